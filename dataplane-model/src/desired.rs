//! What the kernel should hold, by name; no ids yet.

use std::collections::BTreeMap;

use dataplane_common::abi::{FrontendKey, backend_state};

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

/// How a service chooses among its backends and between its sets.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct ServiceConfig {
    /// See [`dataplane_common::abi::algorithm`].
    pub algorithm: u32,
    /// See [`dataplane_common::abi::service_flag`].
    pub flags: u32,
}

/// Everything that a service should be in the kernel.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct DesiredService {
    /// Where it is offered, and what kind of frontend that is ([`dataplane_common::abi::frontend_kind`]).
    pub frontends: BTreeMap<FrontendKey, u8>,
    /// Set for traffic policy `Cluster`, sorted by backend, without duplicates.
    pub cluster: Vec<SetBackend>,
    /// Set for traffic policy `Local`, sorted by backend, without duplicates.
    pub local: Vec<SetBackend>,
    /// Algorithm and flags.
    pub config: ServiceConfig,
    /// True if any endpoint anywhere could serve (spec kube-proxy 1.3, `hasAny`).
    pub has_any: bool,
}

/// The whole node.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Desired {
    /// By key.
    pub services: BTreeMap<ServiceKey, DesiredService>,
}
