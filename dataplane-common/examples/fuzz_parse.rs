//! Hostile packets for the parser: changes what is in a corpus again and again, and keeps what makes the parser do something
//! that it has not done before.
//!
//! `cargo run --release -p dataplane-common --example fuzz_parse -- SECONDS DIRECTORY [SEED]`
//!
//! A finding is written to `DIRECTORY/../finding`, and ends the run with exit code 1. New inputs of the corpus are written to
//! the directory at the end.

use std::collections::{BTreeMap, HashSet};
use std::fs;
use std::panic::catch_unwind;
use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use dataplane_common::packet::{Head, Load, Outcome, head_flag, parse};

/// SplitMix64: a few lines, so that a run can be repeated anywhere.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, limit: usize) -> usize {
        usize::try_from(self.next() % (limit.max(1) as u64)).unwrap_or(0)
    }

    fn byte(&mut self) -> u8 {
        self.next().to_le_bytes()[0]
    }
}

/// Values that parsers take wrong.
const SPECIAL: [u8; 16] = [0, 1, 3, 4, 6, 17, 43, 44, 0x45, 0x4f, 51, 58, 60, 0x81, 132, 255];

fn change(random: &mut Random, corpus: &[Vec<u8>]) -> Vec<u8> {
    let mut bytes = corpus
        .get(random.below(corpus.len()))
        .cloned()
        .unwrap_or_default();
    for _ in 0..=random.below(6) {
        let at = random.below(bytes.len());
        match random.below(8) {
            0 | 1 => {
                let value = random.byte();
                bytes.get_mut(at).into_iter().for_each(|byte| *byte = value);
            }
            2 | 3 => {
                let value = SPECIAL.get(random.below(SPECIAL.len())).copied().unwrap_or(0);
                bytes.get_mut(at).into_iter().for_each(|byte| *byte = value);
            }
            4 => bytes
                .get_mut(at)
                .into_iter()
                .for_each(|byte| *byte ^= 1 << (at % 8)),
            5 => bytes.truncate(at),
            6 => {
                let more = (0..random.below(40)).map(|_| random.byte()).collect::<Vec<u8>>();
                bytes.splice(at..at, more);
            }
            _ => {
                let other = corpus
                    .get(random.below(corpus.len()))
                    .cloned()
                    .unwrap_or_default();
                let from = random.below(other.len());
                bytes.truncate(at);
                bytes.extend(other.iter().skip(from));
            }
        }
        bytes.truncate(2000);
    }
    bytes
}

/// How a packet is handed to the parser: by its own Ethernet type, or as a device without a link layer has it.
fn run(bytes: &[u8]) -> (Outcome, Head) {
    let mut head = Head::default();
    let len = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
    let mut kind = [0; 2];
    let outcome = if bytes.load(12, &mut kind) {
        parse(bytes, 14, u16::from_be_bytes(kind), len, &mut head)
    } else {
        parse(bytes, 0, 0x0800, len, &mut head)
    };
    (outcome, head)
}

/// What must hold of whatever the parser says.
fn wrong(bytes: &[u8]) -> Option<String> {
    let Ok((outcome, head)) = catch_unwind(|| run(bytes)) else {
        return Some("panic".into());
    };
    if run(bytes) != (outcome, head) {
        return Some("another result the second time".into());
    }
    let len = u64::try_from(bytes.len()).unwrap_or(u64::MAX);
    let (l3, l4, end) = (
        u64::from(head.l3),
        u64::from(head.l4),
        u64::from(head.l3) + u64::from(head.len),
    );
    let v6 = head.flags & head_flag::V6 != 0;
    let least = if v6 { 40 } else { 20 };
    let ports = |at: u32| {
        let mut found = [0; 4];
        bytes.load(at, &mut found).then_some(found)
    };
    let claimed = |source: u16, destination: u16| {
        let ([a, b], [c, d]) = (source.to_be_bytes(), destination.to_be_bytes());
        [a, b, c, d]
    };
    let (source, destination) = (head.src_port.to_host(), head.dst_port.to_host());
    let held = match outcome {
        Outcome::Flow => {
            l4 >= l3 + least
                && end <= len
                && l4 + 8 <= end
                && head.flags & (head_flag::ICMP_ERROR | head_flag::LATER_FRAGMENT) == 0
                && ports(head.l4) == Some(claimed(source, destination))
                && head.src.is_v4() != v6
                && head.dst.is_v4() != v6
        }
        Outcome::LaterFragment => {
            l4 >= l3 + least && l4 <= end && end <= len && head.flags & head_flag::LATER_FRAGMENT != 0
        }
        Outcome::IcmpError => {
            u64::from(head.inner_l3) == l4 + 8
                && u64::from(head.inner_l4) >= u64::from(head.inner_l3) + least
                && u64::from(head.inner_l4) + 8 <= end
                && end <= len
                && head.flags & head_flag::ICMP_ERROR != 0
                // seen from the other end
                && ports(head.inner_l4) == Some(claimed(destination, source))
        }
        Outcome::Echo => {
            let id = source.max(destination).to_be_bytes();
            let mut found = [0; 2];
            end <= len
                && l4 + 8 <= end
                && head.flags & head_flag::ECHO != 0
                && source.min(destination) == 0
                && bytes.load(head.l4 + 4, &mut found)
                && found == id
        }
        Outcome::Other | Outcome::Truncated => true,
    };
    // a mapped address inside of IPv6 would be taken for one of IPv4
    let spoken = !matches!(outcome, Outcome::Other | Outcome::Truncated);
    let mapped = v6 && (head.src.is_v4() || head.dst.is_v4()) && spoken;
    (!held || mapped).then(|| format!("{outcome:?} {head:?}"))
}

/// What tells one behaviour of the parser from another.
fn feature(bytes: &[u8]) -> (u8, u8, u8, u32, u32, u32) {
    let (outcome, head) = run(bytes);
    let kind = match outcome {
        Outcome::Flow => 0,
        Outcome::LaterFragment => 1,
        Outcome::IcmpError => 2,
        Outcome::Other => 3,
        Outcome::Truncated => 4,
        Outcome::Echo => 5,
    };
    let protocol = match head.protocol {
        known @ (1 | 6 | 17 | 58 | 132) => known,
        _ => 0,
    };
    let inner = head.inner_l4.wrapping_sub(head.inner_l3);
    let options = |length: u32, least: u32| u32::from(length > least);
    (
        kind,
        head.flags,
        protocol,
        head.l3,
        head.l4.wrapping_sub(head.l3).min(160) / 32,
        options(inner, 40) + options(inner, 20),
    )
}

fn main() -> std::io::Result<ExitCode> {
    let mut arguments = std::env::args().skip(1);
    let seconds = arguments.next().and_then(|text| text.parse().ok()).unwrap_or(10);
    let directory = arguments
        .next()
        .unwrap_or_else(|| "dataplane-common/fuzz/corpus".into());
    let seed = arguments.next().and_then(|text| text.parse().ok());
    let seed = seed.unwrap_or_else(|| std::process::id().into());
    let directory = Path::new(&directory);
    let mut known = BTreeMap::new();
    for entry in fs::read_dir(directory)? {
        let bytes = fs::read(entry?.path())?;
        known.insert(bytes.clone(), ());
    }
    let mut corpus: Vec<Vec<u8>> = known.into_keys().collect();
    let mut features: HashSet<_> = corpus.iter().map(|bytes| feature(bytes)).collect();
    println!(
        "seed {seed}, {} inputs, {} features",
        corpus.len(),
        features.len()
    );
    let mut random = Random(seed);
    let (begun, mut count, first_new) = (Instant::now(), 0_u64, corpus.len());
    while begun.elapsed() < Duration::from_secs(seconds) {
        for _ in 0..10_000 {
            count += 1;
            let bytes = change(&mut random, &corpus);
            if let Some(what) = wrong(&bytes) {
                let path = directory.with_file_name("finding");
                fs::write(&path, &bytes)?;
                println!("{what}\ninput: {}", path.display());
                return Ok(ExitCode::FAILURE);
            }
            if features.insert(feature(&bytes)) {
                corpus.push(bytes);
            }
        }
    }
    for (i, bytes) in corpus.iter().enumerate().skip(first_new) {
        fs::write(directory.join(format!("{seed:x}-{i}")), bytes)?;
    }
    println!(
        "{count} packets, {} inputs, {} features",
        corpus.len(),
        features.len()
    );
    Ok(ExitCode::SUCCESS)
}
