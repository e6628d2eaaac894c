//! How long it takes from complete lists of objects to maps in memory, and from one endpoint's change:
//! `cargo run -p dataplane-model --release --example cold [services endpoints]`. Times are those on the processor, so that
//! others who use it do not count.
#![expect(clippy::print_stdout, reason = "this is what it is for")]

use std::collections::BTreeMap;
use std::hint::black_box;
use std::time::{Duration, Instant};

use dataplane_model::program::{Capacity, FakeMaps, Programmer};
use dataplane_model::{DesiredService, Event, Model, ServiceKey};
use k8s_openapi::api::core::v1::{Service, ServicePort, ServiceSpec};
use k8s_openapi::api::discovery::v1::{Endpoint, EndpointConditions, EndpointPort, EndpointSlice};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;

const CAPACITY: Capacity = Capacity {
    services: 1 << 17,
    backends: 1 << 17,
    slots: 1 << 18,
    frontends: 1 << 17,
    source_ranges: 1024,
};
const CHANGES: u32 = 2000;

fn address(first: u8, number: u32) -> String {
    let [_, b, c, d] = number.to_be_bytes();
    format!("{first}.{b}.{c}.{d}")
}

fn service(i: u32) -> Service {
    Service {
        metadata: ObjectMeta {
            namespace: Some(format!("ns-{}", i % 100)),
            name: Some(format!("service-{i}")),
            ..ObjectMeta::default()
        },
        spec: Some(ServiceSpec {
            cluster_ip: Some(address(172, i + 1)),
            type_: Some("ClusterIP".into()),
            ports: Some(vec![ServicePort {
                name: Some("http".into()),
                port: 80,
                ..ServicePort::default()
            }]),
            ..ServiceSpec::default()
        }),
        ..Service::default()
    }
}

fn slice(i: u32, endpoints: u32, ready: bool) -> EndpointSlice {
    let labels = [("kubernetes.io/service-name".into(), format!("service-{i}"))];
    let endpoint = |n: u32| Endpoint {
        addresses: vec![address(10, i * endpoints + n + 1)],
        conditions: Some(EndpointConditions {
            ready: Some(ready || n > 0),
            serving: Some(ready || n > 0),
            terminating: Some(false),
        }),
        node_name: Some(format!("node-{}", n % 10)),
        ..Endpoint::default()
    };
    EndpointSlice {
        metadata: ObjectMeta {
            namespace: Some(format!("ns-{}", i % 100)),
            name: Some(format!("service-{i}-abcde")),
            labels: Some(BTreeMap::from(labels)),
            ..ObjectMeta::default()
        },
        address_type: "IPv4".into(),
        ports: Some(vec![EndpointPort {
            name: Some("http".into()),
            port: Some(8080),
            ..EndpointPort::default()
        }]),
        endpoints: Some((0..endpoints).map(endpoint).collect()),
    }
}

fn changes(model: &mut Model) -> Vec<(ServiceKey, Option<DesiredService>)> {
    let dirty = model.take_dirty();
    dirty
        .into_iter()
        .map(|key| {
            let desired = model.desired(&key);
            (key, desired)
        })
        .collect()
}

/// Resident memory in KiB, or 0 where it cannot be read.
fn resident() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    line.and_then(|line| line.split_whitespace().next()?.parse().ok())
        .unwrap_or(0)
}

/// Time that this thread has been on a processor; zero where the kernel does not count it.
fn on_cpu() -> Duration {
    let text = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap_or_default();
    let nanos = text
        .split_whitespace()
        .next()
        .and_then(|nanos| nanos.parse().ok());
    Duration::from_nanos(nanos.unwrap_or(0))
}

fn measure(services: u32, endpoints: u32) -> Result<(), Box<dyn std::error::Error>> {
    let mut model = Model::new("node-0");
    let mut programmer = Programmer::new(FakeMaps::new(CAPACITY))?;
    let service_list: Vec<Service> = (0..services).map(service).collect();
    let slice_list: Vec<EndpointSlice> = (0..services).map(|i| slice(i, endpoints, true)).collect();

    let start = on_cpu();
    let mut problems = model.apply(Event::ServicesReplaced(service_list));
    problems.extend(model.apply(Event::SlicesReplaced(slice_list)));
    let applied = on_cpu() - start;
    let wish = changes(&mut model);
    let desired = on_cpu() - start;
    let outcome = programmer.reconcile(wish, 0);
    let total = on_cpu() - start;
    if !problems.is_empty() || !outcome.failed.is_empty() {
        return Err("the objects were not programmed".into());
    }
    println!(
        "{services} services x {endpoints}: {total:.1?} (objects {applied:.1?}, selection {:.1?}, maps {:.1?}), {} writes",
        desired - applied,
        total - desired,
        outcome.writes,
    );

    let mut times: Vec<Duration> = Vec::new();
    for n in 0..CHANGES {
        let changed = slice(n / 2 * 7919 % services, endpoints, n % 2 == 1);
        let start = Instant::now();
        black_box(model.apply(Event::SliceApplied(Box::new(changed))));
        let wish = changes(&mut model);
        black_box(programmer.reconcile(wish, u64::from(n) * 10));
        times.push(start.elapsed());
    }
    times.sort_unstable();
    println!(
        "    one endpoint's change: p50 {:.1?}, p99 {:.1?}, max {:.1?}",
        times[times.len() / 2],
        times[times.len() * 99 / 100],
        times[times.len() - 1]
    );
    Ok(())
}

/// Memory that the model and the account of the maps take, without the lists that they came from.
fn footprint(services: u32, endpoints: u32) -> Result<(), Box<dyn std::error::Error>> {
    let mut programmer = Programmer::new(FakeMaps::new(CAPACITY))?;
    let mut model = Model::new("node-0");
    let before = resident();
    for i in 0..services {
        model.apply(Event::ServiceApplied(Box::new(service(i))));
        model.apply(Event::SliceApplied(Box::new(slice(i, endpoints, true))));
        programmer.reconcile(changes(&mut model), u64::from(i));
    }
    let more = resident().saturating_sub(before);
    println!("{services} services x {endpoints} one by one: {more} KiB, with the maps");
    Ok(())
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut given = std::env::args().skip(1).map(|text| text.parse());
    if let (Some(services), Some(endpoints)) = (given.next(), given.next()) {
        return measure(services?, endpoints?);
    }
    footprint(10_000, 3)?;
    measure(10_000, 3)?;
    measure(50_000, 1)
}
