//! The socket programs with real sockets, in a cgroup of the test's own, on loopback addresses.
#![allow(clippy::unwrap_used, reason = "a test that cannot be set up fails")]

mod common;

use std::collections::BTreeMap;
use std::net::{SocketAddr, TcpListener, UdpSocket};

use common::python::Python;
use common::{Place, frontend, key, service};
use dataplane_model::{Family, Protocol};
use dataplane_user::kernel::Kernel;

fn counter(kernel: &Kernel, name: &str) -> u64 {
    kernel
        .counters()
        .unwrap()
        .into_iter()
        .find(|(n, _)| *n == name)
        .unwrap()
        .1
}

/// A TCP server that keeps what it accepts open.
fn tcp_server(addr: &str) -> SocketAddr {
    let listener = TcpListener::bind((addr, 0)).unwrap();
    let local = listener.local_addr().unwrap();
    std::thread::spawn(move || listener.incoming().map_while(Result::ok).collect::<Vec<_>>());
    local
}

/// A UDP server that answers with its own port.
fn udp_server(addr: &str) -> SocketAddr {
    let socket = UdpSocket::bind((addr, 0)).unwrap();
    let local = socket.local_addr().unwrap();
    std::thread::spawn(move || {
        let mut buffer = [0; 2048];
        while let Ok((_, from)) = socket.recv_from(&mut buffer) {
            let _ = socket.send_to(local.port().to_string().as_bytes(), from);
        }
    });
    local
}

#[test]
fn tcp_reaches_a_backend_and_sees_the_service() {
    let place = Place::new();
    let (kernel, mut programmer) = place.open();
    let (v4, v6) = (tcp_server("127.0.0.1"), tcp_server("::1"));
    let changes = [
        (
            key("a", Protocol::Tcp, Family::V4),
            Some(service(frontend("10.96.0.1", 80, Protocol::Tcp), &[v4])),
        ),
        (
            key("a", Protocol::Tcp, Family::V6),
            Some(service(frontend("fd00:10:96::1", 80, Protocol::Tcp), &[v6])),
        ),
    ];
    assert!(programmer.reconcile(changes, 0).failed.is_empty());
    let mut client = Python::in_cgroup(&place.config.cgroup_root);

    client.ask("S.update(a=tcp())");
    assert_eq!(client.ask("S['a'].connect(('10.96.0.1', 80))"), "None");
    assert_eq!(client.ask("S['a'].getpeername()"), "('10.96.0.1', 80)");
    client.ask("S.update(b=tcp(socket.AF_INET6))");
    assert_eq!(client.ask("S['b'].connect(('fd00:10:96::1', 80))"), "None");
    assert_eq!(client.ask("S['b'].getpeername()[:2]"), "('fd00:10:96::1', 80)");
    // an IPv6 socket to an IPv4 frontend, as Java and Go do it
    client.ask("S.update(c=tcp(socket.AF_INET6))");
    assert_eq!(client.ask("S['c'].connect(('::ffff:10.96.0.1', 80))"), "None");
    assert_eq!(client.ask("S['c'].getpeername()[:2]"), "('::ffff:10.96.0.1', 80)");
    assert_eq!(counter(&kernel, "connected"), 3);

    // what is no frontend is left alone: another port, another protocol, the backend's own address
    assert_eq!(
        client.ask(&format!("tcp().connect(('127.0.0.1', {}))", v4.port())),
        "None"
    );
    client.ask("S.update(u=udp())");
    assert_eq!(
        client.ask("S['u'].connect(('10.96.0.1', 80))"),
        client.ask("S['u'].connect(('10.96.0.1', 81))")
    );
    assert_eq!(counter(&kernel, "connected"), 3);

    // connections are counted open until they are closed
    let stats = kernel.stats().unwrap();
    let of = |addr: SocketAddr| {
        let services = programmer.services();
        let all = services.iter().flat_map(|s| &s.cluster);
        let id = all
            .into_iter()
            .find(|(_, m)| m.backend.port.to_host() == addr.port())
            .unwrap()
            .0;
        let stats = stats.get(id).unwrap();
        (stats.connections, stats.closed)
    };
    assert_eq!((of(v4), of(v6)), ((2, 0), (1, 0)));
    client.ask("S['a'].close()");
    assert_eq!(of(v4), (2, 1));
    client.kill();
    // the process is gone when it has been waited for, and its sockets with it
    assert_eq!((of(v4), of(v6)), ((2, 2), (1, 1)));
}

#[test]
fn a_service_without_backends_refuses() {
    let place = Place::new();
    let (kernel, mut programmer) = place.open();
    let empty = |addr: &str, protocol| Some(service(frontend(addr, 80, protocol), &[]));
    let changes = [
        (
            key("a", Protocol::Tcp, Family::V4),
            empty("10.96.0.1", Protocol::Tcp),
        ),
        (
            key("a", Protocol::Tcp, Family::V6),
            empty("fd00:10:96::1", Protocol::Tcp),
        ),
        (
            key("a", Protocol::Udp, Family::V4),
            empty("10.96.0.1", Protocol::Udp),
        ),
        (
            key("a", Protocol::Udp, Family::V6),
            empty("fd00:10:96::1", Protocol::Udp),
        ),
    ];
    assert!(programmer.reconcile(changes, 0).failed.is_empty());
    let mut client = Python::in_cgroup(&place.config.cgroup_root);
    for expression in [
        "tcp().connect(('10.96.0.1', 80))",
        "tcp(socket.AF_INET6).connect(('fd00:10:96::1', 80))",
        "udp().connect(('10.96.0.1', 80))",
        "udp().sendto(b'x', ('10.96.0.1', 80))",
        "udp(socket.AF_INET6).sendto(b'x', ('fd00:10:96::1', 80))",
    ] {
        assert_eq!(client.ask(expression), "ECONNREFUSED", "{expression}");
    }
    assert_eq!(counter(&kernel, "no_backend"), 5);
}

#[test]
fn udp_replies_come_from_the_service() {
    let place = Place::new();
    let (kernel, mut programmer) = place.open();
    for (host, front, family, af) in [
        ("127.0.0.1", "10.96.0.1", Family::V4, "socket.AF_INET"),
        ("::1", "fd00:10:96::1", Family::V6, "socket.AF_INET6"),
    ] {
        let servers = [udp_server(host), udp_server(host), udp_server(host)];
        let desired = service(frontend(front, 53, Protocol::Udp), &servers);
        assert!(
            programmer
                .reconcile([(key("dns", Protocol::Udp, family), Some(desired))], 0)
                .failed
                .is_empty()
        );
        let mut client = Python::in_cgroup(&place.config.cgroup_root);

        // unconnected: the reply's source is the frontend, and the backend stays the same for the socket
        client.ask(&format!("S.update(a=udp({af}))"));
        let mut ports = BTreeMap::new();
        for _ in 0..20 {
            assert_eq!(client.ask(&format!("S['a'].sendto(b'x', ('{front}', 53))")), "1");
            let answer = client.ask("(lambda r: (int(r[0]),) + r[1][:2])(S['a'].recvfrom(99))");
            let (port, source) = answer.trim_matches(['(', ')']).split_once(", ").unwrap();
            assert_eq!(source, format!("'{front}', 53"));
            *ports.entry(port.to_string()).or_insert(0) += 1;
        }
        assert_eq!(ports.len(), 1, "{ports:?}");

        // when its backend leaves, the same socket goes on with another one
        let used: u16 = ports.keys().next().unwrap().parse().unwrap();
        let rest: Vec<SocketAddr> = servers.into_iter().filter(|s| s.port() != used).collect();
        let desired = service(frontend(front, 53, Protocol::Udp), &rest);
        assert!(
            programmer
                .reconcile([(key("dns", Protocol::Udp, family), Some(desired))], 0)
                .failed
                .is_empty()
        );
        assert_eq!(client.ask(&format!("S['a'].sendto(b'x', ('{front}', 53))")), "1");
        let answer = client.ask("(lambda r: (int(r[0]),) + r[1][:2])(S['a'].recvfrom(99))");
        assert!(
            rest.iter()
                .any(|s| answer.starts_with(&format!("({},", s.port()))),
            "{answer}"
        );

        // a socket that talks to a backend directly sees the backend
        client.ask(&format!("S.update(c=udp({af}))"));
        client.ask(&format!("S['c'].sendto(b'x', ('{host}', {}))", rest[0].port()));
        assert_eq!(
            client.ask("S['c'].recvfrom(99)[1][:2]"),
            format!("('{host}', {})", rest[0].port())
        );

        // connected: translated once; sending costs no program run. Last, because the burst may fill its backend's queue
        client.ask(&format!("S.update(b=udp({af}))"));
        assert_eq!(client.ask(&format!("S['b'].connect(('{front}', 53))")), "None");
        assert_eq!(client.ask("S['b'].getpeername()[:2]"), format!("('{front}', 53)"));
        let before = counter(&kernel, "datagram_translated");
        assert_eq!(client.ask("sum(S['b'].send(b'x') for _ in range(1000))"), "1000");
        assert_eq!(counter(&kernel, "datagram_translated"), before);
        assert_eq!(
            client.ask("S['b'].recvfrom(99)[1][:2]"),
            format!("('{front}', 53)")
        );
    }
}

#[test]
fn connections_are_spread_over_backends() {
    let place = Place::new();
    let (kernel, mut programmer) = place.open();
    let servers = [
        tcp_server("127.0.0.1"),
        tcp_server("127.0.0.1"),
        tcp_server("127.0.0.1"),
    ];
    let desired = service(frontend("10.96.0.1", 80, Protocol::Tcp), &servers);
    assert!(
        programmer
            .reconcile([(key("a", Protocol::Tcp, Family::V4), Some(desired))], 0)
            .failed
            .is_empty()
    );
    let mut client = Python::in_cgroup(&place.config.cgroup_root);
    let done = client.ask("[tcp().connect(('10.96.0.1', 80)) for _ in range(600)].count(None)");
    assert_eq!(done, "600");
    let stats = kernel.stats().unwrap();
    let services = programmer.services();
    let counts: Vec<u64> = services[0]
        .cluster
        .iter()
        .map(|(id, _)| stats.get(*id).unwrap().connections)
        .collect();
    assert_eq!(counts.iter().sum::<u64>(), 600);
    // chi-square with 2 degrees of freedom: above 27.6 once in a million
    let chi: f64 = counts.iter().map(|c| (*c as f64 - 200.0).powi(2) / 200.0).sum();
    assert!(chi < 27.6, "{counts:?}");
}

#[test]
fn a_socket_can_be_reconnected() {
    let place = Place::new();
    let (kernel, mut programmer) = place.open();
    let server = udp_server("127.0.0.1");
    let desired = service(frontend("10.96.0.1", 53, Protocol::Udp), &[server]);
    assert!(
        programmer
            .reconcile([(key("a", Protocol::Udp, Family::V4), Some(desired))], 0)
            .failed
            .is_empty()
    );
    let mut client = Python::in_cgroup(&place.config.cgroup_root);
    client.ask("S.update(a=udp())");
    client.ask("S['a'].connect(('10.96.0.1', 53))");
    client.ask("S['a'].connect(('10.96.0.1', 53))");
    let id = programmer.services()[0].cluster[0].0;
    let counts = || {
        let stats = kernel.stats().unwrap().get(id).unwrap();
        (stats.connections, stats.closed)
    };
    assert_eq!(counts(), (2, 1));
    // straight to the backend: the old connection is over, and its name is its own
    client.ask(&format!("S['a'].connect(('127.0.0.1', {}))", server.port()));
    assert_eq!(counts(), (2, 2));
    assert_eq!(
        client.ask("S['a'].getpeername()"),
        format!("('127.0.0.1', {})", server.port())
    );
    client.kill();
    assert_eq!(counts(), (2, 2));
}
