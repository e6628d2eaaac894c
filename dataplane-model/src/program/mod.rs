//! Carries operations out on the kernel's maps: gives ids, lays out slots, keeps account of what the kernel holds.
//!
//! Rules: the account changes only after the kernel's write; a step that fails leaves its service as it was, and the
//! others go on; what was given back rests for [`QUARANTINE_MS`] before it is used again, because a program may still
//! hold a word that it read before.

mod alloc;
mod maps;
mod restore;

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::sync::Arc;

use dataplane_common::abi::{Backend, FrontendKey, FrontendValue, Service, SetWord, Slot, map_name};

pub use maps::{Capacity, FakeMaps, FaultyMaps, MapError, Maps, SetKind, Write};

use crate::desired::{BackendState, DesiredService, ServiceConfig, SetBackend};
use crate::diff::{Op, diff_services};
use crate::key::{BackendKey, ServiceKey};
use alloc::{Arena, Ids, Quarantine, Range};

/// How long freed slots, backend ids and service ids rest before reuse, in milliseconds.
pub const QUARANTINE_MS: u64 = 2000;

/// Why a service could not be programmed. Its old set stays in force.
#[derive(Debug, thiserror::Error)]
pub enum ProgramError {
    /// A map is too small.
    #[error("{map} is too small: {needed} more needed, {free} of {max} free")]
    Full {
        /// Name of the map.
        map: &'static str,
        /// Entries asked for.
        needed: u32,
        /// Entries free; they may be in pieces, or resting.
        free: u32,
        /// Size of the map.
        max: u32,
    },
    /// A backend that the service needs could not be programmed.
    #[error("backend {backend}: {source}")]
    Backend {
        /// Which.
        backend: BackendKey,
        /// Why; several services may need it.
        source: Arc<ProgramError>,
    },
    /// A write failed.
    #[error(transparent)]
    Map(#[from] MapError),
}

impl ProgramError {
    /// Name of the map.
    #[must_use]
    pub fn map(&self) -> &'static str {
        match self {
            Self::Full { map, .. } => map,
            Self::Backend { source, .. } => source.map(),
            Self::Map(error) => error.map(),
        }
    }
}

/// What a call of [`Programmer::reconcile`] did.
#[derive(Debug, Default)]
pub struct Outcome {
    /// Services that are now as desired.
    pub applied: usize,
    /// Services that are not, and why; they stay pending.
    pub failed: Vec<(ServiceKey, ProgramError)>,
    /// Writes done.
    pub writes: u64,
}

/// Fill of one map.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Fill {
    /// Name of the map.
    pub map: &'static str,
    /// Entries in use or resting.
    pub used: u32,
    /// Size.
    pub max: u32,
}

/// One of a service's sets as the kernel has it.
#[derive(Clone, Debug, Default)]
struct AppliedSet {
    range: Range,
    members: Vec<(u32, SetBackend)>,
    /// Restored, but not to be trusted: rewritten at the next change.
    unknown: bool,
}

/// The frontends that lead to a service, sorted. Most have one, for which a tree would cost a quarter of a kilobyte.
#[derive(Clone, Debug, Default)]
struct Offers(Vec<(FrontendKey, u8)>);

impl Offers {
    fn find(&self, frontend: &FrontendKey) -> Result<usize, usize> {
        self.0.binary_search_by(|(other, _)| other.cmp(frontend))
    }

    fn insert(&mut self, frontend: FrontendKey, kind: u8) {
        match self.find(&frontend) {
            Ok(at) => self.0[at].1 = kind,
            Err(at) => {
                if self.0.is_empty() {
                    self.0.reserve_exact(1);
                }
                self.0.insert(at, (frontend, kind));
            }
        }
    }

    fn remove(&mut self, frontend: &FrontendKey) {
        if let Ok(at) = self.find(frontend) {
            self.0.remove(at);
        }
    }

    fn keys(&self) -> impl Iterator<Item = &FrontendKey> {
        self.0.iter().map(|(frontend, _)| frontend)
    }

    const fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    fn to_map(&self) -> BTreeMap<FrontendKey, u8> {
        self.0.iter().copied().collect()
    }
}

/// A service as the kernel has it.
#[derive(Clone, Debug)]
struct Applied {
    /// `None` after a restart until it is claimed.
    key: Option<ServiceKey>,
    frontends: Offers,
    config: ServiceConfig,
    cluster: AppliedSet,
    local: AppliedSet,
}

#[derive(Clone, Copy, Debug)]
struct BackendRow {
    id: u32,
    state: BackendState,
    /// How many set members refer to it.
    refs: u32,
    /// How many of them say that it is active. It is active as long as any does, in whatever order they came.
    active: u32,
}

#[derive(Clone, Copy, Debug)]
enum Resting {
    Slots(Range),
    Backend(u32),
    Service(u32),
}

/// A service as the kernel has it, for listings.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct AppliedService {
    /// Row in `SERVICES`.
    pub id: u32,
    /// `None` after a restart until a complete list claims it.
    pub key: Option<ServiceKey>,
    /// Where it is offered, and the kind of frontend.
    pub frontends: BTreeMap<FrontendKey, u8>,
    /// Algorithm and flags.
    pub config: ServiceConfig,
    /// Set `cluster`: row in `BACKENDS` and backend.
    pub cluster: Vec<(u32, SetBackend)>,
    /// Set `local`: row in `BACKENDS` and backend.
    pub local: Vec<(u32, SetBackend)>,
}

/// Keeps the kernel's maps in step with the desired services.
#[derive(Debug)]
pub struct Programmer<M> {
    maps: M,
    services: HashMap<u32, Applied>,
    by_key: HashMap<ServiceKey, u32>,
    by_frontend: HashMap<FrontendKey, u32>,
    backends: HashMap<BackendKey, BackendRow>,
    service_ids: Ids,
    backend_ids: Ids,
    arena: Arena,
    resting: Quarantine<Resting>,
    /// Backends whose state or row could not be brought up to date.
    unsettled: BTreeSet<BackendKey>,
    /// What could not be done yet, newest wish only.
    pending: BTreeMap<ServiceKey, Option<DesiredService>>,
    writes: u64,
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
        let wished: BTreeMap<ServiceKey, Option<DesiredService>> = changes.into_iter().collect();
        for (key, desired) in &wished {
            self.pending.remove(key);
            if let Some(desired) = desired {
                self.adopt(key, desired);
            }
        }
        let held: Vec<Option<DesiredService>> = wished.keys().map(|key| self.held(key)).collect();
        let pairs = wished
            .iter()
            .zip(&held)
            .map(|((key, new), old)| (key, old.as_ref(), new.as_ref()));
        let ops = diff_services(pairs);

        let mut failed: BTreeMap<ServiceKey, ProgramError> = BTreeMap::new();
        let mut lost: HashMap<BackendKey, Arc<ProgramError>> = HashMap::new();
        let mut touched: BTreeSet<BackendKey> = BTreeSet::new();
        let before = self.writes;
        for op in &ops {
            self.carry_out(op, now_ms, &mut failed, &mut lost, &mut touched);
        }
        touched.extend(std::mem::take(&mut self.unsettled));
        for backend in touched {
            if let Err(error) = self.settle_backend(backend, now_ms) {
                // one service stays pending for it, so that it is tried again
                let uses = |s: &Option<DesiredService>| {
                    let mut members = s.iter().flat_map(|s| s.cluster.iter().chain(&s.local));
                    members.any(|m| m.backend == backend)
                };
                let mut users = wished.iter().zip(&held);
                let user = users.find(|((_, new), old)| uses(new) || uses(old));
                if let Some(key) = user.map(|((key, _), _)| key).or_else(|| wished.keys().next()) {
                    failed.entry(key.clone()).or_insert_with(|| error.into());
                }
            }
        }

        let mut outcome = Outcome {
            writes: self.writes - before,
            ..Outcome::default()
        };
        for (key, desired) in wished {
            match failed.remove(&key) {
                Some(error) => {
                    self.pending.insert(key.clone(), desired);
                    outcome.failed.push((key, error));
                }
                None => outcome.applied += 1,
            }
        }
        outcome
    }

    /// Tries again what failed before.
    pub fn retry(&mut self, now_ms: u64) -> Outcome {
        let pending = std::mem::take(&mut self.pending);
        self.reconcile(pending, now_ms)
    }

    /// Services that are not as desired.
    pub fn pending(&self) -> impl Iterator<Item = &ServiceKey> {
        self.pending.keys()
    }

    /// When something that rests can be used again, on the clock of `now_ms`.
    #[must_use]
    pub fn next_release(&self) -> Option<u64> {
        self.resting.next_release()
    }

    /// Makes what has rested long enough available again.
    pub fn release(&mut self, now_ms: u64) {
        for item in self.resting.release(now_ms) {
            match item {
                Resting::Slots(range) => self.arena.give_back(range),
                Resting::Backend(id) => self.backend_ids.give_back(id),
                Resting::Service(id) => self.service_ids.give_back(id),
            }
        }
    }

    /// Removes every restored service and frontend that nobody has claimed. To be called after complete lists. What a
    /// service that is still pending wants stays as it was: it serves until that service can be programmed.
    pub fn prune(&mut self, now_ms: u64) -> Outcome {
        let mut outcome = Outcome::default();
        let before = self.writes;
        let wished = self.pending.values().flatten();
        let spared: HashSet<FrontendKey> = wished.flat_map(|s| s.frontends.keys().copied()).collect();
        for frontend in self.orphans().collect::<Vec<_>>() {
            if self.write(&Write::DeleteFrontend { key: frontend }).is_ok() {
                self.by_frontend.remove(&frontend);
            }
        }
        let unclaimed: Vec<u32> = self
            .services
            .iter()
            .filter(|(_, s)| s.key.is_none())
            .map(|(id, _)| *id)
            .collect();
        for id in unclaimed {
            let Some(service) = self.services.get(&id) else {
                continue;
            };
            let frontends: Vec<FrontendKey> = service
                .frontends
                .keys()
                .filter(|f| !spared.contains(f))
                .copied()
                .collect();
            let backends: Vec<BackendKey> = members(service).map(|(_, m)| m.backend).collect();
            for frontend in frontends {
                // a failure leaves the frontend for the next call: it still leads to a complete service
                let _: Result<(), MapError> = self.delete_frontend(id, frontend);
            }
            if self.remove_service(id, now_ms).is_ok() && !self.services.contains_key(&id) {
                outcome.applied += 1;
            }
            for backend in backends {
                // a failure is remembered and tried again by the next call of reconcile
                let _: Result<(), MapError> = self.settle_backend(backend, now_ms);
            }
        }
        outcome.writes = self.writes - before;
        outcome
    }

    /// True if [`Self::prune`] would find something to do.
    #[must_use]
    pub fn has_unclaimed(&self) -> bool {
        self.services.values().any(|service| service.key.is_none()) || self.orphans().next().is_some()
    }

    /// Restored frontends that lead to an id that no service can have.
    fn orphans(&self) -> impl Iterator<Item = FrontendKey> + '_ {
        self.by_frontend
            .iter()
            .filter(|(_, id)| !self.services.contains_key(*id))
            .map(|(frontend, _)| *frontend)
    }

    /// How full the maps are.
    #[must_use]
    pub fn usage(&self) -> [Fill; 4] {
        let max = self.maps.capacity();
        let (mut services, mut backends) = (self.services.len(), self.backends.len());
        for item in self.resting.items() {
            match item {
                Resting::Slots(_) => {}
                Resting::Backend(_) => backends += 1,
                Resting::Service(_) => services += 1,
            }
        }
        let count = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
        [
            Fill {
                map: map_name::FRONTENDS,
                used: count(self.by_frontend.len()),
                max: max.frontends,
            },
            Fill {
                map: map_name::SERVICES,
                used: count(services),
                max: max.services,
            },
            Fill {
                map: map_name::SLOTS,
                used: max.slots - self.arena.free(),
                max: max.slots,
            },
            Fill {
                map: map_name::BACKENDS,
                used: count(backends),
                max: max.backends,
            },
        ]
    }

    /// What the kernel holds, in order of key.
    #[must_use]
    pub fn services(&self) -> Vec<AppliedService> {
        let mut out: Vec<AppliedService> = self
            .services
            .iter()
            .map(|(&id, service)| AppliedService {
                id,
                key: service.key.clone(),
                frontends: service.frontends.to_map(),
                config: service.config,
                cluster: service.cluster.members.clone(),
                local: service.local.members.clone(),
            })
            .collect();
        out.sort_by(|a, b| (&a.key, a.id).cmp(&(&b.key, b.id)));
        out
    }

    /// A restored service is this one if it is offered at wished frontends only: else changing its sets would change what
    /// the others lead to.
    fn adopt(&mut self, key: &ServiceKey, desired: &DesiredService) {
        if self.by_key.contains_key(key) {
            return;
        }
        let is_this =
            |s: &Applied| s.key.is_none() && s.frontends.keys().all(|f| desired.frontends.contains_key(f));
        for frontend in desired.frontends.keys() {
            let Some(&id) = self.by_frontend.get(frontend) else {
                continue;
            };
            if let Some(service) = self.services.get_mut(&id).filter(|s| is_this(s)) {
                service.key = Some(key.clone());
                self.by_key.insert(key.clone(), id);
                return;
            }
        }
    }

    /// What the kernel holds of a service, in the terms of the wish.
    fn held(&self, key: &ServiceKey) -> Option<DesiredService> {
        let service = self.services.get(self.by_key.get(key)?)?;
        let set = |set: &AppliedSet| set.members.iter().map(|&(_, member)| member).collect();
        let mut held = DesiredService {
            frontends: service.frontends.to_map(),
            cluster: set(&service.cluster),
            local: set(&service.local),
            config: service.config,
            has_any: false,
        };
        if service.cluster.unknown || service.local.unknown {
            // differs from every wish, so that the sets are written
            held.config.algorithm = u32::MAX;
        }
        Some(held)
    }

    fn carry_out(
        &mut self,
        op: &Op,
        now_ms: u64,
        failed: &mut BTreeMap<ServiceKey, ProgramError>,
        lost: &mut HashMap<BackendKey, Arc<ProgramError>>,
        touched: &mut BTreeSet<BackendKey>,
    ) {
        let (key, result) = match op {
            Op::PutBackend { backend, state } => {
                touched.insert(*backend);
                if let Err(error) = self.put_backend(*backend, *state) {
                    lost.insert(*backend, Arc::new(error));
                }
                return;
            }
            Op::DeleteBackend { backend } => {
                touched.insert(*backend);
                return;
            }
            Op::SetService {
                key,
                config,
                cluster,
                local,
            } => {
                touched.extend(self.services_members(key));
                (key, self.set_service(key, *config, cluster, local, lost, now_ms))
            }
            Op::PutFrontend { key, .. } | Op::DeleteFrontend { key, .. } | Op::DeleteService { key }
                if failed.contains_key(key) =>
            {
                return;
            }
            Op::PutFrontend { frontend, kind, key } => (key, self.put_frontend(key, *frontend, *kind)),
            Op::DeleteFrontend { frontend, key } => {
                let id = self
                    .by_key
                    .get(key)
                    .copied()
                    .filter(|id| self.by_frontend.get(frontend) == Some(id));
                (
                    key,
                    id.map_or(Ok(()), |id| self.delete_frontend(id, *frontend))
                        .map_err(Into::into),
                )
            }
            Op::DeleteService { key } => {
                let id = self.by_key.get(key).copied();
                (
                    key,
                    id.map_or(Ok(()), |id| self.remove_service(id, now_ms))
                        .map_err(Into::into),
                )
            }
        };
        if let Err(error) = result {
            failed.insert(key.clone(), error);
        }
    }

    fn services_members(&self, key: &ServiceKey) -> Vec<BackendKey> {
        let service = self.by_key.get(key).and_then(|id| self.services.get(id));
        service
            .into_iter()
            .flat_map(members)
            .map(|(_, member)| member.backend)
            .collect()
    }

    fn write(&mut self, write: &Write<'_>) -> Result<(), MapError> {
        self.writes += 1;
        self.maps.write(write)
    }

    fn put_backend(&mut self, backend: BackendKey, state: BackendState) -> Result<(), ProgramError> {
        if self.backends.contains_key(&backend) {
            // its state follows when all sets are as wished
            return Ok(());
        }
        let Some(id) = self.backend_ids.take() else {
            let max = self.maps.capacity().backends;
            return Err(ProgramError::Full {
                map: map_name::BACKENDS,
                needed: 1,
                free: 0,
                max,
            });
        };
        let row = Backend {
            addr: backend.addr,
            port: backend.port,
            protocol: backend.protocol.number(),
            state: state.number(),
            generation: self
                .maps
                .backend(id)
                .unwrap_or_default()
                .generation
                .wrapping_add(1),
            ..Backend::default()
        };
        let written = self
            .write(&Write::ResetStats { id })
            .and_then(|()| self.write(&Write::Backend { id, row }));
        if let Err(error) = written {
            self.backend_ids.give_back(id);
            return Err(error.into());
        }
        self.backends.insert(
            backend,
            BackendRow {
                id,
                state,
                refs: 0,
                active: 0,
            },
        );
        Ok(())
    }

    /// Gives a backend's row back if no set refers to it, else makes its state what the sets say.
    fn settle_backend(&mut self, backend: BackendKey, now_ms: u64) -> Result<(), MapError> {
        self.unsettled.remove(&backend);
        let Some(row) = self.backends.get(&backend).copied() else {
            return Ok(());
        };
        if row.refs == 0 {
            self.resting.put(now_ms, Resting::Backend(row.id));
            self.backends.remove(&backend);
            return Ok(());
        }
        let state = if row.active > 0 {
            BackendState::Active
        } else {
            BackendState::Terminating
        };
        if row.state != state {
            let write = Write::BackendState {
                id: row.id,
                state: state.number(),
            };
            if let Err(error) = self.write(&write) {
                self.unsettled.insert(backend);
                return Err(error);
            }
            self.backends.insert(backend, BackendRow { state, ..row });
        }
        Ok(())
    }

    /// Ids of a set's members.
    fn resolve(
        &self,
        set: &[SetBackend],
        lost: &HashMap<BackendKey, Arc<ProgramError>>,
    ) -> Result<Vec<(u32, SetBackend)>, ProgramError> {
        let mut out = Vec::with_capacity(set.len());
        for member in set {
            match self.backends.get(&member.backend) {
                Some(row) => out.push((row.id, *member)),
                None => {
                    let full = || {
                        Arc::new(ProgramError::Full {
                            map: map_name::BACKENDS,
                            needed: 1,
                            free: 0,
                            max: self.maps.capacity().backends,
                        })
                    };
                    return Err(ProgramError::Backend {
                        backend: member.backend,
                        source: lost.get(&member.backend).map_or_else(full, Arc::clone),
                    });
                }
            }
        }
        Ok(out)
    }

    fn set_service(
        &mut self,
        key: &ServiceKey,
        config: ServiceConfig,
        cluster: &[SetBackend],
        local: &[SetBackend],
        lost: &HashMap<BackendKey, Arc<ProgramError>>,
        now_ms: u64,
    ) -> Result<(), ProgramError> {
        let cluster = self.resolve(cluster, lost)?;
        let local = self.resolve(local, lost)?;
        match self.by_key.get(key).copied() {
            None => self.add_service(key, config, cluster, local),
            Some(id) => {
                // Sets that traffic may need come before the flag that sends it there; emptied ones after it.
                let grows = |set: &[(u32, SetBackend)]| !set.is_empty();
                for (which, set) in [(SetKind::Cluster, &cluster), (SetKind::Local, &local)] {
                    if grows(set) {
                        self.change_set(id, which, set, now_ms)?;
                    }
                }
                self.change_config(id, config)?;
                for (which, set) in [(SetKind::Cluster, &cluster), (SetKind::Local, &local)] {
                    if !grows(set) {
                        self.change_set(id, which, set, now_ms)?;
                    }
                }
                Ok(())
            }
        }
    }

    fn add_service(
        &mut self,
        key: &ServiceKey,
        config: ServiceConfig,
        cluster: Vec<(u32, SetBackend)>,
        local: Vec<(u32, SetBackend)>,
    ) -> Result<(), ProgramError> {
        let Some(id) = self.service_ids.take() else {
            let max = self.maps.capacity().services;
            return Err(ProgramError::Full {
                map: map_name::SERVICES,
                needed: 1,
                free: 0,
                max,
            });
        };
        let laid_out = self
            .lay_out(id, &cluster)
            .and_then(|cluster_range| match self.lay_out(id, &local) {
                Ok(local_range) => Ok((cluster_range, local_range)),
                Err(error) => {
                    self.arena.give_back(cluster_range);
                    Err(error)
                }
            });
        let result = laid_out.and_then(|(cluster_range, local_range)| {
            let row = Service {
                cluster: word(cluster_range),
                local: word(local_range),
                algorithm: config.algorithm,
                flags: config.flags,
                ..Service::default()
            };
            let written = self.write(&Write::Service { id, row });
            written.map(|()| (cluster_range, local_range)).map_err(|error| {
                self.arena.give_back(cluster_range);
                self.arena.give_back(local_range);
                error.into()
            })
        });
        let (cluster_range, local_range) = match result {
            Ok(ranges) => ranges,
            Err(error) => {
                self.service_ids.give_back(id);
                return Err(error);
            }
        };
        self.count_refs(&cluster, true);
        self.count_refs(&local, true);
        let applied = Applied {
            key: Some(key.clone()),
            frontends: Offers::default(),
            config,
            cluster: AppliedSet {
                range: cluster_range,
                members: cluster,
                unknown: false,
            },
            local: AppliedSet {
                range: local_range,
                members: local,
                unknown: false,
            },
        };
        self.services.insert(id, applied);
        self.by_key.insert(key.clone(), id);
        Ok(())
    }

    /// Writes a set's slots into a new range that nothing refers to yet.
    fn lay_out(&mut self, service: u32, members: &[(u32, SetBackend)]) -> Result<Range, ProgramError> {
        let needed = u32::try_from(members.len()).unwrap_or(u32::MAX);
        let Some(range) = self.arena.take(needed) else {
            let (free, max) = (self.arena.free(), self.maps.capacity().slots);
            return Err(ProgramError::Full {
                map: map_name::SLOTS,
                needed,
                free,
                max,
            });
        };
        if range.len > 0 {
            let slots: Vec<Slot> = members
                .iter()
                .map(|(backend, _)| Slot::new(*backend, service))
                .collect();
            if let Err(error) = self.write(&Write::Slots {
                base: range.base,
                slots: &slots,
            }) {
                self.arena.give_back(range);
                return Err(error.into());
            }
        }
        Ok(range)
    }

    fn change_set(
        &mut self,
        id: u32,
        which: SetKind,
        members: &[(u32, SetBackend)],
        now_ms: u64,
    ) -> Result<(), ProgramError> {
        let Some(old) = self.services.get(&id).map(|s| pick(s, which)) else {
            return Ok(());
        };
        let same = !old.unknown && old.members.iter().map(|m| m.0).eq(members.iter().map(|m| m.0));
        if !same {
            let range = self.lay_out(id, members)?;
            if let Err(error) = self.write(&Write::Set {
                id,
                which,
                word: word(range),
            }) {
                self.arena.give_back(range);
                return Err(error.into());
            }
            self.count_refs(members, true);
            let Some(service) = self.services.get_mut(&id) else {
                return Ok(());
            };
            let set = AppliedSet {
                range,
                members: members.to_vec(),
                unknown: false,
            };
            let old = std::mem::replace(pick_mut(service, which), set);
            self.count_refs(&old.members, false);
            if old.range.len > 0 {
                self.resting.put(now_ms, Resting::Slots(old.range));
            }
        } else if let Some(service) = self.services.get_mut(&id) {
            let old = std::mem::replace(&mut pick_mut(service, which).members, members.to_vec());
            self.count_refs(members, true);
            self.count_refs(&old, false);
        }
        Ok(())
    }

    fn change_config(&mut self, id: u32, config: ServiceConfig) -> Result<(), ProgramError> {
        if self.services.get(&id).is_some_and(|s| s.config != config) {
            self.write(&Write::Config {
                id,
                algorithm: config.algorithm,
                flags: config.flags,
            })?;
            if let Some(service) = self.services.get_mut(&id) {
                service.config = config;
            }
        }
        Ok(())
    }

    fn count_refs(&mut self, members: &[(u32, SetBackend)], add: bool) {
        for (_, member) in members {
            if let Some(row) = self.backends.get_mut(&member.backend) {
                let active = u32::from(member.state == BackendState::Active);
                if add {
                    row.refs += 1;
                    row.active += active;
                } else {
                    row.refs = row.refs.saturating_sub(1);
                    row.active = row.active.saturating_sub(active);
                }
            }
        }
    }

    fn put_frontend(
        &mut self,
        key: &ServiceKey,
        frontend: FrontendKey,
        kind: u8,
    ) -> Result<(), ProgramError> {
        let Some(&id) = self.by_key.get(key) else {
            return Ok(());
        };
        let value = FrontendValue {
            service: id,
            kind,
            ..FrontendValue::default()
        };
        self.write(&Write::PutFrontend { key: frontend, value })?;
        if let Some(before) = self
            .by_frontend
            .insert(frontend, id)
            .filter(|before| *before != id)
            && let Some(service) = self.services.get_mut(&before)
        {
            service.frontends.remove(&frontend);
        }
        if let Some(service) = self.services.get_mut(&id) {
            service.frontends.insert(frontend, kind);
        }
        Ok(())
    }

    fn delete_frontend(&mut self, id: u32, frontend: FrontendKey) -> Result<(), MapError> {
        self.write(&Write::DeleteFrontend { key: frontend })?;
        self.by_frontend.remove(&frontend);
        if let Some(service) = self.services.get_mut(&id) {
            service.frontends.remove(&frontend);
        }
        Ok(())
    }

    /// Removes a service to which no frontend leads any more. Its row is emptied: who still holds its id is refused.
    fn remove_service(&mut self, id: u32, now_ms: u64) -> Result<(), MapError> {
        if self
            .services
            .get(&id)
            .is_none_or(|service| !service.frontends.is_empty())
        {
            return Ok(());
        }
        for which in [SetKind::Cluster, SetKind::Local] {
            self.write(&Write::Set {
                id,
                which,
                word: SetWord::default(),
            })?;
            // if the next write fails, a later wish for this service must not take the set for what it was
            if let Some(service) = self.services.get_mut(&id) {
                pick_mut(service, which).unknown = true;
            }
        }
        let Some(service) = self.services.remove(&id) else {
            return Ok(());
        };
        if let Some(key) = &service.key {
            self.by_key.remove(key);
        }
        self.resting.put(now_ms, Resting::Service(id));
        for set in [service.cluster, service.local] {
            self.count_refs(&set.members, false);
            if set.range.len > 0 {
                self.resting.put(now_ms, Resting::Slots(set.range));
            }
        }
        Ok(())
    }
}

const fn word(range: Range) -> SetWord {
    SetWord::new(range.base, range.len)
}

fn members(service: &Applied) -> impl Iterator<Item = &(u32, SetBackend)> {
    service.cluster.members.iter().chain(&service.local.members)
}

const fn pick(service: &Applied, which: SetKind) -> &AppliedSet {
    match which {
        SetKind::Cluster => &service.cluster,
        SetKind::Local => &service.local,
    }
}

const fn pick_mut(service: &mut Applied, which: SetKind) -> &mut AppliedSet {
    match which {
        SetKind::Cluster => &mut service.cluster,
        SetKind::Local => &mut service.local,
    }
}
