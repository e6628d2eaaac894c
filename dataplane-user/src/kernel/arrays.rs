//! Arrays of the kernel in our own memory: a change is a store, not a system call.

use std::collections::BTreeMap;
use std::io;
use std::marker::PhantomData;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::path::Path;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering, fence};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use aya::Pod;
use dataplane_common::abi::{BackendHealth, BackendStats, ServiceStats, map_name};

use super::{KernelError, open_map};

/// The memory of a map. A map is mapped once, however many use it: each mapping counts as memory of the process.
#[derive(Debug)]
struct Mapping {
    words: NonNull<u64>,
    bytes: usize,
}

// SAFETY: the mapping is plain shared memory, only accessed through atomics; nothing is bound to a thread.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

/// What is mapped, by map id. A mapping holds its map, so the id is no other map's while it lives.
static MAPPINGS: Mutex<BTreeMap<u32, Weak<Mapping>>> = Mutex::new(BTreeMap::new());

impl Mapping {
    /// The mapping of this map; `bytes` is the size of its rows in all.
    fn of(id: u32, map: BorrowedFd<'_>, bytes: usize) -> io::Result<Arc<Self>> {
        let mut mappings = MAPPINGS.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = mappings.get(&id).and_then(Weak::upgrade)
            && known.bytes == bytes
        {
            return Ok(known);
        }
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new shared mapping at an address of the kernel's choice; it holds the map alive by itself.
        let address = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                bytes,
                protection,
                libc::MAP_SHARED,
                map.as_raw_fd(),
                0,
            )
        };
        if address == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let words = NonNull::new(address.cast()).ok_or_else(|| io::Error::other("mapped at address 0"))?;
        let mapping = Arc::new(Self { words, bytes });
        mappings.retain(|_, mapping| mapping.strong_count() > 0);
        mappings.insert(id, Arc::downgrade(&mapping));
        Ok(mapping)
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: our own mapping, and no reference into it outlives self.
        unsafe { libc::munmap(self.words.as_ptr().cast(), self.bytes) };
    }
}

/// A memory-mapped array (`BPF_F_MMAPABLE`, 5.5) of rows of whole 8-byte words.
#[derive(Debug)]
pub(super) struct MappedArray<T> {
    mapping: Arc<Mapping>,
    len: u32,
    row: PhantomData<fn() -> T>,
}

impl<T: Pod> MappedArray<T> {
    const WORDS: usize = {
        assert!(
            size_of::<T>().is_multiple_of(8),
            "the kernel rounds rows up to 8 bytes"
        );
        size_of::<T>() / 8
    };

    /// Maps the array pinned under `name`, whose shape has been checked.
    pub(super) fn open(pin_dir: &Path, name: &'static str) -> Result<Self, KernelError> {
        let map = open_map(pin_dir, name)?;
        let fail = |source| KernelError::Map {
            map: name.into(),
            source,
        };
        let info = map.info().map_err(fail)?;
        let len = info.max_entries();
        let bytes = size_of::<T>() * len as usize;
        let mapping = Mapping::of(info.id(), map.fd().as_fd(), bytes).map_err(|source| KernelError::Io {
            operation: "map the memory of",
            path: pin_dir.join(name),
            source,
        })?;
        Ok(Self {
            mapping,
            len,
            row: PhantomData,
        })
    }

    /// Rows.
    pub(super) const fn len(&self) -> u32 {
        self.len
    }

    /// Word `word` of row `index`; `None` beyond the end.
    pub(super) fn word(&self, index: u32, word: usize) -> Option<&AtomicU64> {
        if index >= self.len || word >= Self::WORDS {
            return None;
        }
        // SAFETY: inside the mapping (checked), aligned to 8 bytes, alive as long as self; the programs in the kernel
        // access it by whole aligned words too.
        Some(unsafe {
            AtomicU64::from_ptr(
                self.mapping
                    .words
                    .as_ptr()
                    .add(index as usize * Self::WORDS + word),
            )
        })
    }

    /// Byte `byte` of row `index`; `None` beyond the end.
    pub(super) fn byte(&self, index: u32, byte: usize) -> Option<&AtomicU8> {
        if index >= self.len || byte >= size_of::<T>() {
            return None;
        }
        // SAFETY: inside the mapping (checked), alive as long as self.
        Some(unsafe {
            AtomicU8::from_ptr(
                self.mapping
                    .words
                    .as_ptr()
                    .cast::<u8>()
                    .add(index as usize * size_of::<T>() + byte),
            )
        })
    }

    /// The row as it is; words may be of different moments.
    pub(super) fn read(&self, index: u32) -> Option<T> {
        let mut row = std::mem::MaybeUninit::<T>::uninit();
        for word in 0..Self::WORDS {
            let value = self.word(index, word)?.load(Ordering::Acquire);
            // SAFETY: inside `row`, which is WORDS words long; `T` need not be aligned to 8.
            unsafe { row.as_mut_ptr().cast::<u64>().add(word).write_unaligned(value) };
        }
        // SAFETY: every byte has been written, and any bytes are a valid `T` (Pod).
        Some(unsafe { row.assume_init() })
    }

    /// Writes a row that no reader can reach yet. False beyond the end.
    pub(super) fn write(&self, index: u32, row: &T) -> bool {
        for word in 0..Self::WORDS {
            // SAFETY: inside `row`, which is WORDS words of initialised integers.
            let value = unsafe { std::ptr::from_ref(row).cast::<u64>().add(word).read_unaligned() };
            let Some(target) = self.word(index, word) else {
                return false;
            };
            target.store(value, Ordering::Relaxed);
        }
        // what is published later is seen after this row
        fence(Ordering::Release);
        true
    }
}

/// Reads what the programs count of each backend and service. Cheap to clone.
#[derive(Clone, Debug)]
pub struct StatsReader(Arc<Stats>);

#[derive(Debug)]
struct Stats {
    backends: MappedArray<BackendStats>,
    health: MappedArray<BackendHealth>,
    services: MappedArray<ServiceStats>,
}

impl StatsReader {
    pub(super) fn open(pin_dir: &Path) -> Result<Self, KernelError> {
        Ok(Self(Arc::new(Stats {
            backends: MappedArray::open(pin_dir, map_name::BACKEND_STATS)?,
            health: MappedArray::open(pin_dir, map_name::BACKEND_HEALTH)?,
            services: MappedArray::open(pin_dir, map_name::SERVICE_STATS)?,
        })))
    }

    /// The counts of a backend; `None` beyond the end of the map.
    #[must_use]
    pub fn get(&self, id: u32) -> Option<BackendStats> {
        self.0.backends.read(id)
    }

    /// What connections saw of a backend; `None` beyond the end of the map.
    #[must_use]
    pub fn health(&self, id: u32) -> Option<BackendHealth> {
        self.0.health.read(id)
    }

    /// The counts of a service; `None` beyond the end of the map.
    #[must_use]
    pub fn service(&self, id: u32) -> Option<ServiceStats> {
        self.0.services.read(id)
    }
}
