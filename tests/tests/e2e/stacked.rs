//! A device on top of another: a VLAN. Packets pass both devices of the pair, and are translated once.

use std::net::SocketAddr;

use beeline_tests::client::Mode;
use beeline_tests::{Agent, Place};
use serde_json::json;

use crate::pair::{BOTH, NODE_PORT, NODE_PORT_UDP, Pair, ask, assert_replies, wait_replies};

/// Addresses in the VLAN: the node's, and its neighbour's.
const NODE: [&str; 2] = ["198.18.0.1", "fd00:18::1"];
const NEIGHBOUR: [&str; 2] = ["198.18.0.2", "fd00:18::2"];

fn add_vlan(place: &Place, lower: &str, [v4, v6]: [&str; 2]) {
    let batch = [
        format!("link add link {lower} name {lower}.10 type vlan id 10"),
        format!("addr add {v4}/24 dev {lower}.10"),
        format!("addr add {v6}/64 dev {lower}.10 nodad"),
        format!("link set {lower}.10 up"),
    ];
    place.netns().ip_batch(&batch).unwrap();
}

#[test]
#[ignore = "needs a kernel with VLANs: cargo xtask vm"]
fn node_ports_are_served_in_a_vlan_whichever_devices_are() {
    let everywhere =
        |options: beeline_tests::AgentOptions| options.flag("--nodeport-addresses", "0.0.0.0/0,::/0");
    let mut pair = Pair::with(json!({}), everywhere);
    let neighbour = pair.cluster.switch();
    neighbour.output("modprobe", &["8021q"]).unwrap();
    add_vlan(neighbour, "n1", NEIGHBOUR);
    add_vlan(pair.nodes[0].host(), "up0", NODE);
    for devices in [None, Some("up0,up0.10")] {
        if let Some(devices) = devices {
            let options = pair.options.clone().flag("--devices", devices);
            pair.agents[0].process.kill().unwrap();
            pair.agents[0] = Agent::start_synced(&pair.nodes[0], &options).unwrap();
            beeline_tests::agent::wait_complete(&pair.nodes[0]).unwrap();
        }
        for (port, mode) in [(NODE_PORT, Mode::Http), (NODE_PORT_UDP, Mode::Udp)] {
            for ip in NODE {
                let target = SocketAddr::new(ip.parse().unwrap(), port);
                wait_replies(pair.cluster.switch(), target, mode, &BOTH);
                let report = ask(pair.cluster.switch(), target, mode, 64);
                assert_replies(&format!("{target} with {devices:?}"), &report, &BOTH);
            }
        }
    }
}
