//! The ABI between the eBPF programs and user space.
//!
//! Rules: every struct is `repr(C)` with explicit padding and a size and offset assert beside it; addresses and ports are
//! big-endian newtypes; flags are integers, never `bool`, `Option` or an enum, because the kernel hands out whatever bytes
//! are in the map. Values are aligned to 8 bytes at most.

mod addr;
mod backend;
mod config;
mod counter;
mod flow;
mod frontend;
mod health;
mod pod;
mod service;
mod socket;

pub use addr::{Addr, BePort};
pub use backend::{Backend, BackendStats, backend_state};
pub use config::{
    Device, MasqueradeKey, NodeConfig, POD_RANGES, Range, SERVICE_RANGES, config_flag, device_flag,
    masquerade, node_addr_flag,
};
pub use counter::{COUNTERS, Counter};
pub use flow::{
    Affinity, AffinityKey, Flow, FlowKey, FragmentKey, FragmentPorts, Trace, flow_flag, flow_role,
};
pub use frontend::{FrontendKey, FrontendValue, frontend_class, frontend_flag, frontend_kind, protocol};
pub use health::{BackendHealth, Event, event_kind};
pub use pod::{Limit, Pod, PodDevice, pod_flag};
pub use service::{Service, ServiceStats, SetWord, Slot, SourceRangeKey, algorithm, service_flag};
pub use socket::{NetnsAddrs, SockFlow, SockOrigin, SockOriginKey, SockState};

/// Version of everything in this module. Pinned maps and links live in a directory that is named after it, so that a
/// build with another layout never reads them.
pub const ABI_VERSION: u32 = 2;

/// Id 0 is never given to a service or a backend: a zeroed map entry refers to nothing.
pub const NO_ID: u32 = 0;

/// Names of the maps, as in the object file and below the pin directory.
pub mod map_name {
    /// Hash: [`super::FrontendKey`] to [`super::FrontendValue`].
    pub const FRONTENDS: &str = "FRONTENDS";
    /// Memory-mapped array by service id: [`super::Service`].
    pub const SERVICES: &str = "SERVICES";
    /// Memory-mapped array: [`super::Slot`].
    pub const SLOTS: &str = "SLOTS";
    /// Memory-mapped array by backend id: [`super::Backend`].
    pub const BACKENDS: &str = "BACKENDS";
    /// Memory-mapped array by backend id, written by the programs: [`super::BackendStats`].
    pub const BACKEND_STATS: &str = "BACKEND_STATS";
    /// LRU hash: [`super::SockOriginKey`] to [`super::SockOrigin`].
    pub const SOCK_ORIGIN: &str = "SOCK_ORIGIN";
    /// Hash: cookie (`u64`) of a connected socket to [`super::SockState`].
    pub const SOCK_CONN: &str = "SOCK_CONN";
    /// Socket storage of UDP sockets: [`super::SockState`].
    pub const SOCK_STATE: &str = "SOCK_STATE";
    /// Socket storage: [`super::SockFlow`].
    pub const SOCK_FLOW: &str = "SOCK_FLOW";
    /// Per-CPU array by [`super::Counter`]: `u64`.
    pub const COUNTERS: &str = "COUNTERS";
    /// Memory-mapped array by service id, written by the programs: [`super::ServiceStats`].
    pub const SERVICE_STATS: &str = "SERVICE_STATS";
    /// Memory-mapped array by backend id, written by the programs: [`super::BackendHealth`].
    pub const BACKEND_HEALTH: &str = "BACKEND_HEALTH";
    /// Trie: [`super::SourceRangeKey`] to `u32` (always 1).
    pub const SOURCE_RANGES: &str = "SOURCE_RANGES";
    /// Hash: [`super::Addr`] to `u32` of [`super::node_addr_flag`].
    pub const NODE_ADDRS: &str = "NODE_ADDRS";
    /// Hash: interface index (`u32`) to [`super::Device`].
    pub const DEVICES: &str = "DEVICES";
    /// Memory-mapped array of one row: [`super::NodeConfig`].
    pub const CONFIG: &str = "CONFIG";
    /// LRU hash: [`super::AffinityKey`] to [`super::Affinity`].
    pub const AFFINITY: &str = "AFFINITY";
    /// LRU hash: [`super::FlowKey`] to [`super::Flow`], roles forward and reverse.
    pub const CONNTRACK: &str = "CONNTRACK";
    /// LRU hash: [`super::FlowKey`] to [`super::Flow`], the NAT roles.
    pub const NAT: &str = "NAT";
    /// Trie: [`super::MasqueradeKey`] to `u32` of [`super::masquerade`].
    pub const MASQUERADE: &str = "MASQUERADE";
    /// Hash: [`super::Addr`] to [`super::Pod`]: pods of this node.
    pub const PODS: &str = "PODS";
    /// Hash: interface index (`u32`) of a pod's device to [`super::PodDevice`].
    pub const POD_DEVICES: &str = "POD_DEVICES";
    /// Array by a part of a tuple's hash: [`super::Trace`].
    pub const TRACES: &str = "TRACES";
    /// LRU hash: [`super::FragmentKey`] to [`super::FragmentPorts`].
    pub const FRAGMENTS: &str = "FRAGMENTS";
    /// Ring buffer of [`super::Event`].
    pub const EVENTS: &str = "EVENTS";
    /// Hash: cookie of a network namespace (`u64`) to [`super::NetnsAddrs`].
    pub const NETNS_ADDRS: &str = "NETNS_ADDRS";
}

#[cfg(feature = "user")]
mod plain {
    use super::{
        Addr, Affinity, AffinityKey, Backend, BackendHealth, BackendStats, Device, Event, Flow, FlowKey,
        FragmentKey, FragmentPorts, FrontendKey, FrontendValue, Limit, MasqueradeKey, NetnsAddrs, NodeConfig,
        Pod, PodDevice, Service, ServiceStats, Slot, SockFlow, SockOrigin, SockOriginKey, SockState,
        SourceRangeKey, Trace,
    };

    macro_rules! pod {
        ($($type:ty),*) => {
            // SAFETY: each is Copy, 'static and repr(C) or repr(transparent) over integers, with its padding spelled out.
            $(unsafe impl aya::Pod for $type {})*
        };
    }
    pod!(
        Addr,
        Affinity,
        AffinityKey,
        Backend,
        BackendHealth,
        BackendStats,
        Device,
        Event,
        Flow,
        FlowKey,
        FragmentKey,
        FragmentPorts,
        FrontendKey,
        FrontendValue,
        Limit,
        MasqueradeKey,
        NetnsAddrs,
        NodeConfig,
        Pod,
        PodDevice,
        Service,
        ServiceStats,
        Slot,
        SockFlow,
        SockOrigin,
        SockOriginKey,
        SockState,
        SourceRangeKey,
        Trace
    );
}
