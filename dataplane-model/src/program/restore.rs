//! After a restart: what the maps hold, read back.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use dataplane_common::abi::{
    Backend, FrontendKey, NO_ID, Service, SetWord, SourceRangeKey, backend_state, frontend_class,
    frontend_kind,
};
use dataplane_common::maglev;
use hashbrown::{HashMap, HashSet};

use super::access::net_of;
use super::alloc::{Arena, Ids, Quarantine, Range};
use super::held::{
    Applied, AppliedRanges, AppliedSet, AppliedTable, BackendRow, Backends, Member, Resting, Services,
};
use super::maps::{MapError, Maps, backend_node};
use super::tables::KEEP_SIZE_MS;
use super::{Programmer, QUARANTINE_MS};
use crate::desired::{BackendState, Frontends, Offer, ServiceConfig, SetBackend, table};
use crate::key::{BackendKey, Protocol};
use crate::object::range_list;

impl<M: Maps> Programmer<M> {
    /// Reads back what the maps hold, so that ids stay what they were and a restart changes nothing. Services are known
    /// by their frontends until a complete list names them.
    ///
    /// # Errors
    ///
    /// If the frontends or source ranges cannot be read.
    pub fn new(maps: M) -> Result<Self, MapError> {
        let capacity = maps.capacity();
        let mut restored = Self {
            services: Services::default(),
            by_frontend: HashMap::new(),
            active: HashMap::new(),
            idle: BTreeSet::new(),
            backends: Backends::default(),
            orphans: HashSet::new(),
            suspects: Vec::new(),
            service_ids: Ids::new(capacity.services),
            backend_ids: Ids::new(capacity.backends.min(Member::MAX_ID)),
            range_ids: Ids::new(capacity.source_ranges.saturating_add(1)),
            range_entries: 0,
            addresses: 0,
            arena: Arena::new(capacity.slots),
            table_slots: 0,
            resting: Quarantine::new(QUARANTINE_MS),
            resizes: VecDeque::new(),
            pending: BTreeMap::new(),
            writes: 0,
            released: Vec::new(),
            slots: Vec::new(),
            maps,
        };
        let mut ranges: BTreeMap<u32, Vec<SourceRangeKey>> = BTreeMap::new();
        for key in restored.maps.source_ranges()? {
            restored.range_entries += 1;
            ranges.entry(key.ranges).or_default().push(key);
        }
        let mut frontends: BTreeMap<u32, Vec<(FrontendKey, Offer)>> = BTreeMap::new();
        for (frontend, value) in restored.maps.frontends()? {
            if frontend.class == frontend_class::ACTIVE_ADDRESS {
                restored.active.entry(frontend.addr).or_default().written = true;
                restored.addresses += 1;
                continue;
            }
            let Offer { kind, flags } = Offer {
                kind: value.kind,
                flags: value.flags,
            };
            restored.by_frontend.insert(frontend, (value.service, kind));
            if kind == frontend_kind::CLUSTER_IP {
                restored.active.entry(frontend.addr).or_default().frontends += 1;
            }
            let offers = frontends.entry(value.service).or_default();
            offers.push((frontend, Offer { kind, flags }));
        }
        for (id, offers) in frontends {
            restored.restore_service(id, offers.into_iter().collect(), &mut ranges);
        }
        let idle = restored.active.iter().filter(|(_, active)| active.frontends == 0);
        restored.idle = idle.map(|(addr, _)| *addr).collect();
        // what no service refers to is of a change that was cut short
        for (id, keys) in ranges {
            let id = if restored.range_ids.reserve(id) { id } else { 0 };
            let keys = keys.into();
            restored.resting.put(0, Resting::SourceRanges { id, keys });
        }
        Ok(restored)
    }

    /// A service is taken as it is found, its sets only as far as they make sense. An id that none of ours can have leaves
    /// its frontends orphaned: they are pruned, or lead elsewhere when claimed.
    fn restore_service(
        &mut self,
        id: u32,
        frontends: Frontends,
        ranges: &mut BTreeMap<u32, Vec<SourceRangeKey>>,
    ) {
        if !self.service_ids.reserve(id) {
            self.orphans.extend(frontends.keys().copied());
            return;
        }
        let row = self.maps.service(id).unwrap_or_default();
        let cluster = self.restore_set(id, row.cluster);
        let local = self.restore_set(id, row.local);
        let tables = self.restore_tables(id, &row);
        let has_table = |at: usize| {
            let tables: Option<&[AppliedTable; 2]> = tables.as_deref();
            tables.is_some_and(|tables| tables[at].range.len > 0)
        };
        let (has_cluster, has_local) = (has_table(0), has_table(1));
        let config = ServiceConfig {
            algorithm: row.algorithm,
            flags: row.flags,
            affinity_seconds: row.affinity_seconds,
            tables: if has_cluster { table::CLUSTER } else { 0 } | if has_local { table::LOCAL } else { 0 },
        };
        let source_ranges = self.restore_ranges(row.source_ranges, ranges);
        // an id without ranges lets nobody in: that is not what anybody wishes
        let shut = row.source_ranges != 0 && source_ranges.is_none();
        // the change of a set may have been cut short before its table's
        let outlived = |table: &AppliedTable, set: &AppliedSet| {
            table.range.len > 0 && !set.published().eq(table.members.iter().copied())
        };
        let outlived = tables.as_deref().is_some_and(|[of_cluster, of_local]| {
            outlived(of_cluster, &cluster) || outlived(of_local, &local)
        });
        self.services.insert(
            id,
            Applied {
                key: None,
                frontends,
                config,
                cluster,
                local,
                tables,
                ranges: source_ranges,
                stale: shut || outlived,
            },
        );
    }

    fn restore_set(&mut self, service: u32, word: SetWord) -> AppliedSet {
        let Some((range, backends, unknown)) = self.restore_slots(service, word) else {
            return AppliedSet {
                unknown: true,
                ..AppliedSet::default()
            };
        };
        let members: Box<[Member]> = backends
            .iter()
            .filter_map(|id| {
                let row = self.backends.get(*id)?;
                let member = SetBackend {
                    backend: row.key,
                    state: row.state,
                    local: row.local,
                };
                Some(Member::new(*id, &member))
            })
            .collect();
        self.count_members(&members, true);
        AppliedSet {
            range,
            members,
            left_out: Box::default(),
            unknown,
        }
    }

    /// A restored table is taken to be of the backends in it, in the order of their keys, as sets are.
    fn restore_tables(&mut self, service: u32, row: &Service) -> Option<Box<[AppliedTable; 2]>> {
        let words = [row.maglev, row.maglev_local];
        if words.iter().all(|word| word.count() == 0) {
            return None;
        }
        let tables = words.map(|word| {
            let Some((range, backends, unknown)) = self.restore_slots(service, word) else {
                return AppliedTable {
                    unknown: true,
                    ..AppliedTable::default()
                };
            };
            let mut members: Vec<(BackendKey, u32)> = backends
                .into_iter()
                .filter_map(|id| Some((self.backends.get(id)?.key, id)))
                .collect();
            members.sort_unstable();
            members.dedup();
            let members: Box<[u32]> = members.into_iter().map(|(_, id)| id).collect();
            self.count_ids(&members, true);
            self.table_slots += range.len;
            let size = maglev::table_size(members.len());
            let misfit = usize::try_from(range.len).is_ok_and(|len| len != 0 && len != size);
            if misfit {
                self.resizes.push_back((KEEP_SIZE_MS, service));
            }
            AppliedTable {
                range,
                members,
                unknown,
                resize_at: misfit.then_some(KEEP_SIZE_MS),
            }
        });
        Some(Box::new(tables))
    }

    /// The range of a word, the backends in it, and whether some of it cannot be trusted; `None` if the range cannot be
    /// the service's.
    fn restore_slots(&mut self, service: u32, word: SetWord) -> Option<(Range, Vec<u32>, bool)> {
        let range = Range {
            base: word.base(),
            len: word.count(),
        };
        if !self.arena.reserve(range) {
            return None;
        }
        let mut backends = Vec::new();
        let mut unknown = false;
        for index in range.base..range.base + range.len {
            let slot = self.maps.slot(index).filter(|slot| slot.service() == service);
            match slot {
                Some(slot) if self.restore_backend(slot.backend()) => backends.push(slot.backend()),
                _ => unknown = true,
            }
        }
        Some((range, backends, unknown))
    }

    /// False if the row cannot be one of ours.
    fn restore_backend(&mut self, id: u32) -> bool {
        if self.backends.get(id).is_some() {
            return true;
        }
        let Some(row) = self.maps.backend(id).filter(|_| id != NO_ID) else {
            return false;
        };
        let Backend {
            addr, port, state, ..
        } = row;
        let state = match state {
            backend_state::ACTIVE => BackendState::Active,
            backend_state::TERMINATING => BackendState::Terminating,
            _ => return false,
        };
        let Some(protocol) = Protocol::from_number(row.protocol) else {
            return false;
        };
        let key = BackendKey { addr, port, protocol };
        // two rows for one backend: the other one is the one to keep
        if self.backends.find(&key).is_some() || !self.backend_ids.reserve(id) {
            return false;
        }
        let row = BackendRow {
            key,
            state,
            local: row.node == backend_node::LOCAL,
            unsettled: false,
            refs: 0,
            actives: 0,
            locals: 0,
        };
        self.backends.insert(id, row);
        true
    }

    fn restore_ranges(
        &mut self,
        id: u32,
        found: &mut BTreeMap<u32, Vec<SourceRangeKey>>,
    ) -> Option<Box<AppliedRanges>> {
        if id == 0 || !self.range_ids.reserve(id) {
            return None;
        }
        let Some(keys) = found.remove(&id) else {
            self.range_ids.give_back(id);
            return None;
        };
        if keys.iter().any(|key| net_of(key).is_none()) {
            // not ours: removed with the others that nobody refers to
            self.range_ids.give_back(id);
            found.insert(id, keys);
            return None;
        }
        let list = range_list(keys.iter().filter_map(net_of));
        Some(Box::new(AppliedRanges { id, list }))
    }
}
