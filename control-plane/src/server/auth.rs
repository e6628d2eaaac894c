//! Who may do what: administrators everything, everyone the health and version documents, nobody else anything.

use http::{HeaderMap, Method, header};
use serde_json::json;

use super::request::Params;
use super::route::{Route, Target};
use super::verb;
use crate::error::ApiError;
use crate::pki::Identity;

/// The user, if they may go on.
///
/// # Errors
/// 401 for a token (none is known), 403 for everyone who is no administrator.
pub(super) fn check<'a>(
    user: Option<&'a Identity>,
    headers: &HeaderMap,
    method: &Method,
    params: &Params,
    route: &Route,
    path: &str,
) -> Result<&'a Identity, ApiError> {
    match user {
        Some(user) if user.is_admin() => Ok(user),
        Some(user) => Err(forbidden(&user.user, method, params, route, path)),
        None if headers.contains_key(header::AUTHORIZATION) => Err(ApiError::unauthorized()),
        None => Err(forbidden("system:anonymous", method, params, route, path)),
    }
}

fn forbidden(user: &str, method: &Method, params: &Params, route: &Route, path: &str) -> ApiError {
    if let Route::Objects(target) = route
        && let Some(verb) = verb(method, params, target)
    {
        return forbidden_object(user, verb, target);
    }
    let verb = method.as_str().to_ascii_lowercase();
    ApiError {
        code: 403,
        reason: "Forbidden",
        message: format!("forbidden: User {user:?} cannot {verb} path {path:?}"),
        details: Some(json!({})),
    }
}

fn forbidden_object(user: &str, verb: &str, target: &Target) -> ApiError {
    let r = target.resource;
    let scope = if target.namespace.is_empty() {
        "at the cluster scope".to_owned()
    } else {
        format!("in the namespace {:?}", target.namespace)
    };
    let why = format!(
        "User {user:?} cannot {verb} resource {:?} in API group {:?} {scope}",
        target.qualified_resource(),
        r.group
    );
    let name = target.name.as_deref().unwrap_or_default();
    let mut error = ApiError::forbidden(r, name, &why);
    let mut details = json!({"kind": r.plural});
    if !name.is_empty() {
        details["name"] = name.into();
    }
    if !r.group.is_empty() {
        details["group"] = r.group.into();
    }
    error.details = Some(details);
    error
}
