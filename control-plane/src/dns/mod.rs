//! The cluster's DNS (Kubernetes DNS specification 1.1.0): names of Services, of the pods behind headless ones, and of
//! pods by address; everything else is asked of the servers of this machine's `/etc/resolv.conf`.
//!
//! Answers come from watches of the API as any client has them, so a change shows as soon as it is told. Clients reach it
//! at the ClusterIP of the Service `kube-system/kube-dns`, whose EndpointSlice names the control planes that serve.

mod cache;
mod forward;
mod resolve;
mod serve;
#[cfg(test)]
mod tests;
mod zone;

use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, PoisonError, RwLock};

use anyhow::{Context as _, Result};
use hickory_proto::rr::Name;
use ipnet::IpNet;
use kube::Client;
use tokio::net::{TcpListener, UdpSocket};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use forward::Forwarder;
use zone::Zone;

/// What the server has to know beside the API's objects.
#[derive(Debug, Clone)]
pub struct Settings {
    /// The cluster's domain, such as `cluster.local`.
    pub domain: String,
    /// Addresses of the Service through which clients come.
    pub addresses: Vec<IpAddr>,
    /// Ranges of pods, which may ask.
    pub clients: Vec<IpNet>,
    /// Servers to ask about other names, if not those of `/etc/resolv.conf`.
    pub upstream: Vec<SocketAddr>,
}

/// Sockets that are bound and not served yet.
#[derive(Debug)]
pub struct Sockets {
    udp: UdpSocket,
    tcp: TcpListener,
}

impl Sockets {
    /// Binds both protocols to the same address and port.
    ///
    /// # Errors
    /// When the address is not this machine's, or the port is taken.
    pub async fn bind(address: SocketAddr) -> Result<Self> {
        let tcp = TcpListener::bind(address)
            .await
            .with_context(|| format!("listen for DNS on {address} over TCP"))?;
        let address = tcp.local_addr()?;
        let udp = UdpSocket::bind(address)
            .await
            .with_context(|| format!("listen for DNS on {address} over UDP"))?;
        Ok(Self { udp, tcp })
    }

    /// Where they are bound.
    ///
    /// # Errors
    /// When the kernel does not say.
    pub fn address(&self) -> Result<SocketAddr> {
        Ok(self.tcp.local_addr()?)
    }
}

/// What answers: shared by everything that serves.
struct Dns {
    zone: RwLock<Zone>,
    forwarder: Forwarder,
    /// Who may ask beside the nodes, whose addresses the zone knows.
    clients: Vec<IpNet>,
}

impl Dns {
    fn new(settings: Settings, own: IpAddr) -> Result<Self> {
        let domain = Name::from_ascii(&settings.domain)
            .with_context(|| format!("{:?} is no domain", settings.domain))?;
        let mut clients = settings.clients;
        clients.push(own.into());
        let own: Vec<IpAddr> = settings.addresses.iter().copied().chain([own]).collect();
        Ok(Self {
            zone: RwLock::new(Zone::new(&domain, settings.addresses)),
            forwarder: Forwarder::new(settings.upstream, own),
            clients,
        })
    }

    /// Reads what is known now; for a moment only.
    fn zone<T>(&self, read: impl FnOnce(&Zone) -> T) -> T {
        read(&self.zone.read().unwrap_or_else(PoisonError::into_inner))
    }

    /// Whether this client belongs to the cluster: to the rest of the world this is no server.
    fn serves(&self, client: IpAddr) -> bool {
        let client = client.to_canonical();
        client.is_loopback()
            || self.clients.iter().any(|range| range.contains(&client))
            || self.zone(|zone| zone.is_node(client))
    }
}

/// Serves until `stop` is cancelled.
///
/// # Errors
/// When the settings name no domain.
pub fn start(
    sockets: Sockets,
    settings: Settings,
    client: Client,
    tasks: &TaskTracker,
    stop: &CancellationToken,
) -> Result<()> {
    let own = sockets.address()?;
    let dns = Arc::new(Dns::new(settings, own.ip())?);
    tasks.spawn(cache::follow(Arc::clone(&dns), client, stop.clone()));
    tasks.spawn(serve::udp(Arc::clone(&dns), sockets.udp, stop.clone()));
    tasks.spawn(serve::tcp(dns, sockets.tcp, stop.clone()));
    tracing::info!(address = %own, "serving the cluster's DNS");
    Ok(())
}
