//! From Pods to endpoints: which Pods count, their addresses, ports and conditions.

use std::collections::BTreeMap;
use std::net::IpAddr;

use k8s_openapi::api::core::v1::{Node, ObjectReference, Pod, Service, ServicePort};
use k8s_openapi::api::discovery::v1::{
    Endpoint, EndpointConditions, EndpointHints, EndpointPort, ForNode, ForZone,
};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use k8s_openapi::jiff::Timestamp;

const ZONE: &str = "topology.kubernetes.io/zone";

/// An endpoint, the ports under which it is offered, and when it became what it is.
#[derive(Debug, Clone)]
pub(super) struct Candidate {
    pub(super) endpoint: Endpoint,
    pub(super) ports: Vec<EndpointPort>,
    pub(super) since: Option<Timestamp>,
}

/// The endpoints of a Service in one address family, by name of the Pod.
pub(super) fn candidates(
    service: &Service,
    pods: &[&Pod],
    nodes: &BTreeMap<String, Node>,
    ipv6: bool,
) -> Vec<Candidate> {
    let mut found: Vec<Candidate> = pods
        .iter()
        .filter(|pod| selects(service, pod))
        .filter_map(|pod| candidate(service, pod, nodes, ipv6))
        .collect();
    let name = |c: &Candidate| c.endpoint.target_ref.as_ref().and_then(|t| t.name.clone());
    found.sort_by_cached_key(name);
    found
}

/// Whether the Service's selector is there and matches the Pod's labels.
pub(super) fn selects(service: &Service, pod: &Pod) -> bool {
    let Some(selector) = service.spec.as_ref().and_then(|s| s.selector.as_ref()) else {
        return false;
    };
    !selector.is_empty()
        && selector
            .iter()
            .all(|(k, v)| pod.metadata.labels.as_ref().is_some_and(|l| l.get(k) == Some(v)))
}

fn candidate(service: &Service, pod: &Pod, nodes: &BTreeMap<String, Node>, ipv6: bool) -> Option<Candidate> {
    let spec = service.spec.as_ref()?;
    let status = pod.status.as_ref()?;
    if matches!(status.phase.as_deref(), Some("Succeeded" | "Failed")) {
        return None;
    }
    let address = address(pod, ipv6)?;
    let ready_condition = status.conditions.iter().flatten().find(|c| c.type_ == "Ready");
    let serving = ready_condition.is_some_and(|c| c.status == "True");
    let terminating = pod.metadata.deletion_timestamp.is_some();
    let publish_all = spec.publish_not_ready_addresses == Some(true);
    let ready = publish_all || (serving && !terminating);
    let node_name = pod.spec.as_ref().and_then(|s| s.node_name.clone());
    let node = node_name.as_ref().and_then(|n| nodes.get(n));
    // The zone is not known yet. The node's arrival brings the Pod back.
    if node_name.is_some() && node.is_none() && !publish_all {
        return None;
    }
    let zone = node.and_then(|n| n.metadata.labels.as_ref()?.get(ZONE)).cloned();
    let hints = if ready {
        hints(
            spec.traffic_distribution.as_deref(),
            zone.as_deref(),
            node_name.as_deref(),
        )
    } else {
        None
    };
    let endpoint = Endpoint {
        addresses: vec![address],
        conditions: Some(EndpointConditions {
            ready: Some(ready),
            serving: Some(serving),
            terminating: Some(terminating),
        }),
        hints,
        hostname: hostname(service, pod),
        node_name,
        target_ref: Some(ObjectReference {
            kind: Some("Pod".into()),
            namespace: pod.metadata.namespace.clone(),
            name: pod.metadata.name.clone(),
            uid: pod.metadata.uid.clone(),
            ..ObjectReference::default()
        }),
        zone,
        ..Endpoint::default()
    };
    Some(Candidate {
        endpoint,
        ports: ports(spec.ports.as_deref().unwrap_or_default(), pod),
        since: ready_condition
            .and_then(|c| c.last_transition_time.as_ref())
            .map(|t| t.0),
    })
}

fn address(pod: &Pod, ipv6: bool) -> Option<String> {
    let status = pod.status.as_ref()?;
    status
        .pod_ips
        .iter()
        .flatten()
        .map(|entry| &entry.ip)
        .chain(&status.pod_ip)
        .find(|ip| ip.parse::<IpAddr>().is_ok_and(|ip| ip.is_ipv6() == ipv6))
        .cloned()
}

/// A Pod has a name of its own in DNS if it asks for one in the domain of this Service.
fn hostname(service: &Service, pod: &Pod) -> Option<String> {
    let spec = pod.spec.as_ref()?;
    let same = spec.subdomain.is_some()
        && spec.subdomain == service.metadata.name
        && pod.metadata.namespace == service.metadata.namespace;
    spec.hostname.clone().filter(|_| same)
}

/// Keeps traffic in its zone or on its node when the Service asks for it (KEP-4444, KEP-3015).
fn hints(distribution: Option<&str>, zone: Option<&str>, node: Option<&str>) -> Option<EndpointHints> {
    let for_zones = || {
        zone.map(|name| {
            vec![ForZone {
                name: name.to_owned(),
            }]
        })
    };
    match distribution? {
        "PreferClose" | "PreferSameZone" => for_zones().map(|for_zones| EndpointHints {
            for_zones: Some(for_zones),
            ..EndpointHints::default()
        }),
        "PreferSameNode" => node.map(|name| EndpointHints {
            for_nodes: Some(vec![ForNode {
                name: name.to_owned(),
            }]),
            for_zones: for_zones(),
        }),
        _ => None,
    }
}

/// The Service's ports as this Pod has them. A named port that the Pod lacks is left out.
fn ports(service_ports: &[ServicePort], pod: &Pod) -> Vec<EndpointPort> {
    service_ports
        .iter()
        .filter_map(|port| {
            let protocol = port.protocol.as_deref().unwrap_or("TCP");
            let number = match &port.target_port {
                None => port.port,
                Some(IntOrString::Int(number)) => *number,
                Some(IntOrString::String(name)) => named_port(pod, name, protocol)?,
            };
            Some(EndpointPort {
                name: Some(port.name.clone().unwrap_or_default()),
                port: Some(number),
                protocol: Some(protocol.to_owned()),
                app_protocol: port.app_protocol.clone(),
            })
        })
        .collect()
}

fn named_port(pod: &Pod, name: &str, protocol: &str) -> Option<i32> {
    let spec = pod.spec.as_ref()?;
    let sidecars = spec
        .init_containers
        .iter()
        .flatten()
        .filter(|c| c.restart_policy.as_deref() == Some("Always"));
    spec.containers
        .iter()
        .chain(sidecars)
        .flat_map(|c| c.ports.iter().flatten())
        .find(|p| p.name.as_deref() == Some(name) && p.protocol.as_deref().unwrap_or("TCP") == protocol)
        .map(|p| p.container_port)
}
