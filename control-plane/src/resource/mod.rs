//! What the API serves, and the rules for each kind: defaults, validation, what may change.
//!
//! Objects are JSON values. Before a kind's own rules run, the object is brought into the shape of its OpenAPI schema
//! (see `shape`): values of a wrong type are refused, unknown fields are dropped, so that the rules can rely on types.

mod allocator;
mod config;
mod kinds;
mod meta;
mod names;
mod network;
mod pod;
mod rbac;
mod registry;
mod rules;
pub(crate) mod schema;
mod service;
mod service_validation;
mod shape;
mod workloads;

use serde_json::{Map, Value};

pub use allocator::{Allocator, allocated};
pub use pod::bind;
pub use registry::{RESOURCES, ResourceInfo, SubresourceInfo, find};

use crate::error::{ApiError, Cause};
use crate::fields::{self, Manager};

/// What is wrong with the key of a label; nothing if it is right.
pub(crate) fn label_key_errors(key: &str) -> Vec<String> {
    names::qualified_name(key)
}

/// What is wrong with the value of a label; nothing if it is right.
pub(crate) fn label_value_errors(value: &str) -> Vec<String> {
    names::label_value(value)
}

/// What to do about fields that the schema does not know (query parameter `fieldValidation`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum FieldValidation {
    /// Drop them silently.
    Ignore,
    /// Drop them and answer with a warning for each. The API's default.
    #[default]
    Warn,
    /// Refuse the request.
    Strict,
}

impl FieldValidation {
    /// Reads the query parameter; an empty one means the default.
    ///
    /// # Errors
    /// Bad request for any other word.
    pub fn parse(s: &str) -> Result<Self, ApiError> {
        match s {
            "" | "Warn" => Ok(Self::Warn),
            "Ignore" => Ok(Self::Ignore),
            "Strict" => Ok(Self::Strict),
            other => Err(ApiError::bad_request(format!(
                "fieldValidation parameter {other:?} invalid: must be one of Ignore, Warn, Strict"
            ))),
        }
    }
}

/// What a rule may look at and change besides the object itself.
pub struct Ctx<'a> {
    /// Time of the request, RFC 3339 with seconds, UTC.
    pub now: String,
    /// Identifier for a new object.
    pub uid: String,
    /// The namespace of the request as it is stored; `None` if it does not exist or the kind has none.
    pub namespace_state: Option<&'a Value>,
    /// Cluster addresses and node ports.
    pub alloc: &'a mut Allocator,
    /// What to do about unknown fields.
    pub field_validation: FieldValidation,
    /// Texts for `Warning` headers are added here.
    pub warnings: &'a mut Vec<String>,
    /// Who will own what the object's fields are.
    pub ownership: &'a Ownership,
}

/// What a write does to `metadata.managedFields`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Ownership {
    /// Nothing: the server's own writes.
    #[default]
    Keep,
    /// The object already says who owns what: the result of an apply.
    Given,
    /// The manager gets what it sets or changes.
    Of(Manager),
}

/// Checks and completes an object that is to be created.
///
/// Service addresses and ports are taken from `ctx.alloc`; the caller wraps the call in [`Allocator::begin`] and
/// [`Allocator::commit`] or [`Allocator::rollback`] (also when this function fails).
///
/// # Errors
/// The answer to give to the client.
pub fn prepare_create(r: &ResourceInfo, ctx: &mut Ctx<'_>, obj: &mut Value) -> Result<(), ApiError> {
    decode(r, ctx, obj)?;
    let managed = match ctx.ownership {
        Ownership::Keep => None,
        Ownership::Given => obj["metadata"].get("managedFields").cloned(),
        Ownership::Of(manager) => {
            let mut completed = obj.clone();
            complete(r, &mut completed)?;
            Some(fields::created(r, &completed, manager))
        }
    };
    meta::prepare_create(r, ctx, obj)?;
    set_managed(obj, managed);
    if r.is("", "Service") {
        return service::create(r, ctx.alloc, obj);
    }
    (r.rules.defaults)(obj);
    match r.rules.create {
        Some(create) => create(obj),
        None => {
            if let (true, Some(map)) = (r.has_status, obj.as_object_mut()) {
                map.remove("status");
            }
        }
    }
    let causes = (r.rules.validate)(obj);
    let mut all = meta::validate(r, obj);
    all.extend(causes);
    finish(r, obj, &all)
}

/// Checks and completes `new`, which is to replace `old`, through the resource itself or one of its subresources.
/// Allocations: as for [`prepare_create`].
///
/// # Errors
/// The answer to give to the client.
pub fn prepare_update(
    r: &ResourceInfo,
    ctx: &mut Ctx<'_>,
    old: &Value,
    new: &mut Value,
    subresource: Option<&str>,
) -> Result<(), ApiError> {
    decode(r, ctx, new)?;
    let given = new["metadata"].get("managedFields").cloned();
    let managed = match ctx.ownership {
        Ownership::Given => given,
        Ownership::Of(manager) if subresource.is_none() => {
            let mut completed = new.clone();
            complete(r, &mut completed)?;
            fields::updated(r, old, &completed, &given.unwrap_or_default(), manager)
        }
        _ => old["metadata"].get("managedFields").cloned(),
    };
    meta::prepare_update(r, old, new)?;
    set_managed(new, managed);
    match subresource {
        Some("status") => {
            update_status(r, old, new)?;
            if let Ownership::Of(manager) = ctx.ownership {
                let managed = fields::updated(r, old, new, &Value::Null, manager);
                set_managed(new, managed);
            }
            return Ok(());
        }
        Some("finalize") => {
            let finalizers = new["spec"]["finalizers"].take();
            let mut spec = Map::new();
            if finalizers.as_array().is_some_and(|f| !f.is_empty()) {
                spec.insert("finalizers".into(), finalizers);
            }
            keep_all_but(old, new, &["metadata"]);
            new["spec"] = spec.into();
            return Ok(());
        }
        _ => {}
    }
    if r.has_status {
        copy(old, new, "status");
    }
    if r.is("", "Service") {
        service::update(r, ctx.alloc, old, new)?;
        meta::bump_generation(r, old, new);
        return Ok(());
    }
    (r.rules.keep)(old, new);
    (r.rules.defaults)(new);
    let mut causes = (r.rules.validate)(new);
    causes.extend((r.rules.validate_update)(old, new));
    meta::bump_generation(r, old, new);
    let mut all = meta::validate_update(old, new);
    all.extend(meta::validate(r, new));
    all.extend(causes);
    finish(r, new, &all)
}

/// Sets the defaults of the kind's version, as decoding does, before the server decides anything.
fn complete(r: &ResourceInfo, object: &mut Value) -> Result<(), ApiError> {
    if r.is("", "Service") {
        return service::complete(object);
    }
    (r.rules.defaults)(object);
    Ok(())
}

fn set_managed(object: &mut Value, managed: Option<Value>) {
    let Some(metadata) = meta::metadata_mut(object) else {
        return;
    };
    match managed.filter(|list| list.as_array().is_some_and(|list| !list.is_empty())) {
        Some(managed) => metadata.insert("managedFields".into(), managed),
        None => metadata.remove("managedFields"),
    };
}

/// Fields of a node's status that are always there.
pub(crate) fn complete_node_status(node: &mut Value) {
    kinds::node_status_defaults(node);
}

/// The paths of fields in `object` that the kind does not have.
///
/// # Errors
/// The text of the first value of a wrong type.
pub(crate) fn unknown_fields(r: &ResourceInfo, object: &Value) -> Result<Vec<String>, String> {
    shape::shape(r.schema, &mut object.clone())
}

/// Turns what a client sent into an object of the kind, as decoding does.
fn decode(r: &ResourceInfo, ctx: &mut Ctx<'_>, obj: &mut Value) -> Result<(), ApiError> {
    let cannot = |why: &str| {
        ApiError::bad_request(format!(
            "{} in version {:?} cannot be handled as a {}: {why}",
            r.kind, r.version, r.kind
        ))
    };
    if let Some(map) = obj.as_object() {
        let text = |field: &str| map.get(field).and_then(Value::as_str).unwrap_or_default();
        let (version, kind) = (text("apiVersion"), text("kind"));
        let expected = r.api_version();
        if !kind.is_empty() && kind != r.kind {
            return Err(ApiError::bad_request(format!(
                "{kind} in version {:?} cannot be handled as a {}: converting ({version}.{kind}) to ({expected}.{}): \
                 unknown conversion",
                if version.is_empty() {
                    expected.as_str()
                } else {
                    version
                },
                r.kind,
                r.kind
            )));
        }
        if !version.is_empty() && version != expected {
            return Err(ApiError::bad_request(format!(
                "the API version in the data ({version}) does not match the expected API version ({expected})"
            )));
        }
    }
    let unknown = shape::shape(r.schema, obj).map_err(|e| cannot(&e))?;
    let messages = unknown.iter().map(|path| format!("unknown field {path:?}"));
    match ctx.field_validation {
        FieldValidation::Ignore => {}
        FieldValidation::Warn => ctx.warnings.extend(messages),
        FieldValidation::Strict if unknown.is_empty() => {}
        FieldValidation::Strict => {
            let list: Vec<String> = messages.collect();
            return Err(cannot(&format!("strict decoding error: {}", list.join(", "))));
        }
    }
    if let Some(map) = obj.as_object_mut() {
        map.insert("apiVersion".into(), r.api_version().into());
        map.insert("kind".into(), r.kind.into());
    }
    Ok(())
}

/// An update of `/status`: everything but status and metadata stays.
fn update_status(r: &ResourceInfo, old: &Value, new: &mut Value) -> Result<(), ApiError> {
    keep_all_but(old, new, &["metadata", "status"]);
    if r.is("", "Service") {
        service::update_status(r, new)?;
    }
    let mut causes = (r.rules.status)(old, new);
    let mut all = meta::validate_update(old, new);
    all.extend(meta::validate(r, new));
    all.append(&mut causes);
    finish(r, new, &all)
}

/// Takes every field from `old` except those named.
fn keep_all_but(old: &Value, new: &mut Value, fields: &[&str]) {
    let (Some(old), Some(new)) = (old.as_object(), new.as_object_mut()) else {
        return;
    };
    new.retain(|key, _| fields.contains(&key.as_str()));
    for (key, value) in old {
        if !fields.contains(&key.as_str()) {
            new.insert(key.clone(), value.clone());
        }
    }
}

/// Takes one field from `old`, or removes it.
fn copy(old: &Value, new: &mut Value, field: &str) {
    let Some(new) = new.as_object_mut() else { return };
    match old.get(field) {
        Some(value) => {
            new.insert(field.into(), value.clone());
        }
        None => {
            new.remove(field);
        }
    }
}

fn finish(r: &ResourceInfo, obj: &Value, causes: &[Cause]) -> Result<(), ApiError> {
    if causes.is_empty() {
        Ok(())
    } else {
        Err(ApiError::invalid(r, meta::name(obj), causes))
    }
}

/// Gives back what the deleted object held.
pub fn after_delete(r: &ResourceInfo, ctx: &mut Ctx<'_>, old: &Value) {
    if r.is("", "Service") {
        ctx.alloc.release(old);
    }
}

#[cfg(test)]
mod kind_tests;
#[cfg(test)]
mod tests;
