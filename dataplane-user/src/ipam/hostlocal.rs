//! The state of the host-local plugin: one file per address, named by it, with the container's id in its first line.

use std::collections::BTreeMap;
use std::io;
use std::net::IpAddr;
use std::path::Path;

/// Reads `/var/lib/cni/networks/<network>`.
#[derive(Clone, Copy, Debug)]
pub struct HostLocal;

impl HostLocal {
    /// Addresses and the ids of their containers. Files with other names (`lock`, `last_reserved_ip.0`) are left out; a
    /// directory that is not there holds nothing.
    ///
    /// # Errors
    ///
    /// When the directory or a file cannot be read.
    pub fn read(dir: &Path) -> io::Result<BTreeMap<IpAddr, String>> {
        let entries = match std::fs::read_dir(dir) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(BTreeMap::new()),
            entries => entries?,
        };
        let mut found = BTreeMap::new();
        for entry in entries {
            let entry = entry?;
            let Some(address) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else {
                continue;
            };
            match std::fs::read_to_string(entry.path()) {
                Ok(text) => {
                    found.insert(address, text.lines().next().unwrap_or_default().trim().to_owned());
                }
                // removed by host-local in this moment
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                // the address is in use, whoever has it
                Err(error) if error.kind() == io::ErrorKind::InvalidData => {
                    found.insert(address, String::new());
                }
                Err(error) => return Err(error),
            }
        }
        Ok(found)
    }
}
