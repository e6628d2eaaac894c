//! Taking over what an earlier agent left, refusing what is foreign, removing everything.

mod common;

use std::net::TcpListener;

use common::python::Python;
use common::{Place, frontend, key, link_ids, service};
use dataplane_common::abi::{Counter, Slot};
use dataplane_model::program::{Maps, Write};
use dataplane_model::{Family, Protocol};
use dataplane_user::kernel::{Kernel, KernelError, MAPS, MapSpec, RealMaps, cleanup};

#[test]
fn a_restart_replaces_programs_and_keeps_everything_else() {
    let place = Place::new();
    let (kernel, mut programmer) = place.open();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let backend = listener.local_addr().unwrap();
    let front = frontend("10.96.0.1", 80, Protocol::Tcp);
    let change = [(
        key("a", Protocol::Tcp, Family::V4),
        Some(service(front, &[backend])),
    )];
    assert!(programmer.reconcile(change.clone(), 0).failed.is_empty());
    let mut client = Python::in_cgroup(&place.config.cgroup_root);
    client.ask("S.update(a=tcp())");
    assert_eq!(client.ask("S['a'].connect(('10.96.0.1', 80))"), "None");
    let before: Vec<(String, u32)> = kernel
        .info()
        .programs
        .iter()
        .map(|p| (p.name.clone(), p.id))
        .collect();
    assert!(kernel.info().programs.iter().all(|p| !p.replaced));
    drop((kernel, programmer));

    // without an agent everything goes on
    assert_eq!(client.ask("tcp().connect(('10.96.0.1', 80))"), "None");

    let (kernel, mut programmer) = place.open();
    for (program, (name, id)) in kernel.info().programs.iter().zip(&before) {
        assert_eq!(&program.name, name);
        assert!(program.replaced && program.id != *id, "{program:?}");
    }
    assert_eq!(kernel.info().programs.len(), before.len());
    assert_eq!(client.ask("S['a'].getpeername()"), "('10.96.0.1', 80)");
    let outcome = programmer.reconcile(change, 0);
    assert_eq!(
        (outcome.applied, outcome.writes),
        (1, 0),
        "what is right is not written again"
    );
    assert!(!programmer.has_unclaimed());
    // the connection from before is still counted
    let id = programmer.services()[0].cluster[0].0;
    let stats = kernel.stats().unwrap();
    assert_eq!(stats.get(id).unwrap().connections, 2);
    client.ask("S['a'].close()");
    assert_eq!(stats.get(id).unwrap().closed, 2);
}

/// To another build of one ABI version and back: the programs differ, all else is the same.
#[test]
fn an_upgrade_and_a_downgrade_replace_programs_below_their_links() {
    let mut place = Place::new();
    let (kernel, mut programmer) = place.open();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let echo = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    let changes = [
        (
            key("a", Protocol::Tcp, Family::V4),
            Some(service(
                frontend("10.96.0.1", 80, Protocol::Tcp),
                &[listener.local_addr().unwrap()],
            )),
        ),
        (
            key("b", Protocol::Udp, Family::V4),
            Some(service(
                frontend("10.96.0.1", 53, Protocol::Udp),
                &[echo.local_addr().unwrap()],
            )),
        ),
    ];
    assert!(programmer.reconcile(changes.clone(), 0).failed.is_empty());
    let map_ids = |place: &Place| {
        let id = |spec: &MapSpec| {
            let path = place.pin_dir().join("maps").join(spec.name);
            aya::maps::MapInfo::from_pin(path).unwrap().id()
        };
        MAPS.iter().map(id).collect::<Vec<u32>>()
    };
    let instructions = |kernel: &Kernel| {
        let all = kernel.info().programs.iter().map(|p| p.verified_instructions);
        all.sum::<u32>()
    };
    let (links, maps, size) = (link_ids(&kernel), map_ids(&place), instructions(&kernel));
    drop((kernel, programmer));
    let mut client = Python::in_cgroup(&place.config.cgroup_root);
    client.ask("S.update(a=tcp(), u=udp())");
    assert_eq!(client.ask("S['a'].connect(('10.96.0.1', 80))"), "None");
    let mut sent = 0;
    // what another build has another constant in, a branch of each program: the kernel gets another program
    for (log_level, other) in [(5, true), (0, false), (5, true)] {
        assert_eq!(client.ask("S['u'].sendto(b'question', ('10.96.0.1', 53))"), "8");
        sent += 1;
        place.config.ebpf_log_level = log_level;
        let (kernel, mut programmer) = place.open();
        assert_eq!(instructions(&kernel) != size, other, "log level {log_level}");
        assert!(kernel.info().programs.iter().all(|p| p.replaced));
        assert_eq!(link_ids(&kernel), links);
        assert_eq!(map_ids(&place), maps);
        let outcome = programmer.reconcile(changes.clone(), 0);
        assert_eq!((outcome.applied, outcome.writes), (2, 0));
        // an answer to the build of before
        let peer = echo.recv_from(&mut [0; 16]).unwrap().1;
        echo.send_to(b"answer", peer).unwrap();
        assert_eq!(client.ask("S['u'].recvfrom(99)[1]"), "('10.96.0.1', 53)");
        assert_eq!(client.ask("S['a'].getpeername()"), "('10.96.0.1', 80)");
        assert_eq!(client.ask("tcp().connect(('10.96.0.1', 80))"), "None");
        let services = programmer.services();
        let total = services
            .iter()
            .map(|s| kernel.stats().unwrap().get(s.cluster[0].0).unwrap())
            .fold((0, 0), |sum, s| (sum.0 + s.connections, sum.1 + s.datagrams));
        assert_eq!(total, (1 + sent, sent));
    }
}

#[test]
fn two_kernels_do_not_see_each_other() {
    let (one, two) = (Place::new(), Place::new());
    let (_kernel_one, mut programmer) = one.open();
    let (kernel_two, _) = two.open();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let desired = service(
        frontend("127.66.0.1", 9, Protocol::Tcp),
        &[listener.local_addr().unwrap()],
    );
    assert!(
        programmer
            .reconcile([(key("a", Protocol::Tcp, Family::V4), Some(desired))], 0)
            .failed
            .is_empty()
    );
    assert_eq!(
        Python::in_cgroup(&one.config.cgroup_root).ask("tcp().connect(('127.66.0.1', 9))"),
        "None"
    );
    // the other node has no such service: the address is what it is without Beeline, a closed port
    assert_eq!(
        Python::in_cgroup(&two.config.cgroup_root).ask("tcp().connect(('127.66.0.1', 9))"),
        "ECONNREFUSED"
    );
    assert!(kernel_two.counters().unwrap().iter().all(|(_, n)| *n == 0));
}

#[test]
fn a_pin_of_another_shape_is_refused() {
    let place = Place::new();
    let (kernel, _) = place.open();
    drop(kernel);
    let maps = place.pin_dir().join("maps");
    // COUNTERS is a per-CPU array of u64: not what FRONTENDS should be
    std::fs::remove_file(maps.join("FRONTENDS")).unwrap();
    let data = aya::maps::MapData::from_pin(maps.join("COUNTERS")).unwrap();
    data.pin(maps.join("FRONTENDS")).unwrap();
    let error = Kernel::open(&place.config).unwrap_err();
    assert!(
        matches!(error, KernelError::Shape { field: "type", .. }),
        "{error}"
    );
    assert!(error.to_string().contains("FRONTENDS"), "{error}");
}

#[test]
fn maps_in_the_kernel_have_the_sizes_of_the_rust_types() {
    let place = Place::new();
    let (_kernel, _) = place.open();
    for spec in MAPS {
        let info = aya::maps::MapInfo::from_pin(place.pin_dir().join("maps").join(spec.name)).unwrap();
        let found = (
            info.map_type().unwrap(),
            info.key_size(),
            info.value_size(),
            info.map_flags(),
        );
        assert_eq!(
            found,
            (spec.kind, spec.key_size, spec.value_size, spec.flags),
            "{}",
            spec.name
        );
    }
}

/// What user space must never write, written: the programs refuse, count, and go on.
#[test]
fn broken_maps_are_refused_and_counted() {
    let place = Place::new();
    let (kernel, mut programmer) = place.open();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let front = frontend("10.96.0.1", 80, Protocol::Tcp);
    let change = [(
        key("a", Protocol::Tcp, Family::V4),
        Some(service(front, &[listener.local_addr().unwrap()])),
    )];
    assert!(programmer.reconcile(change, 0).failed.is_empty());
    let (service_id, backend_id) = (programmer.services()[0].id, programmer.services()[0].cluster[0].0);
    let base = programmer.maps().service(service_id).unwrap().cluster.base();
    let row = programmer.maps().backend(backend_id).unwrap();
    let frontends = programmer.maps().frontends().unwrap();
    let (_, value) = *frontends.iter().find(|(key, _)| *key == front).unwrap();
    let mut client = Python::in_cgroup(&place.config.cgroup_root);
    let mut expect = |programmer: &mut dataplane_model::program::Programmer<RealMaps>,
                      write: Write<'_>,
                      counter: Counter| {
        programmer.maps_mut().write(&write).unwrap();
        let count = |counter: Counter| kernel.counters().unwrap()[counter as usize].1;
        let before = count(counter);
        assert_eq!(
            client.ask("tcp().connect(('10.96.0.1', 80))"),
            "ECONNREFUSED",
            "{counter:?}"
        );
        assert_eq!(count(counter), before + 1, "{counter:?}");
    };
    let foreign = [Slot::new(backend_id, service_id + 1)];
    expect(
        &mut programmer,
        Write::Slots {
            base,
            slots: &foreign,
        },
        Counter::ForeignSlot,
    );
    let nobody = [Slot::new(1 << 20, service_id)];
    expect(
        &mut programmer,
        Write::Slots { base, slots: &nobody },
        Counter::BadBackend,
    );
    let right = [Slot::new(backend_id, service_id)];
    programmer
        .maps_mut()
        .write(&Write::Slots { base, slots: &right })
        .unwrap();
    expect(
        &mut programmer,
        Write::BackendState {
            id: backend_id,
            state: 0,
        },
        Counter::BadBackend,
    );
    programmer
        .maps_mut()
        .write(&Write::Backend { id: backend_id, row })
        .unwrap();
    let mut lost = value;
    lost.service = 1 << 20;
    expect(
        &mut programmer,
        Write::PutFrontend {
            key: front,
            value: lost,
        },
        Counter::BadService,
    );
    programmer
        .maps_mut()
        .write(&Write::PutFrontend { key: front, value })
        .unwrap();
    assert_eq!(
        client.ask("tcp().connect(('10.96.0.1', 80))"),
        "None",
        "mended, it works again"
    );
}

#[test]
fn cleanup_leaves_nothing_attached() {
    let place = Place::new();
    let (kernel, _) = place.open();
    let ids: Vec<u32> = kernel.info().programs.iter().map(|p| p.id).collect();
    drop(kernel);
    let alive = |ids: &[u32]| {
        aya::programs::loaded_programs()
            .filter_map(Result::ok)
            .filter(|p| ids.contains(&p.id()))
            .count()
    };
    assert_eq!(alive(&ids), ids.len(), "without the agent they stay");
    let removed = cleanup(&place.config.bpffs_root).unwrap();
    assert_eq!(removed.len(), MAPS.len() + ids.len() + 1, "{removed:?}");
    assert!(!place.config.bpffs_root.exists());
    // the kernel frees programs after a grace period
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(10);
    while alive(&ids) > 0 {
        assert!(std::time::Instant::now() < deadline, "programs are still there");
        std::thread::yield_now();
    }
    assert_eq!(
        cleanup(&place.config.bpffs_root).unwrap(),
        Vec::<String>::new(),
        "a second time finds nothing"
    );
}

/// A program that grew by more than a tenth needs a reason, and a new number here.
#[test]
fn programs_stay_within_their_budget() {
    let place = Place::new();
    let (kernel, _) = place.open();
    let budget = include_str!("../../dataplane-ebpf/budget.txt");
    let lines = budget.lines().filter(|line| !line.starts_with('#'));
    let budget: std::collections::BTreeMap<&str, u32> = lines
        .filter_map(|line| line.split_once(' '))
        .map(|(name, n)| (name, n.trim().parse().unwrap()))
        .collect();
    let used: std::collections::BTreeMap<&str, u32> = kernel
        .info()
        .programs
        .iter()
        .chain(&kernel.info().packet_programs)
        .map(|p| (p.name.as_str(), p.verified_instructions))
        .collect();
    let within =
        |(name, n): (&&str, &u32)| *n > 0 && budget.get(name).is_some_and(|allowed| n * 10 <= allowed * 11);
    assert!(
        budget.len() == used.len() && used.iter().all(within),
        "verified {used:#?}, budget {budget:#?}"
    );
}
