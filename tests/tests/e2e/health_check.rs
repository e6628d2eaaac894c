//! What load balancers ask each node of a Service with `externalTrafficPolicy: Local`, and what is told to the API.

use std::net::SocketAddr;
use std::time::Duration;

use beeline_tests::cluster::ECHO_PORT;
use beeline_tests::{Agent, AgentOptions, Cluster, ControlPlane, Node, OutsideHost, http, wait_for};

use crate::scene::PROPAGATION;

const PORT: u16 = 30999;
const SERVICE: &str = r#"{"apiVersion": "v1", "kind": "Service", "metadata": {"name": "web"},
    "spec": {"type": "LoadBalancer", "externalTrafficPolicy": "Local", "healthCheckNodePort": 30999,
        "selector": {"app": "web"}, "ports": [{"port": 80, "targetPort": 8080}]}}"#;

#[track_caller]
fn wait_answer(outside: &OutsideHost, node: &Node, status: u16, endpoints: u32) {
    let addr = SocketAddr::from((node.v4(), PORT));
    let what = format!("{} to answer {status} for {endpoints} endpoints", node.name());
    wait_for(&what, PROPAGATION, || {
        let Ok((found, body)) = http::get(outside.place().netns(), addr, "/healthz") else {
            return Ok(None);
        };
        let count = format!("\"localEndpoints\": {endpoints},");
        let right = found == status && body.contains(&count) && body.contains("\"name\": \"web\"");
        Ok(right.then_some(()))
    })
    .unwrap();
}

#[test]
fn load_balancers_learn_which_nodes_have_endpoints() {
    let cluster = Cluster::new().unwrap();
    let plane = ControlPlane::start(&cluster).unwrap();
    let nodes = [cluster.add_node().unwrap(), cluster.add_node().unwrap()];
    let outside = cluster.add_outside_host().unwrap();
    for node in &nodes {
        plane.register_node(node).unwrap();
    }
    let pod = nodes[0].add_echo_pod("web-1").unwrap();
    plane.register_pod(&nodes[0], &pod, "web", ECHO_PORT).unwrap();
    plane.kubectl_stdin(&["apply"], SERVICE).unwrap();
    let options = AgentOptions::kubeconfig(plane.kubeconfig());
    let _agents = nodes
        .each_ref()
        .map(|node| Agent::start_synced(node, &options).unwrap());

    wait_answer(&outside, &nodes[0], 200, 1);
    wait_answer(&outside, &nodes[1], 503, 0);
    // readiness is followed
    plane.report_pod(&pod, false).unwrap();
    wait_answer(&outside, &nodes[0], 503, 0);
    plane.report_pod(&pod, true).unwrap();
    wait_answer(&outside, &nodes[0], 200, 1);

    // without the policy nobody is to ask any more
    let patch = r#"{"spec": {"externalTrafficPolicy": "Cluster"}}"#;
    plane.kubectl(&["patch", "service", "web", "-p", patch]).unwrap();
    for node in &nodes {
        let addr = SocketAddr::from((node.v4(), PORT));
        wait_for("the port to be closed", PROPAGATION, || {
            let answer = http::get(outside.place().netns(), addr, "/");
            Ok(answer.is_err().then_some(()))
        })
        .unwrap();
    }

    // what an operator reads of the start
    wait_for("events of the start", Duration::from_secs(20), || {
        let events = plane.kubectl(&["get", "events", "-o", "wide"])?;
        let started = |node: &Node| {
            let object = format!("node/{}", node.name());
            events
                .lines()
                .any(|line| line.contains("Starting") && line.contains(&object))
        };
        Ok(nodes.iter().all(started).then_some(()))
    })
    .unwrap();
}
