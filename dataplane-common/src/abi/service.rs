use core::mem::offset_of;

/// Flags of a service.
pub mod service_flag {
    /// `internalTrafficPolicy: Local`: traffic to the ClusterIP uses the `local` set.
    pub const INTERNAL_LOCAL: u32 = 1 << 0;
    /// `externalTrafficPolicy: Local`.
    pub const EXTERNAL_LOCAL: u32 = 1 << 1;
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
    /// Maglev table `{base, size}`. Not used yet.
    pub maglev: SetWord,
    /// See [`algorithm`].
    pub algorithm: u32,
    /// See [`service_flag`].
    pub flags: u32,
    /// Idle time of client affinity in seconds; 0 is none. Not used yet.
    pub affinity_seconds: u32,
    /// Id of the source ranges that may enter by a load-balancer address; 0 is all. Not used yet.
    pub source_ranges: u32,
    /// Always 0.
    pub reserved: [u64; 3],
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
    assert!(offset_of!(Service, reserved) == 40);
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
