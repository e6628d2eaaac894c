//! With the control plane and kubectl.

use std::time::Duration;

use beeline_tests::client::Mode;
use beeline_tests::cluster::ECHO_PORT;
use beeline_tests::{Agent, AgentOptions, Cluster, ControlPlane, Load, wait_for};

use crate::scene::{address, ask, assert_spread, wait_answered_by};

const IP: &str = "10.96.7.7";
const SERVICE: &str = r#"{"apiVersion": "v1", "kind": "Service", "metadata": {"name": "myweb"},
    "spec": {"clusterIP": "10.96.7.7", "selector": {"app": "myweb"}, "ports": [{"port": 80, "targetPort": 8080}]}}"#;

#[test]
fn the_api_goes_away_and_comes_back() {
    let cluster = Cluster::new().unwrap();
    let mut plane = ControlPlane::start(&cluster).unwrap();
    let node = cluster.add_node().unwrap();
    plane.register_node(&node).unwrap();
    let pods = [
        node.add_echo_pod("web-1").unwrap(),
        node.add_echo_pod("web-2").unwrap(),
    ];
    for pod in &pods {
        plane.register_pod(&node, pod, "myweb", ECHO_PORT).unwrap();
    }
    plane.kubectl_stdin(&["apply"], SERVICE).unwrap();
    let mut agent = Agent::start_synced(&node, &AgentOptions::kubeconfig(plane.kubeconfig())).unwrap();
    let target = format!("{IP}:80");
    wait_answered_by(node.host(), &target, &["web-1", "web-2"]);
    assert_spread(&ask(node.host(), &target, Mode::Http, 64), &["web-1", "web-2"]);

    let load = Load::start(node.host(), address(&target), Mode::Http, 100, 4).unwrap();
    plane.process.kill().unwrap();
    // Long enough for watches to break, to be tried again and to be refused several times.
    let refused = std::time::Instant::now();
    wait_for("ten seconds without an API", Duration::from_secs(20), || {
        agent.process.check_running()?;
        Ok((refused.elapsed() > Duration::from_secs(10)).then_some(()))
    })
    .unwrap();
    assert_spread(&ask(node.host(), &target, Mode::Http, 64), &["web-1", "web-2"]);
    let report = load.stop().unwrap();
    assert_eq!(report.failed, 0, "{report:?}");

    // The data survived the SIGKILL, and what changes before the agent is back is not missed.
    drop(plane);
    let plane = ControlPlane::start(&cluster).unwrap();
    plane.report_pod(&pods[0], false).unwrap();
    let other = SERVICE
        .replace("myweb\"},\n", "other\"},\n")
        .replace(IP, "10.96.7.8");
    plane.kubectl_stdin(&["apply"], &other).unwrap();
    wait_for("the agent to have what changed", Duration::from_secs(45), || {
        let [old, new] =
            [&target, "10.96.7.8:80"].map(|target| Load::ask(node.host(), address(target), Mode::Http, 16));
        let only = |report: &beeline_tests::LoadReport| {
            report.failed == 0 && report.replies.keys().all(|name| name == "web-2")
        };
        Ok((only(&old?) && only(&new?)).then_some(()))
    })
    .unwrap();
    // And the watch goes on.
    plane.report_pod(&pods[0], true).unwrap();
    plane.report_pod(&pods[1], false).unwrap();
    wait_answered_by(node.host(), &target, &["web-1"]);
    agent.process.check_running().unwrap();
}
