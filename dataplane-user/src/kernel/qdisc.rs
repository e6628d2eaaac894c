//! The `clsact` qdisc, which filters of devices are below (include/uapi/linux/rtnetlink.h, pkt_sched.h).

use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd};

use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, send, setsockopt, socket, sockopt,
};
use nix::sys::time::{TimeVal, TimeValLike as _};

const RTM_DELQDISC: u16 = 37;
const RTM_NEWTFILTER: u16 = 44;
const RTM_GETTFILTER: u16 = 46;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const NLM_F_REQUEST: u16 = 1;
const NLM_F_ACK: u16 = 4;
const NLM_F_DUMP: u16 = 0x300;

/// `TC_H_CLSACT`, as handle and as parent.
const HANDLE: u32 = 0xffff_0000;
const CLSACT: u32 = 0xffff_fff1;
/// Where filters are: `TC_H_MIN_INGRESS` and `TC_H_MIN_EGRESS` below it.
const SIDES: [u32; 2] = [0xffff_fff2, 0xffff_fff3];

/// `struct nlmsghdr` and `struct tcmsg`.
const LENGTH: u32 = 16 + 20;

fn message(kind: u16, flags: u16, ifindex: u32, handle: u32, parent: u32) -> Vec<u8> {
    let mut out = Vec::new();
    out.extend(LENGTH.to_ne_bytes());
    out.extend(kind.to_ne_bytes());
    out.extend((NLM_F_REQUEST | flags).to_ne_bytes());
    // sequence and port
    out.extend([0; 8]);
    // any family
    out.extend([0; 4]);
    out.extend(ifindex.to_ne_bytes());
    out.extend(handle.to_ne_bytes());
    out.extend(parent.to_ne_bytes());
    out.extend([0; 4]);
    out
}

/// What one message of an answer says.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Said {
    Filter,
    Done,
    Failed(i32),
}

/// The messages of an answer that matter.
fn said(mut bytes: &[u8]) -> Vec<Said> {
    let mut out = Vec::new();
    while let Some((length, rest)) = bytes.split_first_chunk() {
        let Some(length) = usize::try_from(u32::from_ne_bytes(*length))
            .ok()
            .filter(|n| *n >= 16)
        else {
            break;
        };
        let kind = rest.first_chunk().map(|kind| u16::from_ne_bytes(*kind));
        match kind {
            Some(RTM_NEWTFILTER) => out.push(Said::Filter),
            Some(NLMSG_DONE) => out.push(Said::Done),
            Some(NLMSG_ERROR) => {
                let code = bytes.get(16..).and_then(|body| body.first_chunk());
                let code = code.map_or(0, |code| i32::from_ne_bytes(*code));
                out.push(if code == 0 {
                    Said::Done
                } else {
                    Said::Failed(-code)
                });
            }
            _ => {}
        }
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    out
}

/// Asks, and gives whether there was a filter in the answer.
fn ask(socket: &OwnedFd, request: &[u8]) -> io::Result<bool> {
    send(socket.as_raw_fd(), request, MsgFlags::empty())?;
    let mut buffer = vec![0; 32 * 1024];
    let mut filter = false;
    loop {
        let length = recv(socket.as_raw_fd(), &mut buffer, MsgFlags::empty())?;
        for said in said(&buffer[..length]) {
            match said {
                Said::Filter => filter = true,
                Said::Done => return Ok(filter),
                Said::Failed(code) => return Err(io::Error::from_raw_os_error(code)),
            }
        }
    }
}

/// Removes the `clsact` qdisc of a device of this network namespace if no filter is left below it, whoever made it: an
/// empty one does nothing, and who wants one makes it. False if it stays, or there is none.
///
/// # Errors
///
/// If the kernel refuses.
pub(super) fn remove_if_empty(ifindex: u32) -> io::Result<bool> {
    let socket = socket(
        AddressFamily::Netlink,
        SockType::Raw,
        SockFlag::SOCK_CLOEXEC,
        SockProtocol::NetlinkRoute,
    )?;
    setsockopt(&socket, sockopt::ReceiveTimeout, &TimeVal::seconds(10))?;
    for side in SIDES {
        if ask(&socket, &message(RTM_GETTFILTER, NLM_F_DUMP, ifindex, 0, side))? {
            return Ok(false);
        }
    }
    match ask(
        &socket,
        &message(RTM_DELQDISC, NLM_F_ACK, ifindex, HANDLE, CLSACT),
    ) {
        Ok(_) => Ok(true),
        // there is none, or the device is gone
        Err(error)
            if matches!(
                error.raw_os_error(),
                Some(libc::ENOENT | libc::EINVAL | libc::ENODEV)
            ) =>
        {
            Ok(false)
        }
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_read() {
        let header = |kind: u16, body: &[u8]| {
            let length = u32::try_from(16 + body.len()).unwrap();
            [&length.to_ne_bytes()[..], &kind.to_ne_bytes(), &[0; 10], body].concat()
        };
        let filters = [header(RTM_NEWTFILTER, &[1; 20]), header(NLMSG_DONE, &[0; 4])].concat();
        assert_eq!(said(&filters), [Said::Filter, Said::Done]);
        let failed = header(NLMSG_ERROR, &(-libc::ENOENT).to_ne_bytes());
        assert_eq!(said(&failed), [Said::Failed(libc::ENOENT)]);
        assert_eq!(said(&header(NLMSG_ERROR, &[0; 4])), [Said::Done]);
        // cut short, or of no length
        assert_eq!(said(&filters[..3]), []);
        assert_eq!(said(&[0; 16]), []);
    }

    #[test]
    fn requests_are_of_the_length_that_they_say() {
        let request = message(RTM_DELQDISC, NLM_F_ACK, 7, HANDLE, CLSACT);
        assert_eq!(request.len(), usize::try_from(LENGTH).unwrap());
        assert_eq!(request[20..24], 7_u32.to_ne_bytes());
        assert_eq!(request[28..32], CLSACT.to_ne_bytes());
    }
}
