//! Endpoints that serve a service no more, and where flows to them may still come from (spec kube-proxy 2.7).
//!
//! Neither traffic policies, nor topology, nor readiness have a part in this: an endpoint that is left out of every set, but
//! still serves, keeps the flows that it has.

use std::collections::{BTreeMap, BTreeSet};

use dataplane_common::abi::{Addr, FrontendKey};
use hashbrown::HashSet;

use super::Model;
use crate::key::{BackendKey, Protocol, ServiceKey};
use crate::object::{SliceObject, SlicePort, endpoint_flag};

/// Where a service is offered, and who serves it whatever the policies say.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Serving {
    /// Where it is offered, sorted. A node port has the unspecified address.
    pub frontends: Vec<FrontendKey>,
    /// Endpoints whose condition `serving` holds, sorted, without duplicates. A flow from one of the frontends to anybody
    /// else is stale, unless there is nobody here.
    pub backends: Vec<BackendKey>,
}

/// An endpoint that served a service, and does so no more.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Stale {
    /// The service. The endpoint may serve others.
    pub service: ServiceKey,
    /// The endpoint.
    pub backend: BackendKey,
    /// A slice of the service still lists it: its pod is there, but not ready to serve. Otherwise it is gone.
    pub listed: bool,
}

/// Those that may be stale, by service.
pub(super) type Suspects = BTreeMap<ServiceKey, BTreeSet<BackendKey>>;

/// Services that are gone and of which it is remembered who served them: most never come again.
const MAX_ABSENT: usize = 1000;

impl Model {
    /// Where a service is offered and who serves it; `None` if there is no service of this key.
    ///
    /// kube-proxy asks this of every UDP service after its first sync, and then of each whose endpoints changed.
    #[must_use]
    pub fn serving(&self, key: &ServiceKey) -> Option<Serving> {
        let port = self.port(key)?;
        if let Some(host) = port.service.host(port.number) {
            return Some(Serving {
                frontends: self.frontends(&port, key.family, &[]).keys().copied().collect(),
                backends: vec![host.backend],
            });
        }
        let candidates = self.candidates(port.entry, key).into_iter();
        let mut backends: Vec<BackendKey> = candidates.filter(|c| c.serving).map(|c| c.backend).collect();
        backends.sort_unstable();
        Some(Serving {
            frontends: self.frontends(&port, key.family, &[]).keys().copied().collect(),
            backends,
        })
    }

    /// The endpoints that have stopped serving since the last call, in order.
    ///
    /// As in kube-proxy those of a UDP service wait until somebody else serves it: until then a flow may as well stay where
    /// it is. Endpoints of a Service that is gone are named when it comes again, if they do not serve it then; of TCP not at
    /// all.
    pub fn take_stale(&mut self) -> Vec<Stale> {
        let mut out = Vec::new();
        let mut waiting = Suspects::new();
        let mut absent = 0;
        for (key, backends) in std::mem::take(&mut self.stale) {
            let Some(port) = self.port(&key) else {
                if key.protocol == Protocol::Udp && absent < MAX_ABSENT {
                    absent += 1;
                    waiting.insert(key, backends);
                }
                continue;
            };
            let candidates = self.candidates(port.entry, &key);
            let listed: HashSet<BackendKey> = candidates.iter().map(|c| c.backend).collect();
            let serving: HashSet<BackendKey> = candidates
                .iter()
                .filter(|c| c.serving)
                .map(|c| c.backend)
                .collect();
            if key.protocol == Protocol::Udp && serving.is_empty() {
                waiting.insert(key, backends);
                continue;
            }
            let stale = backends.into_iter().filter(|b| !serving.contains(b));
            out.extend(stale.map(|backend| Stale {
                service: key.clone(),
                backend,
                listed: listed.contains(&backend),
            }));
        }
        self.stale = waiting;
        out
    }

    /// The Service of an entry goes.
    pub(super) fn suspect_all(&mut self, id: u32) {
        let slices = self.entries.get(id).map(|entry| entry.slices.clone());
        for (_, slice) in slices.into_iter().flatten() {
            self.suspect(id, &slice, None);
        }
    }

    /// A slice of an entry becomes another, or goes.
    pub(super) fn suspect(&mut self, id: u32, old: &SliceObject, new: Option<&SliceObject>) {
        let Some(entry) = self.entries.get(id) else { return };
        let new = new.filter(|new| new.family == old.family);
        let serves: HashSet<Addr> = new
            .into_iter()
            .flat_map(|new| &new.endpoints)
            .filter(|endpoint| endpoint.is(endpoint_flag::SERVING))
            .map(|endpoint| endpoint.addr)
            .collect();
        let service = entry.service.as_deref();
        let offered = |port: &SlicePort| {
            service?.ports.iter().find_map(|offered| {
                let joined = offered.name == port.name && offered.protocol == port.protocol;
                joined.then(|| entry.key(offered, old.family))
            })
        };
        for port in &old.ports {
            let stays = new.is_some_and(|new| new.ports.contains(port));
            let mut gone = old
                .endpoints
                .iter()
                .filter(|endpoint| endpoint.is(endpoint_flag::SERVING))
                .filter(|endpoint| !stays || !serves.contains(&endpoint.addr))
                .map(|endpoint| BackendKey {
                    addr: endpoint.addr,
                    port: port.port,
                    protocol: port.protocol,
                })
                .peekable();
            if gone.peek().is_some()
                && let Some(key) = offered(port)
            {
                self.stale.entry(key).or_default().extend(gone);
            }
        }
    }
}
