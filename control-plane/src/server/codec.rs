//! How objects lie in the store, and how they come out again.
//!
//! A stored value is the object's JSON without `apiVersion`, `kind` (the key says them) and `metadata.resourceVersion` (the
//! store's revision says it), with `metadata` first. So an object is put into a list, a single answer or a watch event by
//! writing a few bytes before its stored ones: lists of ten thousand objects are copied, not parsed.

use bytes::{BufMut as _, Bytes, BytesMut};
use serde_json::{Map, Value};

use crate::error::ApiError;
use crate::resource::ResourceInfo;

/// What every stored value starts with.
const HEAD: &[u8] = br#"{"metadata":{"#;

/// The object as it is stored.
///
/// # Errors
/// When it has no metadata: every stored object has a name.
pub(super) fn encode(object: &Value) -> Result<Bytes, ApiError> {
    let corrupt = || ApiError::internal("an object without metadata cannot be stored");
    let fields = object.as_object().ok_or_else(corrupt)?;
    let metadata = fields
        .get("metadata")
        .and_then(Value::as_object)
        .ok_or_else(corrupt)?;
    let mut rest: Map<String, Value> = metadata.clone();
    rest.remove("resourceVersion");
    if rest.is_empty() {
        return Err(corrupt());
    }
    let internal = |error: serde_json::Error| ApiError::internal(&error.to_string());
    let mut out = Vec::with_capacity(1024);
    out.extend_from_slice(br#"{"metadata":"#);
    serde_json::to_writer(&mut out, &rest).map_err(internal)?;
    for (name, value) in fields {
        if !matches!(name.as_str(), "apiVersion" | "kind" | "metadata") {
            out.push(b',');
            serde_json::to_writer(&mut out, name).map_err(internal)?;
            out.push(b':');
            serde_json::to_writer(&mut out, value).map_err(internal)?;
        }
    }
    out.push(b'}');
    Ok(out.into())
}

/// The stored object as a value, complete.
pub(super) fn decode(r: &ResourceInfo, revision: u64, stored: &[u8]) -> Result<Value, ApiError> {
    let mut object: Value = serde_json::from_slice(stored)
        .map_err(|error| ApiError::internal(&format!("stored object: {error}")))?;
    if let Some(fields) = object.as_object_mut() {
        fields.insert("apiVersion".into(), r.api_version().into());
        fields.insert("kind".into(), r.kind.into());
    }
    set_revision(&mut object, revision);
    Ok(object)
}

/// Sets `metadata.resourceVersion`.
pub(super) fn set_revision(object: &mut Value, revision: u64) {
    if let Some(metadata) = object.get_mut("metadata").and_then(Value::as_object_mut) {
        metadata.insert("resourceVersion".into(), revision.to_string().into());
    }
}

/// Appends a list item: no `apiVersion` and `kind`, as lists have them once.
pub(super) fn write_item(out: &mut BytesMut, revision: u64, stored: &[u8]) {
    out.put_slice(br#"{"metadata":{"resourceVersion":""#);
    write_tail(out, revision, stored);
}

/// Appends the whole object.
pub(super) fn write_object(out: &mut BytesMut, r: &ResourceInfo, revision: u64, stored: &[u8]) {
    out.put_slice(br#"{"apiVersion":""#);
    out.put_slice(r.api_version().as_bytes());
    out.put_slice(br#"","kind":""#);
    out.put_slice(r.kind.as_bytes());
    out.put_slice(br#"","metadata":{"resourceVersion":""#);
    write_tail(out, revision, stored);
}

fn write_tail(out: &mut BytesMut, revision: u64, stored: &[u8]) {
    out.put_slice(revision.to_string().as_bytes());
    out.put_slice(br#"","#);
    out.put_slice(stored.get(HEAD.len()..).unwrap_or_default());
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::resource;

    #[test]
    fn objects_survive_the_store() {
        let r = resource::find("", "v1", "services").unwrap();
        let object = json!({
            "apiVersion": "v1", "kind": "Service",
            "metadata": {"name": "a\"b", "resourceVersion": "3"},
            "spec": {"ports": [1, 2]}, "status": {}
        });
        let stored = encode(&object).unwrap();
        assert!(stored.starts_with(HEAD));
        assert!(!String::from_utf8_lossy(&stored).contains("resourceVersion"));
        let mut expected = object;
        set_revision(&mut expected, 7);
        assert_eq!(decode(r, 7, &stored).unwrap(), expected);
        let mut out = BytesMut::new();
        write_object(&mut out, r, 7, &stored);
        assert_eq!(serde_json::from_slice::<Value>(&out).unwrap(), expected);
        let mut out = BytesMut::new();
        write_item(&mut out, 7, &stored);
        expected.as_object_mut().unwrap().remove("kind");
        expected.as_object_mut().unwrap().remove("apiVersion");
        assert_eq!(serde_json::from_slice::<Value>(&out).unwrap(), expected);
    }

    #[test]
    fn nothing_without_metadata_is_stored() {
        assert!(encode(&json!({"metadata": {"resourceVersion": "1"}})).is_err());
        assert!(encode(&json!({})).is_err());
        assert!(encode(&json!([])).is_err());
    }
}
