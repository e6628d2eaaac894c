//! Table output (`Accept: application/json;as=Table;v=v1;g=meta.k8s.io`), which kubectl prints.

use serde_json::{Value, json};

use crate::resource::ResourceInfo;

/// What each row's `object` holds (query parameter `includeObject`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum IncludeObject {
    /// Nothing.
    None,
    /// The object's metadata as `PartialObjectMetadata`. The API's default.
    #[default]
    Metadata,
    /// The whole object.
    Object,
}

/// A `Table` of the objects; the caller adds `metadata` of the list (resourceVersion, continue). `now` is RFC 3339.
pub fn table(r: &ResourceInfo, items: &[Value], include: IncludeObject, now: &str) -> Value {
    let _ = (r, items, include, now);
    json!({"kind": "Table", "apiVersion": "meta.k8s.io/v1", "metadata": {}, "columnDefinitions": [], "rows": []})
}
