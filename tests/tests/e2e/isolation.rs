//! Two agents on one kernel.

use beeline_tests::client::Mode;
use beeline_tests::{Agent, AgentOptions, Cluster, ObjectDir};

use crate::scene::{V4, ask, assert_spread};

#[test]
fn two_agents_on_one_kernel_do_not_see_each_others_services() {
    let cluster = Cluster::new().unwrap();
    let nodes = [cluster.add_node().unwrap(), cluster.add_node().unwrap()];
    let pods = [
        nodes[0].add_echo_pod("one").unwrap(),
        nodes[1].add_echo_pod("two").unwrap(),
    ];
    let mut agents = Vec::new();
    // The same address on both, and one address that only the first node has.
    for (node, pod) in nodes.iter().zip(&pods) {
        let objects = ObjectDir::new(node.state().join("objects")).unwrap();
        objects.put_service("shared", &[V4], &[pod]).unwrap();
        if node.name() == nodes[0].name() {
            objects.put_service("private", &["10.96.0.11"], &[pod]).unwrap();
        }
        agents.push(Agent::start_synced(node, &AgentOptions::dir(objects.path())).unwrap());
    }
    for (node, name) in nodes.iter().zip(["one", "two"]) {
        assert_spread(&ask(node.host(), &format!("{V4}:80"), Mode::Http, 32), &[name]);
    }
    assert_spread(&ask(nodes[0].host(), "10.96.0.11:80", Mode::Http, 8), &["one"]);
    assert_eq!(ask(nodes[1].host(), "10.96.0.11:80", Mode::Http, 1).ok, 0);
    // A process outside of both nodes' cgroups sees neither.
    assert_eq!(ask(cluster.switch(), &format!("{V4}:80"), Mode::Http, 1).ok, 0);
    // Ending one changes nothing for the other, not even after its cleanup.
    drop(agents.pop());
    beeline_tests::agent::cleanup(&nodes[1]).unwrap();
    assert_spread(
        &ask(nodes[0].host(), &format!("{V4}:80"), Mode::Http, 32),
        &["one"],
    );
    assert_eq!(ask(nodes[1].host(), &format!("{V4}:80"), Mode::Http, 1).ok, 0);
}
