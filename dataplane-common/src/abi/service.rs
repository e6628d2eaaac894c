use core::mem::offset_of;

use super::Addr;

/// Flags of a service.
pub mod service_flag {
    /// `internalTrafficPolicy: Local`: traffic to the ClusterIP uses the `local` set.
    pub const INTERNAL_LOCAL: u32 = 1 << 0;
    /// `externalTrafficPolicy: Local`: traffic from outside the cluster to an external address uses the `local` set.
    pub const EXTERNAL_LOCAL: u32 = 1 << 1;
    /// Somewhere there is a ready endpoint, or a serving and terminating one: an empty `local` set drops, while without
    /// this flag it rejects (spec kube-proxy 2.2).
    pub const HAS_ENDPOINTS: u32 = 1 << 2;
    /// A source range covers this node, so that a source that equals the load-balancer address is let in as well
    /// (spec kube-proxy 2.4).
    pub const NODE_IN_RANGES: u32 = 1 << 3;
    /// Backends of this service are not watched for failures.
    pub const NO_FAILURE_DETECTION: u32 = 1 << 4;
}

/// Ways to choose a backend.
pub mod algorithm {
    /// Uniformly at random, per connection (kube-proxy's).
    pub const RANDOM: u32 = 0;
    /// Backends in turn.
    pub const ROUND_ROBIN: u32 = 1;
    /// Consistent hashing of the flow.
    pub const MAGLEV: u32 = 2;
    /// By the client's address.
    pub const SOURCE_HASH: u32 = 3;
    /// Fewer open connections out of two random choices.
    pub const LEAST_CONN: u32 = 4;
}

/// A set of backends: a contiguous range of `SLOTS`, as one word `{base, count}` that is stored and loaded whole (one
/// aligned 8-byte access), so that a reader sees the old set or the new one and never a mix.
#[repr(transparent)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct SetWord(pub u64);

impl SetWord {
    /// The set of `count` slots from slot `base` on.
    #[inline(always)]
    #[must_use]
    pub const fn new(base: u32, count: u32) -> Self {
        Self((count as u64) << 32 | base as u64)
    }

    /// Index of the first slot.
    #[inline(always)]
    #[must_use]
    #[expect(clippy::cast_possible_truncation, reason = "the low half is what is wanted")]
    pub const fn base(self) -> u32 {
        self.0 as u32
    }

    /// Number of slots; 0 is the empty set.
    #[inline(always)]
    #[must_use]
    pub const fn count(self) -> u32 {
        (self.0 >> 32) as u32
    }
}

/// One row of `SERVICES`, by service id.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Service {
    /// What traffic under policy `Cluster` may use.
    pub cluster: SetWord,
    /// What traffic under policy `Local` may use.
    pub local: SetWord,
    /// Maglev table of the `cluster` set; the empty set while there is none.
    pub maglev: SetWord,
    /// See [`algorithm`].
    pub algorithm: u32,
    /// See [`service_flag`].
    pub flags: u32,
    /// Idle time of client affinity in seconds; 0 is none.
    pub affinity_seconds: u32,
    /// Id of the source ranges that may enter by a load-balancer address ([`super::SourceRangeKey`]); 0 is all.
    pub source_ranges: u32,
    /// Maglev table of the `local` set; the empty set while there is none.
    pub maglev_local: SetWord,
    /// Always 0.
    pub reserved: [u64; 2],
}

const _: () = {
    assert!(size_of::<Service>() == 64 && align_of::<Service>() == 8);
    assert!(offset_of!(Service, cluster) == 0);
    assert!(offset_of!(Service, local) == 8);
    assert!(offset_of!(Service, maglev) == 16);
    assert!(offset_of!(Service, algorithm) == 24);
    assert!(offset_of!(Service, flags) == 28);
    assert!(offset_of!(Service, affinity_seconds) == 32);
    assert!(offset_of!(Service, source_ranges) == 36);
    assert!(offset_of!(Service, maglev_local) == 40);
    assert!(offset_of!(Service, reserved) == 48);
};

/// One entry of `SLOTS`, stored and loaded whole.
#[repr(transparent)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Slot(pub u64);

impl Slot {
    /// A slot of `service` that names `backend`.
    #[inline(always)]
    #[must_use]
    pub const fn new(backend: u32, service: u32) -> Self {
        Self((service as u64) << 32 | backend as u64)
    }

    /// Row in `BACKENDS`.
    #[inline(always)]
    #[must_use]
    #[expect(clippy::cast_possible_truncation, reason = "the low half is what is wanted")]
    pub const fn backend(self) -> u32 {
        self.0 as u32
    }

    /// The service that the slot belongs to: a reader checks it, because the range may have changed hands since it read
    /// the set word.
    #[inline(always)]
    #[must_use]
    pub const fn service(self) -> u32 {
        (self.0 >> 32) as u32
    }
}

const _: () = assert!(size_of::<SetWord>() == 8 && size_of::<Slot>() == 8);
const _: () = assert!(align_of::<SetWord>() == 8 && align_of::<Slot>() == 8);

/// One row of `SERVICE_STATS`, by service id; only the programs write it, user space zeroes it when an id is given out.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct ServiceStats {
    /// Turn of round-robin: the next choice is this value modulo the size of the set.
    pub turn: u64,
    /// Connections and datagram flows given a backend.
    pub connections: u64,
    /// Refused or dropped because the set was empty.
    pub no_backend: u64,
    /// Dropped because the client is outside the source ranges.
    pub denied: u64,
}

const _: () = {
    assert!(size_of::<ServiceStats>() == 32 && align_of::<ServiceStats>() == 8);
    assert!(offset_of!(ServiceStats, turn) == 0);
    assert!(offset_of!(ServiceStats, connections) == 8);
    assert!(offset_of!(ServiceStats, no_backend) == 16);
    assert!(offset_of!(ServiceStats, denied) == 24);
};

/// Key of the trie `SOURCE_RANGES`: the ranges of one id. In a trie the first word is the prefix length, counted over the
/// bytes behind it: 32 bits of id, then the prefix of the (IPv4-mapped) address.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Default)]
pub struct SourceRangeKey {
    /// 32 plus the length of the address prefix (96 more for IPv4).
    pub prefix_len: u32,
    /// [`Service::source_ranges`].
    pub ranges: u32,
    /// The range's first address.
    pub addr: Addr,
}

const _: () = {
    assert!(size_of::<SourceRangeKey>() == 24 && align_of::<SourceRangeKey>() == 4);
    assert!(offset_of!(SourceRangeKey, prefix_len) == 0);
    assert!(offset_of!(SourceRangeKey, ranges) == 4);
    assert!(offset_of!(SourceRangeKey, addr) == 8);
};
