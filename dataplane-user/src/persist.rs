//! Files that survive a crash at any moment, and failures on demand for tests.

use std::fmt;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

type Hook = dyn Fn(&'static str) -> io::Result<()> + Send + Sync;

/// Called with the name of each step before it is done; a test makes one fail. Without a hook it costs nothing.
#[derive(Clone, Default)]
pub struct Faults(Option<Arc<Hook>>);

impl Faults {
    /// Every step asks this function first.
    #[must_use]
    pub fn new(hook: impl Fn(&'static str) -> io::Result<()> + Send + Sync + 'static) -> Self {
        Self(Some(Arc::new(hook)))
    }

    /// # Errors
    ///
    /// When a test wants the step to fail.
    pub fn check(&self, step: &'static str) -> io::Result<()> {
        self.0.as_ref().map_or(Ok(()), |hook| hook(step))
    }
}

impl fmt::Debug for Faults {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.0.is_some() {
            "Faults(on)"
        } else {
            "Faults(off)"
        })
    }
}

/// Where the new content is written before it takes the place of the old.
fn temporary(path: &Path) -> PathBuf {
    let mut name = std::ffi::OsString::from(".");
    name.push(path.file_name().unwrap_or_default());
    name.push(".tmp");
    path.with_file_name(name)
}

/// Whether a name in a directory is what a crash in [`replace`] leaves.
#[must_use]
pub fn is_temporary(name: &str) -> bool {
    name.starts_with('.') && name.ends_with(".tmp")
}

/// Gives a file new content: after a crash it has the old content or the new, and when this returns, the new.
///
/// # Errors
///
/// Of the file system; the file then has the old content, or the new if only the directory could not be flushed.
pub fn replace(path: &Path, content: &[u8], faults: &Faults) -> io::Result<()> {
    let temporary = temporary(path);
    let result = write(path, &temporary, content, faults);
    if result.is_err() {
        // nothing to remove if it is in place already
        let _ = fs::remove_file(&temporary);
    }
    result
}

fn write(path: &Path, temporary: &Path, content: &[u8], faults: &Faults) -> io::Result<()> {
    faults.check("create file")?;
    let mut file = File::create(temporary)?;
    let (first, second) = content.split_at(content.len() / 2);
    file.write_all(first)?;
    faults.check("write file")?;
    file.write_all(second)?;
    faults.check("flush file")?;
    file.sync_all()?;
    faults.check("rename file")?;
    fs::rename(temporary, path)?;
    faults.check("flush directory")?;
    sync_parent(path)
}

/// Removes a file for good; one that is not there is fine.
///
/// # Errors
///
/// Of the file system.
pub fn remove(path: &Path, faults: &Faults) -> io::Result<()> {
    faults.check("remove file")?;
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => sync_parent(path),
    }
}

fn sync_parent(path: &Path) -> io::Result<()> {
    match path.parent() {
        Some(parent) => File::open(parent)?.sync_all(),
        None => Ok(()),
    }
}
