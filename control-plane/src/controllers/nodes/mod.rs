//! The controllers of nodes: whether they are there (leases, conditions, taints), what that means for their pods, and
//! which pod addresses they have.
//!
//! Only a node that has an agent is watched over: one that has ever renewed a lease. A node that was registered by hand
//! stays as it was said to be.

mod ipam;
mod lifecycle;
#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt as _;
use futures::stream;
use ipnet::IpNet;
use jiff::Timestamp;
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::{Node, Pod};
use kube::api::{Api, DeleteParams, Patch, PatchParams, Preconditions};
use kube::runtime::watcher;
use kube::{Client, ResourceExt as _};
use serde_json::{Value, json};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::events;
use super::objects::{Objects, Transition};
use super::work::{Changes, Controller, Next, drive, watch};
use lifecycle::Signs;

/// Namespace of the leases that nodes renew.
const LEASES: &str = "kube-node-lease";
const MANAGER: &str = "kube-controller-manager";
/// How long a node must be gone before what is left of its pods is removed.
const GONE: Duration = Duration::from_secs(40);

/// One thing to do.
#[derive(Debug, Clone, PartialEq)]
enum Action {
    /// Changes the node's status.
    Status { node: String, patch: Value },
    /// Changes the node.
    Patch { node: String, patch: Value },
    /// Says that a pod is not ready.
    NotReady { namespace: String, pod: String },
    /// Deletes a pod; at once if nobody can end it.
    Delete {
        namespace: String,
        pod: String,
        uid: String,
        force: bool,
        reason: &'static str,
    },
}

#[expect(clippy::large_enum_variant, reason = "one at a time, and moved once")]
enum Change {
    Node(watcher::Event<Node>),
    Pod(watcher::Event<Pod>),
    Lease(watcher::Event<Lease>),
}

enum Written {
    Node(Box<Node>),
    Pod(Box<Pod>),
}

fn changes(client: &Client) -> Changes<Change> {
    let any = watcher::Config::default();
    stream::select_all([
        watch(Api::all(client.clone()), any.clone(), |_| {}, Change::Node),
        watch(Api::all(client.clone()), any.clone(), slim, Change::Pod),
        watch(
            Api::namespaced(client.clone(), LEASES),
            any,
            |_| {},
            Change::Lease,
        ),
    ])
    .boxed()
}

/// Of a pod, only where it is, what it tolerates and how it is matters here.
fn slim(pod: &mut Pod) {
    pod.metadata.annotations = None;
    pod.metadata.labels = None;
    if let Some(spec) = pod.spec.as_mut() {
        spec.containers = Vec::new();
        spec.init_containers = None;
        spec.volumes = None;
        spec.affinity = None;
    }
}

/// Runs until `shutdown` is cancelled. The API may come and go meanwhile. Nodes without pod addresses get them from
/// `cluster_cidrs`, at most one range per address family.
pub async fn run(client: Client, cluster_cidrs: Vec<IpNet>, shutdown: CancellationToken) {
    let changes = changes(&client);
    let nodes = Nodes {
        client,
        ranges: cluster_cidrs.into_iter().map(ipam::Range::new).collect(),
        nodes: Objects::default(),
        pods: Objects::default(),
        leases: Objects::default(),
        signs: HashMap::new(),
        missing: HashMap::new(),
    };
    drive(nodes, changes, shutdown).await;
}

struct Nodes {
    client: Client,
    ranges: Vec<ipam::Range>,
    nodes: Objects<Node>,
    pods: Objects<Pod>,
    leases: Objects<Lease>,
    /// What each node last showed of itself.
    signs: HashMap<String, Signs>,
    /// Since when pods name a node that is not there.
    missing: HashMap<String, Instant>,
}

fn names<K: kube::Resource>(transition: &Transition<K>) -> impl Iterator<Item = String> {
    transition
        .0
        .iter()
        .chain(&transition.1)
        .map(|object| object.name_any())
}

impl Controller for Nodes {
    type Key = String;
    type Change = Change;
    type Done = Vec<Written>;
    const NAME: &'static str = "node controllers";
    const PARALLEL: usize = 8;
    const BATCH: Duration = Duration::ZERO;

    fn is_complete(&self) -> bool {
        self.nodes.is_complete() && self.pods.is_complete() && self.leases.is_complete()
    }

    fn observe(&mut self, change: Change) -> Vec<String> {
        let mut dirty: Vec<String> = Vec::new();
        match change {
            Change::Node(event) => {
                for transition in self.nodes.observe(event) {
                    dirty.extend(names(&transition));
                }
            }
            Change::Lease(event) => {
                for transition in self.leases.observe(event) {
                    dirty.extend(names(&transition));
                }
            }
            Change::Pod(event) => {
                for (before, after) in self.pods.observe(event) {
                    for pod in before.iter().chain(&after) {
                        let node = pod.spec.as_ref().and_then(|spec| spec.node_name.clone());
                        dirty.extend(node.filter(|node| !node.is_empty()));
                    }
                }
            }
        }
        dirty
    }

    fn decide(&mut self, name: &String) -> Next<Vec<Written>> {
        let (actions, again) = self.plan(name);
        if actions.is_empty() {
            return Next::later(again);
        }
        Next::requests(carry_out(self.client.clone(), actions), again)
    }

    fn done(&mut self, _: &String, written: Vec<Written>) -> bool {
        for written in written {
            match written {
                Written::Node(node) => self.nodes.wrote(*node),
                Written::Pod(mut pod) => {
                    slim(&mut pod);
                    self.pods.wrote(*pod);
                }
            }
        }
        false
    }
}

impl Nodes {
    fn plan(&mut self, name: &str) -> (Vec<Action>, Option<Duration>) {
        let now = Instant::now();
        let pods: Vec<Arc<Pod>> = self
            .pods
            .all()
            .filter(|pod| pod.spec.as_ref().and_then(|spec| spec.node_name.as_deref()) == Some(name))
            .cloned()
            .collect();
        let Some(node) = self.nodes.get("", name).cloned() else {
            self.signs.remove(name);
            return self.without_node(name, &pods, now);
        };
        self.missing.remove(name);
        let lease = self.leases.get(LEASES, name);
        let renewed = lease.and_then(|lease| lease.spec.as_ref()?.renew_time.as_ref().map(|time| time.0));
        let signs = self
            .signs
            .entry(name.to_owned())
            .or_insert_with(|| Signs::new(now));
        signs.observe(renewed, &node, now);
        let (mut actions, again) = lifecycle::plan(&node, signs, &pods, now, Timestamp::now());
        if let Some(patch) = self.addresses(&node) {
            actions.push(Action::Patch {
                node: name.to_owned(),
                patch,
            });
        }
        (actions, again)
    }

    fn addresses(&mut self, node: &Node) -> Option<Value> {
        let spec = node.spec.as_ref();
        let has = spec.is_some_and(|spec| spec.pod_cidr.is_some() || spec.pod_cidrs.is_some());
        if has || self.ranges.is_empty() || node.metadata.deletion_timestamp.is_some() {
            return None;
        }
        let taken: Vec<IpNet> = self
            .nodes
            .all()
            .filter_map(|node| node.spec.as_ref())
            .flat_map(|spec| spec.pod_cidrs.iter().flatten().chain(&spec.pod_cidr))
            .filter_map(|cidr| cidr.parse().ok())
            .collect();
        let mut given = Vec::new();
        for range in &mut self.ranges {
            match range.next(&taken) {
                Some(cidr) => given.push(cidr.to_string()),
                None => {
                    tracing::error!(node = node.name_any(), range = %range, "no pod addresses are left for the node");
                    return None;
                }
            }
        }
        let first = given.first()?.clone();
        // Whatever else has changed meanwhile: the API refuses to change addresses that are there.
        Some(json!({"spec": {"podCIDR": first, "podCIDRs": given}}))
    }

    /// What is left of a node that is gone.
    fn without_node(
        &mut self,
        name: &str,
        pods: &[Arc<Pod>],
        now: Instant,
    ) -> (Vec<Action>, Option<Duration>) {
        if pods.is_empty() {
            self.missing.remove(name);
            return (Vec::new(), None);
        }
        let since = *self.missing.entry(name.to_owned()).or_insert(now);
        let left = GONE.saturating_sub(now.saturating_duration_since(since));
        if !left.is_zero() {
            return (Vec::new(), Some(left));
        }
        let actions = pods
            .iter()
            .map(|pod| Action::Delete {
                namespace: pod.namespace().unwrap_or_default(),
                pod: pod.name_any(),
                uid: pod.metadata.uid.clone().unwrap_or_default(),
                force: true,
                reason: "NodeGone",
            })
            .collect();
        (actions, None)
    }
}

async fn carry_out(client: Client, actions: Vec<Action>) -> (Vec<Written>, Result<(), String>) {
    let nodes: Api<Node> = Api::all(client.clone());
    let params = PatchParams {
        field_manager: Some(MANAGER.to_owned()),
        ..PatchParams::default()
    };
    let mut written = Vec::new();
    for action in actions {
        let what = format!("{action:?}");
        let result = match action {
            Action::Status { node, patch } => nodes
                .patch_status(&node, &params, &Patch::Strategic(patch))
                .await
                .map(|node| Some(Written::Node(Box::new(node)))),
            Action::Patch { node, patch } => nodes
                .patch(&node, &params, &Patch::Merge(patch))
                .await
                .map(|node| Some(Written::Node(Box::new(node)))),
            Action::NotReady { namespace, pod } => {
                let now = Timestamp::now().strftime("%Y-%m-%dT%H:%M:%SZ").to_string();
                let condition = json!({"type": "Ready", "status": "False", "lastTransitionTime": now});
                Api::<Pod>::namespaced(client.clone(), &namespace)
                    .patch_status(
                        &pod,
                        &params,
                        &Patch::Strategic(json!({"status": {"conditions": [condition]}})),
                    )
                    .await
                    .map(|pod| Some(Written::Pod(Box::new(pod))))
            }
            Action::Delete {
                namespace,
                pod,
                uid,
                force,
                reason,
            } => {
                let about = events::About {
                    component: events::CONTROLLERS,
                    api_version: "v1".into(),
                    kind: "Pod".into(),
                    namespace: namespace.clone(),
                    name: pod.clone(),
                    uid: uid.clone(),
                };
                let delete = DeleteParams {
                    grace_period_seconds: force.then_some(0),
                    preconditions: Some(Preconditions {
                        uid: Some(uid),
                        ..Preconditions::default()
                    }),
                    ..DeleteParams::default()
                };
                let message = format!("Marking for deletion Pod {namespace}/{pod}");
                events::normal(&client, &about, reason, &message).await;
                Api::<Pod>::namespaced(client.clone(), &namespace)
                    .delete(&pod, &delete)
                    .await
                    .map(|_| None)
            }
        };
        match result {
            Ok(object) => written.extend(object),
            // Gone, or changed meanwhile: the watch will tell.
            Err(kube::Error::Api(status)) if status.code == 404 => {}
            Err(error) => return (written, Err(format!("{what}: {error}"))),
        }
    }
    (written, Ok(()))
}
