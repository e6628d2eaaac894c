//! The state directory: one agent each.

use std::fs::{self, File};
use std::io::{Read, Seek, Write};
use std::path::Path;

use anyhow::Context as _;
use nix::fcntl::{Flock, FlockArg};

use crate::devices;

/// Name of the local socket in the state directory.
pub const SOCKET: &str = "agent.sock";
/// Name of the lock in the state directory.
const LOCK: &str = "agent.lock";

/// Held as long as the agent runs.
pub(super) fn lock(state_dir: &Path) -> anyhow::Result<Flock<File>> {
    let path = state_dir.join(LOCK);
    let mut file = File::options()
        .create(true)
        .truncate(false)
        .read(true)
        .write(true)
        .open(&path)
        .with_context(|| format!("open {}", path.display()))?;
    let mut pid = String::new();
    file.read_to_string(&mut pid)
        .with_context(|| format!("read {}", path.display()))?;
    let mut file = Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|(_, errno)| {
        anyhow::anyhow!(
            "state directory {} is in use by the agent with pid {} ({errno})",
            state_dir.display(),
            pid.trim()
        )
    })?;
    file.set_len(0)?;
    file.rewind()?;
    writeln!(file, "{}", std::process::id())?;
    Ok(file)
}

/// For `beeline cleanup`.
///
/// # Errors
///
/// If an agent runs with this state directory: it would go on with maps that nobody reads.
pub fn check_stopped(state_dir: &Path) -> anyhow::Result<()> {
    if state_dir.join(LOCK).exists() {
        lock(state_dir).map(drop).context("stop it first")
    } else {
        Ok(())
    }
}

/// Removes the agent's files, and the directory if nothing else is in it. Gives what was removed.
///
/// # Errors
///
/// If a file cannot be removed.
pub fn remove_state(state_dir: &Path) -> anyhow::Result<Vec<String>> {
    let mut removed = Vec::new();
    if devices::release_ports(state_dir).context("undo the reservation of ports")? {
        removed.push("reservation of ports for masquerading".into());
    }
    for name in [SOCKET, LOCK] {
        let path = state_dir.join(name);
        match fs::remove_file(&path) {
            Ok(()) => removed.push(path.display().to_string()),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => return Err(error).with_context(|| format!("remove {}", path.display())),
        }
    }
    if fs::remove_dir(state_dir).is_ok() {
        removed.push(state_dir.display().to_string());
    }
    Ok(removed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_agent_per_state_directory() {
        let dir = tempfile::tempdir().unwrap();
        let held = lock(dir.path()).unwrap();
        let error = lock(dir.path()).unwrap_err().to_string();
        assert!(error.contains(&format!("pid {}", std::process::id())), "{error}");
        drop(held);
        lock(dir.path()).unwrap();
    }
}
