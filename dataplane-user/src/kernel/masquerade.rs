//! Whose packets to the world get the node's address.

use std::collections::BTreeMap;
use std::path::Path;

use aya::maps::lpm_trie::{Key, LpmTrie};
use aya::maps::{Map, MapData, MapError};
use dataplane_common::abi::{Addr, map_name};
use ipnet::IpNet;

use super::maps::gone;
use super::{KernelError, open_map};

/// Writes `MASQUERADE`. The programs see a change at once.
#[derive(Debug)]
pub struct MasqueradeTable {
    map: LpmTrie<MapData, [u32; 4], u32>,
}

fn fail(source: MapError) -> KernelError {
    KernelError::Map {
        map: map_name::MASQUERADE.into(),
        source,
    }
}

fn key(net: &IpNet) -> Key<[u32; 4]> {
    // IPv4 is mapped into IPv6
    let mapped = if net.addr().is_ipv4() { 96 } else { 0 };
    let length = u32::from(net.prefix_len()) + mapped;
    Key::new(length, Addr::from(net.network()).words_be())
}

impl MasqueradeTable {
    pub(super) fn open(pin_dir: &Path) -> Result<Self, KernelError> {
        let map = Map::LpmTrie(open_map(pin_dir, map_name::MASQUERADE)?);
        Ok(Self {
            map: map.try_into().map_err(fail)?,
        })
    }

    /// Makes the table hold exactly these networks, with flags of [`dataplane_common::abi::masquerade`].
    ///
    /// # Errors
    ///
    /// If the map is full, or the kernel refuses.
    pub fn set(&mut self, wanted: &BTreeMap<IpNet, u32>) -> Result<(), KernelError> {
        let wanted: BTreeMap<(u32, [u32; 4]), u32> = wanted
            .iter()
            .map(|(net, flags)| {
                let key = key(net);
                ((key.prefix_len(), key.data()), *flags)
            })
            .collect();
        let mut found = BTreeMap::new();
        for entry in self.map.iter() {
            let (key, flags) = entry.map_err(fail)?;
            found.insert((key.prefix_len(), key.data()), flags);
        }
        // Exceptions first: no packet between may get an address that it should not have.
        let mut missing: Vec<_> = wanted
            .iter()
            .filter(|(key, flags)| found.get(*key) != Some(*flags))
            .collect();
        missing.sort_by_key(|(_, flags)| **flags & dataplane_common::abi::masquerade::SOURCE);
        for ((length, data), flags) in missing {
            self.map
                .insert(&Key::new(*length, *data), *flags, 0)
                .map_err(fail)?;
        }
        for (length, data) in found.keys().filter(|key| !wanted.contains_key(*key)) {
            gone(self.map.remove(&Key::new(*length, *data))).map_err(fail)?;
        }
        Ok(())
    }
}
