//! Files that change all at once (kubelet's `AtomicWriter`): what is seen are links through `..data`, which is one link to a
//! directory that never changes.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};

use jiff::Timestamp;

const DATA: &str = "..data";
const NEW: &str = "..data_tmp";

/// A file to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct File {
    pub(super) bytes: Vec<u8>,
    /// Permissions.
    pub(super) mode: u32,
}

/// Files by their path in the volume.
pub(super) type Files = BTreeMap<PathBuf, File>;

/// Makes a directory show these files and no others.
///
/// # Errors
/// When it cannot; then it shows what it did.
pub(super) fn write(dir: &Path, files: &Files) -> io::Result<()> {
    fs::create_dir_all(dir)?;
    let data = dir.join(DATA);
    if shows(&data, files) {
        return Ok(());
    }
    let old = fs::read_link(&data).ok();
    let stamp = Timestamp::now().strftime("..%Y_%m_%d_%H_%M_%S.%9f").to_string();
    let fresh = dir.join(&stamp);
    for (path, file) in files {
        let path = fresh.join(path);
        if let Some(parent) = path.parent() {
            fs::create_dir_all(parent)?;
        }
        fs::write(&path, &file.bytes)?;
        fs::set_permissions(&path, fs::Permissions::from_mode(file.mode))?;
    }
    fs::create_dir_all(&fresh)?;
    let link = dir.join(NEW);
    if link.is_symlink() {
        fs::remove_file(&link)?;
    }
    symlink(&stamp, &link)?;
    fs::rename(&link, &data)?;
    let first = |path: &Path| path.components().next().map(|part| part.as_os_str().to_owned());
    let shown: BTreeSet<_> = files.keys().filter_map(|path| first(path)).collect();
    for name in &shown {
        let at = dir.join(name);
        if !at.is_symlink() {
            symlink(Path::new(DATA).join(name), at)?;
        }
    }
    for entry in fs::read_dir(dir)?.flatten() {
        let name = entry.file_name();
        if !shown.contains(&name) && !name.to_string_lossy().starts_with("..") {
            fs::remove_file(entry.path())?;
        }
    }
    if let Some(old) = old {
        fs::remove_dir_all(dir.join(old))?;
    }
    Ok(())
}

fn shows(data: &Path, files: &Files) -> bool {
    if !data.exists() || count(data) != files.len() {
        return false;
    }
    files.iter().all(|(path, file)| {
        let path = data.join(path);
        let same_mode =
            fs::metadata(&path).is_ok_and(|found| found.permissions().mode() & 0o7777 == file.mode);
        same_mode && fs::read(&path).is_ok_and(|bytes| bytes == file.bytes)
    })
}

/// Files in a directory and below.
fn count(dir: &Path) -> usize {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    entries
        .map(|entry| match entry.file_type() {
            Ok(kind) if kind.is_dir() => count(&entry.path()),
            _ => 1,
        })
        .sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn files(list: &[(&str, &str)]) -> Files {
        list.iter()
            .map(|(path, text)| {
                let file = File {
                    bytes: text.as_bytes().to_vec(),
                    mode: 0o640,
                };
                (PathBuf::from(path), file)
            })
            .collect()
    }

    #[test]
    fn a_volume_shows_what_it_was_told_last() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path().join("v");
        let shown = || -> Vec<String> {
            let mut names: Vec<String> = fs::read_dir(&dir)
                .unwrap()
                .map(|entry| entry.unwrap().file_name().into_string().unwrap())
                .filter(|name| !name.starts_with(".."))
                .collect();
            names.sort();
            names
        };
        let versions = || fs::read_dir(&dir).unwrap().count() - shown().len();
        write(&dir, &files(&[("a", "1"), ("d/x", "2"), ("d/y", "3")])).unwrap();
        assert_eq!(shown(), ["a", "d"]);
        assert_eq!(fs::read_to_string(dir.join("d/y")).unwrap(), "3");
        let mode = fs::metadata(dir.join("a")).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o640);
        let before = fs::read_link(dir.join(DATA)).unwrap();
        write(&dir, &files(&[("a", "1"), ("d/x", "2"), ("d/y", "3")])).unwrap();
        assert_eq!(fs::read_link(dir.join(DATA)).unwrap(), before);
        write(&dir, &files(&[("a", "new"), ("b", "4")])).unwrap();
        assert_eq!(shown(), ["a", "b"]);
        assert_eq!(fs::read_to_string(dir.join("a")).unwrap(), "new");
        // the link and the one directory that it shows
        assert_eq!(versions(), 2);
        write(&dir, &files(&[])).unwrap();
        assert!(shown().is_empty());
    }
}
