//! What the API serves, and the rules for each kind: defaults, validation, what may change.
//!
//! Objects are JSON values. Before a kind's own rules run, the object is brought into the shape of its OpenAPI schema
//! (see `shape`): values of a wrong type are refused, unknown fields are dropped, so that the rules can rely on types.

mod allocator;
mod registry;

use serde_json::Value;

pub use allocator::Allocator;
pub use registry::{RESOURCES, ResourceInfo, SubresourceInfo, find};

use crate::error::ApiError;

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
    let _ = (r, ctx, obj);
    Ok(())
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
    let _ = (r, ctx, old, new, subresource);
    Ok(())
}

/// Gives back what the deleted object held.
pub fn after_delete(r: &ResourceInfo, ctx: &mut Ctx<'_>, old: &Value) {
    if r.group.is_empty() && r.kind == "Service" {
        ctx.alloc.release(old);
    }
}
