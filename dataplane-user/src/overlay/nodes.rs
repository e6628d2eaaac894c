//! Nodes of the cluster: read from the API, and what this node says of itself written there.

use std::collections::BTreeSet;
use std::time::Duration;

use futures::StreamExt as _;
use jiff::Timestamp;
use k8s_openapi::api::core::v1::Node;
use kube::api::{Patch, PatchParams};
use kube::core::DeserializeGuard;
use kube::runtime::watcher;
use kube::{Api, Client, ResourceExt as _};
use tokio::sync::{mpsc, watch};
use tracing::{debug, info, warn};

use super::engine::{NodeUpdate, View};
use super::flannel::{self, Prefix};

/// Nodes in one page of a list.
const PAGE_SIZE: u32 = 500;
/// First and longest pause after a failure.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(5));
/// Pause before a patch that failed is tried again, as flannel's.
const RETRY: Duration = Duration::from_secs(3);

/// Watches all nodes until the receiver is gone. This node's own object goes to `own`, too.
pub async fn watch(
    client: Client,
    node_name: String,
    sender: mpsc::Sender<NodeUpdate>,
    own: watch::Sender<Option<Node>>,
) {
    let api: Api<DeserializeGuard<Node>> = Api::all(client);
    let mut stream = std::pin::pin!(watcher(api, watcher::Config::default().page_size(PAGE_SIZE)));
    let mut names = BTreeSet::new();
    let mut pause = BACKOFF.0;
    let mut failing = false;
    while let Some(item) = stream.next().await {
        let update = match item {
            Ok(event) => {
                if failing && !matches!(event, watcher::Event::Init) {
                    (failing, pause) = (false, BACKOFF.0);
                    info!("nodes can be watched again");
                }
                match event {
                    watcher::Event::Init => {
                        names.clear();
                        None
                    }
                    watcher::Event::InitApply(node) => {
                        names.insert(node.name_any());
                        applied(node, &node_name, &own)
                    }
                    watcher::Event::InitDone => Some(NodeUpdate::Listed(std::mem::take(&mut names))),
                    watcher::Event::Apply(node) => applied(node, &node_name, &own),
                    watcher::Event::Delete(node) => {
                        let name = node.name_any();
                        if name == node_name {
                            own.send_replace(None);
                        }
                        Some(NodeUpdate::Deleted(name))
                    }
                }
            }
            Err(watcher::Error::WatchError(status)) if status.code == 410 => None,
            Err(error) => {
                if !failing {
                    failing = true;
                    warn!(%error, "nodes cannot be watched; what is known of them stays in force");
                }
                tokio::select! {
                    () = tokio::time::sleep(pause) => {}
                    () = sender.closed() => return,
                }
                pause = (pause * 2).min(BACKOFF.1);
                None
            }
        };
        if let Some(update) = update
            && sender.send(update).await.is_err()
        {
            return;
        }
    }
}

fn applied(
    node: DeserializeGuard<Node>,
    node_name: &str,
    own: &watch::Sender<Option<Node>>,
) -> Option<NodeUpdate> {
    match node.0 {
        Ok(node) => {
            if node.metadata.name.as_deref() == Some(node_name) {
                own.send_replace(Some(node.clone()));
            }
            Some(NodeUpdate::Applied(Box::new(node)))
        }
        Err(invalid) => {
            // what is known of it stays
            let name = invalid.metadata.name.as_deref().unwrap_or_default();
            warn!(node = name, error = %invalid.error, "a node cannot be read");
            None
        }
    }
}

/// Keeps this node's annotations and its condition NetworkUnavailable in the API as they should be, until a sender is gone.
pub async fn publish(
    client: Client,
    node_name: String,
    prefix: Prefix,
    mut view: watch::Receiver<View>,
    mut own: watch::Receiver<Option<Node>>,
) {
    let api: Api<Node> = Api::all(client);
    loop {
        let patch = {
            let view = view.borrow_and_update();
            let own = own.borrow_and_update();
            own.as_ref().and_then(|node| wanted(node, &view, &prefix))
        };
        let mut pause = None;
        if let Some(patch) = patch {
            match api
                .patch_status(&node_name, &PatchParams::default(), &Patch::Strategic(&patch))
                .await
            {
                Ok(node) => {
                    debug!(%patch, "this node is announced");
                    // The watch may lag behind: an older object must not cause a second patch.
                    let text = node.metadata.resource_version.clone();
                    let _newer = tokio::time::timeout(
                        RETRY,
                        own.wait_for(|seen| {
                            seen.as_ref()
                                .is_none_or(|seen| seen.metadata.resource_version == text)
                        }),
                    )
                    .await;
                    pause = Some(Duration::ZERO);
                }
                Err(error) => {
                    warn!(%error, node = node_name, "this node cannot be announced to others");
                    pause = Some(RETRY);
                }
            }
        }
        tokio::select! {
            () = tokio::time::sleep(pause.unwrap_or_default()), if pause.is_some() => {}
            changed = view.changed() => if changed.is_err() { return },
            changed = own.changed() => if changed.is_err() { return },
        }
    }
}

fn wanted(node: &Node, view: &View, prefix: &Prefix) -> Option<serde_json::Value> {
    let annotations = view
        .announcement
        .as_ref()
        .map(|a| flannel::annotations(a, prefix))
        .unwrap_or_default();
    let announced = flannel::is_announced(node, &annotations);
    // Nothing is said of the network before anything is known of it.
    let network = match &view.failure {
        Some(failure) if !view.ready => {
            (flannel::network_condition(node) != Some("True")).then_some(Err(failure.as_str()))
        }
        None if view.ready => (flannel::network_condition(node) != Some("False")).then_some(Ok(())),
        // It worked: what fails now may be one node of many, and pods that run must not be taken for dead.
        _ => None,
    };
    if announced && network.is_none() {
        return None;
    }
    Some(flannel::status_patch(
        &annotations,
        network,
        &Timestamp::now().to_string(),
    ))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::netconf::{Backend, Vxlan};
    use super::*;

    fn node(condition: Option<&str>) -> Node {
        let conditions: Vec<_> = condition
            .iter()
            .map(|status| json!({"type": "NetworkUnavailable", "status": status}))
            .collect();
        serde_json::from_value(json!({"metadata": {"name": "n"}, "status": {"conditions": conditions}}))
            .unwrap()
    }

    fn view(ready: bool, failure: Option<&str>) -> View {
        let announcement = flannel::Announcement {
            v4: Some((
                "192.168.0.2".parse().unwrap(),
                Some("aa:bb:cc:dd:ee:ff".parse().unwrap()),
            )),
            v6: None,
            backend: Backend::Vxlan(Vxlan::default()),
        };
        View {
            announcement: Some(announcement),
            ready,
            failure: failure.map(Into::into),
            ..View::default()
        }
    }

    #[test]
    fn the_condition_follows_the_network_but_a_single_failure_does_not_unmake_it() {
        let status = |node: &Node, view: &View| {
            let patch = wanted(node, view, &Prefix::default()).unwrap();
            patch["status"]["conditions"][0]["status"]
                .as_str()
                .map(ToOwned::to_owned)
        };
        assert_eq!(status(&node(None), &view(false, None)), None);
        assert_eq!(status(&node(None), &view(true, None)).unwrap(), "False");
        assert_eq!(status(&node(None), &view(false, Some("x"))).unwrap(), "True");
        assert_eq!(status(&node(Some("True")), &view(true, None)).unwrap(), "False");
        assert_eq!(status(&node(Some("False")), &view(true, Some("x"))), None);
    }

    #[test]
    fn what_is_there_already_is_not_written_again() {
        let view = view(true, None);
        let mut node = node(Some("False"));
        node.metadata.annotations = Some(flannel::annotations(
            view.announcement.as_ref().unwrap(),
            &Prefix::default(),
        ));
        assert_eq!(wanted(&node, &view, &Prefix::default()), None);
        node.metadata.annotations.as_mut().unwrap().pop_first();
        assert!(wanted(&node, &view, &Prefix::default()).is_some());
    }
}
