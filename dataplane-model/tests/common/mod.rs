//! Objects as JSON, and a programmer to feed, for several tests.
#![allow(dead_code, reason = "each test uses a part of it")]
#![expect(clippy::unwrap_used, reason = "a test that cannot go on must fail")]

use dataplane_model::program::{Capacity, FakeMaps, Outcome, Programmer};
use dataplane_model::{Event, Model};
use serde_json::{Value, json};

pub(crate) const CAPACITY: Capacity = Capacity {
    services: 256,
    backends: 8192,
    slots: 16384,
    frontends: 256,
    source_ranges: 64,
};

pub(crate) fn service(name: &str, ip: &str, more: &Value) -> Event {
    let mut object = json!({
        "metadata": {"namespace": "ns", "name": name},
        "spec": {"type": "ClusterIP", "clusterIP": ip, "ports": [{"name": "p", "port": 80}]},
    });
    merge(&mut object, more);
    Event::ServiceApplied(serde_json::from_value(object).unwrap())
}

pub(crate) fn slice(name: &str, service: &str, endpoints: &Value, more: &Value) -> Event {
    let mut object = json!({
        "metadata": {"namespace": "ns", "name": name, "labels": {"kubernetes.io/service-name": service}},
        "addressType": "IPv4",
        "ports": [{"name": "p", "port": 8080}],
        "endpoints": endpoints,
    });
    merge(&mut object, more);
    Event::SliceApplied(serde_json::from_value(object).unwrap())
}

pub(crate) fn merge(into: &mut Value, more: &Value) {
    match (into, more) {
        (Value::Object(into), Value::Object(more)) => {
            for (k, v) in more {
                merge(into.entry(k.clone()).or_insert(Value::Null), v);
            }
        }
        (into, more) => *into = more.clone(),
    }
}

pub(crate) fn ready(addresses: &[&str]) -> Value {
    addresses.iter().map(|a| json!({"addresses": [a]})).collect()
}

/// Programs what is dirty; gives how many services were applied.
pub(crate) fn program(programmer: &mut Programmer<FakeMaps>, model: &mut Model) -> usize {
    program_all(programmer, model).applied
}

/// The same; gives how many writes it took.
pub(crate) fn program_writes(programmer: &mut Programmer<FakeMaps>, model: &mut Model) -> u64 {
    program_all(programmer, model).writes
}

fn program_all(programmer: &mut Programmer<FakeMaps>, model: &mut Model) -> Outcome {
    let dirty = model.take_dirty();
    let changes: Vec<_> = dirty
        .into_iter()
        .map(|k| (k.clone(), model.desired(&k)))
        .collect();
    let outcome = programmer.reconcile(changes, 0);
    assert!(outcome.failed.is_empty(), "{:?}", outcome.failed);
    outcome
}
