//! What most tests start from: nodes with an agent each that reads a directory, pods, and services.

use std::net::SocketAddr;
use std::time::Duration;

use beeline_tests::client::Mode;
use beeline_tests::{Agent, AgentOptions, Cluster, Load, LoadReport, Node, ObjectDir, Place, Pod, wait_for};

/// How long a change of a file may take to the kernel; a loaded machine is no reason to fail.
pub(crate) const PROPAGATION: Duration = Duration::from_secs(10);
/// The first service's addresses.
pub(crate) const V4: &str = "10.96.0.10";
pub(crate) const V6: &str = "fd00:10:96::a";

/// One node with an agent, two pods that answer, and a pod that asks.
pub(crate) struct Scene {
    // Order of dropping: processes before the cluster.
    pub(crate) agent: Agent,
    pub(crate) options: AgentOptions,
    pub(crate) servers: Vec<Pod>,
    pub(crate) client: Pod,
    pub(crate) node: Node,
    pub(crate) objects: ObjectDir,
    _cluster: Cluster,
}

impl Scene {
    /// A service `web` with two pods.
    pub(crate) fn new() -> Self {
        Self::with_options(|options| options)
    }

    pub(crate) fn with_options(change: impl FnOnce(AgentOptions) -> AgentOptions) -> Self {
        let cluster = Cluster::new().unwrap();
        let node = cluster.add_node().unwrap();
        let servers: Vec<Pod> = ["web-1", "web-2"]
            .iter()
            .map(|name| node.add_echo_pod(name).unwrap())
            .collect();
        let client = node.add_pod("client").unwrap();
        let objects = ObjectDir::new(cluster.state().join("objects")).unwrap();
        objects
            .put_service("web", &[V4, V6], &servers.iter().collect::<Vec<_>>())
            .unwrap();
        let options = change(AgentOptions::dir(objects.path()));
        let agent = Agent::start_synced(&node, &options).unwrap();
        Self {
            agent,
            options,
            servers,
            client,
            node,
            objects,
            _cluster: cluster,
        }
    }

    /// Puts a service with these pods behind it; the agent has programmed it then.
    #[track_caller]
    pub(crate) fn put_service(&self, name: &str, cluster_ips: &[&str], pods: &[&Pod]) {
        self.objects.put_service(name, cluster_ips, pods).unwrap();
        self.objects.settle([&self.node]).unwrap();
    }

    /// Asks a frontend from the client pod.
    pub(crate) fn ask(&self, target: &str, mode: Mode, count: u64) -> LoadReport {
        ask(self.client.place(), target, mode, count)
    }
}

pub(crate) fn ask(place: &Place, target: &str, mode: Mode, count: u64) -> LoadReport {
    Load::ask(place, address(target), mode, count).unwrap()
}

pub(crate) fn address(text: &str) -> SocketAddr {
    text.parse().unwrap()
}

/// All answered, and each of the pods at least once.
#[track_caller]
pub(crate) fn assert_spread(report: &LoadReport, pods: &[&str]) {
    assert_eq!(report.failed, 0, "{report:?}");
    let names: Vec<&str> = report.replies.keys().map(String::as_str).collect();
    assert_eq!(names, pods, "{report:?}");
}

/// All failed in this way.
#[track_caller]
pub(crate) fn assert_all_fail(report: &LoadReport, error: &str) {
    assert_eq!(report.ok, 0, "{report:?}");
    assert_eq!(report.errors.get(error), Some(&report.failed), "{report:?}");
}

/// Waits until one request is answered by one of these pods and none by another.
#[track_caller]
pub(crate) fn wait_answered_by(place: &Place, target: &str, pods: &[&str]) {
    wait_for(
        &format!("{target} to be answered by {pods:?}"),
        PROPAGATION,
        || {
            let report = Load::ask(place, address(target), Mode::Http, 16)?;
            let only = report.replies.keys().all(|name| pods.contains(&name.as_str()));
            Ok((report.failed == 0 && only).then_some(()))
        },
    )
    .unwrap();
}
