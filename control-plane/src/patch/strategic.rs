//! Strategic merge patch (apimachinery `util/strategicpatch`): a merge patch that knows which lists are sets or maps.

use serde_json::{Map, Value};

use super::keys::{Strategy, strategy};
use crate::resource::schema;

const PATCH: &str = "$patch";
const RETAIN_KEYS: &str = "$retainKeys";
const SET_ELEMENT_ORDER: &str = "$setElementOrder/";
const DELETE_FROM_PRIMITIVE_LIST: &str = "$deleteFromPrimitiveList/";

/// Name of the schema of a field, which may be a list or map of it; empty when it has none of its own.
fn field_type<'a>(type_name: &str, field: &str) -> &'a str {
    schema::named(type_name)
        .and_then(|s| s.get("properties")?.get(field))
        .and_then(|f| {
            schema::reference(f)
                .or_else(|| schema::reference(f.get("items")?))
                .or_else(|| schema::reference(f.get("additionalProperties")?))
        })
        .unwrap_or_default()
}

/// Merges `patch` into `original`, an object of the named schema.
///
/// # Errors
/// What is wrong with the patch.
pub(super) fn merge(
    type_name: &str,
    original: Map<String, Value>,
    patch: Map<String, Value>,
) -> Result<Map<String, Value>, String> {
    let mut original = original;
    let mut patch = patch;
    match patch.remove(PATCH) {
        None => {}
        Some(Value::String(directive)) => match directive.as_str() {
            "replace" => return Ok(patch),
            "delete" => return Ok(Map::new()),
            "merge" => {}
            other => return Err(format!("unknown patch type found: {other}")),
        },
        Some(other) => return Err(format!("unknown patch type found: {other}")),
    }
    retain_keys(&mut original, &mut patch)?;
    set_element_orders(type_name, &mut original, &mut patch)?;
    for (key, value) in patch {
        if let Some(field) = key.strip_prefix(DELETE_FROM_PRIMITIVE_LIST) {
            let Value::Array(gone) = value else {
                return Err(format!("{key} must be a list"));
            };
            if let Some(list) = original.get_mut(field).and_then(Value::as_array_mut) {
                list.retain(|v| !gone.contains(v));
            }
            continue;
        }
        if value.is_null() {
            original.remove(&key);
            continue;
        }
        let before = original.remove(&key);
        let merged = merge_field(type_name, &key, before, value)?;
        original.insert(key, merged);
    }
    Ok(original)
}

fn merge_field(type_name: &str, field: &str, before: Option<Value>, patch: Value) -> Result<Value, String> {
    let inner = field_type(type_name, field);
    match patch {
        Value::Object(patch) => {
            let before = match before {
                Some(Value::Object(map)) => map,
                _ => Map::new(),
            };
            Ok(merge(inner, before, patch)?.into())
        }
        Value::Array(patch) => {
            let before = match before {
                Some(Value::Array(list)) => list,
                _ => Vec::new(),
            };
            Ok(merge_list(inner, strategy(type_name, field), &before, patch)?.into())
        }
        plain => Ok(plain),
    }
}

/// Only the named keys of the original survive: one of several alternatives, such as the source of a volume.
fn retain_keys(original: &mut Map<String, Value>, patch: &mut Map<String, Value>) -> Result<(), String> {
    let Some(list) = patch.remove(RETAIN_KEYS) else {
        return Ok(());
    };
    let Value::Array(list) = list else {
        return Err(format!("{RETAIN_KEYS} must be a list"));
    };
    let keeps = |key: &str| list.iter().any(|k| k.as_str() == Some(key));
    if let Some(key) = patch
        .iter()
        .find(|(k, v)| !v.is_null() && !k.starts_with('$') && !keeps(k))
    {
        return Err(format!(
            "{RETAIN_KEYS} does not name {}, which the patch sets",
            key.0
        ));
    }
    original.retain(|key, _| keeps(key));
    Ok(())
}

/// Merges the lists whose order the patch gives, and orders them.
fn set_element_orders(
    type_name: &str,
    original: &mut Map<String, Value>,
    patch: &mut Map<String, Value>,
) -> Result<(), String> {
    let directives: Vec<String> = patch
        .keys()
        .filter(|k| k.starts_with(SET_ELEMENT_ORDER))
        .cloned()
        .collect();
    for directive in directives {
        let Some(Value::Array(order)) = patch.remove(&directive) else {
            return Err(format!("{directive} must be a list"));
        };
        let field = directive.strip_prefix(SET_ELEMENT_ORDER).unwrap_or_default();
        let gone = patch.remove(&format!("{DELETE_FROM_PRIMITIVE_LIST}{field}"));
        let given = patch.remove(field);
        if given.as_ref().is_some_and(Value::is_null) {
            original.remove(field);
            continue;
        }
        let before = match original.remove(field) {
            Some(Value::Array(list)) => list,
            _ if given.is_none() => continue,
            _ => Vec::new(),
        };
        let how = strategy(type_name, field);
        let mut merged = match given {
            None => before.clone(),
            Some(Value::Array(list)) => merge_list(field_type(type_name, field), how, &before, list)?,
            Some(_) => return Err(format!("{field} must be a list")),
        };
        if let Some(Value::Array(gone)) = gone {
            merged.retain(|v| !gone.contains(v));
        }
        original.insert(field.to_owned(), order_list(how, merged, &order, &before).into());
    }
    Ok(())
}

/// Whether two elements of a list are the same one.
fn same(how: Strategy, a: &Value, b: &Value) -> bool {
    match how {
        Strategy::Union => a == b,
        Strategy::ByKey(key) => a.get(key).is_some() && a.get(key) == b.get(key),
    }
}

fn position(how: Strategy, list: &[Value], item: &Value) -> Option<usize> {
    list.iter().position(|other| same(how, other, item))
}

/// Items named in `order` in that order; the others where they were relative to them, and after them when unknown.
fn order_list(how: Option<Strategy>, items: Vec<Value>, order: &[Value], before: &[Value]) -> Vec<Value> {
    let Some(how) = how else { return items };
    let (mut named, mut others): (Vec<Value>, Vec<Value>) = items
        .into_iter()
        .partition(|item| position(how, order, item).is_some());
    named.sort_by_key(|item| position(how, order, item));
    others.sort_by_key(|item| position(how, before, item));
    let mut result = Vec::with_capacity(named.len() + others.len());
    let mut named = named.into_iter().peekable();
    let mut others = others.into_iter().peekable();
    loop {
        let other_first = match (others.peek(), named.peek()) {
            (None, None) => return result,
            (Some(_), None) => true,
            (None, Some(_)) => false,
            (Some(other), Some(name)) => match (position(how, before, other), position(how, before, name)) {
                (Some(a), Some(b)) => a < b,
                _ => false,
            },
        };
        result.extend(if other_first { others.next() } else { named.next() });
    }
}

fn merge_list(
    inner: &str,
    how: Option<Strategy>,
    before: &[Value],
    patch: Vec<Value>,
) -> Result<Vec<Value>, String> {
    let Some(how) = how else {
        // The list is one value; nulls and directives inside it have nothing to act on.
        return patch.into_iter().map(|item| clean(inner, item)).collect();
    };
    let Strategy::ByKey(key) = how else {
        let mut merged = before.to_vec();
        for item in &patch {
            if !merged.contains(item) {
                merged.push(item.clone());
            }
        }
        return Ok(order_list(Some(how), merged, &patch, before));
    };
    let mut merged = before.to_vec();
    let mut changes = Vec::new();
    let mut replace = false;
    for item in patch {
        let Value::Object(mut item) = item else {
            return Err(format!(
                "a list merged by {key:?} holds {item}, which is no object"
            ));
        };
        match item.get(PATCH).and_then(Value::as_str) {
            Some("replace") => {
                item.remove(PATCH);
                replace = true;
                // The directive alone, or on an element that is part of the new list.
                if !item.is_empty() {
                    changes.push(item);
                }
            }
            Some("delete") => {
                let item = Value::Object(item);
                if item.get(key).is_none() {
                    return Err(missing_key(key, &item));
                }
                merged.retain(|other| !same(how, other, &item));
            }
            Some("merge") | None => changes.push(item),
            Some(other) => return Err(format!("unknown patch type found: {other}")),
        }
    }
    if replace {
        return changes
            .into_iter()
            .map(|item| clean(inner, Value::Object(item)))
            .collect();
    }
    let order: Vec<Value> = changes.iter().cloned().map(Value::Object).collect();
    for item in changes {
        let wanted = Value::Object(item.clone());
        if wanted.get(key).is_none() {
            return Err(missing_key(key, &wanted));
        }
        match merged.iter_mut().find(|other| same(how, other, &wanted)) {
            Some(slot) => {
                let before = slot.as_object().cloned().unwrap_or_default();
                *slot = merge(inner, before, item)?.into();
            }
            None => merged.push(merge(inner, Map::new(), item)?.into()),
        }
    }
    Ok(order_list(Some(how), merged, &order, before))
}

fn missing_key(key: &str, item: &Value) -> String {
    format!("map: {item} does not contain declared merge key: {key}")
}

/// An element without nulls and directives.
fn clean(inner: &str, item: Value) -> Result<Value, String> {
    match item {
        Value::Object(map) => Ok(merge(inner, Map::new(), map)?.into()),
        other => Ok(other),
    }
}
