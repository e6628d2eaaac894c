//! Sets of addresses and ports that iptables' rules ask (include/uapi/linux/netfilter/ipset/ip_set.h).

use std::collections::BTreeSet;
use std::io;
use std::path::Path;
use std::time::{Duration, Instant};

use super::names;
use super::netlink::{Attrs, IPSET, NLM_F_ACK, Socket, attr, attr_be16, attr_str, attrs, kind, nfgen};

const DESTROY: u8 = 3;
const LIST: u8 = 7;
const PROTOCOL: u16 = 1;
const SET_NAME: u16 = 2;
const FLAGS: u16 = 6;
const DATA: u16 = 7;
const ELEMENTS: u16 = 8;
const PORT: u16 = 4;
/// The oldest that all kernels speak.
const VERSION: u8 = 6;
/// `IPSET_FLAG_LIST_SETNAME`: names, without elements.
const NAMES_ONLY: u32 = 1 << 1;
/// `IPSET_ERR_BUSY`: a rule asks it.
const BUSY: i32 = 4100;
const AF_INET: u8 = 2;

/// Rules let go of their sets some time after they were removed; so long is waited for that.
const RELEASE: Duration = Duration::from_secs(5);
const AGAIN: Duration = Duration::from_millis(20);

/// The names of kube-proxy's sets.
pub(super) fn of_kube_proxy(socket: &mut Socket) -> io::Result<BTreeSet<String>> {
    // to ask would load the module
    if !Path::new("/sys/module/ip_set").exists() {
        return Ok(BTreeSet::new());
    }
    let filter = Attrs::new().u8(PROTOCOL, VERSION).be32(FLAGS, NAMES_ONLY);
    let found = socket.dump(IPSET, LIST, AF_INET, &filter, |message| {
        let name = attr_str(message.body, SET_NAME)?;
        names::is_set(name).then(|| name.to_owned())
    })?;
    Ok(found.into_iter().collect())
}

/// All ports that are elements of a set, or parts of some.
pub(super) fn ports(socket: &mut Socket, name: &str) -> io::Result<BTreeSet<u16>> {
    let filter = Attrs::new().u8(PROTOCOL, VERSION).string(SET_NAME, name);
    let found = socket.dump(IPSET, LIST, AF_INET, &filter, |message| {
        Some(ports_of(message.body))
    })?;
    Ok(found.into_iter().flatten().collect())
}

fn ports_of(body: &[u8]) -> Vec<u16> {
    let elements = attrs(attr(body, ELEMENTS).unwrap_or_default());
    elements
        .filter(|(kind, _)| *kind == DATA)
        .filter_map(|(_, element)| attr_be16(element, PORT))
        .collect()
}

/// Removes a set, and waits until the rules that asked it have let go.
pub(super) fn destroy(socket: &mut Socket, name: &str) -> io::Result<()> {
    let set = Attrs::new().u8(PROTOCOL, VERSION).string(SET_NAME, name);
    let begun = Instant::now();
    loop {
        match socket.ask(kind(IPSET, DESTROY), NLM_F_ACK, &nfgen(AF_INET, 0), &set) {
            Ok(_) => return Ok(()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(error) if error.raw_os_error() == Some(BUSY) => {
                if begun.elapsed() >= RELEASE {
                    return Err(io::Error::other(format!("rules still use the ipset {name}")));
                }
                std::thread::sleep(AGAIN);
            }
            Err(error) => return Err(io::Error::other(format!("remove the ipset {name}: {error}"))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::netlink::tests_bytes;
    use super::*;

    #[test]
    fn ports_are_read_from_all_kinds_of_sets() {
        let port = Attrs::new().be16(PORT, 30001);
        let pair = Attrs::new().be32(1, 0x0a00_0001).be16(PORT, 30002);
        let address = Attrs::new().be32(1, 0x0a00_0001);
        let elements = Attrs::new()
            .nested(DATA, &port)
            .nested(DATA, &pair)
            .nested(DATA, &address);
        let body = tests_bytes(Attrs::new().string(SET_NAME, "a").nested(ELEMENTS, &elements));
        assert_eq!(ports_of(&body), [30001, 30002]);
        assert!(ports_of(&[]).is_empty());
    }
}
