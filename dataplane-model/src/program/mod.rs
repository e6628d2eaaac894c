//! Carries operations out on the kernel's maps: gives ids, lays out slots, keeps account of what the kernel holds.
//!
//! Rules: the account changes only after the kernel's write; a step that fails leaves its service as it was, and the
//! others go on; what was given back rests for [`QUARANTINE_MS`] before it is used again, because a program may still
//! hold a word that it read before.

mod access;
mod alloc;
mod audit;
mod backend;
mod error;
mod fake;
mod frontend;
mod held;
mod maps;
mod released;
mod restore;
mod service;
mod suspects;
mod tables;
mod view;

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;

use dataplane_common::abi::{Addr, FrontendKey, Slot};
use hashbrown::{HashMap, HashSet};

pub use audit::Audit;
pub use error::ProgramError;
pub use fake::{FakeMaps, FaultyMaps};
pub use held::AppliedService;
pub use maps::{Capacity, MapError, Maps, SetKind, Write, backend_node};
pub use released::Released;
pub use view::Fill;

use crate::desired::DesiredService;
use crate::diff::{Keeps, Op, backends_of, diff_services, needs_new_row};
use crate::key::{BackendKey, ServiceKey};
use alloc::{Arena, Ids, Quarantine};
use backend::Lost;
use frontend::ActiveAddress;
use held::{Backends, Resting, Services};

/// How long freed slots, backend ids, service ids and source ranges rest before reuse, in milliseconds.
pub const QUARANTINE_MS: u64 = 2000;

/// What a call of [`Programmer::reconcile`] did.
#[derive(Debug, Default)]
pub struct Outcome {
    /// Services that are now as desired.
    pub applied: usize,
    /// Services that are not, and why; they stay pending.
    pub failed: Vec<(ServiceKey, ProgramError)>,
    /// Writes done.
    pub writes: u64,
    /// Backends that left services, in order, each once. Whether they are stale the model knows
    /// ([`crate::Model::take_stale`]): one that terminates leaves the sets, but keeps the flows that it has.
    pub released: Vec<Released>,
}

/// A wish that could not be fulfilled yet.
#[derive(Clone, Debug)]
struct Pending {
    wish: Option<DesiredService>,
    /// For want of room.
    full: bool,
}

/// Keeps the kernel's maps in step with the desired services.
#[derive(Debug)]
pub struct Programmer<M> {
    maps: M,
    services: Services,
    /// To whom a frontend leads, and as what.
    by_frontend: HashMap<FrontendKey, (u32, u8)>,
    active: HashMap<Addr, ActiveAddress>,
    /// How many of them are written.
    addresses: usize,
    /// Addresses to be removed from `active` unless a frontend there comes.
    idle: BTreeSet<Addr>,
    backends: Backends,
    /// Restored frontends that lead to an id that no service can have.
    orphans: HashSet<FrontendKey>,
    /// Rows of backends that get no new connections, the first ones first.
    suspects: Vec<u32>,
    service_ids: Ids,
    backend_ids: Ids,
    range_ids: Ids,
    /// Entries of `SOURCE_RANGES` in use or resting.
    range_entries: u32,
    arena: Arena,
    /// Slots of tables in use.
    table_slots: u32,
    resting: Quarantine<Resting>,
    /// When tables of which services may get another size, in order of time.
    resizes: VecDeque<(u64, u32)>,
    /// What could not be done yet, newest wish only.
    pending: BTreeMap<ServiceKey, Pending>,
    writes: u64,
    /// Backends that left a set.
    released: Vec<Released>,
    /// Kept for its memory.
    slots: Vec<Slot>,
}

/// What went wrong while operations were carried out.
#[derive(Default)]
struct Failures {
    services: HashMap<ServiceKey, ProgramError>,
    backends: Lost,
    /// Frontends whose coming owner could not be programmed.
    coveted: Option<HashMap<FrontendKey, ServiceKey>>,
}

impl<M: Maps> Programmer<M> {
    /// The maps.
    pub const fn maps(&self) -> &M {
        &self.maps
    }

    /// The maps, to be changed behind the programmer's back: for tests.
    pub const fn maps_mut(&mut self) -> &mut M {
        &mut self.maps
    }

    /// Makes these services as desired; `None` removes one. `now_ms` is a monotonic clock.
    ///
    /// What fails is reported, leaves its service as it was, and is tried again by [`Self::retry`].
    pub fn reconcile(
        &mut self,
        changes: impl IntoIterator<Item = (ServiceKey, Option<DesiredService>)>,
        now_ms: u64,
    ) -> Outcome {
        self.release(now_ms);
        let wished = newest(changes.into_iter().collect());
        for (key, wish) in &wished {
            if let Some(pending) = self.pending.remove(key) {
                self.let_go(&pending);
            }
            if let Some(wish) = wish.as_ref().filter(|_| self.services.unclaimed() > 0) {
                self.adopt(key, wish);
            }
        }
        let mut failures = Failures::default();
        let before = self.writes;
        // what it was and what it should be
        let mut held: Vec<(&ServiceKey, Option<DesiredService>, Option<&DesiredService>)> = Vec::new();
        let mut disowned: Vec<(u32, &ServiceKey)> = Vec::new();
        for (key, new) in &wished {
            let mut old = self.held(key);
            match (&old, new) {
                (None, Some(new)) if self.is_free(new) => {
                    self.add(key, new, now_ms, &mut failures);
                    continue;
                }
                (Some(was), Some(new)) if needs_new_row(was, new) => {
                    disowned.extend(self.services.disown(key).map(|id| (id, key)));
                    old = None;
                }
                _ => {}
            }
            held.push((key, old, new.as_ref()));
        }
        let ops = diff_services(held.iter().map(|(key, old, new)| (*key, old.as_ref(), *new)));
        for op in &ops {
            self.carry_out(op, &wished, now_ms, &mut failures);
        }
        drop(ops);
        if !disowned.is_empty() {
            let before = self.pending.values().filter_map(|pending| pending.wish.as_ref());
            let now = wished
                .iter()
                .filter(|(key, _)| failures.services.contains_key(key));
            let wishes = before.chain(now.filter_map(|(_, wish)| wish.as_ref()));
            let spared = frontends_of(wishes);
            for (id, key) in disowned {
                // what fails is left for `prune`
                self.remove_unclaimed(id, &spared, now_ms);
                self.rename_released(id, key);
            }
        }
        let kept = self.kept_backends(&wished, &failures.services);
        for id in self.backends.take_unsettled() {
            let key = self.backends.get(id).map(|row| row.key);
            if let Err(error) = self.settle_backend(id, &kept, now_ms) {
                // one service stays pending for it, so that it is tried again
                let uses = |s: &DesiredService| backends_of(s).any(|backend| Some(backend) == key);
                let using = wished.iter().find(|(_, new)| new.as_ref().is_some_and(uses));
                let used = || held.iter().find(|(_, old, _)| old.as_ref().is_some_and(uses));
                let blamed = using
                    .map(|(key, _)| key)
                    .or_else(|| used().map(|(key, ..)| *key))
                    .or_else(|| wished.first().map(|(key, _)| key));
                if let Some(key) = blamed {
                    failures
                        .services
                        .entry(key.clone())
                        .or_insert_with(|| error.into());
                }
            }
        }
        if let Err(error) = self.settle_active()
            && let Some((key, _)) = wished.first()
        {
            failures
                .services
                .entry(key.clone())
                .or_insert_with(|| error.into());
        }

        drop(held);
        let mut outcome = Outcome {
            writes: self.writes - before,
            released: self.take_released(),
            ..Outcome::default()
        };
        if failures.services.is_empty() {
            outcome.applied = wished.len();
            return outcome;
        }
        for (key, wish) in wished {
            match failures.services.remove(&key) {
                Some(error) => {
                    let full = error.is_full();
                    self.pending.insert(key.clone(), Pending { wish, full });
                    outcome.failed.push((key, error));
                }
                None => outcome.applied += 1,
            }
        }
        outcome
    }

    /// True if no frontend of a new service leads anywhere yet: then nobody is concerned by its coming, and it needs no place
    /// in an order of steps.
    fn is_free(&self, new: &DesiredService) -> bool {
        new.frontends
            .keys()
            .all(|frontend| !self.by_frontend.contains_key(frontend))
    }

    /// Adds such a service.
    fn add(&mut self, key: &ServiceKey, new: &DesiredService, now_ms: u64, failures: &mut Failures) {
        for backend in backends_of(new) {
            if let Err(error) = self.put_backend(backend) {
                failures.backends.insert(backend, Arc::new(error));
            }
        }
        let mut result = self.set_service(key, new, Keeps::default(), &failures.backends, now_ms);
        for (frontend, offer) in new.frontends.iter() {
            if result.is_ok() {
                result = self.put_frontend(key, frontend, offer);
            }
        }
        if let Err(error) = result {
            if let Some(service) = self.services.find(key).and_then(|id| self.services.get_mut(id)) {
                service.stale = true;
            }
            failures.services.insert(key.clone(), error);
        }
    }

    /// Tries again what failed before.
    pub fn retry(&mut self, now_ms: u64) -> Outcome {
        let pending = std::mem::take(&mut self.pending);
        for pending in pending.values() {
            self.let_go(pending);
        }
        self.reconcile(
            pending.into_iter().map(|(key, pending)| (key, pending.wish)),
            now_ms,
        )
    }

    /// Rows of backends that were kept for a wish are to be looked at again.
    fn let_go(&mut self, pending: &Pending) {
        for backend in pending.wish.iter().flat_map(backends_of) {
            if let Some(id) = self.backends.find(&backend) {
                self.backends.touch(id);
            }
        }
    }

    /// Services that are not as desired.
    pub fn pending(&self) -> impl Iterator<Item = &ServiceKey> {
        self.pending.keys()
    }

    /// When [`Self::release`] has something to do, on the clock of `now_ms`.
    #[must_use]
    pub fn next_release(&self) -> Option<u64> {
        let resize = self.resizes.front().map(|(at, _)| *at);
        self.resting.next_release().into_iter().chain(resize).min()
    }

    /// Makes what has rested long enough available again, and does what has waited for this time.
    pub fn release(&mut self, now_ms: u64) {
        self.resize_tables(now_ms);
        if self.resting.next_release().is_none_or(|at| at > now_ms) {
            return;
        }
        for item in self.resting.release(now_ms).collect::<Vec<_>>() {
            match item {
                Resting::Slots(range) => self.arena.give_back(range),
                Resting::Backend(id) => self.backend_ids.give_back(id),
                Resting::Service(id) => self.service_ids.give_back(id),
                Resting::SourceRanges { id, keys } => self.remove_ranges(now_ms, id, keys),
            }
        }
    }

    /// Removes every restored service and frontend that nobody has claimed. To be called after complete lists. What a
    /// service that is still pending wants stays as it was: it serves until that service can be programmed.
    pub fn prune(&mut self, now_ms: u64) -> Outcome {
        let mut outcome = Outcome::default();
        let before = self.writes;
        let wished = self.pending.values().filter_map(|pending| pending.wish.as_ref());
        let spared = frontends_of(wished);
        for frontend in self.orphans.iter().copied().collect::<Vec<_>>() {
            // a failure leaves it for the next call
            let _: Result<(), MapError> = self.delete_frontend(frontend);
        }
        let unclaimed = self.services.iter().filter(|(_, s)| s.key.is_none());
        for id in unclaimed.map(|(id, _)| id).collect::<Vec<_>>() {
            if self.remove_unclaimed(id, &spared, now_ms) {
                outcome.applied += 1;
            }
        }
        let kept = self.kept_backends(&[], &HashMap::new());
        for id in self.backends.take_unsettled() {
            // a failure is remembered and tried again by the next call of reconcile
            let _: Result<(), MapError> = self.settle_backend(id, &kept, now_ms);
        }
        // the same
        let _: Result<(), MapError> = self.settle_active();
        outcome.writes = self.writes - before;
        outcome.released = self.take_released();
        outcome
    }

    /// Removes a service that nobody claims, less the frontends that are spared. True if it is gone.
    fn remove_unclaimed(&mut self, id: u32, spared: &HashSet<FrontendKey>, now_ms: u64) -> bool {
        let Some(service) = self.services.get(id) else {
            return false;
        };
        let frontends = service.frontends.keys().filter(|f| !spared.contains(*f));
        for frontend in frontends.copied().collect::<Vec<_>>() {
            // a failure leaves the frontend for the next call: it still leads to a complete service
            let _: Result<(), MapError> = self.delete_frontend(frontend);
        }
        self.remove_service(id, now_ms).is_ok() && self.services.get(id).is_none()
    }

    /// True if [`Self::prune`] would find something to do.
    #[must_use]
    pub fn has_unclaimed(&self) -> bool {
        self.services.unclaimed() > 0 || !self.idle.is_empty() || !self.orphans.is_empty()
    }

    /// A restored service is this one if it is offered at wished frontends only: else changing its sets would change what
    /// the others lead to.
    fn adopt(&mut self, key: &ServiceKey, wish: &DesiredService) {
        if self.services.find(key).is_some() {
            return;
        }
        for frontend in wish.frontends.keys() {
            let Some(&(id, _)) = self.by_frontend.get(frontend) else {
                continue;
            };
            let is_this = self.services.get(id).is_some_and(|s| {
                s.key.is_none() && s.frontends.keys().all(|f| wish.frontends.contains_key(f))
            });
            if is_this {
                self.services.name(id, key);
                return;
            }
        }
    }

    /// What the kernel holds of a service, in the terms of the wish.
    fn held(&self, key: &ServiceKey) -> Option<DesiredService> {
        let service = self.services.get(self.services.find(key)?)?;
        let set = |set: &held::AppliedSet| set.members.iter().filter_map(|m| self.member(*m)).collect();
        let mut held = DesiredService {
            frontends: service.frontends.clone(),
            cluster: set(&service.cluster),
            local: set(&service.local),
            config: service.config,
            source_ranges: service
                .ranges
                .as_ref()
                .map(|r| r.list.clone())
                .unwrap_or_default(),
        };
        let unknown_table = |tables: &[held::AppliedTable; 2]| tables.iter().any(|table| table.unknown);
        if service.stale
            || service.cluster.unknown
            || service.local.unknown
            || service.tables.as_deref().is_some_and(unknown_table)
        {
            // differs from every wish, so that everything is gone through
            held.config.algorithm = u32::MAX;
        }
        Some(held)
    }

    fn carry_out(
        &mut self,
        op: &Op<'_>,
        wished: &[(ServiceKey, Option<DesiredService>)],
        now_ms: u64,
        failures: &mut Failures,
    ) {
        let (key, result) = match *op {
            Op::PutBackend { backend } => {
                if let Err(error) = self.put_backend(backend) {
                    failures.backends.insert(backend, Arc::new(error));
                }
                return;
            }
            // its references are counted
            Op::DeleteBackend { .. } => return,
            Op::GrowService { key, .. }
            | Op::SetService { key, .. }
            | Op::PutFrontend { key, .. }
            | Op::DeleteFrontend { key, .. }
            | Op::DeleteService { key }
                if failures.services.contains_key(key) =>
            {
                return;
            }
            Op::GrowService { key, wish, keeps } => {
                let result = self.set_service(key, wish, keeps, &failures.backends, now_ms);
                (key, result)
            }
            Op::SetService { key, wish } => {
                let result = self.set_service(key, wish, Keeps::default(), &failures.backends, now_ms);
                (key, result)
            }
            Op::PutFrontend { frontend, offer, key } => (key, self.put_frontend(key, frontend, offer)),
            Op::DeleteFrontend { frontend, key } => {
                let leads_here = self
                    .services
                    .find(key)
                    .is_some_and(|id| self.by_frontend.get(&frontend).is_some_and(|(to, _)| *to == id));
                if !leads_here {
                    return;
                }
                let coveted = failures
                    .coveted
                    .get_or_insert_with(|| coveted(&failures.services, wished, &self.pending));
                let result = match coveted.get(&frontend) {
                    Some(by) => Err(ProgramError::Kept {
                        frontend,
                        by: Box::new(by.clone()),
                    }),
                    None => self.delete_frontend(frontend).map_err(Into::into),
                };
                (key, result)
            }
            Op::DeleteService { key } => {
                let id = self.services.find(key);
                let result = id.map_or(Ok(()), |id| self.remove_service(id, now_ms));
                (key, result.map_err(Into::into))
            }
        };
        let is_set = matches!(op, Op::SetService { .. });
        let service = if is_set || result.is_err() {
            self.services.find(key).and_then(|id| self.services.get_mut(id))
        } else {
            None
        };
        if let Some(service) = service {
            service.stale = result.is_err();
        }
        if let Err(error) = result {
            failures.services.insert(key.clone(), error);
        }
    }

    /// Backends whose rows are kept for services that could not be programmed, though there is room for them: else a large
    /// service would begin anew with each try.
    fn kept_backends(
        &self,
        wished: &[(ServiceKey, Option<DesiredService>)],
        failed: &HashMap<ServiceKey, ProgramError>,
    ) -> HashSet<BackendKey> {
        if failed.is_empty() && self.pending.is_empty() {
            return HashSet::new();
        }
        let now = wished
            .iter()
            .filter(|(key, _)| failed.get(key).is_some_and(|error| !error.is_full()))
            .filter_map(|(_, wish)| wish.as_ref());
        let before = self.pending.values().filter(|pending| !pending.full);
        let wishes = now.chain(before.filter_map(|pending| pending.wish.as_ref()));
        wishes.flat_map(backends_of).collect()
    }

    /// A service that is to be gone through again.
    fn want_again(&mut self, id: u32, key: &ServiceKey) {
        let Some(service) = self.services.get_mut(id) else {
            return;
        };
        service.stale = false;
        let wish = self.held(key);
        if let Some(service) = self.services.get_mut(id) {
            service.stale = true;
        }
        self.pending
            .entry(key.clone())
            .or_insert(Pending { wish, full: false });
    }

    fn write(&mut self, write: &Write<'_>) -> Result<(), MapError> {
        self.writes += 1;
        self.maps.write(write)
    }
}

fn frontends_of<'a>(services: impl Iterator<Item = &'a DesiredService>) -> HashSet<FrontendKey> {
    services.flat_map(|s| s.frontends.keys().copied()).collect()
}

/// Only the last wish for each service.
fn newest(
    mut wished: Vec<(ServiceKey, Option<DesiredService>)>,
) -> Vec<(ServiceKey, Option<DesiredService>)> {
    let mut stays: Vec<bool> = Vec::with_capacity(wished.len());
    {
        let mut seen: HashSet<&ServiceKey> = HashSet::with_capacity(wished.len());
        stays.extend(wished.iter().rev().map(|(key, _)| seen.insert(key)));
    }
    if stays.contains(&false) {
        let mut stays = stays.into_iter().rev();
        wished.retain(|_| stays.next().unwrap_or(true));
    }
    wished
}

/// Frontends that services want which could not be programmed, though there is room for them.
fn coveted(
    failed: &HashMap<ServiceKey, ProgramError>,
    wished: &[(ServiceKey, Option<DesiredService>)],
    pending: &BTreeMap<ServiceKey, Pending>,
) -> HashMap<FrontendKey, ServiceKey> {
    let mut out = HashMap::new();
    if failed.is_empty() && pending.is_empty() {
        return out;
    }
    let now = wished
        .iter()
        .filter(|(key, _)| failed.get(key).is_some_and(|error| !error.is_full()));
    let before = pending.iter().filter(|(_, pending)| !pending.full);
    let wishes = now
        .map(|(key, wish)| (key, wish))
        .chain(before.map(|(key, pending)| (key, &pending.wish)));
    for (key, wish) in wishes {
        let frontends = wish.iter().flat_map(|wish| wish.frontends.keys());
        out.extend(frontends.map(|frontend| (*frontend, key.clone())));
    }
    out
}
