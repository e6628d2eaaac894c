//! Errors as the API reports them: a `v1` `Status` object with the code, reason, message and details that kubectl and
//! client libraries match on.

use serde_json::{Map, Value, json};

use crate::resource::ResourceInfo;

/// One reason why an object is invalid: an entry of `details.causes`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cause {
    /// `FieldValueInvalid`, `FieldValueRequired`, …
    pub reason: &'static str,
    /// What is wrong with the field, starting with a capital letter as the Kubernetes API words it.
    pub message: String,
    /// Path of the field, for example `spec.ports[0].nodePort`.
    pub field: String,
}

impl Cause {
    /// The field's value is not acceptable; the value is shown as JSON.
    pub fn invalid(field: impl Into<String>, value: &Value, why: &str) -> Self {
        Self {
            reason: "FieldValueInvalid",
            message: format!("Invalid value: {value}: {why}"),
            field: field.into(),
        }
    }

    /// The field must be given. `why` may be empty.
    pub fn required(field: impl Into<String>, why: &str) -> Self {
        Self {
            reason: "FieldValueRequired",
            message: with_detail("Required value", why),
            field: field.into(),
        }
    }

    /// The field must not be given in this combination. `why` may be empty.
    pub fn forbidden(field: impl Into<String>, why: &str) -> Self {
        Self {
            reason: "FieldValueForbidden",
            message: with_detail("Forbidden", why),
            field: field.into(),
        }
    }

    /// Another element of the list has the same value.
    pub fn duplicate(field: impl Into<String>, value: &Value) -> Self {
        Self {
            reason: "FieldValueDuplicate",
            message: format!("Duplicate value: {value}"),
            field: field.into(),
        }
    }

    /// The value is none of the supported ones, which are listed sorted.
    pub fn not_supported(field: impl Into<String>, value: &Value, supported: &[&str]) -> Self {
        let mut supported: Vec<&str> = supported.to_vec();
        supported.sort_unstable();
        let list: Vec<String> = supported.iter().map(|s| format!("\"{s}\"")).collect();
        Self {
            reason: "FieldValueNotSupported",
            message: format!(
                "Unsupported value: {value}: supported values: {}",
                list.join(", ")
            ),
            field: field.into(),
        }
    }

    /// A list has more than `max` entries.
    pub fn too_many(field: impl Into<String>, actual: usize, max: usize) -> Self {
        let items = if max == 1 { "item" } else { "items" };
        Self {
            reason: "FieldValueTooMany",
            message: format!("Too many: {actual}: must have at most {max} {items}"),
            field: field.into(),
        }
    }

    /// A text has more than `max` bytes.
    pub fn too_long(field: impl Into<String>, max: usize) -> Self {
        let bytes = if max == 1 { "byte" } else { "bytes" };
        Self {
            reason: "FieldValueTooLong",
            message: format!("Too long: may not be more than {max} {bytes}"),
            field: field.into(),
        }
    }

    /// The cause as one text, as it appears in the status message.
    fn line(&self) -> String {
        format!("{}: {}", self.field, self.message)
    }
}

fn with_detail(head: &str, why: &str) -> String {
    if why.is_empty() {
        head.to_owned()
    } else {
        format!("{head}: {why}")
    }
}

/// An answer other than success. The texts are those of kube-apiserver, because clients and people match on them.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[error("{message}")]
pub struct ApiError {
    /// HTTP status code.
    pub code: u16,
    /// Machine-readable reason; empty when the API gives none.
    pub reason: &'static str,
    /// Text for people.
    pub message: String,
    /// `details` of the status, if any.
    pub details: Option<Value>,
}

impl ApiError {
    fn new(code: u16, reason: &'static str, message: impl Into<String>) -> Self {
        Self {
            code,
            reason,
            message: message.into(),
            details: None,
        }
    }

    fn with_details(mut self, details: Value) -> Self {
        self.details = Some(details);
        self
    }

    /// The `Status` object for this error.
    pub fn status(&self) -> Value {
        let mut status = json!({
            "kind": "Status",
            "apiVersion": "v1",
            "metadata": {},
            "status": "Failure",
            "message": self.message,
            "code": self.code,
        });
        if let Some(map) = status.as_object_mut() {
            if !self.reason.is_empty() {
                map.insert("reason".into(), self.reason.into());
            }
            if let Some(details) = &self.details {
                map.insert("details".into(), details.clone());
            }
        }
        status
    }

    /// 404: the named object does not exist.
    pub fn not_found(r: &ResourceInfo, name: &str) -> Self {
        Self::new(404, "NotFound", format!("{} \"{name}\" not found", r.qualified()))
            .with_details(resource_details(r, name))
    }

    /// 404: the path names nothing that is served.
    pub fn unknown_path() -> Self {
        Self::new(
            404,
            "NotFound",
            "the server could not find the requested resource",
        )
        .with_details(json!({}))
    }

    /// 409: an object of that name exists.
    pub fn already_exists(r: &ResourceInfo, name: &str) -> Self {
        Self::new(
            409,
            "AlreadyExists",
            format!("{} \"{name}\" already exists", r.qualified()),
        )
        .with_details(resource_details(r, name))
    }

    /// 409: the update was computed from an older version of the object.
    pub fn conflict(r: &ResourceInfo, name: &str) -> Self {
        Self::conflict_because(
            r,
            name,
            "the object has been modified; please apply your changes to the latest version and try again",
        )
    }

    /// 409 with a reason of its own.
    pub fn conflict_because(r: &ResourceInfo, name: &str, why: &str) -> Self {
        Self::new(
            409,
            "Conflict",
            format!(
                "Operation cannot be fulfilled on {} \"{name}\": {why}",
                r.qualified()
            ),
        )
        .with_details(resource_details(r, name))
    }

    /// 409 about a subresource such as `pods/binding`.
    pub fn conflict_in_subresource(r: &ResourceInfo, subresource: &str, name: &str, why: &str) -> Self {
        let kind = format!("{}/{subresource}", r.plural);
        Self::new(
            409,
            "Conflict",
            format!("Operation cannot be fulfilled on {kind} \"{name}\": {why}"),
        )
        .with_details(json!({"name": name, "kind": kind}))
    }

    /// 422: the object as a whole was understood, but fields are wrong.
    pub fn invalid(r: &ResourceInfo, name: &str, causes: &[Cause]) -> Self {
        let mut lines: Vec<String> = Vec::new();
        for cause in causes {
            let line = cause.line();
            if !lines.contains(&line) {
                lines.push(line);
            }
        }
        let list = match lines.as_slice() {
            [one] => one.clone(),
            many => format!("[{}]", many.join(", ")),
        };
        let mut details = Map::new();
        details.insert("name".into(), name.into());
        if !r.group.is_empty() {
            details.insert("group".into(), r.group.into());
        }
        details.insert("kind".into(), r.kind.into());
        details.insert(
            "causes".into(),
            causes
                .iter()
                .map(|c| json!({"reason": c.reason, "message": c.message, "field": c.field}))
                .collect(),
        );
        let kind = if r.group.is_empty() {
            r.kind.to_owned()
        } else {
            format!("{}.{}", r.kind, r.group)
        };
        Self::new(422, "Invalid", format!("{kind} \"{name}\" is invalid: {list}"))
            .with_details(details.into())
    }

    /// 422: an option of the request is wrong; `kind` is the kind of the options.
    pub fn invalid_options(kind: &str, cause: &Cause) -> Self {
        Self::new(
            422,
            "Invalid",
            format!("{kind}.meta.k8s.io \"\" is invalid: {}", cause.line()),
        )
        .with_details(json!({
            "group": "meta.k8s.io",
            "kind": kind,
            "causes": [{"reason": cause.reason, "message": cause.message, "field": cause.field}],
        }))
    }

    /// 422 without a word on why: what the API answers to a JSON patch that does not apply.
    pub fn rejected() -> Self {
        Self::new(
            422,
            "Invalid",
            "the server rejected our request due to an error in our request",
        )
        .with_details(json!({}))
    }

    /// 400.
    pub fn bad_request(message: impl Into<String>) -> Self {
        Self::new(400, "BadRequest", message)
    }

    /// 405.
    pub fn method_not_allowed() -> Self {
        Self::new(
            405,
            "MethodNotAllowed",
            "the server does not allow this method on the requested resource",
        )
        .with_details(json!({}))
    }

    /// 410: a watch or a paged list asks for a revision that was compacted.
    pub fn expired(message: impl Into<String>) -> Self {
        Self::new(410, "Expired", message)
    }

    /// 415: the body's content type is not understood.
    pub fn unsupported_media_type(accepted: &[&str]) -> Self {
        Self::new(
            415,
            "UnsupportedMediaType",
            format!(
                "the body of the request was in an unknown format - accepted media types include: {}",
                accepted.join(", ")
            ),
        )
    }

    /// 406: none of the types in the Accept header can be produced.
    pub fn not_acceptable(accepted: &[&str]) -> Self {
        Self::new(
            406,
            "NotAcceptable",
            format!(
                "only the following media types are accepted: {}",
                accepted.join(", ")
            ),
        )
    }

    /// 403 about one object, or about all of them when `name` is empty.
    pub fn forbidden(r: &ResourceInfo, name: &str, why: &str) -> Self {
        let object = if name.is_empty() {
            r.qualified()
        } else {
            format!("{} \"{name}\"", r.qualified())
        };
        Self::new(403, "Forbidden", format!("{object} is forbidden: {why}"))
            .with_details(resource_details(r, name))
    }

    /// 403: the namespace is being deleted.
    pub fn namespace_terminating(r: &ResourceInfo, name: &str, namespace: &str) -> Self {
        let mut error = Self::forbidden(
            r,
            name,
            &format!("unable to create new content in namespace {namespace} because it is being terminated"),
        );
        if let Some(details) = error.details.as_mut().and_then(Value::as_object_mut) {
            details.insert(
                "causes".into(),
                json!([{
                    "reason": "NamespaceTerminating",
                    "message": format!("namespace {namespace} is being terminated"),
                    "field": "metadata.namespace",
                }]),
            );
        }
        error
    }

    /// 401.
    pub fn unauthorized() -> Self {
        Self::new(401, "Unauthorized", "Unauthorized")
    }

    /// 413.
    pub fn too_large(limit: usize) -> Self {
        Self::new(
            413,
            "RequestEntityTooLarge",
            format!("Request entity too large: limit is {limit}"),
        )
    }

    /// 500.
    pub fn internal(why: &str) -> Self {
        Self::new(500, "InternalError", format!("Internal error occurred: {why}"))
            .with_details(json!({"causes": [{"message": why}]}))
    }

    /// 403 for a certificate of another node.
    pub fn unauthorized_request(user: &str, node: &str) -> Self {
        let message = format!(
            "certificatesigningrequests.certificates.k8s.io is forbidden: user {user:?} may not have a certificate of node {node:?}"
        );
        Self::new(403, "Forbidden", message)
    }

    /// 503.
    pub fn unavailable(message: impl Into<String>) -> Self {
        Self::new(503, "ServiceUnavailable", message)
    }

    /// 429: as many requests as there may be are being worked on.
    pub fn too_many_requests() -> Self {
        Self::new(
            429,
            "TooManyRequests",
            "Too many requests, please try again later.",
        )
        .with_details(json!({"retryAfterSeconds": 1}))
    }

    /// 504: what was asked for did not happen in the time that the request gave.
    pub fn timeout(message: &str) -> Self {
        Self::new(504, "Timeout", format!("Timeout: {message}")).with_details(json!({}))
    }
}

fn resource_details(r: &ResourceInfo, name: &str) -> Value {
    let mut details = Map::new();
    if !name.is_empty() {
        details.insert("name".into(), name.into());
    }
    if !r.group.is_empty() {
        details.insert("group".into(), r.group.into());
    }
    details.insert("kind".into(), r.plural.into());
    details.into()
}
