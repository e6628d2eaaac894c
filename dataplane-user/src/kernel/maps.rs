//! The kernel's maps for the programmer.

use std::mem::offset_of;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use aya::maps::lpm_trie::{Key, LpmTrie};
use aya::maps::{HashMap, Map, MapData, MapError as AyaMapError};
use dataplane_common::abi::{
    Addr, Backend, BackendHealth, BackendStats, FrontendKey, FrontendValue, Service, ServiceStats, Slot,
    SourceRangeKey, map_name,
};
use dataplane_model::program::{Capacity, MapError, Maps, SetKind, Write};

use super::arrays::MappedArray;
use super::{KernelError, open_map, pins};

/// The maps below a pin directory.
#[derive(Debug)]
pub struct RealMaps {
    frontends: HashMap<MapData, FrontendKey, FrontendValue>,
    max_frontends: u32,
    services: MappedArray<Service>,
    slots: MappedArray<Slot>,
    backends: MappedArray<Backend>,
    stats: MappedArray<BackendStats>,
    health: Option<MappedArray<BackendHealth>>,
    service_stats: Option<MappedArray<ServiceStats>>,
    source_ranges: Option<LpmTrie<MapData, [u32; 5], u32>>,
    max_source_ranges: u32,
}

/// A map that only some of the programs have: `None` without its pin.
fn if_pinned<T>(
    pin_dir: &Path,
    name: &'static str,
    open: impl FnOnce(&Path, &'static str) -> Result<T, KernelError>,
) -> Result<Option<T>, KernelError> {
    let pinned = pins::map_path(pin_dir, name).exists();
    pinned.then(|| open(pin_dir, name)).transpose()
}

/// A key of the trie as aya has it: the prefix length apart.
const fn trie_key(key: &SourceRangeKey) -> Key<[u32; 5]> {
    let [a, b, c, d] = key.addr.words_be();
    Key::new(key.prefix_len, [key.ranges, a, b, c, d])
}

impl RealMaps {
    pub(super) fn open(pin_dir: &Path) -> Result<Self, KernelError> {
        let fail = |source| KernelError::Map {
            map: map_name::FRONTENDS.into(),
            source,
        };
        let frontends = open_map(pin_dir, map_name::FRONTENDS)?;
        let max_frontends = frontends.info().map_err(fail)?.max_entries();
        let ranges = if_pinned(pin_dir, map_name::SOURCE_RANGES, open_map)?;
        let max_source_ranges = match &ranges {
            Some(map) => map.info().map_err(fail)?.max_entries(),
            None => 0,
        };
        Ok(Self {
            frontends: Map::HashMap(frontends).try_into().map_err(fail)?,
            max_frontends,
            services: MappedArray::open(pin_dir, map_name::SERVICES)?,
            slots: MappedArray::open(pin_dir, map_name::SLOTS)?,
            backends: MappedArray::open(pin_dir, map_name::BACKENDS)?,
            stats: MappedArray::open(pin_dir, map_name::BACKEND_STATS)?,
            health: if_pinned(pin_dir, map_name::BACKEND_HEALTH, MappedArray::open)?,
            service_stats: if_pinned(pin_dir, map_name::SERVICE_STATS, MappedArray::open)?,
            source_ranges: ranges
                .map(|map| Map::LpmTrie(map).try_into().map_err(fail))
                .transpose()?,
            max_source_ranges,
        })
    }

    fn io(&self, operation: &'static str, error: AyaMapError) -> MapError {
        failure(map_name::FRONTENDS, self.max_frontends, operation, error)
    }

    fn ranges_io(&self, operation: &'static str, error: AyaMapError) -> MapError {
        failure(map_name::SOURCE_RANGES, self.max_source_ranges, operation, error)
    }
}

/// A full hash says E2BIG, a full trie ENOSPC.
fn failure(map: &'static str, max: u32, operation: &'static str, error: AyaMapError) -> MapError {
    match error {
        AyaMapError::SyscallError(call)
            if matches!(call.io_error.raw_os_error(), Some(libc::E2BIG | libc::ENOSPC)) =>
        {
            MapError::Full { map, max }
        }
        AyaMapError::SyscallError(call) => MapError::Io {
            map,
            operation,
            source: call.io_error,
        },
        other => MapError::Io {
            map,
            operation,
            source: std::io::Error::other(other),
        },
    }
}

/// That something is gone already is no failure of a deletion.
pub(super) fn gone(result: Result<(), AyaMapError>) -> Result<(), AyaMapError> {
    match result {
        Err(AyaMapError::SyscallError(call)) if call.io_error.raw_os_error() == Some(libc::ENOENT) => Ok(()),
        other => other,
    }
}

fn found<T>(entry: Option<T>, map: &'static str, index: u32, max: u32) -> Result<T, MapError> {
    entry.ok_or(MapError::OutOfRange {
        map,
        index: index.into(),
        max,
    })
}

fn publish(
    word: Option<&AtomicU64>,
    value: u64,
    map: &'static str,
    index: u32,
    max: u32,
) -> Result<(), MapError> {
    found(word, map, index, max).map(|word| word.store(value, Ordering::Release))
}

impl Maps for RealMaps {
    fn write(&mut self, write: &Write<'_>) -> Result<(), MapError> {
        let (services, backends) = (self.services.len(), self.backends.len());
        match *write {
            Write::Backend { id, row } => {
                let written = self.backends.write(id, &row);
                found(written.then_some(()), map_name::BACKENDS, id, backends)
            }
            Write::BackendState { id, state } => {
                let byte = self.backends.byte(id, offset_of!(Backend, state));
                found(byte, map_name::BACKENDS, id, backends).map(|byte| byte.store(state, Ordering::Release))
            }
            Write::BackendNode { id, node } => {
                // the node is the high half of a word that only user space writes; nobody reads it but the programs
                const WORD: usize = offset_of!(Backend, node) / 8;
                const _: () = assert!(offset_of!(Backend, node) % 8 == 4);
                found(self.backends.word(id, WORD), map_name::BACKENDS, id, backends).map(|word| {
                    let mut bytes = word.load(Ordering::Acquire).to_ne_bytes();
                    bytes[4..].copy_from_slice(&node.to_ne_bytes());
                    word.store(u64::from_ne_bytes(bytes), Ordering::Release);
                })
            }
            Write::ResetServiceStats { id } => match &mut self.service_stats {
                Some(stats) => {
                    let max = stats.len();
                    let written = stats.write(id, &ServiceStats::default());
                    found(written.then_some(()), map_name::SERVICE_STATS, id, max)
                }
                None => Ok(()),
            },
            Write::ResetStats { id } => {
                if let Some(health) = &mut self.health {
                    let max = health.len();
                    let written = health.write(id, &BackendHealth::default());
                    found(written.then_some(()), map_name::BACKEND_HEALTH, id, max)?;
                }
                let written = self.stats.write(id, &BackendStats::default());
                found(
                    written.then_some(()),
                    map_name::BACKEND_STATS,
                    id,
                    self.stats.len(),
                )
            }
            Write::Slots { base, slots } => {
                for (index, slot) in (base..).zip(slots) {
                    publish(
                        self.slots.word(index, 0),
                        slot.0,
                        map_name::SLOTS,
                        index,
                        self.slots.len(),
                    )?;
                }
                Ok(())
            }
            Write::Service { id, row } => {
                let written = self.services.write(id, &row);
                found(written.then_some(()), map_name::SERVICES, id, services)
            }
            Write::Set { id, which, word } => {
                let offset = match which {
                    SetKind::Cluster => offset_of!(Service, cluster),
                    SetKind::Local => offset_of!(Service, local),
                    SetKind::Maglev => offset_of!(Service, maglev),
                    SetKind::MaglevLocal => offset_of!(Service, maglev_local),
                };
                publish(
                    self.services.word(id, offset / 8),
                    word.0,
                    map_name::SERVICES,
                    id,
                    services,
                )
            }
            Write::Config { id, algorithm, flags } => {
                // algorithm and flags are neighbours in one word, in memory order
                const _: () = assert!(offset_of!(Service, flags) == offset_of!(Service, algorithm) + 4);
                let mut bytes = [0; 8];
                bytes[..4].copy_from_slice(&algorithm.to_ne_bytes());
                bytes[4..].copy_from_slice(&flags.to_ne_bytes());
                let word = self.services.word(id, offset_of!(Service, algorithm) / 8);
                publish(word, u64::from_ne_bytes(bytes), map_name::SERVICES, id, services)
            }
            Write::Access {
                id,
                affinity_seconds,
                source_ranges,
            } => {
                const _: () =
                    assert!(offset_of!(Service, source_ranges) == offset_of!(Service, affinity_seconds) + 4);
                let mut bytes = [0; 8];
                bytes[..4].copy_from_slice(&affinity_seconds.to_ne_bytes());
                bytes[4..].copy_from_slice(&source_ranges.to_ne_bytes());
                let word = self.services.word(id, offset_of!(Service, affinity_seconds) / 8);
                publish(word, u64::from_ne_bytes(bytes), map_name::SERVICES, id, services)
            }
            Write::PutSourceRange { key } => match &mut self.source_ranges {
                Some(trie) => trie
                    .insert(&trie_key(&key), 1, 0)
                    .map_err(|error| self.ranges_io("insert", error)),
                None => Err(MapError::Full {
                    map: map_name::SOURCE_RANGES,
                    max: 0,
                }),
            },
            Write::DeleteSourceRange { key } => match &mut self.source_ranges {
                Some(trie) => {
                    gone(trie.remove(&trie_key(&key))).map_err(|error| self.ranges_io("delete", error))
                }
                None => Ok(()),
            },
            Write::PutFrontend { key, value } => self
                .frontends
                .insert(key, value, 0)
                .map_err(|error| self.io("insert", error)),
            Write::DeleteFrontend { key } => {
                gone(self.frontends.remove(&key)).map_err(|error| self.io("delete", error))
            }
        }
    }

    fn frontends(&self) -> Result<Vec<(FrontendKey, FrontendValue)>, MapError> {
        self.frontends
            .iter()
            .map(|entry| entry.map_err(|error| self.io("read", error)))
            .collect()
    }

    fn source_ranges(&self) -> Result<Vec<SourceRangeKey>, MapError> {
        let Some(trie) = &self.source_ranges else {
            return Ok(Vec::new());
        };
        let read = |key: Result<Key<[u32; 5]>, AyaMapError>| {
            let key = key.map_err(|error| self.ranges_io("read", error))?;
            let [ranges, a, b, c, d] = key.data();
            Ok(SourceRangeKey {
                prefix_len: key.prefix_len(),
                ranges,
                addr: Addr::from_v6_be([a, b, c, d]),
            })
        };
        trie.keys().map(read).collect()
    }

    fn service(&self, id: u32) -> Option<Service> {
        self.services.read(id)
    }

    fn slot(&self, index: u32) -> Option<Slot> {
        self.slots.read(index)
    }

    fn backend(&self, id: u32) -> Option<Backend> {
        self.backends.read(id)
    }

    fn capacity(&self) -> Capacity {
        Capacity {
            services: self.services.len(),
            backends: self.backends.len(),
            slots: self.slots.len(),
            frontends: self.max_frontends,
            source_ranges: self.max_source_ranges,
        }
    }
}
