//! What Beeline's eBPF programs and its user space share.
//!
//! [`maglev`] is consistent hashing. [`abi`] holds every type that crosses the boundary between the two; a change of any layout there is a change of
//! [`abi::ABI_VERSION`]. The crate is `no_std` and links nothing of aya's kernel side, so that host code may use it
//! (aya-ebpf exports its own `memcpy` and would replace libc's in the whole program).
#![no_std]
#![forbid(unsafe_op_in_unsafe_fn)]

pub mod abi;
pub mod maglev;
pub mod packet;
