//! What the kernel tells over a routing netlink socket, and when it has changed.

use std::io;
use std::net::IpAddr;
use std::time::Duration;

use futures::StreamExt as _;
use rtnetlink::packet_core::NetlinkMessage;
use rtnetlink::packet_route::RouteNetlinkMessage;
use rtnetlink::packet_route::address::{AddressAttribute, AddressMessage};
use rtnetlink::{Handle, MulticastGroup};

/// A change that the kernel has told.
pub(crate) type Message = NetlinkMessage<RouteNetlinkMessage>;

/// Longest burst of changes that is waited out.
const LONGEST: Duration = Duration::from_secs(1);

/// A netlink socket in the network namespace of the thread that opens it.
pub(crate) struct Socket {
    /// To ask it.
    pub(crate) handle: Handle,
    messages: futures::channel::mpsc::UnboundedReceiver<(Message, rtnetlink::sys::SocketAddr)>,
    connection: tokio::task::JoinHandle<()>,
}

impl Socket {
    /// Opens it; what happens in these groups is told.
    pub(crate) fn open(groups: &[MulticastGroup]) -> io::Result<Self> {
        let (connection, handle, messages) = rtnetlink::new_multicast_connection(groups)?;
        Ok(Self {
            handle,
            messages,
            connection: tokio::spawn(connection),
        })
    }

    /// Ends when something that matters may have changed and nothing more has for the time `quiet`; also when the kernel has
    /// dropped messages. Changes come in bursts, but none is waited out for longer than a second. False if there will be
    /// none any more.
    pub(crate) async fn changed(&mut self, quiet: Duration, matters: impl Fn(&Message) -> bool) -> bool {
        loop {
            match self.messages.next().await {
                None => return false,
                Some((message, _)) if matters(&message) => break,
                Some(_) => {}
            }
        }
        let wait = async {
            while let Ok(next) = tokio::time::timeout(quiet, self.messages.next()).await {
                if next.is_none() {
                    return false;
                }
            }
            true
        };
        tokio::time::timeout(LONGEST, wait).await.unwrap_or(true)
    }
}

impl Drop for Socket {
    fn drop(&mut self) {
        self.connection.abort();
    }
}

/// The interface's own address: on a point-to-point link `IFA_ADDRESS` is the other end's.
pub(crate) fn own_address(message: &AddressMessage) -> Option<IpAddr> {
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
