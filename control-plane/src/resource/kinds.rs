//! Rules of Namespace, Node, EndpointSlice and Event.

use std::net::IpAddr;

use ipnet::IpNet;
use serde_json::{Value, json};

use super::{copy, meta, names};
use crate::error::Cause;

/// The finalizer that keeps a namespace until it is empty.
const NAMESPACE_FINALIZER: &str = "kubernetes";
const NAME_LABEL: &str = "kubernetes.io/metadata.name";

/// A new namespace is active, and its name is a label so that selectors can name it.
pub(super) fn create_namespace(object: &mut Value) {
    if object["spec"]["finalizers"].as_array().is_none_or(Vec::is_empty) {
        object["spec"] = json!({"finalizers": [NAMESPACE_FINALIZER]});
    }
    object["status"] = json!({"phase": "Active"});
    label_namespace(object);
}

/// The name label is always right.
pub(super) fn label_namespace(object: &mut Value) {
    let name = meta::name(object).to_owned();
    object["metadata"]["labels"][NAME_LABEL] = name.into();
}

const NOT_READY: &str = "node.kubernetes.io/not-ready";

/// A new node is not ready until its agent says so (admission plugin TaintNodesByCondition). Unlike elsewhere a status
/// is accepted: kubelet registers with one.
pub(super) fn create_node(node: &mut Value) {
    if !node["spec"].is_object() {
        node["spec"] = json!({});
    }
    sync_pod_cidrs(node);
    let taints = node["spec"]
        .as_object_mut()
        .map(|s| s.entry("taints").or_insert_with(|| json!([])));
    if let Some(list) = taints.and_then(Value::as_array_mut)
        && !list
            .iter()
            .any(|t| t["key"] == NOT_READY && t["effect"] == "NoSchedule")
    {
        list.push(json!({"key": NOT_READY, "effect": "NoSchedule"}));
    }
    node_status_defaults(node);
}

/// A node always has a specification.
pub(super) fn node_defaults(node: &mut Value) {
    sync_pod_cidrs(node);
    if node["spec"].is_null() {
        node["spec"] = json!({});
    }
}

/// The status of a node after a change.
pub(super) fn node_status(_: &Value, node: &mut Value) -> Vec<Cause> {
    node_status_defaults(node);
    Vec::new()
}

/// Finalizers of a namespace's specification change through `finalize` only.
pub(super) fn keep_namespace(old: &Value, new: &mut Value) {
    copy(old, new, "spec");
    label_namespace(new);
}

/// Fields of a node's status that are always there.
pub(super) fn node_status_defaults(node: &mut Value) {
    if !node["status"].is_object() {
        node["status"] = json!({});
    }
    if node["status"]["daemonEndpoints"]["kubeletEndpoint"].is_null() {
        node["status"]["daemonEndpoints"] = json!({"kubeletEndpoint": {"Port": 0}});
    }
    for field in [
        "machineID",
        "systemUUID",
        "bootID",
        "kernelVersion",
        "osImage",
        "containerRuntimeVersion",
        "kubeletVersion",
        "kubeProxyVersion",
        "operatingSystem",
        "architecture",
    ] {
        if node["status"]["nodeInfo"][field].is_null() {
            node["status"]["nodeInfo"][field] = "".into();
        }
    }
}

/// `podCIDR` and `podCIDRs[0]` are the same value.
pub(super) fn sync_pod_cidrs(node: &mut Value) {
    if !node["spec"].is_object() {
        return;
    }
    let first = node["spec"]["podCIDRs"].get(0).cloned();
    let one = node["spec"].get("podCIDR").cloned();
    match (one, first) {
        (Some(one), None) => node["spec"]["podCIDRs"] = json!([one]),
        (None, Some(first)) => node["spec"]["podCIDR"] = first,
        _ => {}
    }
}

/// What is wrong with a node.
pub(super) fn validate_node(node: &Value) -> Vec<Cause> {
    let mut causes = Vec::new();
    let cidrs: Vec<&Value> = node["spec"]["podCIDRs"]
        .as_array()
        .into_iter()
        .flatten()
        .collect();
    let mut families = Vec::new();
    for (i, cidr) in cidrs.iter().enumerate() {
        match cidr.as_str().unwrap_or_default().parse::<IpNet>() {
            Ok(net) => families.push(matches!(net, IpNet::V6(_))),
            Err(_) => causes.push(Cause::invalid(
                format!("spec.podCIDRs[{i}]"),
                cidr,
                names::BAD_CIDR,
            )),
        }
    }
    if cidrs.len() > 2 || (families.len() == 2 && families.first() == families.last()) {
        causes.push(Cause::invalid(
            "spec.podCIDRs",
            &node["spec"]["podCIDRs"],
            "may specify no more than one CIDR for each IP family",
        ));
    }
    let mut seen = Vec::new();
    for (i, taint) in node["spec"]["taints"]
        .as_array()
        .into_iter()
        .flatten()
        .enumerate()
    {
        let key = taint["key"].as_str().unwrap_or_default();
        let field = format!("metadata.taints[{i}]");
        for why in names::qualified_name(key) {
            causes.push(Cause::invalid(format!("{field}.key"), &key.into(), &why));
        }
        let effect = taint["effect"].as_str().unwrap_or_default();
        let effects = ["NoSchedule", "PreferNoSchedule", "NoExecute"];
        if effect.is_empty() {
            causes.push(Cause::required(format!("{field}.effect"), ""));
        } else if !effects.contains(&effect) {
            causes.push(Cause::not_supported(
                format!("{field}.effect"),
                &effect.into(),
                &effects,
            ));
        }
        if seen.contains(&(key, effect)) {
            causes.push(Cause::duplicate(field, taint));
        }
        seen.push((key, effect));
    }
    causes
}

/// A node keeps its pod ranges once it has them.
pub(super) fn validate_node_update(old: &Value, new: &Value) -> Vec<Cause> {
    let mut causes = Vec::new();
    let before = &old["spec"]["podCIDRs"];
    if before.as_array().is_some_and(|l| !l.is_empty()) && before != &new["spec"]["podCIDRs"] {
        causes.push(Cause::forbidden(
            "spec.podCIDRs",
            "node updates may not change podCIDR except from \"\" to valid",
        ));
    }
    let id = old["spec"]["providerID"].as_str().unwrap_or_default();
    if !id.is_empty() && old["spec"]["providerID"] != new["spec"]["providerID"] {
        causes.push(Cause::forbidden(
            "spec.providerID",
            "node updates may not change providerID except from \"\" to valid",
        ));
    }
    causes
}

const MAX_ENDPOINTS: usize = 1000;
const MAX_ADDRESSES: usize = 100;
const MAX_PORTS: usize = 100;

/// Completes an EndpointSlice: both lists are always there, as null when empty.
pub(super) fn slice_defaults(slice: &mut Value) {
    for port in slice
        .get_mut("ports")
        .and_then(Value::as_array_mut)
        .into_iter()
        .flatten()
    {
        if let Some(map) = port.as_object_mut() {
            map.entry("name").or_insert_with(|| "".into());
            map.entry("protocol").or_insert_with(|| "TCP".into());
        }
    }
    for endpoint in slice
        .get_mut("endpoints")
        .and_then(Value::as_array_mut)
        .into_iter()
        .flatten()
    {
        if let Some(map) = endpoint.as_object_mut() {
            map.entry("conditions").or_insert_with(|| json!({}));
        }
    }
    if let Some(map) = slice.as_object_mut() {
        map.entry("endpoints").or_insert(Value::Null);
        map.entry("ports").or_insert(Value::Null);
    }
}

/// What is wrong with an EndpointSlice.
pub(super) fn validate_slice(slice: &Value) -> Vec<Cause> {
    let mut causes = Vec::new();
    let kind = slice["addressType"].as_str().unwrap_or_default();
    let kinds = ["FQDN", "IPv4", "IPv6"];
    if kind.is_empty() {
        causes.push(Cause::required("addressType", ""));
    } else if !kinds.contains(&kind) {
        causes.push(Cause::not_supported("addressType", &kind.into(), &kinds));
    }
    let endpoints = slice["endpoints"].as_array().map_or(&[][..], Vec::as_slice);
    if endpoints.len() > MAX_ENDPOINTS {
        causes.push(Cause::too_many("endpoints", endpoints.len(), MAX_ENDPOINTS));
        return causes;
    }
    for (i, endpoint) in endpoints.iter().enumerate() {
        let field = format!("endpoints[{i}]");
        let addresses = endpoint["addresses"].as_array().map_or(&[][..], Vec::as_slice);
        if addresses.is_empty() {
            causes.push(Cause::required(
                format!("{field}.addresses"),
                "must contain at least 1 address",
            ));
        } else if addresses.len() > MAX_ADDRESSES {
            causes.push(Cause::too_many(
                format!("{field}.addresses"),
                addresses.len(),
                MAX_ADDRESSES,
            ));
            continue;
        }
        for (j, address) in addresses.iter().enumerate() {
            for why in endpoint_address(kind, address.as_str().unwrap_or_default()) {
                causes.push(Cause::invalid(format!("{field}.addresses[{j}]"), address, &why));
            }
        }
        if let Some(node) = endpoint["nodeName"].as_str() {
            for why in names::dns1123_subdomain(node) {
                causes.push(Cause::invalid(format!("{field}.nodeName"), &node.into(), &why));
            }
        }
        if let Some(host) = endpoint["hostname"].as_str() {
            for why in names::dns1123_label(host) {
                causes.push(Cause::invalid(format!("{field}.hostname"), &host.into(), &why));
            }
        }
    }
    slice_ports(slice, &mut causes);
    causes
}

fn slice_ports(slice: &Value, causes: &mut Vec<Cause>) {
    let ports = slice["ports"].as_array().map_or(&[][..], Vec::as_slice);
    if ports.len() > MAX_PORTS {
        causes.push(Cause::too_many("ports", ports.len(), MAX_PORTS));
        return;
    }
    let mut seen = std::collections::HashSet::new();
    for (i, port) in ports.iter().enumerate() {
        let name = port["name"].as_str().unwrap_or_default();
        if !name.is_empty() {
            for why in names::dns1123_label(name) {
                causes.push(Cause::invalid(format!("ports[{i}].name"), &name.into(), &why));
            }
        }
        if !seen.insert(name) {
            causes.push(Cause::duplicate(format!("ports[{i}].name"), &name.into()));
        }
        let protocol = port["protocol"].as_str().unwrap_or_default();
        let protocols = ["TCP", "UDP", "SCTP"];
        if !protocols.contains(&protocol) {
            causes.push(Cause::not_supported(
                format!("ports[{i}].protocol"),
                &protocol.into(),
                &protocols,
            ));
        }
        if let Some(protocol) = port["appProtocol"].as_str() {
            for why in names::qualified_name(protocol) {
                causes.push(Cause::invalid(
                    format!("ports[{i}].appProtocol"),
                    &protocol.into(),
                    &why,
                ));
            }
        }
    }
}

fn endpoint_address(kind: &str, text: &str) -> Vec<String> {
    if kind == "FQDN" {
        let name = text.strip_suffix('.').unwrap_or(text);
        return names::dns1123_subdomain(name);
    }
    let Some(address) = names::parse_ip(text) else {
        return vec![names::BAD_IP.to_owned()];
    };
    let mut errors = Vec::new();
    match (kind, address) {
        ("IPv4", IpAddr::V6(_)) => errors.push("must be an IPv4 address".to_owned()),
        ("IPv6", IpAddr::V4(_)) => errors.push("must be an IPv6 address".to_owned()),
        _ => errors.extend(names::special_ip(address).map(str::to_owned)),
    }
    errors
}

/// The address type never changes.
pub(super) fn validate_slice_update(old: &Value, new: &Value) -> Vec<Cause> {
    if old["addressType"] == new["addressType"] {
        return Vec::new();
    }
    vec![Cause::invalid(
        "addressType",
        &new["addressType"],
        "field is immutable",
    )]
}

/// Fields of an Event that are always there.
pub(super) fn event_defaults(event: &mut Value) {
    let Some(map) = event.as_object_mut() else { return };
    for field in ["eventTime", "firstTimestamp", "lastTimestamp"] {
        map.entry(field).or_insert(Value::Null);
    }
    map.entry("source").or_insert_with(|| json!({}));
    map.entry("reportingComponent").or_insert_with(|| "".into());
    map.entry("reportingInstance").or_insert_with(|| "".into());
}

/// What is wrong with an Event.
pub(super) fn validate_event(event: &Value) -> Vec<Cause> {
    let namespace = event["metadata"]["namespace"].as_str().unwrap_or_default();
    let involved = event["involvedObject"]["namespace"].as_str().unwrap_or_default();
    // Events about objects without a namespace live in `default`, or where the sender put them.
    if !involved.is_empty() && involved != namespace {
        return vec![Cause::invalid(
            "involvedObject.namespace",
            &involved.into(),
            "does not match event.namespace",
        )];
    }
    Vec::new()
}
