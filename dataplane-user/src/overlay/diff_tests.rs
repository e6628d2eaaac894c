//! What is done for a difference, and what is left alone.

use super::super::flannel::{Lease, Peer};
use super::super::netconf::NetConf;
use super::super::plan::{Here, plan};
use super::super::snapshot::Address;
use super::super::uplink::Uplink;
use super::*;

const OWN: Mac = Mac([2, 0, 0, 0, 0, 1]);

fn peer(n: u8) -> Peer {
    let v4 = Lease {
        subnet: format!("10.244.{n}.0/24").parse().unwrap(),
        public: format!("192.168.0.{n}").parse().unwrap(),
        vtep: Some(Mac([2, 0, 0, 0, 1, n])),
    };
    Peer {
        v4: Some(v4),
        v6: None,
    }
}

fn here() -> Here {
    Here {
        subnets: vec!["10.244.1.0/24".parse().unwrap()],
        macs: (OWN, OWN),
        uplink: Uplink {
            index: 2,
            name: "eth0".into(),
            mtu: 1500,
            v4: Some("192.168.0.1".parse().unwrap()),
            v6: None,
        },
    }
}

fn uplink() -> Snapshot {
    Snapshot {
        links: vec![Link {
            index: 2,
            name: "eth0".into(),
            mtu: 1500,
            mac: None,
            up: true,
            vxlan: None,
        }],
        routes: vec![Route {
            dst: "192.168.0.0/24".parse().unwrap(),
            gateway: None,
            link: Some(2),
            metric: 0,
            boot: false,
            onlink: false,
            kind: RouteKind::Unicast,
        }],
        ..Snapshot::default()
    }
}

fn desired(backend: &str, peers: &[u8], kernel: &Snapshot) -> Desired {
    let conf = NetConf::parse(&format!(
        r#"{{"Network": "10.244.0.0/16", "Backend": {backend}}}"#
    ))
    .unwrap();
    let peers = peers.iter().map(|n| (format!("n{n}"), peer(*n))).collect();
    let (desired, problems) = plan(&conf, &here(), &peers, kernel, false);
    assert_eq!(problems, BTreeMap::new());
    desired
}

/// A kernel that does what it is told.
fn apply(kernel: &mut Snapshot, changes: &Changes) {
    for op in changes.steps.iter().flatten() {
        match op {
            Op::DeleteLink(index, _) => {
                kernel.links.retain(|link| link.index != *index);
                kernel.addresses.retain(|address| address.link != *index);
                kernel.routes.retain(|route| route.link != Some(*index));
                kernel.neighbours.retain(|entry| entry.link != *index);
                kernel.fdb.retain(|entry| entry.link != *index);
            }
            Op::CreateDevice(device) => kernel.links.push(Link {
                index: kernel.links.iter().map(|link| link.index).max().unwrap_or(0) + 1,
                name: device.name.clone(),
                mtu: device.mtu,
                mac: Some(device.mac),
                up: true,
                vxlan: Some(device.params),
            }),
            Op::SetDevice(index, device, _) => {
                let link = kernel.links.iter_mut().find(|link| link.index == *index).unwrap();
                (link.mac, link.mtu, link.up) = (Some(device.mac), device.mtu, true);
            }
            Op::AddAddress(link, net) => kernel.addresses.push(Address {
                link: *link,
                net: *net,
                global: true,
                permanent: true,
                unsteady: false,
            }),
            Op::DeleteAddress(link, net) => {
                kernel
                    .addresses
                    .retain(|address| address.link != *link || address.net != *net);
            }
            Op::SetNeighbour(link, address, mac) => {
                kernel.neighbours.retain(|entry| entry.address != *address);
                let (link, address, mac) = (*link, *address, Some(*mac));
                kernel.neighbours.push(Neighbour {
                    link,
                    address,
                    mac,
                    permanent: true,
                });
            }
            Op::DeleteNeighbour(_, address) => kernel.neighbours.retain(|entry| entry.address != *address),
            Op::SetFdb(link, mac, dst) => {
                kernel.fdb.push(FdbEntry {
                    link: *link,
                    mac: *mac,
                    dst: Some(*dst),
                    permanent: true,
                });
            }
            Op::DeleteFdb(_, mac, dst) => {
                kernel.fdb.retain(|entry| entry.mac != *mac || entry.dst != *dst);
            }
            Op::SetProxy(..) | Op::DeleteProxy(..) => {
                panic!("{op} is nothing that a device or an entry needs")
            }
            Op::SetRoute(route) => {
                kernel
                    .routes
                    .retain(|old| (old.dst, old.metric) != (route.dst, route.metric));
                kernel.routes.push((**route).clone());
            }
            Op::DeleteRoute(route) => kernel.routes.retain(|old| old != &**route),
        }
    }
}

type Damage = Box<dyn Fn(&mut Snapshot)>;

fn settle(kernel: &mut Snapshot, desired: &Desired) {
    let changes = devices(kernel, desired);
    apply(kernel, &changes);
    let changes = entries(kernel, desired, true);
    apply(kernel, &changes);
    assert_eq!(
        devices(kernel, desired).len() + entries(kernel, desired, true).len(),
        0
    );
}

#[test]
fn from_nothing_to_flannels_shape_and_then_nothing_more() {
    let mut kernel = uplink();
    let desired = desired(r#"{"Type": "vxlan"}"#, &[2, 3], &kernel);
    settle(&mut kernel, &desired);
    let device = kernel.link("flannel.1").unwrap().clone();
    assert_eq!((device.mtu, device.mac), (1450, Some(OWN)));
    assert_eq!(kernel.addresses[0].net.to_string(), "10.244.1.0/32");
    assert_eq!((kernel.neighbours.len(), kernel.fdb.len()), (2, 2));
    let route = kernel
        .routes
        .iter()
        .find(|route| route.dst.to_string() == "10.244.2.0/24")
        .unwrap();
    assert_eq!(route.gateway.unwrap().to_string(), "10.244.2.0");
    assert!(route.onlink && route.link == Some(device.index));
}

#[test]
fn each_thing_that_is_changed_is_repaired_and_only_that() {
    let start = uplink();
    let desired = desired(r#"{"Type": "vxlan"}"#, &[2, 3], &start);
    let mut good = start;
    settle(&mut good, &desired);
    let index = good.link("flannel.1").unwrap().index;
    let other = Mac([2, 9, 9, 9, 9, 9]);
    let damages: Vec<(&str, Damage)> = vec![
        (
            "mac",
            Box::new(move |k| k.links.last_mut().unwrap().mac = Some(other)),
        ),
        ("mtu", Box::new(|k| k.links.last_mut().unwrap().mtu = 1500)),
        ("down", Box::new(|k| k.links.last_mut().unwrap().up = false)),
        ("route", Box::new(|k| k.routes.truncate(k.routes.len() - 1))),
        ("neighbour", Box::new(move |k| k.neighbours[0].mac = Some(other))),
        (
            "fdb dst",
            Box::new(|k| k.fdb[0].dst = Some("192.168.0.99".parse().unwrap())),
        ),
        ("fdb gone", Box::new(|k| k.fdb.clear())),
        ("address", Box::new(|k| k.addresses.clear())),
        (
            "stale fdb",
            Box::new(move |k| {
                k.fdb.push(FdbEntry {
                    link: index,
                    mac: other,
                    dst: None,
                    permanent: true,
                });
            }),
        ),
    ];
    for (name, damage) in damages {
        let mut kernel = good.clone();
        damage(&mut kernel);
        let first = devices(&kernel, &desired);
        apply(&mut kernel, &first);
        let second = entries(&kernel, &desired, true);
        assert!(
            (1..=2).contains(&(first.len() + second.len())),
            "{name}: {first:?} {second:?}"
        );
        apply(&mut kernel, &second);
        assert!(entries(&kernel, &desired, true).is_empty(), "{name}");
    }
}

#[test]
fn stale_entries_go_only_when_all_nodes_are_known_and_foreign_ones_never() {
    let mut kernel = uplink();
    let before = desired(r#"{"Type": "vxlan"}"#, &[2, 3], &kernel);
    settle(&mut kernel, &before);
    let mut cni0 = kernel.routes.last().unwrap().clone();
    (cni0.dst, cni0.link, cni0.gateway) = ("10.244.1.0/24".parse().unwrap(), Some(9), None);
    kernel.routes.push(cni0.clone());
    let mut foreign = kernel.routes.last().unwrap().clone();
    (foreign.dst, foreign.link) = ("172.30.0.0/16".parse().unwrap(), Some(2));
    kernel.routes.push(foreign.clone());
    let after = desired(r#"{"Type": "vxlan"}"#, &[2], &kernel);
    assert!(entries(&kernel, &after, false).is_empty());
    assert_eq!(entries(&kernel, &after, true).len(), 3);
    settle(&mut kernel, &after);
    assert!(kernel.routes.contains(&cni0) && kernel.routes.contains(&foreign));
    assert!(
        !kernel
            .routes
            .iter()
            .any(|route| route.dst.to_string() == "10.244.3.0/24")
    );
}

#[test]
fn another_backend_replaces_the_first_and_leaves_nothing_of_it() {
    let mut kernel = uplink();
    let vxlan = desired(r#"{"Type": "vxlan"}"#, &[2], &kernel);
    settle(&mut kernel, &vxlan);
    let direct = desired(r#"{"Type": "host-gw"}"#, &[2], &kernel);
    settle(&mut kernel, &direct);
    assert!(kernel.link("flannel.1").is_none());
    let route = kernel
        .routes
        .iter()
        .find(|route| route.dst.to_string() == "10.244.2.0/24")
        .unwrap();
    assert_eq!(
        (route.gateway.unwrap().to_string(), route.link),
        ("192.168.0.2".into(), Some(2))
    );
    let none = desired(r#"{"Type": "host-gw"}"#, &[], &kernel);
    settle(&mut kernel, &none);
    assert_eq!(kernel.routes.len(), 1, "{:?}", kernel.routes);
}

#[test]
fn a_device_with_another_port_or_address_is_made_again() {
    let mut kernel = uplink();
    let first = desired(r#"{"Type": "vxlan"}"#, &[2], &kernel);
    settle(&mut kernel, &first);
    let second = desired(r#"{"Type": "vxlan", "Port": 4789}"#, &[2], &kernel);
    settle(&mut kernel, &second);
    assert_eq!(kernel.link("flannel.1").unwrap().vxlan.unwrap().port, 4789);
}

#[test]
fn nodes_that_contradict_others_are_named_and_left_out() {
    let conf = NetConf::parse(r#"{"Network": "10.244.0.0/16"}"#).unwrap();
    let mut same_mac = peer(3);
    same_mac.v4.as_mut().unwrap().vtep = Some(Mac([2, 0, 0, 0, 1, 2]));
    let mut same_net = peer(4);
    same_net.v4.as_mut().unwrap().subnet = "10.244.2.0/25".parse().unwrap();
    let mut outside = peer(5);
    outside.v4.as_mut().unwrap().subnet = "10.1.0.0/24".parse().unwrap();
    let mut ours = peer(6);
    ours.v4.as_mut().unwrap().subnet = "10.244.1.0/24".parse().unwrap();
    let peers = [
        ("a", peer(2)),
        ("b", same_mac),
        ("c", same_net),
        ("d", outside),
        ("e", ours),
    ];
    let peers = peers
        .into_iter()
        .map(|(name, peer)| (name.to_owned(), peer))
        .collect();
    let (desired, problems) = plan(&conf, &here(), &peers, &uplink(), false);
    assert_eq!(desired.tunnels.len(), 1);
    assert_eq!(problems.keys().collect::<Vec<_>>(), ["b", "c", "d", "e"]);
    assert!(problems["b"].contains("node a") && problems["c"].contains("10.244.2.0/24"));
}

#[test]
fn direct_routing_is_for_nodes_on_the_same_link() {
    let conf = NetConf::parse(
        r#"{"Network": "10.244.0.0/16", "Backend": {"Type": "vxlan", "DirectRouting": true}}"#,
    )
    .unwrap();
    let mut far = peer(3);
    far.v4.as_mut().unwrap().public = "172.20.0.3".parse().unwrap();
    let peers = BTreeMap::from([("near".to_owned(), peer(2)), ("far".to_owned(), far)]);
    let (desired, _) = plan(&conf, &here(), &peers, &uplink(), true);
    assert_eq!(
        desired.direct.keys().map(ToString::to_string).collect::<Vec<_>>(),
        ["10.244.2.0/24"]
    );
    assert_eq!(
        desired
            .tunnels
            .keys()
            .map(ToString::to_string)
            .collect::<Vec<_>>(),
        ["10.244.3.0/24"]
    );
    assert_eq!(desired.unreachable.len(), 1);
}
