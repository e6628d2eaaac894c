use core::mem::offset_of;

use super::{Addr, BePort};

/// What a flow entry is for; part of its key, because the same tuple may occur in two roles.
pub mod flow_role {
    /// Client to frontend, as it comes in: gives the backend.
    pub const FORWARD: u8 = 1;
    /// Backend to client, as the answer leaves: gives the frontend.
    pub const REVERSE: u8 = 2;
    /// Client to backend, as it leaves for another host: gives the masquerade address and port.
    pub const NAT_FORWARD: u8 = 3;
    /// Backend to masquerade address, as the answer comes in: gives the client.
    pub const NAT_REVERSE: u8 = 4;
}

/// Key of `CONNTRACK` and `NAT`: a tuple as it is seen on the wire, and its role. ICMP echo has its identifier as both
/// ports.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Default)]
pub struct FlowKey {
    /// Source address.
    pub src: Addr,
    /// Destination address.
    pub dst: Addr,
    /// Source port.
    pub src_port: BePort,
    /// Destination port.
    pub dst_port: BePort,
    /// See [`super::protocol`].
    pub protocol: u8,
    /// See [`flow_role`].
    pub role: u8,
    /// Always 0.
    pub pad: u16,
}

const _: () = {
    assert!(size_of::<FlowKey>() == 40 && align_of::<FlowKey>() == 4);
    assert!(offset_of!(FlowKey, src) == 0);
    assert!(offset_of!(FlowKey, dst) == 16);
    assert!(offset_of!(FlowKey, src_port) == 32);
    assert!(offset_of!(FlowKey, dst_port) == 34);
    assert!(offset_of!(FlowKey, protocol) == 36);
    assert!(offset_of!(FlowKey, role) == 37);
    assert!(offset_of!(FlowKey, pad) == 38);
};

/// Flags of a flow.
pub mod flow_flag {
    /// The egress program gives the packet a source of this node (set the mark on the way in).
    pub const MASQUERADE: u32 = 1 << 0;
    /// A SYN was seen in this direction.
    pub const SYN: u32 = 1 << 1;
    /// A FIN was seen in this direction.
    pub const FIN: u32 = 1 << 2;
    /// A RST was seen in either direction.
    pub const RST: u32 = 1 << 3;
    /// The other direction was seen (TCP: the handshake is complete).
    pub const REPLIED: u32 = 1 << 4;
    /// Made in the middle of a connection (its entry was lost, or another node had it).
    pub const RECOVERED: u32 = 1 << 5;
}

/// Value of `CONNTRACK` and `NAT`.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Flow {
    /// Time of the last packet in this direction, nanoseconds since boot (`CLOCK_MONOTONIC`, `bpf_ktime_get_ns`).
    pub seen: u64,
    /// What the tuple's far end becomes: forward the backend, reverse the frontend, NAT forward the node's address, NAT
    /// reverse the client.
    pub addr: Addr,
    /// Its port.
    pub port: BePort,
    /// Forward and reverse: the client's port towards the backend, where it had to change; else 0. For a reverse entry
    /// it is the port that the client itself uses.
    pub client_port: BePort,
    /// See [`flow_flag`].
    pub flags: u32,
    /// Row in `SERVICES`; 0 for NAT entries.
    pub service: u32,
    /// Row in `BACKENDS`; 0 for NAT entries.
    pub backend: u32,
    /// Packets in this direction.
    pub packets: u64,
    /// Bytes in this direction, from the network header on.
    pub bytes: u64,
}

const _: () = {
    assert!(size_of::<Flow>() == 56 && align_of::<Flow>() == 8);
    assert!(offset_of!(Flow, seen) == 0);
    assert!(offset_of!(Flow, addr) == 8);
    assert!(offset_of!(Flow, port) == 24);
    assert!(offset_of!(Flow, client_port) == 26);
    assert!(offset_of!(Flow, flags) == 28);
    assert!(offset_of!(Flow, service) == 32);
    assert!(offset_of!(Flow, backend) == 36);
    assert!(offset_of!(Flow, packets) == 40);
    assert!(offset_of!(Flow, bytes) == 48);
};

/// Value of `TRACES`, near the place that a part of the tuple's hash names: what is left of the entry of a flow's answers when
/// it is forgotten.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Trace {
    /// The entry's key. A role of 0 is nobody's.
    pub key: FlowKey,
    /// As in [`Flow`].
    pub addr: Addr,
    /// As in [`Flow`].
    pub port: BePort,
    /// As in [`Flow`].
    pub client_port: BePort,
    /// Always 0.
    pub pad: u32,
}

const _: () = {
    // a cache line
    assert!(size_of::<Trace>() == 64 && align_of::<Trace>() == 4);
    assert!(offset_of!(Trace, addr) == 40);
    assert!(offset_of!(Trace, port) == 56);
    assert!(offset_of!(Trace, client_port) == 58);
    assert!(offset_of!(Trace, pad) == 60);
};

/// Key of `FRAGMENTS`: what the fragments of one datagram have in common (RFC 791 3.2, RFC 8200 4.5).
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct FragmentKey {
    /// Source address.
    pub src: Addr,
    /// Destination address.
    pub dst: Addr,
    /// Identification, as it lies in the packet (IPv4: 16 bits).
    pub id: u32,
    /// See [`super::protocol`].
    pub protocol: u8,
    /// 0 at ingress, 1 at egress: a forwarded datagram passes both, translated in between.
    pub egress: u8,
    /// Always 0.
    pub pad: u16,
}

/// Value of `FRAGMENTS`: the ports that only the first fragment carries.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct FragmentPorts {
    /// Source port.
    pub src_port: BePort,
    /// Destination port.
    pub dst_port: BePort,
}

const _: () = {
    assert!(size_of::<FragmentKey>() == 40 && align_of::<FragmentKey>() == 4);
    assert!(offset_of!(FragmentKey, id) == 32);
    assert!(offset_of!(FragmentKey, protocol) == 36);
    assert!(offset_of!(FragmentKey, egress) == 37);
    assert!(offset_of!(FragmentKey, pad) == 38);
    assert!(size_of::<FragmentPorts>() == 4 && align_of::<FragmentPorts>() == 2);
};

/// Key of `AFFINITY`: a client of a service.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct AffinityKey {
    /// The client: its address for packets; for sockets `AffinityKey::from_netns`.
    pub client: Addr,
    /// Row in `SERVICES`.
    pub service: u32,
    /// Always 0.
    pub pad: u32,
}

impl AffinityKey {
    /// The client of a socket, which has no address yet when it connects: its network namespace (`bpf_get_netns_cookie`),
    /// written as no address is.
    #[inline(always)]
    #[must_use]
    #[expect(clippy::cast_possible_truncation, reason = "the two halves of the cookie")]
    pub const fn from_netns(cookie: u64, service: u32) -> Self {
        Self {
            client: Addr::from_v6_be([cookie as u32, (cookie >> 32) as u32, u32::MAX, u32::MAX]),
            service,
            pad: 0,
        }
    }
}

/// Value of `AFFINITY`.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Affinity {
    /// Time of the last new connection, nanoseconds since boot.
    pub seen: u64,
    /// Row in `BACKENDS`.
    pub backend: u32,
    /// A hint where to look for it: the entry of `SLOTS` that named it (packets), its place in the set (sockets).
    pub slot: u32,
}

const _: () = {
    assert!(size_of::<AffinityKey>() == 24 && align_of::<AffinityKey>() == 4);
    assert!(size_of::<Affinity>() == 16 && align_of::<Affinity>() == 8);
    assert!(offset_of!(Affinity, seen) == 0);
    assert!(offset_of!(Affinity, backend) == 8);
    assert!(offset_of!(Affinity, slot) == 12);
};
