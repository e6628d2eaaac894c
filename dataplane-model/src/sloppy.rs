//! Addresses and CIDRs as kube-proxy reads them: decimal octets with leading zeros are accepted (`172.30.0.041`,
//! `203.0.113.000/025`), because objects from before Kubernetes refused them may still be stored (spec kube-proxy 1.1).

use std::net::{IpAddr, Ipv4Addr};

use ipnet::IpNet;

/// Parses an address; IPv4 octets may have leading zeros and are decimal, also at the end of an IPv6 address. An
/// IPv4-mapped IPv6 address is the IPv4 address, as in Go.
#[must_use]
pub fn parse_ip(text: &str) -> Option<IpAddr> {
    parse_as_written(text).map(|ip| ip.to_canonical())
}

/// Parses a CIDR in the same spirit; surrounding white space is dropped, host bits are cleared.
#[must_use]
pub fn parse_cidr(text: &str) -> Option<IpNet> {
    let (ip, prefix) = text.trim().split_once('/')?;
    let net = IpNet::new(parse_as_written(ip)?, decimal(prefix)?).ok()?;
    Some(net.trunc())
}

fn parse_as_written(text: &str) -> Option<IpAddr> {
    if let Ok(ip) = text.parse() {
        return Some(ip);
    }
    match text.rsplit_once(':') {
        Some((head, tail)) => format!("{head}:{}", dotted(tail)?).parse().ok(),
        None => dotted(text).map(IpAddr::V4),
    }
}

fn dotted(text: &str) -> Option<Ipv4Addr> {
    let mut octets = [0u8; 4];
    let mut parts = text.split('.');
    for octet in &mut octets {
        *octet = decimal(parts.next()?)?;
    }
    parts.next().is_none().then(|| Ipv4Addr::from(octets))
}

/// A decimal number of digits only, small enough for an octet or a prefix length; leading zeros do not count.
fn decimal(text: &str) -> Option<u8> {
    if text.is_empty() || !text.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    let digits = text.trim_start_matches('0');
    if digits.is_empty() {
        Some(0)
    } else {
        digits.parse().ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn accepts_leading_zeros_and_emits_canonical_text() {
        for (text, canonical) in [
            ("172.30.0.041", "172.30.0.41"),
            ("010.000.08.1", "10.0.8.1"),
            ("1.2.3.4", "1.2.3.4"),
            ("FD00::0001", "fd00::1"),
            ("::ffff:172.30.0.041", "172.30.0.41"),
            ("64:ff9b::010.0.0.1", "64:ff9b::a00:1"),
            ("000000000001.0.0.0", "1.0.0.0"),
        ] {
            assert_eq!(
                parse_ip(text).map(|ip| ip.to_string()).as_deref(),
                Some(canonical),
                "{text}"
            );
        }
        for (text, canonical) in [
            ("203.0.113.000/025", "203.0.113.0/25"),
            (" 10.1.2.3/8 ", "10.0.0.0/8"),
            ("fd00::1/64", "fd00::/64"),
            ("0.0.0.0/0", "0.0.0.0/0"),
        ] {
            assert_eq!(
                parse_cidr(text).map(|net| net.to_string()).as_deref(),
                Some(canonical),
                "{text}"
            );
        }
    }

    #[test]
    fn refuses_what_is_no_address() {
        for text in [
            "",
            "1.2.3",
            "1.2.3.4.5",
            "256.1.1.1",
            "1.2.3.-4",
            "a.b.c.d",
            "1..2.3",
            "1.2.3.4 ",
            "99999999999.1.1.1",
            "fe80::1%eth0",
            "::1.2.3",
            "1.2.3.\u{664}",
        ] {
            assert_eq!(parse_ip(text), None, "{text}");
        }
        for text in ["10.0.0.0", "10.0.0.0/33", "10.0.0.0/", "/8", "fd00::/129", "x/8"] {
            assert_eq!(parse_cidr(text), None, "{text}");
        }
    }
}
