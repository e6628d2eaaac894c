//! `metadata`: what the server sets, what may change, what is valid (apimachinery `api/validation/objectmeta.go`).

use rand::Rng;
use serde_json::{Map, Value, json};

use super::{Ctx, ResourceInfo, names};
use crate::error::{ApiError, Cause};

/// All annotations of an object together, in bytes.
const ANNOTATIONS_LIMIT: usize = 256 * 1024;

/// Letters that make no words, as Kubernetes uses for generated names.
const SUFFIX_LETTERS: &[u8] = b"bcdfghjklmnpqrstvwxz2456789";
const SUFFIX_LENGTH: usize = 5;

/// `metadata` of the object, created if it is missing.
pub(super) fn metadata_mut(object: &mut Value) -> Option<&mut Map<String, Value>> {
    let map = object.as_object_mut()?;
    let meta = map.entry("metadata").or_insert_with(|| json!({}));
    if !meta.is_object() {
        *meta = json!({});
    }
    meta.as_object_mut()
}

/// `metadata.name`, or nothing.
pub(super) fn name(object: &Value) -> &str {
    object["metadata"]["name"].as_str().unwrap_or_default()
}

/// Fills in what the server decides about a new object.
pub(super) fn prepare_create(r: &ResourceInfo, ctx: &Ctx<'_>, object: &mut Value) -> Result<(), ApiError> {
    let wanted_namespace = object["metadata"]["namespace"]
        .as_str()
        .unwrap_or_default()
        .to_owned();
    let namespace = if r.namespaced {
        let Some(state) = ctx.namespace_state else {
            return Err(ApiError::not_found(
                &super::registry::NAMESPACES,
                &wanted_namespace,
            ));
        };
        let namespace = name(state).to_owned();
        if !wanted_namespace.is_empty() && wanted_namespace != namespace {
            return Err(ApiError::bad_request(
                "the namespace of the provided object does not match the namespace sent on the request",
            ));
        }
        if state["metadata"].get("deletionTimestamp").is_some() || state["status"]["phase"] == "Terminating" {
            return Err(ApiError::namespace_terminating(r, name(object), &namespace));
        }
        Some(namespace)
    } else {
        if !wanted_namespace.is_empty() {
            return Err(ApiError::bad_request("namespace is not allowed on this type"));
        }
        None
    };
    let Some(meta) = metadata_mut(object) else {
        return Err(ApiError::bad_request("the object provided is no JSON object"));
    };
    if meta
        .get("resourceVersion")
        .and_then(Value::as_str)
        .is_some_and(|rv| !rv.is_empty())
    {
        return Err(ApiError::bad_request(
            "resourceVersion should not be set on objects to be created",
        ));
    }
    for field in [
        "resourceVersion",
        "managedFields",
        "selfLink",
        "deletionTimestamp",
        "deletionGracePeriodSeconds",
        "generation",
    ] {
        meta.remove(field);
    }
    if !meta.contains_key("name")
        && let Some(prefix) = meta.get("generateName").and_then(Value::as_str)
    {
        let generated = generate_name(prefix);
        meta.insert("name".into(), generated.into());
    }
    if let Some(namespace) = namespace {
        meta.insert("namespace".into(), namespace.into());
    }
    meta.insert("uid".into(), ctx.uid.clone().into());
    meta.insert("creationTimestamp".into(), ctx.now.clone().into());
    if r.has_generation {
        meta.insert("generation".into(), 1.into());
    }
    Ok(())
}

/// A prefix, cut to leave room, and five random letters.
fn generate_name(prefix: &str) -> String {
    let mut end = prefix.len().min(63 - SUFFIX_LENGTH);
    while !prefix.is_char_boundary(end) {
        end -= 1;
    }
    let mut name = prefix.get(..end).unwrap_or_default().to_owned();
    let mut rng = rand::rng();
    for _ in 0..SUFFIX_LENGTH {
        let letter = SUFFIX_LETTERS
            .get(rng.random_range(0..SUFFIX_LETTERS.len()))
            .copied()
            .unwrap_or(b'x');
        name.push(char::from(letter));
    }
    name
}

/// Puts back what an update may not change, and refuses updates of another object or another version of it.
pub(super) fn prepare_update(r: &ResourceInfo, old: &Value, new: &mut Value) -> Result<(), ApiError> {
    let old_meta = &old["metadata"];
    let object_name = name(old).to_owned();
    let Some(meta) = metadata_mut(new) else {
        return Err(ApiError::bad_request("the object provided is no JSON object"));
    };
    let given = |meta: &Map<String, Value>, field: &str| -> String {
        meta.get(field)
            .and_then(Value::as_str)
            .unwrap_or_default()
            .to_owned()
    };
    let new_name = given(meta, "name");
    if !new_name.is_empty() && new_name != object_name {
        return Err(ApiError::bad_request(format!(
            "the name of the object ({new_name}) does not match the name on the URL ({object_name})"
        )));
    }
    let namespace = old_meta["namespace"].as_str().unwrap_or_default();
    let new_namespace = given(meta, "namespace");
    if !new_namespace.is_empty() && new_namespace != namespace {
        return Err(ApiError::bad_request(format!(
            "the namespace of the object ({new_namespace}) does not match the namespace on the URL ({namespace})"
        )));
    }
    let old_uid = old_meta["uid"].as_str().unwrap_or_default();
    let new_uid = given(meta, "uid");
    if !new_uid.is_empty() && new_uid != old_uid {
        return Err(ApiError::conflict_because(
            r,
            &object_name,
            &format!("Precondition failed: UID in precondition: {new_uid}, UID in object meta: {old_uid}"),
        ));
    }
    let old_version = old_meta["resourceVersion"].as_str().unwrap_or_default();
    let new_version = given(meta, "resourceVersion");
    if !new_version.is_empty() && !old_version.is_empty() && new_version != old_version {
        return Err(ApiError::conflict(r, &object_name));
    }
    meta.remove("managedFields");
    for field in [
        "name",
        "namespace",
        "uid",
        "resourceVersion",
        "creationTimestamp",
        "deletionTimestamp",
        "deletionGracePeriodSeconds",
        "generateName",
        "generation",
        "selfLink",
    ] {
        match old_meta.get(field) {
            Some(value) => {
                meta.insert(field.into(), value.clone());
            }
            None => {
                meta.remove(field);
            }
        }
    }
    Ok(())
}

/// Counts a change of the specification: of anything but metadata and status.
pub(super) fn bump_generation(r: &ResourceInfo, old: &Value, new: &mut Value) {
    if !r.has_generation {
        return;
    }
    let content = |object: &Value| -> Map<String, Value> {
        let mut map = object.as_object().cloned().unwrap_or_default();
        for field in ["metadata", "status", "apiVersion", "kind"] {
            map.remove(field);
        }
        map
    };
    // Labels and annotations of an EndpointSlice count as well (registry/discovery/endpointslice/strategy.go).
    let metadata_counts = r.kind == "EndpointSlice"
        && ["labels", "annotations"]
            .iter()
            .any(|f| old["metadata"].get(f) != new["metadata"].get(f));
    if metadata_counts || content(old) != content(new) {
        let generation = old["metadata"]["generation"].as_i64().unwrap_or(0);
        if let Some(meta) = metadata_mut(new) {
            meta.insert("generation".into(), generation.saturating_add(1).into());
        }
    }
}

/// What is wrong with the metadata of a new or changed object.
pub(super) fn validate(r: &ResourceInfo, object: &Value) -> Vec<Cause> {
    let mut causes = Vec::new();
    let meta = &object["metadata"];
    if let Some(prefix) = meta["generateName"].as_str() {
        // A prefix may end in what a name may not.
        let probe = format!("{}a", prefix.trim_end_matches('-'));
        for why in check_name(r, &probe) {
            causes.push(Cause::invalid("metadata.generateName", &prefix.into(), &why));
        }
    }
    match meta["name"].as_str().filter(|n| !n.is_empty()) {
        None => causes.push(Cause::required(
            "metadata.name",
            "name or generateName is required",
        )),
        Some(name) => {
            for why in check_name(r, name) {
                causes.push(Cause::invalid("metadata.name", &name.into(), &why));
            }
        }
    }
    labels(&meta["labels"], "metadata.labels", &mut causes);
    let mut total = 0;
    for (key, value) in meta["annotations"].as_object().into_iter().flatten() {
        for why in names::qualified_name(&key.to_lowercase()) {
            causes.push(Cause::invalid("metadata.annotations", &key.as_str().into(), &why));
        }
        total += key.len() + value.as_str().map_or(0, str::len);
    }
    if total > ANNOTATIONS_LIMIT {
        causes.push(Cause::too_long("metadata.annotations", ANNOTATIONS_LIMIT));
    }
    for finalizer in meta["finalizers"].as_array().into_iter().flatten() {
        let text = finalizer.as_str().unwrap_or_default();
        for why in names::qualified_name(text) {
            causes.push(Cause::invalid("metadata.finalizers", finalizer, &why));
        }
    }
    for (i, owner) in meta["ownerReferences"]
        .as_array()
        .into_iter()
        .flatten()
        .enumerate()
    {
        let field = format!("metadata.ownerReferences[{i}]");
        for (key, why) in [
            ("apiVersion", "version must not be empty"),
            ("kind", "must not be empty"),
            ("name", "must not be empty"),
            ("uid", "must not be empty"),
        ] {
            if owner[key].as_str().unwrap_or_default().is_empty() {
                let value = owner.get(key).cloned().unwrap_or_else(|| "".into());
                causes.push(Cause::invalid(format!("{field}.{key}"), &value, why));
            }
        }
    }
    causes
}

/// What is wrong with a change of metadata.
pub(super) fn validate_update(old: &Value, new: &Value) -> Vec<Cause> {
    let mut causes = Vec::new();
    if old["metadata"].get("deletionTimestamp").is_some() {
        let before = old["metadata"]["finalizers"].as_array();
        let added: Vec<&str> = new["metadata"]["finalizers"]
            .as_array()
            .into_iter()
            .flatten()
            .filter(|f| !before.is_some_and(|b| b.contains(f)))
            .filter_map(Value::as_str)
            .collect();
        if !added.is_empty() {
            causes.push(Cause::forbidden(
                "metadata.finalizers",
                &format!(
                    "no new finalizers can be added if the object is being deleted, found new finalizers {added:?}"
                ),
            ));
        }
    }
    causes
}

/// Keys and values of labels or of a selector.
pub(super) fn labels(labels: &Value, field: &str, causes: &mut Vec<Cause>) {
    for (key, value) in labels.as_object().into_iter().flatten() {
        for why in names::qualified_name(key) {
            causes.push(Cause::invalid(field, &key.as_str().into(), &why));
        }
        for why in names::label_value(value.as_str().unwrap_or_default()) {
            causes.push(Cause::invalid(field, value, &why));
        }
    }
}

fn check_name(r: &ResourceInfo, name: &str) -> Vec<String> {
    (r.rules.name)(name)
}
