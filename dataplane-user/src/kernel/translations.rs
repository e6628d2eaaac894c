//! What the socket programs remember of connected sockets.

use std::mem::offset_of;
use std::path::Path;
use std::sync::atomic::Ordering;

use aya::maps::{HashMap, Map, MapData};
use dataplane_common::abi::{Backend, BackendStats, NO_ID, SockState, map_name, protocol};

use super::arrays::MappedArray;
use super::{KernelError, open_map};

/// Where connected sockets were sent to.
#[derive(Debug)]
pub struct Translations {
    sockets: HashMap<MapData, u64, SockState>,
    backends: MappedArray<Backend>,
    stats: MappedArray<BackendStats>,
}

impl Translations {
    pub(super) fn open(pin_dir: &Path) -> Result<Self, KernelError> {
        let fail = |source| KernelError::Map {
            map: map_name::SOCK_CONN.into(),
            source,
        };
        Ok(Self {
            sockets: Map::HashMap(open_map(pin_dir, map_name::SOCK_CONN)?)
                .try_into()
                .map_err(fail)?,
            backends: MappedArray::open(pin_dir, map_name::BACKENDS)?,
            stats: MappedArray::open(pin_dir, map_name::BACKEND_STATS)?,
        })
    }

    /// That of a socket, by its cookie (`SO_COOKIE`).
    #[must_use]
    pub fn get(&self, cookie: u64) -> Option<SockState> {
        self.sockets.get(&cookie, 0).ok()
    }

    /// Every socket that is remembered.
    pub fn cookies(&self) -> impl Iterator<Item = u64> + '_ {
        self.sockets.keys().filter_map(Result::ok)
    }

    /// Forgets a TCP socket and counts its connection as closed, as the programs do when it is closed. False if it is not
    /// remembered, or of another protocol: a UDP socket ends with its own storage, which the programs find in any case.
    pub fn end(&mut self, cookie: u64) -> bool {
        let Some(state) = self.get(cookie) else {
            return false;
        };
        let row = self.backends.read(state.backend);
        if row.is_some_and(|row| row.protocol == protocol::UDP) {
            return false;
        }
        // the programs may have been faster
        if self.sockets.remove(&cookie).is_err() {
            return false;
        }
        if state.backend != NO_ID
            && row.is_some_and(|row| row.generation == state.generation)
            && let Some(closed) = self
                .stats
                .word(state.backend, offset_of!(BackendStats, closed) / 8)
        {
            closed.fetch_add(1, Ordering::Relaxed);
        }
        true
    }
}
