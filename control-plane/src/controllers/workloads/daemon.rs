//! DaemonSet: one pod on every node that fits (kube-controller-manager `daemon`).
//!
//! Pods are given their node at once instead of going through a scheduler, so that they also run where none is up.

use std::collections::BTreeMap;
use std::sync::Arc;

use jiff::Timestamp;
use k8s_openapi::api::apps::v1::{DaemonSet, DaemonSetStatus};
use k8s_openapi::api::core::v1::{Node, Pod, PodSpec, Taint, Toleration};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use serde_json::json;

use super::pods;
use super::{Action, Plan, Subject};
use crate::controllers::placement;

const REVISION_HASH: &str = "controller-revision-hash";

/// Taints that its pods live with, whatever their template says.
const TOLERATED: &[(&str, &str)] = &[
    ("node.kubernetes.io/not-ready", "NoExecute"),
    ("node.kubernetes.io/unreachable", "NoExecute"),
    ("node.kubernetes.io/disk-pressure", "NoSchedule"),
    ("node.kubernetes.io/memory-pressure", "NoSchedule"),
    ("node.kubernetes.io/pid-pressure", "NoSchedule"),
    ("node.kubernetes.io/unschedulable", "NoSchedule"),
];

fn tolerations(spec: &PodSpec) -> Vec<Toleration> {
    let mut list = spec.tolerations.clone().unwrap_or_default();
    let network = [("node.kubernetes.io/network-unavailable", "NoSchedule")];
    let more: &[(&str, &str)] = if spec.host_network == Some(true) {
        &network
    } else {
        &[]
    };
    for (key, effect) in TOLERATED.iter().chain(more) {
        let toleration = Toleration {
            key: Some((*key).to_owned()),
            operator: Some("Exists".to_owned()),
            effect: Some((*effect).to_owned()),
            ..Toleration::default()
        };
        if !list.contains(&toleration) {
            list.push(toleration);
        }
    }
    list
}

/// Whether a pod belongs on the node, and whether one that is there may go on.
fn fits(spec: &PodSpec, tolerations: &[Toleration], node: &Node) -> (bool, bool) {
    if !placement::selects_node(spec, node) {
        return (false, false);
    }
    let taints = node
        .spec
        .as_ref()
        .and_then(|spec| spec.taints.as_deref())
        .unwrap_or_default();
    let bad = |effects: &[&str]| {
        taints.iter().any(|taint: &Taint| {
            effects.contains(&taint.effect.as_str()) && !placement::tolerates(tolerations, taint)
        })
    };
    (!bad(&["NoSchedule", "NoExecute"]), !bad(&["NoExecute"]))
}

/// What to do; `all` are the pods of the namespace.
pub(super) fn plan<'a>(
    set: &DaemonSet,
    nodes: impl Iterator<Item = &'a Arc<Node>>,
    all: impl Iterator<Item = &'a Arc<Pod>>,
    now: Timestamp,
) -> Plan {
    let mut plan = Plan::default();
    let Some(spec) = set.spec.as_ref() else {
        return plan;
    };
    let Some(pod_spec) = spec.template.spec.as_ref() else {
        return plan;
    };
    if set.metadata.deletion_timestamp.is_some() {
        return plan;
    }
    let by = Subject::new("apps/v1", "DaemonSet", &set.metadata);
    let uid = set.metadata.uid.as_deref().unwrap_or_default();
    let hash = pods::hash(&spec.template, 0);
    let mut there: BTreeMap<&str, Vec<&Arc<Pod>>> = BTreeMap::new();
    for pod in all {
        if pods::controller(&pod.metadata).is_some_and(|owner| owner.uid == uid) {
            there.entry(pods::node(pod)).or_default().push(pod);
        }
    }
    let min_ready = spec.min_ready_seconds.unwrap_or(0);
    let tolerations = tolerations(pod_spec);
    let mut status = DaemonSetStatus::default();
    let (mut updated, mut available) = (0, 0);
    let mut outdated: Vec<&Arc<Pod>> = Vec::new();
    let delete = |pod: &Arc<Pod>| Action::DeletePod {
        pod: Arc::clone(pod),
        by: by.clone(),
    };
    let mut seen = Vec::new();
    for node in nodes {
        let name = node.metadata.name.as_deref().unwrap_or_default();
        seen.push(name.to_owned());
        let mut here = there.remove(name).unwrap_or_default();
        let (should_run, may_run) = fits(pod_spec, &tolerations, node);
        let ended = |pod: &&Arc<Pod>| matches!(pods::phase(pod), "Succeeded" | "Failed");
        if !should_run {
            let living = here.iter().any(|pod| pods::is_active(pod));
            status.number_misscheduled += i32::from(living);
            if !may_run || !placement::selects_node(pod_spec, node) {
                plan.actions.extend(
                    here.iter()
                        .filter(|pod| pods::is_active(pod))
                        .map(|pod| delete(pod)),
                );
            }
            continue;
        }
        status.desired_number_scheduled += 1;
        plan.actions.extend(
            here.iter()
                .filter(|pod| ended(pod) && pod.metadata.deletion_timestamp.is_none())
                .map(|pod| delete(pod)),
        );
        // One that is on its way out still has the node.
        let leaving = here
            .iter()
            .any(|pod| pod.metadata.deletion_timestamp.is_some() && !ended(pod));
        here.retain(|pod| pods::is_active(pod));
        here.sort_by_key(|pod| pod.metadata.creation_timestamp.as_ref().map(|time| time.0));
        let Some((first, more)) = here.split_first() else {
            if !leaving {
                let mut template = spec.template.clone();
                let meta = template.metadata.get_or_insert_default();
                let labels = meta.labels.get_or_insert_default();
                labels.insert(REVISION_HASH.into(), hash.clone());
                let owner = pods::owner("apps/v1", "DaemonSet", &set.metadata);
                let namespace = set.metadata.namespace.as_deref().unwrap_or_default();
                let prefix = set.metadata.name.as_deref().unwrap_or_default();
                let mut pod = pods::from_template(&template, namespace, prefix, owner);
                if let Some(spec) = pod.spec.as_mut() {
                    spec.node_name = Some(name.to_owned());
                    spec.tolerations = Some(tolerations.clone());
                }
                plan.actions.push(Action::CreatePod {
                    pod: Box::new(pod),
                    by: by.clone(),
                });
            }
            continue;
        };
        plan.actions.extend(more.iter().map(|pod| delete(pod)));
        status.current_number_scheduled += 1;
        status.number_ready += i32::from(pods::ready_since(first).is_some());
        match pods::available(first, min_ready, now) {
            Ok(()) => available += 1,
            Err(left) => plan.again_in(left),
        }
        let current = first
            .metadata
            .labels
            .as_ref()
            .and_then(|labels| labels.get(REVISION_HASH));
        if current == Some(&hash) {
            updated += 1;
        } else {
            outdated.push(first);
        }
    }
    // Pods of nodes that are gone.
    for (node, orphans) in there {
        if !seen.iter().any(|name| name == node) {
            plan.actions.extend(
                orphans
                    .iter()
                    .filter(|pod| pods::is_active(pod))
                    .map(|pod| delete(pod)),
            );
        }
    }
    let desired = status.desired_number_scheduled;
    let rolling = spec.update_strategy.as_ref();
    if rolling.and_then(|strategy| strategy.type_.as_deref()) != Some("OnDelete") {
        let value = rolling
            .and_then(|strategy| strategy.rolling_update.as_ref())
            .and_then(|rolling| rolling.max_unavailable.as_ref());
        replace(
            &mut plan,
            &outdated,
            max_unavailable(value, desired),
            desired - available,
            min_ready,
            now,
            &by,
        );
    }
    status.updated_number_scheduled = Some(updated);
    status.number_available = Some(available);
    status.number_unavailable = Some(desired - available);
    write_status(&mut plan, set, &status, by);
    plan
}

fn max_unavailable(value: Option<&IntOrString>, desired: i32) -> i32 {
    let number = match value {
        None => 1,
        Some(IntOrString::Int(number)) => *number,
        Some(IntOrString::String(text)) => {
            let percent: i64 = text.trim_end_matches('%').parse().unwrap_or(0);
            i32::try_from((percent * i64::from(desired) + 99).div_euclid(100)).unwrap_or(i32::MAX)
        }
    };
    number.max(1)
}

/// Deletes pods of an old template: those that serve nobody at once, the others as few at a time as allowed.
fn replace(
    plan: &mut Plan,
    outdated: &[&Arc<Pod>],
    allowed: i32,
    unavailable: i32,
    min_ready: i32,
    now: Timestamp,
    by: &Subject,
) {
    let mut room = allowed.saturating_sub(unavailable);
    for pod in outdated {
        let serves = pods::available(pod, min_ready, now).is_ok();
        if serves {
            if room <= 0 {
                continue;
            }
            room -= 1;
        }
        plan.actions.push(Action::DeletePod {
            pod: Arc::clone(pod),
            by: by.clone(),
        });
    }
}

fn write_status(plan: &mut Plan, set: &DaemonSet, status: &DaemonSetStatus, by: Subject) {
    let none = DaemonSetStatus::default();
    let before = set.status.as_ref().unwrap_or(&none);
    let counted = [
        (
            "desiredNumberScheduled",
            before.desired_number_scheduled,
            status.desired_number_scheduled,
        ),
        (
            "currentNumberScheduled",
            before.current_number_scheduled,
            status.current_number_scheduled,
        ),
        (
            "numberMisscheduled",
            before.number_misscheduled,
            status.number_misscheduled,
        ),
        ("numberReady", before.number_ready, status.number_ready),
        (
            "updatedNumberScheduled",
            before.updated_number_scheduled.unwrap_or(0),
            status.updated_number_scheduled.unwrap_or(0),
        ),
        (
            "numberAvailable",
            before.number_available.unwrap_or(0),
            status.number_available.unwrap_or(0),
        ),
        (
            "numberUnavailable",
            before.number_unavailable.unwrap_or(0),
            status.number_unavailable.unwrap_or(0),
        ),
    ];
    let mut changes = json!({});
    for (field, had, count) in counted {
        if had != count {
            changes[field] = count.into();
        }
    }
    if before.observed_generation != set.metadata.generation {
        changes["observedGeneration"] = set.metadata.generation.into();
    }
    if changes != json!({}) {
        plan.actions.push(Action::Status {
            of: by,
            status: changes,
        });
    }
}
