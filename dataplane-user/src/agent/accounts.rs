//! What the agent keeps account of for kube-proxy's metrics (spec kube-proxy 4 and 6).

use std::collections::hash_map::RandomState;
use std::collections::{HashMap, HashSet};
use std::hash::BuildHasher;

use dataplane_common::abi::service_flag;
use dataplane_model::{DesiredService, Family, ObjectName, ServiceKey};
use jiff::Timestamp;
use k8s_openapi::api::discovery::v1::EndpointSlice;

/// Annotation of an endpoint slice: when what changed it happened.
const TRIGGER_TIME: &str = "endpoints.kubernetes.io/last-change-trigger-time";
/// Label of an endpoint slice that names its Service.
const SERVICE_NAME: &str = "kubernetes.io/service-name";

#[derive(Clone, PartialEq, Debug)]
struct Trigger {
    service: ObjectName,
    family: Family,
    at: Timestamp,
}

/// When the changes happened that wait to be programmed.
#[derive(Debug)]
pub(super) struct Triggers {
    start: Timestamp,
    /// By slice: the last one seen, so that the same object again does not count.
    seen: HashMap<ObjectName, Trigger>,
    waiting: Vec<Trigger>,
}

impl Triggers {
    /// Of an agent that started at this time: what happened before is not its latency.
    pub(super) fn new(start: Timestamp) -> Self {
        Self {
            start,
            seen: HashMap::new(),
            waiting: Vec::new(),
        }
    }

    /// A slice was added or changed.
    pub(super) fn applied(&mut self, slice: &EndpointSlice) {
        let Some((name, trigger)) = self.read(slice) else {
            return;
        };
        if self.seen.get(&name) != Some(&trigger) {
            self.waiting.push(trigger.clone());
            self.seen.insert(name, trigger);
        }
    }

    fn read(&self, slice: &EndpointSlice) -> Option<(ObjectName, Trigger)> {
        let meta = &slice.metadata;
        let at: Timestamp = meta.annotations.as_ref()?.get(TRIGGER_TIME)?.parse().ok()?;
        let family = match slice.address_type.as_str() {
            "IPv4" => Family::V4,
            "IPv6" => Family::V6,
            _ => return None,
        };
        let namespace = meta.namespace.as_deref()?;
        let service = meta.labels.as_ref()?.get(SERVICE_NAME)?;
        let trigger = Trigger {
            service: ObjectName::new(namespace, service),
            family,
            at,
        };
        let name = ObjectName::new(namespace, meta.name.as_deref()?);
        (at > self.start).then_some((name, trigger))
    }

    /// A slice is gone: when that happened is not known, and what waits of its Service says nothing any more.
    pub(super) fn deleted(&mut self, namespace: &str, name: &str) {
        if let Some(gone) = self.seen.remove(&ObjectName::new(namespace, name)) {
            self.waiting
                .retain(|trigger| (&trigger.service, trigger.family) != (&gone.service, gone.family));
        }
    }

    /// Everything that could be programmed has been: seconds that it took, by family. What `failed` names is lost.
    pub(super) fn programmed(
        &mut self,
        now: Timestamp,
        failed: impl Fn(&ObjectName, Family) -> bool,
    ) -> Vec<(Family, f64)> {
        let waiting = std::mem::take(&mut self.waiting);
        waiting
            .into_iter()
            .filter(|trigger| !failed(&trigger.service, trigger.family))
            .map(|trigger| {
                let took = now.duration_since(trigger.at).as_secs_f64();
                // the clock of who wrote the annotation may be ahead
                (trigger.family, took.max(0.0))
            })
            .collect()
    }
}

/// Objects of one kind with a change that is not programmed yet. Only their hashes are kept: before the first sync these
/// are all objects of the cluster.
#[derive(Debug, Default)]
pub(super) struct Pending {
    hasher: RandomState,
    names: HashSet<u64>,
}

impl Pending {
    pub(super) fn add(&mut self, namespace: Option<&str>, name: Option<&str>) {
        self.names.insert(self.hasher.hash_one((namespace, name)));
    }

    pub(super) fn clear(&mut self) {
        // with its memory
        self.names = HashSet::new();
    }

    pub(super) fn count(&self) -> i64 {
        i64::try_from(self.names.len()).unwrap_or(i64::MAX)
    }
}

/// Services that a `Local` policy leaves without endpoints though there are some on other nodes.
#[derive(Debug, Default)]
pub(super) struct NoLocal {
    internal: HashSet<ServiceKey>,
    external: HashSet<ServiceKey>,
}

impl NoLocal {
    pub(super) fn set(&mut self, key: &ServiceKey, desired: Option<&DesiredService>) {
        let without = |flag: u32| {
            desired.is_some_and(|d| {
                let has = |flag: u32| d.config.flags & flag != 0;
                has(flag) && has(service_flag::HAS_ENDPOINTS) && d.local.is_empty()
            })
        };
        for (set, flag) in [
            (&mut self.internal, service_flag::INTERNAL_LOCAL),
            (&mut self.external, service_flag::EXTERNAL_LOCAL),
        ] {
            if without(flag) {
                set.insert(key.clone());
            } else {
                set.remove(key);
            }
        }
    }

    /// How many there are, by traffic policy and family.
    pub(super) fn counts(&self) -> impl Iterator<Item = (&'static str, Family, i64)> + '_ {
        let policies = [("internal", &self.internal), ("external", &self.external)];
        policies.into_iter().flat_map(|(policy, set)| {
            [Family::V4, Family::V6].into_iter().map(move |family| {
                let count = set.iter().filter(|key| key.family == family).count();
                (policy, family, i64::try_from(count).unwrap_or(i64::MAX))
            })
        })
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn slice(name: &str, at: &str) -> EndpointSlice {
        serde_json::from_value(json!({
            "metadata": {"name": name, "namespace": "default", "labels": {SERVICE_NAME: "web"},
                "annotations": {TRIGGER_TIME: at}},
            "addressType": "IPv4", "endpoints": [],
        }))
        .unwrap()
    }

    #[test]
    fn latency_counts_from_the_trigger_of_what_is_new_and_programmed() {
        let at = |text: &str| text.parse::<Timestamp>().unwrap();
        let mut triggers = Triggers::new(at("2026-01-01T00:00:00Z"));
        let none = |_: &ObjectName, _| false;
        triggers.applied(&slice("old", "2025-12-31T23:59:59Z"));
        triggers.applied(&slice("noise", "yesterday"));
        triggers.applied(&EndpointSlice::default());
        assert_eq!(triggers.programmed(at("2026-01-01T00:00:10Z"), none), []);
        for _ in 0..2 {
            triggers.applied(&slice("a", "2026-01-01T00:00:08.5Z"));
        }
        triggers.applied(&slice("b", "2026-01-01T00:00:11Z"));
        assert_eq!(
            triggers.programmed(at("2026-01-01T00:00:10Z"), none),
            [(Family::V4, 1.5), (Family::V4, 0.0)]
        );
        // the same object again is no change
        triggers.applied(&slice("a", "2026-01-01T00:00:08.5Z"));
        assert_eq!(triggers.programmed(at("2026-01-01T00:00:12Z"), none), []);
        // what fails is lost
        triggers.applied(&slice("a", "2026-01-01T00:00:13Z"));
        let web = |service: &ObjectName, family| &*service.name == "web" && family == Family::V4;
        assert_eq!(triggers.programmed(at("2026-01-01T00:00:14Z"), web), []);
        assert_eq!(triggers.programmed(at("2026-01-01T00:00:14Z"), none), []);
        // so is what waits when a slice goes
        triggers.applied(&slice("a", "2026-01-01T00:00:15Z"));
        triggers.deleted("default", "b");
        assert_eq!(triggers.programmed(at("2026-01-01T00:00:16Z"), none), []);
    }

    #[test]
    fn services_without_local_endpoints_are_counted_by_policy() {
        let key = |name: &str, family| ServiceKey {
            service: ObjectName::new("default", name),
            port_name: "".into(),
            protocol: dataplane_model::Protocol::Tcp,
            family,
        };
        let desired = |flags: u32, has_any: bool| {
            let has_any = if has_any { service_flag::HAS_ENDPOINTS } else { 0 };
            let mut desired = DesiredService::default();
            desired.config.flags = flags | has_any;
            desired
        };
        let mut account = NoLocal::default();
        let counts = |account: &NoLocal| {
            let mut counts: Vec<_> = account.counts().collect();
            counts.retain(|&(_, _, count)| count != 0);
            counts
        };
        let both = service_flag::INTERNAL_LOCAL | service_flag::EXTERNAL_LOCAL;
        account.set(&key("a", Family::V4), Some(&desired(both, true)));
        account.set(
            &key("b", Family::V6),
            Some(&desired(service_flag::EXTERNAL_LOCAL, true)),
        );
        account.set(&key("none", Family::V4), Some(&desired(both, false)));
        account.set(&key("cluster", Family::V4), Some(&desired(0, true)));
        assert_eq!(
            counts(&account),
            [
                ("internal", Family::V4, 1),
                ("external", Family::V4, 1),
                ("external", Family::V6, 1)
            ]
        );
        account.set(
            &key("a", Family::V4),
            Some(&desired(service_flag::INTERNAL_LOCAL, true)),
        );
        account.set(&key("b", Family::V6), None);
        assert_eq!(counts(&account), [("internal", Family::V4, 1)]);
    }

    #[test]
    fn an_object_that_changes_twice_is_pending_once() {
        let mut pending = Pending::default();
        pending.add(Some("a"), Some("b"));
        pending.add(Some("a"), Some("b"));
        pending.add(Some("a"), Some("c"));
        assert_eq!(pending.count(), 2);
        pending.clear();
        assert_eq!(pending.count(), 0);
    }
}
