//! Which node a pod goes to: filters say where it can be, scores where it is best (kube-scheduler's default plugins, without
//! preemption). No I/O.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{Pod, PodSpec, Taint, Toleration};
use kube::ResourceExt as _;

use super::cluster::{Cluster, Place};
use super::resources::{self, CPU, MEMORY, PODS, Resources};
use super::topology::Neighbours;
use crate::controllers::placement;

/// The best score of one kind.
const BEST: i64 = 100;
/// kube-scheduler's weights.
const WEIGHT_RESOURCES: i64 = 1;
const WEIGHT_BALANCE: i64 = 1;
const WEIGHT_SPREAD: i64 = 2;
const WEIGHT_NODE_AFFINITY: i64 = 2;
const WEIGHT_NEIGHBOURS: i64 = 2;
const WEIGHT_TAINTS: i64 = 3;

/// What a pod asks of a node.
struct Demand<'a> {
    pod: &'a Pod,
    spec: &'a PodSpec,
    requests: Resources,
    compared: Resources,
    tolerations: &'a [Toleration],
    neighbours: Neighbours,
}

/// The name of the best node.
///
/// # Errors
/// Why there is none, in kube-scheduler's words.
pub(super) fn choose(cluster: &Cluster, pod: &Pod) -> Result<String, String> {
    let none = PodSpec::default();
    let spec = pod.spec.as_ref().unwrap_or(&none);
    let demand = Demand {
        pod,
        spec,
        requests: resources::of_pod(spec),
        compared: resources::compared(spec),
        tolerations: spec.tolerations.as_deref().unwrap_or_default(),
        neighbours: Neighbours::of(cluster, pod, spec),
    };
    let mut fitting: Vec<Place<'_>> = Vec::new();
    let mut refusals: BTreeMap<String, usize> = BTreeMap::new();
    let mut total = 0;
    for place in cluster.places() {
        total += 1;
        let reasons = demand.refusals(&place);
        if reasons.is_empty() {
            fitting.push(place);
        }
        for reason in reasons {
            *refusals.entry(reason).or_default() += 1;
        }
    }
    if let Some(best) = demand.best(&fitting) {
        return Ok(best);
    }
    if total == 0 {
        return Err("no nodes available to schedule pods".to_owned());
    }
    let mut reasons: Vec<String> = refusals
        .iter()
        .map(|(reason, nodes)| format!("{nodes} {reason}"))
        .collect();
    reasons.sort();
    Err(format!("0/{total} nodes are available: {}.", reasons.join(", ")))
}

impl Demand<'_> {
    /// Why the pod cannot be at the place: what the first filter says that refuses it.
    fn refusals(&self, place: &Place<'_>) -> Vec<String> {
        let one = |reason: &str| vec![reason.to_owned()];
        let spec = place.node.spec.as_ref();
        let unschedulable = Taint {
            key: "node.kubernetes.io/unschedulable".to_owned(),
            effect: "NoSchedule".to_owned(),
            ..Taint::default()
        };
        if spec.and_then(|spec| spec.unschedulable) == Some(true)
            && !placement::tolerates(self.tolerations, &unschedulable)
        {
            return one("node(s) were unschedulable");
        }
        if let Some(taint) = self.bad_taints(place, &["NoSchedule", "NoExecute"]).next() {
            let value = taint.value.as_deref().unwrap_or_default();
            return one(&format!(
                "node(s) had untolerated taint {{{}: {value}}}",
                taint.key
            ));
        }
        if !placement::selects_node(self.spec, place.node) {
            return one("node(s) didn't match Pod's node affinity/selector");
        }
        let clash = host_ports(self.spec).any(|port| {
            let others = place.load.pods.values().filter_map(|other| other.spec.as_ref());
            others.flat_map(host_ports).any(|other| port.clashes(&other))
        });
        if clash {
            return one("node(s) didn't have free ports for the requested pod ports");
        }
        let short = self.short_of(place);
        if !short.is_empty() {
            return short;
        }
        self.neighbours.refusal(place).map(one).unwrap_or_default()
    }

    fn bad_taints<'p>(&self, place: &Place<'p>, effects: &[&str]) -> impl Iterator<Item = &'p Taint> {
        let spec = place.node.spec.as_ref();
        let taints = spec.and_then(|spec| spec.taints.as_deref()).unwrap_or_default();
        taints.iter().filter(|taint| {
            effects.contains(&taint.effect.as_str()) && !placement::tolerates(self.tolerations, taint)
        })
    }

    fn short_of(&self, place: &Place<'_>) -> Vec<String> {
        let lacks = |(name, amount): &(&str, i128)| {
            *amount > 0 && place.load.taken.get(name) + amount > place.offers.get(name)
        };
        let say = |name: &str| match name {
            PODS => "Too many pods".to_owned(),
            other => format!("Insufficient {other}"),
        };
        self.requests
            .iter()
            .filter(lacks)
            .map(|(name, _)| say(name))
            .collect()
    }

    /// The name of the best place: the highest score, then the fewest pods, then the name.
    fn best(&self, places: &[Place<'_>]) -> Option<String> {
        let crowds: Vec<i64> = places.iter().map(|place| self.crowd(place)).collect();
        let taints: Vec<i64> = places
            .iter()
            .map(|place| count(self.bad_taints(place, &["PreferNoSchedule"])))
            .collect();
        let wishes: Vec<i64> = places.iter().map(|place| self.node_wishes(place)).collect();
        let attractions: Vec<i64> = places
            .iter()
            .map(|place| self.neighbours.attraction(place))
            .collect();
        let kinds = [
            (WEIGHT_SPREAD, normalized(&crowds, true)),
            (WEIGHT_TAINTS, normalized(&taints, true)),
            (WEIGHT_NODE_AFFINITY, normalized(&wishes, false)),
            (WEIGHT_NEIGHBOURS, normalized(&attractions, false)),
        ];
        let score = |index: usize, place: &Place<'_>| -> i64 {
            let (room, balance) = self.room(place);
            let relative = kinds
                .iter()
                .map(|(weight, scores)| weight * scores.get(index).copied().unwrap_or(0));
            room * WEIGHT_RESOURCES + balance * WEIGHT_BALANCE + relative.sum::<i64>()
        };
        let best = places.iter().enumerate().min_by_key(|(index, place)| {
            let name = place.node.metadata.name.as_deref();
            (
                std::cmp::Reverse(score(*index, place)),
                place.load.pods.len(),
                name,
            )
        });
        best.map(|(_, place)| place.node.name_any())
    }

    /// Pods of the same controller, and those that the pod would rather not be with.
    fn crowd(&self, place: &Place<'_>) -> i64 {
        let own = placement::controller(&self.pod.metadata).map(|owner| owner.uid.as_str());
        let same = place.load.pods.values().filter(|other| {
            own.is_some() && placement::controller(&other.metadata).map(|owner| owner.uid.as_str()) == own
        });
        count(same) + self.neighbours.crowd(place)
    }

    fn node_wishes(&self, place: &Place<'_>) -> i64 {
        let affinity = self.spec.affinity.as_ref();
        let wishes = affinity
            .and_then(|affinity| affinity.node_affinity.as_ref())
            .into_iter()
            .flat_map(|affinity| &affinity.preferred_during_scheduling_ignored_during_execution)
            .flatten();
        wishes
            .filter(|wish| placement::matches(&wish.preference, place.node))
            .map(|wish| i64::from(wish.weight))
            .sum()
    }

    /// How much of the place would stay free, and how evenly CPU and memory would be used.
    fn room(&self, place: &Place<'_>) -> (i64, i64) {
        let used = [CPU, MEMORY].map(|name| {
            let offers = place.offers.get(name);
            let taken = place.load.compared.get(name) + self.compared.get(name);
            if offers <= 0 {
                BEST
            } else {
                i64::try_from(taken * i128::from(BEST) / offers).map_or(BEST, |share| share.clamp(0, BEST))
            }
        });
        let [cpu, memory] = used;
        // The standard deviation of two shares is half of their difference.
        (BEST - i64::midpoint(cpu, memory), BEST - (cpu - memory).abs() / 2)
    }
}

fn count<T>(items: impl Iterator<Item = T>) -> i64 {
    i64::try_from(items.count()).unwrap_or(i64::MAX)
}

/// Scores from 0 to [`BEST`] of values that are only good or bad beside each other.
fn normalized(values: &[i64], less_is_better: bool) -> Vec<i64> {
    let (Some(least), Some(most)) = (values.iter().min(), values.iter().max()) else {
        return Vec::new();
    };
    let span = most - least;
    let score = |value: &i64| match (span, less_is_better) {
        (0, _) => 0,
        (_, true) => BEST * (most - value) / span,
        (_, false) => BEST * (value - least) / span,
    };
    values.iter().map(score).collect()
}

/// A port of the node itself that a pod takes.
struct HostPort<'a> {
    protocol: &'a str,
    address: &'a str,
    port: i32,
}

impl HostPort<'_> {
    fn clashes(&self, other: &Self) -> bool {
        let any = |address: &str| matches!(address, "" | "0.0.0.0" | "::");
        self.port == other.port
            && self.protocol == other.protocol
            && (any(self.address) || any(other.address) || self.address == other.address)
    }
}

fn host_ports(spec: &PodSpec) -> impl Iterator<Item = HostPort<'_>> {
    let ports = spec
        .containers
        .iter()
        .flat_map(|container| container.ports.iter().flatten());
    ports.filter_map(|port| {
        Some(HostPort {
            protocol: port.protocol.as_deref().unwrap_or("TCP"),
            address: port.host_ip.as_deref().unwrap_or_default(),
            port: port.host_port.filter(|port| *port > 0)?,
        })
    })
}
