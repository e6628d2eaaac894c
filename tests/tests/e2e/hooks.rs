//! How the packet programs get to devices: by links where the kernel has them, as filters below `clsact` where not.
//! `cargo xtask vm` runs this on kernels of either kind.

use beeline_tests::client::Mode;
use beeline_tests::{Agent, Load, Node, agent};

use crate::pair::{BOTH, NODE_PORT, Pair, ask, assert_replies};

fn has_clsact(node: &Node) -> bool {
    let qdiscs = node.host().output("tc", &["qdisc", "show"]).unwrap();
    qdiscs.contains("clsact")
}

#[test]
fn programs_are_at_devices_as_status_says_and_cleanup_leaves_no_qdisc() {
    let mut pair = Pair::new();
    let status = agent::beeline_json(&pair.nodes[0], &["status"]).unwrap();
    let features = status["features"].as_array().unwrap();
    let links = features
        .iter()
        .find(|feature| {
            feature["name"]
                .as_str()
                .unwrap()
                .starts_with("packet programs by links")
        })
        .and_then(|feature| feature["available"].as_bool())
        .unwrap();
    assert_eq!(has_clsact(&pair.nodes[0]), !links, "{status}");

    let outside = pair.outside.place();
    let [v4, v6] = pair.node_ports(0, NODE_PORT);
    for target in [v4, v6] {
        assert_replies(&target.to_string(), &ask(outside, target, Mode::Http, 64), &BOTH);
    }
    // A new agent puts its programs in the place of the old ones.
    let held = Load::start(outside, v4, Mode::Hold, 50, 4).unwrap();
    let mut old = pair.agents.remove(0);
    old.process.kill().unwrap();
    let mut agent = Agent::start_synced(&pair.nodes[0], &pair.options).unwrap();
    assert_replies("after a restart", &ask(outside, v4, Mode::Http, 64), &BOTH);
    let report = held.stop().unwrap();
    assert!(report.ok > 0 && report.failed == 0, "{report:?}");

    agent.process.terminate().unwrap();
    agent::cleanup(&pair.nodes[0]).unwrap();
    assert!(!has_clsact(&pair.nodes[0]));
    assert_eq!(ask(outside, v4, Mode::Http, 1).ok, 0);
}
