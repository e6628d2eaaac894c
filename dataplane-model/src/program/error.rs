//! Why a service could not be programmed.

use std::sync::Arc;

use dataplane_common::abi::FrontendKey;

use super::maps::MapError;
use crate::key::{BackendKey, ServiceKey};

/// Why a service could not be programmed. Its old set stays in force.
#[derive(Debug, thiserror::Error)]
pub enum ProgramError {
    /// A map is too small.
    #[error("{map} is too small: {needed} more needed, {free} of {max} free")]
    Full {
        /// Name of the map.
        map: &'static str,
        /// Entries asked for.
        needed: u32,
        /// Entries free; they may be in pieces, or resting.
        free: u32,
        /// Size of the map.
        max: u32,
    },
    /// A backend that the service needs could not be programmed.
    #[error("backend {backend}: {source}")]
    Backend {
        /// Which.
        backend: BackendKey,
        /// Why; several services may need it.
        source: Arc<ProgramError>,
    },
    /// The service is to lose a frontend to another that could not be programmed yet: it serves until then.
    #[error("frontend {}:{} is kept until {by} can be programmed", frontend.addr, frontend.port)]
    Kept {
        /// Which.
        frontend: FrontendKey,
        /// Who is to have it.
        by: Box<ServiceKey>,
    },
    /// A write failed.
    #[error(transparent)]
    Map(#[from] MapError),
}

impl ProgramError {
    /// Name of the map.
    #[must_use]
    pub fn map(&self) -> &'static str {
        match self {
            Self::Full { map, .. } => map,
            Self::Backend { source, .. } => source.map(),
            Self::Kept { .. } => dataplane_common::abi::map_name::FRONTENDS,
            Self::Map(error) => error.map(),
        }
    }

    /// True if a map has no room: waiting does not help.
    #[must_use]
    pub fn is_full(&self) -> bool {
        match self {
            Self::Full { .. } | Self::Map(MapError::Full { .. }) => true,
            Self::Backend { source, .. } => source.is_full(),
            Self::Kept { .. } | Self::Map(_) => false,
        }
    }
}
