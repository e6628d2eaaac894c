//! What a Service gets that its client left out, and loses when its type changes.

use k8s_openapi::api::core::v1::{ClientIPConfig, ServiceSpec, SessionAffinityConfig};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;

use super::{CLUSTER_IP, LOAD_BALANCER, NONE, SpecExt as _};

/// Three hours, as kube-apiserver sets it.
const AFFINITY_SECONDS: i32 = 10800;

/// Values that a client may leave out (`pkg/apis/core/v1/defaults.go`). Zero means "not given" for ports.
pub(super) fn defaults(spec: &mut ServiceSpec) {
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
pub(super) fn keep_allocated_values(old: &ServiceSpec, new: &mut ServiceSpec) {
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
pub(super) fn normalize_cluster_ips(old: &ServiceSpec, new: &mut ServiceSpec) {
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
pub(super) fn drop_fields_of_old_type(old: &ServiceSpec, new: &mut ServiceSpec) {
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
