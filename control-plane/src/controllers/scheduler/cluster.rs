//! Nodes, and the pods that are on them or about to be.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use k8s_openapi::api::core::v1::{Node, Pod, PodSpec};
use kube::ResourceExt as _;

use super::resources::{self, Resources};

/// Namespace and name of a pod.
pub(super) type Key = (String, String);

/// What the pods of a node take.
#[derive(Debug, Default)]
pub(super) struct Load {
    pub(super) pods: BTreeMap<Key, Arc<Pod>>,
    /// What they asked for.
    pub(super) taken: Resources,
    /// The same for comparing nodes.
    pub(super) compared: Resources,
}

/// A node that pods can go to.
#[derive(Debug)]
pub(super) struct Place<'a> {
    pub(super) node: &'a Node,
    pub(super) offers: &'a Resources,
    pub(super) load: &'a Load,
}

impl Place<'_> {
    pub(super) fn label(&self, key: &str) -> Option<&str> {
        let labels = self.node.metadata.labels.as_ref()?;
        labels.get(key).map(String::as_str)
    }
}

/// What the scheduler knows.
#[derive(Debug, Default)]
pub(super) struct Cluster {
    nodes: BTreeMap<String, (Arc<Node>, Resources)>,
    /// By name of the node, which need not be known yet.
    loads: HashMap<String, Load>,
    placed: HashMap<Key, String>,
    /// Labels of namespaces.
    namespaces: HashMap<String, BTreeMap<String, String>>,
    nothing: Load,
}

fn spec(pod: &Pod) -> PodSpec {
    pod.spec.clone().unwrap_or_default()
}

impl Cluster {
    pub(super) fn put_node(&mut self, node: &Arc<Node>) {
        let offers = Resources::of_node(node);
        self.nodes.insert(node.name_any(), (Arc::clone(node), offers));
    }

    pub(super) fn remove_node(&mut self, name: &str) {
        self.nodes.remove(name);
    }

    pub(super) fn set_namespace(&mut self, name: String, labels: Option<BTreeMap<String, String>>) {
        match labels {
            Some(labels) => drop(self.namespaces.insert(name, labels)),
            None => drop(self.namespaces.remove(&name)),
        }
    }

    pub(super) fn namespace_labels(&self, name: &str) -> Option<&BTreeMap<String, String>> {
        self.namespaces.get(name)
    }

    /// In the order of their names.
    pub(super) fn places(&self) -> impl Iterator<Item = Place<'_>> {
        self.nodes.iter().map(|(name, (node, offers))| Place {
            node,
            offers,
            load: self.loads.get(name).unwrap_or(&self.nothing),
        })
    }

    /// Where the pod is, or is about to be.
    pub(super) fn node_of(&self, key: &Key) -> Option<&str> {
        self.placed.get(key).map(String::as_str)
    }

    /// Puts a pod on a node, or changes it there.
    pub(super) fn put(&mut self, key: &Key, node: &str, pod: &Arc<Pod>) {
        self.remove(key);
        let load = self.loads.entry(node.to_owned()).or_default();
        load.taken.add(&resources::of_pod(&spec(pod)));
        load.compared.add(&resources::compared(&spec(pod)));
        load.pods.insert(key.clone(), Arc::clone(pod));
        self.placed.insert(key.clone(), node.to_owned());
    }

    /// Takes a pod away; false if it was nowhere.
    pub(super) fn remove(&mut self, key: &Key) -> bool {
        let Some(node) = self.placed.remove(key) else {
            return false;
        };
        if let Some(load) = self.loads.get_mut(&node)
            && let Some(pod) = load.pods.remove(key)
        {
            load.taken.subtract(&resources::of_pod(&spec(&pod)));
            load.compared.subtract(&resources::compared(&spec(&pod)));
            if load.pods.is_empty() {
                self.loads.remove(&node);
            }
        }
        true
    }
}
