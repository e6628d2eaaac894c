//! Backends that are suspected to have failed get no new connections, within bounds.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on must fail")]

mod common;

use std::collections::BTreeSet;

use common::{CAPACITY, program, ready, service, slice};
use dataplane_model::Model;
use dataplane_model::program::{FakeMaps, FaultyMaps, Maps, Programmer, QUARANTINE_MS};
use serde_json::json;

const ADDRESSES: [&str; 5] = ["10.0.0.1", "10.0.0.2", "10.0.0.3", "10.0.0.4", "10.0.0.5"];

/// A service with this many endpoints and a table, and the rows of its backends.
fn of(endpoints: usize) -> (Model, Programmer<FakeMaps>, Vec<u32>) {
    let mut model = Model::new("n1");
    let by_maglev = json!({"metadata": {"annotations": {"beeline.dev/algorithm": "maglev"}}});
    model.apply(service("s", "10.96.0.1", &by_maglev));
    model.apply(slice("s-1", "s", &ready(&ADDRESSES[..endpoints]), &json!({})));
    let mut programmer = Programmer::new(FakeMaps::new(CAPACITY)).unwrap();
    program(&mut programmer, &mut model);
    let ids = programmer.services()[0]
        .cluster
        .iter()
        .map(|(id, _)| *id)
        .collect();
    (model, programmer, ids)
}

/// Rows that connections are sent to, by the set and by its table, which must agree.
fn published(programmer: &Programmer<impl Maps>) -> BTreeSet<u32> {
    let service = &programmer.services()[0];
    let row = programmer.maps().service(service.id).unwrap();
    let read = |word: dataplane_common::abi::SetWord| -> BTreeSet<u32> {
        let slots = word.base()..word.base() + word.count();
        slots
            .map(|i| programmer.maps().slot(i).unwrap().backend())
            .collect()
    };
    let set = read(row.cluster);
    if row.maglev.count() > 0 {
        assert_eq!(read(row.maglev), set);
    } else {
        assert!(set.len() < 2);
    }
    set
}

#[test]
fn never_more_than_half_of_a_set_is_left_out() {
    for endpoints in 1..=5 {
        let (_, mut programmer, ids) = of(endpoints);
        let outcome = programmer.set_suspects(&ids, 0);
        assert!(outcome.failed.is_empty());
        let left: BTreeSet<u32> = ids[endpoints / 2..].iter().copied().collect();
        assert_eq!(
            published(&programmer),
            left,
            "of {endpoints} the first {} go",
            endpoints / 2
        );
        assert_eq!(programmer.services()[0].left_out, ids[..endpoints / 2]);
        programmer.set_suspects(&[], 0);
        assert_eq!(published(&programmer).len(), endpoints);
        assert!(programmer.services()[0].left_out.is_empty());
    }
}

#[test]
fn suspects_stay_out_of_what_is_programmed_later_and_nothing_is_written_twice() {
    let (mut model, mut programmer, ids) = of(4);
    programmer.set_suspects(&[ids[1], 999, ids[1]], 0);
    assert_eq!(
        programmer.suspects(),
        [ids[1]],
        "rows that nobody uses are ignored"
    );
    assert_eq!(programmer.set_suspects(&[ids[1]], 0).writes, 0);
    // another change of the service, and another service with the same backends
    model.apply(slice("s-1", "s", &ready(&ADDRESSES), &json!({})));
    model.apply(service("t", "10.96.0.2", &json!({})));
    model.apply(slice("t-1", "t", &ready(&ADDRESSES[..2]), &json!({})));
    program(&mut programmer, &mut model);
    assert_eq!(published(&programmer).len(), 4);
    assert!(!published(&programmer).contains(&ids[1]));
    let second = &programmer.services()[1];
    assert_eq!(second.left_out, [ids[1]]);
    assert_eq!(second.cluster.len(), 2, "it is still a member");
    assert!(
        programmer.audit(0).unwrap().is_clean(),
        "what is left out is no damage"
    );
    // the suspect goes and comes: it is still suspected, because nobody has said otherwise
    model.apply(slice("t-1", "t", &ready(&ADDRESSES[..1]), &json!({})));
    program(&mut programmer, &mut model);
    assert!(
        programmer.services()[1].left_out.is_empty(),
        "a single backend stays"
    );
}

#[test]
fn a_row_that_another_backend_gets_is_not_suspected() {
    let (mut model, mut programmer, ids) = of(2);
    programmer.set_suspects(&[ids[0]], 0);
    model.apply(slice("s-1", "s", &ready(&["10.0.0.2"]), &json!({})));
    program(&mut programmer, &mut model);
    programmer.release(QUARANTINE_MS);
    model.apply(slice("s-1", "s", &ready(&["10.0.0.2", "10.0.0.9"]), &json!({})));
    program(&mut programmer, &mut model);
    let service = &programmer.services()[0];
    assert!(
        service.cluster.iter().any(|(id, _)| *id == ids[0]),
        "the row is used again"
    );
    assert_eq!(service.left_out, [] as [u32; 0]);
    assert_eq!(published(&programmer).len(), 2);
}

#[test]
fn what_fails_is_tried_again() {
    let (_, healthy, ids) = of(4);
    let mut programmer = Programmer::new(FaultyMaps::new(healthy.maps().clone(), 0, 1)).unwrap();
    let mut model = Model::new("n1");
    let by_maglev = json!({"metadata": {"annotations": {"beeline.dev/algorithm": "maglev"}}});
    model.apply(service("s", "10.96.0.1", &by_maglev));
    model.apply(slice("s-1", "s", &ready(&ADDRESSES[..4]), &json!({})));
    let wish: Vec<_> = model
        .take_dirty()
        .into_iter()
        .map(|k| (k.clone(), model.desired(&k)))
        .collect();
    assert!(programmer.reconcile(wish, 0).failed.is_empty());
    programmer.maps_mut().set_rate(u32::MAX);
    assert_eq!(programmer.set_suspects(&ids[..1], 0).failed.len(), 1);
    assert_eq!(published(&programmer).len(), 4, "as before");
    programmer.maps_mut().set_rate(0);
    assert_eq!(programmer.retry(0).applied, 1);
    assert_eq!(published(&programmer), ids[1..].iter().copied().collect());
}

#[test]
fn a_service_that_is_not_watched_keeps_its_suspects() {
    let (mut model, mut programmer, ids) = of(3);
    let unwatched = json!({"metadata": {"annotations": {"beeline.dev/failure-detection": "off"}}});
    model.apply(service("t", "10.96.0.2", &unwatched));
    model.apply(slice("t-1", "t", &ready(&ADDRESSES[..3]), &json!({})));
    program(&mut programmer, &mut model);
    programmer.set_suspects(&ids[..1], 0);
    let left_out = |name: &str| {
        let services = programmer.services();
        let found = services
            .iter()
            .find(|s| &*s.key.as_ref().unwrap().service.name == name);
        found.unwrap().left_out.clone()
    };
    assert_eq!((left_out("s"), left_out("t")), (ids[..1].to_vec(), vec![]));
}
