//! What a container runtime leaves of the cgroups of pods, in each hierarchy.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// Where hierarchies are mounted, and whether it is that of cgroup v2.
fn mounts() -> io::Result<Vec<(PathBuf, bool)>> {
    let mounts = fs::read_to_string("/proc/self/mounts")?;
    let of = |line: &str| {
        let mut fields = line.split(' ').skip(1);
        let (at, kind) = (fields.next()?, fields.next()?);
        matches!(kind, "cgroup" | "cgroup2").then(|| (PathBuf::from(at), kind == "cgroup2"))
    };
    Ok(mounts.lines().filter_map(of).collect())
}

/// The name of a cgroup v2 directory in its hierarchy; a runtime uses the same name in those of cgroup v1.
pub(super) fn name(path: &Path) -> String {
    let mounts = mounts().unwrap_or_default().into_iter();
    let inside = mounts
        .filter(|(_, unified)| *unified)
        .filter_map(|(root, _)| path.strip_prefix(root).ok().map(Path::to_owned))
        .min_by_key(|inside| inside.as_os_str().len());
    Path::new("/")
        .join(inside.as_deref().unwrap_or(path))
        .display()
        .to_string()
}

/// Removes what is empty of a cgroup and those below it.
///
/// # Errors
/// When it is not empty.
pub(super) fn remove(name: &str) -> io::Result<()> {
    for (root, _) in mounts()? {
        remove_dir(&root.join(name.trim_start_matches('/')))?;
    }
    Ok(())
}

/// Removes the cgroup of all pods. In the hierarchies of cgroup v1 the runtime has made those above it, too.
///
/// # Errors
/// When it is not empty.
pub(super) fn remove_all(name: &str) -> io::Result<()> {
    remove(name)?;
    for (root, unified) in mounts()? {
        let path = root.join(name.trim_start_matches('/'));
        let above = path
            .ancestors()
            .skip(1)
            .take_while(|above| !unified && *above != root);
        for above in above {
            // Others may be in it.
            if fs::remove_dir(above).is_err() {
                break;
            }
        }
    }
    Ok(())
}

fn remove_dir(path: &Path) -> io::Result<()> {
    for entry in fs::read_dir(path).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove_dir(&entry.path())?;
        }
    }
    match fs::remove_dir(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cgroups_are_named_from_the_root_of_their_hierarchy() {
        let unified = mounts().unwrap().into_iter().find(|(_, unified)| *unified);
        let path = unified.map_or_else(|| "/a/b".into(), |(root, _)| root.join("a/b"));
        assert_eq!(name(&path), "/a/b");
        remove_all("/no-such-cgroup-of-beeline/x").unwrap();
    }
}
