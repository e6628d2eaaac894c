//! The order in which objects arrive does not matter, what changed is known, and a difference leads to its goal step by step.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on must fail")]

mod common;

use std::collections::{BTreeMap, BTreeSet, HashSet, VecDeque};

use common::{CAPACITY, program, service, slice};
use dataplane_common::abi::{FrontendKey, SetWord};
use dataplane_model::program::{FakeMaps, Maps, Programmer};
use dataplane_model::{Desired, DesiredService, Event, Model, ObjectName, Op, ServiceKey, diff};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use proptest::prelude::*;
use serde_json::json;

/// What a service is to those who enter by a frontend: kind and flags of the frontend; algorithm, flags and affinity of the
/// service; its source ranges; sets; and who is in its tables.
type Entered = (
    (u8, u8),
    (u32, u32, u32),
    BTreeSet<(u32, String)>,
    [Vec<(String, u8, u32)>; 2],
    [BTreeSet<String>; 2],
);
type Meaning = BTreeMap<FrontendKey, Entered>;

/// What a program in the kernel would read, without the ids.
fn meaning(maps: &FakeMaps) -> Meaning {
    let mut out = Meaning::new();
    let ranges = maps.source_ranges().unwrap();
    for (frontend, value) in maps.frontends().unwrap() {
        let row = maps.service(value.service).unwrap();
        let read = |word: SetWord| -> Vec<(String, u8, u32)> {
            let slots = (word.base()..word.base() + word.count()).map(|i| maps.slot(i).unwrap());
            let rows = slots.map(|slot| {
                assert_eq!(slot.service(), value.service);
                let row = maps.backend(slot.backend()).unwrap();
                (format!("{}:{}", row.addr, row.port), row.state, row.node)
            });
            rows.collect()
        };
        let of_service = ranges
            .iter()
            .filter(|range| row.source_ranges != 0 && range.ranges == row.source_ranges);
        let names = |word| read(word).into_iter().map(|(name, ..)| name).collect();
        out.insert(
            frontend,
            (
                (value.kind, value.flags),
                (row.algorithm, row.flags, row.affinity_seconds),
                of_service
                    .map(|range| (range.prefix_len, range.addr.to_string()))
                    .collect(),
                [row.cluster, row.local].map(read),
                [row.maglev, row.maglev_local].map(names),
            ),
        );
    }
    out
}

/// An event of object `object` (0-4 services, 5-10 slices, 11 the node) in one of its versions.
fn event(object: u8, version: u8) -> Event {
    match object {
        0..=4 => {
            let name = format!("s{object}");
            match version % 8 {
                0 => Event::ServiceDeleted {
                    namespace: "ns".into(),
                    name,
                },
                // addresses that others want, too, and one of them has as its own
                5 => service(
                    &name,
                    &format!("10.96.1.{object}"),
                    &json!({
                        "metadata": {"creationTimestamp": format!("202{}-01-01T00:00:00Z", object % 2)},
                        "spec": {"type": "LoadBalancer", "externalIPs": ["10.96.0.1", "192.0.2.1"],
                            "loadBalancerSourceRanges": [format!("198.51.{object}.0/24"), "2001:db8::/32"]},
                        "status": {"loadBalancer": {"ingress": [{"ip": "203.0.113.7"}, {"ip": "192.0.2.1"}]}},
                    }),
                ),
                6 => service(
                    &name,
                    &format!("10.96.1.{object}"),
                    &json!({
                        "metadata": {"annotations": {"beeline.dev/algorithm": "maglev"}},
                        "spec": {"externalIPs": ["203.0.113.7"], "sessionAffinity": "ClientIP"},
                    }),
                ),
                7 => service(
                    &name,
                    "10.96.0.1",
                    &json!({"spec": {"clusterIPs": ["10.96.0.1", "fd00::1"], "ipFamilies": ["IPv4", "IPv6"],
                        "externalIPs": ["2001:db8::9"],
                        "ports": [{"name": "p", "port": 80, "nodePort": 30001},
                            {"name": "p", "port": 80, "protocol": "UDP", "nodePort": 30001}]}}),
                ),
                1 => service(
                    &name,
                    "10.96.0.1",
                    &json!({"metadata": {"creationTimestamp": format!("202{}-01-01T00:00:00Z", object % 3)}}),
                ),
                2 => service(
                    &name,
                    &format!("10.96.1.{object}"),
                    &json!({"spec": {"internalTrafficPolicy": "Local"}}),
                ),
                3 => service(
                    &name,
                    &format!("10.96.1.{object}"),
                    &json!({"metadata": {"labels": {"service.kubernetes.io/service-proxy-name": "x"}}}),
                ),
                _ => service(
                    &name,
                    &format!("10.96.1.{object}"),
                    &json!({"spec": {"type": "NodePort", "externalTrafficPolicy": "Local", "ports": [{"name": "p", "port": 80, "nodePort": 30001}]}}),
                ),
            }
        }
        5..=10 => {
            let name = format!("e{object}");
            let owner = format!("s{}", (object + version / 8) % 5);
            // slices share addresses, and disagree about their state
            let endpoint = |i: u8| {
                let ready = (version >> i) & 1 == 0;
                json!({
                    "addresses": [format!("10.0.0.{}", i + object % 3)],
                    "nodeName": format!("n{}", i % 2),
                    "conditions": {"ready": ready, "serving": true, "terminating": !ready},
                    "hints": if version.is_multiple_of(3) { json!({"forZones": [{"name": if i == 0 { "a" } else { "b" }}]}) } else { json!({}) },
                })
            };
            match version % 7 {
                0 => Event::SliceDeleted {
                    namespace: "ns".into(),
                    name,
                },
                count => slice(
                    &name,
                    &owner,
                    &(0..count.min(4)).map(endpoint).collect(),
                    &json!({}),
                ),
            }
        }
        _ if version % 5 == 4 => Event::NodeDeleted { name: "n1".into() },
        _ => {
            let zone = if version.is_multiple_of(2) { "a" } else { "b" };
            let node = json!({
                "metadata": {"name": "n1", "labels": {"topology.kubernetes.io/zone": zone}},
                "status": {"addresses": [{"type": "InternalIP", "address": format!("198.51.{}.1", version % 5)}]},
            });
            Event::NodeApplied(serde_json::from_value(node).unwrap())
        }
    }
}

/// Object and version of each, see [`event`].
type Events = Vec<(u8, u8)>;

/// Events that are ordered per object only, in two orders.
fn two_orders() -> impl Strategy<Value = (Events, Events)> {
    let events = prop::collection::vec((0u8..12, any::<u8>()), 1..24);
    events
        .prop_flat_map(|events| (Just(events.clone()), Just(events).prop_shuffle()))
        .prop_map(|(events, shuffled)| {
            let mut left: BTreeMap<u8, VecDeque<u8>> = BTreeMap::new();
            for (object, version) in &events {
                left.entry(*object).or_default().push_back(*version);
            }
            let reordered = shuffled
                .iter()
                .map(|(o, _)| (*o, left.get_mut(o).and_then(|q| q.pop_front()).unwrap_or(0)));
            let reordered = reordered.collect();
            (events, reordered)
        })
}

fn run(events: &[(u8, u8)]) -> Desired {
    let mut model = Model::new("n1");
    for (object, version) in events {
        model.apply(event(*object, *version));
    }
    model.desired_all()
}

/// A step of a cluster's history.
#[derive(Clone, Copy, Debug)]
enum Step {
    /// The object is now of this version, and a watch says so.
    Seen(u8, u8),
    /// The object is now of this version, but nobody says so before the next complete list.
    Missed(u8, u8),
    /// A complete list of all objects of the kind.
    List,
}

/// The history of one kind: objects from `first` on, `count` of them. Ends with a list if anything was missed.
fn history(first: u8, count: u8) -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        8 => (first..first + count, any::<u8>()).prop_map(|(o, v)| Step::Seen(o, v)),
        2 => (first..first + count, any::<u8>()).prop_map(|(o, v)| Step::Missed(o, v)),
        1 => Just(Step::List),
    ];
    prop::collection::vec(step, 0..14).prop_map(|mut steps| {
        let missed = steps.iter().rposition(|s| matches!(s, Step::Missed(..)));
        if missed > steps.iter().rposition(|s| matches!(s, Step::List)) {
            steps.push(Step::List);
        }
        steps
    })
}

/// The events of a history: what a list holds is decided by the history, not by who reads it when.
fn events(steps: &[Step]) -> Vec<(u8, Event)> {
    let mut cluster: BTreeMap<u8, u8> = BTreeMap::new();
    let mut out = Vec::new();
    let kind = steps.iter().find_map(|s| match s {
        Step::Seen(object, _) | Step::Missed(object, _) => Some(*object),
        Step::List => None,
    });
    for step in steps {
        match *step {
            Step::Missed(object, version) => {
                cluster.insert(object, version);
            }
            Step::Seen(object, version) => {
                cluster.insert(object, version);
                out.push((object, event(object, version)));
            }
            Step::List => {
                let (mut services, mut slices, mut nodes) = (Vec::new(), Vec::new(), Vec::new());
                for (object, version) in &cluster {
                    match event(*object, *version) {
                        Event::ServiceApplied(service) => services.push(*service),
                        Event::SliceApplied(slice) => slices.push(*slice),
                        Event::NodeApplied(node) => nodes.push(*node),
                        _ => {}
                    }
                }
                // every other list comes object by object, with the names at the end
                let by_name = out.len() % 2 == 1;
                let named = |metas: Vec<&ObjectMeta>| -> HashSet<ObjectName> {
                    let name = |m: &ObjectMeta| {
                        ObjectName::new(m.namespace.as_deref().unwrap(), m.name.as_deref().unwrap())
                    };
                    metas.into_iter().map(name).collect()
                };
                let list = match kind {
                    Some(0..=4) if by_name => {
                        let names = named(services.iter().map(|s| &s.metadata).collect());
                        let each = services.into_iter().map(|s| Event::ServiceApplied(Box::new(s)));
                        out.extend(each.map(|event| (u8::MAX, event)));
                        Event::ServicesListed(names)
                    }
                    Some(5..=10) if by_name => {
                        let names = named(slices.iter().map(|s| &s.metadata).collect());
                        let each = slices.into_iter().map(|s| Event::SliceApplied(Box::new(s)));
                        out.extend(each.map(|event| (u8::MAX, event)));
                        Event::SlicesListed(names)
                    }
                    Some(0..=4) => Event::ServicesReplaced(services),
                    Some(5..=10) => Event::SlicesReplaced(slices),
                    Some(_) => Event::NodesReplaced(nodes),
                    None => continue,
                };
                out.push((u8::MAX, list));
            }
        }
    }
    out
}

/// What the model should be in the end: the last version of each object, with no history.
fn from_the_end(histories: &[Vec<Step>; 3]) -> Desired {
    let mut last: BTreeMap<u8, u8> = BTreeMap::new();
    for step in histories.iter().flatten() {
        if let Step::Seen(object, version) | Step::Missed(object, version) = *step {
            last.insert(object, version);
        }
    }
    run(&last.into_iter().collect::<Vec<_>>())
}

/// Another order of the same events: between two lists each object keeps its own order only, and kinds mix freely.
fn mixed(kinds: [Vec<(u8, Event)>; 3], choices: &[u16]) -> Vec<Event> {
    let mut choices = choices.iter().cycle().map(|c| usize::from(*c));
    let mut choose = move |n: usize| choices.next().unwrap_or(0) % n;
    let mut queues: Vec<VecDeque<Event>> = Vec::new();
    for kind in kinds {
        let mut queue = VecDeque::new();
        let mut parts = kind.into_iter().peekable();
        while parts.peek().is_some() {
            let mut objects: BTreeMap<u8, VecDeque<Event>> = BTreeMap::new();
            while let Some((object, event)) = parts.next_if(|(object, _)| *object != u8::MAX) {
                objects.entry(object).or_default().push_back(event);
            }
            while !objects.is_empty() {
                let object = *objects.keys().nth(choose(objects.len())).unwrap();
                let left = objects.get_mut(&object).unwrap();
                queue.extend(left.pop_front());
                if left.is_empty() {
                    objects.remove(&object);
                }
            }
            queue.extend(parts.next().map(|(_, list)| list));
        }
        queues.push(queue);
    }
    let mut out = Vec::new();
    loop {
        queues.retain(|queue| !queue.is_empty());
        if queues.is_empty() {
            return out;
        }
        let which = choose(queues.len());
        out.extend(queues[which].pop_front());
    }
}

/// Keys whose desired state differs.
fn differing(a: &Desired, b: &Desired) -> BTreeSet<ServiceKey> {
    let keys = a.services.keys().chain(b.services.keys());
    keys.filter(|key| a.services.get(*key) != b.services.get(*key))
        .cloned()
        .collect()
}

fn programmed(desired: &Desired) -> Meaning {
    let mut programmer = Programmer::new(FakeMaps::new(CAPACITY)).unwrap();
    let wish = desired.services.iter().map(|(k, s)| (k.clone(), Some(s.clone())));
    let outcome = programmer.reconcile(wish, 0);
    assert!(outcome.failed.is_empty(), "{:?}", outcome.failed);
    meaning(programmer.maps())
}

/// Carries operations out on a desired state, refusing what refers to something that is not there.
fn carry_out(state: &mut Desired, ops: &[Op<'_>]) -> Result<(), String> {
    let mut backends: BTreeSet<_> = state
        .services
        .values()
        .flat_map(|s| s.cluster.iter().chain(&s.local).map(|m| m.backend))
        .collect();
    for op in ops {
        match *op {
            Op::PutBackend { backend } => {
                backends.insert(backend);
            }
            Op::GrowService { key, wish, .. } | Op::SetService { key, wish } => {
                let mut members = wish.cluster.iter().chain(&wish.local);
                if let Some(m) = members.find(|m| !backends.contains(&m.backend)) {
                    return Err(format!("{key} set with missing {}", m.backend));
                }
                if matches!(op, Op::GrowService { .. }) {
                    // what is not taken away yet follows
                    state.services.get(key).ok_or("a missing service grows")?;
                    continue;
                }
                let service = state.services.entry(key.clone()).or_default();
                let frontends = std::mem::take(&mut service.frontends);
                *service = DesiredService {
                    frontends,
                    ..wish.clone()
                };
            }
            Op::PutFrontend { frontend, offer, key } => {
                for (other, service) in &mut state.services {
                    if other != key {
                        service.frontends.remove(&frontend);
                    }
                }
                let service = state
                    .services
                    .get_mut(key)
                    .ok_or("frontend of a missing service")?;
                service.frontends.insert(frontend, offer);
            }
            Op::DeleteFrontend { frontend, key } => {
                if let Some(service) = state.services.get_mut(key) {
                    service.frontends.remove(&frontend);
                }
            }
            Op::DeleteService { key } => {
                let service = state.services.remove(key).ok_or("deleted twice")?;
                if !service.frontends.is_empty() {
                    return Err(format!("{key} deleted under its frontends"));
                }
            }
            Op::DeleteBackend { backend } => {
                let mut sets = state
                    .services
                    .values()
                    .flat_map(|s| s.cluster.iter().chain(&s.local));
                if !sets.any(|m| m.backend == backend) {
                    backends.remove(&backend);
                }
            }
        }
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 512, ..ProptestConfig::default() })]

    /// Watches and lists of services, slices and the node in any order, programmed in batches: the same model, and the maps
    /// that one pass over the whole model gives.
    #[test]
    fn order_of_arrival_does_not_matter(
        services in history(0, 5),
        slices in history(5, 6),
        node in history(11, 1),
        orders in prop::array::uniform2(prop::collection::vec(any::<u16>(), 1..64)),
        batch in 1usize..8,
    ) {
        let histories = [services, slices, node];
        let kinds = [0, 1, 2].map(|kind: usize| events(&histories[kind]));
        let mut ends = Vec::new();
        for choices in &orders {
            let mut model = Model::new("n1");
            let mut programmer = Programmer::new(FakeMaps::new(CAPACITY)).unwrap();
            for events in mixed(kinds.clone(), choices).chunks(batch) {
                for event in events {
                    model.apply(event.clone());
                }
                program(&mut programmer, &mut model);
            }
            let desired = model.desired_all();
            prop_assert_eq!(meaning(programmer.maps()), programmed(&desired));
            ends.push(desired);
        }
        prop_assert_eq!(&ends[0], &ends[1]);
        prop_assert_eq!(&ends[0], &from_the_end(&histories), "what the cluster is in the end");
    }

    #[test]
    fn whatever_changes_is_dirty_and_what_is_known_changes_nothing(
        services in history(0, 5),
        slices in history(5, 6),
        node in history(11, 1),
        order in prop::collection::vec(any::<u16>(), 1..64),
    ) {
        let mut model = Model::new("n1");
        let mut before = Desired::default();
        for event in mixed([services, slices, node].map(|steps| events(&steps)), &order) {
            model.apply(event.clone());
            let dirty: BTreeSet<_> = model.take_dirty().into_iter().collect();
            let after = model.desired_all();
            let forgotten: Vec<_> = differing(&before, &after).difference(&dirty).cloned().collect();
            prop_assert!(forgotten.is_empty(), "not dirty: {:?}", forgotten);
            for key in &dirty {
                let desired = model.desired(key);
                prop_assert_eq!(desired.as_ref(), after.services.get(key));
            }
            model.apply(event);
            prop_assert_eq!(model.take_dirty(), vec![], "the same again");
            before = after;
        }
    }

    #[test]
    fn a_difference_leads_from_one_state_to_the_other((one, other) in two_orders(), cut in any::<prop::sample::Index>()) {
        let old = run(&one[..cut.index(one.len())]);
        let new = run(&other);
        let mut state = old.clone();
        let done = carry_out(&mut state, &diff(&old, &new));
        prop_assert!(done.is_ok(), "{:?}", done);
        prop_assert_eq!(state, new);
    }
}
