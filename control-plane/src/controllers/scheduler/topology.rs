//! Where pods want to be with respect to other pods: affinity, anti-affinity, spread (kube-scheduler `interpodaffinity`,
//! `podtopologyspread`).

use std::collections::{HashMap, HashSet};

use k8s_openapi::api::core::v1::{Affinity, Pod, PodAffinityTerm, PodSpec, TopologySpreadConstraint};

use super::cluster::{Cluster, Place};
use crate::controllers::{labels, placement};

/// A topology domain: the label's key and value.
type Domain = (String, String);

/// What the pods that are there mean for one that is to come.
#[derive(Debug, Default)]
pub(super) struct Neighbours {
    /// For each required affinity term its key, and the values of the domains that have a pod it is for.
    wanted: Vec<(String, HashSet<String>)>,
    /// No pod is there that any term is for, but the pod itself is one: it is the first of its group.
    first: bool,
    /// Domains that the pod must not be in.
    avoided: HashSet<Domain>,
    /// Domains that other pods do not want it in.
    refused: HashSet<Domain>,
    /// What being in a domain is worth.
    preferred: HashMap<Domain, i64>,
    spreads: Vec<Spread>,
}

#[derive(Debug)]
struct Spread {
    key: String,
    required: bool,
    /// Difference to the emptiest domain that there may be.
    max_skew: i64,
    /// The pod counts itself.
    own: i64,
    counts: HashMap<String, i64>,
}

fn affinity(pod: &Pod) -> Option<&Affinity> {
    pod.spec.as_ref()?.affinity.as_ref()
}

fn namespace(pod: &Pod) -> &str {
    pod.metadata.namespace.as_deref().unwrap_or_default()
}

/// Whether a term that `of` bears is for the pod.
fn is_for(cluster: &Cluster, of: &Pod, term: &PodAffinityTerm, pod: &Pod) -> bool {
    let Some(selector) = &term.label_selector else {
        return false;
    };
    let place = namespace(pod);
    let named = term.namespaces.as_deref().unwrap_or_default();
    let in_namespace = match &term.namespace_selector {
        None if named.is_empty() => place == namespace(of),
        None => named.iter().any(|name| name == place),
        Some(selector) => {
            named.iter().any(|name| name == place) || labels::fit(selector, cluster.namespace_labels(place))
        }
    };
    in_namespace && labels::fit(selector, pod.metadata.labels.as_ref())
}

fn required_apart(pod: &Pod) -> impl Iterator<Item = &PodAffinityTerm> {
    affinity(pod)
        .and_then(|affinity| affinity.pod_anti_affinity.as_ref())
        .into_iter()
        .flat_map(|apart| {
            apart
                .required_during_scheduling_ignored_during_execution
                .iter()
                .flatten()
        })
}

impl Neighbours {
    pub(super) fn of(cluster: &Cluster, pod: &Pod, spec: &PodSpec) -> Self {
        let mut found = Self {
            spreads: spreads(pod, spec),
            ..Self::default()
        };
        let together = affinity(pod).and_then(|affinity| affinity.pod_affinity.as_ref());
        let apart = affinity(pod).and_then(|affinity| affinity.pod_anti_affinity.as_ref());
        let wanted: Vec<&PodAffinityTerm> = together
            .into_iter()
            .flat_map(|together| {
                together
                    .required_during_scheduling_ignored_during_execution
                    .iter()
                    .flatten()
            })
            .collect();
        found.wanted = wanted
            .iter()
            .map(|term| (term.topology_key.clone(), HashSet::new()))
            .collect();
        let preferred: Vec<(&PodAffinityTerm, i64)> = together
            .into_iter()
            .flat_map(|together| &together.preferred_during_scheduling_ignored_during_execution)
            .flatten()
            .map(|term| (&term.pod_affinity_term, i64::from(term.weight)))
            .chain(
                apart
                    .into_iter()
                    .flat_map(|apart| &apart.preferred_during_scheduling_ignored_during_execution)
                    .flatten()
                    .map(|term| (&term.pod_affinity_term, -i64::from(term.weight))),
            )
            .collect();
        for place in cluster.places() {
            let domain = |key: &str| place.label(key).map(|value| (key.to_owned(), value.to_owned()));
            for other in place.load.pods.values() {
                for (term, (_, domains)) in wanted.iter().zip(&mut found.wanted) {
                    if is_for(cluster, pod, term, other) {
                        domains.extend(place.label(&term.topology_key).map(str::to_owned));
                    }
                }
                let avoided = required_apart(pod).filter(|term| is_for(cluster, pod, term, other));
                found
                    .avoided
                    .extend(avoided.filter_map(|term| domain(&term.topology_key)));
                let refused = required_apart(other).filter(|term| is_for(cluster, other, term, pod));
                found
                    .refused
                    .extend(refused.filter_map(|term| domain(&term.topology_key)));
                for (term, weight) in &preferred {
                    if is_for(cluster, pod, term, other)
                        && let Some(domain) = domain(&term.topology_key)
                    {
                        *found.preferred.entry(domain).or_default() += weight;
                    }
                }
            }
            count(&mut found.spreads, pod, spec, &place);
        }
        found.first = found.wanted.iter().all(|(_, domains)| domains.is_empty())
            && wanted.iter().all(|term| is_for(cluster, pod, term, pod));
        found
    }

    /// Why the pod cannot be at the place, if so.
    pub(super) fn refusal(&self, place: &Place<'_>) -> Option<&'static str> {
        for spread in self.spreads.iter().filter(|spread| spread.required) {
            let Some(value) = place.label(&spread.key) else {
                return Some("node(s) didn't match pod topology spread constraints (missing required label)");
            };
            let least = spread.counts.values().min().copied().unwrap_or(0);
            let there = spread.counts.get(value).copied().unwrap_or(0);
            if there + spread.own - least > spread.max_skew {
                return Some("node(s) didn't match pod topology spread constraints");
            }
        }
        let has = |domains: &HashSet<Domain>| {
            domains
                .iter()
                .any(|(key, value)| place.label(key) == Some(value.as_str()))
        };
        let at_wanted = self.wanted.iter().all(|(key, domains)| match place.label(key) {
            Some(value) => self.first || domains.contains(value),
            None => false,
        });
        if !at_wanted {
            return Some("node(s) didn't match pod affinity rules");
        }
        if has(&self.avoided) {
            return Some("node(s) didn't match pod anti-affinity rules");
        }
        has(&self.refused).then_some("node(s) didn't satisfy existing pods anti-affinity rules")
    }

    /// What the neighbours at the place are worth: more is better.
    pub(super) fn attraction(&self, place: &Place<'_>) -> i64 {
        let worth = self
            .preferred
            .iter()
            .filter(|((key, value), _)| place.label(key) == Some(value.as_str()));
        worth.map(|(_, weight)| weight).sum()
    }

    /// How many pods of its kind are there already, where it would rather be alone.
    pub(super) fn crowd(&self, place: &Place<'_>) -> i64 {
        let wishes = self.spreads.iter().filter(|spread| !spread.required);
        wishes
            .filter_map(|spread| spread.counts.get(place.label(&spread.key)?))
            .sum()
    }
}

fn spreads(pod: &Pod, spec: &PodSpec) -> Vec<Spread> {
    let spread = |constraint: &TopologySpreadConstraint| Spread {
        key: constraint.topology_key.clone(),
        required: constraint.when_unsatisfiable == "DoNotSchedule",
        max_skew: i64::from(constraint.max_skew),
        own: i64::from(is_counted(constraint, pod)),
        counts: HashMap::new(),
    };
    let constraints = spec.topology_spread_constraints.iter().flatten();
    constraints.map(spread).collect()
}

fn is_counted(constraint: &TopologySpreadConstraint, pod: &Pod) -> bool {
    constraint
        .label_selector
        .as_ref()
        .is_some_and(|selector| labels::fit(selector, pod.metadata.labels.as_ref()))
}

/// Counts the pods of a place, if it is one that the pod may be at by its own choice of nodes.
fn count(spreads: &mut [Spread], pod: &Pod, spec: &PodSpec, place: &Place<'_>) {
    if spreads.is_empty() || !placement::selects_node(spec, place.node) {
        return;
    }
    let constraints = spec.topology_spread_constraints.iter().flatten();
    for (spread, constraint) in spreads.iter_mut().zip(constraints) {
        let Some(value) = place.label(&spread.key) else {
            continue;
        };
        let counted = place.load.pods.values().filter(|other| {
            namespace(other) == namespace(pod)
                && other.metadata.deletion_timestamp.is_none()
                && is_counted(constraint, other)
        });
        let number = i64::try_from(counted.count()).unwrap_or(i64::MAX);
        *spread.counts.entry(value.to_owned()).or_default() += number;
    }
}
