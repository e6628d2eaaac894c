//! Brings the node up.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result};
use beeline_cni::client::{Agent as _, Socket};
use beeline_cni::protocol::{Request, Response};
use k8s_openapi::api::core::v1::Pod;
use kube::runtime::{WatchStreamExt as _, watcher};
use kube::{Api, Client};
use tokio::sync::mpsc;

use crate::config::{NodeArgs, RuntimeKind, Shared};
use crate::node::{self, Facts};
use crate::pods::{self, Context, Events};
use crate::runtime::{CriRuntime, Dirs, ProcessRuntime, Processes, Runtime, Settings};
use crate::server;

/// A request that gets no answer in this time is tried again; watches have bookmarks more often.
const READ_TIMEOUT: Duration = Duration::from_secs(295);

/// Registers the node and runs its pods, for ever.
///
/// # Errors
/// When it cannot start.
pub async fn run(args: NodeArgs, shared: Shared) -> Result<()> {
    let config = client_config(&shared.kubeconfig).await?;
    let host_ips = if args.node_ip.is_empty() {
        node::addresses(&config.cluster_url)
    } else {
        args.node_ip.clone()
    };
    anyhow::ensure!(
        !host_ips.is_empty(),
        "this host has no address from which it reaches others: --node-ip says which one it has"
    );
    let client = Client::try_from(config).context("set up the API client")?;
    let (changed, changes) = mpsc::unbounded_channel();
    let dirs = Dirs {
        root: args.pod_dir.clone(),
        logs: args.pod_log_dir.clone(),
    };
    let cgroup = pods_cgroup(&shared.cgroup_root);
    let runtime: Arc<dyn Runtime> = match args.runtime {
        RuntimeKind::Process => {
            let settings = Settings {
                dirs,
                image_dir: args.image_dir.clone(),
                cgroup,
                netns_prefix: args.netns_prefix.clone(),
                cni_socket: shared.cni_socket.clone(),
            };
            let runtime =
                ProcessRuntime::open(settings, changed).context("take over the pods of this node")?;
            Arc::new(Processes(runtime))
        }
        RuntimeKind::Cri => {
            let endpoint = &args.container_runtime_endpoint;
            CriRuntime::open(endpoint, dirs, &cgroup, changed)
                .await
                .with_context(|| format!("container runtime at {endpoint}"))?
        }
    };
    let facts = Facts {
        name: shared.node_name.clone(),
        labels: args.node_labels.clone(),
        ips: host_ips.clone(),
        max_pods: args.max_pods,
        runtime: runtime.version(),
        port: server::start(args.kubelet_port, &shared.kubeconfig, Arc::clone(&runtime)).await?,
    };
    let context = Context {
        client: client.clone(),
        runtime: Arc::clone(&runtime),
        events: Events::new(client.clone(), &shared.node_name),
        host_ips,
        cluster_dns: args.cluster_dns.clone(),
        cluster_domain: args.cluster_domain.clone(),
        node: shared.node_name.clone(),
        manifests: args.pod_manifest_path.clone(),
    };
    let own = watcher::Config::default().fields(&format!("spec.nodeName={}", shared.node_name));
    let pods = watcher(Api::<Pod>::all(client.clone()), own)
        .modify(|pod: &mut Pod| pod.metadata.managed_fields = None)
        .default_backoff();
    let keeper = node::keep(client, facts, move || {
        agent_ready(&shared.cni_socket).and_then(|()| runtime.network_ready())
    });
    tokio::join!(keeper, pods::run(context, pods, changes));
    anyhow::bail!("the watch of pods has ended")
}

/// Whether the agent can attach pods; the text says why not.
fn agent_ready(socket: &Path) -> Result<(), String> {
    match Socket.ask(socket, &Request::Status, None) {
        Ok(Response::Done) => Ok(()),
        Ok(Response::Failed(failure)) => Err(failure.to_string()),
        Ok(other) => Err(format!("the agent answered {other:?}")),
        Err(error) => Err(error.to_string()),
    }
}

/// The cgroup that those of the pods are in.
pub(crate) fn pods_cgroup(root: &Path) -> PathBuf {
    root.join("beeline-pods")
}

async fn client_config(kubeconfig: &Path) -> Result<kube::Config> {
    let text = kube::config::Kubeconfig::read_from(kubeconfig)
        .with_context(|| format!("read {}", kubeconfig.display()))?;
    let mut config = kube::Config::from_custom_kubeconfig(text, &kube::config::KubeConfigOptions::default())
        .await
        .with_context(|| format!("use {}", kubeconfig.display()))?;
    config.read_timeout = Some(READ_TIMEOUT);
    Ok(config)
}
