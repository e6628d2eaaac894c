//! Ports on which load balancers ask whether this node has endpoints of a Service (spec kube-proxy 3.3).

use dataplane_common::abi::Addr;
use hashbrown::HashSet;

use super::Model;
use crate::key::{Family, ServiceKey};
use crate::object::family_index;

/// A `healthCheckNodePort`, of a Service of type `LoadBalancer` with `externalTrafficPolicy: Local`.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct HealthCheckNodePort {
    /// Namespace of the Service.
    pub namespace: String,
    /// Name of the Service.
    pub name: String,
    /// Where to listen, 1 to 65535.
    pub port: u16,
    /// Different addresses of ready endpoints on this node, over all ports; `None` if the Service has no IPv4.
    pub local_endpoints_v4: Option<u32>,
    /// The same for IPv6.
    pub local_endpoints_v6: Option<u32>,
}

impl Model {
    /// All of them, in order of namespace and name.
    #[must_use]
    pub fn health_check_node_ports(&self) -> Vec<HealthCheckNodePort> {
        let mut out: Vec<HealthCheckNodePort> = self
            .health_checked
            .iter()
            .filter_map(|id| {
                let entry = self.entries.get(*id)?;
                let service = entry.service.as_deref()?;
                let count = |family: Family| -> Option<u32> {
                    service.cluster_ip[family_index(family)]?;
                    let keys = entry.keys().filter(|key| key.family == family);
                    let local = |key: ServiceKey| {
                        let candidates = self.candidates(entry, &key).into_iter();
                        candidates.filter(|c| c.ready && c.local).map(|c| c.backend.addr)
                    };
                    let addresses: HashSet<Addr> = keys.flat_map(local).collect();
                    u32::try_from(addresses.len()).ok()
                };
                Some(HealthCheckNodePort {
                    namespace: entry.name.namespace.to_string(),
                    name: entry.name.name.to_string(),
                    port: service.external.as_ref()?.health_check_port?,
                    local_endpoints_v4: count(Family::V4),
                    local_endpoints_v6: count(Family::V6),
                })
            })
            .collect();
        out.sort_unstable();
        out
    }
}
