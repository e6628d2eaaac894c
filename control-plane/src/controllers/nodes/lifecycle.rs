//! Whether a node is there: from its lease and heartbeats to conditions, from conditions to taints, from taints to the end
//! of pods (kube-controller-manager `nodelifecycle`, `tainteviction`). No I/O.

use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Node, Pod, Taint};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::ResourceExt as _;
use serde_json::{Value, json};
use tokio::time::Instant;

use super::Action;
use crate::controllers::placement;

/// A node that has shown no sign of life for so long is not known to be there (`--node-monitor-grace-period`).
pub(super) const GRACE: Duration = Duration::from_secs(50);
const REPORTED: [&str; 4] = ["Ready", "MemoryPressure", "DiskPressure", "PIDPressure"];
const NOT_READY: &str = "node.kubernetes.io/not-ready";
const UNREACHABLE: &str = "node.kubernetes.io/unreachable";
const UNSCHEDULABLE: &str = "node.kubernetes.io/unschedulable";
/// Taints that say what conditions say.
const BY_CONDITION: [(&str, &str); 4] = [
    ("MemoryPressure", "node.kubernetes.io/memory-pressure"),
    ("DiskPressure", "node.kubernetes.io/disk-pressure"),
    ("PIDPressure", "node.kubernetes.io/pid-pressure"),
    ("NetworkUnavailable", "node.kubernetes.io/network-unavailable"),
];

/// What a node last showed of itself. Its clock does not matter: what counts is when something changed.
#[derive(Debug)]
pub(super) struct Signs {
    renewed: Option<Timestamp>,
    heartbeat: Option<Timestamp>,
    changed: Instant,
    /// Whether it has an agent.
    watched: bool,
}

impl Signs {
    pub(super) fn new(now: Instant) -> Self {
        Self {
            renewed: None,
            heartbeat: None,
            changed: now,
            watched: false,
        }
    }

    pub(super) fn observe(&mut self, renewed: Option<Timestamp>, node: &Node, now: Instant) {
        let heartbeat = condition(node, "Ready")
            .and_then(|condition| condition.last_heartbeat_time.as_ref())
            .map(|time| time.0);
        self.watched |= renewed.is_some();
        if renewed.is_some() && renewed != self.renewed || heartbeat > self.heartbeat {
            self.changed = now;
        }
        if renewed.is_some() {
            self.renewed = renewed;
        }
        self.heartbeat = self.heartbeat.max(heartbeat);
    }
}

fn condition<'a>(node: &'a Node, kind: &str) -> Option<&'a k8s_openapi::api::core::v1::NodeCondition> {
    let conditions = node.status.as_ref()?.conditions.as_ref()?;
    conditions.iter().find(|condition| condition.type_ == kind)
}

fn state<'a>(node: &'a Node, kind: &str) -> &'a str {
    condition(node, kind).map_or("", |condition| condition.status.as_str())
}

/// What to do about a node and its pods, and when to look again at the latest.
pub(super) fn plan(
    node: &Node,
    signs: &Signs,
    pods: &[Arc<Pod>],
    now: Instant,
    time: Timestamp,
) -> (Vec<Action>, Option<Duration>) {
    let name = node.name_any();
    let mut actions = Vec::new();
    let mut again = None;
    if signs.watched {
        let silent = now.saturating_duration_since(signs.changed);
        if silent < GRACE {
            again = Some(GRACE - silent);
        } else if let Some(patch) = unknown(node, time) {
            actions.push(Action::Status { node: name, patch });
            // Taints follow from the status that is written now.
            return (actions, Some(Duration::from_millis(100)));
        }
    }
    if let Some(patch) = taints(node, time) {
        actions.push(Action::Patch { node: name, patch });
    }
    let unreachable = signs.watched && state(node, "Ready") == "Unknown";
    for pod in pods {
        let ready = pod
            .status
            .as_ref()
            .and_then(|status| status.conditions.as_ref())
            .is_some_and(|list| list.iter().any(|c| c.type_ == "Ready" && c.status == "True"));
        if unreachable && ready {
            actions.push(Action::NotReady {
                namespace: pod.namespace().unwrap_or_default(),
                pod: pod.name_any(),
            });
        }
        match eviction(node, pod, time) {
            Some(left) if left.is_zero() => actions.push(Action::Delete {
                namespace: pod.namespace().unwrap_or_default(),
                pod: pod.name_any(),
                uid: pod.metadata.uid.clone().unwrap_or_default(),
                force: false,
                reason: "TaintManagerEviction",
            }),
            Some(left) => again = Some(again.map_or(left, |again: Duration| again.min(left))),
            None => {}
        }
    }
    (actions, again)
}

/// The status of a node that nothing is heard from; nothing if it says so already.
fn unknown(node: &Node, time: Timestamp) -> Option<Value> {
    let stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ").to_string();
    let conditions: Vec<Value> = REPORTED
        .iter()
        .filter(|kind| state(node, kind) != "Unknown")
        .map(|kind| {
            let (reason, message) = match condition(node, kind) {
                Some(_) => ("NodeStatusUnknown", "Kubelet stopped posting node status."),
                None => ("NodeStatusNeverUpdated", "Kubelet never posted node status."),
            };
            json!({"type": kind, "status": "Unknown", "reason": reason, "message": message, "lastTransitionTime": stamp})
        })
        .collect();
    (!conditions.is_empty()).then(|| json!({"status": {"conditions": conditions}}))
}

/// The node's taints as its conditions want them; nothing if they are so.
fn taints(node: &Node, time: Timestamp) -> Option<Value> {
    let mut wanted: Vec<(&str, &str)> = Vec::new();
    let before = node
        .spec
        .as_ref()
        .and_then(|spec| spec.taints.clone())
        .unwrap_or_default();
    let has = |key: &str, effect: &str| {
        before
            .iter()
            .any(|taint| taint.key == key && taint.effect == effect)
    };
    match state(node, "Ready") {
        "False" => wanted.extend([(NOT_READY, "NoSchedule"), (NOT_READY, "NoExecute")]),
        "Unknown" => wanted.extend([(UNREACHABLE, "NoSchedule"), (UNREACHABLE, "NoExecute")]),
        "True" => {}
        // Nothing is said yet: as it was registered.
        _ if has(NOT_READY, "NoSchedule") => wanted.push((NOT_READY, "NoSchedule")),
        _ => {}
    }
    for (kind, key) in BY_CONDITION {
        if state(node, kind) == "True" {
            wanted.push((key, "NoSchedule"));
        }
    }
    if node.spec.as_ref().and_then(|spec| spec.unschedulable) == Some(true) {
        wanted.push((UNSCHEDULABLE, "NoSchedule"));
    }
    let ours = |taint: &Taint| {
        [NOT_READY, UNREACHABLE, UNSCHEDULABLE].contains(&taint.key.as_str())
            && matches!(taint.effect.as_str(), "NoSchedule" | "NoExecute")
            || taint.effect == "NoSchedule" && BY_CONDITION.iter().any(|(_, key)| *key == taint.key)
    };
    let mut after: Vec<Taint> = before
        .iter()
        .filter(|taint| !ours(taint) || wanted.contains(&(taint.key.as_str(), taint.effect.as_str())))
        .cloned()
        .collect();
    for (key, effect) in wanted {
        if !has(key, effect) {
            after.push(Taint {
                key: key.to_owned(),
                effect: effect.to_owned(),
                value: None,
                time_added: (effect == "NoExecute").then_some(Time(time)),
            });
        }
    }
    if after == before {
        return None;
    }
    let taints = if after.is_empty() {
        Value::Null
    } else {
        json!(after)
    };
    Some(json!({"metadata": {"resourceVersion": node.metadata.resource_version}, "spec": {"taints": taints}}))
}

/// After which time the pod has to leave the node; nothing if it may stay.
fn eviction(node: &Node, pod: &Pod, time: Timestamp) -> Option<Duration> {
    if pod.metadata.deletion_timestamp.is_some() {
        return None;
    }
    let tolerations = pod
        .spec
        .as_ref()
        .and_then(|spec| spec.tolerations.as_deref())
        .unwrap_or_default();
    let taints = node
        .spec
        .as_ref()
        .and_then(|spec| spec.taints.as_deref())
        .unwrap_or_default();
    let mut least: Option<Duration> = None;
    for taint in taints.iter().filter(|taint| taint.effect == "NoExecute") {
        let Some(toleration) = placement::toleration(tolerations, taint) else {
            return Some(Duration::ZERO);
        };
        let Some(seconds) = toleration.toleration_seconds else {
            continue;
        };
        let since = taint.time_added.as_ref().map_or(time, |added| added.0);
        let passed = time.duration_since(since).as_secs();
        let left = Duration::from_secs(u64::try_from(seconds.saturating_sub(passed)).unwrap_or(0));
        least = Some(least.map_or(left, |least| least.min(left)));
    }
    least
}
