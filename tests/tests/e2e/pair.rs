//! Two nodes with an agent each, pods on both, and a host outside the cluster.

use std::net::{IpAddr, SocketAddr};

use beeline_tests::client::{Mode, Question};
use beeline_tests::objects::{endpoint, service, slice_of};
use beeline_tests::{
    Agent, AgentOptions, Cluster, Load, LoadReport, Node, ObjectDir, OutsideHost, Place, Pod, agent,
    slowness, wait_for,
};
use serde_json::{Value, json};

use crate::scene::PROPAGATION;

/// The service's addresses.
pub(crate) const V4: &str = "10.96.0.20";
pub(crate) const V6: &str = "fd00:10:96::14";
/// Its node ports: TCP and UDP.
pub(crate) const NODE_PORT: u16 = 30080;
pub(crate) const NODE_PORT_UDP: u16 = 30053;
/// Both pods.
pub(crate) const BOTH: [&str; 2] = ["web-1", "web-2"];

/// How a request fails that is refused.
pub(crate) const REFUSED: [&str; 4] = [
    "connect: ECONNREFUSED",
    "recv: ECONNREFUSED",
    "sendto: ECONNREFUSED",
    "recvfrom: ECONNREFUSED",
];
/// How it fails when it is dropped.
pub(crate) const SILENT: [&str; 4] = [
    "connect: TimedOut",
    "recvfrom: WouldBlock",
    "recvfrom: EAGAIN",
    "recv: EAGAIN",
];
/// How it fails when nobody serves the address.
pub(crate) const UNREACHABLE: [&str; 5] = [
    "connect: TimedOut",
    "connect: EHOSTUNREACH",
    "connect: ENETUNREACH",
    "connect: HostUnreachable",
    "connect: NetworkUnreachable",
];

/// `web-1` runs on the first node, `web-2` on the second, `client-1` and `client-2` likewise.
pub(crate) struct Pair {
    // Order of dropping: processes before the cluster.
    pub(crate) agents: Vec<Agent>,
    pub(crate) servers: Vec<Pod>,
    pub(crate) clients: Vec<Pod>,
    pub(crate) outside: OutsideHost,
    pub(crate) nodes: Vec<Node>,
    pub(crate) objects: ObjectDir,
    pub(crate) options: AgentOptions,
    pub(crate) cluster: Cluster,
}

impl Pair {
    /// A NodePort Service `web` with both pods.
    pub(crate) fn new() -> Self {
        Self::with(json!({}), |options| options)
    }

    /// The same, changed by a merge patch (RFC 7396) of the Service and by further flags of the agents.
    pub(crate) fn with(patch: Value, change: impl FnOnce(AgentOptions) -> AgentOptions) -> Self {
        let cluster = Cluster::new().unwrap();
        let nodes = [cluster.add_node().unwrap(), cluster.add_node().unwrap()];
        let outside = cluster.add_outside_host().unwrap();
        let mut servers = Vec::new();
        let mut clients = Vec::new();
        for (i, node) in nodes.iter().enumerate() {
            servers.push(node.add_echo_pod(&format!("web-{}", i + 1)).unwrap());
            clients.push(node.add_pod(&format!("client-{}", i + 1)).unwrap());
        }
        let objects = ObjectDir::new(cluster.state().join("objects")).unwrap();
        let options = change(AgentOptions::dir(objects.path()));
        let mut pair = Self {
            agents: Vec::new(),
            servers,
            clients,
            outside,
            nodes: nodes.into(),
            objects,
            options,
            cluster,
        };
        pair.objects
            .put("nodes", &pair.nodes.iter().map(node_object).collect::<Vec<_>>())
            .unwrap();
        pair.put(patch, &[true, true]);
        pair.agents = pair
            .nodes
            .iter()
            .map(|node| {
                let agent = Agent::start_synced(node, &pair.options).unwrap();
                agent::wait_complete(node).unwrap();
                agent
            })
            .collect();
        pair
    }

    /// Puts the Service with this patch, and with those of the pods as ready endpoints that are marked; every agent has
    /// programmed it then.
    #[track_caller]
    pub(crate) fn put(&self, patch: Value, pods: &[bool]) {
        let endpoints: Vec<(usize, Value)> = pods
            .iter()
            .enumerate()
            .filter(|(_, ready)| **ready)
            .map(|(i, _)| (i, json!({"ready": true, "serving": true, "terminating": false})))
            .collect();
        self.put_with(patch, &endpoints);
    }

    /// The same with the conditions of each endpoint, by the number of the pod.
    #[track_caller]
    pub(crate) fn put_with(&self, patch: Value, endpoints: &[(usize, Value)]) {
        let object = Self::service(patch);
        let of = |v6: bool| -> Vec<Value> {
            endpoints
                .iter()
                .map(|(i, conditions)| {
                    let pod = &self.servers[*i];
                    let address: IpAddr = if v6 { pod.v6().into() } else { pod.v4().into() };
                    let mut object = endpoint(&address.to_string());
                    object["nodeName"] = self.nodes[*i].name().into();
                    object["conditions"] = conditions.clone();
                    object
                })
                .collect()
        };
        self.objects
            .put(
                "web",
                &[
                    object,
                    slice_of("web", "v4", "IPv4", &of(false)),
                    slice_of("web", "v6", "IPv6", &of(true)),
                ],
            )
            .unwrap();
        self.settle();
    }

    /// Puts these objects into a file; every agent has programmed them then.
    #[track_caller]
    pub(crate) fn put_objects(&self, file: &str, objects: &[Value]) {
        self.objects.put(file, objects).unwrap();
        self.settle();
    }

    /// Removes a file; every agent has programmed that then.
    #[track_caller]
    pub(crate) fn remove(&self, file: &str) {
        self.objects.remove(file).unwrap();
        self.settle();
    }

    /// The Service `web` as [`Pair::put`] puts it, for tests with endpoint slices of their own.
    pub(crate) fn service(patch: Value) -> Value {
        let mut object = service("web", &[V4, V6]);
        merge(
            &mut object,
            json!({"spec": {"type": "NodePort", "externalTrafficPolicy": "Cluster"}}),
        );
        object["spec"]["ports"][0]["nodePort"] = NODE_PORT.into();
        object["spec"]["ports"][1]["nodePort"] = NODE_PORT_UDP.into();
        merge(&mut object, patch);
        object
    }

    /// Waits until every agent has programmed what the directory holds.
    #[track_caller]
    pub(crate) fn settle(&self) {
        self.objects
            .settle(self.nodes.iter().take(self.agents.len()))
            .unwrap();
    }

    /// The node port's addresses at a node, IPv4 and IPv6.
    pub(crate) fn node_ports(&self, node: usize, port: u16) -> [SocketAddr; 2] {
        let node = &self.nodes[node];
        [
            SocketAddr::new(node.v4().into(), port),
            SocketAddr::new(node.v6().into(), port),
        ]
    }

    /// Everywhere a client may be: outside, pods and hosts of both nodes.
    pub(crate) fn everywhere(&self) -> Vec<(&'static str, &Place)> {
        vec![
            ("outside", self.outside.place()),
            ("pod on node-1", self.clients[0].place()),
            ("pod on node-2", self.clients[1].place()),
            ("node-1", self.nodes[0].host()),
            ("node-2", self.nodes[1].host()),
        ]
    }

    /// The addresses by which a backend may see something of node `i`.
    pub(crate) fn own_addresses(&self, node: usize) -> [String; 2] {
        [
            self.nodes[node].v4().to_string(),
            self.nodes[node].v6().to_string(),
        ]
    }
}

pub(crate) fn node_object(node: &Node) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Node",
        "metadata": {"name": node.name()},
        "spec": {"podCIDR": node.pod_cidrs()[0], "podCIDRs": node.pod_cidrs()},
        "status": {"addresses": [
            {"type": "InternalIP", "address": node.v4().to_string()},
            {"type": "InternalIP", "address": node.v6().to_string()},
            {"type": "Hostname", "address": node.name()},
        ]},
    })
}

/// A ready endpoint of each of these pods, on no node in particular, at these ports: a slice for each family.
pub(crate) fn slices(service: &str, suffix: &str, ports: &Value, pods: &[&Pod]) -> [Value; 2] {
    [("v4", "IPv4", 0), ("v6", "IPv6", 1)].map(|(short, family, index)| {
        let endpoints: Vec<Value> = pods
            .iter()
            .map(|pod| endpoint(&pod.addresses()[index].to_string()))
            .collect();
        let mut slice = slice_of(service, &format!("{suffix}-{short}"), family, &endpoints);
        slice["ports"] = ports.clone();
        slice
    })
}

/// RFC 7396.
pub(crate) fn merge(target: &mut Value, patch: Value) {
    let Value::Object(patch) = patch else {
        *target = patch;
        return;
    };
    if !target.is_object() {
        *target = json!({});
    }
    for (key, value) in patch {
        if value.is_null() {
            target.as_object_mut().unwrap().remove(&key);
        } else {
            merge(&mut target[key], value);
        }
    }
}

/// Asks, and gives what came of it.
#[track_caller]
pub(crate) fn ask(
    place: &Place,
    target: SocketAddr,
    question: impl Into<Question>,
    count: u64,
) -> LoadReport {
    Load::ask(place, target, question, count).unwrap()
}

/// Asks for the address that the server sees.
#[track_caller]
pub(crate) fn sources(place: &Place, target: SocketAddr, mode: Mode, count: u64) -> LoadReport {
    let question = Question {
        source: true,
        ..mode.into()
    };
    Load::ask(place, target, question, count).unwrap()
}

/// A question that does not wait long for an answer that should not come.
pub(crate) fn impatient(mode: Mode) -> Question {
    Question {
        timeout_ms: 300 * u64::from(slowness()),
        ..mode.into()
    }
}

/// All answered, and by exactly these.
#[track_caller]
pub(crate) fn assert_replies(what: &str, report: &LoadReport, wanted: &[&str]) {
    assert_eq!(report.failed, 0, "{what}: {report:?}");
    let names: Vec<&str> = report.replies.keys().map(String::as_str).collect();
    assert_eq!(names, wanted, "{what}: {report:?}");
}

/// None answered; each in one of these ways.
#[track_caller]
pub(crate) fn assert_fails(what: &str, report: &LoadReport, errors: &[&str]) {
    assert_eq!(report.ok, 0, "{what}: {report:?}");
    for error in report.errors.keys() {
        assert!(errors.contains(&error.as_str()), "{what}: {report:?}");
    }
}

/// Waits until a series of requests is answered by exactly these pods.
#[track_caller]
pub(crate) fn wait_replies(place: &Place, target: SocketAddr, mode: Mode, wanted: &[&str]) {
    let question = impatient(mode);
    wait_for(
        &format!("{target} to be answered by {wanted:?}"),
        PROPAGATION,
        || {
            let report = Load::ask(place, target, question, 24)?;
            let names: Vec<&str> = report.replies.keys().map(String::as_str).collect();
            Ok((report.failed == 0 && names == wanted).then_some(()))
        },
    )
    .unwrap();
}

/// Waits until a request fails in one of these ways.
#[track_caller]
pub(crate) fn wait_fails(place: &Place, target: SocketAddr, mode: Mode, errors: &[&str]) {
    wait_fails_within(place, target, mode, errors, 300);
}

/// The same, if each answer may take this long.
#[track_caller]
pub(crate) fn wait_fails_within(
    place: &Place,
    target: SocketAddr,
    mode: Mode,
    errors: &[&str],
    timeout_ms: u64,
) {
    let question = Question {
        timeout_ms,
        ..impatient(mode)
    };
    let mut last = None;
    let waited = wait_for(&format!("{target} to fail with {errors:?}"), PROPAGATION, || {
        let report = Load::ask(place, target, question, 1)?;
        let all = report.errors.keys().all(|error| errors.contains(&error.as_str()));
        let failed = report.ok == 0 && all;
        last = Some(report);
        Ok(failed.then_some(()))
    });
    let error = waited.err().map(|error| format!("{error:#}"));
    assert_eq!(error, None, "at last {last:?}");
}
