//! From the destination of a new flow to a backend, by the service's policies.

use aya_ebpf::bindings::BPF_ANY;
use aya_ebpf::btf_maps::lpm_trie::Key;
use dataplane_common::abi::{
    Affinity, AffinityKey, Backend, Counter, Device, Flow, FrontendKey, NO_ID, NodeConfig, POD_RANGES,
    SERVICE_RANGES, Service, ServiceStats, SetWord, Slot, algorithm, backend_state, config_flag, device_flag,
    flow_flag, frontend_class, frontend_kind, node_addr_flag, service_flag,
};
use dataplane_common::maglev::{client_hash, entry, flow_hash};
use dataplane_common::packet::Head;

use super::Scratch;
use crate::frontend::{Frontend, active_address, node_port, read, within};
use crate::maps::{AFFINITY, BACKENDS, NODE_ADDRS, SERVICE_STATS, SERVICES, SLOTS, SOURCE_RANGES, count};

/// What is to be done with a packet that has no flow yet.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Found {
    /// None of ours.
    Nothing,
    /// It goes to the backend in `scratch.flow`.
    Backend,
    /// Drop it.
    Drop(Counter),
    /// Answer that nobody is there.
    Reject(Counter),
}

/// Value of `Backend.node` for backends on this node.
const THIS_NODE: u32 = 1;

/// The frontend that a packet calls, or what becomes of it without one.
#[inline(always)]
fn find(head: &Head, config: *const NodeConfig) -> Result<Frontend, Found> {
    let mut key = FrontendKey {
        addr: head.dst,
        port: head.dst_port,
        protocol: head.protocol,
        class: frontend_class::ADDRESS,
    };
    let mut front = read(&key);
    if !front.is_none() {
        return Ok(front);
    }
    if let Some(flags) = NODE_ADDRS.get_ptr(&key.addr) {
        // SAFETY: from a successful lookup; an aligned word.
        if unsafe { flags.read_volatile() } & node_addr_flag::NODE_PORTS != 0 {
            front = node_port(&mut key);
        }
        return if front.is_none() {
            Err(Found::Nothing)
        } else {
            Ok(front)
        };
    }
    // SAFETY: a field of a row from a successful lookup.
    let ranges = unsafe { &raw const (*config).service_ranges };
    if !within(&head.dst, ranges.cast(), SERVICE_RANGES) {
        return Err(Found::Nothing);
    }
    Err(if active_address(&mut key).is_none() {
        Found::Drop(Counter::UnknownAddress)
    } else {
        Found::Reject(Counter::UnknownPort)
    })
}

/// The sets that a class of traffic may use.
struct Class {
    set: SetWord,
    maglev: SetWord,
    /// The set is the `local` one.
    local: bool,
}

#[inline(always)]
fn class(row: *const Service, local: bool) -> Class {
    // SAFETY: `row` comes from a successful lookup; the fields are aligned words that user space stores whole.
    unsafe {
        if local {
            Class {
                set: (&raw const (*row).local).read_volatile(),
                maglev: (&raw const (*row).maglev_local).read_volatile(),
                local,
            }
        } else {
            Class {
                set: (&raw const (*row).cluster).read_volatile(),
                maglev: (&raw const (*row).maglev).read_volatile(),
                local,
            }
        }
    }
}

/// No index of a slot: arrays are smaller.
const NOT_FOUND: u32 = u32::MAX;

#[inline(always)]
fn read_slot(index: u32) -> Slot {
    match SLOTS.get_ptr(index) {
        // SAFETY: an aligned word from a successful lookup.
        Some(slot) => unsafe { slot.read_volatile() },
        None => Slot(0),
    }
}

/// The backend that a hash falls on in a set; 0 if the range belongs to another service by now.
#[inline(always)]
fn place(service: u32, set: SetWord, hash: u32, slot: &mut u32) -> u32 {
    let index = set.base().wrapping_add(entry(hash, set.count()));
    let found = read_slot(index);
    *slot = index;
    if found.service() == service {
        found.backend()
    } else {
        NO_ID
    }
}

/// How many slots of a changed set are searched for the backend of a client's last connection.
const SEARCH: u32 = 64;

/// Where the set names the backend; looked for first where it was.
#[inline(always)]
fn find_slot(service: u32, set: SetWord, wanted: u32, slot: u32) -> u32 {
    let expected = Slot::new(wanted, service);
    if slot.wrapping_sub(set.base()) < set.count() && read_slot(slot) == expected {
        return slot;
    }
    let mut i = 0;
    while i < SEARCH && i < set.count() {
        let index = set.base().wrapping_add(i);
        if read_slot(index) == expected {
            return index;
        }
        i += 1;
    }
    NOT_FOUND
}

/// One more of what a service's row counts.
#[inline(always)]
fn add(service: u32, field: impl Fn(*const ServiceStats) -> *const u64) {
    if let Some(stats) = SERVICE_STATS.get_ptr(service) {
        // SAFETY: an aligned u64 in an entry from a successful lookup. Written as the instruction itself because core
        // has no atomic add for this target; without a result it is XADD, which every kernel has.
        unsafe {
            core::arch::asm!("lock *(u64 *)({0} + 0) += {1}", in(reg) field(stats), in(reg) 1u64);
        }
    }
}

/// Whether a packet that comes in by a pod's device is a local pod's (detect-local, spec kube-proxy 2.1).
#[inline(always)]
pub(super) fn is_pod(head: &Head, device: &Device, config: *const NodeConfig) -> bool {
    device.flags & device_flag::BY_SOURCE == 0 || in_pod_ranges(head, config)
}

#[inline(always)]
fn in_pod_ranges(head: &Head, config: *const NodeConfig) -> bool {
    // SAFETY: a field of a row from a successful lookup.
    let ranges = unsafe { &raw const (*config).pod_ranges };
    within(&head.src, ranges.cast(), POD_RANGES)
}

/// Chooses the way of a new flow: fills in address, port, service, backend and flags of `scratch.flow`.
///
/// `pod` is true for a packet of a pod of this node: it is no outside client's.
#[inline(always)]
pub(super) fn choose(scratch: &mut Scratch, config: *const NodeConfig, pod: bool, now: u64) -> Found {
    let head = &scratch.head;
    let front = match find(head, config) {
        Ok(front) => front,
        Err(found) => return found,
    };
    let service = front.service();
    let Some(row) = SERVICES.get_ptr(service) else {
        return Found::Drop(Counter::BadService);
    };
    // SAFETY: from a successful lookup; aligned words.
    let (service_flags, algorithm) = unsafe {
        (
            (&raw const (*row).flags).read_volatile(),
            (&raw const (*row).algorithm).read_volatile(),
        )
    };
    if front.has_source_ranges() && !admitted(head, row, service_flags) {
        // SAFETY: field address within the entry.
        add(service, |stats| unsafe { &raw const (*stats).denied });
        return Found::Drop(Counter::Denied);
    }
    let internal = front.is_internal();
    // Spec kube-proxy 2.1: internal traffic by the internal policy; external by the external one if it comes from
    // another host, else to every backend.
    let local = match front.kind() {
        frontend_kind::CLUSTER_IP => service_flags & service_flag::INTERNAL_LOCAL != 0,
        frontend_kind::HOST_PORT => false,
        _ => !pod && service_flags & service_flag::EXTERNAL_LOCAL != 0,
    };
    let mut class = class(row, local);
    if class.set.count() == 0 {
        // SAFETY: field address within the entry.
        add(service, |stats| unsafe { &raw const (*stats).no_backend });
        return if class.local && service_flags & service_flag::HAS_ENDPOINTS != 0 {
            Found::Drop(Counter::NoLocalBackend)
        } else {
            Found::Reject(Counter::NoBackend)
        };
    }
    let hash = if algorithm == algorithm::SOURCE_HASH {
        client_hash(&head.src)
    } else {
        flow_hash(&head.src, head.src_port, head.dst_port, head.protocol)
    };
    let mut slot = 0;
    // SAFETY: from a successful lookup; an aligned word.
    let affinity = unsafe { (&raw const (*row).affinity_seconds).read_volatile() };
    let mut backend = NO_ID;
    let client = &mut scratch.client;
    client.client = head.src;
    client.service = service;
    client.pad = 0;
    if affinity != 0 {
        backend = last_backend(client, service, class.set, affinity, now, &mut slot);
    }
    if backend == NO_ID {
        let table = if class.maglev.count() == 0 {
            class.set
        } else {
            class.maglev
        };
        backend = place(service, table, hash, &mut slot);
    }
    if backend == NO_ID {
        // The range changed hands between the two loads: the set word is new by now, and the set itself always whole.
        class = self::class(row, local);
        backend = place(service, class.set, hash, &mut slot);
        if backend == NO_ID {
            return Found::Drop(Counter::ForeignSlot);
        }
        count(Counter::SlotRetry);
    }
    let Some(target) = BACKENDS.get_ptr(backend) else {
        return Found::Drop(Counter::BadBackend);
    };
    // SAFETY: from a successful lookup; the row does not change while a slot refers to it, `state` apart.
    let target: &Backend = unsafe { &*target };
    if target.state == backend_state::FREE {
        return Found::Drop(Counter::BadBackend);
    }
    if affinity != 0 {
        let last = Affinity {
            seen: now,
            backend,
            slot,
        };
        if AFFINITY.insert(&*client, &last, u64::from(BPF_ANY)).is_err() {
            count(Counter::AffinityLost);
        }
    }
    // SAFETY: field address within the entry.
    add(service, |stats| unsafe { &raw const (*stats).connections });
    let masquerade = masquerades(head, target, internal, class.local, pod, config);
    let flow: &mut Flow = &mut scratch.flow;
    flow.addr = target.addr;
    flow.port = target.port;
    flow.flags = if masquerade { flow_flag::MASQUERADE } else { 0 };
    flow.service = service;
    flow.backend = backend;
    Found::Backend
}

/// Whether the backend must see an address of this node instead of the client's, because its answers would not come this
/// way.
#[inline(always)]
fn masquerades(
    head: &Head,
    target: &Backend,
    internal: bool,
    local_only: bool,
    pod: bool,
    config: *const NodeConfig,
) -> bool {
    if target.addr.same(&head.src) {
        // it would answer itself
        return true;
    }
    // SAFETY: from a successful lookup; an aligned word.
    let flags = unsafe { (&raw const (*config).flags).read_volatile() };
    if internal && flags & config_flag::MASQUERADE_ALL != 0 {
        return true;
    }
    if pod || target.node == THIS_NODE {
        return false;
    }
    if internal {
        return !in_pod_ranges(head, config);
    }
    !local_only
}

/// Spec kube-proxy 2.4.
#[inline(always)]
fn admitted(head: &Head, row: *const Service, service_flags: u32) -> bool {
    // SAFETY: from a successful lookup; an aligned word.
    let ranges = unsafe { (&raw const (*row).source_ranges).read_volatile() };
    if ranges == 0 {
        return true;
    }
    let [a, b, c, d] = head.src.words_be();
    let key = Key::new(160, [ranges, a, b, c, d]);
    if SOURCE_RANGES.get(&key).is_some() {
        return true;
    }
    service_flags & service_flag::NODE_IN_RANGES != 0 && head.src.same(&head.dst)
}

/// The backend of the client's last connection, if that is not too long ago and the set still has it; else 0.
#[inline(always)]
fn last_backend(
    client: &AffinityKey,
    service: u32,
    set: SetWord,
    seconds: u32,
    now: u64,
    slot: &mut u32,
) -> u32 {
    let Some(last) = AFFINITY.get_ptr(client) else {
        return NO_ID;
    };
    // SAFETY: from a successful lookup; what is read of a recycled entry is checked against the set.
    let last = unsafe { &*last };
    if now.saturating_sub(last.seen) > u64::from(seconds) * 1_000_000_000 {
        return NO_ID;
    }
    let found = find_slot(service, set, last.backend, last.slot);
    if found == NOT_FOUND {
        return NO_ID;
    }
    *slot = found;
    last.backend
}
