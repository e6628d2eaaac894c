//! Services: defaults, addresses and ports, what may change (kube-apiserver `registry/core/service`).

mod allocate;
mod defaults;

use k8s_openapi::api::core::v1::{ServicePort, ServiceSpec};
use serde_json::{Value, json};

use super::{Allocator, ResourceInfo, meta, names, service_validation};
use crate::error::{ApiError, Cause};
use allocate::Work;
use defaults::{defaults, drop_fields_of_old_type, keep_allocated_values, normalize_cluster_ips};

pub(super) const NONE: &str = "None";
pub(super) const EXTERNAL_NAME: &str = "ExternalName";
pub(super) const CLUSTER_IP: &str = "ClusterIP";
pub(super) const NODE_PORT: &str = "NodePort";
pub(super) const LOAD_BALANCER: &str = "LoadBalancer";
pub(super) const SINGLE_STACK: &str = "SingleStack";

/// The specification of a Service object that has been brought into shape.
pub(super) fn spec_of(object: &Value) -> Result<ServiceSpec, ApiError> {
    if object["spec"].is_null() {
        return Ok(ServiceSpec::default());
    }
    serde_json::from_value(object["spec"].clone()).map_err(|e| {
        ApiError::bad_request(format!(
            "Service in version \"v1\" cannot be handled as a Service: {e}"
        ))
    })
}

fn put_spec(object: &mut Value, spec: &ServiceSpec) -> Result<(), ApiError> {
    object["spec"] = serde_json::to_value(spec).map_err(|e| ApiError::internal(&e.to_string()))?;
    Ok(())
}

/// Sets what a client may leave out.
pub(super) fn complete(object: &mut Value) -> Result<(), ApiError> {
    let mut spec = spec_of(object)?;
    defaults(&mut spec);
    put_spec(object, &spec)
}

/// Completes and checks a new Service.
pub(super) fn create(r: &ResourceInfo, alloc: &mut Allocator, object: &mut Value) -> Result<(), ApiError> {
    let mut spec = spec_of(object)?;
    defaults(&mut spec);
    if !spec.cluster_ip().is_empty() && spec.ips().is_empty() {
        spec.cluster_ips = Some(vec![spec.cluster_ip().to_owned()]);
    }
    let name = meta::name(object).to_owned();
    let mut work = Work {
        r,
        name: &name,
        alloc,
    };
    work.init_families(&mut spec, None)?;
    work.allocate_addresses(&mut spec)?;
    work.allocate_node_ports(&mut spec)?;
    if spec.needs_health_check() {
        work.allocate_health_check(&mut spec)?;
    }
    put_spec(object, &spec)?;
    object["status"] = json!({"loadBalancer": {}});
    let mut causes = meta::validate(r, object);
    causes.extend(service_validation::validate(object, &spec));
    finish(r, &name, &causes)
}

/// Completes and checks a changed Service.
pub(super) fn update(
    r: &ResourceInfo,
    alloc: &mut Allocator,
    old: &Value,
    new: &mut Value,
) -> Result<(), ApiError> {
    let before = spec_of(old)?;
    let mut spec = spec_of(new)?;
    defaults(&mut spec);
    keep_allocated_values(&before, &mut spec);
    normalize_cluster_ips(&before, &mut spec);
    drop_fields_of_old_type(&before, &mut spec);
    let name = meta::name(old).to_owned();
    let mut work = Work {
        r,
        name: &name,
        alloc,
    };
    work.init_families(&mut spec, Some(&before))?;
    work.update_addresses(&before, &mut spec)?;
    work.update_node_ports(&before, &mut spec)?;
    put_spec(new, &spec)?;
    new["status"] = old
        .get("status")
        .cloned()
        .unwrap_or_else(|| json!({"loadBalancer": {}}));
    let mut causes = meta::validate_update(old, new);
    causes.extend(service_validation::validate_update(&before, &spec));
    causes.extend(meta::validate(r, new));
    causes.extend(service_validation::validate(new, &spec));
    finish(r, &name, &causes)
}

/// Completes and checks a changed status.
pub(super) fn update_status(r: &ResourceInfo, new: &mut Value) -> Result<(), ApiError> {
    let mut causes = Vec::new();
    if new["status"].is_null() {
        new["status"] = json!({"loadBalancer": {}});
    }
    if new["status"]["loadBalancer"].is_null() {
        new["status"]["loadBalancer"] = json!({});
    }
    let ingress = new["status"]["loadBalancer"]
        .get_mut("ingress")
        .and_then(Value::as_array_mut);
    for (i, entry) in ingress.into_iter().flatten().enumerate() {
        let Some(ip) = entry.get("ip").and_then(Value::as_str).map(str::to_owned) else {
            continue;
        };
        if names::parse_ip(&ip).is_none() {
            causes.push(Cause::invalid(
                format!("status.loadBalancer.ingress[{i}].ip"),
                &ip.into(),
                names::BAD_IP,
            ));
        }
        if entry.get("ipMode").is_none() {
            entry["ipMode"] = "VIP".into();
        }
    }
    let name = meta::name(new).to_owned();
    finish(r, &name, &causes)
}

fn finish(r: &ResourceInfo, name: &str, causes: &[Cause]) -> Result<(), ApiError> {
    if causes.is_empty() {
        Ok(())
    } else {
        Err(ApiError::invalid(r, name, causes))
    }
}

/// Short ways to ask about a specification.
pub(super) trait SpecExt {
    fn kind(&self) -> &str;
    fn cluster_ip(&self) -> &str;
    fn ips(&self) -> &[String];
    fn families(&self) -> &[String];
    fn policy(&self) -> &str;
    fn ports(&self) -> &[ServicePort];
    fn is_headless(&self) -> bool;
    fn has_selector(&self) -> bool;
    fn needs_cluster_ip(&self) -> bool;
    fn needs_node_port(&self) -> bool;
    fn needs_health_check(&self) -> bool;
    fn externally_accessible(&self) -> bool;
}

impl SpecExt for ServiceSpec {
    fn kind(&self) -> &str {
        self.type_.as_deref().unwrap_or_default()
    }
    fn cluster_ip(&self) -> &str {
        self.cluster_ip.as_deref().unwrap_or_default()
    }
    fn ips(&self) -> &[String] {
        self.cluster_ips.as_deref().unwrap_or_default()
    }
    fn families(&self) -> &[String] {
        self.ip_families.as_deref().unwrap_or_default()
    }
    fn policy(&self) -> &str {
        self.ip_family_policy.as_deref().unwrap_or_default()
    }
    fn ports(&self) -> &[ServicePort] {
        self.ports.as_deref().unwrap_or_default()
    }
    fn is_headless(&self) -> bool {
        matches!(self.ips(), [one] if one == NONE)
    }
    fn has_selector(&self) -> bool {
        self.selector.as_ref().is_some_and(|s| !s.is_empty())
    }
    fn needs_cluster_ip(&self) -> bool {
        matches!(self.kind(), CLUSTER_IP | NODE_PORT | LOAD_BALANCER)
    }
    fn needs_node_port(&self) -> bool {
        matches!(self.kind(), NODE_PORT | LOAD_BALANCER)
    }
    fn needs_health_check(&self) -> bool {
        self.kind() == LOAD_BALANCER && self.external_traffic_policy.as_deref() == Some("Local")
    }
    fn externally_accessible(&self) -> bool {
        self.needs_node_port()
            || (self.kind() == CLUSTER_IP && self.external_ips.as_ref().is_some_and(|e| !e.is_empty()))
    }
}
