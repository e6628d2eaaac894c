//! The pod network as a part of the agent.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use dataplane_common::abi::masquerade::{EXEMPT, REMOTE_PODS, SOURCE};
use ipnet::IpNet;
use tokio::sync::{mpsc, watch};
use tracing::{info, warn};

use super::engine::{Engine, View};
use super::flags::NetworkConfig;
use super::path::{self, Cause, Path, Paths};
use super::{nodes, view};
use crate::agent::events::Events;
use crate::agent::state::Shared;
use crate::cni;
use crate::devices::Handle;
use crate::kernel::{MasqueradeTable, PodTable};
use crate::takeover::forward;

/// Nodes that the watch may be ahead of the engine.
const QUEUE: usize = 256;
/// How often firewalls are looked at.
const FORWARDING: Duration = Duration::from_secs(10);

/// The pod network; the CNI plugin is served as long as it lives.
#[derive(Debug)]
pub struct Network {
    /// How things are.
    pub view: watch::Receiver<View>,
    /// What is attached.
    pub service: Arc<cni::Service>,
    /// What `beeline node list` shows.
    pub nodes: view::Reader,
    _server: cni::Server,
}

/// Where it is told of.
#[derive(Clone, Debug)]
pub struct Reports {
    /// Events of the Node.
    pub events: Events,
    /// Metrics.
    pub shared: Arc<Shared>,
}

/// Tells of ways to other nodes.
struct Watcher {
    reports: Reports,
    paths: Arc<Paths>,
}

impl path::Observer for Watcher {
    fn looked(&self, found: Result<Duration, Cause>) {
        self.reports.shared.metrics.overlay.looked(found);
    }

    fn forgotten(&self) {
        self.reports.shared.metrics.overlay.failing(&self.paths.all());
    }

    fn changed(&self, path: &Path) {
        self.forgotten();
        let (way, events) = (&path.way, &self.reports.events);
        let pods = format!("pods of node {} ({})", way.node, way.subnet);
        match path.problem() {
            Some(problem) => events.path_failed(&format!("{pods}: {problem}")),
            None if path.failed_before => events.path_works(&format!("{pods} can be reached again")),
            None => {}
        }
    }
}

/// Starts it, once its configuration is known. `client`: of the API whose nodes take part; not needed with etcd. `fatal`:
/// told when it ends for good.
///
/// # Errors
///
/// When the kernel, the state of the CNI plugin or its socket cannot be used, or nothing tells of nodes.
pub async fn start(
    config: NetworkConfig,
    client: Option<kube::Client>,
    (masquerade, pods): (MasqueradeTable, PodTable),
    devices: Handle,
    reports: Reports,
    fatal: mpsc::Sender<anyhow::Error>,
) -> anyhow::Result<Network> {
    let (sender, queue) = mpsc::channel(QUEUE);
    let mut settings = config.settings;
    if let Some(etcd) = &config.etcd {
        settings.conf = etcd.config().await;
    }
    let network = settings.clone();
    let world = World {
        enabled: settings.masquerade,
        pods: [
            settings.conf.network_v4.map(IpNet::V4),
            settings.conf.network_v6.map(IpNet::V6),
        ]
        .into_iter()
        .flatten()
        .collect(),
        others: config.non_masquerade_cidrs,
    };
    // A thread of its own: a large cluster's routes take long, and Services should not wait for them.
    let (ready, view) = std::sync::mpsc::channel();
    std::thread::Builder::new()
        .name("network".into())
        .spawn(move || {
            let result = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .and_then(|runtime| {
                    runtime.block_on(async {
                        let (engine, view) = Engine::new(settings, queue)?;
                        let _unheard = ready.send(view);
                        engine.run().await
                    })
                });
            if let Err(error) = result {
                let _stopping = fatal.blocking_send(anyhow::Error::new(error).context("the pod network"));
            }
        })?;
    let view = view.recv().context("open netlink for the pod network")?;
    let forwarded = world.pods.iter().chain(&world.others).copied().collect();
    tokio::spawn(keep_forwarding(forwarded, view.clone()));
    tokio::spawn(follow(masquerade, world, view.clone()));
    let node_name = network.node_name.clone();
    match (config.etcd, client) {
        (Some(etcd), _) => {
            tokio::spawn(etcd.keep(network, sender, view.clone()));
        }
        (None, Some(client)) => {
            let own = watch::Sender::new(None);
            tokio::spawn(nodes::publish(
                client.clone(),
                node_name.clone(),
                network.prefix,
                view.clone(),
                own.subscribe(),
            ));
            tokio::spawn(nodes::watch(client, node_name.clone(), sender, own));
        }
        (None, None) => anyhow::bail!("nodes can be known neither from an API nor from etcd"),
    }
    let paths = Arc::new(Paths::default());
    if let Some(period) = config.probe_period {
        let watcher = Watcher {
            reports: reports.clone(),
            paths: Arc::clone(&paths),
        };
        tokio::spawn(path::keep(Arc::clone(&paths), view.clone(), period, watcher));
    }
    tokio::spawn(count(reports.shared, view.clone()));
    let nodes = view::Reader {
        node_name,
        view: view.clone(),
        paths,
    };
    let dir = config.cni.state_dir.clone();
    // its work on devices waits for the kernel in a runtime of its own, which this thread cannot have
    let (cni, network) = (config.cni, view.clone());
    let serving = cni::Serving::new(pods, config.pod_shortcut, devices);
    let opened = std::thread::spawn(move || cni::Service::open(cni, network, Some(serving))).join();
    let service = opened
        .map_err(|_| anyhow::anyhow!("the thread that reads them panicked"))
        .and_then(|opened| Ok(opened?))
        .with_context(|| format!("read attachments of pods below {}", dir.display()))?;
    let service = Arc::new(service);
    let server = cni::Server::start(&config.socket, Arc::clone(&service))
        .with_context(|| format!("listen on {}", config.socket.display()))?;
    if let Some(conf) = config.cni_conf {
        tokio::spawn(cni::install::when_ready(conf, view.clone()));
    }
    Ok(Network {
        view,
        service,
        nodes,
        _server: server,
    })
}

/// What is masqueraded.
struct World {
    enabled: bool,
    /// Networks of all pods: not the world.
    pods: Vec<IpNet>,
    /// Neither are these.
    others: Vec<IpNet>,
}

/// Multicast is for nobody in particular (spec cni-overlay 1.7, rule 5).
const MULTICAST: [&str; 2] = ["224.0.0.0/4", "ff00::/8"];

impl World {
    fn table(&self, subnets: &[IpNet]) -> BTreeMap<IpNet, u32> {
        let multicast = MULTICAST.iter().filter_map(|net| net.parse().ok());
        let mut table: BTreeMap<IpNet, u32> = self
            .others
            .iter()
            .map(IpNet::trunc)
            .chain(multicast)
            .map(|net| (net, EXEMPT))
            .collect();
        table.extend(self.pods.iter().map(|net| (net.trunc(), EXEMPT | REMOTE_PODS)));
        let own = if self.enabled { SOURCE | EXEMPT } else { EXEMPT };
        table.extend(subnets.iter().map(|net| (net.trunc(), own)));
        table
    }
}

/// Looks again and again whether a firewall drops what pods send each other.
async fn keep_forwarding(networks: Vec<IpNet>, mut view: watch::Receiver<View>) {
    let mut told = BTreeSet::new();
    loop {
        let networks = networks.clone();
        match tokio::task::spawn_blocking(move || forward::ensure(&networks)).await {
            Ok(Ok(report)) => {
                for chain in &report.opened {
                    info!(
                        chain,
                        "its policy drops what is forwarded: packets of pods are let through by rules in it"
                    );
                }
                for chain in report.others {
                    if told.insert(chain.clone()) {
                        warn!(
                            chain,
                            "its policy drops what is forwarded: packets of pods may be lost there"
                        );
                    }
                }
            }
            Ok(Err(error)) => {
                if told.insert(error.to_string()) {
                    warn!(%error, "whether a firewall drops packets of pods cannot be seen");
                }
            }
            Err(error) => warn!(%error, "the look at firewalls ended"),
        }
        let ended = async { while view.changed().await.is_ok() {} };
        if tokio::time::timeout(FORWARDING, ended).await.is_ok() {
            return;
        }
    }
}

/// Keeps the metrics in step.
async fn count(shared: Arc<Shared>, mut view: watch::Receiver<View>) {
    loop {
        shared.metrics.overlay.follow(&view.borrow_and_update());
        if view.changed().await.is_err() {
            return;
        }
    }
}

/// Keeps the table in step with this node's podCIDRs.
async fn follow(mut table: MasqueradeTable, world: World, mut view: watch::Receiver<View>) {
    let mut held = None;
    loop {
        let subnets = view.borrow_and_update().subnets.clone();
        // until they are known, what an earlier agent knew stays
        if !subnets.is_empty() && held.as_ref() != Some(&subnets) {
            match table.set(&world.table(&subnets)) {
                Ok(()) => held = Some(subnets),
                Err(error) => warn!(%error, "masquerading of pods cannot be set"),
            }
        }
        if view.changed().await.is_err() {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pods_of_this_node_are_sources_and_all_pods_and_multicast_are_exempt() {
        let nets = |texts: &[&str]| {
            texts
                .iter()
                .map(|text| text.parse().unwrap())
                .collect::<Vec<IpNet>>()
        };
        let mut world = World {
            enabled: true,
            pods: nets(&["10.244.0.0/16"]),
            others: nets(&["192.168.7.0/24"]),
        };
        let own: IpNet = "10.244.1.0/24".parse().unwrap();
        let table = world.table(&[own]);
        assert_eq!(table[&own], SOURCE | EXEMPT);
        assert_eq!(table[&world.pods[0]], EXEMPT | REMOTE_PODS);
        assert_eq!(table.values().filter(|flags| **flags == EXEMPT).count(), 3);
        // pods are told apart from the world still, but nobody gets another address
        world.enabled = false;
        let table = world.table(&[own]);
        assert_eq!(table[&own], EXEMPT);
        assert_eq!(table[&world.pods[0]], EXEMPT | REMOTE_PODS);
    }
}
