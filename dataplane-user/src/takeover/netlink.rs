//! Messages of nfnetlink (include/uapi/linux/netfilter/nfnetlink.h): the way to nf_tables, to ipsets and to the connection
//! tracker without any program beside this one; and single requests of other kinds.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, send, setsockopt, socket, sockopt,
};
use nix::sys::time::{TimeVal, TimeValLike};

/// Subsystem of the connection tracker.
pub(super) const CONNTRACK: u8 = 1;
/// Subsystem of ipsets.
pub(super) const IPSET: u8 = 6;
/// Subsystem of nf_tables.
pub(super) const NFTABLES: u8 = 10;

// include/uapi/linux/netlink.h
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const NLM_F_REQUEST: u16 = 1;
/// Asks for an answer also where all is well.
pub(super) const NLM_F_ACK: u16 = 4;
const NLM_F_DUMP_INTR: u16 = 0x10;
const NLM_F_DUMP: u16 = 0x300;
/// Makes an object that may be there already.
pub(super) const NLM_F_CREATE: u16 = 0x400;
/// Adds behind what is there.
pub(super) const NLM_F_APPEND: u16 = 0x800;
const NLA_F_NESTED: u16 = 1 << 15;
const NLA_TYPE_MASK: u16 = 0x3fff;

const BATCH_BEGIN: u16 = 0x10;
const BATCH_END: u16 = 0x11;
const BATCH_GENID: u16 = 1;

/// Length of `struct nlmsghdr`.
const HEADER: usize = 16;
/// And of `struct nfgenmsg` behind it.
const NFGEN: usize = 4;
/// The kernel fills at most 32 KiB of a dump at once (netlink_dump).
const RECEIVE: usize = 64 << 10;
/// What is read while the kernel changes is read again, so often at most.
const DUMP_TRIES: usize = 10;

/// Attributes, in the order in which they are put.
#[derive(Clone, Debug, Default)]
pub(super) struct Attrs(Vec<u8>);

impl Attrs {
    pub(super) fn new() -> Self {
        Self::default()
    }

    pub(super) fn bytes(mut self, kind: u16, value: &[u8]) -> Self {
        // an attribute of more than 64 KiB is never made here
        let length = u16::try_from(4 + value.len()).unwrap_or(u16::MAX);
        self.0.extend(length.to_ne_bytes());
        self.0.extend(kind.to_ne_bytes());
        self.0.extend(value);
        self.0.resize(self.0.len().next_multiple_of(4), 0);
        self
    }

    /// With the byte 0 behind it.
    pub(super) fn string(self, kind: u16, value: &str) -> Self {
        self.bytes(kind, &[value.as_bytes(), &[0]].concat())
    }

    pub(super) fn u8(self, kind: u16, value: u8) -> Self {
        self.bytes(kind, &[value])
    }

    /// In this machine's byte order.
    pub(super) fn u16(self, kind: u16, value: u16) -> Self {
        self.bytes(kind, &value.to_ne_bytes())
    }

    /// In network byte order.
    pub(super) fn be16(self, kind: u16, value: u16) -> Self {
        self.bytes(kind, &value.to_be_bytes())
    }

    /// In network byte order, as nf_tables has all its numbers.
    pub(super) fn be32(self, kind: u16, value: u32) -> Self {
        self.bytes(kind, &value.to_be_bytes())
    }

    /// In network byte order.
    pub(super) fn be64(self, kind: u16, value: u64) -> Self {
        self.bytes(kind, &value.to_be_bytes())
    }

    pub(super) fn nested(self, kind: u16, value: &Self) -> Self {
        self.bytes(kind | NLA_F_NESTED, &value.0)
    }
}

/// The attributes in a message or in another attribute.
pub(super) fn attrs(bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    let mut rest = bytes;
    std::iter::from_fn(move || {
        let length = usize::from(u16_at(rest, 0)?);
        let kind = u16_at(rest, 2)? & NLA_TYPE_MASK;
        let value = rest.get(4..length)?;
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, value))
    })
}

/// The value of the first attribute of this kind.
pub(super) fn attr(bytes: &[u8], kind: u16) -> Option<&[u8]> {
    attrs(bytes)
        .find(|(found, _)| *found == kind)
        .map(|(_, value)| value)
}

/// A string attribute.
pub(super) fn attr_str(bytes: &[u8], kind: u16) -> Option<&str> {
    let value = attr(bytes, kind)?;
    let end = value.iter().position(|b| *b == 0).unwrap_or(value.len());
    std::str::from_utf8(&value[..end]).ok()
}

/// A number in this machine's byte order.
pub(super) fn attr_u16(bytes: &[u8], kind: u16) -> Option<u16> {
    u16_at(attr(bytes, kind)?, 0)
}

/// A number in network byte order.
pub(super) fn attr_be16(bytes: &[u8], kind: u16) -> Option<u16> {
    Some(u16::from_be_bytes(*attr(bytes, kind)?.first_chunk()?))
}

/// A number in network byte order.
pub(super) fn attr_be32(bytes: &[u8], kind: u16) -> Option<u32> {
    Some(u32::from_be_bytes(*attr(bytes, kind)?.first_chunk()?))
}

/// A number in network byte order.
pub(super) fn attr_be64(bytes: &[u8], kind: u16) -> Option<u64> {
    Some(u64::from_be_bytes(*attr(bytes, kind)?.first_chunk()?))
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_ne_bytes(*bytes.get(at..)?.first_chunk()?))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(*bytes.get(at..)?.first_chunk()?))
}

/// A message of a dump.
#[derive(Clone, Copy, Debug)]
pub(super) struct Message<'a> {
    /// `NFPROTO_*`.
    pub(super) family: u8,
    /// Its attributes.
    pub(super) body: &'a [u8],
}

/// Changes that are made all or none.
#[derive(Debug, Default)]
pub(super) struct Batch {
    messages: Vec<(u16, u16, u8, Attrs)>,
}

impl Batch {
    pub(super) fn add(&mut self, message: u8, flags: u16, family: u8, attrs: Attrs) {
        self.messages
            .push((kind(NFTABLES, message), flags, family, attrs));
    }
}

/// The kind of a message of nfnetlink.
pub(super) fn kind(subsystem: u8, message: u8) -> u16 {
    u16::from(subsystem) << 8 | u16::from(message)
}

/// `struct nfgenmsg`.
pub(super) fn nfgen(family: u8, resource: u16) -> [u8; NFGEN] {
    let [high, low] = resource.to_be_bytes();
    [family, 0, high, low]
}

/// A socket in the network namespace of the thread that opens it. Its calls block, but not for long.
#[derive(Debug)]
pub(super) struct Socket {
    fd: OwnedFd,
    sequence: u32,
}

impl Socket {
    pub(super) fn open() -> io::Result<Self> {
        Self::of(SockProtocol::NetlinkNetFilter)
    }

    /// To another part of the kernel; for [`Self::ask`].
    pub(super) fn of(protocol: SockProtocol) -> io::Result<Self> {
        let flags = SockFlag::SOCK_CLOEXEC;
        let fd = socket(AddressFamily::Netlink, SockType::Raw, flags, protocol)?;
        setsockopt(&fd, sockopt::ReceiveTimeout, &TimeVal::seconds(10))?;
        Ok(Self { fd, sequence: 0 })
    }

    fn put(&mut self, out: &mut Vec<u8>, kind: u16, flags: u16, head: &[u8], attrs: &Attrs) -> u32 {
        self.sequence = self.sequence.wrapping_add(1);
        let length = u32::try_from(HEADER + head.len() + attrs.0.len()).unwrap_or(u32::MAX);
        out.extend(length.to_ne_bytes());
        out.extend(kind.to_ne_bytes());
        out.extend((NLM_F_REQUEST | flags).to_ne_bytes());
        out.extend(self.sequence.to_ne_bytes());
        out.extend(0_u32.to_ne_bytes());
        out.extend(head);
        out.extend(&attrs.0);
        self.sequence
    }

    /// Gives every object to `each`; again from the beginning, behind a call of `restart`, when the kernel says that
    /// they changed meanwhile.
    pub(super) fn dump<T>(
        &mut self,
        subsystem: u8,
        message: u8,
        family: u8,
        filter: &Attrs,
        mut each: impl FnMut(Message<'_>) -> Option<T>,
    ) -> io::Result<Vec<T>> {
        for _ in 0..DUMP_TRIES {
            let mut out = Vec::new();
            let kind = kind(subsystem, message);
            let sequence = self.put(&mut out, kind, NLM_F_DUMP, &nfgen(family, 0), filter);
            self.send(&out)?;
            let mut found = Vec::new();
            let mut changed = false;
            self.receive(|header, body| {
                if header.sequence != sequence {
                    return Ok(false);
                }
                changed |= header.flags & NLM_F_DUMP_INTR != 0;
                match header.kind {
                    NLMSG_DONE => return Ok(true),
                    NLMSG_ERROR => return error_of(body).map(|()| true),
                    _ => {}
                }
                if let (Some(family), Some(body)) = (body.first(), body.get(NFGEN..)) {
                    found.extend(each(Message {
                        family: *family,
                        body,
                    }));
                }
                Ok(false)
            })?;
            if !changed {
                return Ok(found);
            }
        }
        Err(io::Error::other(
            "what is read changes too often to be read as a whole",
        ))
    }

    /// Asks for one object and gives its attributes.
    pub(super) fn get(
        &mut self,
        subsystem: u8,
        message: u8,
        family: u8,
        attrs: &Attrs,
    ) -> io::Result<Vec<u8>> {
        self.ask(kind(subsystem, message), 0, &nfgen(family, 0), attrs)
    }

    /// One request: with [`NLM_F_ACK`] a change, without a question whose answer has a head of the same length, behind
    /// which are its attributes.
    pub(super) fn ask(&mut self, kind: u16, flags: u16, head: &[u8], attrs: &Attrs) -> io::Result<Vec<u8>> {
        let mut out = Vec::new();
        let sequence = self.put(&mut out, kind, flags, head, attrs);
        self.send(&out)?;
        let mut answer = Vec::new();
        self.receive(|header, body| {
            if header.sequence != sequence {
                return Ok(false);
            }
            if header.kind == NLMSG_ERROR {
                return error_of(body).map(|()| true);
            }
            answer = body.get(head.len()..).unwrap_or_default().to_vec();
            Ok(true)
        })?;
        Ok(answer)
    }

    /// Does all of a batch or nothing. With a generation, only if nothing has changed since: else the error is
    /// `ERESTART`.
    pub(super) fn commit(&mut self, batch: &Batch, generation: Option<u32>) -> io::Result<()> {
        let Some((last, before)) = batch.messages.split_last() else {
            return Ok(());
        };
        let begin = match generation {
            Some(generation) => Attrs::new().be32(BATCH_GENID, generation),
            None => Attrs::new(),
        };
        let mut out = Vec::new();
        let first = self.put(&mut out, BATCH_BEGIN, 0, &nfgen(0, NFTABLES.into()), &begin);
        for (kind, flags, family, attrs) in before {
            self.put(&mut out, *kind, *flags, &nfgen(*family, 0), attrs);
        }
        // one acknowledgement says that all is well: errors come first
        let (kind, flags, family, attrs) = last;
        let last = self.put(&mut out, *kind, *flags | NLM_F_ACK, &nfgen(*family, 0), attrs);
        let end = nfgen(0, NFTABLES.into());
        self.put(&mut out, BATCH_END, 0, &end, &Attrs::new());
        // as the nft program does: a batch is one message to the socket, however long
        setsockopt(&self.fd, sockopt::SndBufForce, &(out.len() * 2))?;
        self.send(&out)?;
        self.receive(|header, body| {
            if header.kind != NLMSG_ERROR || header.sequence < first || header.sequence > last {
                return Ok(false);
            }
            error_of(body)?;
            Ok(header.sequence == last)
        })
    }

    fn send(&self, bytes: &[u8]) -> io::Result<()> {
        send(self.fd.as_raw_fd(), bytes, MsgFlags::empty())?;
        Ok(())
    }

    /// Gives each message to `each` until that says that it was the last.
    fn receive(&self, mut each: impl FnMut(&Header, &[u8]) -> io::Result<bool>) -> io::Result<()> {
        let mut buffer = vec![0; RECEIVE];
        loop {
            let length = recv(self.fd.as_raw_fd(), &mut buffer, MsgFlags::empty())?;
            let mut rest = &buffer[..length];
            while let Some((header, body, next)) = Header::split(rest) {
                if each(&header, body)? {
                    return Ok(());
                }
                rest = next;
            }
        }
    }
}

/// The head of a message.
struct Header {
    kind: u16,
    flags: u16,
    sequence: u32,
}

impl Header {
    /// Head and body of the first message, and the others.
    fn split(bytes: &[u8]) -> Option<(Self, &[u8], &[u8])> {
        let length = usize::try_from(u32_at(bytes, 0)?).ok()?;
        let header = Self {
            kind: u16_at(bytes, 4)?,
            flags: u16_at(bytes, 6)?,
            sequence: u32_at(bytes, 8)?,
        };
        let body = bytes.get(HEADER..length)?;
        let next = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((header, body, next))
    }
}

/// Of `struct nlmsgerr`: 0 is an acknowledgement.
fn error_of(body: &[u8]) -> io::Result<()> {
    match body.first_chunk().map(|code| i32::from_ne_bytes(*code)) {
        Some(0) => Ok(()),
        Some(code) => Err(io::Error::from_raw_os_error(code.wrapping_neg())),
        None => Err(io::Error::other("an answer of netlink is cut short")),
    }
}

/// The bytes of attributes, as a message has them.
#[cfg(test)]
pub(super) fn tests_bytes(attrs: Attrs) -> Vec<u8> {
    attrs.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_are_read_as_they_are_put() {
        let inner = Attrs::new().be64(3, 0x0102_0304_0506_0708);
        let all = Attrs::new().string(1, "nat").be32(2, 9).nested(4, &inner);
        assert_eq!(attr_str(&all.0, 1), Some("nat"));
        assert_eq!(attr_be32(&all.0, 2), Some(9));
        assert_eq!(
            attr_be64(attr(&all.0, 4).unwrap(), 3),
            Some(0x0102_0304_0506_0708)
        );
        assert_eq!(attr(&all.0, 5), None);
    }

    #[test]
    fn what_is_cut_short_ends_the_attributes() {
        let all = Attrs::new().string(1, "nat").be32(2, 9);
        for length in 0..all.0.len() {
            assert!(attrs(&all.0[..length]).count() < 2, "{length}");
        }
        // a length of less than its own head
        assert_eq!(attrs(&[2, 0, 1, 0, 0, 0, 0, 0]).count(), 0);
        assert!(Header::split(&[0; 15]).is_none());
        assert!(Header::split(&[8, 0, 0, 0, 3, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]).is_none());
    }
}
