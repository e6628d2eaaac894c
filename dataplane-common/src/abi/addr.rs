use core::fmt;
use core::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// An IPv4 or IPv6 address: 16 bytes in network order, IPv4 as IPv4-mapped IPv6 (`::ffff:a.b.c.d`, RFC 4291 2.5.5.2), so
/// that one set of maps and one code path serve both families.
///
/// Held as four words as loaded from memory, the most significant first: that is how `bpf_sock_addr` shows them.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Default)]
pub struct Addr([u32; 4]);

const _: () = assert!(size_of::<Addr>() == 16 && align_of::<Addr>() == 4);

/// The third word of an IPv4-mapped address, as it lies in memory.
const MAPPED: u32 = 0x0000_ffff_u32.to_be();

impl Addr {
    /// The IPv4 address whose four bytes in network order are `be` (as in `bpf_sock_addr.user_ip4`).
    #[inline(always)]
    #[must_use]
    pub const fn from_v4_be(be: u32) -> Self {
        Self([0, 0, MAPPED, be])
    }

    /// The IPv6 address of four words in network order (as in `bpf_sock_addr.user_ip6`).
    #[inline(always)]
    #[must_use]
    pub const fn from_v6_be(words: [u32; 4]) -> Self {
        Self(words)
    }

    /// True for IPv4 (IPv4-mapped) addresses.
    #[inline(always)]
    #[must_use]
    pub const fn is_v4(&self) -> bool {
        self.0[0] == 0 && self.0[1] == 0 && self.0[2] == MAPPED
    }

    /// The last four bytes, in network order: the IPv4 address if [`Self::is_v4`].
    #[inline(always)]
    #[must_use]
    pub const fn v4_be(&self) -> u32 {
        self.0[3]
    }

    /// Equality, word by word, for the eBPF programs: LLVM 22 makes one 16-byte comparison of `==` and then fails to
    /// expand it for that target.
    #[inline(always)]
    #[must_use]
    pub const fn same(&self, other: &Self) -> bool {
        let (a, b) = (&self.0, &other.0);
        (a[0] ^ b[0]) | (a[1] ^ b[1]) | (a[2] ^ b[2]) | (a[3] ^ b[3]) == 0
    }

    /// The four words in network order.
    #[inline(always)]
    #[must_use]
    pub const fn words_be(&self) -> [u32; 4] {
        self.0
    }

    /// The address as the standard library has it; IPv4-mapped ones become [`IpAddr::V4`].
    #[must_use]
    pub fn to_ip(self) -> IpAddr {
        let mut bytes = [0u8; 16];
        for (chunk, word) in bytes.chunks_exact_mut(4).zip(self.0) {
            chunk.copy_from_slice(&word.to_ne_bytes());
        }
        let v6 = Ipv6Addr::from(bytes);
        v6.to_ipv4_mapped().map_or(IpAddr::V6(v6), IpAddr::V4)
    }
}

impl From<IpAddr> for Addr {
    fn from(ip: IpAddr) -> Self {
        match ip {
            IpAddr::V4(v4) => v4.into(),
            IpAddr::V6(v6) => v6.into(),
        }
    }
}

impl From<Ipv4Addr> for Addr {
    fn from(v4: Ipv4Addr) -> Self {
        Self::from_v4_be(u32::from_ne_bytes(v4.octets()))
    }
}

impl From<Ipv6Addr> for Addr {
    fn from(v6: Ipv6Addr) -> Self {
        let b = v6.octets();
        let word = |i: usize| u32::from_ne_bytes([b[i], b[i + 1], b[i + 2], b[i + 3]]);
        Self([word(0), word(4), word(8), word(12)])
    }
}

impl fmt::Debug for Addr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.to_ip(), f)
    }
}

impl fmt::Display for Addr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.to_ip(), f)
    }
}

/// A port in network byte order.
#[repr(transparent)]
#[derive(Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct BePort(u16);

const _: () = assert!(size_of::<BePort>() == 2 && align_of::<BePort>() == 2);

impl BePort {
    /// From a port number in host order, 0 to 65535.
    #[inline(always)]
    #[must_use]
    pub const fn from_host(port: u16) -> Self {
        Self(port.to_be())
    }

    /// The port number in host order.
    #[inline(always)]
    #[must_use]
    pub const fn to_host(self) -> u16 {
        u16::from_be(self.0)
    }

    /// From two bytes in network order as they lie in memory (the low half of `bpf_sock_addr.user_port`).
    #[inline(always)]
    #[must_use]
    pub const fn from_be(be: u16) -> Self {
        Self(be)
    }

    /// The two bytes in network order.
    #[inline(always)]
    #[must_use]
    pub const fn to_be(self) -> u16 {
        self.0
    }
}

impl PartialOrd for BePort {
    fn partial_cmp(&self, other: &Self) -> Option<core::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for BePort {
    fn cmp(&self, other: &Self) -> core::cmp::Ordering {
        self.to_host().cmp(&other.to_host())
    }
}

impl fmt::Debug for BePort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.to_host(), f)
    }
}

impl fmt::Display for BePort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.to_host(), f)
    }
}

#[cfg(test)]
mod tests {
    extern crate std;
    use std::string::ToString;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn memory_is_network_order() {
        let addr = Addr::from(Ipv4Addr::new(10, 1, 2, 3));
        let mut bytes = [0u8; 16];
        for (chunk, word) in bytes.chunks_exact_mut(4).zip(addr.words_be()) {
            chunk.copy_from_slice(&word.to_ne_bytes());
        }
        assert_eq!(bytes, [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 10, 1, 2, 3]);
        assert!(addr.is_v4());
        assert!(addr.same(&addr) && !addr.same(&Ipv4Addr::new(10, 1, 2, 4).into()));
        assert_eq!(addr.to_string(), "10.1.2.3");
        assert_eq!(BePort::from_host(8080).to_be().to_ne_bytes(), [0x1f, 0x90]);
        assert!(!Addr::from(Ipv6Addr::LOCALHOST).is_v4());
    }

    proptest! {
        #[test]
        fn addresses_round_trip(ip: IpAddr, port: u16) {
            // A v4-mapped IPv6 address is the IPv4 address: that is the point of the type.
            let canonical = match ip {
                IpAddr::V6(v6) => v6.to_ipv4_mapped().map_or(ip, IpAddr::V4),
                IpAddr::V4(_) => ip,
            };
            prop_assert_eq!(Addr::from(ip).to_ip(), canonical);
            prop_assert_eq!(Addr::from(ip).is_v4(), canonical.is_ipv4());
            prop_assert_eq!(BePort::from_host(port).to_host(), port);
        }
    }
}
