//! cgroup v2: where it is mounted, and subtrees for nodes and pods.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::wait_for;

/// Where cgroup v2 is mounted: `/sys/fs/cgroup`, or beside the v1 controllers.
///
/// # Errors
/// When it is not mounted.
pub fn mount_point() -> Result<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mountinfo").context("cannot read /proc/self/mountinfo")?;
    find_mount(&mounts, "cgroup2").context("cgroup v2 is not mounted: mount -t cgroup2 none /sys/fs/cgroup")
}

/// The mount point of the first mount of this file system type; the format is in proc_pid_mountinfo(5).
pub(crate) fn find_mount(mountinfo: &str, fs_type: &str) -> Option<PathBuf> {
    mountinfo.lines().find_map(|line| {
        let (before, after) = line.split_once(" - ")?;
        let mut fields = before.split(' ').skip(3);
        let (root, point) = (fields.next()?, fields.next()?);
        // A bind mount of a part of it is not the hierarchy's root.
        (after.split(' ').next()? == fs_type && root == "/").then(|| PathBuf::from(point))
    })
}

/// Makes the directory, and those above it.
pub(crate) fn create(path: &Path) -> Result<()> {
    fs::create_dir_all(path).with_context(|| format!("cannot make cgroup {}", path.display()))
}

/// Kills every process below `path`, waits until they are gone and removes the subtree.
pub(crate) fn remove(path: &Path) -> Result<()> {
    if !path.is_dir() {
        return Ok(());
    }
    kill(path)?;
    remove_dirs(path)
}

fn kill(path: &Path) -> Result<()> {
    // cgroup.kill is there since 5.14.
    let whole_tree = path.join("cgroup.kill");
    wait_for(
        &format!("the processes in {} to end", path.display()),
        Duration::from_secs(10),
        || {
            let pids = processes(path);
            if pids.is_empty() {
                return Ok(Some(()));
            }
            if whole_tree.exists() {
                fs::write(&whole_tree, "1").context("cannot write cgroup.kill")?;
            } else {
                for pid in pids {
                    let _ =
                        nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::SIGKILL);
                }
            }
            Ok(None)
        },
    )
}

/// The processes in this cgroup and those below; zombies are left out, they hold nothing.
pub(crate) fn processes(path: &Path) -> Vec<i32> {
    let mut pids: Vec<i32> = fs::read_to_string(path.join("cgroup.procs"))
        .unwrap_or_default()
        .lines()
        .filter_map(|line| line.parse().ok())
        .collect();
    pids.retain(|pid| {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        // The state follows the name, which may hold anything but ends at the last parenthesis: proc_pid_stat(5).
        stat.rsplit_once(") ")
            .is_some_and(|(_, rest)| !rest.starts_with('Z'))
    });
    for child in children(path) {
        pids.extend(processes(&child));
    }
    pids
}

fn remove_dirs(path: &Path) -> Result<()> {
    for child in children(path) {
        remove_dirs(&child)?;
    }
    // A process that has just ended may still be counted for an instant.
    wait_for(
        &format!("cgroup {} to be removable", path.display()),
        Duration::from_secs(10),
        || match fs::remove_dir(path) {
            Ok(()) => Ok(Some(())),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Some(())),
            Err(error) => bail!("cannot remove cgroup {}: {error}", path.display()),
        },
    )
}

fn children(path: &Path) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(path) else {
        return Vec::new();
    };
    entries
        .filter_map(|entry| entry.ok().map(|entry| entry.path()))
        .filter(|path| path.is_dir())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_unified_mount_is_found_beside_v1() {
        let text = "31 23 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw\n\
                    32 31 0:29 / /sys/fs/cgroup/cpu rw,relatime - cgroup cgroup rw,cpu\n\
                    40 31 0:38 /sub /mnt rw - cgroup2 cgroup2 rw\n\
                    41 31 0:38 / /sys/fs/cgroup/unified rw,relatime shared:9 - cgroup2 cgroup2 rw\n";
        assert_eq!(
            find_mount(text, "cgroup2"),
            Some(PathBuf::from("/sys/fs/cgroup/unified"))
        );
        assert_eq!(find_mount(text, "bpf"), None);
    }
}
