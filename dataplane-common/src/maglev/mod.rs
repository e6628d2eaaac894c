//! Consistent hashing after Eisenbud et al., "Maglev: A Fast and Reliable Software Network Load Balancer" (NSDI 2016), 3.4.
//!
//! A table is made of the backends' addresses and ports only, never of ids, and a flow's hash of what the client's packets
//! carry; so every node chooses the same backend for a flow, also one that it has never seen before.

use crate::abi::{Addr, BePort};

// The eBPF target has no allocator, and its programs only read tables.
#[cfg(not(target_arch = "bpf"))]
mod table;

#[cfg(not(target_arch = "bpf"))]
pub use table::{build, table_size};

/// The finalizer of `SplitMix64` (Steele, Lea, Flood 2014): every bit of the input changes half of the output's.
#[inline(always)]
#[must_use]
pub const fn mix(value: u64) -> u64 {
    let value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}

#[inline(always)]
const fn addr_hash(addr: &Addr, seed: u64) -> u64 {
    let words = addr.words_be();
    mix(mix(seed ^ pair(words[0], words[1])) ^ pair(words[2], words[3]))
}

#[inline(always)]
const fn pair(high: u32, low: u32) -> u64 {
    (u32::from_be(high) as u64) << 32 | u32::from_be(low) as u64
}

/// The hash by which a flow is placed: of the client's address and port, and the port and protocol that it calls. The
/// address that it calls has no part in it, so that a flow to a node port keeps its backend at another node's address.
#[inline(always)]
#[must_use]
pub const fn flow_hash(client: &Addr, client_port: BePort, port: BePort, protocol: u8) -> u32 {
    let rest =
        (client_port.to_host() as u64) << 32 | (port.to_host() as u64) << 16 | (protocol as u64) << 8 | 1;
    (addr_hash(client, rest) >> 32) as u32
}

/// The hash by which a client is placed whatever its ports (`source-hash`).
#[inline(always)]
#[must_use]
pub const fn client_hash(client: &Addr) -> u32 {
    (addr_hash(client, 0) >> 32) as u32
}

/// The entry of a table (or the place in a set) of `count` entries for a hash: scaled, which needs no division.
#[inline(always)]
#[must_use]
pub const fn entry(hash: u32, count: u32) -> u32 {
    ((hash as u64 * count as u64) >> 32) as u32
}

const _: () = assert!(entry(u32::MAX, 7) == 6 && entry(0, 7) == 0);
