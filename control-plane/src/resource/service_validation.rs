//! What a valid Service looks like (kube-apiserver `ValidateService` and its helpers).

use ipnet::IpNet;
use k8s_openapi::api::core::v1::{ServicePort, ServiceSpec};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use serde_json::{Value, json};

use super::service::{CLUSTER_IP, EXTERNAL_NAME, LOAD_BALANCER, NODE_PORT, NONE, SINGLE_STACK, SpecExt};
use super::{meta, names};
use crate::error::Cause;

/// Everything that is wrong with a Service, metadata aside.
pub(super) fn validate(object: &Value, spec: &ServiceSpec) -> Vec<Cause> {
    let mut causes = Vec::new();
    if spec.ports().is_empty() && !spec.is_headless() && spec.kind() != EXTERNAL_NAME {
        causes.push(Cause::required("spec.ports", ""));
    }
    match spec.kind() {
        kind @ (LOAD_BALANCER | NODE_PORT) if spec.is_headless() => {
            causes.push(Cause::invalid(
                "spec.clusterIPs[0]",
                &NONE.into(),
                &format!("may not be set to 'None' for {kind} services"),
            ));
        }
        EXTERNAL_NAME => external_name(spec, &mut causes),
        _ => {}
    }
    let mut port_names = Vec::new();
    for (i, port) in spec.ports().iter().enumerate() {
        service_port(
            port,
            spec.ports().len() > 1,
            &mut port_names,
            &format!("spec.ports[{i}]"),
            &mut causes,
        );
    }
    meta::labels(&object["spec"]["selector"], "spec.selector", &mut causes);
    affinity(spec, &mut causes);
    causes.extend(cluster_ips(spec));
    for (i, ip) in spec.external_ips.iter().flatten().enumerate() {
        external_ip(ip, &format!("spec.externalIPs[{i}]"), &mut causes);
    }
    if ![CLUSTER_IP, EXTERNAL_NAME, LOAD_BALANCER, NODE_PORT].contains(&spec.kind()) {
        causes.push(Cause::not_supported(
            "spec.type",
            &spec.kind().into(),
            &[CLUSTER_IP, EXTERNAL_NAME, LOAD_BALANCER, NODE_PORT],
        ));
    }
    duplicate_ports(spec, &mut causes);
    load_balancer(object, spec, &mut causes);
    traffic(spec, &mut causes);
    causes
}

fn external_name(spec: &ServiceSpec, causes: &mut Vec<Cause>) {
    for (given, field) in [
        (!spec.ips().is_empty(), "spec.clusterIPs"),
        (!spec.families().is_empty(), "spec.ipFamilies"),
        (spec.ip_family_policy.is_some(), "spec.ipFamilyPolicy"),
    ] {
        if given {
            causes.push(Cause::forbidden(
                field,
                "may not be set for ExternalName services",
            ));
        }
    }
    let name = spec.external_name.as_deref().unwrap_or_default();
    let name = name.strip_suffix('.').unwrap_or(name);
    if name.is_empty() {
        causes.push(Cause::required("spec.externalName", ""));
    } else {
        for why in names::dns1123_subdomain(name) {
            causes.push(Cause::invalid("spec.externalName", &name.into(), &why));
        }
    }
}

fn service_port(
    port: &ServicePort,
    name_required: bool,
    seen: &mut Vec<String>,
    field: &str,
    causes: &mut Vec<Cause>,
) {
    match port.name.as_deref().filter(|n| !n.is_empty()) {
        None if name_required => causes.push(Cause::required(format!("{field}.name"), "")),
        None => {}
        Some(name) => {
            for why in names::dns1123_label(name) {
                causes.push(Cause::invalid(format!("{field}.name"), &name.into(), &why));
            }
            if seen.iter().any(|s| s == name) {
                causes.push(Cause::duplicate(format!("{field}.name"), &name.into()));
            } else {
                seen.push(name.to_owned());
            }
        }
    }
    for why in names::port_number(port.port.into()) {
        causes.push(Cause::invalid(format!("{field}.port"), &port.port.into(), &why));
    }
    let protocol = port.protocol.as_deref().unwrap_or_default();
    if !["TCP", "UDP", "SCTP"].contains(&protocol) {
        causes.push(Cause::not_supported(
            format!("{field}.protocol"),
            &protocol.into(),
            &["TCP", "UDP", "SCTP"],
        ));
    }
    match &port.target_port {
        Some(IntOrString::Int(number)) => {
            for why in names::port_number((*number).into()) {
                causes.push(Cause::invalid(
                    format!("{field}.targetPort"),
                    &(*number).into(),
                    &why,
                ));
            }
        }
        Some(IntOrString::String(name)) => {
            for why in names::port_name(name) {
                causes.push(Cause::invalid(
                    format!("{field}.targetPort"),
                    &name.as_str().into(),
                    &why,
                ));
            }
        }
        None => {}
    }
    if let Some(protocol) = &port.app_protocol {
        for why in names::qualified_name(protocol) {
            causes.push(Cause::invalid(
                format!("{field}.appProtocol"),
                &protocol.as_str().into(),
                &why,
            ));
        }
    }
}

/// A day in seconds: the longest session affinity.
const MAX_AFFINITY_SECONDS: i32 = 86400;

fn affinity(spec: &ServiceSpec, causes: &mut Vec<Cause>) {
    match spec.session_affinity.as_deref() {
        Some("ClientIP") => {
            let config = spec.session_affinity_config.as_ref();
            let timeout = config
                .and_then(|c| c.client_ip.as_ref())
                .and_then(|c| c.timeout_seconds);
            match timeout {
                None => causes.push(Cause::required(
                    "spec.sessionAffinityConfig",
                    "when session affinity type is ClientIP",
                )),
                Some(t) if !(1..=MAX_AFFINITY_SECONDS).contains(&t) => causes.push(Cause::invalid(
                    "spec.sessionAffinityConfig.clientIP.timeoutSeconds",
                    &t.into(),
                    &format!("must be greater than 0 and less than {MAX_AFFINITY_SECONDS}"),
                )),
                Some(_) => {}
            }
        }
        Some(NONE) => {}
        other => causes.push(Cause::not_supported(
            "spec.sessionAffinity",
            &other.unwrap_or_default().into(),
            &["ClientIP", NONE],
        )),
    }
}

fn external_ip(ip: &str, field: &str, causes: &mut Vec<Cause>) {
    let value: Value = ip.into();
    let Some(address) = names::parse_ip(ip) else {
        causes.push(Cause::invalid(field, &value, names::BAD_IP));
        return;
    };
    if let Some(why) = names::special_ip(address) {
        causes.push(Cause::invalid(field, &value, why));
    }
}

fn duplicate_ports(spec: &ServiceSpec, causes: &mut Vec<Cause>) {
    if spec.kind() == CLUSTER_IP {
        for (i, _) in spec
            .ports()
            .iter()
            .enumerate()
            .filter(|(_, p)| p.node_port.is_some())
        {
            causes.push(Cause::forbidden(
                format!("spec.ports[{i}].nodePort"),
                "may not be used when `type` is 'ClusterIP'",
            ));
        }
    }
    let mut seen = Vec::new();
    for (i, port) in spec.ports().iter().enumerate() {
        let Some(node_port) = port.node_port else { continue };
        if seen.contains(&(&port.protocol, node_port)) {
            causes.push(Cause::duplicate(
                format!("spec.ports[{i}].nodePort"),
                &node_port.into(),
            ));
        }
        seen.push((&port.protocol, node_port));
    }
    let mut seen = Vec::new();
    for (i, port) in spec.ports().iter().enumerate() {
        if seen.contains(&(&port.protocol, port.port)) {
            let shown = json!({
                "protocol": port.protocol.as_deref().unwrap_or_default(),
                "port": port.port,
                "targetPort": 0,
            });
            causes.push(Cause::duplicate(format!("spec.ports[{i}]"), &shown));
        }
        seen.push((&port.protocol, port.port));
    }
}

const SOURCE_RANGES_ANNOTATION: &str = "service.beta.kubernetes.io/load-balancer-source-ranges";

fn load_balancer(object: &Value, spec: &ServiceSpec, causes: &mut Vec<Cause>) {
    let is_lb = spec.kind() == LOAD_BALANCER;
    let only_lb = "may only be used when `type` is 'LoadBalancer'";
    let ranges = spec.load_balancer_source_ranges.as_deref().unwrap_or_default();
    let check = |range: &str, field: String, causes: &mut Vec<Cause>| {
        if range.trim().parse::<IpNet>().is_err() {
            causes.push(Cause::invalid(field, &range.trim().into(), names::BAD_CIDR));
        }
    };
    if !ranges.is_empty() {
        // The capital letter is kube-apiserver's.
        let field = "spec.LoadBalancerSourceRanges";
        if !is_lb {
            causes.push(Cause::forbidden(field, only_lb));
        }
        for (i, range) in ranges.iter().enumerate() {
            check(range, format!("{field}[{i}]"), causes);
        }
    } else if let Some(text) = object["metadata"]["annotations"]
        .get(SOURCE_RANGES_ANNOTATION)
        .and_then(Value::as_str)
    {
        let field = format!("metadata.annotations[{SOURCE_RANGES_ANNOTATION}]");
        if !is_lb {
            causes.push(Cause::forbidden(field.clone(), only_lb));
        }
        for range in text.split(',').filter(|_| !text.trim().is_empty()) {
            check(range, field.clone(), causes);
        }
    }
    if spec.allocate_load_balancer_node_ports.is_some() && !is_lb {
        causes.push(Cause::forbidden("spec.allocateLoadBalancerNodePorts", only_lb));
    }
    if let Some(class) = &spec.load_balancer_class {
        if is_lb {
            for why in names::qualified_name(class) {
                causes.push(Cause::invalid(
                    "spec.loadBalancerClass",
                    &class.as_str().into(),
                    &why,
                ));
            }
        } else {
            causes.push(Cause::forbidden("spec.loadBalancerClass", only_lb));
        }
    }
}

fn traffic(spec: &ServiceSpec, causes: &mut Vec<Cause>) {
    let policies = ["Cluster", "Local"];
    match spec.external_traffic_policy.as_deref() {
        Some(policy) if !spec.externally_accessible() => causes.push(Cause::invalid(
            "spec.externalTrafficPolicy",
            &policy.into(),
            "may only be set for externally-accessible services",
        )),
        Some(policy) if !policies.contains(&policy) => causes.push(Cause::not_supported(
            "spec.externalTrafficPolicy",
            &policy.into(),
            &policies,
        )),
        None if spec.externally_accessible() => {
            causes.push(Cause::required("spec.externalTrafficPolicy", ""));
        }
        _ => {}
    }
    if let Some(port) = spec.health_check_node_port
        && !spec.needs_health_check()
    {
        causes.push(Cause::invalid(
            "spec.healthCheckNodePort",
            &port.into(),
            "may only be set when `type` is 'LoadBalancer' and `externalTrafficPolicy` is 'Local'",
        ));
    }
    match spec.internal_traffic_policy.as_deref() {
        None if spec.needs_cluster_ip() => causes.push(Cause::required("spec.internalTrafficPolicy", "")),
        Some(policy) if !policies.contains(&policy) => causes.push(Cause::not_supported(
            "spec.internalTrafficPolicy",
            &policy.into(),
            &policies,
        )),
        _ => {}
    }
    let distributions = ["PreferClose", "PreferSameNode", "PreferSameZone"];
    if let Some(distribution) = spec.traffic_distribution.as_deref()
        && !distributions.contains(&distribution)
    {
        causes.push(Cause::not_supported(
            "spec.trafficDistribution",
            &distribution.into(),
            &distributions,
        ));
    }
}

/// `clusterIP`, `clusterIPs`, `ipFamilies` and `ipFamilyPolicy` must fit together.
pub(super) fn cluster_ips(spec: &ServiceSpec) -> Vec<Cause> {
    let mut causes = Vec::new();
    if spec.kind() == EXTERNAL_NAME {
        return causes;
    }
    let ips = spec.ips();
    let shown = json!(ips);
    if spec.cluster_ip().is_empty() {
        if !ips.is_empty() {
            causes.push(Cause::invalid(
                "spec.clusterIPs",
                &shown,
                "must be empty when `clusterIP` is not specified",
            ));
        }
    } else if ips.is_empty() {
        causes.push(Cause::required("spec.clusterIPs", ""));
    } else if ips.first().map(String::as_str) != Some(spec.cluster_ip()) {
        causes.push(Cause::invalid(
            "spec.clusterIPs",
            &shown,
            "first value must match `clusterIP`",
        ));
    }
    let families = spec.families();
    for (i, family) in families.iter().enumerate() {
        let field = format!("spec.ipFamilies[{i}]");
        let value: Value = family.as_str().into();
        if !["IPv4", "IPv6"].contains(&family.as_str()) {
            causes.push(Cause::not_supported(field.clone(), &value, &["IPv4", "IPv6"]));
        }
        if families.iter().take(i).any(|f| f == family) {
            causes.push(Cause::duplicate(field, &value));
        }
    }
    let policies = [SINGLE_STACK, "PreferDualStack", "RequireDualStack"];
    if let Some(policy) = spec.ip_family_policy.as_deref()
        && !policies.contains(&policy)
    {
        causes.push(Cause::not_supported(
            "spec.ipFamilyPolicy",
            &policy.into(),
            &policies,
        ));
    }
    let mut unreadable = false;
    for (i, ip) in ips.iter().enumerate() {
        if i == 0 && ip == NONE {
            if ips.len() > 1 {
                unreadable = true;
                causes.push(Cause::invalid(
                    "spec.clusterIPs",
                    &shown,
                    "'None' must be the first and only value",
                ));
            }
        } else if names::parse_ip(ip).is_none() {
            unreadable = true;
            causes.push(Cause::invalid(
                format!("spec.clusterIPs[{i}]"),
                &ip.as_str().into(),
                names::BAD_IP,
            ));
        }
    }
    if ips.len() > 2 {
        causes.push(Cause::invalid(
            "spec.clusterIPs",
            &shown,
            "may only hold up to 2 values",
        ));
    }
    if unreadable {
        return causes;
    }
    let is_v6 = |ip: &String| names::parse_ip(ip).is_some_and(|ip| ip.is_ipv6());
    if ips.len() > 1 && !(ips.iter().any(is_v6) && ips.iter().any(|ip| !is_v6(ip))) {
        causes.push(Cause::invalid(
            "spec.clusterIPs",
            &shown,
            "may specify no more than one IP for each IP family",
        ));
    }
    if !spec.is_headless() {
        for (i, (ip, family)) in ips.iter().zip(families).enumerate() {
            let fits = match family.as_str() {
                "IPv4" => !is_v6(ip),
                "IPv6" => is_v6(ip),
                _ => true,
            };
            if !fits {
                causes.push(Cause::invalid(
                    format!("spec.clusterIPs[{i}]"),
                    &ip.as_str().into(),
                    &format!("expected an {family} value as indicated by `ipFamilies[{i}]`"),
                ));
            }
        }
    }
    causes
}

/// What is wrong with a change.
pub(super) fn validate_update(old: &ServiceSpec, new: &ServiceSpec) -> Vec<Cause> {
    let mut causes = Vec::new();
    if old.kind() != EXTERNAL_NAME && new.kind() != EXTERNAL_NAME {
        if !(old.is_headless() && new.is_headless()) {
            changed_list(
                "clusterIPs",
                "clusterIP",
                "secondary clusterIP",
                old.ips(),
                new.ips(),
                new,
                &mut causes,
            );
        }
        if !old.is_headless() && !new.is_headless() {
            changed_list(
                "ipFamilies",
                "ipFamily",
                "secondary ipFamily",
                old.families(),
                new.families(),
                new,
                &mut causes,
            );
        }
    }
    if old.kind() == LOAD_BALANCER
        && new.kind() == LOAD_BALANCER
        && old.load_balancer_class != new.load_balancer_class
    {
        causes.push(Cause::invalid(
            "spec.loadBalancerClass",
            &json!(new.load_balancer_class),
            "may not change once set",
        ));
    }
    if old.needs_health_check()
        && new.needs_health_check()
        && old.health_check_node_port != new.health_check_node_port
    {
        causes.push(Cause::forbidden("spec.healthCheckNodePort", "field is immutable"));
    }
    causes
}

/// The first of a list of cluster addresses or families never changes, the second may come and go.
fn changed_list(
    list: &str,
    one: &str,
    second: &str,
    old: &[String],
    new: &[String],
    spec: &ServiceSpec,
    causes: &mut Vec<Cause>,
) {
    let shown = json!(new);
    let changed = |i: usize| Cause::invalid(format!("spec.{list}[{i}]"), &shown, "may not change once set");
    if old.len() == new.len() {
        for (i, _) in old.iter().zip(new).enumerate().filter(|(_, (a, b))| a != b) {
            // kube-apiserver names the first family whichever changed.
            causes.push(changed(if list == "ipFamilies" { 0 } else { i }));
        }
        return;
    }
    if new.is_empty() {
        causes.push(Cause::invalid(
            format!("spec.{list}[0]"),
            &shown,
            &format!("primary {one} can not be unset"),
        ));
    } else if !old.is_empty() && old.first() != new.first() {
        causes.push(changed(0));
    }
    if new.len() == 1 && old.len() > 1 && spec.policy() != SINGLE_STACK {
        causes.push(Cause::invalid(
            "spec.ipFamilyPolicy",
            &json!(spec.ip_family_policy),
            &format!("must be set to 'SingleStack' when releasing the {second}"),
        ));
    }
}
