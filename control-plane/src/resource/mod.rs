//! What the API serves, and the rules for each kind: defaults, validation, what may change.
//!
//! Objects are JSON values. Before a kind's own rules run, the object is brought into the shape of its OpenAPI schema
//! (see `shape`): values of a wrong type are refused, unknown fields are dropped, so that the rules can rely on types.

mod allocator;
mod kinds;
mod meta;
mod names;
mod pod;
mod registry;
pub(crate) mod schema;
mod service;
mod service_validation;
mod shape;

use serde_json::{Map, Value, json};

pub use allocator::Allocator;
pub use pod::bind;
pub use registry::{RESOURCES, ResourceInfo, SubresourceInfo, find};

use crate::error::{ApiError, Cause};

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
    meta::prepare_create(r, ctx, obj)?;
    let causes = match r.kind {
        "Service" => return service::create(r, ctx.alloc, obj),
        "Pod" => {
            pod::prepare_create(obj);
            pod::validate_spec(&obj["spec"], "spec")
        }
        "Namespace" => {
            kinds::create_namespace(obj);
            Vec::new()
        }
        "Node" => {
            kinds::create_node(obj);
            kinds::validate_node(obj)
        }
        "EndpointSlice" => {
            kinds::slice_defaults(obj);
            kinds::validate_slice(obj)
        }
        "Event" => {
            kinds::event_defaults(obj);
            kinds::validate_event(obj)
        }
        "ReplicationController" => {
            kinds::replication_controller_defaults(obj);
            obj["status"] = json!({"replicas": 0});
            kinds::validate_replication_controller(obj)
        }
        "Secret" => {
            secret_defaults(obj);
            Vec::new()
        }
        _ => {
            if let (true, Some(map)) = (r.has_status, obj.as_object_mut()) {
                map.remove("status");
            }
            Vec::new()
        }
    };
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
    meta::prepare_update(r, old, new)?;
    match subresource {
        Some("status") => return update_status(r, old, new),
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
    let causes = match r.kind {
        "Service" => {
            service::update(r, ctx.alloc, old, new)?;
            meta::bump_generation(r, old, new);
            return Ok(());
        }
        "Pod" => {
            pod::template_defaults(new);
            keep_pod_defaults(old, new);
            pod::validate_update(old, new)
        }
        "Namespace" => {
            // Finalizers of the specification change through `finalize` only.
            copy(old, new, "spec");
            kinds::label_namespace(new);
            Vec::new()
        }
        "Node" => {
            kinds::sync_pod_cidrs(new);
            if new["spec"].is_null() {
                new["spec"] = json!({});
            }
            let mut causes = kinds::validate_node(new);
            causes.extend(kinds::validate_node_update(old, new));
            causes
        }
        "EndpointSlice" => {
            kinds::slice_defaults(new);
            let mut causes = kinds::validate_slice(new);
            causes.extend(kinds::validate_slice_update(old, new));
            causes
        }
        "Event" => {
            kinds::event_defaults(new);
            kinds::validate_event(new)
        }
        "ReplicationController" => {
            kinds::replication_controller_defaults(new);
            kinds::validate_replication_controller(new)
        }
        "Secret" => {
            secret_defaults(new);
            immutable_data(old, new)
        }
        "ConfigMap" => immutable_data(old, new),
        _ => Vec::new(),
    };
    meta::bump_generation(r, old, new);
    let mut all = meta::validate_update(old, new);
    all.extend(meta::validate(r, new));
    all.extend(causes);
    finish(r, new, &all)
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
    let mut causes = Vec::new();
    match r.kind {
        "Service" => service::update_status(r, new)?,
        "Node" => kinds::node_status_defaults(new),
        "Pod" => {
            // The owner and the end of a pod are not for its node to decide.
            if let Some(owners) = old["metadata"].get("ownerReferences") {
                new["metadata"]["ownerReferences"] = owners.clone();
            }
            pod::sync_ips(new);
            pod_condition_defaults(new);
            causes = pod::validate_status(new);
            if new["status"].get("qosClass").is_none() && old["status"].get("qosClass").is_some() {
                new["status"]["qosClass"] = old["status"]["qosClass"].clone();
            }
        }
        _ => {}
    }
    let mut all = meta::validate_update(old, new);
    all.extend(meta::validate(r, new));
    all.append(&mut causes);
    finish(r, new, &all)
}

/// Times of a condition are null rather than missing.
fn pod_condition_defaults(pod: &mut Value) {
    let conditions = pod
        .get_mut("status")
        .and_then(|s| s.get_mut("conditions"))
        .and_then(Value::as_array_mut);
    for condition in conditions.into_iter().flatten().filter_map(Value::as_object_mut) {
        for field in ["lastProbeTime", "lastTransitionTime"] {
            condition.entry(field).or_insert(Value::Null);
        }
    }
}

/// Values that the server chose for a pod stay when an update leaves them out.
fn keep_pod_defaults(old: &Value, new: &mut Value) {
    for field in [
        "enableServiceLinks",
        "serviceAccountName",
        "serviceAccount",
        "priority",
        "preemptionPolicy",
        "tolerations",
        "nodeName",
    ] {
        if new["spec"].get(field).is_none()
            && let Some(value) = old["spec"].get(field)
        {
            new["spec"][field] = value.clone();
        }
    }
}

/// Text values are stored encoded, next to the others.
fn secret_defaults(secret: &mut Value) {
    use base64::Engine as _;
    let Some(map) = secret.as_object_mut() else { return };
    map.entry("type").or_insert_with(|| "Opaque".into());
    let Some(Value::Object(texts)) = map.remove("stringData") else {
        return;
    };
    if let Some(data) = map.entry("data").or_insert_with(|| json!({})).as_object_mut() {
        for (key, text) in texts {
            let encoded = base64::engine::general_purpose::STANDARD.encode(text.as_str().unwrap_or_default());
            data.insert(key, encoded.into());
        }
    }
}

/// ConfigMaps and Secrets can be frozen.
fn immutable_data(old: &Value, new: &Value) -> Vec<Cause> {
    if old["immutable"] != true {
        return Vec::new();
    }
    ["immutable", "data", "binaryData"]
        .iter()
        .filter(|field| old[**field] != new[**field])
        .map(|field| Cause::forbidden(*field, "field is immutable when `immutable` is set"))
        .collect()
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
    if r.group.is_empty() && r.kind == "Service" {
        ctx.alloc.release(old);
    }
}

#[cfg(test)]
mod tests;
