//! Sockets that are connected, through a service, to a backend that serves it no more.
//!
//! The socket programs choose a backend when a socket connects; nothing moves it afterwards. A connected UDP socket whose
//! backend has gone would send into the void for ever, and a TCP connection would wait for its time-outs. Destroyed, the
//! application learns of it at once (`ECONNABORTED`) and connects again.
//!
//! Left alone are sockets that were connected to the backend directly, and sockets of the kernel itself (NFS, SMB): these no
//! process has open.

use std::collections::{HashMap, HashSet};
use std::fs;
use std::io;
use std::net::SocketAddr;
use std::path::Path;

use dataplane_common::abi::{NO_ID, SockState, protocol};
use tracing::{debug, warn};

use super::diag::{Diag, Socket};
use super::namespaces::{self, Namespace};
use crate::cni::netns;
use crate::kernel::Translations;

/// A backend that serves a service no more.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Stale {
    /// Its address.
    pub addr: SocketAddr,
    /// TCP or UDP (IANA number).
    pub protocol: u8,
    /// Row of the service in `SERVICES`; `None`: it serves nobody any more.
    pub service: Option<u32>,
}

impl Stale {
    fn is_hit(&self, socket: &Socket, state: &SockState) -> bool {
        self.addr == socket.peer && backend(state) == Some(socket.peer) && self.served(state)
    }

    fn served(&self, state: &SockState) -> bool {
        self.service.is_none_or(|service| service == state.service)
    }
}

/// The backend that a socket was led to.
fn backend(state: &SockState) -> Option<SocketAddr> {
    let addr = SocketAddr::new(state.backend_addr.to_ip(), state.backend_port.to_host());
    (state.backend != NO_ID).then_some(addr)
}

/// What was done.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub struct Report {
    /// Sockets destroyed.
    pub destroyed: usize,
    /// Sockets of the kernel that were left alone.
    pub kernel: usize,
    /// Network namespaces that could not be looked at, and why.
    pub errors: Vec<String>,
}

/// Those of these to which a socket is connected through a service, as far as the socket programs know. Most backends go
/// without any, and then neither sockets nor processes need to be looked at. (A UDP socket counts for a TCP backend of the
/// same address, too.)
///
/// # Errors
///
/// If the programs' table cannot be read.
pub fn in_use(stale: &[Stale], translations: &Translations) -> io::Result<Vec<Stale>> {
    let mut by_addr: HashMap<SocketAddr, Vec<usize>> = HashMap::new();
    for (number, stale) in stale.iter().enumerate() {
        by_addr.entry(stale.addr).or_default().push(number);
    }
    let mut used = vec![false; stale.len()];
    if !by_addr.is_empty() {
        let mark = |_, state: &SockState| {
            let here = backend(state).and_then(|addr| by_addr.get(&addr));
            for &number in here.into_iter().flatten() {
                used[number] |= stale[number].served(state);
            }
        };
        translations.visit(mark).map_err(io::Error::other)?;
    }
    let used = stale.iter().zip(used).filter(|(_, used)| *used);
    Ok(used.map(|(stale, _)| stale.clone()).collect())
}

/// Destroys the sockets of every process on the node, in whatever network namespace, that are connected to one of these
/// through a service. Blocks for some milliseconds, more with many namespaces or sockets.
///
/// `root` is `/`, or where the host's `proc` and `run` are mounted.
///
/// # Errors
///
/// If the programs' table or the node's network namespaces cannot be read. What fails in one of them is in the report.
pub fn destroy(root: &Path, stale: &[Stale], translations: &Translations) -> io::Result<Report> {
    let mut report = Report::default();
    let stale = &in_use(stale, translations)?;
    if stale.is_empty() {
        return Ok(report);
    }
    for namespace in namespaces::all(root)? {
        let done = netns::enter(&namespace.file, || in_this(root, stale, translations));
        match done {
            Ok((destroyed, kernel)) => {
                report.destroyed += destroyed;
                report.kernel += kernel;
            }
            Err(error) => report.errors.push(said(&namespace, &error)),
        }
    }
    if report.destroyed > 0 {
        debug!(
            sockets = report.destroyed,
            "destroyed sockets that were connected to backends that have gone"
        );
    }
    for error in &report.errors {
        warn!("stale sockets stay: {error}");
    }
    Ok(report)
}

fn said(namespace: &Namespace, error: &io::Error) -> String {
    if error.raw_os_error() == Some(libc::EOPNOTSUPP) {
        format!(
            "{}: the kernel cannot destroy sockets (CONFIG_INET_DIAG_DESTROY)",
            namespace.path.display()
        )
    } else {
        format!("{}: {error}", namespace.path.display())
    }
}

/// In the network namespace of this thread: how many were destroyed, and how many are the kernel's.
fn in_this(root: &Path, stale: &[Stale], translations: &Translations) -> io::Result<(usize, usize)> {
    let mut diag = Diag::open()?;
    let mut hit = Vec::new();
    for number in [protocol::UDP, protocol::TCP] {
        let wanted: Vec<&Stale> = stale.iter().filter(|s| s.protocol == number).collect();
        let ports: HashSet<u16> = wanted.iter().map(|s| s.addr.port()).collect();
        // one port is asked for as such; a few more are cheaper to find in everything
        let port = match ports.iter().next() {
            None => continue,
            Some(port) => Some(*port).filter(|_| ports.len() == 1),
        };
        for socket in diag.connected(number, port)? {
            if !wanted.iter().any(|s| s.addr == socket.peer) {
                continue;
            }
            // a socket that connected there directly has none
            let state = translations.get(socket.cookie);
            if state.is_some_and(|state| wanted.iter().any(|s| s.is_hit(&socket, &state))) {
                hit.push(socket);
            }
        }
    }
    if hit.is_empty() {
        return Ok((0, 0));
    }
    let owned = open_in_processes(root, &hit.iter().map(|s| s.inode).collect())?;
    let (mut destroyed, mut kernel) = (0, 0);
    for socket in hit {
        if !owned.contains(&socket.inode) {
            kernel += 1;
        } else if diag.destroy(&socket)? {
            destroyed += 1;
        }
    }
    Ok((destroyed, kernel))
}

/// Those of these inodes of sockets that a process has open.
fn open_in_processes(root: &Path, inodes: &HashSet<u32>) -> io::Result<HashSet<u32>> {
    let mut found = HashSet::new();
    for process in namespaces::processes(root)? {
        let descriptors = fs::read_dir(process.join("fd")).into_iter().flatten().flatten();
        let links = descriptors.filter_map(|entry| fs::read_link(entry.path()).ok());
        found.extend(
            links
                .filter_map(|link| inode(&link))
                .filter(|inode| inodes.contains(inode)),
        );
        if found.len() == inodes.len() {
            break;
        }
    }
    Ok(found)
}

/// The inode in `socket:[123]`.
fn inode(link: &Path) -> Option<u32> {
    link.to_str()?
        .strip_prefix("socket:[")?
        .strip_suffix(']')?
        .parse()
        .ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_name_sockets() {
        assert_eq!(inode(Path::new("socket:[4711]")), Some(4711));
        for other in [
            "pipe:[1]",
            "socket:[]",
            "socket:[-1]",
            "/socket:[1]",
            "socket:[99999999999]",
        ] {
            assert_eq!(inode(Path::new(other)), None, "{other}");
        }
    }

    #[test]
    fn sockets_of_processes_are_found() {
        use std::os::fd::AsRawFd;
        use std::os::unix::fs::MetadataExt;
        let socket = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        let path = format!("/proc/self/fd/{}", socket.as_raw_fd());
        let own = u32::try_from(fs::metadata(path).unwrap().ino()).unwrap();
        let found = open_in_processes(Path::new("/"), &[own, u32::MAX].into()).unwrap();
        assert_eq!(found, [own].into());
    }
}
