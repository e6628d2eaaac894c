//! `PODS` and `POD_DEVICES`: the pods of this node whose devices are ours.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use aya::Pod as Plain;
use aya::maps::{HashMap, Map, MapData, MapError};
use dataplane_common::abi::{Addr, Pod, PodDevice, map_name, pod_flag};

use super::maps::gone;
use super::{KernelError, open_map};

/// Writes both maps. The programs see a change at once.
#[derive(Debug)]
pub struct PodTable {
    pods: HashMap<MapData, Addr, Pod>,
    devices: HashMap<MapData, u32, PodDevice>,
}

fn fail(map: &'static str) -> impl Fn(MapError) -> KernelError {
    move |source| KernelError::Map {
        map: map.into(),
        source,
    }
}

fn open<K: Plain, V: Plain>(
    pin_dir: &Path,
    name: &'static str,
) -> Result<HashMap<MapData, K, V>, KernelError> {
    let map = Map::HashMap(open_map(pin_dir, name)?);
    map.try_into().map_err(fail(name))
}

impl PodTable {
    pub(super) fn open(pin_dir: &Path) -> Result<Self, KernelError> {
        Ok(Self {
            pods: open(pin_dir, map_name::PODS)?,
            devices: open(pin_dir, map_name::POD_DEVICES)?,
        })
    }

    /// Every pod, by address.
    ///
    /// # Errors
    ///
    /// If the map cannot be read.
    pub fn pods(&self) -> Result<BTreeMap<Addr, Pod>, KernelError> {
        let rows = self.pods.iter().collect::<Result<_, _>>();
        rows.map_err(fail(map_name::PODS))
    }

    /// Every device, by its index.
    ///
    /// # Errors
    ///
    /// If the map cannot be read.
    pub fn devices(&self) -> Result<BTreeMap<u32, PodDevice>, KernelError> {
        let rows = self.devices.iter().collect::<Result<_, _>>();
        rows.map_err(fail(map_name::POD_DEVICES))
    }

    /// Adds a pod. What the programs have noted of the same pod stays.
    ///
    /// # Errors
    ///
    /// If a map is full; nothing of the pod is there then.
    pub fn put(&mut self, pod: &Pod, device: &PodDevice) -> Result<(), KernelError> {
        let mut device = *device;
        if let Ok(held) = self.devices.get(&pod.ifindex, 0) {
            device.out.full_at = held.out.full_at;
            device.into.full_at = held.into.full_at;
        }
        let result = self.insert(pod, &device);
        if result.is_err() {
            // the failure to tell of is the first one
            let _incomplete = self.remove(&[device.v4, device.v6]);
        }
        result
    }

    fn insert(&mut self, pod: &Pod, device: &PodDevice) -> Result<(), KernelError> {
        self.devices
            .insert(pod.ifindex, device, 0)
            .map_err(fail(map_name::POD_DEVICES))?;
        for addr in [device.v4, device.v6] {
            if addr == Addr::default() {
                continue;
            }
            let mut pod = *pod;
            if let Ok(held) = self.pods.get(&addr, 0)
                && held.ifindex == pod.ifindex
            {
                pod.flags |= held.flags & pod_flag::TRANSLATED;
            }
            self.pods.insert(addr, pod, 0).map_err(fail(map_name::PODS))?;
        }
        Ok(())
    }

    /// Removes the pods that have these addresses, and their devices; none there is no error.
    ///
    /// # Errors
    ///
    /// If the kernel refuses.
    pub fn remove(&mut self, addrs: &[Addr]) -> Result<(), KernelError> {
        for addr in addrs {
            if let Ok(pod) = self.pods.get(addr, 0) {
                gone(self.devices.remove(&pod.ifindex)).map_err(fail(map_name::POD_DEVICES))?;
                gone(self.pods.remove(addr)).map_err(fail(map_name::PODS))?;
            }
        }
        Ok(())
    }

    /// Removes all pods but those of these devices.
    ///
    /// # Errors
    ///
    /// If the kernel refuses.
    pub fn retain(&mut self, known: &BTreeSet<u32>) -> Result<(), KernelError> {
        for (addr, pod) in self.pods()? {
            if !known.contains(&pod.ifindex) {
                gone(self.pods.remove(&addr)).map_err(fail(map_name::PODS))?;
            }
        }
        for index in self.devices()?.into_keys().filter(|index| !known.contains(index)) {
            gone(self.devices.remove(&index)).map_err(fail(map_name::POD_DEVICES))?;
        }
        Ok(())
    }
}
