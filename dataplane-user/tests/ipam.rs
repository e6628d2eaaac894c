//! Addresses for pods: never one twice, whatever fails and whenever the agent dies.
#![allow(clippy::unwrap_used, reason = "a test that cannot be set up fails")]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::net::IpAddr;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use beeline_cni::protocol::Key;
use dataplane_user::ipam::{Config, Ipam, IpamError, Use};
use dataplane_user::persist::Faults;
use proptest::prelude::*;

fn key(number: usize) -> Key {
    Key {
        network: "cbr0".into(),
        container_id: format!("c{number}"),
        ifname: "eth0".into(),
    }
}

fn config(dir: &Path, cidrs: &[&str]) -> Config {
    Config {
        file: dir.join("ipam.json"),
        cidrs: cidrs.iter().map(|cidr| cidr.parse().unwrap()).collect(),
        quarantine: Duration::from_secs(60),
        host_local: None,
        faults: Faults::default(),
    }
}

fn addresses(texts: &[&str]) -> Vec<IpAddr> {
    texts.iter().map(|text| text.parse().unwrap()).collect()
}

#[test]
fn a_pod_gets_one_address_of_each_family_and_keeps_it() {
    let dir = tempfile::tempdir().unwrap();
    let config = config(dir.path(), &["10.244.1.0/24", "fd00:1::/64"]);
    let mut ipam = Ipam::open(config.clone()).unwrap();
    assert_eq!(
        ipam.allocate(&key(1), &[]).unwrap(),
        addresses(&["10.244.1.2", "fd00:1::2"])
    );
    assert_eq!(
        ipam.allocate(&key(2), &[]).unwrap(),
        addresses(&["10.244.1.3", "fd00:1::3"])
    );
    assert!(matches!(ipam.allocate(&key(1), &[]), Err(IpamError::Exists(_))));
    drop(ipam);
    let mut ipam = Ipam::open(config).unwrap();
    assert_eq!(
        ipam.allocate(&key(3), &[]).unwrap(),
        addresses(&["10.244.1.4", "fd00:1::4"])
    );
    assert_eq!(ipam.used(), 6);
    assert_eq!(
        ipam.release(&key(1)).unwrap(),
        addresses(&["10.244.1.2", "fd00:1::2"])
    );
    assert_eq!(ipam.release(&key(1)).unwrap(), [] as [IpAddr; 0]);
    assert_eq!(
        ipam.list().unwrap()[&"10.244.1.2".parse::<IpAddr>().unwrap()],
        Use::Quarantine
    );
}

#[test]
fn freed_addresses_wait_and_the_oldest_goes_first_when_nothing_else_is_left() {
    let dir = tempfile::tempdir().unwrap();
    // .2 to .6 are for pods
    let mut ipam = Ipam::open(config(dir.path(), &["10.0.0.0/29"])).unwrap();
    for number in 0..3 {
        ipam.allocate(&key(number), &[]).unwrap();
    }
    ipam.release(&key(0)).unwrap();
    assert_eq!(ipam.allocate(&key(3), &[]).unwrap(), addresses(&["10.0.0.5"]));
    assert_eq!(ipam.allocate(&key(4), &[]).unwrap(), addresses(&["10.0.0.6"]));
    assert_eq!(
        ipam.allocate(&key(5), &[]).unwrap(),
        addresses(&["10.0.0.2"]),
        "early rather than none"
    );
    let error = ipam.allocate(&key(6), &[]).unwrap_err();
    assert_eq!(error.to_string(), "no address is free in 10.0.0.0/29: 5 in use");
}

#[test]
fn a_quarantine_that_is_over_does_not_hold() {
    let dir = tempfile::tempdir().unwrap();
    let mut config = config(dir.path(), &["10.0.0.0/30"]);
    config.quarantine = Duration::ZERO;
    let mut ipam = Ipam::open(config).unwrap();
    for number in 0..20 {
        assert_eq!(
            ipam.allocate(&key(number), &[]).unwrap(),
            addresses(&["10.0.0.2"])
        );
        ipam.release(&key(number)).unwrap();
    }
    assert!(ipam.list().unwrap().is_empty());
}

#[test]
fn requested_addresses_are_given_or_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let mut ipam = Ipam::open(config(dir.path(), &["10.0.0.0/24", "fd00::/64"])).unwrap();
    let wanted = addresses(&["10.0.0.77"]);
    assert_eq!(
        ipam.allocate(&key(1), &wanted).unwrap(),
        addresses(&["10.0.0.77", "fd00::2"])
    );
    for (wanted, cause) in [
        ("10.0.0.77", "is used by eth0 of container c1 in network cbr0"),
        ("10.0.0.1", "is not one that pods of this node can have"),
        ("10.0.0.255", "is not one that pods of this node can have"),
        ("10.9.0.5", "is not one that pods of this node can have"),
    ] {
        let error = ipam.allocate(&key(2), &addresses(&[wanted])).unwrap_err();
        assert_eq!(error.to_string(), format!("requested address {wanted} {cause}"));
    }
    assert_eq!(ipam.used(), 2, "what failed took nothing");
}

#[test]
fn addresses_of_host_local_are_left_alone_until_it_frees_them() {
    let dir = tempfile::tempdir().unwrap();
    let theirs = dir.path().join("networks/cbr0");
    fs::create_dir_all(&theirs).unwrap();
    fs::write(theirs.join("10.0.0.2"), "abc\r\neth0").unwrap();
    // before 0.8 only the id
    fs::write(theirs.join("fd00::2"), "abc").unwrap();
    fs::write(theirs.join("last_reserved_ip.0"), "10.0.0.2").unwrap();
    fs::write(theirs.join("lock"), "").unwrap();
    let mut config = config(dir.path(), &["10.0.0.0/24", "fd00::/64"]);
    config.host_local = Some(theirs.clone());
    let mut ipam = Ipam::open(config).unwrap();
    assert_eq!(
        ipam.allocate(&key(1), &[]).unwrap(),
        addresses(&["10.0.0.3", "fd00::3"])
    );
    let wanted = addresses(&["10.0.0.2"]);
    let error = ipam.allocate(&key(2), &wanted).unwrap_err();
    assert_eq!(
        error.to_string(),
        "requested address 10.0.0.2 is used by container abc of another plugin"
    );
    assert_eq!(ipam.list().unwrap()[&wanted[0]], Use::HostLocal("abc".into()));
    fs::remove_file(theirs.join("10.0.0.2")).unwrap();
    assert_eq!(ipam.allocate(&key(2), &wanted).unwrap()[0], wanted[0]);
}

#[test]
fn new_ranges_leave_old_pods_alone() {
    let dir = tempfile::tempdir().unwrap();
    let mut ipam = Ipam::open(config(dir.path(), &["10.0.0.0/24"])).unwrap();
    ipam.allocate(&key(1), &[]).unwrap();
    let small: Vec<_> = ["10.1.0.0/31"].iter().map(|cidr| cidr.parse().unwrap()).collect();
    assert!(matches!(ipam.set_cidrs(&small), Err(IpamError::TooSmall(_))));
    ipam.set_cidrs(&["10.1.0.0/24".parse().unwrap()]).unwrap();
    assert_eq!(ipam.allocate(&key(2), &[]).unwrap(), addresses(&["10.1.0.2"]));
    assert_eq!(ipam.release(&key(1)).unwrap(), addresses(&["10.0.0.2"]));
    assert!(matches!(
        ipam.set_cidrs(&[]).and_then(|()| ipam.allocate(&key(3), &[])),
        Err(IpamError::NoRange)
    ));
}

#[test]
fn a_corrupt_file_is_named_and_what_lives_is_taken_over() {
    let dir = tempfile::tempdir().unwrap();
    let config = config(dir.path(), &["10.0.0.0/24"]);
    fs::write(&config.file, "{\"version\": 1, \"used\": {\"10.0").unwrap();
    let error = Ipam::open(config.clone()).unwrap_err();
    assert!(error.to_string().contains("ipam.json cannot be used"), "{error}");
    let mut ipam = Ipam::rebuild(config).unwrap();
    ipam.adopt(&key(7), &addresses(&["10.0.0.2"])).unwrap();
    assert!(ipam.adopt(&key(8), &addresses(&["10.0.0.2"])).is_err());
    assert_eq!(ipam.allocate(&key(9), &[]).unwrap(), addresses(&["10.0.0.3"]));
    assert!(dir.path().join("ipam.corrupt").exists());
}

#[derive(Clone, Debug)]
enum Step {
    Add(usize),
    Del(usize),
    Gc(BTreeSet<usize>),
    Restart,
}

fn steps() -> impl Strategy<Value = Vec<(Step, Option<usize>)>> {
    let step = prop_oneof![
        4 => (0..12usize).prop_map(Step::Add),
        3 => (0..12usize).prop_map(Step::Del),
        1 => prop::collection::btree_set(0..12usize, 0..6).prop_map(Step::Gc),
        1 => Just(Step::Restart),
    ];
    // the number of the write step that fails; the process dies with it half the time
    prop::collection::vec((step, prop::option::weighted(0.4, 0..6usize)), 1..60)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(150))]
    #[test]
    fn no_two_live_pods_ever_have_the_same_address(steps in steps(), dies in any::<u64>()) {
        let dir = tempfile::tempdir().unwrap();
        let countdown = Arc::new(AtomicUsize::new(usize::MAX));
        let counter = countdown.clone();
        let mut config = config(dir.path(), &["10.0.0.0/28", "fd00::/124"]);
        config.quarantine = Duration::from_secs(if dies & 1 == 0 { 0 } else { 60 });
        config.faults = Faults::new(move |step| {
            let left = counter.load(Ordering::Relaxed);
            counter.store(left.saturating_sub(1), Ordering::Relaxed);
            if left == 0 { Err(io::Error::other(step)) } else { Ok(()) }
        });
        let mut ipam = Ipam::open(config.clone()).unwrap();
        // what pods believe that they have: only what was answered
        let mut live: BTreeMap<usize, Vec<IpAddr>> = BTreeMap::new();
        for (number, (step, fault)) in steps.into_iter().enumerate() {
            countdown.store(fault.unwrap_or(usize::MAX), Ordering::Relaxed);
            match &step {
                Step::Add(pod) => {
                    if let Ok(got) = ipam.allocate(&key(*pod), &[]) {
                        prop_assert_eq!(got.len(), 2);
                        prop_assert!(live.insert(*pod, got).is_none(), "allocated twice");
                    }
                }
                // DEL always counts as done for the runtime
                Step::Del(pod) => {
                    let _ = ipam.release(&key(*pod));
                    live.remove(pod);
                }
                Step::Gc(keep) => {
                    let _ = ipam.retain(|owner| keep.iter().any(|pod| key(*pod) == *owner));
                    live.retain(|pod, _| keep.contains(pod));
                }
                Step::Restart => {}
            }
            countdown.store(usize::MAX, Ordering::Relaxed);
            if matches!(step, Step::Restart) || fault.is_some() && dies >> (number % 64) & 1 == 1 {
                ipam = Ipam::open(config.clone()).unwrap();
                // as the agent does at start: attachments are the truth
                for (pod, addresses) in &live {
                    ipam.adopt(&key(*pod), addresses).unwrap();
                }
                ipam.retain(|owner| live.keys().any(|pod| key(*pod) == *owner)).unwrap();
            }
            let all: Vec<&IpAddr> = live.values().flatten().collect();
            let distinct: BTreeSet<&IpAddr> = all.iter().copied().collect();
            prop_assert_eq!(all.len(), distinct.len(), "an address twice: {:?}", live);
            let list = ipam.list().unwrap();
            for (pod, addresses) in &live {
                for address in addresses {
                    prop_assert_eq!(list.get(address), Some(&Use::Used(key(*pod))));
                }
            }
        }
        // nothing leaks: when all are gone, all can be had again
        ipam.retain(|_| false).unwrap();
        for pod in 100..112 {
            prop_assert!(ipam.allocate(&key(pod), &[]).is_ok());
        }
    }
}
