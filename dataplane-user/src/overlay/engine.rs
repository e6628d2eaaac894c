//! Keeps the kernel as the nodes say it should be, whatever changes.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use beeline_cni::mac::Mac;
use futures::StreamExt as _;
use ipnet::IpNet;
use k8s_openapi::api::core::v1::Node;
use rtnetlink::MulticastGroup;
use rtnetlink::packet_core::{NetlinkMessage, NetlinkPayload};
use rtnetlink::packet_route::RouteNetlinkMessage;
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;
use tracing::{info, warn};

use super::diff::Changes;
use super::flannel::{self, Announcement, Local, Peer, Prefix};
use super::netconf::{Backend, NetConf};
use super::netlink::Netlink;
use super::path::Way;
use super::plan::{self, Here};
use super::snapshot::Snapshot;
use super::uplink::{self, Uplink, Wish};
use super::{bridge, diff, sysctl};
use crate::nodeaddr;
use crate::persist::{self, Faults};

/// The kernel is looked at this often even if it tells of no change.
const PERIOD: Duration = Duration::from_secs(10);
/// And this often while something fails.
const RETRY: Duration = Duration::from_secs(1);
/// Changes come in bursts: so long after the first one they are taken together.
const BURST: Duration = Duration::from_millis(30);
/// Pause between two looks, as a multiple of what the last one took, and at least and at most.
const REST: (u32, Duration, Duration) = (10, Duration::from_millis(100), Duration::from_secs(1));

/// Settings.
#[derive(Clone, Debug)]
pub struct Settings {
    /// flannel's `net-conf.json`.
    pub conf: NetConf,
    /// Of the annotations.
    pub prefix: Prefix,
    /// This node.
    pub node_name: String,
    /// Name or address of the uplink, as `--iface`.
    pub iface: Option<String>,
    /// Where peers send to, as `--public-ip`.
    pub public_v4: Option<Ipv4Addr>,
    /// Where peers send to, as `--public-ipv6`.
    pub public_v6: Option<Ipv6Addr>,
    /// `subnet.env`; `None`: not written.
    pub subnet_file: Option<PathBuf>,
    /// What `subnet.env` says of masquerading.
    pub masquerade: bool,
    /// Whether pods of this node have routes of their own, so that the rest of its podCIDRs is refused.
    pub own_range: bool,
}

impl Settings {
    /// Everything but the network as it is without flags; no file is written, and no range is this node's alone.
    #[must_use]
    pub fn new(conf: NetConf, node_name: impl Into<String>) -> Self {
        Self {
            conf,
            prefix: Prefix::default(),
            node_name: node_name.into(),
            iface: None,
            public_v4: None,
            public_v6: None,
            subnet_file: None,
            masquerade: true,
            own_range: false,
        }
    }
}

/// What is told of nodes.
#[derive(Clone, Debug)]
pub enum NodeUpdate {
    /// A node is new or has changed.
    Applied(Box<Node>),
    /// The same of this node, whose object is not in an API.
    Own(Box<Local>),
    /// The same of another one, by its name: how it is reached, if it takes part, and what is wrong with it.
    Peer(String, Option<Peer>, Vec<String>),
    /// A node is gone.
    Deleted(String),
    /// A complete list has been told: these are all.
    Listed(BTreeSet<String>),
}

/// How things are.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct View {
    /// What other nodes should know of this one.
    pub announcement: Option<Announcement>,
    /// podCIDRs of this node.
    pub subnets: Vec<IpNet>,
    /// MTU of the uplink in bytes: what pods of one node can send each other.
    pub mtu: u32,
    /// MTU towards other nodes' pods in bytes.
    pub overlay_mtu: u32,
    /// Name of the uplink.
    pub uplink: String,
    /// Why the network does not work, if so.
    pub failure: Option<String>,
    /// Whether the kernel has been made as it should be at least once, with all nodes known.
    pub ready: bool,
    /// Nodes that take part, but this one.
    pub peers: usize,
    /// Nodes that cannot be reached or read, and why.
    pub problems: BTreeMap<String, String>,
    /// Changes that were made to the kernel since the start.
    pub changes: u64,
    /// How other nodes are reached.
    pub ways: Arc<Vec<Way>>,
}

/// The loop and what it knows.
#[derive(Debug)]
pub struct Engine {
    settings: Settings,
    netlink: Netlink,
    nodes: mpsc::Receiver<NodeUpdate>,
    view: watch::Sender<View>,
    peers: BTreeMap<String, Peer>,
    unreadable: BTreeMap<String, String>,
    own: Option<(Local, Vec<IpAddr>)>,
    listed: bool,
    macs: (Option<Mac>, Option<Mac>),
    ours: BTreeSet<u32>,
    told: BTreeSet<String>,
}

impl Engine {
    /// Opens netlink in the network namespace of the calling thread.
    ///
    /// # Errors
    ///
    /// When that fails.
    pub fn new(
        settings: Settings,
        nodes: mpsc::Receiver<NodeUpdate>,
    ) -> std::io::Result<(Self, watch::Receiver<View>)> {
        let (view, receiver) = watch::channel(View::default());
        let engine = Self {
            settings,
            netlink: Netlink::open()?,
            nodes,
            view,
            peers: BTreeMap::new(),
            unreadable: BTreeMap::new(),
            own: None,
            listed: false,
            macs: (None, None),
            ours: BTreeSet::new(),
            told: BTreeSet::new(),
        };
        Ok((engine, receiver))
    }

    /// Runs until the sender of nodes is gone.
    ///
    /// # Errors
    ///
    /// When the kernel tells of no changes any more.
    pub async fn run(mut self) -> std::io::Result<()> {
        let groups = [
            MulticastGroup::Link,
            MulticastGroup::Neigh,
            MulticastGroup::Ipv4Ifaddr,
            MulticastGroup::Ipv6Ifaddr,
            MulticastGroup::Ipv4Route,
            MulticastGroup::Ipv6Route,
        ];
        let (connection, _handle, mut messages) = rtnetlink::new_multicast_connection(&groups)?;
        let connection = tokio::spawn(connection);
        let mut next = Instant::now();
        let mut earliest = Instant::now();
        let result = loop {
            tokio::select! {
                update = self.nodes.recv() => match update {
                    Some(update) => {
                        self.take(update);
                        next = next.min(Instant::now() + BURST);
                    }
                    None => break Ok(()),
                },
                message = messages.next() => match message {
                    Some((message, _)) => {
                        if self.matters(&message) {
                            next = next.min(Instant::now() + BURST);
                        }
                    }
                    None => break Err(std::io::Error::other("netlink's events ended")),
                },
                () = tokio::time::sleep_until(next.max(earliest)) => {
                    while let Ok(update) = self.nodes.try_recv() {
                        self.take(update);
                    }
                    let begun = Instant::now();
                    let works = self.reconcile().await;
                    let rest = (begun.elapsed() * REST.0).clamp(REST.1, REST.2);
                    earliest = Instant::now() + rest;
                    next = Instant::now() + if works { PERIOD } else { RETRY };
                }
            }
        };
        connection.abort();
        result
    }

    /// Pods and neighbours of other devices come and go without concern to us.
    fn matters(&self, message: &NetlinkMessage<RouteNetlinkMessage>) -> bool {
        match &message.payload {
            NetlinkPayload::InnerMessage(
                RouteNetlinkMessage::NewNeighbour(neighbour) | RouteNetlinkMessage::DelNeighbour(neighbour),
            ) => self.ours.contains(&neighbour.header.ifindex),
            _ => true,
        }
    }

    fn take(&mut self, update: NodeUpdate) {
        match update {
            NodeUpdate::Applied(node) => {
                let name = node.metadata.name.clone().unwrap_or_default();
                if name == self.settings.node_name {
                    let (local, problems) = flannel::local(&node, &self.settings.prefix);
                    self.note(&name, &problems);
                    self.own = Some((local, nodeaddr::candidates(&node)));
                    return;
                }
                let (peer, problems) =
                    flannel::peer(&node, &self.settings.prefix, &self.settings.conf.backend);
                self.take(NodeUpdate::Peer(name, peer, problems));
            }
            NodeUpdate::Own(local) => self.own = Some((*local, Vec::new())),
            NodeUpdate::Peer(name, peer, problems) => {
                self.note(&name, &problems);
                match peer {
                    Some(peer) => self.peers.insert(name, peer),
                    None => self.peers.remove(&name),
                };
            }
            NodeUpdate::Deleted(name) => {
                self.peers.remove(&name);
                self.unreadable.remove(&name);
            }
            NodeUpdate::Listed(names) => {
                self.listed = true;
                self.peers.retain(|name, _| names.contains(name));
                self.unreadable.retain(|name, _| names.contains(name));
            }
        }
    }

    fn note(&mut self, node: &str, problems: &[String]) {
        if problems.is_empty() {
            self.unreadable.remove(node);
        } else {
            self.unreadable.insert(node.to_owned(), problems.join("; "));
        }
    }

    /// Whether all is as it should be now.
    async fn reconcile(&mut self) -> bool {
        let mut view = self.view.borrow().clone();
        let result = self.attempt(&mut view).await;
        let failure = match result {
            Ok(errors) if errors.is_empty() => None,
            Ok(errors) => Some(shorten(&errors)),
            Err(cause) => Some(cause),
        };
        let works = failure.is_none();
        match &failure {
            Some(failure) if view.failure.as_ref() != Some(failure) => {
                warn!(failure, "the network between nodes does not work");
            }
            None if view.failure.is_some() => info!("the network between nodes works again"),
            _ => {}
        }
        view.failure = failure;
        view.ready |= works && self.listed;
        self.tell(&view.problems);
        self.view.send_if_modified(|old| {
            let changed = *old != view;
            *old = view;
            changed
        });
        works
    }

    /// Each problem once.
    fn tell(&mut self, problems: &BTreeMap<String, String>) {
        let now: BTreeSet<String> = problems
            .iter()
            .map(|(node, problem)| format!("node {node}: {problem}"))
            .collect();
        for problem in now.difference(&self.told) {
            warn!("{problem}");
        }
        self.told = now;
    }

    async fn attempt(&mut self, view: &mut View) -> Result<Vec<String>, String> {
        let Some((own, node_ips)) = self.own.clone() else {
            return Err(format!(
                "the podCIDR of node {} is not known yet",
                self.settings.node_name
            ));
        };
        let subnets = self.subnets(&own)?;
        let mut kernel = self.netlink.snapshot().await.map_err(|error| error.to_string())?;
        let conf = self.settings.conf.clone();
        let wish = Wish {
            annotated: own
                .uplink_v4
                .map(IpAddr::V4)
                .into_iter()
                .chain(own.uplink_v6.map(IpAddr::V6))
                .collect(),
            iface: self.settings.iface.clone(),
            node_ips,
            v4: conf.network_v4.is_some(),
            v6: conf.network_v6.is_some(),
        };
        let uplink = uplink::choose(&kernel, &wish)?;
        let here = Here {
            subnets: subnets.clone(),
            macs: self.macs(&own, &conf, &kernel),
            uplink,
        };
        sysctl::forward(&here.uplink.name, wish.v4, wish.v6).map_err(|error| error.to_string())?;
        let (desired, mut problems) = plan::plan(&conf, &here, &self.peers, &kernel, self.settings.own_range);
        for (node, problem) in &self.unreadable {
            problems.insert(node.clone(), problem.clone());
        }

        let changes = diff::devices(&kernel, &desired);
        let mut errors = self.netlink.apply(&changes).await;
        let mut made = changes.len();
        if !changes.is_empty() {
            info!(changes = made, "VXLAN devices are set up");
            kernel = self.netlink.snapshot().await.map_err(|error| error.to_string())?;
        }
        self.ours = desired
            .devices
            .iter()
            .filter_map(|device| kernel.link(&device.name))
            .map(|link| link.index)
            .collect();
        let changes = diff::entries(&kernel, &desired, self.listed);
        errors.extend(self.netlink.apply(&changes).await);
        made += changes.len();
        let bridges = bridge::find(&kernel, &subnets);
        bridge::answer(&bridges).map_err(|error| error.to_string())?;
        let changes = Changes {
            steps: vec![bridge::proxies(&kernel, &bridges)],
        };
        errors.extend(self.netlink.apply(&changes).await);
        made += changes.len();
        let errors: Vec<String> = errors.iter().map(ToString::to_string).collect();

        view.announcement = Some(self.announcement(&own, &here));
        view.subnets = subnets;
        view.mtu = here.uplink.mtu;
        view.overlay_mtu = desired.mtu;
        view.uplink.clone_from(&here.uplink.name);
        view.peers = self.peers.len();
        view.problems = problems;
        let ways = plan::ways(&self.peers, &here, &desired);
        if *view.ways != ways {
            view.ways = Arc::new(ways);
        }
        view.changes = view
            .changes
            .saturating_add(u64::try_from(made).unwrap_or(u64::MAX));
        if errors.is_empty() {
            self.write_subnet_env(&own, desired.mtu)?;
        }
        Ok(errors)
    }

    fn subnets(&self, own: &Local) -> Result<Vec<IpNet>, String> {
        let conf = &self.settings.conf;
        let pairs = [
            (
                conf.network_v4.map(IpNet::V4),
                own.subnet_v4.map(IpNet::V4),
                "IPv4",
            ),
            (
                conf.network_v6.map(IpNet::V6),
                own.subnet_v6.map(IpNet::V6),
                "IPv6",
            ),
        ];
        let mut subnets = Vec::new();
        for (network, subnet, family) in pairs {
            match (network, subnet) {
                (Some(network), Some(subnet)) if network.contains(&subnet) => subnets.push(subnet),
                (Some(network), Some(subnet)) => {
                    return Err(format!(
                        "this node's podCIDR {subnet} is not in the pod network {network}"
                    ));
                }
                (Some(_), None) => return Err(format!("this node has no {family} podCIDR yet")),
                (None, _) => {}
            }
        }
        Ok(subnets)
    }

    /// The addresses of our devices: those that peers know, else those that the devices have, else new ones.
    fn macs(&mut self, own: &Local, conf: &NetConf, kernel: &Snapshot) -> (Mac, Mac) {
        let names = match &conf.backend {
            Backend::Vxlan(vxlan) => plan::names(vxlan.vni),
            Backend::HostGw => (String::new(), String::new()),
        };
        let choose = |kept: Option<Mac>, annotated: Option<Mac>, name: &str| {
            kept.or(annotated)
                .or_else(|| kernel.link(name)?.mac.filter(|mac| mac.is_unicast()))
                .unwrap_or_else(random_mac)
        };
        let v4 = choose(self.macs.0, own.vtep_v4, &names.0);
        let v6 = choose(self.macs.1, own.vtep_v6, &names.1);
        self.macs = (Some(v4), Some(v6));
        (v4, v6)
    }

    fn announcement(&self, own: &Local, here: &Here) -> Announcement {
        let vxlan = matches!(self.settings.conf.backend, Backend::Vxlan(_));
        let Uplink { v4, v6, .. } = here.uplink;
        let public_v4 = own
            .public_v4
            .or(self.settings.public_v4)
            .filter(|_| v4.is_some())
            .or(v4);
        let public_v6 = own
            .public_v6
            .or(self.settings.public_v6)
            .filter(|_| v6.is_some())
            .or(v6);
        Announcement {
            v4: public_v4.map(|public| (public, vxlan.then_some(here.macs.0))),
            v6: public_v6.map(|public| (public, vxlan.then_some(here.macs.1))),
            backend: self.settings.conf.backend.clone(),
        }
    }

    fn write_subnet_env(&self, own: &Local, mtu: u32) -> Result<(), String> {
        let Some(path) = &self.settings.subnet_file else {
            return Ok(());
        };
        let conf = &self.settings.conf;
        let text = flannel::subnet_env(
            conf.network_v4.zip(own.subnet_v4),
            conf.network_v6.zip(own.subnet_v6),
            mtu,
            self.settings.masquerade,
        );
        if std::fs::read_to_string(path).is_ok_and(|old| old == text) {
            return Ok(());
        }
        let failed = |error: std::io::Error| format!("cannot write {}: {error}", path.display());
        if let Some(dir) = path.parent() {
            std::fs::create_dir_all(dir).map_err(failed)?;
        }
        persist::replace(path, text.as_bytes(), &Faults::default()).map_err(failed)
    }
}

/// The first few of many.
fn shorten(errors: &[String]) -> String {
    const SHOWN: usize = 3;
    let mut text = errors.iter().take(SHOWN).cloned().collect::<Vec<_>>().join("; ");
    if errors.len() > SHOWN {
        text += &format!("; and {} more", errors.len() - SHOWN);
    }
    text
}

/// Locally administered, unicast.
pub(super) fn random_mac() -> Mac {
    let mut bytes: [u8; 6] = rand::random();
    bytes[0] = (bytes[0] | 0x02) & !0x01;
    Mac(bytes)
}
