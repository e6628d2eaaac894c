//! kube-proxy's ipvs mode: virtual servers in the kernel's own load balancer, a device that makes Service addresses this
//! host's, sets and rules around them.
//!
//! Every packet of a connection asks ipvs, and goes nowhere once the server is gone; so a server stays until its last
//! connection has ended, and all else until that of the last server. New ones do not come here any more: our programs are
//! before it, on sockets and on devices. A server without connections goes at once, though: ipvs remembers those that have
//! ended for two minutes, and would take the answers to a client that connects from such a port again for theirs. With
//! its server it forgets them (since Linux 5.9, with `expire_nodest_conn`, which kube-proxy sets).
//! Virtual servers of others (keepalived) are not touched: kube-proxy's have an address of its device, or a node port
//! of its sets.

use std::collections::{BTreeSet, HashSet};
use std::fs;
use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use nix::ifaddrs::getifaddrs;
use nix::sys::socket::SockProtocol;

use super::names;
use super::netlink::{Attrs, NLM_F_ACK, Socket, attr_u16};
use super::{Counts, Survey, ipset};

// include/uapi/linux/genetlink.h
const CONTROLLER: u16 = 16;
const GET_FAMILY: u8 = 3;
const FAMILY_ID: u16 = 1;
const FAMILY_NAME: u16 = 2;
// include/uapi/linux/ip_vs.h
const DELETE_SERVICE: u8 = 3;
const SERVICE: u16 = 1;
const SERVICE_FAMILY: u16 = 1;
const SERVICE_PROTOCOL: u16 = 2;
const SERVICE_ADDRESS: u16 = 3;
const SERVICE_PORT: u16 = 4;
// include/uapi/linux/rtnetlink.h, if_link.h
const DELETE_LINK: u16 = 17;
const LINK_NAME: u16 = 3;
/// `struct ifinfomsg`, all 0.
const ANY_LINK: [u8; 16] = [0; 16];

/// A virtual server.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
struct Server {
    /// `IPPROTO_*`.
    protocol: u16,
    address: IpAddr,
    port: u16,
}

impl Server {
    /// From a line of `/proc/net/ip_vs` (ip_vs_info_seq_show): `TCP  0A60000A:0050 rr`, or with `[fd00:…:000a]:0050`. None
    /// for backends, and for servers that go by a mark.
    fn parse(line: &str) -> Option<Self> {
        let mut words = line.split_whitespace();
        let protocol = match words.next()? {
            "TCP" => libc::IPPROTO_TCP,
            "UDP" => libc::IPPROTO_UDP,
            "SCTP" => libc::IPPROTO_SCTP,
            _ => return None,
        };
        let (address, port) = words.next()?.rsplit_once(':')?;
        Some(Self {
            protocol: u16::try_from(protocol).ok()?,
            address: match address.strip_prefix('[') {
                Some(v6) => v6.strip_suffix(']')?.parse::<Ipv6Addr>().ok()?.into(),
                None => Ipv4Addr::from(u32::from_str_radix(address, 16).ok()?).into(),
            },
            port: u16::from_str_radix(port, 16).ok()?,
        })
    }

    /// As [`Self::parse`], from the columns of a connection.
    fn of_connection(words: &[&str]) -> Option<Self> {
        let (protocol, address, port) = (words.first()?, words.get(3)?, words.get(4)?);
        if address.contains(':') {
            Self::parse(&format!("{protocol} [{address}]:{port}"))
        } else {
            Self::parse(&format!("{protocol} {address}:{port}"))
        }
    }

    fn attrs(&self) -> Attrs {
        let (family, address) = match self.address {
            // union nf_inet_addr
            IpAddr::V4(ip) => (libc::AF_INET, [ip.octets().as_slice(), &[0; 12]].concat()),
            IpAddr::V6(ip) => (libc::AF_INET6, ip.octets().into()),
        };
        let service = Attrs::new()
            .u16(SERVICE_FAMILY, u16::try_from(family).unwrap_or_default())
            .u16(SERVICE_PROTOCOL, self.protocol)
            .bytes(SERVICE_ADDRESS, &address)
            .be16(SERVICE_PORT, self.port);
        Attrs::new().nested(SERVICE, &service)
    }
}

/// A connection by the first words of its line: protocol, client, virtual server and backend.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub(super) struct Connection(String);

impl Connection {
    #[cfg(test)]
    pub(super) fn for_tests(name: &str) -> Self {
        Self(name.into())
    }

    /// From a line of `/proc/net/ip_vs_conn` (ip_vs_conn_seq_show) if the connection may send or get something yet.
    /// Those of clients without a port are what session affinity remembers. SYN_SENT is the answer to a new connection,
    /// which is not ipvs' own, from the ports of one that has ended: ipvs translates it as we would.
    fn parse(line: &str) -> Option<Self> {
        let words: Vec<&str> = line.split_whitespace().collect();
        let (id, state) = (words.get(..7)?, *words.get(7)?);
        let is_head = id[0] == "Pro";
        let ended = ["TIME_WAIT", "CLOSE", "CLOSED", "SYN_SENT"].contains(&state);
        (!is_head && !ended && id[2] != "0000").then(|| Self(id.join(" ")))
    }
}

/// A file of `/proc/net` in our network namespace; empty while the module is not loaded.
fn proc_net(name: &str) -> io::Result<String> {
    match fs::read_to_string(format!("/proc/thread-self/net/{name}")) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(String::new()),
        other => other,
    }
}

/// `/sys/class/net` shows the network namespace of whoever mounted it; this file that of the reader.
fn has_device() -> io::Result<bool> {
    let devices = proc_net("dev")?;
    let mut names = devices.lines().filter_map(|line| line.split_once(':'));
    Ok(names.any(|(device, _)| device.trim() == names::IPVS_DEVICE))
}

/// Addresses of kube-proxy's device.
fn addresses() -> io::Result<BTreeSet<IpAddr>> {
    let all = getifaddrs()?.filter(|found| found.interface_name == names::IPVS_DEVICE);
    let ip = |address: nix::sys::socket::SockaddrStorage| {
        let v4 = address.as_sockaddr_in().map(|v4| IpAddr::from(v4.ip()));
        v4.or_else(|| address.as_sockaddr_in6().map(|v6| v6.ip().into()))
    };
    Ok(all.filter_map(|found| found.address.and_then(ip)).collect())
}

/// kube-proxy's virtual servers.
fn servers(socket: &mut Socket, sets: &BTreeSet<String>) -> io::Result<BTreeSet<Server>> {
    let text = proc_net("ip_vs")?;
    let all = text.lines().filter_map(Server::parse);
    let addresses = addresses()?;
    let mut ports = BTreeSet::new();
    for set in names::NODE_PORT_SETS
        .into_iter()
        .filter(|set| sets.contains(*set))
    {
        ports.append(&mut ipset::ports(socket, set)?);
    }
    Ok(all
        .filter(|server| addresses.contains(&server.address) || ports.contains(&server.port))
        .collect())
}

/// Says what there is of kube-proxy's ipvs mode.
pub(super) fn survey(socket: &mut Socket, survey: &mut Survey) -> io::Result<()> {
    let sets = ipset::of_kube_proxy(socket)?;
    survey.ipvs = has_device()? || !sets.is_empty();
    if survey.ipvs {
        let servers = servers(socket, &sets)?.len();
        survey
            .rules
            .push(format!("ipvs ({servers} virtual servers, {} ipsets)", sets.len()));
    }
    Ok(())
}

/// Connections that go through virtual servers, whoever made these.
pub(super) fn connections() -> io::Result<HashSet<Connection>> {
    let text = proc_net("ip_vs_conn")?;
    Ok(text.lines().filter_map(Connection::parse).collect())
}

/// Removes those of kube-proxy's virtual servers that have none of these connections.
pub(super) fn remove_idle(socket: &mut Socket, running: &HashSet<Connection>) -> io::Result<()> {
    let sets = ipset::of_kube_proxy(socket)?;
    let mut idle = servers(socket, &sets)?;
    for connection in running {
        let words: Vec<&str> = connection.0.split(' ').collect();
        if let Some(server) = Server::of_connection(&words) {
            idle.remove(&server);
        }
    }
    delete(&idle).map(drop)
}

/// Removes kube-proxy's virtual servers, and the device that has their addresses. The sets by which they are known are
/// removed last: see [`remove_sets`].
pub(super) fn remove(socket: &mut Socket, counts: &mut Counts) -> io::Result<()> {
    let sets = ipset::of_kube_proxy(socket)?;
    counts.servers += delete(&servers(socket, &sets)?)?;
    if has_device()? {
        let name = Attrs::new().string(LINK_NAME, names::IPVS_DEVICE);
        let mut route = Socket::of(SockProtocol::NetlinkRoute)?;
        match route.ask(DELETE_LINK, NLM_F_ACK, &ANY_LINK, &name) {
            Err(error) if error.raw_os_error() != Some(libc::ENODEV) => {
                let text = format!("remove the device {}: {error}", names::IPVS_DEVICE);
                return Err(io::Error::other(text));
            }
            _ => {}
        }
    }
    Ok(())
}

/// Gives how many were there.
fn delete(servers: &BTreeSet<Server>) -> io::Result<usize> {
    let mut count = 0;
    if servers.is_empty() {
        return Ok(count);
    }
    let mut generic = Socket::of(SockProtocol::NetlinkGeneric)?;
    let family = family(&mut generic)?;
    for server in servers {
        let head = [DELETE_SERVICE, 1, 0, 0];
        match generic.ask(family, NLM_F_ACK, &head, &server.attrs()) {
            Ok(_) => count += 1,
            // somebody else was faster
            Err(error) if error.raw_os_error() == Some(libc::ESRCH) => {}
            Err(error) => {
                let Server { address, port, .. } = server;
                let text = format!("remove the virtual server {address} port {port}: {error}");
                return Err(io::Error::other(text));
            }
        }
    }
    Ok(count)
}

/// Removes kube-proxy's sets, once no rule asks them.
pub(super) fn remove_sets(socket: &mut Socket, counts: &mut Counts) -> io::Result<()> {
    for set in ipset::of_kube_proxy(socket)? {
        ipset::destroy(socket, &set)?;
        counts.sets += 1;
    }
    Ok(())
}

/// The number of ipvs' own netlink family.
fn family(generic: &mut Socket) -> io::Result<u16> {
    let name = Attrs::new().string(FAMILY_NAME, "IPVS");
    let answer = generic.ask(CONTROLLER, 0, &[GET_FAMILY, 1, 0, 0], &name)?;
    attr_u16(&answer, FAMILY_ID).ok_or_else(|| io::Error::other("ipvs has no number"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn virtual_servers_are_read_from_what_the_kernel_prints() {
        let text = "IP Virtual Server version 1.2.1 (size=4096)
Prot LocalAddress:Port Scheduler Flags
  -> RemoteAddress:Port Forward Weight ActiveConn InActConn
TCP  0A60000A:0050 rr persistent 10800 FFFFFFFF
  -> 0AF40102:0050      Masq    1      0          0
UDP  [fd00:0010:0096:0000:0000:0000:0000:000a]:0035 rr
  -> [fd00:0010:0244:0001:0000:0000:0000:0002]:0035      Masq    1      0          0
FWM  00000001 rr
SCTP C0A80101:7531 wrr\n";
        let found: Vec<Server> = text.lines().filter_map(Server::parse).collect();
        let server = |protocol, address: &str, port| Server {
            protocol,
            address: address.parse().unwrap(),
            port,
        };
        assert_eq!(
            found,
            [
                server(6, "10.96.0.10", 80),
                server(17, "fd00:10:96::a", 53),
                server(132, "192.168.1.1", 30001),
            ]
        );
    }

    #[test]
    fn connections_count_until_both_ends_are_closed() {
        let text = "Pro FromIP   FPrt ToIP     TPrt DestIP   DPrt State       Expires PEName PEData
TCP 0AF40103 9C40 0A60000A 0050 0AF40102 1F90 ESTABLISHED     899
TCP 0AF40103 9C41 0A60000A 0050 0AF40102 1F90 FIN_WAIT        119
TCP 0AF40103 9C42 0A60000A 0050 0AF40102 1F90 TIME_WAIT       119
TCP 0AF40103 9C43 0A60000A 0050 0AF40102 1F90 CLOSE             9
TCP 0AF40103 9C45 0A60000A 0050 0AF40102 1F90 SYN_SENT        119
TCP 0AF40103 0000 0A60000A 0050 0AF40102 1F90 NONE          10799
UDP fd00:0010:0244:0001:0000:0000:0000:0003 9C44 fd00:0010:0096:0000:0000:0000:0000:000a 0035 fd00:0010:0244:0001:0000:0000:0000:0002 0035 UDP             299
TCP cut short\n";
        let found: Vec<Connection> = text.lines().filter_map(Connection::parse).collect();
        assert_eq!(found.len(), 3);
        assert_eq!(found[0].0, "TCP 0AF40103 9C40 0A60000A 0050 0AF40102 1F90");
        let server = |at: usize| {
            let words: Vec<&str> = found[at].0.split(' ').collect();
            Server::of_connection(&words)
                .map(|server| (server.protocol, server.address.to_string(), server.port))
        };
        assert_eq!(server(0), Some((6, "10.96.0.10".into(), 80)));
        assert_eq!(server(2), Some((17, "fd00:10:96::a".into(), 53)));
    }
}
