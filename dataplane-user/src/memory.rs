//! How the process uses the allocator.

/// To be called once, before there are threads. The agent frees many small pieces and now and then a large one, upon which
/// glibc would tidy up all small ones again (`malloc_consolidate`): that took half the time of programming 50,000 Services.
/// Pieces of these sizes still have a cache of each thread's.
pub fn prepare() {
    #[cfg(target_env = "gnu")]
    // SAFETY: sets a parameter of the allocator, without preconditions.
    unsafe {
        libc::mallopt(libc::M_MXFAST, 0);
    }
}

/// A list passes through many times the memory that is kept of it; the allocator would hold on to that.
pub fn give_back() {
    #[cfg(target_env = "gnu")]
    // SAFETY: the call only releases pages that the allocator does not use; it has no preconditions.
    unsafe {
        libc::malloc_trim(0);
    }
}
