//! Pods of an earlier plugin, on a bridge with the whole podCIDR (flannel's `cni0`): they take our pods of this node to be on
//! their link and ask the link for them. The bridge answers in their place: for IPv4 by proxy ARP, which follows the
//! routes, for IPv6 by an entry for each of our pods.

use std::collections::BTreeSet;
use std::io;
use std::net::IpAddr;

use ipnet::IpNet;

use super::diff::Op;
use super::plan;
use super::snapshot::{Link, RouteKind, Snapshot};
use super::sysctl;

/// A device that has a podCIDR of this node on its link, and that range.
pub(super) fn find<'a>(kernel: &'a Snapshot, subnets: &[IpNet]) -> Vec<(&'a Link, IpNet)> {
    let mut found = Vec::new();
    for address in &kernel.addresses {
        let net = address.net;
        let in_range = subnets.iter().any(|subnet| subnet.contains(&net.addr()));
        if !in_range || net.prefix_len() == net.max_prefix_len() {
            continue;
        }
        let link = kernel.links.iter().find(|link| link.index == address.link);
        found.extend(
            link.filter(|link| !plan::is_device(&link.name))
                .map(|link| (link, net.trunc())),
        );
    }
    found
}

/// Lets bridges answer for IPv4 pods, and IPv6 ones for what [`proxies`] says.
pub(super) fn answer(bridges: &[(&Link, IpNet)]) -> io::Result<()> {
    for (link, net) in bridges {
        let name = &link.name;
        if net.addr().is_ipv4() {
            sysctl::set(&format!("ipv4/conf/{name}/proxy_arp"), "1")?;
            // it would answer up to 0.8 s late
            sysctl::set(&format!("ipv4/neigh/{name}/proxy_delay"), "0")?;
        } else {
            sysctl::set(&format!("ipv6/conf/{name}/proxy_ndp"), "1")?;
            sysctl::set(&format!("ipv6/neigh/{name}/proxy_delay"), "0")?;
        }
    }
    Ok(())
}

/// IPv6 entries that are missing, and those of pods that are gone.
pub(super) fn proxies(kernel: &Snapshot, bridges: &[(&Link, IpNet)]) -> Vec<Op> {
    let mut ops = Vec::new();
    for (link, net) in bridges.iter().filter(|(_, net)| net.addr().is_ipv6()) {
        let elsewhere = |index: Option<u32>| index.is_some_and(|index| index != link.index);
        let pods: BTreeSet<IpAddr> = kernel
            .routes
            .iter()
            .filter(|route| {
                route.kind == RouteKind::Unicast && route.gateway.is_none() && elsewhere(route.link)
            })
            .filter(|route| route.dst.prefix_len() == 128 && net.contains(&route.dst))
            .map(|route| route.dst.addr())
            .collect();
        let held: BTreeSet<IpAddr> = kernel
            .proxies
            .iter()
            .filter(|(index, ip)| *index == link.index && net.contains(ip))
            .map(|(_, ip)| *ip)
            .collect();
        ops.extend(pods.difference(&held).map(|ip| Op::SetProxy(link.index, *ip)));
        ops.extend(held.difference(&pods).map(|ip| Op::DeleteProxy(link.index, *ip)));
    }
    ops
}

#[cfg(test)]
mod tests {
    use super::super::snapshot::{Address, Route};
    use super::*;

    fn link(index: u32, name: &str) -> Link {
        Link {
            index,
            name: name.into(),
            mtu: 1450,
            mac: None,
            up: true,
            vxlan: None,
        }
    }

    fn address(link: u32, net: &str) -> Address {
        Address {
            link,
            net: net.parse().unwrap(),
            global: true,
            permanent: true,
            unsteady: false,
        }
    }

    fn pod(dst: &str, link: u32) -> Route {
        Route {
            dst: dst.parse().unwrap(),
            gateway: None,
            link: Some(link),
            metric: 1024,
            boot: true,
            onlink: false,
            kind: RouteKind::Unicast,
        }
    }

    #[test]
    fn a_bridge_answers_for_our_pods_and_no_longer_for_those_that_went() {
        let subnets: Vec<IpNet> = ["10.244.1.0/24", "fd00:1::/64"]
            .map(|s| s.parse().unwrap())
            .into();
        let kernel = Snapshot {
            links: vec![
                link(1, "flannel.1"),
                link(2, "cni0"),
                link(3, "bee0"),
                link(4, "eth0"),
            ],
            addresses: vec![
                address(1, "10.244.1.0/32"),
                address(2, "10.244.1.1/24"),
                address(2, "fd00:1::1/64"),
                address(4, "192.168.0.1/24"),
            ],
            routes: vec![
                pod("fd00:1::7/128", 3),
                pod("fd00:1::8/128", 2),
                pod("fd00:2::7/128", 3),
                pod("10.244.1.7/32", 3),
            ],
            proxies: vec![
                (2, "fd00:1::9".parse().unwrap()),
                (4, "fd00:1::9".parse().unwrap()),
                (2, "fd00:9::9".parse().unwrap()),
            ],
            ..Snapshot::default()
        };
        let bridges = find(&kernel, &subnets);
        let names: Vec<String> = bridges
            .iter()
            .map(|(link, net)| format!("{} {net}", link.name))
            .collect();
        assert_eq!(names, ["cni0 10.244.1.0/24", "cni0 fd00:1::/64"]);
        assert_eq!(
            proxies(&kernel, &bridges),
            [
                Op::SetProxy(2, "fd00:1::7".parse().unwrap()),
                Op::DeleteProxy(2, "fd00:1::9".parse().unwrap()),
            ]
        );
    }
}
