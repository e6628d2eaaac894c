//! Giving new connections to someone else, while those that run go on.

use std::collections::BTreeSet;
use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use aya::maps::{HashMap, Map, MapData};
use dataplane_common::abi::{ABI_VERSION, FrontendKey, FrontendValue, frontend_class, map_name};

use super::{KernelError, open_map, pins};

/// Programs that decide where a new connection or a datagram goes.
const DECIDE: [&str; 4] = ["sock_connect4", "sock_connect6", "sock_sendmsg4", "sock_sendmsg6"];

fn pin_dir(bpffs_root: &Path) -> PathBuf {
    bpffs_root.join(format!("v{ABI_VERSION}"))
}

/// The families of the services that are served, by their own addresses: true for IPv6.
///
/// # Errors
///
/// If a map is there and cannot be read.
pub fn served_families(bpffs_root: &Path) -> Result<BTreeSet<bool>, KernelError> {
    let pin_dir = pin_dir(bpffs_root);
    if !pins::map_path(&pin_dir, map_name::FRONTENDS).exists() {
        return Ok(BTreeSet::new());
    }
    let fail = |source| KernelError::Map {
        map: map_name::FRONTENDS.into(),
        source,
    };
    let frontends = Map::HashMap(open_map(&pin_dir, map_name::FRONTENDS)?);
    let frontends: HashMap<MapData, FrontendKey, FrontendValue> = frontends.try_into().map_err(fail)?;
    let mut families = BTreeSet::new();
    for key in frontends.keys() {
        let key = key.map_err(fail)?;
        if key.class == frontend_class::ADDRESS {
            families.insert(key.addr.to_ip().is_ipv6());
        }
    }
    Ok(families)
}

/// Detaches the programs that decide on new connections. Those that show an earlier decision to its socket stay. Gives
/// what was removed.
///
/// # Errors
///
/// If a link cannot be removed.
pub fn stop_new_connections(bpffs_root: &Path) -> Result<Vec<String>, KernelError> {
    let mut removed = Vec::new();
    for name in DECIDE {
        let path = pins::link_path(&pin_dir(bpffs_root), name);
        match fs::remove_file(&path) {
            Ok(()) => removed.push(path.display().to_string()),
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            Err(source) => {
                return Err(KernelError::Io {
                    operation: "remove",
                    path,
                    source,
                });
            }
        }
    }
    Ok(removed)
}
