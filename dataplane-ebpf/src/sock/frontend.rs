//! What an address that a socket calls means.

use aya_ebpf::EbpfContext;
use aya_ebpf::helpers::generated::bpf_get_netns_cookie;
use aya_ebpf::programs::SockAddrContext;
use dataplane_common::abi::{
    Addr, FrontendKey, Range, SERVICE_RANGES, config_flag, frontend_class, frontend_flag, frontend_kind,
    node_addr_flag,
};

use crate::maps::{CONFIG, FRONTENDS, HOST_NETNS, NODE_ADDRS};

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

    /// True if the address is none of ours.
    #[inline(always)]
    pub fn is_none(self) -> bool {
        self.0 == 0
    }

    /// True for a service's address at a port where it offers nothing.
    #[inline(always)]
    pub fn is_unknown_port(self) -> bool {
        self.byte(4) == frontend_kind::ACTIVE_ADDRESS
    }

    /// True for traffic that the internal traffic policy rules. Everything else is external, and from sockets of this
    /// node always goes to the `cluster` set (spec kube-proxy 2.1).
    #[inline(always)]
    pub fn is_internal(self) -> bool {
        self.byte(4) == frontend_kind::CLUSTER_IP
    }

    /// True if only clients of the service's source ranges may enter.
    #[inline(always)]
    pub fn has_source_ranges(self) -> bool {
        self.byte(5) & frontend_flag::SOURCE_RANGES != 0
    }
}

#[inline(always)]
fn read(key: &FrontendKey) -> Frontend {
    match FRONTENDS.get_ptr(key) {
        // SAFETY: the value is one aligned 8-byte word, so a concurrent change shows the old or the new one.
        Some(value) => Frontend(unsafe { value.cast::<u64>().read_volatile() }),
        None => Frontend::NONE,
    }
}

/// What is offered at the address: by its own name, as a node port, or nothing at a service's address.
#[inline(always)]
pub fn find(ctx: &SockAddrContext, key: &FrontendKey) -> Frontend {
    let found = read(key);
    if found.is_none() {
        indirect(ctx, key)
    } else {
        found
    }
}

#[inline(always)]
fn indirect(ctx: &SockAddrContext, key: &FrontendKey) -> Frontend {
    let Some(config) = CONFIG.get_ptr(0) else {
        return Frontend::NONE;
    };
    // SAFETY: from a successful lookup; an aligned word.
    let flags = unsafe { (&raw const (*config).flags).read_volatile() };
    let mut other = FrontendKey {
        addr: key.addr,
        port: key.port,
        protocol: key.protocol,
        class: frontend_class::NODE_PORT,
    };
    if let Some(own) = NODE_ADDRS.get_ptr(&key.addr) {
        // SAFETY: as above.
        let own = unsafe { own.read_volatile() };
        let offered = own & node_addr_flag::NODE_PORTS != 0
            || own & node_addr_flag::LOOPBACK != 0
                && flags & config_flag::LOCALHOST_NODE_PORTS != 0
                && is_host(ctx);
        if !offered {
            return Frontend::NONE;
        }
        other.addr = if key.addr.is_v4() {
            Addr::from_v4_be(0)
        } else {
            Addr::from_v6_be([0; 4])
        };
        return read(&other);
    }
    // SAFETY: as above.
    let ranges = unsafe { &raw const (*config).service_ranges };
    if !within(&key.addr, ranges.cast()) {
        return Frontend::NONE;
    }
    other.port = dataplane_common::abi::BePort::from_be(0);
    other.protocol = 0;
    other.class = frontend_class::ACTIVE_ADDRESS;
    read(&other)
}

/// True for sockets of the host's network namespace: a pod's 127.0.0.1 is its own.
#[inline(always)]
fn is_host(ctx: &SockAddrContext) -> bool {
    // SAFETY: the context is valid for the helper.
    unsafe { bpf_get_netns_cookie(ctx.as_ptr()) == HOST_NETNS.load() }
}

#[inline(always)]
fn within(addr: &Addr, ranges: *const Range) -> bool {
    let addr = addr.words_be();
    let mut i = 0;
    while i < SERVICE_RANGES {
        // SAFETY: a field of a row from a successful lookup. An address is four words; words of different moments show
        // at worst an address that no service has.
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
