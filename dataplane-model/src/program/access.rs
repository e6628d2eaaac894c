//! Who may enter, and who comes back to the same backend: source ranges and client affinity.

use dataplane_common::abi::{SourceRangeKey, map_name};
use ipnet::IpNet;

use super::Programmer;
use super::error::ProgramError;
use super::held::{AppliedRanges, Resting};
use super::maps::{Maps, Write};

/// Bits of a trie's key before the address, and of an IPv4-mapped address before the IPv4 address.
const ID_BITS: u32 = 32;
const MAPPED_BITS: u32 = 96;

fn trie_key(id: u32, net: &IpNet) -> SourceRangeKey {
    let prefix = u32::from(net.prefix_len());
    SourceRangeKey {
        prefix_len: match net {
            IpNet::V4(_) => ID_BITS + MAPPED_BITS + prefix,
            IpNet::V6(_) => ID_BITS + prefix,
        },
        ranges: id,
        addr: net.network().into(),
    }
}

/// The range of a key that [`trie_key`] made.
pub(super) fn net_of(key: &SourceRangeKey) -> Option<IpNet> {
    let before = if key.addr.is_v4() {
        ID_BITS + MAPPED_BITS
    } else {
        ID_BITS
    };
    let prefix = u8::try_from(key.prefix_len.checked_sub(before)?).ok()?;
    IpNet::new(key.addr.to_ip(), prefix).ok()
}

impl AppliedRanges {
    /// Its entries in the trie.
    pub(super) fn keys(&self) -> impl Iterator<Item = SourceRangeKey> + '_ {
        self.list.iter().map(|net| trie_key(self.id, net))
    }
}

impl<M: Maps> Programmer<M> {
    pub(super) fn change_access(
        &mut self,
        id: u32,
        affinity_seconds: u32,
        ranges: &[IpNet],
        now_ms: u64,
    ) -> Result<(), ProgramError> {
        let Some(service) = self.services.get(id) else {
            return Ok(());
        };
        let same_ranges = service.ranges.as_ref().map_or(&[][..], |held| &held.list) == ranges;
        if same_ranges && service.config.affinity_seconds == affinity_seconds {
            return Ok(());
        }
        let (source_ranges, new) = if same_ranges {
            (service.ranges_id(), None)
        } else {
            let new = self.lay_out_ranges(ranges)?;
            (new.as_ref().map_or(0, |new| new.id), Some(new))
        };
        if let Err(error) = self.write(&Write::Access {
            id,
            affinity_seconds,
            source_ranges,
        }) {
            if let Some(new) = new.flatten() {
                self.rest_ranges(now_ms, &new);
            }
            return Err(error.into());
        }
        if let Some(service) = self.services.get_mut(id) {
            service.config.affinity_seconds = affinity_seconds;
            if let Some(new) = new
                && let Some(old) = std::mem::replace(&mut service.ranges, new)
            {
                self.rest_ranges(now_ms, &old);
            }
        }
        Ok(())
    }

    /// Writes ranges under an id that nothing refers to yet.
    pub(super) fn lay_out_ranges(
        &mut self,
        list: &[IpNet],
    ) -> Result<Option<Box<AppliedRanges>>, ProgramError> {
        if list.is_empty() {
            return Ok(None);
        }
        let max = self.maps.capacity().source_ranges;
        let needed = u32::try_from(list.len()).unwrap_or(u32::MAX);
        let free = max.saturating_sub(self.range_entries);
        let full = || ProgramError::Full {
            map: map_name::SOURCE_RANGES,
            needed,
            free,
            max,
        };
        if needed > free {
            return Err(full());
        }
        let id = self.range_ids.take().ok_or_else(full)?;
        let ranges = AppliedRanges {
            id,
            list: list.into(),
        };
        self.range_entries += needed;
        for net in list {
            let key = trie_key(id, net);
            if let Err(error) = self.write(&Write::PutSourceRange { key }) {
                self.rest_ranges(0, &ranges);
                return Err(error.into());
            }
        }
        Ok(Some(Box::new(ranges)))
    }

    /// Ranges that no service refers to any more.
    pub(super) fn rest_ranges(&mut self, now_ms: u64, ranges: &AppliedRanges) {
        let keys = ranges.keys().collect();
        let id = ranges.id;
        self.resting.put(now_ms, Resting::SourceRanges { id, keys });
    }

    /// Removes ranges that have rested; what cannot be removed rests again.
    pub(super) fn remove_ranges(&mut self, now_ms: u64, id: u32, keys: Box<[SourceRangeKey]>) {
        let removed = keys
            .iter()
            .all(|key| self.write(&Write::DeleteSourceRange { key: *key }).is_ok());
        if removed {
            let count = u32::try_from(keys.len()).unwrap_or(u32::MAX);
            self.range_entries = self.range_entries.saturating_sub(count);
            if id != 0 {
                self.range_ids.give_back(id);
            }
        } else {
            self.resting.put(now_ms, Resting::SourceRanges { id, keys });
        }
    }
}
