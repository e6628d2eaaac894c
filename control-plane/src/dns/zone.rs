//! What names there are: <https://github.com/kubernetes/dns/blob/master/docs/specification.md>, version 1.1.0.

use std::collections::{BTreeSet, HashMap};
use std::net::IpAddr;
use std::sync::Arc;

use hickory_proto::rr::rdata::{A, AAAA, NS, PTR, SOA, SRV, TXT};
use hickory_proto::rr::{Name, RData};
use k8s_openapi::api::core::v1::{Namespace, Node, Service, ServicePort};
use k8s_openapi::api::discovery::v1::{Endpoint, EndpointPort, EndpointSlice};
use kube::ResourceExt as _;
use kube::runtime::watcher::Event;

use crate::controllers::endpointslice::SERVICE_NAME;
use crate::controllers::objects::{Objects, Transition};

/// Seconds for which answers of the zone may be kept: CoreDNS's default.
pub(super) const TTL: u32 = 5;
/// Version of the specification.
const VERSION: &str = "1.1.0";

/// Namespace and name.
type Key = (String, String);

/// What a watch tells.
#[expect(clippy::large_enum_variant, reason = "one at a time, and moved once")]
pub(super) enum Change {
    Service(Event<Service>),
    Slice(Event<EndpointSlice>),
    Namespace(Event<Namespace>),
    Node(Event<Node>),
}

/// What is known of a name.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Answer {
    /// The name is there; these are its records, of any type.
    Records(Vec<RData>),
    /// Another name of something else.
    Alias(Name),
    /// The name would be in the zone and is not.
    Nothing,
    /// Others know.
    Foreign,
    /// Not everything was listed yet.
    NotYet,
}

/// The cluster's names.
pub(super) struct Zone {
    domain: Name,
    /// Where the cluster's DNS is.
    servers: Vec<IpAddr>,
    services: Objects<Service>,
    slices: Objects<EndpointSlice>,
    namespaces: Objects<Namespace>,
    nodes: Objects<Node>,
    /// Names of the slices of each Service.
    of_service: HashMap<Key, BTreeSet<String>>,
    /// Which Services have an address, or have it in a slice: once for each time.
    by_address: HashMap<IpAddr, Vec<Key>>,
    node_addresses: HashMap<IpAddr, usize>,
}

fn key<K: kube::Resource>(object: &K) -> Key {
    (object.namespace().unwrap_or_default(), object.name_any())
}

/// The Service of a slice.
fn owner(slice: &EndpointSlice) -> Option<Key> {
    let labels = slice.metadata.labels.as_ref()?;
    let name = labels.get(SERVICE_NAME)?;
    Some((slice.namespace().unwrap_or_default(), name.clone()))
}

fn addresses(texts: &[String]) -> impl Iterator<Item = IpAddr> {
    texts.iter().filter_map(|text| text.parse().ok())
}

/// None for headless Services.
fn cluster_ips(service: &Service) -> Vec<IpAddr> {
    let spec = service.spec.as_ref();
    let all = spec.and_then(|spec| spec.cluster_ips.as_deref());
    match all {
        Some(all) if !all.is_empty() => addresses(all).collect(),
        _ => spec
            .and_then(|spec| spec.cluster_ip.as_ref()?.parse().ok())
            .into_iter()
            .collect(),
    }
}

fn is_headless(service: &Service) -> bool {
    service.spec.as_ref().and_then(|spec| spec.cluster_ip.as_deref()) == Some("None")
}

fn address_record(address: IpAddr) -> RData {
    match address {
        IpAddr::V4(v4) => RData::A(A(v4)),
        IpAddr::V6(v6) => RData::AAAA(AAAA(v6)),
    }
}

/// The label of an endpoint below its Service: what its pod asked for, or its address.
fn label(endpoint: &Endpoint, address: IpAddr) -> String {
    match endpoint.hostname.as_deref() {
        Some(name) if !name.is_empty() => name.to_owned(),
        _ => address.to_string().replace(['.', ':'], "-"),
    }
}

fn dashed_address(label: &str) -> Option<IpAddr> {
    let v4 = label.replace('-', ".").parse().map(IpAddr::V4);
    let v6 = || label.replace('-', ":").parse().map(IpAddr::V6);
    v4.or_else(|_| v6()).ok()
}

fn port(number: i32) -> u16 {
    u16::try_from(number).unwrap_or_default()
}

impl Zone {
    /// An empty zone of that domain, served at those addresses.
    pub(super) fn new(domain: &Name, servers: Vec<IpAddr>) -> Self {
        let mut domain = domain.to_lowercase();
        domain.set_fqdn(true);
        Self {
            domain,
            servers,
            services: Objects::default(),
            slices: Objects::default(),
            namespaces: Objects::default(),
            nodes: Objects::default(),
            of_service: HashMap::new(),
            by_address: HashMap::new(),
            node_addresses: HashMap::new(),
        }
    }

    /// Takes in what a watch tells.
    pub(super) fn observe(&mut self, change: Change) {
        match change {
            Change::Service(event) => {
                for (before, after) in self.services.observe(event) {
                    for (service, is_there) in each((before, after)) {
                        for address in cluster_ips(&service) {
                            self.index(address, key(&*service), is_there);
                        }
                    }
                }
            }
            Change::Slice(event) => {
                for (before, after) in self.slices.observe(event) {
                    for (slice, is_there) in each((before, after)) {
                        self.index_slice(&slice, is_there);
                    }
                }
            }
            Change::Namespace(event) => drop(self.namespaces.observe(event)),
            Change::Node(event) => {
                for (before, after) in self.nodes.observe(event) {
                    for (node, is_there) in each((before, after)) {
                        self.index_node(&node, is_there);
                    }
                }
            }
        }
    }

    fn index(&mut self, address: IpAddr, key: Key, is_there: bool) {
        let keys = self.by_address.entry(address).or_default();
        if is_there {
            keys.push(key);
        } else if let Some(at) = keys.iter().position(|known| *known == key) {
            keys.swap_remove(at);
        }
        if keys.is_empty() {
            self.by_address.remove(&address);
        }
    }

    fn index_slice(&mut self, slice: &EndpointSlice, is_there: bool) {
        let Some(owner) = owner(slice) else {
            return;
        };
        for endpoint in slice.endpoints.iter().flatten() {
            for address in addresses(&endpoint.addresses) {
                self.index(address, owner.clone(), is_there);
            }
        }
        let names = self.of_service.entry(owner.clone()).or_default();
        if is_there {
            names.insert(slice.name_any());
        } else {
            names.remove(&slice.name_any());
        }
        if names.is_empty() {
            self.of_service.remove(&owner);
        }
    }

    fn index_node(&mut self, node: &Node, is_there: bool) {
        let listed = node
            .status
            .iter()
            .flat_map(|status| status.addresses.iter().flatten());
        for address in listed.filter_map(|listed| listed.address.parse::<IpAddr>().ok()) {
            let count = self.node_addresses.entry(address).or_default();
            *count = if is_there {
                *count + 1
            } else {
                count.saturating_sub(1)
            };
            if *count == 0 {
                self.node_addresses.remove(&address);
            }
        }
    }

    /// Whether a node has this address.
    pub(super) fn is_node(&self, address: IpAddr) -> bool {
        self.node_addresses.contains_key(&address)
    }

    /// Start of authority: goes with every negative answer of the zone.
    pub(super) fn authority(&self) -> (Name, SOA) {
        let below = |labels: &[&str]| self.name(labels);
        // The serial is fixed: there are no secondaries.
        let soa = SOA::new(
            below(&["ns", "dns"]),
            below(&["hostmaster"]),
            1,
            7200,
            1800,
            86400,
            TTL,
        );
        (self.domain.clone(), soa)
    }

    /// The name of these labels below the domain; the domain itself where they make none.
    fn name(&self, labels: &[&str]) -> Name {
        Name::from_labels(labels.iter().map(|label| label.as_bytes()))
            .and_then(|name| name.append_domain(&self.domain))
            .unwrap_or_else(|_| self.domain.clone())
    }

    fn is_complete(&self) -> bool {
        self.services.is_complete() && self.slices.is_complete() && self.namespaces.is_complete()
    }

    /// What is known of the name.
    pub(super) fn lookup(&self, name: &Name) -> Answer {
        if let Some(answer) = self.reverse(name) {
            return answer;
        }
        if !self.domain.zone_of(name) {
            return Answer::Foreign;
        }
        if !self.is_complete() {
            return Answer::NotYet;
        }
        let below = usize::from(name.num_labels().saturating_sub(self.domain.num_labels()));
        let labels: Option<Vec<String>> = name
            .iter()
            .take(below)
            .map(|label| Some(std::str::from_utf8(label).ok()?.to_ascii_lowercase()))
            .collect();
        let labels = labels.unwrap_or_default();
        if labels.len() != below {
            return Answer::Nothing;
        }
        let mut labels: Vec<&str> = labels.iter().map(String::as_str).collect();
        labels.reverse();
        let exists = |yes: bool| {
            if yes {
                Answer::Records(Vec::new())
            } else {
                Answer::Nothing
            }
        };
        match labels.as_slice() {
            [] => {
                let (_, soa) = self.authority();
                let server = soa.mname.clone();
                Answer::Records(vec![RData::SOA(soa), RData::NS(NS(server))])
            }
            ["dns-version"] => Answer::Records(vec![RData::TXT(TXT::new(vec![VERSION.to_owned()]))]),
            ["dns", "ns"] => Answer::Records(self.servers.iter().copied().map(address_record).collect()),
            ["svc" | "pod" | "dns"] => exists(true),
            ["svc" | "pod", namespace] => exists(self.has(namespace)),
            ["pod", namespace, pod] if self.has(namespace) => match dashed_address(pod) {
                Some(address) => Answer::Records(vec![address_record(address)]),
                None => Answer::Nothing,
            },
            ["svc", namespace, service, below @ ..] => match self.services.get(namespace, service) {
                Some(service) => self.below_service(service, below),
                None => Answer::Nothing,
            },
            _ => Answer::Nothing,
        }
    }

    fn has(&self, namespace: &str) -> bool {
        self.namespaces.get("", namespace).is_some()
    }

    /// What `below` names: nothing, `_protocol`, `_protocol._port` (the outer label first), or an endpoint.
    fn below_service(&self, service: &Service, below: &[&str]) -> Answer {
        let spec = service.spec.as_ref();
        if spec.and_then(|spec| spec.type_.as_deref()) == Some("ExternalName") {
            let target = spec.and_then(|spec| Name::from_ascii(spec.external_name.as_ref()?).ok());
            return match (target, below) {
                (Some(mut target), []) => {
                    target.set_fqdn(true);
                    Answer::Alias(target)
                }
                _ => Answer::Nothing,
            };
        }
        let ports = || spec.iter().flat_map(|spec| spec.ports.iter().flatten());
        let records = match below {
            [] if is_headless(service) => self.endpoints(service).map(|(_, ip, _)| ip).collect(),
            [] => cluster_ips(service),
            [protocol] if protocol.starts_with('_') => {
                return if ports().any(|port| speaks(port, protocol)) {
                    Answer::Records(Vec::new())
                } else {
                    Answer::Nothing
                };
            }
            [host] if is_headless(service) => self
                .endpoints(service)
                .filter(|(label, ..)| label == host)
                .map(|(_, ip, _)| ip)
                .collect(),
            [protocol, name] => return self.service_ports(service, protocol, name),
            _ => return Answer::Nothing,
        };
        if records.is_empty() && !below.is_empty() {
            return Answer::Nothing;
        }
        let mut seen = BTreeSet::new();
        let records = records.into_iter().filter(|ip| seen.insert(*ip));
        Answer::Records(records.map(address_record).collect())
    }

    /// SRV records of a named port.
    fn service_ports(&self, service: &Service, protocol: &str, name: &str) -> Answer {
        let Some(wanted) = name.strip_prefix('_').filter(|name| !name.is_empty()) else {
            return Answer::Nothing;
        };
        let ports = service.spec.iter().flat_map(|spec| spec.ports.iter().flatten());
        let Some(found) = ports
            .filter(|port| speaks(port, protocol))
            .find(|port| port.name.as_deref() == Some(wanted))
        else {
            return Answer::Nothing;
        };
        let (namespace, name) = key(service);
        let targets: BTreeSet<(String, u16)> = if is_headless(service) {
            let of_port = |ports: &[EndpointPort]| -> Option<u16> {
                let protocol = found.protocol.as_deref().unwrap_or("TCP");
                let matching = ports.iter().find(|port| {
                    port.name.as_deref() == Some(wanted)
                        && port.protocol.as_deref().unwrap_or("TCP") == protocol
                });
                matching?.port.map(port)
            };
            self.endpoints(service)
                .filter_map(|(label, _, ports)| Some((label, of_port(ports)?)))
                .collect()
        } else {
            [(String::new(), port(found.port))].into()
        };
        // Shares of a hundred, as CoreDNS gives.
        let weight = u16::try_from(100 / targets.len().max(1)).unwrap_or(0).max(1);
        let record = |(label, port): (String, u16)| {
            let mut labels = vec![label.as_str(), name.as_str(), namespace.as_str(), "svc"];
            labels.retain(|label| !label.is_empty());
            RData::SRV(SRV::new(0, weight, port, self.name(&labels)))
        };
        Answer::Records(targets.into_iter().map(record).collect())
    }

    /// Label, address and ports of each endpoint that is ready.
    fn endpoints<'a>(
        &'a self,
        service: &Service,
    ) -> impl Iterator<Item = (String, IpAddr, &'a [EndpointPort])> {
        let key = key(service);
        let names = self.of_service.get(&key).into_iter().flatten();
        names
            .filter_map(move |name| self.slices.get(&key.0, name))
            .flat_map(|slice| {
                let ports = slice.ports.as_deref().unwrap_or_default();
                slice
                    .endpoints
                    .iter()
                    .flatten()
                    .filter(|endpoint| is_ready(endpoint))
                    .flat_map(|endpoint| addresses(&endpoint.addresses).map(|ip| (label(endpoint, ip), ip)))
                    .map(move |(label, ip)| (label, ip, ports))
            })
    }

    /// The names of an address of the cluster; `None` for all other names.
    fn reverse(&self, name: &Name) -> Option<Answer> {
        let net = name.parse_arpa_name().ok()?;
        if net.prefix_len() != net.max_prefix_len() {
            return None;
        }
        let address = net.addr();
        let mut names = BTreeSet::new();
        for key in self.by_address.get(&address)? {
            let Some(service) = self.services.get(&key.0, &key.1) else {
                continue;
            };
            let below = [key.1.as_str(), key.0.as_str(), "svc"];
            if cluster_ips(service).contains(&address) {
                names.insert(self.name(&below));
            } else if is_headless(service) {
                let at = self.endpoints(service).filter(|(_, ip, _)| *ip == address);
                names.extend(at.map(|(label, ..)| self.name(&[&[label.as_str()], &below[..]].concat())));
            }
        }
        if names.is_empty() {
            return None;
        }
        Some(Answer::Records(
            names.into_iter().map(|name| RData::PTR(PTR(name))).collect(),
        ))
    }
}

/// `_tcp` and the like.
fn speaks(port: &ServicePort, label: &str) -> bool {
    let protocol = port.protocol.as_deref().unwrap_or("TCP");
    label
        .strip_prefix('_')
        .is_some_and(|label| label.eq_ignore_ascii_case(protocol))
}

/// What is not said counts as ready; so does every endpoint of a Service that publishes those that are not.
fn is_ready(endpoint: &Endpoint) -> bool {
    endpoint
        .conditions
        .as_ref()
        .and_then(|conditions| conditions.ready)
        .unwrap_or(true)
}

/// Both sides of a transition, what is gone first.
fn each<K>((before, after): Transition<K>) -> impl Iterator<Item = (Arc<K>, bool)> {
    let gone = before.map(|object| (object, false));
    gone.into_iter().chain(after.map(|object| (object, true)))
}
