//! One look at the way to a node.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use nix::sys::socket::{AddressFamily, SockFlag, SockProtocol, SockType, SockaddrStorage, bind, socket};
use tokio::net::UdpSocket;
use tokio::time::timeout;

use super::packet;
use super::{Cause, Way};

/// How often something is sent before it counts as lost, and the wait each time.
const TRIES: usize = 3;
const WAIT: Duration = Duration::from_millis(400);
/// Bytes of the small packet.
const SMALL: u32 = 84;
/// Sizes that are tried when the largest does not arrive.
const SIZES: [u32; 13] = [
    8000, 1480, 1460, 1450, 1430, 1400, 1380, 1350, 1300, 1280, 1200, 1000, 576,
];
/// Where nobody listens, so that the peer's kernel answers what arrives in order: traceroute's first port.
const CLOSED_PORT: u16 = 33434;
/// Sequence number of the packet in the frame that we make ourselves.
const FRAME: u16 = u16::MAX;

/// Sends packets whole, and not by what the kernel has learned of the path, which may be what is wrong.
fn never_fragment(fd: &impl AsRawFd, v4: bool) -> io::Result<()> {
    const LENGTH: libc::socklen_t = 4;
    const _: () = assert!(size_of::<libc::c_int>() == LENGTH as usize);
    let (level, name, value) = if v4 {
        (libc::IPPROTO_IP, libc::IP_MTU_DISCOVER, libc::IP_PMTUDISC_PROBE)
    } else {
        (
            libc::IPPROTO_IPV6,
            libc::IPV6_MTU_DISCOVER,
            libc::IPV6_PMTUDISC_PROBE,
        )
    };
    // SAFETY: `value` is an int (of LENGTH bytes) that lives until the call returns,.
    let result = unsafe { libc::setsockopt(fd.as_raw_fd(), level, name, (&raw const value).cast(), LENGTH) };
    nix::errno::Errno::result(result)?;
    Ok(())
}

fn unspecified(ip: IpAddr) -> IpAddr {
    match ip {
        IpAddr::V4(_) => std::net::Ipv4Addr::UNSPECIFIED.into(),
        IpAddr::V6(_) => std::net::Ipv6Addr::UNSPECIFIED.into(),
    }
}

/// A socket of the kernel's raw kind, bound to an address of ours. Sending and receiving is as with datagrams.
fn raw(source: IpAddr, v4: SockProtocol, v6: SockProtocol) -> io::Result<UdpSocket> {
    let (family, protocol) = match source {
        IpAddr::V4(_) => (AddressFamily::Inet, v4),
        IpAddr::V6(_) => (AddressFamily::Inet6, v6),
    };
    let flags = SockFlag::SOCK_CLOEXEC | SockFlag::SOCK_NONBLOCK;
    let fd = socket(family, SockType::Raw, flags, protocol)?;
    bind(fd.as_raw_fd(), &SockaddrStorage::from(SocketAddr::new(source, 0)))?;
    UdpSocket::from_std(fd.into())
}

/// Asks for echoes.
struct Echo {
    socket: UdpSocket,
    source: IpAddr,
    id: u16,
}

impl Echo {
    fn open(source: IpAddr) -> io::Result<Self> {
        let socket = raw(source, SockProtocol::Icmp, SockProtocol::IcmpV6)?;
        never_fragment(&socket, source.is_ipv4())?;
        Ok(Self {
            socket,
            source,
            id: rand::random(),
        })
    }

    async fn receive(&self) -> io::Result<u16> {
        loop {
            let mut buffer = [0; 64];
            let length = self.socket.recv(&mut buffer).await?;
            let packet = buffer.get(..length).unwrap_or_default();
            if let Some(sequence) = packet::reply(self.source.is_ipv4(), packet, self.id) {
                return Ok(sequence);
            }
        }
    }

    /// Time until each of these sizes came back, of those that did.
    async fn ask(&self, target: IpAddr, sizes: &[u32]) -> io::Result<Vec<Option<Duration>>> {
        let mut got = vec![None; sizes.len()];
        for _ in 0..TRIES {
            let begun = Instant::now();
            for ((sequence, size), _) in (0..).zip(sizes).zip(&got).filter(|(_, got)| got.is_none()) {
                let message = packet::echo(self.source, target, (self.id, sequence), *size);
                // what the network does not take counts as lost
                let _lost = self.socket.send_to(&message, (target, 0)).await;
            }
            let all = async {
                while got.iter().any(Option::is_none) {
                    let sequence = self.receive().await?;
                    if let Some(slot) = got.get_mut(usize::from(sequence)) {
                        slot.get_or_insert(begun.elapsed());
                    }
                }
                io::Result::Ok(())
            };
            match timeout(WAIT, all).await {
                Ok(result) => {
                    result?;
                    break;
                }
                Err(_late) => {}
            }
        }
        Ok(got)
    }
}

/// What became of the frame that we made ourselves.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Frame {
    Answered,
    Refused,
    Lost,
}

/// Why nothing comes back through the tunnel.
pub(super) fn cause(frame: Frame, underlay: bool) -> Cause {
    match (frame, underlay) {
        (Frame::Answered, _) => Cause::WrongMac,
        (Frame::Refused, _) => Cause::PortClosed,
        (Frame::Lost, true) => Cause::PortBlocked,
        (Frame::Lost, false) => Cause::Dead,
    }
}

/// Looks at reachability, MTU and checksums. Takes milliseconds if all is well, and a few seconds if not.
pub(super) async fn check(way: &Way) -> io::Result<Result<Duration, Cause>> {
    let echo = Echo::open(way.source)?;
    let got = echo.ask(way.target, &[SMALL, way.mtu]).await?;
    let Some(rtt) = got[0] else {
        return Ok(Err(find_cause(way, &echo).await?));
    };
    if got[1].is_none() {
        let sizes: Vec<u32> = SIZES.into_iter().filter(|size| *size < way.mtu).collect();
        let got = echo.ask(way.target, &sizes).await?;
        let arrived = sizes.iter().zip(got).filter(|(_, got)| got.is_some());
        let largest = arrived.map(|(size, _)| *size).max().unwrap_or(SMALL);
        return Ok(Err(Cause::Mtu { largest }));
    }
    // what the card finishes against what is complete; both may be lost where a firewall says so
    if !is_taken(way, false).await? && is_taken(way, true).await? {
        return Ok(Err(Cause::Checksum));
    }
    Ok(Ok(rtt))
}

async fn find_cause(way: &Way, echo: &Echo) -> io::Result<Cause> {
    let Some(tunnel) = &way.tunnel else {
        return Ok(Cause::Dead);
    };
    let below = Echo::open(unspecified(way.public))?;
    let sizes = [SMALL];
    let (underlay, frame) = tokio::join!(below.ask(way.public, &sizes), async {
        let socket = UdpSocket::bind((way.public_source, 0)).await?;
        socket.connect((way.public, tunnel.port)).await?;
        let icmp = packet::echo(way.source, way.target, (echo.id, FRAME), SMALL);
        let frame = packet::frame(tunnel.vni, tunnel.own, way.source, way.target, &icmp);
        for _ in 0..TRIES {
            // an error is that of the one before
            let _refused = socket.send(&frame).await;
            let mut buffer = [0; 1];
            let either = async {
                tokio::select! {
                    refused = socket.recv(&mut buffer) => refused.map(|_| Frame::Lost),
                    answered = async {
                        while echo.receive().await? != FRAME {}
                        io::Result::Ok(())
                    } => answered.map(|()| Frame::Answered),
                }
            };
            match timeout(WAIT, either).await {
                Ok(Ok(Frame::Answered)) => return Ok(Frame::Answered),
                Ok(Err(error)) if error.kind() == io::ErrorKind::ConnectionRefused => {
                    return Ok(Frame::Refused);
                }
                _ => {}
            }
        }
        io::Result::Ok(Frame::Lost)
    });
    Ok(cause(frame?, underlay?[0].is_some()))
}

/// Whether the peer's kernel takes a datagram, which it tells by refusing it: one with a wrong checksum it drops.
async fn is_taken(way: &Way, complete: bool) -> io::Result<bool> {
    let socket = UdpSocket::bind((way.source, 0)).await?;
    let (source, target) = (socket.local_addr()?, SocketAddr::new(way.target, CLOSED_PORT));
    socket.connect(target).await?;
    // a trace shows which is which
    let payload = [u8::from(complete); 32];
    let direct = raw(way.source, SockProtocol::Udp, SockProtocol::Udp)?;
    for _ in 0..TRIES {
        if complete {
            let message = packet::datagram(source, target, &payload);
            let _lost = direct.send_to(&message, (way.target, 0)).await;
        } else {
            let _refused = socket.send(&payload).await;
        }
        let mut buffer = [0; 1];
        match timeout(WAIT, socket.recv(&mut buffer)).await {
            Ok(Ok(_)) => return Ok(true),
            Ok(Err(error)) if error.kind() == io::ErrorKind::ConnectionRefused => return Ok(true),
            _ => {}
        }
    }
    Ok(false)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cause_is_what_the_frame_and_the_underlay_say() {
        assert_eq!(cause(Frame::Answered, false), Cause::WrongMac);
        assert_eq!(cause(Frame::Refused, true), Cause::PortClosed);
        assert_eq!(cause(Frame::Lost, true), Cause::PortBlocked);
        assert_eq!(cause(Frame::Lost, false), Cause::Dead);
    }
}
