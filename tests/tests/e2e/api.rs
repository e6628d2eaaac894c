//! With the control plane and kubectl.

use std::time::Duration;

use beeline_tests::client::Mode;
use beeline_tests::cluster::ECHO_PORT;
use beeline_tests::{Agent, AgentOptions, Cluster, ControlPlane, Load, Node, Pod, wait_for};

use crate::pair::{BOTH, REFUSED, UNREACHABLE, wait_fails, wait_replies};
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

/// [`SERVICE`]'s address and port.
const TARGET: &str = "10.96.7.7:80";

/// Two nodes in zones of their own with an agent and a pod each.
struct ApiPair {
    // Order of dropping: processes before the cluster.
    _agents: [Agent; 2],
    pods: [Pod; 2],
    nodes: [Node; 2],
    plane: ControlPlane,
    _cluster: Cluster,
}

impl ApiPair {
    fn new() -> Self {
        let cluster = Cluster::new().unwrap();
        let plane = ControlPlane::start(&cluster).unwrap();
        let nodes = [cluster.add_node().unwrap(), cluster.add_node().unwrap()];
        let pods = ["web-1", "web-2"];
        let pods = std::array::from_fn(|i| nodes[i].add_echo_pod(pods[i]).unwrap());
        for (i, zone) in ["a", "b"].into_iter().enumerate() {
            plane.register_node(&nodes[i]).unwrap();
            let label = format!("topology.kubernetes.io/zone={zone}");
            plane
                .kubectl(&["label", "node", nodes[i].name(), &label])
                .unwrap();
            plane
                .register_pod(&nodes[i], &pods[i], "myweb", ECHO_PORT)
                .unwrap();
        }
        plane.kubectl_stdin(&["apply"], SERVICE).unwrap();
        let options = AgentOptions::kubeconfig(plane.kubeconfig());
        Self {
            _agents: nodes
                .each_ref()
                .map(|node| Agent::start_synced(node, &options).unwrap()),
            pods,
            nodes,
            plane,
            _cluster: cluster,
        }
    }

    fn patch(&self, patch: &str) {
        self.plane
            .kubectl(&["patch", "service", "myweb", "--type=merge", "-p", patch])
            .unwrap();
    }

    /// Waits until the hosts of both nodes are answered by exactly these.
    #[track_caller]
    fn wait(&self, wanted: [&[&str]; 2]) {
        for (node, wanted) in self.nodes.iter().zip(wanted) {
            wait_replies(node.host(), address(TARGET), Mode::Http, wanted);
        }
    }

    #[track_caller]
    fn wait_fails(&self, errors: &[&str]) {
        for node in &self.nodes {
            wait_fails(node.host(), address(TARGET), Mode::Http, errors);
        }
    }
}

#[test]
fn pods_that_are_not_ready_serve_where_they_are_published() {
    let pair = ApiPair::new();
    pair.wait([&BOTH, &BOTH]);
    for pod in &pair.pods {
        pair.plane.report_pod(pod, false).unwrap();
    }
    pair.wait_fails(&REFUSED);
    pair.patch(r#"{"spec": {"publishNotReadyAddresses": true}}"#);
    pair.wait([&BOTH, &BOTH]);
    pair.patch(r#"{"spec": {"publishNotReadyAddresses": false}}"#);
    pair.wait_fails(&REFUSED);
    pair.plane.report_pod(&pair.pods[1], true).unwrap();
    pair.wait([&BOTH[1..], &BOTH[1..]]);
}

#[test]
fn traffic_stays_where_its_distribution_says() {
    let pair = ApiPair::new();
    let (one, two) = (&BOTH[..1], &BOTH[1..]);
    for distribution in ["PreferClose", "PreferSameZone", "PreferSameNode"] {
        pair.patch(&format!(
            r#"{{"spec": {{"trafficDistribution": "{distribution}"}}}}"#
        ));
        pair.wait([one, two]);
        // an endpoint that is not ready has to be done without, and returns
        pair.plane.report_pod(&pair.pods[0], false).unwrap();
        pair.wait([two, two]);
        pair.plane.report_pod(&pair.pods[0], true).unwrap();
        pair.wait([one, two]);
        pair.patch(r#"{"spec": {"trafficDistribution": null}}"#);
        pair.wait([&BOTH, &BOTH]);
    }
}

#[test]
fn a_service_of_the_api_is_deleted_made_again_and_turned_into_a_name() {
    let pair = ApiPair::new();
    pair.wait([&BOTH, &BOTH]);
    pair.plane.kubectl(&["delete", "service", "myweb"]).unwrap();
    pair.wait_fails(&UNREACHABLE);
    pair.plane.kubectl_stdin(&["apply"], SERVICE).unwrap();
    pair.wait([&BOTH, &BOTH]);
    pair.patch(
        r#"{"spec": {"type": "ExternalName", "externalName": "example.com", "clusterIP": null, "clusterIPs": null}}"#,
    );
    pair.wait_fails(&UNREACHABLE);
    pair.patch(r#"{"spec": {"type": "ClusterIP", "externalName": null, "clusterIP": "10.96.7.7"}}"#);
    pair.wait([&BOTH, &BOTH]);
}
