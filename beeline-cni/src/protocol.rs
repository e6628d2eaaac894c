//! What the plugin and the agent say to each other.
//!
//! One connection to a unix stream socket carries one [`Request`] as JSON, ended by shutting down the sending side, and one
//! [`Response`]. With the first byte of an ADD or CHECK goes an open file of the pod's network namespace (SCM_RIGHTS), so
//! that the agent needs no view of the runtime's mounts.

use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use crate::mac::Mac;

/// Where the agent listens unless the network configuration has `socket`.
pub const DEFAULT_SOCKET: &str = "/run/beeline/cni.sock";
/// Where the agent keeps attachments, and the plugin what it could not tell the agent, unless the configuration has `stateDir`.
pub const DEFAULT_STATE_DIR: &str = "/var/lib/beeline/cni";
/// Below the state directory: DELs that the agent has not seen yet, one [`Del`] as JSON in each file.
pub const RELEASES: &str = "releases";
/// Longest message in bytes: a GC names every sandbox of the node.
pub const MAX_MESSAGE: u64 = 4 << 20;

/// Error codes of the CNI specification 1.1 and where we use them.
pub mod code {
    /// Unknown or unsupported `cniVersion`.
    pub const INCOMPATIBLE_VERSION: u32 = 1;
    /// Nothing is known of the container.
    pub const UNKNOWN_CONTAINER: u32 = 3;
    /// A missing or wrong environment variable.
    pub const BAD_ENVIRONMENT: u32 = 4;
    /// Reading or writing failed.
    pub const IO: u32 = 5;
    /// Text that cannot be decoded.
    pub const DECODE: u32 = 6;
    /// A network configuration that cannot be used.
    pub const BAD_CONFIG: u32 = 7;
    /// `CNI_NETNS` is the namespace of the plugin or of the agent.
    pub const SAME_NAMESPACE: u32 = 8;
    /// The agent does not answer, or has no address free: the same request may succeed later.
    pub const TRY_AGAIN: u32 = 11;
    /// STATUS: ADD would fail.
    pub const NOT_AVAILABLE: u32 = 50;
    /// CHECK: something of the attachment is missing or different (plugin specific).
    pub const CHECK_FAILED: u32 = 100;
    /// Anything else that fails in the agent (plugin specific).
    pub const FAILED: u32 = 101;
}

/// A question to the agent.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(tag = "op", rename_all = "snake_case")]
pub enum Request {
    /// Give a pod its network, or note the network that it has.
    Add(Box<Add>),
    /// Take it away.
    Del(Del),
    /// See whether it is as ADD left it.
    Check(Check),
    /// Remove all attachments of a network but these.
    Gc(Gc),
    /// Whether an ADD would be served.
    Status,
    /// All attachments and addresses, for people.
    List,
}

/// What an attachment is known by.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
pub struct Key {
    /// Name of the network configuration.
    pub network: String,
    /// `CNI_CONTAINERID`: a pod that is made again has another one.
    pub container_id: String,
    /// `CNI_IFNAME`.
    pub ifname: String,
}

impl std::fmt::Display for Key {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "{} of container {} in network {}",
            self.ifname, self.container_id, self.network
        )
    }
}

/// ADD.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Add {
    /// Which attachment.
    pub key: Key,
    /// `CNI_NETNS`, for results and people; the open file counts.
    pub netns: String,
    /// The pod, if the runtime says.
    pub pod: Option<Pod>,
    /// Bytes; `None`: what the node's uplink has.
    pub mtu: Option<u32>,
    /// Address that the pod's device must have.
    pub mac: Option<Mac>,
    /// Addresses that the pod must have; of a family without one any.
    pub ips: Vec<IpAddr>,
    /// hostPorts.
    pub port_mappings: Vec<PortMapping>,
    /// Limits.
    pub bandwidth: Option<Bandwidth>,
    /// Chained behind another plugin: what is there already. The pod's network is then left as it is.
    pub chained: Option<Chained>,
}

/// The pod that a sandbox is for.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Pod {
    /// Namespace of the pod.
    pub namespace: String,
    /// Name of the pod.
    pub name: String,
    /// UID of the pod, if the runtime says.
    pub uid: String,
}

/// Capability `portMappings`.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct PortMapping {
    /// Port of the node.
    pub host_port: u16,
    /// Port of the pod.
    pub container_port: u16,
    /// `tcp`, `udp` or `sctp`.
    #[serde(default = "tcp")]
    pub protocol: String,
    /// Address of the node; `None`: any.
    #[serde(default, rename = "hostIP")]
    pub host_ip: Option<IpAddr>,
}

fn tcp() -> String {
    "tcp".into()
}

/// Capability `bandwidth`: bits per second and bits; zero: no limit.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Bandwidth {
    /// To the pod.
    pub ingress_rate: u64,
    /// To the pod.
    pub ingress_burst: u64,
    /// From the pod.
    pub egress_rate: u64,
    /// From the pod.
    pub egress_burst: u64,
}

/// What the plugins before us made.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Chained {
    /// Addresses of the pod.
    pub ips: Vec<IpAddr>,
}

/// DEL.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Del {
    /// Which attachment.
    pub key: Key,
}

/// CHECK.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Check {
    /// Which attachment.
    pub key: Key,
    /// Addresses that the runtime believes the pod has.
    pub ips: Vec<IpAddr>,
}

/// GC.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Gc {
    /// Only attachments of this network are looked at.
    pub network: String,
    /// (container id, interface name) of those that live.
    pub valid: Vec<(String, String)>,
}

/// The agent's answer.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Response {
    /// ADD was done.
    Added(Added),
    /// All others were done.
    Done,
    /// Answer to [`Request::List`].
    List(List),
    /// It was not done, and nothing of it is left.
    Failed(Failure),
}

/// What ADD made; chained, nothing.
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
pub struct Added {
    /// Name and address of the device in the node.
    pub host: Option<(String, Mac)>,
    /// Address of the device in the pod.
    pub mac: Option<Mac>,
    /// Bytes.
    pub mtu: u32,
    /// Addresses of the pod, each with its gateway.
    pub ips: Vec<(IpAddr, IpAddr)>,
}

/// Answer to [`Request::List`].
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
pub struct List {
    /// Ranges that addresses come from, as CIDRs.
    pub ranges: Vec<String>,
    /// Addresses in use or waiting to be free.
    pub addresses: Vec<Address>,
}

/// A line of [`List`].
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Address {
    /// The address.
    pub address: IpAddr,
    /// `used`, `quarantine` or `host-local`.
    pub state: String,
    /// Who has it.
    pub key: Option<Key>,
    /// The pod, if known.
    pub pod: Option<Pod>,
    /// Device in the node, if known.
    pub device: Option<String>,
}

/// A CNI error.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize, thiserror::Error)]
#[error("{msg}{}{details}", if details.is_empty() { "" } else { ": " })]
pub struct Failure {
    /// One of [`code`].
    pub code: u32,
    /// What failed.
    pub msg: String,
    /// Why.
    #[serde(default)]
    pub details: String,
}

impl Failure {
    /// A failure whose text says all.
    #[must_use]
    pub fn new(code: u32, msg: impl Into<String>) -> Self {
        Self {
            code,
            msg: msg.into(),
            details: String::new(),
        }
    }

    /// A failure with its cause.
    #[must_use]
    pub fn because(code: u32, msg: impl Into<String>, cause: impl std::fmt::Display) -> Self {
        Self {
            code,
            msg: msg.into(),
            details: cause.to_string(),
        }
    }
}
