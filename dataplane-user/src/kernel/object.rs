//! The embedded object file and the shapes of its maps.

use aya::maps::MapType;
use dataplane_common::abi::{
    Addr, Affinity, AffinityKey, Backend, BackendHealth, BackendStats, COUNTERS, Device, Flow, FlowKey,
    FragmentKey, FragmentPorts, FrontendKey, FrontendValue, MasqueradeKey, NetnsAddrs, NodeConfig, Pod,
    PodDevice, Service, ServiceStats, Slot, SockFlow, SockOrigin, SockOriginKey, SockState, SourceRangeKey,
    Trace, map_name,
};

use super::Sizes;

/// The object file that `build.rs` made of `dataplane-ebpf/src/bin/sock.rs`.
pub(super) fn bytes() -> &'static [u8] {
    aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/sock"))
}

/// The object file that `build.rs` made of `dataplane-ebpf/src/bin/nic.rs`.
pub(super) fn nic_bytes() -> &'static [u8] {
    aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/nic"))
}

/// The object file that `build.rs` made of `dataplane-ebpf/src/bin/pod.rs`.
pub(super) fn pod_bytes() -> &'static [u8] {
    aya::include_bytes_aligned!(concat!(env!("OUT_DIR"), "/pod"))
}

const F_NO_PREALLOC: u32 = 1;
const F_MMAPABLE: u32 = 1 << 10;

/// Shape of a map.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct MapSpec {
    /// Name in the object and of the pin.
    pub name: &'static str,
    /// Kind.
    pub kind: MapType,
    /// Size of a key in bytes.
    pub key_size: u32,
    /// Size of a value in bytes.
    pub value_size: u32,
    /// `BPF_F_*`.
    pub flags: u32,
    /// Size in entries; `None` where the kernel fixes it.
    pub max_entries: Option<u32>,
}

#[expect(
    clippy::cast_possible_truncation,
    reason = "types of the ABI are at most a few hundred bytes"
)]
const fn spec<K, V>(name: &'static str, kind: MapType, flags: u32) -> MapSpec {
    MapSpec {
        name,
        kind,
        key_size: size_of::<K>() as u32,
        value_size: size_of::<V>() as u32,
        flags,
        max_entries: None,
    }
}

/// Every map that is pinned, with the sizes of the Rust types.
pub const MAPS: [MapSpec; 26] = [
    spec::<FrontendKey, FrontendValue>(map_name::FRONTENDS, MapType::Hash, F_NO_PREALLOC),
    spec::<u32, Service>(map_name::SERVICES, MapType::Array, F_MMAPABLE),
    spec::<u32, Slot>(map_name::SLOTS, MapType::Array, F_MMAPABLE),
    spec::<u32, Backend>(map_name::BACKENDS, MapType::Array, F_MMAPABLE),
    spec::<u32, BackendStats>(map_name::BACKEND_STATS, MapType::Array, F_MMAPABLE),
    spec::<u32, ServiceStats>(map_name::SERVICE_STATS, MapType::Array, F_MMAPABLE),
    spec::<u32, BackendHealth>(map_name::BACKEND_HEALTH, MapType::Array, F_MMAPABLE),
    spec::<u32, NodeConfig>(map_name::CONFIG, MapType::Array, F_MMAPABLE),
    spec::<Addr, u32>(map_name::NODE_ADDRS, MapType::Hash, F_NO_PREALLOC),
    spec::<SourceRangeKey, u32>(map_name::SOURCE_RANGES, MapType::LpmTrie, F_NO_PREALLOC),
    spec::<AffinityKey, Affinity>(map_name::AFFINITY, MapType::LruHash, 0),
    // a ring buffer has neither keys nor values
    spec::<(), ()>(map_name::EVENTS, MapType::RingBuf, 0),
    spec::<u64, NetnsAddrs>(map_name::NETNS_ADDRS, MapType::Hash, F_NO_PREALLOC),
    spec::<SockOriginKey, SockOrigin>(map_name::SOCK_ORIGIN, MapType::LruHash, 0),
    spec::<u64, SockState>(map_name::SOCK_CONN, MapType::Hash, F_NO_PREALLOC),
    spec::<u32, SockState>(map_name::SOCK_STATE, MapType::SkStorage, F_NO_PREALLOC),
    spec::<u32, SockFlow>(map_name::SOCK_FLOW, MapType::SkStorage, F_NO_PREALLOC),
    spec::<u32, Device>(map_name::DEVICES, MapType::Hash, F_NO_PREALLOC),
    spec::<FlowKey, Flow>(map_name::CONNTRACK, MapType::LruHash, 0),
    spec::<FlowKey, Flow>(map_name::NAT, MapType::LruHash, 0),
    spec::<u32, Trace>(map_name::TRACES, MapType::Array, 0),
    spec::<FragmentKey, FragmentPorts>(map_name::FRAGMENTS, MapType::LruHash, 0),
    spec::<MasqueradeKey, u32>(map_name::MASQUERADE, MapType::LpmTrie, F_NO_PREALLOC),
    spec::<Addr, Pod>(map_name::PODS, MapType::Hash, F_NO_PREALLOC),
    spec::<u32, PodDevice>(map_name::POD_DEVICES, MapType::Hash, F_NO_PREALLOC),
    spec::<u32, u64>(map_name::COUNTERS, MapType::PerCpuArray, 0),
];

/// [`MAPS`] with these sizes.
pub(super) fn specs(sizes: Sizes) -> Vec<MapSpec> {
    let entries = |name: &str| match name {
        map_name::FRONTENDS => Some(sizes.frontends),
        map_name::SERVICES | map_name::SERVICE_STATS => Some(sizes.services),
        map_name::SLOTS => Some(sizes.slots),
        map_name::BACKENDS | map_name::BACKEND_STATS | map_name::BACKEND_HEALTH => Some(sizes.backends),
        map_name::SOCK_ORIGIN => Some(sizes.sock_origins),
        map_name::SOCK_CONN => Some(sizes.sock_connections),
        map_name::CONNTRACK => Some(sizes.conntrack),
        map_name::NAT => Some(sizes.nat),
        map_name::COUNTERS => u32::try_from(COUNTERS.len()).ok(),
        _ => None,
    };
    MAPS.iter()
        .map(|spec| MapSpec {
            max_entries: entries(spec.name),
            ..*spec
        })
        .collect()
}
