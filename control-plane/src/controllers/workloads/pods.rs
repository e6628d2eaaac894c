//! What controllers of pods have in common: which pods are theirs, which are ready, and how a pod is made.

use std::collections::BTreeMap;
use std::sync::Arc;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Pod, PodTemplateSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{LabelSelector, ObjectMeta, OwnerReference};

use crate::controllers::labels;
pub(super) use crate::controllers::placement::controller;

/// Whether the labels fit the selector. An empty selector selects nothing: every kind here refuses it.
pub(super) fn selects(selector: &LabelSelector, labels: Option<&BTreeMap<String, String>>) -> bool {
    !labels::is_empty(selector) && labels::fit(selector, labels)
}

/// Neither ended nor about to.
pub(super) fn is_active(pod: &Pod) -> bool {
    pod.metadata.deletion_timestamp.is_none() && !matches!(phase(pod), "Succeeded" | "Failed")
}

pub(super) fn phase(pod: &Pod) -> &str {
    pod.status
        .as_ref()
        .and_then(|status| status.phase.as_deref())
        .unwrap_or_default()
}

pub(super) fn node(pod: &Pod) -> &str {
    pod.spec
        .as_ref()
        .and_then(|spec| spec.node_name.as_deref())
        .unwrap_or_default()
}

/// Since when the pod is ready.
pub(super) fn ready_since(pod: &Pod) -> Option<Option<Timestamp>> {
    let conditions = pod.status.as_ref()?.conditions.as_ref()?;
    conditions
        .iter()
        .find(|condition| condition.type_ == "Ready" && condition.status == "True")
        .map(|condition| condition.last_transition_time.as_ref().map(|time| time.0))
}

/// Whether the pod has been ready for so many seconds; otherwise in how many it will be, if nothing happens.
pub(super) fn available(pod: &Pod, min_ready: i32, now: Timestamp) -> Result<(), Option<i64>> {
    match ready_since(pod) {
        None => Err(None),
        Some(_) if min_ready <= 0 => Ok(()),
        Some(None) => Err(Some(i64::from(min_ready))),
        Some(Some(since)) => {
            let left = i64::from(min_ready) - now.duration_since(since).as_secs();
            if left <= 0 { Ok(()) } else { Err(Some(left)) }
        }
    }
}

/// A pod from a template. The server completes its name.
pub(super) fn from_template(
    template: &PodTemplateSpec,
    namespace: &str,
    prefix: &str,
    owner: OwnerReference,
) -> Pod {
    let meta = template.metadata.clone().unwrap_or_default();
    Pod {
        metadata: ObjectMeta {
            generate_name: Some(format!("{prefix}-")),
            namespace: Some(namespace.to_owned()),
            labels: meta.labels,
            annotations: meta.annotations,
            finalizers: meta.finalizers,
            owner_references: Some(vec![owner]),
            ..ObjectMeta::default()
        },
        spec: template.spec.clone(),
        status: None,
    }
}

pub(super) fn owner(api_version: &str, kind: &str, meta: &ObjectMeta) -> OwnerReference {
    OwnerReference {
        api_version: api_version.to_owned(),
        kind: kind.to_owned(),
        name: meta.name.clone().unwrap_or_default(),
        uid: meta.uid.clone().unwrap_or_default(),
        controller: Some(true),
        block_owner_deletion: Some(true),
    }
}

/// Pods in the order in which they are given up: not assigned before assigned, not running before running, not ready
/// before ready, cheap before dear, and the youngest first (`controller.ActivePods`).
pub(super) fn by_worth(pods: &mut [Arc<Pod>]) {
    let cost = |pod: &Pod| -> i32 {
        pod.metadata
            .annotations
            .as_ref()
            .and_then(|annotations| annotations.get("controller.kubernetes.io/pod-deletion-cost"))
            .and_then(|cost| cost.parse().ok())
            .unwrap_or(0)
    };
    pods.sort_by_cached_key(|pod| {
        let phase = match phase(pod) {
            "Running" => 2,
            "Unknown" => 1,
            _ => 0,
        };
        let age = pod.metadata.creation_timestamp.as_ref().map(|time| time.0);
        (
            !node(pod).is_empty(),
            phase,
            ready_since(pod).is_some(),
            cost(pod),
            std::cmp::Reverse(age),
            pod.metadata.name.clone(),
        )
    });
}

/// A short name for a template, the same for equal ones.
pub(super) fn hash(template: &PodTemplateSpec, collisions: i32) -> String {
    const LETTERS: &[u8] = b"bcdfghjklmnpqrstvwxz2456789";
    let mut template = template.clone();
    if let Some(labels) = template.metadata.as_mut().and_then(|meta| meta.labels.as_mut()) {
        labels.remove(super::TEMPLATE_HASH);
    }
    // Field by field in a fixed order: the text is the same for equal templates.
    let text = serde_json::to_string(&template).unwrap_or_default();
    // FNV-1a.
    let mut hash: u64 = 0xcbf2_9ce4_8422_2325;
    for byte in text.bytes().chain(collisions.to_le_bytes()) {
        hash = (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
    }
    let mut name = String::new();
    for _ in 0..10 {
        let at = usize::try_from(hash % 27).unwrap_or_default();
        name.push(char::from(LETTERS.get(at).copied().unwrap_or(b'b')));
        hash /= 27;
    }
    name
}
