//! Connections that the kernel's connection tracker translates (include/uapi/linux/netfilter/nfnetlink_conntrack.h).

use std::collections::HashSet;
use std::io;

use super::netlink::{self, Attrs, Socket, attr, attr_be32};

const CT_GET: u8 = 1;
const CTA_TUPLE_ORIG: u16 = 1;
const CTA_STATUS: u16 = 3;
const CTA_ID: u16 = 12;
const CTA_ZONE: u16 = 18;
const CTA_STATUS_MASK: u16 = 26;
/// `IPS_DST_NAT`: the destination is translated.
pub(super) const DST_NAT: u32 = 1 << 5;
const AF_UNSPEC: u8 = 0;

/// One connection: the tuple of its first packet (addresses, protocol, ports), its zone, and the kernel's id, which another
/// connection of the same tuple does not have.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub(super) struct Connection {
    tuple: Box<[u8]>,
    zone: Option<Box<[u8]>>,
    id: u32,
}

impl Connection {
    #[cfg(test)]
    pub(super) fn for_tests(id: u32) -> Self {
        Self {
            tuple: Box::default(),
            zone: None,
            id,
        }
    }

    fn parse(body: &[u8]) -> Option<Self> {
        // older kernels do not filter
        if attr_be32(body, CTA_STATUS)? & DST_NAT == 0 {
            return None;
        }
        Some(Self {
            tuple: attr(body, CTA_TUPLE_ORIG)?.into(),
            zone: attr(body, CTA_ZONE).map(Into::into),
            id: attr_be32(body, CTA_ID)?,
        })
    }
}

/// Every connection whose destination is translated: none of our own, whose packets the connection tracker sees translated.
pub(super) fn translated(socket: &mut Socket) -> io::Result<HashSet<Connection>> {
    let filter = Attrs::new()
        .be32(CTA_STATUS, DST_NAT)
        .be32(CTA_STATUS_MASK, DST_NAT);
    let found = socket.dump(netlink::CONNTRACK, CT_GET, AF_UNSPEC, &filter, |message| {
        Connection::parse(message.body)
    })?;
    Ok(found.into_iter().collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_translated_connections_count() {
        let body = |status| {
            let tuple = Attrs::new().be32(1, 7);
            netlink::tests_bytes(
                Attrs::new()
                    .nested(CTA_TUPLE_ORIG, &tuple)
                    .be32(CTA_STATUS, status)
                    .be32(CTA_ID, 5),
            )
        };
        assert_eq!(Connection::parse(&body(1 << 3 | 1 << 6)), None);
        let found = Connection::parse(&body(DST_NAT | 1 << 3)).unwrap();
        assert_eq!((found.id, found.zone.is_none()), (5, true));
        assert_eq!(Connection::parse(&[]), None);
    }
}
