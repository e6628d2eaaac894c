//! A pod's device: a veth pair, with single addresses in the pod and a gateway that no route of the node can take away.
//!
//! The gateway is a link-local address with a permanent neighbour entry in the pod. That works on any node; proxy ARP, which
//! others use for this, answers only where the node has a route to the gateway's address.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::AsRawFd as _;

use beeline_cni::mac::Mac;
use futures::TryStreamExt as _;
use ipnet::IpNet;
use rtnetlink::packet_core::{NLM_F_CREATE, NLM_F_EXCL};
use rtnetlink::packet_route::RouteNetlinkMessage;
use rtnetlink::packet_route::link::{
    InfoData, InfoKind, InfoVeth, LinkAttribute, LinkFlags, LinkInfo, LinkMessage,
};

use super::netns;
use super::store::Device;
use crate::overlay::netlink::{self, Netlink};
use crate::overlay::snapshot::{Link, Route, RouteKind};
use crate::overlay::sysctl;
use crate::persist::Faults;

/// Next hop of pods, as Calico's.
pub const GATEWAY_V4: Ipv4Addr = Ipv4Addr::new(169, 254, 1, 1);
/// Next hop of pods, on every one of our devices.
pub const GATEWAY_V6: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 1);
/// What the kernel gives IPv6 routes where nothing is said.
const METRIC_V6: u32 = 1024;

/// What to make.
#[derive(Clone, Debug)]
pub struct Wish {
    /// Name in the node.
    pub name: String,
    /// Name in the pod.
    pub ifname: String,
    /// Address that it must have in the pod.
    pub mac: Option<Mac>,
    /// Bytes.
    pub mtu: u32,
    /// Bytes, to everything but pods of this node.
    pub route_mtu: u32,
    /// Addresses of the pod.
    pub ips: Vec<IpAddr>,
    /// podCIDRs of this node.
    pub subnets: Vec<IpNet>,
}

/// The next hop of a family.
#[must_use]
pub fn gateway(ip: IpAddr) -> IpAddr {
    if ip.is_ipv4() {
        GATEWAY_V4.into()
    } else {
        GATEWAY_V6.into()
    }
}

fn failed(what: impl std::fmt::Display) -> impl FnOnce(io::Error) -> io::Error {
    move |error| io::Error::new(error.kind(), format!("{what}: {error}"))
}

/// Makes it. On failure the caller removes what there is of it by [`remove`]. `before` is called with the device and its
/// index before the pod can send by it.
///
/// # Errors
///
/// Names the step.
pub fn create(
    wish: &Wish,
    pod: &File,
    faults: &Faults,
    before: impl FnOnce(&Device, u32) -> io::Result<()>,
) -> io::Result<Device> {
    let device = Device {
        name: wish.name.clone(),
        host_mac: random_mac(),
        mac: wish.mac.unwrap_or_else(random_mac),
        mtu: wish.mtu,
    };
    let index = netns::block_on(async {
        let netlink = Netlink::open()?;
        // Nobody else has this name: what is there is of an ADD that was cut off.
        if let Some(stale) = find(&netlink, &wish.name).await? {
            netlink
                .delete_link(stale.index)
                .await
                .map_err(failed("remove what an earlier ADD left"))?;
        }
        faults.check("create link")?;
        let message = veth(wish, &device, pod);
        netlink
            .request(RouteNetlinkMessage::NewLink(message), NLM_F_CREATE | NLM_F_EXCL)
            .await
            .map_err(failed(format_args!(
                "create devices {} and, in the pod, {}",
                wish.name, wish.ifname
            )))?;
        faults.check("configure link")?;
        let link = find(&netlink, &wish.name).await?.ok_or(io::ErrorKind::NotFound)?;
        in_node(&netlink, wish, &link).await?;
        Ok(link.index)
    })?;
    faults.check("serve pod")?;
    before(&device, index)?;
    netns::enter(pod, || {
        netns::block_on(async {
            faults.check("configure pod")?;
            in_pod(&Netlink::open()?, wish, device.host_mac).await
        })
    })?;
    faults.check("route to pod")?;
    netns::block_on(async {
        let netlink = Netlink::open()?;
        for ip in &wish.ips {
            let route = route(IpNet::from(*ip), None, index);
            netlink
                .set_route(&route, None)
                .await
                .map_err(failed(format_args!("route {ip} to {}", wish.name)))?;
        }
        Ok(())
    })?;
    Ok(device)
}

/// Removes the pair by the name in the node, and with it all routes to the pod. Fine if it is not there.
///
/// # Errors
///
/// The kernel's.
pub fn remove(name: &str) -> io::Result<()> {
    netns::block_on(async {
        let netlink = Netlink::open()?;
        match find(&netlink, name).await? {
            Some(link) => match netlink.delete_link(link.index).await {
                Err(error) if error.raw_os_error() != Some(libc::ENODEV) => {
                    Err(failed(format_args!("remove device {name}"))(error))
                }
                _ => Ok(()),
            },
            None => Ok(()),
        }
    })
}

/// All devices of this namespace: their indexes by name.
///
/// # Errors
///
/// The kernel's.
pub fn all() -> io::Result<BTreeMap<String, u32>> {
    netns::block_on(async {
        let links: Vec<LinkMessage> = Netlink::open()?
            .handle()
            .link()
            .get()
            .execute()
            .try_collect()
            .await
            .map_err(io::Error::other)?;
        let found = links.iter().map(netlink::link);
        Ok(found.map(|link| (link.name, link.index)).collect())
    })
}

/// Says what is different from what [`create`] made.
///
/// # Errors
///
/// The first thing that is missing or different.
pub fn check(device: &Device, ifname: &str, ips: &[IpAddr], pod: &File) -> io::Result<()> {
    let wrong = |text: String| Err(io::Error::other(text));
    netns::block_on(async {
        let netlink = Netlink::open()?;
        let Some(link) = find(&netlink, &device.name).await? else {
            return wrong(format!("device {} is gone", device.name));
        };
        if !link.up {
            return wrong(format!("device {} is down", device.name));
        }
        let kernel = netlink.snapshot().await.map_err(io::Error::other)?;
        for ip in ips {
            let dst = IpNet::from(*ip);
            if !kernel
                .routes
                .iter()
                .any(|route| route.dst == dst && route.link == Some(link.index))
            {
                return wrong(format!("the node has no route to {ip} by {}", device.name));
            }
        }
        Ok(())
    })?;
    netns::enter(pod, || {
        netns::block_on(async {
            let netlink = Netlink::open()?;
            let Some(link) = find(&netlink, ifname).await? else {
                return wrong(format!("device {ifname} is not in the pod"));
            };
            if !link.up {
                return wrong(format!("device {ifname} of the pod is down"));
            }
            let kernel = netlink.snapshot().await.map_err(io::Error::other)?;
            for ip in ips {
                let has = |address: &crate::overlay::snapshot::Address| {
                    address.link == link.index && address.net.addr() == *ip
                };
                if !kernel.addresses.iter().any(has) {
                    return wrong(format!("device {ifname} of the pod has lost address {ip}"));
                }
                let is_default = |route: &Route| {
                    route.dst.prefix_len() == 0
                        && route.dst.addr().is_ipv4() == ip.is_ipv4()
                        && route.gateway == Some(gateway(*ip))
                };
                if !kernel.routes.iter().any(is_default) {
                    return wrong(format!("the pod has lost its default route by {}", gateway(*ip)));
                }
            }
            Ok(())
        })
    })
}

async fn find(netlink: &Netlink, name: &str) -> io::Result<Option<Link>> {
    let mut links = std::pin::pin!(
        netlink
            .handle()
            .link()
            .get()
            .match_name(name.to_owned())
            .execute()
    );
    match links.try_next().await {
        Ok(message) => Ok(message.map(|message| netlink::link(&message))),
        Err(error) => {
            let error = netlink::io_error(&error);
            if error.raw_os_error() == Some(libc::ENODEV) {
                Ok(None)
            } else {
                Err(error)
            }
        }
    }
}

fn veth(wish: &Wish, device: &Device, pod: &File) -> LinkMessage {
    let mut peer = LinkMessage::default();
    peer.attributes = vec![
        LinkAttribute::IfName(wish.ifname.clone()),
        LinkAttribute::Mtu(wish.mtu),
        LinkAttribute::Address(device.mac.0.to_vec()),
        LinkAttribute::NetNsFd(pod.as_raw_fd()),
    ];
    let mut message = LinkMessage::default();
    message.attributes = vec![
        LinkAttribute::IfName(wish.name.clone()),
        LinkAttribute::Mtu(wish.mtu),
        // given, so that nobody changes it: the pod has it as its gateway's for ever
        LinkAttribute::Address(device.host_mac.0.to_vec()),
        LinkAttribute::LinkInfo(vec![
            LinkInfo::Kind(InfoKind::Veth),
            LinkInfo::Data(InfoData::Veth(InfoVeth::Peer(peer))),
        ]),
    ];
    message
}

fn route(dst: IpNet, gateway: Option<IpAddr>, link: u32) -> Route {
    Route {
        dst,
        gateway,
        link: Some(link),
        metric: if dst.addr().is_ipv4() { 0 } else { METRIC_V6 },
        boot: true,
        onlink: false,
        kind: RouteKind::Unicast,
    }
}

async fn up(netlink: &Netlink, index: u32) -> io::Result<()> {
    let mut message = LinkMessage::default();
    message.header.index = index;
    message.header.flags = LinkFlags::Up;
    message.header.change_mask = LinkFlags::Up;
    netlink.request(RouteNetlinkMessage::SetLink(message), 0).await
}

async fn in_node(netlink: &Netlink, wish: &Wish, link: &Link) -> io::Result<()> {
    let name = &wish.name;
    let (v4, v6) = families(&wish.ips);
    if v4 {
        // A pod may only use addresses that are routed to it: what it sends with others is dropped here.
        sysctl::set(&format!("ipv4/conf/{name}/rp_filter"), "1")?;
        sysctl::set(&format!("ipv4/conf/{name}/forwarding"), "1")?;
    }
    for (key, value) in [
        ("accept_ra", "0"),
        ("accept_dad", "0"),
        ("forwarding", "1"),
        ("addr_gen_mode", "1"),
    ] {
        sysctl::set(&format!("ipv6/conf/{name}/{key}"), value)?;
    }
    up(netlink, link.index)
        .await
        .map_err(failed(format_args!("switch on {name}")))?;
    if v6 {
        let net = IpNet::new_assert(GATEWAY_V6.into(), 64);
        netlink
            .add_address(link.index, net)
            .await
            .map_err(failed(format_args!("give {name} {GATEWAY_V6}")))?;
    }
    Ok(())
}

fn families(ips: &[IpAddr]) -> (bool, bool) {
    (ips.iter().any(IpAddr::is_ipv4), ips.iter().any(IpAddr::is_ipv6))
}

async fn in_pod(netlink: &Netlink, wish: &Wish, host_mac: Mac) -> io::Result<()> {
    let name = &wish.ifname;
    let (_, v6) = families(&wish.ips);
    if v6 {
        // some runtimes switch IPv6 off in new namespaces; `disable_ipv6` of `all` would give other devices addresses
        for device in ["default", "lo", name] {
            sysctl::set(&format!("ipv6/conf/{device}/disable_ipv6"), "0")?;
        }
        for (key, value) in [
            ("accept_ra", "0"),
            ("accept_dad", "0"),
            ("keep_addr_on_down", "1"),
        ] {
            sysctl::set(&format!("ipv6/conf/{name}/{key}"), value)?;
        }
    }
    let failed_pod = |what: &'static str| move |error| failed(format_args!("{what} in the pod"))(error);
    let link = find(netlink, name).await?.ok_or(io::ErrorKind::NotFound)?;
    if let Some(lo) = find(netlink, "lo").await? {
        up(netlink, lo.index).await.map_err(failed_pod("switch on lo"))?;
    }
    for ip in &wish.ips {
        netlink
            .add_address(link.index, IpNet::from(*ip))
            .await
            .map_err(failed_pod("add an address"))?;
    }
    up(netlink, link.index)
        .await
        .map_err(failed_pod("switch on the device"))?;
    // 1500 everywhere needs no exception
    let mtu = (wish.route_mtu < wish.mtu).then_some(wish.route_mtu);
    for ip in &wish.ips {
        let gateway = gateway(*ip);
        netlink
            .set_neighbour(link.index, gateway, host_mac)
            .await
            .map_err(failed_pod("set the gateway's neighbour entry"))?;
        if ip.is_ipv4() {
            let direct = route(IpNet::from(gateway), None, link.index);
            netlink
                .set_route(&direct, None)
                .await
                .map_err(failed_pod("add the route to the gateway"))?;
        }
        for subnet in wish
            .subnets
            .iter()
            .filter(|subnet| subnet.addr().is_ipv4() == ip.is_ipv4())
        {
            if mtu.is_some() {
                let near = route(*subnet, Some(gateway), link.index);
                netlink
                    .set_route(&near, None)
                    .await
                    .map_err(failed_pod("add the route to pods of this node"))?;
            }
        }
        let everywhere = IpNet::new_assert(
            if ip.is_ipv4() {
                Ipv4Addr::UNSPECIFIED.into()
            } else {
                Ipv6Addr::UNSPECIFIED.into()
            },
            0,
        );
        let default = route(everywhere, Some(gateway), link.index);
        netlink
            .set_route(&default, mtu)
            .await
            .map_err(failed_pod("add the default route"))?;
    }
    Ok(())
}

/// Locally administered, unicast.
fn random_mac() -> Mac {
    let mut bytes: [u8; 6] = rand::random();
    bytes[0] = (bytes[0] | 0x02) & !0x01;
    Mac(bytes)
}
