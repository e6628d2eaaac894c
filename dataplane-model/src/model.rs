//! The cluster as this node sees it: events in, desired services out. An event costs what the services that it touches
//! cost, not what the cluster costs.

use std::collections::hash_map::Entry;
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::sync::Arc;

use dataplane_common::abi::{FrontendKey, frontend_class, frontend_kind, service_flag};
use k8s_openapi::api::core::v1::{Node, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;

use crate::desired::{Desired, DesiredService, ServiceConfig, SetBackend};
use crate::event::Event;
use crate::key::{BackendKey, Family, ObjectName, ServiceKey};
use crate::object::{LABEL_ZONE, Problem, ServiceObject, ServicePort, SliceObject, family_index};
use crate::select::{Candidate, Hint, Policy, Selection, categorize};

/// Who wants a frontend: the oldest Service keeps it, then the first by name, so arrival order does not matter.
type Claim = (i64, ServiceKey);

/// The objects of the cluster, reduced, with the indexes that keep a change cheap.
#[derive(Debug, Default)]
pub struct Model {
    node_name: String,
    zone: Option<String>,
    services: BTreeMap<ObjectName, ServiceObject>,
    /// Slices by Service, then by slice name, because duplicates are resolved in that order.
    slices: HashMap<ObjectName, Vec<(Arc<str>, SliceObject)>>,
    /// The Service that a slice belongs to, by the slice's name: its label may change.
    slice_owner: HashMap<ObjectName, ObjectName>,
    /// Sorted, nearly always one: a tree would cost a kilobyte each.
    claims: HashMap<FrontendKey, Box<[Claim]>>,
    dirty: BTreeSet<ServiceKey>,
}

impl Model {
    /// An empty model for the node of this name. Without a name no endpoint is local.
    #[must_use]
    pub fn new(node_name: &str) -> Self {
        Self {
            node_name: node_name.into(),
            ..Self::default()
        }
    }

    /// Takes an event in. What was wrong with the objects is returned; the good rest of them is used.
    pub fn apply(&mut self, event: Event) -> Vec<Problem> {
        let mut problems = Vec::new();
        match event {
            Event::ServiceApplied(service) => {
                self.apply_service(&service, &mut problems);
            }
            Event::ServiceDeleted { namespace, name } => {
                self.set_service(&ObjectName::new(&namespace, &name), None, &mut problems);
            }
            Event::SliceApplied(slice) => {
                self.apply_slice(&slice, &mut problems);
            }
            Event::SliceDeleted { namespace, name } => {
                self.set_slice(&ObjectName::new(&namespace, &name), None);
            }
            Event::NodeApplied(node) => self.apply_node(&node),
            Event::NodeDeleted { name } => {
                if name == self.node_name {
                    self.set_zone(None);
                }
            }
            Event::ServicesReplaced(list) => {
                // what is gone goes first: a frontend of it that another now has is no conflict
                let mut gone: HashSet<ObjectName> = self.services.keys().cloned().collect();
                for name in list.iter().filter_map(|s| name_of(&s.metadata)) {
                    gone.remove(&name);
                }
                for name in gone {
                    self.set_service(&name, None, &mut problems);
                }
                for service in &list {
                    self.apply_service(service, &mut problems);
                }
            }
            Event::SlicesReplaced(list) => {
                let listed = list
                    .iter()
                    .filter_map(|slice| self.apply_slice(slice, &mut problems))
                    .collect();
                self.keep_slices(&listed);
            }
            Event::ServicesListed(listed) => {
                let gone = |name: &&ObjectName| !listed.contains(*name);
                for name in self.services.keys().filter(gone).cloned().collect::<Vec<_>>() {
                    self.set_service(&name, None, &mut problems);
                }
            }
            Event::SlicesListed(listed) => self.keep_slices(&listed),
            Event::NodesReplaced(list) => {
                let own = list
                    .iter()
                    .find(|n| n.metadata.name.as_deref() == Some(&self.node_name));
                match own {
                    Some(node) => self.apply_node(node),
                    None => self.set_zone(None),
                }
            }
        }
        problems
    }

    /// The services whose desired state may have changed since the last call.
    pub fn take_dirty(&mut self) -> BTreeSet<ServiceKey> {
        std::mem::take(&mut self.dirty)
    }

    /// What a service should be; `None` if there should be none of this key.
    #[must_use]
    pub fn desired(&self, key: &ServiceKey) -> Option<DesiredService> {
        let (service, port) = self.service_port(key)?;
        let addr = service.cluster_ip[family_index(key.family)]?;
        let selection = self.selection(key)?;

        let frontend = cluster_ip_frontend(addr, port);
        let owns = self
            .claims
            .get(&frontend)
            .and_then(|claims| claims.first())
            .is_some_and(|(_, owner)| owner == key);
        let frontends = owns
            .then_some((frontend, frontend_kind::CLUSTER_IP))
            .into_iter()
            .collect();
        let flag = |on: bool, bit: u32| if on { bit } else { 0 };
        Some(DesiredService {
            frontends,
            cluster: sorted(selection.cluster),
            local: sorted(selection.local),
            config: ServiceConfig {
                algorithm: service.algorithm,
                flags: flag(service.internal_local, service_flag::INTERNAL_LOCAL)
                    | flag(service.external_local, service_flag::EXTERNAL_LOCAL),
            },
            has_any: selection.has_any,
        })
    }

    /// Which endpoints a service uses (spec kube-proxy 1.3), in the order of the slices; `None` if there is no service of
    /// this key.
    #[must_use]
    pub fn selection(&self, key: &ServiceKey) -> Option<Selection> {
        let (service, port) = self.service_port(key)?;
        let policy = Policy {
            internal_local: service.internal_local,
            external_local: service.external_local,
            externally_accessible: port.node_port || service.external[family_index(key.family)],
        };
        Some(categorize(&self.candidates(key), policy))
    }

    fn service_port(&self, key: &ServiceKey) -> Option<(&ServiceObject, &ServicePort)> {
        let service = self.services.get(&key.service)?;
        let mut ports = service.ports.iter();
        let port = ports.find(|p| p.name == key.port_name && p.protocol == key.protocol)?;
        service.cluster_ip[family_index(key.family)]?;
        Some((service, port))
    }

    /// What the whole node should be.
    #[must_use]
    pub fn desired_all(&self) -> Desired {
        let keys = self
            .services
            .iter()
            .flat_map(|(name, service)| keys_of(name, service));
        Desired {
            services: keys
                .filter_map(|key| Some((key.clone(), self.desired(&key)?)))
                .collect(),
        }
    }

    /// This node's zone, from its label.
    #[must_use]
    pub fn zone(&self) -> Option<&str> {
        self.zone.as_deref()
    }

    /// How many Services and endpoint slices are known, in this order.
    #[must_use]
    pub fn object_counts(&self) -> (usize, usize) {
        (self.services.len(), self.slice_owner.len())
    }

    fn apply_service(&mut self, service: &Service, problems: &mut Vec<Problem>) {
        match ServiceObject::parse(service) {
            Ok((name, object, found)) => {
                problems.extend(found);
                self.set_service(&name, object, problems);
            }
            Err(problem) => problems.push(problem),
        }
    }

    fn set_service(&mut self, name: &ObjectName, object: Option<ServiceObject>, problems: &mut Vec<Problem>) {
        if self.services.get(name) == object.as_ref() {
            return;
        }
        if let Some(old) = self.services.remove(name) {
            for (frontend, key) in frontends_of(name, &old) {
                self.unclaim(&frontend, &(old.created, key));
            }
            self.dirty.extend(keys_of(name, &old));
        }
        let Some(new) = object else { return };
        for (frontend, key) in frontends_of(name, &new) {
            self.claim(frontend, (new.created, key), problems);
        }
        self.dirty.extend(keys_of(name, &new));
        self.services.insert(name.clone(), new);
    }

    fn keep_slices(&mut self, listed: &HashSet<ObjectName>) {
        let gone = |name: &&ObjectName| !listed.contains(*name);
        for name in self.slice_owner.keys().filter(gone).cloned().collect::<Vec<_>>() {
            self.set_slice(&name, None);
        }
    }

    fn claim(&mut self, frontend: FrontendKey, claim: Claim, problems: &mut Vec<Problem>) {
        let claims = self.claims.entry(frontend).or_default();
        if let Some((_, before)) = claims.first() {
            self.dirty.insert(before.clone());
        }
        let mut list = std::mem::take(claims).into_vec();
        list.push(claim);
        list.sort_unstable();
        if let [(_, owner), losers @ ..] = &list[..] {
            problems.extend(losers.iter().map(|(_, loser)| Problem {
                object: format!("Service {}", loser.service),
                message: format!("{}:{} already belongs to {owner}", frontend.addr, frontend.port),
            }));
        }
        *claims = list.into();
    }

    fn unclaim(&mut self, frontend: &FrontendKey, claim: &Claim) {
        if let Some(claims) = self.claims.get_mut(frontend) {
            let mut list = std::mem::take(claims).into_vec();
            list.retain(|other| other != claim);
            *claims = list.into();
            match claims.first() {
                Some((_, heir)) => {
                    self.dirty.insert(heir.clone());
                }
                None => {
                    self.claims.remove(frontend);
                }
            }
        }
    }

    fn apply_slice(&mut self, slice: &EndpointSlice, problems: &mut Vec<Problem>) -> Option<ObjectName> {
        match SliceObject::parse(slice, &self.node_name) {
            Ok((name, object, found)) => {
                problems.extend(found);
                self.set_slice(&name, object);
                Some(name)
            }
            Err(problem) => {
                problems.push(problem);
                None
            }
        }
    }

    fn set_slice(&mut self, name: &ObjectName, object: Option<SliceObject>) {
        let owner = self.slice_owner.get(name).cloned();
        if let Some(owner) = &owner {
            if let Some(slices) = self.slices.get_mut(owner)
                && let Ok(at) = slices.binary_search_by(|(other, _)| other.cmp(&name.name))
            {
                if object.as_ref() == Some(&slices[at].1) {
                    return;
                }
                slices.remove(at);
                if slices.is_empty() {
                    self.slices.remove(owner);
                }
            }
            self.slice_owner.remove(name);
            self.mark(owner);
        }
        if let Some(slice) = object {
            let service = slice.service.clone();
            let slices = self.slices.entry(service.clone()).or_default();
            let at = slices.partition_point(|(other, _)| *other < name.name);
            // most services have one slice: room for no more than there are
            slices.reserve_exact(1);
            slices.insert(at, (Arc::clone(&name.name), slice));
            self.slice_owner.insert(name.clone(), service.clone());
            if owner.as_ref() != Some(&service) {
                self.mark(&service);
            }
        }
    }

    fn mark(&mut self, name: &ObjectName) {
        if let Some(service) = self.services.get(name) {
            self.dirty.extend(keys_of(name, service));
        }
    }

    fn apply_node(&mut self, node: &Node) {
        if node.metadata.name.as_deref() == Some(&self.node_name) {
            let zone = node
                .metadata
                .labels
                .as_ref()
                .and_then(|labels| labels.get(LABEL_ZONE));
            self.set_zone(zone.filter(|z| !z.is_empty()).cloned());
        }
    }

    fn set_zone(&mut self, zone: Option<String>) {
        if self.zone == zone {
            return;
        }
        self.zone = zone;
        let hinted = |slice: &SliceObject| slice.endpoints.iter().any(|e| e.zone_hints.is_some());
        let names = self
            .slices
            .iter()
            .filter(|(_, slices)| slices.iter().any(|(_, slice)| hinted(slice)))
            .map(|(name, _)| name.clone());
        for name in names.collect::<Vec<_>>() {
            self.mark(&name);
        }
    }

    /// The endpoints of a service, one per backend. Of duplicates a later one replaces an earlier one unless it is
    /// terminating (spec kube-proxy 1.2).
    fn candidates(&self, key: &ServiceKey) -> Vec<Candidate> {
        let slices = self
            .slices
            .get(&key.service)
            .into_iter()
            .flatten()
            .map(|(_, slice)| slice);
        let mut out: Vec<Candidate> = Vec::new();
        let mut seen = Seen::default();
        for slice in slices.filter(|s| s.family == key.family) {
            let ports = slice
                .ports
                .iter()
                .filter(|p| p.protocol == key.protocol && p.name == key.port_name);
            for port in ports {
                out.reserve(slice.endpoints.len());
                for endpoint in &slice.endpoints {
                    let zone_hint = match (&endpoint.zone_hints, &self.zone) {
                        (None, _) => Hint::None,
                        (Some(zones), Some(zone)) if zones.iter().any(|z| **z == **zone) => Hint::Here,
                        (Some(_), _) => Hint::Elsewhere,
                    };
                    let candidate = Candidate {
                        backend: BackendKey {
                            addr: endpoint.addr,
                            port: port.port,
                            protocol: key.protocol,
                        },
                        ready: endpoint.ready,
                        serving: endpoint.serving,
                        terminating: endpoint.terminating,
                        local: endpoint.local,
                        node_hint: match (endpoint.node_hints, endpoint.node_hint_here) {
                            (false, _) => Hint::None,
                            (true, true) => Hint::Here,
                            (true, false) => Hint::Elsewhere,
                        },
                        zone_hint,
                    };
                    match seen.find_or_add(candidate.backend, &out) {
                        None => out.push(candidate),
                        Some(at) if !candidate.terminating => out[at] = candidate,
                        Some(_) => {}
                    }
                }
            }
        }
        out
    }
}

/// Where the candidates found so far are. Most services have a handful, for which a look at each is cheaper than a table.
#[derive(Default)]
struct Seen {
    table: HashMap<BackendKey, usize>,
}

impl Seen {
    const FEW: usize = 16;

    /// Where `backend` is among `found`; if it is not, it is taken to become the next.
    fn find_or_add(&mut self, backend: BackendKey, found: &[Candidate]) -> Option<usize> {
        if found.len() < Self::FEW {
            return found.iter().position(|c| c.backend == backend);
        }
        if self.table.is_empty() {
            self.table = found.iter().enumerate().map(|(i, c)| (c.backend, i)).collect();
        }
        match self.table.entry(backend) {
            Entry::Occupied(entry) => Some(*entry.get()),
            Entry::Vacant(entry) => {
                entry.insert(found.len());
                None
            }
        }
    }
}

fn name_of(meta: &ObjectMeta) -> Option<ObjectName> {
    Some(ObjectName::new(meta.namespace.as_deref()?, meta.name.as_deref()?))
}

fn cluster_ip_frontend(addr: dataplane_common::abi::Addr, port: &ServicePort) -> FrontendKey {
    FrontendKey {
        addr,
        port: port.port,
        protocol: port.protocol.number(),
        class: frontend_class::ADDRESS,
    }
}

/// Every service of a Service object: its ports in each family that it is offered in.
fn keys_of<'a>(name: &'a ObjectName, service: &'a ServiceObject) -> impl Iterator<Item = ServiceKey> + 'a {
    let families = [Family::V4, Family::V6]
        .into_iter()
        .filter(|f| service.cluster_ip[family_index(*f)].is_some());
    families.flat_map(move |family| {
        service.ports.iter().map(move |port| ServiceKey {
            service: name.clone(),
            port_name: Arc::clone(&port.name),
            protocol: port.protocol,
            family,
        })
    })
}

fn frontends_of<'a>(
    name: &'a ObjectName,
    service: &'a ServiceObject,
) -> impl Iterator<Item = (FrontendKey, ServiceKey)> + 'a {
    let ports = service.ports.iter().cycle();
    keys_of(name, service).zip(ports).filter_map(|(key, port)| {
        let addr = service.cluster_ip[family_index(key.family)]?;
        Some((cluster_ip_frontend(addr, port), key))
    })
}

fn sorted(mut set: Vec<SetBackend>) -> Vec<SetBackend> {
    set.sort_unstable();
    set
}
