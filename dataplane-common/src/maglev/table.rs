extern crate alloc;

use alloc::vec;
use alloc::vec::Vec;

use super::addr_hash;
use crate::abi::{Addr, BePort};

/// Sizes of tables: primes just below powers of two, so that every step visits every entry.
const PRIMES: [usize; 10] = [251, 509, 1021, 2039, 4093, 8191, 16_381, 32_749, 65_521, 131_071];

/// No backend yet.
const EMPTY: u32 = u32::MAX;

/// Entries that a table of this many backends should have. No backends need none, and one needs one.
///
/// The paper's hundred for each keep the shares within 1 %. When one of `n` backends leaves, more flows than its own move,
/// and the share of these falls with `size / n` only: four times `n` for each (measured: 1.0 to 1.6 times `1/n` of all
/// flows move) keep that below twice `1/n` up to 150 backends. The largest table has 131,071 entries (1 MiB of slots);
/// beyond 150 backends about 1 % of the flows move.
#[must_use]
pub fn table_size(backends: usize) -> usize {
    if backends < 2 {
        return backends;
    }
    let wanted = backends.saturating_mul(backends.saturating_mul(4).max(100));
    let fitting = PRIMES.into_iter().find(|prime| *prime >= wanted);
    fitting.unwrap_or(PRIMES[PRIMES.len() - 1])
}

/// Makes a table of `size` entries, each an index into `backends`. The order of `backends` does not matter to which
/// backend an entry names, and what is listed twice counts once.
///
/// `size` should come from [`table_size`]; one that is no prime is taken too, but the shares may be less even. The table
/// is empty if `backends` is empty, and does not name all of them if it is smaller than their number. Takes about
/// `size x ln(size)` steps.
#[must_use]
pub fn build(backends: &[(Addr, BePort)], size: usize) -> Vec<u32> {
    let mut order: Vec<u32> = (0..backends.len())
        .filter_map(|i| u32::try_from(i).ok())
        .collect();
    let of = |index: u32| backends.get(index as usize).copied().unwrap_or_default();
    order.sort_unstable_by_key(|index| (of(*index), *index));
    order.dedup_by_key(|index| of(*index));
    if order.is_empty() || size == 0 {
        return Vec::new();
    }
    let modulus = size as u64;
    let mut turns: Vec<Turn> = order
        .into_iter()
        .map(|index| Turn::new(index, of(index), modulus))
        .collect();
    let mut table = vec![EMPTY; size];
    let mut filled = 0;
    loop {
        for turn in &mut turns {
            // A step that shares a factor with the size never leaves a cycle of full entries: then the neighbours are next.
            let mut tried = 0;
            let place = loop {
                let place = turn.next;
                turn.next = (turn.next + turn.step) % modulus;
                tried += 1;
                if tried > modulus {
                    turn.step = 1;
                }
                if let Some(entry) = usize::try_from(place).ok().and_then(|p| table.get_mut(p))
                    && *entry == EMPTY
                {
                    break entry;
                }
            };
            *place = turn.index;
            filled += 1;
            if filled == size {
                return table;
            }
        }
    }
}

/// Where a backend is in its own permutation of the table.
struct Turn {
    index: u32,
    next: u64,
    step: u64,
}

impl Turn {
    fn new(index: u32, (addr, port): (Addr, BePort), size: u64) -> Self {
        let port = u64::from(port.to_host());
        let offset = addr_hash(&addr, 0x6f66_6673_6574 ^ port);
        let skip = addr_hash(&addr, 0x736b_6970_0000_0000 ^ port);
        Self {
            index,
            next: offset % size,
            step: if size > 2 { skip % (size - 1) + 1 } else { 1 },
        }
    }
}

#[cfg(test)]
#[expect(clippy::cast_possible_truncation, reason = "small numbers")]
mod tests {
    extern crate std;
    use std::collections::HashMap;
    use std::net::Ipv4Addr;

    use proptest::prelude::*;

    use super::*;
    use crate::maglev::{client_hash, entry, flow_hash};

    fn backends(n: u32) -> Vec<(Addr, BePort)> {
        (0..n)
            .map(|i| {
                (
                    Ipv4Addr::from(0x0af4_0000 + i / 3 * 7).into(),
                    BePort::from_host((8000 + i % 3) as u16),
                )
            })
            .collect()
    }

    fn flows() -> impl Iterator<Item = u32> {
        (0..50_000_u32).map(|i| {
            let client = Ipv4Addr::from(0xc0a8_0000 + i / 50).into();
            let port = BePort::from_host((32_768 + i % 50 * 331) as u16);
            flow_hash(&client, port, BePort::from_host(80), 6)
        })
    }

    fn chi_square(counts: &[u64]) -> f64 {
        let mean = counts.iter().sum::<u64>() as f64 / counts.len() as f64;
        counts.iter().map(|c| (*c as f64 - mean).powi(2) / mean).sum()
    }

    #[test]
    fn sizes_follow_the_number_of_backends() {
        assert_eq!([0, 1, 2, 3, 5, 6].map(table_size), [0, 1, 251, 509, 509, 1021]);
        assert_eq!(
            [25, 50, 100, 128].map(table_size),
            [4093, 16_381, 65_521, 131_071]
        );
        assert_eq!([2000, 20_000, usize::MAX].map(table_size), [131_071; 3]);
        for prime in PRIMES {
            assert!(
                (2..prime).take_while(|d| d * d <= prime).all(|d| prime % d != 0),
                "{prime}"
            );
        }
    }

    #[test]
    fn shares_are_even() {
        for n in [2, 3, 7, 10, 50, 100, 1000] {
            let table = build(&backends(n), table_size(n as usize));
            let mut entries = vec![0; n as usize];
            for index in &table {
                entries[*index as usize] += 1;
            }
            let (least, most) = (entries.iter().min().unwrap(), entries.iter().max().unwrap());
            assert!(most - least <= 1, "{n}: {least} to {most}");

            // what flows see: chi-square within 5 standard deviations of its mean, the degrees of freedom
            let mut counts = vec![0; n as usize];
            for hash in flows() {
                let place = entry(hash, u32::try_from(table.len()).unwrap());
                counts[table[place as usize] as usize] += 1;
            }
            let freedom = f64::from(n - 1);
            let chi = chi_square(&counts);
            assert!(chi < freedom + 5.0 * (2.0 * freedom).sqrt() + 5.0, "{n}: {chi}");
        }
    }

    #[test]
    fn few_flows_move_when_a_backend_leaves() {
        for n in [2_u32, 3, 5, 10, 20, 50, 100, 150] {
            let all = backends(n);
            let size = table_size(n as usize);
            let before = build(&all, size);
            for gone in [0, n / 2, n - 1] {
                let mut rest = all.clone();
                rest.remove(gone as usize);
                let after = build(&rest, size);
                let moved = flows()
                    .filter(|hash| {
                        let place = entry(*hash, u32::try_from(size).unwrap()) as usize;
                        all[before[place] as usize] != rest[after[place] as usize]
                    })
                    .count();
                let share = moved as f64 / 50_000.0;
                assert!(share <= 2.0 / f64::from(n), "{n} without {gone}: {share}");
            }
        }
    }

    /// Two builds must agree, or a flow changes its backend during an upgrade: these values may not change.
    #[test]
    fn the_hash_is_part_of_the_protocol() {
        let table = build(&backends(3), 251);
        let head: Vec<u32> = table.iter().take(12).copied().collect();
        let client: Addr = Ipv4Addr::new(192, 0, 2, 1).into();
        let hash = flow_hash(&client, BePort::from_host(40_000), BePort::from_host(80), 6);
        assert_eq!((hash, client_hash(&client)), (1_172_161_857, 450_492_319));
        assert_eq!(head, [0, 1, 1, 0, 2, 2, 1, 1, 1, 1, 1, 2]);
    }

    proptest! {
        #[test]
        fn tables_depend_on_identity_only(n in 1_u32..60, size in 1_usize..600, seed: u64) {
            let sorted = backends(n);
            let mut shuffled = sorted.clone();
            let mut state = seed;
            for i in (1..shuffled.len()).rev() {
                state = crate::maglev::mix(state.wrapping_add(1));
                shuffled.swap(i, (state % (i as u64 + 1)) as usize);
            }
            let (a, b) = (build(&sorted, size), build(&shuffled, size));
            prop_assert_eq!(a.len(), size);
            let a: Vec<_> = a.iter().map(|i| sorted[*i as usize]).collect();
            let b: Vec<_> = b.iter().map(|i| shuffled[*i as usize]).collect();
            prop_assert_eq!(&a, &b);

            // every backend has its share, whatever the size
            let mut counts = HashMap::new();
            for backend in &a {
                *counts.entry(*backend).or_insert(0) += 1;
            }
            prop_assert_eq!(counts.len(), size.min(n as usize));

            // twice the same is once
            let doubled: Vec<_> = sorted.iter().chain(&sorted).copied().collect();
            let c: Vec<_> = build(&doubled, size).iter().map(|i| doubled[*i as usize]).collect();
            prop_assert_eq!(a, c);
        }
    }
}
