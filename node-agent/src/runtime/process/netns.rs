//! Network namespaces of pods, named as `ip netns` names them, so that an operator finds them with `ip netns`.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};

const DIR: &str = "/run/netns";

/// Where a pod's namespace is.
pub(super) fn path(prefix: &str, uid: &str) -> PathBuf {
    Path::new(DIR).join(format!("{prefix}{uid}"))
}

/// Whether there is a namespace: after a reboot only the file may be left.
pub(super) fn is_one(path: &Path) -> bool {
    match (fs::metadata(path), fs::metadata("/proc/self/ns/net")) {
        (Ok(theirs), Ok(ours)) => theirs.dev() == ours.dev(),
        _ => false,
    }
}

/// Makes a namespace, in the place of what an attempt that was cut off left.
pub(super) fn create(path: &Path) -> io::Result<()> {
    remove(path)?;
    fs::create_dir_all(DIR)?;
    File::create(path)?;
    let made = std::thread::scope(|scope| {
        // A thread of its own, that ends in the new namespace.
        let thread = std::thread::Builder::new()
            .name("netns".into())
            .spawn_scoped(scope, || {
                unshare(CloneFlags::CLONE_NEWNET)?;
                let own = Some("/proc/thread-self/ns/net");
                Ok(mount(own, path, None::<&str>, MsFlags::MS_BIND, None::<&str>)?)
            })?;
        thread
            .join()
            .map_err(|_| io::Error::other("the thread that makes a network namespace panicked"))?
    });
    made.inspect_err(|_| drop(fs::remove_file(path)))
}

/// Removes the name; the namespace goes with its last process.
pub(super) fn remove(path: &Path) -> io::Result<()> {
    if is_one(path) {
        umount2(path, MntFlags::MNT_DETACH)?;
    }
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}
