//! Carries operations out on the kernel's maps: gives ids, lays out slots, keeps account of what the kernel holds.
//!
//! Rules: the account changes only after the kernel's write; a step that fails leaves its service as it was, and the
//! others go on; what was given back rests for [`QUARANTINE_MS`] before it is used again, because a program may still
//! hold a word that it read before.

mod alloc;
mod audit;
mod backend;
mod error;
mod fake;
mod held;
mod maps;
mod restore;
mod service;

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::sync::Arc;

use dataplane_common::abi::{FrontendKey, map_name};

pub use audit::Audit;
pub use error::ProgramError;
pub use fake::{FakeMaps, FaultyMaps};
pub use held::AppliedService;
pub use maps::{Capacity, MapError, Maps, SetKind, Write, backend_node};

use crate::desired::DesiredService;
use crate::diff::{Op, diff_services};
use crate::key::{BackendKey, ServiceKey};
use alloc::{Arena, Ids, Quarantine};
use held::{Applied, AppliedSet, BackendRow, Resting, members};

/// How long freed slots, backend ids and service ids rest before reuse, in milliseconds.
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
}
