//! Looking frontends up, for sockets and packets.

use dataplane_common::abi::{Addr, BePort, FrontendKey, Range, frontend_class, frontend_flag, frontend_kind};

use crate::maps::FRONTENDS;

/// A value of `FRONTENDS` as it was loaded; [`Frontend::NONE`] where there is none.
#[derive(Clone, Copy)]
pub struct Frontend(u64);

impl Frontend {
    /// No frontend: the address is none of ours.
    pub const NONE: Self = Self(0);

    #[inline(always)]
    fn byte(self, index: usize) -> u8 {
        // the layout is in memory order, whatever the byte order
        self.0.to_ne_bytes()[index]
    }

    /// Row in `SERVICES`.
    #[inline(always)]
    pub fn service(self) -> u32 {
        let [a, b, c, d, ..] = self.0.to_ne_bytes();
        u32::from_ne_bytes([a, b, c, d])
    }

    /// See [`frontend_kind`].
    #[inline(always)]
    pub fn kind(self) -> u8 {
        self.byte(4)
    }

    /// True if the address is none of ours.
    #[inline(always)]
    pub fn is_none(self) -> bool {
        self.0 == 0
    }

    /// True for a service's address at a port where it offers nothing.
    #[inline(always)]
    pub fn is_unknown_port(self) -> bool {
        self.kind() == frontend_kind::ACTIVE_ADDRESS
    }

    /// True for traffic that the internal traffic policy rules. Everything else is external, and from sockets of this
    /// node always goes to the `cluster` set (spec kube-proxy 2.1).
    #[inline(always)]
    pub fn is_internal(self) -> bool {
        self.kind() == frontend_kind::CLUSTER_IP
    }

    /// True if only clients of the service's source ranges may enter.
    #[inline(always)]
    pub fn has_source_ranges(self) -> bool {
        self.byte(5) & frontend_flag::SOURCE_RANGES != 0
    }
}

/// The value at the key.
#[inline(always)]
pub fn read(key: &FrontendKey) -> Frontend {
    match FRONTENDS.get_ptr(key) {
        // SAFETY: the value is one aligned 8-byte word, so a concurrent change shows the old or the new one.
        Some(value) => Frontend(unsafe { value.cast::<u64>().read_volatile() }),
        None => Frontend::NONE,
    }
}

/// What is offered at the port of the key on every address of the node. The key is changed in place, as in
/// [`active_address`]: a second one would cost stack, and the verifier its time.
#[inline(always)]
pub fn node_port(key: &mut FrontendKey) -> Frontend {
    key.addr = if key.addr.is_v4() {
        Addr::from_v4_be(0)
    } else {
        Addr::from_v6_be([0; 4])
    };
    key.class = frontend_class::NODE_PORT;
    read(key)
}

/// The address of the key as such, if it is a service's.
#[inline(always)]
pub fn active_address(key: &mut FrontendKey) -> Frontend {
    key.port = BePort::from_be(0);
    key.protocol = 0;
    key.class = frontend_class::ACTIVE_ADDRESS;
    read(key)
}

/// True if one of the first `count` ranges holds the address. The ranges are those of a row from a successful lookup.
#[inline(always)]
pub(crate) fn within(addr: &Addr, ranges: *const Range, count: usize) -> bool {
    let addr = addr.words_be();
    let mut i = 0;
    while i < count {
        // SAFETY: the callers hand in the ranges of a row from a successful lookup. An address is four words; words of
        // different moments show at worst a range that is in neither configuration.
        let word = |which: usize| unsafe { ranges.add(i).cast::<u32>().add(which).read_volatile() };
        let mask = [word(4), word(5), word(6), word(7)];
        let outside = (addr[0] ^ word(0)) & mask[0]
            | (addr[1] ^ word(1)) & mask[1]
            | (addr[2] ^ word(2)) & mask[2]
            | (addr[3] ^ word(3)) & mask[3];
        if mask[0] | mask[1] | mask[2] | mask[3] != 0 && outside == 0 {
            return true;
        }
        i += 1;
    }
    false
}
