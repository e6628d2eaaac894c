//! The process's memory.
//!
//! The agent allocates and frees in many small pieces, and now and then all of a list of the cluster's objects. The C library's
//! allocator joins freed neighbours at once, which took a third of the time of programming 50,000 Services.

use std::ffi::{c_int, c_void};
use std::{ptr, slice};

use nix::unistd::{SysconfVar, sysconf};
use tikv_jemallocator::Jemalloc;

#[global_allocator]
static ALLOCATOR: Jemalloc = Jemalloc;

/// How jemalloc is configured, which looks for a pointer to a string under this name. Few arenas, because each keeps pages of
/// its own and no more than a few threads have much to do.
#[unsafe(export_name = "_rjem_malloc_conf")]
static CONFIG: &[u8; 27] = b"narenas:2,muzzy_decay_ms:0\0";

/// A list passes through many times the memory that is kept of it: gives what is free back to the system.
pub fn give_back() {
    // 4096 stands for all arenas (MALLCTL_ARENAS_ALL)
    for action in [c"thread.tcache.flush", c"arena.4096.purge"] {
        // SAFETY: the name ends with a zero byte; these actions take no value and give none.
        unsafe {
            tikv_jemalloc_sys::mallctl(
                action.as_ptr(),
                ptr::null_mut(),
                ptr::null_mut(),
                ptr::null_mut(),
                0,
            );
        }
    }
}

/// Unmaps the pages of the program and its libraries: those that only the start needed would count as resident memory for
/// ever. What is still needed is mapped again when it is used, from the page cache, which costs some microseconds for every
/// 64 KiB. (Probes and breakpoints that someone has set in the code are lost.)
pub fn let_go_of_code() {
    // SAFETY: the callback keeps nothing of what it is given.
    unsafe { libc::dl_iterate_phdr(Some(unmap_code), ptr::null_mut()) };
}

/// # Safety
///
/// To be called by `dl_iterate_phdr` only.
unsafe extern "C" fn unmap_code(object: *mut libc::dl_phdr_info, _: usize, _: *mut c_void) -> c_int {
    let Some(page) = page_size() else { return 0 };
    // SAFETY: it is a valid description of a loaded object, and `dlpi_phnum` is the number of its program headers.
    let (base, headers) = unsafe {
        let object = &*object;
        let count = usize::from(object.dlpi_phnum);
        (object.dlpi_addr, slice::from_raw_parts(object.dlpi_phdr, count))
    };
    // nothing that was ever writable (also what has been relocated, which is read-only later): it would be lost
    let loaded = headers
        .iter()
        .filter(|header| header.p_type == libc::PT_LOAD && header.p_flags & libc::PF_W == 0);
    for header in loaded {
        let start = (base + header.p_vaddr) & !(page - 1);
        // a last page that is not full may belong to what comes next, too
        let end = (base + header.p_vaddr + header.p_filesz) & !(page - 1);
        let Ok(length) = usize::try_from(end.saturating_sub(start)) else {
            continue;
        };
        // SAFETY: the pages are as they are in the file, from which the kernel maps them again. A refusal changes nothing.
        unsafe { libc::madvise(start as *mut c_void, length, libc::MADV_DONTNEED) };
    }
    0
}

fn page_size() -> Option<u64> {
    let size = sysconf(SysconfVar::PAGE_SIZE).ok()??;
    u64::try_from(size).ok().filter(|size| size.is_power_of_two())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A number in `/proc/self/status`; of memory in KiB.
    fn status(field: &str) -> u64 {
        let text = std::fs::read_to_string("/proc/self/status").unwrap();
        let line = text.lines().find_map(|line| line.strip_prefix(field)).unwrap();
        line.trim().trim_end_matches(" kB").parse().unwrap()
    }

    #[test]
    fn code_goes_and_comes_again() {
        let before = status("RssFile:");
        let_go_of_code();
        let after = status("RssFile:");
        assert!(after < before * 3 / 4, "{after} of {before} KiB");
        // code and constants that were in use before, and some that were not
        let text = std::thread::spawn(|| "ab".repeat(2)).join().unwrap();
        assert_eq!(text, "abab");
    }

    #[test]
    fn freed_memory_goes_back_to_the_system() {
        let pieces: Vec<Box<[u8; 1000]>> = (0..50_000).map(|_| Box::new([1; 1000])).collect();
        let full = status("RssAnon:");
        drop(pieces);
        give_back();
        let left = status("RssAnon:");
        assert!(left + 40_000 < full, "{left} of {full} KiB");
    }

    #[test]
    fn the_allocator_reads_its_configuration() {
        let mut arenas: u32 = 0;
        let mut length = size_of::<u32>();
        // SAFETY: the value is an unsigned int, of the length that is given.
        let result = unsafe {
            tikv_jemalloc_sys::mallctl(
                c"opt.narenas".as_ptr(),
                (&raw mut arenas).cast(),
                &raw mut length,
                ptr::null_mut(),
                0,
            )
        };
        assert_eq!((result, arenas), (0, 2));
    }
}
