//! Deployment: replica sets, the newest of which takes over step by step (kube-controller-manager `deployment`).

use std::collections::BTreeMap;
use std::sync::Arc;

use jiff::Timestamp;
use k8s_openapi::api::apps::v1::{Deployment, DeploymentSpec, DeploymentStatus, ReplicaSet, ReplicaSetSpec};
use k8s_openapi::api::core::v1::{Pod, PodTemplateSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use serde_json::{Value, json};

use super::pods;
use super::{Action, Plan, Subject, TEMPLATE_HASH};

/// Annotation: which revision of the Deployment a ReplicaSet is, and which one the Deployment has.
const REVISION: &str = "deployment.kubernetes.io/revision";
const REVISION_HISTORY: &str = "deployment.kubernetes.io/revision-history";
const DESIRED: &str = "deployment.kubernetes.io/desired-replicas";
const MAX: &str = "deployment.kubernetes.io/max-replicas";
/// Annotations of a Deployment that its ReplicaSets do not take over.
const NOT_COPIED: &[&str] = &[
    "kubectl.kubernetes.io/last-applied-configuration",
    REVISION,
    REVISION_HISTORY,
    DESIRED,
    MAX,
    "deprecated.deployment.rollback.to",
];

/// One Deployment with its ReplicaSets.
struct Work<'a> {
    deployment: &'a Deployment,
    spec: &'a DeploymentSpec,
    /// Of the present template.
    new: Option<Arc<ReplicaSet>>,
    /// Oldest first.
    old: Vec<Arc<ReplicaSet>>,
    plan: Plan,
}

fn revision(meta: &ObjectMeta) -> i64 {
    annotation(meta, REVISION)
        .and_then(|revision| revision.parse().ok())
        .unwrap_or(0)
}

fn annotation<'a>(meta: &'a ObjectMeta, name: &str) -> Option<&'a str> {
    meta.annotations.as_ref()?.get(name).map(String::as_str)
}

fn wanted(set: &ReplicaSet) -> i32 {
    set.spec.as_ref().and_then(|spec| spec.replicas).unwrap_or(0)
}

fn status(
    set: &ReplicaSet,
    field: impl Fn(&k8s_openapi::api::apps::v1::ReplicaSetStatus) -> Option<i32>,
) -> i32 {
    set.status.as_ref().and_then(field).unwrap_or(0)
}

fn available(set: &ReplicaSet) -> i32 {
    status(set, |status| status.available_replicas)
}

/// A number or a share of `total`.
fn resolve(value: Option<&IntOrString>, total: i32, up: bool) -> i32 {
    match value {
        None => 0,
        Some(IntOrString::Int(number)) => *number,
        Some(IntOrString::String(text)) => {
            let percent: i64 = text.trim_end_matches('%').parse().unwrap_or(0);
            let product = percent.saturating_mul(i64::from(total));
            let share = if up {
                (product + 99).div_euclid(100)
            } else {
                product.div_euclid(100)
            };
            i32::try_from(share).unwrap_or(i32::MAX)
        }
    }
}

/// What to do; `sets` are the ReplicaSets and `pods` the Pods of the namespace.
pub(super) fn plan<'a>(
    deployment: &Deployment,
    sets: impl Iterator<Item = &'a Arc<ReplicaSet>>,
    pods: impl Iterator<Item = &'a Arc<Pod>>,
    now: Timestamp,
) -> Plan {
    let Some(spec) = deployment.spec.as_ref() else {
        return Plan::default();
    };
    let mut plan = Plan::default();
    let uid = deployment.metadata.uid.as_deref().unwrap_or_default();
    let deleting = deployment.metadata.deletion_timestamp.is_some();
    let mut mine: Vec<Arc<ReplicaSet>> = Vec::new();
    for set in sets {
        let fits = pods::selects(&spec.selector, set.metadata.labels.as_ref());
        match pods::controller(&set.metadata) {
            Some(owner) if owner.uid == uid => mine.push(Arc::clone(set)),
            None if fits && !deleting && set.metadata.deletion_timestamp.is_none() => {
                plan.actions.push(Action::AdoptSet {
                    set: Arc::clone(set),
                    owner: pods::owner("apps/v1", "Deployment", &deployment.metadata),
                });
            }
            _ => {}
        }
    }
    if !plan.actions.is_empty() {
        return plan;
    }
    mine.retain(|set| set.metadata.deletion_timestamp.is_none());
    mine.sort_by_key(|set| {
        let age = set.metadata.creation_timestamp.as_ref().map(|time| time.0);
        (age, set.metadata.name.clone())
    });
    let same = |set: &Arc<ReplicaSet>| {
        let template = set.spec.as_ref().and_then(|spec| spec.template.as_ref());
        template.is_some_and(|template| same_template(template, &spec.template))
    };
    let new = mine.iter().position(same).map(|at| mine.remove(at));
    let mut work = Work {
        deployment,
        spec,
        new,
        old: mine,
        plan,
    };
    if !deleting {
        work.progress(pods);
    }
    work.status(now);
    work.plan
}

fn same_template(a: &PodTemplateSpec, b: &PodTemplateSpec) -> bool {
    let plain = |template: &PodTemplateSpec| {
        let mut template = template.clone();
        let meta = template.metadata.get_or_insert_with(ObjectMeta::default);
        if let Some(labels) = meta.labels.as_mut() {
            labels.remove(TEMPLATE_HASH);
        }
        template
    };
    plain(a) == plain(b)
}

impl Work<'_> {
    fn replicas(&self) -> i32 {
        self.spec.replicas.unwrap_or(1)
    }

    fn is_rolling(&self) -> bool {
        self.strategy_type() == "RollingUpdate"
    }

    fn strategy_type(&self) -> &str {
        self.spec
            .strategy
            .as_ref()
            .and_then(|strategy| strategy.type_.as_deref())
            .unwrap_or("RollingUpdate")
    }

    /// How many pods more and how many less than wanted there may be.
    fn bounds(&self) -> (i32, i32) {
        if !self.is_rolling() {
            return (0, 0);
        }
        let rolling = self
            .spec
            .strategy
            .as_ref()
            .and_then(|s| s.rolling_update.as_ref());
        let surge = resolve(rolling.and_then(|r| r.max_surge.as_ref()), self.replicas(), true);
        let missing = resolve(
            rolling.and_then(|r| r.max_unavailable.as_ref()),
            self.replicas(),
            false,
        );
        // Both zero would never get anywhere.
        let missing = if surge == 0 && missing == 0 { 1 } else { missing };
        (surge, missing.min(self.replicas()))
    }

    fn subject(&self) -> Subject {
        Subject::new("apps/v1", "Deployment", &self.deployment.metadata)
    }

    fn all(&self) -> impl Iterator<Item = &Arc<ReplicaSet>> {
        self.old.iter().chain(&self.new)
    }

    fn total(&self) -> i32 {
        self.all().map(|set| wanted(set)).sum()
    }

    fn progress<'a>(&mut self, pods: impl Iterator<Item = &'a Arc<Pod>>) {
        if self.spec.paused == Some(true) {
            self.note_revision();
            self.scale_all();
            return;
        }
        if self.is_scaling() {
            self.note_revision();
            self.scale_all();
            return;
        }
        if self.is_rolling() {
            if self.note_or_create(true) && !self.grow() {
                self.shrink();
            }
        } else {
            self.recreate(pods);
        }
        self.clean_up();
    }

    /// Whether the wanted number itself was changed: the sets still carry another one.
    fn is_scaling(&self) -> bool {
        self.all()
            .filter(|set| wanted(set) > 0)
            .filter_map(|set| annotation(&set.metadata, DESIRED)?.parse::<i32>().ok())
            .any(|desired| desired != self.replicas())
    }

    /// The number of the present template's revision.
    fn next_revision(&self) -> i64 {
        let before = self
            .old
            .iter()
            .map(|set| revision(&set.metadata))
            .max()
            .unwrap_or(0);
        match &self.new {
            Some(new) if revision(&new.metadata) > before => revision(&new.metadata),
            _ => before.saturating_add(1),
        }
    }

    /// Keeps the new set's annotations right, and the Deployment's.
    fn note_revision(&mut self) {
        let Some(new) = self.new.clone() else { return };
        let wanted = self.next_revision();
        let had = revision(&new.metadata);
        let mut annotations = self.copied_annotations();
        annotations.insert(REVISION.into(), wanted.to_string());
        if had != wanted && had > 0 {
            let mut history = annotation(&new.metadata, REVISION_HISTORY)
                .unwrap_or_default()
                .to_owned();
            if !history.is_empty() {
                history.push(',');
            }
            history.push_str(&had.to_string());
            annotations.insert(REVISION_HISTORY.into(), history);
        }
        let changes: BTreeMap<String, String> = annotations
            .into_iter()
            .filter(|(name, value)| annotation(&new.metadata, name) != Some(value))
            .collect();
        let min_ready = self.spec.min_ready_seconds.unwrap_or(0);
        let had_min_ready = new
            .spec
            .as_ref()
            .and_then(|spec| spec.min_ready_seconds)
            .unwrap_or(0);
        if !changes.is_empty() || min_ready != had_min_ready {
            self.plan.actions.push(Action::PatchSet {
                set: Arc::clone(&new),
                patch: json!({"metadata": {"annotations": changes}, "spec": {"minReadySeconds": min_ready}}),
                event: None,
            });
        }
        if revision(&self.deployment.metadata) != wanted {
            self.plan.actions.push(Action::PatchDeployment {
                of: self.subject(),
                patch: json!({"metadata": {"annotations": {REVISION: wanted.to_string()}}}),
            });
        }
    }

    fn copied_annotations(&self) -> BTreeMap<String, String> {
        let mut annotations = self.deployment.metadata.annotations.clone().unwrap_or_default();
        annotations.retain(|name, _| !NOT_COPIED.contains(&name.as_str()));
        annotations
    }

    /// True if the new set is there; otherwise it is made, if `create` allows.
    fn note_or_create(&mut self, create: bool) -> bool {
        if self.new.is_some() {
            self.note_revision();
            return true;
        }
        if !create {
            return false;
        }
        let collisions = self
            .deployment
            .status
            .as_ref()
            .and_then(|status| status.collision_count)
            .unwrap_or(0);
        let hash = pods::hash(&self.spec.template, collisions);
        let labeled = |labels: Option<&BTreeMap<String, String>>| {
            let mut labels = labels.cloned().unwrap_or_default();
            labels.insert(TEMPLATE_HASH.into(), hash.clone());
            Some(labels)
        };
        let mut template = self.spec.template.clone();
        let meta = template.metadata.get_or_insert_with(ObjectMeta::default);
        meta.labels = labeled(meta.labels.as_ref());
        let mut selector = self.spec.selector.clone();
        selector.match_labels = labeled(selector.match_labels.as_ref());
        let (surge, _) = self.bounds();
        let replicas = self.new_size(0);
        let mut annotations = self.copied_annotations();
        annotations.insert(REVISION.into(), self.next_revision().to_string());
        annotations.insert(DESIRED.into(), self.replicas().to_string());
        annotations.insert(MAX.into(), self.replicas().saturating_add(surge).to_string());
        let name = self.deployment.metadata.name.clone().unwrap_or_default();
        let set = ReplicaSet {
            metadata: ObjectMeta {
                name: Some(format!("{name}-{hash}")),
                namespace: self.deployment.metadata.namespace.clone(),
                labels: meta_labels(&template),
                annotations: Some(annotations),
                owner_references: Some(vec![pods::owner(
                    "apps/v1",
                    "Deployment",
                    &self.deployment.metadata,
                )]),
                ..ObjectMeta::default()
            },
            spec: Some(ReplicaSetSpec {
                replicas: Some(replicas),
                min_ready_seconds: self.spec.min_ready_seconds,
                selector,
                template: Some(template),
            }),
            status: None,
        };
        self.plan.actions.push(Action::CreateSet {
            set: Box::new(set),
            by: self.subject(),
            collisions,
        });
        if revision(&self.deployment.metadata) != self.next_revision() {
            self.plan.actions.push(Action::PatchDeployment {
                of: self.subject(),
                patch: json!({"metadata": {"annotations": {REVISION: self.next_revision().to_string()}}}),
            });
        }
        false
    }

    /// How large the new set may be that has `now` pods.
    fn new_size(&self, now: i32) -> i32 {
        if !self.is_rolling() {
            return self.replicas();
        }
        let (surge, _) = self.bounds();
        let room = self.replicas().saturating_add(surge).saturating_sub(self.total());
        if room <= 0 {
            return now;
        }
        now.saturating_add(room.min(self.replicas().saturating_sub(now)))
    }

    /// Lets the new set have as many pods as there is room for; true if it changes.
    fn grow(&mut self) -> bool {
        let Some(new) = self.new.clone() else { return false };
        let now = wanted(&new);
        if now == self.replicas() {
            return false;
        }
        let size = if now > self.replicas() {
            self.replicas()
        } else {
            self.new_size(now)
        };
        self.scale(&new, size)
    }

    /// Takes from the old sets what may go without too few pods being available.
    fn shrink(&mut self) {
        let old_total: i32 = self.old.iter().map(|set| wanted(set)).sum();
        let Some(new) = self.new.clone().filter(|_| old_total > 0) else {
            return;
        };
        let (_, missing) = self.bounds();
        let least = self.replicas().saturating_sub(missing);
        let new_unavailable = wanted(&new).saturating_sub(available(&new));
        let mut may_go = self.total() - least - new_unavailable;
        if may_go <= 0 {
            return;
        }
        // First those that serve nobody.
        let mut sizes: Vec<(Arc<ReplicaSet>, i32)> = self
            .old
            .iter()
            .map(|set| (Arc::clone(set), wanted(set)))
            .collect();
        for (set, size) in &mut sizes {
            let unhealthy = (*size - available(set)).clamp(0, may_go);
            *size -= unhealthy;
            may_go -= unhealthy;
        }
        let serving: i32 = self.all().map(|set| available(set)).sum();
        let mut surplus = serving.saturating_sub(least);
        for (_, size) in &mut sizes {
            let goes = (*size).min(surplus.max(0));
            *size -= goes;
            surplus -= goes;
        }
        for (set, size) in sizes {
            self.scale(&set, size);
        }
    }

    fn recreate<'a>(&mut self, pods: impl Iterator<Item = &'a Arc<Pod>>) {
        let old = self.old.clone();
        let mut scaled = false;
        for set in &old {
            scaled |= self.scale(set, 0);
        }
        if scaled {
            return;
        }
        let uids: Vec<&str> = old.iter().filter_map(|set| set.metadata.uid.as_deref()).collect();
        let left = pods
            .filter(|pod| {
                pods::controller(&pod.metadata).is_some_and(|owner| uids.contains(&owner.uid.as_str()))
            })
            .any(|pod| !matches!(pods::phase(pod), "Succeeded" | "Failed"));
        if !left && self.note_or_create(true) {
            self.grow();
        }
    }

    /// Divides the wanted number among the sets as they are divided now.
    fn scale_all(&mut self) {
        let active: Vec<Arc<ReplicaSet>> = self.all().filter(|set| wanted(set) > 0).cloned().collect();
        match active.as_slice() {
            [] => {
                if let Some(only) = self.new.clone().or_else(|| self.old.last().cloned()) {
                    self.scale(&only, self.replicas());
                }
            }
            [only] => {
                let only = Arc::clone(only);
                self.scale(&only, self.replicas());
            }
            many => {
                let (surge, _) = self.bounds();
                let allowed = if self.replicas() > 0 {
                    self.replicas().saturating_add(surge)
                } else {
                    0
                };
                let total: i32 = many.iter().map(|set| wanted(set)).sum();
                let mut left = allowed - total;
                let mut largest = many.to_vec();
                largest.sort_by_key(|set| std::cmp::Reverse(wanted(set)));
                let mut sizes: Vec<i32> = Vec::new();
                for set in &largest {
                    let share = f64::from(wanted(set)) * f64::from(allowed) / f64::from(total.max(1));
                    #[expect(
                        clippy::cast_possible_truncation,
                        reason = "the share of a 32 bit number fits in one; `as` saturates"
                    )]
                    let change = share.round() as i32 - wanted(set);
                    let change = if left >= 0 {
                        change.clamp(0, left)
                    } else {
                        change.clamp(left, 0)
                    };
                    left -= change;
                    sizes.push(wanted(set) + change);
                }
                if let Some(first) = sizes.first_mut() {
                    *first = (*first + left).max(0);
                }
                for (set, size) in largest.iter().zip(sizes) {
                    self.scale(set, size);
                }
            }
        }
    }

    /// Sets the size of a set, and what it says about the Deployment; true if the size changes.
    fn scale(&mut self, set: &Arc<ReplicaSet>, size: i32) -> bool {
        let (surge, _) = self.bounds();
        let desired = self.replicas().to_string();
        let max = self.replicas().saturating_add(surge).to_string();
        let noted = annotation(&set.metadata, DESIRED) == Some(&desired)
            && annotation(&set.metadata, MAX) == Some(&max);
        let before = wanted(set);
        if before == size && noted {
            return false;
        }
        let event = (before != size).then(|| {
            let way = if size > before { "up" } else { "down" };
            let name = set.metadata.name.as_deref().unwrap_or_default();
            let message = format!("Scaled {way} replica set {name} from {before} to {size}");
            (self.subject(), "ScalingReplicaSet", message)
        });
        self.plan.actions.push(Action::PatchSet {
            set: Arc::clone(set),
            patch: json!({
                "metadata": {"annotations": {DESIRED: desired, MAX: max}},
                "spec": {"replicas": size},
            }),
            event,
        });
        before != size
    }

    /// Deletes sets that are too old to go back to.
    fn clean_up(&mut self) {
        let Some(limit) = self.spec.revision_history_limit else {
            return;
        };
        if !self.is_complete() {
            return;
        }
        let mut empty: Vec<&Arc<ReplicaSet>> = self
            .old
            .iter()
            .filter(|set| wanted(set) == 0 && status(set, |status| Some(status.replicas)) == 0)
            .collect();
        empty.sort_by_key(|set| revision(&set.metadata));
        let surplus = empty.len().saturating_sub(usize::try_from(limit).unwrap_or(0));
        let doomed: Vec<Action> = empty
            .into_iter()
            .take(surplus)
            .map(|set| Action::DeleteSet(Arc::clone(set)))
            .collect();
        self.plan.actions.extend(doomed);
    }

    fn counts(&self) -> (i32, i32, i32, i32) {
        let sum = |field: fn(&k8s_openapi::api::apps::v1::ReplicaSetStatus) -> Option<i32>| -> i32 {
            self.all().map(|set| status(set, field)).sum()
        };
        let updated = self
            .new
            .as_ref()
            .map_or(0, |set| status(set, |status| Some(status.replicas)));
        (
            sum(|status| Some(status.replicas)),
            updated,
            sum(|status| status.ready_replicas),
            sum(|status| status.available_replicas),
        )
    }

    /// Whether all pods are new and available.
    fn is_complete(&self) -> bool {
        let (replicas, updated, _, available) = self.counts();
        [replicas, updated, available]
            .iter()
            .all(|count| *count == self.replicas())
            && self
                .deployment
                .status
                .as_ref()
                .and_then(|status| status.observed_generation)
                >= self.deployment.metadata.generation
    }

    fn status(&mut self, now: Timestamp) {
        let (replicas, updated, ready, available) = self.counts();
        let none = DeploymentStatus::default();
        let before = self.deployment.status.as_ref().unwrap_or(&none);
        let unavailable = self.total().saturating_sub(available).max(0);
        let counted = [
            ("replicas", before.replicas, replicas),
            ("updatedReplicas", before.updated_replicas, updated),
            ("readyReplicas", before.ready_replicas, ready),
            ("availableReplicas", before.available_replicas, available),
            ("unavailableReplicas", before.unavailable_replicas, unavailable),
        ];
        let mut changes = json!({});
        let mut progressed = false;
        for (field, had, count) in counted {
            if had.unwrap_or(0) != count {
                progressed |= field != "unavailableReplicas";
                changes[field] = if count == 0 { Value::Null } else { count.into() };
            }
        }
        if before.observed_generation != self.deployment.metadata.generation {
            changes["observedGeneration"] = self.deployment.metadata.generation.into();
        }
        let conditions: Value =
            serde_json::to_value(before.conditions.clone().unwrap_or_default()).unwrap_or_default();
        let mut after = conditions.clone();
        let (_, missing) = self.bounds();
        let enough = available >= self.replicas().saturating_sub(missing);
        let stamp = now.strftime("%Y-%m-%dT%H:%M:%SZ").to_string();
        set_condition(
            &mut after,
            &stamp,
            "Available",
            enough,
            if enough {
                "MinimumReplicasAvailable"
            } else {
                "MinimumReplicasUnavailable"
            },
            if enough {
                "Deployment has minimum availability."
            } else {
                "Deployment does not have minimum availability."
            },
            false,
        );
        self.progressing(&mut after, &stamp, progressed, now);
        if after != conditions {
            changes["conditions"] = after;
        }
        if changes != json!({}) {
            self.plan.actions.push(Action::Status {
                of: self.subject(),
                status: changes,
            });
        }
    }

    fn progressing(&mut self, conditions: &mut Value, stamp: &str, progressed: bool, now: Timestamp) {
        let deployment = self.deployment.metadata.name.clone().unwrap_or_default();
        let find = |conditions: &Value| -> Value {
            let mut list = conditions.as_array().into_iter().flatten();
            list.find(|condition| condition["type"] == "Progressing")
                .cloned()
                .unwrap_or_default()
        };
        let had = find(conditions);
        let set = self.new.as_ref().and_then(|set| set.metadata.name.clone());
        let about = set.map_or_else(
            || format!("Deployment \"{deployment}\""),
            |set| format!("ReplicaSet \"{set}\""),
        );
        let mut put = |good: bool, reason: &str, message: &str, moved: bool| {
            set_condition(conditions, stamp, "Progressing", good, reason, message, moved);
        };
        if self.spec.paused == Some(true) {
            if had["reason"] != "DeploymentPaused" {
                set_unknown(conditions, stamp, "DeploymentPaused", "Deployment is paused");
            }
            return;
        }
        if self.is_complete() && self.new.is_some() {
            put(
                true,
                "NewReplicaSetAvailable",
                &format!("{about} has successfully progressed."),
                false,
            );
            return;
        }
        if had["reason"] == "DeploymentPaused" {
            set_unknown(conditions, stamp, "DeploymentResumed", "Deployment is resumed");
            return;
        }
        if self.new.is_none() {
            put(
                true,
                "NewReplicaSetCreated",
                &format!("Created new replica set for deployment {deployment:?}"),
                false,
            );
            return;
        }
        let moved = progressed || had.is_null() || had["reason"] == "NewReplicaSetAvailable";
        if moved {
            put(
                true,
                "ReplicaSetUpdated",
                &format!("{about} is progressing."),
                true,
            );
            return;
        }
        // Nothing moves: for how long may that be?
        let deadline = i64::from(self.spec.progress_deadline_seconds.unwrap_or(600));
        let since = had["lastUpdateTime"]
            .as_str()
            .and_then(|time| time.parse::<Timestamp>().ok());
        if let Some(since) = since
            && deadline < i64::from(i32::MAX)
            && had["status"] == "True"
        {
            let left = deadline - now.duration_since(since).as_secs();
            if left <= 0 {
                put(
                    false,
                    "ProgressDeadlineExceeded",
                    &format!("{about} has timed out progressing."),
                    false,
                );
            } else {
                self.plan.again_in(Some(left));
            }
        }
    }
}

fn meta_labels(template: &PodTemplateSpec) -> Option<BTreeMap<String, String>> {
    template.metadata.as_ref().and_then(|meta| meta.labels.clone())
}

fn set_condition(
    conditions: &mut Value,
    stamp: &str,
    kind: &str,
    good: bool,
    reason: &str,
    message: &str,
    moved: bool,
) {
    put_condition(
        conditions,
        stamp,
        kind,
        if good { "True" } else { "False" },
        reason,
        message,
        moved,
    );
}

fn set_unknown(conditions: &mut Value, stamp: &str, reason: &str, message: &str) {
    put_condition(
        conditions,
        stamp,
        "Progressing",
        "Unknown",
        reason,
        message,
        false,
    );
}

fn put_condition(
    conditions: &mut Value,
    stamp: &str,
    kind: &str,
    state: &str,
    reason: &str,
    message: &str,
    moved: bool,
) {
    if !conditions.is_array() {
        *conditions = json!([]);
    }
    let Some(list) = conditions.as_array_mut() else {
        return;
    };
    let had = list.iter().position(|condition| condition["type"] == kind);
    let before = had.and_then(|at| list.get(at)).cloned().unwrap_or_default();
    if !moved && before["status"] == state && before["reason"] == reason && before["message"] == message {
        return;
    }
    let transition = if before["status"] == state {
        before["lastTransitionTime"].clone()
    } else {
        stamp.into()
    };
    let condition = json!({
        "type": kind, "status": state, "reason": reason, "message": message,
        "lastUpdateTime": stamp, "lastTransitionTime": transition,
    });
    match had.and_then(|at| list.get_mut(at)) {
        Some(place) => *place = condition,
        None => list.push(condition),
    }
}
