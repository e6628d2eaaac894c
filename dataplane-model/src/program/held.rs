//! The account of what the kernel holds.

use std::hash::BuildHasher;

use dataplane_common::abi::{FrontendKey, SetWord, SourceRangeKey};
use hashbrown::{DefaultHashBuilder, HashTable};
use ipnet::IpNet;

use super::alloc::Range;
use super::maps::SetKind;
use crate::desired::{BackendState, Frontends, ServiceConfig, SetBackend};
use crate::key::{BackendKey, ServiceKey};

/// A backend in a set: its id, and what the service says of it, in one word.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Member(u32);

impl Member {
    const LOCAL: u32 = 1 << 31;
    const TERMINATING: u32 = 1 << 30;
    /// Ids are below this.
    pub(super) const MAX_ID: u32 = Self::TERMINATING;

    pub(super) fn new(id: u32, member: &SetBackend) -> Self {
        debug_assert!(id < Self::MAX_ID);
        let local = if member.local { Self::LOCAL } else { 0 };
        let state = match member.state {
            BackendState::Active => 0,
            BackendState::Terminating => Self::TERMINATING,
        };
        Self(id | local | state)
    }

    pub(super) const fn id(self) -> u32 {
        self.0 & (Self::MAX_ID - 1)
    }

    pub(super) const fn local(self) -> bool {
        self.0 & Self::LOCAL != 0
    }

    pub(super) const fn active(self) -> bool {
        self.0 & Self::TERMINATING == 0
    }
}

/// One of a service's sets as the kernel has it.
#[derive(Clone, Debug, Default)]
pub(super) struct AppliedSet {
    pub(super) range: Range,
    pub(super) members: Box<[Member]>,
    /// Members that have no slot, because they are suspected to have failed; sorted.
    pub(super) left_out: Box<[u32]>,
    /// Restored, but not to be trusted: rewritten at the next change.
    pub(super) unknown: bool,
}

impl AppliedSet {
    /// The members that have slots, in their order.
    pub(super) fn published(&self) -> impl Iterator<Item = u32> + '_ {
        let ids = self.members.iter().map(|member| member.id());
        ids.filter(|id| self.left_out.binary_search(id).is_err())
    }
}

/// A Maglev table as the kernel has it.
#[derive(Clone, Debug, Default)]
pub(super) struct AppliedTable {
    pub(super) range: Range,
    /// The backends in it, in the order of their set.
    pub(super) members: Box<[u32]>,
    /// Restored, but not to be trusted.
    pub(super) unknown: bool,
    /// When it gets the size that suits its set, if it has another.
    pub(super) resize_at: Option<u64>,
}

/// Source ranges as the kernel has them.
#[derive(Clone, Debug)]
pub(super) struct AppliedRanges {
    pub(super) id: u32,
    pub(super) list: Box<[IpNet]>,
}

/// A service as the kernel has it.
#[derive(Clone, Debug)]
pub(super) struct Applied {
    /// `None` after a restart until it is claimed.
    pub(super) key: Option<ServiceKey>,
    pub(super) frontends: Frontends,
    pub(super) config: ServiceConfig,
    pub(super) cluster: AppliedSet,
    pub(super) local: AppliedSet,
    /// Of `cluster` and of `local`, if it has any.
    pub(super) tables: Option<Box<[AppliedTable; 2]>>,
    pub(super) ranges: Option<Box<AppliedRanges>>,
    /// The last change failed somewhere: it is to be gone through again.
    pub(super) stale: bool,
}

impl Applied {
    pub(super) const fn set(&self, which: SetKind) -> &AppliedSet {
        match which {
            SetKind::Cluster | SetKind::Maglev => &self.cluster,
            SetKind::Local | SetKind::MaglevLocal => &self.local,
        }
    }

    pub(super) const fn set_mut(&mut self, which: SetKind) -> &mut AppliedSet {
        match which {
            SetKind::Cluster | SetKind::Maglev => &mut self.cluster,
            SetKind::Local | SetKind::MaglevLocal => &mut self.local,
        }
    }

    pub(super) fn members(&self) -> impl Iterator<Item = Member> + '_ {
        self.cluster.members.iter().chain(&self.local.members).copied()
    }

    pub(super) fn ranges_id(&self) -> u32 {
        self.ranges.as_ref().map_or(0, |ranges| ranges.id)
    }
}

/// Services by id and by key.
#[derive(Debug, Default)]
pub(super) struct Services {
    list: Vec<Option<Box<Applied>>>,
    /// With their hashes: else every growth would look at every key.
    by_key: HashTable<(u64, u32)>,
    hasher: DefaultHashBuilder,
    len: usize,
    unclaimed: usize,
}

impl Services {
    pub(super) fn get(&self, id: u32) -> Option<&Applied> {
        self.list.get(id as usize)?.as_deref()
    }

    pub(super) fn get_mut(&mut self, id: u32) -> Option<&mut Applied> {
        self.list.get_mut(id as usize)?.as_deref_mut()
    }

    pub(super) fn find(&self, key: &ServiceKey) -> Option<u32> {
        let hash = self.hasher.hash_one(key);
        let same = |(other, id): &(u64, u32)| {
            *other == hash && self.get(*id).is_some_and(|s| s.key.as_ref() == Some(key))
        };
        self.by_key.find(hash, same).map(|(_, id)| *id)
    }

    pub(super) fn insert(&mut self, id: u32, service: Applied) {
        let index = id as usize;
        if self.list.len() <= index {
            self.list.resize_with(index + 1, || None);
        }
        let key = service.key.clone();
        self.list[index] = Some(Box::new(service));
        self.len += 1;
        match key {
            Some(key) => self.index(id, &key),
            None => self.unclaimed += 1,
        }
    }

    fn index(&mut self, id: u32, key: &ServiceKey) {
        let hash = self.hasher.hash_one(key);
        self.by_key.insert_unique(hash, (hash, id), |(hash, _)| *hash);
    }

    /// Gives a restored service its key.
    pub(super) fn name(&mut self, id: u32, key: &ServiceKey) {
        if let Some(service) = self.get_mut(id).filter(|s| s.key.is_none()) {
            service.key = Some(key.clone());
            self.unclaimed -= 1;
            self.index(id, key);
        }
    }

    /// Takes a service its key, as if it had been restored.
    pub(super) fn disown(&mut self, key: &ServiceKey) -> Option<u32> {
        let id = self.find(key)?;
        self.forget(id, key);
        self.get_mut(id)?.key = None;
        self.unclaimed += 1;
        Some(id)
    }

    fn forget(&mut self, id: u32, key: &ServiceKey) {
        let hash = self.hasher.hash_one(key);
        if let Ok(found) = self.by_key.find_entry(hash, |(_, other)| *other == id) {
            found.remove();
        }
    }

    pub(super) fn remove(&mut self, id: u32) -> Option<Applied> {
        let service = self.list.get_mut(id as usize)?.take()?;
        self.len -= 1;
        match &service.key {
            None => self.unclaimed -= 1,
            Some(key) => self.forget(id, key),
        }
        Some(*service)
    }

    /// In order of id.
    pub(super) fn iter(&self) -> impl Iterator<Item = (u32, &Applied)> {
        (0..)
            .zip(&self.list)
            .filter_map(|(id, service)| Some((id, service.as_deref()?)))
    }

    pub(super) const fn len(&self) -> usize {
        self.len
    }

    /// How many have no key.
    pub(super) const fn unclaimed(&self) -> usize {
        self.unclaimed
    }
}

/// A row of `BACKENDS`.
#[derive(Clone, Copy, Debug)]
pub(super) struct BackendRow {
    pub(super) key: BackendKey,
    pub(super) state: BackendState,
    /// What the row says: on this node.
    pub(super) local: bool,
    /// Its counts have changed, or it could not be brought up to date.
    pub(super) unsettled: bool,
    /// How many sets and tables refer to it.
    pub(super) refs: u32,
    /// How many sets say that it is active. It is active as long as any does, in whatever order they came.
    pub(super) actives: u32,
    /// How many sets say that it is on this node.
    pub(super) locals: u32,
}

/// Rows of `BACKENDS` by id and by key.
#[derive(Debug, Default)]
pub(super) struct Backends {
    rows: Vec<Option<BackendRow>>,
    by_key: HashTable<u32>,
    hasher: DefaultHashBuilder,
    unsettled: Vec<u32>,
    len: usize,
}

impl Backends {
    pub(super) fn get(&self, id: u32) -> Option<&BackendRow> {
        self.rows.get(id as usize)?.as_ref()
    }

    pub(super) fn get_mut(&mut self, id: u32) -> Option<&mut BackendRow> {
        self.rows.get_mut(id as usize)?.as_mut()
    }

    pub(super) fn find(&self, key: &BackendKey) -> Option<u32> {
        let same = |id: &u32| self.get(*id).is_some_and(|row| row.key == *key);
        self.by_key.find(self.hasher.hash_one(key), same).copied()
    }

    pub(super) fn insert(&mut self, id: u32, row: BackendRow) {
        let index = id as usize;
        if self.rows.len() <= index {
            self.rows.resize(index + 1, None);
        }
        self.rows[index] = Some(row);
        self.len += 1;
        let (rows, hasher) = (&self.rows, &self.hasher);
        let hash = |id: &u32| {
            let row = rows.get(*id as usize).and_then(Option::as_ref);
            row.map_or(0, |row| hasher.hash_one(row.key))
        };
        self.by_key.insert_unique(hasher.hash_one(row.key), id, hash);
        self.touch(id);
    }

    pub(super) fn remove(&mut self, id: u32) {
        let Some(row) = self.rows.get_mut(id as usize).and_then(Option::take) else {
            return;
        };
        self.len -= 1;
        let hash = self.hasher.hash_one(row.key);
        if let Ok(found) = self.by_key.find_entry(hash, |other| *other == id) {
            found.remove();
        }
    }

    /// The row is to be brought up to date.
    pub(super) fn touch(&mut self, id: u32) {
        if let Some(row) = self.get_mut(id).filter(|row| !row.unsettled) {
            row.unsettled = true;
            self.unsettled.push(id);
        }
    }

    /// What is to be brought up to date; each is taken to be from now on.
    pub(super) fn take_unsettled(&mut self) -> Vec<u32> {
        let ids = std::mem::take(&mut self.unsettled);
        for id in &ids {
            if let Some(row) = self.get_mut(*id) {
                row.unsettled = false;
            }
        }
        ids
    }

    /// In order of id.
    pub(super) fn iter(&self) -> impl Iterator<Item = (u32, &BackendRow)> {
        (0..)
            .zip(&self.rows)
            .filter_map(|(id, row)| Some((id, row.as_ref()?)))
    }

    pub(super) const fn len(&self) -> usize {
        self.len
    }
}

/// What may not be given out again yet.
#[derive(Clone, Debug)]
pub(super) enum Resting {
    Slots(Range),
    Backend(u32),
    Service(u32),
    /// Removed from the map when it has rested; an id of 0 is not given out again.
    SourceRanges {
        id: u32,
        keys: Box<[SourceRangeKey]>,
    },
}

/// A service as the kernel has it, for listings.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct AppliedService {
    /// Row in `SERVICES`.
    pub id: u32,
    /// `None` after a restart until a complete list claims it.
    pub key: Option<ServiceKey>,
    /// Where it is offered, and the kind of frontend.
    pub frontends: std::collections::BTreeMap<FrontendKey, u8>,
    /// Algorithm, flags, affinity.
    pub config: ServiceConfig,
    /// Set `cluster`: row in `BACKENDS` and backend.
    pub cluster: Vec<(u32, SetBackend)>,
    /// Set `local`: row in `BACKENDS` and backend.
    pub local: Vec<(u32, SetBackend)>,
    /// Rows in `BACKENDS` that get no new connections, because they are suspected to have failed.
    pub left_out: Vec<u32>,
    /// Entries of the Maglev tables of `cluster` and `local`; 0 means that there is none.
    pub maglev: [u32; 2],
    /// Who may enter by a load-balancer address; nobody here means everybody.
    pub source_ranges: Vec<IpNet>,
}

pub(super) const fn word(range: Range) -> SetWord {
    SetWord::new(range.base, range.len)
}
