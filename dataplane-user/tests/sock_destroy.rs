//! Sockets that are connected to backends that have gone.
#![allow(clippy::unwrap_used, reason = "a test that cannot be set up fails")]

mod common;

use std::net::SocketAddr;
use std::path::Path;

use common::Place;
use common::plane::Plane;
use common::python::Python;
use dataplane_common::abi::{BePort, Service, protocol};
use dataplane_model::{BackendKey, Family, Protocol};
use dataplane_user::flow::destroy::{Report, Stale, destroy};
use dataplane_user::flow::stale;
use dataplane_user::flow::sweep::Sweep;

/// Where the servers listen; each network namespace has its own.
const SERVER: ([u8; 4], u16) = ([127, 0, 0, 1], 7999);

/// Service 1 (UDP), 2 (TCP) at 10.96.0.1:80 and 3 (UDP), 4 (TCP) at 10.96.0.2:80, all with the one server.
fn plane(place: &Place) -> Plane {
    let mut plane = Plane::new(place);
    plane.backend(1, SERVER.into(), Protocol::Udp);
    plane.backend(2, SERVER.into(), Protocol::Tcp);
    for (id, addr) in [(1, "10.96.0.1"), (3, "10.96.0.2")] {
        plane.serve(id, &[1], Service::default());
        plane.serve(id + 1, &[2], Service::default());
        plane.cluster_ip(addr, 80, Protocol::Udp, id);
        plane.cluster_ip(addr, 80, Protocol::Tcp, id + 1);
    }
    plane
}

/// A pod with the server, and sockets connected to it: a and b through the services, c (IPv6 socket) through the first,
/// d directly; the same with capitals for TCP.
fn pod(place: &Place) -> Python {
    let mut pod = Python::isolated(&place.config.cgroup_root);
    assert_eq!(pod.ask("__import__('os').system('ip link set lo up')"), "0");
    pod.ask("S.update(s=udp(), l=tcp())");
    pod.ask("[S[n].bind(('127.0.0.1', 7999)) for n in 'sl']");
    pod.ask("S['l'].listen(99)");
    pod.ask("S.update(a=udp(), b=udp(), c=udp(socket.AF_INET6), d=udp())");
    pod.ask("S.update(A=tcp(), B=tcp(), C=tcp(socket.AF_INET6), D=tcp())");
    for (name, addr, port) in [
        ("a", "10.96.0.1", 80),
        ("b", "10.96.0.2", 80),
        ("c", "::ffff:10.96.0.1", 80),
        ("d", "127.0.0.1", 7999),
    ] {
        for name in [name.to_owned(), name.to_uppercase()] {
            let connect = format!("S['{name}'].connect(('{addr}', {port}))");
            assert_eq!(pod.ask(&connect), "None", "{connect}");
        }
    }
    pod
}

/// Which of the pod's sockets are still connected.
fn connected(pod: &mut Python) -> String {
    pod.ask("''.join(n for n in 'abcdABCD' if name(lambda: S[n].send(b'x')) == 1)")
}

fn gone(protocol: u8, service: Option<u32>) -> [Stale; 1] {
    [Stale {
        addr: SERVER.into(),
        protocol,
        service,
    }]
}

fn done(destroyed: usize) -> Report {
    Report {
        destroyed,
        ..Report::default()
    }
}

#[test]
fn sockets_of_every_namespace_lose_the_backend_that_has_gone() {
    let place = Place::new();
    let plane = plane(&place);
    let translations = plane.kernel.translations().unwrap();
    let (mut one, mut two) = (pod(&place), pod(&place));
    let run = |stale: &[Stale]| destroy(Path::new("/"), stale, &translations).unwrap();
    assert_eq!(run(&[]), done(0));
    let elsewhere: SocketAddr = ([127, 0, 0, 1], 7998).into();
    let other = |addr| Stale {
        addr,
        protocol: protocol::UDP,
        service: None,
    };
    assert_eq!(
        run(&[other(elsewhere), other(([127, 0, 0, 2], 7999).into())]),
        done(0)
    );
    assert_eq!(run(&gone(protocol::UDP, Some(7))), done(0));
    assert_eq!(connected(&mut one), "abcdABCD");

    // one service has lost it, the other has not; who went there directly stays
    assert_eq!(run(&gone(protocol::UDP, Some(1))), done(4));
    assert_eq!(one.ask("S['a'].recv(9)"), "ECONNABORTED");
    assert_eq!(one.ask("S['a'].send(b'x')"), "EDESTADDRREQ");
    assert_eq!(connected(&mut one), "bdABCD");
    assert_eq!(connected(&mut two), "bdABCD");

    // nobody has it any more
    assert_eq!(run(&gone(protocol::UDP, None)), done(2));
    assert_eq!(connected(&mut one), "dABCD");
    assert_eq!(run(&gone(protocol::TCP, Some(2))), done(4));
    assert_eq!(connected(&mut one), "dBD");
    let all = [gone(protocol::UDP, None), gone(protocol::TCP, None)].concat();
    assert_eq!(run(&[all, vec![other(elsewhere)]].concat()), done(2));
    assert_eq!(connected(&mut two), "dD");

    // the sockets can be used again, and the accounts are right
    assert_eq!(one.ask("S['a'].connect(('10.96.0.1', 80))"), "None");
    assert_eq!(connected(&mut one), "adD");
    one.kill();
    two.kill();
    let stats = plane.kernel.stats().unwrap();
    for id in [1, 2] {
        let counts = stats.get(id).unwrap();
        assert_eq!(counts.connections, counts.closed, "{id}");
    }
}

#[test]
fn a_socket_that_no_process_has_open_is_left_alone() {
    let place = Place::new();
    let plane = plane(&place);
    let translations = plane.kernel.translations().unwrap();
    let mut pod = pod(&place);
    // on its way through a Unix socket: as the kernel's own sockets, it is in nobody's table of descriptors
    pod.ask("S.update(zip(('x', 'y'), socket.socketpair(socket.AF_UNIX)))");
    assert_eq!(pod.ask("socket.send_fds(S['x'], [b'x'], [S['a'].fileno()])"), "1");
    pod.ask("S.pop('a').close()");
    pod.ask("S.pop('c').close()");
    let report = destroy(Path::new("/"), &gone(protocol::UDP, Some(1)), &translations).unwrap();
    assert_eq!(report, Report { kernel: 1, ..done(0) });
    pod.ask("S.update(a=socket.socket(fileno=socket.recv_fds(S['y'], 9, 1)[1][0]))");
    assert_eq!(pod.ask("S['a'].send(b'x')"), "1");
    let report = destroy(Path::new("/"), &gone(protocol::UDP, Some(1)), &translations).unwrap();
    assert_eq!(report, done(1));
}

#[test]
fn connections_whose_end_nobody_saw_are_ended() {
    let place = Place::new();
    let plane = plane(&place);
    let mut translations = plane.kernel.translations().unwrap();
    let mut sweep = Sweep::new("/".into());
    let mut pod = pod(&place);
    let closed = |id| plane.kernel.stats().unwrap().get(id).unwrap().closed;
    assert_eq!(sweep.run(&mut translations).unwrap(), 0);
    // the server resets two connections; the application keeps the sockets
    pod.ask("[S['l'].accept()[0].setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, bytes([1,0,0,0,0,0,0,0])) for _ in 'AB']");
    assert_eq!(pod.ask("S['A'].recv(9)"), "ECONNRESET");
    assert_eq!(closed(2), 0);
    assert_eq!(sweep.run(&mut translations).unwrap(), 2);
    assert_eq!((closed(1), closed(2)), (0, 2));
    assert_eq!(sweep.run(&mut translations).unwrap(), 0);
    // once each, also when they are closed at last
    pod.ask("[S[n].close() for n in 'AB']");
    assert_eq!(closed(2), 2);
    // a UDP socket that is not connected any more ends when it is closed
    let run =
        |stale: &[Stale]| destroy(Path::new("/"), stale, &plane.kernel.translations().unwrap()).unwrap();
    assert_eq!(run(&gone(protocol::UDP, Some(3))), done(1));
    assert_eq!((sweep.run(&mut translations).unwrap(), closed(1)), (0, 0));
    pod.kill();
    assert_eq!((closed(1), closed(2)), (3, 3));
    assert_eq!(translations.visit(|_, _| {}).unwrap(), 0);

    // a socket that was never seen alive is left alone: it may be where nobody can look
    let mut pod = self::pod(&place);
    pod.ask("[S['l'].accept()[0].setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, bytes([1,0,0,0,0,0,0,0])) for _ in 'AB']");
    assert_eq!(pod.ask("S['A'].recv(9)"), "ECONNRESET");
    assert_eq!(sweep.run(&mut translations).unwrap(), 0);
    assert_eq!(translations.visit(|_, _| {}).unwrap(), 6);
}

#[test]
fn a_backend_that_leaves_its_service_is_looked_for_in_its_family() {
    let place = Place::new();
    let plane = plane(&place);
    let mut pod = pod(&place);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    let done = runtime.block_on(async {
        let (gone, queue) = tokio::sync::mpsc::unbounded_channel();
        let (told, mut hear) = tokio::sync::mpsc::unbounded_channel();
        let settings = stale::Settings {
            root: "/".into(),
            tcp: true,
        };
        tokio::spawn(stale::keep(
            settings,
            queue,
            plane.kernel.translations().unwrap(),
            plane.kernel.flows().unwrap(),
            move |done| told.send(done.clone()).unwrap_or_default(),
        ));
        let backend = BackendKey {
            addr: std::net::IpAddr::from(SERVER.0).into(),
            port: BePort::from_host(SERVER.1),
            protocol: Protocol::Udp,
        };
        gone.send(vec![stale::Gone {
            service: 1,
            backend,
            listed: false,
        }])
        .unwrap();
        // at once, and again for who chose it just before
        [hear.recv().await.unwrap(), hear.recv().await.unwrap()]
    });
    assert_eq!(done.each_ref().map(|done| done.family), [Family::V4; 2]);
    assert_eq!(done.each_ref().map(|done| done.sockets.destroyed), [2, 0]);
    assert_eq!(connected(&mut pod), "bdABCD");
    pod.kill();
}
