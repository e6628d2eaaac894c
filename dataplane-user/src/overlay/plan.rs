//! What the kernel should hold for a set of nodes (spec cni-overlay 1.6).

use std::collections::{BTreeMap, HashMap};
use std::net::IpAddr;

use beeline_cni::mac::Mac;
use ipnet::IpNet;

use super::flannel::Peer;
use super::netconf::{Backend, NetConf, Vxlan};
use super::path::{self, Way};
use super::snapshot::{Snapshot, VxlanParams};
use super::uplink::{self, Uplink};

/// What Linux takes where no port is given (drivers/net/vxlan, `vxlan_port`).
pub const DEFAULT_PORT: u16 = 8472;
/// Bytes that VXLAN adds: Ethernet 14, VXLAN 8, UDP 8, and the outer header.
const OVERHEAD: (u32, u32) = (50, 70);
/// IPv6 needs links of this many bytes (RFC 8200, 5).
const MIN_MTU_V6: u32 = 1280;
/// So low that a bridge of an earlier plugin, whose range this is, wins.
pub const UNREACHABLE_METRIC: u32 = 65_535;

/// A VXLAN device as it should be.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Device {
    /// Its name.
    pub name: String,
    /// What cannot be changed while it lives.
    pub params: VxlanParams,
    /// Peers send to this one.
    pub mac: Mac,
    /// Bytes.
    pub mtu: u32,
    /// First address of the podCIDR, alone on its prefix: the source of this host's packets to pods elsewhere.
    pub address: IpNet,
    /// The cluster's pod network of this family: other addresses and routes in it on this device are stale.
    pub network: IpNet,
}

/// A node that is reached through a VXLAN device.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Tunnel {
    /// Address of its device.
    pub vtep: Mac,
    /// Where it is.
    pub public: IpAddr,
}

/// What the kernel should hold.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Desired {
    /// At most one of each family.
    pub devices: Vec<Device>,
    /// podCIDRs reached through the device of their family.
    pub tunnels: BTreeMap<IpNet, Tunnel>,
    /// podCIDRs reached by a plain route to this address on the uplink.
    pub direct: BTreeMap<IpNet, IpAddr>,
    /// Index of the uplink.
    pub uplink: u32,
    /// The cluster's pod networks in which plain routes are ours; none if we make none.
    pub direct_networks: Vec<IpNet>,
    /// podCIDRs of this node: packets to addresses that no pod has must not leave by the default route.
    pub unreachable: Vec<IpNet>,
    /// MTU of packets to other nodes' pods, in bytes.
    pub mtu: u32,
}

/// This node.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Here {
    /// Its podCIDRs.
    pub subnets: Vec<IpNet>,
    /// Addresses of its devices, IPv4 and IPv6.
    pub macs: (Mac, Mac),
    /// What carries its packets.
    pub uplink: Uplink,
}

/// Names of the devices of a VNI, IPv4 and IPv6.
#[must_use]
pub fn names(vni: u32) -> (String, String) {
    (format!("flannel.{vni}"), format!("flannel-v6.{vni}"))
}

/// Whether a device's name is one that flannel gives.
#[must_use]
pub fn is_device(name: &str) -> bool {
    name.strip_prefix("flannel.")
        .or_else(|| name.strip_prefix("flannel-v6."))
        .is_some_and(|vni| vni.parse::<u32>().is_ok())
}

/// Plans. With it come the nodes that cannot be reached, and why. `sweep_unreachable`: whether pods of this node have
/// addresses of their own, so that the rest of its podCIDRs is nobody's.
#[must_use]
pub fn plan(
    conf: &NetConf,
    here: &Here,
    peers: &BTreeMap<String, Peer>,
    kernel: &Snapshot,
    own_range: bool,
) -> (Desired, BTreeMap<String, String>) {
    let mut desired = Desired {
        uplink: here.uplink.index,
        mtu: here.uplink.mtu,
        ..Desired::default()
    };
    if own_range {
        desired.unreachable.clone_from(&here.subnets);
    }
    let vxlan = match &conf.backend {
        Backend::Vxlan(vxlan) => {
            desired.devices = devices(conf, vxlan, here);
            desired.mtu = desired
                .devices
                .iter()
                .map(|device| device.mtu)
                .min()
                .unwrap_or(desired.mtu);
            Some(vxlan)
        }
        Backend::HostGw => None,
    };
    if vxlan.is_none_or(|vxlan| vxlan.direct_routing) {
        let networks = [conf.network_v4.map(IpNet::V4), conf.network_v6.map(IpNet::V6)];
        desired.direct_networks = networks.into_iter().flatten().collect();
    }
    let mut problems = BTreeMap::new();
    let mut taken = Taken::default();
    for (name, peer) in peers {
        let leases = [
            peer.v4
                .map(|l| (IpNet::V4(l.subnet), IpAddr::V4(l.public), l.vtep)),
            peer.v6
                .map(|l| (IpNet::V6(l.subnet), IpAddr::V6(l.public), l.vtep)),
        ];
        for (subnet, public, vtep) in leases.into_iter().flatten() {
            if let Err(problem) = add(
                &mut desired,
                &mut taken,
                conf,
                here,
                kernel,
                (name, subnet, public, vtep),
            ) {
                problems.insert(name.clone(), problem);
            }
        }
    }
    (desired, problems)
}

#[derive(Default)]
struct Taken {
    macs: HashMap<(bool, Mac), String>,
    subnets: BTreeMap<IpNet, String>,
}

fn add(
    desired: &mut Desired,
    taken: &mut Taken,
    conf: &NetConf,
    here: &Here,
    kernel: &Snapshot,
    (name, subnet, public, vtep): (&str, IpNet, IpAddr, Option<Mac>),
) -> Result<(), String> {
    let network = match subnet {
        IpNet::V4(_) => conf.network_v4.map(IpNet::V4),
        IpNet::V6(_) => conf.network_v6.map(IpNet::V6),
    };
    // a family that this cluster does not use
    let Some(network) = network else { return Ok(()) };
    if !network.contains(&subnet) {
        return Err(format!("its podCIDR {subnet} is not in {network}"));
    }
    if here.subnets.iter().any(|own| overlap(*own, subnet)) {
        return Err(format!("its podCIDR {subnet} overlaps with this node's"));
    }
    let before = taken.subnets.range(..=subnet).next_back();
    let after = taken.subnets.range(subnet..).next();
    if let Some((other, owner)) = before
        .into_iter()
        .chain(after)
        .find(|(other, _)| overlap(**other, subnet))
    {
        return Err(format!(
            "its podCIDR {subnet} overlaps with {other} of node {owner}"
        ));
    }
    let direct = match &conf.backend {
        Backend::HostGw => true,
        Backend::Vxlan(vxlan) => vxlan.direct_routing && uplink::is_on_link(kernel, &here.uplink, public),
    };
    if direct {
        if !uplink::is_on_link(kernel, &here.uplink, public) {
            return Err(format!(
                "its address {public} is not on the link of {}",
                here.uplink.name
            ));
        }
        desired.direct.insert(subnet, public);
    } else {
        let Some(vtep) = vtep else {
            return Err("the address of its VXLAN device is not known".into());
        };
        let own = if subnet.addr().is_ipv4() {
            here.macs.0
        } else {
            here.macs.1
        };
        if vtep == own {
            return Err(format!("its VXLAN device has this node's address {vtep}"));
        }
        if let Some(other) = taken
            .macs
            .insert((subnet.addr().is_ipv4(), vtep), name.to_owned())
        {
            taken.macs.insert((subnet.addr().is_ipv4(), vtep), other.clone());
            return Err(format!(
                "its VXLAN device has the same address {vtep} as that of node {other}"
            ));
        }
        desired.tunnels.insert(subnet, Tunnel { vtep, public });
    }
    taken.subnets.insert(subnet, name.to_owned());
    Ok(())
}

/// How each family of each node is reached.
#[must_use]
pub fn ways(peers: &BTreeMap<String, Peer>, here: &Here, desired: &Desired) -> Vec<Way> {
    let mut ways = Vec::new();
    for (node, peer) in peers {
        let v4 = peer
            .v4
            .map(|lease| (IpNet::V4(lease.subnet), IpAddr::V4(lease.public)));
        let v6 = peer
            .v6
            .map(|lease| (IpNet::V6(lease.subnet), IpAddr::V6(lease.public)));
        for (subnet, public) in v4.into_iter().chain(v6) {
            let is_v4 = subnet.addr().is_ipv4();
            let uplink = &here.uplink;
            let public_source = if is_v4 {
                uplink.v4.map(IpAddr::V4)
            } else {
                uplink.v6.map(IpAddr::V6)
            };
            let device = desired
                .devices
                .iter()
                .find(|device| device.address.addr().is_ipv4() == is_v4);
            let (Some(public_source), tunnel) = (public_source, desired.tunnels.get(&subnet).zip(device))
            else {
                continue;
            };
            let way = match tunnel {
                Some((tunnel, device)) => Way {
                    node: node.clone(),
                    subnet,
                    target: subnet.network(),
                    source: device.address.addr(),
                    public,
                    public_source,
                    tunnel: Some(path::Tunnel {
                        vni: device.params.vni,
                        port: device.params.port,
                        own: device.mac,
                        peer: tunnel.vtep,
                    }),
                    mtu: device.mtu,
                    device: device.name.clone(),
                },
                // what a peer's pods and bridge have for addresses is not known: its own is at the end of the same link
                None if desired.direct.contains_key(&subnet) => Way {
                    node: node.clone(),
                    subnet,
                    target: public,
                    source: public_source,
                    public,
                    public_source,
                    tunnel: None,
                    mtu: uplink.mtu,
                    device: uplink.name.clone(),
                },
                None => continue,
            };
            ways.push(way);
        }
    }
    ways
}

/// Whether one is in the other.
pub(super) fn overlap(a: IpNet, b: IpNet) -> bool {
    a.contains(&b) || b.contains(&a)
}

fn devices(conf: &NetConf, vxlan: &Vxlan, here: &Here) -> Vec<Device> {
    let underlay = vxlan.mtu.unwrap_or(here.uplink.mtu);
    let (name_v4, name_v6) = names(vxlan.vni);
    let device = |name: String, network: IpNet, local: IpAddr, mac: Mac, overhead: u32| {
        let subnet = here
            .subnets
            .iter()
            .find(|subnet| subnet.addr().is_ipv4() == network.addr().is_ipv4())?;
        let mut mtu = underlay.saturating_sub(overhead);
        if !network.addr().is_ipv4() {
            mtu = mtu.max(MIN_MTU_V6);
        }
        Some(Device {
            name,
            params: VxlanParams {
                vni: vxlan.vni,
                port: vxlan.port.unwrap_or(DEFAULT_PORT),
                local: Some(local),
                link: here.uplink.index,
                learning: vxlan.learning,
                gbp: vxlan.gbp,
                foreign: false,
            },
            mac,
            mtu,
            address: IpNet::from(subnet.network()),
            network,
        })
    };
    let v4 = conf
        .network_v4
        .zip(here.uplink.v4)
        .and_then(|(network, local)| device(name_v4, network.into(), local.into(), here.macs.0, OVERHEAD.0));
    let v6 = conf
        .network_v6
        .zip(here.uplink.v6)
        .and_then(|(network, local)| device(name_v6, network.into(), local.into(), here.macs.1, OVERHEAD.1));
    v4.into_iter().chain(v6).collect()
}
