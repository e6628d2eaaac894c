//! Where what a node keeps of pods is, whatever runs them.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use nix::mount::{MntFlags, umount2};

use super::PodRef;

/// Directories of the node.
#[derive(Clone, Debug, Default)]
pub(crate) struct Dirs {
    /// What is known of pods, a directory for each.
    pub(crate) root: PathBuf,
    pub(crate) logs: PathBuf,
}

impl Dirs {
    pub(crate) fn pod(&self, uid: &str) -> PathBuf {
        self.root.join(uid)
    }

    /// Where the volumes of a pod are.
    pub(crate) fn volumes(&self, uid: &str) -> PathBuf {
        self.pod(uid).join("volumes")
    }

    pub(crate) fn pod_logs(&self, pod: &PodRef) -> PathBuf {
        let PodRef { namespace, name, uid } = pod;
        self.logs.join(format!("{namespace}_{name}_{uid}"))
    }

    /// The file with the output of a container.
    pub(crate) fn log(&self, pod: &PodRef, container: &str, attempt: u32) -> PathBuf {
        self.pod_logs(pod).join(log_name(container, attempt))
    }

    /// Removes what a pod has there. `known`: who it was, if that is known.
    ///
    /// # Errors
    /// When something cannot be removed.
    pub(crate) fn remove(&self, uid: &str, known: Option<&PodRef>) -> io::Result<()> {
        if let Some(pod) = known {
            remove(&self.pod_logs(pod))?;
        }
        unmount_below(&self.pod(uid))?;
        remove(&self.pod(uid))
    }
}

/// Where in the directory of its pod's logs the log of a container is.
pub(crate) fn log_name(container: &str, attempt: u32) -> PathBuf {
    Path::new(container).join(format!("{attempt}.log"))
}

/// Ends what is mounted in a directory: a volume in memory, and never something of the host that must not be removed with it.
fn unmount_below(dir: &Path) -> io::Result<()> {
    let prefix = format!("{}/", dir.display());
    let mounts = fs::read_to_string("/proc/self/mounts")?;
    let places = mounts.lines().filter_map(|line| line.split(' ').nth(1));
    for place in places.filter(|place| place.starts_with(&prefix)) {
        umount2(place, MntFlags::MNT_DETACH)?;
    }
    Ok(())
}

fn remove(dir: &Path) -> io::Result<()> {
    match fs::remove_dir_all(dir) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}
