//! What the socket programs remember of connected sockets.

use std::mem::offset_of;
use std::path::Path;
use std::sync::atomic::Ordering;

use dataplane_common::abi::{Backend, BackendStats, NO_ID, SockState, map_name, protocol};

use super::arrays::MappedArray;
use super::transfer::{RawMap, read};
use super::{KernelError, pins};

const VALUE: usize = size_of::<SockState>();

/// Where connected sockets were sent to.
#[derive(Debug)]
pub struct Translations {
    sockets: RawMap,
    backends: MappedArray<Backend>,
    stats: MappedArray<BackendStats>,
}

impl Translations {
    pub(super) fn open(pin_dir: &Path) -> Result<Self, KernelError> {
        Ok(Self {
            sockets: RawMap::open(&pins::map_path(pin_dir, map_name::SOCK_CONN))?,
            backends: MappedArray::open(pin_dir, map_name::BACKENDS)?,
            stats: MappedArray::open(pin_dir, map_name::BACKEND_STATS)?,
        })
    }

    /// That of a socket, by its cookie (`SO_COOKIE`).
    #[must_use]
    pub fn get(&self, cookie: u64) -> Option<SockState> {
        let mut value = [0; VALUE];
        let found = self.sockets.get(&cookie.to_ne_bytes(), &mut value).ok()?;
        read::<SockState, VALUE>(&value).filter(|_| found)
    }

    /// Shows every socket that is remembered to `visit`, by its cookie, and gives how many there were. What changes meanwhile
    /// may be shown or not, or twice.
    ///
    /// # Errors
    ///
    /// If the kernel refuses.
    pub fn visit(&self, mut visit: impl FnMut(u64, &SockState)) -> Result<usize, KernelError> {
        self.sockets.visit(&mut |key, value| {
            if let (Some(key), Some(state)) = (key.first_chunk(), read::<SockState, VALUE>(value)) {
                visit(u64::from_ne_bytes(*key), &state);
            }
        })
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
        if !self.sockets.remove(&cookie.to_ne_bytes()).unwrap_or(false) {
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
