//! Where sockets find services besides the ClusterIP.
#![allow(clippy::unwrap_used, reason = "a test that cannot be set up fails")]

mod common;

use std::net::TcpListener;

use common::plane::Plane;
use common::python::Python;
use common::{Place, frontend};
use dataplane_common::abi::{
    Addr, Service, SetWord, config_flag, frontend_kind, node_addr_flag, service_flag,
};
use dataplane_model::Protocol;
use dataplane_user::kernel::range;

const V6: &str = "socket.AF_INET6";

fn addr(text: &str) -> Addr {
    text.parse::<std::net::IpAddr>().unwrap().into()
}

/// A plane with service 1 (IPv4, backend 1) and service 2 (IPv6, backend 2), and what listens behind them.
fn two_families(place: &Place) -> (Plane, [TcpListener; 2]) {
    let mut plane = Plane::new(place);
    let v4 = TcpListener::bind("127.0.0.1:0").unwrap();
    let v6 = TcpListener::bind("[::1]:0").unwrap();
    plane.backend(1, v4.local_addr().unwrap(), Protocol::Tcp);
    plane.backend(2, v6.local_addr().unwrap(), Protocol::Tcp);
    plane.serve(1, &[1], Service::default());
    plane.serve(2, &[2], Service::default());
    plane.node_port("0.0.0.0", 30001, Protocol::Tcp, 1);
    plane.node_port("::", 30001, Protocol::Tcp, 2);
    (plane, [v4, v6])
}

#[test]
fn node_ports_are_reached_at_the_nodes_addresses_only() {
    let place = Place::new();
    let (mut plane, _listeners) = two_families(&place);
    let ports = [
        ("127.7.7.1", node_addr_flag::NODE_PORTS),
        ("fd00:7::1", node_addr_flag::NODE_PORTS),
        ("127.7.7.2", 0),
    ];
    plane
        .node
        .set_addrs(&ports.map(|(a, f)| (addr(a), f)).into())
        .unwrap();
    let mut client = Python::in_cgroup(&place.config.cgroup_root);
    client.ask("S.update(a=tcp())");
    assert_eq!(client.ask("S['a'].connect(('127.7.7.1', 30001))"), "None");
    assert_eq!(client.ask("S['a'].getpeername()"), "('127.7.7.1', 30001)");
    client.ask(&format!("S.update(b=tcp({V6}))"));
    assert_eq!(client.ask("S['b'].connect(('fd00:7::1', 30001))"), "None");
    assert_eq!(client.ask("S['b'].getpeername()[:2]"), "('fd00:7::1', 30001)");
    client.ask(&format!("S.update(c=tcp({V6}))"));
    assert_eq!(client.ask("S['c'].connect(('::ffff:127.7.7.1', 30001))"), "None");
    assert_eq!(
        client.ask("S['c'].getpeername()[:2]"),
        "('::ffff:127.7.7.1', 30001)"
    );
    assert_eq!((plane.connections(1), plane.connections(2)), (2, 1));

    // an address of the node without node ports, a foreign address, another port, another protocol
    for target in ["'127.7.7.2', 30001", "'127.7.7.3', 30001", "'127.7.7.1', 30002"] {
        assert_eq!(
            client.ask(&format!("tcp().connect(({target}))")),
            "ECONNREFUSED",
            "{target}"
        );
    }
    client.ask("udp().connect(('127.7.7.1', 30001))");
    assert_eq!((plane.connections(1), plane.connections(2)), (2, 1));
    assert_eq!(plane.counter("unknown_port"), 0, "these are no service addresses");

    // addresses come and go while the programs run
    plane
        .node
        .set_addrs(&[(addr("127.7.7.2"), node_addr_flag::NODE_PORTS)].into())
        .unwrap();
    assert_eq!(client.ask("tcp().connect(('127.7.7.2', 30001))"), "None");
    assert_eq!(client.ask("tcp().connect(('127.7.7.1', 30001))"), "ECONNREFUSED");
}

#[test]
fn node_ports_at_localhost_are_the_hosts_alone() {
    let place = Place::new();
    let (mut plane, _listeners) = two_families(&place);
    let both = [
        (addr("127.0.0.1"), node_addr_flag::LOOPBACK),
        (addr("::1"), node_addr_flag::LOOPBACK),
    ];
    plane.node.set_addrs(&both.into()).unwrap();
    let mut host = Python::in_cgroup(&place.config.cgroup_root);
    let v4 = "tcp().connect(('127.0.0.1', 30001))";
    let v6 = "tcp(socket.AF_INET6).connect(('::1', 30001))";
    assert_eq!([v4, v6].map(|e| host.ask(e)), ["ECONNREFUSED"; 2], "switched off");
    plane.configure(|c| c.flags |= config_flag::LOCALHOST_NODE_PORTS);
    assert_eq!([v4, v6].map(|e| host.ask(e)), ["None"; 2]);
    host.ask("S.update(a=tcp())");
    host.ask("S['a'].connect(('127.0.0.1', 30001))");
    assert_eq!(host.ask("S['a'].getpeername()"), "('127.0.0.1', 30001)");
    assert_eq!(plane.counter("connected"), 3);

    let mut pod = Python::isolated(&place.config.cgroup_root);
    // its loopback device is down
    assert_eq!(pod.ask(v4), "ENETUNREACH");
    assert_eq!(plane.counter("connected"), 3, "a pod's localhost is its own");
    plane
        .node
        .set_addrs(&[(addr("127.0.0.1"), node_addr_flag::NODE_PORTS)].into())
        .unwrap();
    pod.ask(v4);
    assert_eq!(
        plane.counter("connected"),
        4,
        "the program does run for the pod's sockets"
    );
}

#[test]
fn external_addresses_lead_to_the_cluster_set_and_the_cluster_ip_to_its_policys() {
    let place = Place::new();
    let mut plane = Plane::new(&place);
    let listeners = [(); 2].map(|()| TcpListener::bind("127.0.0.1:0").unwrap());
    for (id, listener) in (1..).zip(&listeners) {
        plane.backend(id, listener.local_addr().unwrap(), Protocol::Tcp);
    }
    let (cluster, local) = (plane.slots(1, &[1]), plane.slots(1, &[2]));
    let row = Service {
        cluster,
        local,
        flags: service_flag::INTERNAL_LOCAL | service_flag::EXTERNAL_LOCAL | service_flag::HAS_ENDPOINTS,
        ..Service::default()
    };
    plane.service(1, row);
    let kinds = [
        ("10.96.0.1", frontend_kind::CLUSTER_IP),
        ("192.0.2.1", frontend_kind::EXTERNAL_IP),
        ("192.0.2.2", frontend_kind::LOAD_BALANCER),
        ("192.0.2.3", frontend_kind::HOST_PORT),
    ];
    for (address, kind) in kinds {
        plane.front(frontend(address, 80, Protocol::Tcp), 1, kind);
    }
    let mut client = Python::in_cgroup(&place.config.cgroup_root);
    for (address, kind) in kinds {
        let before = (plane.connections(1), plane.connections(2));
        assert_eq!(client.ask(&format!("tcp().connect(('{address}', 80))")), "None");
        let expected = if kind == frontend_kind::CLUSTER_IP {
            (before.0, before.1 + 1)
        } else {
            (before.0 + 1, before.1)
        };
        assert_eq!(
            (plane.connections(1), plane.connections(2)),
            expected,
            "{address}"
        );
    }
    // nothing local: refused, and counted by its own reason; external addresses go on
    plane.service(
        1,
        Service {
            local: SetWord::default(),
            ..row
        },
    );
    assert_eq!(client.ask("tcp().connect(('10.96.0.1', 80))"), "ECONNREFUSED");
    assert_eq!(
        (plane.counter("no_local_backend"), plane.counter("no_backend")),
        (1, 0)
    );
    assert_eq!(client.ask("tcp().connect(('192.0.2.1', 80))"), "None");
    plane.service(
        1,
        Service {
            local: SetWord::default(),
            flags: service_flag::INTERNAL_LOCAL,
            ..row
        },
    );
    assert_eq!(client.ask("tcp().connect(('10.96.0.1', 80))"), "ECONNREFUSED");
    assert_eq!(
        (plane.counter("no_local_backend"), plane.counter("no_backend")),
        (1, 1)
    );
}

#[test]
fn unknown_ports_of_service_addresses_are_refused() {
    let place = Place::new();
    let (mut plane, _listeners) = two_families(&place);
    plane.cluster_ip("127.96.0.1", 80, Protocol::Tcp, 1);
    plane.active_address("127.96.0.1");
    plane.cluster_ip("fd00:10:96::1", 80, Protocol::Tcp, 2);
    plane.active_address("fd00:10:96::1");
    let mut client = Python::in_cgroup(&place.config.cgroup_root);
    // port 0 of the key that marks the address is no port that one can connect to
    let unknown = [
        "tcp().connect(('127.96.0.1', 81))",
        "udp().connect(('127.96.0.1', 80))",
        "udp().sendto(b'x', ('127.96.0.1', 80))",
        "tcp(socket.AF_INET6).connect(('fd00:10:96::1', 81))",
        "tcp(socket.AF_INET6).connect(('::ffff:127.96.0.1', 81))",
    ];
    let check = |client: &mut Python, plane: &Plane, expected: u64, why: &str| {
        for expression in unknown {
            let answer = client.ask(expression);
            assert!(
                expected == 0 || answer == "ECONNREFUSED",
                "{expression}: {answer}"
            );
        }
        assert_eq!(plane.counter("unknown_port"), expected, "{why}");
    };
    check(&mut client, &plane, 0, "not in a service range");
    plane.configure(|config| {
        config.service_ranges[0] = range("127.96.0.0".parse().unwrap(), 12);
        config.service_ranges[3] = range("fd00:10:96::".parse().unwrap(), 108);
    });
    check(&mut client, &plane, 5, "in a service range");
    assert_eq!(client.ask("tcp().connect(('127.96.0.1', 80))"), "None");
    // an address of the range that no service has: sockets leave it to the packet path
    assert_eq!(client.ask("udp().connect(('127.96.0.9', 80))"), "None");
    assert_eq!(plane.counter("unknown_port"), 5);
}
