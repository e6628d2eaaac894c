//! The kernel's maps as the programmer sees them.

use dataplane_common::abi::{Backend, FrontendKey, FrontendValue, Service, SetWord, Slot, SourceRangeKey};

/// Which of a service's sets.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum SetKind {
    /// For traffic policy `Cluster`.
    Cluster,
    /// For traffic policy `Local`.
    Local,
    /// Maglev table of `Cluster`.
    Maglev,
    /// Maglev table of `Local`.
    MaglevLocal,
}

/// Values of `Backend.node`.
pub mod backend_node {
    /// The backend is on this node.
    pub const LOCAL: u32 = 1;
    /// The backend is on another node, or nobody says where it is.
    pub const REMOTE: u32 = 2;
}

/// One write. Each is atomic for the programs that read, except [`Write::Backend`], [`Write::Slots`] and
/// [`Write::Service`], which only touch what no reader can reach yet.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Write<'a> {
    /// A whole row of `BACKENDS` that nothing refers to.
    Backend {
        /// Row.
        id: u32,
        /// Content.
        row: Backend,
    },
    /// The `state` byte of a row of `BACKENDS` in use.
    BackendState {
        /// Row.
        id: u32,
        /// See [`dataplane_common::abi::backend_state`].
        state: u8,
    },
    /// The `node` of a row of `BACKENDS` in use: one store of 4 bytes.
    BackendNode {
        /// Row.
        id: u32,
        /// See [`backend_node`].
        node: u32,
    },
    /// Zeroes a row of `SERVICE_STATS`.
    ResetServiceStats {
        /// Row.
        id: u32,
    },
    /// Zeroes a row of `BACKEND_STATS` and of `BACKEND_HEALTH`.
    ResetStats {
        /// Row.
        id: u32,
    },
    /// A range of `SLOTS` that nothing refers to.
    Slots {
        /// First slot.
        base: u32,
        /// Content.
        slots: &'a [Slot],
    },
    /// A whole row of `SERVICES` that no frontend leads to.
    Service {
        /// Row.
        id: u32,
        /// Content.
        row: Service,
    },
    /// Publishes a set: one 8-byte store.
    Set {
        /// Row of `SERVICES`.
        id: u32,
        /// Which set.
        which: SetKind,
        /// Its new range.
        word: SetWord,
    },
    /// Algorithm and flags of a service in use: one 8-byte store.
    Config {
        /// Row of `SERVICES`.
        id: u32,
        /// See [`dataplane_common::abi::algorithm`].
        algorithm: u32,
        /// See [`dataplane_common::abi::service_flag`].
        flags: u32,
    },
    /// Client affinity and source ranges of a service in use: one 8-byte store.
    Access {
        /// Row of `SERVICES`.
        id: u32,
        /// Idle time of client affinity; 0 is none.
        affinity_seconds: u32,
        /// Id of its source ranges; 0 is none.
        source_ranges: u32,
    },
    /// Adds a source range.
    PutSourceRange {
        /// Id of the ranges, and the range.
        key: SourceRangeKey,
    },
    /// Removes a source range; that it is not there is no error.
    DeleteSourceRange {
        /// Id of the ranges, and the range.
        key: SourceRangeKey,
    },
    /// Adds or changes a frontend.
    PutFrontend {
        /// Where it is offered.
        key: FrontendKey,
        /// To whom it leads.
        value: FrontendValue,
    },
    /// Removes a frontend; that it is not there is no error.
    DeleteFrontend {
        /// Where it was offered.
        key: FrontendKey,
    },
}

/// Why a write or a read failed.
#[derive(Debug, thiserror::Error)]
pub enum MapError {
    /// The map has no room.
    #[error("map {map} is full ({max} entries)")]
    Full {
        /// Name of the map.
        map: &'static str,
        /// Its size.
        max: u32,
    },
    /// An index that the map does not have.
    #[error("map {map} has no entry {index} ({max} entries)")]
    OutOfRange {
        /// Name of the map.
        map: &'static str,
        /// The index.
        index: u64,
        /// Its size.
        max: u32,
    },
    /// The kernel refused.
    #[error("map {map}: {operation}: {source}")]
    Io {
        /// Name of the map.
        map: &'static str,
        /// What was tried.
        operation: &'static str,
        /// The kernel's answer.
        source: std::io::Error,
    },
}

impl MapError {
    /// Name of the map.
    #[must_use]
    pub const fn map(&self) -> &'static str {
        match self {
            Self::Full { map, .. } | Self::OutOfRange { map, .. } | Self::Io { map, .. } => map,
        }
    }
}

/// Sizes of the maps, in entries. Ids run from 1 to the size less 1.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Capacity {
    /// `SERVICES`.
    pub services: u32,
    /// `BACKENDS` and `BACKEND_STATS`.
    pub backends: u32,
    /// `SLOTS`.
    pub slots: u32,
    /// `FRONTENDS`.
    pub frontends: u32,
    /// `SOURCE_RANGES`.
    pub source_ranges: u32,
}

/// The kernel's maps, or what stands in for them.
pub trait Maps {
    /// Carries out one write, wholly or not at all.
    ///
    /// # Errors
    ///
    /// If the map is full, has no such entry, or the kernel refuses.
    fn write(&mut self, write: &Write<'_>) -> Result<(), MapError>;

    /// All frontends.
    ///
    /// # Errors
    ///
    /// If the kernel refuses.
    fn frontends(&self) -> Result<Vec<(FrontendKey, FrontendValue)>, MapError>;

    /// All source ranges.
    ///
    /// # Errors
    ///
    /// If the kernel refuses.
    fn source_ranges(&self) -> Result<Vec<SourceRangeKey>, MapError>;

    /// A row of `SERVICES`; `None` beyond its end.
    fn service(&self, id: u32) -> Option<Service>;

    /// An entry of `SLOTS`; `None` beyond its end.
    fn slot(&self, index: u32) -> Option<Slot>;

    /// A row of `BACKENDS`; `None` beyond its end.
    fn backend(&self, id: u32) -> Option<Backend>;

    /// Sizes.
    fn capacity(&self) -> Capacity;
}
