//! Reserving ports, so that the kernel gives them to no socket by itself: `net.ipv4.ip_local_reserved_ports`, which holds
//! for IPv6, too.

use std::fs;
use std::io::{Error, ErrorKind};
use std::ops::RangeInclusive;
use std::path::Path;

const SYSCTL: &str = "/proc/sys/net/ipv4/ip_local_reserved_ports";
/// In the state directory: what was reserved before.
const BEFORE: &str = "reserved-ports";

/// Reserves the ports from `range.0` to `range.1`, besides those that are reserved already.
///
/// # Errors
///
/// If the setting cannot be read or written, or the former one not be remembered.
pub(super) fn reserve(state_dir: &Path, range: (u16, u16)) -> Result<(), Error> {
    let now = fs::read_to_string(SYSCTL)?;
    let wanted = add(&parse(&now), range.0..=range.1);
    if parse(&now) == wanted {
        return Ok(());
    }
    let before = state_dir.join(BEFORE);
    if !before.exists() {
        fs::write(&before, &now)?;
    }
    fs::write(SYSCTL, format(&wanted))
}

/// Undoes what the agents of this state directory reserved; ports that others reserved since stay so. True if there was
/// anything to undo.
///
/// # Errors
///
/// If the setting cannot be written.
pub fn release(state_dir: &Path) -> Result<bool, Error> {
    let path = state_dir.join(BEFORE);
    let before = match fs::read_to_string(&path) {
        Ok(text) => parse(&text),
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(false),
        Err(error) => return Err(error),
    };
    let (first, last) = crate::agent::node::NAT_PORTS;
    let mut wanted = parse(&fs::read_to_string(SYSCTL)?);
    for port in first..=last {
        wanted[usize::from(port)] = before[usize::from(port)];
    }
    fs::write(SYSCTL, format(&wanted))?;
    fs::remove_file(&path)?;
    Ok(true)
}

type Ports = Vec<bool>;

/// Reads the kernel's own format: ports and ranges between commas.
fn parse(text: &str) -> Ports {
    let mut ports = vec![false; 1 << 16];
    for part in text.trim().split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        if let (Ok(first), Ok(last)) = (first.trim().parse::<u16>(), last.trim().parse::<u16>()) {
            (first..=last).for_each(|port| ports[usize::from(port)] = true);
        }
    }
    ports
}

fn add(ports: &Ports, range: RangeInclusive<u16>) -> Ports {
    let mut out = ports.clone();
    range.for_each(|port| out[usize::from(port)] = true);
    out
}

/// An empty list is a newline: the kernel takes nothing of an empty write.
fn format(ports: &Ports) -> String {
    let mut parts = Vec::new();
    let mut begin = None;
    for (port, set) in ports.iter().chain([&false]).enumerate() {
        match (begin, set) {
            (None, true) => begin = Some(port),
            (Some(first), false) => {
                parts.push(if first + 1 == port {
                    first.to_string()
                } else {
                    format!("{first}-{}", port - 1)
                });
                begin = None;
            }
            _ => {}
        }
    }
    parts.join(",") + "\n"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_reserved_stays_reserved() {
        let ports = parse("80,8080-8090,61005\n");
        let more = add(&ports, 61_000..=u16::MAX);
        assert_eq!(format(&more), "80,8080-8090,61000-65535\n");
        assert_eq!(format(&parse(&format(&more))), format(&more));
        assert_eq!(format(&ports), "80,8080-8090,61005\n");
        assert_eq!(format(&parse("\n")), "\n");
        assert_eq!(format(&parse("0,noise,70000,65535")), "0,65535\n");
    }
}
