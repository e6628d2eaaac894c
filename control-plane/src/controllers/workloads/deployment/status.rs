//! What a Deployment says of itself.

use jiff::Timestamp;
use k8s_openapi::api::apps::v1::DeploymentStatus;
use serde_json::{Value, json};

use super::super::Action;
use super::{Work, status};

impl Work<'_> {
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
    pub(super) fn is_complete(&self) -> bool {
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

    pub(super) fn status(&mut self, now: Timestamp) {
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
