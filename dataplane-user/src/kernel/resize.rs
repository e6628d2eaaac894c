//! Another size for maps that are in use, without losing what is in them.
//!
//! The kernel cannot change the size of a map, and a program keeps the maps that it was loaded with. So new maps are made
//! beside the old ones, the new programs are loaded with the new maps, the entries are copied, the programs are swapped
//! one by one, and the pins follow:
//!
//! 1. `maps_next/` gets pins of the new maps, empty. A start that finds it removes it: nothing uses it.
//! 2. When the programs are loaded and the entries copied, `maps_next/` becomes `maps_ready/`, by one rename. From here on
//!    both sets are complete and serve; a start that finds it goes on from here, with the maps in it.
//! 3. The programs are swapped. Meanwhile what the old ones add to maps that programs write, the new ones find, and the
//!    other way round.
//! 4. Each pin in `maps_ready/` is renamed over the one in `maps/`, and the directory is removed.
//!
//! What user space writes does not change meanwhile: this is the start of its only writer.

use std::collections::{BTreeMap, HashSet};
use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use aya::maps::MapType;
use dataplane_common::abi::{
    BackendStats, FrontendKey, FrontendValue, Service, ServiceStats, Slot, map_name,
};

use super::arrays::MappedArray;
use super::transfer::{Entries, RawMap};
use super::{KernelError, MapSpec, pins};

/// New maps that are not in use yet.
const NEXT: &str = "maps_next";
/// New maps that are complete.
const READY: &str = "maps_ready";
/// Directories that may be there after a start was cut short.
pub(super) const DIRS: [&str; 2] = [NEXT, READY];

/// A point of [`super::Kernel::open_observed`] behind which a start may be cut short.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Step {
    /// The maps of another size are made.
    Created,
    /// The programs are loaded.
    Loaded,
    /// The entries are copied.
    Copied,
    /// The new maps are known to be complete.
    Ready,
    /// One more program is attached or replaced.
    Attached,
    /// One more map has taken the place of the old one.
    Moved,
    /// All is done.
    Done,
}

/// A map whose pin has another size than asked for.
#[derive(Clone, Copy, Debug)]
pub(super) struct Change {
    pub(super) spec: MapSpec,
    /// Entries that the pinned map has.
    pub(super) from: u32,
}

impl Change {
    fn to(&self) -> u32 {
        self.spec.max_entries.unwrap_or(self.from)
    }
}

/// How far from the start the maps are used.
#[derive(Debug)]
struct Extent {
    services: u32,
    backends: u32,
    slots: u32,
}

impl Extent {
    /// What can be reached from the frontends. Nothing else is ever looked at again.
    fn read(pin_dir: &Path) -> Result<Self, KernelError> {
        let services = MappedArray::<Service>::open(pin_dir, map_name::SERVICES)?;
        let slots = MappedArray::<Slot>::open(pin_dir, map_name::SLOTS)?;
        let mut extent = Self {
            services: 1,
            backends: 1,
            slots: 1,
        };
        let mut seen = HashSet::new();
        for (key, value) in entries_of(pin_dir, map_name::FRONTENDS)?.iter() {
            debug_assert!(key.len() == size_of::<FrontendKey>() && value.len() == size_of::<FrontendValue>());
            let at = std::mem::offset_of!(FrontendValue, service);
            let Some(id) = value.get(at..).and_then(|bytes| bytes.first_chunk()) else {
                continue;
            };
            let id = u32::from_ne_bytes(*id);
            let Some(row) = services.read(id).filter(|_| seen.insert(id)) else {
                continue;
            };
            extent.services = extent.services.max(id.saturating_add(1));
            for set in [row.cluster, row.local, row.maglev, row.maglev_local] {
                let end = set.base().saturating_add(set.count());
                extent.slots = extent.slots.max(end);
                for slot in (set.base()..end).map_while(|index| slots.read(index)) {
                    if slot.service() == id {
                        extent.backends = extent.backends.max(slot.backend().saturating_add(1));
                    }
                }
            }
        }
        Ok(extent)
    }

    /// Entries that a map must have at least to keep what is in use.
    fn least(&self, pin_dir: &Path, spec: &MapSpec) -> Result<u32, KernelError> {
        Ok(match spec.name {
            map_name::SERVICES | map_name::SERVICE_STATS => self.services,
            map_name::BACKENDS | map_name::BACKEND_STATS | map_name::BACKEND_HEALTH => self.backends,
            map_name::SLOTS => self.slots,
            _ if spec.kind == MapType::RingBuf => 0,
            name => {
                let map = RawMap::open(&pins::map_path(pin_dir, name))?;
                let entries = map.entries()?;
                let count = if map.is_array() {
                    let used = entries
                        .iter()
                        .filter(|(_, value)| value.iter().any(|byte| *byte != 0));
                    used.filter_map(|(key, _)| key.first_chunk())
                        .map(|key| u32::from_ne_bytes(*key).saturating_add(1))
                        .max()
                        .unwrap_or(0)
                } else {
                    u32::try_from(entries.len()).unwrap_or(u32::MAX)
                };
                // Such a map begins to forget while each CPU still has free entries of its own.
                if map.is_lru() {
                    count.saturating_mul(2)
                } else {
                    count
                }
            }
        })
    }
}

fn entries_of(pin_dir: &Path, name: &str) -> Result<Entries, KernelError> {
    RawMap::open(&pins::map_path(pin_dir, name))?.entries()
}

/// Splits changes into those that can be made and warnings about those that cannot: a map is never made smaller than what
/// it holds.
pub(super) fn decide(
    pin_dir: &Path,
    changes: Vec<Change>,
) -> Result<(Vec<Change>, Vec<String>), KernelError> {
    let mut possible = Vec::new();
    let mut warnings = Vec::new();
    let mut extent = None;
    for change in changes {
        if change.to() < change.from {
            let extent = match &extent {
                Some(extent) => extent,
                None => extent.insert(Extent::read(pin_dir)?),
            };
            let least = extent.least(pin_dir, &change.spec)?;
            if change.to() < least {
                warnings.push(format!(
                    "map {} keeps its size of {} entries: {} are asked for, but what it holds needs {least}",
                    change.spec.name,
                    change.from,
                    change.to()
                ));
                continue;
            }
        }
        possible.push(change);
    }
    Ok((possible, warnings))
}

/// Maps on the way from one size to another.
#[derive(Debug)]
pub(super) struct Resize {
    pin_dir: PathBuf,
    names: Vec<String>,
    /// An earlier start got as far as [`Step::Ready`].
    resumed: bool,
    /// What was counted in the old maps when they were copied.
    counted: BTreeMap<String, Entries>,
}

impl Resize {
    /// Looks for what an earlier start left: removes what is not complete, and gives what is.
    pub(super) fn left_over(pin_dir: &Path) -> Result<Option<Self>, KernelError> {
        discard(pin_dir)?;
        let ready = pin_dir.join(READY);
        let names = match fs::read_dir(&ready) {
            Ok(entries) => entries
                .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
                .collect::<std::io::Result<Vec<_>>>(),
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
            Err(error) => Err(error),
        };
        let names = names.map_err(|source| KernelError::Io {
            operation: "list",
            path: ready,
            source,
        })?;
        Ok(Some(Self {
            pin_dir: pin_dir.into(),
            names,
            resumed: true,
            counted: BTreeMap::new(),
        }))
    }

    /// Prepares for these changes; there must be at least one.
    pub(super) fn begin(pin_dir: &Path, changes: &[Change]) -> Result<Self, KernelError> {
        let next = pin_dir.join(NEXT);
        fs::create_dir(&next).map_err(|source| KernelError::Io {
            operation: "create directory",
            path: next,
            source,
        })?;
        Ok(Self {
            pin_dir: pin_dir.into(),
            names: changes.iter().map(|change| change.spec.name.into()).collect(),
            resumed: false,
            counted: BTreeMap::new(),
        })
    }

    /// Where the new map of this name is or goes; `None` if it does not change.
    pub(super) fn path(&self, name: &str) -> Option<PathBuf> {
        let dir = if self.resumed { READY } else { NEXT };
        self.names
            .iter()
            .any(|changed| changed == name)
            .then(|| self.pin_dir.join(dir).join(name))
    }

    /// Copies what is in the old maps. The new ones have been made.
    pub(super) fn copy(&mut self) -> Result<(), KernelError> {
        if self.resumed {
            // done; programs of both sets may have been at work since
            return self.pairs()?.iter_mut().try_for_each(Pair::exchange);
        }
        for name in &self.names {
            let old = RawMap::open(&pins::map_path(&self.pin_dir, name))?;
            if old.kind() == MapType::RingBuf {
                continue;
            }
            let entries = old.entries()?;
            RawMap::open(&self.pin_dir.join(NEXT).join(name))?.put_all(&entries)?;
            if is_counted(name) {
                self.counted.insert(name.clone(), entries);
            }
        }
        Ok(())
    }

    /// From here on an interrupted start is finished by the next one.
    pub(super) fn ready(&self) -> Result<(), KernelError> {
        if self.resumed {
            return Ok(());
        }
        rename(&self.pin_dir.join(NEXT), &self.pin_dir.join(READY))
    }

    /// Runs `work`, which swaps the programs, and keeps what they write in both sets the same meanwhile.
    pub(super) fn mirrored<T>(
        &self,
        work: impl FnOnce() -> Result<T, KernelError>,
    ) -> Result<T, KernelError> {
        let mut pairs = self.pairs()?;
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            let mirror = scope.spawn(|| {
                while !stop.load(Ordering::Acquire) {
                    pairs.iter_mut().try_for_each(Pair::exchange)?;
                }
                // once more behind the last program
                pairs.iter_mut().try_for_each(Pair::exchange)
            });
            let guard = StopOnDrop(&stop);
            let done = work();
            drop(guard);
            match mirror.join() {
                Ok(mirrored) => mirrored.and(done),
                Err(panic) => std::panic::resume_unwind(panic),
            }
        })
    }

    fn pairs(&self) -> Result<Vec<Pair>, KernelError> {
        let mut pairs = Vec::new();
        for name in &self.names {
            let pair = Pair {
                old: RawMap::open(&pins::map_path(&self.pin_dir, name))?,
                new: RawMap::open(&self.pin_dir.join(READY).join(name))?,
                known: HashSet::new(),
            };
            if pair.old.is_lru() || name == map_name::SOCK_CONN {
                pairs.push(pair);
            }
        }
        Ok(pairs)
    }

    /// Gives the new maps the places of the old ones.
    pub(super) fn finish(
        self,
        observe: &mut dyn FnMut(Step) -> Result<(), KernelError>,
    ) -> Result<(), KernelError> {
        let ready = self.pin_dir.join(READY);
        let mut old = Vec::new();
        for name in &self.names {
            let path = pins::map_path(&self.pin_dir, name);
            if is_counted(name) {
                old.push((name.clone(), RawMap::open(&path)?));
            }
            rename(&ready.join(name), &path)?;
            observe(Step::Moved)?;
        }
        fs::remove_dir(&ready).map_err(|source| KernelError::Io {
            operation: "remove directory",
            path: ready,
            source,
        })?;
        for (name, old) in old {
            if let Some(before) = self.counted.get(&name) {
                add_counts(&self.pin_dir, &name, before, &old.entries()?)?;
            }
        }
        Ok(())
    }
}

struct StopOnDrop<'a>(&'a AtomicBool);

impl Drop for StopOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Release);
    }
}

/// A map that programs write, in both sizes.
struct Pair {
    old: RawMap,
    new: RawMap,
    /// Keys that both have had: one that was deleted since is not brought back.
    known: HashSet<Box<[u8]>>,
}

impl Pair {
    fn exchange(&mut self) -> Result<(), KernelError> {
        self.new.put_missing(&self.old.entries()?, &mut self.known)?;
        self.old.put_missing(&self.new.entries()?, &mut self.known)?;
        Ok(())
    }
}

/// Arrays of counts that only grow, all words.
fn is_counted(name: &str) -> bool {
    matches!(name, map_name::BACKEND_STATS | map_name::SERVICE_STATS)
}

/// Adds what the old programs counted since the copy.
fn add_counts(pin_dir: &Path, name: &str, before: &Entries, after: &Entries) -> Result<(), KernelError> {
    let add = |word: &dyn Fn(u32, usize, u64)| {
        for ((key, before), (_, after)) in before.iter().zip(after.iter()) {
            let Some(index) = key.first_chunk().map(|key| u32::from_ne_bytes(*key)) else {
                continue;
            };
            for (at, (before, after)) in before
                .as_chunks::<8>()
                .0
                .iter()
                .zip(after.as_chunks::<8>().0)
                .enumerate()
            {
                let more = u64::from_ne_bytes(*after).wrapping_sub(u64::from_ne_bytes(*before));
                if more != 0 {
                    word(index, at, more);
                }
            }
        }
    };
    if name == map_name::SERVICE_STATS {
        let map = MappedArray::<ServiceStats>::open(pin_dir, map_name::SERVICE_STATS)?;
        add(&|index, at, more| {
            if let Some(word) = map.word(index, at) {
                word.fetch_add(more, Ordering::Relaxed);
            }
        });
    } else {
        let map = MappedArray::<BackendStats>::open(pin_dir, map_name::BACKEND_STATS)?;
        add(&|index, at, more| {
            if let Some(word) = map.word(index, at) {
                word.fetch_add(more, Ordering::Relaxed);
            }
        });
    }
    Ok(())
}

fn rename(from: &Path, to: &Path) -> Result<(), KernelError> {
    fs::rename(from, to).map_err(|source| KernelError::Io {
        operation: "rename",
        path: from.into(),
        source,
    })
}

/// Removes new maps that nothing uses.
pub(super) fn discard(pin_dir: &Path) -> Result<(), KernelError> {
    let next = pin_dir.join(NEXT);
    match fs::remove_dir_all(&next) {
        Err(source) if source.kind() != ErrorKind::NotFound => Err(KernelError::Io {
            operation: "remove directory",
            path: next,
            source,
        }),
        _ => Ok(()),
    }
}
