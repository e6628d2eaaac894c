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
    /// What a connected socket was translated from could not be kept: `getpeername` will show the backend's address, and the
    /// connection counts as closed.
    StateLost = 8,
    /// Replies whose source was translated back.
    ReplyTranslated = 9,
    /// Refused or dropped: the client is outside the source ranges of a load-balancer address.
    Denied = 10,
    /// Dropped: policy Local, and the endpoints are elsewhere.
    NoLocalBackend = 11,
    /// Rejected: a service address without a service at this port.
    UnknownPort = 12,
    /// Dropped: within the service ranges, but no service has the address.
    UnknownAddress = 13,
    /// A client's affinity could not be recorded.
    AffinityLost = 14,
    /// Flow entries made.
    FlowCreated = 15,
    /// Flows found again in mid-connection: their entry had been evicted, or another node had them.
    FlowRecovered = 16,
    /// Dropped: a flow entry could not be made.
    FlowLost = 17,
    /// Dropped: no free port for masquerading towards this backend.
    NatExhausted = 18,
    /// Dropped: the device has no address of the family to masquerade with.
    NoNatAddress = 19,
    /// Passed untouched: shorter than its headers say.
    Truncated = 20,
    /// Passed untouched: a later fragment whose first one was not seen.
    FragmentUnknown = 21,
    /// ICMP errors whose inner packet was translated.
    IcmpTranslated = 22,
    /// Answered with an ICMP error or a reset.
    Rejected = 23,
    /// Dropped: the packet could not be rewritten.
    StoreFailed = 24,
    /// Packets translated towards a backend.
    PacketForward = 25,
    /// Packets translated back towards a client.
    PacketReverse = 26,
    /// Packets given a source of this node.
    PacketMasqueraded = 27,
    /// Packets whose source of this node was taken back.
    PacketUnmasqueraded = 28,
    /// Events that the ring buffer had no room for.
    EventLost = 29,
    /// Calls left to the packet programs: the service has source ranges, and the caller's address is not known.
    LeftToPackets = 30,
    /// Dropped: a pod sent with a source that is not its own.
    SourceForeign = 31,
    /// Dropped: more than a pod's bandwidth.
    OverLimit = 32,
    /// Packets between pods that went past the node's routing and netfilter.
    ShortWay = 33,
    /// Packets between pods that the node's own forwarding had to carry.
    LongWay = 34,
}

/// Every counter, in order, with the name that metrics and `beeline status` show.
pub const COUNTERS: [(Counter, &str); 35] = [
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
    (Counter::Denied, "denied"),
    (Counter::NoLocalBackend, "no_local_backend"),
    (Counter::UnknownPort, "unknown_port"),
    (Counter::UnknownAddress, "unknown_address"),
    (Counter::AffinityLost, "affinity_lost"),
    (Counter::FlowCreated, "flow_created"),
    (Counter::FlowRecovered, "flow_recovered"),
    (Counter::FlowLost, "flow_lost"),
    (Counter::NatExhausted, "nat_exhausted"),
    (Counter::NoNatAddress, "no_nat_address"),
    (Counter::Truncated, "truncated"),
    (Counter::FragmentUnknown, "fragment_unknown"),
    (Counter::IcmpTranslated, "icmp_translated"),
    (Counter::Rejected, "rejected"),
    (Counter::StoreFailed, "store_failed"),
    (Counter::PacketForward, "packet_forward"),
    (Counter::PacketReverse, "packet_reverse"),
    (Counter::PacketMasqueraded, "packet_masqueraded"),
    (Counter::PacketUnmasqueraded, "packet_unmasqueraded"),
    (Counter::EventLost, "event_lost"),
    (Counter::LeftToPackets, "left_to_packets"),
    (Counter::SourceForeign, "source_foreign"),
    (Counter::OverLimit, "over_limit"),
    (Counter::ShortWay, "short_way"),
    (Counter::LongWay, "long_way"),
];

const _: () = {
    let mut i = 0;
    while i < COUNTERS.len() {
        assert!(COUNTERS[i].0 as usize == i);
        i += 1;
    }
};
