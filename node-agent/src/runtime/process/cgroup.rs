//! cgroup v2 directories of pods: where the agent's programs see their sockets, and how all processes of one are ended.

use std::fs;
use std::io;
use std::path::Path;
use std::time::Duration;

use nix::sys::signal::{Signal, kill as send};
use nix::unistd::Pid;
use tracing::debug;

/// The processes of a cgroup are looked at so often while they are waited for.
const POLL: Duration = Duration::from_millis(5);
/// Period of a CPU limit, microseconds.
const PERIOD: u64 = 100_000;

/// The cgroup that those of the pods are in, with limits where the kernel has them.
pub(super) fn create_parent(path: &Path) -> io::Result<()> {
    create(path)?;
    let above = path.parent().filter(|above| above.join("cgroup.procs").exists());
    for dir in above.into_iter().chain([path]) {
        delegate(dir);
    }
    Ok(())
}

pub(super) fn create(path: &Path) -> io::Result<()> {
    match fs::create_dir(path) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(error),
        _ => Ok(()),
    }
}

/// Lets the cgroups below have limits. Where the controllers belong to cgroup v1 there are none.
fn delegate(dir: &Path) {
    for controller in ["+memory", "+cpu", "+pids"] {
        if let Err(error) = fs::write(dir.join("cgroup.subtree_control"), controller) {
            debug!(dir = %dir.display(), controller, %error, "no limits");
        }
    }
}

/// `memory` in bytes, `cpu` in thousandths.
pub(super) fn limit(path: &Path, memory: Option<u64>, cpu: Option<u64>) {
    if memory.is_none() && cpu.is_none() {
        return;
    }
    if let Some(pod) = path.parent() {
        delegate(pod);
    }
    let memory = memory.map(|bytes| ("memory.max", bytes.to_string()));
    let cpu = cpu.map(|milli| {
        (
            "cpu.max",
            format!("{} {PERIOD}", (milli * PERIOD / 1000).max(1000)),
        )
    });
    for (file, text) in [memory, cpu].into_iter().flatten() {
        if let Err(error) = fs::write(path.join(file), &text) {
            debug!(path = %path.display(), file, %error, "a limit cannot be set");
        }
    }
}

/// Whether the kernel has killed a process of it because it ran out of memory.
pub(super) fn out_of_memory(path: &Path) -> bool {
    let events = fs::read_to_string(path.join("memory.events")).unwrap_or_default();
    events
        .lines()
        .filter_map(|line| line.strip_prefix("oom_kill "))
        .any(|count| count != "0")
}

/// Kills all processes in it and below, and waits for their end.
pub(super) async fn kill(path: &Path, limit: Duration) {
    let all_gone = async {
        loop {
            let mut found = Vec::new();
            processes(path, &mut found);
            if found.is_empty() {
                return;
            }
            for pid in found {
                // It may have ended meanwhile.
                let _gone = send(Pid::from_raw(pid), Signal::SIGKILL);
            }
            tokio::time::sleep(POLL).await;
        }
    };
    if tokio::time::timeout(limit, all_gone).await.is_err() {
        debug!(path = %path.display(), "processes do not end after SIGKILL");
    }
}

fn processes(path: &Path, found: &mut Vec<i32>) {
    let text = fs::read_to_string(path.join("cgroup.procs")).unwrap_or_default();
    // "0": a process that this namespace cannot see
    found.extend(
        text.lines()
            .filter_map(|line| line.parse().ok())
            .filter(|pid: &i32| *pid > 0),
    );
    for entry in fs::read_dir(path).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            processes(&entry.path(), found);
        }
    }
}

/// Removes it with those below it; one that is not there is fine.
pub(super) fn remove(path: &Path) -> io::Result<()> {
    for entry in fs::read_dir(path).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove(&entry.path())?;
        }
    }
    match fs::remove_dir(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}
