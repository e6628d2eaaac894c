//! What tells one kind from another besides its names: each kind has an entry of functions, and most need few of them.

use serde_json::Value;

use super::names;
use crate::error::Cause;

/// The rules of one kind. What an entry leaves out does nothing.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Rules {
    /// What is wrong with a name.
    pub(super) name: fn(&str) -> Vec<String>,
    /// Sets what a new or changed object leaves out.
    pub(super) defaults: fn(&mut Value),
    /// Sets what only the server decides about a new object, such as its status. Without one there is no status.
    pub(super) create: Option<fn(&mut Value)>,
    /// Puts back (old, new) what an update may not touch and does not complain about.
    pub(super) keep: fn(&Value, &mut Value),
    /// What is wrong with an object.
    pub(super) validate: fn(&Value) -> Vec<Cause>,
    /// What is wrong with a change (old, new).
    pub(super) validate_update: fn(&Value, &Value) -> Vec<Cause>,
    /// Completes a changed status (old, new), and says what is wrong with it.
    pub(super) status: fn(&Value, &mut Value) -> Vec<Cause>,
}

impl Rules {
    /// Rules of a kind without any.
    pub(super) const NONE: Self = Self {
        name: names::dns1123_subdomain,
        defaults: |_| {},
        create: None,
        keep: |_, _| {},
        validate: |_| Vec::new(),
        validate_update: |_, _| Vec::new(),
        status: |_, _| Vec::new(),
    };
}

/// Sets a field that was not given.
pub(super) fn default(object: &mut Value, field: &str, value: impl Into<Value>) {
    if let Some(map) = object.as_object_mut()
        && !map.contains_key(field)
    {
        map.insert(field.to_owned(), value.into());
    }
}

/// The field as an object, made if it is missing; nothing if `object` is none.
pub(super) fn child<'a>(object: &'a mut Value, field: &str) -> Option<&'a mut Value> {
    let child = object
        .as_object_mut()?
        .entry(field)
        .or_insert_with(|| Value::Object(serde_json::Map::new()));
    child.is_object().then_some(child)
}

/// The elements of a list, none if it is none.
pub(super) fn list(value: &Value) -> impl Iterator<Item = &Value> {
    value.as_array().into_iter().flatten()
}

/// The elements of a list field, to be changed.
pub(super) fn list_mut<'a>(object: &'a mut Value, field: &str) -> impl Iterator<Item = &'a mut Value> {
    object
        .get_mut(field)
        .and_then(Value::as_array_mut)
        .into_iter()
        .flatten()
}

/// Refuses a number below zero.
pub(super) fn not_negative(object: &Value, field: &str, path: &str, causes: &mut Vec<Cause>) {
    if object[field].as_i64().is_some_and(|n| n < 0) {
        causes.push(Cause::invalid(
            format!("{path}.{field}"),
            &object[field],
            "must be greater than or equal to 0",
        ));
    }
}

/// Refuses a change of a field.
pub(super) fn immutable(old: &Value, new: &Value, path: &str, causes: &mut Vec<Cause>) {
    if old != new {
        causes.push(Cause::invalid(path, new, "field is immutable"));
    }
}
