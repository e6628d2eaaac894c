//! Ids and slot ranges. Nothing that was given back is given out again before it has rested.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

/// Gives out ids from 1 to `max - 1`, low ones first.
#[derive(Clone, Debug)]
pub(super) struct Ids {
    max: u32,
    next: u32,
    free: BTreeSet<u32>,
}

impl Ids {
    pub(super) const fn new(max: u32) -> Self {
        Self {
            max,
            next: 1,
            free: BTreeSet::new(),
        }
    }

    /// Takes a given id out, when state is restored. False if it is taken or out of range.
    pub(super) fn reserve(&mut self, id: u32) -> bool {
        if id == 0 || id >= self.max {
            return false;
        }
        if id < self.next {
            return self.free.remove(&id);
        }
        self.free.extend(self.next..id);
        self.next = id + 1;
        true
    }

    pub(super) fn take(&mut self) -> Option<u32> {
        if let Some(id) = self.free.pop_first() {
            return Some(id);
        }
        if self.next >= self.max {
            return None;
        }
        self.next += 1;
        Some(self.next - 1)
    }

    pub(super) fn give_back(&mut self, id: u32) {
        debug_assert!(id != 0 && id < self.next && !self.free.contains(&id));
        self.free.insert(id);
    }
}

/// Gives out contiguous ranges, best fit, coalescing what comes back.
#[derive(Clone, Debug)]
pub(super) struct Arena {
    by_base: BTreeMap<u32, u32>,
    by_len: BTreeSet<(u32, u32)>,
}

/// A range of slots.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Default)]
pub(super) struct Range {
    pub(super) base: u32,
    pub(super) len: u32,
}

impl Arena {
    pub(super) fn new(size: u32) -> Self {
        let mut arena = Self {
            by_base: BTreeMap::new(),
            by_len: BTreeSet::new(),
        };
        if size > 0 {
            arena.insert(0, size);
        }
        arena
    }

    fn insert(&mut self, base: u32, len: u32) {
        self.by_base.insert(base, len);
        self.by_len.insert((len, base));
    }

    fn remove(&mut self, base: u32, len: u32) {
        self.by_base.remove(&base);
        self.by_len.remove(&(len, base));
    }

    /// A range of `len` slots; the empty range is always there.
    pub(super) fn take(&mut self, len: u32) -> Option<Range> {
        if len == 0 {
            return Some(Range::default());
        }
        let &(found, base) = self.by_len.range((len, 0)..).next()?;
        self.remove(base, found);
        if found > len {
            self.insert(base + len, found - len);
        }
        Some(Range { base, len })
    }

    /// Takes a given range out, when state is restored. False if any of it is taken or out of range.
    pub(super) fn reserve(&mut self, range: Range) -> bool {
        if range.len == 0 {
            return true;
        }
        let Some((&base, &len)) = self.by_base.range(..=range.base).next_back() else {
            return false;
        };
        let (end, range_end) = (
            u64::from(base) + u64::from(len),
            u64::from(range.base) + u64::from(range.len),
        );
        if range_end > end {
            return false;
        }
        self.remove(base, len);
        if range.base > base {
            self.insert(base, range.base - base);
        }
        let rest = len - (range.base - base) - range.len;
        if rest > 0 {
            self.insert(range.base + range.len, rest);
        }
        true
    }

    pub(super) fn give_back(&mut self, range: Range) {
        if range.len == 0 {
            return;
        }
        let (mut base, mut len) = (range.base, range.len);
        if let Some((&before, &before_len)) = self.by_base.range(..base).next_back() {
            debug_assert!(before + before_len <= base, "range given back twice");
            if before + before_len == base {
                self.remove(before, before_len);
                base = before;
                len += before_len;
            }
        }
        if let Some((&after, &after_len)) = self.by_base.range(base + len..).next()
            && after == base + len
        {
            self.remove(after, after_len);
            len += after_len;
        }
        self.insert(base, len);
    }

    /// Free slots in all.
    pub(super) fn free(&self) -> u32 {
        self.by_base.values().sum()
    }
}

/// What rests before it may be used again, in the order of its end.
#[derive(Clone, Debug)]
pub(super) struct Quarantine<T> {
    rest_ms: u64,
    queue: VecDeque<(u64, T)>,
}

impl<T> Quarantine<T> {
    pub(super) const fn new(rest_ms: u64) -> Self {
        Self {
            rest_ms,
            queue: VecDeque::new(),
        }
    }

    pub(super) fn put(&mut self, now_ms: u64, item: T) {
        self.queue.push_back((now_ms.saturating_add(self.rest_ms), item));
    }

    /// What has rested long enough.
    pub(super) fn release(&mut self, now_ms: u64) -> impl Iterator<Item = T> + '_ {
        let ready = self.queue.iter().take_while(|(at, _)| *at <= now_ms).count();
        self.queue.drain(..ready).map(|(_, item)| item)
    }

    /// When the next item is ready.
    pub(super) fn next_release(&self) -> Option<u64> {
        self.queue.front().map(|(at, _)| *at)
    }

    pub(super) fn items(&self) -> impl Iterator<Item = &T> {
        self.queue.iter().map(|(_, item)| item)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn ids_are_low_and_reserved_ones_are_not_given_out() {
        let mut ids = Ids::new(6);
        assert!(ids.reserve(3));
        assert!(!ids.reserve(3), "taken");
        assert!(!ids.reserve(6) && !ids.reserve(0), "out of range");
        assert_eq!(
            [ids.take(), ids.take(), ids.take(), ids.take(), ids.take()],
            [Some(1), Some(2), Some(4), Some(5), None]
        );
        ids.give_back(4);
        assert_eq!((ids.take(), ids.take()), (Some(4), None));
    }

    #[test]
    fn quarantine_keeps_for_the_whole_rest() {
        let mut quarantine = Quarantine::new(2000);
        quarantine.put(10, 'a');
        quarantine.put(500, 'b');
        assert_eq!(quarantine.release(2009).count(), 0);
        assert_eq!(quarantine.release(2010).collect::<Vec<_>>(), ['a']);
        assert_eq!(quarantine.next_release(), Some(2500));
        assert_eq!(quarantine.release(9999).collect::<Vec<_>>(), ['b']);
    }

    proptest! {
        /// Ranges never overlap, none is lost, and all free space is one range again in the end.
        #[test]
        fn arena_neither_overlaps_nor_leaks(steps in prop::collection::vec((0u32..40, any::<prop::sample::Index>(), any::<bool>()), 0..200)) {
            const SIZE: u32 = 256;
            let mut arena = Arena::new(SIZE);
            let mut held: Vec<Range> = Vec::new();
            for (len, index, take) in steps {
                if take || held.is_empty() {
                    if let Some(range) = arena.take(len) {
                        prop_assert_eq!(range.len, len);
                        prop_assert!(range.base + range.len <= SIZE);
                        for other in held.iter().filter(|o| o.len > 0 && len > 0) {
                            prop_assert!(range.base >= other.base + other.len || other.base >= range.base + range.len);
                        }
                        held.push(range);
                    }
                } else {
                    arena.give_back(held.swap_remove(index.index(held.len())));
                }
                prop_assert_eq!(arena.free() + held.iter().map(|r| r.len).sum::<u32>(), SIZE);
            }
            // what is held can be reserved in a new arena, once
            let mut restored = Arena::new(SIZE);
            for range in &held {
                prop_assert!(restored.reserve(*range));
                prop_assert!(range.len == 0 || !restored.reserve(*range));
            }
            prop_assert_eq!(restored.free(), arena.free());
            for range in held {
                arena.give_back(range);
            }
            prop_assert_eq!(arena.take(SIZE), Some(Range { base: 0, len: SIZE }));
        }
    }
}
