//! The `scale` subresource: how many replicas a workload has and is to have, whatever its kind.

use http::Response;
use serde_json::{Value, json};

use super::response::{self, Body};
use super::route::Target;
use super::write::How;
use super::{Api, Parts, codec, request};
use crate::error::{ApiError, Cause};
use crate::patch;
use crate::resource::ResourceInfo;
use crate::selector::selector_text;

/// The `autoscaling/v1` Scale of an object.
pub(super) fn scale_of(r: &ResourceInfo, object: &Value) -> Value {
    let metadata = &object["metadata"];
    let selector = if r.is("", "ReplicationController") {
        selector_text(&json!({"matchLabels": object["spec"]["selector"]}))
    } else {
        selector_text(&object["spec"]["selector"])
    };
    let mut scale = json!({
        "kind": "Scale",
        "apiVersion": "autoscaling/v1",
        "metadata": {},
        "spec": {},
        "status": {"replicas": object["status"]["replicas"].as_i64().unwrap_or(0), "selector": selector},
    });
    for field in ["name", "namespace", "uid", "resourceVersion", "creationTimestamp"] {
        scale["metadata"][field] = metadata[field].clone();
    }
    if let Some(replicas) = object["spec"]["replicas"].as_i64().filter(|n| *n != 0) {
        scale["spec"]["replicas"] = replicas.into();
    }
    scale
}

/// Takes the wanted number from a Scale.
pub(super) fn apply(r: &ResourceInfo, old: &Value, scale: &Value) -> Result<Value, ApiError> {
    let name = old["metadata"]["name"].as_str().unwrap_or_default();
    let given = &scale["metadata"];
    if given["name"]
        .as_str()
        .is_some_and(|given| !given.is_empty() && given != name)
    {
        return Err(ApiError::bad_request(format!(
            "the name of the object ({}) does not match the name on the URL ({name})",
            given["name"].as_str().unwrap_or_default()
        )));
    }
    let replicas = match &scale["spec"]["replicas"] {
        Value::Null => 0,
        number => number
            .as_i64()
            .filter(|n| i32::try_from(*n).is_ok())
            .ok_or_else(|| {
                ApiError::bad_request(format!(
                    "spec.replicas of a Scale must be a 32 bit number, got {number}"
                ))
            })?,
    };
    if replicas < 0 {
        let why = "must be greater than or equal to 0";
        let cause = Cause::invalid("spec.replicas", &replicas.into(), why);
        let scale = ResourceInfo {
            group: "autoscaling",
            kind: "Scale",
            ..*r
        };
        return Err(ApiError::invalid(&scale, name, &[cause]));
    }
    let mut new = old.clone();
    new["spec"]["replicas"] = replicas.into();
    // The client's precondition, if it has one.
    for field in ["resourceVersion", "uid"] {
        if let Some(value) = given[field].as_str().filter(|value| !value.is_empty()) {
            new["metadata"][field] = value.into();
        }
    }
    Ok(new)
}

impl Api {
    pub(super) async fn get_scale(
        &self,
        parts: &Parts<'_>,
        target: &Target,
        name: &str,
    ) -> Result<Response<Body>, ApiError> {
        let found = self.stored(target, name).await?;
        let object = codec::decode(target.resource, found.revision, &found.value)?;
        Ok(response::value(
            200,
            parts.accept,
            &scale_of(target.resource, &object),
        ))
    }

    pub(super) async fn update_scale(
        &self,
        parts: &Parts<'_>,
        target: &Target,
        name: &str,
        body: &[u8],
    ) -> Result<Response<Body>, ApiError> {
        let content_type = request::content_type(parts.headers);
        let scale = request::decode(&content_type, body)?.map_err(ApiError::bad_request)?;
        self.change_scale(parts, target, name, |_| Ok(scale.clone()))
            .await
    }

    pub(super) async fn patch_scale(
        &self,
        parts: &Parts<'_>,
        target: &Target,
        name: &str,
        body: &[u8],
    ) -> Result<Response<Body>, ApiError> {
        let content_type = request::content_type(parts.headers);
        if content_type == patch::APPLY_PATCH {
            return self.apply_scale(parts, target, name, body).await;
        }
        let r = target.resource;
        let scale = ResourceInfo {
            schema: "io.k8s.api.autoscaling.v1.Scale",
            ..*r
        };
        self.change_scale(parts, target, name, |old| {
            patch::apply(&scale, &content_type, &scale_of(r, old), body)
        })
        .await
    }

    async fn change_scale(
        &self,
        parts: &Parts<'_>,
        target: &Target,
        name: &str,
        scale: impl Fn(&Value) -> Result<Value, ApiError>,
    ) -> Result<Response<Body>, ApiError> {
        let r = target.resource;
        let how = How::of(parts, Some("scale"))?;
        let mut warnings = Vec::new();
        let changed = self
            .change(target, name, None, &how, &mut warnings, |old| {
                apply(r, old, &scale(old)?)
            })
            .await?;
        Ok(response::value(200, parts.accept, &scale_of(r, &changed)))
    }
}
