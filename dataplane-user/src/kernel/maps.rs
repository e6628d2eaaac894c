//! The kernel's maps for the programmer.

use std::mem::offset_of;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use aya::maps::{HashMap, Map, MapData, MapError as AyaMapError};
use dataplane_common::abi::{Backend, BackendStats, FrontendKey, FrontendValue, Service, Slot, map_name};
use dataplane_model::program::{Capacity, MapError, Maps, SetKind, Write};

use super::arrays::MappedArray;
use super::{KernelError, open_map};

/// The maps below a pin directory.
#[derive(Debug)]
pub struct RealMaps {
    frontends: HashMap<MapData, FrontendKey, FrontendValue>,
    max_frontends: u32,
    services: MappedArray<Service>,
    slots: MappedArray<Slot>,
    backends: MappedArray<Backend>,
    stats: MappedArray<BackendStats>,
}

impl RealMaps {
    pub(super) fn open(pin_dir: &Path) -> Result<Self, KernelError> {
        let fail = |source| KernelError::Map {
            map: map_name::FRONTENDS.into(),
            source,
        };
        let frontends = open_map(pin_dir, map_name::FRONTENDS)?;
        let max_frontends = frontends.info().map_err(fail)?.max_entries();
        Ok(Self {
            frontends: Map::HashMap(frontends).try_into().map_err(fail)?,
            max_frontends,
            services: MappedArray::open(pin_dir, map_name::SERVICES)?,
            slots: MappedArray::open(pin_dir, map_name::SLOTS)?,
            backends: MappedArray::open(pin_dir, map_name::BACKENDS)?,
            stats: MappedArray::open(pin_dir, map_name::BACKEND_STATS)?,
        })
    }

    fn io(&self, operation: &'static str, error: AyaMapError) -> MapError {
        let map = map_name::FRONTENDS;
        match error {
            AyaMapError::SyscallError(call) if call.io_error.raw_os_error() == Some(libc::E2BIG) => {
                MapError::Full {
                    map,
                    max: self.max_frontends,
                }
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
            Write::ResetStats { id } => {
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
            Write::PutFrontend { key, value } => self
                .frontends
                .insert(key, value, 0)
                .map_err(|error| self.io("insert", error)),
            Write::DeleteFrontend { key } => match self.frontends.remove(&key) {
                Err(AyaMapError::SyscallError(call))
                    if call.io_error.raw_os_error() == Some(libc::ENOENT) =>
                {
                    Ok(())
                }
                other => other.map_err(|error| self.io("delete", error)),
            },
        }
    }

    fn frontends(&self) -> Result<Vec<(FrontendKey, FrontendValue)>, MapError> {
        self.frontends
            .iter()
            .map(|entry| entry.map_err(|error| self.io("read", error)))
            .collect()
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
        }
    }
}
