//! What the kernel should hold, by name; no ids yet.

use std::collections::BTreeMap;

use dataplane_common::abi::{FrontendKey, backend_state};
use ipnet::IpNet;

use crate::key::{BackendKey, ServiceKey};

/// Whether a backend is ready or only still serving.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub enum BackendState {
    /// Ready.
    Active,
    /// Serving and terminating: in a set only while nothing ready is.
    Terminating,
}

impl BackendState {
    /// The number in the ABI, see [`backend_state`].
    #[must_use]
    pub const fn number(self) -> u8 {
        match self {
            Self::Active => backend_state::ACTIVE,
            Self::Terminating => backend_state::TERMINATING,
        }
    }
}

/// A backend in a set.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug)]
pub struct SetBackend {
    /// Which one.
    pub backend: BackendKey,
    /// Ready or terminating, as this service's endpoint slices say.
    pub state: BackendState,
    /// True if the endpoint is on this node.
    pub local: bool,
}

/// Which sets need a Maglev table.
pub mod table {
    /// `cluster`.
    pub const CLUSTER: u8 = 1 << 0;
    /// `local`.
    pub const LOCAL: u8 = 1 << 1;
}

/// How a service chooses among its backends and between its sets.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct ServiceConfig {
    /// See [`dataplane_common::abi::algorithm`].
    pub algorithm: u32,
    /// See [`dataplane_common::abi::service_flag`].
    pub flags: u32,
    /// Idle time of client affinity in seconds; 0 is none.
    pub affinity_seconds: u32,
    /// See [`table`].
    pub tables: u8,
}

/// What kind of frontend leads to a service.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Default)]
pub struct Offer {
    /// See [`dataplane_common::abi::frontend_kind`].
    pub kind: u8,
    /// See [`dataplane_common::abi::frontend_flag`].
    pub flags: u8,
}

impl From<u8> for Offer {
    /// An offer of this kind without flags.
    fn from(kind: u8) -> Self {
        Self { kind, flags: 0 }
    }
}

/// The frontends that lead to a service, sorted. Most have one, for which a tree would cost a quarter of a kilobyte.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Frontends(Box<[(FrontendKey, Offer)]>);

impl Frontends {
    fn find(&self, frontend: &FrontendKey) -> Result<usize, usize> {
        self.0.binary_search_by(|(other, _)| other.cmp(frontend))
    }

    /// What is offered there.
    #[must_use]
    pub fn get(&self, frontend: &FrontendKey) -> Option<Offer> {
        self.find(frontend).ok().map(|at| self.0[at].1)
    }

    /// True if it leads here.
    #[must_use]
    pub fn contains_key(&self, frontend: &FrontendKey) -> bool {
        self.find(frontend).is_ok()
    }

    /// Adds or changes one.
    pub fn insert(&mut self, frontend: FrontendKey, offer: Offer) {
        match self.find(&frontend) {
            Ok(at) => self.0[at].1 = offer,
            Err(at) => {
                let mut list = std::mem::take(&mut self.0).into_vec();
                list.reserve_exact(1);
                list.insert(at, (frontend, offer));
                self.0 = list.into();
            }
        }
    }

    /// Removes one, if it is there.
    pub fn remove(&mut self, frontend: &FrontendKey) {
        if let Ok(at) = self.find(frontend) {
            let mut list = std::mem::take(&mut self.0).into_vec();
            list.remove(at);
            self.0 = list.into();
        }
    }

    /// All of them, in order.
    pub fn iter(&self) -> impl Iterator<Item = (FrontendKey, Offer)> + '_ {
        self.0.iter().copied()
    }

    /// Where the service is offered, in order.
    pub fn keys(&self) -> impl Iterator<Item = &FrontendKey> {
        self.0.iter().map(|(frontend, _)| frontend)
    }

    /// How many.
    #[must_use]
    pub const fn len(&self) -> usize {
        self.0.len()
    }

    /// True if none leads here.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl<O: Into<Offer>> FromIterator<(FrontendKey, O)> for Frontends {
    fn from_iter<I: IntoIterator<Item = (FrontendKey, O)>>(frontends: I) -> Self {
        let mut frontends = frontends.into_iter().map(|(f, offer)| (f, offer.into()));
        let Some(first) = frontends.next() else {
            return Self::default();
        };
        let Some(second) = frontends.next() else {
            return Self(Box::new([first]));
        };
        let mut list: Box<[_]> = [first, second].into_iter().chain(frontends).collect();
        list.sort_unstable();
        Self(list)
    }
}

impl<O: Into<Offer>, const N: usize> From<[(FrontendKey, O); N]> for Frontends {
    fn from(frontends: [(FrontendKey, O); N]) -> Self {
        frontends.into_iter().collect()
    }
}

/// Everything that a service should be in the kernel.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct DesiredService {
    /// Where it is offered, and as what.
    pub frontends: Frontends,
    /// Set for traffic policy `Cluster`, sorted by backend, without duplicates.
    pub cluster: Vec<SetBackend>,
    /// Set for traffic policy `Local`, sorted by backend, without duplicates.
    pub local: Vec<SetBackend>,
    /// Algorithm, flags, affinity.
    pub config: ServiceConfig,
    /// Who may enter by a load-balancer address, sorted, without duplicates, all of the service's family; nobody here
    /// means everybody.
    pub source_ranges: Box<[IpNet]>,
}

/// The whole node.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Desired {
    /// By key.
    pub services: BTreeMap<ServiceKey, DesiredService>,
}
