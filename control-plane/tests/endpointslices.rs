//! The endpoint slice controller at work, next to a running API.

#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

mod common;

use std::time::Duration;

use beeline_control_plane::controllers::endpointslice::{CONTROLLER, MANAGED_BY, SERVICE_NAME};
use common::{Server, call};
use futures::StreamExt as _;
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::api::{Api, ListParams};
use kube::runtime::watcher;
use serde_json::{Value, json};

/// Waits until the slices of the namespace are as wanted, looking again at every change.
async fn until(
    client: &kube::Client,
    what: &str,
    wanted: impl Fn(&[EndpointSlice]) -> bool,
) -> Vec<EndpointSlice> {
    let api: Api<EndpointSlice> = Api::namespaced(client.clone(), "d");
    let mut last = Vec::new();
    let waiting = async {
        let mut changes = watcher(api.clone(), watcher::Config::default()).boxed();
        while let Some(change) = changes.next().await {
            change.unwrap();
            last = api.list(&ListParams::default()).await.unwrap().items;
            if wanted(&last) {
                return;
            }
        }
    };
    let waited = tokio::time::timeout(Duration::from_secs(20), waiting).await;
    assert!(waited.is_ok(), "{what}: {last:#?}");
    last
}

fn ours(slices: &[EndpointSlice]) -> Vec<&EndpointSlice> {
    let managed = |s: &&EndpointSlice| {
        s.metadata
            .labels
            .as_ref()
            .and_then(|l| l.get(MANAGED_BY))
            .is_some_and(|v| v == CONTROLLER)
    };
    slices.iter().filter(managed).collect()
}

fn addresses(slices: &[EndpointSlice]) -> Vec<String> {
    let mut found: Vec<String> = ours(slices)
        .iter()
        .flat_map(|s| s.endpoints.iter().flatten())
        .filter(|e| e.conditions.as_ref().and_then(|c| c.ready) == Some(true))
        .flat_map(|e| e.addresses.clone())
        .collect();
    found.sort();
    found
}

async fn ok(client: &kube::Client, method: &str, path: &str, body: &Value) -> Value {
    let (status, answer) = call(client, method, path, body).await;
    assert!((200..300).contains(&status), "{method} {path}: {answer}");
    answer
}

async fn pod(client: &kube::Client, name: &str, ip: &str) {
    let pod = json!({
        "metadata": {"name": name, "labels": {"app": "web"}},
        "spec": {"nodeName": "n1", "containers": [{"name": "c", "image": "i"}]},
    });
    let mut pod = ok(client, "POST", "/api/v1/namespaces/d/pods", &pod).await;
    pod["status"] =
        json!({"phase": "Running", "podIP": ip, "conditions": [{"type": "Ready", "status": "True"}]});
    ok(
        client,
        "PUT",
        &format!("/api/v1/namespaces/d/pods/{name}/status"),
        &pod,
    )
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn slices_follow_services_and_pods() {
    let server = Server::start().await;
    let client = server.client().await;
    let slices = "/apis/discovery.k8s.io/v1/namespaces/d/endpointslices";
    ok(
        &client,
        "POST",
        "/api/v1/namespaces",
        &json!({"metadata": {"name": "d"}}),
    )
    .await;
    ok(
        &client,
        "POST",
        "/api/v1/nodes",
        &json!({"metadata": {"name": "n1"}}),
    )
    .await;
    let by_hand = json!({
        "metadata": {"name": "by-hand", "labels": {SERVICE_NAME: "web"}},
        "addressType": "IPv4", "endpoints": [{"addresses": ["10.9.9.9"]}], "ports": [{"port": 1}],
    });
    let by_hand = ok(&client, "POST", slices, &by_hand).await;
    let service = json!({
        "metadata": {"name": "web"},
        "spec": {"selector": {"app": "web"}, "ports": [{"port": 80, "targetPort": 8080}]},
    });
    ok(&client, "POST", "/api/v1/namespaces/d/services", &service).await;
    until(&client, "an empty slice", |s| ours(s).len() == 1).await;
    pod(&client, "a", "10.1.0.1").await;
    pod(&client, "b", "10.1.0.2").await;
    let found = until(&client, "two endpoints", |s| {
        addresses(s) == ["10.1.0.1", "10.1.0.2"]
    })
    .await;
    let [slice] = ours(&found)[..] else {
        panic!("{found:#?}")
    };
    assert_eq!(slice.ports.as_ref().unwrap()[0].port, Some(8080));
    // Who deletes a slice gets another one.
    let name = slice.metadata.name.clone().unwrap();
    ok(&client, "DELETE", &format!("{slices}/{name}"), &Value::Null).await;
    until(&client, "a new slice", |s| {
        addresses(s).len() == 2 && ours(s).iter().all(|s| s.metadata.name.as_ref() != Some(&name))
    })
    .await;
    ok(
        &client,
        "DELETE",
        "/api/v1/namespaces/d/pods/a?gracePeriodSeconds=0",
        &Value::Null,
    )
    .await;
    until(&client, "one endpoint", |s| addresses(s) == ["10.1.0.2"]).await;
    ok(
        &client,
        "DELETE",
        "/api/v1/namespaces/d/services/web",
        &Value::Null,
    )
    .await;
    until(&client, "no slice of ours", |s| ours(s).is_empty()).await;
    let after = ok(&client, "GET", &format!("{slices}/by-hand"), &Value::Null).await;
    assert_eq!(after, by_hand, "a slice made by hand is left alone");
    server.stop().await;
}
