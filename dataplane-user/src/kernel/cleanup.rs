//! Removing every trace.

use std::fs;
use std::io::ErrorKind;
use std::path::Path;

use super::{KernelError, nic, resize};

/// Removes what any version of the agent pinned below `bpffs_root`: links first, which detaches their programs, then
/// maps; and the filters at devices of this network namespace. Gives what was removed; nothing there is no error.
///
/// # Errors
///
/// If something cannot be removed.
pub fn cleanup(bpffs_root: &Path) -> Result<Vec<String>, KernelError> {
    let mut removed = nic::cleanup();
    let versions = list(bpffs_root)?;
    let is_version = |name: &str| name.strip_prefix('v').is_some_and(|n| n.parse::<u32>().is_ok());
    for version in versions.iter().filter(|name| is_version(name)) {
        let dir = bpffs_root.join(version);
        for part in ["links", "maps"].into_iter().chain(resize::DIRS) {
            let part = dir.join(part);
            for name in list(&part)? {
                let path = part.join(name);
                remove("remove", &path, |path| fs::remove_file(path))?;
                removed.push(path.display().to_string());
            }
            remove("remove directory", &part, |path| fs::remove_dir(path))?;
        }
        remove("remove directory", &dir, |path| fs::remove_dir(path))?;
    }
    // the root may hold what is not ours, or be a mount point: it goes only if it is empty and can go
    if bpffs_root.exists() && list(bpffs_root)?.is_empty() && fs::remove_dir(bpffs_root).is_ok() {
        removed.push(bpffs_root.display().to_string());
    }
    Ok(removed)
}

fn list(dir: &Path) -> Result<Vec<String>, KernelError> {
    let io = |source| KernelError::Io {
        operation: "list",
        path: dir.into(),
        source,
    };
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(io(error)),
    };
    let mut names = Vec::new();
    for entry in entries {
        names.push(entry.map_err(io)?.file_name().to_string_lossy().into_owned());
    }
    names.sort();
    Ok(names)
}

fn remove(
    operation: &'static str,
    path: &Path,
    how: impl FnOnce(&Path) -> std::io::Result<()>,
) -> Result<(), KernelError> {
    match how(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(KernelError::Io {
            operation,
            path: path.into(),
            source: error,
        }),
        _ => Ok(()),
    }
}
