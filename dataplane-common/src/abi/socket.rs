use core::mem::offset_of;

use super::{Addr, BePort};

/// Value of `SOCK_CONN` and, for UDP, of `SOCK_STATE`, the socket's own storage: how a connected socket was translated. It
/// goes with the socket, so it is never evicted, and its end is how closed connections are counted.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct SockState {
    /// The frontend that the application connected to.
    pub addr: Addr,
    /// The frontend that the application connected to.
    pub port: BePort,
    /// Always 0.
    pub pad: u16,
    /// Row in `SERVICES` at the time of the connect.
    pub service: u32,
    /// Row in `BACKENDS` at the time of the connect; 0: not translated (the socket was reconnected elsewhere).
    pub backend: u32,
    /// Generation of that row, so that a close is not counted for a later user of the id.
    pub generation: u32,
    /// Where the connection really goes.
    pub backend_addr: Addr,
    /// Where the connection really goes.
    pub backend_port: BePort,
    /// Always 0.
    pub pad2: [u16; 3],
}

const _: () = {
    assert!(size_of::<SockState>() == 56 && align_of::<SockState>() == 4);
    assert!(offset_of!(SockState, addr) == 0);
    assert!(offset_of!(SockState, port) == 16);
    assert!(offset_of!(SockState, pad) == 18);
    assert!(offset_of!(SockState, service) == 20);
    assert!(offset_of!(SockState, backend) == 24);
    assert!(offset_of!(SockState, generation) == 28);
    assert!(offset_of!(SockState, backend_addr) == 32);
    assert!(offset_of!(SockState, backend_port) == 48);
    assert!(offset_of!(SockState, pad2) == 50);
};

/// Key of `SOCK_ORIGIN`: an unconnected UDP socket and the backend that one of its datagrams went to.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct SockOriginKey {
    /// `bpf_get_socket_cookie`.
    pub cookie: u64,
    /// The backend's address.
    pub addr: Addr,
    /// The backend's port.
    pub port: BePort,
    /// Always 0.
    pub pad: [u16; 3],
}

const _: () = {
    assert!(size_of::<SockOriginKey>() == 32 && align_of::<SockOriginKey>() == 8);
    assert!(offset_of!(SockOriginKey, cookie) == 0);
    assert!(offset_of!(SockOriginKey, addr) == 8);
    assert!(offset_of!(SockOriginKey, port) == 24);
    assert!(offset_of!(SockOriginKey, pad) == 26);
};

/// Value of `SOCK_ORIGIN`: the frontend that the application sent to.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct SockOrigin {
    /// The frontend's address.
    pub addr: Addr,
    /// The frontend's port.
    pub port: BePort,
    /// Always 0.
    pub pad: u16,
    /// Row in `SERVICES`.
    pub service: u32,
}

const _: () = {
    assert!(size_of::<SockOrigin>() == 24 && align_of::<SockOrigin>() == 4);
    assert!(offset_of!(SockOrigin, addr) == 0);
    assert!(offset_of!(SockOrigin, port) == 16);
    assert!(offset_of!(SockOrigin, pad) == 18);
    assert!(offset_of!(SockOrigin, service) == 20);
};

/// Value of `SOCK_FLOW`, a socket's own storage: the backend that an unconnected UDP socket's datagrams to one frontend go
/// to, so that a client keeps its server while that serves, as connection tracking would have it.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct SockFlow {
    /// The frontend of the last datagram.
    pub addr: Addr,
    /// The frontend of the last datagram.
    pub port: BePort,
    /// Always 0.
    pub pad: u16,
    /// Row in `SERVICES`.
    pub service: u32,
    /// Row in `BACKENDS`; 0: none yet.
    pub backend: u32,
    /// Its place in the set, where it is known: a hint.
    pub place: u32,
}

const _: () = {
    assert!(size_of::<SockFlow>() == 32 && align_of::<SockFlow>() == 4);
    assert!(offset_of!(SockFlow, addr) == 0);
    assert!(offset_of!(SockFlow, port) == 16);
    assert!(offset_of!(SockFlow, pad) == 18);
    assert!(offset_of!(SockFlow, service) == 20);
    assert!(offset_of!(SockFlow, backend) == 24);
    assert!(offset_of!(SockFlow, place) == 28);
};

/// Value of `NETNS_ADDRS`, by network namespace cookie: the addresses that its sockets call from, for source ranges.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct NetnsAddrs {
    /// IPv4 address (IPv4-mapped); all zero if there is none.
    pub v4: Addr,
    /// IPv6 address; all zero if there is none.
    pub v6: Addr,
}

const _: () = {
    assert!(size_of::<NetnsAddrs>() == 32 && align_of::<NetnsAddrs>() == 4);
    assert!(offset_of!(NetnsAddrs, v4) == 0);
    assert!(offset_of!(NetnsAddrs, v6) == 16);
};
