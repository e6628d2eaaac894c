//! The controllers that make pods: ReplicaSet, ReplicationController, Deployment, DaemonSet.
//!
//! They share one view of the API and one work queue. What to do about one object is decided without I/O (`replicas`,
//! `deployment`, `daemon`); [`run`] watches and carries it out.

mod daemon;
mod deployment;
mod pods;
mod replicas;
#[cfg(test)]
mod tests;

use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt as _;
use futures::stream;
use jiff::Timestamp;
use k8s_openapi::api::apps::v1::{DaemonSet, Deployment, ReplicaSet};
use k8s_openapi::api::core::v1::{Node, Pod, ReplicationController};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference};
use kube::api::{Api, DeleteParams, Patch, PatchParams, PostParams, Preconditions, PropagationPolicy};
use kube::runtime::watcher;
use kube::{Client, ResourceExt as _};
use serde_json::{Value, json};
use tokio_util::sync::CancellationToken;

use super::events;
use super::objects::{Objects, Transition};
use super::work::{Changes, Controller, Next, drive, watch};
use replicas::Set;

/// Label that tells a ReplicaSet's pods from those of another one of the same Deployment.
const TEMPLATE_HASH: &str = "pod-template-hash";
/// Requests for one object at the same time.
const REQUESTS: usize = 16;
/// Who writes, as `managedFields` names it.
const MANAGER: &str = "kube-controller-manager";

/// An object that a controller works for.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
enum Key {
    ReplicaSet(String, String),
    ReplicationController(String, String),
    Deployment(String, String),
    DaemonSet(String, String),
}

/// The object on whose behalf something is done.
#[derive(Debug, Clone)]
struct Subject {
    api_version: &'static str,
    kind: &'static str,
    namespace: String,
    name: String,
    uid: String,
}

impl Subject {
    fn new(api_version: &'static str, kind: &'static str, meta: &ObjectMeta) -> Self {
        Self {
            api_version,
            kind,
            namespace: meta.namespace.clone().unwrap_or_default(),
            name: meta.name.clone().unwrap_or_default(),
            uid: meta.uid.clone().unwrap_or_default(),
        }
    }

    fn reference(&self) -> events::About {
        events::About {
            component: events::CONTROLLERS,
            api_version: self.api_version.to_owned(),
            kind: self.kind.to_owned(),
            namespace: self.namespace.clone(),
            name: self.name.clone(),
            uid: self.uid.clone(),
        }
    }
}

/// One thing to do.
#[derive(Debug, Clone)]
enum Action {
    CreatePod {
        pod: Box<Pod>,
        by: Subject,
    },
    DeletePod {
        pod: Arc<Pod>,
        by: Subject,
    },
    /// Makes this the pod's controller.
    Adopt {
        pod: Arc<Pod>,
        owner: OwnerReference,
    },
    /// The pod is not that owner's any more.
    Disown {
        pod: Arc<Pod>,
        owner: String,
    },
    CreateSet {
        set: Box<ReplicaSet>,
        by: Subject,
        collisions: i32,
    },
    AdoptSet {
        set: Arc<ReplicaSet>,
        owner: OwnerReference,
    },
    PatchSet {
        set: Arc<ReplicaSet>,
        patch: Value,
        event: Option<(Subject, &'static str, String)>,
    },
    DeleteSet(Arc<ReplicaSet>),
    PatchDeployment {
        of: Subject,
        patch: Value,
    },
    /// Changes these fields of a status.
    Status {
        of: Subject,
        status: Value,
    },
}

/// What to do about an object, and when to look again at the latest.
#[derive(Debug, Default)]
struct Plan {
    actions: Vec<Action>,
    again: Option<i64>,
}

impl Plan {
    /// Asks to be looked at again in so many seconds.
    fn again_in(&mut self, seconds: Option<i64>) {
        self.again = match (self.again, seconds) {
            (Some(a), Some(b)) => Some(a.min(b)),
            (a, b) => a.or(b),
        };
    }
}

enum Change {
    Pod(watcher::Event<Pod>),
    Node(watcher::Event<Node>),
    ReplicaSet(watcher::Event<ReplicaSet>),
    ReplicationController(watcher::Event<ReplicationController>),
    Deployment(watcher::Event<Deployment>),
    DaemonSet(watcher::Event<DaemonSet>),
}

/// The answer to an own write.
enum Written {
    Pod(Box<Pod>),
    Set(Box<ReplicaSet>),
    Deployment(Box<Deployment>),
    DaemonSet(Box<DaemonSet>),
    ReplicationController(Box<ReplicationController>),
}

fn changes(client: &Client) -> Changes<Change> {
    let any = watcher::Config::default();
    stream::select_all([
        watch(Api::all(client.clone()), any.clone(), |_| {}, Change::Pod),
        watch(Api::all(client.clone()), any.clone(), |_| {}, Change::Node),
        watch(Api::all(client.clone()), any.clone(), |_| {}, Change::ReplicaSet),
        watch(
            Api::all(client.clone()),
            any.clone(),
            |_| {},
            Change::ReplicationController,
        ),
        watch(Api::all(client.clone()), any.clone(), |_| {}, Change::Deployment),
        watch(Api::all(client.clone()), any, |_| {}, Change::DaemonSet),
    ])
    .boxed()
}

/// Runs until `shutdown` is cancelled. The API may come and go meanwhile.
pub async fn run(client: Client, shutdown: CancellationToken) {
    let changes = changes(&client);
    let workloads = Workloads {
        client,
        view: View::default(),
    };
    drive(workloads, changes, shutdown).await;
}

/// What the API holds, as far as the watches have told.
#[derive(Default)]
struct View {
    pods: Objects<Pod>,
    nodes: Objects<Node>,
    sets: Objects<ReplicaSet>,
    controllers: Objects<ReplicationController>,
    deployments: Objects<Deployment>,
    daemons: Objects<DaemonSet>,
}

fn place<K: kube::Resource<DynamicType = ()>>(object: &K) -> (String, String) {
    (object.namespace().unwrap_or_default(), object.name_any())
}

fn either<K>(transition: &Transition<K>) -> impl Iterator<Item = &Arc<K>> {
    transition.0.iter().chain(&transition.1)
}

impl View {
    fn is_complete(&self) -> bool {
        self.pods.is_complete()
            && self.nodes.is_complete()
            && self.sets.is_complete()
            && self.controllers.is_complete()
            && self.deployments.is_complete()
            && self.daemons.is_complete()
    }

    /// Takes in a change and returns what it concerns.
    fn observe(&mut self, change: Change) -> Vec<Key> {
        let mut dirty = Vec::new();
        match change {
            Change::Pod(event) => {
                for transition in self.pods.observe(event) {
                    for pod in either(&transition) {
                        self.concerned_by_pod(pod, &mut dirty);
                    }
                }
            }
            Change::Node(event) => {
                for transition in self.nodes.observe(event) {
                    if node_matters(&transition) {
                        dirty.extend(self.daemons.all().map(|set| daemon_key(set)));
                    }
                }
            }
            Change::ReplicaSet(event) => {
                for transition in self.sets.observe(event) {
                    for set in either(&transition) {
                        let (namespace, name) = place(&**set);
                        match pods::controller(&set.metadata) {
                            Some(owner) => dirty.push(Key::Deployment(namespace.clone(), owner.name.clone())),
                            None => dirty.extend(self.deployments.in_namespace(&namespace).map(|d| {
                                let (namespace, name) = place(&**d);
                                Key::Deployment(namespace, name)
                            })),
                        }
                        dirty.push(Key::ReplicaSet(namespace, name));
                    }
                }
            }
            Change::ReplicationController(event) => {
                for transition in self.controllers.observe(event) {
                    for object in either(&transition) {
                        let (namespace, name) = place(&**object);
                        dirty.push(Key::ReplicationController(namespace, name));
                    }
                }
            }
            Change::Deployment(event) => {
                for transition in self.deployments.observe(event) {
                    for object in either(&transition) {
                        let (namespace, name) = place(&**object);
                        dirty.push(Key::Deployment(namespace, name));
                    }
                }
            }
            Change::DaemonSet(event) => {
                for transition in self.daemons.observe(event) {
                    dirty.extend(either(&transition).map(|set| daemon_key(set)));
                }
            }
        }
        dirty
    }

    fn concerned_by_pod(&self, pod: &Pod, dirty: &mut Vec<Key>) {
        let namespace = pod.namespace().unwrap_or_default();
        let Some(owner) = pods::controller(&pod.metadata) else {
            // Nobody's: whose selector fits may have it.
            let labels = pod.metadata.labels.as_ref();
            for set in self.sets.in_namespace(&namespace) {
                let fits = set
                    .spec
                    .as_ref()
                    .is_some_and(|spec| pods::selects(&spec.selector, labels));
                if fits {
                    dirty.push(Key::ReplicaSet(namespace.clone(), set.name_any()));
                }
            }
            for object in self.controllers.in_namespace(&namespace) {
                dirty.push(Key::ReplicationController(namespace.clone(), object.name_any()));
            }
            return;
        };
        let name = owner.name.clone();
        match owner.kind.as_str() {
            "ReplicaSet" => {
                // A Deployment that recreates waits for the last pod of its old set.
                if let Some(set) = self.sets.get(&namespace, &name)
                    && let Some(deployment) = pods::controller(&set.metadata)
                {
                    dirty.push(Key::Deployment(namespace.clone(), deployment.name.clone()));
                }
                dirty.push(Key::ReplicaSet(namespace, name));
            }
            "ReplicationController" => dirty.push(Key::ReplicationController(namespace, name)),
            "DaemonSet" => dirty.push(Key::DaemonSet(namespace, name)),
            _ => {}
        }
    }

    fn plan(&self, key: &Key, now: Timestamp) -> Plan {
        match key {
            Key::ReplicaSet(namespace, name) => self
                .sets
                .get(namespace, name)
                .and_then(|set| Set::of_replica_set(set))
                .map(|set| set.plan(self.pods.in_namespace(namespace), now)),
            Key::ReplicationController(namespace, name) => self
                .controllers
                .get(namespace, name)
                .and_then(|object| Set::of_replication_controller(object))
                .map(|set| set.plan(self.pods.in_namespace(namespace), now)),
            Key::Deployment(namespace, name) => self.deployments.get(namespace, name).map(|deployment| {
                deployment::plan(
                    deployment,
                    self.sets.in_namespace(namespace),
                    self.pods.in_namespace(namespace),
                    now,
                )
            }),
            Key::DaemonSet(namespace, name) => self
                .daemons
                .get(namespace, name)
                .map(|set| daemon::plan(set, self.nodes.all(), self.pods.in_namespace(namespace), now)),
        }
        .unwrap_or_default()
    }

    fn wrote(&mut self, written: Written) {
        match written {
            Written::Pod(pod) => self.pods.wrote(*pod),
            Written::Set(set) => self.sets.wrote(*set),
            Written::Deployment(deployment) => self.deployments.wrote(*deployment),
            Written::DaemonSet(set) => self.daemons.wrote(*set),
            Written::ReplicationController(object) => self.controllers.wrote(*object),
        }
    }
}

fn daemon_key(set: &DaemonSet) -> Key {
    let (namespace, name) = place(set);
    Key::DaemonSet(namespace, name)
}

/// Heartbeats of a node change nothing about which pods belong there.
fn node_matters(transition: &Transition<Node>) -> bool {
    match transition {
        (Some(before), Some(after)) => {
            before.metadata.labels != after.metadata.labels || before.spec != after.spec
        }
        _ => true,
    }
}

struct Workloads {
    client: Client,
    view: View,
}

impl Controller for Workloads {
    type Key = Key;
    type Change = Change;
    type Done = Vec<Written>;
    const NAME: &'static str = "workload controllers";
    const PARALLEL: usize = 16;
    const BATCH: Duration = Duration::from_millis(10);

    fn is_complete(&self) -> bool {
        self.view.is_complete()
    }

    fn observe(&mut self, change: Change) -> Vec<Key> {
        self.view.observe(change)
    }

    fn decide(&mut self, key: &Key) -> Next<Vec<Written>> {
        let plan = self.view.plan(key, Timestamp::now());
        let again = plan
            .again
            .map(|seconds| Duration::from_secs(seconds.clamp(1, 3600).unsigned_abs()));
        if plan.actions.is_empty() {
            return Next::later(again);
        }
        Next::requests(carry_out(self.client.clone(), plan.actions), again)
    }

    fn done(&mut self, _: &Key, written: Vec<Written>) -> bool {
        for written in written {
            self.view.wrote(written);
        }
        // What was written is the ground for what comes next.
        true
    }
}

/// Carries out what belongs to one object. Requests run side by side; the first failure keeps the rest from starting.
async fn carry_out(client: Client, actions: Vec<Action>) -> (Vec<Written>, Result<(), String>) {
    let mut written = Vec::new();
    let mut results = stream::iter(actions)
        .map(|action| carry_out_one(&client, action))
        .buffer_unordered(REQUESTS);
    while let Some(result) = results.next().await {
        match result {
            Ok(object) => written.extend(object),
            Err(error) => return (written, Err(error)),
        }
    }
    (written, Ok(()))
}

async fn carry_out_one(client: &Client, action: Action) -> Result<Option<Written>, String> {
    let merge = |patch: &Value| Patch::Merge(patch.clone());
    let params = PatchParams {
        field_manager: Some(MANAGER.to_owned()),
        ..PatchParams::default()
    };
    let post = PostParams {
        field_manager: Some(MANAGER.to_owned()),
        ..PostParams::default()
    };
    match action {
        Action::CreatePod { pod, by } => {
            let api: Api<Pod> = Api::namespaced(client.clone(), &by.namespace);
            match api.create(&post, &pod).await {
                Ok(pod) => {
                    let message = format!("Created pod: {}", pod.name_any());
                    events::normal(client, &by.reference(), "SuccessfulCreate", &message).await;
                    Ok(Some(Written::Pod(Box::new(pod))))
                }
                Err(error) if is_gone(&error) => Ok(None),
                Err(error) => {
                    let message = format!("Error creating: {error}");
                    events::warning(client, &by.reference(), "FailedCreate", &message).await;
                    Err(message)
                }
            }
        }
        Action::DeletePod { pod, by } => {
            let api: Api<Pod> = Api::namespaced(client.clone(), &by.namespace);
            let name = pod.name_any();
            let delete = DeleteParams {
                preconditions: Some(Preconditions {
                    uid: pod.metadata.uid.clone(),
                    ..Preconditions::default()
                }),
                ..DeleteParams::default()
            };
            match api.delete(&name, &delete).await {
                Ok(answer) => {
                    let message = format!("Deleted pod: {name}");
                    events::normal(client, &by.reference(), "SuccessfulDelete", &message).await;
                    let Some(mut pod) = answer.left() else {
                        return Ok(None);
                    };
                    // Counted out until the watch shows that it is gone.
                    if pod.metadata.deletion_timestamp.is_none() {
                        let now = k8s_openapi::apimachinery::pkg::apis::meta::v1::Time(Timestamp::now());
                        pod.metadata.deletion_timestamp = Some(now);
                    }
                    Ok(Some(Written::Pod(Box::new(pod))))
                }
                Err(kube::Error::Api(status)) if matches!(status.code, 404 | 409) => Ok(None),
                Err(error) => Err(format!("delete pod {name}: {error}")),
            }
        }
        Action::Adopt { pod, owner } => {
            let mut owners = pod.metadata.owner_references.clone().unwrap_or_default();
            owners.push(owner);
            patch_owners(client, &*pod, &owners)
                .await
                .map(|pod| pod.map(|pod| Written::Pod(Box::new(pod))))
        }
        Action::Disown { pod, owner } => {
            let mut owners = pod.metadata.owner_references.clone().unwrap_or_default();
            owners.retain(|reference| reference.uid != owner);
            patch_owners(client, &*pod, &owners)
                .await
                .map(|pod| pod.map(|pod| Written::Pod(Box::new(pod))))
        }
        Action::AdoptSet { set, owner } => {
            let mut owners = set.metadata.owner_references.clone().unwrap_or_default();
            owners.push(owner);
            patch_owners(client, &*set, &owners)
                .await
                .map(|set| set.map(|set| Written::Set(Box::new(set))))
        }
        Action::CreateSet { set, by, collisions } => {
            let api: Api<ReplicaSet> = Api::namespaced(client.clone(), &by.namespace);
            let replicas = set.spec.as_ref().and_then(|spec| spec.replicas).unwrap_or(0);
            match api.create(&post, &set).await {
                Ok(set) => {
                    let message = format!("Scaled up replica set {} from 0 to {replicas}", set.name_any());
                    events::normal(client, &by.reference(), "ScalingReplicaSet", &message).await;
                    Ok(Some(Written::Set(Box::new(set))))
                }
                // Another template has the same short name: the next one is made with another number.
                Err(kube::Error::Api(status)) if status.reason == "AlreadyExists" => {
                    let status = json!({"collisionCount": collisions.saturating_add(1)});
                    write_status(client, &by, &status, &params).await
                }
                Err(error) if is_gone(&error) => Ok(None),
                Err(error) => Err(format!("create a replica set: {error}")),
            }
        }
        Action::PatchSet { set, patch, event } => {
            let (namespace, name) = place(&*set);
            let api: Api<ReplicaSet> = Api::namespaced(client.clone(), &namespace);
            match api.patch(&name, &params, &merge(&patch)).await {
                Ok(set) => {
                    if let Some((by, reason, message)) = event {
                        events::normal(client, &by.reference(), reason, &message).await;
                    }
                    Ok(Some(Written::Set(Box::new(set))))
                }
                Err(kube::Error::Api(status)) if status.code == 404 => Ok(None),
                Err(error) => Err(format!("change replica set {name}: {error}")),
            }
        }
        Action::DeleteSet(set) => {
            let (namespace, name) = place(&*set);
            let api: Api<ReplicaSet> = Api::namespaced(client.clone(), &namespace);
            let params = DeleteParams {
                propagation_policy: Some(PropagationPolicy::Background),
                ..DeleteParams::default()
            };
            match api.delete(&name, &params).await {
                Err(error) if !is_gone(&error) => Err(format!("delete replica set {name}: {error}")),
                _ => Ok(None),
            }
        }
        Action::PatchDeployment { of, patch } => {
            let api: Api<Deployment> = Api::namespaced(client.clone(), &of.namespace);
            match api.patch(&of.name, &params, &merge(&patch)).await {
                Ok(deployment) => Ok(Some(Written::Deployment(Box::new(deployment)))),
                Err(error) if is_gone(&error) => Ok(None),
                Err(error) => Err(format!("change deployment {}: {error}", of.name)),
            }
        }
        Action::Status { of, status } => write_status(client, &of, &status, &params).await,
    }
}

async fn write_status(
    client: &Client,
    of: &Subject,
    status: &Value,
    params: &PatchParams,
) -> Result<Option<Written>, String> {
    let patch = Patch::Merge(json!({"metadata": {"uid": of.uid}, "status": status}));
    let (namespace, name) = (of.namespace.as_str(), of.name.as_str());
    macro_rules! write {
        ($kind:ident, $written:ident) => {
            Api::<$kind>::namespaced(client.clone(), namespace)
                .patch_status(name, params, &patch)
                .await
                .map(|object| Written::$written(Box::new(object)))
        };
    }
    let written = match of.kind {
        "ReplicaSet" => write!(ReplicaSet, Set),
        "ReplicationController" => write!(ReplicationController, ReplicationController),
        "Deployment" => write!(Deployment, Deployment),
        _ => write!(DaemonSet, DaemonSet),
    };
    match written {
        Ok(written) => Ok(Some(written)),
        Err(kube::Error::Api(status)) if matches!(status.code, 404 | 409) => Ok(None),
        Err(error) => Err(format!("write the status of {} {name}: {error}", of.kind)),
    }
}

async fn patch_owners<K>(client: &Client, object: &K, owners: &[OwnerReference]) -> Result<Option<K>, String>
where
    K: kube::Resource<DynamicType = (), Scope = kube::core::NamespaceResourceScope>
        + Clone
        + k8s_openapi::serde::de::DeserializeOwned
        + std::fmt::Debug,
{
    let (namespace, name) = place(object);
    let api: Api<K> = Api::namespaced(client.clone(), &namespace);
    // The object must still be as it was when this was decided.
    let meta = json!({
        "uid": object.meta().uid, "resourceVersion": object.meta().resource_version, "ownerReferences": owners,
    });
    let patch = Patch::Merge(json!({"metadata": meta}));
    match api.patch(&name, &PatchParams::default(), &patch).await {
        Ok(object) => Ok(Some(object)),
        Err(kube::Error::Api(status)) if matches!(status.code, 404 | 409) => Ok(None),
        Err(error) => Err(format!("change the owner of {name}: {error}")),
    }
}

/// Nothing can be made in a namespace that is going, and what is gone needs nothing.
fn is_gone(error: &kube::Error) -> bool {
    match error {
        kube::Error::Api(status) => {
            status.code == 404 || status.code == 403 && status.message.contains("being terminated")
        }
        _ => false,
    }
}
