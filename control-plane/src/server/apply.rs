//! Server-side apply.

use http::Response;
use serde_json::{Value, json};

use super::response::{self, Body};
use super::route::Target;
use super::write::{How, RETRIES, answer, manager, place_as};
use super::{Api, Parts, scale};
use crate::error::{ApiError, Cause};
use crate::fields::{self, Manager};
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
        let (manager, how) = applying(parts, subresource)?;
        let force = parts.params.flag("force");
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

    /// Server-side apply of a Scale, which stands for one field of the object.
    pub(super) async fn apply_scale(
        &self,
        parts: &Parts<'_>,
        target: &Target,
        name: &str,
        body: &[u8],
    ) -> Result<Response<Body>, ApiError> {
        let r = target.resource;
        let (manager, how) = applying(parts, Some("scale"))?;
        let scale = yaml(body)?;
        check_kind(&scale, "autoscaling/v1", "Scale")?;
        let force = parts.params.flag("force");
        let mut warnings = Vec::new();
        let apply = |old: &Value| {
            // Checks the number and the name, and takes over the client's preconditions.
            let scaled = scale::apply(r, old, &scale)?;
            let mut config = json!({
                "apiVersion": r.api_version(), "kind": r.kind,
                "metadata": {"name": name, "namespace": target.namespace},
            });
            if scale["spec"]["replicas"].is_number() {
                config["spec"] = json!({"replicas": scaled["spec"]["replicas"]});
            }
            let mut new = fields::apply(r, Some(old), &config, &manager, force)?;
            for field in ["resourceVersion", "uid"] {
                new["metadata"][field] = scaled["metadata"][field].clone();
            }
            Ok(new)
        };
        let changed = self
            .change(target, name, None, &how, &mut warnings, apply)
            .await?;
        Ok(response::value(200, parts.accept, &scale::scale_of(r, &changed)))
    }
}

/// Who applies, and how it is written.
fn applying(parts: &Parts<'_>, subresource: Option<&str>) -> Result<(Manager, How), ApiError> {
    if parts.params.get("fieldManager").is_empty() {
        return Err(ApiError::invalid_options(
            "PatchOptions",
            &Cause::required("fieldManager", "is required for apply patch"),
        ));
    }
    let how = How {
        ownership: Ownership::Given,
        ..How::of(parts, subresource)?
    };
    Ok((manager(parts, subresource)?, how))
}

fn yaml(body: &[u8]) -> Result<Value, ApiError> {
    let bad = |error: &dyn std::fmt::Display| ApiError::bad_request(format!("error decoding YAML: {error}"));
    let text = std::str::from_utf8(body).map_err(|error| bad(&error))?;
    serde_saphyr::from_str(text).map_err(|error| bad(&error))
}

fn check_kind(config: &Value, api_version: &str, kind: &str) -> Result<(), ApiError> {
    if config["kind"] == kind && config["apiVersion"] == api_version {
        return Ok(());
    }
    Err(ApiError::bad_request(format!(
        "invalid object type: apply needs apiVersion {api_version:?} and kind {kind:?}"
    )))
}

/// Reads an applied configuration, which must be one of the named object.
fn applied_config(target: &Target, name: &str, body: &[u8]) -> Result<Value, ApiError> {
    let r = target.resource;
    let mut config = yaml(body)?;
    let refuse = |why: &str| {
        ApiError::bad_request(format!(
            "failed to create typed patch object ({name}; {}, Kind={}): {why}",
            r.api_version(),
            r.kind
        ))
    };
    check_kind(&config, &r.api_version(), r.kind)?;
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
