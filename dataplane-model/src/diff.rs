//! From one desired state to another: ordered operations.

use std::collections::BTreeSet;

use dataplane_common::abi::{FrontendKey, frontend_flag, service_flag};
use hashbrown::HashSet;

use crate::desired::{Desired, DesiredService, Offer};
use crate::key::{BackendKey, ServiceKey};

/// One step. Steps are idempotent; carrying out a list in order never leaves a service pointing at something missing, and
/// no frontend without backends that has some before and after.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Op<'a> {
    /// The backend's row must be there.
    PutBackend {
        /// Which.
        backend: BackendKey,
    },
    /// As far as it does not take anything away the service becomes this; all backends in it have been put. The rest
    /// follows with [`Op::SetService`], when frontends that move elsewhere have moved.
    GrowService {
        /// Which.
        key: &'a ServiceKey,
        /// What it becomes.
        wish: &'a DesiredService,
        /// What it keeps until then.
        keeps: Keeps,
    },
    /// The service's sets and configuration become these; all backends in them have been put.
    SetService {
        /// Which.
        key: &'a ServiceKey,
        /// What it becomes.
        wish: &'a DesiredService,
    },
    /// The frontend leads to the service, which has been set.
    PutFrontend {
        /// Where it is offered.
        frontend: FrontendKey,
        /// As what.
        offer: Offer,
        /// To whom it leads.
        key: &'a ServiceKey,
    },
    /// The frontend leads to this service no more.
    DeleteFrontend {
        /// Where it was offered.
        frontend: FrontendKey,
        /// To whom it led; another service may have taken it over already.
        key: &'a ServiceKey,
    },
    /// The service has no frontend any more and goes.
    DeleteService {
        /// Which.
        key: &'a ServiceKey,
    },
    /// No service that is being changed uses the backend any more; it goes unless another does.
    DeleteBackend {
        /// Which.
        backend: BackendKey,
    },
}

/// What of a service stays as it was until frontends have moved or changed.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Keeps {
    /// Sets that are to become empty, and flags that send anybody to an empty set: a frontend is about to lead elsewhere,
    /// and who enters by it must not be refused before.
    pub sets: bool,
    /// Source ranges: frontends still ask for those that are to go, or are about to lead elsewhere.
    pub ranges: bool,
}

/// The operations that turn `old` into `new`: backend rows, sets, frontends; then removal the other way round.
/// Equal states give no operation.
#[must_use]
pub fn diff<'a>(old: &'a Desired, new: &'a Desired) -> Vec<Op<'a>> {
    let keys: BTreeSet<&ServiceKey> = old.services.keys().chain(new.services.keys()).collect();
    let pairs = keys
        .into_iter()
        .map(|key| (key, old.services.get(key), new.services.get(key)));
    diff_services(pairs)
}

/// [`diff`] of some services: key, what it was, what it should be.
#[must_use]
pub fn diff_services<'a>(
    pairs: impl Iterator<
        Item = (
            &'a ServiceKey,
            Option<&'a DesiredService>,
            Option<&'a DesiredService>,
        ),
    >,
) -> Vec<Op<'a>> {
    let mut before: HashSet<BackendKey> = HashSet::new();
    let mut after: HashSet<BackendKey> = HashSet::new();
    let (mut backends, mut sets, mut put_frontends) = (Vec::new(), Vec::new(), Vec::new());
    let (mut delete_frontends, mut late_sets, mut delete_services) = (Vec::new(), Vec::new(), Vec::new());
    let mut gone = Vec::new();
    for (key, old, new) in pairs {
        if old == new {
            continue;
        }
        if let Some(new) = new {
            for backend in backends_of(new) {
                if after.insert(backend) {
                    backends.push(Op::PutBackend { backend });
                }
            }
            if !old.is_some_and(|old| same_but_frontends(old, new)) {
                let keeps = old.map(|old| keeps(old, new)).unwrap_or_default();
                if keeps.sets || keeps.ranges {
                    sets.push(Op::GrowService {
                        key,
                        wish: new,
                        keeps,
                    });
                    late_sets.push(Op::SetService { key, wish: new });
                } else {
                    sets.push(Op::SetService { key, wish: new });
                }
            }
            for (frontend, offer) in new.frontends.iter() {
                if old.and_then(|old| old.frontends.get(&frontend)) != Some(offer) {
                    put_frontends.push(Op::PutFrontend { frontend, offer, key });
                }
            }
        } else {
            delete_services.push(Op::DeleteService { key });
        }
        if let Some(old) = old {
            gone.extend(backends_of(old).filter(|backend| before.insert(*backend)));
            for &frontend in old.frontends.keys() {
                if new.is_none_or(|new| !new.frontends.contains_key(&frontend)) {
                    delete_frontends.push(Op::DeleteFrontend { frontend, key });
                }
            }
        }
    }

    gone.retain(|backend| !after.contains(backend));
    if !before.is_empty() {
        backends.retain(|op| !matches!(op, Op::PutBackend { backend } if before.contains(backend)));
    }
    let mut ops = backends;
    ops.append(&mut sets);
    ops.append(&mut put_frontends);
    ops.append(&mut delete_frontends);
    ops.append(&mut late_sets);
    ops.append(&mut delete_services);
    ops.extend(gone.into_iter().map(|backend| Op::DeleteBackend { backend }));
    ops
}

pub(crate) fn backends_of(service: &DesiredService) -> impl Iterator<Item = BackendKey> + '_ {
    service.cluster.iter().chain(&service.local).map(|m| m.backend)
}

fn same_but_frontends(old: &DesiredService, new: &DesiredService) -> bool {
    (&old.cluster, &old.local, old.config, &old.source_ranges)
        == (&new.cluster, &new.local, new.config, &new.source_ranges)
}

/// What must wait for frontends that lead elsewhere, or change.
fn keeps(old: &DesiredService, new: &DesiredService) -> Keeps {
    let emptied = |old: bool, new: bool| !old && new;
    let takes_away = emptied(old.cluster.is_empty(), new.cluster.is_empty())
        || emptied(old.local.is_empty(), new.local.is_empty())
        || (old.config.flags != new.config.flags && !serves_all(new));
    let is_asked = |(f, offer): (FrontendKey, Offer)| {
        offer.flags & frontend_flag::SOURCE_RANGES != 0 && !new.frontends.contains_key(&f)
    };
    Keeps {
        sets: takes_away && leads_elsewhere(old, new),
        ranges: old.source_ranges != new.source_ranges
            && (new.source_ranges.is_empty() || old.frontends.iter().any(is_asked)),
    }
}

fn leads_elsewhere(old: &DesiredService, new: &DesiredService) -> bool {
    old.frontends.keys().any(|f| !new.frontends.contains_key(f))
}

/// True if no order of steps on one row does: frontends leave, and must find the service as it was, while others come, and
/// must find it as it is to be.
pub(crate) fn needs_new_row(old: &DesiredService, new: &DesiredService) -> bool {
    let keeps = keeps(old, new);
    (keeps.sets || keeps.ranges) && leads_elsewhere(old, new) && leads_elsewhere(new, old)
}

/// True if neither policy sends anybody to an empty set.
pub(crate) fn serves_all(service: &DesiredService) -> bool {
    let set = |local: u32| {
        if service.config.flags & local == 0 {
            &service.cluster
        } else {
            &service.local
        }
    };
    !set(service_flag::INTERNAL_LOCAL).is_empty() && !set(service_flag::EXTERNAL_LOCAL).is_empty()
}
