//! Nodes and pods as network namespaces.
//!
//! ```text
//!   pod eth0 ──veth── node ──up0──veth── switch ──veth──up0── node ──veth── eth0 pod
//!   10.244.1.2/32      172.31.0.1/32      (routes)       172.31.0.2/32       10.244.2.2/32
//! ```
//! Plain routes, no bridge and no overlay: every link is point to point, gateways are link-local addresses that are the
//! same on every node (169.254.1.1 and fe80::1 towards pods), as Calico does it.

use std::fs;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context, Result, bail};

use crate::netns::NetNs;
use crate::process::{self, Place, Process};
use crate::{cgroup, residue, signals};

/// The port at which the pods' echo servers listen, TCP and UDP.
pub const ECHO_PORT: u16 = 8080;

/// A cluster: the switch, and the names and directories that all of its parts share. Removed on drop.
#[derive(Debug)]
pub struct Cluster {
    name: String,
    state: PathBuf,
    bpffs: PathBuf,
    cgroup: PathBuf,
    switch: Place,
    keep: bool,
    nodes: AtomicU32,
    outside: AtomicU32,
}

impl Cluster {
    /// A cluster without nodes. Also makes Ctrl-C remove it.
    ///
    /// # Errors
    /// When not root, or cgroup v2, bpffs or network namespaces cannot be used.
    pub fn new() -> Result<Self> {
        Self::create(false)
    }

    /// A cluster that stays when this process ends, with all processes in it.
    ///
    /// # Errors
    /// As [`Cluster::new`].
    pub fn kept() -> Result<Self> {
        Self::create(true)
    }

    fn create(keep: bool) -> Result<Self> {
        static SEQUENCE: AtomicU32 = AtomicU32::new(0);
        if !nix::unistd::geteuid().is_root() {
            bail!("not root: network namespaces, cgroups and eBPF programs need root");
        }
        signals::clean_up_on_signals()?;
        let name = format!(
            "bl{}-{}",
            std::process::id(),
            SEQUENCE.fetch_add(1, Ordering::Relaxed)
        );
        let (state, bpffs, group) = (
            residue::state_root().join(&name),
            residue::bpffs()?.join(&name),
            cgroup::mount_point()?.join(&name),
        );
        // Leftovers of a process that had our number: nobody else can own them.
        let _ = residue::remove(&name);
        let guard = RemoveOnError(Some(name.clone()));
        fs::create_dir_all(&state).with_context(|| format!("cannot make {}", state.display()))?;
        residue::claim(&state)?;
        fs::create_dir_all(&bpffs).with_context(|| format!("cannot make {}", bpffs.display()))?;
        let switch_group = group.join("switch");
        cgroup::create(&switch_group)?;
        let netns = Arc::new(NetNs::create(&format!("{name}-sw"))?);
        netns.ip_batch(&[
            format!("addr add {SWITCH_V4}/32 dev lo"),
            "addr add 169.254.1.2/32 dev lo scope link".to_owned(),
            format!("addr add {SWITCH_V6}/128 dev lo nodad"),
        ])?;
        guard.defuse();
        let switch = Place::new(netns, switch_group, keep);
        Ok(Self {
            name,
            state,
            bpffs,
            cgroup: group,
            switch,
            keep,
            nodes: AtomicU32::new(0),
            outside: AtomicU32::new(0),
        })
    }

    /// `bl<pid>-<n>`.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Where the control plane and clients that are no node's run.
    #[must_use]
    pub fn switch(&self) -> &Place {
        &self.switch
    }

    /// The address of the switch, for the control plane.
    #[must_use]
    pub fn switch_address(&self) -> Ipv4Addr {
        SWITCH_V4
    }

    /// Logs and databases.
    #[must_use]
    pub fn state(&self) -> &Path {
        &self.state
    }

    /// Whether it stays when this process ends.
    #[must_use]
    pub fn is_kept(&self) -> bool {
        self.keep
    }

    /// Adds a node, named `node-<i>` from 1 on.
    ///
    /// # Errors
    /// When a part of it cannot be made.
    pub fn add_node(&self) -> Result<Node> {
        let index = self.nodes.fetch_add(1, Ordering::Relaxed) + 1;
        let index = u8::try_from(index).context("too many nodes")?;
        let short = format!("n{index}");
        let (v4, v6) = (Ipv4Addr::new(172, 31, 0, index), node_v6(index));
        let (group, state, bpffs) = (
            self.cgroup.join(&short),
            self.state.join(&short),
            self.bpffs.join(&short),
        );
        // Processes of the node are beside its pods, not above them: cgroup v2 wants leaves for processes.
        cgroup::create(&group.join("host"))?;
        fs::create_dir_all(&state).with_context(|| format!("cannot make {}", state.display()))?;
        fs::create_dir_all(&bpffs).with_context(|| format!("cannot make {}", bpffs.display()))?;
        let netns = self.plug(&short, v4, v6)?;
        netns.ip_batch(&["addr add 169.254.1.1/32 dev lo scope link".to_owned()])?;
        self.switch.netns().ip_batch(&routes(index, v4, v6))?;
        Ok(Node {
            name: format!("node-{index}"),
            index,
            host: Place::new(netns, group.join("host"), self.keep),
            cgroup: group,
            state,
            bpffs,
            v4,
            v6,
            pods: AtomicU32::new(1),
        })
    }
}

impl Cluster {
    /// A network namespace with these addresses at its `up0`, which leads to the switch's device of this name.
    fn plug(&self, short: &str, v4: Ipv4Addr, v6: Ipv6Addr) -> Result<Arc<NetNs>> {
        let netns = Arc::new(NetNs::create(&format!("{}-{short}", self.name))?);
        self.switch.netns().ip_batch(&[
            format!("link add {short} type veth peer name up0 netns {}", netns.name()),
            format!("link set {short} up"),
            format!("addr add fe80::1/64 dev {short} nodad"),
        ])?;
        netns.ip_batch(&[
            format!("addr add {v4}/32 dev up0"),
            format!("addr add {v6}/128 dev up0 nodad"),
            "link set up0 up".to_owned(),
            format!("route add default via 169.254.1.2 dev up0 onlink src {v4}"),
            format!("route add ::/0 via fe80::1 dev up0 src {v6}"),
        ])?;
        Ok(netns)
    }

    /// Adds a host that is no part of the cluster, at 192.0.2.`i` and `2001:db8::i`: a client from the world. It knows
    /// the nodes, and no pod or service address but by [`Cluster::route_to`].
    ///
    /// # Errors
    /// When a part of it cannot be made.
    pub fn add_outside_host(&self) -> Result<OutsideHost> {
        let index = self.outside.fetch_add(1, Ordering::Relaxed) + 1;
        let index = u8::try_from(index).context("too many hosts")?;
        let short = format!("o{index}");
        let (v4, v6) = (Ipv4Addr::new(192, 0, 2, index), outside_v6(index));
        let group = self.cgroup.join(&short);
        cgroup::create(&group)?;
        let netns = self.plug(&short, v4, v6)?;
        self.switch.netns().ip_batch(&[
            format!("route add {v4}/32 dev {short} src {SWITCH_V4}"),
            format!("route add {v6}/128 dev {short} src {SWITCH_V6}"),
        ])?;
        Ok(OutsideHost {
            place: Place::new(netns, group, self.keep),
            v4,
            v6,
        })
    }

    /// Sends what the world sends to an address (a load balancer's, an external one) to this node.
    ///
    /// # Errors
    /// When the route cannot be set.
    pub fn route_to(&self, address: IpAddr, node: &Node) -> Result<()> {
        let device = format!("n{}", node.index);
        let line = match address {
            IpAddr::V4(v4) => format!("route replace {v4}/32 via {} dev {device} onlink", node.v4),
            IpAddr::V6(v6) => format!("route replace {v6}/128 via {} dev {device}", node.v6),
        };
        self.switch.netns().ip_batch(&[line])
    }

    /// Cuts a node off, as by a power failure: nothing arrives any more, and nobody is told.
    ///
    /// # Errors
    /// When `ip` fails.
    pub fn unplug(&self, node: &Node) -> Result<()> {
        // Not the link itself: its routes would go with it, and clients would be told that there is none.
        let [v4, v6] = node.pod_cidrs();
        self.switch.netns().ip_batch(&[
            format!("route replace blackhole {}/32", node.v4),
            format!("route replace blackhole {v4}"),
            format!("route replace blackhole {}/128", node.v6),
            format!("route replace blackhole {v6}"),
        ])
    }

    /// Undoes [`Cluster::unplug`].
    ///
    /// # Errors
    /// When `ip` fails.
    pub fn plug_in(&self, node: &Node) -> Result<()> {
        self.switch
            .netns()
            .ip_batch(&routes(node.index, node.v4, node.v6))
    }
}

/// The switch's routes to a node and its pods.
fn routes(index: u8, v4: Ipv4Addr, v6: Ipv6Addr) -> [String; 4] {
    [
        format!("route replace {v4}/32 dev n{index} src {SWITCH_V4}"),
        format!("route replace 10.244.{index}.0/24 via {v4} dev n{index} onlink src {SWITCH_V4}"),
        format!("route replace {v6}/128 dev n{index} src {SWITCH_V6}"),
        format!("route replace fd00:10:244:{index:x}::/64 via {v6} dev n{index} src {SWITCH_V6}"),
    ]
}

/// A host outside the cluster. Goes with it.
#[derive(Debug)]
pub struct OutsideHost {
    place: Place,
    v4: Ipv4Addr,
    v6: Ipv6Addr,
}

impl OutsideHost {
    /// Where its processes run.
    #[must_use]
    pub fn place(&self) -> &Place {
        &self.place
    }

    /// Its IPv4 address.
    #[must_use]
    pub fn v4(&self) -> Ipv4Addr {
        self.v4
    }

    /// Its IPv6 address.
    #[must_use]
    pub fn v6(&self) -> Ipv6Addr {
        self.v6
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if self.keep {
            return;
        }
        let (_, failed) = residue::remove(&self.name);
        for line in failed {
            eprintln!("cannot remove {line}");
        }
    }
}

const SWITCH_V4: Ipv4Addr = Ipv4Addr::new(172, 31, 0, 254);
const SWITCH_V6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0x172, 0x31, 0, 0, 0, 0, 0xfe);

fn outside_v6(index: u8) -> Ipv6Addr {
    Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, u16::from(index))
}

fn node_v6(index: u8) -> Ipv6Addr {
    Ipv6Addr::new(0xfd00, 0x172, 0x31, 0, 0, 0, 0, u16::from(index))
}

struct RemoveOnError(Option<String>);

impl RemoveOnError {
    fn defuse(mut self) {
        self.0 = None;
    }
}

impl Drop for RemoveOnError {
    fn drop(&mut self) {
        if let Some(name) = self.0.take() {
            let _ = residue::remove(&name);
        }
    }
}

/// A node: what an agent needs to believe that it has a machine to itself. Goes with its cluster.
#[derive(Debug)]
pub struct Node {
    name: String,
    index: u8,
    host: Place,
    cgroup: PathBuf,
    state: PathBuf,
    bpffs: PathBuf,
    v4: Ipv4Addr,
    v6: Ipv6Addr,
    pods: AtomicU32,
}

impl Node {
    /// `node-<i>`, its name in the API.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Where the node's own processes run: its network namespace, and a cgroup below the node's.
    #[must_use]
    pub fn host(&self) -> &Place {
        &self.host
    }

    /// The top of the node's cgroup subtree, where the agent attaches.
    #[must_use]
    pub fn cgroup(&self) -> &Path {
        &self.cgroup
    }

    /// The node's directory in bpffs.
    #[must_use]
    pub fn bpffs(&self) -> &Path {
        &self.bpffs
    }

    /// The node's state directory.
    #[must_use]
    pub fn state(&self) -> &Path {
        &self.state
    }

    /// The node's IPv4 address.
    #[must_use]
    pub fn v4(&self) -> Ipv4Addr {
        self.v4
    }

    /// The node's IPv6 address.
    #[must_use]
    pub fn v6(&self) -> Ipv6Addr {
        self.v6
    }

    /// The addresses of the pods, IPv4 and IPv6.
    #[must_use]
    pub fn pod_cidrs(&self) -> [String; 2] {
        [
            format!("10.244.{}.0/24", self.index),
            format!("fd00:10:244:{:x}::/64", self.index),
        ]
    }

    /// Adds a pod without a process.
    ///
    /// # Errors
    /// When a part of it cannot be made.
    pub fn add_pod(&self, name: &str) -> Result<Pod> {
        let number = u8::try_from(self.pods.fetch_add(1, Ordering::Relaxed) + 1).context("too many pods")?;
        let v4 = Ipv4Addr::new(10, 244, self.index, number);
        let v6 = Ipv6Addr::new(
            0xfd00,
            0x10,
            0x244,
            u16::from(self.index),
            0,
            0,
            0,
            u16::from(number),
        );
        let host = self.host.netns();
        let netns = Arc::new(NetNs::create(&format!("{}-p{number}", host.name()))?);
        let link = format!("p{number}");
        host.ip_batch(&[
            format!("link add {link} type veth peer name eth0 netns {}", netns.name()),
            format!("addr add fe80::1/64 dev {link} nodad"),
            format!("link set {link} up"),
            format!("route add {v4}/32 dev {link} src {}", self.v4),
            format!("route add {v6}/128 dev {link} src {}", self.v6),
        ])?;
        netns.ip_batch(&[
            format!("addr add {v4}/32 dev eth0"),
            format!("addr add {v6}/128 dev eth0 nodad"),
            "link set eth0 up".to_owned(),
            format!("route add default via 169.254.1.1 dev eth0 onlink src {v4}"),
            format!("route add ::/0 via fe80::1 dev eth0 src {v6}"),
        ])?;
        self.pod(name, netns, v4, v6)
    }

    /// A pod whose network is there.
    pub(crate) fn pod(&self, name: &str, netns: Arc<NetNs>, v4: Ipv4Addr, v6: Ipv6Addr) -> Result<Pod> {
        let group = self.cgroup.join(format!("pod-{name}"));
        cgroup::create(&group)?;
        Ok(Pod {
            name: name.to_owned(),
            place: Place::new(netns, group, self.host.keeps()),
            v4,
            v6,
            log: self.state.join(format!("pod-{name}.log")),
            echo: None,
        })
    }

    /// Adds a pod that runs an echo server which answers with the pod's name, TCP and UDP, at [`ECHO_PORT`].
    ///
    /// # Errors
    /// When a part of it cannot be made or the server does not come up.
    pub fn add_echo_pod(&self, name: &str) -> Result<Pod> {
        let mut pod = self.add_pod(name)?;
        pod.start_echo(ECHO_PORT)?;
        Ok(pod)
    }
}

/// A pod: a network namespace and a cgroup, maybe with an echo server. Goes with its cluster.
#[derive(Debug)]
pub struct Pod {
    name: String,
    place: Place,
    v4: Ipv4Addr,
    v6: Ipv6Addr,
    log: PathBuf,
    echo: Option<Process>,
}

impl Pod {
    /// The pod's name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Where the pod's processes run.
    #[must_use]
    pub fn place(&self) -> &Place {
        &self.place
    }

    /// The pod's IPv4 address.
    #[must_use]
    pub fn v4(&self) -> Ipv4Addr {
        self.v4
    }

    /// The pod's IPv6 address.
    #[must_use]
    pub fn v6(&self) -> Ipv6Addr {
        self.v6
    }

    /// Both addresses.
    #[must_use]
    pub fn addresses(&self) -> [IpAddr; 2] {
        [self.v4.into(), self.v6.into()]
    }

    /// Starts the echo server, and waits until it listens.
    ///
    /// # Errors
    /// When it does not come up.
    pub fn start_echo(&mut self, port: u16) -> Result<()> {
        let process = process::echo(&self.place, &self.name, port, &self.log)?;
        self.echo = Some(process);
        Ok(())
    }

    /// Ends the echo server as kubelet does: SIGTERM; it finishes the connections that it has.
    ///
    /// # Errors
    /// When there is none, or it does not end.
    pub fn stop_echo(&mut self) -> Result<()> {
        let mut process = self
            .echo
            .take()
            .with_context(|| format!("pod {} runs no echo server", self.name))?;
        process.terminate().map(|_| ())
    }
}
