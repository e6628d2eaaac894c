//! The logic of Beeline's eBPF programs, by topic. The binaries only name the attach points.
//!
//! Nothing here may panic (an index that the compiler cannot prove in range becomes a call that the verifier refuses), and
//! nothing logs by default: `AYA_LOG_LEVEL` is overridden to off at load.
#![no_std]
#![cfg_attr(target_arch = "bpf", feature(asm_experimental_arch))]

pub mod choose;
pub mod context;
pub mod frontend;
pub mod maps;
pub mod nic;
pub mod ops;
mod pod;
pub mod sock;

/// What every object file ends with: its licence, and what a panic would do if there could be one.
#[macro_export]
macro_rules! end_of_object {
    () => {
        #[panic_handler]
        fn panic(_info: &core::panic::PanicInfo<'_>) -> ! {
            loop {}
        }

        /// The kernel offers some helpers only to GPL-compatible programs.
        #[unsafe(link_section = "license")]
        #[unsafe(no_mangle)]
        static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
    };
}
