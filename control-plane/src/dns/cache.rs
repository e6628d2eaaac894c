//! Keeps the zone as the API is.

use std::sync::{Arc, PoisonError};

use futures::{StreamExt as _, stream};
use k8s_openapi::api::core::v1::{Node, NodeStatus, Service};
use kube::runtime::watcher;
use kube::{Api, Client, Resource};
use tokio_util::sync::CancellationToken;

use super::Dns;
use super::zone::Change;
use crate::controllers::work::watch;

fn without_annotations<K: Resource>(object: &mut K) {
    object.meta_mut().annotations = None;
}

fn slim_service(service: &mut Service) {
    without_annotations(service);
    service.status = None;
}

fn slim_node(node: &mut Node) {
    without_annotations(node);
    node.spec = None;
    node.status = node.status.take().map(|status| NodeStatus {
        addresses: status.addresses,
        ..NodeStatus::default()
    });
}

/// Runs until `stop` is cancelled. The API may come and go meanwhile: what was known last is answered.
pub(super) async fn follow(dns: Arc<Dns>, client: Client, stop: CancellationToken) {
    let any = watcher::Config::default();
    let api = || client.clone();
    let mut changes = stream::select_all([
        watch(Api::all(api()), any.clone(), slim_service, Change::Service),
        watch(Api::all(api()), any.clone(), without_annotations, Change::Slice),
        watch(
            Api::all(api()),
            any.clone(),
            without_annotations,
            Change::Namespace,
        ),
        watch(Api::all(api()), any, slim_node, Change::Node),
    ]);
    while let Some(Some(change)) = stop.run_until_cancelled(changes.next()).await {
        match change {
            Ok(change) => dns
                .zone
                .write()
                .unwrap_or_else(PoisonError::into_inner)
                .observe(change),
            Err(error) => tracing::warn!(%error, "DNS: watch interrupted, trying again"),
        }
    }
}
