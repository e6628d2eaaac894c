//! Reading and changing the kernel's state by rtnetlink.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use beeline_cni::mac::Mac;
use futures::{StreamExt as _, TryStreamExt as _};
use ipnet::IpNet;
use rtnetlink::Handle;
use rtnetlink::packet_core::{
    NLM_F_ACK, NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload,
};
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
    RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteMetric, RouteProtocol,
    RouteScope, RouteType,
};
use rtnetlink::packet_route::{AddressFamily, RouteNetlinkMessage};

use super::diff::{Changes, Op};
use super::plan::Device;
use super::snapshot::{Address, FdbEntry, Link, Neighbour, Route, RouteKind, Snapshot, VxlanParams};
use super::sysctl;

/// Requests under way at once: their answers must fit into the socket's buffer.
const PARALLEL: usize = 64;

/// What the kernel did not do.
#[derive(Debug, thiserror::Error)]
#[error("cannot {operation}: {cause}")]
pub struct NetlinkError {
    /// With its object.
    pub operation: String,
    /// The kernel's error.
    pub cause: std::io::Error,
}

/// A netlink socket in the network namespace of the thread that opens it.
#[derive(Debug)]
pub struct Netlink {
    handle: Handle,
    connection: tokio::task::JoinHandle<()>,
}

impl Drop for Netlink {
    fn drop(&mut self) {
        self.connection.abort();
    }
}

/// The kernel's error in one of rtnetlink's.
#[must_use]
pub fn io_error(error: &rtnetlink::Error) -> std::io::Error {
    match error {
        rtnetlink::Error::NetlinkError(message) => {
            std::io::Error::from_raw_os_error(message.code.map_or(0, |code| code.get().saturating_neg()))
        }
        other => std::io::Error::other(other.to_string()),
    }
}

impl Netlink {
    /// Opens a socket; needs a tokio runtime.
    ///
    /// # Errors
    ///
    /// When there is no netlink.
    pub fn open() -> std::io::Result<Self> {
        let (connection, handle, _) = rtnetlink::new_connection()?;
        Ok(Self {
            handle,
            connection: tokio::spawn(connection),
        })
    }

    /// For requests of other kinds.
    #[must_use]
    pub fn handle(&self) -> &Handle {
        &self.handle
    }

    /// One request and its acknowledgement.
    ///
    /// # Errors
    ///
    /// The kernel's.
    pub async fn request(&self, message: RouteNetlinkMessage, flags: u16) -> std::io::Result<()> {
        let mut request = NetlinkMessage::from(message);
        request.header.flags = NLM_F_REQUEST | NLM_F_ACK | flags;
        let mut handle = self.handle.clone();
        let mut answers = handle.request(request).map_err(|error| io_error(&error))?;
        while let Some(answer) = answers.next().await {
            if let NetlinkPayload::Error(error) = answer.payload
                && let Some(code) = error.code
            {
                return Err(std::io::Error::from_raw_os_error(code.get().saturating_neg()));
            }
        }
        Ok(())
    }

    /// Reads all that the overlay needs.
    ///
    /// # Errors
    ///
    /// When the kernel does not answer.
    pub async fn snapshot(&self) -> Result<Snapshot, NetlinkError> {
        let failed = |what: &str| {
            let operation = format!("read {what}");
            move |error: rtnetlink::Error| NetlinkError {
                operation: operation.clone(),
                cause: io_error(&error),
            }
        };
        let mut all = Snapshot::default();
        let links: Vec<LinkMessage> = self
            .handle
            .link()
            .get()
            .execute()
            .try_collect()
            .await
            .map_err(failed("links"))?;
        all.links = links.iter().map(link).collect();
        let addresses: Vec<AddressMessage> = self
            .handle
            .address()
            .get()
            .execute()
            .try_collect()
            .await
            .map_err(failed("addresses"))?;
        all.addresses = addresses.iter().filter_map(address).collect();
        for family in [AddressFamily::Inet, AddressFamily::Inet6] {
            let mut message = RouteMessage::default();
            message.header.address_family = family;
            let mut routes = std::pin::pin!(self.handle.route().get(message).execute());
            while let Some(message) = routes.try_next().await.map_err(failed("routes"))? {
                all.routes.extend(route(&message));
            }
        }
        let is_ours = |index: u32| {
            all.links
                .iter()
                .any(|link| link.index == index && link.vxlan.is_some())
        };
        let ours: Vec<u32> = all
            .links
            .iter()
            .map(|link| link.index)
            .filter(|index| is_ours(*index))
            .collect();
        if ours.is_empty() {
            return Ok(all);
        }
        for family in [AddressFamily::Inet, AddressFamily::Inet6, AddressFamily::Bridge] {
            let request = self.handle.neighbours().get().set_address_family(family);
            let mut entries = std::pin::pin!(request.execute());
            while let Some(message) = entries.try_next().await.map_err(failed("neighbours"))? {
                if !ours.contains(&message.header.ifindex) {
                    continue;
                }
                if family == AddressFamily::Bridge {
                    all.fdb.extend(fdb(&message));
                } else {
                    all.neighbours.extend(neighbour(&message));
                }
            }
        }
        Ok(all)
    }

    /// Makes the changes, step by step; goes on past errors and gives them all.
    pub async fn apply(&self, changes: &Changes) -> Vec<NetlinkError> {
        let mut errors = Vec::new();
        for step in &changes.steps {
            let results = futures::stream::iter(step)
                .map(|op| self.change(op))
                .buffer_unordered(PARALLEL);
            errors.extend(
                results
                    .filter_map(async |result| result.err())
                    .collect::<Vec<_>>()
                    .await,
            );
        }
        errors
    }

    async fn change(&self, op: &Op) -> Result<(), NetlinkError> {
        let result = match op {
            Op::DeleteLink(index, _) => gone(self.delete_link(*index).await),
            Op::CreateDevice(device) => self.create(device).await,
            Op::SetDevice(index, device) => self.set_device(*index, device).await,
            Op::AddAddress(index, net) => self.add_address(*index, *net).await,
            Op::DeleteAddress(index, net) => gone(
                self.request(RouteNetlinkMessage::DelAddress(address_message(*index, *net)), 0)
                    .await,
            ),
            Op::SetNeighbour(index, address, mac) => self.set_neighbour(*index, *address, *mac).await,
            Op::DeleteNeighbour(index, address) => {
                let message = neighbour_message(*index, *address, None);
                gone(self.request(RouteNetlinkMessage::DelNeighbour(message), 0).await)
            }
            Op::SetFdb(index, mac, dst) => {
                let message = fdb_message(*index, *mac, Some(*dst));
                self.request(
                    RouteNetlinkMessage::NewNeighbour(message),
                    NLM_F_CREATE | NLM_F_REPLACE,
                )
                .await
            }
            Op::DeleteFdb(index, mac, dst) => {
                let message = fdb_message(*index, *mac, *dst);
                gone(self.request(RouteNetlinkMessage::DelNeighbour(message), 0).await)
            }
            Op::SetRoute(route) => self.set_route(route, None).await,
            Op::DeleteRoute(route) => gone(self.delete_route(route).await),
        };
        result.map_err(|cause| NetlinkError {
            operation: op.to_string(),
            cause,
        })
    }

    /// Removes a device.
    ///
    /// # Errors
    ///
    /// The kernel's.
    pub async fn delete_link(&self, index: u32) -> std::io::Result<()> {
        let mut message = LinkMessage::default();
        message.header.index = index;
        self.request(RouteNetlinkMessage::DelLink(message), 0).await
    }

    /// Adds an address that is usable at once.
    ///
    /// # Errors
    ///
    /// The kernel's.
    pub async fn add_address(&self, index: u32, net: IpNet) -> std::io::Result<()> {
        let message = address_message(index, net);
        self.request(
            RouteNetlinkMessage::NewAddress(message),
            NLM_F_CREATE | NLM_F_REPLACE,
        )
        .await
    }

    /// Adds or replaces a permanent neighbour.
    ///
    /// # Errors
    ///
    /// The kernel's.
    pub async fn set_neighbour(&self, index: u32, address: IpAddr, mac: Mac) -> std::io::Result<()> {
        let message = neighbour_message(index, address, Some(mac));
        self.request(
            RouteNetlinkMessage::NewNeighbour(message),
            NLM_F_CREATE | NLM_F_REPLACE,
        )
        .await
    }

    /// Adds or replaces a route of the main table. `mtu`: bytes, if less than the device's.
    ///
    /// # Errors
    ///
    /// The kernel's.
    pub async fn set_route(&self, route: &Route, mtu: Option<u32>) -> std::io::Result<()> {
        let mut message = route_message(route);
        let metrics = |mtu| RouteAttribute::Metrics(vec![RouteMetric::Mtu(mtu)]);
        message.attributes.extend(mtu.map(metrics));
        self.request(
            RouteNetlinkMessage::NewRoute(message),
            NLM_F_CREATE | NLM_F_REPLACE,
        )
        .await
    }

    /// Removes a route of the main table.
    ///
    /// # Errors
    ///
    /// The kernel's.
    pub async fn delete_route(&self, route: &Route) -> std::io::Result<()> {
        self.request(RouteNetlinkMessage::DelRoute(route_message(route)), 0)
            .await
    }

    async fn create(&self, device: &Device) -> std::io::Result<()> {
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
        self.request(RouteNetlinkMessage::NewLink(message), NLM_F_CREATE | NLM_F_EXCL)
            .await?;
        sysctl::set(&format!("ipv6/conf/{}/accept_ra", device.name), "0")
    }

    async fn set_device(&self, index: u32, device: &Device) -> std::io::Result<()> {
        let mut message = LinkMessage::default();
        message.header.index = index;
        message.header.flags = LinkFlags::Up;
        message.header.change_mask = LinkFlags::Up;
        message.attributes = vec![
            LinkAttribute::Mtu(device.mtu),
            LinkAttribute::Address(device.mac.0.to_vec()),
        ];
        self.request(RouteNetlinkMessage::SetLink(message), 0).await
    }
}

/// What is not there need not be removed.
fn gone(result: std::io::Result<()>) -> std::io::Result<()> {
    match result {
        Err(error)
            if matches!(
                error.raw_os_error(),
                Some(libc::ENOENT | libc::ESRCH | libc::ENODEV | libc::EADDRNOTAVAIL)
            ) =>
        {
            Ok(())
        }
        other => other,
    }
}

impl std::fmt::Display for Op {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::DeleteLink(_, name) => write!(f, "delete link {name}"),
            Self::CreateDevice(device) => write!(f, "create link {}", device.name),
            Self::SetDevice(_, device) => write!(f, "set link {}", device.name),
            Self::AddAddress(index, net) => write!(f, "add address {net} to link {index}"),
            Self::DeleteAddress(index, net) => write!(f, "delete address {net} from link {index}"),
            Self::SetNeighbour(index, address, mac) => {
                write!(f, "set neighbour {address} at {mac} on link {index}")
            }
            Self::DeleteNeighbour(index, address) => write!(f, "delete neighbour {address} on link {index}"),
            Self::SetFdb(index, mac, dst) => {
                write!(f, "set forwarding of {mac} to {dst} on link {index}")
            }
            Self::DeleteFdb(index, mac, dst) => match dst {
                Some(dst) => write!(f, "delete forwarding of {mac} to {dst} on link {index}"),
                None => write!(f, "delete forwarding of {mac} on link {index}"),
            },
            Self::SetRoute(route) => write!(f, "set route {}", Shown(route)),
            Self::DeleteRoute(route) => write!(f, "delete route {}", Shown(route)),
        }
    }
}

struct Shown<'a>(&'a Route);

impl std::fmt::Display for Shown<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.0.kind == RouteKind::Unreachable {
            f.write_str("unreachable ")?;
        }
        write!(f, "{}", self.0.dst)?;
        if let Some(gateway) = self.0.gateway {
            write!(f, " via {gateway}")?;
        }
        self.0.link.map_or(Ok(()), |link| write!(f, " on link {link}"))
    }
}

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

fn address(message: &AddressMessage) -> Option<Address> {
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

fn address_message(index: u32, net: IpNet) -> AddressMessage {
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
fn route(message: &RouteMessage) -> Option<Route> {
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

fn route_message(route: &Route) -> RouteMessage {
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

fn neighbour(message: &NeighbourMessage) -> Option<Neighbour> {
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

fn neighbour_message(index: u32, address: IpAddr, mac: Option<Mac>) -> NeighbourMessage {
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

fn fdb(message: &NeighbourMessage) -> Option<FdbEntry> {
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

fn fdb_message(index: u32, mac: Mac, dst: Option<IpAddr>) -> NeighbourMessage {
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
