//! What a container sees at other places than the host: its volumes, and files of its pod.
//!
//! A container's root is the host's. Where a volume is mounted at a place that the host does not have, nothing is made on the
//! host: the container gets a root of its own, in memory, in which the directories on the way to that place are copies, made
//! when it starts, whose entries are the host's.

use std::ffi::{CStr, CString};
use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Component, Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, OFlag, open};
use nix::mount::{MsFlags, mount};
use nix::sys::stat::Mode;
use nix::unistd::{chdir, chroot, mkdir, symlinkat};

use super::super::Mount;

/// Something between fork and exec: system calls on what is here, nothing else.
#[derive(Debug)]
pub(super) enum Step {
    /// An empty filesystem that no bind mount takes along.
    Memory(CString),
    Dir(CString, Mode),
    File(CString),
    Link {
        to: CString,
        at: CString,
    },
    Bind {
        from: CString,
        at: CString,
        read_only: bool,
    },
    /// Something of the host, that may have gone meanwhile.
    Host {
        from: CString,
        at: CString,
    },
    Root(CString),
}

/// What makes `mounts`; `staging` is an empty directory for a root of the container's own.
///
/// # Errors
/// When a source is not there, or a target is not absolute; the text names it.
pub(super) fn plan(staging: &Path, mounts: &[Mount]) -> io::Result<Vec<Step>> {
    let mut wanted = Vec::new();
    for mount in mounts {
        let is_dir = fs::metadata(&mount.source)
            .map_err(|error| named(&mount.source, &error))?
            .is_dir();
        wanted.push((resolve(&mount.target)?, is_dir, mount));
    }
    // Those that are inside others come later.
    wanted.sort_by(|a, b| a.0.cmp(&b.0));
    let mut missing = Vec::new();
    for (i, (target, is_dir, mount)) in wanted.iter().enumerate() {
        let outer = wanted[..i]
            .iter()
            .rev()
            .find(|(outer, ..)| target.starts_with(outer) && outer != target);
        if let Some((outer, _, outer_mount)) = outer {
            let inside = target.strip_prefix(outer).unwrap_or(target);
            make(&outer_mount.source.join(inside), *is_dir).map_err(|error| named(&mount.target, &error))?;
        } else if fs::metadata(target).map(|there| there.is_dir()).ok() != Some(*is_dir) {
            missing.push((target.as_path(), *is_dir));
        }
    }
    let mut steps = Vec::new();
    let own = if missing.is_empty() {
        PathBuf::from("/")
    } else {
        fs::create_dir_all(staging)?;
        steps.push(Step::Memory(text(staging)?));
        let places: Vec<&Path> = missing.iter().map(|(target, _)| *target).collect();
        mirror(Path::new("/"), staging, &places, &mut steps)?;
        for (target, is_dir) in missing {
            let mut made = PathBuf::from("/");
            let above = target.parent().unwrap_or(target);
            for part in above.components().skip(1) {
                made.push(part);
                if !made.exists() {
                    steps.push(Step::Dir(text(&below(staging, &made))?, mode(0o755)));
                }
            }
            let place = text(&below(staging, target))?;
            steps.push(if is_dir {
                Step::Dir(place, mode(0o755))
            } else {
                Step::File(place)
            });
        }
        staging.to_owned()
    };
    for (target, _, mount) in wanted {
        steps.push(Step::Bind {
            from: text(&mount.source)?,
            at: text(&below(&own, &target))?,
            read_only: mount.read_only,
        });
    }
    if own != Path::new("/") {
        steps.push(Step::Root(text(&own)?));
    }
    Ok(steps)
}

/// Makes the entries of a directory of the host; those on the way to a missing place are copies.
fn mirror(dir: &Path, staging: &Path, missing: &[&Path], steps: &mut Vec<Step>) -> io::Result<()> {
    for entry in fs::read_dir(dir)?.flatten() {
        let from = entry.path();
        let (at, kind) = (text(&below(staging, &from))?, entry.file_type()?);
        if missing.contains(&from.as_path()) {
            // A file where a directory is wanted, or the other way round.
            continue;
        }
        if kind.is_symlink() {
            let to = text(&fs::read_link(&from)?)?;
            steps.push(Step::Link { to, at });
        } else if kind.is_dir() {
            let bits = entry.metadata()?.permissions().mode();
            steps.push(Step::Dir(at.clone(), mode(bits)));
            if missing.iter().any(|place| place.starts_with(&from)) {
                mirror(&from, staging, missing, steps)?;
            } else {
                steps.push(Step::Host {
                    from: text(&from)?,
                    at,
                });
            }
        } else {
            steps.push(Step::File(at.clone()));
            steps.push(Step::Host {
                from: text(&from)?,
                at,
            });
        }
    }
    Ok(())
}

/// Does it, in a mount namespace of the process's own.
pub(super) fn perform(steps: &[Step]) -> io::Result<()> {
    let bind = |from: &CStr, at: &CStr| {
        let flags = MsFlags::MS_BIND | MsFlags::MS_REC;
        mount(Some(from), at, None::<&CStr>, flags, None::<&CStr>)
    };
    let there = |done: nix::Result<()>| match done {
        Err(Errno::EEXIST) => Ok(()),
        other => other,
    };
    for step in steps {
        match step {
            Step::Memory(at) => {
                let options = Some(c"mode=755");
                mount(
                    Some(c"beeline"),
                    at.as_c_str(),
                    Some(c"tmpfs"),
                    MsFlags::empty(),
                    options,
                )?;
                let flags = MsFlags::MS_UNBINDABLE;
                mount(None::<&CStr>, at.as_c_str(), None::<&CStr>, flags, None::<&CStr>)?;
            }
            Step::Dir(at, mode) => there(mkdir(at.as_c_str(), *mode))?,
            Step::File(at) => {
                let flags = OFlag::O_CREAT | OFlag::O_WRONLY | OFlag::O_CLOEXEC;
                drop(open(at.as_c_str(), flags, mode(0o644))?);
            }
            Step::Link { to, at } => symlinkat(to.as_c_str(), AT_FDCWD, at.as_c_str())?,
            Step::Host { from, at } => match bind(from, at) {
                Ok(()) | Err(Errno::ENOENT | Errno::EACCES | Errno::EINVAL) => {}
                Err(error) => return Err(error.into()),
            },
            Step::Bind { from, at, read_only } => {
                bind(from, at)?;
                if *read_only {
                    let flags = MsFlags::MS_BIND | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
                    mount(None::<&CStr>, at.as_c_str(), None::<&CStr>, flags, None::<&CStr>)?;
                }
            }
            Step::Root(at) => {
                chroot(at.as_c_str())?;
                chdir(c"/")?;
            }
        }
    }
    Ok(())
}

/// Where a path of the host leads to, as far as it is there.
fn resolve(target: &Path) -> io::Result<PathBuf> {
    let plain = |part: Component<'_>| matches!(part, Component::RootDir | Component::Normal(_));
    if !target.is_absolute() || !target.components().all(plain) || target == Path::new("/") {
        let message = format!("{}: no place to mount something at", target.display());
        return Err(io::Error::new(io::ErrorKind::InvalidInput, message));
    }
    let mut there = target;
    loop {
        if let Ok(found) = fs::canonicalize(there) {
            let rest = target.strip_prefix(there).unwrap_or(Path::new(""));
            return Ok(if rest.as_os_str().is_empty() {
                found
            } else {
                found.join(rest)
            });
        }
        there = there.parent().unwrap_or(Path::new("/"));
    }
}

/// Makes a place to mount something at.
fn make(path: &Path, is_dir: bool) -> io::Result<()> {
    if path.exists() {
        return Ok(());
    }
    if is_dir {
        return fs::create_dir_all(path);
    }
    if let Some(parent) = path.parent() {
        fs::create_dir_all(parent)?;
    }
    fs::File::create(path).map(drop)
}

fn below(root: &Path, path: &Path) -> PathBuf {
    root.join(path.strip_prefix("/").unwrap_or(path))
}

fn mode(bits: u32) -> Mode {
    Mode::from_bits_truncate(bits)
}

fn text(path: &Path) -> io::Result<CString> {
    CString::new(path.as_os_str().as_bytes()).map_err(io::Error::other)
}

fn named(path: &Path, error: &io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("{}: {error}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_are_found_through_links_and_bad_ones_are_named() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().canonicalize().unwrap();
        fs::create_dir(root.join("run")).unwrap();
        std::os::unix::fs::symlink("run", root.join("var")).unwrap();
        assert_eq!(resolve(&root.join("var/a/b")).unwrap(), root.join("run/a/b"));
        assert_eq!(resolve(&root.join("var")).unwrap(), root.join("run"));
        for bad in ["x", "/", "/a/../b"] {
            let error = resolve(Path::new(bad)).unwrap_err();
            assert!(error.to_string().starts_with(bad), "{error}");
        }
    }

    #[test]
    fn only_a_missing_place_costs_a_root_of_its_own() {
        let dir = tempfile::tempdir().unwrap();
        let (source, place) = (dir.path().join("source"), dir.path().join("place"));
        for dir in [&source, &place] {
            fs::create_dir(dir).unwrap();
        }
        let mount = |target: PathBuf| Mount {
            source: source.clone(),
            target,
            read_only: true,
        };
        let staging = dir.path().join("root");
        let steps = plan(&staging, &[mount(place.clone())]).unwrap();
        assert!(matches!(steps.as_slice(), [Step::Bind { .. }]), "{steps:?}");
        // inside another one: in that one's directory
        let steps = plan(&staging, &[mount(place.join("in")), mount(place.clone())]).unwrap();
        assert!(
            matches!(steps.as_slice(), [Step::Bind { .. }, Step::Bind { .. }]),
            "{steps:?}"
        );
        assert!(source.join("in").is_dir());
        let steps = plan(&staging, &[mount("/no-such-place/a/b".into())]).unwrap();
        assert!(matches!(steps.first(), Some(Step::Memory(_))));
        assert!(matches!(steps.last(), Some(Step::Root(_))));
        let dirs: Vec<&CString> = steps
            .iter()
            .filter_map(|step| match step {
                Step::Dir(at, _) if at.as_bytes().windows(8).any(|part| part == b"no-such-") => Some(at),
                _ => None,
            })
            .collect();
        assert_eq!(dirs.len(), 3, "{dirs:?}");
        let gone = Mount {
            source: dir.path().join("gone"),
            target: place,
            read_only: false,
        };
        assert!(plan(&staging, &[gone]).unwrap_err().to_string().contains("gone"));
    }
}
