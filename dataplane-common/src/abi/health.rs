use core::mem::offset_of;

/// One row of `BACKEND_HEALTH`, by backend id: what connections saw of it. Only the programs write it.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct BackendHealth {
    /// Time of the last sign of life (a completed handshake, or data acknowledged after a time-out), nanoseconds since
    /// boot.
    pub alive: u64,
    /// Time of the last failure, nanoseconds since boot.
    pub failed: u64,
    /// Connects that failed or timed out.
    pub connect_failures: u64,
    /// Retransmission time-outs of established connections.
    pub timeouts: u64,
}

const _: () = {
    assert!(size_of::<BackendHealth>() == 32 && align_of::<BackendHealth>() == 8);
    assert!(offset_of!(BackendHealth, alive) == 0);
    assert!(offset_of!(BackendHealth, failed) == 8);
    assert!(offset_of!(BackendHealth, connect_failures) == 16);
    assert!(offset_of!(BackendHealth, timeouts) == 24);
};

/// Kinds of [`Event`].
pub mod event_kind {
    /// A SYN to a backend was not answered in time.
    pub const CONNECT_TIMEOUT: u32 = 1;
    /// A connect to a backend failed for good.
    pub const CONNECT_FAILED: u32 = 2;
    /// An established connection had to send again.
    pub const RETRANSMIT: u32 = 3;
    /// A backend that had failed answered.
    pub const ALIVE: u32 = 4;
}

/// A record of the ring buffer `EVENTS`: fixed size, so that nothing has to be parsed.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Event {
    /// Nanoseconds since boot.
    pub time: u64,
    /// See [`event_kind`].
    pub kind: u32,
    /// Row in `SERVICES`, 0 if it is about none.
    pub service: u32,
    /// Row in `BACKENDS`, 0 if it is about none.
    pub backend: u32,
    /// Generation of that row.
    pub generation: u32,
    /// The socket (`bpf_get_socket_cookie`), 0 if there is none.
    pub cookie: u64,
}

const _: () = {
    assert!(size_of::<Event>() == 32 && align_of::<Event>() == 8);
    assert!(offset_of!(Event, time) == 0);
    assert!(offset_of!(Event, kind) == 8);
    assert!(offset_of!(Event, service) == 12);
    assert!(offset_of!(Event, backend) == 16);
    assert!(offset_of!(Event, generation) == 20);
    assert!(offset_of!(Event, cookie) == 24);
};
