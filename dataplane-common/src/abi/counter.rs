/// What `COUNTERS` counts: index of the per-CPU array. Numbers are stable: never renumber, only append.
#[repr(u32)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Counter {
    /// Connections translated to a backend.
    Connected = 0,
    /// Datagrams of unconnected sockets translated to a backend.
    DatagramTranslated = 1,
    /// Refused: the service has no usable backend.
    NoBackend = 2,
    /// Refused: the frontend names a service id outside `SERVICES`.
    BadService = 3,
    /// Refused: a slot belonged to another service, twice in a row.
    ForeignSlot = 4,
    /// Refused: a slot named a backend outside `BACKENDS` or a free row.
    BadBackend = 5,
    /// A slot belonged to another service; the second read was right.
    SlotRetry = 6,
    /// The origin of a datagram could not be recorded: its reply will show the backend's address.
    OriginLost = 7,
    /// The socket's storage could not be made: `getpeername` will show the backend's address.
    StateLost = 8,
    /// Replies whose source was translated back.
    ReplyTranslated = 9,
}

/// Every counter, in order, with the name that metrics and `beeline status` show.
pub const COUNTERS: [(Counter, &str); 10] = [
    (Counter::Connected, "connected"),
    (Counter::DatagramTranslated, "datagram_translated"),
    (Counter::NoBackend, "no_backend"),
    (Counter::BadService, "bad_service"),
    (Counter::ForeignSlot, "foreign_slot"),
    (Counter::BadBackend, "bad_backend"),
    (Counter::SlotRetry, "slot_retry"),
    (Counter::OriginLost, "origin_lost"),
    (Counter::StateLost, "state_lost"),
    (Counter::ReplyTranslated, "reply_translated"),
];

const _: () = {
    let mut i = 0;
    while i < COUNTERS.len() {
        assert!(COUNTERS[i].0 as usize == i);
        i += 1;
    }
};
