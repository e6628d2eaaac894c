//! The maps. Sizes are defaults; the agent overrides them at load.

use aya_ebpf::Global;
use aya_ebpf::bindings::{BPF_F_MMAPABLE, BPF_F_NO_PREALLOC};
use aya_ebpf::btf_maps::{Array, HashMap, LruHashMap, PerCpuArray, SkStorage};
use aya_ebpf::macros::btf_map;
use dataplane_common::abi::{
    Backend, BackendStats, COUNTERS as COUNTER_NAMES, Counter, FrontendKey, FrontendValue, Service, Slot,
    SockFlow, SockOrigin, SockOriginKey, SockState,
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

/// Origins of datagrams, for their replies.
#[btf_map]
pub static SOCK_ORIGIN: LruHashMap<SockOriginKey, SockOrigin, 16_384> = LruHashMap::new();

/// How connected sockets were translated.
#[btf_map]
pub static SOCK_STATE: SkStorage<SockState> = SkStorage::new();

/// Where datagrams of unconnected sockets go.
#[btf_map]
pub static SOCK_FLOW: SkStorage<SockFlow> = SkStorage::new();

/// See [`Counter`].
#[btf_map]
pub static COUNTERS: PerCpuArray<u64, { COUNTER_NAMES.len() }> = PerCpuArray::new();

/// 1 where the kernel lets a program choose the error of a refused connect (5.18, commit b44123b4a3dc "bpf: Add
/// cgroup helpers bpf_{get,set}_retval"); 0 prunes the call, and a refusal is EPERM.
#[unsafe(no_mangle)]
pub static HAVE_SET_RETVAL: Global<u32> = Global::new(1);

/// Adds one to a counter of this CPU.
#[inline(always)]
pub fn count(counter: Counter) {
    if let Some(value) = COUNTERS.get_ptr_mut(counter as u32) {
        // SAFETY: the pointer comes from a successful lookup; only this CPU writes the entry, and preemption by another
        // program of ours on it costs at most one count.
        unsafe { *value = (*value).wrapping_add(1) };
    }
}
