//! Address families, cluster addresses and node ports of a Service.

use k8s_openapi::api::core::v1::ServiceSpec;
use serde_json::{Value, json};

use super::super::{Allocator, ResourceInfo, names, service_validation};
use super::{EXTERNAL_NAME, NODE_PORT, NONE, SINGLE_STACK, SpecExt as _};
use crate::error::{ApiError, Cause};

const PREFER_DUAL_STACK: &str = "PreferDualStack";
const REQUIRE_DUAL_STACK: &str = "RequireDualStack";
const IPV4: &str = "IPv4";
const IPV6: &str = "IPv6";

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
pub(super) struct Work<'a> {
    pub(super) r: &'a ResourceInfo,
    pub(super) name: &'a str,
    pub(super) alloc: &'a mut Allocator,
}

impl Work<'_> {
    fn invalid(&self, causes: &[Cause]) -> ApiError {
        ApiError::invalid(self.r, self.name, causes)
    }

    fn dual_stack_cluster(&self) -> bool {
        self.alloc.has_family(false) && self.alloc.has_family(true)
    }

    /// Completes `ipFamilyPolicy` and `ipFamilies` from what was given and what the cluster has.
    pub(super) fn init_families(
        &self,
        spec: &mut ServiceSpec,
        before: Option<&ServiceSpec>,
    ) -> Result<(), ApiError> {
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
    pub(super) fn allocate_addresses(&mut self, spec: &mut ServiceSpec) -> Result<(), ApiError> {
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

    pub(super) fn update_addresses(
        &mut self,
        before: &ServiceSpec,
        spec: &mut ServiceSpec,
    ) -> Result<(), ApiError> {
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
    pub(super) fn allocate_node_ports(&mut self, spec: &mut ServiceSpec) -> Result<(), ApiError> {
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

    pub(super) fn allocate_health_check(&mut self, spec: &mut ServiceSpec) -> Result<(), ApiError> {
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

    pub(super) fn update_node_ports(
        &mut self,
        before: &ServiceSpec,
        spec: &mut ServiceSpec,
    ) -> Result<(), ApiError> {
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
