//! Listing and destroying sockets of a network namespace over netlink (`NETLINK_SOCK_DIAG`, include/uapi/linux/inet_diag.h).

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

const SOCK_DIAG_BY_FAMILY: u16 = 20;
const SOCK_DESTROY: u16 = 21;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const NLM_F_REQUEST: u16 = 1;
const NLM_F_ACK: u16 = 4;
const NLM_F_DUMP: u16 = 0x300;
/// Length of `struct nlmsghdr`.
const HEADER: usize = 16;
/// Length of `struct inet_diag_sockid`.
const ID: usize = 48;
/// States of connected sockets: all but `TCP_CLOSE`, `TCP_TIME_WAIT`, `TCP_LISTEN`, `TCP_NEW_SYN_RECV` (include/net/tcp_states.h).
/// Connected UDP sockets are `TCP_ESTABLISHED`.
const CONNECTED: u32 = 0xfff & !(1 << 6 | 1 << 7 | 1 << 10);

/// A connected socket.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Socket {
    family: u8,
    protocol: u8,
    /// `struct inet_diag_sockid`, as the kernel gave it.
    id: [u8; ID],
    /// Where it is connected to; IPv4-mapped addresses are given as IPv4.
    pub(super) peer: SocketAddr,
    /// `bpf_get_socket_cookie`.
    pub(super) cookie: u64,
    /// Inode of the socket's file; 0 if it has none.
    pub(super) inode: u32,
}

/// A netlink socket. It belongs to the network namespace of the thread that opens it.
pub(super) struct Diag {
    fd: OwnedFd,
    sequence: u32,
}

impl Diag {
    pub(super) fn open() -> io::Result<Self> {
        // SAFETY: a plain system call.
        let fd = unsafe {
            libc::socket(
                libc::AF_NETLINK,
                libc::SOCK_RAW | libc::SOCK_CLOEXEC,
                libc::NETLINK_SOCK_DIAG,
            )
        };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the kernel has just given this descriptor to us.
        let fd = unsafe { OwnedFd::from_raw_fd(fd) };
        Ok(Self { fd, sequence: 0 })
    }

    /// Connected sockets of a protocol, IPv4 and IPv6; only those connected to a port if one is given.
    pub(super) fn connected(&mut self, protocol: u8, port: Option<u16>) -> io::Result<Vec<Socket>> {
        let mut out = Vec::new();
        for family in [libc::AF_INET, libc::AF_INET6] {
            let family = u8::try_from(family).unwrap_or_default();
            let mut id = [0; ID];
            id[2..4].copy_from_slice(&port.unwrap_or(0).to_be_bytes());
            let body = request(family, protocol, CONNECTED, &id);
            self.send(SOCK_DIAG_BY_FAMILY, NLM_F_REQUEST | NLM_F_DUMP, &body)?;
            self.receive(|kind, body| {
                if kind == SOCK_DIAG_BY_FAMILY
                    && let Some(socket) = parse(protocol, body)
                {
                    out.push(socket);
                }
            })?;
        }
        Ok(out)
    }

    /// The application that owns the socket gets `ECONNABORTED`; the peer of a TCP connection gets a reset. False if it is
    /// gone already.
    pub(super) fn destroy(&mut self, socket: &Socket) -> io::Result<bool> {
        let body = request(socket.family, socket.protocol, u32::MAX, &socket.id);
        self.send(SOCK_DESTROY, NLM_F_REQUEST | NLM_F_ACK, &body)?;
        match self.receive(|_, _| {}) {
            Ok(()) => Ok(true),
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(false),
            Err(error) => Err(error),
        }
    }

    fn send(&mut self, kind: u16, flags: u16, body: &[u8]) -> io::Result<()> {
        self.sequence = self.sequence.wrapping_add(1);
        let length = u32::try_from(HEADER + body.len()).map_err(io::Error::other)?;
        let mut message = Vec::with_capacity(HEADER + body.len());
        message.extend(length.to_ne_bytes());
        message.extend(kind.to_ne_bytes());
        message.extend(flags.to_ne_bytes());
        message.extend(self.sequence.to_ne_bytes());
        message.extend([0; 4]);
        message.extend(body);
        nix::sys::socket::send(self.fd.as_raw_fd(), &message, nix::sys::socket::MsgFlags::empty())?;
        Ok(())
    }

    /// Takes messages until the answer is complete; an error in it is ours.
    fn receive(&mut self, mut take: impl FnMut(u16, &[u8])) -> io::Result<()> {
        let mut buffer = vec![0; 1 << 17];
        loop {
            let got = match nix::sys::socket::recv(
                self.fd.as_raw_fd(),
                &mut buffer,
                nix::sys::socket::MsgFlags::empty(),
            ) {
                Err(nix::errno::Errno::EINTR) => continue,
                other => other?,
            };
            let mut rest = buffer.get(..got).unwrap_or_default();
            while let Some(length) = u32_at(rest, 0) {
                let length = usize::try_from(length).unwrap_or(usize::MAX);
                let Some(body) = rest.get(HEADER..length) else {
                    break;
                };
                let (kind, sequence) = (u16_at(rest, 4).unwrap_or(0), u32_at(rest, 8).unwrap_or(0));
                if sequence == self.sequence {
                    match kind {
                        NLMSG_DONE => return Ok(()),
                        NLMSG_ERROR => {
                            let error = u32_at(body, 0).unwrap_or(0).cast_signed();
                            return if error == 0 {
                                Ok(())
                            } else {
                                Err(io::Error::from_raw_os_error(-error))
                            };
                        }
                        kind => take(kind, body),
                    }
                }
                rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
            }
        }
    }
}

/// `struct inet_diag_req_v2`.
fn request(family: u8, protocol: u8, states: u32, id: &[u8; ID]) -> Vec<u8> {
    let mut body = vec![family, protocol, 0, 0];
    body.extend(states.to_ne_bytes());
    body.extend(id);
    body
}

/// `struct inet_diag_msg`; `None` if it is cut short or of another family.
fn parse(protocol: u8, body: &[u8]) -> Option<Socket> {
    let family = *body.first()?;
    let id: [u8; ID] = *body.get(4..)?.first_chunk()?;
    let addr = id.get(20..)?;
    let ip = match i32::from(family) {
        libc::AF_INET => IpAddr::V4(Ipv4Addr::from(*addr.first_chunk::<4>()?)),
        libc::AF_INET6 => IpAddr::V6(Ipv6Addr::from(*addr.first_chunk::<16>()?)).to_canonical(),
        _ => return None,
    };
    let port = u16::from_be_bytes([id[2], id[3]]);
    let (low, high) = (u32_at(&id, 40)?, u32_at(&id, 44)?);
    Some(Socket {
        family,
        protocol,
        id,
        peer: SocketAddr::new(ip, port),
        cookie: u64::from(high) << 32 | u64::from(low),
        inode: u32_at(body, 68)?,
    })
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_ne_bytes(*bytes.get(at..)?.first_chunk()?))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(*bytes.get(at..)?.first_chunk()?))
}

#[cfg(test)]
mod tests {
    use std::net::UdpSocket;

    use super::*;

    /// Length of `struct inet_diag_msg`.
    const MESSAGE: usize = 72;

    #[test]
    fn messages_that_are_cut_short_are_no_sockets() {
        let mut body = vec![0; MESSAGE];
        body[0] = 2;
        assert!(parse(17, &body).is_some());
        for length in 0..MESSAGE {
            assert_eq!(parse(17, &body[..length]), None, "{length}");
        }
        body[0] = 99;
        assert_eq!(parse(17, &body), None);
    }

    #[test]
    fn connected_sockets_are_listed_with_their_peers() {
        let server = UdpSocket::bind("[::]:0").unwrap();
        let port = server.local_addr().unwrap().port();
        let client = UdpSocket::bind("[::]:0").unwrap();
        client.connect(("::ffff:127.0.0.1", port)).unwrap();
        let mut diag = Diag::open().unwrap();
        let of_port = diag.connected(17, Some(port)).unwrap();
        let peers: Vec<SocketAddr> = of_port.iter().map(|socket| socket.peer).collect();
        assert_eq!(peers, [SocketAddr::from(([127, 0, 0, 1], port))]);
        assert!(diag.connected(17, None).unwrap().contains(&of_port[0]));
        assert_eq!(diag.connected(6, Some(port)).unwrap(), []);
    }
}
