//! From what is known to what should be.

use dataplane_common::abi::{algorithm, frontend_flag, frontend_kind, service_flag};
use hashbrown::HashMap;
use hashbrown::hash_map::Entry as Slot;
use ipnet::IpNet;

use super::claims::wanted;
use super::entries::Entry;
use super::{Model, node};
use crate::desired::{
    BackendState, Desired, DesiredService, Frontends, Offer, ServiceConfig, SetBackend, table,
};
use crate::key::{BackendKey, Family, ServiceKey};
use crate::object::{ServiceObject, endpoint_flag, family_index};
use crate::select::{Candidate, Hint, Policy, Selection, categorize};

/// A port of a Service.
pub(super) struct Port<'a> {
    pub(super) id: u32,
    pub(super) entry: &'a Entry,
    pub(super) service: &'a ServiceObject,
    pub(super) number: usize,
}

impl Model {
    /// What a service should be; `None` if there should be none of this key.
    #[must_use]
    pub fn desired(&self, key: &ServiceKey) -> Option<DesiredService> {
        self.desired_port(&self.port(key)?, key)
    }

    fn desired_port(&self, port: &Port<'_>, key: &ServiceKey) -> Option<DesiredService> {
        let service = port.service;
        let source_ranges = service.source_ranges(key.family);
        let frontends = self.frontends(port, key.family, &source_ranges);

        if let Some(host) = service.host(port.number) {
            return Some(DesiredService {
                frontends,
                cluster: vec![SetBackend {
                    backend: host.backend,
                    state: BackendState::Active,
                    local: true,
                }],
                config: ServiceConfig {
                    flags: service_flag::HAS_ENDPOINTS | service_flag::NO_FAILURE_DETECTION,
                    ..ServiceConfig::default()
                },
                ..DesiredService::default()
            });
        }

        let selection = self.select(port, key);
        let flag = |on: bool, bit: u32| if on { bit } else { 0 };
        let node_ip = self.node_ips[family_index(key.family)].map(node::to_net);
        let node_in_ranges = node_ip.is_some_and(|ip| source_ranges.iter().any(|net| net.contains(&ip)));
        let flags = service.flags
            | flag(selection.has_any, service_flag::HAS_ENDPOINTS)
            | flag(node_in_ranges, service_flag::NODE_IN_RANGES);
        let tables = self.tables(&frontends, service.algorithm, flags);
        Some(DesiredService {
            frontends,
            cluster: sorted(selection.cluster),
            local: sorted(selection.local),
            config: ServiceConfig {
                algorithm: service.algorithm,
                flags,
                affinity_seconds: service.affinity_seconds,
                tables,
            },
            source_ranges,
        })
    }

    /// Where a port is offered in a family, as far as no other service has it.
    pub(super) fn frontends(&self, port: &Port<'_>, family: Family, source_ranges: &[IpNet]) -> Frontends {
        let offers = wanted(port.service, port.number, family).filter_map(|(frontend, kind)| {
            let winner = self.claims.winner(&frontend)?;
            let won = (winner.entry, usize::from(winner.port), winner.family, winner.kind)
                == (port.id, port.number, family, kind);
            let ranged = kind == frontend_kind::LOAD_BALANCER && !source_ranges.is_empty();
            let flags = if ranged { frontend_flag::SOURCE_RANGES } else { 0 };
            won.then_some((frontend, Offer { kind, flags }))
        });
        offers.collect()
    }

    /// Sets that traffic chooses from by hash: by the service's algorithm, or because other hosts reach it.
    fn tables(&self, frontends: &Frontends, chosen: u32, flags: u32) -> u8 {
        let hashed = matches!(chosen, algorithm::MAGLEV | algorithm::SOURCE_HASH);
        let external = self.settings.external_maglev
            && frontends.iter().any(|(_, offer)| {
                matches!(
                    offer.kind,
                    frontend_kind::NODE_PORT | frontend_kind::EXTERNAL_IP | frontend_kind::LOAD_BALANCER
                )
            });
        let has = |flag: u32| flags & flag != 0;
        let mut out = 0;
        if hashed || (external && !has(service_flag::EXTERNAL_LOCAL)) {
            out |= table::CLUSTER;
        }
        if (hashed && has(service_flag::INTERNAL_LOCAL)) || (external && has(service_flag::EXTERNAL_LOCAL)) {
            out |= table::LOCAL;
        }
        out
    }

    /// Which endpoints a service uses (spec kube-proxy 1.3), in the order of the slices; `None` if there is no service of
    /// this key.
    #[must_use]
    pub fn selection(&self, key: &ServiceKey) -> Option<Selection> {
        Some(self.select(&self.port(key)?, key))
    }

    fn select(&self, port: &Port<'_>, key: &ServiceKey) -> Selection {
        let has_node_port = port.service.ports[port.number].node_port.to_host() != 0;
        let external = port.service.external.as_ref();
        let policy = Policy {
            internal_local: port.service.flags & service_flag::INTERNAL_LOCAL != 0,
            external_local: port.service.flags & service_flag::EXTERNAL_LOCAL != 0,
            externally_accessible: has_node_port
                || external.is_some_and(|e| e.accessible[family_index(key.family)]),
        };
        categorize(&self.candidates(port.entry, key), policy)
    }

    pub(super) fn port(&self, key: &ServiceKey) -> Option<Port<'_>> {
        let id = self.entries.find(&key.service)?;
        let entry = self.entries.get(id)?;
        let service = entry.service.as_deref()?;
        let ports = service.ports.iter();
        let (number, _) = ports.enumerate().find(|(i, p)| {
            p.name == key.port_name && p.protocol == key.protocol && service.offers(*i, key.family)
        })?;
        Some(Port {
            id,
            entry,
            service,
            number,
        })
    }

    /// What the whole node should be.
    #[must_use]
    pub fn desired_all(&self) -> Desired {
        let keys = self.entries.iter().flat_map(|(_, entry)| entry.keys());
        Desired {
            services: keys
                .filter_map(|key| Some((key.clone(), self.desired(&key)?)))
                .collect(),
        }
    }

    /// The endpoints of a service, one per backend. Of duplicates a later one replaces an earlier one unless it is
    /// terminating (spec kube-proxy 1.2).
    pub(super) fn candidates(&self, entry: &Entry, key: &ServiceKey) -> Vec<Candidate> {
        let mut out: Vec<Candidate> = Vec::new();
        let mut seen = Seen::default();
        let slices = entry.slices.iter().map(|(_, slice)| slice);
        for slice in slices.filter(|s| s.family == key.family) {
            let ports = slice
                .ports
                .iter()
                .filter(|p| p.protocol == key.protocol && p.name == key.port_name);
            for port in ports {
                out.reserve_exact(slice.endpoints.len());
                for endpoint in &slice.endpoints {
                    let zones = usize::from(endpoint.zones)
                        .checked_sub(1)
                        .and_then(|i| slice.zones.get(i));
                    let zone_hint = match (zones, &self.zone) {
                        (None, _) => Hint::None,
                        (Some(zones), Some(zone)) if zones.iter().any(|z| **z == **zone) => Hint::Here,
                        (Some(_), _) => Hint::Elsewhere,
                    };
                    let candidate = Candidate {
                        backend: BackendKey {
                            addr: endpoint.addr,
                            port: port.port,
                            protocol: key.protocol,
                        },
                        ready: endpoint.is(endpoint_flag::READY),
                        serving: endpoint.is(endpoint_flag::SERVING),
                        terminating: endpoint.is(endpoint_flag::TERMINATING),
                        local: endpoint.is(endpoint_flag::LOCAL),
                        node_hint: match (
                            endpoint.is(endpoint_flag::NODE_HINTS),
                            endpoint.is(endpoint_flag::NODE_HINT_HERE),
                        ) {
                            (false, _) => Hint::None,
                            (true, true) => Hint::Here,
                            (true, false) => Hint::Elsewhere,
                        },
                        zone_hint,
                    };
                    match seen.find_or_add(candidate.backend, &out) {
                        None => out.push(candidate),
                        Some(at) if !candidate.terminating => out[at] = candidate,
                        Some(_) => {}
                    }
                }
            }
        }
        out
    }

    /// The ranges of service addresses, sorted: what is in them and no service's is dropped (spec kube-proxy 2.3).
    #[must_use]
    pub fn service_ranges(&self) -> Vec<IpNet> {
        crate::object::range_list(self.service_cidrs.values().flatten().copied()).into_vec()
    }
}

/// Where the candidates found so far are. Most services have a handful, for which a look at each is cheaper than a table.
#[derive(Default)]
struct Seen {
    table: HashMap<BackendKey, usize>,
}

impl Seen {
    const FEW: usize = 16;

    /// Where `backend` is among `found`; if it is not, it is taken to become the next.
    fn find_or_add(&mut self, backend: BackendKey, found: &[Candidate]) -> Option<usize> {
        if found.len() < Self::FEW {
            return found.iter().position(|c| c.backend == backend);
        }
        if self.table.is_empty() {
            self.table = found.iter().enumerate().map(|(i, c)| (c.backend, i)).collect();
        }
        match self.table.entry(backend) {
            Slot::Occupied(entry) => Some(*entry.get()),
            Slot::Vacant(entry) => {
                entry.insert(found.len());
                None
            }
        }
    }
}

fn sorted(mut set: Vec<SetBackend>) -> Vec<SetBackend> {
    set.sort_unstable();
    set
}
