//! What an address that a socket calls means.

use aya_ebpf::EbpfContext;
use aya_ebpf::helpers::generated::bpf_get_netns_cookie;
use aya_ebpf::programs::SockAddrContext;
use dataplane_common::abi::{FrontendKey, SERVICE_RANGES, config_flag, node_addr_flag};

use crate::frontend::{Frontend, active_address, node_port, read, within};
use crate::maps::{CONFIG, HOST_NETNS, NODE_ADDRS};

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
    let mut other = *key;
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
        return node_port(&mut other);
    }
    // SAFETY: as above.
    let ranges = unsafe { &raw const (*config).service_ranges };
    if !within(&key.addr, ranges.cast(), SERVICE_RANGES) {
        return Frontend::NONE;
    }
    active_address(&mut other)
}

/// True for sockets of the host's network namespace: a pod's 127.0.0.1 is its own.
#[inline(always)]
fn is_host(ctx: &SockAddrContext) -> bool {
    // SAFETY: the context is valid for the helper.
    unsafe { bpf_get_netns_cookie(ctx.as_ptr()) == HOST_NETNS.load() }
}
