//! What the agent tells the command line: JSON with stable field names.

use dataplane_model::program::Fill;
use serde::{Deserialize, Serialize};

/// A place where a service is offered.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct FrontendView {
    /// IP address.
    pub address: String,
    /// Port.
    pub port: u16,
    /// `ClusterIP`, `NodePort`, …
    pub kind: String,
    /// Only clients of the service's source ranges may enter here.
    #[serde(default)]
    pub restricted: bool,
}

/// Single connections of the agent to a backend that seems to have failed.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ProbingView {
    /// How many, since it was last good.
    pub probes: u32,
    /// How the last one ended: `answered`, `refused` or `silent`; none before the first has.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last: Option<String>,
}

/// A backend of a service.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct BackendView {
    /// IP address.
    pub address: String,
    /// Port.
    pub port: u16,
    /// `active`, `terminating`; `probing`: a connection to it has failed, and it is asked whether it answers; or `suspect`:
    /// it did not, and is asked again and again.
    pub state: String,
    /// In the latter two states.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub probing: Option<ProbingView>,
    /// It gets no new connections of this service, because it is suspect. (Not all backends of a service are left out.)
    #[serde(default)]
    pub left_out: bool,
    /// On this node.
    pub local: bool,
    /// The sets that it is in: `cluster`, `local`.
    pub sets: Vec<String>,
    /// Relative weight.
    pub weight: u32,
    /// Connections that sockets of this node have open to it, through any service.
    pub active_connections: u64,
    /// Connections that sockets of this node have made to it, through any service, since it is known.
    pub total_connections: u64,
    /// Datagrams that unconnected sockets of this node have sent to it.
    pub datagrams: u64,
    /// Connections of this node's sockets to it that failed or were not answered in time.
    #[serde(default)]
    pub connect_failures: u64,
    /// Times that an established connection had to send again.
    #[serde(default)]
    pub timeouts: u64,
}

/// A service as the kernel has it.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ServiceView {
    /// Empty if the service is left from an earlier agent and not claimed yet.
    pub namespace: String,
    /// Name of the Service.
    pub name: String,
    /// Name of its port.
    pub port: String,
    /// `TCP`, `UDP` or `SCTP`.
    pub protocol: String,
    /// `IPv4` or `IPv6`.
    pub family: String,
    /// How a backend is chosen.
    pub algorithm: String,
    /// A client keeps its backend until it has been idle for so many seconds; 0: it does not.
    #[serde(default)]
    pub affinity_seconds: u32,
    /// `Cluster` or `Local`: backends for traffic to the ClusterIP.
    #[serde(default)]
    pub internal_traffic_policy: String,
    /// `Cluster` or `Local`: backends for traffic from other hosts to the other addresses.
    #[serde(default)]
    pub external_traffic_policy: String,
    /// Who may enter by a restricted frontend.
    #[serde(default)]
    pub source_ranges: Vec<String>,
    /// Entries of the Maglev tables of the sets `cluster` and `local`; 0: there is none.
    #[serde(default)]
    pub maglev_entries: [u32; 2],
    /// Connections and flows that were given a backend.
    #[serde(default)]
    pub connections: u64,
    /// Connections and flows that were refused or dropped because there was no backend for them.
    #[serde(default)]
    pub without_backend: u64,
    /// Connections and flows that were dropped because the client is outside of the source ranges.
    #[serde(default)]
    pub denied: u64,
    /// Where it is offered.
    pub frontends: Vec<FrontendView>,
    /// Who serves it.
    pub backends: Vec<BackendView>,
}

/// Body of `/services`.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Services {
    /// In order of namespace and name.
    pub services: Vec<ServiceView>,
}

/// Where a kind of object comes from.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct SourceView {
    /// `Service`, `EndpointSlice` or `Node`.
    pub kind: String,
    /// Why it fails, if it does.
    pub error: Option<String>,
}

/// Fill of a map.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct MapView {
    /// Its name.
    pub name: String,
    /// Entries in use or resting.
    pub used: u32,
    /// Its size.
    pub max: u32,
}

impl From<&Fill> for MapView {
    fn from(fill: &Fill) -> Self {
        Self {
            name: fill.map.into(),
            used: fill.used,
            max: fill.max,
        }
    }
}

/// A program in the kernel.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct ProgramView {
    /// Its name.
    pub name: String,
    /// The kernel's id.
    pub id: u32,
    /// Instructions that the verifier walked through.
    pub verified_instructions: u32,
    /// True if it took the place of an earlier agent's.
    pub replaced: bool,
}

/// A feature of the kernel.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct FeatureView {
    /// What, and since which version.
    pub name: String,
    /// Whether this kernel has it.
    pub available: bool,
}

/// Body of `/status`.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Status {
    /// Name of the node.
    pub node: String,
    /// Its zone, if its Node object says.
    pub zone: Option<String>,
    /// Always `ebpf`.
    pub mode: String,
    /// Version of the agent.
    pub version: String,
    /// Version of the maps' layout.
    pub abi: u32,
    /// Process id of the agent.
    pub pid: u32,
    /// `uname -r`.
    pub kernel: String,
    /// Features that make a difference.
    pub features: Vec<FeatureView>,
    /// Programs in the kernel.
    pub programs: Vec<ProgramView>,
    /// The cgroup whose sockets are served.
    pub cgroup_root: String,
    /// Where maps and links are pinned.
    pub pin_dir: String,
    /// Fill of the maps.
    pub maps: Vec<MapView>,
    /// What the programs counted.
    pub counters: std::collections::BTreeMap<String, u64>,
    /// True after the first complete sync.
    pub synced: bool,
    /// What is not programmed completely, or not yet: `Services`, `the addresses of this node`, `its devices`.
    pub missing: Vec<String>,
    /// When the last sync ended (RFC 3339).
    pub last_sync: Option<String>,
    /// Services known.
    pub services: usize,
    /// Endpoint slices known.
    pub endpoint_slices: usize,
    /// Where objects come from.
    pub sources: Vec<SourceView>,
    /// Services that are not as desired, and why.
    pub failing: Vec<String>,
    /// The last objects that could not be used, and why.
    pub problems: Vec<String>,
    /// What an operator should know.
    pub warnings: Vec<String>,
}
