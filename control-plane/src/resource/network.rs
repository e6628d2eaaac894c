//! Rules of NetworkPolicy, ServiceCIDR, IPAddress and Endpoints.

use std::net::IpAddr;

use ipnet::IpNet;
use serde_json::{Value, json};

use super::rules::{child, default, list, list_mut};
use super::workloads::label_selector;
use super::{meta, names};
use crate::error::Cause;

/// Completes a NetworkPolicy: what it restricts follows from what it allows.
pub(super) fn policy_defaults(object: &mut Value) {
    let Some(spec) = child(object, "spec") else { return };
    default(spec, "podSelector", json!({}));
    for direction in ["ingress", "egress"] {
        for rule in list_mut(spec, direction) {
            for port in list_mut(rule, "ports") {
                default(port, "protocol", "TCP");
            }
        }
    }
    let egress = list(&spec["egress"]).next().is_some();
    default(
        spec,
        "policyTypes",
        if egress {
            json!(["Ingress", "Egress"])
        } else {
            json!(["Ingress"])
        },
    );
}

/// What is wrong with a NetworkPolicy.
pub(super) fn validate_policy(object: &Value) -> Vec<Cause> {
    let mut causes = Vec::new();
    let spec = &object["spec"];
    label_selector(&spec["podSelector"], "spec.podSelector", &mut causes);
    for (direction, peers) in [("ingress", "from"), ("egress", "to")] {
        for (i, rule) in list(&spec[direction]).enumerate() {
            let path = format!("spec.{direction}[{i}]");
            for (j, port) in list(&rule["ports"]).enumerate() {
                policy_port(port, &format!("{path}.ports[{j}]"), &mut causes);
            }
            for (j, peer) in list(&rule[peers]).enumerate() {
                policy_peer(peer, &format!("{path}.{peers}[{j}]"), &mut causes);
            }
        }
    }
    let types: Vec<&Value> = list(&spec["policyTypes"]).collect();
    if types.len() > 2 {
        causes.push(Cause::invalid(
            "spec.policyTypes",
            &spec["policyTypes"],
            "may not specify more than two policyTypes",
        ));
        return causes;
    }
    for (i, kind) in types.into_iter().enumerate() {
        if kind != "Ingress" && kind != "Egress" {
            causes.push(Cause::not_supported(
                format!("spec.policyTypes[{i}]"),
                kind,
                &["Egress", "Ingress"],
            ));
        }
    }
    causes
}

fn policy_port(port: &Value, path: &str, causes: &mut Vec<Cause>) {
    let protocols = ["SCTP", "TCP", "UDP"];
    if !protocols.iter().any(|p| port["protocol"] == *p) {
        causes.push(Cause::not_supported(
            format!("{path}.protocol"),
            &port["protocol"],
            &protocols,
        ));
    }
    match &port["port"] {
        Value::Null => {
            if !port["endPort"].is_null() {
                causes.push(Cause::required(
                    format!("{path}.port"),
                    "must be specified when `endPort` is specified",
                ));
            }
        }
        Value::String(name) => {
            for why in names::port_name(name) {
                causes.push(Cause::invalid(format!("{path}.port"), &port["port"], &why));
            }
            if !port["endPort"].is_null() {
                causes.push(Cause::invalid(
                    format!("{path}.endPort"),
                    &port["endPort"],
                    "may not be specified when `port` is non-numeric",
                ));
            }
        }
        number => {
            let first = number.as_i64().unwrap_or(0);
            for why in names::port_number(first) {
                causes.push(Cause::invalid(format!("{path}.port"), number, &why));
            }
            if let Some(last) = port["endPort"].as_i64() {
                if last < first {
                    causes.push(Cause::invalid(
                        format!("{path}.endPort"),
                        &last.into(),
                        "must be greater than or equal to `port`",
                    ));
                }
                for why in names::port_number(last) {
                    causes.push(Cause::invalid(format!("{path}.endPort"), &last.into(), &why));
                }
            }
        }
    }
}

fn policy_peer(peer: &Value, path: &str, causes: &mut Vec<Cause>) {
    let mut kinds = 0;
    for selector in ["podSelector", "namespaceSelector"] {
        if !peer[selector].is_null() {
            kinds = 1;
            label_selector(&peer[selector], &format!("{path}.{selector}"), causes);
        }
    }
    if !peer["ipBlock"].is_null() {
        if kinds > 0 {
            causes.push(Cause::forbidden(
                path,
                "may not specify both ipBlock and another peer",
            ));
        }
        kinds = 1;
        ip_block(&peer["ipBlock"], &format!("{path}.ipBlock"), causes);
    }
    if kinds == 0 {
        causes.push(Cause::required(path, "must specify a peer"));
    }
}

fn ip_block(block: &Value, path: &str, causes: &mut Vec<Cause>) {
    let text = block["cidr"].as_str().unwrap_or_default();
    if text.is_empty() {
        causes.push(Cause::required(format!("{path}.cidr"), ""));
        return;
    }
    let Ok(all) = text.parse::<IpNet>() else {
        causes.push(Cause::invalid(
            format!("{path}.cidr"),
            &block["cidr"],
            names::BAD_CIDR,
        ));
        return;
    };
    for (i, except) in list(&block["except"]).enumerate() {
        let path = format!("{path}.except[{i}]");
        match except.as_str().unwrap_or_default().parse::<IpNet>() {
            Err(_) => causes.push(Cause::invalid(path, except, names::BAD_CIDR)),
            Ok(part) if !all.contains(&part) || part.prefix_len() <= all.prefix_len() => {
                causes.push(Cause::invalid(path, except, "must be a strict subset of `cidr`"));
            }
            Ok(_) => {}
        }
    }
}

/// What is wrong with a ServiceCIDR.
pub(super) fn validate_service_cidr(object: &Value) -> Vec<Cause> {
    let mut causes = Vec::new();
    let cidrs: Vec<&Value> = list(&object["spec"]["cidrs"]).collect();
    if cidrs.is_empty() {
        causes.push(Cause::required("spec.cidrs", "at least one CIDR required"));
    }
    let mut families = Vec::new();
    for (i, cidr) in cidrs.iter().enumerate() {
        match cidr.as_str().unwrap_or_default().parse::<IpNet>() {
            Ok(net) if net.trunc() == net => families.push(matches!(net, IpNet::V6(_))),
            _ => causes.push(Cause::invalid(format!("spec.cidrs[{i}]"), cidr, names::BAD_CIDR)),
        }
    }
    if cidrs.len() > 2 || (families.len() == 2 && families.first() == families.last()) {
        causes.push(Cause::invalid(
            "spec.cidrs",
            &object["spec"]["cidrs"],
            "may only hold up to 2 values, one for each IP family",
        ));
    }
    causes
}

/// The ranges of a ServiceCIDR never change.
pub(super) fn validate_service_cidr_update(old: &Value, new: &Value) -> Vec<Cause> {
    if old["spec"]["cidrs"] == new["spec"]["cidrs"] {
        Vec::new()
    } else {
        vec![Cause::invalid(
            "spec.cidrs",
            &new["spec"]["cidrs"],
            "field is immutable",
        )]
    }
}

/// The name of an IPAddress is the address, in its canonical form.
pub(super) fn ip_name(name: &str) -> Vec<String> {
    match name.parse::<IpAddr>() {
        Ok(ip) if ip.to_string() == name => Vec::new(),
        Ok(_) => vec!["must be a canonical IP address".to_owned()],
        Err(_) => vec![names::BAD_IP.to_owned()],
    }
}

/// What is wrong with an IPAddress.
pub(super) fn validate_ip_address(object: &Value) -> Vec<Cause> {
    let mut causes = Vec::new();
    let name = meta::name(object);
    let family = if name.contains(':') { "IPv6" } else { "IPv4" };
    let label = "ipaddress.kubernetes.io/ip-family";
    let given = &object["metadata"]["labels"][label];
    if !given.is_null() && given != family {
        let why = "does not match the address";
        causes.push(Cause::invalid(format!("metadata.labels[{label}]"), given, why));
    }
    let parent = &object["spec"]["parentRef"];
    if parent.is_null() {
        causes.push(Cause::required("spec.parentRef", ""));
        return causes;
    }
    for field in ["resource", "name"] {
        if parent[field].as_str().unwrap_or_default().is_empty() {
            causes.push(Cause::required(format!("spec.parentRef.{field}"), ""));
        }
    }
    causes
}

/// An IPAddress never goes to another owner.
pub(super) fn validate_ip_address_update(old: &Value, new: &Value) -> Vec<Cause> {
    if old["spec"]["parentRef"] == new["spec"]["parentRef"] {
        Vec::new()
    } else {
        vec![Cause::invalid(
            "spec.parentRef",
            &new["spec"]["parentRef"],
            "field is immutable",
        )]
    }
}

/// Completes Endpoints.
pub(super) fn endpoints_defaults(object: &mut Value) {
    for subset in list_mut(object, "subsets") {
        for port in list_mut(subset, "ports") {
            default(port, "protocol", "TCP");
        }
    }
}

/// What is wrong with Endpoints.
pub(super) fn validate_endpoints(object: &Value) -> Vec<Cause> {
    let mut causes = Vec::new();
    for (i, subset) in list(&object["subsets"]).enumerate() {
        let path = format!("subsets[{i}]");
        let addresses = ["addresses", "notReadyAddresses"];
        if addresses.iter().all(|a| list(&subset[*a]).next().is_none()) {
            causes.push(Cause::required(
                path.clone(),
                "must specify `addresses` or `notReadyAddresses`",
            ));
        }
        for field in addresses {
            for (j, address) in list(&subset[field]).enumerate() {
                let path = format!("{path}.{field}[{j}].ip");
                match names::parse_ip(address["ip"].as_str().unwrap_or_default()) {
                    None => causes.push(Cause::invalid(path, &address["ip"], names::BAD_IP)),
                    Some(ip) => {
                        if let Some(why) = names::special_ip(ip) {
                            causes.push(Cause::invalid(path, &address["ip"], why));
                        }
                    }
                }
            }
        }
        let several = list(&subset["ports"]).count() > 1;
        for (j, port) in list(&subset["ports"]).enumerate() {
            let path = format!("{path}.ports[{j}]");
            let name = port["name"].as_str().unwrap_or_default();
            if name.is_empty() {
                if several {
                    causes.push(Cause::required(format!("{path}.name"), ""));
                }
            } else {
                for why in names::dns1123_label(name) {
                    causes.push(Cause::invalid(format!("{path}.name"), &name.into(), &why));
                }
            }
            for why in names::port_number(port["port"].as_i64().unwrap_or(0)) {
                causes.push(Cause::invalid(format!("{path}.port"), &port["port"], &why));
            }
        }
    }
    causes
}
