//! Work inside another network namespace.

use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt as _;

use nix::sched::{CloneFlags, setns};

/// Runs in a thread of its own inside the namespace, so that no error leaves this thread there.
pub(crate) fn enter<T: Send>(netns: &File, work: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new()
            .name("netns".into())
            .spawn_scoped(scope, || {
                setns(netns, CloneFlags::CLONE_NEWNET)?;
                work()
            })?;
        thread
            .join()
            .map_err(|_| io::Error::other("the thread in the pod's network namespace panicked"))?
    })
}

/// Runs a future on a runtime of this thread, so that netlink sockets belong to this thread's namespace.
pub(crate) fn block_on<T>(future: impl Future<Output = io::Result<T>>) -> io::Result<T> {
    tokio::runtime::Builder::new_current_thread()
        .enable_io()
        .enable_time()
        .build()?
        .block_on(future)
}

/// Whether it is the namespace of the calling thread.
pub(crate) fn is_own(netns: &File) -> io::Result<bool> {
    let (theirs, own) = (netns.metadata()?, std::fs::metadata("/proc/thread-self/ns/net")?);
    Ok((theirs.dev(), theirs.ino()) == (own.dev(), own.ino()))
}
