//! What connections that fail tell of their backends.
#![allow(clippy::unwrap_used, reason = "a test that cannot be set up fails")]

mod common;

use std::net::{SocketAddr, TcpListener};
use std::time::Duration;

use common::Place;
use common::plane::Plane;
use common::python::Python;
use dataplane_common::abi::{Event, Service, event_kind, service_flag};
use dataplane_model::Protocol;
use dataplane_user::kernel::Events;

const LIMIT: Duration = Duration::from_secs(10);

/// A plane with service 1 at 10.96.0.1:80 and this backend as number 1.
fn plane(place: &Place, backend: SocketAddr, flags: u32) -> Plane {
    let mut plane = Plane::new(place);
    plane.backend(1, backend, Protocol::Tcp);
    let row = Service {
        flags,
        ..Service::default()
    };
    plane.serve(1, &[1], row);
    plane.cluster_ip("10.96.0.1", 80, Protocol::Tcp, 1);
    plane
}

async fn next(events: &mut Events) -> Event {
    tokio::time::timeout(LIMIT, events.next()).await.unwrap().unwrap()
}

async fn nothing(events: &mut Events) -> bool {
    tokio::time::timeout(Duration::from_millis(50), events.next())
        .await
        .is_err()
}

/// A client in a network namespace of its own, whose packets to 10.7.0.0/24 go nowhere.
fn in_a_void(place: &Place) -> Python {
    let mut client = Python::isolated(&place.config.cgroup_root);
    let void = "ip link add void type veth peer name hole && ip addr add 10.7.0.1/24 dev void && \
        ip link set void up && ip link set hole up && ip neigh add 10.7.0.2 lladdr 02:00:00:00:00:02 dev void";
    assert_eq!(client.ask(&format!("__import__('os').system('{void}')")), "0");
    client
}

#[tokio::test]
async fn a_syn_without_an_answer_is_told_after_a_second() {
    let place = Place::new();
    let plane = plane(&place, "10.7.0.2:80".parse().unwrap(), 0);
    let mut events = plane.kernel.events().unwrap();
    let mut client = in_a_void(&place);
    client.ask("S.update(a=tcp())");
    client.ask("S['a'].setblocking(False)");
    assert_eq!(client.ask("S['a'].connect(('10.96.0.1', 80))"), "EINPROGRESS");
    let start = std::time::Instant::now();
    let event = next(&mut events).await;
    assert!((900..1500).contains(&start.elapsed().as_millis()));
    assert_eq!(
        (event.kind, event.service, event.backend, event.generation),
        (event_kind::CONNECT_TIMEOUT, 1, 1, 1)
    );
    let backends = plane.kernel.backends().unwrap();
    let health = backends.health(1).unwrap();
    assert_eq!(
        (health.connect_failures, health.timeouts, health.failed),
        (1, 0, event.time)
    );
    assert_eq!(backends.failed_since(event.time), [1]);
    assert_eq!(backends.failed_since(event.time + 1), [0_u32; 0]);

    // an application that gives up before the first time-out tells as well, at a decent distance from the event before
    client.ask("__import__('time').sleep(0.06)");
    client.ask("S.update(b=tcp())");
    client.ask("S['b'].setblocking(False)");
    assert_eq!(client.ask("S['b'].connect(('10.96.0.1', 80))"), "EINPROGRESS");
    client.ask("S['b'].close()");
    let event = next(&mut events).await;
    assert_eq!((event.kind, event.backend), (event_kind::CONNECT_FAILED, 1));
    assert_eq!(backends.health(1).unwrap().connect_failures, 2);

    // many at once are counted, but told once
    client.ask("[(s.setblocking(False), S.update({i: s}), s.connect_ex(('10.96.0.1', 80)), s.close()) for i in range(50) for s in [tcp()]]");
    assert_eq!(backends.health(1).unwrap().connect_failures, 52);
    next(&mut events).await;
    let mut more = 0;
    while !nothing(&mut events).await {
        more += 1;
    }
    assert!(more <= 3, "{more}");

    // connections that are not to a service are nobody's business
    let before = backends.health(1).unwrap();
    client.ask("(lambda s: (s.setblocking(False), s.connect_ex(('10.7.0.2', 80)), s.close()))(tcp())");
    assert_eq!(backends.health(1).unwrap(), before);
}

#[tokio::test]
async fn a_refusal_is_told() {
    let place = Place::new();
    // a port where nobody listens any more
    let closed = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let plane = plane(&place, closed, 0);
    let mut events = plane.kernel.events().unwrap();
    let mut client = Python::in_cgroup(&place.config.cgroup_root);
    assert_eq!(client.ask("tcp().connect(('10.96.0.1', 80))"), "ECONNREFUSED");
    let event = next(&mut events).await;
    assert_eq!((event.kind, event.backend), (event_kind::CONNECT_FAILED, 1));
    assert_eq!(
        plane
            .kernel
            .backends()
            .unwrap()
            .health(1)
            .unwrap()
            .connect_failures,
        1
    );
}

#[tokio::test]
async fn services_that_do_not_want_it_are_not_watched() {
    let place = Place::new();
    let plane = plane(
        &place,
        "10.7.0.2:80".parse().unwrap(),
        service_flag::NO_FAILURE_DETECTION,
    );
    let mut events = plane.kernel.events().unwrap();
    let mut client = in_a_void(&place);
    client.ask("S.update(a=tcp())");
    client.ask("S['a'].settimeout(1.3)");
    assert_eq!(client.ask("S['a'].connect(('10.96.0.1', 80))"), "timed out");
    client.ask("S['a'].close()");
    assert!(nothing(&mut events).await);
    assert_eq!(
        plane
            .kernel
            .backends()
            .unwrap()
            .health(1)
            .unwrap()
            .connect_failures,
        0
    );
}

#[tokio::test]
async fn good_connections_tell_nothing_and_broken_ones_time_out() {
    let place = Place::new();
    let plane = plane(&place, "127.0.0.1:7080".parse().unwrap(), 0);
    let mut events = plane.kernel.events().unwrap();
    let mut client = Python::isolated(&place.config.cgroup_root);
    assert_eq!(client.ask("__import__('os').system('ip link set lo up')"), "0");
    client.ask("S.update(l=tcp())");
    client.ask("S['l'].bind(('127.0.0.1', 7080))");
    client.ask("S['l'].listen(99)");
    client.ask("[tcp().connect(('10.96.0.1', 80)) for _ in range(50)]");
    assert!(nothing(&mut events).await);
    let backends = plane.kernel.backends().unwrap();
    assert_eq!(
        (plane.connections(1), backends.health(1).unwrap()),
        (50, Default::default())
    );

    client.ask("S.update(a=tcp())");
    assert_eq!(client.ask("S['a'].connect(('10.96.0.1', 80))"), "None");
    assert_eq!(client.ask("S['a'].send(b'x')"), "1");
    assert!(nothing(&mut events).await);
    assert_eq!(client.ask("__import__('os').system('ip link set lo down')"), "0");
    client.ask("S['a'].send(b'x')");
    let event = next(&mut events).await;
    assert_eq!((event.kind, event.backend), (event_kind::RETRANSMIT, 1));
    let health = backends.health(1).unwrap();
    assert!(health.timeouts >= 1 && health.connect_failures == 0, "{health:?}");
}

#[tokio::test]
async fn a_late_answer_is_a_sign_of_life() {
    let place = Place::new();
    let plane = plane(&place, "10.7.0.1:7080".parse().unwrap(), 0);
    let mut events = plane.kernel.events().unwrap();
    let mut client = Python::isolated(&place.config.cgroup_root);
    let setup = "ip link set lo up && ip addr add 10.7.0.1/32 dev lo";
    assert_eq!(client.ask(&format!("__import__('os').system('{setup}')")), "0");
    client.ask("S.update(l=tcp())");
    client.ask("S['l'].bind(('10.7.0.1', 7080))");
    // a full queue of connections drops further handshakes
    client.ask("S['l'].listen(0)");
    client.ask("S.update(f=tcp())");
    client.ask("S['f'].connect(('10.7.0.1', 7080))");
    client.ask("S.update(a=tcp())");
    client.ask("S['a'].setblocking(False)");
    assert_eq!(client.ask("S['a'].connect(('10.96.0.1', 80))"), "EINPROGRESS");
    assert_eq!(next(&mut events).await.kind, event_kind::CONNECT_TIMEOUT);
    client.ask("S['l'].accept()");
    // the next try begins with a time-out too
    let mut event = next(&mut events).await;
    while event.kind == event_kind::CONNECT_TIMEOUT {
        event = next(&mut events).await;
    }
    assert_eq!((event.kind, event.backend), (event_kind::ALIVE, 1));
    let backends = plane.kernel.backends().unwrap();
    assert_eq!(backends.health(1).unwrap().alive, event.time);
    assert_eq!(backends.failed_since(0), [0_u32; 0]);
}
