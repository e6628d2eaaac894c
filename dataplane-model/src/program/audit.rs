//! Comparing the maps with the account of them, and repairing what someone else has changed.

use std::collections::{BTreeMap, BTreeSet};

use dataplane_common::abi::{
    Addr, Backend, FrontendKey, FrontendValue, Service, SourceRangeKey, frontend_class, map_name,
};
use hashbrown::{HashMap, HashSet};

use super::Programmer;
use super::backend::node;
use super::error::ProgramError;
use super::frontend::{ACTIVE_VALUE, active_key};
use super::held::{AppliedRanges, AppliedSet, AppliedTable, Resting, word};
use super::maps::{MapError, Maps, SetKind, Write};
use crate::key::BackendKey;

/// Differences that are spelled out in a report.
const SHOWN: usize = 20;

/// What [`Programmer::audit`] found.
#[derive(Debug, Default)]
pub struct Audit {
    /// Entries that differed, by name of the map.
    pub differences: BTreeMap<&'static str, u64>,
    /// The first of them in words.
    pub examples: Vec<String>,
    /// What could not be repaired; the next audit tries again.
    pub failed: Vec<ProgramError>,
}

impl Audit {
    /// True if the maps are as they should be.
    #[must_use]
    pub fn is_clean(&self) -> bool {
        self.differences.is_empty()
    }

    fn found(&mut self, map: &'static str, example: impl FnOnce() -> String) {
        *self.differences.entry(map).or_default() += 1;
        if self.examples.len() < SHOWN {
            self.examples.push(format!("{map}: {}", example()));
        }
    }

    fn repaired<E: Into<ProgramError>>(&mut self, result: Result<(), E>) {
        if let Err(error) = result {
            self.failed.push(error.into());
        }
    }
}

impl<M: Maps> Programmer<M> {
    /// Compares what the maps hold with what this programmer has written, and writes again what differs. A set is never
    /// repaired in place: it is laid out anew and published as a whole, as a change of it would be.
    ///
    /// # Errors
    ///
    /// If the frontends or source ranges cannot be read; nothing has been compared then.
    pub fn audit(&mut self, now_ms: u64) -> Result<Audit, MapError> {
        self.release(now_ms);
        let frontends: HashMap<FrontendKey, FrontendValue> = self.maps.frontends()?.into_iter().collect();
        let ranges: BTreeSet<SourceRangeKey> = self.maps.source_ranges()?.into_iter().collect();
        let mut audit = Audit::default();
        self.audit_backends(&mut audit);
        for id in self.services.iter().map(|(id, _)| id).collect::<Vec<_>>() {
            self.audit_service(id, now_ms, &mut audit);
        }
        self.audit_ranges(&ranges, &mut audit);
        self.audit_frontends(&frontends, &mut audit);
        Ok(audit)
    }

    fn audit_backends(&mut self, audit: &mut Audit) {
        let backends: Vec<(BackendKey, u32, u8, bool)> = self
            .backends
            .iter()
            .filter(|(_, row)| !row.unsettled)
            .map(|(id, row)| (row.key, id, row.state.number(), row.local))
            .collect();
        for (key, id, state, local) in backends {
            let found = self.maps.backend(id).unwrap_or_default();
            // what else is in the row is not for this account to say
            let wanted = Backend {
                addr: key.addr,
                port: key.port,
                protocol: key.protocol.number(),
                state,
                node: node(local),
                ..found
            };
            if found != wanted {
                audit.found(map_name::BACKENDS, || {
                    format!("row {id} is not {key} in state {state}")
                });
                let only_state = Backend { state, ..found } == wanted;
                let result = if only_state {
                    self.write(&Write::BackendState { id, state })
                } else {
                    self.write(&Write::Backend { id, row: wanted })
                };
                audit.repaired(result);
            }
        }
    }

    fn audit_service(&mut self, id: u32, now_ms: u64, audit: &mut Audit) {
        let row = self.maps.service(id).unwrap_or_default();
        for which in [SetKind::Cluster, SetKind::Local] {
            let Some(service) = self.services.get(id) else {
                return;
            };
            let set = service.set(which);
            if set.unknown && service.key.is_none() {
                // restored and not claimed yet: nobody knows what it should be
                continue;
            }
            let found = match which {
                SetKind::Cluster | SetKind::Maglev => row.cluster,
                SetKind::Local | SetKind::MaglevLocal => row.local,
            };
            let (word_differs, slots) = (found != word(set.range), self.wrong_slots(id, set));
            if !word_differs && slots == 0 && !set.unknown {
                continue;
            }
            let name = service.key.as_ref().map(ToString::to_string).unwrap_or_default();
            if word_differs || set.unknown {
                audit.found(map_name::SERVICES, || format!("row {id} ({name}): set {which:?}"));
            }
            for _ in 0..slots {
                audit.found(map_name::SLOTS, || format!("a slot of set {which:?} of {name}"));
            }
            let members = set.members.clone();
            if let Some(service) = self.services.get_mut(id) {
                service.set_mut(which).unknown = true;
            }
            let result = self.change_set(id, which, &members, now_ms);
            audit.repaired(result);
        }
        self.audit_tables(id, &row, now_ms, audit);
        let Some(service) = self.services.get_mut(id) else {
            return;
        };
        let config = service.config;
        let access = (config.affinity_seconds, service.ranges_id());
        if (row.algorithm, row.flags) != (config.algorithm, config.flags) {
            let name = service.key.as_ref().map(ToString::to_string).unwrap_or_default();
            audit.found(map_name::SERVICES, || {
                format!("row {id} ({name}): algorithm or flags")
            });
            // differs from the wish, so that it is written
            service.config.algorithm = u32::MAX;
            let result = self.change_config(id, config);
            if result.is_err()
                && let Some(service) = self.services.get_mut(id)
            {
                service.config = config;
            }
            audit.repaired(result);
        }
        if (row.affinity_seconds, row.source_ranges) != access {
            audit.found(map_name::SERVICES, || {
                format!("row {id}: affinity or source ranges")
            });
            let (affinity_seconds, source_ranges) = access;
            let result = self.write(&Write::Access {
                id,
                affinity_seconds,
                source_ranges,
            });
            audit.repaired(result);
        }
    }

    fn audit_tables(&mut self, id: u32, row: &Service, now_ms: u64, audit: &mut Audit) {
        let Some(service) = self.services.get(id) else {
            return;
        };
        let none = <[AppliedTable; 2]>::default();
        let tables = service.tables.as_deref().unwrap_or(&none);
        let mut wrong = [false; 2];
        for (at, found) in [row.maglev, row.maglev_local].into_iter().enumerate() {
            let table = &tables[at];
            if table.unknown && service.key.is_none() {
                // restored and not claimed yet: nobody knows what it should be
                continue;
            }
            let members: HashSet<u32> = table.members.iter().copied().collect();
            let strange = |index: &u32| {
                let slot = self.maps.slot(*index);
                slot.is_none_or(|slot| slot.service() != id || !members.contains(&slot.backend()))
            };
            let slots = (table.range.base..).take(table.range.len as usize);
            let strangers = slots.filter(strange).count();
            let name = || service.key.as_ref().map(ToString::to_string).unwrap_or_default();
            if found != word(table.range) || table.unknown {
                audit.found(map_name::SERVICES, || {
                    format!("row {id} ({}): table {at}", name())
                });
                wrong[at] = true;
            }
            for _ in 0..strangers {
                audit.found(map_name::SLOTS, || format!("a slot of table {at} of {}", name()));
                wrong[at] = true;
            }
        }
        if wrong == [false; 2] {
            return;
        }
        if let Some(service) = self.services.get_mut(id) {
            let tables = service.tables.get_or_insert_default();
            for (table, wrong) in tables.iter_mut().zip(wrong) {
                table.unknown |= wrong;
            }
        }
        let result = self.change_tables(id, now_ms);
        audit.repaired(result);
    }

    fn audit_ranges(&mut self, found: &BTreeSet<SourceRangeKey>, audit: &mut Audit) {
        let in_use = self.services.iter().filter_map(|(_, s)| s.ranges.as_deref());
        let wanted: BTreeSet<SourceRangeKey> = in_use.flat_map(AppliedRanges::keys).collect();
        for key in wanted.difference(found) {
            audit.found(map_name::SOURCE_RANGES, || {
                format!("a range at {} of id {} is missing", key.addr, key.ranges)
            });
            let result = self.write(&Write::PutSourceRange { key: *key });
            audit.repaired(result);
        }
        let resting: BTreeSet<SourceRangeKey> = self
            .resting
            .items()
            .filter_map(|item| match item {
                Resting::SourceRanges { keys, .. } => Some(keys),
                _ => None,
            })
            .flatten()
            .copied()
            .collect();
        for key in found
            .iter()
            .filter(|key| !wanted.contains(key) && !resting.contains(key))
        {
            audit.found(map_name::SOURCE_RANGES, || {
                format!("a range at {} of id {} is nobody's", key.addr, key.ranges)
            });
            let result = self.write(&Write::DeleteSourceRange { key: *key });
            audit.repaired(result);
        }
    }

    fn wrong_slots(&self, service: u32, set: &AppliedSet) -> usize {
        let slots = (set.range.base..).take(set.range.len as usize);
        slots
            .zip(set.published())
            .filter(|&(index, backend)| {
                self.maps
                    .slot(index)
                    .is_none_or(|slot| slot.service() != service || slot.backend() != backend)
            })
            .count()
    }

    fn audit_frontends(&mut self, found: &HashMap<FrontendKey, FrontendValue>, audit: &mut Audit) {
        let show = |frontend: &FrontendKey| format!("{}:{}", frontend.addr, frontend.port);
        let mut wanted = Vec::new();
        for (id, service) in self.services.iter() {
            let Some(key) = &service.key else { continue };
            for (frontend, offer) in service.frontends.iter() {
                let there = found.get(&frontend).copied();
                let right = |value: &FrontendValue| {
                    (value.service, value.kind, value.flags) == (id, offer.kind, offer.flags)
                };
                if !there.as_ref().is_some_and(right) {
                    wanted.push((frontend, offer, key.clone(), there.is_some()));
                }
            }
        }
        wanted.sort_unstable_by_key(|(frontend, ..)| *frontend);
        for (frontend, offer, key, there) in wanted {
            audit.found(map_name::FRONTENDS, || {
                let how = if there { "leads elsewhere" } else { "is missing" };
                format!("{} of {key} {how}", show(&frontend))
            });
            let result = self.put_frontend(&key, frontend, offer);
            audit.repaired(result);
        }
        let active = self.active.iter().filter(|(_, active)| active.frontends > 0);
        let mut addresses: Vec<Addr> = active.map(|(addr, _)| *addr).collect();
        addresses.retain(|addr| found.get(&active_key(*addr)) != Some(&ACTIVE_VALUE));
        addresses.sort_unstable();
        for addr in addresses {
            audit.found(map_name::FRONTENDS, || {
                format!("{addr} is not known as a service's")
            });
            let result = self.write(&Write::PutFrontend {
                key: active_key(addr),
                value: ACTIVE_VALUE,
            });
            audit.repaired(result);
        }
        let mut foreign: Vec<FrontendKey> = found
            .keys()
            .filter(|frontend| match frontend.class {
                frontend_class::ACTIVE_ADDRESS => {
                    active_key(frontend.addr) != **frontend
                        || self
                            .active
                            .get(&frontend.addr)
                            .is_none_or(|active| !active.written)
                }
                _ => !self.by_frontend.contains_key(*frontend),
            })
            .copied()
            .collect();
        foreign.sort_unstable();
        for frontend in foreign {
            audit.found(map_name::FRONTENDS, || format!("{} is nobody's", show(&frontend)));
            let result = self.write(&Write::DeleteFrontend { key: frontend });
            audit.repaired(result);
        }
    }
}
