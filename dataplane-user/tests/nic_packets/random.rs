//! Noise: whatever comes, the verdict is one of ours and checksums that were right stay right.
//! `BEELINE_RANDOM_PACKETS` says how many per program; 100,000 by default.

use std::net::{IpAddr, SocketAddr};

use dataplane_common::abi::device_flag;
use dataplane_user::kernel::Direction;
use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};

use crate::build::{Packet, SCTP, TCP, UDP, check};
use crate::scene::{BACK, DROP, FAMILIES, Family, MARK, PASS, Scene, ip};

fn count() -> u32 {
    let wanted = std::env::var("BEELINE_RANDOM_PACKETS").ok();
    wanted.map_or(100_000, |text| text.parse().unwrap())
}

fn address(random: &mut StdRng, family: Family) -> IpAddr {
    let number = random.random_range(1..16);
    ip(&match random.random_range(0..7) {
        0 => family.client.into(),
        1 => family.pod.into(),
        2 | 3 => family.node.into(),
        4 => family.local.into(),
        5 => format!("{}{number}", family.cluster),
        _ => format!("{}{number}", family.external),
    })
}

fn port(random: &mut StdRng) -> u16 {
    match random.random_range(0..5) {
        0 => 30_000 + random.random_range(0..16),
        1 => 80,
        2 => 8080,
        3 => 61_000 + random.random_range(0..8),
        _ => random.random_range(1..32),
    }
}

fn valid(random: &mut StdRng) -> Vec<u8> {
    let family = FAMILIES[random.random_range(0..2)];
    let protocol = [TCP, UDP, SCTP, 1, 58][random.random_range(0..5)];
    let src = SocketAddr::new(address(random, family), port(random));
    let dst = SocketAddr::new(address(random, family), port(random));
    let mut packet = Packet {
        tcp_flags: random.random(),
        payload: (0..random.random_range(0..200))
            .map(|_| random.random())
            .collect(),
        id: random.random_range(0..4),
        udp_checksum: random.random(),
        ..crate::build::packet(protocol, &src.to_string(), &dst.to_string())
    };
    packet.udp_checksum |= family.v6;
    if random.random_ratio(1, 8) {
        packet.vlans = vec![random.random_range(0..4096)];
    }
    if random.random_ratio(1, 8) {
        if family.v6 {
            packet.extensions = vec![(60, vec![0; 8])];
        } else {
            packet.options = vec![1; 4 * random.random_range(0..=10)];
        }
    }
    match random.random_range(0..8) {
        0 => {
            let fragments = packet.fragments(8 * random.random_range(3..8));
            let which = random.random_range(0..fragments.len());
            fragments[which].clone()
        }
        1 if matches!(protocol, TCP | UDP | SCTP) => {
            let from = address(random, family).to_string();
            let kind = if family.v6 {
                random.random_range(1..=4)
            } else {
                [3, 11, 12][random.random_range(0..3)]
            };
            let least = if family.v6 { 48 } else { 28 };
            let quote = random.random_range(least..300);
            packet.error(&from, kind, random.random_range(0..5), quote)
        }
        _ => packet.build(),
    }
}

fn damaged(random: &mut StdRng) -> Vec<u8> {
    let mut bytes = valid(random);
    for _ in 0..random.random_range(1..6) {
        let at = random.random_range(12..bytes.len());
        bytes[at] = random.random();
    }
    if random.random() {
        bytes.truncate(random.random_range(14..=bytes.len()));
    }
    bytes
}

fn noise(random: &mut StdRng) -> Vec<u8> {
    let mut bytes: Vec<u8> = (0..random.random_range(14..120))
        .map(|_| random.random())
        .collect();
    let kind: [u8; 2] = [[8, 0], [0x86, 0xdd], [0x81, 0]][random.random_range(0..3)];
    bytes[12..14].copy_from_slice(&kind);
    if let Some(first) = bytes.get_mut(14) {
        *first = if kind == [8, 0] { 0x45 } else { 0x60 };
    }
    bytes
}

fn run(direction: Direction, flags: u16) {
    let scene = Scene::new();
    scene.serve_as(flags);
    let seed: u64 = rand::random();
    let mut random = StdRng::seed_from_u64(seed);
    let mut verdicts = [0_u32; 3];
    let mut changed = 0;
    for i in 0..count() {
        let (bytes, right) = match random.random_range(0..4) {
            0 => (damaged(&mut random), false),
            1 => (noise(&mut random), false),
            _ => (valid(&mut random), true),
        };
        let mark = if random.random() { MARK } else { 0 };
        let out = scene.plane.kernel.run_packet(direction, &bytes, mark, 1);
        let context = format!("seed {seed}, packet {i}: {bytes:02x?}");
        // too short to be one for the kernel itself
        let Ok(out) = out else {
            assert!(bytes.len() < 14 + 20 || !right, "{context}: {out:?}");
            continue;
        };
        match out.verdict {
            PASS => verdicts[0] += 1,
            DROP => verdicts[1] += 1,
            BACK => verdicts[2] += 1,
            other => panic!("{context}: verdict {other}"),
        }
        if out.verdict == PASS {
            assert_eq!(out.packet.len(), bytes.len(), "{context}");
        }
        if out.packet != bytes && out.verdict != DROP {
            changed += 1;
            if right {
                let checked = std::panic::catch_unwind(|| check(&out.packet));
                assert!(checked.is_ok(), "{context}: became {:02x?}", out.packet);
            }
        }
    }
    println!("{direction:?} {flags}: {verdicts:?} passed, dropped, sent back; {changed} changed");
    assert!(
        changed > count() / 50 && verdicts[1] > 0,
        "{verdicts:?} {changed}"
    );
}

#[test]
fn random_packets_come_in() {
    run(Direction::Ingress, 0);
}

#[test]
fn random_packets_leave() {
    run(Direction::Egress, 0);
}

#[test]
fn random_packets_come_from_a_pod() {
    run(Direction::Ingress, device_flag::POD | device_flag::BY_SOURCE);
}

#[test]
fn random_packets_go_to_a_pod() {
    run(Direction::Egress, device_flag::POD);
}
