//! Which device carries traffic to other nodes, and with which addresses (spec cni-overlay 1.2).

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use super::snapshot::{Address, Link, RouteKind, Snapshot};

/// The device that carries traffic to other nodes.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Uplink {
    /// Its index.
    pub index: u32,
    /// Its name.
    pub name: String,
    /// Bytes.
    pub mtu: u32,
    /// Its address.
    pub v4: Option<Ipv4Addr>,
    /// Its address.
    pub v6: Option<Ipv6Addr>,
}

/// What picks it, the first that is given.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Wish {
    /// Addresses that the administrator named in the Node's annotations.
    pub annotated: Vec<IpAddr>,
    /// Name or address, as `--iface`.
    pub iface: Option<String>,
    /// Addresses that the cluster knows the node by: for hosts without a default route.
    pub node_ips: Vec<IpAddr>,
    /// IPv4 is used.
    pub v4: bool,
    /// IPv6 is used.
    pub v6: bool,
}

/// Finds it; the error says what is missing.
pub fn choose(kernel: &Snapshot, wish: &Wish) -> Result<Uplink, String> {
    let link = find(kernel, wish)?;
    let of_family = |v4: bool| {
        let addresses = kernel
            .addresses
            .iter()
            .filter(|address| address.link == link.index);
        let usable = addresses.filter(|address| address.net.addr().is_ipv4() == v4 && !address.unsteady);
        let named = |address: &Address| {
            let ip = address.net.addr();
            wish.annotated.contains(&ip) || wish.iface.as_deref().is_some_and(|iface| iface == ip.to_string())
        };
        // the first among equals: where the kernel lists it first, it is the primary one
        usable
            .min_by_key(|address| (!named(address), !address.global, !address.permanent))
            .map(|address| address.net.addr())
    };
    let v4 = match of_family(true) {
        Some(IpAddr::V4(ip)) if wish.v4 => Some(ip),
        _ => None,
    };
    let v6 = match of_family(false) {
        Some(IpAddr::V6(ip)) if wish.v6 => Some(ip),
        _ => None,
    };
    for (wanted, found, family) in [(wish.v4, v4.is_some(), "IPv4"), (wish.v6, v6.is_some(), "IPv6")] {
        if wanted && !found {
            return Err(format!(
                "device {} has no {family} address for traffic between nodes",
                link.name
            ));
        }
    }
    Ok(Uplink {
        index: link.index,
        name: link.name.clone(),
        mtu: link.mtu,
        v4,
        v6,
    })
}

fn find<'a>(kernel: &'a Snapshot, wish: &Wish) -> Result<&'a Link, String> {
    let by_index = |index: u32| kernel.links.iter().find(|link| link.index == index);
    let by_address = |ip: IpAddr| {
        let address = kernel.addresses.iter().find(|address| address.net.addr() == ip)?;
        by_index(address.link)
    };
    if let Some(ip) = wish.annotated.first() {
        return by_address(*ip).ok_or_else(|| format!("no device has the node's annotated address {ip}"));
    }
    if let Some(iface) = &wish.iface {
        let link = match iface.parse() {
            Ok(ip) => by_address(ip),
            Err(_) => kernel.link(iface),
        };
        return link.ok_or_else(|| format!("no device has the name or address {iface}"));
    }
    let default = kernel
        .routes
        .iter()
        .filter(|route| route.kind == RouteKind::Unicast && route.dst.prefix_len() == 0)
        .filter(|route| route.dst.addr().is_ipv4() == wish.v4)
        .min_by_key(|route| route.metric);
    if let Some(link) = default.and_then(|route| route.link).and_then(by_index) {
        return Ok(link);
    }
    wish.node_ips
        .iter()
        .find_map(|ip| by_address(*ip))
        .ok_or_else(|| {
            "no default route, and no device has the node's address: name the device that reaches other nodes"
                .into()
        })
}

/// Whether an address is on the uplink's own link, by the main table: the longest prefix wins.
pub fn is_on_link(kernel: &Snapshot, uplink: &Uplink, ip: IpAddr) -> bool {
    kernel
        .routes
        .iter()
        .filter(|route| route.dst.contains(&ip))
        .max_by_key(|route| (route.dst.prefix_len(), std::cmp::Reverse(route.metric)))
        .is_some_and(|route| {
            route.kind == RouteKind::Unicast && route.gateway.is_none() && route.link == Some(uplink.index)
        })
}

#[cfg(test)]
mod tests {
    use super::super::snapshot::Route;
    use super::*;

    fn link(index: u32, name: &str) -> Link {
        Link {
            index,
            name: name.into(),
            mtu: 1500,
            mac: None,
            up: true,
            vxlan: None,
        }
    }

    fn address(link: u32, net: &str, global: bool, unsteady: bool) -> Address {
        Address {
            link,
            net: net.parse().unwrap(),
            global,
            permanent: true,
            unsteady,
        }
    }

    fn route(dst: &str, link: u32, gateway: Option<&str>, metric: u32) -> Route {
        Route {
            dst: dst.parse().unwrap(),
            gateway: gateway.map(|ip| ip.parse().unwrap()),
            link: Some(link),
            metric,
            boot: true,
            onlink: false,
            kind: RouteKind::Unicast,
        }
    }

    fn kernel() -> Snapshot {
        Snapshot {
            links: vec![link(1, "lo"), link(2, "eth0"), link(3, "eth1")],
            addresses: vec![
                address(2, "192.168.0.2/24", true, false),
                address(3, "172.20.0.2/16", true, false),
                address(3, "fe80::1/64", false, false),
                address(3, "fd01::1:2/64", true, true),
                address(3, "fd01::2/64", true, false),
            ],
            routes: vec![
                route("0.0.0.0/0", 2, Some("192.168.0.1"), 100),
                route("0.0.0.0/0", 3, Some("172.20.0.1"), 50),
                route("192.168.0.0/24", 2, None, 0),
                route("172.20.0.0/16", 3, None, 0),
                route("172.20.5.0/24", 3, Some("172.20.0.7"), 0),
            ],
            ..Snapshot::default()
        }
    }

    #[test]
    fn the_default_route_with_the_smallest_metric_wins_and_v6_takes_a_steady_global_address() {
        let wish = Wish {
            v4: true,
            v6: true,
            ..Wish::default()
        };
        let uplink = choose(&kernel(), &wish).unwrap();
        assert_eq!(
            (uplink.name.as_str(), uplink.v4.unwrap().to_string()),
            ("eth1", "172.20.0.2".into())
        );
        assert_eq!(uplink.v6.unwrap().to_string(), "fd01::2");
    }

    #[test]
    fn a_name_or_an_address_picks_the_device_and_annotations_win() {
        let mut wish = Wish {
            v4: true,
            iface: Some("eth0".into()),
            ..Wish::default()
        };
        assert_eq!(choose(&kernel(), &wish).unwrap().name, "eth0");
        wish.iface = Some("192.168.0.2".into());
        assert_eq!(choose(&kernel(), &wish).unwrap().name, "eth0");
        wish.annotated = vec!["172.20.0.2".parse().unwrap()];
        assert_eq!(choose(&kernel(), &wish).unwrap().name, "eth1");
        wish.annotated = vec!["1.2.3.4".parse().unwrap()];
        assert!(choose(&kernel(), &wish).unwrap_err().contains("1.2.3.4"));
    }

    #[test]
    fn without_a_default_route_the_nodes_address_picks_it_and_a_missing_family_is_told() {
        let mut kernel = kernel();
        kernel.routes.clear();
        let mut wish = Wish {
            v4: true,
            node_ips: vec!["192.168.0.2".parse().unwrap()],
            ..Wish::default()
        };
        assert_eq!(choose(&kernel, &wish).unwrap().name, "eth0");
        wish.v6 = true;
        assert!(choose(&kernel, &wish).unwrap_err().contains("no IPv6 address"));
        wish.node_ips.clear();
        assert!(choose(&kernel, &wish).unwrap_err().contains("no default route"));
    }

    #[test]
    fn what_needs_a_gateway_is_not_on_the_link() {
        let kernel = kernel();
        let uplink = choose(
            &kernel,
            &Wish {
                v4: true,
                ..Wish::default()
            },
        )
        .unwrap();
        for (ip, expected) in [
            ("172.20.1.1", true),
            ("172.20.5.1", false),
            ("192.168.0.9", false),
            ("8.8.8.8", false),
        ] {
            assert_eq!(
                is_on_link(&kernel, &uplink, ip.parse().unwrap()),
                expected,
                "{ip}"
            );
        }
    }
}
