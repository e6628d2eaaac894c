//! Sizes that a node must survive: many services, large services, full maps, floods of changes.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on must fail")]

mod common;

use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;

use common::program;
use dataplane_common::abi::{Service as Row, SetWord};
use dataplane_model::program::{Capacity, FakeMaps, Fill, Maps, Programmer, QUARANTINE_MS};
use dataplane_model::{Event, Model, ServiceKey};
use k8s_openapi::api::core::v1::{Service, ServicePort, ServiceSpec};
use k8s_openapi::api::discovery::v1::{Endpoint, EndpointPort, EndpointSlice};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;

fn address(first: u8, number: u32) -> String {
    Ipv4Addr::from(Ipv4Addr::new(first, 0, 0, 0).to_bits() + number).to_string()
}

fn meta(name: String) -> ObjectMeta {
    ObjectMeta {
        namespace: Some("ns".into()),
        name: Some(name),
        ..ObjectMeta::default()
    }
}

/// A Service at `172.0.0.0 + number`, with a node port if it is not 0.
fn service(number: u32, node_port: i32) -> Service {
    Service {
        metadata: meta(format!("s{number}")),
        spec: Some(ServiceSpec {
            cluster_ip: Some(address(172, number)),
            ports: Some(vec![ServicePort {
                name: Some("p".into()),
                port: 80,
                node_port: Some(node_port),
                ..ServicePort::default()
            }]),
            ..ServiceSpec::default()
        }),
        ..Service::default()
    }
}

/// The endpoints `10.0.0.0 + number` of a service, in its slice `part`.
fn slice(service: u32, part: u32, endpoints: impl Iterator<Item = u32>) -> EndpointSlice {
    let endpoint = |number: u32| Endpoint {
        addresses: vec![address(10, number)],
        ..Endpoint::default()
    };
    let mut metadata = meta(format!("s{service}-{part}"));
    metadata.labels = Some([("kubernetes.io/service-name".into(), format!("s{service}"))].into());
    EndpointSlice {
        metadata,
        address_type: "IPv4".into(),
        ports: Some(vec![EndpointPort {
            name: Some("p".into()),
            port: Some(8080),
            ..EndpointPort::default()
        }]),
        endpoints: Some(endpoints.map(endpoint).collect()),
    }
}

fn applied(service: Service) -> Event {
    Event::ServiceApplied(Box::new(service))
}

fn slice_applied(slice: EndpointSlice) -> Event {
    Event::SliceApplied(Box::new(slice))
}

fn key(number: u32) -> ServiceKey {
    ServiceKey {
        service: dataplane_model::ObjectName::new("ns", &format!("s{number}")),
        port_name: "p".into(),
        protocol: dataplane_model::Protocol::Tcp,
        family: dataplane_model::Family::V4,
    }
}

/// The row of a service, by its key.
fn row(programmer: &Programmer<FakeMaps>, number: u32) -> Option<Row> {
    let key = Some(key(number));
    let found = programmer.services().into_iter().find(|s| s.key == key)?;
    programmer.maps().service(found.id)
}

/// Addresses of a set's backends, by what they come after 10.0.0.0.
fn read(maps: &impl Maps, word: SetWord) -> BTreeSet<u32> {
    let slots = word.base()..word.base() + word.count();
    let first = Ipv4Addr::new(10, 0, 0, 0).to_bits();
    slots
        .map(|i| {
            let row = maps.backend(maps.slot(i).unwrap().backend()).unwrap();
            let ip: Ipv4Addr = row.addr.to_ip().to_string().parse().unwrap();
            ip.to_bits() - first
        })
        .collect()
}

fn used(programmer: &Programmer<FakeMaps>) -> BTreeMap<&'static str, u32> {
    let fill = |fill: Fill| (fill.map, fill.used);
    programmer.usage().into_iter().map(fill).collect()
}

#[test]
fn a_hundred_thousand_services_come_and_go() {
    const COUNT: u32 = 100_000;
    let capacity = Capacity {
        services: COUNT + 1,
        backends: COUNT + 1,
        slots: COUNT,
        frontends: 2 * COUNT,
        source_ranges: 1,
    };
    let mut model = Model::new("n1");
    let mut programmer = Programmer::new(FakeMaps::new(capacity)).unwrap();
    for number in 0..COUNT {
        model.apply(applied(service(number, 0)));
        model.apply(slice_applied(slice(number, 0, number..=number)));
    }
    assert_eq!(program(&mut programmer, &mut model), COUNT as usize);
    let full = [
        ("FRONTENDS", 2 * COUNT),
        ("SERVICES", COUNT),
        ("SLOTS", COUNT),
        ("BACKENDS", COUNT),
        ("SOURCE_RANGES", 0),
    ];
    assert_eq!(used(&programmer), full.into());
    for number in [0, 49_999, COUNT - 1] {
        let word = row(&programmer, number).unwrap().cluster;
        assert_eq!(read(programmer.maps(), word), [number].into());
    }
    // a restart finds all of them, and needs no write
    let mut restarted = Programmer::new(programmer.maps().clone()).unwrap();
    let wish = model.desired_all().services.into_iter();
    let outcome = restarted.reconcile(wish.map(|(k, s)| (k, Some(s))), 0);
    assert_eq!((outcome.applied, outcome.writes), (COUNT as usize, 0));
    assert!(!restarted.has_unclaimed());

    model.apply(Event::ServicesListed(std::collections::HashSet::new()));
    assert_eq!(program(&mut programmer, &mut model), COUNT as usize);
    programmer.release(QUARANTINE_MS);
    assert!(used(&programmer).values().all(|used| *used == 0));
}

#[test]
fn a_service_may_have_twenty_thousand_endpoints() {
    const COUNT: u32 = 20_000;
    // a change needs room for the old set, the new one, and their tables
    for (slots, tables) in [(1 << 20, 1), (2 * COUNT, 0)] {
        let capacity = Capacity {
            services: 8,
            backends: COUNT + 8,
            slots,
            frontends: 8,
            source_ranges: 1,
        };
        let mut model = Model::new("n1");
        let mut programmer = Programmer::new(FakeMaps::new(capacity)).unwrap();
        model.apply(applied(service(1, 30_001)));
        let part = |part: u32| part * 1000..(part + 1) * 1000;
        for number in 0..COUNT / 1000 {
            assert_eq!(model.apply(slice_applied(slice(1, number, part(number)))), []);
        }
        assert_eq!(program(&mut programmer, &mut model), 1);
        let found = row(&programmer, 1).unwrap();
        assert_eq!(found.cluster.count(), COUNT);
        assert_eq!(read(programmer.maps(), found.cluster), (0..COUNT).collect());
        assert_eq!(programmer.missing_tables(), 1 - tables);
        if tables == 1 {
            // as large as tables become, and every endpoint is in it
            assert_eq!(found.maglev.count(), 131_071);
            assert_eq!(read(programmer.maps(), found.maglev).len(), COUNT as usize);
        } else {
            assert_eq!(found.maglev.count(), 0, "no room: the set is used");
        }
        // one leaves
        model.apply(slice_applied(slice(1, 3, part(3).skip(1))));
        assert_eq!(program(&mut programmer, &mut model), 1);
        let found = row(&programmer, 1).unwrap();
        assert_eq!(found.cluster.count(), COUNT - 1);
        assert!(!read(programmer.maps(), found.cluster).contains(&3000));
        assert!(!read(programmer.maps(), found.maglev).contains(&3000));
    }
}

/// Room for a node port service of three endpoints and a table, less what `small` takes away.
fn tight(small: impl FnOnce(&mut Capacity)) -> Programmer<FakeMaps> {
    let mut capacity = Capacity {
        services: 64,
        backends: 64,
        slots: 4096,
        frontends: 64,
        source_ranges: 8,
    };
    small(&mut capacity);
    Programmer::new(FakeMaps::new(capacity)).unwrap()
}

/// What happens to a service that does not fit beside one that does.
fn full(mut programmer: Programmer<FakeMaps>, large: &[Event], small: &[Event]) -> (String, String) {
    let mut model = Model::new("n1");
    model.apply(applied(service(1, 0)));
    model.apply(slice_applied(slice(1, 0, 0..3)));
    program(&mut programmer, &mut model);
    let before = row(&programmer, 1).unwrap();

    for event in large {
        model.apply(event.clone());
    }
    model.apply(slice_applied(slice(1, 0, 1..3)));
    let dirty = model.take_dirty();
    let wish: Vec<_> = dirty
        .into_iter()
        .map(|k| (k.clone(), model.desired(&k)))
        .collect();
    let outcome = programmer.reconcile(wish, 10);
    assert_eq!(outcome.failed.len(), 1, "{:?}", outcome.failed);
    let (key, error) = &outcome.failed[0];
    assert!(error.is_full(), "{error}");
    let said = (key.to_string(), error.to_string());
    assert!(said.1.contains(error.map()));
    let found = row(&programmer, 1).unwrap();
    if outcome.applied > 0 {
        assert_eq!(
            read(programmer.maps(), found.cluster),
            [1, 2].into(),
            "the other goes on"
        );
    } else {
        assert_eq!(found, before, "as it was");
    }
    // it stays pending, and is programmed when its wish fits
    assert_eq!(programmer.retry(20).failed.len(), 1);
    for event in small {
        model.apply(event.clone());
    }
    programmer.release(20 + QUARANTINE_MS);
    let dirty = model.take_dirty();
    let wish: Vec<_> = dirty
        .into_iter()
        .map(|k| (k.clone(), model.desired(&k)))
        .collect();
    let outcome = programmer.reconcile(wish, 20 + QUARANTINE_MS);
    assert!(outcome.failed.is_empty(), "{:?}", outcome.failed);
    assert_eq!(programmer.pending().count(), 0);
    assert!(programmer.audit(30 + QUARANTINE_MS).unwrap().is_clean());
    said
}

fn ranged(number: u32, ranges: &[&str]) -> Event {
    let mut object = service(number, 0);
    let spec = object.spec.as_mut().unwrap();
    spec.load_balancer_source_ranges = Some(ranges.iter().map(|r| (*r).to_owned()).collect());
    applied(object)
}

fn gone(number: u32) -> Event {
    Event::ServiceDeleted {
        namespace: "ns".into(),
        name: format!("s{number}"),
    }
}

#[test]
fn a_full_map_is_named_with_the_service_and_the_others_go_on() {
    let second = [applied(service(2, 30_002)), slice_applied(slice(2, 0, 10..12))];
    let said = full(tight(|c| c.services = 2), &second, &[gone(2)]);
    assert_eq!(said.0, "ns/s2:p/TCP IPv4");
    assert_eq!(said.1, "SERVICES is too small: 1 more needed, 0 of 2 free");

    // one frontend and its address are there; the second service's address finds room, but not its frontends
    let said = full(tight(|c| c.frontends = 3), &second, &[gone(2)]);
    assert_eq!(said.0, "ns/s2:p/TCP IPv4");
    assert_eq!(said.1, "map FRONTENDS is full (3 entries)");

    let said = full(
        tight(|c| c.backends = 5),
        &second,
        &[slice_applied(slice(2, 0, 10..11))],
    );
    assert_eq!(said.0, "ns/s2:p/TCP IPv4");
    assert_eq!(
        said.1,
        "backend 10.0.0.11:8080/TCP: BACKENDS is too small: 1 more needed, 0 of 5 free"
    );

    let many = [applied(service(2, 0)), slice_applied(slice(2, 0, 10..20))];
    let said = full(
        tight(|c| c.slots = 8),
        &many,
        &[slice_applied(slice(2, 0, 10..12))],
    );
    assert_eq!(said.0, "ns/s2:p/TCP IPv4");
    assert!(
        said.1.starts_with("SLOTS is too small: 10 more needed, "),
        "{}",
        said.1
    );

    let ranges = ["192.0.2.0/25", "198.51.100.0/24", "203.0.113.0/24"];
    let said = full(
        tight(|c| c.source_ranges = 2),
        &[ranged(2, &ranges)],
        &[ranged(2, &ranges[..2])],
    );
    assert_eq!(said.0, "ns/s2:p/TCP IPv4");
    assert_eq!(said.1, "SOURCE_RANGES is too small: 3 more needed, 2 of 2 free");
}

#[test]
fn a_flood_of_changes_costs_what_its_end_costs() {
    const SERVICES: u32 = 100;
    const CHANGES: u32 = 10_000;
    let mut programmer = tight(|c| {
        c.services = 256;
        c.backends = 1024;
        c.slots = 1 << 16;
        c.frontends = 256;
    });
    let mut model = Model::new("n1");
    for number in 0..SERVICES {
        model.apply(applied(service(number, 0)));
        model.apply(slice_applied(slice(number, 0, number..number + 2)));
    }
    program(&mut programmer, &mut model);
    // each service gets a hundred changes, and ends with other endpoints than it began with
    for change in 0..CHANGES {
        let (number, turn) = (change % SERVICES, change / SERVICES + 1);
        let first = 200 + (number + turn) % 300;
        model.apply(slice_applied(slice(number, 0, first..first + 2)));
    }
    let dirty = model.take_dirty();
    assert_eq!(dirty.len(), SERVICES as usize, "each once");
    let wish: Vec<_> = dirty
        .into_iter()
        .map(|k| (k.clone(), model.desired(&k)))
        .collect();
    let outcome = programmer.reconcile(wish, 0);
    assert_eq!((outcome.applied, outcome.failed.len()), (SERVICES as usize, 0));
    // slots and word for each service, and two or three writes for each of the new backends
    assert!(
        outcome.writes <= 2 * u64::from(SERVICES) + 3 * 400,
        "{}",
        outcome.writes
    );
    for number in 0..SERVICES {
        let first = 200 + (number + CHANGES / SERVICES) % 300;
        let word = row(&programmer, number).unwrap().cluster;
        assert_eq!(read(programmer.maps(), word), [first, first + 1].into());
    }
    // and a flood that ends where it began costs nothing
    for turn in (0..100).rev() {
        for number in 0..SERVICES {
            let first = 200 + (number + CHANGES / SERVICES + turn) % 300;
            model.apply(slice_applied(slice(number, 0, first..first + 2)));
        }
    }
    assert_eq!(common::program_writes(&mut programmer, &mut model), 0);
}
