//! Events that say what a controller did, for `kubectl describe`. One that cannot be written is not worth a failure.

use k8s_openapi::api::core::v1::Event;
use kube::Client;
use kube::api::{Api, PostParams};
use serde_json::json;

/// The controllers, as the source of events.
pub(super) const CONTROLLERS: &str = "beeline-controllers";

/// The object that an event is about, and whose doing it is.
#[derive(Debug, Clone)]
pub(super) struct About {
    pub(super) component: &'static str,
    pub(super) api_version: String,
    pub(super) kind: String,
    pub(super) namespace: String,
    pub(super) name: String,
    pub(super) uid: String,
}

pub(super) async fn normal(client: &Client, about: &About, reason: &str, message: &str) {
    record(client, about, "Normal", reason, message).await;
}

pub(super) async fn warning(client: &Client, about: &About, reason: &str, message: &str) {
    record(client, about, "Warning", reason, message).await;
}

async fn record(client: &Client, about: &About, kind: &str, reason: &str, message: &str) {
    let namespace = if about.namespace.is_empty() {
        "default"
    } else {
        &about.namespace
    };
    let now = jiff::Timestamp::now().strftime("%Y-%m-%dT%H:%M:%SZ").to_string();
    let event = json!({
        "metadata": {"generateName": format!("{}.", about.name), "namespace": namespace},
        "involvedObject": {
            "apiVersion": about.api_version, "kind": about.kind, "namespace": about.namespace,
            "name": about.name, "uid": about.uid,
        },
        "type": kind, "reason": reason, "message": message, "count": 1,
        "firstTimestamp": now, "lastTimestamp": now,
        "source": {"component": about.component}, "reportingComponent": about.component,
    });
    let written = match serde_json::from_value::<Event>(event) {
        Ok(event) => Api::<Event>::namespaced(client.clone(), namespace)
            .create(&PostParams::default(), &event)
            .await
            .map(drop)
            .map_err(|error| error.to_string()),
        Err(error) => Err(error.to_string()),
    };
    if let Err(error) = written {
        tracing::debug!(error, reason, message, "an event was not recorded");
    }
}
