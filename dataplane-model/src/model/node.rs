//! This node: its zone, its addresses, its host ports; and the cluster's ranges of service addresses.

use std::collections::BTreeMap;
use std::net::IpAddr;

use dataplane_common::abi::{Addr, BePort};
use ipnet::IpNet;
use k8s_openapi::api::core::v1::Node;
use k8s_openapi::api::networking::v1::ServiceCIDR;

use super::{Model, entries::Entry};
use crate::event::HostPort;
use crate::key::{BackendKey, Family, ObjectName};
use crate::object::{External, Host, LABEL_ZONE, Problem, ServiceObject, ServicePort, family_index};
use crate::sloppy::{parse_cidr, parse_ip};

/// An address as a range of its own.
pub(super) fn to_net(addr: Addr) -> IpNet {
    addr.to_ip().into()
}

impl Model {
    pub(super) fn apply_node(&mut self, node: &Node, problems: &mut Vec<Problem>) {
        if node.metadata.name.as_deref() != Some(&self.node_name) {
            return;
        }
        let labels = node.metadata.labels.as_ref();
        let zone = labels.and_then(|labels| labels.get(LABEL_ZONE));
        self.set_zone(zone.filter(|z| !z.is_empty()).cloned());

        // as kube-proxy: of each family the first internal address, else the first external one
        let mut ips = [None; 2];
        let addresses = node.status.as_ref().and_then(|status| status.addresses.as_ref());
        for kind in ["InternalIP", "ExternalIP"] {
            for address in addresses.into_iter().flatten().filter(|a| a.type_ == kind) {
                match parse_ip(&address.address) {
                    Some(ip) => {
                        ips[family_index(Family::of(ip.into()))].get_or_insert(Addr::from(ip));
                    }
                    None => problems.push(Problem {
                        object: format!("Node {}", self.node_name),
                        message: format!("address {:?} is not an IP address", address.address),
                    }),
                }
            }
        }
        self.set_node_ips(ips);
    }

    pub(super) fn forget_node(&mut self) {
        self.set_zone(None);
        self.set_node_ips([None; 2]);
    }

    fn set_node_ips(&mut self, ips: [Option<Addr>; 2]) {
        if self.node_ips != ips {
            self.node_ips = ips;
            let ranged = |entry: &Entry| {
                let external = entry.service.as_ref().and_then(|s| s.external.as_ref());
                external.is_some_and(|e| !e.source_ranges.is_empty())
            };
            self.mark_all(ranged);
        }
    }

    fn set_zone(&mut self, zone: Option<String>) {
        if self.zone != zone {
            self.zone = zone;
            self.mark_all(|entry| entry.slices.iter().any(|(_, slice)| !slice.zones.is_empty()));
        }
    }

    fn mark_all(&mut self, which: impl Fn(&Entry) -> bool) {
        let found = self.entries.iter().filter(|(_, entry)| which(entry));
        for id in found.map(|(id, _)| id).collect::<Vec<_>>() {
            self.entries.mark(id);
        }
    }

    pub(super) fn apply_service_cidr(&mut self, object: &ServiceCIDR, problems: &mut Vec<Problem>) {
        let Some(name) = object.metadata.name.as_deref().filter(|name| !name.is_empty()) else {
            problems.push(Problem {
                object: "ServiceCIDR".into(),
                message: "has no name".into(),
            });
            return;
        };
        let texts = object.spec.as_ref().and_then(|spec| spec.cidrs.as_ref());
        let mut ranges = Vec::new();
        for text in texts.into_iter().flatten() {
            match parse_cidr(text) {
                Some(range) => ranges.push(range),
                None => problems.push(Problem {
                    object: format!("ServiceCIDR {name}").escape_debug().to_string(),
                    message: format!("{text:?} is not a CIDR"),
                }),
            }
        }
        self.service_cidrs.insert(name.into(), ranges);
    }

    /// Host ports are the services of their pod. The namespace's prefix, with a character that no namespace has, keeps them
    /// apart from Services.
    pub(super) fn set_host_ports(&mut self, list: &[HostPort], problems: &mut Vec<Problem>) {
        let mut pods: BTreeMap<ObjectName, (Vec<ServicePort>, Vec<Host>)> = BTreeMap::new();
        for item in list {
            let host_ip = item.host_ip.filter(|ip| !ip.is_unspecified());
            let backend = BackendKey {
                addr: item.backend.ip().into(),
                port: BePort::from_host(item.backend.port()),
                protocol: item.protocol,
            };
            let family = Family::of(backend.addr);
            let problem = if item.port == 0 || item.backend.port() == 0 {
                Some("has port 0".into())
            } else {
                let other = host_ip.filter(|ip| Family::of((*ip).into()) != family);
                other.map(|ip| format!("at {ip} leads to {}, of another family", item.backend))
            };
            let pod = ObjectName::new(&format!("hostPort:{}", item.namespace), &item.pod);
            if let Some(problem) = problem {
                problems.push(Problem {
                    object: format!("Pod {}/{}", item.namespace, item.pod),
                    message: format!("host port {}/{} {problem}", item.port, item.protocol),
                });
                continue;
            }
            let name = match host_ip {
                Some(ip) => format!("{ip}:{}", item.port),
                None => item.port.to_string(),
            };
            let (ports, hosts) = pods.entry(pod).or_default();
            let taken = ports
                .iter()
                .zip(&*hosts)
                .any(|(port, host): (&ServicePort, &Host)| {
                    *port.name == *name
                        && port.protocol == item.protocol
                        && Family::of(host.backend.addr) == family
                });
            if taken {
                problems.push(Problem {
                    object: format!("Pod {}/{}", item.namespace, item.pod),
                    message: format!("host port {name}/{} is there twice", item.protocol),
                });
                continue;
            }
            ports.push(ServicePort {
                name: self.names.get(&name),
                protocol: item.protocol,
                port: BePort::from_host(item.port),
                node_port: BePort::default(),
            });
            hosts.push(Host {
                ip: host_ip.map(|ip: IpAddr| ip.into()),
                backend,
            });
        }

        for name in std::mem::take(&mut self.host_ports) {
            if !pods.contains_key(&name) {
                self.set_service(&name, None, problems);
            }
        }
        for (name, (ports, hosts)) in pods {
            let object = ServiceObject {
                created: i64::MAX,
                cluster_ip: [None, None],
                flags: 0,
                algorithm: 0,
                affinity_seconds: 0,
                ports: ports.into(),
                external: Some(Box::new(External {
                    hosts: hosts.into(),
                    ..External::default()
                })),
            };
            self.set_service(&name, Some(object), problems);
            self.host_ports.insert(name);
        }
    }
}
