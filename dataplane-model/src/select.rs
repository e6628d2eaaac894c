//! Which endpoints a service uses: kube-proxy's `CategorizeEndpoints` (spec kube-proxy 1.3), as a pure function.

use crate::desired::{BackendState, SetBackend};
use crate::key::BackendKey;

/// Names that a topology hint gives, reduced to what this node needs to know.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Hint {
    /// There is none of this kind.
    #[default]
    None,
    /// There are some, but none names this node (or its zone).
    Elsewhere,
    /// One names this node (or its zone).
    Here,
}

/// An endpoint of one service port.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Candidate {
    /// Address, port, protocol.
    pub backend: BackendKey,
    /// Condition `ready`; absent means true.
    pub ready: bool,
    /// Condition `serving`; absent means true.
    pub serving: bool,
    /// Condition `terminating`; absent means false.
    pub terminating: bool,
    /// True if the endpoint's node is this one.
    pub local: bool,
    /// From `hints.forNodes`.
    pub node_hint: Hint,
    /// From `hints.forZones`; [`Hint::Elsewhere`] when this node has no zone.
    pub zone_hint: Hint,
}

impl Candidate {
    fn draining(&self) -> bool {
        self.serving && self.terminating
    }

    fn member(&self, state: BackendState) -> SetBackend {
        SetBackend {
            backend: self.backend,
            state,
            local: self.local,
        }
    }
}

/// The traffic policies of a service port.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Policy {
    /// `internalTrafficPolicy: Local`.
    pub internal_local: bool,
    /// `externalTrafficPolicy: Local`, where the service's type lets it count.
    pub external_local: bool,
    /// The port has a node port, or the service an external or load-balancer address of the family.
    pub externally_accessible: bool,
}

impl Policy {
    /// The cluster set is needed: also with `externalTrafficPolicy: Local`, for pods and processes of this node.
    #[must_use]
    pub const fn uses_cluster(&self) -> bool {
        !self.internal_local || self.externally_accessible
    }

    /// The local set is needed.
    #[must_use]
    pub const fn uses_local(&self) -> bool {
        self.internal_local || (self.external_local && self.externally_accessible)
    }
}

/// What was selected.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Selection {
    /// For traffic under policy `Cluster`.
    pub cluster: Vec<SetBackend>,
    /// For traffic under policy `Local`.
    pub local: Vec<SetBackend>,
    /// An endpoint that could serve exists somewhere: a service without local endpoints then drops instead of refusing.
    pub has_any: bool,
    policy: Policy,
    filtered: bool,
    local_fallback: bool,
}

impl Selection {
    /// Every endpoint that some traffic on this node may reach.
    #[must_use]
    pub fn reachable(&self) -> Vec<SetBackend> {
        if !self.policy.uses_local() {
            return self.cluster.clone();
        }
        if !self.policy.uses_cluster() {
            return self.local.clone();
        }
        let mut union = self.cluster.clone();
        if self.filtered || (self.local_fallback && !self.local.is_empty()) {
            let elsewhere = |l: &&SetBackend| !self.cluster.iter().any(|c| c.backend == l.backend);
            union.extend(self.local.iter().filter(elsewhere));
            union.sort_unstable();
        }
        union
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Topology {
    Off,
    SameNode,
    SameZone,
}

/// Selects from `candidates`, whose order is kept.
#[must_use]
pub fn categorize(candidates: &[Candidate], policy: Policy) -> Selection {
    let mut out = Selection {
        policy,
        ..Selection::default()
    };
    let ready = || candidates.iter().filter(|c| c.ready);
    let fallback = |wanted: &dyn Fn(&Candidate) -> bool| -> Vec<SetBackend> {
        let chosen = candidates.iter().filter(|c| c.draining() && wanted(c));
        chosen.map(|c| c.member(BackendState::Terminating)).collect()
    };
    if policy.uses_cluster() {
        let topology = topology_of(candidates);
        out.filtered = topology != Topology::Off;
        let in_topology = |c: &&Candidate| match topology {
            Topology::Off => true,
            Topology::SameNode => c.node_hint == Hint::Here,
            Topology::SameZone => c.zone_hint == Hint::Here,
        };
        out.cluster.reserve_exact(candidates.len());
        let chosen = ready().filter(in_topology);
        out.cluster.extend(chosen.map(|c| c.member(BackendState::Active)));
        if out.cluster.is_empty() {
            out.cluster = fallback(&|_| true);
        }
        out.has_any = !out.cluster.is_empty();
    }
    if policy.uses_local() {
        out.has_any |= candidates.iter().any(|c| c.ready || c.draining());
        let local = ready().filter(|c| c.local);
        out.local = local.map(|c| c.member(BackendState::Active)).collect();
        if out.local.is_empty() {
            out.local_fallback = true;
            out.local = fallback(&|c| c.local);
        }
    }
    out
}

/// Hints count only if every ready endpoint has one of the kind and at least one names this node or zone.
fn topology_of(candidates: &[Candidate]) -> Topology {
    let usable = |hint: fn(&Candidate) -> Hint| {
        let mut here = false;
        for candidate in candidates.iter().filter(|c| c.ready) {
            match hint(candidate) {
                Hint::None => return false,
                Hint::Elsewhere => {}
                Hint::Here => here = true,
            }
        }
        here
    };
    if usable(|c| c.node_hint) {
        Topology::SameNode
    } else if usable(|c| c.zone_hint) {
        Topology::SameZone
    } else {
        Topology::Off
    }
}
