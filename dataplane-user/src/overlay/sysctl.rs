//! Kernel settings in `/proc/sys/net`, of the network namespace of the calling thread.

use std::fs;
use std::io;

/// Writes a setting if it has another value; one that this kernel lacks is left out.
pub(crate) fn set(key: &str, value: &str) -> io::Result<()> {
    let path = format!("/proc/sys/net/{key}");
    match fs::read_to_string(&path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Ok(text) if text.trim() == value => Ok(()),
        Ok(_) => fs::write(&path, value)
            .map_err(|error| io::Error::new(error.kind(), format!("write {value} to {path}: {error}"))),
        Err(error) => Err(io::Error::new(error.kind(), format!("read {path}: {error}"))),
    }
}

/// Lets this host forward packets. An uplink that gets its IPv6 default route from router advertisements goes on doing so:
/// the kernel ignores them on routers unless told otherwise.
pub(crate) fn forward(uplink: &str, v4: bool, v6: bool) -> io::Result<()> {
    if v4 {
        set("ipv4/ip_forward", "1")?;
    }
    if v6 {
        let accept = format!("ipv6/conf/{uplink}/accept_ra");
        if fs::read_to_string(format!("/proc/sys/net/{accept}")).is_ok_and(|text| text.trim() == "1") {
            set(&accept, "2")?;
        }
        set("ipv6/conf/all/forwarding", "1")?;
    }
    Ok(())
}
