//! Metrics of the network between nodes.

use std::sync::Mutex;
use std::sync::PoisonError;
use std::time::Duration;

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::Registry;

use super::View;
use super::path::{Cause, Path};

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct FailedLabel {
    node: String,
    /// `IPv4` or `IPv6`.
    ip_family: &'static str,
    cause: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct ProbeLabel {
    /// `ok` or a cause.
    result: &'static str,
}

/// Metrics of the network between nodes.
#[derive(Debug)]
pub struct Metrics {
    peers: Gauge,
    left_out: Gauge,
    mtu: Gauge,
    ready: Gauge,
    changes: Counter,
    /// What the counter of changes has been told.
    counted: Mutex<u64>,
    failed: Family<FailedLabel, Gauge>,
    probes: Family<ProbeLabel, Counter>,
    rtt: Histogram,
}

impl Default for Metrics {
    fn default() -> Self {
        Self {
            peers: Gauge::default(),
            left_out: Gauge::default(),
            mtu: Gauge::default(),
            ready: Gauge::default(),
            changes: Counter::default(),
            counted: Mutex::default(),
            failed: Family::default(),
            probes: Family::default(),
            // 0.1 ms to 0.8 s
            rtt: Histogram::new(exponential_buckets(0.0001, 2.0, 14)),
        }
    }
}

impl Metrics {
    /// Names them.
    pub fn register(&self, registry: &mut Registry) {
        let mut gauge = |name: &str, help: &str, gauge: &Gauge| registry.register(name, help, gauge.clone());
        gauge(
            "beeline_overlay_peers",
            "Other nodes of the pod network",
            &self.peers,
        );
        gauge(
            "beeline_overlay_peers_left_out",
            "Nodes that are left out because of what they say of themselves",
            &self.left_out,
        );
        gauge(
            "beeline_overlay_mtu_bytes",
            "Largest packet to pods of other nodes",
            &self.mtu,
        );
        gauge(
            "beeline_overlay_ready",
            "1 while the kernel is as the pod network needs it",
            &self.ready,
        );
        registry.register(
            "beeline_overlay_changes",
            "Changes of devices, routes, neighbours and forwarding entries",
            self.changes.clone(),
        );
        registry.register(
            "beeline_overlay_path_failed",
            "1 for each node that packets do not get to, and why",
            self.failed.clone(),
        );
        registry.register(
            "beeline_overlay_path_probes",
            "Looks at the ways to other nodes, by result",
            self.probes.clone(),
        );
        registry.register(
            "beeline_overlay_path_rtt_seconds",
            "Round trip times to other nodes",
            self.rtt.clone(),
        );
    }

    /// How things are.
    pub fn follow(&self, view: &View) {
        let count = |count: usize| i64::try_from(count).unwrap_or(i64::MAX);
        self.peers.set(count(view.peers));
        self.left_out.set(count(view.problems.len()));
        self.mtu.set(view.overlay_mtu.into());
        self.ready.set((view.ready && view.failure.is_none()).into());
        let mut counted = self.counted.lock().unwrap_or_else(PoisonError::into_inner);
        self.changes.inc_by(view.changes.saturating_sub(*counted));
        *counted = view.changes;
    }

    /// A look has ended.
    pub fn looked(&self, found: Result<Duration, Cause>) {
        let result = match found {
            Ok(rtt) => {
                self.rtt.observe(rtt.as_secs_f64());
                "ok"
            }
            Err(cause) => cause.name(),
        };
        self.probes.get_or_create(&ProbeLabel { result }).inc();
    }

    /// These fail, and no others.
    pub fn failing(&self, all: &[Path]) {
        self.failed.clear();
        for path in all {
            if let Some(Err(cause)) = path.state {
                let label = FailedLabel {
                    node: path.way.node.clone(),
                    ip_family: if path.way.target.is_ipv4() { "IPv4" } else { "IPv6" },
                    cause: cause.name(),
                };
                self.failed.get_or_create(&label).set(1);
            }
        }
    }
}
