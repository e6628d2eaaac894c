//! Packets: where their headers are, and how their checksums follow a change. Pure: the eBPF programs run it on packets in
//! the kernel, tests on byte strings.

pub mod checksum;
pub mod crc32c;
mod parse;

pub use parse::{Head, Load, Outcome, head_flag, parse, tcp_flag};
