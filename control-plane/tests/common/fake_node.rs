//! Stands in for nodes and their agents: gives pods a node, says that they run, and ends them when they are deleted.
#![allow(clippy::unwrap_used, reason = "a test stops where it fails")]
#![allow(dead_code, reason = "each test binary uses a part of this")]
#![allow(unreachable_pub, reason = "shared by several test binaries")]

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use futures::StreamExt as _;
use k8s_openapi::api::core::v1::Pod;
use kube::api::{Api, DeleteParams, Patch, PatchParams};
use kube::runtime::{WatchStreamExt as _, watcher};
use kube::{Client, ResourceExt as _};
use serde_json::json;

use crate::common::call;

/// Nodes that run whatever they are given, except images that are called `broken`. Stops on drop.
pub struct FakeNodes(tokio::task::JoinHandle<()>);

impl Drop for FakeNodes {
    fn drop(&mut self) {
        self.0.abort();
    }
}

impl FakeNodes {
    pub async fn start(client: &Client, names: &[&str]) -> Self {
        for name in names {
            let node = json!({
                "metadata": {"name": name, "labels": {"kubernetes.io/hostname": name}},
                "status": {
                    "nodeInfo": {"kubeletVersion": "v1.36.0"},
                    "conditions": [{"type": "Ready", "status": "True", "reason": "KubeletReady"}],
                },
            });
            let (code, answer) = call(client, "POST", "/api/v1/nodes", &node).await;
            assert_eq!(code, 201, "{answer}");
        }
        let names: Arc<[String]> = names.iter().map(|name| (*name).to_owned()).collect();
        let client = client.clone();
        let next = AtomicU32::new(0);
        Self(tokio::spawn(async move {
            let mut pods = watcher(Api::<Pod>::all(client.clone()), watcher::Config::default())
                .applied_objects()
                .boxed();
            while let Some(pod) = pods.next().await {
                let Ok(pod) = pod else { continue };
                let number = next.fetch_add(1, Ordering::Relaxed);
                tokio::spawn(tend(client.clone(), pod, Arc::clone(&names), number));
            }
        }))
    }
}

async fn tend(client: Client, pod: Pod, names: Arc<[String]>, number: u32) {
    let namespace = pod.namespace().unwrap();
    let name = pod.name_any();
    let api: Api<Pod> = Api::namespaced(client.clone(), &namespace);
    if pod.metadata.deletion_timestamp.is_some() {
        drop(api.delete(&name, &DeleteParams::default().grace_period(0)).await);
        return;
    }
    let spec = pod.spec.as_ref().unwrap();
    if spec.node_name.as_deref().unwrap_or_default().is_empty() {
        let node = &names[usize::try_from(number).unwrap() % names.len()];
        let binding = json!({"metadata": {"name": name}, "target": {"kind": "Node", "name": node}});
        let path = format!("/api/v1/namespaces/{namespace}/pods/{name}/binding");
        call(&client, "POST", &path, &binding).await;
        return;
    }
    let phase = pod.status.as_ref().and_then(|status| status.phase.as_deref());
    if phase == Some("Pending")
        && !spec
            .containers
            .iter()
            .any(|c| c.image.as_deref() == Some("broken"))
    {
        let ip = format!("10.244.{}.{}", number / 250, number % 250 + 1);
        let now = jiff::Timestamp::now().strftime("%Y-%m-%dT%H:%M:%SZ").to_string();
        let status = json!({"status": {
            "phase": "Running", "podIP": ip, "podIPs": [{"ip": ip}],
            "conditions": [{"type": "Ready", "status": "True", "lastTransitionTime": now}],
        }});
        drop(
            api.patch_status(&name, &PatchParams::default(), &Patch::Strategic(status))
                .await,
        );
    }
}
