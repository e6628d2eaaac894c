//! Which devices are served, and with which addresses. Pure.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use dataplane_common::abi::{Addr, BePort, Device, device_flag};
use ipnet::IpNet;

use crate::cni::store::is_device as is_own_device;
use crate::proxyconfig::KubeProxyConfiguration;

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

/// How pods of this node are told from others (detectLocalMode, spec kube-proxy 2.1). The devices of our own CNI plugin are
/// pods' in any case.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum DetectLocal {
    /// By their source address (ClusterCIDR, NodeCIDR). Their devices are those that lead to an address of these ranges, or
    /// of the Node's.
    Ranges(Vec<IpNet>),
    /// By the bridge with this name, a port of which is their device. It is at the ports that they are served: what pods of
    /// one bridge send each other does not pass the bridge's own device.
    Bridge(String),
    /// By the begin of their device's name, or of the name of the bridge that it is a port of.
    Prefix(String),
}

impl DetectLocal {
    /// As kube-proxy's configuration says it.
    #[must_use]
    pub fn new(proxy: &KubeProxyConfiguration) -> Self {
        match proxy.detect_local_mode.as_str() {
            "BridgeInterface" => Self::Bridge(proxy.detect_local.bridge_interface.clone()),
            "InterfaceNamePrefix" => Self::Prefix(proxy.detect_local.interface_name_prefix.clone()),
            "NodeCIDR" => Self::Ranges(Vec::new()),
            _ => Self::Ranges(proxy.cluster_cidrs()),
        }
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
    /// The bridge (or bond) that it is a port of.
    pub(super) bridge: Option<u32>,
    /// Its other end is in another network namespace.
    pub(super) away: bool,
    /// VXLAN: the UDP port at which it takes packets; 0 for other kinds.
    pub(super) port: u16,
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
    /// Devices with routes to single addresses, and these.
    pub(super) host_routes: Vec<(u32, IpAddr)>,
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

/// Which devices are pods', and whether that says that all that comes in by them is.
struct Pods<'a> {
    seen: &'a Seen,
    local: &'a DetectLocal,
    /// Devices that lead to an address of a pod.
    near: BTreeSet<u32>,
}

impl<'a> Pods<'a> {
    fn new(seen: &'a Seen, local: &'a DetectLocal, node_ranges: &[IpNet]) -> Self {
        let DetectLocal::Ranges(ranges) = local else {
            let near = BTreeSet::new();
            return Self { seen, local, near };
        };
        let pod = |ip: &IpAddr| ranges.iter().chain(node_ranges).any(|net| net.contains(ip));
        let addresses = seen.addresses.iter().map(|address| (address.index, address.ip));
        let near = addresses
            .chain(seen.host_routes.iter().copied())
            .filter(|(_, ip)| pod(ip))
            .map(|(index, _)| index)
            .collect();
        Self { seen, local, near }
    }

    /// Flags of the device; 0 if it is no pod's.
    fn flags(&self, index: u32, link: &Link) -> u16 {
        if matches!(&*link.kind, "bridge" | "vlan" | "bond") || TUNNELS.contains(&&*link.kind) {
            return 0;
        }
        let bridge = link.bridge.map(|bridge| (bridge, self.seen.name(bridge)));
        let is_pod = |yes: bool| if yes { device_flag::POD } else { 0 };
        if link.kind == "veth" && is_own_device(&link.name) {
            return device_flag::POD;
        }
        match self.local {
            DetectLocal::Bridge(name) => is_pod(bridge.is_some_and(|(_, bridge)| bridge == name)),
            DetectLocal::Prefix(prefix) => is_pod(
                link.name.starts_with(prefix) || bridge.is_some_and(|(_, bridge)| bridge.starts_with(prefix)),
            ),
            DetectLocal::Ranges(_) => {
                let leads_to_one = link.kind == "veth" && link.away || link.kind == "tun";
                let near = self.near.contains(&index)
                    || bridge.is_some_and(|(bridge, _)| self.near.contains(&bridge));
                if leads_to_one && near {
                    device_flag::POD | device_flag::BY_SOURCE
                } else {
                    0
                }
            }
        }
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
/// have an address are taken for one, but for those that only the host itself uses, and pods'.
pub(super) fn select(
    seen: &Seen,
    wanted: &Wanted,
    local: &DetectLocal,
    node: &[IpAddr],
    node_ranges: &[IpNet],
) -> BTreeMap<u32, Device> {
    let with_address = |index: u32, which: &dyn Fn(&LinkAddress) -> bool| {
        seen.addresses
            .iter()
            .any(|address| address.index == index && which(address))
    };
    let uplink = |index: u32| {
        seen.default_routes.contains(&index) || with_address(index, &|address| node.contains(&address.ip))
    };
    let pods = Pods::new(seen, local, node_ranges);
    let links = || seen.links.iter().filter(|(_, link)| !link.loopback);
    let known = links().any(|(index, _)| uplink(*index));
    // one that is down takes nothing
    let tunnel = links().find(|(_, link)| link.up && link.port != 0);
    let tunnel = BePort::from_host(tunnel.map_or(0, |(_, link)| link.port));
    let chosen = links().filter_map(|(index, link)| {
        let flags = if uplink(*index) {
            0
        } else {
            pods.flags(*index, link)
        };
        let leads_out = || match wanted {
            Wanted::Named(_) => wanted.names(&link.name),
            Wanted::Auto if TUNNELS.contains(&link.kind.as_str()) => link.up,
            Wanted::Auto if known => uplink(*index),
            Wanted::Auto => {
                !matches!(&*link.kind, "bridge" | "dummy") && with_address(*index, &|address| address.global)
            }
        };
        (flags != 0 || leads_out()).then_some((*index, link, flags))
    });
    chosen
        .map(|(index, link, flags)| {
            let device = Device {
                v4: seen.source(index, true, node),
                v6: seen.source(index, false, node),
                flags,
                tunnel,
                header: link.header,
            };
            (index, device)
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
            ..Link::default()
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
            host_routes: Vec::new(),
        }
    }

    fn chosen(seen: &Seen, wanted: &Wanted, node: &[&str]) -> BTreeMap<u32, Device> {
        let node: Vec<IpAddr> = node.iter().map(|ip| ip.parse().unwrap()).collect();
        select(seen, wanted, &DetectLocal::Ranges(Vec::new()), &node, &[])
    }

    fn names(seen: &Seen, wanted: &Wanted, node: &[&str]) -> Vec<String> {
        chosen(seen, wanted, node)
            .keys()
            .map(|index| seen.name(*index).into())
            .collect()
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
            let chosen = chosen(&host(), &Wanted::Auto, node);
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

    #[test]
    fn devices_know_the_port_of_the_nodes_tunnel() {
        let ports = |seen: &Seen| -> BTreeSet<u16> {
            let chosen = chosen(seen, &Wanted::Auto, &[]);
            chosen.values().map(|device| device.tunnel.to_host()).collect()
        };
        let mut seen = host();
        assert_eq!(ports(&seen), [0].into());
        seen.links.get_mut(&5).unwrap().port = 8472;
        assert_eq!(ports(&seen), [8472].into());
        seen.links.get_mut(&5).unwrap().up = false;
        assert_eq!(ports(&seen), [0].into());
    }

    /// The host, and: a bridge `cni0` with two ports, a device of our own, one of a network with a device per pod, and a
    /// virtual machine.
    fn host_with_pods() -> Seen {
        let mut seen = host();
        let link = |name: &str, kind: &str, bridge| Link {
            name: name.into(),
            kind: kind.into(),
            header: 14,
            bridge,
            away: kind == "veth",
            ..Link::default()
        };
        seen.links.extend([
            (20, link("cni0", "bridge", None)),
            (21, link("vetha", "veth", Some(20))),
            (22, link("vethb", "veth", Some(20))),
            (23, link("bl0123456789ab", "veth", None)),
            (24, link("cali1", "veth", None)),
            (25, link("tap1", "tun", None)),
            (26, link("docker1", "veth", Some(4))),
            (27, link("vx1", "vxlan", Some(20))),
        ]);
        seen.addresses.push(LinkAddress {
            index: 20,
            ip: "10.244.1.1".parse().unwrap(),
            global: true,
            preferred: true,
        });
        seen.host_routes = vec![
            (24, "10.244.1.24".parse().unwrap()),
            (25, "fd00:244::25".parse().unwrap()),
            (26, "172.17.0.2".parse().unwrap()),
        ];
        seen
    }

    #[test]
    fn pods_devices_are_those_that_detect_local_says() {
        let own = crate::cni::store::device_name(&beeline_cni::protocol::Key {
            network: "beeline".into(),
            container_id: "x".into(),
            ifname: "eth0".into(),
        });
        let mut seen = host_with_pods();
        seen.links.get_mut(&23).unwrap().name.clone_from(&own);
        let pods = |local: DetectLocal, node: &str| -> Vec<(String, u16)> {
            let ranges: Vec<IpNet> = node
                .split_terminator(',')
                .map(|net| net.parse().unwrap())
                .collect();
            let chosen = select(&seen, &Wanted::Auto, &local, &[], &ranges);
            let pods = chosen.iter().filter(|(_, device)| device.flags != 0);
            pods.map(|(index, device)| (seen.name(*index).to_owned(), device.flags))
                .collect()
        };
        let expect = |names: &[&str], flags: u16| -> Vec<(String, u16)> {
            let flags_of = |name: &str| if name == own { device_flag::POD } else { flags };
            names
                .iter()
                .map(|name| ((*name).to_owned(), flags_of(name)))
                .collect()
        };
        let by_source = device_flag::POD | device_flag::BY_SOURCE;
        let none = || DetectLocal::Ranges(Vec::new());
        assert_eq!(pods(none(), ""), expect(&[&own], by_source));
        assert_eq!(
            pods(none(), "10.244.1.0/24,fd00:244::/64"),
            expect(&["vetha", "vethb", &own, "cali1", "tap1"], by_source)
        );
        let cluster = DetectLocal::Ranges(vec!["10.244.0.0/16".parse().unwrap()]);
        assert_eq!(
            pods(cluster, ""),
            expect(&["vetha", "vethb", &own, "cali1"], by_source)
        );
        let bridge = DetectLocal::Bridge("cni0".into());
        assert_eq!(
            pods(bridge, ""),
            expect(&["vetha", "vethb", &own], device_flag::POD)
        );
        let prefix = |text: &str| DetectLocal::Prefix(text.into());
        assert_eq!(
            pods(prefix("cali"), ""),
            expect(&[&own, "cali1"], device_flag::POD)
        );
        // kube-proxy sees the bridge where a packet of a port comes in
        assert_eq!(
            pods(prefix("cni"), "10.244.1.0/24"),
            expect(&["vetha", "vethb", &own], device_flag::POD)
        );
    }

    #[test]
    fn an_uplink_is_no_pods_device() {
        let mut seen = host_with_pods();
        let eth0 = seen.links.get_mut(&2).unwrap();
        (eth0.kind, eth0.away) = ("veth".into(), true);
        let ranges = ["10.0.0.0/8".parse().unwrap()];
        let local = DetectLocal::Ranges(Vec::new());
        let chosen = select(&seen, &Wanted::Auto, &local, &[], &ranges);
        assert_eq!(chosen[&2].flags, 0);
        assert_eq!(chosen[&21].flags, device_flag::POD | device_flag::BY_SOURCE);
        // without an uplink that is known as one, a device with an address of a pod is still a pod's
        seen.default_routes.clear();
        seen.addresses.push(LinkAddress {
            index: 24,
            ..seen.addresses.last().unwrap().clone()
        });
        let chosen = select(&seen, &Wanted::Auto, &local, &[], &ranges);
        assert_ne!(chosen[&24].flags, 0);
        assert_eq!(chosen[&3].flags, 0);
    }
}
