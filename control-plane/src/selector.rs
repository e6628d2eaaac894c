//! Label and field selectors.

use serde_json::Value;

use crate::error::ApiError;
use crate::resource::ResourceInfo;

/// A parsed `labelSelector`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct LabelSelector {}

impl LabelSelector {
    /// Reads a selector such as `app in (a,b),!gone,tier=web`; an empty one selects everything.
    ///
    /// # Errors
    /// Bad request with the API's words.
    pub fn parse(text: &str) -> Result<Self, ApiError> {
        let _ = text;
        Ok(Self {})
    }

    /// Whether the object's labels satisfy the selector.
    pub fn matches(&self, object: &Value) -> bool {
        let _ = object;
        true
    }
}

/// A parsed `fieldSelector`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct FieldSelector {}

impl FieldSelector {
    /// Reads a selector such as `spec.nodeName=n1,status.phase!=Failed`; an empty one selects everything.
    ///
    /// # Errors
    /// Bad request if the kind cannot be selected by a field.
    pub fn parse(r: &ResourceInfo, text: &str) -> Result<Self, ApiError> {
        let _ = (r, text);
        Ok(Self {})
    }

    /// Whether the object's fields satisfy the selector.
    pub fn matches(&self, object: &Value) -> bool {
        let _ = object;
        true
    }
}
