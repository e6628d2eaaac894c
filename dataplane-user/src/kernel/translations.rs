//! What the socket programs remember of connected sockets.

use std::path::Path;

use aya::maps::{HashMap, Map, MapData};
use dataplane_common::abi::{SockState, map_name};

use super::{KernelError, open_map};

/// Where connected sockets were sent to.
#[derive(Debug)]
pub struct Translations {
    sockets: HashMap<MapData, u64, SockState>,
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
        })
    }

    /// That of a socket, by its cookie (`SO_COOKIE`).
    #[must_use]
    pub fn get(&self, cookie: u64) -> Option<SockState> {
        self.sockets.get(&cookie, 0).ok()
    }
}
