//! The ABI between the eBPF programs and user space.
//!
//! Rules: every struct is `repr(C)` with explicit padding and a size and offset assert beside it; addresses and ports are
//! big-endian newtypes; flags are integers, never `bool`, `Option` or an enum, because the kernel hands out whatever bytes
//! are in the map. Values are aligned to 8 bytes at most.

mod addr;
mod backend;
mod counter;
mod frontend;
mod service;
mod socket;

pub use addr::{Addr, BePort};
pub use backend::{Backend, BackendStats, backend_state};
pub use counter::{COUNTERS, Counter};
pub use frontend::{FrontendKey, FrontendValue, frontend_class, frontend_kind, protocol};
pub use service::{Service, SetWord, Slot, algorithm, service_flag};
pub use socket::{SockFlow, SockOrigin, SockOriginKey, SockState};

/// Version of everything in this module. Pinned maps and links live in a directory that is named after it, so that a
/// build with another layout never reads them.
pub const ABI_VERSION: u32 = 1;

/// Id 0 is never given to a service or a backend: a zeroed map entry refers to nothing.
pub const NO_ID: u32 = 0;

/// Names of the maps, as in the object file and below the pin directory.
pub mod map_name {
    /// Hash: [`super::FrontendKey`] to [`super::FrontendValue`].
    pub const FRONTENDS: &str = "FRONTENDS";
    /// Memory-mapped array by service id: [`super::Service`].
    pub const SERVICES: &str = "SERVICES";
    /// Memory-mapped array: [`super::Slot`].
    pub const SLOTS: &str = "SLOTS";
    /// Memory-mapped array by backend id: [`super::Backend`].
    pub const BACKENDS: &str = "BACKENDS";
    /// Memory-mapped array by backend id, written by the programs: [`super::BackendStats`].
    pub const BACKEND_STATS: &str = "BACKEND_STATS";
    /// LRU hash: [`super::SockOriginKey`] to [`super::SockOrigin`].
    pub const SOCK_ORIGIN: &str = "SOCK_ORIGIN";
    /// Socket storage: [`super::SockState`].
    pub const SOCK_STATE: &str = "SOCK_STATE";
    /// Socket storage: [`super::SockFlow`].
    pub const SOCK_FLOW: &str = "SOCK_FLOW";
    /// Per-CPU array by [`super::Counter`]: `u64`.
    pub const COUNTERS: &str = "COUNTERS";
}

#[cfg(feature = "user")]
mod pod {
    use super::{
        Backend, BackendStats, FrontendKey, FrontendValue, Service, Slot, SockFlow, SockOrigin,
        SockOriginKey, SockState,
    };

    macro_rules! pod {
        ($($type:ty),*) => {
            // SAFETY: each is Copy, 'static and repr(C) or repr(transparent) over integers, with its padding spelled out.
            $(unsafe impl aya::Pod for $type {})*
        };
    }
    pod!(
        Backend,
        BackendStats,
        FrontendKey,
        FrontendValue,
        Service,
        Slot,
        SockFlow,
        SockOrigin,
        SockOriginKey,
        SockState
    );
}
