//! The fields, named as in the file. Each may be absent or null, which is the same.

use std::collections::BTreeMap;

use serde::{Deserialize, Deserializer, Serialize};
use serde_json::Value;

use super::GoDuration;

/// Null means the zero value, as for Go.
fn nullable<'de, D: Deserializer<'de>, T: Deserialize<'de> + Default>(
    deserializer: D,
) -> Result<T, D::Error> {
    Ok(Option::deserialize(deserializer)?.unwrap_or_default())
}

macro_rules! config_type {
    ($(#[$meta:meta])* $name:ident { $($(#[$field_meta:meta])* $field:ident: $type:ty,)* }) => {
        $(#[$meta])*
        #[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
        #[serde(rename_all = "camelCase", default)]
        pub struct $name {
            $(
                $(#[$field_meta])*
                #[serde(deserialize_with = "nullable")]
                pub $field: $type,
            )*
        }
    };
}

config_type! {
    /// kube-proxy's configuration. What the defaults fill in is zero or `None` before
    /// [`KubeProxyConfiguration::set_defaults`].
    KubeProxyConfiguration {
        /// `kubeproxy.config.k8s.io/v1alpha1`.
        api_version: String,
        /// `KubeProxyConfiguration`.
        kind: String,
        /// Feature gates by name.
        feature_gates: BTreeMap<String, bool>,
        /// How the API is reached.
        client_connection: ClientConnection,
        /// How it logs.
        logging: Logging,
        /// Name of the Node, instead of the host's name.
        hostname_override: String,
        /// Overrides the node's address of its family and makes this family the primary one; nothing is bound to it.
        bind_address: String,
        /// Address of the health server.
        healthz_bind_address: String,
        /// Address of the metrics server.
        metrics_bind_address: String,
        /// A server that cannot listen is fatal.
        bind_address_hard_fail: bool,
        /// Serve profiles.
        enable_profiling: bool,
        /// Go on showing metrics that this version hides.
        show_hidden_metrics_for_version: String,
        /// `iptables`, `ipvs`, `nftables`.
        mode: String,
        /// Mode `iptables`.
        #[serde(rename = "iptables")]
        iptables: Iptables,
        /// Mode `ipvs`.
        ipvs: Ipvs,
        /// Mode `nftables`.
        nftables: Nftables,
        /// Windows only.
        winkernel: Winkernel,
        /// How traffic of local pods is told.
        detect_local_mode: String,
        /// What that mode needs to know.
        detect_local: DetectLocal,
        /// Where pods are: at most one CIDR per family, separated by a comma.
        #[serde(rename = "clusterCIDR")]
        cluster_cidr: String,
        /// CIDRs of the addresses that serve NodePorts, or `primary`.
        node_port_addresses: Vec<String>,
        /// `oom_score_adj` of the process.
        oom_score_adj: Option<i32>,
        /// Settings of the kernel's connection tracking.
        conntrack: Conntrack,
        /// How often everything is looked at again.
        config_sync_period: GoDuration,
        /// Ignored, by kube-proxy, too.
        port_range: String,
        /// Windows only.
        windows_run_as_service: bool,
    }
}

config_type! {
    /// How the API is reached.
    ClientConnection {
        /// Path of a kubeconfig; empty: the service account of the pod.
        kubeconfig: String,
        /// Content types that are accepted.
        accept_content_types: String,
        /// Content type of requests.
        content_type: String,
        /// Requests per second.
        qps: f64,
        /// Requests at once.
        burst: i32,
    }
}

config_type! {
    /// How it logs.
    Logging {
        /// `text` or `json`.
        format: String,
        /// A duration or nanoseconds.
        flush_frequency: Value,
        /// 0 to 10.
        verbosity: u32,
        /// Verbosity by file.
        vmodule: Value,
        /// Options of the formats.
        options: Value,
    }
}

config_type! {
    /// Mode `iptables`.
    Iptables {
        /// Bit of the packet's mark that means "masquerade".
        masquerade_bit: Option<i32>,
        /// Masquerade all traffic to ClusterIPs.
        masquerade_all: bool,
        /// NodePorts on loopback addresses.
        #[serde(rename = "localhostNodePorts")]
        localhost_node_ports: Option<bool>,
        /// Longest time between syncs.
        sync_period: GoDuration,
        /// Shortest time between syncs.
        min_sync_period: GoDuration,
    }
}

config_type! {
    /// Mode `ipvs`.
    Ipvs {
        /// Longest time between syncs.
        sync_period: GoDuration,
        /// Shortest time between syncs.
        min_sync_period: GoDuration,
        /// Scheduler.
        scheduler: String,
        /// CIDRs of virtual servers that are left alone.
        #[serde(rename = "excludeCIDRs")]
        exclude_cidrs: Vec<String>,
        /// Set `arp_ignore` and `arp_announce`.
        #[serde(rename = "strictARP")]
        strict_arp: bool,
        /// Idle time of connections.
        tcp_timeout: GoDuration,
        /// Time after a FIN.
        tcp_fin_timeout: GoDuration,
        /// Idle time of UDP flows.
        udp_timeout: GoDuration,
    }
}

config_type! {
    /// Mode `nftables`.
    Nftables {
        /// Bit of the packet's mark that means "masquerade".
        masquerade_bit: Option<i32>,
        /// Masquerade all traffic to ClusterIPs.
        masquerade_all: bool,
        /// Longest time between syncs.
        sync_period: GoDuration,
        /// Shortest time between syncs.
        min_sync_period: GoDuration,
    }
}

config_type! {
    /// Windows only.
    Winkernel {
        /// Network of the HNS.
        network_name: String,
        /// Source address.
        source_vip: String,
        /// Direct server return.
        #[serde(rename = "enableDSR")]
        enable_dsr: bool,
        /// Endpoint of the root namespace.
        root_hns_endpoint_name: String,
        /// Forward health checks.
        forward_health_check_vip: bool,
    }
}

config_type! {
    /// What `detectLocalMode` needs to know.
    DetectLocal {
        /// Mode `BridgeInterface`.
        bridge_interface: String,
        /// Mode `InterfaceNamePrefix`.
        interface_name_prefix: String,
    }
}

config_type! {
    /// Settings of the kernel's connection tracking. Zero leaves a setting as it is.
    Conntrack {
        /// Connections per processor.
        max_per_core: Option<i32>,
        /// Connections at the least.
        min: Option<i32>,
        /// Idle time of established TCP connections.
        tcp_established_timeout: Option<GoDuration>,
        /// Time in CLOSE_WAIT.
        tcp_close_wait_timeout: Option<GoDuration>,
        /// Do not take packets outside of the window for invalid.
        tcp_be_liberal: bool,
        /// Idle time of UDP flows without a reply.
        udp_timeout: GoDuration,
        /// Idle time of UDP flows with one.
        udp_stream_timeout: GoDuration,
    }
}
