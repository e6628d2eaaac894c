//! What someone else changed in the maps is found and repaired.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on must fail")]

mod common;

use dataplane_common::abi::{FrontendKey, FrontendValue, Service, SetWord, Slot, frontend_class};
use dataplane_model::Model;
use dataplane_model::program::{FakeMaps, FaultyMaps, Maps, Programmer, SetKind, Write};
use serde_json::json;

/// A table, source ranges and affinity.
fn rich() -> serde_json::Value {
    json!({
        "metadata": {"annotations": {"beeline.dev/algorithm": "maglev"}},
        "spec": {"loadBalancerSourceRanges": ["192.0.2.0/24", "198.51.100.0/24"], "sessionAffinity": "ClientIP"},
    })
}

/// Two services with two and one endpoints.
fn programmed() -> Programmer<FakeMaps> {
    let mut model = Model::new("n");
    for event in [
        common::service("a", "10.96.0.1", &rich()),
        common::service("b", "10.96.0.2", &json!({})),
        common::slice("a-1", "a", &common::ready(&["10.0.0.1", "10.0.0.2"]), &json!({})),
        common::slice("b-1", "b", &common::ready(&["10.0.0.3"]), &json!({})),
    ] {
        assert!(model.apply(event).is_empty());
    }
    let mut programmer = Programmer::new(FakeMaps::new(common::CAPACITY)).unwrap();
    common::program(&mut programmer, &mut model);
    programmer
}

/// The frontends that lead to services, in order.
fn services(maps: &(impl Maps + ?Sized)) -> Vec<(FrontendKey, FrontendValue)> {
    let mut frontends = maps.frontends().unwrap();
    frontends.retain(|(key, _)| key.class != frontend_class::ACTIVE_ADDRESS);
    frontends.sort_by_key(|(key, _)| *key);
    frontends
}

/// Everything that a program in the kernel can reach, by address of the frontend.
fn reachable(maps: &impl Maps) -> Vec<(FrontendKey, u8, u32, Vec<String>)> {
    for key in maps.source_ranges().unwrap() {
        let known = |(_, value): &(FrontendKey, FrontendValue)| {
            maps.service(value.service).unwrap().source_ranges == key.ranges
        };
        assert!(services(maps).iter().any(known), "a range that nobody asks for");
    }
    let mut out: Vec<_> = services(maps)
        .into_iter()
        .map(|(key, value)| {
            let row = maps.service(value.service).unwrap();
            let read = |word: SetWord| {
                let slots = word.base()..word.base() + word.count();
                slots.map(|index| {
                    let slot = maps.slot(index).unwrap();
                    assert_eq!(slot.service(), value.service);
                    let backend = maps.backend(slot.backend()).unwrap();
                    format!("{}:{} {}", backend.addr, backend.port, backend.state)
                })
            };
            let ranges = maps.source_ranges().unwrap();
            let ranges = ranges.iter().filter(|range| range.ranges == row.source_ranges);
            let access = format!("{} s, {} ranges", row.affinity_seconds, ranges.count());
            let all = read(row.cluster).chain(read(row.maglev)).chain([access]);
            (key, value.kind, row.algorithm, all.collect())
        })
        .collect();
    out.sort();
    out
}

type Damage = (&'static str, fn(&mut dyn Maps), &'static [(&'static str, u64)]);

fn first(maps: &dyn Maps) -> (FrontendKey, FrontendValue, Service) {
    let (key, value) = services(maps)[0];
    (key, value, maps.service(value.service).unwrap())
}

const DAMAGE: &[Damage] = &[
    ("nothing", |_| {}, &[]),
    (
        "a frontend is gone",
        |maps| {
            let (key, ..) = first(maps);
            maps.write(&Write::DeleteFrontend { key }).unwrap();
        },
        &[("FRONTENDS", 1)],
    ),
    (
        "a frontend leads to another service",
        |maps| {
            let (key, mut value, _) = first(maps);
            value.service += 1;
            maps.write(&Write::PutFrontend { key, value }).unwrap();
        },
        &[("FRONTENDS", 1)],
    ),
    (
        "a frontend is nobody's",
        |maps| {
            let (mut key, value, _) = first(maps);
            key.port = dataplane_common::abi::BePort::from_host(1);
            maps.write(&Write::PutFrontend { key, value }).unwrap();
        },
        &[("FRONTENDS", 1)],
    ),
    (
        "a set is empty",
        |maps| {
            let (_, value, _) = first(maps);
            let write = Write::Set {
                id: value.service,
                which: SetKind::Cluster,
                word: SetWord::default(),
            };
            maps.write(&write).unwrap();
        },
        &[("SERVICES", 1)],
    ),
    (
        "an algorithm is another",
        |maps| {
            let (_, value, row) = first(maps);
            let row = Service { algorithm: 3, ..row };
            maps.write(&Write::Service {
                id: value.service,
                row,
            })
            .unwrap();
        },
        &[("SERVICES", 1)],
    ),
    (
        "a whole row is zero",
        |maps| {
            let (_, value, _) = first(maps);
            let row = Service {
                algorithm: 1,
                ..Service::default()
            };
            maps.write(&Write::Service {
                id: value.service,
                row,
            })
            .unwrap();
        },
        // the set, the table, the algorithm, and access
        &[("SERVICES", 4)],
    ),
    (
        "a table is gone",
        |maps| {
            let (_, value, _) = first(maps);
            let write = Write::Set {
                id: value.service,
                which: SetKind::Maglev,
                word: SetWord::default(),
            };
            maps.write(&write).unwrap();
        },
        &[("SERVICES", 1)],
    ),
    (
        "a table is where there should be none",
        |maps| {
            let (_, value, row) = first(maps);
            let write = Write::Set {
                id: value.service,
                which: SetKind::MaglevLocal,
                word: row.cluster,
            };
            maps.write(&write).unwrap();
        },
        &[("SERVICES", 1)],
    ),
    (
        "slots of a table are another service's, and another backend's",
        |maps| {
            let (_, value, row) = first(maps);
            let slots = [Slot::new(1, 9), Slot::new(3, value.service)];
            maps.write(&Write::Slots {
                base: row.maglev.base(),
                slots: &slots,
            })
            .unwrap();
        },
        &[("SLOTS", 2)],
    ),
    (
        "affinity is another",
        |maps| {
            let (_, value, row) = first(maps);
            maps.write(&Write::Access {
                id: value.service,
                affinity_seconds: 1,
                source_ranges: row.source_ranges,
            })
            .unwrap();
        },
        &[("SERVICES", 1)],
    ),
    (
        "a source range is gone, another is nobody's",
        |maps| {
            let mut key = maps.source_ranges().unwrap()[0];
            maps.write(&Write::DeleteSourceRange { key }).unwrap();
            key.ranges += 7;
            maps.write(&Write::PutSourceRange { key }).unwrap();
        },
        &[("SOURCE_RANGES", 2)],
    ),
    (
        "slots are another service's",
        |maps| {
            let (_, _, row) = first(maps);
            let slots = [Slot::new(1, 9), Slot::new(1, 9)];
            maps.write(&Write::Slots {
                base: row.cluster.base(),
                slots: &slots,
            })
            .unwrap();
        },
        &[("SLOTS", 2)],
    ),
    (
        "a backend is elsewhere",
        |maps| {
            let mut row = maps.backend(1).unwrap();
            row.addr = std::net::Ipv4Addr::new(192, 0, 2, 1).into();
            maps.write(&Write::Backend { id: 1, row }).unwrap();
        },
        &[("BACKENDS", 1)],
    ),
    (
        "a backend is terminating",
        |maps| maps.write(&Write::BackendState { id: 1, state: 2 }).unwrap(),
        &[("BACKENDS", 1)],
    ),
];

#[test]
fn every_damage_is_found_named_and_repaired() {
    for (name, damage, expected) in DAMAGE {
        let mut programmer = programmed();
        let before = reachable(programmer.maps());
        assert_eq!(before.len(), 2);
        damage(programmer.maps_mut());
        let audit = programmer.audit(0).unwrap();
        let found: Vec<(&str, u64)> = audit.differences.iter().map(|(map, n)| (*map, *n)).collect();
        assert_eq!(found, *expected, "{name}");
        assert_eq!(
            audit.examples.len(),
            usize::try_from(audit.differences.values().sum::<u64>()).unwrap()
        );
        assert!(audit.failed.is_empty(), "{name}: {:?}", audit.failed);
        assert_eq!(reachable(programmer.maps()), before, "{name}");
        assert!(programmer.audit(0).unwrap().is_clean(), "{name}");
    }
}

#[test]
fn what_cannot_be_repaired_is_reported_and_tried_again() {
    for (name, damage, _) in &DAMAGE[1..] {
        let healthy = programmed();
        let before = reachable(healthy.maps());
        let maps = FaultyMaps::new(healthy.maps().clone(), 0, 1);
        let mut programmer = Programmer::new(maps).unwrap();
        // claimed, as after the first complete lists
        let mut model = Model::new("n");
        for event in [
            common::service("a", "10.96.0.1", &rich()),
            common::service("b", "10.96.0.2", &json!({})),
            common::slice("a-1", "a", &common::ready(&["10.0.0.1", "10.0.0.2"]), &json!({})),
            common::slice("b-1", "b", &common::ready(&["10.0.0.3"]), &json!({})),
        ] {
            model.apply(event);
        }
        let changes: Vec<_> = model
            .take_dirty()
            .into_iter()
            .map(|k| (k.clone(), model.desired(&k)))
            .collect();
        assert!(programmer.reconcile(changes, 0).failed.is_empty());
        damage(programmer.maps_mut());
        programmer.maps_mut().set_rate(u32::MAX);
        let audit = programmer.audit(0).unwrap();
        assert!(!audit.failed.is_empty(), "{name}");
        programmer.maps_mut().set_rate(0);
        assert!(programmer.audit(0).unwrap().failed.is_empty(), "{name}");
        assert_eq!(reachable(programmer.maps()), before, "{name}");
        assert!(programmer.audit(0).unwrap().is_clean(), "{name}");
    }
}
