//! Kubernetes objects reduced to what the dataplane needs, and what was wrong with them.

use std::collections::HashSet;
use std::fmt;
use std::sync::Arc;

use dataplane_common::abi::{Addr, BePort, algorithm};
use k8s_openapi::api::core::v1 as core;
use k8s_openapi::api::discovery::v1 as discovery;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;

use crate::key::{Family, ObjectName, Protocol};
use crate::sloppy::parse_ip;

/// Label on Services that another proxy handles, whatever its value (spec kube-proxy 1.1).
pub const LABEL_PROXY_NAME: &str = "service.kubernetes.io/service-proxy-name";
/// Label on endpoint slices of headless Services, whatever its value.
pub const LABEL_HEADLESS: &str = "service.kubernetes.io/headless";
/// Endpoints of one slice that the API's validation allows (kubernetes pkg/apis/discovery/validation).
const MAX_ENDPOINTS: usize = 1000;
/// Label that names the Service of an endpoint slice.
pub const LABEL_SERVICE_NAME: &str = "kubernetes.io/service-name";
/// Label on nodes.
pub const LABEL_ZONE: &str = "topology.kubernetes.io/zone";
/// Annotation on Services that chooses the load-balancing algorithm.
pub const ANNOTATION_ALGORITHM: &str = "beeline.dev/algorithm";

/// Something in an object that had to be left out. The rest of the object, and all others, are used.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Problem {
    /// `Service ns/name`, `EndpointSlice ns/name` or `Node name`.
    pub object: String,
    /// What is wrong, with the value.
    pub message: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.object, self.message)
    }
}

/// How many problems of one object are listed one by one: an object can have thousands of the same kind.
pub const MAX_PROBLEMS: usize = 16;
/// How many characters of a problem's message are kept: it quotes values, which can be of any length.
pub const MAX_MESSAGE: usize = 240;

/// Collects the problems of one object.
struct Problems<'a> {
    kind: &'static str,
    name: &'a ObjectName,
    list: Vec<Problem>,
    unlisted: usize,
}

impl<'a> Problems<'a> {
    const fn new(kind: &'static str, name: &'a ObjectName) -> Self {
        Self {
            kind,
            name,
            list: Vec::new(),
            unlisted: 0,
        }
    }

    fn add(&mut self, message: String) {
        if self.list.len() == MAX_PROBLEMS {
            self.unlisted += 1;
        } else {
            self.push(message);
        }
    }

    fn push(&mut self, mut message: String) {
        if let Some((end, _)) = message.char_indices().nth(MAX_MESSAGE) {
            message.truncate(end);
            message.push('…');
        }
        // the name is as good as the object: no line break of it may end up in a log
        let object = format!("{} {}", self.kind, self.name).escape_debug().to_string();
        self.list.push(Problem { object, message });
    }

    fn finish(mut self) -> Vec<Problem> {
        if self.unlisted > 0 {
            self.push(format!("and {} more problems", self.unlisted));
        }
        self.list
    }
}

/// Namespace and name; an object without a name cannot be told from others.
fn object_name(kind: &'static str, meta: &ObjectMeta) -> Result<ObjectName, Problem> {
    match (meta.namespace.as_deref(), meta.name.as_deref()) {
        (Some(namespace), Some(name)) if !namespace.is_empty() && !name.is_empty() => {
            Ok(ObjectName::new(namespace, name))
        }
        (namespace, name) => Err(Problem {
            object: format!(
                "{kind} {}/{}",
                namespace.unwrap_or_default(),
                name.unwrap_or_default()
            ),
            message: "has no name or no namespace".into(),
        }),
    }
}

/// Labels that no API server would take are noise, and a sign of a damaged object. (Not a full check of the syntax.)
fn check_labels(meta: &ObjectMeta, problems: &mut Problems<'_>) {
    let noise = |text: &str| !text.bytes().all(|b| b.is_ascii_graphic());
    for (key, value) in meta.labels.iter().flatten() {
        if noise(key) || noise(value) {
            problems.add(format!(
                "label {key:?} = {value:?} is not a valid label: it is ignored"
            ));
        }
    }
}

/// What an API server would not hand out, but can be used: too many endpoints, and the same one twice.
fn check_crowd(endpoints: &[Endpoint], problems: &mut Problems<'_>) {
    if endpoints.len() > MAX_ENDPOINTS {
        let count = endpoints.len();
        problems.add(format!(
            "has {count} endpoints, more than {MAX_ENDPOINTS}: all are used"
        ));
    }
    let different: HashSet<Addr> = endpoints.iter().map(|endpoint| endpoint.addr).collect();
    if different.len() < endpoints.len() {
        let twice = endpoints.len() - different.len();
        problems.add(format!(
            "lists {twice} endpoint addresses more than once: each is used once"
        ));
    }
}

fn has_label(meta: &ObjectMeta, label: &str) -> bool {
    meta.labels
        .as_ref()
        .is_some_and(|labels| labels.contains_key(label))
}

/// A port number; 0 and what does not fit are no ports.
fn port(number: i32) -> Option<u16> {
    u16::try_from(number).ok().filter(|&p| p != 0)
}

/// A port of a Service.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ServicePort {
    /// Empty when it has none.
    pub name: Arc<str>,
    /// TCP, UDP or SCTP.
    pub protocol: Protocol,
    /// Where it is offered.
    pub port: BePort,
    /// True if it has a node port.
    pub node_port: bool,
}

/// A Service. `None` of a family means that the Service is not offered in it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ServiceObject {
    /// Creation in microseconds of the Unix epoch; the oldest Service keeps a frontend that several claim.
    pub created: i64,
    /// ClusterIP by family (IPv4, IPv6).
    pub cluster_ip: [Option<Addr>; 2],
    /// By family: has an external or a VIP-mode load-balancer address.
    pub external: [bool; 2],
    /// `internalTrafficPolicy: Local`.
    pub internal_local: bool,
    /// `externalTrafficPolicy: Local`, where the type lets it count.
    pub external_local: bool,
    /// See [`algorithm`].
    pub algorithm: u32,
    /// Valid ports.
    pub ports: Box<[ServicePort]>,
}

/// Index of a family in the arrays of [`ServiceObject`].
#[must_use]
pub const fn family_index(family: Family) -> usize {
    match family {
        Family::V4 => 0,
        Family::V6 => 1,
    }
}

/// What became of a Service: its name, and its reduced form unless it is not ours (headless, ExternalName, another
/// proxy's, nothing usable in it).
pub type Parsed<T> = Result<(ObjectName, Option<T>, Vec<Problem>), Problem>;

impl ServiceObject {
    /// Reduces a Service.
    ///
    /// # Errors
    ///
    /// If it has no name or namespace.
    pub fn parse(service: &core::Service) -> Parsed<Self> {
        let name = object_name("Service", &service.metadata)?;
        let mut problems = Problems::new("Service", &name);
        let object = Self::parse_spec(service, &mut problems);
        let list = problems.finish();
        Ok((name, object, list))
    }

    fn parse_spec(service: &core::Service, problems: &mut Problems<'_>) -> Option<Self> {
        if has_label(&service.metadata, LABEL_PROXY_NAME) {
            return None;
        }
        let spec = service.spec.as_ref()?;
        let kind = spec.type_.as_deref().unwrap_or("ClusterIP");
        let first = spec.cluster_ip.as_deref().unwrap_or_default();
        if kind == "ExternalName" || first.is_empty() || first == "None" {
            return None;
        }
        check_labels(&service.metadata, problems);
        let cluster_ip = cluster_ips(spec, first, problems);
        if cluster_ip == [None, None] {
            return None;
        }

        let mut external = [false; 2];
        let external_ips = spec
            .external_ips
            .iter()
            .flatten()
            .map(|ip| (ip.as_str(), "external IP"));
        let ingress = service
            .status
            .as_ref()
            .and_then(|s| s.load_balancer.as_ref()?.ingress.as_ref());
        let balancer_ips = ingress
            .into_iter()
            .flatten()
            .filter(|i| i.ip_mode.as_deref().is_none_or(|mode| mode == "VIP"))
            .filter_map(|i| Some((i.ip.as_deref()?, "load-balancer IP")));
        for (text, what) in external_ips
            .chain(balancer_ips)
            .filter(|(text, _)| !text.is_empty())
        {
            match parse_ip(text) {
                Some(ip) => external[family_index(Family::of(ip.into()))] = true,
                None => problems.add(format!("{what} {text:?} is not an IP address")),
            }
        }
        // spec kube-proxy 1.1: the policy counts for these types only, or for a ClusterIP with external IPs
        let external_policy_counts = matches!(kind, "LoadBalancer" | "NodePort")
            || spec.external_ips.as_ref().is_some_and(|ips| !ips.is_empty());

        Some(Self {
            created: service
                .metadata
                .creation_timestamp
                .as_ref()
                .map_or(i64::MAX, |t| t.0.as_microsecond()),
            cluster_ip,
            external,
            internal_local: spec.internal_traffic_policy.as_deref() == Some("Local"),
            external_local: external_policy_counts
                && spec.external_traffic_policy.as_deref() == Some("Local"),
            algorithm: chosen_algorithm(&service.metadata, problems),
            ports: service_ports(spec, problems),
        })
    }
}

fn cluster_ips(spec: &core::ServiceSpec, first: &str, problems: &mut Problems<'_>) -> [Option<Addr>; 2] {
    let mut out = [None; 2];
    let families = spec.ip_families.as_deref().unwrap_or_default();
    let ips = spec.cluster_ips.as_deref().unwrap_or_default();
    let texts: Vec<&str> = if families.is_empty() || ips.is_empty() {
        vec![first]
    } else {
        ips.iter().take(families.len()).map(String::as_str).collect()
    };
    for (i, text) in texts.into_iter().enumerate() {
        let Some(ip) = parse_ip(text) else {
            problems.add(format!("cluster IP {text:?} is not an IP address"));
            continue;
        };
        let family = Family::of(ip.into());
        match families.get(i) {
            Some(named) if *named != family.to_string() => {
                problems.add(format!("cluster IP {text} is not of its family {named}"));
            }
            _ if ip.is_unspecified() || ip.is_multicast() => {
                problems.add(format!("cluster IP {text} cannot be connected to"));
            }
            // of several the first counts, as in kube-proxy
            _ => {
                out[family_index(family)].get_or_insert(ip.into());
            }
        }
    }
    out
}

fn service_ports(spec: &core::ServiceSpec, problems: &mut Problems<'_>) -> Box<[ServicePort]> {
    let mut out: Vec<ServicePort> = Vec::new();
    for entry in spec.ports.iter().flatten() {
        let name = entry.name.as_deref().unwrap_or_default();
        let Some(number) = port(entry.port) else {
            problems.add(format!(
                "port {name:?}: {} is not a port number (1 to 65535)",
                entry.port
            ));
            continue;
        };
        let Some(protocol) = Protocol::parse(entry.protocol.as_deref()) else {
            problems.add(format!(
                "port {name:?}: unknown protocol {:?}",
                entry.protocol.as_deref().unwrap_or_default()
            ));
            continue;
        };
        if out.iter().any(|p| *p.name == *name && p.protocol == protocol) {
            problems.add(format!("port {name:?}/{protocol} is there twice"));
            continue;
        }
        let node_port = entry.node_port.filter(|&p| p != 0);
        if let Some(bad) = node_port.filter(|&p| port(p).is_none()) {
            problems.add(format!(
                "port {name:?}: node port {bad} is not a port number (1 to 65535)"
            ));
        }
        out.push(ServicePort {
            name: name.into(),
            protocol,
            port: BePort::from_host(number),
            node_port: node_port.and_then(port).is_some(),
        });
    }
    out.into()
}

fn chosen_algorithm(meta: &ObjectMeta, problems: &mut Problems<'_>) -> u32 {
    let chosen = meta
        .annotations
        .as_ref()
        .and_then(|a| a.get(ANNOTATION_ALGORITHM));
    if let Some(text) = chosen.filter(|text| *text != "random") {
        problems.add(format!(
            "annotation {ANNOTATION_ALGORITHM}: {text:?} is not supported, random is used"
        ));
    }
    algorithm::RANDOM
}

/// A port of an endpoint slice.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct SlicePort {
    /// Joined to the Service's port by name and protocol.
    pub name: Arc<str>,
    /// TCP, UDP or SCTP.
    pub protocol: Protocol,
    /// Where the endpoints listen.
    pub port: BePort,
}

/// An endpoint of a slice.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Endpoint {
    /// `addresses[0]`.
    pub addr: Addr,
    /// Condition `ready`.
    pub ready: bool,
    /// Condition `serving`.
    pub serving: bool,
    /// Condition `terminating`.
    pub terminating: bool,
    /// On this node.
    pub local: bool,
    /// Has hints for nodes.
    pub node_hints: bool,
    /// One of them names this node.
    pub node_hint_here: bool,
    /// Hints for zones; rarely any. All of them, because this node's zone may change.
    pub zone_hints: Option<Box<[Box<str>]>>,
}

/// An endpoint slice.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct SliceObject {
    /// The Service that it belongs to.
    pub service: ObjectName,
    /// Family of its addresses.
    pub family: Family,
    /// Valid ports.
    pub ports: Box<[SlicePort]>,
    /// Valid endpoints.
    pub endpoints: Box<[Endpoint]>,
}

impl SliceObject {
    /// Reduces an endpoint slice, as node `node_name` sees it.
    ///
    /// # Errors
    ///
    /// If it has no name or namespace.
    pub fn parse(slice: &discovery::EndpointSlice, node_name: &str) -> Parsed<Self> {
        let name = object_name("EndpointSlice", &slice.metadata)?;
        let mut problems = Problems::new("EndpointSlice", &name);
        let object = Self::parse_slice(slice, node_name, &name, &mut problems);
        let list = problems.finish();
        Ok((name, object, list))
    }

    fn parse_slice(
        slice: &discovery::EndpointSlice,
        node_name: &str,
        name: &ObjectName,
        problems: &mut Problems<'_>,
    ) -> Option<Self> {
        if has_label(&slice.metadata, LABEL_HEADLESS) {
            return None;
        }
        let service = slice
            .metadata
            .labels
            .as_ref()
            .and_then(|l| l.get(LABEL_SERVICE_NAME))
            .map(String::as_str);
        check_labels(&slice.metadata, problems);
        let Some(service) = service.filter(|s| !s.is_empty()) else {
            problems.add(format!(
                "has no label {LABEL_SERVICE_NAME}, so it belongs to no Service"
            ));
            return None;
        };
        let family = match slice.address_type.as_str() {
            "IPv4" => Family::V4,
            "IPv6" => Family::V6,
            "FQDN" => return None,
            other => {
                problems.add(format!("unknown addressType {other:?}"));
                return None;
            }
        };
        let mut ports = Vec::new();
        for entry in slice.ports.iter().flatten() {
            let Some(port_name) = entry.name.as_deref() else {
                problems.add("a port has no name field".into());
                continue;
            };
            let Some(number) = entry.port.and_then(port) else {
                problems.add(match entry.port {
                    Some(bad) => format!("port {port_name:?}: {bad} is not a port number (1 to 65535)"),
                    None => format!("port {port_name:?} has no number: all ports is not supported"),
                });
                continue;
            };
            let Some(protocol) = Protocol::parse(entry.protocol.as_deref()) else {
                problems.add(format!(
                    "port {port_name:?}: unknown protocol {:?}",
                    entry.protocol.as_deref().unwrap_or_default()
                ));
                continue;
            };
            ports.push(SlicePort {
                name: port_name.into(),
                protocol,
                port: BePort::from_host(number),
            });
        }
        let endpoints: Box<[Endpoint]> = slice
            .endpoints
            .iter()
            .flatten()
            .filter_map(|e| endpoint(e, family, node_name, problems))
            .collect();
        check_crowd(&endpoints, problems);
        let service = ObjectName {
            namespace: Arc::clone(&name.namespace),
            name: service.into(),
        };
        Some(Self {
            service,
            family,
            ports: ports.into(),
            endpoints,
        })
    }
}

fn endpoint(
    endpoint: &discovery::Endpoint,
    family: Family,
    node_name: &str,
    problems: &mut Problems<'_>,
) -> Option<Endpoint> {
    let text = endpoint.addresses.first().filter(|text| !text.is_empty())?;
    let Some(ip) = parse_ip(text) else {
        problems.add(format!("endpoint address {text:?} is not an IP address"));
        return None;
    };
    let addr = Addr::from(ip);
    if Family::of(addr) != family {
        problems.add(format!(
            "endpoint address {text} is not of the slice's addressType {family}"
        ));
        return None;
    }
    if ip.is_unspecified() || ip.is_multicast() {
        problems.add(format!("endpoint address {text} cannot be connected to"));
        return None;
    }
    let conditions = endpoint.conditions.as_ref();
    let hints = endpoint.hints.as_ref();
    let node_hints = hints.and_then(|h| h.for_nodes.as_deref()).unwrap_or_default();
    let zone_hints = hints.and_then(|h| h.for_zones.as_deref()).unwrap_or_default();
    Some(Endpoint {
        addr,
        ready: conditions.and_then(|c| c.ready).unwrap_or(true),
        serving: conditions.and_then(|c| c.serving).unwrap_or(true),
        terminating: conditions.and_then(|c| c.terminating).unwrap_or(false),
        local: !node_name.is_empty() && endpoint.node_name.as_deref() == Some(node_name),
        node_hints: !node_hints.is_empty(),
        node_hint_here: node_hints.iter().any(|n| n.name == node_name),
        zone_hints: (!zone_hints.is_empty())
            .then(|| zone_hints.iter().map(|z| z.name.as_str().into()).collect()),
    })
}
