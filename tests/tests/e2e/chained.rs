//! `beeline-cni` behind another plugin: the pod's network stays that plugin's, and gets host ports.

use std::time::Duration;

use beeline_tests::cluster::{ECHO_PORT, Node};
use beeline_tests::{Agent, Cluster, ControlPlane, process, wait_for};
use serde_json::{Value, json};

use crate::flannel::Flannel;
use crate::pod_network::{NET_CONF, ipam, options, plugin, start_agent};

const HOST_PORT: u16 = 54330;

/// The answer at the pod's host port, from another host.
fn ask(outside: &beeline_tests::OutsideHost, node: &Node) -> Option<String> {
    let mut command = outside.place().command("curl").unwrap();
    command.args([
        "-s",
        "-f",
        "-m",
        "1",
        &format!("http://{}:{HOST_PORT}/", node.v4()),
    ]);
    process::output(command).ok()
}

fn wait_port(outside: &beeline_tests::OutsideHost, node: &Node, there: bool) {
    let what = if there {
        "the host port"
    } else {
        "the host port to go"
    };
    wait_for(what, Duration::from_secs(10), || {
        Ok((ask(outside, node).is_some() == there).then_some(()))
    })
    .unwrap();
}

#[test]
fn behind_another_plugin_only_ports_are_added() {
    let cluster = Cluster::new().unwrap();
    let plane = ControlPlane::start(&cluster).unwrap();
    let node = cluster.add_node().unwrap();
    plane.register_node(&node).unwrap();
    let flannel = Flannel::new(&plane, &node, 1);
    let pod = flannel.pod("bridged");
    let mut agent: Option<Agent> = Some(start_agent(&plane, &node, &options(&plane, &node, NET_CONF)));
    let outside = cluster.add_outside_host().unwrap();

    let devices = || {
        node.host()
            .output("ip", &["-br", "link"])
            .unwrap()
            .lines()
            .count()
    };
    let before = devices();
    let previous = json!({
        "cniVersion": "1.0.0",
        "interfaces": [{"name": "cni0"}, {"name": "eth0", "sandbox": "/run/netns/x"}],
        "ips": [{"address": format!("{}/24", pod.v4), "gateway": "10.244.1.1", "interface": 1}],
        "routes": [{"dst": "0.0.0.0/0"}],
        "dns": {},
    });
    let port = json!([{"hostPort": HOST_PORT, "containerPort": ECHO_PORT, "protocol": "tcp"}]);
    let more = json!({"prevResult": previous, "runtimeConfig": {"portMappings": port}});
    let netns = pod.place.netns().name();
    let result = plugin(&node, "ADD", "bridged", netns, &more);
    for field in ["interfaces", "ips", "routes"] {
        assert_eq!(result[field], previous[field], "{field} is as it came");
    }
    wait_port(&outside, &node, true);
    assert_eq!(ask(&outside, &node).as_deref().map(str::trim), Some("bridged"));
    assert_eq!(devices(), before, "no device is made");
    let used = |list: &Value| {
        let all = list["addresses"].as_array().unwrap();
        all.iter().filter(|address| !address["pod"].is_null()).count()
    };
    assert_eq!(used(&ipam(&node)), 0, "no address is given");
    plugin(&node, "CHECK", "bridged", netns, &more);

    // an agent that starts knows it, though it has no device of ours
    drop(agent.take());
    let _agent = start_agent(&plane, &node, &options(&plane, &node, NET_CONF));
    wait_port(&outside, &node, true);

    plugin(&node, "DEL", "bridged", netns, &more);
    plugin(&node, "DEL", "bridged", netns, &more);
    wait_port(&outside, &node, false);
    let still = node
        .host()
        .output("ping", &["-c", "1", "-W", "1", &pod.v4.to_string()]);
    assert!(still.is_ok(), "the pod keeps its network: {still:?}");
}
