//! Reading and writing the address in `bpf_sock_addr`.

use aya_ebpf::programs::SockAddrContext;
use dataplane_common::abi::{Addr, BePort, protocol};

/// `IPPROTO_MPTCP`: offered by applications as TCP.
const MPTCP: u32 = 262;

/// Family of the hook, which is fixed per program, so that each program holds only its own half.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Family {
    /// `*4` hooks.
    V4,
    /// `*6` hooks. Their address may be an IPv4-mapped one.
    V6,
}

/// The address that the application gave (or gets).
#[inline(always)]
pub fn address(ctx: &SockAddrContext, family: Family) -> Addr {
    let raw = ctx.sock_addr;
    match family {
        // SAFETY: the kernel hands in a valid context; each field is read with the 4-byte access that the verifier
        // asks for (volatile, so that the compiler does not merge them).
        Family::V4 => Addr::from_v4_be(unsafe { (&raw const (*raw).user_ip4).read_volatile() }),
        Family::V6 => {
            // SAFETY: as above.
            let word =
                |i: usize| unsafe { (&raw const (*raw).user_ip6).cast::<u32>().add(i).read_volatile() };
            Addr::from_v6_be([word(0), word(1), word(2), word(3)])
        }
    }
}

/// The port that the application gave (or gets).
#[inline(always)]
pub fn port(ctx: &SockAddrContext) -> BePort {
    // SAFETY: as in `address`. The kernel keeps the port in network order in the low half.
    let port = unsafe { (&raw const (*ctx.sock_addr).user_port).read_volatile() };
    BePort::from_be((port & 0xffff) as u16)
}

/// The socket's protocol, as a frontend's key has it.
#[inline(always)]
pub fn protocol(ctx: &SockAddrContext) -> u8 {
    // SAFETY: as in `address`.
    let number = unsafe { (&raw const (*ctx.sock_addr).protocol).read_volatile() };
    if number == MPTCP {
        protocol::TCP
    } else {
        (number & 0xff) as u8
    }
}

/// Puts another address in its place. False, and nothing changed, if the hook's family cannot hold it.
#[inline(always)]
pub fn rewrite(ctx: &SockAddrContext, family: Family, addr: Addr, port: BePort) -> bool {
    let raw = ctx.sock_addr;
    match family {
        Family::V4 => {
            if !addr.is_v4() {
                return false;
            }
            // SAFETY: the verifier allows 4-byte writes to these fields.
            unsafe { (&raw mut (*raw).user_ip4).write_volatile(addr.v4_be()) };
        }
        Family::V6 => {
            let words = addr.words_be();
            // SAFETY: as above.
            let put = |i: usize, word: u32| unsafe {
                (&raw mut (*raw).user_ip6)
                    .cast::<u32>()
                    .add(i)
                    .write_volatile(word);
            };
            put(0, words[0]);
            put(1, words[1]);
            put(2, words[2]);
            put(3, words[3]);
        }
    }
    // SAFETY: as above.
    unsafe { (&raw mut (*raw).user_port).write_volatile(u32::from(port.to_be())) };
    true
}
