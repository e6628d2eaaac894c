//! `pods/{name}/binding`: what a scheduler writes.

use http::Response;
use serde_json::{Value, json};

use super::response::{self, Body};
use super::route::Target;
use super::write::RETRIES;
use super::{Api, Parts, codec, read};
use crate::error::ApiError;
use crate::store::{Expect, StoreError, Write};

impl Api {
    /// Assigns a pod to a node.
    pub(super) async fn bind(
        &self,
        parts: &Parts<'_>,
        target: &Target,
        name: &str,
        binding: &Value,
    ) -> Result<Response<Body>, ApiError> {
        let r = target.resource;
        let node = binding["target"]["name"].as_str().unwrap_or_default();
        if node.is_empty() {
            return Err(ApiError::bad_request("binding: target.name is required"));
        }
        let dry_run = parts.params.dry_run()?;
        for _ in 0..RETRIES {
            let stored = self.stored(target, name).await?;
            let mut pod = codec::decode(r, stored.revision, &stored.value)?;
            let (wanted, uid) = (&binding["metadata"]["uid"], &pod["metadata"]["uid"]);
            let refused = match pod["spec"]["nodeName"].as_str() {
                _ if pod["metadata"]["deletionTimestamp"].is_string() => Some(format!(
                    "pod {name} is being deleted, cannot be assigned to a host"
                )),
                _ if wanted.is_string() && wanted != uid => Some(format!(
                    "Precondition failed: UID in precondition: {}, UID in object meta: {}",
                    wanted.as_str().unwrap_or_default(),
                    uid.as_str().unwrap_or_default()
                )),
                Some(other) if !other.is_empty() => {
                    Some(format!("pod {name} is already assigned to node {other:?}"))
                }
                _ => None,
            };
            if let Some(why) = refused {
                return Err(ApiError {
                    code: 409,
                    reason: "Conflict",
                    message: format!("Operation cannot be fulfilled on pods/binding {name:?}: {why}"),
                    details: Some(json!({"name": name, "kind": "pods/binding"})),
                });
            }
            pod["spec"]["nodeName"] = node.into();
            schedule(&mut pod);
            if dry_run {
                return Ok(bound(parts));
            }
            let write = Write {
                key: stored.key,
                expect: Expect::Revision(stored.revision),
                value: Some(codec::encode(&pod)?),
                guards: Vec::new(),
                also: Vec::new(),
            };
            match self.store.write(write).await {
                Ok(_) => return Ok(bound(parts)),
                Err(StoreError::Conflict { .. }) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Err(ApiError::conflict(r, name))
    }
}

fn bound(parts: &Parts<'_>) -> Response<Body> {
    let status =
        json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success", "code": 201});
    response::value(201, parts.accept, &status)
}

/// Sets the PodScheduled condition, as the binding of kube-apiserver does.
fn schedule(pod: &mut Value) {
    if !pod["status"].is_object() {
        pod["status"] = json!({});
    }
    let condition = json!({
        "type": "PodScheduled", "status": "True", "lastProbeTime": null, "lastTransitionTime": read::now(),
    });
    match pod["status"]["conditions"].as_array_mut() {
        Some(conditions) => {
            conditions.retain(|condition| condition["type"] != "PodScheduled");
            conditions.push(condition);
        }
        None => pod["status"]["conditions"] = json!([condition]),
    }
}
