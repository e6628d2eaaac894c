//! The account of what the kernel holds.

use std::collections::BTreeMap;

use dataplane_common::abi::{FrontendKey, SetWord};

use super::alloc::Range;
use super::maps::SetKind;
use crate::desired::{BackendState, ServiceConfig, SetBackend};
use crate::key::ServiceKey;

/// One of a service's sets as the kernel has it.
#[derive(Clone, Debug, Default)]
pub(super) struct AppliedSet {
    pub(super) range: Range,
    pub(super) members: Vec<(u32, SetBackend)>,
    /// Restored, but not to be trusted: rewritten at the next change.
    pub(super) unknown: bool,
}

/// The frontends that lead to a service, sorted. Most have one, for which a tree would cost a quarter of a kilobyte.
#[derive(Clone, Debug, Default)]
pub(super) struct Offers(Vec<(FrontendKey, u8)>);

impl Offers {
    pub(super) fn find(&self, frontend: &FrontendKey) -> Result<usize, usize> {
        self.0.binary_search_by(|(other, _)| other.cmp(frontend))
    }

    pub(super) fn insert(&mut self, frontend: FrontendKey, kind: u8) {
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

    pub(super) fn remove(&mut self, frontend: &FrontendKey) {
        if let Ok(at) = self.find(frontend) {
            self.0.remove(at);
        }
    }

    pub(super) fn keys(&self) -> impl Iterator<Item = &FrontendKey> {
        self.0.iter().map(|(frontend, _)| frontend)
    }

    pub(super) const fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(super) fn to_map(&self) -> BTreeMap<FrontendKey, u8> {
        self.0.iter().copied().collect()
    }
}

/// A service as the kernel has it.
#[derive(Clone, Debug)]
pub(super) struct Applied {
    /// `None` after a restart until it is claimed.
    pub(super) key: Option<ServiceKey>,
    pub(super) frontends: Offers,
    pub(super) config: ServiceConfig,
    pub(super) cluster: AppliedSet,
    pub(super) local: AppliedSet,
}

#[derive(Clone, Copy, Debug)]
pub(super) struct BackendRow {
    pub(super) id: u32,
    pub(super) state: BackendState,
    /// How many set members refer to it.
    pub(super) refs: u32,
    /// How many of them say that it is active. It is active as long as any does, in whatever order they came.
    pub(super) active: u32,
}

#[derive(Clone, Copy, Debug)]
pub(super) enum Resting {
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

pub(super) const fn word(range: Range) -> SetWord {
    SetWord::new(range.base, range.len)
}

pub(super) fn members(service: &Applied) -> impl Iterator<Item = &(u32, SetBackend)> {
    service.cluster.members.iter().chain(&service.local.members)
}

pub(super) const fn pick(service: &Applied, which: SetKind) -> &AppliedSet {
    match which {
        SetKind::Cluster | SetKind::Maglev => &service.cluster,
        SetKind::Local | SetKind::MaglevLocal => &service.local,
    }
}

pub(super) const fn pick_mut(service: &mut Applied, which: SetKind) -> &mut AppliedSet {
    match which {
        SetKind::Cluster | SetKind::Maglev => &mut service.cluster,
        SetKind::Local | SetKind::MaglevLocal => &mut service.local,
    }
}
