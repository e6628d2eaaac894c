//! What is said of a sync: metrics, health, logs.

use std::collections::HashSet;
use std::time::Instant;

use dataplane_model::program::{Maps, Outcome, ProgramError};
use dataplane_model::{Family, ObjectName, ServiceKey};
use jiff::Timestamp;
use tracing::{debug, error, info, warn};

use super::{Extent, Failure, State};
use crate::agent::metrics::{FamilyLabel, PolicyLabel};

impl<M: Maps> State<M> {
    /// Compares the maps with what they should hold and repairs them: what someone else has changed would stay so until its
    /// service changes. False if it has to be done again soon.
    pub fn audit(&mut self) -> bool {
        if !self.synced {
            return true;
        }
        let begun = Instant::now();
        let now = self.now_ms();
        let audit = match self.programmer.audit(now) {
            Ok(audit) => audit,
            Err(error) => {
                warn!(%error, "the maps cannot be compared with what they should hold");
                return false;
            }
        };
        let metrics = &self.shared.metrics;
        for (&map, &count) in &audit.differences {
            metrics.audit_differences(map, count);
        }
        metrics.last_audit.set(unix_seconds(Timestamp::now()));
        let took = begun.elapsed();
        for histogram in [&metrics.sync_duration, &metrics.full_sync_duration] {
            for family in [Family::V4, Family::V6] {
                histogram
                    .get_or_create(&FamilyLabel::of(family))
                    .observe(took.as_secs_f64());
            }
        }
        if audit.is_clean() {
            debug!(?took, "the maps hold what they should");
        } else {
            let differences: u64 = audit.differences.values().sum();
            let (repaired, examples) = (audit.failed.is_empty(), audit.examples.join("; "));
            warn!(
                differences,
                repaired,
                ?took,
                "something else has changed the maps: {examples}"
            );
        }
        for error in &audit.failed {
            metrics.program_error(error.map());
            error!(%error, "what was changed in a map cannot be repaired");
        }
        metrics.set_fill(&self.programmer.usage());
        audit.failed.is_empty()
    }

    /// A sync has been asked for.
    pub(super) fn queued(&self, families: &[Family], begun: Instant) {
        let at = Timestamp::now();
        for &family in families {
            self.shared.health().queued(family, begun);
            self.shared
                .metrics
                .last_queued
                .get_or_create(&FamilyLabel::of(family))
                .set(unix_seconds(at));
        }
    }

    /// Everything that has been taken in has been looked at.
    pub(super) fn caught_up(&mut self) {
        self.pending_services.clear();
        self.pending_slices.clear();
        let metrics = &self.shared.metrics;
        metrics.service_changes_pending.set(0);
        metrics.endpoint_changes_pending.set(0);
        let failed: HashSet<(&ObjectName, Family)> = self
            .failing
            .keys()
            .map(|key| (&key.service, key.family))
            .collect();
        let took = self.triggers.programmed(Timestamp::now(), |service, family| {
            failed.contains(&(service, family))
        });
        for (family, seconds) in took {
            metrics
                .network_programming
                .get_or_create(&FamilyLabel::of(family))
                .observe(seconds);
        }
    }

    pub(super) fn finish(&mut self, outcome: Outcome, begun: Instant, extent: Extent, families: &[Family]) {
        let mut before = std::mem::take(&mut self.failing);
        for (key, error) in outcome.failed {
            self.shared.metrics.program_error(error.map());
            let failure = Failure {
                text: error.to_string(),
                refused: !matches!(error, ProgramError::Full { .. }),
            };
            if before.remove(&key).is_none_or(|known| known.text != failure.text) {
                let map = error.map();
                error!(service = %key, map, "cannot be programmed, its old backends stay in force: {}", failure.text);
            }
            self.failing.insert(key, failure);
        }
        let pending: HashSet<&ServiceKey> = self.programmer.pending().collect();
        for (key, failure) in before {
            if pending.contains(&key) {
                self.failing.insert(key, failure);
            } else {
                info!(service = %key, "is programmed now");
            }
        }
        let refused = self.failing.iter().filter(|(_, failure)| failure.refused);
        let broken: HashSet<Family> = refused.map(|(key, _)| key.family).collect();

        let at = Timestamp::now();
        let metrics = &self.shared.metrics;
        for family in [Family::V4, Family::V6] {
            if !broken.contains(&family) {
                self.shared.health().updated(family, at);
                metrics
                    .last_sync
                    .get_or_create(&FamilyLabel::of(family))
                    .set(unix_seconds(at));
                self.last_sync = Some(at);
            } else {
                metrics
                    .sync_failures
                    .get_or_create(&FamilyLabel::of(family))
                    .inc();
            }
        }
        metrics
            .services_failing
            .set(i64::try_from(self.failing.len()).unwrap_or(i64::MAX));
        let took = begun.elapsed().as_secs_f64();
        metrics.fine_sync_duration.observe(took);
        let of_extent = match extent {
            Extent::Full => &metrics.full_sync_duration,
            Extent::Partial => &metrics.partial_sync_duration,
        };
        for histogram in [&metrics.sync_duration, of_extent] {
            for &family in families {
                histogram.get_or_create(&FamilyLabel::of(family)).observe(took);
            }
        }
        for (traffic_policy, family, count) in self.no_local.counts() {
            let label = PolicyLabel {
                traffic_policy,
                ip_family: FamilyLabel::of(family).ip_family,
            };
            metrics.no_local_endpoints.get_or_create(&label).set(count);
        }
        metrics.set_fill(&self.programmer.usage());
        self.caught_up();
    }
}

fn unix_seconds(at: Timestamp) -> f64 {
    at.as_duration().as_secs_f64()
}
