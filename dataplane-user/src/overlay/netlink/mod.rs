//! Reading and changing the kernel's state by rtnetlink.

mod message;

use std::net::IpAddr;

use beeline_cni::mac::Mac;
use futures::{StreamExt as _, TryStreamExt as _};
use ipnet::IpNet;
use rtnetlink::Handle;
use rtnetlink::packet_core::{
    NLM_F_ACK, NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload,
};
use rtnetlink::packet_route::address::AddressMessage;
use rtnetlink::packet_route::link::LinkMessage;
use rtnetlink::packet_route::route::{RouteAttribute, RouteMessage, RouteMetric};
use rtnetlink::packet_route::{AddressFamily, RouteNetlinkMessage};

pub use message::link;

use super::diff::{Changes, Op};
use super::plan::Device;
use super::snapshot::{Route, Snapshot};
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
        all.addresses = addresses.iter().filter_map(message::address).collect();
        for family in [AddressFamily::Inet, AddressFamily::Inet6] {
            let mut message = RouteMessage::default();
            message.header.address_family = family;
            let mut routes = std::pin::pin!(self.handle.route().get(message).execute());
            while let Some(message) = routes.try_next().await.map_err(failed("routes"))? {
                all.routes.extend(message::route(&message));
            }
        }
        let proxies = self.handle.neighbours().get().proxies();
        let mut entries = std::pin::pin!(proxies.set_address_family(AddressFamily::Inet6).execute());
        while let Some(message) = entries.try_next().await.map_err(failed("neighbour proxies"))? {
            all.proxies
                .extend(message::neighbour(&message).map(|entry| (entry.link, entry.address)));
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
                    all.fdb.extend(message::fdb(&message));
                } else {
                    all.neighbours.extend(message::neighbour(&message));
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
            Op::SetDevice(index, device, mac) => self.set_device(*index, device, *mac).await,
            Op::AddAddress(index, net) => self.add_address(*index, *net).await,
            Op::DeleteAddress(index, net) => gone(
                self.request(
                    RouteNetlinkMessage::DelAddress(message::address_of(*index, *net)),
                    0,
                )
                .await,
            ),
            Op::SetNeighbour(index, address, mac) => self.set_neighbour(*index, *address, *mac).await,
            Op::DeleteNeighbour(index, address) => {
                let message = message::neighbour_of(*index, *address, None);
                gone(self.request(RouteNetlinkMessage::DelNeighbour(message), 0).await)
            }
            Op::SetFdb(index, mac, dst) => {
                let message = message::fdb_of(*index, *mac, Some(*dst));
                self.request(
                    RouteNetlinkMessage::NewNeighbour(message),
                    NLM_F_CREATE | NLM_F_REPLACE,
                )
                .await
            }
            Op::DeleteFdb(index, mac, dst) => {
                let message = message::fdb_of(*index, *mac, *dst);
                gone(self.request(RouteNetlinkMessage::DelNeighbour(message), 0).await)
            }
            Op::SetProxy(index, ip) => {
                let message = message::proxy_of(*index, *ip);
                self.request(RouteNetlinkMessage::NewNeighbour(message), NLM_F_CREATE)
                    .await
            }
            Op::DeleteProxy(index, ip) => {
                let message = message::proxy_of(*index, *ip);
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
        let message = message::address_of(index, net);
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
        let message = message::neighbour_of(index, address, Some(mac));
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
        let mut message = message::route_of(route);
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
        self.request(RouteNetlinkMessage::DelRoute(message::route_of(route)), 0)
            .await
    }

    async fn create(&self, device: &Device) -> std::io::Result<()> {
        let message = message::new_vxlan(device);
        self.request(RouteNetlinkMessage::NewLink(message), NLM_F_CREATE | NLM_F_EXCL)
            .await?;
        sysctl::set(&format!("ipv6/conf/{}/accept_ra", device.name), "0")
    }

    async fn set_device(&self, index: u32, device: &Device, mac: bool) -> std::io::Result<()> {
        let message = message::set_link(index, device, mac);
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
