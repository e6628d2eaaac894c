//! Properties of the programmer, as a program in the kernel would see its maps.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on must fail")]

mod crash;

use std::collections::{BTreeMap, BTreeSet};

use dataplane_common::abi::{
    BePort, FrontendKey, FrontendValue, SetWord, SourceRangeKey, frontend_class, frontend_flag, frontend_kind,
};
use dataplane_model::program::{
    Capacity, FakeMaps, FaultyMaps, MapError, Maps, Programmer, QUARANTINE_MS, Write, backend_node,
};
use dataplane_model::{
    BackendKey, BackendState, Desired, DesiredService, Family, ObjectName, Offer, Protocol, ServiceConfig,
    ServiceKey, SetBackend, diff, table,
};
use ipnet::IpNet;
use proptest::prelude::*;

const CAPACITY: Capacity = Capacity {
    services: 64,
    backends: 64,
    slots: 1 << 16,
    frontends: 64,
    source_ranges: 64,
};

fn key(i: u8) -> ServiceKey {
    ServiceKey {
        service: ObjectName::new("default", &format!("s{i}")),
        port_name: "".into(),
        protocol: Protocol::Tcp,
        family: Family::V4,
    }
}

fn frontend(i: u8) -> FrontendKey {
    let addr = std::net::Ipv4Addr::new(10, 96, 0, i).into();
    FrontendKey {
        addr,
        port: BePort::from_host(80),
        protocol: 6,
        class: 0,
    }
}

fn backend(i: u8) -> BackendKey {
    let addr = std::net::Ipv4Addr::new(10, 0, 0, i).into();
    BackendKey {
        addr,
        port: BePort::from_host(8080),
        protocol: Protocol::Tcp,
    }
}

fn set(ids: &BTreeSet<u8>) -> Vec<SetBackend> {
    ids.iter()
        .map(|i| SetBackend {
            backend: backend(*i),
            state: BackendState::Active,
            local: i % 3 == 0,
        })
        .collect()
}

fn net(i: u8) -> IpNet {
    IpNet::new(std::net::Ipv4Addr::new(10, i, 0, 0).into(), 16).unwrap()
}

/// Frontends of every kind, two each.
fn offer(f: u8, ranges: &BTreeSet<u8>) -> Offer {
    let kind = match f % 3 {
        0 => frontend_kind::CLUSTER_IP,
        1 => frontend_kind::LOAD_BALANCER,
        _ => frontend_kind::NODE_PORT,
    };
    let ranged = kind == frontend_kind::LOAD_BALANCER && !ranges.is_empty();
    Offer {
        kind,
        flags: if ranged { frontend_flag::SOURCE_RANGES } else { 0 },
    }
}

/// Cluster set, local set, flags, tables, affinity, source ranges.
type Spec = (BTreeSet<u8>, BTreeSet<u8>, u32, u8, u32, BTreeSet<u8>);

fn specs() -> impl Strategy<Value = BTreeMap<u8, Spec>> {
    let spec = (
        prop::collection::btree_set(0u8..10, 0..4),
        prop::collection::btree_set(0u8..10, 0..4),
        0u32..4,
        prop::sample::select(vec![0u8, 0, 0, 0, 1, 2, 3]),
        prop::sample::select(vec![0u32, 0, 60]),
        prop::collection::btree_set(0u8..4, 0..3),
    );
    prop::collection::btree_map(0u8..4, spec, 0..=4)
}

/// Which service each frontend belongs to.
fn owners() -> impl Strategy<Value = BTreeMap<u8, u8>> {
    prop::collection::btree_map(0u8..6, 0u8..4, 0..=6)
}

fn build(specs: &BTreeMap<u8, Spec>, owners: &BTreeMap<u8, u8>) -> Desired {
    let service = |i: u8, (cluster, local, flags, tables, affinity_seconds, ranges): &Spec| {
        let mine = owners.iter().filter(|(_, owner)| **owner == i);
        DesiredService {
            frontends: mine.map(|(f, _)| (frontend(*f), offer(*f, ranges))).collect(),
            cluster: set(cluster),
            local: set(local),
            config: ServiceConfig {
                algorithm: 0,
                flags: *flags,
                affinity_seconds: *affinity_seconds,
                tables: *tables,
            },
            source_ranges: ranges.iter().copied().map(net).collect(),
        }
    };
    Desired {
        services: specs
            .iter()
            .map(|(i, spec)| (key(*i), service(*i, spec)))
            .collect(),
    }
}

/// Up to 4 services over 6 frontends (each frontend to one service) and 10 backends.
fn desired() -> impl Strategy<Value = Desired> {
    (specs(), owners()).prop_map(|(specs, owners)| build(&specs, &owners))
}

/// Two states of which the second is the first one edited: frontends move between services that lose what they had.
fn edited() -> impl Strategy<Value = (Desired, Desired)> {
    let edits = prop::collection::vec(0u8..6, 4);
    (specs(), specs(), owners(), owners(), edits).prop_map(|(first, other, owners, moved, edits)| {
        let mut second = first.clone();
        for (i, edit) in (0..).zip(edits) {
            let other = other.get(&i);
            let Some(spec) = second.get_mut(&i) else {
                second.extend(other.map(|other| (i, other.clone())));
                continue;
            };
            match (edit, other) {
                (0, _) => spec.0.clear(),
                (1, _) => spec.1.clear(),
                (2, Some(other)) => spec.2 = other.2,
                (3, Some(other)) => spec.5.clone_from(&other.5),
                (4, None) => drop(second.remove(&i)),
                _ => {}
            }
        }
        let mut later = owners.clone();
        later.extend(moved);
        (build(&first, &owners), build(&second, &later))
    })
}

/// What a connect to `frontend` could reach, read as the eBPF program reads; an error is what it would refuse as broken.
fn reachable(
    maps: &impl Maps,
    value: FrontendValue,
) -> Result<(BTreeSet<BackendKey>, BTreeSet<BackendKey>), String> {
    let row = maps.service(value.service).ok_or("service id out of range")?;
    // a table is a set whose backends come often
    read_set(maps, value.service, row.maglev)?;
    read_set(maps, value.service, row.maglev_local)?;
    Ok((
        read_set(maps, value.service, row.cluster)?,
        read_set(maps, value.service, row.local)?,
    ))
}

fn read_set(maps: &impl Maps, service: u32, word: SetWord) -> Result<BTreeSet<BackendKey>, String> {
    let mut ids = Vec::new();
    for i in word.base()..word.base() + word.count() {
        let slot = maps.slot(i).ok_or("slot out of range")?;
        if slot.service() != service {
            return Err(format!(
                "slot {i} is of service {}, not {service}",
                slot.service()
            ));
        }
        if !ids.contains(&slot.backend()) {
            ids.push(slot.backend());
        }
    }
    ids.into_iter()
        .map(|id| {
            let row = maps.backend(id).ok_or("backend out of range")?;
            if id == 0 || row.state == 0 {
                return Err(format!("a slot of service {service} names free backend {id}"));
            }
            let protocol = Protocol::from_number(row.protocol).ok_or("bad protocol")?;
            Ok(BackendKey {
                addr: row.addr,
                port: row.port,
                protocol,
            })
        })
        .collect()
}

/// The frontends that lead to services. Each address of a ClusterIP must be known as such.
fn frontends(maps: &impl Maps) -> Result<Vec<(FrontendKey, FrontendValue)>, String> {
    let mut all = maps.frontends().map_err(|e| e.to_string())?;
    let active: BTreeSet<_> = all
        .extract_if(.., |(key, _)| key.class == frontend_class::ACTIVE_ADDRESS)
        .map(|(key, _)| key.addr)
        .collect();
    let unknown = |(key, value): &&(FrontendKey, FrontendValue)| {
        value.kind == frontend_kind::CLUSTER_IP && !active.contains(&key.addr)
    };
    match all.iter().find(unknown) {
        Some((key, _)) => Err(format!("{} is not known as a service's address", key.addr)),
        None => Ok(all),
    }
}

/// Maps that check after each write that every frontend leads to a complete service whose backends are its own, before or
/// after the change.
#[derive(Debug)]
struct Watched {
    inner: FaultyMaps<FakeMaps>,
    /// Who may own a frontend, and what a service may be, before or after the change.
    owners: BTreeMap<FrontendKey, BTreeSet<ServiceKey>>,
    allowed: BTreeMap<ServiceKey, Vec<DesiredService>>,
    broken: Option<String>,
    /// Up to half of a set may be left out.
    suspicious: bool,
    now: u64,
}

impl Watched {
    fn new(rate: u32, seed: u64) -> Self {
        let inner = FaultyMaps::new(FakeMaps::new(CAPACITY), rate, seed);
        Self {
            inner,
            owners: BTreeMap::new(),
            allowed: BTreeMap::new(),
            broken: None,
            suspicious: false,
            now: 0,
        }
    }

    fn allow(&mut self, desired: &Desired) {
        for (key, service) in &desired.services {
            self.allowed.entry(key.clone()).or_default().push(service.clone());
            for frontend in service.frontends.keys() {
                self.owners.entry(*frontend).or_default().insert(key.clone());
            }
        }
    }

    fn check(&self) -> Result<(), String> {
        for (frontend, value) in frontends(&self.inner)? {
            let (cluster, local) = reachable(&self.inner, value).map_err(|e| format!("{frontend:?}: {e}"))?;
            let owners = self
                .owners
                .get(&frontend)
                .ok_or("a frontend that nobody wanted")?;
            let services: Vec<_> = owners.iter().flat_map(|owner| &self.allowed[owner]).collect();
            let any = |found: &BTreeSet<BackendKey>, of: fn(&DesiredService) -> &Vec<SetBackend>| {
                services.iter().any(|s| {
                    let whole: BTreeSet<_> = of(s).iter().map(|m| m.backend).collect();
                    let enough = self.suspicious && 2 * found.len() >= whole.len();
                    whole == *found || (enough && found.is_subset(&whole))
                })
            };
            if !any(&cluster, |s| &s.cluster) || !any(&local, |s| &s.local) {
                return Err(format!(
                    "{frontend:?} leads to backends of nobody that it belonged to"
                ));
            }
        }
        Ok(())
    }
}

impl Maps for Watched {
    fn write(&mut self, write: &Write<'_>) -> Result<(), MapError> {
        let result = self.inner.write(write);
        if self.broken.is_none() {
            self.broken = self
                .check()
                .err()
                .map(|e| format!("after {write:?} at {}: {e}", self.now));
        }
        result
    }
    fn frontends(&self) -> Result<Vec<(FrontendKey, FrontendValue)>, MapError> {
        self.inner.frontends()
    }
    fn source_ranges(&self) -> Result<Vec<SourceRangeKey>, MapError> {
        self.inner.source_ranges()
    }

    fn service(&self, id: u32) -> Option<dataplane_common::abi::Service> {
        self.inner.service(id)
    }
    fn slot(&self, index: u32) -> Option<dataplane_common::abi::Slot> {
        self.inner.slot(index)
    }
    fn backend(&self, id: u32) -> Option<dataplane_common::abi::Backend> {
        self.inner.backend(id)
    }
    fn capacity(&self) -> Capacity {
        self.inner.capacity()
    }
}

fn changes(old: &Desired, new: &Desired) -> Vec<(ServiceKey, Option<DesiredService>)> {
    let keys: BTreeSet<_> = old.services.keys().chain(new.services.keys()).cloned().collect();
    keys.into_iter()
        .map(|k| (k.clone(), new.services.get(&k).cloned()))
        .collect()
}

/// What the maps mean, by frontend.
#[derive(Clone, PartialEq, Eq, Debug)]
struct Meaning {
    offer: Offer,
    cluster: BTreeSet<BackendKey>,
    local: BTreeSet<BackendKey>,
    tables: [BTreeSet<BackendKey>; 2],
    flags: u32,
    affinity_seconds: u32,
    source_ranges: BTreeSet<IpNet>,
    locals: BTreeSet<BackendKey>,
}

fn meaning(maps: &impl Maps) -> BTreeMap<FrontendKey, Meaning> {
    let ranges = maps.source_ranges().unwrap();
    let read = |(frontend, value): (FrontendKey, FrontendValue)| {
        let (cluster, local) = reachable(maps, value).unwrap();
        let row = maps.service(value.service).unwrap();
        let of_service = ranges.iter().filter(|key| key.ranges == row.source_ranges);
        let slots = row.cluster.base()..row.cluster.base() + row.cluster.count();
        let rows = slots.map(|i| maps.backend(maps.slot(i).unwrap().backend()).unwrap());
        let meaning = Meaning {
            offer: Offer {
                kind: value.kind,
                flags: value.flags,
            },
            cluster,
            local,
            tables: [row.maglev, row.maglev_local].map(|word| read_set(maps, value.service, word).unwrap()),
            flags: row.flags,
            affinity_seconds: row.affinity_seconds,
            source_ranges: of_service
                .map(|key| {
                    IpNet::new(key.addr.to_ip(), u8::try_from(key.prefix_len - 32 - 96).unwrap()).unwrap()
                })
                .collect(),
            locals: rows
                .filter(|row| row.node == backend_node::LOCAL)
                .map(|row| BackendKey {
                    addr: row.addr,
                    port: row.port,
                    protocol: Protocol::Tcp,
                })
                .collect(),
        };
        (frontend, meaning)
    };
    let all = frontends(maps).unwrap();
    let cluster_ips = all
        .iter()
        .filter(|(_, value)| value.kind == frontend_kind::CLUSTER_IP);
    let addresses: BTreeSet<_> = cluster_ips.map(|(key, _)| key.addr).collect();
    assert_eq!(
        maps.frontends().unwrap().len(),
        all.len() + addresses.len(),
        "no address more than needed"
    );
    all.into_iter().map(read).collect()
}

fn wanted(desired: &Desired) -> BTreeMap<FrontendKey, Meaning> {
    let names = |set: &[SetBackend]| set.iter().map(|m| m.backend).collect::<BTreeSet<_>>();
    let of = |s: &DesiredService| {
        let table = |set: &[SetBackend], bit: u8| {
            let wanted = s.config.tables & bit != 0 && set.len() > 1;
            if wanted { names(set) } else { BTreeSet::new() }
        };
        let meaning = |offer: Offer| Meaning {
            offer,
            cluster: names(&s.cluster),
            local: names(&s.local),
            tables: [table(&s.cluster, table::CLUSTER), table(&s.local, table::LOCAL)],
            flags: s.config.flags,
            affinity_seconds: s.config.affinity_seconds,
            source_ranges: s.source_ranges.iter().copied().collect(),
            locals: s.cluster.iter().filter(|m| m.local).map(|m| m.backend).collect(),
        };
        s.frontends
            .iter()
            .map(|(f, offer)| (f, meaning(offer)))
            .collect::<Vec<_>>()
    };
    desired.services.values().flat_map(of).collect()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 192, ..ProptestConfig::default() })]

    #[test]
    fn every_step_is_whole_and_the_end_is_as_desired(states in prop::collection::vec(desired(), 1..6), gap in 0u64..3000) {
        let mut programmer = Programmer::new(Watched::new(0, 0)).unwrap();
        let mut before = Desired::default();
        for (i, state) in states.iter().enumerate() {
            programmer.maps_mut().allowed.clear();
            programmer.maps_mut().owners.clear();
            programmer.maps_mut().allow(&before);
            programmer.maps_mut().allow(state);
            let outcome = programmer.reconcile(changes(&before, state), i as u64 * gap);
            prop_assert!(outcome.failed.is_empty(), "{:?}", outcome.failed);
            prop_assert_eq!(&programmer.maps().broken, &None);
            prop_assert_eq!(meaning(programmer.maps()), wanted(state));
            // doing it again does nothing
            let again = programmer.reconcile(changes(&before, state), i as u64 * gap);
            prop_assert_eq!(again.writes, 0);
            prop_assert_eq!(programmer.audit(i as u64 * gap).unwrap().differences, BTreeMap::new());
            before = state.clone();
        }
        // nothing leaks: after everything is removed and has rested, all is free
        programmer.maps_mut().allow(&before);
        programmer.reconcile(changes(&before, &Desired::default()), 1_000_000);
        programmer.release(1_000_000 + QUARANTINE_MS);
        for fill in programmer.usage() {
            prop_assert_eq!(fill.used, 0, "{}", fill.map);
        }
    }

    #[test]
    fn a_faulty_kernel_is_brought_to_the_desired_state(states in prop::collection::vec(desired(), 1..5), seed: u64) {
        let mut programmer = Programmer::new(Watched::new(19_660, seed)).unwrap(); // 0.3
        let mut all = Desired::default();
        let mut now = 0;
        for state in &states {
            programmer.maps_mut().allow(state);
            now += 500;
            programmer.reconcile(changes(&all, state), now);
            prop_assert_eq!(&programmer.maps().broken, &None);
            for (k, s) in &state.services {
                all.services.insert(k.clone(), s.clone());
            }
        }
        let mut tries = 0;
        while programmer.pending().next().is_some() || programmer.has_unclaimed() {
            tries += 1;
            now += 500;
            prop_assert!(tries < 500, "does not converge");
            programmer.retry(now);
            programmer.prune(now);
            prop_assert_eq!(&programmer.maps().broken, &None);
        }
        prop_assert_eq!(meaning(programmer.maps()), wanted(states.last().unwrap()));
    }

    #[test]
    fn a_restart_keeps_ids_and_serves_all_the_time(first in desired(), second in desired(), rate in prop::sample::select(vec![0u32, 19_660]), seed: u64) {
        let mut programmer = Programmer::new(Watched::new(rate, seed)).unwrap();
        programmer.maps_mut().allow(&first);
        programmer.maps_mut().allow(&second);
        // a crash after some of the writes: the rest of them is lost
        programmer.reconcile(changes(&Desired::default(), &first), 0);
        let ids: BTreeMap<FrontendKey, u32> = programmer.maps().frontends().unwrap().into_iter().map(|(f, v)| (f, v.service)).collect();
        let Watched { mut inner, owners, allowed, .. } = std::mem::replace(programmer.maps_mut(), Watched::new(0, 0));
        inner.set_rate(0);
        let watched = Watched { inner, owners, allowed, broken: None, suspicious: false, now: 1 };
        let mut restarted = Programmer::new(watched).unwrap();
        prop_assert_eq!(restarted.reconcile(changes(&Desired::default(), &first), 10_000).failed.len(), 0);
        prop_assert_eq!(&restarted.maps().broken, &None);
        prop_assert_eq!(meaning(restarted.maps()), wanted(&first));
        if rate == 0 {
            let after: BTreeMap<FrontendKey, u32> = restarted.maps().frontends().unwrap().into_iter().map(|(f, v)| (f, v.service)).collect();
            prop_assert_eq!(ids, after);
        }
        // a second restart, after which only `second` is known: prune removes the rest
        let Watched { inner, owners, allowed, .. } = std::mem::replace(restarted.maps_mut(), Watched::new(0, 0));
        let mut third = Programmer::new(Watched { inner, owners, allowed, broken: None, suspicious: false, now: 2 }).unwrap();
        prop_assert_eq!(third.reconcile(changes(&Desired::default(), &second), 20_000).failed.len(), 0);
        third.prune(20_000);
        prop_assert!(!third.has_unclaimed());
        prop_assert_eq!(&third.maps().broken, &None);
        prop_assert_eq!(meaning(third.maps()), wanted(&second));
    }

    #[test]
    fn suspects_come_and_go_between_changes(
        steps in prop::collection::vec((desired(), prop::collection::vec(0u8..10, 0..6)), 1..5),
        rate in prop::sample::select(vec![0u32, 0, 9_830]),
        seed: u64,
    ) {
        let mut programmer = Programmer::new(Watched::new(rate, seed)).unwrap();
        programmer.maps_mut().suspicious = true;
        let mut before = Desired::default();
        let mut now = 0;
        for (state, numbers) in &steps {
            programmer.maps_mut().allow(state);
            programmer.reconcile(changes(&before, state), now);
            let ids: BTreeMap<BackendKey, u32> = programmer
                .services()
                .into_iter()
                .flat_map(|s| s.cluster.into_iter().chain(s.local))
                .map(|(id, member)| (member.backend, id))
                .collect();
            let suspects: Vec<u32> = numbers.iter().filter_map(|i| ids.get(&backend(*i)).copied()).collect();
            programmer.set_suspects(&suspects, now);
            prop_assert_eq!(&programmer.maps().broken, &None);
            before = state.clone();
            now += 700;
        }
        programmer.maps_mut().inner.set_rate(0);
        programmer.retry(now);
        programmer.prune(now);
        prop_assert_eq!(programmer.pending().count(), 0);
        prop_assert_eq!(&programmer.maps().broken, &None);
        // who is left out is suspected, and nobody else; the sets are as desired without them
        let suspects: BTreeSet<u32> = programmer.suspects().iter().copied().collect();
        for service in programmer.services() {
            prop_assert!(service.left_out.iter().all(|id| suspects.contains(id)));
            let row = programmer.maps().service(service.id).unwrap();
            for (word, members) in [(row.cluster, &service.cluster), (row.local, &service.local)] {
                let found = read_set(programmer.maps(), service.id, word).unwrap();
                let suspected = members.iter().filter(|(id, _)| suspects.contains(id)).count();
                prop_assert_eq!(members.len() - found.len(), suspected.min(members.len() / 2));
            }
        }
        programmer.set_suspects(&[], now);
        prop_assert_eq!(meaning(programmer.maps()), wanted(&before));
        prop_assert_eq!(programmer.audit(now).unwrap().differences, BTreeMap::new());
    }

    #[test]
    fn equal_states_need_nothing(state in desired()) {
        prop_assert_eq!(diff(&state, &state), vec![]);
    }
}

#[test]
fn a_set_that_does_not_fit_leaves_the_old_one_in_force() {
    let small = Capacity {
        slots: 12,
        ..CAPACITY
    };
    let mut programmer = Programmer::new(FakeMaps::new(small)).unwrap();
    let service = |members: u8, f: u8| DesiredService {
        frontends: [(frontend(f), frontend_kind::CLUSTER_IP)].into(),
        cluster: set(&(1..=members).collect()),
        ..DesiredService::default()
    };
    assert_eq!(
        programmer.reconcile([(key(1), Some(service(3, 1)))], 0).applied,
        1
    );
    let outcome = programmer.reconcile(
        [(key(1), Some(service(20, 1))), (key(2), Some(service(2, 2)))],
        10,
    );
    assert_eq!(outcome.applied, 1, "the other service goes on");
    let (failed, error) = &outcome.failed[0];
    assert_eq!((failed, error.map()), (&key(1), "SLOTS"));
    assert!(
        error.to_string().contains("SLOTS is too small: 20 more needed"),
        "{error}"
    );
    let meaning = meaning(programmer.maps());
    assert_eq!(meaning[&frontend(1)].cluster, (1..=3).map(backend).collect());
    assert_eq!(meaning[&frontend(2)].cluster, (1..=2).map(backend).collect());
    // rows that only the refused set wanted are given back
    programmer.release(10 + QUARANTINE_MS);
    assert_eq!(programmer.usage()[3].used, 3);
    // and when the wish becomes possible it is fulfilled
    assert_eq!(
        programmer
            .reconcile([(key(1), Some(service(4, 1)))], 5000)
            .applied,
        1
    );
    assert_eq!(programmer.pending().count(), 0);
}

#[test]
fn what_was_freed_rests_before_it_is_used_again() {
    let tight = Capacity {
        slots: 3,
        backends: 3,
        services: 2,
        frontends: 8,
        source_ranges: 64,
    };
    let mut programmer = Programmer::new(FakeMaps::new(tight)).unwrap();
    let service = |b: u8| DesiredService {
        frontends: [(frontend(1), frontend_kind::CLUSTER_IP)].into(),
        cluster: set(&[b].into()),
        ..DesiredService::default()
    };
    assert!(
        programmer
            .reconcile([(key(1), Some(service(1)))], 0)
            .failed
            .is_empty()
    );
    assert!(
        programmer
            .reconcile([(key(1), Some(service(2)))], 1)
            .failed
            .is_empty()
    );
    // the row of backend 1 rests until 2,001: backend 3 finds none
    assert_eq!(
        programmer.reconcile([(key(1), Some(service(3)))], 2000).failed[0]
            .1
            .map(),
        "BACKENDS"
    );
    assert_eq!(programmer.next_release(), Some(1 + QUARANTINE_MS));
    assert_eq!(programmer.retry(2001).applied, 1);
    // the same for a service id
    assert!(programmer.reconcile([(key(1), None)], 5000).failed.is_empty());
    assert_eq!(
        programmer.reconcile([(key(2), Some(service(3)))], 6999).failed[0]
            .1
            .map(),
        "SERVICES"
    );
    assert_eq!(programmer.retry(7000).applied, 1);
}

#[test]
fn pruning_spares_what_a_pending_service_wants() {
    let small = Capacity {
        slots: 12,
        ..CAPACITY
    };
    let service = |frontends: &[u8], members: u8| DesiredService {
        frontends: frontends
            .iter()
            .map(|f| (frontend(*f), frontend_kind::CLUSTER_IP))
            .collect(),
        cluster: set(&(1..=members).collect()),
        ..DesiredService::default()
    };
    let mut programmer = Programmer::new(FakeMaps::new(small)).unwrap();
    programmer.reconcile([(key(1), Some(service(&[1, 2, 3], 3)))], 0);
    // after a restart its frontends belong to two services, of which one does not fit, and to nobody
    let mut restarted = Programmer::new(programmer.maps().clone()).unwrap();
    let wish = [
        (key(4), Some(service(&[1], 20))),
        (key(5), Some(service(&[2], 2))),
    ];
    assert_eq!(restarted.reconcile(wish, 0).failed.len(), 1);
    restarted.prune(0);
    let found = meaning(restarted.maps());
    assert_eq!(
        found[&frontend(1)].cluster,
        (1..=3).map(backend).collect(),
        "still served"
    );
    assert_eq!(found[&frontend(2)].cluster, (1..=2).map(backend).collect());
    assert!(!found.contains_key(&frontend(3)), "wanted by nobody");
    // when it fits, nothing of the old service is left
    restarted.reconcile([(key(4), Some(service(&[1], 4)))], 5000);
    restarted.prune(5000);
    assert!(!restarted.has_unclaimed());
    assert_eq!(
        meaning(restarted.maps())[&frontend(1)].cluster,
        (1..=4).map(backend).collect()
    );
}
