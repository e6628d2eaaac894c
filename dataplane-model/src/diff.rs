//! From one desired state to another: ordered operations.

use std::collections::{BTreeMap, BTreeSet};

use dataplane_common::abi::FrontendKey;

use crate::desired::{BackendState, Desired, DesiredService, ServiceConfig, SetBackend};
use crate::key::{BackendKey, ServiceKey};

/// One step. Steps are idempotent; carrying out a list in order never leaves a service pointing at something missing.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Op {
    /// The backend's row must be there, in this state.
    PutBackend {
        /// Which.
        backend: BackendKey,
        /// Active if any service that is being changed says so.
        state: BackendState,
    },
    /// The service's sets and configuration become these; all backends in them have been put.
    SetService {
        /// Which.
        key: ServiceKey,
        /// Algorithm and flags.
        config: ServiceConfig,
        /// Set `cluster`.
        cluster: Vec<SetBackend>,
        /// Set `local`.
        local: Vec<SetBackend>,
    },
    /// The frontend leads to the service, which has been set.
    PutFrontend {
        /// Where it is offered.
        frontend: FrontendKey,
        /// See [`dataplane_common::abi::frontend_kind`].
        kind: u8,
        /// To whom it leads.
        key: ServiceKey,
    },
    /// The frontend leads to this service no more.
    DeleteFrontend {
        /// Where it was offered.
        frontend: FrontendKey,
        /// To whom it led; another service may have taken it over already.
        key: ServiceKey,
    },
    /// The service has no frontend any more and goes.
    DeleteService {
        /// Which.
        key: ServiceKey,
    },
    /// No service that is being changed uses the backend any more; it goes unless another does.
    DeleteBackend {
        /// Which.
        backend: BackendKey,
    },
}

/// The operations that turn `old` into `new`: backend rows, sets, frontends; then removal the other way round.
/// Equal states give no operation.
#[must_use]
pub fn diff(old: &Desired, new: &Desired) -> Vec<Op> {
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
) -> Vec<Op> {
    let mut before: BTreeMap<BackendKey, BackendState> = BTreeMap::new();
    let mut after: BTreeMap<BackendKey, BackendState> = BTreeMap::new();
    let (mut sets, mut put_frontends, mut delete_frontends, mut delete_services) =
        (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for (key, old, new) in pairs {
        if old == new {
            continue;
        }
        collect_backends(old, &mut before);
        collect_backends(new, &mut after);
        if let Some(new) = new {
            let same = old.is_some_and(|old| {
                (&old.cluster, &old.local, old.config) == (&new.cluster, &new.local, new.config)
            });
            if !same {
                sets.push(Op::SetService {
                    key: key.clone(),
                    config: new.config,
                    cluster: new.cluster.clone(),
                    local: new.local.clone(),
                });
            }
            for (&frontend, &kind) in &new.frontends {
                if old.and_then(|old| old.frontends.get(&frontend)) != Some(&kind) {
                    put_frontends.push(Op::PutFrontend {
                        frontend,
                        kind,
                        key: key.clone(),
                    });
                }
            }
        }
        for &frontend in old.into_iter().flat_map(|old| old.frontends.keys()) {
            if new.is_none_or(|new| !new.frontends.contains_key(&frontend)) {
                delete_frontends.push(Op::DeleteFrontend {
                    frontend,
                    key: key.clone(),
                });
            }
        }
        if new.is_none() {
            delete_services.push(Op::DeleteService { key: key.clone() });
        }
    }

    let put_backends = after
        .iter()
        .filter(|(backend, state)| before.get(backend) != Some(state));
    let gone = before.keys().filter(|backend| !after.contains_key(backend));
    let mut ops: Vec<Op> = put_backends
        .map(|(&backend, &state)| Op::PutBackend { backend, state })
        .collect();
    ops.extend(sets);
    ops.extend(put_frontends);
    ops.extend(delete_frontends);
    ops.extend(delete_services);
    ops.extend(gone.map(|&backend| Op::DeleteBackend { backend }));
    ops
}

fn collect_backends(service: Option<&DesiredService>, into: &mut BTreeMap<BackendKey, BackendState>) {
    for member in service.into_iter().flat_map(|s| s.cluster.iter().chain(&s.local)) {
        let state = into.entry(member.backend).or_insert(member.state);
        *state = (*state).min(member.state);
    }
}
