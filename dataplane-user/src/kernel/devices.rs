//! `DEVICES`: which devices the packet programs serve, and with which addresses.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use aya::maps::{HashMap, Map, MapData, MapError};
use dataplane_common::abi::{Device, map_name};

use super::maps::gone;
use super::{KernelError, open_map};

/// Writes `DEVICES`. The programs see a change at once.
#[derive(Debug)]
pub struct DeviceTable(HashMap<MapData, u32, Device>);

fn fail(source: MapError) -> KernelError {
    KernelError::Map {
        map: map_name::DEVICES.into(),
        source,
    }
}

impl DeviceTable {
    pub(super) fn open(pin_dir: &Path) -> Result<Self, KernelError> {
        let map = Map::HashMap(open_map(pin_dir, map_name::DEVICES)?);
        map.try_into().map(Self).map_err(fail)
    }

    /// Every row, by interface index.
    ///
    /// # Errors
    ///
    /// If the map cannot be read.
    pub fn rows(&self) -> Result<BTreeMap<u32, Device>, KernelError> {
        self.0.iter().collect::<Result<_, _>>().map_err(fail)
    }

    pub(super) fn row(&self, ifindex: u32) -> Result<Option<Device>, KernelError> {
        match self.0.get(&ifindex, 0) {
            Ok(row) => Ok(Some(row)),
            Err(MapError::KeyNotFound) => Ok(None),
            Err(error) => Err(fail(error)),
        }
    }

    pub(super) fn indexes(&self) -> Result<BTreeSet<u32>, KernelError> {
        self.0.keys().collect::<Result<_, _>>().map_err(fail)
    }

    /// Writes a row.
    ///
    /// # Errors
    ///
    /// If the map is full.
    pub fn put(&mut self, ifindex: u32, device: &Device) -> Result<(), KernelError> {
        self.0.insert(ifindex, device, 0).map_err(fail)
    }

    /// Removes a row; none there is no error.
    ///
    /// # Errors
    ///
    /// If the kernel refuses.
    pub fn remove(&mut self, ifindex: u32) -> Result<(), KernelError> {
        gone(self.0.remove(&ifindex)).map_err(fail)
    }
}
