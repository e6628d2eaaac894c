//! ReplicaSet and ReplicationController: as many pods as wanted (kube-controller-manager `replicaset`).

use std::collections::BTreeMap;
use std::sync::Arc;

use jiff::Timestamp;
use k8s_openapi::api::apps::v1::ReplicaSet;
use k8s_openapi::api::core::v1::{Pod, PodTemplateSpec, ReplicationController};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{LabelSelector, ObjectMeta};
use serde_json::{Value, json};

use super::pods;
use super::{Action, Plan, Subject};

/// Pods that are made or deleted in one go.
const BURST: usize = 500;

/// What the two kinds have in common.
#[derive(Debug)]
pub(super) struct Set<'a> {
    pub(super) api_version: &'static str,
    pub(super) kind: &'static str,
    pub(super) meta: &'a ObjectMeta,
    selector: LabelSelector,
    replicas: i32,
    min_ready: i32,
    template: PodTemplateSpec,
    status: Value,
}

impl<'a> Set<'a> {
    pub(super) fn of_replica_set(object: &'a ReplicaSet) -> Option<Self> {
        let spec = object.spec.as_ref()?;
        Some(Self {
            api_version: "apps/v1",
            kind: "ReplicaSet",
            meta: &object.metadata,
            selector: spec.selector.clone(),
            replicas: spec.replicas.unwrap_or(1),
            min_ready: spec.min_ready_seconds.unwrap_or(0),
            template: spec.template.clone()?,
            status: serde_json::to_value(&object.status).ok()?,
        })
    }

    pub(super) fn of_replication_controller(object: &'a ReplicationController) -> Option<Self> {
        let spec = object.spec.as_ref()?;
        Some(Self {
            api_version: "v1",
            kind: "ReplicationController",
            meta: &object.metadata,
            selector: LabelSelector {
                match_labels: spec.selector.clone(),
                match_expressions: None,
            },
            replicas: spec.replicas.unwrap_or(1),
            min_ready: spec.min_ready_seconds.unwrap_or(0),
            template: spec.template.clone()?,
            status: serde_json::to_value(&object.status).ok()?,
        })
    }

    /// What to do; `all` are the pods of the namespace.
    pub(super) fn plan<'p>(&self, all: impl Iterator<Item = &'p Arc<Pod>>, now: Timestamp) -> Plan {
        let mut plan = Plan::default();
        let uid = self.meta.uid.as_deref().unwrap_or_default();
        let deleting = self.meta.deletion_timestamp.is_some();
        let mut mine: Vec<Arc<Pod>> = Vec::new();
        for pod in all {
            let fits = pods::selects(&self.selector, pod.metadata.labels.as_ref());
            match pods::controller(&pod.metadata) {
                Some(owner) if owner.uid == uid && fits => mine.push(Arc::clone(pod)),
                Some(owner) if owner.uid == uid && !deleting => plan.actions.push(Action::Disown {
                    pod: Arc::clone(pod),
                    owner: uid.to_owned(),
                }),
                None if fits && !deleting && pods::is_active(pod) => plan.actions.push(Action::Adopt {
                    pod: Arc::clone(pod),
                    owner: pods::owner(self.api_version, self.kind, self.meta),
                }),
                _ => {}
            }
        }
        // What changes hands is counted when that is done.
        if !plan.actions.is_empty() {
            return plan;
        }
        mine.retain(|pod| pods::is_active(pod));
        let wanted = usize::try_from(self.replicas).unwrap_or(0);
        if !deleting {
            self.fill(&mut plan, &mut mine, wanted);
        }
        self.status(&mut plan, &mine, now);
        plan
    }

    fn subject(&self) -> Subject {
        Subject::new(self.api_version, self.kind, self.meta)
    }

    fn fill(&self, plan: &mut Plan, mine: &mut [Arc<Pod>], wanted: usize) {
        let namespace = self.meta.namespace.as_deref().unwrap_or_default();
        let name = self.meta.name.as_deref().unwrap_or_default();
        if mine.len() < wanted {
            let owner = pods::owner(self.api_version, self.kind, self.meta);
            let pod = pods::from_template(&self.template, namespace, name, owner);
            plan.actions
                .extend((mine.len()..wanted).take(BURST).map(|_| Action::CreatePod {
                    pod: Box::new(pod.clone()),
                    by: self.subject(),
                }));
        } else if mine.len() > wanted {
            pods::by_worth(mine);
            let surplus = (mine.len() - wanted).min(BURST);
            plan.actions
                .extend(mine.iter().take(surplus).map(|pod| Action::DeletePod {
                    pod: Arc::clone(pod),
                    by: self.subject(),
                }));
        }
    }

    fn status(&self, plan: &mut Plan, mine: &[Arc<Pod>], now: Timestamp) {
        let (mut labeled, mut ready, mut available) = (0, 0, 0);
        let wanted: BTreeMap<String, String> = self
            .template
            .metadata
            .as_ref()
            .and_then(|meta| meta.labels.clone())
            .unwrap_or_default();
        for pod in mine {
            let has = |(key, value): (&String, &String)| {
                pod.metadata.labels.as_ref().and_then(|labels| labels.get(key)) == Some(value)
            };
            labeled += i64::from(wanted.iter().all(has));
            ready += i64::from(pods::ready_since(pod).is_some());
            match pods::available(pod, self.min_ready, now) {
                Ok(()) => available += 1,
                Err(left) => plan.again_in(left),
            }
        }
        let replicas = i64::try_from(mine.len()).unwrap_or(i64::MAX);
        let counted = [
            ("fullyLabeledReplicas", labeled),
            ("readyReplicas", ready),
            ("availableReplicas", available),
        ];
        let mut changes = json!({});
        if self.status["replicas"].as_i64() != Some(replicas) {
            changes["replicas"] = replicas.into();
        }
        for (field, count) in counted {
            if self.status[field].as_i64().unwrap_or(0) != count {
                // Zero is left out.
                changes[field] = if count == 0 { Value::Null } else { count.into() };
            }
        }
        if self.status["observedGeneration"].as_i64() != self.meta.generation {
            changes["observedGeneration"] = self.meta.generation.into();
        }
        if changes != json!({}) {
            if changes.get("replicas").is_none() {
                changes["replicas"] = replicas.into();
            }
            plan.actions.push(Action::Status {
                of: self.subject(),
                status: changes,
            });
        }
    }
}
