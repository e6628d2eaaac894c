//! What makes a machine a node of a cluster: registers it, runs its pods, reports on both.
//!
//! Data flows one way: the API's pods -> `pods` (one worker for each pod) -> `runtime` -> status -> the API. Two rules keep it
//! simple: a worker looks at everything again whenever anything has changed, and what runs is asked of the runtime, never
//! remembered, so that the program can be killed and started at any time.

mod channels;
pub mod config;
mod node;
mod pods;
pub mod process;
pub mod run;
mod runtime;
mod server;

use std::net::IpAddr;
use std::path::Path;
use std::sync::Arc;

use tokio::sync::mpsc;

use runtime::{CriRuntime, ProcessRuntime, Processes, Runtime};

/// Addresses from which this host reaches the world, at most one per address family.
#[must_use]
pub fn own_addresses() -> Vec<IpAddr> {
    node::addresses(&http::Uri::default())
}

/// Ends all pods that a node has left in these directories and in this cgroup; the node itself does not run. `endpoint`: the
/// container runtime that has run them; `None`: they are processes of the host.
///
/// # Errors
/// When something of a pod cannot be removed.
pub async fn remove_pods(
    pod_dir: &Path,
    log_dir: &Path,
    cgroup_root: &Path,
    endpoint: Option<&str>,
) -> anyhow::Result<()> {
    let dirs = runtime::Dirs {
        root: pod_dir.to_owned(),
        logs: log_dir.to_owned(),
    };
    let cgroup = run::pods_cgroup(cgroup_root);
    let (changed, _nobody_listens) = mpsc::unbounded_channel();
    let runtime: Arc<dyn Runtime> = match endpoint {
        Some(endpoint) => CriRuntime::open(endpoint, dirs, &cgroup, changed).await?,
        None => {
            let settings = runtime::Settings {
                dirs,
                cgroup,
                ..runtime::Settings::default()
            };
            Arc::new(Processes(ProcessRuntime::open(settings, changed)?))
        }
    };
    for pod in runtime.pods() {
        runtime.remove(&pod.uid).await?;
    }
    runtime.close()?;
    Ok(())
}
