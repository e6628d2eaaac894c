//! The Maglev tables that are written, as a packet program reads them: shares are even, and few flows move.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on must fail")]

mod common;

use std::collections::BTreeMap;
use std::net::Ipv4Addr;

use common::{CAPACITY, program, ready, service, slice};
use dataplane_common::abi::{Addr, BePort};
use dataplane_common::maglev::{entry, flow_hash, table_size};
use dataplane_model::Model;
use dataplane_model::program::{Capacity, FakeMaps, Maps, Programmer};
use serde_json::json;

const FLOWS: u32 = 20_000;

fn flows() -> impl Iterator<Item = u32> {
    (0..FLOWS).map(|i| {
        let client = Ipv4Addr::from(0xc0a8_0000 + i / 50).into();
        let port = BePort::from_host(u16::try_from(32_768 + i % 50 * 331).unwrap());
        flow_hash(&client, port, BePort::from_host(80), 6)
    })
}

/// A node with a NodePort service.
struct Node {
    model: Model,
    programmer: Programmer<FakeMaps>,
}

impl Node {
    fn new() -> Self {
        let mut model = Model::new("n1");
        let ports = json!({"spec": {"ports": [{"name": "p", "port": 80, "nodePort": 30001}]}});
        model.apply(service("s", "10.96.0.1", &ports));
        let capacity = Capacity {
            slots: 1 << 20,
            ..CAPACITY
        };
        let programmer = Programmer::new(FakeMaps::new(capacity)).unwrap();
        Self { model, programmer }
    }

    fn endpoints(&mut self, numbers: impl Iterator<Item = u32>) {
        let addresses: Vec<String> = numbers
            .map(|i| format!("10.0.{}.{}", i / 200, i % 200 + 1))
            .collect();
        let addresses: Vec<&str> = addresses.iter().map(String::as_str).collect();
        self.model
            .apply(slice("s-1", "s", &ready(&addresses), &json!({})));
        program(&mut self.programmer, &mut self.model);
    }

    /// Entries of the table.
    fn size(&self) -> u32 {
        self.programmer.services()[0].maglev[0]
    }

    /// Where each flow goes.
    fn choices(&self) -> Vec<Addr> {
        let maps = self.programmer.maps();
        let id = self.programmer.services()[0].id;
        let word = maps.service(id).unwrap().maglev;
        let choose = |hash: u32| {
            let slot = maps.slot(word.base() + entry(hash, word.count())).unwrap();
            assert_eq!(slot.service(), id);
            maps.backend(slot.backend()).unwrap().addr
        };
        flows().map(choose).collect()
    }
}

#[test]
fn flows_are_spread_evenly() {
    for n in [2_u32, 3, 5, 10, 50, 100] {
        let mut node = Node::new();
        node.endpoints(0..n);
        let mut counts: BTreeMap<Addr, f64> = BTreeMap::new();
        for backend in node.choices() {
            *counts.entry(backend).or_default() += 1.0;
        }
        assert_eq!(counts.len(), n as usize);
        // chi-square within 5 standard deviations of its mean, the degrees of freedom
        let (mean, freedom) = (f64::from(FLOWS) / f64::from(n), f64::from(n - 1));
        let chi: f64 = counts.values().map(|count| (count - mean).powi(2) / mean).sum();
        assert!(chi < freedom + 5.0 * (2.0 * freedom).sqrt() + 5.0, "{n}: {chi}");
    }
}

/// How long a table keeps a size that no longer suits its set.
const KEEP_MS: u64 = 600_000;

fn moved(before: &[Addr], after: &[Addr]) -> f64 {
    let moved = before.iter().zip(after).filter(|(a, b)| a != b).count();
    f64::from(u32::try_from(moved).unwrap()) / f64::from(FLOWS)
}

#[test]
fn few_flows_move_when_a_backend_leaves() {
    for n in (3_u32..40).chain([100, 150]) {
        let mut node = Node::new();
        node.endpoints(0..n);
        let before = node.choices();
        for gone in [0, n / 2, n - 1] {
            node.endpoints((0..n).filter(|i| *i != gone));
            let share = moved(&before, &node.choices());
            let bound = 2.0 / f64::from(n);
            assert!(share <= bound, "{n} without {gone}: {share}");
            node.endpoints(0..n);
            assert_eq!(node.choices(), before, "it comes back to its own flows");
        }
    }
}

#[test]
fn a_table_gets_the_size_that_suits_its_set_when_things_are_quiet() {
    let mut node = Node::new();
    node.endpoints(0..6);
    assert_eq!(node.size(), 1021);
    // what passes soon changes nothing
    node.endpoints(0..5);
    assert_eq!(node.size(), 1021);
    assert_eq!(node.programmer.next_release(), Some(2000), "the old slots");
    node.endpoints(0..6);
    node.programmer.release(KEEP_MS);
    assert_eq!(node.size(), 1021);
    // what stays does; one more or less does not make it wait again
    let at = |node: &mut Node, now: u64, count: u32| {
        let addresses: Vec<String> = (0..count).map(|i| format!("10.0.0.{}", i + 1)).collect();
        let addresses: Vec<&str> = addresses.iter().map(String::as_str).collect();
        node.model
            .apply(slice("s-1", "s", &ready(&addresses), &json!({})));
        let wish = node.model.take_dirty().into_iter();
        let wish: Vec<_> = wish.map(|k| (k.clone(), node.model.desired(&k))).collect();
        assert!(node.programmer.reconcile(wish, now).failed.is_empty());
    };
    let begin = KEEP_MS + 1;
    at(&mut node, begin, 5);
    at(&mut node, begin + 5000, 4);
    assert_eq!(node.size(), 1021);
    node.programmer.release(begin + KEEP_MS - 1);
    assert_eq!(node.programmer.next_release(), Some(begin + KEEP_MS));
    node.programmer.release(begin + KEEP_MS);
    assert_eq!(node.size(), u32::try_from(table_size(4)).unwrap());
    let mut fresh = Node::new();
    fresh.endpoints(0..4);
    assert_eq!(
        node.choices(),
        fresh.choices(),
        "as a node that has seen no other"
    );
    // far too small a table grows at once
    let begin = 3 * KEEP_MS;
    at(&mut node, begin, 6);
    assert_eq!(node.size(), 509);
    at(&mut node, begin, 11);
    assert_eq!(node.size(), 2039);
}

#[test]
fn a_restart_keeps_the_size_and_the_flows() {
    let mut node = Node::new();
    node.endpoints(0..6);
    node.endpoints(0..5);
    let before = node.choices();
    node.programmer = Programmer::new(node.programmer.maps().clone()).unwrap();
    let wish = node.model.desired_all().services.into_iter();
    let outcome = node.programmer.reconcile(wish.map(|(k, s)| (k, Some(s))), 0);
    assert_eq!((outcome.failed.len(), outcome.writes), (0, 0));
    assert_eq!((node.size(), node.choices()), (1021, before));
    node.programmer.release(KEEP_MS);
    assert_eq!(node.size(), 509);
}
