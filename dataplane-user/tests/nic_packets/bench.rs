//! What a packet costs, so that a change that makes it many times dearer is seen.

use std::time::Duration;

use dataplane_common::abi::device_flag;
use dataplane_model::Protocol;
use dataplane_user::kernel::Direction;

use crate::build::{ACK, Packet};
use crate::scene::{Scene, V4, at, of};

/// Far above what it takes (a few hundred nanoseconds): machines differ.
const LIMIT: Duration = Duration::from_micros(20);

#[test]
fn a_packet_costs_little() {
    let scene = Scene::new();
    let kernel = &scene.plane.kernel;
    let time = |what: &str, direction, packet: &Packet| {
        let run = kernel.run_packet(direction, &packet.build(), 0, 100_000).unwrap();
        println!("{what}: {:?}", run.duration);
        assert!(run.duration < LIMIT, "{what}: {:?}", run.duration);
    };
    let tcp = |src: &str, dst: &str| Packet {
        tcp_flags: ACK,
        ..of(Protocol::Tcp, src, dst)
    };
    let client = at(V4.client, 1);
    time("not ours", Direction::Ingress, &tcp(&client, &at(V4.pod, 1)));
    time("not ours", Direction::Egress, &tcp(&at(V4.pod, 1), &client));
    kernel
        .run_packet(
            Direction::Ingress,
            &tcp(&client, &at(V4.node, 30_001)).build(),
            0,
            1,
        )
        .unwrap();
    time(
        "reverse, first",
        Direction::Egress,
        &tcp(&at(V4.local, 8080), &client),
    );
    // what pods' own sockets have translated already, and their other traffic, pays this
    scene.serve_as(device_flag::POD);
    let pod = at(V4.pod, 1);
    time("from a pod, not ours", Direction::Ingress, &tcp(&pod, &client));
    time("to a pod, not ours", Direction::Egress, &tcp(&client, &pod));
    let datagram = of(Protocol::Udp, &pod, &client);
    time("datagram from a pod, not ours", Direction::Ingress, &datagram);
}
