//! What Prometheus reads: kube-proxy's names where they mean the same (spec kube-proxy 4), ours with `beeline_`.

mod labels;
mod other_modes;

use std::borrow::Cow;
use std::fmt::Write as _;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering;

use dataplane_model::program::Fill;
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::Registry;

use super::process::Process;
use super::rest::RestClient;
use crate::flow::gc;
pub(super) use labels::BUILD;
pub use labels::{CodeLabel, FamilyLabel, KindLabel, PolicyLabel};
use labels::{EventLabel, MapLabel, ProbeLabel, RemovedLabel, VersionLabel};

/// A histogram by family. The constructor has a name so that the type does.
pub type FamilyHistogram = Family<FamilyLabel, Histogram, fn() -> Histogram>;

/// kube-proxy's buckets of a sync: 1 ms times 2^0..14.
fn sync_histogram() -> Histogram {
    Histogram::new(exponential_buckets(0.001, 2.0, 15))
}

/// kube-proxy's buckets of the network programming latency, in seconds: 0.25, 0.5, 1 to 59 by 1, 60 to 115 by 5, 120 to
/// 300 by 30.
fn latency_histogram() -> Histogram {
    let buckets = [0.25, 0.5]
        .into_iter()
        .chain((1..60).map(f64::from))
        .chain((60..120).step_by(5).map(f64::from))
        .chain((120..=300).step_by(30).map(f64::from));
    Histogram::new(buckets)
}

/// Every metric of the agent.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    /// Of the network between nodes.
    pub overlay: crate::overlay::metrics::Metrics,
    /// Duration of a sync in seconds, as kube-proxy has it.
    pub sync_duration: FamilyHistogram,
    /// Of those, the ones that looked at everything.
    pub full_sync_duration: FamilyHistogram,
    /// Of those, the ones that looked at what had changed.
    pub partial_sync_duration: FamilyHistogram,
    /// Duration of a sync in seconds, in buckets that suit it.
    pub fine_sync_duration: Histogram,
    /// Seconds from the trigger of an endpoint's change until it was programmed.
    pub network_programming: FamilyHistogram,
    /// Services with a change that is not programmed yet.
    pub service_changes_pending: Gauge,
    /// Endpoint slices with a change that is not programmed yet.
    pub endpoint_changes_pending: Gauge,
    /// Services that a `Local` policy leaves without endpoints though there are some elsewhere.
    pub no_local_endpoints: Family<PolicyLabel, Gauge>,
    /// Seconds that a look for stale datagram flows and sockets took.
    reconciler_duration: FamilyHistogram,
    /// Stale datagram flows and sockets that were removed.
    reconciler_deleted: Family<FamilyLabel, Counter>,
    /// Syncs after which a service of the family was not as desired because the kernel refused. kube-proxy has it in the
    /// mode whose behaviour is ours.
    pub sync_failures: Family<FamilyLabel, Counter>,
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
    /// Sockets destroyed because their backend had gone.
    pub sockets_destroyed: Counter,
    backends_suspect: Gauge,
    backend_failures: Counter,
    backend_probes: Family<ProbeLabel, Counter>,
    audit_differences: Family<MapLabel, Counter>,
    /// Unix time of the last comparison of the maps with what they should hold.
    pub last_audit: Gauge<f64, AtomicU64>,
    flow_entries: Family<MapLabel, Gauge>,
    flow_max_entries: Family<MapLabel, Gauge>,
    flow_pressure: Family<MapLabel, Gauge>,
    flows_removed: Family<RemovedLabel, Counter>,
    process: Process,
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new(&RestClient::default())
    }
}

impl Metrics {
    /// With what is counted of the API.
    #[must_use]
    pub fn new(rest: &RestClient) -> Self {
        let mut registry = Registry::default();
        let metrics = Self {
            sync_duration: Family::new_with_constructor(sync_histogram),
            full_sync_duration: Family::new_with_constructor(sync_histogram),
            partial_sync_duration: Family::new_with_constructor(sync_histogram),
            fine_sync_duration: Histogram::new(exponential_buckets(0.000_031_25, 2.0, 20)),
            network_programming: Family::new_with_constructor(latency_histogram),
            service_changes_pending: Gauge::default(),
            endpoint_changes_pending: Gauge::default(),
            no_local_endpoints: Family::default(),
            reconciler_duration: Family::new_with_constructor(sync_histogram),
            reconciler_deleted: Family::default(),
            sync_failures: Family::default(),
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
            sockets_destroyed: Counter::default(),
            backends_suspect: Gauge::default(),
            backend_failures: Counter::default(),
            backend_probes: Family::default(),
            audit_differences: Family::default(),
            last_audit: Gauge::default(),
            flow_entries: Family::default(),
            flow_max_entries: Family::default(),
            flow_pressure: Family::default(),
            flows_removed: Family::default(),
            process: Process::default(),
            overlay: crate::overlay::metrics::Metrics::default(),
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
            "kubeproxy_sync_full_proxy_rules_duration_seconds",
            "Duration of a sync of everything",
            Box::new(m.full_sync_duration.clone()),
        );
        add(
            "kubeproxy_sync_partial_proxy_rules_duration_seconds",
            "Duration of a sync of what changed",
            Box::new(m.partial_sync_duration.clone()),
        );
        add(
            "kubeproxy_network_programming_duration_seconds",
            "Time from the trigger of an endpoint's change until it was programmed",
            Box::new(m.network_programming.clone()),
        );
        add(
            "kubeproxy_sync_proxy_rules_service_changes_pending",
            "Services with a change that is not programmed yet",
            Box::new(m.service_changes_pending.clone()),
        );
        add(
            "kubeproxy_sync_proxy_rules_endpoint_changes_pending",
            "Endpoint slices with a change that is not programmed yet",
            Box::new(m.endpoint_changes_pending.clone()),
        );
        // A gauge whose name ends like a counter's, in kube-proxy, too.
        add(
            "kubeproxy_sync_proxy_rules_no_local_endpoints_total",
            "Service ports with a Local traffic policy and endpoints on other nodes only",
            Box::new(m.no_local_endpoints.clone()),
        );
        add(
            "beeline_sync_duration_seconds",
            "Duration of a sync",
            Box::new(m.fine_sync_duration.clone()),
        );
        add(
            "beeline_audit_differences",
            "Entries of a map that were found changed behind the agent's back",
            Box::new(m.audit_differences.clone()),
        );
        add(
            "beeline_audit_last_timestamp_seconds",
            "Unix time when the maps were last compared with what they should hold",
            Box::new(m.last_audit.clone()),
        );
        add(
            "kubeproxy_conntrack_reconciler_sync_duration_seconds",
            "Time that a look for stale datagram flows and sockets took",
            Box::new(m.reconciler_duration.clone()),
        );
        add(
            "kubeproxy_conntrack_reconciler_deleted_entries",
            "Stale datagram flows and sockets that were removed",
            Box::new(m.reconciler_deleted.clone()),
        );
        add(
            "kubeproxy_sync_proxy_rules_nftables_sync_failures",
            "Syncs that left a service other than desired because the kernel refused",
            Box::new(m.sync_failures.clone()),
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
            "beeline_sockets_destroyed",
            "Sockets destroyed because the backend that they were connected to through a service had gone",
            Box::new(m.sockets_destroyed.clone()),
        );
        add(
            "beeline_backends_suspect",
            "Backends that seem to have failed",
            Box::new(m.backends_suspect.clone()),
        );
        add(
            "beeline_backend_failures",
            "Connections of this node that a backend did not answer, as far as they were told apart",
            Box::new(m.backend_failures.clone()),
        );
        add(
            "beeline_backend_probes",
            "Probes of backends that connections failed to, by result",
            Box::new(m.backend_probes.clone()),
        );
        add(
            "beeline_conntrack_entries",
            "Entries for flows from other hosts, two for each flow",
            Box::new(m.flow_entries.clone()),
        );
        add(
            "beeline_conntrack_max_entries",
            "Entries for flows from other hosts that fit",
            Box::new(m.flow_max_entries.clone()),
        );
        add(
            "beeline_conntrack_pressure",
            "1 while flows are removed before their time, or nothing but live connections is left in a map that is nearly full",
            Box::new(m.flow_pressure.clone()),
        );
        add(
            "beeline_conntrack_removed",
            "Flows removed, by reason: expired, or before their time: closing, half_open, datagram",
            Box::new(m.flows_removed.clone()),
        );
        add(
            "process_resident_memory_bytes",
            "Resident memory of the agent",
            Box::new(m.process.resident.clone()),
        );
        add(
            "process_virtual_memory_bytes",
            "Address space of the agent",
            Box::new(m.process.virt.clone()),
        );
        add(
            "process_cpu_seconds",
            "Processor time that the agent has used",
            Box::new(m.process.cpu.clone()),
        );
        add(
            "process_open_fds",
            "Open file descriptors",
            Box::new(m.process.open_fds.clone()),
        );
        add(
            "process_max_fds",
            "Most file descriptors that may be open",
            Box::new(m.process.max_fds.clone()),
        );
        add(
            "process_start_time_seconds",
            "Unix time when the agent started",
            Box::new(m.process.start_time.clone()),
        );
        add(
            "rest_client_requests",
            "Requests to the API by answer",
            Box::new(rest.requests.clone()),
        );
        add(
            "rest_client_request_duration_seconds",
            "Time until the API began to answer",
            Box::new(rest.duration.clone()),
        );
        let kubernetes = Family::<labels::BuildLabels, Gauge>::default();
        kubernetes.get_or_create(&BUILD).set(1);
        add(
            "kubernetes_build_info",
            "The Kubernetes version whose kube-proxy this behaves as",
            Box::new(kubernetes),
        );
        let build = Family::<VersionLabel, Gauge>::default();
        build
            .get_or_create(&VersionLabel {
                version: env!("CARGO_PKG_VERSION"),
            })
            .set(1);
        add("beeline_build_info", "Always 1", Box::new(build));
        // A rate over a counter needs to see it at 0 first.
        for family in [dataplane_model::Family::V4, dataplane_model::Family::V6] {
            drop(metrics.sync_failures.get_or_create(&FamilyLabel::of(family)));
            drop(metrics.reconciler_deleted.get_or_create(&FamilyLabel::of(family)));
        }
        for code in [200, 503] {
            drop(metrics.healthz.get_or_create(&CodeLabel { code }));
            drop(metrics.livez.get_or_create(&CodeLabel { code }));
        }
        metrics.overlay.register(&mut registry);
        other_modes::register(&mut registry);
        Self { registry, ..metrics }
    }
}

/// Counts what the failure detector does.
#[derive(Debug)]
pub(super) struct Failures(pub(super) std::sync::Arc<super::state::Shared>);

impl crate::failure::Observer for Failures {
    fn probed(&self, verdict: crate::failure::detector::Verdict) {
        let result = verdict.name();
        self.0
            .metrics
            .backend_probes
            .get_or_create(&ProbeLabel { result })
            .inc();
    }

    fn failed(&self) {
        self.0.metrics.backend_failures.inc();
    }

    fn suspects(&self, count: usize) {
        let count = i64::try_from(count).unwrap_or(i64::MAX);
        self.0.metrics.backends_suspect.set(count);
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
    /// What a round of collecting flows found and did.
    pub fn flows(&self, map: &'static str, round: &gc::Round) {
        let label = MapLabel { map };
        let gauge = |family: &Family<MapLabel, Gauge>, value| {
            family.get_or_create(&label).set(value);
        };
        gauge(
            &self.flow_entries,
            i64::try_from(round.entries).unwrap_or(i64::MAX),
        );
        gauge(&self.flow_max_entries, round.capacity.into());
        gauge(&self.flow_pressure, round.pressure().into());
        for (reason, count) in [
            ("expired", round.expired),
            ("closing", round.closing),
            ("half_open", round.half_open),
            ("datagram", round.datagram),
        ] {
            self.flows_removed
                .get_or_create(&RemovedLabel { map, reason })
                .inc_by(count as u64);
        }
    }

    /// Fill of the maps.
    pub fn set_fill(&self, fill: &[Fill]) {
        for fill in fill {
            let label = MapLabel { map: fill.map };
            self.map_entries.get_or_create(&label).set(fill.used.into());
            self.map_max_entries.get_or_create(&label).set(fill.max.into());
        }
    }

    /// Stale sockets and flows have been looked for.
    pub fn stale(&self, done: &crate::flow::stale::Done) {
        let many = |n: usize| u64::try_from(n).unwrap_or(u64::MAX);
        let label = FamilyLabel::of(done.family);
        self.sockets_destroyed.inc_by(many(done.sockets.destroyed));
        self.reconciler_deleted
            .get_or_create(&label)
            .inc_by(many(done.flows.saturating_add(done.sockets.destroyed)));
        self.reconciler_duration
            .get_or_create(&label)
            .observe(done.took.as_secs_f64());
    }

    /// A failure to program a service.
    pub fn program_error(&self, map: &'static str) {
        self.program_errors.get_or_create(&MapLabel { map }).inc();
    }

    /// Entries of a map that were found changed.
    pub fn audit_differences(&self, map: &'static str, count: u64) {
        self.audit_differences
            .get_or_create(&MapLabel { map })
            .inc_by(count);
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
        self.process.read();
        let mut out = String::new();
        // writing to a String does not fail
        let _: std::fmt::Result = encode(&mut out, &self.registry);
        out
    }
}

/// From the OpenMetrics format to the older text format of Prometheus (version 0.0.4), for clients that do not ask for
/// the former: there a counter's description has the name of its sample, and there are no units and no end mark.
#[must_use]
pub fn older_text(open_metrics: &str) -> String {
    let mut out = String::with_capacity(open_metrics.len());
    let mut help: Option<(&str, &str)> = None;
    for line in open_metrics.lines() {
        if let Some(rest) = line.strip_prefix("# HELP ") {
            // which name it has depends on the type, which comes next
            help = rest.split_once(' ');
        } else if let Some((name, kind)) = line.strip_prefix("# TYPE ").and_then(|rest| rest.split_once(' '))
        {
            let name = if kind == "counter" {
                Cow::Owned(format!("{name}_total"))
            } else {
                Cow::Borrowed(name)
            };
            let (_, help) = help.take().unwrap_or_default();
            // writing to a String does not fail
            let _: std::fmt::Result = write!(out, "# HELP {name} {help}\n# TYPE {name} {kind}\n");
        } else if !line.starts_with('#') {
            out.push_str(line);
            out.push('\n');
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use super::*;

    /// A metric as a scraper sees it.
    #[derive(Debug, Default)]
    struct Found {
        kind: String,
        /// Names of labels but `le`, over all samples.
        labels: BTreeSet<String>,
        samples: Vec<(String, f64)>,
    }

    /// Parses the older text format, strictly: every sample belongs to a description before it.
    fn parse(text: &str) -> BTreeMap<String, Found> {
        let mut out: BTreeMap<String, Found> = BTreeMap::new();
        let mut current = String::new();
        for line in text.lines() {
            if let Some(rest) = line.strip_prefix("# TYPE ") {
                let (name, kind) = rest.split_once(' ').unwrap();
                current = name.into();
                let found = Found {
                    kind: kind.into(),
                    ..Found::default()
                };
                assert!(out.insert(name.into(), found).is_none(), "{name} twice");
                continue;
            }
            if line.starts_with("# HELP ") {
                continue;
            }
            let (series, value) = line.rsplit_once(' ').unwrap();
            let (name, labels) = series.split_once('{').unwrap_or((series, "}"));
            let found = out.get_mut(&current).unwrap();
            let suffixes: &[&str] = if found.kind == "histogram" {
                &["_bucket", "_sum", "_count"]
            } else {
                &[""]
            };
            assert!(
                suffixes.iter().any(|suffix| format!("{current}{suffix}") == name),
                "{name} below {current}"
            );
            for label in labels
                .trim_end_matches('}')
                .split("\",")
                .filter(|l| !l.is_empty())
            {
                found.labels.insert(label.split_once('=').unwrap().0.into());
            }
            found.labels.remove("le");
            found.samples.push((series.into(), value.parse().unwrap()));
        }
        out
    }

    #[test]
    fn what_was_stale_is_counted_by_family() {
        let metrics = Metrics::default();
        metrics.stale(&crate::flow::stale::Done {
            family: dataplane_model::Family::V6,
            took: std::time::Duration::from_millis(3),
            flows: 2,
            sockets: crate::flow::destroy::Report {
                destroyed: 5,
                ..crate::flow::destroy::Report::default()
            },
        });
        let text = metrics.text(&[]);
        for line in [
            "kubeproxy_conntrack_reconciler_deleted_entries_total{ip_family=\"IPv4\"} 0",
            "kubeproxy_conntrack_reconciler_deleted_entries_total{ip_family=\"IPv6\"} 7",
            "kubeproxy_conntrack_reconciler_sync_duration_seconds_count{ip_family=\"IPv6\"} 1",
        ] {
            assert!(text.lines().any(|l| l == line), "{line} is not in {text}");
        }
    }

    #[test]
    fn a_dashboard_of_kube_proxy_finds_what_it_asks_for() {
        let metrics = Metrics::default();
        let v4 = FamilyLabel::of(dataplane_model::Family::V4);
        metrics.last_sync.get_or_create(&v4).set(12.5);
        metrics.last_queued.get_or_create(&v4).set(12.5);
        metrics.service_changes.inc();
        metrics.program_error("SLOTS");
        metrics.audit_differences("SLOTS", 2);
        metrics.healthz.get_or_create(&CodeLabel { code: 200 }).inc();
        for histogram in [
            &metrics.sync_duration,
            &metrics.full_sync_duration,
            &metrics.partial_sync_duration,
            &metrics.network_programming,
        ] {
            histogram.get_or_create(&v4).observe(0.003);
        }
        drop(metrics.reconciler_duration.get_or_create(&v4));
        let policy = PolicyLabel {
            traffic_policy: "internal",
            ip_family: "IPv4",
        };
        metrics.no_local_endpoints.get_or_create(&policy).set(1);
        let open = metrics.text(&[("connected", 7)]);
        assert!(open.ends_with("# EOF\n"));
        let found = parse(&older_text(&open));
        for (name, kind, labels) in [
            (
                "kubeproxy_sync_proxy_rules_duration_seconds",
                "histogram",
                "ip_family",
            ),
            (
                "kubeproxy_sync_full_proxy_rules_duration_seconds",
                "histogram",
                "ip_family",
            ),
            (
                "kubeproxy_sync_partial_proxy_rules_duration_seconds",
                "histogram",
                "ip_family",
            ),
            (
                "kubeproxy_sync_proxy_rules_last_timestamp_seconds",
                "gauge",
                "ip_family",
            ),
            (
                "kubeproxy_sync_proxy_rules_last_queued_timestamp_seconds",
                "gauge",
                "ip_family",
            ),
            (
                "kubeproxy_network_programming_duration_seconds",
                "histogram",
                "ip_family",
            ),
            ("kubeproxy_sync_proxy_rules_endpoint_changes_pending", "gauge", ""),
            ("kubeproxy_sync_proxy_rules_endpoint_changes_total", "counter", ""),
            ("kubeproxy_sync_proxy_rules_service_changes_pending", "gauge", ""),
            ("kubeproxy_sync_proxy_rules_service_changes_total", "counter", ""),
            (
                "kubeproxy_sync_proxy_rules_no_local_endpoints_total",
                "gauge",
                "ip_family traffic_policy",
            ),
            ("kubeproxy_proxy_healthz_total", "counter", "code"),
            ("kubeproxy_proxy_livez_total", "counter", "code"),
            (
                "kubeproxy_conntrack_reconciler_sync_duration_seconds",
                "histogram",
                "ip_family",
            ),
            (
                "kubeproxy_conntrack_reconciler_deleted_entries_total",
                "counter",
                "ip_family",
            ),
            (
                "kubeproxy_sync_proxy_rules_nftables_sync_failures_total",
                "counter",
                "ip_family",
            ),
            (
                "kubeproxy_sync_proxy_rules_nftables_cleanup_failures_total",
                "counter",
                "ip_family",
            ),
            (
                "kubeproxy_sync_proxy_rules_iptables_restore_failures_total",
                "counter",
                "ip_family",
            ),
            (
                "kubeproxy_sync_proxy_rules_iptables_partial_restore_failures_total",
                "counter",
                "ip_family",
            ),
            (
                "kubeproxy_sync_proxy_rules_iptables_total",
                "gauge",
                "ip_family table",
            ),
            (
                "kubeproxy_sync_proxy_rules_iptables_last",
                "gauge",
                "ip_family table",
            ),
            (
                "kubeproxy_iptables_ct_state_invalid_dropped_packets_total",
                "counter",
                "",
            ),
            (
                "kubeproxy_iptables_localhost_nodeports_accepted_packets_total",
                "counter",
                "",
            ),
            ("process_resident_memory_bytes", "gauge", ""),
            ("process_virtual_memory_bytes", "gauge", ""),
            ("process_cpu_seconds_total", "counter", ""),
            ("process_open_fds", "gauge", ""),
            ("process_max_fds", "gauge", ""),
            ("process_start_time_seconds", "gauge", ""),
            (
                "kubernetes_build_info",
                "gauge",
                "build_date compiler git_commit git_tree_state git_version go_version major minor platform",
            ),
            ("beeline_sync_duration_seconds", "histogram", ""),
            ("beeline_program_errors_total", "counter", "map"),
            ("beeline_audit_differences_total", "counter", "map"),
            ("beeline_ebpf_events_total", "counter", "event"),
        ] {
            let metric = found
                .get(name)
                .unwrap_or_else(|| panic!("{name} is not in\n{open}"));
            assert_eq!(metric.kind, kind, "{name}");
            let found: Vec<&str> = metric.labels.iter().map(String::as_str).collect();
            assert_eq!(found.join(" "), labels, "{name}");
            assert!(!metric.samples.is_empty(), "{name}");
        }
        assert!(!found.keys().any(|name| name.ends_with("_total_total")));
        let value = |series: &str| {
            let all = found.values().flat_map(|metric| &metric.samples);
            all.clone()
                .find(|(name, _)| name == series)
                .unwrap_or_else(|| panic!("{series} is not in {:?}", all.collect::<Vec<_>>()))
                .1
        };
        for (series, expected) in [
            (
                "kubeproxy_sync_proxy_rules_last_timestamp_seconds{ip_family=\"IPv4\"}",
                12.5,
            ),
            ("kubeproxy_sync_proxy_rules_service_changes_total", 1.0),
            ("kubeproxy_proxy_healthz_total{code=\"200\"}", 1.0),
            ("kubeproxy_proxy_healthz_total{code=\"503\"}", 0.0),
            ("beeline_program_errors_total{map=\"SLOTS\"}", 1.0),
            ("beeline_audit_differences_total{map=\"SLOTS\"}", 2.0),
            ("beeline_ebpf_events_total{event=\"connected\"}", 7.0),
        ] {
            assert!((value(series) - expected).abs() < 1e-9, "{series}");
        }
        assert!(value("process_resident_memory_bytes") > 100_000.0);
        assert!(value("process_open_fds") >= 3.0);
        let now = jiff::Timestamp::now().as_duration().as_secs_f64();
        let start = value("process_start_time_seconds");
        assert!(start > now - 3600.0 && start <= now + 1.0, "{start} {now}");
    }

    #[test]
    fn buckets_are_kube_proxys() {
        let metrics = Metrics::default();
        let v6 = FamilyLabel::of(dataplane_model::Family::V6);
        metrics.sync_duration.get_or_create(&v6).observe(1.0);
        metrics.network_programming.get_or_create(&v6).observe(1.0);
        let text = older_text(&metrics.text(&[]));
        let bounds = |name: &str| -> Vec<f64> {
            let prefix = format!("{name}_bucket{{le=\"");
            let lines = text.lines().filter_map(|line| line.strip_prefix(&prefix));
            lines
                .filter_map(|rest| rest.split_once('"')?.0.parse().ok())
                .filter(|bound: &f64| bound.is_finite())
                .collect()
        };
        let sync = bounds("kubeproxy_sync_proxy_rules_duration_seconds");
        let expected: Vec<f64> = (0..15).map(|n| 0.001 * f64::from(1 << n)).collect();
        assert_eq!(sync, expected);
        let latency = bounds("kubeproxy_network_programming_duration_seconds");
        assert_eq!(latency.len(), 2 + 59 + 12 + 7);
        assert_eq!(latency[..4], [0.25, 0.5, 1.0, 2.0]);
        assert_eq!(latency[60..63], [59.0, 60.0, 65.0]);
        assert_eq!(
            latency[72..],
            [115.0, 120.0, 150.0, 180.0, 210.0, 240.0, 270.0, 300.0]
        );
    }
}
