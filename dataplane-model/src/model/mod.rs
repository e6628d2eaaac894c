//! The cluster as this node sees it: events in, desired services out. An event costs what the services that it touches
//! cost, not what the cluster costs.

mod claims;
mod desire;
mod entries;
mod healthcheck;
mod node;
mod stale;

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::sync::Arc;

use dataplane_common::abi::Addr;
use ipnet::IpNet;
use k8s_openapi::api::core::v1::Service;
use k8s_openapi::api::discovery::v1::EndpointSlice;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;

use crate::event::Event;
use crate::key::{Family, ObjectName, ServiceKey};
use crate::names::Names;
use crate::object::{Problem, ServiceObject, SliceObject};
use crate::settings::Settings;
use claims::Claims;
use entries::Entries;

pub use healthcheck::HealthCheckNodePort;
pub use stale::{Serving, Stale};

/// The objects of the cluster, reduced, with the indexes that keep a change cheap.
#[derive(Debug, Default)]
pub struct Model {
    node_name: String,
    settings: Settings,
    zone: Option<String>,
    /// This node's address by family.
    node_ips: [Option<Addr>; 2],
    service_cidrs: BTreeMap<String, Vec<IpNet>>,
    names: Names,
    entries: Entries,
    /// The entry that a slice belongs to, by the slice's name: its label may change.
    slice_owner: hashbrown::HashMap<ObjectName, u32>,
    claims: Claims,
    /// Entries of host ports.
    host_ports: BTreeSet<ObjectName>,
    /// Entries with a health check node port.
    health_checked: BTreeSet<u32>,
    /// Keys that no entry has any more.
    gone: hashbrown::HashSet<ServiceKey>,
    stale: stale::Suspects,
}

impl Model {
    /// An empty model for the node of this name. Without a name no endpoint is local.
    #[must_use]
    pub fn new(node_name: &str) -> Self {
        Self::with_settings(node_name, Settings::default())
    }

    /// The same with other settings.
    #[must_use]
    pub fn with_settings(node_name: &str, settings: Settings) -> Self {
        Self {
            node_name: node_name.into(),
            settings,
            ..Self::default()
        }
    }

    /// Takes an event in. What was wrong with the objects is returned; the good rest of them is used.
    pub fn apply(&mut self, event: Event) -> Vec<Problem> {
        let mut problems = Vec::new();
        match event {
            Event::ServiceApplied(service) => self.apply_service(&service, &mut problems),
            Event::ServiceDeleted { namespace, name } => {
                self.set_service(&ObjectName::new(&namespace, &name), None, &mut problems);
            }
            Event::SliceApplied(slice) => {
                self.apply_slice(&slice, &mut problems);
            }
            Event::SliceDeleted { namespace, name } => {
                self.set_slice(&ObjectName::new(&namespace, &name), None);
            }
            Event::NodeApplied(node) => self.apply_node(&node, &mut problems),
            Event::NodeDeleted { name } => {
                if name == self.node_name {
                    self.forget_node();
                }
            }
            Event::ServicesReplaced(list) => {
                // what is gone goes first: a frontend of it that another now has is no conflict
                if self.entries.services() > 0 {
                    let listed = list.iter().filter_map(|s| name_of(&s.metadata)).collect();
                    self.keep_services(&listed, &mut problems);
                }
                self.entries.reserve(list.len());
                self.claims.reserve(list.len());
                // each goes as soon as it has been read, while it is near
                for service in list {
                    self.apply_service(&service, &mut problems);
                }
            }
            Event::SlicesReplaced(list) => {
                let known = !self.slice_owner.is_empty();
                let mut listed = HashSet::new();
                self.slice_owner.reserve(list.len());
                for slice in list {
                    let name = self.apply_slice(&slice, &mut problems);
                    if known {
                        listed.extend(name);
                    }
                }
                if known {
                    self.keep_slices(&listed);
                }
            }
            Event::ServicesListed(listed) => self.keep_services(&listed, &mut problems),
            Event::SlicesListed(listed) => self.keep_slices(&listed),
            Event::NodesReplaced(list) => {
                let own = list
                    .iter()
                    .find(|n| n.metadata.name.as_deref() == Some(&self.node_name));
                match own {
                    Some(node) => self.apply_node(node, &mut problems),
                    None => self.forget_node(),
                }
            }
            Event::ServiceCidrApplied(range) => self.apply_service_cidr(&range, &mut problems),
            Event::ServiceCidrDeleted { name } => {
                self.service_cidrs.remove(&name);
            }
            Event::ServiceCidrsReplaced(list) => {
                self.service_cidrs.clear();
                for range in &list {
                    self.apply_service_cidr(range, &mut problems);
                }
            }
            Event::ServiceCidrsListed(listed) => self.service_cidrs.retain(|name, _| listed.contains(name)),
            Event::HostPorts(list) => self.set_host_ports(&list, &mut problems),
        }
        problems
    }

    /// The services whose desired state may have changed since the last call, each once.
    pub fn take_dirty(&mut self) -> Vec<ServiceKey> {
        let mut gone = std::mem::take(&mut self.gone);
        let mut out = Vec::new();
        for id in self.entries.take_dirty() {
            let Some(entry) = self.entries.get(id) else {
                continue;
            };
            for key in entry.keys() {
                if !gone.is_empty() {
                    gone.remove(&key);
                }
                out.push(key);
            }
            self.entries.free_if_empty(id);
        }
        out.extend(gone);
        out
    }

    /// This node's zone, from its label.
    #[must_use]
    pub fn zone(&self) -> Option<&str> {
        self.zone.as_deref()
    }

    /// How many Services and endpoint slices are known, in this order.
    #[must_use]
    pub fn object_counts(&self) -> (usize, usize) {
        let services = self.entries.services() - self.host_ports.len();
        (services, self.slice_owner.len())
    }

    fn apply_service(&mut self, service: &Service, problems: &mut Vec<Problem>) {
        match ServiceObject::parse(service, self.settings, &mut self.names) {
            Ok((name, object, found)) => {
                problems.extend(found);
                self.set_service(&name, object, problems);
            }
            Err(problem) => problems.push(problem),
        }
    }

    fn set_service(&mut self, name: &ObjectName, object: Option<ServiceObject>, problems: &mut Vec<Problem>) {
        let id = match &object {
            Some(_) => self.entries.id(&name.namespace, &name.name),
            None => self.entries.find(name),
        };
        let Some(id) = id else { return };
        let Some(entry) = self.entries.get(id) else { return };
        if entry.service.as_deref() == object.as_ref() {
            return;
        }
        if entry.service.is_some() {
            if object.is_none() {
                self.suspect_all(id);
            }
            self.withdraw(id);
            if let Some(entry) = self.entries.get(id) {
                self.gone.extend(entry.keys());
            }
        }
        let checked = object
            .as_ref()
            .is_some_and(|s| s.external.as_ref().is_some_and(|e| e.health_check_port.is_some()));
        if checked {
            self.health_checked.insert(id);
        } else {
            self.health_checked.remove(&id);
        }
        self.entries.set_service(id, object);
        self.entries.mark(id);
        self.claim(id, problems);
    }

    fn keep_services(&mut self, listed: &HashSet<ObjectName>, problems: &mut Vec<Problem>) {
        let gone = |name: &&ObjectName| !listed.contains(*name) && !self.host_ports.contains(*name);
        for name in self
            .entries
            .service_names()
            .filter(gone)
            .cloned()
            .collect::<Vec<_>>()
        {
            self.set_service(&name, None, problems);
        }
    }

    fn keep_slices(&mut self, listed: &HashSet<ObjectName>) {
        let gone = |name: &&ObjectName| !listed.contains(*name);
        for name in self.slice_owner.keys().filter(gone).cloned().collect::<Vec<_>>() {
            self.set_slice(&name, None);
        }
    }

    fn apply_slice(&mut self, slice: &EndpointSlice, problems: &mut Vec<Problem>) -> Option<ObjectName> {
        match SliceObject::parse(slice, &self.node_name, &mut self.names) {
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

    /// A slice is of the Service of this name, or of none.
    fn set_slice(&mut self, name: &ObjectName, object: Option<(&str, SliceObject)>) {
        let owner = self.slice_owner.get(name).copied();
        let next = object
            .as_ref()
            .and_then(|(service, _)| self.entries.id(&name.namespace, service));
        if let Some(owner) = owner {
            let same = owner == next.unwrap_or(u32::MAX);
            if let Some((_, slice)) = object.as_ref().filter(|_| same) {
                if let Some(old) = self.entries.replace_slice(owner, &name.name, slice) {
                    self.suspect(owner, &old, Some(slice));
                    self.entries.mark(owner);
                }
                return;
            }
            if let Some(old) = self.entries.remove_slice(owner, &name.name) {
                self.suspect(owner, &old, None);
            }
            self.slice_owner.remove(name);
            self.entries.mark(owner);
        }
        if let (Some(id), Some((_, slice))) = (next, object) {
            self.entries.add_slice(id, Arc::clone(&name.name), slice);
            self.slice_owner.insert(name.clone(), id);
            self.entries.mark(id);
        }
    }
}

/// Both families.
const FAMILIES: [Family; 2] = [Family::V4, Family::V6];

fn name_of(meta: &ObjectMeta) -> Option<ObjectName> {
    Some(ObjectName::new(meta.namespace.as_deref()?, meta.name.as_deref()?))
}
