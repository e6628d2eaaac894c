//! The agent without its surroundings: updates in, programmed services and answers out. Nothing here waits.

mod report;

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use dataplane_model::program::{Maps, Programmer, Released};
use dataplane_model::{Event, Family, HealthCheckNodePort, Model, Problem, Protocol, ServiceKey, Settings};
use ipnet::IpNet;
use jiff::Timestamp;
use k8s_openapi::api::core::v1::Node;
use tokio::sync::{mpsc, watch};
use tracing::{info, warn};

use super::accounts::{NoLocal, Pending, Triggers};
use super::listing::{self, Counts};
use super::metrics::KindLabel;
use super::node::Ranges;
use super::problems::Problems;
pub use super::shared::Shared;
use super::view::{ServiceView, SourceView};
use crate::flow::stale::Gone;
use crate::nodeaddr;
use crate::source::{Kind, Update};

/// How long the first sync waits for this node's object.
const NODE_WAIT: Duration = Duration::from_secs(5);

/// Why a service is not as desired.
#[derive(Debug)]
struct Failure {
    text: String,
    /// The kernel refused. (A set that does not fit is the operator's to mend and leaves the node healthy.)
    refused: bool,
}

/// The agent's state.
#[derive(Debug)]
pub struct State<M> {
    model: Model,
    programmer: Programmer<M>,
    shared: Arc<Shared>,
    node_name: String,
    start: Instant,
    listed: HashSet<Kind>,
    sources: BTreeMap<&'static str, Option<String>>,
    synced: bool,
    last_sync: Option<Timestamp>,
    failing: BTreeMap<ServiceKey, Failure>,
    problems: Problems,
    node_addresses: watch::Sender<Option<Vec<IpAddr>>>,
    ranges: watch::Sender<Ranges>,
    health_checks: watch::Sender<Vec<HealthCheckNodePort>>,
    triggers: Triggers,
    pending_services: Pending,
    pending_slices: Pending,
    no_local: NoLocal,
    gone: mpsc::UnboundedSender<Vec<Gone>>,
}

/// How much a sync looks at.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Extent {
    Full,
    Partial,
}

impl<M: Maps> State<M> {
    /// Nothing is known yet; the kernel is left as it is.
    pub fn new(node_name: &str, settings: Settings, programmer: Programmer<M>, shared: Arc<Shared>) -> Self {
        Self {
            model: Model::with_settings(node_name, settings),
            programmer,
            shared,
            node_name: node_name.into(),
            start: Instant::now(),
            listed: HashSet::new(),
            sources: BTreeMap::new(),
            synced: false,
            last_sync: None,
            failing: BTreeMap::new(),
            problems: Problems::default(),
            node_addresses: watch::Sender::new(None),
            ranges: watch::Sender::new(Ranges::default()),
            health_checks: watch::Sender::default(),
            triggers: Triggers::new(Timestamp::now()),
            pending_services: Pending::default(),
            pending_slices: Pending::default(),
            no_local: NoLocal::default(),
            // nobody listens yet
            gone: mpsc::unbounded_channel().0,
        }
    }

    /// From now on, who serves a service no more is told.
    pub fn gone(&mut self) -> mpsc::UnboundedReceiver<Vec<Gone>> {
        let (sender, receiver) = mpsc::unbounded_channel();
        self.gone = sender;
        receiver
    }

    /// Milliseconds on the programmer's clock.
    #[must_use]
    pub fn now_ms(&self) -> u64 {
        u64::try_from(self.start.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    /// True after the first complete sync.
    #[must_use]
    pub const fn synced(&self) -> bool {
        self.synced
    }

    /// Takes an update in. Programming follows with [`Self::sync`].
    pub fn take(&mut self, update: Update) {
        match update {
            Update::Event(event) => {
                self.count(&event);
                self.own_node(&event);
                for problem in self.model.apply(event) {
                    self.problem(problem);
                }
            }
            Update::Listed(kind) => {
                self.listed.insert(kind);
                self.sources.entry(kind.name()).or_insert(None);
                self.shared
                    .metrics
                    .source_up
                    .get_or_create(&KindLabel { kind: kind.name() })
                    .set(1);
            }
            Update::Problem(problem) => self.problem(problem),
            Update::State { kind, error } => {
                match &error {
                    Some(error) => {
                        warn!(kind = kind.name(), %error, "source fails; what is programmed stays in force");
                    }
                    None => info!(kind = kind.name(), "source works again"),
                }
                let up = i64::from(error.is_none());
                self.shared
                    .metrics
                    .source_up
                    .get_or_create(&KindLabel { kind: kind.name() })
                    .set(up);
                self.sources.insert(kind.name(), error);
            }
        }
    }

    /// What an event says of this node's object. That it is gone changes nothing, as in kube-proxy: the last one seen holds.
    fn own_node(&mut self, event: &Event) {
        let own = |node: &&Node| node.metadata.name.as_deref() == Some(&self.node_name);
        let node = match event {
            Event::NodeApplied(node) => Some(&**node).filter(own),
            Event::NodesReplaced(nodes) => nodes.iter().find(own),
            Event::NodeDeleted { name } if *name == self.node_name => {
                warn!("the Node object of this node is gone; what it said holds on");
                None
            }
            _ => None,
        };
        if let Some(node) = node {
            self.shared.health().node(node);
            let addresses = Some(nodeaddr::candidates(node));
            self.node_addresses.send_if_modified(|known| {
                let changed = *known != addresses;
                *known = addresses;
                changed
            });
            let pods = Some(pod_cidrs(node));
            self.ranges.send_if_modified(|known| {
                let changed = known.pods != pods;
                known.pods = pods;
                changed
            });
        }
    }

    /// The addresses of the Node object, as [`nodeaddr::candidates`] has them; `None` while it is not known.
    #[must_use]
    pub fn node_addresses(&self) -> watch::Receiver<Option<Vec<IpAddr>>> {
        self.node_addresses.subscribe()
    }

    /// The cluster's ranges.
    #[must_use]
    pub fn ranges(&self) -> watch::Receiver<Ranges> {
        self.ranges.subscribe()
    }

    /// The health check node ports of Services, and what is to be said there. Nothing before the first sync.
    #[must_use]
    pub fn health_checks(&self) -> watch::Receiver<Vec<HealthCheckNodePort>> {
        self.health_checks.subscribe()
    }

    fn count(&mut self, event: &Event) {
        let many = |n: usize| u64::try_from(n).unwrap_or(u64::MAX);
        let metrics = &self.shared.metrics;
        match event {
            Event::ServiceApplied(service) => {
                metrics.service_changes.inc();
                let meta = &service.metadata;
                self.pending_services
                    .add(meta.namespace.as_deref(), meta.name.as_deref());
            }
            Event::ServiceDeleted { namespace, name } => {
                metrics.service_changes.inc();
                self.pending_services.add(Some(namespace), Some(name));
            }
            Event::ServicesReplaced(list) => {
                metrics.service_changes.inc_by(many(list.len()));
                for service in list {
                    let meta = &service.metadata;
                    self.pending_services
                        .add(meta.namespace.as_deref(), meta.name.as_deref());
                }
            }
            Event::SliceApplied(slice) => {
                metrics.endpoint_changes.inc();
                self.pending_slices.add(
                    slice.metadata.namespace.as_deref(),
                    slice.metadata.name.as_deref(),
                );
                self.triggers.applied(slice);
            }
            Event::SliceDeleted { namespace, name } => {
                metrics.endpoint_changes.inc();
                self.pending_slices.add(Some(namespace), Some(name));
                self.triggers.deleted(namespace, name);
            }
            Event::SlicesReplaced(list) => {
                metrics.endpoint_changes.inc_by(many(list.len()));
                for slice in list {
                    self.pending_slices.add(
                        slice.metadata.namespace.as_deref(),
                        slice.metadata.name.as_deref(),
                    );
                    self.triggers.applied(slice);
                }
            }
            _ => return,
        }
        let metrics = &self.shared.metrics;
        metrics.service_changes_pending.set(self.pending_services.count());
        metrics.endpoint_changes_pending.set(self.pending_slices.count());
    }

    /// Says a problem once, however often the object comes again.
    fn problem(&mut self, problem: Problem) {
        self.shared.metrics.object_problems.inc();
        self.problems.say(problem);
    }

    /// True once Services and endpoint slices have both been listed completely: before that nothing is programmed, and
    /// what an earlier agent programmed stays. The Node is waited for, too, but not for long: it only gives the zone.
    #[must_use]
    pub fn ready(&self) -> bool {
        let objects = self.listed.contains(&Kind::Service) && self.listed.contains(&Kind::EndpointSlice);
        objects && (self.listed.contains(&Kind::Node) || self.synced || self.start.elapsed() >= NODE_WAIT)
    }

    /// When [`Self::ready`] may become true by itself, from now.
    #[must_use]
    pub fn ready_in(&self) -> Option<Duration> {
        (!self.synced)
            .then(|| NODE_WAIT.saturating_sub(self.start.elapsed()))
            .filter(|wait| !wait.is_zero())
    }

    /// Publishes the ranges of service addresses, once they are known.
    fn service_ranges(&self) {
        if !self.listed.contains(&Kind::ServiceCidr) {
            return;
        }
        let services = Some(self.model.service_ranges());
        self.ranges.send_if_modified(|known| {
            let changed = known.services != services;
            known.services = services;
            changed
        });
    }

    /// Programs what changed. The first time, what nobody claims any more is removed, too.
    pub fn sync(&mut self) {
        self.service_ranges();
        if !self.ready() {
            return;
        }
        let dirty = self.model.take_dirty();
        let first = !self.synced;
        if dirty.is_empty() && !first {
            self.caught_up();
            return;
        }
        let begun = Instant::now();
        let families: Vec<Family> = [Family::V4, Family::V6]
            .into_iter()
            .filter(|family| first || dirty.iter().any(|key| key.family == *family))
            .collect();
        self.queued(&families, begun);
        let now = self.now_ms();
        let mut changes = Vec::with_capacity(dirty.len());
        for key in dirty {
            let desired = self.model.desired(&key);
            self.no_local.set(&key, desired.as_ref());
            changes.push((key, desired));
        }
        let outcome = self.programmer.reconcile(changes, now);
        self.tell_gone(first, &outcome.released);
        let (applied, failed) = (outcome.applied, outcome.failed.len());
        let extent = if first { Extent::Full } else { Extent::Partial };
        self.finish(outcome, begun, extent, &families);
        let checks = self.model.health_check_node_ports();
        self.health_checks.send_if_modified(|known| {
            let changed = *known != checks;
            *known = checks;
            changed
        });
        if first {
            let pruned = self.programmer.prune(now).applied;
            self.synced = true;
            let (services, slices) = self.model.object_counts();
            let took = begun.elapsed();
            info!(
                services,
                slices,
                applied,
                failed,
                pruned,
                ?took,
                "first sync done"
            );
        }
        self.say_complete();
    }

    /// Says who serves a service no more. In the first sync that is who served it when the last agent ended: what became of
    /// it since, nobody has seen.
    fn tell_gone(&mut self, first: bool, released: &[Released]) {
        let mut gone: Vec<Gone> = self
            .model
            .take_stale()
            .into_iter()
            .filter_map(|stale| {
                Some(Gone {
                    service: self.programmer.service_id(&stale.service)?,
                    backend: stale.backend,
                    listed: stale.listed,
                })
            })
            .collect();
        if first {
            let missed = released.iter().filter_map(|released| {
                let serving = self.model.serving(released.service.as_ref()?)?;
                let elsewhere = !serving.backends.is_empty() || released.backend.protocol != Protocol::Udp;
                (elsewhere && !serving.backends.contains(&released.backend)).then_some(Gone {
                    service: released.service_id,
                    backend: released.backend,
                    listed: false,
                })
            });
            gone.extend(missed);
        }
        if !gone.is_empty() {
            let _nobody = self.gone.send(gone);
        }
    }

    fn say_complete(&self) {
        let complete = self.synced && self.failing.is_empty();
        self.shared
            .programmed
            .send_if_modified(|programmed| std::mem::replace(&mut programmed.services, complete) != complete);
    }

    /// Tries again what failed; prunes what could not be pruned.
    pub fn retry(&mut self) {
        if self.synced && (self.programmer.pending().next().is_some() || self.programmer.has_unclaimed()) {
            let begun = Instant::now();
            let now = self.now_ms();
            let families: BTreeSet<Family> = self.programmer.pending().map(|key| key.family).collect();
            let outcome = self.programmer.retry(now);
            self.programmer.prune(now);
            let families: Vec<Family> = families.into_iter().collect();
            self.finish(outcome, begun, Extent::Partial, &families);
            self.say_complete();
        }
    }

    /// From now on these backends seem to have failed (rows of `BACKENDS`, the first ones first if not all of a set may be
    /// left out).
    pub fn set_suspects(&mut self, ids: &[u32]) {
        let begun = Instant::now();
        let outcome = self.programmer.set_suspects(ids, self.now_ms());
        // before that there is nothing to be up to date with; what failed is tried again
        if self.synced {
            self.finish(outcome, begun, Extent::Partial, &[]);
        }
    }

    /// True if something waits for [`Self::retry`].
    #[must_use]
    pub fn wants_retry(&self) -> bool {
        self.programmer.pending().next().is_some() || (self.synced && self.programmer.has_unclaimed())
    }

    /// When resting ids can be released, on the clock of [`Self::now_ms`].
    #[must_use]
    pub fn next_release(&self) -> Option<u64> {
        self.programmer.next_release()
    }

    /// Releases what has rested.
    pub fn release(&mut self) {
        let now = self.now_ms();
        self.programmer.release(now);
        self.shared.metrics.set_fill(&self.programmer.usage());
    }

    /// Every service that the kernel holds.
    pub fn services(&self, counts: &impl Counts) -> Vec<ServiceView> {
        let suspects = self.programmer.suspects();
        self.programmer
            .services()
            .iter()
            .map(|service| listing::view(service, suspects, counts))
            .collect()
    }

    /// Where objects come from, the last sync, what fails: for `beeline status`.
    pub fn fill_status(&self, status: &mut super::view::Status) {
        status.synced = self.synced;
        let missing = self.shared.programmed.borrow().missing();
        status.missing = missing.into_iter().map(Into::into).collect();
        status.last_sync = self.last_sync.map(|at| at.to_string());
        status.zone = self.model.zone().map(Into::into);
        (status.services, status.endpoint_slices) = self.model.object_counts();
        status.sources = self
            .sources
            .iter()
            .map(|(kind, error)| SourceView {
                kind: (*kind).into(),
                error: error.clone(),
            })
            .collect();
        status.failing = self
            .failing
            .iter()
            .map(|(key, failure)| format!("{key}: {}", failure.text))
            .collect();
        status.problems = self.problems.shown();
        status.maps = self.programmer.usage().iter().map(Into::into).collect();
    }
}

/// The readable ones of `spec.podCIDRs`, or of `spec.podCIDR` in old objects.
fn pod_cidrs(node: &Node) -> Vec<IpNet> {
    let Some(spec) = &node.spec else {
        return Vec::new();
    };
    let listed = spec.pod_cidrs.as_deref().unwrap_or_default();
    let all = if listed.is_empty() {
        spec.pod_cidr.as_slice()
    } else {
        listed
    };
    all.iter().filter_map(|text| text.parse().ok()).collect()
}

#[cfg(test)]
pub(super) mod tests {
    use dataplane_model::program::{Capacity, FakeMaps, FaultyMaps};
    use serde_json::json;

    use super::super::health::Health;
    use super::*;

    /// A Service with one endpoint.
    pub(in crate::agent) fn web() -> [Event; 2] {
        let service = json!({
            "metadata": {"name": "web", "namespace": "default"},
            "spec": {"clusterIP": "10.96.0.9", "clusterIPs": ["10.96.0.9"], "ipFamilies": ["IPv4"],
                "type": "ClusterIP", "ports": [{"port": 80, "protocol": "TCP"}]},
        });
        let slice = json!({
            "metadata": {"name": "web-1", "namespace": "default", "labels": {"kubernetes.io/service-name": "web"}},
            "addressType": "IPv4", "ports": [{"name": "", "port": 8080, "protocol": "TCP"}],
            "endpoints": [{"addresses": ["10.1.0.2"], "conditions": {"ready": true}}],
        });
        [
            Event::ServiceApplied(serde_json::from_value(service).unwrap()),
            Event::SliceApplied(serde_json::from_value(slice).unwrap()),
        ]
    }

    pub(in crate::agent) fn capacity(slots: u32) -> Capacity {
        Capacity {
            services: 8,
            backends: 8,
            slots,
            frontends: 8,
            source_ranges: 64,
        }
    }

    fn state<M: Maps>(maps: M) -> State<M> {
        State::new(
            "n",
            Settings::default(),
            Programmer::new(maps).unwrap(),
            Shared::new(Health::for_tests()),
        )
    }

    #[test]
    fn nothing_is_programmed_or_pruned_before_both_lists_are_complete() {
        // what an earlier agent left
        let mut earlier = state(FakeMaps::new(capacity(8)));
        for event in web() {
            earlier.take(Update::Event(event));
        }
        for kind in [Kind::Service, Kind::EndpointSlice, Kind::Node] {
            earlier.take(Update::Listed(kind));
        }
        earlier.sync();
        assert_eq!(
            earlier.programmer.maps().frontends.len(),
            2,
            "the frontend and its address"
        );

        let mut state = state(earlier.programmer.maps().clone());
        state.take(Update::Listed(Kind::Node));
        state.take(Update::Listed(Kind::Service));
        state.sync();
        state.retry();
        assert!(!state.synced());
        assert_eq!(state.programmer.maps().frontends.len(), 2);
        // now it is known that there is no such Service any more
        state.take(Update::Listed(Kind::EndpointSlice));
        state.sync();
        assert!(state.synced());
        assert_eq!(state.programmer.maps().frontends.len(), 0);
    }

    #[test]
    fn a_service_that_fails_is_named_until_it_is_programmed() {
        let mut state = state(FaultyMaps::new(FakeMaps::new(capacity(8)), u32::MAX, 1));
        for event in web() {
            state.take(Update::Event(event));
        }
        for kind in [Kind::Service, Kind::EndpointSlice, Kind::Node] {
            state.take(Update::Listed(kind));
        }
        state.sync();
        let mut status = super::super::view::Status::default();
        state.fill_status(&mut status);
        assert_eq!(status.failing.len(), 1);
        assert!(
            status.failing[0].starts_with("default/web/TCP"),
            "{:?}",
            status.failing
        );
        // the others are programmed by other tasks, which nobody runs here
        let others = ["the addresses of this node", "its devices"];
        assert_eq!(status.missing, ["Services", others[0], others[1]]);
        assert!(state.wants_retry());
        let text = state.shared.metrics.text(&[]);
        for line in [
            "kubeproxy_sync_proxy_rules_nftables_sync_failures_total{ip_family=\"IPv4\"} 1",
            "kubeproxy_sync_proxy_rules_nftables_sync_failures_total{ip_family=\"IPv6\"} 0",
        ] {
            assert!(text.lines().any(|l| l == line), "{line} is not in {text}");
        }
        state.programmer.maps_mut().set_rate(0);
        state.retry();
        state.fill_status(&mut status);
        assert_eq!(status.missing, others);
        assert!(!state.wants_retry());
        state.fill_status(&mut status);
        assert!(status.failing.is_empty(), "{:?}", status.failing);
        assert!(status.synced);
    }

    #[test]
    fn what_waits_and_what_a_sync_took_is_counted_by_family() {
        let mut state = state(FakeMaps::new(capacity(8)));
        let [service, slice] = web();
        let Event::SliceApplied(mut slice) = slice else {
            panic!("{slice:?}")
        };
        let trigger = Timestamp::now() + Duration::from_millis(1);
        let annotation = (
            "endpoints.kubernetes.io/last-change-trigger-time".into(),
            trigger.to_string(),
        );
        slice.metadata.annotations = Some([annotation].into());
        for event in [service, Event::SliceApplied(slice)] {
            state.take(Update::Event(event.clone()));
            state.take(Update::Event(event));
        }
        let shared = Arc::clone(&state.shared);
        let value = |series: &str| {
            let text = shared.metrics.text(&[]);
            let line = text
                .lines()
                .find_map(|line| line.strip_prefix(&format!("{series} ")));
            line.and_then(|value| value.parse::<f64>().ok())
        };
        let services = "kubeproxy_sync_proxy_rules_service_changes_pending";
        let slices = "kubeproxy_sync_proxy_rules_endpoint_changes_pending";
        state.sync();
        assert_eq!((value(services), value(slices)), (Some(1.0), Some(1.0)));
        for kind in [Kind::Service, Kind::EndpointSlice, Kind::Node] {
            state.take(Update::Listed(kind));
        }
        state.sync();
        assert_eq!((value(services), value(slices)), (Some(0.0), Some(0.0)));
        let count = |name: &str, family: &str| {
            value(&format!(
                "kubeproxy_{name}_duration_seconds_count{{ip_family=\"{family}\"}}"
            ))
        };
        assert_eq!(count("network_programming", "IPv4"), Some(1.0));
        assert_eq!(count("sync_full_proxy_rules", "IPv4"), Some(1.0));
        assert_eq!(
            count("sync_full_proxy_rules", "IPv6"),
            Some(1.0),
            "the first sync is of both"
        );
        state.take(Update::Event(Event::ServiceDeleted {
            namespace: "default".into(),
            name: "web".into(),
        }));
        assert_eq!(value(services), Some(1.0));
        state.sync();
        assert_eq!(value(services), Some(0.0));
        assert_eq!(count("sync_partial_proxy_rules", "IPv4"), Some(1.0));
        assert_eq!(count("sync_partial_proxy_rules", "IPv6"), None);
        assert_eq!(count("sync_proxy_rules", "IPv4"), Some(2.0));
        assert_eq!(value("beeline_sync_duration_seconds_count"), Some(2.0));
    }

    #[test]
    fn what_someone_else_changed_is_counted_and_repaired() {
        let mut state = state(FaultyMaps::new(FakeMaps::new(capacity(8)), 0, 1));
        assert!(state.audit(), "nothing to compare before the first sync");
        for event in web() {
            state.take(Update::Event(event));
        }
        for kind in [Kind::Service, Kind::EndpointSlice, Kind::Node] {
            state.take(Update::Listed(kind));
        }
        state.sync();
        let before = state.programmer.maps().frontends().unwrap();
        let write = dataplane_model::program::Write::DeleteFrontend { key: before[0].0 };
        state.programmer.maps_mut().write(&write).unwrap();
        state.programmer.maps_mut().set_rate(u32::MAX);
        assert!(!state.audit(), "to be done again");
        state.programmer.maps_mut().set_rate(0);
        assert!(state.audit());
        assert_eq!(state.programmer.maps().frontends().unwrap(), before);
        let text = state.shared.metrics.text(&[]);
        assert!(
            text.contains("beeline_audit_differences_total{map=\"FRONTENDS\"} 2"),
            "{text}"
        );
        assert!(!text.contains("beeline_audit_last_timestamp_seconds 0"), "{text}");
    }

    #[test]
    fn the_addresses_of_this_nodes_object_are_told() {
        let mut state = state(FakeMaps::new(capacity(8)));
        let mut addresses = state.node_addresses();
        let node = |name: &str, ip: &str| {
            let node = json!({"metadata": {"name": name}, "status": {"addresses": [{"type": "InternalIP", "address": ip}]}});
            Update::Event(Event::NodeApplied(serde_json::from_value(node).unwrap()))
        };
        state.take(node("other", "10.0.0.9"));
        assert!(!addresses.has_changed().unwrap());
        state.take(node("n", "10.0.0.1"));
        let known = Some(vec![IpAddr::from([10, 0, 0, 1])]);
        assert_eq!(*addresses.borrow_and_update(), known);
        state.take(node("n", "10.0.0.1"));
        state.take(Update::Event(Event::NodeDeleted { name: "n".into() }));
        assert!(!addresses.has_changed().unwrap());
        assert_eq!(*addresses.borrow(), known);
    }

    #[test]
    fn health_check_node_ports_are_told_with_what_is_on_this_node() {
        let mut state = state(FakeMaps::new(capacity(8)));
        let mut checks = state.health_checks();
        let [service, slice] = web();
        let (Event::ServiceApplied(mut service), Event::SliceApplied(mut slice)) = (service, slice) else {
            panic!("not a Service and a slice")
        };
        let spec = service.spec.as_mut().unwrap();
        spec.type_ = Some("LoadBalancer".into());
        spec.external_traffic_policy = Some("Local".into());
        spec.health_check_node_port = Some(31_000);
        slice.endpoints.as_mut().unwrap()[0].node_name = Some("n".into());
        state.take(Update::Event(Event::ServiceApplied(service.clone())));
        state.take(Update::Event(Event::SliceApplied(slice.clone())));
        state.sync();
        assert!(!checks.has_changed().unwrap(), "not before everything is known");
        for kind in [Kind::Service, Kind::EndpointSlice, Kind::Node] {
            state.take(Update::Listed(kind));
        }
        state.sync();
        let told = |checks: &mut watch::Receiver<Vec<HealthCheckNodePort>>| {
            let checks = checks.borrow_and_update();
            let of = |check: &HealthCheckNodePort| {
                (check.port, check.local_endpoints_v4, check.local_endpoints_v6)
            };
            checks.iter().map(of).collect::<Vec<_>>()
        };
        assert_eq!(told(&mut checks), [(31_000, Some(1), None)]);
        slice.endpoints.as_mut().unwrap()[0].node_name = Some("other".into());
        state.take(Update::Event(Event::SliceApplied(slice)));
        state.sync();
        assert_eq!(told(&mut checks), [(31_000, Some(0), None)]);
        service.spec.as_mut().unwrap().external_traffic_policy = Some("Cluster".into());
        state.take(Update::Event(Event::ServiceApplied(service)));
        state.sync();
        assert_eq!(told(&mut checks), []);
    }

    #[test]
    fn a_problem_is_said_once() {
        let mut state = state(FakeMaps::new(capacity(8)));
        for _ in 0..3 {
            state.take(Update::Problem(Problem {
                object: "Service a/b".into(),
                message: "is bad".into(),
            }));
        }
        assert_eq!(state.problems.shown(), ["Service a/b: is bad"]);
        assert!(
            state
                .shared
                .metrics
                .text(&[])
                .contains("beeline_object_problems_total 3")
        );
    }
}
