//! What probes and load balancers ask: kube-proxy's health server (spec kube-proxy 3.1).

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use dataplane_model::Family;
use jiff::Timestamp;
use k8s_openapi::api::core::v1::Node;
use serde::Serialize;

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
    /// A change that waits this long without a successful sync makes the node unhealthy.
    pending_limit: Duration,
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
    /// Healthy, without status until [`Self::started`]. `eligible`: whether the node may get traffic before its Node object
    /// is known; a node without an API has none. `sync_period` is kube-proxy's setting, half of the time that a change may
    /// wait without a successful sync.
    #[must_use]
    pub fn new(eligible: bool, sync_period: Duration) -> Self {
        Self {
            families: BTreeMap::new(),
            eligible,
            pending_limit: sync_period.saturating_mul(2),
        }
    }

    /// The families that this host can serve are from now on looked after, which counts as an update.
    pub fn started(&mut self, families: &[Family], at: Timestamp) {
        for &family in families {
            let health = FamilyHealth {
                last_updated: at,
                pending_since: None,
            };
            self.families.insert(family, health);
        }
    }

    /// A change of the family waits to be programmed; the oldest counts. Ignored for a family that was not
    /// [`started`](Self::started).
    pub fn queued(&mut self, family: Family, now: Instant) {
        if let Some(health) = self.families.get_mut(&family) {
            health.pending_since.get_or_insert(now);
        }
    }

    /// Everything of the family has been programmed. Ignored for a family that was not [`started`](Self::started).
    pub fn updated(&mut self, family: Family, at: Timestamp) {
        if let Some(health) = self.families.get_mut(&family) {
            health.last_updated = at;
            health.pending_since = None;
        }
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

    fn late(&self, health: &FamilyHealth, now: Instant) -> bool {
        health
            .pending_since
            .is_some_and(|since| now.saturating_duration_since(since) >= self.pending_limit)
    }

    /// Whether no family has a change that waits too long.
    #[must_use]
    pub fn healthy(&self, now: Instant) -> bool {
        !self.families.values().any(|health| self.late(health, now))
    }

    /// Whether the answer is 200, and the body. `/healthz` also asks whether the node is eligible; `/livez` does not.
    #[must_use]
    pub fn answer(&self, with_node: bool, now: Instant, at: Timestamp) -> (bool, Body) {
        let late = |health: &FamilyHealth| self.late(health, now);
        let healthy = self.healthy(now);
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
    use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;

    use super::*;

    const BOTH: [Family; 2] = [Family::V4, Family::V6];
    const PERIOD: Duration = Duration::from_secs(30);

    impl Health {
        /// Eligible, with both families.
        pub(in crate::agent) fn for_tests() -> Self {
            let mut health = Self::new(true, PERIOD);
            health.started(&BOTH, Timestamp::UNIX_EPOCH);
            health
        }
    }

    fn text((_, body): (bool, Body)) -> String {
        serde_json::to_string(&body).unwrap()
    }

    #[test]
    fn a_change_that_waits_for_two_periods_is_unhealthy_until_it_is_done() {
        let start = Instant::now();
        let at = Timestamp::from_second(1_700_000_000).unwrap();
        let later = Timestamp::from_second(1_700_000_100).unwrap();
        let mut health = Health::new(true, PERIOD);
        assert_eq!(
            text(health.answer(true, start, at)),
            r#"{"lastUpdated":"2023-11-14T22:13:20Z","currentTime":"2023-11-14T22:13:20Z","nodeEligible":true,"healthy":true}"#,
            "no status before the start"
        );
        health.started(&BOTH, at);
        assert_eq!(
            text(health.answer(false, start, later)),
            r#"{"lastUpdated":"2023-11-14T22:15:00Z","currentTime":"2023-11-14T22:15:00Z","healthy":true,"status":{"IPv4":{"lastUpdated":"2023-11-14T22:13:20Z","healthy":true},"IPv6":{"lastUpdated":"2023-11-14T22:13:20Z","healthy":true}}}"#,
            "what is well says now"
        );
        health.queued(Family::V4, start);
        // the oldest change counts, not the newest
        health.queued(Family::V4, start + Duration::from_secs(50));
        assert!(
            health
                .answer(true, start + Duration::from_millis(59_999), later)
                .0
        );
        let (ok, body) = health.answer(true, start + Duration::from_secs(60), later);
        assert!(!ok);
        assert_eq!(
            serde_json::to_string(&body).unwrap(),
            r#"{"lastUpdated":"2023-11-14T22:13:20Z","currentTime":"2023-11-14T22:15:00Z","nodeEligible":true,"healthy":false,"status":{"IPv4":{"lastUpdated":"2023-11-14T22:13:20Z","healthy":false},"IPv6":{"lastUpdated":"2023-11-14T22:13:20Z","healthy":true}}}"#
        );
        // success of the other family does not clear it, but is the newest update
        health.updated(Family::V6, later);
        let (ok, body) = health.answer(false, start + Duration::from_secs(61), later);
        assert!(!ok && body.last_updated == "2023-11-14T22:15:00Z");
        health.updated(Family::V4, later);
        assert!(health.answer(false, start + Duration::from_secs(61), later).0);
    }

    #[test]
    fn the_period_is_a_setting_and_a_family_that_the_host_lacks_has_no_status() {
        let (start, at) = (Instant::now(), Timestamp::from_second(1_700_000_000).unwrap());
        let mut health = Health::new(true, Duration::from_secs(5));
        health.started(&[Family::V4], at);
        health.queued(Family::V6, start);
        health.updated(Family::V6, at);
        assert!(health.answer(true, start + Duration::from_secs(100), at).0);
        assert!(!text(health.answer(true, start, at)).contains("IPv6"));
        health.queued(Family::V4, start);
        assert!(health.answer(true, start + Duration::from_secs(9), at).0);
        assert!(!health.answer(true, start + Duration::from_secs(10), at).0);
    }

    #[test]
    fn a_node_that_goes_away_is_not_eligible_but_alive() {
        let (now, at) = (Instant::now(), Timestamp::from_second(1_700_000_000).unwrap());
        let mut health = Health::new(false, PERIOD);
        health.started(&BOTH, at);
        assert!(!health.answer(true, now, at).0, "its Node is not known yet");
        let mut node = Node::default();
        health.node(&node);
        assert!(health.answer(true, now, at).0);
        let taint = |key: &str| Taint {
            key: key.into(),
            effect: "NoSchedule".into(),
            ..Taint::default()
        };
        let mut tainted = |keys: &[&str]| {
            node.spec = Some(NodeSpec {
                taints: Some(keys.iter().map(|key| taint(key)).collect()),
                ..NodeSpec::default()
            });
            node.clone()
        };
        health.node(&tainted(&["node.kubernetes.io/unreachable"]));
        assert!(health.answer(true, now, at).0, "another taint");
        let going = tainted(&["other", TAINT_REMOVAL]);
        health.node(&going);
        let (ok, body) = health.answer(true, now, at);
        assert!(!ok && body.healthy && body.node_eligible == Some(false));
        let (ok, body) = health.answer(false, now, at);
        assert!(ok && body.node_eligible.is_none(), "/livez does not care");
        // the autoscaler has changed its mind
        let mut node = tainted(&[]);
        health.node(&node);
        assert!(health.answer(true, now, at).0);
        node.metadata.deletion_timestamp = Some(Time(at));
        health.node(&node);
        assert!(!health.answer(true, now, at).0);
    }
}
