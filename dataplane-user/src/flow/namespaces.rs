//! The network namespaces of a node: the host's, and those of its pods.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// Where `ip netns`, containerd and CRI-O keep namespaces that no process may be in.
const NAMED: &str = "run/netns";

/// A network namespace, held open: it does not go while this lives.
#[derive(Debug)]
pub struct Namespace {
    /// Inode of the namespace, which tells it from the others.
    pub inode: u64,
    /// A path by which it was found.
    pub path: PathBuf,
    /// The namespace.
    pub file: File,
}

/// Every network namespace that a process is in or that has a name, once each. Processes that end meanwhile are no error,
/// nor is one that may not be looked at.
///
/// `root` is `/`, or where the host's `proc` and `run` are mounted. Without the host's pid namespace, only the agent's own
/// processes and named namespaces are found.
///
/// # Errors
///
/// If there is no `proc` at all.
pub fn all(root: &Path) -> io::Result<Vec<Namespace>> {
    let mut found = BTreeMap::new();
    let mut add = |path: PathBuf| {
        let Ok(metadata) = fs::metadata(&path) else {
            return;
        };
        let inode = metadata.ino();
        if !found.contains_key(&inode)
            && let Ok(file) = File::open(&path)
            // another may have taken its place between the two calls
            && file.metadata().is_ok_and(|m| m.ino() == inode)
        {
            found.insert(inode, Namespace { inode, path, file });
        }
    };
    for process in processes(root)? {
        add(process.join("ns/net"));
    }
    for entry in fs::read_dir(root.join(NAMED)).into_iter().flatten().flatten() {
        // a name whose mount is gone is a plain file, which `setns` refuses later on
        add(entry.path());
    }
    Ok(found.into_values().collect())
}

/// Directories of processes.
pub(super) fn processes(root: &Path) -> io::Result<impl Iterator<Item = PathBuf>> {
    let entries = fs::read_dir(root.join("proc"))?;
    let is_process = |name: &std::ffi::OsStr| name.as_encoded_bytes().first().is_some_and(u8::is_ascii_digit);
    Ok(entries
        .flatten()
        .filter(move |entry| is_process(&entry.file_name()))
        .map(|entry| entry.path()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_own_namespace_is_found_once() {
        let own = fs::metadata("/proc/self/ns/net").unwrap().ino();
        let found = all(Path::new("/")).unwrap();
        assert_eq!(found.iter().filter(|n| n.inode == own).count(), 1);
        assert!(all(Path::new("/nowhere")).is_err());
    }
}
