//! The addresses of this host's interfaces, from the kernel.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::time::Duration;

use futures::{StreamExt as _, TryStreamExt as _};
use rtnetlink::packet_core::NetlinkMessage;
use rtnetlink::packet_route::RouteNetlinkMessage;
use rtnetlink::packet_route::address::{AddressAttribute, AddressMessage};
use rtnetlink::{Handle, MulticastGroup};

/// Changes come in bursts: one is waited out before the addresses are read again.
const QUIET: Duration = Duration::from_millis(20);

type Messages = futures::channel::mpsc::UnboundedReceiver<(
    NetlinkMessage<RouteNetlinkMessage>,
    rtnetlink::sys::SocketAddr,
)>;

/// A netlink socket in the network namespace of the thread that opens it.
pub(super) struct Host {
    handle: Handle,
    messages: Messages,
    connection: tokio::task::JoinHandle<()>,
}

impl Host {
    pub(super) fn open() -> std::io::Result<Self> {
        let groups = [MulticastGroup::Ipv4Ifaddr, MulticastGroup::Ipv6Ifaddr];
        let (connection, handle, messages) = rtnetlink::new_multicast_connection(&groups)?;
        Ok(Self {
            handle,
            messages,
            connection: tokio::spawn(connection),
        })
    }

    /// Every address of every interface.
    pub(super) async fn addresses(&self) -> Result<BTreeSet<IpAddr>, rtnetlink::Error> {
        let messages: Vec<AddressMessage> = self.handle.address().get().execute().try_collect().await?;
        Ok(messages.iter().filter_map(address).collect())
    }

    /// Ends when addresses may have changed; also when the kernel has dropped messages. False if there will be none any
    /// more.
    pub(super) async fn changed(&mut self) -> bool {
        if self.messages.next().await.is_none() {
            return false;
        }
        while let Ok(next) = tokio::time::timeout(QUIET, self.messages.next()).await {
            if next.is_none() {
                return false;
            }
        }
        true
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        self.connection.abort();
    }
}

/// The interface's own address: on a point-to-point link `IFA_ADDRESS` is the other end's.
fn address(message: &AddressMessage) -> Option<IpAddr> {
    let mut other = None;
    for attribute in &message.attributes {
        match attribute {
            AddressAttribute::Local(ip) => return Some(*ip),
            AddressAttribute::Address(ip) => other = Some(*ip),
            _ => {}
        }
    }
    other
}
