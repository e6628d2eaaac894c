//! The scheduler: gives pods a node (kube-scheduler's default plugins).
//!
//! [`choice`] decides, without I/O; here is what watches and binds. A pod counts as being on its node from the decision on,
//! so that the next one is decided at once. One that fits nowhere says why, in its condition and in an event, and is looked at
//! again when nodes or pods change. No pod makes room for one of higher priority: preemption is left out.

mod choice;
mod cluster;
mod resources;
#[cfg(test)]
mod tests;
mod topology;

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt as _;
use futures::stream;
use k8s_openapi::api::core::v1::{Container, Namespace, Node, Pod};
use kube::api::{Api, Patch, PatchParams, PostParams};
use kube::runtime::watcher;
use kube::{Client, ResourceExt as _};
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

use super::events::{self, About};
use super::objects::{Objects, Transition};
use super::work::{Changes, Controller, Next, drive, watch};
use cluster::{Cluster, Key};

/// Name of this scheduler, which pods ask for if they ask for none.
const NAME: &str = "default-scheduler";
const SCHEDULED: &str = "PodScheduled";

#[expect(clippy::large_enum_variant, reason = "one at a time, and moved once")]
enum Change {
    Node(watcher::Event<Node>),
    Pod(watcher::Event<Pod>),
    Namespace(watcher::Event<Namespace>),
}

fn changes(client: &Client) -> Changes<Change> {
    let any = watcher::Config::default();
    stream::select_all([
        watch(Api::all(client.clone()), any.clone(), |_| {}, Change::Node),
        watch(Api::all(client.clone()), any.clone(), slim, Change::Pod),
        watch(Api::all(client.clone()), any, |_| {}, Change::Namespace),
    ])
    .boxed()
}

/// Of a pod's containers only what they ask of the node matters here.
fn slim(pod: &mut Pod) {
    pod.metadata.annotations = None;
    let Some(spec) = pod.spec.as_mut() else { return };
    spec.volumes = None;
    let init = spec.init_containers.iter_mut().flatten();
    for container in spec.containers.iter_mut().chain(init) {
        *container = Container {
            name: std::mem::take(&mut container.name),
            ports: container.ports.take(),
            resources: container.resources.take(),
            restart_policy: container.restart_policy.take(),
            ..Container::default()
        };
    }
}

/// Runs until `shutdown` is cancelled. The API may come and go meanwhile.
pub async fn run(client: Client, shutdown: CancellationToken) {
    let changes = changes(&client);
    drive(Scheduler::new(client), changes, shutdown).await;
}

struct Scheduler {
    client: Client,
    nodes: Objects<Node>,
    pods: Objects<Pod>,
    namespaces: Objects<Namespace>,
    cluster: Cluster,
    /// Pods that fit nowhere; true for those whom it matters where other pods are.
    waiting: HashMap<Key, bool>,
}

/// What came of the requests for a pod.
enum Done {
    /// It has its node, or says why it has none.
    Written,
    /// It was not given the node.
    Refused,
}

impl Scheduler {
    fn new(client: Client) -> Self {
        Self {
            client,
            nodes: Objects::default(),
            pods: Objects::default(),
            namespaces: Objects::default(),
            cluster: Cluster::default(),
            waiting: HashMap::new(),
        }
    }

    /// Takes in what became of a pod. True if others may fit now: there is more room, or a neighbour more.
    fn pod_changed(&mut self, (before, after): Transition<Pod>, dirty: &mut Vec<Key>) -> Freed {
        let Some(pod) = after.as_ref().or(before.as_ref()) else {
            return Freed::Nothing;
        };
        let key = (pod.namespace().unwrap_or_default(), pod.name_any());
        let Some(pod) = after.filter(|pod| !has_ended(pod)) else {
            self.waiting.remove(&key);
            return if self.cluster.remove(&key) {
                Freed::Room
            } else {
                Freed::Nothing
            };
        };
        let node = node_of(&pod);
        if !node.is_empty() {
            self.waiting.remove(&key);
            let is_new = self.cluster.node_of(&key) != Some(node);
            self.cluster.put(&key, node, &pod);
            return if is_new { Freed::Neighbour } else { Freed::Nothing };
        }
        if is_ours(&pod) && self.cluster.node_of(&key).is_none() {
            dirty.push(key);
        }
        Freed::Nothing
    }

    /// Those that may fit now.
    fn woken(&self, freed: Freed) -> impl Iterator<Item = Key> {
        self.waiting
            .iter()
            .filter(move |(_, by_neighbours)| match freed {
                Freed::Nothing => false,
                Freed::Neighbour => **by_neighbours,
                Freed::Room => true,
            })
            .map(|(key, _)| key.clone())
    }
}

/// What a change may be good for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Freed {
    Nothing,
    Neighbour,
    Room,
}

fn node_of(pod: &Pod) -> &str {
    let spec = pod.spec.as_ref();
    spec.and_then(|spec| spec.node_name.as_deref())
        .unwrap_or_default()
}

fn has_ended(pod: &Pod) -> bool {
    let phase = pod.status.as_ref().and_then(|status| status.phase.as_deref());
    matches!(phase, Some("Succeeded" | "Failed"))
}

/// Whether the pod waits for this scheduler.
fn is_ours(pod: &Pod) -> bool {
    let Some(spec) = &pod.spec else { return false };
    let name = spec.scheduler_name.as_deref().unwrap_or_default();
    let gates = spec.scheduling_gates.as_deref().unwrap_or_default();
    (name.is_empty() || name == NAME) && gates.is_empty() && pod.metadata.deletion_timestamp.is_none()
}

/// Whether it matters to the pod where others are.
fn heeds_neighbours(pod: &Pod) -> bool {
    pod.spec.as_ref().is_some_and(|spec| {
        let affinity = spec.affinity.as_ref();
        affinity.is_some_and(|affinity| affinity.pod_affinity.is_some())
            || spec.topology_spread_constraints.is_some()
    })
}

/// Heartbeats of a node change nothing about which pods it can take.
fn node_matters((before, after): &Transition<Node>) -> bool {
    let (Some(before), Some(after)) = (before, after) else {
        return true;
    };
    let offers = |node: &Node| node.status.as_ref().and_then(|status| status.allocatable.clone());
    before.spec != after.spec
        || before.metadata.labels != after.metadata.labels
        || offers(before) != offers(after)
}

impl Controller for Scheduler {
    type Key = Key;
    type Change = Change;
    type Done = Done;
    const NAME: &'static str = "scheduler";
    const PARALLEL: usize = 32;
    const BATCH: Duration = Duration::from_millis(5);

    fn is_complete(&self) -> bool {
        self.nodes.is_complete() && self.pods.is_complete() && self.namespaces.is_complete()
    }

    fn observe(&mut self, change: Change) -> Vec<Key> {
        let mut dirty = Vec::new();
        let mut freed = Freed::Nothing;
        match change {
            Change::Node(event) => {
                for transition in self.nodes.observe(event) {
                    if !node_matters(&transition) {
                        continue;
                    }
                    freed = Freed::Room;
                    match transition {
                        (_, Some(node)) => self.cluster.put_node(&node),
                        (Some(node), None) => self.cluster.remove_node(&node.name_any()),
                        (None, None) => {}
                    }
                }
            }
            Change::Pod(event) => {
                for transition in self.pods.observe(event) {
                    freed = freed.max(self.pod_changed(transition, &mut dirty));
                }
            }
            Change::Namespace(event) => {
                for (before, after) in self.namespaces.observe(event) {
                    let labels = after.as_ref().map(|after| after.metadata.labels.clone());
                    if let Some(namespace) = after.or(before) {
                        let labels = labels.map(Option::unwrap_or_default);
                        self.cluster.set_namespace(namespace.name_any(), labels);
                    }
                    freed = freed.max(Freed::Neighbour);
                }
            }
        }
        dirty.extend(self.woken(freed));
        dirty
    }

    fn decide(&mut self, key: &Key) -> Next<Done> {
        let Some(pod) = self.pods.get(&key.0, &key.1).cloned() else {
            return Next::nothing();
        };
        if !node_of(&pod).is_empty() || !is_ours(&pod) || self.cluster.node_of(key).is_some() {
            return Next::nothing();
        }
        match choice::choose(&self.cluster, &pod) {
            Ok(node) => {
                self.waiting.remove(key);
                self.cluster.put(key, &node, &pod);
                Next::requests(bind(self.client.clone(), pod, node), None)
            }
            Err(why) => {
                self.waiting.insert(key.clone(), heeds_neighbours(&pod));
                if says(&pod, &why) {
                    return Next::nothing();
                }
                Next::requests(tell(self.client.clone(), pod, why), None)
            }
        }
    }

    fn done(&mut self, key: &Key, done: Done) -> bool {
        if matches!(done, Done::Refused) {
            // Unless the watch has told meanwhile that it is on a node after all.
            let pod = self.pods.get(&key.0, &key.1);
            if pod.is_none_or(|pod| node_of(pod).is_empty()) {
                self.cluster.remove(key);
            }
        }
        false
    }
}

fn about(pod: &Pod) -> About {
    About {
        component: NAME,
        api_version: "v1".into(),
        kind: "Pod".into(),
        namespace: pod.namespace().unwrap_or_default(),
        name: pod.name_any(),
        uid: pod.metadata.uid.clone().unwrap_or_default(),
    }
}

async fn bind(client: Client, pod: Arc<Pod>, node: String) -> (Done, Result<(), String>) {
    let (namespace, name) = (pod.namespace().unwrap_or_default(), pod.name_any());
    let api: Api<Pod> = Api::namespaced(client.clone(), &namespace);
    let binding = json!({
        "apiVersion": "v1",
        "kind": "Binding",
        "metadata": {"name": name, "namespace": namespace, "uid": pod.metadata.uid},
        "target": {"apiVersion": "v1", "kind": "Node", "name": node},
    });
    let bound: kube::Result<Value> = api
        .create_subresource("binding", &name, &PostParams::default(), &binding)
        .await;
    match bound {
        Ok(_) => {
            let message = format!("Successfully assigned {namespace}/{name} to {node}");
            events::normal(&client, &about(&pod), "Scheduled", &message).await;
            (Done::Written, Ok(()))
        }
        // Gone, or given a node by someone else: the watch tells.
        Err(kube::Error::Api(status)) if matches!(status.code, 404 | 409) => (Done::Refused, Ok(())),
        Err(error) => (
            Done::Refused,
            Err(format!("bind {namespace}/{name} to {node}: {error}")),
        ),
    }
}

/// Whether the pod says already why it is pending.
fn says(pod: &Pod, why: &str) -> bool {
    let status = pod.status.as_ref();
    let conditions = status
        .and_then(|status| status.conditions.as_deref())
        .unwrap_or_default();
    conditions.iter().any(|condition| {
        condition.type_ == SCHEDULED
            && condition.status == "False"
            && condition.message.as_deref() == Some(why)
    })
}

async fn tell(client: Client, pod: Arc<Pod>, why: String) -> (Done, Result<(), String>) {
    let (namespace, name) = (pod.namespace().unwrap_or_default(), pod.name_any());
    let now = jiff::Timestamp::now().strftime("%Y-%m-%dT%H:%M:%SZ").to_string();
    let condition = json!({
        "type": SCHEDULED, "status": "False", "reason": "Unschedulable", "message": why, "lastTransitionTime": now,
    });
    let patch = json!({"metadata": {"uid": pod.metadata.uid}, "status": {"conditions": [condition]}});
    events::warning(&client, &about(&pod), "FailedScheduling", &why).await;
    let params = PatchParams {
        field_manager: Some("kube-scheduler".to_owned()),
        ..PatchParams::default()
    };
    let result = Api::<Pod>::namespaced(client, &namespace)
        .patch_status(&name, &params, &Patch::Strategic(patch))
        .await;
    let result = match result {
        Err(kube::Error::Api(status)) if matches!(status.code, 404 | 409) => Ok(()),
        other => other
            .map(drop)
            .map_err(|error| format!("say why {namespace}/{name} is pending: {error}")),
    };
    (Done::Written, result)
}
