//! Who has a frontend when several services want it.
//!
//! A ClusterIP is never lost to what anybody may write into a Service (external IPs) or a controller into its status; among
//! equals the older Service has it, then the first by name: order of arrival does not matter.

use std::cmp::Ordering;
use std::net::{Ipv4Addr, Ipv6Addr};

use dataplane_common::abi::{Addr, BePort, FrontendKey, frontend_class, frontend_kind};
use hashbrown::HashMap;

use super::entries::{Entries, Entry};
use super::{FAMILIES, Model};
use crate::key::Family;
use crate::object::{Problem, ServiceObject, family_index};

/// A port of an entry in a family, and as what it wants the frontend.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Claim {
    pub(super) entry: u32,
    pub(super) port: u16,
    pub(super) family: Family,
    pub(super) kind: u8,
}

/// All claims.
#[derive(Debug, Default)]
pub(super) struct Claims {
    /// Who has it.
    won: HashMap<FrontendKey, Claim>,
    /// Who else wants it. Nearly always nobody.
    lost: HashMap<FrontendKey, Vec<Claim>>,
}

impl Claims {
    /// Makes room for more.
    pub(super) fn reserve(&mut self, more: usize) {
        self.won.reserve(more);
    }

    /// Who has a frontend.
    pub(super) fn winner(&self, frontend: &FrontendKey) -> Option<Claim> {
        self.won.get(frontend).copied()
    }
}

/// Low ones go first.
const fn rank(kind: u8) -> u8 {
    match kind {
        frontend_kind::CLUSTER_IP => 0,
        frontend_kind::LOAD_BALANCER => 1,
        frontend_kind::EXTERNAL_IP => 2,
        frontend_kind::NODE_PORT => 3,
        _ => 4,
    }
}

fn order(entries: &Entries, a: Claim, b: Claim) -> Ordering {
    let of = |claim: Claim| {
        let entry = entries.get(claim.entry)?;
        let service = entry.service.as_deref()?;
        let port = service.ports.get(usize::from(claim.port))?;
        Some((service.created, &entry.name, &port.name, port.protocol))
    };
    rank(a.kind).cmp(&rank(b.kind)).then_with(|| of(a).cmp(&of(b)))
}

/// Every frontend that a port wants in a family. The same may come twice, as two kinds.
pub(super) fn wanted(
    service: &ServiceObject,
    number: usize,
    family: Family,
) -> impl Iterator<Item = (FrontendKey, u8)> + '_ {
    let host = service.host(number);
    let port = service.ports.get(number);
    let at = move |addr: Addr, number: BePort, class: u8| FrontendKey {
        addr,
        port: number,
        protocol: port.map_or(0, |p| p.protocol.number()),
        class,
    };
    let on_all = move |number: BePort| at(unspecified(family), number, frontend_class::NODE_PORT);

    let hosted = host.zip(port).map(|(host, port)| match host.ip {
        Some(ip) => at(ip, port.port, frontend_class::ADDRESS),
        None => on_all(port.port),
    });
    let own = port.filter(|_| host.is_none());
    let cluster_ip = own
        .and_then(|port| Some((service.cluster_ip[family_index(family)]?, port.port)))
        .map(|(ip, port)| (at(ip, port, frontend_class::ADDRESS), frontend_kind::CLUSTER_IP));
    let node_port = own
        .filter(|port| port.node_port.to_host() != 0)
        .map(|port| (on_all(port.node_port), frontend_kind::NODE_PORT));
    let external = own.zip(service.external.as_deref()).into_iter();
    let external = external.flat_map(move |(port, external)| {
        let of_family = external
            .addresses
            .iter()
            .filter(move |(addr, _)| Family::of(*addr) == family);
        of_family.map(move |(addr, kind)| (at(*addr, port.port, frontend_class::ADDRESS), *kind))
    });
    let hosted = hosted.map(|frontend| (frontend, frontend_kind::HOST_PORT));
    cluster_ip
        .into_iter()
        .chain(node_port)
        .chain(external)
        .chain(hosted)
}

/// All addresses of a family.
fn unspecified(family: Family) -> Addr {
    match family {
        Family::V4 => Ipv4Addr::UNSPECIFIED.into(),
        Family::V6 => Ipv6Addr::UNSPECIFIED.into(),
    }
}

/// Every claim of an entry.
fn claims_of(id: u32, entry: &Entry) -> Vec<(FrontendKey, Claim)> {
    let Some(service) = entry.service.as_deref() else {
        return Vec::new();
    };
    let mut out: Vec<(FrontendKey, Claim)> = Vec::with_capacity(service.ports.len());
    for family in FAMILIES {
        for (number, port) in (0..service.ports.len()).zip(0..) {
            if !service.offers(number, family) {
                continue;
            }
            let first = out.len();
            for (frontend, kind) in wanted(service, number, family) {
                let claim = Claim {
                    entry: id,
                    port,
                    family,
                    kind,
                };
                // an address can be external and of a load balancer: the stronger claim counts
                match out[first..].iter_mut().find(|(other, _)| *other == frontend) {
                    Some((_, other)) if rank(other.kind) <= rank(kind) => {}
                    Some((_, other)) => other.kind = kind,
                    None => out.push((frontend, claim)),
                }
            }
        }
    }
    out
}

impl Model {
    /// An entry wants its frontends.
    pub(super) fn claim(&mut self, id: u32, problems: &mut Vec<Problem>) {
        let Some(entry) = self.entries.get(id) else { return };
        for (frontend, claim) in claims_of(id, entry) {
            let Some(holder) = self.claims.won.insert(frontend, claim) else {
                continue;
            };
            let lost = self.claims.lost.entry(frontend).or_default();
            let wins = order(&self.entries, claim, holder).is_lt();
            lost.push(if wins { holder } else { claim });
            let winner = if wins { claim } else { holder };
            self.claims.won.insert(frontend, winner);
            if wins {
                self.entries.mark(holder.entry);
            }
            let mut losers = lost.clone();
            losers.sort_unstable_by(|a, b| order(&self.entries, *a, *b));
            problems.extend(losers.into_iter().filter_map(|loser| {
                let entry = self.entries.get(loser.entry)?;
                Some(Problem {
                    object: format!("Service {}", entry.name),
                    message: format!(
                        "{}:{} already belongs to {}",
                        frontend.addr,
                        frontend.port,
                        self.key_of(winner)?
                    ),
                })
            }));
        }
    }

    /// An entry wants its frontends no more; who wanted them, too, may have them.
    pub(super) fn withdraw(&mut self, id: u32) {
        let Some(entry) = self.entries.get(id) else { return };
        for (frontend, claim) in claims_of(id, entry) {
            let holds = self.claims.won.get(&frontend) == Some(&claim);
            let Some(lost) = self.claims.lost.get_mut(&frontend) else {
                if holds {
                    self.claims.won.remove(&frontend);
                }
                continue;
            };
            if holds {
                let first = (0..lost.len()).min_by(|a, b| order(&self.entries, lost[*a], lost[*b]));
                if let Some(heir) = first.map(|at| lost.swap_remove(at)) {
                    self.claims.won.insert(frontend, heir);
                    self.entries.mark(heir.entry);
                }
            } else {
                lost.retain(|other| *other != claim);
            }
            if lost.is_empty() {
                self.claims.lost.remove(&frontend);
            }
        }
    }

    fn key_of(&self, claim: Claim) -> Option<crate::key::ServiceKey> {
        let entry = self.entries.get(claim.entry)?;
        let port = entry.service.as_deref()?.ports.get(usize::from(claim.port))?;
        Some(entry.key(port, claim.family))
    }
}
