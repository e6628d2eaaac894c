//! Services, reduced.

use std::sync::Arc;

use dataplane_common::abi::{Addr, BePort, frontend_kind, service_flag};
use ipnet::IpNet;
use k8s_openapi::api::core::v1 as core;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta;

use super::{
    ANNOTATION_ALGORITHM, ANNOTATION_FAILURE_DETECTION, LABEL_PROXY_NAME, Parsed, Problems, check_labels,
    family_index, has_label, object_name, port,
};
use crate::key::{BackendKey, Family, Protocol};
use crate::names::Names;
use crate::settings::{Settings, algorithm_by_name, algorithm_name};
use crate::sloppy::{parse_cidr, parse_ip};

/// Idle time of client affinity that the API gives when none is asked for, and the longest it takes, in seconds.
const AFFINITY_DEFAULT: u32 = 10_800;
const AFFINITY_MAX: u32 = 86_400;

/// A port of a Service.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct ServicePort {
    /// Empty when it has none.
    pub(crate) name: Arc<str>,
    /// TCP, UDP or SCTP.
    pub(crate) protocol: Protocol,
    /// Where it is offered.
    pub(crate) port: BePort,
    /// 0 if it has none.
    pub(crate) node_port: BePort,
}

/// What few Services have.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(crate) struct External {
    /// External and load-balancer addresses, with the kind of frontend.
    pub(crate) addresses: Box<[(Addr, u8)]>,
    /// By family: has an external or a VIP-mode load-balancer address, counted or not.
    pub(crate) accessible: [bool; 2],
    /// Who may enter by a load-balancer address, of both families, sorted, without duplicates.
    pub(crate) source_ranges: Box<[IpNet]>,
    /// `healthCheckNodePort`, where the type and policy let it count.
    pub(crate) health_check_port: Option<u16>,
    /// For host ports: by port, where it is offered and to whom it leads. No Service has any.
    pub(crate) hosts: Box<[Host]>,
}

/// Where a host port is offered and to whom it leads.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Host {
    /// `None`: all addresses of the node.
    pub(crate) ip: Option<Addr>,
    /// The pod.
    pub(crate) backend: BackendKey,
}

/// A Service. `None` of a family means that the Service is not offered in it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct ServiceObject {
    /// Creation in microseconds of the Unix epoch; the oldest Service keeps a frontend that several claim.
    pub(crate) created: i64,
    /// ClusterIP by family (IPv4, IPv6).
    pub(crate) cluster_ip: [Option<Addr>; 2],
    /// [`service_flag::INTERNAL_LOCAL`], [`service_flag::EXTERNAL_LOCAL`] (where the type lets it count) and
    /// [`service_flag::NO_FAILURE_DETECTION`].
    pub(crate) flags: u32,
    /// See [`dataplane_common::abi::algorithm`].
    pub(crate) algorithm: u32,
    /// Idle time of client affinity in seconds; 0 is none.
    pub(crate) affinity_seconds: u32,
    /// Valid ports.
    pub(crate) ports: Box<[ServicePort]>,
    /// What few Services have.
    pub(crate) external: Option<Box<External>>,
}

impl ServiceObject {
    /// Reduces a Service.
    ///
    /// # Errors
    ///
    /// If it has no name or namespace.
    pub(crate) fn parse(service: &core::Service, settings: Settings, names: &mut Names) -> Parsed<Self> {
        let name = object_name("Service", &service.metadata, names)?;
        let mut problems = Problems::new("Service", &name);
        let object = Self::parse_spec(service, settings, names, &mut problems);
        let list = problems.finish();
        Ok((name, object, list))
    }

    fn parse_spec(
        service: &core::Service,
        settings: Settings,
        names: &mut Names,
        problems: &mut Problems<'_>,
    ) -> Option<Self> {
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

        // spec kube-proxy 1.1: the policy counts for these types only, or for a ClusterIP with external IPs
        let external_policy_counts = matches!(kind, "LoadBalancer" | "NodePort")
            || spec.external_ips.as_ref().is_some_and(|ips| !ips.is_empty());
        let external_local =
            external_policy_counts && spec.external_traffic_policy.as_deref() == Some("Local");
        let internal_local = spec.internal_traffic_policy.as_deref() == Some("Local");
        let flag = |on: bool, bit: u32| if on { bit } else { 0 };
        Some(Self {
            created: service
                .metadata
                .creation_timestamp
                .as_ref()
                .map_or(i64::MAX, |t| t.0.as_microsecond()),
            cluster_ip,
            flags: flag(internal_local, service_flag::INTERNAL_LOCAL)
                | flag(external_local, service_flag::EXTERNAL_LOCAL)
                | flag(
                    !failure_detection(&service.metadata, settings, problems),
                    service_flag::NO_FAILURE_DETECTION,
                ),
            algorithm: chosen_algorithm(&service.metadata, settings, problems),
            affinity_seconds: affinity(spec, problems),
            ports: service_ports(spec, names, problems),
            external: external(
                service,
                spec,
                settings,
                kind == "LoadBalancer" && external_local,
                problems,
            ),
        })
    }

    /// The source ranges that count for a family: nobody means everybody (spec kube-proxy 2.4).
    pub(crate) fn source_ranges(&self, family: Family) -> Box<[IpNet]> {
        let Some(external) = &self.external else {
            return Box::default();
        };
        let of_family = |net: &&IpNet| matches!(net, IpNet::V4(_)) == (family == Family::V4);
        let ranges: Box<[IpNet]> = external.source_ranges.iter().filter(of_family).copied().collect();
        if ranges.iter().any(|net| net.prefix_len() == 0) {
            return Box::default();
        }
        ranges
    }

    /// What a port is if it is a host port.
    pub(crate) fn host(&self, port: usize) -> Option<&Host> {
        self.external.as_ref()?.hosts.get(port)
    }

    /// True if a port is offered in a family.
    pub(crate) fn offers(&self, port: usize, family: Family) -> bool {
        match self.host(port) {
            Some(host) => Family::of(host.backend.addr) == family,
            None => self.cluster_ip[family_index(family)].is_some(),
        }
    }
}

/// Ranges sorted and without duplicates.
pub(crate) fn range_list(ranges: impl IntoIterator<Item = IpNet>) -> Box<[IpNet]> {
    let mut list: Vec<IpNet> = ranges.into_iter().collect();
    list.sort_unstable();
    list.dedup();
    list.into()
}

fn external(
    service: &core::Service,
    spec: &core::ServiceSpec,
    settings: Settings,
    health_checked: bool,
    problems: &mut Problems<'_>,
) -> Option<Box<External>> {
    let mut out = External::default();
    let external_ips = spec.external_ips.iter().flatten().map(|ip| {
        (
            ip.as_str(),
            "external IP",
            frontend_kind::EXTERNAL_IP,
            settings.external_ips,
        )
    });
    let ingress = service
        .status
        .as_ref()
        .and_then(|s| s.load_balancer.as_ref()?.ingress.as_ref());
    let balancer_ips = ingress
        .into_iter()
        .flatten()
        .filter(|i| i.ip_mode.as_deref().is_none_or(|mode| mode == "VIP"))
        .filter_map(|i| {
            Some((
                i.ip.as_deref()?,
                "load-balancer IP",
                frontend_kind::LOAD_BALANCER,
                true,
            ))
        });
    let mut addresses = Vec::new();
    for (text, what, kind, counts) in external_ips
        .chain(balancer_ips)
        .filter(|(text, ..)| !text.is_empty())
    {
        match parse_ip(text) {
            Some(ip) if ip.is_unspecified() || ip.is_multicast() || ip.is_loopback() => {
                problems.add(format!("{what} {text} cannot be offered"));
            }
            Some(ip) => {
                let addr = Addr::from(ip);
                out.accessible[family_index(Family::of(addr))] = true;
                if counts {
                    addresses.push((addr, kind));
                }
            }
            None => problems.add(format!("{what} {text:?} is not an IP address")),
        }
    }
    addresses.sort_unstable();
    addresses.dedup();
    out.addresses = addresses.into();

    let texts = spec.load_balancer_source_ranges.iter().flatten();
    let texts = texts.filter(|text| !text.trim().is_empty());
    out.source_ranges = range_list(texts.filter_map(|text| {
        let range = parse_cidr(text);
        if range.is_none() {
            problems.add(format!("load-balancer source range {text:?} is not a CIDR"));
        }
        range
    }));
    if health_checked {
        out.health_check_port = spec.health_check_node_port.and_then(port);
    }
    (out != External::default()).then(|| Box::new(out))
}

fn cluster_ips(spec: &core::ServiceSpec, first: &str, problems: &mut Problems<'_>) -> [Option<Addr>; 2] {
    let mut out = [None; 2];
    let families = spec.ip_families.as_deref().unwrap_or_default();
    let ips = spec.cluster_ips.as_deref().unwrap_or_default();
    let by_family = !families.is_empty() && !ips.is_empty();
    let texts = ips.iter().take(families.len()).map(String::as_str);
    let texts = texts.chain((!by_family).then_some(first));
    for (i, text) in texts.enumerate() {
        let Some(ip) = parse_ip(text) else {
            problems.add(format!("cluster IP {text:?} is not an IP address"));
            continue;
        };
        let family = Family::of(ip.into());
        match families.get(i) {
            Some(named) if *named != family.name() => {
                problems.add(format!("cluster IP {text} is not of its family {named}"));
            }
            // and who offers a loopback address would take the host's own services
            _ if ip.is_unspecified() || ip.is_multicast() || ip.is_loopback() => {
                problems.add(format!("cluster IP {text} cannot be offered"));
            }
            // of several the first counts, as in kube-proxy
            _ => {
                out[family_index(family)].get_or_insert(ip.into());
            }
        }
    }
    out
}

fn service_ports(
    spec: &core::ServiceSpec,
    names: &mut Names,
    problems: &mut Problems<'_>,
) -> Box<[ServicePort]> {
    let entries = spec.ports.as_deref().unwrap_or_default();
    let mut out: Vec<ServicePort> = Vec::with_capacity(entries.len());
    for entry in entries {
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
            name: names.get(name),
            protocol,
            port: BePort::from_host(number),
            node_port: BePort::from_host(node_port.and_then(port).unwrap_or(0)),
        });
    }
    // claims name ports by a 16-bit number; no API server lets a Service have as many
    out.truncate(usize::from(u16::MAX));
    out.into()
}

fn affinity(spec: &core::ServiceSpec, problems: &mut Problems<'_>) -> u32 {
    match spec.session_affinity.as_deref() {
        None | Some("None" | "") => return 0,
        Some("ClientIP") => {}
        Some(other) => {
            problems.add(format!("unknown session affinity {other:?}: there is none"));
            return 0;
        }
    }
    let config = spec.session_affinity_config.as_ref();
    let Some(asked) = config.and_then(|c| c.client_ip.as_ref()?.timeout_seconds) else {
        return AFFINITY_DEFAULT;
    };
    match u32::try_from(asked) {
        Ok(seconds @ 1..=AFFINITY_MAX) => seconds,
        _ => {
            problems.add(format!(
                "session affinity for {asked} s is not possible (1 to {AFFINITY_MAX}): {AFFINITY_DEFAULT} s are used"
            ));
            AFFINITY_DEFAULT
        }
    }
}

fn annotation<'a>(meta: &'a ObjectMeta, name: &str) -> Option<&'a str> {
    meta.annotations.as_ref()?.get(name).map(String::as_str)
}

fn chosen_algorithm(meta: &ObjectMeta, settings: Settings, problems: &mut Problems<'_>) -> u32 {
    let Some(text) = annotation(meta, ANNOTATION_ALGORITHM) else {
        return settings.algorithm;
    };
    algorithm_by_name(text).unwrap_or_else(|| {
        let default = algorithm_name(settings.algorithm);
        problems.add(format!(
            "annotation {ANNOTATION_ALGORITHM}: {text:?} is not supported, {default} is used"
        ));
        settings.algorithm
    })
}

fn failure_detection(meta: &ObjectMeta, settings: Settings, problems: &mut Problems<'_>) -> bool {
    match annotation(meta, ANNOTATION_FAILURE_DETECTION) {
        None => settings.failure_detection,
        Some("on") => true,
        Some("off") => false,
        Some(other) => {
            let default = if settings.failure_detection { "on" } else { "off" };
            problems.add(format!(
                "annotation {ANNOTATION_FAILURE_DETECTION}: {other:?} is neither on nor off, {default} is used"
            ));
            settings.failure_detection
        }
    }
}
