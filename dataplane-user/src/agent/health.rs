//! What probes and load balancers ask: kube-proxy's health server (spec kube-proxy 3.1).

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use dataplane_model::Family;
use jiff::Timestamp;
use k8s_openapi::api::core::v1::Node;
use serde::Serialize;

/// A change that waits longer than this without a successful sync makes the node unhealthy: twice kube-proxy's sync
/// period.
const PENDING_LIMIT: Duration = Duration::from_secs(60);

/// Taint by which the cluster autoscaler announces that it removes a node.
const TAINT_REMOVAL: &str = "ToBeDeletedByClusterAutoscaler";

#[derive(Debug)]
struct FamilyHealth {
    last_updated: Timestamp,
    pending_since: Option<Instant>,
}

/// Health of the node's dataplane.
#[derive(Debug)]
pub struct Health {
    families: BTreeMap<Family, FamilyHealth>,
    eligible: bool,
}

/// Body of `/healthz` and `/livez`. Field order is kube-proxy's.
#[derive(Clone, PartialEq, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Body {
    last_updated: String,
    current_time: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    node_eligible: Option<bool>,
    healthy: bool,
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    status: BTreeMap<String, FamilyBody>,
}

#[derive(Clone, PartialEq, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
struct FamilyBody {
    last_updated: String,
    healthy: bool,
}

impl Health {
    /// Healthy, without status until the first sync. `eligible`: whether the node may get traffic before its Node object
    /// is known; a node without an API has none.
    #[must_use]
    pub const fn new(eligible: bool) -> Self {
        Self {
            families: BTreeMap::new(),
            eligible,
        }
    }

    /// A change of the family waits to be programmed. Before the first sync its start counts as the last update.
    pub fn queued(&mut self, family: Family, now: Instant, at: Timestamp) {
        let fresh = FamilyHealth {
            last_updated: at,
            pending_since: None,
        };
        self.families
            .entry(family)
            .or_insert(fresh)
            .pending_since
            .get_or_insert(now);
    }

    /// Everything of the family has been programmed.
    pub fn updated(&mut self, family: Family, at: Timestamp) {
        self.families.insert(
            family,
            FamilyHealth {
                last_updated: at,
                pending_since: None,
            },
        );
    }

    /// This node's object: a node that is going away should get no new traffic.
    pub fn node(&mut self, node: &Node) {
        let taints = node
            .spec
            .as_ref()
            .and_then(|spec| spec.taints.as_deref())
            .unwrap_or_default();
        self.eligible = node.metadata.deletion_timestamp.is_none()
            && taints.iter().all(|taint| taint.key != TAINT_REMOVAL);
    }

    /// Whether the answer is 200, and the body. `/healthz` also asks whether the node is eligible; `/livez` does not.
    #[must_use]
    pub fn answer(&self, with_node: bool, now: Instant, at: Timestamp) -> (bool, Body) {
        let late = |health: &FamilyHealth| {
            health
                .pending_since
                .is_some_and(|since| now.saturating_duration_since(since) >= PENDING_LIMIT)
        };
        let healthy = !self.families.values().any(late);
        let ok = healthy && (!with_node || self.eligible);
        let newest = self
            .families
            .values()
            .map(|health| health.last_updated)
            .max()
            .unwrap_or(at);
        let body = Body {
            // kube-proxy says "now" whenever all is well
            last_updated: if ok { at } else { newest }.to_string(),
            current_time: at.to_string(),
            node_eligible: with_node.then_some(self.eligible),
            healthy,
            status: self
                .families
                .iter()
                .map(|(family, health)| {
                    let body = FamilyBody {
                        last_updated: health.last_updated.to_string(),
                        healthy: !late(health),
                    };
                    (family.to_string(), body)
                })
                .collect(),
        };
        (ok, body)
    }
}

#[cfg(test)]
mod tests {
    use k8s_openapi::api::core::v1::{NodeSpec, Taint};

    use super::*;

    #[test]
    fn a_change_that_waits_for_a_minute_is_unhealthy_until_it_is_done() {
        let start = Instant::now();
        let at = Timestamp::from_second(1_700_000_000).unwrap();
        let later = Timestamp::from_second(1_700_000_100).unwrap();
        let mut health = Health::new(true);
        let text = serde_json::to_string(&health.answer(true, start, at).1).unwrap();
        assert_eq!(
            text,
            r#"{"lastUpdated":"2023-11-14T22:13:20Z","currentTime":"2023-11-14T22:13:20Z","nodeEligible":true,"healthy":true}"#
        );
        health.queued(Family::V4, start, at);
        assert!(
            !health.answer(false, start + Duration::from_secs(60), at).0,
            "a first sync that fails counts, too"
        );
        health.updated(Family::V4, at);
        health.updated(Family::V6, at);
        health.queued(Family::V4, start, at);
        // the oldest change counts, not the newest
        health.queued(Family::V4, start + Duration::from_secs(50), at);
        assert!(health.answer(true, start + Duration::from_secs(59), later).0);
        let (ok, body) = health.answer(false, start + Duration::from_secs(60), later);
        assert!(!ok);
        let text = serde_json::to_string(&body).unwrap();
        assert_eq!(
            text,
            r#"{"lastUpdated":"2023-11-14T22:13:20Z","currentTime":"2023-11-14T22:15:00Z","healthy":false,"status":{"IPv4":{"lastUpdated":"2023-11-14T22:13:20Z","healthy":false},"IPv6":{"lastUpdated":"2023-11-14T22:13:20Z","healthy":true}}}"#
        );
        // success of the other family does not clear it
        health.updated(Family::V6, later);
        assert!(!health.answer(false, start + Duration::from_secs(61), later).0);
        health.updated(Family::V4, later);
        assert!(health.answer(false, start + Duration::from_secs(61), later).0);
    }

    #[test]
    fn a_node_that_goes_away_is_not_eligible_but_alive() {
        let (now, at) = (Instant::now(), Timestamp::from_second(1_700_000_000).unwrap());
        let mut health = Health::new(false);
        assert!(!health.answer(true, now, at).0, "its Node is not known yet");
        let mut node = Node::default();
        health.node(&node);
        assert!(health.answer(true, now, at).0);
        let taint = Taint {
            key: TAINT_REMOVAL.into(),
            effect: "NoSchedule".into(),
            ..Taint::default()
        };
        node.spec = Some(NodeSpec {
            taints: Some(vec![taint]),
            ..NodeSpec::default()
        });
        health.node(&node);
        let (ok, body) = health.answer(true, now, at);
        assert!(!ok && body.healthy && body.node_eligible == Some(false));
        assert!(health.answer(false, now, at).0);
    }
}
