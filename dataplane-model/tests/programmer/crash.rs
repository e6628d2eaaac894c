//! Death and failure at each single write of a change, not only at random ones.

use dataplane_common::abi::{Backend, Service, Slot, service_flag};

use super::*;

/// What befalls the writes, counted from the moment that it is armed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    /// All are carried out.
    Fine,
    /// This many are carried out and no more, as when the process is killed.
    DiesAfter(usize),
    /// The one with this number fails.
    FailsOnce(usize),
}

/// Maps that meet a fate, and that check after each write that no frontend is broken, and that none of `served` is
/// refused.
#[derive(Clone, Debug)]
struct Fated {
    inner: FakeMaps,
    fate: Fate,
    tried: usize,
    /// Frontends that answer, and clients (by their range) that may enter there.
    served: BTreeSet<(FrontendKey, Option<u8>)>,
    /// Clients that may not.
    denied: BTreeSet<(FrontendKey, Option<u8>)>,
    broken: Option<String>,
}

impl Fated {
    fn check(&self) -> Result<(), String> {
        let ranges = self.inner.source_ranges().map_err(|e| e.to_string())?;
        let mut missing: BTreeSet<FrontendKey> = self
            .served
            .iter()
            .filter(|(_, client)| client.is_none())
            .map(|(frontend, _)| *frontend)
            .collect();
        for (frontend, value) in frontends(&self.inner)? {
            let (cluster, local) = reachable(&self.inner, value).map_err(|e| format!("{frontend:?}: {e}"))?;
            let row = self.inner.service(value.service).ok_or("no service")?;
            let used = if row.flags & local_flag(value.kind) == 0 {
                cluster
            } else {
                local
            };
            if missing.remove(&frontend) && used.is_empty() {
                return Err(format!(
                    "{frontend:?} would be refused, but is served before and after"
                ));
            }
            for i in 0..4 {
                let listed = ranges
                    .iter()
                    .any(|key| key.ranges == row.source_ranges && key.addr == net(i).addr().into());
                let enters = value.flags & frontend_flag::SOURCE_RANGES == 0 || listed;
                let may = (frontend, Some(i));
                if self.served.contains(&may) && !enters {
                    return Err(format!(
                        "{frontend:?}: {} is kept out, but may enter before and after",
                        net(i)
                    ));
                }
                if self.denied.contains(&may) && enters {
                    return Err(format!(
                        "{frontend:?}: {} gets in, but may not before and after",
                        net(i)
                    ));
                }
            }
        }
        match missing.first() {
            None => Ok(()),
            Some(frontend) => Err(format!("{frontend:?} is gone, but is served before and after")),
        }
    }

    /// The maps as the next process finds them.
    fn survivor(&self, fate: Fate) -> Self {
        Self {
            fate,
            tried: 0,
            ..self.clone()
        }
    }
}

impl Maps for Fated {
    fn write(&mut self, write: &Write<'_>) -> Result<(), MapError> {
        let number = self.tried;
        self.tried += 1;
        let fails = match self.fate {
            Fate::Fine => false,
            Fate::DiesAfter(count) => number >= count,
            Fate::FailsOnce(at) => number == at,
        };
        if fails {
            return Err(MapError::Io {
                map: "FATED",
                operation: "write",
                source: std::io::Error::other("injected fault"),
            });
        }
        self.inner.write(write)?;
        if self.broken.is_none() {
            self.broken = self.check().err().map(|e| format!("after {write:?}: {e}"));
        }
        Ok(())
    }

    fn frontends(&self) -> Result<Vec<(FrontendKey, FrontendValue)>, MapError> {
        self.inner.frontends()
    }

    fn source_ranges(&self) -> Result<Vec<SourceRangeKey>, MapError> {
        self.inner.source_ranges()
    }

    fn service(&self, id: u32) -> Option<Service> {
        self.inner.service(id)
    }

    fn slot(&self, index: u32) -> Option<Slot> {
        self.inner.slot(index)
    }

    fn backend(&self, id: u32) -> Option<Backend> {
        self.inner.backend(id)
    }

    fn capacity(&self) -> Capacity {
        self.inner.capacity()
    }
}

/// The policy that decides about a frontend of this kind, for clients outside.
fn local_flag(kind: u8) -> u32 {
    if kind == frontend_kind::CLUSTER_IP {
        service_flag::INTERNAL_LOCAL
    } else {
        service_flag::EXTERNAL_LOCAL
    }
}

/// The frontends that answer in a state, and which clients may enter or not.
fn served(state: &Desired, may_enter: bool) -> BTreeSet<(FrontendKey, Option<u8>)> {
    let mut out = BTreeSet::new();
    for service in state.services.values() {
        for (frontend, offer) in service.frontends.iter() {
            let local = service.config.flags & local_flag(offer.kind) != 0;
            if may_enter && !if local { &service.local } else { &service.cluster }.is_empty() {
                out.insert((frontend, None));
            }
            let open = offer.flags & frontend_flag::SOURCE_RANGES == 0;
            let enters = |i: &u8| open || service.source_ranges.contains(&net(*i));
            out.extend(
                (0..4)
                    .filter(|i| enters(i) == may_enter)
                    .map(|i| (frontend, Some(i))),
            );
        }
    }
    out
}

fn ways() -> impl Strategy<Value = (Desired, Desired)> {
    prop_oneof![1 => (desired(), desired()), 3 => edited()]
}

/// A programmer that has `a` in force and knows so, and what both states serve.
fn in_force(a: &Desired, b: &Desired) -> Programmer<Fated> {
    let mut first = Programmer::new(Fated {
        inner: FakeMaps::new(CAPACITY),
        fate: Fate::Fine,
        tried: 0,
        served: BTreeSet::new(),
        denied: BTreeSet::new(),
        broken: None,
    })
    .unwrap();
    assert!(
        first
            .reconcile(changes(&Desired::default(), a), 0)
            .failed
            .is_empty()
    );
    let maps = first.maps_mut();
    maps.served = served(a, true).intersection(&served(b, true)).copied().collect();
    maps.denied = served(a, false)
        .intersection(&served(b, false))
        .copied()
        .collect();
    maps.tried = 0;
    first
}

/// Entries in use when nothing but `state` is programmed.
fn fill_of(state: &Desired) -> Vec<u32> {
    let mut fresh = Programmer::new(FakeMaps::new(CAPACITY)).unwrap();
    fresh.reconcile(changes(&Desired::default(), state), 0);
    fresh.usage().iter().map(|fill| fill.used).collect()
}

/// Brings what a dead process left to `b`, as a new one does after complete lists.
fn take_up(left: Fated, b: &Desired, now: u64) -> Result<Programmer<Fated>, TestCaseError> {
    let mut next = Programmer::new(left).unwrap();
    next.reconcile(changes(&Desired::default(), b), now);
    next.prune(now);
    let mut tries = 0;
    while next.pending().next().is_some() || next.has_unclaimed() {
        tries += 1;
        prop_assert!(tries < 10, "does not converge");
        next.retry(now);
        next.prune(now);
    }
    prop_assert_eq!(&next.maps().broken, &None);
    prop_assert_eq!(meaning(next.maps()), wanted(b));
    Ok(next)
}

fn nothing_leaks(programmer: &mut Programmer<Fated>, b: &Desired, now: u64) -> Result<(), TestCaseError> {
    // what could not be settled is settled with the next change, whatever it is
    programmer.reconcile([], now);
    // a removal that fails now rests once more, and tables keep their size for a while
    for rest in [QUARANTINE_MS, 2 * QUARANTINE_MS, 1_000_000, 2_000_000, 3_000_000] {
        programmer.release(now + rest);
    }
    let used: Vec<u32> = programmer.usage().iter().map(|fill| fill.used).collect();
    prop_assert_eq!(used, fill_of(b));
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, ..ProptestConfig::default() })]

    /// Death after each write of the way from `a` to `b`; and of the process after it, too, after each third of its.
    #[test]
    fn death_after_any_write_is_taken_up_without_a_gap((a, b) in ways()) {
        let way = {
            let mut whole = in_force(&a, &b);
            whole.reconcile(changes(&a, &b), 0);
            prop_assert_eq!(&whole.maps().broken, &None);
            whole.maps().tried
        };
        for writes in 0..=way {
            let mut dying = in_force(&a, &b);
            dying.maps_mut().fate = Fate::DiesAfter(writes);
            dying.reconcile(changes(&a, &b), 0);
            prop_assert_eq!(&dying.maps().broken, &None);
            let left = dying.maps().survivor(Fate::Fine);
            let mut next = take_up(left, &b, 1000)?;
            let second_way = next.maps().tried;
            nothing_leaks(&mut next, &b, 1000)?;

            for writes in (0..second_way).step_by(3.max(second_way / 5)) {
                let mut again = Programmer::new(dying.maps().survivor(Fate::DiesAfter(writes))).unwrap();
                again.reconcile(changes(&Desired::default(), &b), 1000);
                again.prune(1000);
                prop_assert_eq!(&again.maps().broken, &None);
                take_up(again.maps().survivor(Fate::Fine), &b, 2000)?;
            }
        }
    }

    /// A failure of each write of the way from `a` to `b`, with and without a restart before it.
    #[test]
    fn failure_of_any_write_is_made_good((a, b) in ways(), restart: bool) {
        for number in 0.. {
            let mut programmer = in_force(&a, &b);
            if restart {
                programmer = Programmer::new(programmer.maps().clone()).unwrap();
            }
            programmer.maps_mut().fate = Fate::FailsOnce(number);
            let from = if restart { Desired::default() } else { a.clone() };
            programmer.reconcile(changes(&from, &b), 0);
            programmer.prune(0);
            let mut tries = 0;
            while programmer.pending().next().is_some() || programmer.has_unclaimed() {
                tries += 1;
                prop_assert!(tries < 10, "does not converge");
                programmer.retry(0);
                programmer.prune(0);
            }
            prop_assert_eq!(&programmer.maps().broken, &None);
            prop_assert_eq!(meaning(programmer.maps()), wanted(&b));
            nothing_leaks(&mut programmer, &b, 0)?;
            if programmer.maps().tried <= number {
                break;
            }
        }
    }
}

/// Two services of these frontends, clusters and ranges.
fn two(services: [(&[u8], &[u8], &[u8]); 2]) -> Desired {
    let service = |(frontends, cluster, ranges): (&[u8], &[u8], &[u8])| {
        let ranges: BTreeSet<u8> = ranges.iter().copied().collect();
        DesiredService {
            frontends: frontends
                .iter()
                .map(|f| (frontend(*f), offer(*f, &ranges)))
                .collect(),
            cluster: set(&cluster.iter().copied().collect()),
            source_ranges: ranges.into_iter().map(net).collect(),
            ..DesiredService::default()
        }
    };
    Desired {
        services: [key(0), key(1)].into_iter().zip(services.map(service)).collect(),
    }
}

#[test]
fn a_frontend_that_moves_is_served_all_the_time() {
    let a = two([(&[0], &[1], &[]), (&[], &[2], &[])]);
    let b = two([(&[], &[], &[]), (&[0], &[2], &[])]);
    let mut programmer = in_force(&a, &b);
    assert_eq!(programmer.maps().served.len(), 1 + 4);
    programmer.reconcile(changes(&a, &b), 0);
    assert_eq!(programmer.maps().broken, None);
}

#[test]
fn services_that_swap_frontends_and_ranges_let_nobody_in_or_out_for_a_moment() {
    // 1 and 4 are load-balancer addresses: at each the same ranges may enter before and after
    let a = two([(&[1], &[1], &[0]), (&[4], &[2], &[1])]);
    let b = two([(&[4], &[1], &[1]), (&[1], &[2], &[0])]);
    for restart in [false, true] {
        let mut programmer = in_force(&a, &b);
        if restart {
            programmer = Programmer::new(programmer.maps().clone()).unwrap();
        }
        let ids: Vec<u32> = programmer.services().iter().map(|s| s.id).collect();
        programmer.reconcile(changes(&a, &b), 0);
        programmer.prune(0);
        assert_eq!(programmer.maps().broken, None);
        assert_eq!(meaning(programmer.maps()), wanted(&b));
        assert_eq!(programmer.services().len(), 2);
        let kept = programmer
            .services()
            .iter()
            .filter(|s| ids.contains(&s.id))
            .count();
        // who is known by name gets a new row; after a restart nobody is
        assert_eq!(kept, if restart { 2 } else { 0 });
    }
}
