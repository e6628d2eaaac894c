//! Deployment: replica sets, the newest of which takes over step by step (kube-controller-manager `deployment`).

mod sizes;
mod status;

use std::collections::BTreeMap;
use std::sync::Arc;

use jiff::Timestamp;
use k8s_openapi::api::apps::v1::{Deployment, DeploymentSpec, ReplicaSet, ReplicaSetSpec};
use k8s_openapi::api::core::v1::{Pod, PodTemplateSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;
use serde_json::json;

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
}

fn meta_labels(template: &PodTemplateSpec) -> Option<BTreeMap<String, String>> {
    template.metadata.as_ref().and_then(|meta| meta.labels.clone())
}
