use core::mem::offset_of;

use super::{Addr, BePort};

/// States of a backend. Only [`ACTIVE`](backend_state::ACTIVE) and [`TERMINATING`](backend_state::TERMINATING) are ever
/// referred to by a slot.
pub mod backend_state {
    /// The row belongs to nobody (a zeroed entry).
    pub const FREE: u8 = 0;
    /// Ready to serve.
    pub const ACTIVE: u8 = 1;
    /// Serving and terminating: used only while nothing ready is left.
    pub const TERMINATING: u8 = 2;
}

/// One row of `BACKENDS`, by backend id. Rows are written before a slot refers to them and not changed, `state` apart,
/// until their id has been free for the quarantine.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Backend {
    /// Where to send to.
    pub addr: Addr,
    /// Where to send to.
    pub port: BePort,
    /// An IANA protocol number, see [`super::protocol`].
    pub protocol: u8,
    /// See [`backend_state`].
    pub state: u8,
    /// Id of the node that the backend runs on; 0 is unknown. Not used yet.
    pub node: u32,
    /// Relative weight. Not used yet; 0 means 1.
    pub weight: u16,
    /// Always 0.
    pub pad: u16,
    /// How often the id has been given out, so that stale references can be told from new ones.
    pub generation: u32,
}

const _: () = {
    assert!(size_of::<Backend>() == 32 && align_of::<Backend>() == 4);
    assert!(offset_of!(Backend, addr) == 0);
    assert!(offset_of!(Backend, port) == 16);
    assert!(offset_of!(Backend, protocol) == 18);
    assert!(offset_of!(Backend, state) == 19);
    assert!(offset_of!(Backend, node) == 20);
    assert!(offset_of!(Backend, weight) == 24);
    assert!(offset_of!(Backend, pad) == 26);
    assert!(offset_of!(Backend, generation) == 28);
};

/// One row of `BACKEND_STATS`, by backend id; only the programs write it (atomic adds), user space zeroes it when an id is
/// given out.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct BackendStats {
    /// Connections (TCP, connected UDP) sent to the backend since the id was given out.
    pub connections: u64,
    /// Of these, how many have been closed. A socket that dies with its process counts as closed.
    pub closed: u64,
    /// Datagrams of unconnected UDP sockets sent to the backend.
    pub datagrams: u64,
    /// Always 0.
    pub reserved: u64,
}

const _: () = {
    assert!(size_of::<BackendStats>() == 32 && align_of::<BackendStats>() == 8);
    assert!(offset_of!(BackendStats, connections) == 0);
    assert!(offset_of!(BackendStats, closed) == 8);
    assert!(offset_of!(BackendStats, datagrams) == 16);
    assert!(offset_of!(BackendStats, reserved) == 24);
};
