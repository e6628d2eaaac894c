//! From what the kernel holds to what it should hold.
//!
//! Only what is ours is removed: what is on our devices, and, where plain routes are ours, routes inside the pod network
//! that look like them.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::net::IpAddr;

use beeline_cni::mac::Mac;
use ipnet::IpNet;

use super::plan::{self, Desired, Device, UNREACHABLE_METRIC};
use super::snapshot::{FdbEntry, Link, Neighbour, Route, RouteKind, Snapshot};

/// What IPv6 routes have where nothing was said (`IP6_RT_PRIO_USER`).
const METRIC_V6: u32 = 1024;

/// A change.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Op {
    /// Removes a device, and with it all that is on it.
    DeleteLink(u32, String),
    /// Makes a VXLAN device and switches it on.
    CreateDevice(Box<Device>),
    /// Sets MTU, and on; the Ethernet address only where that is said: neighbour entries go with it even if it stays the
    /// same (`NETDEV_CHANGEADDR`), and packets are lost until they are back.
    SetDevice(u32, Box<Device>, bool),
    /// Adds an address to a device.
    AddAddress(u32, IpNet),
    /// Removes one.
    DeleteAddress(u32, IpNet),
    /// Adds or replaces.
    SetNeighbour(u32, IpAddr, Mac),
    /// Removes.
    DeleteNeighbour(u32, IpAddr),
    /// Adds or replaces.
    SetFdb(u32, Mac, IpAddr),
    /// Removes one.
    DeleteFdb(u32, Mac, Option<IpAddr>),
    /// Lets a device answer for an address.
    SetProxy(u32, IpAddr),
    /// No longer.
    DeleteProxy(u32, IpAddr),
    /// Adds or replaces.
    SetRoute(Box<Route>),
    /// Removes.
    DeleteRoute(Box<Route>),
}

/// Changes in steps: those of one step do not depend on each other.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Changes {
    /// In order.
    pub steps: Vec<Vec<Op>>,
}

impl Changes {
    /// How many there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.steps.iter().map(Vec::len).sum()
    }

    /// Whether nothing is to be done.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// Devices: what must be done before entries on them can be.
#[must_use]
pub fn devices(kernel: &Snapshot, desired: &Desired) -> Changes {
    let mut deletions = Vec::new();
    let mut changes = Vec::new();
    let wanted: BTreeMap<&str, &Device> = desired
        .devices
        .iter()
        .map(|device| (device.name.as_str(), device))
        .collect();
    for link in &kernel.links {
        match wanted.get(link.name.as_str()) {
            Some(device) if is_right(link, device) => {}
            Some(device) if link.vxlan == Some(device.params) => {
                let other_mac = link.mac != Some(device.mac);
                changes.push(Op::SetDevice(link.index, Box::new((*device).clone()), other_mac));
            }
            Some(device) => {
                deletions.push(Op::DeleteLink(link.index, link.name.clone()));
                changes.push(Op::CreateDevice(Box::new((*device).clone())));
            }
            None if link.vxlan.is_some() && plan::is_device(&link.name) => {
                deletions.push(Op::DeleteLink(link.index, link.name.clone()));
            }
            None => {}
        }
    }
    for device in &desired.devices {
        if kernel.link(&device.name).is_none() {
            changes.push(Op::CreateDevice(Box::new(device.clone())));
        }
    }
    Changes {
        steps: vec![deletions, changes],
    }
}

fn is_right(link: &Link, device: &Device) -> bool {
    let same = link.mac == Some(device.mac) && link.mtu == device.mtu && link.up;
    same && link.vxlan == Some(device.params)
}

/// Addresses, neighbours, forwarding entries and routes. A device that is not there has none. `sweep`: whether all nodes
/// are known, so that what no node explains is stale.
#[must_use]
pub fn entries(kernel: &Snapshot, desired: &Desired, sweep: bool) -> Changes {
    let mut addresses = Vec::new();
    let mut neighbours = Vec::new();
    let mut fdb = Vec::new();
    let mut stale = Vec::new();
    let mut routes = Wanted::default();
    let mut owned = Vec::new();
    for device in &desired.devices {
        let Some(link) = kernel.link(&device.name) else {
            continue;
        };
        owned.push((link.index, device.network));
        diff_addresses(kernel, link, device, &mut addresses);
        let v4 = device.network.addr().is_ipv4();
        let tunnels = || {
            desired
                .tunnels
                .iter()
                .filter(move |(subnet, _)| subnet.addr().is_ipv4() == v4)
        };
        let wanted = tunnels()
            .map(|(subnet, tunnel)| (subnet.network(), tunnel.vtep))
            .collect();
        diff_neighbours(
            &kernel.neighbours,
            link,
            &wanted,
            sweep,
            &mut neighbours,
            &mut stale,
        );
        let wanted = tunnels()
            .map(|(_, tunnel)| (tunnel.vtep, tunnel.public))
            .collect();
        diff_fdb(&kernel.fdb, link, device, &wanted, sweep, (&mut fdb, &mut stale));
        for (subnet, _) in tunnels() {
            routes.add(Route {
                dst: *subnet,
                gateway: Some(subnet.network()),
                link: Some(link.index),
                metric: if v4 { 0 } else { METRIC_V6 },
                boot: true,
                onlink: true,
                kind: RouteKind::Unicast,
            });
        }
    }
    for (subnet, gateway) in &desired.direct {
        routes.add(Route {
            dst: *subnet,
            gateway: Some(*gateway),
            link: Some(desired.uplink),
            metric: if subnet.addr().is_ipv4() { 0 } else { METRIC_V6 },
            boot: true,
            onlink: false,
            kind: RouteKind::Unicast,
        });
    }
    for subnet in &desired.unreachable {
        routes.add(Route {
            dst: *subnet,
            gateway: None,
            link: None,
            metric: UNREACHABLE_METRIC,
            boot: true,
            onlink: false,
            kind: RouteKind::Unreachable,
        });
    }
    let (set, delete) = routes.diff(&kernel.routes, desired, &owned, sweep);
    // Packets must not find a route before what it rests on, nor rest on what a route still needs.
    Changes {
        steps: vec![addresses, neighbours, fdb, set, delete, stale],
    }
}

fn diff_addresses(kernel: &Snapshot, link: &Link, device: &Device, ops: &mut Vec<Op>) {
    let mut found = false;
    for address in kernel
        .addresses
        .iter()
        .filter(|address| address.link == link.index)
    {
        if address.net.addr().is_ipv4() != device.network.addr().is_ipv4() {
            continue;
        }
        if address.net == device.address {
            found = true;
        } else if device.network.contains(&address.net.addr()) {
            ops.push(Op::DeleteAddress(link.index, address.net));
        }
    }
    if !found {
        ops.push(Op::AddAddress(link.index, device.address));
    }
}

fn diff_neighbours(
    kernel: &[Neighbour],
    link: &Link,
    wanted: &BTreeMap<IpAddr, Mac>,
    sweep: bool,
    set: &mut Vec<Op>,
    stale: &mut Vec<Op>,
) {
    let mut right = BTreeSet::new();
    for entry in kernel.iter().filter(|entry| entry.link == link.index) {
        match wanted.get(&entry.address) {
            Some(mac) if entry.permanent && entry.mac == Some(*mac) => {
                right.insert(entry.address);
            }
            Some(_) => {}
            // the kernel makes others itself, of packets that nobody has an answer for: they go by themselves
            None if entry.permanent && sweep => stale.push(Op::DeleteNeighbour(link.index, entry.address)),
            None => {}
        }
    }
    let missing = wanted.iter().filter(|(address, _)| !right.contains(*address));
    set.extend(missing.map(|(address, mac)| Op::SetNeighbour(link.index, *address, *mac)));
}

fn diff_fdb(
    kernel: &[FdbEntry],
    link: &Link,
    device: &Device,
    wanted: &HashMap<Mac, IpAddr>,
    sweep: bool,
    (set, stale): (&mut Vec<Op>, &mut Vec<Op>),
) {
    let mut right = BTreeSet::new();
    for entry in kernel.iter().filter(|entry| entry.link == link.index) {
        match wanted.get(&entry.mac) {
            Some(dst) if entry.permanent && entry.dst == Some(*dst) => {
                right.insert(entry.mac);
            }
            // a second destination, or another: packets must not go there meanwhile
            Some(_) => set.push(Op::DeleteFdb(link.index, entry.mac, entry.dst)),
            None if !sweep || (device.params.learning && !entry.permanent) => {}
            None => stale.push(Op::DeleteFdb(link.index, entry.mac, entry.dst)),
        }
    }
    let missing = wanted.iter().filter(|(mac, _)| !right.contains(*mac));
    set.extend(missing.map(|(mac, dst)| Op::SetFdb(link.index, *mac, *dst)));
}

#[derive(Default)]
struct Wanted(BTreeMap<(IpNet, u32), Route>);

impl Wanted {
    fn add(&mut self, route: Route) {
        self.0.insert((route.dst, route.metric), route);
    }

    fn diff(
        self,
        kernel: &[Route],
        desired: &Desired,
        owned: &[(u32, IpNet)],
        sweep: bool,
    ) -> (Vec<Op>, Vec<Op>) {
        let mut missing = self.0.clone();
        let mut delete = Vec::new();
        for route in kernel {
            match self.0.get(&(route.dst, route.metric)) {
                Some(wanted) if same(wanted, route) => {
                    missing.remove(&(route.dst, route.metric));
                }
                // in IPv6 a route of another device stands beside ours
                Some(wanted) if route.dst.addr().is_ipv6() && route.boot && route.link != wanted.link => {
                    delete.push(Op::DeleteRoute(Box::new(route.clone())));
                }
                Some(_) => {}
                None if sweep && is_stale(route, desired, owned) => {
                    delete.push(Op::DeleteRoute(Box::new(route.clone())));
                }
                None => {}
            }
        }
        let set = missing
            .into_values()
            .map(|route| Op::SetRoute(Box::new(route)))
            .collect();
        (set, delete)
    }
}

fn same(wanted: &Route, found: &Route) -> bool {
    // IPv6 shows unreachable routes on a device, lo
    let link = wanted.link == found.link || wanted.kind == RouteKind::Unreachable;
    link && wanted.gateway == found.gateway && wanted.kind == found.kind && wanted.onlink == found.onlink
}

fn is_stale(route: &Route, desired: &Desired, owned: &[(u32, IpNet)]) -> bool {
    if !route.boot {
        return false;
    }
    let on_ours = owned
        .iter()
        .any(|(link, network)| route.link == Some(*link) && network.contains(&route.dst));
    let direct = route.kind == RouteKind::Unicast
        && route.gateway.is_some()
        && route.metric == (if route.dst.addr().is_ipv4() { 0 } else { METRIC_V6 })
        && desired
            .direct_networks
            .iter()
            .any(|network| network.contains(&route.dst) && *network != route.dst);
    let unreachable = route.kind == RouteKind::Unreachable && route.metric == UNREACHABLE_METRIC;
    on_ours || direct || unreachable
}

#[cfg(test)]
#[path = "diff_tests.rs"]
mod tests;
