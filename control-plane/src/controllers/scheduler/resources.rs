//! What pods ask for and what nodes have.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{Container, Node, PodSpec};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;

use crate::quantity;

pub(super) const CPU: &str = "cpu";
pub(super) const MEMORY: &str = "memory";
/// How many pods a node takes.
pub(super) const PODS: &str = "pods";
/// What a container that asks for nothing counts as when nodes are compared: a tenth of a CPU and 200 MB, in thousandths
/// (kube-scheduler `GetNonzeroRequests`).
const ASSUMED: [(&str, i128); 2] = [(CPU, 100), (MEMORY, 200 * 1024 * 1024 * 1000)];

/// Amounts by name of the resource, in thousandths.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Resources(BTreeMap<String, i128>);

impl Resources {
    pub(super) fn get(&self, name: &str) -> i128 {
        self.0.get(name).copied().unwrap_or(0)
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (&str, i128)> {
        self.0.iter().map(|(name, amount)| (name.as_str(), *amount))
    }

    fn of(quantities: Option<&BTreeMap<String, Quantity>>) -> Self {
        let known = quantities
            .into_iter()
            .flatten()
            .filter_map(|(name, amount)| Some((name.clone(), quantity::milli(&amount.0)?)));
        Self(known.collect())
    }

    pub(super) fn add(&mut self, other: &Self) {
        for (name, amount) in &other.0 {
            *self.0.entry(name.clone()).or_default() += amount;
        }
    }

    pub(super) fn subtract(&mut self, other: &Self) {
        for (name, amount) in &other.0 {
            *self.0.entry(name.clone()).or_default() -= amount;
        }
    }

    /// Each amount at least as large as that of `other`.
    fn at_least(&mut self, other: &Self) {
        for (name, amount) in &other.0 {
            let own = self.0.entry(name.clone()).or_default();
            *own = (*own).max(*amount);
        }
    }

    /// What the node offers to pods. One that says nothing offers nothing.
    pub(super) fn of_node(node: &Node) -> Self {
        Self::of(
            node.status
                .as_ref()
                .and_then(|status| status.allocatable.as_ref()),
        )
    }
}

/// A limit without a request is a request.
fn of_container(container: &Container) -> Resources {
    let resources = container.resources.as_ref();
    let mut requests = Resources::of(resources.and_then(|resources| resources.limits.as_ref()));
    let given = Resources::of(resources.and_then(|resources| resources.requests.as_ref()));
    requests.0.extend(given.0);
    requests
}

/// What the pod takes from its node (k8s.io/component-helpers `resource.PodRequests`): its containers together with the init
/// containers that stay, or what the greediest moment of its start needs.
pub(super) fn of_pod(spec: &PodSpec) -> Resources {
    total(spec, of_container)
}

/// The same for comparing nodes, where a container that asks for nothing counts a little too.
pub(super) fn compared(spec: &PodSpec) -> Resources {
    total(spec, |container| {
        let mut requests = of_container(container);
        for (name, amount) in ASSUMED {
            requests.0.entry(name.to_owned()).or_insert(amount);
        }
        requests
    })
}

fn total(spec: &PodSpec, of: impl Fn(&Container) -> Resources) -> Resources {
    let mut stays = Resources::default();
    let mut peak = Resources::default();
    for container in spec.init_containers.iter().flatten() {
        let mut moment = of(container);
        if container.restart_policy.as_deref() == Some("Always") {
            stays.add(&moment);
            peak.at_least(&stays);
        } else {
            moment.add(&stays);
            peak.at_least(&moment);
        }
    }
    for container in &spec.containers {
        stays.add(&of(container));
    }
    stays.at_least(&peak);
    stays.add(&Resources::of(spec.overhead.as_ref()));
    stays.0.insert(PODS.to_owned(), 1000);
    stays
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn the_greediest_moment_counts() {
        let spec: PodSpec = serde_json::from_value(json!({
            "initContainers": [
                {"name": "a", "resources": {"requests": {"cpu": "2"}}},
                {"name": "side", "restartPolicy": "Always", "resources": {"requests": {"cpu": "500m"}}},
                {"name": "b", "resources": {"requests": {"cpu": "1", "memory": "1k"}}},
            ],
            "containers": [
                {"name": "c", "resources": {"requests": {"cpu": "250m"}, "limits": {"cpu": "1", "memory": "100"}}},
                {"name": "d"},
            ],
            "overhead": {"cpu": "10m"},
        }))
        .unwrap();
        let requests = of_pod(&spec);
        // The first init container alone; the second one while the sidecar runs; all containers need less.
        assert_eq!(requests.get(CPU), 2010);
        assert_eq!(requests.get(MEMORY), 1_000_000);
        assert_eq!(requests.get(PODS), 1000);
        assert_eq!(
            compared(&spec).get(MEMORY),
            2 * 200 * 1024 * 1024 * 1000 + 100_000
        );
    }
}
