//! The kernel's state as far as the overlay needs it.

use std::net::IpAddr;

use beeline_cni::mac::Mac;
use ipnet::IpNet;

/// Parameters of a VXLAN device that cannot be changed while it lives.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct VxlanParams {
    /// VXLAN network identifier, 24 bits.
    pub vni: u32,
    /// UDP destination port.
    pub port: u16,
    /// Source address of its packets.
    pub local: Option<IpAddr>,
    /// Index of the device below; zero: none.
    pub link: u32,
    /// Whether it learns addresses from packets.
    pub learning: bool,
    /// Group based policy extension.
    pub gbp: bool,
    /// Collects metadata, sends to a group, or asks user space: nothing that flannel makes.
    pub foreign: bool,
}

/// A network device.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Link {
    /// Its index.
    pub index: u32,
    /// Its name.
    pub name: String,
    /// Bytes.
    pub mtu: u32,
    /// Its Ethernet address, if it has one.
    pub mac: Option<Mac>,
    /// Whether it is switched on.
    pub up: bool,
    /// What it is, if it is a VXLAN device.
    pub vxlan: Option<VxlanParams>,
}

/// An address of a device.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Address {
    /// Index of the device.
    pub link: u32,
    /// Address and length of the prefix.
    pub net: IpNet,
    /// Whether it is usable anywhere, not just on its link.
    pub global: bool,
    /// Not dynamic.
    pub permanent: bool,
    /// Going away, or made to change often: nothing to tell other nodes.
    pub unsteady: bool,
}

/// An entry of the main routing table with one next hop, or with none.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Route {
    /// Where to.
    pub dst: IpNet,
    /// Next hop.
    pub gateway: Option<IpAddr>,
    /// Index of the device.
    pub link: Option<u32>,
    /// The smallest wins; IPv6 has 1024 where nothing was said.
    pub metric: u32,
    /// Whether `RTPROT_BOOT`, which is what flannel's and our routes have.
    pub boot: bool,
    /// Whether the next hop is taken to be on the link whatever other routes say.
    pub onlink: bool,
    /// What the kernel does with packets.
    pub kind: RouteKind,
}

/// What the kernel does with packets.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum RouteKind {
    /// Sends them.
    Unicast,
    /// Refuses them with an ICMP error.
    Unreachable,
    /// Anything else.
    Other,
}

/// An entry of a device's neighbour table.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Neighbour {
    /// Index of the device.
    pub link: u32,
    /// IP address.
    pub address: IpAddr,
    /// Ethernet address.
    pub mac: Option<Mac>,
    /// Set by hand.
    pub permanent: bool,
}

/// An entry of a VXLAN device's forwarding table.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct FdbEntry {
    /// Index of the device.
    pub link: u32,
    /// Ethernet address.
    pub mac: Mac,
    /// Which node has it.
    pub dst: Option<IpAddr>,
    /// Set by hand.
    pub permanent: bool,
}

/// Everything.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Snapshot {
    /// All devices.
    pub links: Vec<Link>,
    /// All addresses.
    pub addresses: Vec<Address>,
    /// The main table.
    pub routes: Vec<Route>,
    /// Of VXLAN devices.
    pub neighbours: Vec<Neighbour>,
    /// Of VXLAN devices.
    pub fdb: Vec<FdbEntry>,
    /// IPv6 addresses that a device answers for, by its index.
    pub proxies: Vec<(u32, IpAddr)>,
}

impl Snapshot {
    /// A device by its name.
    #[must_use]
    pub fn link(&self, name: &str) -> Option<&Link> {
        self.links.iter().find(|link| link.name == name)
    }
}
