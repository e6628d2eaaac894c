//! The kernel's maps as the programmer sees them.

use std::collections::HashMap;

use dataplane_common::abi::{Backend, FrontendKey, FrontendValue, Service, SetWord, Slot};

/// Which of a service's sets.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum SetKind {
    /// For traffic policy `Cluster`.
    Cluster,
    /// For traffic policy `Local`.
    Local,
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
    /// Zeroes a row of `BACKEND_STATS`.
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

    /// A row of `SERVICES`; `None` beyond its end.
    fn service(&self, id: u32) -> Option<Service>;

    /// An entry of `SLOTS`; `None` beyond its end.
    fn slot(&self, index: u32) -> Option<Slot>;

    /// A row of `BACKENDS`; `None` beyond its end.
    fn backend(&self, id: u32) -> Option<Backend>;

    /// Sizes.
    fn capacity(&self) -> Capacity;
}

/// An array of zeroes as far as it has been written.
#[derive(Clone, Debug, Default)]
struct Rows<T>(Vec<T>);

impl<T: Copy + Default> Rows<T> {
    fn get(&self, index: u32) -> T {
        self.0.get(index as usize).copied().unwrap_or_default()
    }

    /// These rows, made if they are not there yet; the caller has checked the map's size.
    fn rows(&mut self, base: u32, count: usize) -> &mut [T] {
        let (base, end) = (base as usize, base as usize + count);
        if self.0.len() < end {
            self.0.resize(end, T::default());
        }
        &mut self.0[base..end]
    }

    fn row(&mut self, index: u32) -> &mut T {
        &mut self.rows(index, 1)[0]
    }
}

/// Maps in memory that behave as the kernel's do: arrays of a fixed size that start as zeroes, a hash that can be full.
#[derive(Clone, Debug)]
pub struct FakeMaps {
    capacity: Capacity,
    /// Content of `FRONTENDS`.
    pub frontends: HashMap<FrontendKey, FrontendValue>,
    services: Rows<Service>,
    slots: Rows<Slot>,
    backends: Rows<Backend>,
}

impl FakeMaps {
    /// Empty maps of these sizes.
    #[must_use]
    pub fn new(capacity: Capacity) -> Self {
        Self {
            capacity,
            frontends: HashMap::new(),
            services: Rows::default(),
            slots: Rows::default(),
            backends: Rows::default(),
        }
    }
}

fn in_range(map: &'static str, index: u64, max: u32) -> Result<(), MapError> {
    if index < u64::from(max) {
        Ok(())
    } else {
        Err(MapError::OutOfRange { map, index, max })
    }
}

impl Maps for FakeMaps {
    fn write(&mut self, write: &Write<'_>) -> Result<(), MapError> {
        let max = self.capacity;
        match *write {
            Write::Backend { id, row } => {
                in_range("BACKENDS", id.into(), max.backends)?;
                *self.backends.row(id) = row;
            }
            Write::BackendState { id, state } => {
                in_range("BACKENDS", id.into(), max.backends)?;
                self.backends.row(id).state = state;
            }
            Write::ResetStats { id } => in_range("BACKEND_STATS", id.into(), max.backends)?,
            Write::Slots { base, slots } => {
                in_range(
                    "SLOTS",
                    (u64::from(base) + slots.len() as u64).saturating_sub(1),
                    max.slots,
                )?;
                self.slots.rows(base, slots.len()).copy_from_slice(slots);
            }
            Write::Service { id, row } => {
                in_range("SERVICES", id.into(), max.services)?;
                *self.services.row(id) = row;
            }
            Write::Set { id, which, word } => {
                in_range("SERVICES", id.into(), max.services)?;
                let row = self.services.row(id);
                match which {
                    SetKind::Cluster => row.cluster = word,
                    SetKind::Local => row.local = word,
                }
            }
            Write::Config { id, algorithm, flags } => {
                in_range("SERVICES", id.into(), max.services)?;
                let row = self.services.row(id);
                (row.algorithm, row.flags) = (algorithm, flags);
            }
            Write::PutFrontend { key, value } => {
                if self.frontends.len() as u64 >= u64::from(max.frontends)
                    && !self.frontends.contains_key(&key)
                {
                    return Err(MapError::Full {
                        map: "FRONTENDS",
                        max: max.frontends,
                    });
                }
                self.frontends.insert(key, value);
            }
            Write::DeleteFrontend { key } => {
                self.frontends.remove(&key);
            }
        }
        Ok(())
    }

    fn frontends(&self) -> Result<Vec<(FrontendKey, FrontendValue)>, MapError> {
        Ok(self.frontends.iter().map(|(k, v)| (*k, *v)).collect())
    }

    fn service(&self, id: u32) -> Option<Service> {
        (id < self.capacity.services).then(|| self.services.get(id))
    }

    fn slot(&self, index: u32) -> Option<Slot> {
        (index < self.capacity.slots).then(|| self.slots.get(index))
    }

    fn backend(&self, id: u32) -> Option<Backend> {
        (id < self.capacity.backends).then(|| self.backends.get(id))
    }

    fn capacity(&self) -> Capacity {
        self.capacity
    }
}

/// Maps of which each write fails with a given probability, before it has changed anything.
#[derive(Clone, Debug)]
pub struct FaultyMaps<M> {
    inner: M,
    /// Failures in 65,536 writes.
    rate: u32,
    seed: u64,
}

impl<M> FaultyMaps<M> {
    /// Wraps `inner`; `rate` failures in 65,536 writes, in an order that `seed` gives.
    pub const fn new(inner: M, rate: u32, seed: u64) -> Self {
        Self { inner, rate, seed }
    }

    /// What is wrapped.
    pub const fn inner(&self) -> &M {
        &self.inner
    }

    /// Changes the rate: 0 never fails.
    pub const fn set_rate(&mut self, rate: u32) {
        self.rate = rate;
    }

    /// The next of a sequence of pseudo-random numbers (splitmix64, public domain), 0 to 65,535.
    fn next(&mut self) -> u32 {
        self.seed = self.seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.seed;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        u32::from(u16::from_le_bytes([z.to_le_bytes()[6], z.to_le_bytes()[7]]))
    }
}

impl<M: Maps> Maps for FaultyMaps<M> {
    fn write(&mut self, write: &Write<'_>) -> Result<(), MapError> {
        if self.next() < self.rate {
            let source = std::io::Error::other("injected fault");
            return Err(MapError::Io {
                map: "FAULTY",
                operation: "write",
                source,
            });
        }
        self.inner.write(write)
    }

    fn frontends(&self) -> Result<Vec<(FrontendKey, FrontendValue)>, MapError> {
        self.inner.frontends()
    }

    fn service(&self, id: u32) -> Option<Service> {
        self.inner.service(id)
    }

    fn slot(&self, index: u32) -> Option<Slot> {
        self.inner.slot(index)
    }

    fn backend(&self, id: u32) -> Option<Backend> {
        self.inner.backend(id)
    }

    fn capacity(&self) -> Capacity {
        self.inner.capacity()
    }
}
