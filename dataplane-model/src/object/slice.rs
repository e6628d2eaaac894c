//! Endpoint slices, reduced.

use std::sync::Arc;

use dataplane_common::abi::{Addr, BePort};
use hashbrown::HashSet;
use k8s_openapi::api::discovery::v1 as discovery;

use super::{
    LABEL_HEADLESS, LABEL_SERVICE_NAME, Parsed, Problems, check_labels, has_label, object_name, port,
};
use crate::key::{Family, Protocol};
use crate::names::Names;
use crate::sloppy::parse_ip;

/// Endpoints of one slice that the API's validation allows (kubernetes pkg/apis/discovery/validation).
const MAX_ENDPOINTS: usize = 1000;
/// Up to here looking at all is cheaper than a table.
const FEW: usize = 16;

/// What an API server would not hand out, but can be used: too many endpoints, and the same one twice.
fn check_crowd(endpoints: &[Endpoint], problems: &mut Problems<'_>) {
    if endpoints.len() > MAX_ENDPOINTS {
        let count = endpoints.len();
        problems.add(format!(
            "has {count} endpoints, more than {MAX_ENDPOINTS}: all are used"
        ));
    }
    let different = if endpoints.len() <= FEW {
        let first = |(i, e): &(usize, &Endpoint)| endpoints[..*i].iter().all(|other| other.addr != e.addr);
        endpoints.iter().enumerate().filter(first).count()
    } else {
        endpoints.iter().map(|e| e.addr).collect::<HashSet<Addr>>().len()
    };
    if different < endpoints.len() {
        let twice = endpoints.len() - different;
        problems.add(format!(
            "lists {twice} endpoint addresses more than once: each is used once"
        ));
    }
}

/// A port of an endpoint slice.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct SlicePort {
    /// Joined to the Service's port by name and protocol.
    pub(crate) name: Arc<str>,
    /// TCP, UDP or SCTP.
    pub(crate) protocol: Protocol,
    /// Where the endpoints listen.
    pub(crate) port: BePort,
}

/// What is true of an endpoint.
pub(crate) mod endpoint_flag {
    /// Condition `ready`.
    pub(crate) const READY: u8 = 1 << 0;
    /// Condition `serving`.
    pub(crate) const SERVING: u8 = 1 << 1;
    /// Condition `terminating`.
    pub(crate) const TERMINATING: u8 = 1 << 2;
    /// On this node.
    pub(crate) const LOCAL: u8 = 1 << 3;
    /// Has hints for nodes.
    pub(crate) const NODE_HINTS: u8 = 1 << 4;
    /// One of them names this node.
    pub(crate) const NODE_HINT_HERE: u8 = 1 << 5;
}

/// An endpoint of a slice: there are more of these than of anything else.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Endpoint {
    /// `addresses[0]`.
    pub(crate) addr: Addr,
    /// See [`endpoint_flag`].
    pub(crate) flags: u8,
    /// Its hints for zones: 0 none, else one more than the place in [`SliceObject::zones`].
    pub(crate) zones: u16,
}

impl Endpoint {
    /// True if all of these are.
    pub(crate) const fn is(&self, flags: u8) -> bool {
        self.flags & flags == flags
    }
}

/// An endpoint slice.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct SliceObject {
    /// Family of its addresses.
    pub(crate) family: Family,
    /// Valid ports.
    pub(crate) ports: Box<[SlicePort]>,
    /// Valid endpoints.
    pub(crate) endpoints: Box<[Endpoint]>,
    /// The different lists of zones in the endpoints' hints; rarely any. By name, because this node's zone may change.
    pub(crate) zones: Box<[Box<[Box<str>]>]>,
}

impl SliceObject {
    /// Reduces an endpoint slice, as node `node_name` sees it; with the name of the Service that it belongs to.
    ///
    /// # Errors
    ///
    /// If it has no name or namespace.
    pub(crate) fn parse<'a>(
        slice: &'a discovery::EndpointSlice,
        node_name: &str,
        names: &mut Names,
    ) -> Parsed<(&'a str, Self)> {
        let name = object_name("EndpointSlice", &slice.metadata, names)?;
        let mut problems = Problems::new("EndpointSlice", &name);
        let object = Self::parse_slice(slice, node_name, names, &mut problems);
        let list = problems.finish();
        Ok((name, object, list))
    }

    fn parse_slice<'a>(
        slice: &'a discovery::EndpointSlice,
        node_name: &str,
        names: &mut Names,
        problems: &mut Problems<'_>,
    ) -> Option<(&'a str, Self)> {
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
        let entries = slice.ports.as_deref().unwrap_or_default();
        let mut ports = Vec::with_capacity(entries.len());
        for entry in entries {
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
                name: names.get(port_name),
                protocol,
                port: BePort::from_host(number),
            });
        }
        let listed = slice.endpoints.as_deref().unwrap_or_default();
        let mut endpoints = Vec::with_capacity(listed.len());
        let mut zones = Vec::new();
        for entry in listed {
            endpoints.extend(endpoint(entry, family, node_name, &mut zones, problems));
        }
        check_crowd(&endpoints, problems);
        let object = Self {
            family,
            ports: ports.into(),
            endpoints: endpoints.into(),
            zones: zones.into(),
        };
        Some((service, object))
    }
}

fn endpoint(
    endpoint: &discovery::Endpoint,
    family: Family,
    node_name: &str,
    zones: &mut Vec<Box<[Box<str>]>>,
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
    let flag = |on: bool, bit: u8| if on { bit } else { 0 };
    let condition = |of: fn(&discovery::EndpointConditions) -> Option<bool>, absent: bool| {
        conditions.and_then(of).unwrap_or(absent)
    };
    let local = !node_name.is_empty() && endpoint.node_name.as_deref() == Some(node_name);
    Some(Endpoint {
        addr,
        flags: flag(condition(|c| c.ready, true), endpoint_flag::READY)
            | flag(condition(|c| c.serving, true), endpoint_flag::SERVING)
            | flag(condition(|c| c.terminating, false), endpoint_flag::TERMINATING)
            | flag(local, endpoint_flag::LOCAL)
            | flag(!node_hints.is_empty(), endpoint_flag::NODE_HINTS)
            | flag(
                node_hints.iter().any(|n| n.name == node_name),
                endpoint_flag::NODE_HINT_HERE,
            ),
        zones: zone_list(zone_hints, zones),
    })
}

/// The number of a list of zones among those of the slice, see [`Endpoint::zones`]; slices have a few different ones.
fn zone_list(hints: &[discovery::ForZone], zones: &mut Vec<Box<[Box<str>]>>) -> u16 {
    if hints.is_empty() {
        return 0;
    }
    let same = |list: &[Box<str>]| {
        list.iter()
            .map(|z| &**z)
            .eq(hints.iter().map(|z| z.name.as_str()))
    };
    let place = zones.iter().position(|list| same(list)).unwrap_or_else(|| {
        zones.push(hints.iter().map(|z| z.name.as_str().into()).collect());
        zones.len() - 1
    });
    // more different lists than endpoints are allowed in a slice: as if there were no hint
    u16::try_from(place + 1).unwrap_or(0)
}
