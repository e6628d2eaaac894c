//! From a frontend to a backend. Shared by every attach point.

use core::arch::asm;

use aya_ebpf::bindings::BPF_ANY;
use aya_ebpf::helpers::generated::{bpf_get_prandom_u32, bpf_ktime_get_ns};
use dataplane_common::abi::{
    Addr, Affinity, AffinityKey, Backend, BePort, Counter, NO_ID, Service, SetWord, Slot, algorithm,
    backend_state, service_flag,
};
use dataplane_common::maglev::{entry, mix};

use crate::maps::{AFFINITY, BACKEND_STATS, BACKENDS, SERVICE_STATS, SERVICES, SLOTS, count};

/// A chosen backend.
#[derive(Clone, Copy)]
pub struct Choice {
    /// Row in `SERVICES`.
    pub service: u32,
    /// Row in `BACKENDS`.
    pub backend: u32,
    /// Place in the set, where it is known: a hint for [`again`].
    pub place: u32,
    /// The row. Its fields are read where they are used: LLVM 22 fails to expand the copy of an address that went
    /// through an `Option`.
    row: *const Backend,
}

impl Choice {
    /// The backend's address.
    #[inline(always)]
    pub fn addr(&self) -> Addr {
        // SAFETY: the row comes from a successful lookup and does not change while a slot refers to it, `state` apart.
        let words = unsafe { &raw const (*self.row).addr }.cast::<u32>();
        // SAFETY: as above; an address is four words.
        let word = |i: usize| unsafe { words.add(i).read_volatile() };
        Addr::from_v6_be([word(0), word(1), word(2), word(3)])
    }

    /// The backend's port.
    #[inline(always)]
    pub fn port(&self) -> BePort {
        // SAFETY: as in `addr`.
        unsafe { (*self.row).port }
    }

    /// How often the row has been given out.
    #[inline(always)]
    pub fn generation(&self) -> u32 {
        // SAFETY: as in `addr`.
        unsafe { (*self.row).generation }
    }
}

/// What a class of traffic may use.
#[derive(Clone, Copy)]
struct Class {
    set: SetWord,
    maglev: SetWord,
}

/// One 64-bit load of each.
#[inline(always)]
fn class_of(row: *const Service, internal: bool) -> Class {
    // SAFETY: `row` comes from a successful lookup; the fields are aligned words that user space stores whole.
    unsafe {
        let flags = (&raw const (*row).flags).read_volatile();
        if internal && flags & service_flag::INTERNAL_LOCAL != 0 {
            Class {
                set: (&raw const (*row).local).read_volatile(),
                maglev: (&raw const (*row).maglev_local).read_volatile(),
            }
        } else {
            Class {
                set: (&raw const (*row).cluster).read_volatile(),
                maglev: (&raw const (*row).maglev).read_volatile(),
            }
        }
    }
}

#[inline(always)]
fn read_slot(index: u32) -> Option<Slot> {
    // SAFETY: an aligned word from a successful lookup.
    Some(unsafe { SLOTS.get_ptr(index)?.read_volatile() })
}

/// The choice of a backend that a slot names; `None` if there is no such backend.
#[inline(always)]
fn chosen(service: u32, place: u32, id: u32) -> Option<Choice> {
    if id == NO_ID {
        return None;
    }
    let row: *const Backend = BACKENDS.get_ptr(id)?;
    // SAFETY: from a successful lookup.
    let state = unsafe { (&raw const (*row).state).read_volatile() };
    if state == backend_state::FREE {
        None
    } else {
        Some(Choice {
            service,
            backend: id,
            place,
            row,
        })
    }
}

/// Who calls, as far as a choice can depend on it. Asked only where it does.
pub trait Caller {
    /// A number of the connection's own.
    fn flow(&self) -> u64;
    /// A number that all connections of the client share.
    fn client(&self) -> u64;
}

/// What decides, whatever the set is: taken once, so that a second look at a set that has just changed does not take
/// another turn.
#[derive(Clone, Copy)]
struct Lot {
    algorithm: u32,
    number: u64,
}

#[inline(always)]
fn draw(row: *const Service, service: u32, caller: &impl Caller) -> Lot {
    // SAFETY: `row` comes from a successful lookup; an aligned word.
    let algorithm = unsafe { (&raw const (*row).algorithm).read_volatile() };
    let number = match algorithm {
        algorithm::ROUND_ROBIN => turn(service),
        algorithm::MAGLEV => mix(caller.flow()) >> 32,
        algorithm::SOURCE_HASH => mix(caller.client()) >> 32,
        algorithm::LEAST_CONN => u64::from(random_word()) << 32 | u64::from(random_word()),
        _ => u64::from(random_word()),
    };
    Lot { algorithm, number }
}

#[inline(always)]
fn random_word() -> u32 {
    // SAFETY: the helper has no preconditions.
    unsafe { bpf_get_prandom_u32() }
}

/// The service's next turn, which nobody else gets.
#[inline(always)]
fn turn(service: u32) -> u64 {
    let Some(stats) = SERVICE_STATS.get_ptr(service) else {
        return 0;
    };
    let mut value = 1_u64;
    // SAFETY: an aligned u64 in an entry from a successful lookup. The instruction itself (5.12), because core has no
    // atomic add for this target.
    unsafe {
        asm!(
            "{value} = atomic_fetch_add((u64 *)({turn} + 0), {value})",
            value = inout(reg) value,
            turn = in(reg) &raw const (*stats).turn,
        );
    }
    value
}

/// A row of `SERVICES`.
#[inline(always)]
pub(crate) fn service_row(service: u32) -> Option<*const Service> {
    SERVICES.get_ptr(service)
}

/// Chooses a backend for a new connection: the one that the client had last if the service wants that, else by the
/// service's algorithm.
///
/// # Errors
///
/// The reason why the connection has to be refused.
#[inline(always)]
pub(crate) fn for_connection(
    row: *const Service,
    service: u32,
    internal: bool,
    caller: &impl Caller,
) -> Result<Choice, Counter> {
    // SAFETY: `row` comes from a successful lookup; an aligned word.
    let seconds = unsafe { (&raw const (*row).affinity_seconds).read_volatile() };
    if seconds == 0 {
        by_algorithm(row, service, internal, caller)
    } else {
        sticky(row, service, internal, caller, seconds)
    }
}

#[inline(always)]
fn by_algorithm(
    row: *const Service,
    service: u32,
    internal: bool,
    caller: &impl Caller,
) -> Result<Choice, Counter> {
    let lot = draw(row, service, caller);
    let found = match pick(row, service, internal, lot)? {
        Ok(found) => found,
        // The range changed hands between the two loads: the set word is new by now.
        Err(_) => match pick(row, service, internal, lot)? {
            Ok(found) => {
                count(Counter::SlotRetry);
                found
            }
            Err(_) => return Err(Counter::ForeignSlot),
        },
    };
    chosen(service, found.place, found.slot.backend()).ok_or(Counter::BadBackend)
}

/// The client's backend of last time, if that is not too long ago and it is still in the set (spec kube-proxy 2.6).
#[inline(always)]
#[expect(
    clippy::needless_borrows_for_generic_args,
    reason = "by value they would be copied on the 512-byte stack"
)]
fn sticky(
    row: *const Service,
    service: u32,
    internal: bool,
    caller: &impl Caller,
    seconds: u32,
) -> Result<Choice, Counter> {
    let key = AffinityKey::from_netns(caller.client(), service);
    // SAFETY: the helper has no preconditions.
    let now = unsafe { bpf_ktime_get_ns() };
    if let Some(last) = AFFINITY.get_ptr_mut(&key) {
        // SAFETY: from a successful lookup; aligned words. If the entry is recycled meanwhile, what it names is checked
        // against the set, and another client's time is refreshed.
        let (seen, backend, place) = unsafe {
            (
                (&raw const (*last).seen).read_volatile(),
                (&raw const (*last).backend).read_volatile(),
                (&raw const (*last).slot).read_volatile(),
            )
        };
        if now.wrapping_sub(seen) < u64::from(seconds) * 1_000_000_000
            && let Some(choice) = again(service, internal, backend, place)
        {
            // SAFETY: as above.
            unsafe { (&raw mut (*last).seen).write_volatile(now) };
            return Ok(choice);
        }
    }
    let choice = by_algorithm(row, service, internal, caller)?;
    let value = Affinity {
        seen: now,
        backend: choice.backend,
        slot: choice.place,
    };
    if AFFINITY.insert(&key, &value, u64::from(BPF_ANY)).is_err() {
        count(Counter::AffinityLost);
    }
    Ok(choice)
}

/// Why an empty set refuses (spec kube-proxy 2.2).
#[inline(always)]
fn nothing(row: *const Service, internal: bool) -> Counter {
    // SAFETY: `row` comes from a successful lookup; an aligned word.
    let flags = unsafe { (&raw const (*row).flags).read_volatile() };
    let elsewhere = service_flag::INTERNAL_LOCAL | service_flag::HAS_ENDPOINTS;
    if internal && flags & elsewhere == elsewhere {
        Counter::NoLocalBackend
    } else {
        Counter::NoBackend
    }
}

/// A slot turned out to belong to another service.
struct Foreign;

/// What a lot names.
struct Found {
    slot: Slot,
    /// Where in the set, or a guess.
    place: u32,
}

#[inline(always)]
fn pick(
    row: *const Service,
    service: u32,
    internal: bool,
    lot: Lot,
) -> Result<Result<Found, Foreign>, Counter> {
    let Class { set, maglev } = class_of(row, internal);
    if set.count() == 0 {
        return Err(nothing(row, internal));
    }
    let place = match lot.algorithm {
        algorithm::ROUND_ROBIN => {
            (lot.number.checked_rem(u64::from(set.count())).unwrap_or(0) & 0xffff_ffff) as u32
        }
        algorithm::LEAST_CONN => return Ok(less_busy(set, service, lot.number)),
        algorithm::MAGLEV | algorithm::SOURCE_HASH if maglev.count() != 0 => {
            let index = maglev
                .base()
                .wrapping_add(entry((lot.number & 0xffff_ffff) as u32, maglev.count()));
            return Ok(own_slot(index, service).map(|slot| Found { slot, place: 0 }));
        }
        _ => entry((lot.number & 0xffff_ffff) as u32, set.count()),
    };
    let slot = own_slot(set.base().wrapping_add(place), service);
    Ok(slot.map(|slot| Found { slot, place }))
}

/// The slot, if it is the service's.
#[inline(always)]
fn own_slot(index: u32, service: u32) -> Result<Slot, Foreign> {
    match read_slot(index) {
        Some(slot) if slot.service() == service => Ok(slot),
        _ => Err(Foreign),
    }
}

/// Of two different slots at random, the one whose backend has fewer open connections (Mitzenmacher, "The Power of Two
/// Choices in Randomized Load Balancing", 2001).
#[inline(always)]
fn less_busy(set: SetWord, service: u32, number: u64) -> Result<Found, Foreign> {
    let first = entry((number & 0xffff_ffff) as u32, set.count());
    let slot = own_slot(set.base().wrapping_add(first), service)?;
    if set.count() < 2 {
        return Ok(Found { slot, place: first });
    }
    let step = entry((number >> 32) as u32, set.count().wrapping_sub(1)).wrapping_add(1);
    let mut second = first.wrapping_add(step);
    if second >= set.count() {
        second = second.wrapping_sub(set.count());
    }
    let other = own_slot(set.base().wrapping_add(second), service)?;
    Ok(if open(other.backend()) < open(slot.backend()) {
        Found {
            slot: other,
            place: second,
        }
    } else {
        Found { slot, place: first }
    })
}

/// Connections that a backend has open.
#[inline(always)]
fn open(backend: u32) -> u64 {
    let Some(stats) = BACKEND_STATS.get_ptr(backend) else {
        return u64::MAX;
    };
    // SAFETY: from a successful lookup; aligned words. What is closed is read first, so that it is never more.
    unsafe {
        let closed = (&raw const (*stats).closed).read_volatile();
        (&raw const (*stats).connections)
            .read_volatile()
            .saturating_sub(closed)
    }
}

/// How many slots of a changed set are searched for the backend that a client used before.
const SEARCH: u32 = 64;

/// The backend that the client used before, if it is still in the service's set. Sets keep their order, so a change moves a
/// backend by no more places than it adds and removes: it is looked for around the place where it was.
#[inline(always)]
pub fn again(service: u32, internal: bool, wanted: u32, place: u32) -> Option<Choice> {
    let found = find(service, internal, wanted, place);
    if found == NOT_FOUND {
        None
    } else {
        chosen(service, found, wanted)
    }
}

/// No place in a set: sets are smaller.
const NOT_FOUND: u32 = u32::MAX;

/// Where the service's set names the backend.
#[inline(always)]
fn find(service: u32, internal: bool, wanted: u32, place: u32) -> u32 {
    let Some(row) = SERVICES.get_ptr(service) else {
        return NOT_FOUND;
    };
    let set = class_of(row, internal).set;
    let expected = Slot::new(wanted, service);
    if place < set.count() && read_slot(set.base().wrapping_add(place)) == Some(expected) {
        return place;
    }
    let start = place
        .saturating_sub(SEARCH / 2)
        .min(set.count().saturating_sub(SEARCH));
    let mut i = 0;
    while i < SEARCH {
        let place = start.wrapping_add(i);
        if place >= set.count() {
            break;
        }
        if read_slot(set.base().wrapping_add(place)) == Some(expected) {
            return place;
        }
        i += 1;
    }
    NOT_FOUND
}
