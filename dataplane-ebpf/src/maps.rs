//! The maps. Sizes are defaults; the agent overrides them at load.

use aya_ebpf::Global;
use aya_ebpf::bindings::{BPF_F_MMAPABLE, BPF_F_NO_PREALLOC};
use aya_ebpf::btf_maps::{Array, HashMap, LpmTrie, LruHashMap, PerCpuArray, RingBuf, SkStorage};
use aya_ebpf::macros::btf_map;
use dataplane_common::abi::{
    Addr, Affinity, AffinityKey, Backend, BackendHealth, BackendStats, COUNTERS as COUNTER_NAMES, Counter,
    Device, Event, Flow, FlowKey, FragmentKey, FragmentPorts, FrontendKey, FrontendValue, NetnsAddrs,
    NodeConfig, Pod, PodDevice, Service, ServiceStats, Slot, SockFlow, SockOrigin, SockOriginKey, SockState,
    Trace,
};

const MMAPABLE: usize = BPF_F_MMAPABLE as usize;
const NO_PREALLOC: usize = BPF_F_NO_PREALLOC as usize;

/// Where services are offered. Not preallocated: memory follows use.
#[btf_map]
pub static FRONTENDS: HashMap<FrontendKey, FrontendValue, 65_536, NO_PREALLOC> = HashMap::new();

/// Services, by id.
#[btf_map]
pub static SERVICES: Array<Service, 65_536, MMAPABLE> = Array::new();

/// The slot arena.
#[btf_map]
pub static SLOTS: Array<Slot, 262_144, MMAPABLE> = Array::new();

/// Backends, by id.
#[btf_map]
pub static BACKENDS: Array<Backend, 65_536, MMAPABLE> = Array::new();

/// What the programs count of each backend.
#[btf_map]
pub static BACKEND_STATS: Array<BackendStats, 65_536, MMAPABLE> = Array::new();

/// What the programs count of each service.
#[btf_map]
pub static SERVICE_STATS: Array<ServiceStats, 65_536, MMAPABLE> = Array::new();

/// What connections saw of each backend.
#[btf_map]
pub static BACKEND_HEALTH: Array<BackendHealth, 65_536, MMAPABLE> = Array::new();

/// What holds for the whole node: row 0.
#[btf_map]
pub static CONFIG: Array<NodeConfig, 1, MMAPABLE> = Array::new();

/// The node's own addresses, with their flags.
#[btf_map]
pub static NODE_ADDRS: HashMap<Addr, u32, 4096, NO_PREALLOC> = HashMap::new();

/// Who may enter by a load-balancer address. The key is a `SourceRangeKey`, whose first word is the trie's.
#[btf_map]
pub static SOURCE_RANGES: LpmTrie<[u32; 5], u32, 65_536> = LpmTrie::new();

/// Which backend a client had last.
#[btf_map]
pub static AFFINITY: LruHashMap<AffinityKey, Affinity, 65_536> = LruHashMap::new();

/// What user space is told. The size is in bytes.
#[btf_map]
pub static EVENTS: RingBuf<Event, 262_144> = RingBuf::new();

/// The addresses of network namespaces, for source ranges.
#[btf_map]
pub static NETNS_ADDRS: HashMap<u64, NetnsAddrs, 4096, NO_PREALLOC> = HashMap::new();

/// Origins of datagrams, for their replies.
#[btf_map]
pub static SOCK_ORIGIN: LruHashMap<SockOriginKey, SockOrigin, 16_384> = LruHashMap::new();

/// How connected sockets were translated, by socket cookie, until they are closed. For TCP it is a hash, because the storage
/// of a socket's own costs about 1 us to make and free, ten times as much as everything else that is done for a connection.
/// Not larger, because every close of a TCP socket looks here, and a table that stays in the cache is faster.
#[btf_map]
pub static SOCK_CONN: HashMap<u64, SockState, 131_072, NO_PREALLOC> = HashMap::new();

/// The same of connected UDP sockets, for the programs: each datagram that is received looks here.
#[btf_map]
pub static SOCK_STATE: SkStorage<SockState> = SkStorage::new();

/// Where datagrams of unconnected sockets go.
#[btf_map]
pub static SOCK_FLOW: SkStorage<SockFlow> = SkStorage::new();

/// The devices that the packet programs serve.
#[btf_map]
pub static DEVICES: HashMap<u32, Device, 4096, NO_PREALLOC> = HashMap::new();

/// Flows of services, both directions.
#[btf_map]
pub static CONNTRACK: LruHashMap<FlowKey, Flow, 131_072> = LruHashMap::new();

/// Masqueraded flows, both directions.
#[btf_map]
pub static NAT: LruHashMap<FlowKey, Flow, 65_536> = LruHashMap::new();

/// So many bits of a tuple's hash say where its trace is.
pub const TRACE_BITS: u32 = 16;

/// What is left of flows that the kernel has forgotten.
#[btf_map]
pub static TRACES: Array<Trace, { 1 << TRACE_BITS }> = Array::new();

/// Whose packets to the world get the node's address, and what is not the world. The key is a `MasqueradeKey`, whose first
/// word is the trie's.
#[btf_map]
pub static MASQUERADE: LpmTrie<[u32; 4], u32, 4096> = LpmTrie::new();

/// Pods of this node, by address.
#[btf_map]
pub static PODS: HashMap<Addr, Pod, 8192, NO_PREALLOC> = HashMap::new();

/// Their devices, by index.
#[btf_map]
pub static POD_DEVICES: HashMap<u32, PodDevice, 4096, NO_PREALLOC> = HashMap::new();

/// Ports of fragmented datagrams.
#[btf_map]
pub static FRAGMENTS: LruHashMap<FragmentKey, FragmentPorts, 8192> = LruHashMap::new();

/// See [`Counter`].
#[btf_map]
pub static COUNTERS: PerCpuArray<u64, { COUNTER_NAMES.len() }> = PerCpuArray::new();

/// 1 where the kernel lets a program choose the error of a refused connect (5.18, commit b44123b4a3dc "bpf: Add
/// cgroup helpers bpf_{get,set}_retval"); 0 prunes the call, and a refusal is EPERM.
#[unsafe(no_mangle)]
pub static HAVE_SET_RETVAL: Global<u32> = Global::new(1);

/// `SO_NETNS_COOKIE` of the host's network namespace.
#[unsafe(no_mangle)]
pub static HOST_NETNS: Global<u64> = Global::new(0);

/// Adds one to a counter of this CPU.
#[inline(always)]
pub fn count(counter: Counter) {
    if let Some(value) = COUNTERS.get_ptr_mut(counter as u32) {
        // SAFETY: the pointer comes from a successful lookup; only this CPU writes the entry, and preemption by another
        // program of ours on it costs at most one count.
        unsafe { *value = (*value).wrapping_add(1) };
    }
}
