//! What the API holds, as far as the watches have told, and which Services a change concerns.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use k8s_openapi::api::core::v1::{Node, Pod, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::ResourceExt as _;
use kube::runtime::watcher::Event;

use super::SERVICE_NAME;
use super::desired::{SliceChange, delete, desired_slices};
use super::endpoints::selects;

/// Namespace and name of a Service.
pub(super) type Key = (String, String);

/// One watch's view of its objects: by namespace (empty for nodes) and name.
#[derive(Debug)]
struct Kind<K> {
    objects: HashMap<String, BTreeMap<String, K>>,
    /// Objects of a list that is not complete yet.
    listing: Option<Vec<K>>,
    complete: bool,
}

impl<K> Default for Kind<K> {
    fn default() -> Self {
        Self {
            objects: HashMap::new(),
            listing: None,
            complete: false,
        }
    }
}

/// What became of an object: before and after.
type Transition<K> = (Option<K>, Option<K>);

impl<K: kube::Resource<DynamicType = ()> + Clone> Kind<K> {
    fn in_namespace(&self, namespace: &str) -> impl Iterator<Item = &K> {
        self.objects.get(namespace).into_iter().flat_map(BTreeMap::values)
    }

    fn get(&self, namespace: &str, name: &str) -> Option<&K> {
        self.objects.get(namespace)?.get(name)
    }

    fn put(&mut self, object: K) -> Transition<K> {
        let namespace = object.namespace().unwrap_or_default();
        let before = self
            .objects
            .entry(namespace)
            .or_default()
            .insert(object.name_any(), object.clone());
        (before, Some(object))
    }

    fn take(&mut self, namespace: &str, name: &str) -> Transition<K> {
        let Some(objects) = self.objects.get_mut(namespace) else {
            return (None, None);
        };
        let before = objects.remove(name);
        if objects.is_empty() {
            self.objects.remove(namespace);
        }
        (before, None)
    }

    /// Takes in a watch event. A new list counts as one change when it is complete.
    fn observe(&mut self, event: Event<K>) -> Vec<Transition<K>> {
        match event {
            Event::Apply(object) => vec![self.put(object)],
            Event::Delete(object) => {
                vec![self.take(&object.namespace().unwrap_or_default(), &object.name_any())]
            }
            Event::Init => {
                self.listing = Some(Vec::new());
                Vec::new()
            }
            Event::InitApply(object) => {
                self.listing.get_or_insert_default().push(object);
                Vec::new()
            }
            Event::InitDone => {
                self.complete = true;
                let list = self.listing.take().unwrap_or_default();
                let listed: BTreeSet<(String, String)> = list
                    .iter()
                    .map(|o| (o.namespace().unwrap_or_default(), o.name_any()))
                    .collect();
                let known: Vec<(String, String)> = self
                    .objects
                    .iter()
                    .flat_map(|(ns, objects)| objects.keys().map(|name| (ns.clone(), name.clone())))
                    .collect();
                let gone = known.into_iter().filter(|key| !listed.contains(key));
                let mut transitions: Vec<Transition<K>> = Vec::new();
                for (namespace, name) in gone {
                    transitions.push(self.take(&namespace, &name));
                }
                for object in list {
                    transitions.push(self.put(object));
                }
                transitions
            }
        }
    }
}

/// A watch event of any kind. It lives for the moment between the watch and the cache.
#[expect(clippy::large_enum_variant, reason = "one exists at a time")]
pub(super) enum Change {
    Service(Event<Service>),
    Pod(Event<Pod>),
    Node(Event<Node>),
    Slice(Event<EndpointSlice>),
}

/// Everything that decides about slices.
#[derive(Debug, Default)]
pub(super) struct Cache {
    services: Kind<Service>,
    pods: Kind<Pod>,
    nodes: Kind<Node>,
    slices: Kind<EndpointSlice>,
    /// Slices that were deleted here, by uid. The watch may still tell of an earlier change to them.
    deleted: BTreeSet<String>,
}

fn version<K: kube::Resource>(object: &K) -> Option<u64> {
    object.meta().resource_version.as_ref()?.parse().ok()
}

/// Whether the two are the same version of an object.
fn same<K: kube::Resource>(a: Option<&K>, b: Option<&K>) -> bool {
    match (a, b) {
        (Some(a), Some(b)) => {
            a.meta().uid == b.meta().uid
                && a.meta().resource_version.is_some()
                && a.meta().resource_version == b.meta().resource_version
        }
        (None, None) => true,
        _ => false,
    }
}

impl Cache {
    /// Whether every watch has delivered its first list. Before that nothing may be decided.
    pub(super) fn is_complete(&self) -> bool {
        self.services.complete && self.pods.complete && self.nodes.complete && self.slices.complete
    }

    /// Takes in a change and adds the Services that it may concern to `dirty`.
    pub(super) fn observe(&mut self, change: Change, dirty: &mut BTreeSet<Key>) {
        match change {
            Change::Service(event) => {
                for (before, after) in self.services.observe(event) {
                    if !same(before.as_ref(), after.as_ref())
                        && let Some(service) = after.or(before)
                    {
                        dirty.insert((service.namespace().unwrap_or_default(), service.name_any()));
                    }
                }
            }
            Change::Pod(event) => {
                for (before, after) in self.pods.observe(event) {
                    if !same(before.as_ref(), after.as_ref()) {
                        for pod in [before, after].into_iter().flatten() {
                            self.services_of(&pod, dirty);
                        }
                    }
                }
            }
            Change::Node(event) => {
                let mut moved = BTreeSet::new();
                for (before, after) in self.nodes.observe(event) {
                    // A node's heartbeat is nothing to us.
                    let labels = |node: &Option<Node>| node.as_ref().map(|n| n.metadata.labels.clone());
                    if labels(&before) != labels(&after) {
                        moved.extend(after.or(before).map(|n| n.name_any()));
                    }
                }
                if !moved.is_empty() {
                    self.services_on(&moved, dirty);
                }
            }
            Change::Slice(event) => self.observe_slice(event, dirty),
        }
    }

    fn observe_slice(&mut self, event: Event<EndpointSlice>, dirty: &mut BTreeSet<Key>) {
        if let Event::Apply(slice) = &event {
            let uid = slice.uid().unwrap_or_default();
            let known = self
                .slices
                .get(&slice.namespace().unwrap_or_default(), &slice.name_any());
            let older = known.is_some_and(|k| {
                k.uid() == slice.uid()
                    && matches!((version(k), version(slice)), (Some(ours), Some(theirs)) if theirs < ours)
            });
            // An echo of what was overtaken by our own write.
            if older || self.deleted.contains(&uid) {
                return;
            }
        }
        match &event {
            Event::Delete(slice) => {
                self.deleted.remove(&slice.uid().unwrap_or_default());
            }
            // A new list has no echoes of what was before it.
            Event::InitDone => self.deleted.clear(),
            _ => {}
        }
        for (before, after) in self.slices.observe(event) {
            if !same(before.as_ref(), after.as_ref()) {
                for slice in [&before, &after].into_iter().flatten() {
                    dirty.extend(service_of(slice));
                }
            }
        }
    }

    fn services_of(&self, pod: &Pod, dirty: &mut BTreeSet<Key>) {
        let namespace = pod.namespace().unwrap_or_default();
        for service in self.services.in_namespace(&namespace).filter(|s| selects(s, pod)) {
            dirty.insert((namespace.clone(), service.name_any()));
        }
    }

    fn services_on(&self, nodes: &BTreeSet<String>, dirty: &mut BTreeSet<Key>) {
        for pods in self.pods.objects.values() {
            for pod in pods.values() {
                let node = pod.spec.as_ref().and_then(|s| s.node_name.as_ref());
                if node.is_some_and(|n| nodes.contains(n)) {
                    self.services_of(pod, dirty);
                }
            }
        }
    }

    /// What is to be done for a Service; when it is gone, its slices go.
    pub(super) fn changes(&self, key: &Key) -> Vec<SliceChange> {
        let (namespace, name) = key;
        let slices: Vec<&EndpointSlice> = self
            .slices
            .in_namespace(namespace)
            .filter(|s| service_of(s).as_ref() == Some(key))
            .collect();
        let service = self.services.get(namespace, name);
        match service.filter(|s| s.metadata.deletion_timestamp.is_none()) {
            None => slices.into_iter().map(delete).collect(),
            Some(service) => {
                let pods: Vec<&Pod> = self.pods.in_namespace(namespace).collect();
                let none = BTreeMap::new();
                let nodes = self.nodes.objects.get("").unwrap_or(&none);
                desired_slices(service, &pods, nodes, &slices)
            }
        }
    }

    /// Remembers an own write without waiting for the watch to tell of it.
    pub(super) fn wrote(&mut self, slice: EndpointSlice) {
        let known = self
            .slices
            .get(&slice.namespace().unwrap_or_default(), &slice.name_any());
        let newer = known.is_some_and(
            |k| matches!((version(k), version(&slice)), (Some(known), Some(written)) if known > written),
        );
        if !newer {
            self.slices.put(slice);
        }
    }

    /// Remembers an own deletion.
    pub(super) fn deleted(&mut self, namespace: &str, name: &str, uid: &str) {
        let known = self.slices.get(namespace, name);
        if known.is_some_and(|k| k.uid().as_deref() == Some(uid)) {
            self.slices.take(namespace, name);
            self.deleted.insert(uid.to_owned());
        }
    }
}

fn service_of(slice: &EndpointSlice) -> Option<Key> {
    let name = slice.metadata.labels.as_ref()?.get(SERVICE_NAME)?;
    Some((slice.namespace()?, name.clone()))
}
