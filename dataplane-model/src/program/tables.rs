//! Maglev tables. They lie in the slot arena as sets do, and follow them: what cannot be laid out for want of room is not
//! there, and its set is used instead. So a table never keeps a set from being programmed.

use dataplane_common::abi::{Addr, BePort, SetWord};
use dataplane_common::maglev;

use super::Programmer;
use super::error::ProgramError;
use super::held::{AppliedTable, word};
use super::maps::{MapError, Maps, SetKind, Write};
use crate::desired::table;

const TABLES: [(usize, u8, SetKind); 2] = [
    (0, table::CLUSTER, SetKind::Maglev),
    (1, table::LOCAL, SetKind::MaglevLocal),
];

/// How long a table keeps its size when another suits its set better, in milliseconds.
///
/// With its size nearly every flow changes its backend, not only those of a backend that leaves. That must not happen when
/// backends leave, because then it is that flows come without an entry: a node died, and its flows reach other nodes. Nor may
/// what passes soon, as in a rolling update, change sizes. Later all nodes change to the same size, because it follows from
/// the number of backends.
pub(super) const KEEP_SIZE_MS: u64 = 600_000;

/// The size for a set of `count`, and when it is to be looked at again.
fn wanted_size(old: Option<&AppliedTable>, count: usize, now_ms: u64) -> (u32, Option<u64>) {
    let size = u32::try_from(maglev::table_size(count)).unwrap_or(u32::MAX);
    let Some(old) = old.filter(|old| old.range.len > 0 && old.range.len != size && size > 0) else {
        return (size, None);
    };
    let far_too_small = size / 3 >= old.range.len;
    let resize_at = old.resize_at.unwrap_or(now_ms + KEEP_SIZE_MS);
    if far_too_small || resize_at <= now_ms {
        (size, None)
    } else {
        (old.range.len, Some(resize_at))
    }
}

impl<M: Maps> Programmer<M> {
    /// Brings a service's tables in step with its sets.
    pub(super) fn change_tables(&mut self, id: u32, now_ms: u64) -> Result<(), ProgramError> {
        for (at, bit, which) in TABLES {
            let Some(service) = self.services.get(id) else {
                return Ok(());
            };
            let old = service.tables.as_ref().map(|tables| &tables[at]);
            let mut members: Box<[u32]> = Box::default();
            if service.config.tables & bit != 0 {
                members = service.set(which).published().collect();
            }
            if members.len() < 2 {
                // every hash leads to the same backend without one
                members = Box::default();
            }
            let (size, resize_at) = wanted_size(old, members.len(), now_ms);
            match old {
                Some(old) if !old.unknown && old.members == members && old.range.len == size => continue,
                None if members.is_empty() => continue,
                _ => {}
            }
            let range = if members.is_empty() {
                None
            } else {
                self.lay_out_table(id, &members, size)?
            };
            if range.is_none() {
                members = Box::default();
            }
            let range = range.unwrap_or_default();
            if let Err(error) = self.write(&Write::Set {
                id,
                which,
                word: word(range),
            }) {
                self.arena.give_back(range);
                return Err(error.into());
            }
            self.swap_table(
                id,
                at,
                AppliedTable {
                    range,
                    members,
                    unknown: false,
                    resize_at,
                },
                now_ms,
            );
        }
        Ok(())
    }

    /// Takes the tables of a service that goes out of use.
    pub(super) fn drop_tables(&mut self, id: u32, now_ms: u64) -> Result<(), MapError> {
        for (at, _, which) in TABLES {
            let tables = self.services.get(id).and_then(|s| s.tables.as_ref());
            if tables.is_some_and(|tables| tables[at].range.len > 0 || tables[at].unknown) {
                self.write(&Write::Set {
                    id,
                    which,
                    word: SetWord::default(),
                })?;
                self.swap_table(id, at, AppliedTable::default(), now_ms);
            }
        }
        Ok(())
    }

    /// Gives tables the size for which they have waited. What fails waits again.
    pub(super) fn resize_tables(&mut self, now_ms: u64) {
        while let Some((_, id)) = self.resizes.pop_front_if(|(at, _)| *at <= now_ms) {
            if self.change_tables(id, now_ms).is_err() {
                self.resizes.push_back((now_ms + KEEP_SIZE_MS, id));
            }
        }
    }

    fn swap_table(&mut self, id: u32, at: usize, table: AppliedTable, now_ms: u64) {
        self.count_ids(&table.members, true);
        self.table_slots += table.range.len;
        let Some(service) = self.services.get_mut(id) else {
            return;
        };
        let tables = service.tables.get_or_insert_default();
        if let Some(resize_at) = table.resize_at
            && tables[at].resize_at.is_none()
        {
            self.resizes.push_back((resize_at, id));
        }
        let old = std::mem::replace(&mut tables[at], table);
        if tables.iter().all(|table| table.range.len == 0 && !table.unknown) {
            service.tables = None;
        }
        self.count_ids(&old.members, false);
        self.table_slots -= old.range.len;
        self.rest_slots(old.range, now_ms);
    }

    /// `None` if there is no room: tables may fill half of the arena, sets all of it.
    fn lay_out_table(
        &mut self,
        service: u32,
        members: &[u32],
        size: u32,
    ) -> Result<Option<super::alloc::Range>, ProgramError> {
        let budget = (self.maps.capacity().slots / 2).saturating_sub(self.table_slots);
        if size <= budget {
            let rows = members.iter().filter_map(|id| self.backends.get(*id));
            let backends: Vec<(Addr, BePort)> = rows.map(|row| (row.key.addr, row.key.port)).collect();
            let table = maglev::build(&backends, size as usize);
            let ids = table.into_iter().filter_map(|i| members.get(i as usize).copied());
            match self.lay_out(service, ids) {
                Ok(range) => return Ok(Some(range)),
                Err(ProgramError::Full { .. }) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(None)
    }

    /// Sets that should have a table and have none for want of room.
    #[must_use]
    pub fn missing_tables(&self) -> usize {
        let missing = |(_, service): (u32, &super::held::Applied)| {
            let lacks = |(at, bit, which): &(usize, u8, SetKind)| {
                service.config.tables & bit != 0
                    && service.set(*which).published().take(2).count() == 2
                    && service
                        .tables
                        .as_ref()
                        .is_none_or(|tables| tables[*at].range.len == 0)
            };
            TABLES.iter().filter(|table| lacks(table)).count()
        };
        self.services.iter().map(missing).sum()
    }
}
