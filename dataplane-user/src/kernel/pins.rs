//! The pin directory: where things are, and whether they are what this build expects.
//!
//! aya takes over whatever is pinned without comparing anything, and the kernel would then read past our values; so the
//! shape of each pin is compared first.

use std::fs;
use std::path::{Path, PathBuf};

use aya::maps::{MapError, MapInfo};
use dataplane_common::abi::ABI_VERSION;

use super::resize::Change;
use super::{KernelError, MapSpec, mounts};

/// Makes `<root>/v<ABI>/{maps,links}` and gives its path.
pub(super) fn prepare(root: &Path) -> Result<PathBuf, KernelError> {
    let io = |path: &Path| {
        let path = path.to_path_buf();
        move |source| KernelError::Io {
            operation: "create directory",
            path,
            source,
        }
    };
    fs::create_dir_all(root).map_err(io(root))?;
    mounts::check_bpffs(root)?;
    let dir = root.join(format!("v{ABI_VERSION}"));
    for path in [dir.join("maps"), dir.join("links")] {
        fs::create_dir_all(&path).map_err(io(&path))?;
    }
    Ok(dir)
}

pub(super) fn map_path(dir: &Path, name: &str) -> PathBuf {
    dir.join("maps").join(name)
}

pub(super) fn links_path(dir: &Path) -> PathBuf {
    dir.join("links")
}

pub(super) fn link_path(dir: &Path, name: &str) -> PathBuf {
    links_path(dir).join(name)
}

/// Compares every map that is pinned already with what is wanted, and gives those that have another size.
///
/// # Errors
///
/// If a pinned map has another kind, key size, value size or other flags.
pub(super) fn check(dir: &Path, wanted: &[MapSpec]) -> Result<Vec<Change>, KernelError> {
    let mut changes = Vec::new();
    for spec in wanted {
        let path = map_path(dir, spec.name);
        if path.try_exists().unwrap_or(true) {
            let fail = |source: MapError| KernelError::Map {
                map: spec.name.into(),
                source,
            };
            let info = MapInfo::from_pin(&path).map_err(fail)?;
            compare(&path, spec, &info)?;
            let from = info.max_entries();
            if spec.max_entries.is_some_and(|asked| asked != from) {
                changes.push(Change { spec: *spec, from });
            }
        }
    }
    Ok(changes)
}

fn compare(path: &Path, spec: &MapSpec, info: &MapInfo) -> Result<(), KernelError> {
    let same = |field: &'static str, found: String, expected: String| {
        if found == expected {
            Ok(())
        } else {
            Err(KernelError::Shape {
                path: path.to_path_buf(),
                field,
                found,
                expected,
            })
        }
    };
    let kind = info.map_type().map_err(|source| KernelError::Map {
        map: spec.name.into(),
        source,
    })?;
    same("type", format!("{kind:?}"), format!("{:?}", spec.kind))?;
    same("key size", info.key_size().to_string(), spec.key_size.to_string())?;
    same(
        "value size",
        info.value_size().to_string(),
        spec.value_size.to_string(),
    )?;
    same(
        "flags",
        format!("{:#x}", info.map_flags()),
        format!("{:#x}", spec.flags),
    )
}
