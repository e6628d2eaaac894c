//! Services: defaults, addresses and ports, what may change (kube-apiserver `registry/core/service`).

use k8s_openapi::api::core::v1::{ClientIPConfig, ServicePort, ServiceSpec, SessionAffinityConfig};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use serde_json::{Value, json};

use super::{Allocator, ResourceInfo, meta, names, service_validation};
use crate::error::{ApiError, Cause};

pub(super) const NONE: &str = "None";
pub(super) const EXTERNAL_NAME: &str = "ExternalName";
pub(super) const CLUSTER_IP: &str = "ClusterIP";
pub(super) const NODE_PORT: &str = "NodePort";
pub(super) const LOAD_BALANCER: &str = "LoadBalancer";
pub(super) const SINGLE_STACK: &str = "SingleStack";
const PREFER_DUAL_STACK: &str = "PreferDualStack";
const REQUIRE_DUAL_STACK: &str = "RequireDualStack";
const IPV4: &str = "IPv4";
const IPV6: &str = "IPv6";

/// Three hours, as kube-apiserver sets it.
const AFFINITY_SECONDS: i32 = 10800;

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

/// Values that a client may leave out (`pkg/apis/core/v1/defaults.go`). Zero means "not given" for ports.
fn defaults(spec: &mut ServiceSpec) {
    if spec.session_affinity.is_none() {
        spec.session_affinity = Some(NONE.into());
    }
    match spec.session_affinity.as_deref() {
        Some(NONE) => spec.session_affinity_config = None,
        Some("ClientIP") => {
            let config = spec
                .session_affinity_config
                .get_or_insert_with(SessionAffinityConfig::default);
            let client = config.client_ip.get_or_insert_with(ClientIPConfig::default);
            client.timeout_seconds.get_or_insert(AFFINITY_SECONDS);
        }
        _ => {}
    }
    if spec.type_.is_none() {
        spec.type_ = Some(CLUSTER_IP.into());
    }
    for port in spec.ports.iter_mut().flatten() {
        if port.protocol.is_none() {
            port.protocol = Some("TCP".into());
        }
        let no_target = match &port.target_port {
            None | Some(IntOrString::Int(0)) => true,
            Some(IntOrString::String(s)) => s.is_empty(),
            Some(IntOrString::Int(_)) => false,
        };
        if no_target {
            port.target_port = Some(IntOrString::Int(port.port));
        }
        if port.node_port == Some(0) {
            port.node_port = None;
        }
    }
    if spec.health_check_node_port == Some(0) {
        spec.health_check_node_port = None;
    }
    if spec.publish_not_ready_addresses == Some(false) {
        spec.publish_not_ready_addresses = None;
    }
    if spec.external_traffic_policy.is_none() && spec.externally_accessible() {
        spec.external_traffic_policy = Some("Cluster".into());
    }
    if spec.internal_traffic_policy.is_none() && spec.needs_cluster_ip() {
        spec.internal_traffic_policy = Some("Cluster".into());
    }
    if spec.kind() == LOAD_BALANCER {
        spec.allocate_load_balancer_node_ports.get_or_insert(true);
    }
}

/// An update that leaves out what the server had chosen keeps it.
fn keep_allocated_values(old: &ServiceSpec, new: &mut ServiceSpec) {
    if old.needs_cluster_ip() && new.needs_cluster_ip() {
        if new.cluster_ip().is_empty() {
            new.cluster_ip.clone_from(&old.cluster_ip);
        }
        if new.ips().is_empty() {
            new.cluster_ips.clone_from(&old.cluster_ips);
        }
    }
    if old.needs_node_port() && new.needs_node_port() {
        let ports_of =
            |spec: &ServiceSpec| -> Vec<i32> { spec.ports().iter().filter_map(|p| p.node_port).collect() };
        let theirs = ports_of(new);
        let mut used: Vec<i32> = ports_of(old).into_iter().filter(|p| theirs.contains(p)).collect();
        for port in new.ports.iter_mut().flatten().filter(|p| p.node_port.is_none()) {
            let known = old
                .ports()
                .iter()
                .find(|o| o.name == port.name)
                .and_then(|o| o.node_port);
            if let Some(known) = known.filter(|k| !used.contains(k)) {
                port.node_port = Some(known);
                used.push(known);
            }
        }
    }
    if old.needs_health_check() && new.needs_health_check() && new.health_check_node_port.is_none() {
        new.health_check_node_port = old.health_check_node_port;
    }
}

/// `clusterIP` and `clusterIPs[0]` are the same value; a client that knows only the former changes it alone.
fn normalize_cluster_ips(old: &ServiceSpec, new: &mut ServiceSpec) {
    if !old.ips().is_empty() && new.ips().is_empty() && old.cluster_ip() == new.cluster_ip() {
        new.cluster_ips.clone_from(&old.cluster_ips);
    }
    if old.cluster_ip() != new.cluster_ip() && old.ips() == new.ips() {
        new.cluster_ips = if new.cluster_ip().is_empty() {
            None
        } else {
            Some(vec![new.cluster_ip().to_owned()])
        };
    }
}

/// When the type changes, values that belonged to the old type go, unless the client changed them too.
fn drop_fields_of_old_type(old: &ServiceSpec, new: &mut ServiceSpec) {
    if old.needs_cluster_ip() && !new.needs_cluster_ip() {
        if old.cluster_ip() == new.cluster_ip() && old.ips() == new.ips() {
            new.cluster_ip = None;
            new.cluster_ips = None;
        }
        if old.families() == new.families() {
            new.ip_families = None;
        }
        if old.ip_family_policy == new.ip_family_policy {
            new.ip_family_policy = None;
        }
    }
    let node_ports = |spec: &ServiceSpec| -> Vec<i32> {
        let mut ports: Vec<i32> = spec.ports().iter().filter_map(|p| p.node_port).collect();
        ports.sort_unstable();
        ports.dedup();
        ports
    };
    if old.needs_node_port() && !new.needs_node_port() && node_ports(old) == node_ports(new) {
        for port in new.ports.iter_mut().flatten() {
            port.node_port = None;
        }
    }
    if old.needs_health_check()
        && !new.needs_health_check()
        && old.health_check_node_port == new.health_check_node_port
    {
        new.health_check_node_port = None;
    }
    if old.kind() == LOAD_BALANCER && new.kind() != LOAD_BALANCER {
        if old.allocate_load_balancer_node_ports == new.allocate_load_balancer_node_ports {
            new.allocate_load_balancer_node_ports = None;
        }
        if old.load_balancer_class == new.load_balancer_class {
            new.load_balancer_class = None;
        }
    }
    if old.externally_accessible()
        && !new.externally_accessible()
        && old.external_traffic_policy == new.external_traffic_policy
    {
        new.external_traffic_policy = None;
    }
}

fn is_v6(family: &str) -> bool {
    family == IPV6
}

fn other_family(family: &str) -> String {
    if is_v6(family) { IPV4 } else { IPV6 }.to_owned()
}

fn family_name(v6: bool) -> &'static str {
    if v6 { IPV6 } else { IPV4 }
}

/// One Service on its way through the allocator.
struct Work<'a> {
    r: &'a ResourceInfo,
    name: &'a str,
    alloc: &'a mut Allocator,
}

impl Work<'_> {
    fn invalid(&self, causes: &[Cause]) -> ApiError {
        ApiError::invalid(self.r, self.name, causes)
    }

    fn dual_stack_cluster(&self) -> bool {
        self.alloc.has_family(false) && self.alloc.has_family(true)
    }

    /// Completes `ipFamilyPolicy` and `ipFamilies` from what was given and what the cluster has.
    fn init_families(&self, spec: &mut ServiceSpec, before: Option<&ServiceSpec>) -> Result<(), ApiError> {
        if spec.kind() == EXTERNAL_NAME || unchanged_prefer_dual_stack(spec, before) {
            return Ok(());
        }
        let headless_without_selector = spec.cluster_ip() == NONE && !spec.has_selector();
        if spec.ip_family_policy.is_none() {
            spec.ip_family_policy = match before.and_then(|b| b.ip_family_policy.clone()) {
                Some(policy) => Some(policy),
                None if headless_without_selector => Some(REQUIRE_DUAL_STACK.into()),
                None => Some(SINGLE_STACK.into()),
            };
        }
        let causes = service_validation::cluster_ips(spec);
        if !causes.is_empty() {
            return Err(self.invalid(&causes));
        }
        let mut causes = Vec::new();
        let policy: Value = spec.policy().into();
        if let Some(before) = before {
            if spec.policy() == SINGLE_STACK {
                if before.ips() == spec.ips() && spec.ips().len() > 1 {
                    spec.cluster_ips.iter_mut().for_each(|v| v.truncate(1));
                }
                if before.families() == spec.families() && spec.families().len() > 1 {
                    spec.ip_families.iter_mut().for_each(|v| v.truncate(1));
                }
            } else {
                if !spec.ips().is_empty() && spec.ips().len() < before.ips().len() {
                    causes.push(Cause::invalid(
                        "spec.ipFamilyPolicy",
                        &policy,
                        "must be 'SingleStack' to release the secondary cluster IP",
                    ));
                }
                if !spec.families().is_empty() && spec.families().len() < before.families().len() {
                    causes.push(Cause::invalid(
                        "spec.ipFamilyPolicy",
                        &policy,
                        "must be 'SingleStack' to release the secondary IP family",
                    ));
                }
            }
        }
        if spec.policy() == SINGLE_STACK {
            for (count, what) in [
                (spec.ips().len(), "cluster IPs"),
                (spec.families().len(), "IP families"),
            ] {
                if count == 2 {
                    causes.push(Cause::invalid(
                        "spec.ipFamilyPolicy",
                        &policy,
                        &format!("must be 'RequireDualStack' or 'PreferDualStack' when multiple {what} are specified"),
                    ));
                }
            }
        }
        let ips = spec.ips().to_vec();
        for (i, ip) in ips.iter().enumerate().take_while(|(_, ip)| *ip != NONE) {
            let family = family_name(names::parse_ip(ip).is_some_and(|ip| ip.is_ipv6()));
            if i >= spec.families().len() {
                if self.alloc.has_family(is_v6(family)) {
                    spec.ip_families.get_or_insert_default().push(family.to_owned());
                } else {
                    causes.push(Cause::invalid(
                        format!("spec.clusterIPs[{i}]"),
                        &json!(ips),
                        &format!("{family} is not configured on this cluster"),
                    ));
                }
            }
        }
        if !causes.is_empty() {
            return Err(self.invalid(&causes));
        }
        let default_family = family_name(self.alloc.default_is_v6());
        if headless_without_selector {
            // Whoever writes the endpoints decides about families, whatever the cluster has.
            let families = spec.ip_families.get_or_insert_default();
            if families.is_empty() {
                families.push(default_family.to_owned());
            }
            if let ([only], false) = (families.as_slice(), policy == SINGLE_STACK) {
                let other = other_family(only);
                families.push(other);
            }
            return Ok(());
        }
        if policy == REQUIRE_DUAL_STACK && !self.dual_stack_cluster() {
            causes.push(Cause::invalid(
                "spec.ipFamilyPolicy",
                &policy,
                "this cluster is not configured for dual-stack services",
            ));
        }
        for (i, family) in spec.families().iter().enumerate() {
            if !self.alloc.has_family(is_v6(family)) {
                causes.push(Cause::invalid(
                    format!("spec.ipFamilies[{i}]"),
                    &family.as_str().into(),
                    "not configured on this cluster",
                ));
            }
        }
        if !causes.is_empty() {
            return Err(self.invalid(&causes));
        }
        let dual_stack_cluster = self.dual_stack_cluster();
        let families = spec.ip_families.get_or_insert_default();
        if families.is_empty() {
            families.push(default_family.to_owned());
        }
        if let ([only], true) = (families.as_slice(), policy != SINGLE_STACK && dual_stack_cluster) {
            let other = other_family(only);
            families.push(other);
        }
        Ok(())
    }

    /// One address for each family that has none yet.
    fn allocate_addresses(&mut self, spec: &mut ServiceSpec) -> Result<(), ApiError> {
        if spec.kind() == EXTERNAL_NAME || spec.ips().first().is_some_and(|ip| ip == NONE) {
            return Ok(());
        }
        let families = spec.families().to_vec();
        for (i, family) in families.iter().enumerate() {
            self.allocate_address(spec, i, is_v6(family))?;
        }
        Ok(())
    }

    fn allocate_address(&mut self, spec: &mut ServiceSpec, index: usize, v6: bool) -> Result<(), ApiError> {
        let given = spec.ips().get(index).cloned().unwrap_or_default();
        let address = if given.is_empty() {
            let address = self
                .alloc
                .take_any_address(v6)
                .map_err(|e| ApiError::internal(&format!("failed to allocate a serviceIP: {e}")))?;
            address.to_string()
        } else {
            let taken = match names::parse_ip(&given) {
                Some(address) => self.alloc.take_address(address).map_err(|e| e.to_string()),
                None => Err(names::BAD_IP.to_owned()),
            };
            if let Err(why) = taken {
                return Err(self.invalid(&[Cause::invalid(
                    "spec.clusterIPs",
                    &json!(spec.ips()),
                    &format!("failed to allocate IP {given}: {why}"),
                )]));
            }
            given
        };
        if index == 0 {
            spec.cluster_ip = Some(address.clone());
        }
        let ips = spec.cluster_ips.get_or_insert_default();
        match ips.get_mut(index) {
            Some(slot) => *slot = address,
            None => ips.push(address),
        }
        Ok(())
    }

    fn release_addresses(&mut self, ips: &[String]) {
        for address in ips.iter().filter_map(|ip| names::parse_ip(ip)) {
            self.alloc.release_address(address);
        }
    }

    fn update_addresses(&mut self, before: &ServiceSpec, spec: &mut ServiceSpec) -> Result<(), ApiError> {
        if unchanged_prefer_dual_stack(spec, Some(before)) {
            return Ok(());
        }
        let was_name = before.kind() == EXTERNAL_NAME;
        let is_name = spec.kind() == EXTERNAL_NAME;
        if was_name && !is_name {
            return self.allocate_addresses(spec);
        }
        if before.ips().first().is_some_and(|ip| ip == NONE) {
            return Ok(());
        }
        if !was_name && is_name {
            self.release_addresses(before.ips());
        } else if before.families().len() == 1 && spec.families().len() == 2 {
            let v6 = spec.families().get(1).is_some_and(|f| is_v6(f));
            self.allocate_address(spec, 1, v6)?;
        } else if before.families().len() == 2 && spec.families().len() == 1 {
            self.release_addresses(before.ips().get(1..).unwrap_or_default());
        }
        Ok(())
    }

    fn allocate_node_port(&mut self, index: usize, wanted: i32) -> Result<(), ApiError> {
        let taken = match u16::try_from(wanted) {
            Ok(port) => self.alloc.take_port(port),
            Err(_) => Err(self.alloc.port_out_of_range()),
        };
        taken.map_err(|e| {
            self.invalid(&[Cause::invalid(
                format!("spec.ports[{index}].nodePort"),
                &wanted.into(),
                &e.to_string(),
            )])
        })
    }

    fn any_node_port(&mut self) -> Result<i32, ApiError> {
        let port = self
            .alloc
            .take_any_port()
            .map_err(|e| ApiError::internal(&format!("failed to allocate a nodePort: {e}")))?;
        Ok(port.into())
    }

    /// Node ports of a new Service. Entries that share a port number (TCP and UDP) share the node port.
    fn allocate_node_ports(&mut self, spec: &mut ServiceSpec) -> Result<(), ApiError> {
        if !spec.needs_node_port() {
            return Ok(());
        }
        let allocate = spec.kind() == NODE_PORT || spec.allocate_load_balancer_node_ports != Some(false);
        let mut ports = spec.ports.take().unwrap_or_default();
        let mut chosen: Vec<(i32, i32)> = Vec::new();
        for i in 0..ports.len() {
            let Some((number, given)) = ports.get(i).map(|p| (p.port, p.node_port)) else {
                continue;
            };
            if given.is_none() && !allocate {
                continue;
            }
            let shared = chosen
                .iter()
                .find(|(port, _)| *port == number)
                .map(|(_, node)| *node);
            let node_port = match (shared, given) {
                (Some(shared), None) => shared,
                (Some(shared), Some(given)) if given == shared => shared,
                (Some(_), Some(given)) => {
                    self.allocate_node_port(i, given)?;
                    given
                }
                (None, _) => {
                    let wanted = ports
                        .iter()
                        .filter(|p| p.port == number)
                        .find_map(|p| p.node_port);
                    let node_port = match wanted {
                        Some(wanted) => {
                            self.allocate_node_port(i, wanted)?;
                            wanted
                        }
                        None => self.any_node_port()?,
                    };
                    chosen.push((number, node_port));
                    node_port
                }
            };
            if let Some(port) = ports.get_mut(i) {
                port.node_port = Some(node_port);
            }
        }
        spec.ports = (!ports.is_empty()).then_some(ports);
        Ok(())
    }

    fn allocate_health_check(&mut self, spec: &mut ServiceSpec) -> Result<(), ApiError> {
        match spec.health_check_node_port {
            Some(wanted) => {
                let taken = match u16::try_from(wanted) {
                    Ok(port) => self.alloc.take_port(port),
                    Err(_) => Err(self.alloc.port_out_of_range()),
                };
                taken.map_err(|e| {
                    ApiError::internal(&format!(
                        "failed to allocate requested HealthCheck NodePort {wanted}: {e}"
                    ))
                })?;
            }
            None => {
                let port = self.alloc.take_any_port().map_err(|e| {
                    ApiError::internal(&format!("failed to allocate a HealthCheck NodePort 0: {e}"))
                })?;
                spec.health_check_node_port = Some(port.into());
            }
        }
        Ok(())
    }

    fn release_node_port(&mut self, port: Option<i32>) {
        if let Some(port) = port.and_then(|p| u16::try_from(p).ok()) {
            self.alloc.release_port(port);
        }
    }

    fn update_node_ports(&mut self, before: &ServiceSpec, spec: &mut ServiceSpec) -> Result<(), ApiError> {
        let old_ports: Vec<i32> = before.ports().iter().filter_map(|p| p.node_port).collect();
        if spec.needs_node_port() {
            let allocate = spec.kind() == NODE_PORT || spec.allocate_load_balancer_node_ports != Some(false);
            let mut ports = spec.ports.take().unwrap_or_default();
            let mut taken: Vec<i32> = Vec::new();
            for (i, port) in ports.iter_mut().enumerate() {
                if let Some(wanted) = port.node_port {
                    if !old_ports.contains(&wanted) && !taken.contains(&wanted) {
                        self.allocate_node_port(i, wanted)?;
                        taken.push(wanted);
                    }
                } else if allocate {
                    port.node_port = Some(self.any_node_port()?);
                }
            }
            for old in &old_ports {
                if !ports.iter().any(|p| p.node_port == Some(*old)) {
                    self.release_node_port(Some(*old));
                }
            }
            spec.ports = (!ports.is_empty()).then_some(ports);
        } else if before.needs_node_port() {
            for old in old_ports {
                self.release_node_port(Some(old));
            }
        }
        if !before.needs_health_check() && spec.needs_health_check() {
            self.allocate_health_check(spec)?;
        } else if before.needs_health_check() && !spec.needs_health_check() {
            self.release_node_port(before.health_check_node_port);
        }
        Ok(())
    }
}

/// A PreferDualStack Service stays as it is when only the cluster's families changed since it was created.
fn unchanged_prefer_dual_stack(spec: &ServiceSpec, before: Option<&ServiceSpec>) -> bool {
    before.is_some_and(|before| {
        before.type_ == spec.type_
            && spec.needs_cluster_ip()
            && spec.policy() == PREFER_DUAL_STACK
            && before.policy() == PREFER_DUAL_STACK
            && before.ips() == spec.ips()
            && before.families() == spec.families()
    })
}
