//! Devices, addresses and default routes of this host, from the kernel.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::Duration;

use futures::TryStreamExt as _;
use rtnetlink::packet_core::NetlinkPayload;
use rtnetlink::packet_route::RouteNetlinkMessage;
use rtnetlink::packet_route::address::{AddressAttribute, AddressFlags, AddressMessage, AddressScope};
use rtnetlink::packet_route::link::{
    InfoData, InfoKind, InfoVxlan, LinkAttribute, LinkFlags, LinkInfo, LinkLayerType, LinkMessage,
};
use rtnetlink::packet_route::route::{RouteAddress, RouteAttribute, RouteMessage, RouteType};
use rtnetlink::{MulticastGroup, RouteMessageBuilder};

use super::select::{Link, LinkAddress, Seen};
use crate::rtnl::{Message, Socket, own_address};

/// How long a burst of changes is waited out before everything is read again.
const QUIET: Duration = Duration::from_millis(50);

/// A netlink socket in the network namespace of the thread that opens it.
pub(super) struct Host(Socket);

impl Host {
    pub(super) fn open() -> std::io::Result<Self> {
        Socket::open(&[
            MulticastGroup::Link,
            MulticastGroup::Ipv4Ifaddr,
            MulticastGroup::Ipv6Ifaddr,
            MulticastGroup::Ipv4Route,
            MulticastGroup::Ipv6Route,
        ])
        .map(Self)
    }

    /// Everything as it is now.
    pub(super) async fn seen(&self) -> Result<Seen, rtnetlink::Error> {
        let mut seen = Seen::default();
        let links: Vec<LinkMessage> = self.0.handle.link().get().execute().try_collect().await?;
        for message in &links {
            seen.links.insert(message.header.index, link(message));
        }
        let addresses: Vec<AddressMessage> = self.0.handle.address().get().execute().try_collect().await?;
        seen.addresses = addresses.iter().filter_map(address).collect();
        for family in [
            RouteMessageBuilder::<Ipv4Addr>::new().build(),
            RouteMessageBuilder::<Ipv6Addr>::new().build(),
        ] {
            // thousands on some hosts: only those that say something about devices are kept
            let mut routes = self.0.handle.route().get(family).execute();
            while let Some(route) = routes.try_next().await? {
                match route.header.destination_prefix_length {
                    0 => seen.default_routes.extend(route_devices(&route)),
                    32 | 128 => seen.host_routes.extend(host_route(&route)),
                    _ => {}
                }
            }
        }
        Ok(seen)
    }

    /// As [`Socket::changed`].
    pub(super) async fn changed(&mut self) -> bool {
        self.0.changed(QUIET, matters).await
    }
}

/// Routes come and go by the thousand; only default ones and those to single hosts say anything about devices.
fn matters(message: &Message) -> bool {
    match &message.payload {
        NetlinkPayload::InnerMessage(
            RouteNetlinkMessage::NewRoute(route) | RouteNetlinkMessage::DelRoute(route),
        ) => matches!(route.header.destination_prefix_length, 0 | 32 | 128),
        _ => true,
    }
}

fn link(message: &LinkMessage) -> Link {
    let mut out = Link {
        loopback: message.header.flags.contains(LinkFlags::Loopback),
        up: message.header.flags.contains(LinkFlags::Up),
        header: match message.header.link_layer_type {
            LinkLayerType::Ether | LinkLayerType::Loopback => 14,
            _ => 0,
        },
        ..Link::default()
    };
    for attribute in &message.attributes {
        match attribute {
            LinkAttribute::IfName(name) => out.name.clone_from(name),
            LinkAttribute::Controller(bridge) => out.bridge = Some(*bridge),
            LinkAttribute::LinkNetNsId(_) => out.away = true,
            LinkAttribute::LinkInfo(infos) => {
                let kind = infos.iter().find_map(|info| match info {
                    LinkInfo::Kind(kind) => Some(InfoKind::to_string(kind)),
                    _ => None,
                });
                out.kind = kind.unwrap_or_default();
                out.port = infos.iter().find_map(vxlan_port).unwrap_or_default();
            }
            _ => {}
        }
    }
    out
}

fn vxlan_port(info: &LinkInfo) -> Option<u16> {
    let LinkInfo::Data(InfoData::Vxlan(data)) = info else {
        return None;
    };
    data.iter().find_map(|info| match info {
        InfoVxlan::Port(port) => Some(*port),
        _ => None,
    })
}

fn address(message: &AddressMessage) -> Option<LinkAddress> {
    let ip = own_address(message)?;
    let flags = message.attributes.iter().find_map(|attribute| match attribute {
        AddressAttribute::Flags(flags) => Some(*flags),
        _ => None,
    });
    let worse = AddressFlags::Secondary
        | AddressFlags::Tentative
        | AddressFlags::Deprecated
        | AddressFlags::Dadfailed;
    Some(LinkAddress {
        index: message.header.index,
        ip,
        global: matches!(message.header.scope, AddressScope::Universe | AddressScope::Site)
            && !ip.is_loopback(),
        preferred: !flags.is_some_and(|flags| flags.intersects(worse)),
    })
}

/// The devices of a route.
fn route_devices(message: &RouteMessage) -> Vec<u32> {
    if message.header.kind != RouteType::Unicast {
        return Vec::new();
    }
    let mut devices = Vec::new();
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Oif(index) => devices.push(*index),
            RouteAttribute::MultiPath(hops) => devices.extend(hops.iter().map(|hop| hop.interface_index)),
            _ => {}
        }
    }
    devices
}

/// The device of a route to a single host, which may be a network of the other family's 32 bits.
fn host_route(message: &RouteMessage) -> Option<(u32, IpAddr)> {
    let ip = message.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Destination(RouteAddress::Inet(ip)) => Some(IpAddr::V4(*ip)),
        RouteAttribute::Destination(RouteAddress::Inet6(ip)) => Some(IpAddr::V6(*ip)),
        _ => None,
    })?;
    let single = message.header.destination_prefix_length == if ip.is_ipv4() { 32 } else { 128 };
    let device = route_devices(message).first().copied()?;
    single.then_some((device, ip))
}
