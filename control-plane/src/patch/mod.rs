//! The patch types: what an object looks like after a patch. Validation of the result is `resource`'s.

pub(crate) mod keys;
mod strategic;

use serde_json::{Map, Value};

use crate::error::ApiError;
use crate::resource::ResourceInfo;

/// Media type of JSON patch (RFC 6902).
pub const JSON_PATCH: &str = "application/json-patch+json";
/// Media type of merge patch (RFC 7386).
pub const MERGE_PATCH: &str = "application/merge-patch+json";
/// Media type of Kubernetes' strategic merge patch.
pub const STRATEGIC_MERGE_PATCH: &str = "application/strategic-merge-patch+json";
/// Media type of server-side apply.
pub const APPLY_PATCH: &str = "application/apply-patch+yaml";

/// Operations in one JSON patch, as kube-apiserver limits them.
const MAX_OPERATIONS: usize = 10_000;
/// Size of an object in bytes. A few copy operations can double it again and again.
const MAX_SIZE: usize = 3 * 1024 * 1024;

/// Computes the object that results from a patch of any type but server-side apply, which is in [`crate::fields`].
///
/// # Errors
/// Unsupported media type, a patch that cannot be read, or one that does not apply.
pub fn apply(r: &ResourceInfo, content_type: &str, old: &Value, patch: &[u8]) -> Result<Value, ApiError> {
    let media_type = content_type.split(';').next().unwrap_or_default().trim();
    match media_type {
        JSON_PATCH => json_patch(old, patch),
        MERGE_PATCH => {
            let patch = object(parse(patch)?)?;
            let mut new = old.clone();
            json_patch::merge(&mut new, &Value::Object(patch));
            Ok(new)
        }
        STRATEGIC_MERGE_PATCH => strategic_merge(r, old, object(parse(patch)?)?),
        _ => Err(ApiError::unsupported_media_type(&[
            JSON_PATCH,
            MERGE_PATCH,
            STRATEGIC_MERGE_PATCH,
            APPLY_PATCH,
        ])),
    }
}

fn parse(patch: &[u8]) -> Result<Value, ApiError> {
    serde_json::from_slice(patch).map_err(|e| ApiError::bad_request(format!("error decoding patch: {e}")))
}

fn object(patch: Value) -> Result<Map<String, Value>, ApiError> {
    match patch {
        Value::Object(map) => Ok(map),
        _ => Err(ApiError::bad_request(
            "error decoding patch: it is no JSON object",
        )),
    }
}

fn strategic_merge(r: &ResourceInfo, old: &Value, patch: Map<String, Value>) -> Result<Value, ApiError> {
    let old = old.as_object().cloned().unwrap_or_default();
    strategic::merge(r.schema, old, patch)
        .map(Value::Object)
        .map_err(ApiError::bad_request)
}

fn json_patch(old: &Value, patch: &[u8]) -> Result<Value, ApiError> {
    let operations: Vec<json_patch::PatchOperation> = serde_json::from_slice(patch)
        .map_err(|e| ApiError::bad_request(format!("error decoding patch: {e}")))?;
    if operations.len() > MAX_OPERATIONS {
        return Err(ApiError::too_large(MAX_OPERATIONS));
    }
    let mut new = old.clone();
    for operation in operations {
        json_patch::patch(&mut new, std::slice::from_ref(&operation)).map_err(|_| ApiError::rejected())?;
        if matches!(operation, json_patch::PatchOperation::Copy(_)) && new.to_string().len() > MAX_SIZE {
            return Err(ApiError::too_large(MAX_SIZE));
        }
    }
    Ok(new)
}

#[cfg(test)]
mod tests;
