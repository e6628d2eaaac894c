//! Maps in memory, and maps that fail.

use std::collections::{BTreeSet, HashMap};

use dataplane_common::abi::{Backend, FrontendKey, FrontendValue, Service, Slot, SourceRangeKey};

use super::maps::{Capacity, MapError, Maps, SetKind, Write};

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
    /// Content of `SOURCE_RANGES`.
    pub source_ranges: BTreeSet<SourceRangeKey>,
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
            source_ranges: BTreeSet::new(),
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
            Write::BackendNode { id, node } => {
                in_range("BACKENDS", id.into(), max.backends)?;
                self.backends.row(id).node = node;
            }
            Write::ResetServiceStats { id } => in_range("SERVICE_STATS", id.into(), max.services)?,
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
                    SetKind::Maglev => row.maglev = word,
                    SetKind::MaglevLocal => row.maglev_local = word,
                }
            }
            Write::Config { id, algorithm, flags } => {
                in_range("SERVICES", id.into(), max.services)?;
                let row = self.services.row(id);
                (row.algorithm, row.flags) = (algorithm, flags);
            }
            Write::Access {
                id,
                affinity_seconds,
                source_ranges,
            } => {
                in_range("SERVICES", id.into(), max.services)?;
                let row = self.services.row(id);
                (row.affinity_seconds, row.source_ranges) = (affinity_seconds, source_ranges);
            }
            Write::PutSourceRange { key } => {
                if self.source_ranges.len() as u64 >= u64::from(max.source_ranges)
                    && !self.source_ranges.contains(&key)
                {
                    return Err(MapError::Full {
                        map: "SOURCE_RANGES",
                        max: max.source_ranges,
                    });
                }
                self.source_ranges.insert(key);
            }
            Write::DeleteSourceRange { key } => {
                self.source_ranges.remove(&key);
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

    fn source_ranges(&self) -> Result<Vec<SourceRangeKey>, MapError> {
        Ok(self.source_ranges.iter().copied().collect())
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

    fn source_ranges(&self) -> Result<Vec<SourceRangeKey>, MapError> {
        self.inner.source_ranges()
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
