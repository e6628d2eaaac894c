//! Why a service could not be programmed.

use std::sync::Arc;

use super::maps::MapError;
use crate::key::BackendKey;

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
            Self::Map(error) => error.map(),
        }
    }
}
