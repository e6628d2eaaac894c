//! Which devices are served, and with which addresses. Pure.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use dataplane_common::abi::{Addr, Device};

/// Which devices to serve.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Wanted {
    /// Those through which other hosts are reached.
    Auto,
    /// Those with these names; one that ends in `*` or `+` names all that begin so.
    Named(Vec<String>),
}

impl Wanted {
    /// From the names on a command line: none means [`Wanted::Auto`].
    #[must_use]
    pub fn parse(names: &[String]) -> Self {
        if names.is_empty() {
            Self::Auto
        } else {
            Self::Named(names.to_vec())
        }
    }

    fn names(&self, device: &str) -> bool {
        let Self::Named(names) = self else { return false };
        names.iter().any(|name| match name.strip_suffix(['*', '+']) {
            Some(prefix) => device.starts_with(prefix),
            None => name == device,
        })
    }
}

/// A device.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(super) struct Link {
    pub(super) name: String,
    /// `IFLA_INFO_KIND`; empty for hardware.
    pub(super) kind: String,
    pub(super) loopback: bool,
    pub(super) up: bool,
    /// Length of the link-layer header in bytes.
    pub(super) header: u32,
}

/// An address of a device.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct LinkAddress {
    pub(super) index: u32,
    pub(super) ip: IpAddr,
    /// Reachable from beyond the link.
    pub(super) global: bool,
    /// First of its network, neither tentative nor deprecated nor temporary.
    pub(super) preferred: bool,
}

/// What the kernel says of the devices of a network namespace.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(super) struct Seen {
    pub(super) links: BTreeMap<u32, Link>,
    pub(super) addresses: Vec<LinkAddress>,
    /// Devices with a default route.
    pub(super) default_routes: BTreeSet<u32>,
}

impl Seen {
    pub(super) fn has(&self, index: u32) -> bool {
        self.links.contains_key(&index)
    }

    pub(super) fn name(&self, index: u32) -> &str {
        self.links.get(&index).map_or("", |link| &link.name)
    }

    /// The address that packets leave the device with: its own; of several the Node's, then the first. A device without
    /// one (a tunnel) borrows one of the Node's, or any.
    fn source(&self, index: u32, v4: bool, node: &[IpAddr]) -> Addr {
        let usable = || {
            self.addresses
                .iter()
                .filter(move |a| a.ip.is_ipv4() == v4 && a.global)
        };
        let rank = |address: &&LinkAddress| {
            (
                address.index != index,
                !node.contains(&address.ip),
                !address.preferred,
            )
        };
        let best = usable().min_by_key(rank);
        best.map_or_else(Addr::default, |address| address.ip.into())
    }
}

/// Kinds of devices that carry packets to other nodes inside of others.
const TUNNELS: [&str; 13] = [
    "vxlan",
    "geneve",
    "ipip",
    "sit",
    "gre",
    "gretap",
    "ip6gre",
    "ip6gretap",
    "ip6tnl",
    "vti",
    "vti6",
    "wireguard",
    "xfrm",
];

/// The devices to serve. Uplinks have a default route or an address of the Node; where there is no such device, all that
/// have an address are taken for one, but for those that only the host itself uses.
pub(super) fn select(seen: &Seen, wanted: &Wanted, node: &[IpAddr]) -> BTreeMap<u32, Device> {
    let with_address = |index: u32, which: &dyn Fn(&LinkAddress) -> bool| {
        seen.addresses
            .iter()
            .any(|address| address.index == index && which(address))
    };
    let uplink = |index: u32| {
        seen.default_routes.contains(&index) || with_address(index, &|address| node.contains(&address.ip))
    };
    let links = || seen.links.iter().filter(|(_, link)| !link.loopback);
    let known = links().any(|(index, _)| uplink(*index));
    let chosen = links().filter(|(index, link)| match wanted {
        Wanted::Named(_) => wanted.names(&link.name),
        Wanted::Auto if TUNNELS.contains(&link.kind.as_str()) => link.up,
        Wanted::Auto if known => uplink(**index),
        Wanted::Auto => {
            !matches!(&*link.kind, "bridge" | "dummy") && with_address(**index, &|address| address.global)
        }
    });
    chosen
        .map(|(index, link)| {
            let device = Device {
                v4: seen.source(*index, true, node),
                v6: seen.source(*index, false, node),
                flags: 0,
                header: link.header,
            };
            (*index, device)
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host() -> Seen {
        let link = |name: &str, kind: &str, header| Link {
            name: name.into(),
            kind: kind.into(),
            loopback: name == "lo",
            up: !name.ends_with('0') || name == "eth0",
            header,
        };
        let address = |index, ip: &str| LinkAddress {
            index,
            ip: ip.parse().unwrap(),
            global: !ip.starts_with("fe80") && !ip.starts_with("127"),
            preferred: !ip.ends_with("99"),
        };
        Seen {
            links: [
                (1, link("lo", "", 14)),
                (2, link("eth0", "", 14)),
                (3, link("eth1", "", 14)),
                (4, link("docker", "bridge", 14)),
                (5, link("flannel.1", "vxlan", 14)),
                (6, link("tunl0", "ipip", 0)),
                (7, link("wg", "wireguard", 0)),
            ]
            .into(),
            addresses: vec![
                address(1, "127.0.0.1"),
                address(2, "fe80::2"),
                address(2, "fd00::2:99"),
                address(2, "fd00::2"),
                address(2, "10.0.0.9"),
                address(2, "10.0.0.2"),
                address(3, "192.168.1.3"),
                address(4, "172.17.0.1"),
                address(5, "10.244.1.0"),
            ],
            default_routes: [2].into(),
        }
    }

    fn names(seen: &Seen, wanted: &Wanted, node: &[&str]) -> Vec<String> {
        let node: Vec<IpAddr> = node.iter().map(|ip| ip.parse().unwrap()).collect();
        let chosen = select(seen, wanted, &node);
        chosen.keys().map(|index| seen.name(*index).into()).collect()
    }

    #[test]
    fn uplinks_and_tunnels_are_served() {
        let mut seen = host();
        assert_eq!(names(&seen, &Wanted::Auto, &[]), ["eth0", "flannel.1", "wg"]);
        let both = ["eth0", "eth1", "flannel.1", "wg"];
        assert_eq!(names(&seen, &Wanted::Auto, &["192.168.1.3"]), both);
        // nothing tells which one leads to other hosts
        seen.default_routes.clear();
        assert_eq!(names(&seen, &Wanted::Auto, &[]), both);
        assert_eq!(
            names(&seen, &Wanted::Auto, &["172.17.0.1"]),
            ["docker", "flannel.1", "wg"]
        );
    }

    #[test]
    fn named_devices_are_served_and_no_others() {
        let wanted = |names: &[&str]| Wanted::parse(&names.iter().map(|n| (*n).into()).collect::<Vec<_>>());
        assert_eq!(names(&host(), &wanted(&["eth1", "lo"]), &[]), ["eth1"]);
        assert_eq!(
            names(&host(), &wanted(&["eth*", "tunl+"]), &[]),
            ["eth0", "eth1", "tunl0"]
        );
        assert_eq!(wanted(&[]), Wanted::Auto);
    }

    #[test]
    fn packets_leave_with_an_address_of_the_device() {
        let of = |node: &[&str]| {
            let node: Vec<IpAddr> = node.iter().map(|ip| ip.parse().unwrap()).collect();
            let chosen = select(&host(), &Wanted::Auto, &node);
            let text = |addr: Addr| addr.to_string();
            chosen
                .values()
                .map(|d| (text(d.v4), text(d.v6), d.header))
                .collect::<Vec<_>>()
        };
        let row = |v4: &str, v6: &str, header| (v4.to_string(), v6.to_string(), header);
        assert_eq!(
            of(&["10.0.0.2"]),
            [
                row("10.0.0.2", "fd00::2", 14),
                row("10.244.1.0", "fd00::2", 14),
                row("10.0.0.2", "fd00::2", 0)
            ]
        );
        assert_eq!(of(&[])[0], row("10.0.0.9", "fd00::2", 14));
    }
}
