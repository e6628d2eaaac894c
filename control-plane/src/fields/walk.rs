//! Walks of typed values: which paths they have, how two differ, one laid over another, paths taken out.

use std::collections::BTreeMap;

use serde_json::{Map, Value};

use super::set::{Set, field, readable};
use super::types::{Elements, Type};

/// How two values differ.
#[derive(Debug, Default)]
pub(super) struct Difference {
    pub(super) added: Set,
    pub(super) changed: Set,
    pub(super) removed: Set,
}

/// The paths of a value that its writer has an opinion on.
pub(super) fn field_set(ty: Type<'_>, value: &Value) -> Set {
    let mut set = Set::default();
    collect(ty, value, &mut Vec::new(), &mut set);
    set
}

fn collect(ty: Type<'_>, value: &Value, path: &mut Vec<String>, set: &mut Set) {
    match ty {
        Type::Leaf => set.insert(path),
        Type::Struct(..) | Type::Map(..) => {
            for (key, item) in value.as_object().into_iter().flatten() {
                path.push(field(key));
                collect(ty.field(key), item, path, set);
                if item.is_null() || item.as_object().is_some_and(Map::is_empty) || !ty.has_field(key) {
                    set.insert(path);
                }
                path.pop();
            }
        }
        Type::List(elements, ..) => {
            for item in value.as_array().into_iter().flatten() {
                path.push(elements.edge(item));
                collect(ty.element(), item, path, set);
                set.insert(path);
                path.pop();
            }
        }
    }
}

/// How `new` differs from `old`.
pub(super) fn compare(ty: Type<'_>, old: &Value, new: &Value) -> Difference {
    let mut difference = Difference::default();
    walk(ty, Some(old), Some(new), &mut Vec::new(), &mut difference);
    difference
}

fn empty(value: Option<&Value>) -> bool {
    match value {
        None | Some(Value::Null) => true,
        Some(Value::Object(map)) => map.is_empty(),
        Some(Value::Array(list)) => list.is_empty(),
        Some(_) => false,
    }
}

fn walk(
    ty: Type<'_>,
    old: Option<&Value>,
    new: Option<&Value>,
    path: &mut Vec<String>,
    out: &mut Difference,
) {
    let whole = matches!(ty, Type::Leaf) || empty(old) && empty(new);
    match (old, new) {
        (None, None) => return,
        (None, Some(_)) => out.added.insert(path),
        (Some(_), None) => out.removed.insert(path),
        (Some(old), Some(new)) if whole && old != new => out.changed.insert(path),
        _ => {}
    }
    if whole {
        return;
    }
    match ty {
        Type::Leaf => {}
        Type::Struct(..) | Type::Map(..) => {
            let (old, new) = (old.and_then(Value::as_object), new.and_then(Value::as_object));
            for key in old.into_iter().flat_map(Map::keys) {
                path.push(field(key));
                let after = new.and_then(|map| map.get(key));
                walk(ty.field(key), old.and_then(|map| map.get(key)), after, path, out);
                path.pop();
            }
            for (key, value) in new.into_iter().flatten() {
                if old.is_none_or(|map| !map.contains_key(key)) {
                    path.push(field(key));
                    walk(ty.field(key), None, Some(value), path, out);
                    path.pop();
                }
            }
        }
        Type::List(elements, ..) => {
            let (old, new) = (by_edge(elements, old), by_edge(elements, new));
            for (edge, before) in &old {
                path.push(edge.clone());
                match (before.as_slice(), new.get(edge).map(Vec::as_slice)) {
                    ([before], Some([after])) => walk(ty.element(), Some(before), Some(after), path, out),
                    ([before], None) => walk(ty.element(), Some(before), None, path, out),
                    // Elements that cannot be told apart are one value.
                    (_, None) => out.removed.insert(path),
                    (before, Some(after)) if before != after => out.changed.insert(path),
                    _ => {}
                }
                path.pop();
            }
            for (edge, after) in &new {
                if old.contains_key(edge) {
                    continue;
                }
                path.push(edge.clone());
                match after.as_slice() {
                    [after] => walk(ty.element(), None, Some(after), path, out),
                    _ => out.added.insert(path),
                }
                path.pop();
            }
        }
    }
}

fn by_edge(elements: Elements, list: Option<&Value>) -> BTreeMap<String, Vec<&Value>> {
    let mut found: BTreeMap<String, Vec<&Value>> = BTreeMap::new();
    for item in list.and_then(Value::as_array).into_iter().flatten() {
        found.entry(elements.edge(item)).or_default().push(item);
    }
    found
}

/// The path of the first list that has two elements of one identity.
pub(super) fn duplicate(ty: Type<'_>, value: &Value, path: &str) -> Option<String> {
    match ty {
        Type::Leaf => None,
        Type::Struct(..) | Type::Map(..) => value
            .as_object()?
            .iter()
            .find_map(|(key, item)| duplicate(ty.field(key), item, &format!("{path}.{key}"))),
        Type::List(elements, ..) => {
            if let Some((edge, _)) = by_edge(elements, Some(value)).iter().find(|(_, v)| v.len() > 1) {
                return Some(format!("{path}: duplicate entries for key {}", readable(edge)));
            }
            value.as_array()?.iter().find_map(|item| {
                duplicate(
                    ty.element(),
                    item,
                    &format!("{path}{}", readable(&elements.edge(item))),
                )
            })
        }
    }
}

/// `over` laid over `base`.
pub(super) fn merge(ty: Type<'_>, base: Option<&Value>, over: &Value) -> Value {
    let Some(base) = base else {
        return over.clone();
    };
    match (ty, base, over) {
        (Type::Struct(..) | Type::Map(..) | Type::List(..), base, Value::Null) => base.clone(),
        (Type::Struct(..) | Type::Map(..), Value::Object(base), Value::Object(over)) => {
            let mut merged = base.clone();
            for (key, value) in over {
                merged.insert(key.clone(), merge(ty.field(key), base.get(key), value));
            }
            merged.into()
        }
        (Type::List(elements, ..), Value::Array(base), Value::Array(over)) => {
            merge_list(ty, elements, base, over).into()
        }
        _ => over.clone(),
    }
}

/// The elements of `over` in their order; others stay before the element that they were before.
fn merge_list(ty: Type<'_>, elements: Elements, base: &[Value], over: &[Value]) -> Vec<Value> {
    let over_edges: Vec<String> = over.iter().map(|item| elements.edge(item)).collect();
    let base_edges: Vec<String> = base.iter().map(|item| elements.edge(item)).collect();
    let mut merged = Vec::with_capacity(base.len() + over.len());
    let mut kept = base.iter().zip(&base_edges).peekable();
    for (item, edge) in over.iter().zip(&over_edges) {
        while let Some((other, _)) = kept.next_if(|(_, edge)| !over_edges.contains(edge)) {
            merged.push(other.clone());
        }
        let before = base_edges
            .iter()
            .position(|other| other == edge)
            .and_then(|at| base.get(at));
        if before.is_some() {
            // The place of an element that comes from `over`.
            kept.next();
        }
        merged.push(merge(ty.element(), before, item));
    }
    merged.extend(
        kept.filter(|(_, edge)| !over_edges.contains(edge))
            .map(|(item, _)| item.clone()),
    );
    merged
}

/// The value without the paths of the set; what loses all that it holds is null.
pub(super) fn remove(ty: Type<'_>, value: &Value, gone: &Set) -> Value {
    match (ty, value) {
        (Type::Struct(..) | Type::Map(..), Value::Object(map)) => {
            let mut left = Map::new();
            for (key, item) in map {
                match gone.0.get(&field(key)) {
                    Some(node) if node.member => {}
                    Some(node) => {
                        left.insert(key.clone(), remove(ty.field(key), item, &node.below));
                    }
                    None => {
                        left.insert(key.clone(), item.clone());
                    }
                }
            }
            if left.is_empty() && !map.is_empty() {
                Value::Null
            } else {
                left.into()
            }
        }
        (Type::List(elements, ..), Value::Array(list)) => {
            let left: Vec<Value> = list
                .iter()
                .filter_map(|item| match gone.0.get(&elements.edge(item)) {
                    Some(node) if node.member => None,
                    Some(node) => Some(remove(ty.element(), item, &node.below)),
                    None => Some(item.clone()),
                })
                .collect();
            if left.is_empty() && !list.is_empty() {
                Value::Null
            } else {
                left.into()
            }
        }
        (_, value) => value.clone(),
    }
}

/// The set with every structure's field on the way to a path as a path of its own.
pub(super) fn with_parents(ty: Type<'_>, set: &Set) -> Set {
    let mut result = set.clone();
    for (edge, node) in &mut result.0 {
        let named = edge.strip_prefix("f:").is_some_and(|name| ty.has_field(name));
        if named && !node.below.is_empty() {
            node.member = true;
        }
        node.below = with_parents(ty.below(edge), &node.below);
    }
    result
}
