//! The addresses that the sockets of each network namespace call from, for `loadBalancerSourceRanges`.
//!
//! A socket has no source address yet when the socket programs judge it. Its namespace has one: that of its default route, or
//! the first that it has at all. While nobody has told it, the socket is left to the packet path, which sees the source.

use std::collections::BTreeMap;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, UdpSocket};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use dataplane_common::abi::{Addr, NetnsAddrs};
use tracing::{debug, warn};

use super::namespaces::{self, Namespace};
use crate::cni::netns;
use crate::kernel::mounts::netns_cookie;
use crate::kernel::{KernelError, NodeTables};

/// How often new namespaces are looked for while a service has source ranges.
const PERIOD: Duration = Duration::from_secs(2);
/// After this time a namespace is asked again.
const AGAIN: Duration = Duration::from_secs(30);
/// Addresses that are nobody's (RFC 5737, RFC 3849): only the route to them matters, nothing is sent.
const FAR: (Ipv4Addr, Ipv6Addr) = (
    Ipv4Addr::new(203, 0, 113, 1),
    Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1),
);

/// What is known of namespaces, by inode.
#[derive(Debug)]
pub struct Sources {
    root: PathBuf,
    known: BTreeMap<u64, Known>,
}

#[derive(Debug)]
struct Known {
    asked: Instant,
    cookie: u64,
    addrs: NetnsAddrs,
}

impl Sources {
    /// `root` is `/`, or where the host's `proc` and `run` are mounted.
    #[must_use]
    pub const fn new(root: PathBuf) -> Self {
        Self {
            root,
            known: BTreeMap::new(),
        }
    }

    /// The addresses of each namespace that there is, by its cookie. Blocks for some milliseconds.
    ///
    /// # Errors
    ///
    /// If the namespaces cannot be found.
    pub fn read(&mut self) -> io::Result<BTreeMap<u64, NetnsAddrs>> {
        let now = Instant::now();
        let found = namespaces::all(&self.root)?;
        self.known
            .retain(|inode, _| found.iter().any(|n| n.inode == *inode));
        for namespace in &found {
            let fresh = |known: &Known| {
                now.duration_since(known.asked) < AGAIN && known.addrs != NetnsAddrs::default()
            };
            if self.known.get(&namespace.inode).is_some_and(fresh) {
                continue;
            }
            match ask(namespace) {
                Ok((cookie, addrs)) => {
                    let known = Known {
                        asked: now,
                        cookie,
                        addrs,
                    };
                    self.known.insert(namespace.inode, known);
                }
                // it may be on its way out
                Err(error) => debug!(namespace = %namespace.path.display(), %error, "no addresses"),
            }
        }
        let known = self.known.values().filter(|k| k.addrs != NetnsAddrs::default());
        Ok(known.map(|k| (k.cookie, k.addrs)).collect())
    }
}

fn ask(namespace: &Namespace) -> io::Result<(u64, NetnsAddrs)> {
    netns::enter(&namespace.file, || {
        let cookie = netns_cookie().map_err(io::Error::other)?;
        let interfaces: Vec<IpAddr> = nix::ifaddrs::getifaddrs()?
            .filter_map(|interface| {
                let address = interface.address?;
                let v4 = address.as_sockaddr_in().map(|a| IpAddr::V4(a.ip()));
                v4.or_else(|| address.as_sockaddr_in6().map(|a| IpAddr::V6(a.ip())))
            })
            .filter(|ip| match ip {
                IpAddr::V4(ip) => !ip.is_loopback() && !ip.is_link_local(),
                IpAddr::V6(ip) => !ip.is_loopback() && !ip.is_unicast_link_local(),
            })
            .collect();
        let of = |far: IpAddr| {
            let first = || {
                interfaces
                    .iter()
                    .find(|ip| ip.is_ipv4() == far.is_ipv4())
                    .copied()
            };
            towards(far).or_else(first).map_or(Addr::default(), Into::into)
        };
        let (v4, v6) = (of(FAR.0.into()), of(FAR.1.into()));
        Ok((cookie, NetnsAddrs { v4, v6 }))
    })
}

/// The source address of the route to an address.
fn towards(far: IpAddr) -> Option<IpAddr> {
    let any: IpAddr = match far {
        IpAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        IpAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    };
    let socket = UdpSocket::bind((any, 0)).ok()?;
    socket.connect((far, 9)).ok()?;
    let ip = socket.local_addr().ok()?.ip();
    (!ip.is_unspecified() && !ip.is_loopback()).then_some(ip)
}

/// Keeps the table in step as long as a service has source ranges. Never ends.
///
/// # Errors
///
/// If the table cannot be read at all.
pub async fn keep(root: &Path, mut tables: NodeTables) -> Result<(), KernelError> {
    let mut sources = Sources::new(root.into());
    let mut period = tokio::time::interval(PERIOD);
    period.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    let mut written = None;
    loop {
        period.tick().await;
        if !tables.has_source_ranges()? {
            continue;
        }
        let read;
        (sources, read) = match tokio::task::spawn_blocking(move || {
            let read = sources.read();
            (sources, read)
        })
        .await
        {
            Ok(done) => done,
            Err(error) => {
                warn!(%error, "reading the addresses of network namespaces failed");
                (Sources::new(root.into()), Ok(BTreeMap::new()))
            }
        };
        match read {
            Ok(addrs) if written.as_ref() != Some(&addrs) => match tables.set_netns_addrs(&addrs) {
                Ok(()) => written = Some(addrs),
                Err(error) => {
                    warn!(%error, "the addresses of network namespaces cannot be written: source ranges do not hold for all sockets");
                }
            },
            Ok(_) => {}
            Err(error) => warn!(%error, "the network namespaces of this node cannot be found"),
        }
    }
}
