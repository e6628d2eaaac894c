//! What holds for the whole node: its configuration and its addresses.

use std::collections::BTreeMap;
use std::mem::offset_of;
use std::path::Path;
use std::sync::atomic::Ordering;

use aya::Pod;
use aya::maps::lpm_trie::LpmTrie;
use aya::maps::{HashMap, Map, MapData, MapError};
use dataplane_common::abi::{Addr, NetnsAddrs, NodeConfig, Range, config_flag, map_name};

use super::arrays::MappedArray;
use super::maps::gone;
use super::{KernelError, open_map};

/// Writes `CONFIG`, `NODE_ADDRS` and `NETNS_ADDRS`. The programs see a change at once.
#[derive(Debug)]
pub struct NodeTables {
    config: MappedArray<NodeConfig>,
    addrs: HashMap<MapData, Addr, u32>,
    netns_addrs: HashMap<MapData, u64, NetnsAddrs>,
    source_ranges: LpmTrie<MapData, [u32; 5], u32>,
}

impl NodeTables {
    pub(super) fn open(pin_dir: &Path) -> Result<Self, KernelError> {
        Ok(Self {
            config: MappedArray::open(pin_dir, map_name::CONFIG)?,
            addrs: hash(pin_dir, map_name::NODE_ADDRS)?,
            netns_addrs: hash(pin_dir, map_name::NETNS_ADDRS)?,
            source_ranges: Map::LpmTrie(open_map(pin_dir, map_name::SOURCE_RANGES)?)
                .try_into()
                .map_err(fail(map_name::SOURCE_RANGES))?,
        })
    }

    /// The configuration in force.
    #[must_use]
    pub fn config(&self) -> NodeConfig {
        self.config.read(0).unwrap_or_default()
    }

    /// Changes the configuration in place. The flag [`config_flag::FOREIGN_FLOWS`] is not the caller's: it follows
    /// [`Self::set_foreign_flows`].
    pub fn set_config(&self, wanted: &NodeConfig) {
        let new = std::ptr::from_ref(wanted).cast::<u64>();
        let put = |word: usize| {
            // SAFETY: the callers stay inside `wanted`, which is initialised integers without padding.
            let value = unsafe { new.add(word).read_unaligned() };
            if let Some(target) = self.config.word(0, word) {
                target.store(value, Ordering::Release);
            }
        };
        // A range is two words of address and two of mask. No state in between may cover addresses that neither the old
        // nor the new one covers: a range comes with its address first, and goes with its mask first.
        let ranges = wanted.service_ranges.iter().chain(&wanted.pod_ranges);
        for (index, range) in ranges.enumerate() {
            let order = if range.mask == Addr::default() {
                [2, 3, 0, 1]
            } else {
                [0, 1, 3, 2]
            };
            for word in order {
                put(index * size_of::<Range>() / 8 + word);
            }
        }
        let flags = offset_of!(NodeConfig, flags) / 8;
        if let Some(target) = self.config.word(0, flags) {
            let kept = flags_word(config_flag::FOREIGN_FLOWS);
            // SAFETY: as above.
            let value = unsafe { new.add(flags).read_unaligned() };
            // others change flags of theirs at the same time
            let merged = |held| Some(value & !kept | held & kept);
            let _always = target.fetch_update(Ordering::AcqRel, Ordering::Acquire, merged);
        }
        for word in flags + 1..size_of::<NodeConfig>() / 8 {
            put(word);
        }
    }

    fn set_flag(&self, flag: u32, on: bool) {
        if let Some(target) = self.config.word(0, offset_of!(NodeConfig, flags) / 8) {
            if on {
                target.fetch_or(flags_word(flag), Ordering::AcqRel);
            } else {
                target.fetch_and(!flags_word(flag), Ordering::AcqRel);
            }
        }
    }

    /// Says whether someone else translates connections that are under way ([`config_flag::FOREIGN_FLOWS`]).
    pub fn set_foreign_flows(&self, on: bool) {
        self.set_flag(config_flag::FOREIGN_FLOWS, on);
    }

    /// Leaves packets of unknown flows alone from now on ([`config_flag::NO_NEW_FLOWS`]), until [`Self::set_config`].
    pub fn stop_new_flows(&self) {
        self.set_flag(config_flag::NO_NEW_FLOWS, true);
    }

    /// Makes `NODE_ADDRS` hold exactly these addresses with these flags (see
    /// [`dataplane_common::abi::node_addr_flag`]). What is there already is not touched.
    ///
    /// # Errors
    ///
    /// If the map is full, or the kernel refuses.
    pub fn set_addrs(&mut self, wanted: &BTreeMap<Addr, u32>) -> Result<(), KernelError> {
        update(&mut self.addrs, wanted).map_err(fail(map_name::NODE_ADDRS))
    }

    /// True while a service has source ranges: only then `NETNS_ADDRS` is read.
    ///
    /// # Errors
    ///
    /// If the kernel refuses.
    pub fn has_source_ranges(&self) -> Result<bool, KernelError> {
        let first = self.source_ranges.keys().next().transpose();
        Ok(first.map_err(fail(map_name::SOURCE_RANGES))?.is_some())
    }

    /// Makes `NETNS_ADDRS` hold exactly these addresses by cookie of the network namespace (`SO_NETNS_COOKIE`): with them,
    /// source ranges judge the sockets of each.
    ///
    /// # Errors
    ///
    /// If the map is full, or the kernel refuses.
    pub fn set_netns_addrs(&mut self, wanted: &BTreeMap<u64, NetnsAddrs>) -> Result<(), KernelError> {
        update(&mut self.netns_addrs, wanted).map_err(fail(map_name::NETNS_ADDRS))
    }
}

/// Flags where the word that holds them has them; the mark beside them is 0.
fn flags_word(flags: u32) -> u64 {
    let [a, b, c, d] = flags.to_ne_bytes();
    u64::from_ne_bytes([a, b, c, d, 0, 0, 0, 0])
}

/// The range of a prefix; an IPv4 one becomes that of the IPv4-mapped addresses.
///
/// A length beyond the address's is taken as its whole length.
#[must_use]
pub fn range(addr: std::net::IpAddr, prefix_len: u8) -> Range {
    let bits = match addr {
        std::net::IpAddr::V4(_) => 96 + u32::from(prefix_len).min(32),
        std::net::IpAddr::V6(_) => u32::from(prefix_len).min(128),
    };
    let mask = u128::MAX.checked_shl(128 - bits).unwrap_or(0);
    let mut words = Addr::from(addr).words_be();
    let mut masks = [0; 4];
    for ((word, out), bytes) in words
        .iter_mut()
        .zip(&mut masks)
        .zip(mask.to_be_bytes().chunks_exact(4))
    {
        if let [a, b, c, d] = *bytes {
            *out = u32::from_ne_bytes([a, b, c, d]);
        }
        *word &= *out;
    }
    Range {
        addr: Addr::from_v6_be(words),
        mask: Addr::from_v6_be(masks),
    }
}

fn fail(map: &'static str) -> impl Fn(MapError) -> KernelError {
    move |source| KernelError::Map {
        map: map.into(),
        source,
    }
}

fn hash<K: Pod, V: Pod>(pin_dir: &Path, name: &'static str) -> Result<HashMap<MapData, K, V>, KernelError> {
    Map::HashMap(open_map(pin_dir, name)?)
        .try_into()
        .map_err(fail(name))
}

fn update<K: Pod + Ord, V: Pod + PartialEq>(
    map: &mut HashMap<MapData, K, V>,
    wanted: &BTreeMap<K, V>,
) -> Result<(), MapError> {
    let found: BTreeMap<K, V> = map.iter().collect::<Result<_, _>>()?;
    for (key, value) in wanted {
        if found.get(key) != Some(value) {
            map.insert(key, value, 0)?;
        }
    }
    for key in found.keys().filter(|key| !wanted.contains_key(key)) {
        gone(map.remove(key))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_have_masks_of_their_family() {
        let v4 = range("10.96.1.2".parse().unwrap(), 12);
        assert_eq!(v4.addr.to_string(), "10.96.0.0");
        assert_eq!(
            v4.mask.words_be().map(u32::from_be),
            [u32::MAX, u32::MAX, u32::MAX, 0xfff0_0000]
        );
        let v6 = range("fd00:10:96::1".parse().unwrap(), 48);
        assert_eq!(v6.addr.to_string(), "fd00:10:96::");
        assert_eq!(
            v6.mask.words_be().map(u32::from_be),
            [u32::MAX, 0xffff_0000, 0, 0]
        );
        assert_eq!(range("::".parse().unwrap(), 0), Range::default());
    }
}
