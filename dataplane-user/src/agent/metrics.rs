//! What Prometheus reads: kube-proxy's names where they mean the same (spec kube-proxy 4), ours with `beeline_`.

use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering;

use dataplane_model::program::Fill;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::Registry;

/// Label of a map.
#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct MapLabel {
    map: &'static str,
}

/// Label of an event in the programs.
#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct EventLabel {
    event: &'static str,
}

/// Label of an address family, spelled as kube-proxy does.
#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
pub struct FamilyLabel {
    /// `IPv4` or `IPv6`.
    pub ip_family: &'static str,
}

/// Label of a HTTP answer.
#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
pub struct CodeLabel {
    /// 200 or 503.
    pub code: u32,
}

/// Label of a kind of object.
#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
pub struct KindLabel {
    /// `Service`, `EndpointSlice` or `Node`.
    pub kind: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct VersionLabel {
    version: &'static str,
}

/// Every metric of the agent.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    /// Duration of a sync in seconds.
    pub sync_duration: Histogram,
    /// Unix time of the last successful sync, by family.
    pub last_sync: Family<FamilyLabel, Gauge<f64, AtomicU64>>,
    /// Unix time when a sync was last asked for.
    pub last_queued: Family<FamilyLabel, Gauge<f64, AtomicU64>>,
    /// Changes of Services seen.
    pub service_changes: Counter,
    /// Changes of endpoint slices seen.
    pub endpoint_changes: Counter,
    /// Answers of `/healthz`.
    pub healthz: Family<CodeLabel, Counter>,
    /// Answers of `/livez`.
    pub livez: Family<CodeLabel, Counter>,
    /// Objects, or parts of them, that could not be used.
    pub object_problems: Counter,
    /// Services that are not as desired.
    pub services_failing: Gauge,
    /// 1 while the source of a kind works.
    pub source_up: Family<KindLabel, Gauge>,
    program_errors: Family<MapLabel, Counter>,
    map_entries: Family<MapLabel, Gauge>,
    map_max_entries: Family<MapLabel, Gauge>,
    events: Family<EventLabel, Counter>,
    resident: Gauge,
}

impl Default for Metrics {
    fn default() -> Self {
        let mut registry = Registry::default();
        let metrics = Self {
            // spec kube-proxy 4: 1 ms times 2^0..14; ours are shorter, so finer ones below
            sync_duration: Histogram::new(exponential_buckets(0.000_031_25, 2.0, 20)),
            last_sync: Family::default(),
            last_queued: Family::default(),
            service_changes: Counter::default(),
            endpoint_changes: Counter::default(),
            healthz: Family::default(),
            livez: Family::default(),
            object_problems: Counter::default(),
            services_failing: Gauge::default(),
            source_up: Family::default(),
            program_errors: Family::default(),
            map_entries: Family::default(),
            map_max_entries: Family::default(),
            events: Family::default(),
            resident: Gauge::default(),
            registry: Registry::default(),
        };
        let mut add =
            |name: &str, help: &str, metric: Box<dyn Register>| metric.register(&mut registry, name, help);
        let m = &metrics;
        add(
            "kubeproxy_sync_proxy_rules_duration_seconds",
            "Duration of a sync",
            Box::new(m.sync_duration.clone()),
        );
        add(
            "kubeproxy_sync_proxy_rules_last_timestamp_seconds",
            "Unix time of the last successful sync",
            Box::new(m.last_sync.clone()),
        );
        add(
            "kubeproxy_sync_proxy_rules_last_queued_timestamp_seconds",
            "Unix time when a sync was last asked for",
            Box::new(m.last_queued.clone()),
        );
        add(
            "kubeproxy_sync_proxy_rules_service_changes",
            "Changes of Services seen",
            Box::new(m.service_changes.clone()),
        );
        add(
            "kubeproxy_sync_proxy_rules_endpoint_changes",
            "Changes of endpoint slices seen",
            Box::new(m.endpoint_changes.clone()),
        );
        add(
            "kubeproxy_proxy_healthz",
            "Answers of /healthz by code",
            Box::new(m.healthz.clone()),
        );
        add(
            "kubeproxy_proxy_livez",
            "Answers of /livez by code",
            Box::new(m.livez.clone()),
        );
        add(
            "beeline_object_problems",
            "Objects or parts of them that could not be used",
            Box::new(m.object_problems.clone()),
        );
        add(
            "beeline_services_failing",
            "Services that could not be programmed as desired",
            Box::new(m.services_failing.clone()),
        );
        add(
            "beeline_program_errors",
            "Failures to program a service, by map",
            Box::new(m.program_errors.clone()),
        );
        add(
            "beeline_source_up",
            "1 while the source of a kind works",
            Box::new(m.source_up.clone()),
        );
        add(
            "beeline_map_entries",
            "Entries in use",
            Box::new(m.map_entries.clone()),
        );
        add(
            "beeline_map_max_entries",
            "Size of the map in entries",
            Box::new(m.map_max_entries.clone()),
        );
        add(
            "beeline_ebpf_events",
            "What the programs counted",
            Box::new(m.events.clone()),
        );
        add(
            "process_resident_memory_bytes",
            "Resident memory of the agent",
            Box::new(m.resident.clone()),
        );
        let build = Family::<VersionLabel, Gauge>::default();
        build
            .get_or_create(&VersionLabel {
                version: env!("CARGO_PKG_VERSION"),
            })
            .set(1);
        add("beeline_build_info", "Always 1", Box::new(build));
        Self { registry, ..metrics }
    }
}

/// Lets differently typed metrics be registered in one list.
trait Register {
    fn register(self: Box<Self>, registry: &mut Registry, name: &str, help: &str);
}

impl<M: prometheus_client::registry::Metric> Register for M {
    fn register(self: Box<Self>, registry: &mut Registry, name: &str, help: &str) {
        registry.register(name, help, *self);
    }
}

impl Metrics {
    /// Fill of the maps.
    pub fn set_fill(&self, fill: &[Fill]) {
        for fill in fill {
            let label = MapLabel { map: fill.map };
            self.map_entries.get_or_create(&label).set(fill.used.into());
            self.map_max_entries.get_or_create(&label).set(fill.max.into());
        }
    }

    /// A failure to program a service.
    pub fn program_error(&self, map: &'static str) {
        self.program_errors.get_or_create(&MapLabel { map }).inc();
    }

    /// Everything, in the OpenMetrics text format. `counters` are the programs' own.
    #[must_use]
    pub fn text(&self, counters: &[(&'static str, u64)]) -> String {
        for &(event, value) in counters {
            self.events
                .get_or_create(&EventLabel { event })
                .inner()
                .store(value, Ordering::Relaxed);
        }
        self.resident.set(resident_bytes().unwrap_or(0));
        let mut out = String::new();
        // writing to a String does not fail
        let _: std::fmt::Result = encode(&mut out, &self.registry);
        out
    }
}

/// `VmRSS` of this process, in bytes.
#[must_use]
pub fn resident_bytes() -> Option<i64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    line.trim()
        .strip_suffix(" kB")?
        .trim()
        .parse::<i64>()
        .ok()
        .map(|kib| kib * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_kube_proxys() {
        let metrics = Metrics::default();
        metrics
            .last_sync
            .get_or_create(&FamilyLabel { ip_family: "IPv4" })
            .set(12.5);
        metrics.service_changes.inc();
        metrics.program_error("SLOTS");
        metrics.healthz.get_or_create(&CodeLabel { code: 200 }).inc();
        let text = metrics.text(&[("connected", 7)]);
        for line in [
            "kubeproxy_sync_proxy_rules_last_timestamp_seconds{ip_family=\"IPv4\"} 12.5",
            "kubeproxy_sync_proxy_rules_service_changes_total 1",
            "kubeproxy_proxy_healthz_total{code=\"200\"} 1",
            "beeline_program_errors_total{map=\"SLOTS\"} 1",
            "beeline_ebpf_events_total{event=\"connected\"} 7",
        ] {
            assert!(text.lines().any(|l| l == line), "{line} is not in\n{text}");
        }
        assert!(resident_bytes().unwrap() > 100_000);
    }
}
