//! Entries of any map as bytes: read, written, and copied from one map to another of the same shape.

use std::collections::HashSet;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use aya::maps::{MapInfo, MapType};

use super::{KernelError, syscall};

/// Entries that one system call moves, to begin with.
const BATCH: u32 = 4096;

/// A map, and what is needed to read and write it without knowing its types.
#[derive(Debug)]
pub(super) struct RawMap {
    fd: OwnedFd,
    path: PathBuf,
    kind: MapType,
    key_size: usize,
    /// Size of a value as system calls see it: of all CPUs for a per-CPU map.
    value_size: usize,
    max_entries: u32,
}

/// Entries, one after the other.
#[derive(Debug, Default)]
pub(super) struct Entries {
    keys: Vec<u8>,
    values: Vec<u8>,
    key_size: usize,
    value_size: usize,
}

impl Entries {
    /// Keys with their values.
    pub(super) fn iter(&self) -> impl Iterator<Item = (&[u8], &[u8])> {
        // a size of 0 would panic, and no map has it
        let keys = self.keys.chunks_exact(self.key_size.max(1));
        keys.zip(self.values.chunks_exact(self.value_size.max(1)))
    }

    pub(super) fn len(&self) -> usize {
        self.keys.len() / self.key_size.max(1)
    }
}

/// The value that these bytes are. `T` is integers, for which any bytes will do, and `N` its size.
pub(super) fn read<T: aya::Pod, const N: usize>(bytes: &[u8]) -> Option<T> {
    const { assert!(size_of::<T>() == N) };
    let bytes: &[u8; N] = bytes.first_chunk()?;
    // SAFETY: the bytes are as many as the type has, and any are a value of it.
    Some(unsafe { bytes.as_ptr().cast::<T>().read_unaligned() })
}

impl RawMap {
    pub(super) fn open(path: &Path) -> Result<Self, KernelError> {
        let map_error = |source| KernelError::Map {
            map: path.display().to_string(),
            source,
        };
        let io_error = |source| KernelError::Io {
            operation: "open pinned map",
            path: path.into(),
            source,
        };
        let fd = syscall::obj_get(path).map_err(io_error)?;
        let info = MapInfo::from_pin(path).map_err(map_error)?;
        let kind = info.map_type().map_err(map_error)?;
        let value_size = info.value_size() as usize;
        let per_cpu = matches!(
            kind,
            MapType::PerCpuArray | MapType::PerCpuHash | MapType::LruPerCpuHash
        );
        let value_size = if per_cpu {
            let cpus = aya::util::nr_cpus().map_err(|(_, source)| io_error(source))?;
            value_size.next_multiple_of(8) * cpus
        } else {
            value_size
        };
        Ok(Self {
            fd,
            path: path.into(),
            kind,
            key_size: info.key_size() as usize,
            value_size,
            max_entries: info.max_entries(),
        })
    }

    pub(super) fn kind(&self) -> MapType {
        self.kind
    }

    /// True for maps that have each index from the start.
    pub(super) fn is_array(&self) -> bool {
        matches!(self.kind, MapType::Array | MapType::PerCpuArray)
    }

    /// True for maps that forget what has not been used for long when they are full.
    pub(super) fn is_lru(&self) -> bool {
        matches!(self.kind, MapType::LruHash | MapType::LruPerCpuHash)
    }

    fn error(&self, operation: &'static str, source: io::Error) -> KernelError {
        KernelError::Io {
            operation,
            path: self.path.clone(),
            source,
        }
    }

    /// Every entry. What changes meanwhile is found as it was before or after.
    pub(super) fn entries(&self) -> Result<Entries, KernelError> {
        match self.in_batches() {
            // before 5.6, or 5.13 for a trie
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) || is_unsupported(&error) => {
                self.one_by_one()
            }
            other => other,
        }
        .map_err(|source| self.error("read the entries of", source))
    }

    fn empty(&self) -> Entries {
        Entries {
            key_size: self.key_size,
            value_size: self.value_size,
            ..Entries::default()
        }
    }

    /// Shows every entry to `visit`, without holding them all at once, and gives how many there were.
    pub(super) fn visit(&self, visit: &mut dyn FnMut(&[u8], &[u8])) -> Result<usize, KernelError> {
        let mut count = 0;
        let mut visit_all = |keys: &[u8], values: &[u8]| {
            let keys = keys.chunks_exact(self.key_size.max(1));
            for (key, value) in keys.zip(values.chunks_exact(self.value_size.max(1))) {
                count += 1;
                visit(key, value);
            }
        };
        match self.batches(&mut visit_all) {
            // before 5.6
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) || is_unsupported(&error) => {
                let all = self
                    .one_by_one()
                    .map_err(|source| self.error("read the entries of", source))?;
                visit_all(&all.keys, &all.values);
            }
            other => other.map_err(|source| self.error("read the entries of", source))?,
        }
        Ok(count)
    }

    /// Reads an entry into `value`, which has its size. False if there is none.
    pub(super) fn get(&self, key: &[u8], value: &mut [u8]) -> Result<bool, KernelError> {
        syscall::map_lookup(self.fd.as_fd(), key, value)
            .map_err(|source| self.error("read an entry of", source))
    }

    /// Removes an entry. False if there is none.
    pub(super) fn remove(&self, key: &[u8]) -> Result<bool, KernelError> {
        syscall::map_delete(self.fd.as_fd(), key).map_err(|source| self.error("remove an entry of", source))
    }

    pub(super) fn max_entries(&self) -> u32 {
        self.max_entries
    }

    fn in_batches(&self) -> io::Result<Entries> {
        let mut all = self.empty();
        self.batches(&mut |keys, values| {
            all.keys.extend(keys);
            all.values.extend(values);
        })?;
        Ok(all)
    }

    fn batches(&self, take: &mut dyn FnMut(&[u8], &[u8])) -> io::Result<()> {
        let mut size = BATCH.min(self.max_entries.max(1));
        // what the kernel calls a batch is a bucket's number or a key
        let mut position: Option<Vec<u8>> = None;
        loop {
            let mut keys = vec![0; size as usize * self.key_size];
            let mut values = vec![0; size as usize * self.value_size];
            let mut next = vec![0; self.key_size.max(8)];
            let (count, result) = syscall::map_lookup_batch(
                self.fd.as_fd(),
                position.as_deref(),
                &mut next,
                &mut keys,
                &mut values,
                size,
            );
            match &result {
                // a bucket has more entries than there was room for
                Err(error) if error.raw_os_error() == Some(libc::ENOSPC) => {
                    size = size.saturating_mul(2);
                    continue;
                }
                Err(error) if error.raw_os_error() != Some(libc::ENOENT) => return result,
                _ => {}
            }
            let count = count as usize;
            keys.truncate(count * self.key_size);
            values.truncate(count * self.value_size);
            take(&keys, &values);
            // ENOENT: that was the last
            if result.is_err() {
                return Ok(());
            }
            position = Some(next);
        }
    }

    fn one_by_one(&self) -> io::Result<Entries> {
        let mut all = self.empty();
        let mut key: Option<Vec<u8>> = None;
        // When the key is deleted the kernel begins again with the first: what is read twice is no harm, but it must end.
        for _ in 0..u64::from(self.max_entries).saturating_mul(2) {
            let mut next = vec![0; self.key_size];
            if !syscall::map_next_key(self.fd.as_fd(), key.as_deref(), &mut next)? {
                break;
            }
            let mut value = vec![0; self.value_size];
            if syscall::map_lookup(self.fd.as_fd(), &next, &mut value)? {
                all.keys.extend(&next);
                all.values.extend(&value);
            }
            key = Some(next);
        }
        Ok(all)
    }

    /// Writes entries, those of rows that are zero in a new array apart. Gives how many were written.
    pub(super) fn put_all(&self, entries: &Entries) -> Result<usize, KernelError> {
        let mut written = 0;
        for (key, value) in entries.iter() {
            if self.is_array() {
                let index = key
                    .first_chunk()
                    .map_or(u32::MAX, |bytes| u32::from_ne_bytes(*bytes));
                if index >= self.max_entries || value.iter().all(|byte| *byte == 0) {
                    continue;
                }
            }
            syscall::map_update(self.fd.as_fd(), key, value, syscall::BPF_ANY)
                .map_err(|source| self.error("write an entry of", source))?;
            written += 1;
        }
        Ok(written)
    }

    /// Writes entries of keys that are not there and not in `known`, and adds them to `known`.
    pub(super) fn put_missing(
        &self,
        entries: &Entries,
        known: &mut HashSet<Box<[u8]>>,
    ) -> Result<usize, KernelError> {
        let mut written = 0;
        for (key, value) in entries.iter() {
            if known.contains(key) {
                continue;
            }
            match syscall::map_update(self.fd.as_fd(), key, value, syscall::BPF_NOEXIST) {
                Ok(()) => written += 1,
                Err(error) if error.raw_os_error() == Some(libc::EEXIST) => {}
                Err(source) => return Err(self.error("write an entry of", source)),
            }
            known.insert(key.into());
        }
        Ok(written)
    }
}

fn is_unsupported(error: &io::Error) -> bool {
    // ENOTSUPP has no name in user space
    matches!(error.raw_os_error(), Some(524 | libc::EOPNOTSUPP))
}
