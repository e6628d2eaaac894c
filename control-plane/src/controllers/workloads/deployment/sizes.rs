//! How many pods each ReplicaSet of a Deployment may have.

use std::sync::Arc;

use k8s_openapi::api::apps::v1::ReplicaSet;
use k8s_openapi::api::core::v1::Pod;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use serde_json::json;

use super::super::{Action, pods};
use super::{DESIRED, MAX, Work, annotation, available, wanted};

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

impl Work<'_> {
    /// How many pods more and how many less than wanted there may be.
    pub(super) fn bounds(&self) -> (i32, i32) {
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

    /// How large the new set may be that has `now` pods.
    pub(super) fn new_size(&self, now: i32) -> i32 {
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
    pub(super) fn grow(&mut self) -> bool {
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
    pub(super) fn shrink(&mut self) {
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

    pub(super) fn recreate<'a>(&mut self, pods: impl Iterator<Item = &'a Arc<Pod>>) {
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
    pub(super) fn scale_all(&mut self) {
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
    pub(super) fn scale(&mut self, set: &Arc<ReplicaSet>, size: i32) -> bool {
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
}
