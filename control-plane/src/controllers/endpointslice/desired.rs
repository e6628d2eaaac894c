//! Which slices to create, change and delete so that they hold a Service's endpoints.
//!
//! As few slices as possible change: an endpoint stays in its slice, new ones fill slices that change anyway, and a slice
//! that would be deleted is used again for one that would be created (kube-controller-manager's reconciler does the same,
//! so that every proxy in the cluster has little to read).

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{Node, Pod, Service, ServiceSpec};
use k8s_openapi::api::discovery::v1::{Endpoint, EndpointPort, EndpointSlice};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference};
use k8s_openapi::jiff::Timestamp;

use super::endpoints::{Candidate, candidates};
use super::{CONTROLLER, HEADLESS, MANAGED_BY, SERVICE_NAME, TRIGGER_TIME};

/// Endpoints in one slice, kube-controller-manager's default.
const MAX_ENDPOINTS: usize = 100;

/// One thing to do.
#[derive(Debug, Clone, PartialEq)]
pub enum SliceChange {
    /// Create this slice; the server completes its name.
    Create(EndpointSlice),
    /// Replace the slice of this name.
    Update(EndpointSlice),
    /// Delete the slice of this name, if its uid is still this one.
    Delete {
        /// `metadata.name`
        name: String,
        /// `metadata.uid`
        uid: String,
    },
}

/// What to change in `existing` so that it holds the endpoints of `service`. Slices of other owners in `existing` are
/// ignored; `pods` may hold any Pods of the Service's namespace. Nothing to do is an empty list.
pub fn desired_slices(
    service: &Service,
    pods: &[&Pod],
    nodes: &BTreeMap<String, Node>,
    existing: &[&EndpointSlice],
) -> Vec<SliceChange> {
    let Some(spec) = service.spec.as_ref() else {
        return Vec::new();
    };
    // Without a selector somebody else writes the endpoints.
    if spec.selector.as_ref().is_none_or(BTreeMap::is_empty) {
        return Vec::new();
    }
    let mine: Vec<&EndpointSlice> = existing
        .iter()
        .copied()
        .filter(|slice| is_ours(slice, service))
        .collect();
    let families = families(spec);
    let mut changes: Vec<SliceChange> = mine
        .iter()
        .filter(|slice| !families.contains(&slice.address_type.as_str()))
        .map(|slice| delete(slice))
        .collect();
    for family in families {
        let of_family: Vec<&EndpointSlice> = mine
            .iter()
            .copied()
            .filter(|s| s.address_type == family)
            .collect();
        let candidates = candidates(service, pods, nodes, family == "IPv6");
        changes.extend(Family { service, family }.reconcile(candidates, &of_family));
    }
    changes
}

/// Whether this controller keeps the slice for that Service.
fn is_ours(slice: &EndpointSlice, service: &Service) -> bool {
    let label = |key: &str| slice.metadata.labels.as_ref().and_then(|l| l.get(key));
    label(MANAGED_BY).is_some_and(|v| v == CONTROLLER)
        && label(SERVICE_NAME) == service.metadata.name.as_ref()
        && slice.metadata.namespace == service.metadata.namespace
}

fn families(spec: &ServiceSpec) -> Vec<&'static str> {
    if spec.type_.as_deref() == Some("ExternalName") {
        return Vec::new();
    }
    let given = spec.ip_families.as_deref().unwrap_or_default();
    let mut found: Vec<&'static str> = given
        .iter()
        .filter_map(|f| match f.as_str() {
            "IPv4" => Some("IPv4"),
            "IPv6" => Some("IPv6"),
            _ => None,
        })
        .collect();
    if found.is_empty() {
        let v6 = spec.cluster_ip.as_deref().is_some_and(|ip| ip.contains(':'));
        found.push(if v6 { "IPv6" } else { "IPv4" });
    }
    found
}

pub(super) fn delete(slice: &EndpointSlice) -> SliceChange {
    SliceChange::Delete {
        name: slice.metadata.name.clone().unwrap_or_default(),
        uid: slice.metadata.uid.clone().unwrap_or_default(),
    }
}

/// What tells endpoints apart: the Pod and its address.
fn identity(endpoint: &Endpoint) -> (Option<&str>, Option<&str>) {
    let target = endpoint.target_ref.as_ref();
    (
        target.and_then(|t| t.uid.as_deref().or(t.name.as_deref())),
        endpoint.addresses.first().map(String::as_str),
    )
}

/// A slice as it is to be.
struct Draft<'a> {
    /// The slice to update; none if it is to be created.
    from: Option<&'a EndpointSlice>,
    ports: Vec<EndpointPort>,
    endpoints: Vec<Endpoint>,
    /// Whether endpoints differ from those of `from`.
    changed: bool,
    /// When the changes happened.
    times: Vec<Timestamp>,
}

impl Draft<'_> {
    fn room(&self) -> usize {
        MAX_ENDPOINTS.saturating_sub(self.endpoints.len())
    }

    fn fill(&mut self, new: &mut Vec<Candidate>) {
        let count = self.room().min(new.len());
        for candidate in new.drain(..count) {
            self.changed = true;
            self.times.extend(candidate.since);
            self.endpoints.push(candidate.endpoint);
        }
    }
}

struct Family<'a> {
    service: &'a Service,
    family: &'static str,
}

impl Family<'_> {
    fn reconcile(&self, candidates: Vec<Candidate>, existing: &[&EndpointSlice]) -> Vec<SliceChange> {
        // Pods may have different numbers behind the same port name; a slice has one list of ports.
        let mut by_ports: Vec<(Vec<EndpointPort>, Vec<Candidate>)> = Vec::new();
        for candidate in candidates {
            match by_ports.iter_mut().find(|(ports, _)| *ports == candidate.ports) {
                Some((_, group)) => group.push(candidate),
                None => by_ports.push((candidate.ports.clone(), vec![candidate])),
            }
        }
        let mut drafts = Vec::new();
        let mut spare: Vec<&EndpointSlice> = existing
            .iter()
            .copied()
            .filter(|slice| {
                let ports = slice.ports.as_deref().unwrap_or_default();
                !by_ports.iter().any(|(p, _)| p == ports)
            })
            .collect();
        for (ports, group) in by_ports {
            let slices: Vec<&EndpointSlice> = existing
                .iter()
                .copied()
                .filter(|s| s.ports.as_deref().unwrap_or_default() == ports)
                .collect();
            place(&ports, group, &slices, &mut drafts, &mut spare);
        }
        if drafts.is_empty() {
            // One empty slice says that the Service is known and has no endpoints.
            drafts.push(Draft {
                from: None,
                ports: Vec::new(),
                endpoints: Vec::new(),
                changed: true,
                times: Vec::new(),
            });
        }
        for draft in drafts.iter_mut().filter(|d| d.from.is_none()) {
            let same_ports = spare
                .iter()
                .position(|s| s.ports.as_deref().unwrap_or_default() == draft.ports)
                .or(if spare.is_empty() { None } else { Some(0) });
            draft.from = same_ports.map(|i| spare.remove(i));
        }
        let mut changes: Vec<SliceChange> = drafts.iter().filter_map(|draft| self.change(draft)).collect();
        changes.extend(spare.into_iter().map(delete));
        changes
    }

    /// The change that makes the draft real, if anything differs.
    fn change(&self, draft: &Draft<'_>) -> Option<SliceChange> {
        let Some(from) = draft.from else {
            return Some(SliceChange::Create(self.slice(draft, None)));
        };
        let slice = self.slice(draft, Some(from));
        let same = slice.metadata.labels == from.metadata.labels
            && slice.metadata.owner_references == from.metadata.owner_references
            && slice.endpoints.as_deref().unwrap_or_default()
                == from.endpoints.as_deref().unwrap_or_default()
            && slice.ports.as_deref().unwrap_or_default() == from.ports.as_deref().unwrap_or_default();
        (!same).then_some(SliceChange::Update(slice))
    }

    fn slice(&self, draft: &Draft<'_>, from: Option<&EndpointSlice>) -> EndpointSlice {
        let meta = &self.service.metadata;
        let service_name = meta.name.clone().unwrap_or_default();
        let mut metadata = match from {
            Some(from) => from.metadata.clone(),
            None => ObjectMeta {
                generate_name: Some(format!("{service_name}-")),
                namespace: meta.namespace.clone(),
                ..ObjectMeta::default()
            },
        };
        metadata.managed_fields = None;
        metadata.labels = Some(self.labels(&service_name));
        metadata.owner_references = Some(vec![OwnerReference {
            api_version: "v1".into(),
            kind: "Service".into(),
            name: service_name,
            uid: meta.uid.clone().unwrap_or_default(),
            controller: Some(true),
            block_owner_deletion: Some(true),
        }]);
        let created = meta.creation_timestamp.as_ref().map(|t| t.0);
        let time = match (draft.times.iter().min(), from) {
            (Some(time), _) => Some(*time),
            (None, None) => created,
            (None, Some(_)) => None,
        };
        let mut annotations = metadata.annotations.take().unwrap_or_default();
        match time {
            Some(time) => annotations.insert(TRIGGER_TIME.into(), time.to_string()),
            None => annotations.remove(TRIGGER_TIME),
        };
        metadata.annotations = (!annotations.is_empty()).then_some(annotations);
        EndpointSlice {
            address_type: self.family.to_owned(),
            endpoints: (!draft.endpoints.is_empty()).then(|| draft.endpoints.clone()),
            metadata,
            ports: (!draft.ports.is_empty()).then(|| draft.ports.clone()),
        }
    }

    /// The Service's labels and what the API prescribes.
    fn labels(&self, service_name: &str) -> BTreeMap<String, String> {
        let mut labels = self.service.metadata.labels.clone().unwrap_or_default();
        labels.remove(HEADLESS);
        let spec = self.service.spec.as_ref();
        if spec.is_some_and(|s| s.cluster_ip.as_deref() == Some("None")) {
            labels.insert(HEADLESS.into(), String::new());
        }
        labels.insert(SERVICE_NAME.into(), service_name.to_owned());
        labels.insert(MANAGED_BY.into(), CONTROLLER.into());
        labels
    }
}

/// Puts the endpoints that share a list of ports into slices.
fn place<'a>(
    ports: &[EndpointPort],
    mut group: Vec<Candidate>,
    slices: &[&'a EndpointSlice],
    drafts: &mut Vec<Draft<'a>>,
    spare: &mut Vec<&'a EndpointSlice>,
) {
    let mut kept: Vec<Draft<'a>> = Vec::new();
    for slice in slices {
        let mut draft = Draft {
            from: Some(slice),
            ports: ports.to_vec(),
            endpoints: Vec::new(),
            changed: false,
            times: Vec::new(),
        };
        for old in slice.endpoints.iter().flatten() {
            match group.iter().position(|c| identity(&c.endpoint) == identity(old)) {
                Some(i) => {
                    let candidate = group.remove(i);
                    if candidate.endpoint != *old {
                        draft.changed = true;
                        draft.times.extend(candidate.since);
                    }
                    draft.endpoints.push(candidate.endpoint);
                }
                None => draft.changed = true,
            }
        }
        kept.push(draft);
    }
    for draft in kept.iter_mut().filter(|d| d.changed) {
        draft.fill(&mut group);
    }
    while !group.is_empty() {
        // Full slices are created; what is left over goes into the fullest slice that has room for all of it.
        let rest = group.len();
        let fits = kept
            .iter_mut()
            .filter(|d| rest < MAX_ENDPOINTS && d.room() >= rest)
            .min_by_key(|d| d.room());
        match fits {
            Some(draft) => draft.fill(&mut group),
            None => {
                let mut draft = Draft {
                    from: None,
                    ports: ports.to_vec(),
                    endpoints: Vec::new(),
                    changed: true,
                    times: Vec::new(),
                };
                draft.fill(&mut group);
                kept.push(draft);
            }
        }
    }
    for draft in kept {
        match draft.from {
            Some(slice) if draft.endpoints.is_empty() => spare.push(slice),
            _ => drafts.push(draft),
        }
    }
}
