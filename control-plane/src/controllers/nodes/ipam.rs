//! Pod addresses of nodes: each gets a part of the cluster's range.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};

/// Size of a node's part, kube-controller-manager's defaults.
const V4_PREFIX: u8 = 24;
const V6_PREFIX: u8 = 64;

/// A range that is divided among nodes.
#[derive(Debug)]
pub(super) struct Range {
    net: IpNet,
    /// Number of the part that is tried first: what was given back last is used again last.
    at: u128,
}

impl std::fmt::Display for Range {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.net.fmt(f)
    }
}

impl Range {
    pub(super) fn new(net: IpNet) -> Self {
        Self {
            net: net.trunc(),
            at: 0,
        }
    }

    /// Length of the parts' prefix; a range that is smaller than a part is one part.
    fn prefix(&self) -> u8 {
        let part = if self.net.addr().is_ipv4() {
            V4_PREFIX
        } else {
            V6_PREFIX
        };
        part.max(self.net.prefix_len())
    }

    fn part(&self, number: u128) -> Option<IpNet> {
        let prefix = self.prefix();
        match self.net {
            IpNet::V4(net) => {
                let step = number.checked_shl(u32::from(32 - prefix))?;
                let address = u128::from(net.network().to_bits()).checked_add(step)?;
                let address = Ipv4Addr::from(u32::try_from(address).ok()?);
                Ipv4Net::new(address, prefix).ok().map(IpNet::V4)
            }
            IpNet::V6(net) => {
                let step = number.checked_shl(u32::from(128 - prefix))?;
                let address = Ipv6Addr::from(net.network().to_bits().checked_add(step)?);
                Ipv6Net::new(address, prefix).ok().map(IpNet::V6)
            }
        }
    }

    /// A part that overlaps with none of those taken.
    pub(super) fn next(&mut self, taken: &[IpNet]) -> Option<IpNet> {
        let bits = u32::from(self.prefix().saturating_sub(self.net.prefix_len()));
        let parts = 1_u128.checked_shl(bits).unwrap_or(u128::MAX);
        // One more part than there are taken ranges: larger ones can cover several, so go on as long as any hits.
        let mut tries: u128 = 0;
        while tries < parts {
            let number = (self.at + tries) % parts;
            let part = self.part(number)?;
            let overlaps = |other: &&IpNet| {
                let same = matches!(
                    (part.addr(), other.addr()),
                    (IpAddr::V4(_), IpAddr::V4(_)) | (IpAddr::V6(_), IpAddr::V6(_))
                );
                same && (part.contains(*other) || other.contains(&part))
            };
            if taken.iter().find(overlaps).is_none() {
                self.at = number + 1;
                return Some(part);
            }
            tries += 1;
        }
        None
    }
}
