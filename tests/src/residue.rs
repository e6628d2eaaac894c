//! What the harness leaves on the system, found by name, and its removal.
//!
//! A cluster's things are all called `bl<pid>-<n>` or begin with `bl<pid>-<n>-`. One function removes them, whoever
//! asks: `Drop`, the handler of Ctrl-C, or `cargo xtask sweep` when the process `<pid>` is gone.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use nix::mount::{MsFlags, mount};

use crate::{cgroup, netns};

/// Where bpffs is, or is mounted by us.
const BPFFS: &str = "/sys/fs/bpf";

/// The bpffs mount; mounted at `/sys/fs/bpf` if it is nowhere.
///
/// # Errors
/// When it cannot be mounted.
pub fn bpffs() -> Result<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mountinfo").context("cannot read /proc/self/mountinfo")?;
    if let Some(path) = cgroup::find_mount(&mounts, "bpf") {
        return Ok(path);
    }
    mount(Some("bpf"), BPFFS, Some("bpf"), MsFlags::empty(), None::<&str>)
        .with_context(|| format!("cannot mount bpffs at {BPFFS}"))?;
    Ok(PathBuf::from(BPFFS))
}

/// The directory that holds a cluster's state: logs, databases, kubeconfig.
#[must_use]
pub fn state_root() -> PathBuf {
    std::env::temp_dir()
}

/// The name of a cluster and the process that made it, from the name of something that belongs to it.
fn owner(name: &str) -> Option<(String, u32)> {
    let (pid, rest) = name.strip_prefix("bl")?.split_once('-')?;
    let sequence = rest.split('-').next()?;
    sequence.parse::<u32>().ok()?;
    Some((format!("bl{pid}-{sequence}"), pid.parse().ok()?))
}

fn names_in(dir: &Path) -> Vec<String> {
    let Ok(entries) = fs::read_dir(dir) else {
        return Vec::new();
    };
    entries
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .collect()
}

/// Directories whose entries may be ours.
fn places() -> Result<Vec<PathBuf>> {
    Ok(vec![
        PathBuf::from(netns::DIR),
        cgroup::mount_point()?,
        bpffs()?,
        state_root(),
    ])
}

/// The names of all clusters of which there is anything on this machine.
///
/// # Errors
/// When cgroup v2 or bpffs is not mounted.
pub fn clusters() -> Result<Vec<(String, u32)>> {
    let mut found = BTreeSet::new();
    for place in places()? {
        found.extend(names_in(&place).iter().filter_map(|name| owner(name)));
    }
    Ok(found.into_iter().collect())
}

/// One line for everything on this machine that tests could leave behind, ours or not: network namespaces, links of
/// this namespace, everything in bpffs, cgroups of ours, state directories. For a comparison of before and after. What
/// tests have that run at this moment is left out: nobody left it behind.
///
/// # Errors
/// When cgroup v2 or bpffs is not mounted.
pub fn listing() -> Result<Vec<String>> {
    let running = |name: &str| owner(name).is_some_and(|(cluster, pid)| in_use(&cluster, pid));
    lines(running)
}

/// The same of what this process has made, whether it still runs or not.
///
/// # Errors
/// When cgroup v2 or bpffs is not mounted.
pub fn made_by(pid: u32) -> Result<Vec<String>> {
    let prefix = format!("bl{pid}-");
    let mut lines = lines(|_| false)?;
    lines.retain(|line| line.contains(&prefix));
    Ok(lines)
}

/// Everything but what belongs to names that are left out.
fn lines(left_out: impl Fn(&str) -> bool) -> Result<Vec<String>> {
    let idle = |dir: &Path| -> Vec<String> {
        let names = names_in(dir).into_iter();
        names.filter(|name| !left_out(name)).collect()
    };
    let mut lines: Vec<String> = idle(Path::new(netns::DIR))
        .iter()
        .map(|name| format!("network namespace {name}"))
        .collect();
    lines.extend(
        names_in(Path::new("/sys/class/net"))
            .iter()
            .map(|name| format!("link {name}")),
    );
    let bpffs = bpffs()?;
    for name in idle(&bpffs) {
        walk(&bpffs.join(name), &mut |path| {
            lines.push(format!("bpffs {}", path.display()));
        });
    }
    let cgroups = cgroup::mount_point()?;
    for name in idle(&cgroups).into_iter().filter(|name| owner(name).is_some()) {
        walk(&cgroups.join(name), &mut |path| {
            if path.is_dir() {
                lines.push(format!("cgroup {}", path.display()));
            }
        });
    }
    for name in idle(&state_root())
        .into_iter()
        .filter(|name| owner(name).is_some())
    {
        lines.push(format!("directory {}", state_root().join(name).display()));
    }
    lines.sort();
    Ok(lines)
}

fn walk(dir: &Path, visit: &mut impl FnMut(&Path)) {
    visit(dir);
    for name in names_in(dir) {
        let path = dir.join(name);
        if path.is_dir() {
            walk(&path, visit);
        } else {
            visit(&path);
        }
    }
}

/// Removes all that belongs to a cluster; goes on after a failure. Returns what was removed, and what could not be.
#[must_use]
pub fn remove(cluster: &str) -> (Vec<String>, Vec<String>) {
    let mut removed = Vec::new();
    let mut failed = Vec::new();
    let mut note = |what: String, result: Result<()>| match result {
        Ok(()) => removed.push(what),
        Err(error) => failed.push(format!("{what}: {error:#}")),
    };
    // Pins first: they hold programs in the cgroups. Processes next: they hold the namespaces.
    if let Ok(pins) = bpffs().map(|dir| dir.join(cluster))
        && pins.is_dir()
    {
        note(
            format!("bpffs {}", pins.display()),
            fs::remove_dir_all(&pins).map_err(Into::into),
        );
    }
    if let Ok(group) = cgroup::mount_point().map(|dir| dir.join(cluster))
        && group.is_dir()
    {
        for pid in cgroup::processes(&group) {
            let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
            note(format!("process {pid} {}", name.trim()), Ok(()));
        }
        note(format!("cgroup {}", group.display()), cgroup::remove(&group));
    }
    for name in names_in(Path::new(netns::DIR)) {
        if owner(&name).is_some_and(|(of, _)| of == cluster) {
            let result = netns::delete(&name);
            note(format!("network namespace {name}"), result);
        }
    }
    let state = state_root().join(cluster);
    if state.is_dir() {
        note(
            format!("directory {}", state.display()),
            fs::remove_dir_all(&state).map_err(Into::into),
        );
    }
    (removed, failed)
}

/// Writes down who owns a cluster: a process id alone is used again by others.
pub(crate) fn claim(state_dir: &Path) -> Result<()> {
    let me = start_time(std::process::id()).unwrap_or_default();
    fs::write(state_dir.join("owner"), me).with_context(|| format!("cannot write to {}", state_dir.display()))
}

/// Whether the process that made this cluster still runs.
#[must_use]
pub fn in_use(cluster: &str, pid: u32) -> bool {
    let Some(now) = start_time(pid) else { return false };
    match fs::read_to_string(state_root().join(cluster).join("owner")) {
        Ok(then) => then == now,
        // Made a moment ago, or half removed: leave it alone while there is any such process.
        Err(_) => true,
    }
}

/// The start time of a process in clock ticks after boot, field 22 of proc_pid_stat(5).
fn start_time(pid: u32) -> Option<String> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let (_, after_name) = stat.rsplit_once(") ")?;
    after_name.split(' ').nth(19).map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_our_names_are_taken_for_ours() {
        assert_eq!(owner("bl12-0"), Some(("bl12-0".to_owned(), 12)));
        assert_eq!(owner("bl12-3-n1"), Some(("bl12-3".to_owned(), 12)));
        for other in ["bl12", "blue-1", "bl-0", "bl12-x", "xbl12-0", "beeline"] {
            assert_eq!(owner(other), None, "{other}");
        }
    }

    #[test]
    fn a_running_process_has_a_start_time() {
        assert!(start_time(std::process::id()).is_some_and(|time| time.parse::<u64>().is_ok()));
        assert_eq!(start_time(u32::MAX), None);
    }
}
