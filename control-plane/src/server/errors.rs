//! Errors of the store in the API's words.

use serde_json::json;

use crate::error::ApiError;
use crate::store::StoreError;

impl From<StoreError> for ApiError {
    /// An error that has nothing to do with one object.
    fn from(error: StoreError) -> Self {
        match error {
            StoreError::Compacted { requested, compacted } => {
                Self::expired(format!("too old resource version: {requested} ({compacted})"))
            }
            StoreError::Future { requested, current } => too_large(requested, current),
            StoreError::Closed => Self::unavailable("the server is shutting down"),
            other => {
                tracing::error!(error = %other, "the store failed");
                Self::internal(&other.to_string())
            }
        }
    }
}

/// 504: the revision does not exist yet.
pub(super) fn too_large(requested: u64, current: u64) -> ApiError {
    let mut error = ApiError::timeout(&format!(
        "Too large resource version: {requested}, current: {current}"
    ));
    error.details = Some(json!({
        "causes": [{"reason": "ResourceVersionTooLarge", "message": "Too large resource version"}],
        "retryAfterSeconds": 1,
    }));
    error
}
