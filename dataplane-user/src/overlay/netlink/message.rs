//! rtnetlink's messages, from and to what they say.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use beeline_cni::mac::Mac;
use ipnet::IpNet;
use rtnetlink::packet_route::AddressFamily;
use rtnetlink::packet_route::address::{
    AddressAttribute, AddressFlags, AddressHeaderFlags, AddressMessage, AddressScope,
};
use rtnetlink::packet_route::link::{
    InfoData, InfoKind, InfoVxlan, LinkAttribute, LinkFlags, LinkInfo, LinkMessage,
};
use rtnetlink::packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourFlags, NeighbourMessage, NeighbourState,
};
use rtnetlink::packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteProtocol, RouteScope, RouteType,
};

use super::super::plan::Device;
use super::super::snapshot::{Address, FdbEntry, Link, Neighbour, Route, RouteKind, VxlanParams};

fn mac(bytes: &[u8]) -> Option<Mac> {
    bytes.try_into().ok().map(Mac)
}

/// What a message says of a device.
#[must_use]
pub fn link(message: &LinkMessage) -> Link {
    let mut found = Link {
        index: message.header.index,
        name: String::new(),
        mtu: 0,
        mac: None,
        up: message.header.flags.contains(LinkFlags::Up),
        vxlan: None,
    };
    for attribute in &message.attributes {
        match attribute {
            LinkAttribute::IfName(name) => found.name.clone_from(name),
            LinkAttribute::Mtu(mtu) => found.mtu = *mtu,
            LinkAttribute::Address(bytes) => found.mac = mac(bytes),
            LinkAttribute::LinkInfo(infos) => {
                for info in infos {
                    if let LinkInfo::Data(InfoData::Vxlan(data)) = info {
                        found.vxlan = Some(vxlan(data));
                    }
                }
            }
            _ => {}
        }
    }
    found
}

fn vxlan(data: &[InfoVxlan]) -> VxlanParams {
    let mut params = VxlanParams {
        vni: 0,
        port: 0,
        local: None,
        link: 0,
        learning: false,
        gbp: false,
        foreign: false,
    };
    for item in data {
        match item {
            InfoVxlan::Id(vni) => params.vni = *vni,
            InfoVxlan::Port(port) => params.port = *port,
            InfoVxlan::Local(local) => params.local = Some(IpAddr::V4(*local)),
            InfoVxlan::Local6(local) => params.local = Some(IpAddr::V6(*local)),
            InfoVxlan::Link(link) => params.link = *link,
            InfoVxlan::Learning(learning) => params.learning = *learning,
            InfoVxlan::Gbp => params.gbp = true,
            InfoVxlan::CollectMetadata(true)
            | InfoVxlan::L2Miss(true)
            | InfoVxlan::L3Miss(true)
            | InfoVxlan::UDPZeroCsumTX(true)
            | InfoVxlan::UDPZeroCsumRX(true)
            | InfoVxlan::Gpe
            | InfoVxlan::Group(_)
            | InfoVxlan::Group6(_) => params.foreign = true,
            _ => {}
        }
    }
    params
}

/// A VXLAN device that is to be made, switched on.
pub(super) fn new_vxlan(device: &Device) -> LinkMessage {
    let mut message = LinkMessage::default();
    message.header.flags = LinkFlags::Up;
    message.header.change_mask = LinkFlags::Up;
    let params = &device.params;
    let mut data = vec![
        InfoVxlan::Id(params.vni),
        InfoVxlan::Link(params.link),
        InfoVxlan::Learning(params.learning),
        InfoVxlan::Port(params.port),
    ];
    match params.local {
        Some(IpAddr::V4(local)) => data.push(InfoVxlan::Local(local)),
        Some(IpAddr::V6(local)) => data.push(InfoVxlan::Local6(local)),
        None => {}
    }
    data.extend(params.gbp.then_some(InfoVxlan::Gbp));
    message.attributes = vec![
        LinkAttribute::IfName(device.name.clone()),
        LinkAttribute::Mtu(device.mtu),
        // an address that is given is not changed by udev's MACAddressPolicy
        LinkAttribute::Address(device.mac.0.to_vec()),
        LinkAttribute::LinkInfo(vec![
            LinkInfo::Kind(InfoKind::Vxlan),
            LinkInfo::Data(InfoData::Vxlan(data)),
        ]),
    ];
    message
}

/// A device's MTU, maybe its Ethernet address, and on.
pub(super) fn set_link(index: u32, device: &Device, mac: bool) -> LinkMessage {
    let mut message = LinkMessage::default();
    message.header.index = index;
    message.header.flags = LinkFlags::Up;
    message.header.change_mask = LinkFlags::Up;
    message.attributes.push(LinkAttribute::Mtu(device.mtu));
    let address = mac.then(|| LinkAttribute::Address(device.mac.0.to_vec()));
    message.attributes.extend(address);
    message
}

pub(super) fn address(message: &AddressMessage) -> Option<Address> {
    let mut peer = None;
    let mut local = None;
    let mut flags = AddressFlags::from_bits_retain(message.header.flags.bits().into());
    for attribute in &message.attributes {
        match attribute {
            AddressAttribute::Local(ip) => local = Some(*ip),
            AddressAttribute::Address(ip) => peer = Some(*ip),
            AddressAttribute::Flags(all) => flags = *all,
            _ => {}
        }
    }
    let ip = local.or(peer)?;
    let unsteady = AddressFlags::Deprecated | AddressFlags::Tentative | AddressFlags::Dadfailed;
    // IPv4 has the same bit for secondary addresses, which are as good as others
    let temporary = ip.is_ipv6() && flags.contains(AddressFlags::Secondary);
    Some(Address {
        link: message.header.index,
        net: IpNet::new(ip, message.header.prefix_len).ok()?,
        global: message.header.scope == AddressScope::Universe,
        permanent: flags.contains(AddressFlags::Permanent),
        unsteady: temporary || flags.intersects(unsteady),
    })
}

pub(super) fn address_of(index: u32, net: IpNet) -> AddressMessage {
    let mut message = AddressMessage::default();
    message.header.family = family(net.addr());
    message.header.prefix_len = net.prefix_len();
    message.header.index = index;
    message.header.scope = AddressScope::Universe;
    message.attributes.push(AddressAttribute::Address(net.addr()));
    match net.addr() {
        IpAddr::V4(_) => message.attributes.push(AddressAttribute::Local(net.addr())),
        IpAddr::V6(_) => message.header.flags = AddressHeaderFlags::Nodad,
    }
    message
}

fn family(ip: IpAddr) -> AddressFamily {
    if ip.is_ipv4() {
        AddressFamily::Inet
    } else {
        AddressFamily::Inet6
    }
}

fn ip_of(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(ip) => Some(IpAddr::V4(*ip)),
        RouteAddress::Inet6(ip) => Some(IpAddr::V6(*ip)),
        _ => None,
    }
}

/// Routes of other tables, with several next hops, and cached ones are none of ours.
pub(super) fn route(message: &RouteMessage) -> Option<Route> {
    let header = &message.header;
    let zero = match header.address_family {
        AddressFamily::Inet => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
        AddressFamily::Inet6 => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
        _ => return None,
    };
    let mut found = Route {
        dst: IpNet::new(zero, header.destination_prefix_length).ok()?,
        gateway: None,
        link: None,
        metric: 0,
        boot: header.protocol == RouteProtocol::Boot,
        onlink: header.flags.contains(RouteFlags::Onlink),
        kind: match header.kind {
            RouteType::Unicast => RouteKind::Unicast,
            RouteType::Unreachable => RouteKind::Unreachable,
            _ => RouteKind::Other,
        },
    };
    let mut table = u32::from(header.table);
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Table(id) => table = *id,
            RouteAttribute::Destination(address) => {
                found.dst = IpNet::new(ip_of(address)?, header.destination_prefix_length).ok()?;
            }
            RouteAttribute::Gateway(address) => found.gateway = ip_of(address),
            RouteAttribute::Oif(index) => found.link = Some(*index),
            RouteAttribute::Priority(metric) => found.metric = *metric,
            _ => {}
        }
    }
    let is_main =
        table == u32::from(RouteHeader::RT_TABLE_MAIN) && !header.flags.contains(RouteFlags::Cloned);
    (is_main && header.tos == 0).then_some(found)
}

pub(super) fn route_of(route: &Route) -> RouteMessage {
    let mut message = RouteMessage::default();
    let header = &mut message.header;
    header.address_family = family(route.dst.addr());
    header.destination_prefix_length = route.dst.prefix_len();
    header.table = RouteHeader::RT_TABLE_MAIN;
    header.protocol = if route.boot {
        RouteProtocol::Boot
    } else {
        RouteProtocol::Unspec
    };
    header.scope = match route.gateway {
        None if route.kind == RouteKind::Unicast && route.dst.addr().is_ipv4() => RouteScope::Link,
        _ => RouteScope::Universe,
    };
    header.kind = match route.kind {
        RouteKind::Unreachable => RouteType::Unreachable,
        RouteKind::Unicast | RouteKind::Other => RouteType::Unicast,
    };
    if route.onlink {
        header.flags = RouteFlags::Onlink;
    }
    let attributes = &mut message.attributes;
    if route.dst.prefix_len() > 0 {
        attributes.push(RouteAttribute::Destination(route.dst.network().into()));
    }
    attributes.extend(
        route
            .gateway
            .map(|gateway| RouteAttribute::Gateway(gateway.into())),
    );
    attributes.extend(route.link.map(RouteAttribute::Oif));
    if route.metric > 0 {
        attributes.push(RouteAttribute::Priority(route.metric));
    }
    message
}

pub(super) fn neighbour(message: &NeighbourMessage) -> Option<Neighbour> {
    let mut found = Neighbour {
        link: message.header.ifindex,
        address: IpAddr::V4(Ipv4Addr::UNSPECIFIED),
        mac: None,
        permanent: message.header.state == NeighbourState::Permanent,
    };
    let mut address = None;
    for attribute in &message.attributes {
        match attribute {
            NeighbourAttribute::Destination(NeighbourAddress::Inet(ip)) => address = Some(IpAddr::V4(*ip)),
            NeighbourAttribute::Destination(NeighbourAddress::Inet6(ip)) => address = Some(IpAddr::V6(*ip)),
            NeighbourAttribute::LinkLayerAddress(bytes) => found.mac = mac(bytes),
            _ => {}
        }
    }
    found.address = address?;
    Some(found)
}

pub(super) fn neighbour_of(index: u32, address: IpAddr, mac: Option<Mac>) -> NeighbourMessage {
    let mut message = NeighbourMessage::default();
    message.header.family = family(address);
    message.header.ifindex = index;
    message.header.state = NeighbourState::Permanent;
    message.header.kind = RouteType::Unicast;
    message
        .attributes
        .push(NeighbourAttribute::Destination(address.into()));
    message
        .attributes
        .extend(mac.map(|mac| NeighbourAttribute::LinkLayerAddress(mac.0.to_vec())));
    message
}

/// An entry that lets a device answer for an address.
pub(super) fn proxy_of(index: u32, address: IpAddr) -> NeighbourMessage {
    let mut message = neighbour_of(index, address, None);
    message.header.flags = NeighbourFlags::Proxy;
    message
}

pub(super) fn fdb(message: &NeighbourMessage) -> Option<FdbEntry> {
    let mut address = None;
    let mut dst = None;
    for attribute in &message.attributes {
        match attribute {
            NeighbourAttribute::LinkLayerAddress(bytes) => address = mac(bytes),
            // a table of Ethernet addresses: the length says what the destination is
            NeighbourAttribute::Destination(NeighbourAddress::Other(bytes)) => {
                dst = match bytes.len() {
                    4 => <[u8; 4]>::try_from(bytes.as_slice()).ok().map(IpAddr::from),
                    _ => <[u8; 16]>::try_from(bytes.as_slice()).ok().map(IpAddr::from),
                };
            }
            NeighbourAttribute::Destination(NeighbourAddress::Inet(ip)) => dst = Some(IpAddr::V4(*ip)),
            NeighbourAttribute::Destination(NeighbourAddress::Inet6(ip)) => dst = Some(IpAddr::V6(*ip)),
            _ => {}
        }
    }
    Some(FdbEntry {
        link: message.header.ifindex,
        mac: address?,
        dst,
        permanent: message.header.state == NeighbourState::Permanent,
    })
}

pub(super) fn fdb_of(index: u32, mac: Mac, dst: Option<IpAddr>) -> NeighbourMessage {
    let mut message = NeighbourMessage::default();
    message.header.family = AddressFamily::Bridge;
    message.header.ifindex = index;
    message.header.state = NeighbourState::Permanent;
    message.header.flags = NeighbourFlags::Own;
    message
        .attributes
        .push(NeighbourAttribute::LinkLayerAddress(mac.0.to_vec()));
    message
        .attributes
        .extend(dst.map(|dst| NeighbourAttribute::Destination(dst.into())));
    message
}
