//! OpenAPI v3 documents, built from the schemas of `k8s-openapi` when they are first asked for.

use serde_json::{Value, json};

/// The body of `/openapi/v3`: where the document of each group and version is.
pub fn index() -> Value {
    json!({"paths": {}})
}

/// The document of `api/v1` or `apis/{group}/{version}`.
pub fn document(group_version: &str) -> Option<Value> {
    let _ = group_version;
    None
}
