//! Endpoints from slices, and slices from Endpoints. No I/O.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{EndpointAddress, EndpointPort, EndpointSubset, Endpoints, Service};
use k8s_openapi::api::discovery::v1::{self as discovery, Endpoint, EndpointConditions, EndpointSlice};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference};

use super::super::endpointslice::{CONTROLLER, HEADLESS, MANAGED_BY};
use super::SERVICE_NAME;

/// Who keeps mirrored slices.
pub(super) const MIRROR: &str = "endpointslicemirroring-controller.k8s.io";
const SKIP: &str = "endpointslice.kubernetes.io/skip-mirror";
const LEADER: &str = "control-plane.alpha.kubernetes.io/leader";
/// Label of Endpoints that are kept here.
const KEPT_BY: &str = "endpoints.kubernetes.io/managed-by";
const KEEPER: &str = "endpoint-controller";
const OVER_CAPACITY: &str = "endpoints.kubernetes.io/over-capacity";
/// Addresses that one Endpoints object, and one slice, holds at most.
const MAX: usize = 1000;

/// One thing to do.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Action {
    CreateEndpoints(Box<Endpoints>),
    ReplaceEndpoints(Box<Endpoints>),
    DeleteEndpoints(String),
    CreateSlice(Box<EndpointSlice>),
    ReplaceSlice(Box<EndpointSlice>),
    DeleteSlice(String),
}

fn label<'a>(meta: &'a ObjectMeta, name: &str) -> Option<&'a str> {
    meta.labels.as_ref()?.get(name).map(String::as_str)
}

fn name(meta: &ObjectMeta) -> String {
    meta.name.clone().unwrap_or_default()
}

/// What to do for a Service.
pub(super) fn plan(
    service: Option<&Service>,
    endpoints: Option<&Endpoints>,
    slices: &[&EndpointSlice],
) -> Vec<Action> {
    let kept = endpoints.is_some_and(|endpoints| label(&endpoints.metadata, KEPT_BY) == Some(KEEPER));
    let selects = service
        .and_then(|service| service.spec.as_ref())
        .is_some_and(|spec| {
            spec.type_.as_deref() != Some("ExternalName")
                && spec.selector.as_ref().is_some_and(|s| !s.is_empty())
        });
    match service {
        Some(service) if selects => {
            let mut actions = from_slices(service, endpoints, slices);
            actions.extend(mirrored(slices).map(|slice| Action::DeleteSlice(name(&slice.metadata))));
            actions
        }
        // Without its Service it is nobody's any more.
        _ if kept => endpoints
            .map(|endpoints| Action::DeleteEndpoints(name(&endpoints.metadata)))
            .into_iter()
            .collect(),
        Some(_) => from_endpoints(endpoints, slices),
        None => from_endpoints(None, slices),
    }
}

fn mirrored<'a>(slices: &'a [&'a EndpointSlice]) -> impl Iterator<Item = &'a EndpointSlice> {
    slices
        .iter()
        .copied()
        .filter(|slice| label(&slice.metadata, MANAGED_BY) == Some(MIRROR))
}

fn from_slices(service: &Service, before: Option<&Endpoints>, slices: &[&EndpointSlice]) -> Vec<Action> {
    let spec = service.spec.as_ref();
    let family = spec
        .and_then(|spec| spec.ip_families.as_ref()?.first().map(String::as_str))
        .unwrap_or("IPv4");
    let mut subsets: Vec<EndpointSubset> = Vec::new();
    let mut count = 0;
    let mut over = false;
    let mut own: Vec<&&EndpointSlice> = slices
        .iter()
        .filter(|slice| {
            label(&slice.metadata, MANAGED_BY) == Some(CONTROLLER) && slice.address_type == family
        })
        .collect();
    own.sort_by_key(|slice| slice.metadata.name.clone());
    for slice in own {
        let mut ports: Vec<EndpointPort> = slice.ports.iter().flatten().map(core_port).collect();
        ports.sort_by(|a, b| (&a.name, a.port).cmp(&(&b.name, b.port)));
        for endpoint in slice.endpoints.iter().flatten() {
            let conditions = endpoint.conditions.clone().unwrap_or_default();
            let ready = conditions.ready != Some(false);
            let Some(ip) = endpoint.addresses.first() else {
                continue;
            };
            if !ready && conditions.terminating == Some(true) {
                continue;
            }
            if count == MAX {
                over = true;
                continue;
            }
            count += 1;
            let at = subsets
                .iter()
                .position(|subset| subset.ports.as_deref().unwrap_or_default() == ports)
                .unwrap_or_else(|| {
                    subsets.push(EndpointSubset {
                        ports: (!ports.is_empty()).then(|| ports.clone()),
                        ..EndpointSubset::default()
                    });
                    subsets.len() - 1
                });
            let address = EndpointAddress {
                ip: ip.clone(),
                hostname: endpoint.hostname.clone(),
                node_name: endpoint.node_name.clone(),
                target_ref: endpoint.target_ref.clone(),
            };
            if let Some(subset) = subsets.get_mut(at) {
                let list = if ready {
                    &mut subset.addresses
                } else {
                    &mut subset.not_ready_addresses
                };
                list.get_or_insert_default().push(address);
            }
        }
    }
    for subset in &mut subsets {
        for list in [&mut subset.addresses, &mut subset.not_ready_addresses]
            .into_iter()
            .flatten()
        {
            list.sort_by(|a, b| a.ip.cmp(&b.ip));
        }
    }
    let mut labels: BTreeMap<String, String> = service.metadata.labels.clone().unwrap_or_default();
    labels.insert(KEPT_BY.into(), KEEPER.into());
    if spec.and_then(|spec| spec.cluster_ip.as_deref()) == Some("None") {
        labels.insert(HEADLESS.into(), String::new());
    }
    let mut meta = before
        .map(|endpoints| endpoints.metadata.clone())
        .unwrap_or_else(|| ObjectMeta {
            name: service.metadata.name.clone(),
            namespace: service.metadata.namespace.clone(),
            ..ObjectMeta::default()
        });
    meta.labels = Some(labels);
    let annotations = meta.annotations.get_or_insert_default();
    annotations.remove(OVER_CAPACITY);
    if over {
        annotations.insert(OVER_CAPACITY.into(), "truncated".into());
    }
    if annotations.is_empty() {
        meta.annotations = None;
    }
    let after = Endpoints {
        metadata: meta,
        subsets: (!subsets.is_empty()).then_some(subsets),
    };
    match before {
        Some(before) if *before == after => Vec::new(),
        Some(_) => vec![Action::ReplaceEndpoints(Box::new(after))],
        None => vec![Action::CreateEndpoints(Box::new(after))],
    }
}

fn core_port(port: &discovery::EndpointPort) -> EndpointPort {
    EndpointPort {
        app_protocol: port.app_protocol.clone(),
        name: port.name.clone().filter(|name| !name.is_empty()),
        port: port.port.unwrap_or_default(),
        protocol: port.protocol.clone(),
    }
}

fn from_endpoints(endpoints: Option<&Endpoints>, slices: &[&EndpointSlice]) -> Vec<Action> {
    let mut desired = endpoints
        .filter(|endpoints| {
            let annotations = endpoints.metadata.annotations.as_ref();
            label(&endpoints.metadata, SKIP) != Some("true")
                && annotations.is_none_or(|annotations| !annotations.contains_key(LEADER))
        })
        .map(slices_of)
        .unwrap_or_default();
    let mut actions = Vec::new();
    // What is as it should be stays; then what is there is used again.
    let mut left: Vec<&EndpointSlice> = Vec::new();
    for slice in mirrored(slices) {
        let same = |wanted: &EndpointSlice| {
            wanted.address_type == slice.address_type
                && wanted.ports == slice.ports
                && wanted.endpoints == slice.endpoints
                && wanted.metadata.labels == slice.metadata.labels
        };
        match desired.iter().position(same) {
            Some(at) => drop(desired.remove(at)),
            None => left.push(slice),
        }
    }
    for slice in left {
        match desired
            .iter()
            .position(|wanted| wanted.address_type == slice.address_type)
        {
            Some(at) => {
                let mut wanted = desired.remove(at);
                let labels = wanted.metadata.labels.take();
                wanted.metadata = slice.metadata.clone();
                wanted.metadata.labels = labels;
                actions.push(Action::ReplaceSlice(Box::new(wanted)));
            }
            None => actions.push(Action::DeleteSlice(name(&slice.metadata))),
        }
    }
    actions.extend(
        desired
            .into_iter()
            .map(|slice| Action::CreateSlice(Box::new(slice))),
    );
    actions
}

fn slices_of(endpoints: &Endpoints) -> Vec<EndpointSlice> {
    let service = name(&endpoints.metadata);
    let mut labels = endpoints.metadata.labels.clone().unwrap_or_default();
    labels.insert(SERVICE_NAME.into(), service.clone());
    labels.insert(MANAGED_BY.into(), MIRROR.into());
    let owner = OwnerReference {
        api_version: "v1".into(),
        kind: "Endpoints".into(),
        name: service.clone(),
        uid: endpoints.metadata.uid.clone().unwrap_or_default(),
        controller: Some(true),
        block_owner_deletion: Some(true),
    };
    let mut slices = Vec::new();
    for subset in endpoints.subsets.iter().flatten() {
        let ports: Vec<discovery::EndpointPort> = subset
            .ports
            .iter()
            .flatten()
            .map(|port| discovery::EndpointPort {
                app_protocol: port.app_protocol.clone(),
                name: Some(port.name.clone().unwrap_or_default()),
                port: Some(port.port),
                protocol: Some(port.protocol.clone().unwrap_or_else(|| "TCP".into())),
            })
            .collect();
        for (family, is_family) in [
            ("IPv4", (|ip: &str| !ip.contains(':')) as fn(&str) -> bool),
            ("IPv6", |ip: &str| ip.contains(':')),
        ] {
            let list = |addresses: &Option<Vec<EndpointAddress>>, ready: bool| -> Vec<Endpoint> {
                addresses
                    .iter()
                    .flatten()
                    .filter(|address| is_family(&address.ip))
                    .map(|address| Endpoint {
                        addresses: vec![address.ip.clone()],
                        conditions: Some(EndpointConditions {
                            ready: Some(ready),
                            ..EndpointConditions::default()
                        }),
                        hostname: address.hostname.clone(),
                        node_name: address.node_name.clone(),
                        target_ref: address.target_ref.clone(),
                        ..Endpoint::default()
                    })
                    .collect()
            };
            let mut all = list(&subset.addresses, true);
            all.extend(list(&subset.not_ready_addresses, false));
            for part in all.chunks(MAX) {
                slices.push(EndpointSlice {
                    metadata: ObjectMeta {
                        generate_name: Some(format!("{service}-")),
                        namespace: endpoints.metadata.namespace.clone(),
                        labels: Some(labels.clone()),
                        owner_references: Some(vec![owner.clone()]),
                        ..ObjectMeta::default()
                    },
                    address_type: family.to_owned(),
                    endpoints: Some(part.to_vec()),
                    ports: (!ports.is_empty()).then(|| ports.clone()),
                });
            }
        }
    }
    slices
}
