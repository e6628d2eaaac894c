//! The addresses of a podCIDR that pods can have.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use dataplane_model::Family;
use ipnet::IpNet;

/// A podCIDR without the addresses that are no pod's: the network address (flannel gives it to the overlay device), the
/// first (flannel gives it to the bridge) and, of IPv4, the broadcast address.
#[derive(Clone, Debug)]
pub struct Range {
    cidr: IpNet,
    first: u128,
    last: u128,
}

fn number(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(v4) => v4.to_bits().into(),
        IpAddr::V6(v6) => v6.to_bits(),
    }
}

impl Range {
    /// `None`: no address is left for pods.
    #[must_use]
    pub fn new(cidr: IpNet) -> Option<Self> {
        let cidr = cidr.trunc();
        let first = number(cidr.network()).checked_add(2)?;
        let last = number(cidr.broadcast());
        let last = if cidr.addr().is_ipv4() {
            last.checked_sub(1)?
        } else {
            last
        };
        (first <= last).then_some(Self { cidr, first, last })
    }

    /// The family of its addresses.
    #[must_use]
    pub fn family(&self) -> Family {
        if self.cidr.addr().is_ipv4() {
            Family::V4
        } else {
            Family::V6
        }
    }

    /// Whether a pod can have this address.
    #[must_use]
    pub fn offers(&self, address: IpAddr) -> bool {
        address.is_ipv4() == self.cidr.addr().is_ipv4() && (self.first..=self.last).contains(&number(address))
    }

    fn address(&self, number: u128) -> IpAddr {
        // only numbers of this range come here, so those of IPv4 fit
        match self.family() {
            Family::V4 => Ipv4Addr::from_bits(u32::try_from(number).unwrap_or(0)).into(),
            Family::V6 => Ipv6Addr::from_bits(number).into(),
        }
    }
}

impl fmt::Display for Range {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.cidr.fmt(f)
    }
}

/// The first free address behind `last`, going round all ranges once. Ends after as many steps as addresses are taken.
pub(super) fn search(
    ranges: &[&Range],
    last: Option<IpAddr>,
    is_free: impl Fn(&IpAddr) -> bool,
) -> Option<IpAddr> {
    let start =
        last.and_then(|last| Some((ranges.iter().position(|range| range.offers(last))?, number(last))));
    let (index, after) = start.map_or((0, None), |(index, last)| (index, Some(last)));
    let (before, from) = ranges.split_at_checked(index)?;
    let (current, behind) = from.split_first()?;
    let begin = after.map_or(current.first, |last| last + 1);
    let in_range = |range: &Range, begin: u128, end: u128| {
        let mut number = begin;
        while number <= end {
            let address = range.address(number);
            if is_free(&address) {
                return Some(address);
            }
            number = number.checked_add(1)?;
        }
        None
    };
    in_range(current, begin, current.last)
        .or_else(|| {
            behind
                .iter()
                .chain(before)
                .find_map(|range| in_range(range, range.first, range.last))
        })
        .or_else(|| in_range(current, current.first, begin.saturating_sub(1).min(current.last)))
}
