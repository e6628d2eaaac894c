//! From a frontend to a backend. Shared by every attach point.

use aya_ebpf::helpers::generated::bpf_get_prandom_u32;
use dataplane_common::abi::{
    Addr, Backend, BePort, Counter, NO_ID, Service, SetWord, Slot, backend_state, service_flag,
};

use crate::maps::{BACKENDS, SERVICES, SLOTS, count};

/// A chosen backend.
#[derive(Clone, Copy)]
pub struct Choice {
    /// Row in `SERVICES`.
    pub service: u32,
    /// Row in `BACKENDS`.
    pub backend: u32,
    /// Entry of `SLOTS`.
    pub slot: u32,
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

/// One 64-bit load of the set that a class of traffic may use.
#[inline(always)]
fn set_of(row: *const Service, internal: bool) -> SetWord {
    // SAFETY: `row` comes from a successful lookup; the fields are aligned words that user space stores whole.
    unsafe {
        let flags = (&raw const (*row).flags).read_volatile();
        if internal && flags & service_flag::INTERNAL_LOCAL != 0 {
            (&raw const (*row).local).read_volatile()
        } else {
            (&raw const (*row).cluster).read_volatile()
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
fn chosen(service: u32, slot: u32, id: u32) -> Option<Choice> {
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
            slot,
            row,
        })
    }
}

/// Chooses a backend of the service at random.
///
/// # Errors
///
/// The reason why the connection has to be refused.
#[inline(always)]
pub fn random(service: u32, internal: bool) -> Result<Choice, Counter> {
    let row = SERVICES.get_ptr(service).ok_or(Counter::BadService)?;
    let (slot, index) = match pick(row, service, internal)? {
        Ok(found) => found,
        // The range changed hands between the two loads: the set word is new by now.
        Err(_) => match pick(row, service, internal)? {
            Ok(found) => {
                count(Counter::SlotRetry);
                found
            }
            Err(_) => return Err(Counter::ForeignSlot),
        },
    };
    chosen(service, index, slot.backend()).ok_or(Counter::BadBackend)
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

#[inline(always)]
fn pick(row: *const Service, service: u32, internal: bool) -> Result<Result<(Slot, u32), Foreign>, Counter> {
    let set = set_of(row, internal);
    if set.count() == 0 {
        return Err(nothing(row, internal));
    }
    // SAFETY: the helper has no preconditions.
    let random = unsafe { bpf_get_prandom_u32() };
    // Scales to 0..count without a division.
    let offset = ((u64::from(random) * u64::from(set.count())) >> 32) as u32;
    let index = set.base().wrapping_add(offset);
    let Some(slot) = read_slot(index) else {
        return Ok(Err(Foreign));
    };
    Ok(if slot.service() == service {
        Ok((slot, index))
    } else {
        Err(Foreign)
    })
}

/// How many slots of a changed set are searched for the backend that a datagram flow used before; flows of larger sets
/// choose anew when their set changes.
const SEARCH: u32 = 64;

/// The backend that the flow used before, if it is still in the service's set.
#[inline(always)]
pub fn again(service: u32, internal: bool, wanted: u32, slot: u32) -> Option<Choice> {
    let found = find(service, internal, wanted, slot);
    if found == NOT_FOUND {
        None
    } else {
        chosen(service, found, wanted)
    }
}

/// No index of a slot: arrays are smaller.
const NOT_FOUND: u32 = u32::MAX;

/// Where the service's set names the backend; looked for first where it was.
#[inline(always)]
fn find(service: u32, internal: bool, wanted: u32, slot: u32) -> u32 {
    let Some(row) = SERVICES.get_ptr(service) else {
        return NOT_FOUND;
    };
    let set = set_of(row, internal);
    let expected = Slot::new(wanted, service);
    if slot.wrapping_sub(set.base()) < set.count() && read_slot(slot) == Some(expected) {
        return slot;
    }
    let mut i = 0;
    while i < SEARCH && i < set.count() {
        let index = set.base().wrapping_add(i);
        if read_slot(index) == Some(expected) {
            return index;
        }
        i += 1;
    }
    NOT_FOUND
}
