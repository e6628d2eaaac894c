//! Maps that get another size while they are in use.
#![allow(clippy::unwrap_used, reason = "a test that cannot be set up fails")]

mod common;

use std::net::{TcpListener, UdpSocket};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};

use common::python::Python;
use common::{Place, frontend, key, link_ids, service};
use dataplane_common::abi::Counter;
use dataplane_model::program::{Maps, Programmer};
use dataplane_model::{Family, Protocol};
use dataplane_user::kernel::{Kernel, KernelError, RealMaps, Sizes, Step};

const SMALL: Sizes = Sizes {
    services: 64,
    backends: 64,
    slots: 256,
    frontends: 64,
    sock_origins: 64,
    conntrack: 1024,
    nat: 1024,
    sock_connections: 64,
};
const LARGE: Sizes = Sizes {
    services: 1000,
    backends: 2000,
    slots: 3000,
    frontends: 4000,
    sock_origins: 5000,
    conntrack: 6000,
    nat: 7000,
    sock_connections: 5000,
};

fn asked(sizes: Sizes) -> [u32; 4] {
    [sizes.services, sizes.backends, sizes.slots, sizes.frontends]
}

fn found(programmer: &Programmer<RealMaps>) -> [u32; 4] {
    let capacity = programmer.maps().capacity();
    [
        capacity.services,
        capacity.backends,
        capacity.slots,
        capacity.frontends,
    ]
}

/// A TCP and a UDP service, a backend of each, and a client with a connection and an unconnected datagram socket.
struct Scene {
    // before the place, which it is a process of
    client: Python,
    listener: TcpListener,
    echo: UdpSocket,
    place: Place,
}

impl Scene {
    fn new() -> Self {
        let place = Place::new();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let echo = UdpSocket::bind("127.0.0.1:0").unwrap();
        let mut scene = Self {
            client: Python::in_cgroup(&place.config.cgroup_root),
            place,
            listener,
            echo,
        };
        let (_kernel, mut programmer) = scene.place.open();
        scene.reconcile(&mut programmer, 2);
        scene.client.ask("S.update(a=tcp(), u=udp())");
        let client = &mut scene.client;
        assert_eq!(client.ask("S['a'].connect(('10.96.0.1', 80))"), "None");
        scene.send();
        scene.receive("before anything");
        scene
    }

    /// What the agent does at its start; says how much was to be written.
    fn reconcile(&self, programmer: &mut Programmer<RealMaps>, writes_at_least: u64) {
        let tcp = service(
            frontend("10.96.0.1", 80, Protocol::Tcp),
            &[self.listener.local_addr().unwrap()],
        );
        let udp = service(
            frontend("10.96.0.1", 53, Protocol::Udp),
            &[self.echo.local_addr().unwrap()],
        );
        let changes = [
            (key("a", Protocol::Tcp, Family::V4), Some(tcp)),
            (key("b", Protocol::Udp, Family::V4), Some(udp)),
        ];
        let outcome = programmer.reconcile(changes, 0);
        assert!(outcome.failed.is_empty(), "{:?}", outcome.failed);
        assert_eq!(outcome.writes > 0, writes_at_least > 0, "{}", outcome.writes);
        assert!(!programmer.has_unclaimed());
    }

    fn send(&mut self) {
        assert_eq!(
            self.client.ask("S['u'].sendto(b'question', ('10.96.0.1', 53))"),
            "8"
        );
    }

    fn receive(&mut self, when: &str) {
        let mut buffer = [0; 16];
        let (n, peer) = self.echo.recv_from(&mut buffer).unwrap();
        self.echo.send_to(&buffer[..n], peer).unwrap();
        assert_eq!(
            self.client.ask("S['u'].recvfrom(99)[1]"),
            "('10.96.0.1', 53)",
            "{when}"
        );
    }

    /// All that was begun goes on, and new things begin.
    fn check(&mut self, when: &str) {
        let ask = |client: &mut Python, what| client.ask(what);
        assert_eq!(
            ask(&mut self.client, "tcp().connect(('10.96.0.1', 80))"),
            "None",
            "{when}"
        );
        assert_eq!(
            ask(&mut self.client, "S['a'].getpeername()"),
            "('10.96.0.1', 80)",
            "{when}"
        );
        assert_eq!(ask(&mut self.client, "S['a'].send(b'x')"), "1", "{when}");
        self.send();
        self.receive(when);
    }

    fn open(&mut self, sizes: Sizes) -> (Kernel, Programmer<RealMaps>) {
        self.place.config.sizes = sizes;
        self.place.open()
    }
}

#[test]
fn another_size_keeps_what_is_in_the_maps() {
    let mut scene = Scene::new();
    let (kernel, _) = scene.open(SMALL);
    let links = link_ids(&kernel);
    drop(kernel);
    // an answer that is on its way while the maps change
    scene.send();
    for (sizes, connections) in [(LARGE, 1), (SMALL, 2), (LARGE, 3)] {
        let (kernel, mut programmer) = scene.open(sizes);
        assert_eq!(found(&programmer), asked(sizes));
        assert_eq!(kernel.info().warnings, Vec::<String>::new());
        assert!(kernel.info().programs.iter().all(|program| program.replaced));
        assert_eq!(link_ids(&kernel), links, "the links are the same");
        let origins = scene.place.pin_dir().join("maps/SOCK_ORIGIN");
        let origins = aya::maps::MapInfo::from_pin(origins).unwrap();
        assert_eq!(origins.max_entries(), sizes.sock_origins);
        scene.receive("sent before");
        scene.reconcile(&mut programmer, 0);
        let view = programmer.services();
        let tcp = view
            .iter()
            .find(|s| s.key.as_ref().is_some_and(|k| k.protocol == Protocol::Tcp));
        let stats = kernel.stats().unwrap().get(tcp.unwrap().cluster[0].0).unwrap();
        assert_eq!(stats.connections, connections, "counts are kept");
        drop((kernel, programmer));
        scene.check("after");
        scene.send();
    }
    scene.receive("at the end");
    for dir in ["maps_next", "maps_ready"] {
        assert!(!scene.place.pin_dir().join(dir).exists());
    }
}

#[test]
fn a_map_never_gets_smaller_than_what_it_holds() {
    let mut scene = Scene::new();
    let (kernel, programmer) = scene.open(Sizes {
        slots: 1,
        frontends: 1,
        ..SMALL
    });
    let capacity = programmer.maps().capacity();
    assert_eq!((capacity.slots, capacity.frontends), (256, 64));
    let warnings = &kernel.info().warnings;
    assert_eq!(warnings.len(), 2, "{warnings:?}");
    assert!(
        warnings[0].contains("FRONTENDS") && warnings[0].contains("64 entries: 1 are asked for"),
        "{warnings:?}"
    );
    assert!(warnings[1].contains("SLOTS"), "{warnings:?}");
    drop((kernel, programmer));
    scene.check("nothing was lost");
    // of what can be done nothing is left undone
    let (kernel, programmer) = scene.open(Sizes {
        slots: 1,
        services: 10,
        ..SMALL
    });
    let capacity = programmer.maps().capacity();
    assert_eq!((capacity.slots, capacity.services), (256, 10));
    assert_eq!(kernel.info().warnings.len(), 1);
    drop((kernel, programmer));
    scene.check("smaller");
}

/// As if the agent were killed behind each of its steps, in turn.
#[test]
fn a_start_that_is_cut_short_anywhere_leaves_everything_working() {
    let mut scene = Scene::new();
    let mut cut_at = 0;
    let mut seen = Vec::new();
    loop {
        let sizes = if cut_at % 2 == 0 { LARGE } else { SMALL };
        scene.place.config.sizes = sizes;
        let mut n = 0;
        let result = catch_unwind(AssertUnwindSafe(|| {
            let mut observe = |step: Step| -> Result<(), KernelError> {
                if n == cut_at {
                    seen.push(step);
                    // not an error: nothing must be tidied up
                    std::panic::resume_unwind(Box::new("cut"));
                }
                n += 1;
                Ok(())
            };
            Kernel::open_observed(&scene.place.config, &mut observe)
        }));
        if let Ok(kernel) = result {
            kernel.unwrap();
            break;
        }
        scene.check(&format!("cut behind step {cut_at}, {:?}", seen.last()));
        // every other time the next start asks for the size of before
        let sizes = match (cut_at / 2 % 2, sizes == LARGE) {
            (0, true) | (1, false) => LARGE,
            _ => SMALL,
        };
        let (kernel, mut programmer) = scene.open(sizes);
        assert_eq!(found(&programmer), asked(sizes), "cut behind step {cut_at}");
        scene.reconcile(&mut programmer, 0);
        drop((kernel, programmer));
        scene.check(&format!("started again after step {cut_at}"));
        // the next one is to have something to change
        drop(scene.open(if cut_at % 2 == 0 { LARGE } else { SMALL }));
        cut_at += 1;
    }
    for step in [
        Step::Created,
        Step::Loaded,
        Step::Copied,
        Step::Ready,
        Step::Attached,
        Step::Moved,
        Step::Done,
    ] {
        assert!(seen.contains(&step), "{step:?} never came: {seen:?}");
    }
}

/// What programs write between any two steps is found by those that come after, also when the next start has to go on.
#[test]
fn what_happens_between_two_steps_is_kept() {
    let mut scene = Scene::new();
    for cut in [None, Some(Step::Ready), Some(Step::Attached)] {
        scene.place.config.sizes = LARGE;
        let mut asked = Vec::new();
        let (client, echo, config) = (&mut scene.client, &scene.echo, &scene.place.config);
        let result = catch_unwind(AssertUnwindSafe(|| {
            let mut observe = |step: Step| -> Result<(), KernelError> {
                let n = asked.len();
                let ask =
                    format!("[S.update(s{n}=udp()), S['s{n}'].sendto(b'question', ('10.96.0.1', 53))][1]");
                assert_eq!(client.ask(&ask), "8");
                let mut buffer = [0; 16];
                asked.push(echo.recv_from(&mut buffer).unwrap().1);
                if cut == Some(step) {
                    std::panic::resume_unwind(Box::new("cut"));
                }
                Ok(())
            };
            Kernel::open_observed(config, &mut observe)
        }));
        assert_eq!(result.is_err(), cut.is_some());
        if cut.is_some() {
            drop(scene.place.open());
        }
        assert!(asked.len() > 2, "{asked:?}");
        for (n, peer) in asked.iter().enumerate() {
            scene.echo.send_to(b"answer", peer).unwrap();
            let found = scene.client.ask(&format!("S['s{n}'].recvfrom(99)[1]"));
            assert_eq!(found, "('10.96.0.1', 53)", "asked behind step {n}, {cut:?}");
        }
        drop(scene.open(SMALL));
    }
}

/// What ended with an error has left nothing that takes memory.
#[test]
fn a_start_that_fails_takes_the_new_maps_with_it() {
    let mut scene = Scene::new();
    scene.place.config.sizes = LARGE;
    let mut fail = |step| match step {
        Step::Loaded => Err(KernelError::Missing("nothing".into())),
        _ => Ok(()),
    };
    Kernel::open_observed(&scene.place.config, &mut fail).unwrap_err();
    assert!(!scene.place.pin_dir().join("maps_next").exists());
    scene.check("after the failure");
}

const LOAD: &str = r"[(lambda s: (name(lambda: s.connect(('10.96.0.1', 80))), s.close())[0])(tcp()) for _ in range(200)].count(None)";

/// Ends a thread that waits for the flag, also when the one that sets it fails.
struct SetOnDrop<'a>(&'a AtomicBool);

impl Drop for SetOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[test]
fn connections_go_on_while_maps_change_their_size() {
    let mut scene = Scene::new();
    let (stop, done) = (AtomicBool::new(false), AtomicBool::new(false));
    let cgroup = scene.place.config.cgroup_root.clone();
    let listener = scene.listener.try_clone().unwrap();
    listener.set_nonblocking(true).unwrap();
    let total = std::thread::scope(|scope| {
        let accept = scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                if listener.accept().is_err() {
                    std::thread::yield_now();
                }
            }
        });
        let load = scope.spawn(|| {
            // the last connections wait to be accepted
            let _done = SetOnDrop(&done);
            let mut client = Python::in_cgroup(&cgroup);
            let mut total = 0;
            while !stop.load(Ordering::Relaxed) {
                let good: u32 = client.ask(LOAD).parse().unwrap();
                total += good;
                if good < 200 {
                    return Err((total, good));
                }
            }
            Ok(total)
        });
        let stopper = SetOnDrop(&stop);
        for round in 0..20 {
            let sizes = if round % 2 == 0 { LARGE } else { SMALL };
            let (kernel, programmer) = scene.open(sizes);
            assert_eq!(found(&programmer), asked(sizes));
            assert_eq!(kernel.info().warnings, Vec::<String>::new());
        }
        drop(stopper);
        let total = load.join().unwrap();
        accept.join().unwrap();
        total
    });
    let total = total.unwrap();
    assert!(total > 1000, "only {total} connections");
    let (kernel, mut programmer) = scene.open(SMALL);
    scene.reconcile(&mut programmer, 0);
    let refused: u64 = kernel
        .counters()
        .unwrap()
        .into_iter()
        .enumerate()
        .filter(|(index, _)| *index != Counter::Connected as usize)
        .filter(|(_, (name, _))| !name.starts_with("datagram") && !name.starts_with("repl"))
        .map(|(_, (_, n))| n)
        .sum();
    assert_eq!(refused, 0, "{:?}", kernel.counters());
}
