//! Server-side apply.

use http::Response;
use serde_json::Value;

use super::response::Body;
use super::route::Target;
use super::write::{How, RETRIES, answer, manager, place_as};
use super::{Api, Parts};
use crate::error::{ApiError, Cause};
use crate::fields;
use crate::resource::{self, Ownership};

impl Api {
    /// Server-side apply; creates what is not there.
    pub(super) async fn apply(
        &self,
        parts: &Parts<'_>,
        target: &Target,
        name: &str,
        subresource: Option<&str>,
        body: &[u8],
    ) -> Result<Response<Body>, ApiError> {
        let r = target.resource;
        if parts.params.get("fieldManager").is_empty() {
            return Err(ApiError::invalid_options(
                "PatchOptions",
                &Cause::required("fieldManager", "is required for apply patch"),
            ));
        }
        let manager = manager(parts, subresource)?;
        let force = parts.params.flag("force");
        let how = How {
            ownership: Ownership::Given,
            ..How::of(parts, subresource)?
        };
        let config = applied_config(target, name, body)?;
        let mut warnings = Vec::new();
        for _ in 0..RETRIES {
            let apply = |old: &Value| fields::apply(r, Some(old), &config, &manager, force);
            let changed = self
                .change(target, name, subresource, &how, &mut warnings, apply)
                .await;
            match changed {
                Err(error) if error.code == 404 && subresource.is_none() => {}
                changed => return answer(200, parts, r, changed?, &warnings),
            }
            let object = fields::apply(r, None, &config, &manager, force)?;
            match self.insert(target, object, &how, &mut warnings).await {
                Err(error) if error.reason == "AlreadyExists" => {}
                created => return answer(201, parts, r, created?, &warnings),
            }
        }
        Err(ApiError::conflict(r, name))
    }
}

/// Reads an applied configuration, which must be one of the named object.
fn applied_config(target: &Target, name: &str, body: &[u8]) -> Result<Value, ApiError> {
    let r = target.resource;
    let yaml = std::str::from_utf8(body)
        .map_err(|error| ApiError::bad_request(format!("error decoding YAML: {error}")))?;
    let mut config: Value = serde_saphyr::from_str(yaml)
        .map_err(|error| ApiError::bad_request(format!("error decoding YAML: {error}")))?;
    let refuse = |why: &str| {
        ApiError::bad_request(format!(
            "failed to create typed patch object ({name}; {}, Kind={}): {why}",
            r.api_version(),
            r.kind
        ))
    };
    if config["kind"] != r.kind || config["apiVersion"] != r.api_version().as_str() {
        return Err(ApiError::bad_request(format!(
            "invalid object type: apply needs apiVersion {:?} and kind {:?}",
            r.api_version(),
            r.kind
        )));
    }
    if config["metadata"]["managedFields"]
        .as_array()
        .is_some_and(|list| !list.is_empty())
    {
        return Err(ApiError::bad_request("metadata.managedFields must be nil"));
    }
    let unknown = resource::unknown_fields(r, &config).map_err(|why| refuse(&why))?;
    if !unknown.is_empty() {
        let list: Vec<String> = unknown
            .iter()
            .map(|path| format!(".{path}: field not declared in schema"))
            .collect();
        return Err(refuse(&list.join(", ")));
    }
    place_as(target, name, &mut config)?;
    Ok(config)
}
