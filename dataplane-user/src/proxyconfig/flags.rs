//! kube-proxy's flags that stand for fields of its configuration. Without `--config` they fill it; with it they are
//! ignored, as kube-proxy ignores them.

use clap::Args;

use super::{GoDuration, KubeProxyConfiguration};

/// Heading in the help.
const HEADING: &str = "kube-proxy's flags (ignored with --config)";

macro_rules! flags {
    ($($(#[$meta:meta])* $flag:literal $field:ident: $type:ty,)*) => {
        /// Flags with kube-proxy's names. `None`: not given.
        #[derive(Clone, Debug, Default, Args)]
        pub struct ProxyFlags {
            $(
                $(#[$meta])*
                #[arg(long = $flag, help_heading = HEADING)]
                $field: Option<$type>,
            )*
        }

        impl ProxyFlags {
            /// The flags that were given.
            #[must_use]
            pub fn given(&self) -> Vec<&'static str> {
                let mut out = Vec::new();
                $(
                    if self.$field.is_some() {
                        out.push(concat!("--", $flag));
                    }
                )*
                out
            }
        }
    };
}

flags! {
    /// IP address that overrides the node's address of its family; nothing is bound to it
    "bind-address" bind_address: String,
    /// Where /healthz and /livez are served: IP:port, or an IP that gets port 10256; "" does not serve them [default: 0.0.0.0:10256]
    "healthz-bind-address" healthz_bind_address: String,
    /// Where /metrics, /proxyMode and /configz are served: IP:port, or an IP that gets port 10249; "" does not serve them [default: 127.0.0.1:10249]
    "metrics-bind-address" metrics_bind_address: String,
    /// Port of the health server; 0 does not serve it. Deprecated, use --healthz-bind-address
    #[arg(hide = true)]
    "healthz-port" healthz_port: u16,
    /// Port of the metrics server; 0 does not serve it. Deprecated, use --metrics-bind-address
    #[arg(hide = true)]
    "metrics-port" metrics_port: u16,
    /// A server that cannot listen is fatal, instead of being tried again
    #[arg(num_args = 0..=1, default_missing_value = "true", require_equals = true)]
    "bind-address-hard-fail" bind_address_hard_fail: bool,
    /// Accepted, without effect: Beeline has one dataplane
    "proxy-mode" proxy_mode: String,
    /// Addresses that serve NodePorts: CIDRs separated by commas, or `primary`: the addresses of the Node object [default: primary]
    "nodeport-addresses" nodeport_addresses: String,
    /// Where pods are: a CIDR, or two (IPv4 and IPv6) separated by a comma
    "cluster-cidr" cluster_cidr: String,
    /// How traffic of this node's pods is told: ClusterCIDR, NodeCIDR, BridgeInterface, InterfaceNamePrefix
    "detect-local-mode" detect_local_mode: String,
    /// Bridge of the pods, for BridgeInterface
    "pod-bridge-interface" pod_bridge_interface: String,
    /// How names of the pods' devices begin, for InterfaceNamePrefix
    "pod-interface-name-prefix" pod_interface_name_prefix: String,
    /// Masquerade all traffic to ClusterIPs
    #[arg(num_args = 0..=1, default_missing_value = "true", require_equals = true)]
    "masquerade-all" masquerade_all: bool,
    /// oom_score_adj of the agent, -1000 to 1000 [default: -999]
    #[arg(allow_negative_numbers = true)]
    "oom-score-adj" oom_score_adj: i32,
    /// Tracked connections per processor; 0 leaves the kernel's limit as it is [default: 32768]
    #[arg(allow_negative_numbers = true)]
    "conntrack-max-per-core" conntrack_max_per_core: i32,
    /// Tracked connections at the least, whatever --conntrack-max-per-core says [default: 131072]
    #[arg(allow_negative_numbers = true)]
    "conntrack-min" conntrack_min: i32,
    /// Idle time of established TCP connections; 0 leaves it as it is [default: 24h]
    "conntrack-tcp-timeout-established" conntrack_tcp_timeout_established: GoDuration,
    /// Time of TCP connections in CLOSE_WAIT; 0 leaves it as it is [default: 1h]
    "conntrack-tcp-timeout-close-wait" conntrack_tcp_timeout_close_wait: GoDuration,
    /// Do not take packets outside of the window for invalid
    #[arg(num_args = 0..=1, default_missing_value = "true", require_equals = true)]
    "conntrack-tcp-be-liberal" conntrack_tcp_be_liberal: bool,
    /// Idle time of UDP flows without a reply; 0 leaves it as it is
    "conntrack-udp-timeout" conntrack_udp_timeout: GoDuration,
    /// Idle time of UDP flows with replies; 0 leaves it as it is
    "conntrack-udp-timeout-stream" conntrack_udp_timeout_stream: GoDuration,
    /// A node is unhealthy when a change waits for twice this time [default: 30s]
    "iptables-sync-period" iptables_sync_period: GoDuration,
    /// Accepted, without effect
    #[arg(hide = true)]
    "iptables-min-sync-period" iptables_min_sync_period: GoDuration,
    /// Bit of a packet's mark that asks for masquerade, 0 to 31 [default: 14]
    #[arg(allow_negative_numbers = true)]
    "iptables-masquerade-bit" iptables_masquerade_bit: i32,
    /// Processes of the host reach NodePorts at 127.0.0.1 and ::1, in every mode [default: true]
    #[arg(num_args = 0..=1, default_missing_value = "true", require_equals = true)]
    "iptables-localhost-nodeports" iptables_localhost_nodeports: bool,
    /// As --iptables-sync-period, for --proxy-mode=ipvs
    #[arg(hide = true)]
    "ipvs-sync-period" ipvs_sync_period: GoDuration,
    /// Accepted, without effect
    #[arg(hide = true)]
    "ipvs-min-sync-period" ipvs_min_sync_period: GoDuration,
    /// With --proxy-mode=ipvs and without --algorithm, the algorithm that comes nearest
    #[arg(hide = true)]
    "ipvs-scheduler" ipvs_scheduler: String,
    /// Accepted, without effect
    #[arg(hide = true)]
    "ipvs-exclude-cidrs" ipvs_exclude_cidrs: String,
    /// Accepted, without effect
    #[arg(hide = true, num_args = 0..=1, default_missing_value = "true", require_equals = true)]
    "ipvs-strict-arp" ipvs_strict_arp: bool,
    /// Accepted, without effect
    #[arg(hide = true)]
    "ipvs-tcp-timeout" ipvs_tcp_timeout: GoDuration,
    /// Accepted, without effect
    #[arg(hide = true)]
    "ipvs-tcpfin-timeout" ipvs_tcpfin_timeout: GoDuration,
    /// Accepted, without effect
    #[arg(hide = true)]
    "ipvs-udp-timeout" ipvs_udp_timeout: GoDuration,
    /// Accepted, without effect: every change is watched
    #[arg(hide = true)]
    "config-sync-period" config_sync_period: GoDuration,
    /// Serve /debug/flags/v beside /metrics, to change the verbosity; there are no profiles
    #[arg(num_args = 0..=1, default_missing_value = "true", require_equals = true)]
    "profiling" profiling: bool,
    /// AllowServiceExternalIPs=false leaves spec.externalIPs out; others have no effect
    #[arg(hide = true)]
    "feature-gates" feature_gates: String,
    /// Accepted, without effect
    #[arg(hide = true)]
    "show-hidden-metrics-for-version" show_hidden_metrics_for_version: String,
    /// Accepted, without effect
    #[arg(hide = true)]
    "kube-api-content-type" kube_api_content_type: String,
    /// Accepted, without effect
    #[arg(hide = true)]
    "kube-api-qps" kube_api_qps: f64,
    /// Accepted, without effect
    #[arg(hide = true, allow_negative_numbers = true)]
    "kube-api-burst" kube_api_burst: i32,
}

fn set<T: Clone>(field: &mut T, flag: Option<&T>) {
    if let Some(value) = flag {
        field.clone_from(value);
    }
}

fn list(flag: &str) -> Vec<String> {
    let items = flag.split(',').map(|item| item.trim().to_owned());
    items.filter(|item| !item.is_empty()).collect()
}

impl ProxyFlags {
    /// Puts the flags that were given into a configuration that has kube-proxy's defaults.
    ///
    /// # Errors
    ///
    /// A flag whose value cannot be understood, by name.
    pub fn apply(&self, config: &mut KubeProxyConfiguration) -> Result<(), String> {
        set(&mut config.bind_address, self.bind_address.as_ref());
        if self.bind_address.is_some() {
            // the servers' defaults follow its family
            config.healthz_bind_address.clear();
            config.metrics_bind_address.clear();
            config.set_defaults();
        }
        set(
            &mut config.healthz_bind_address,
            self.healthz_bind_address.as_ref(),
        );
        set(
            &mut config.metrics_bind_address,
            self.metrics_bind_address.as_ref(),
        );
        for (field, port) in [
            (&mut config.healthz_bind_address, self.healthz_port),
            (&mut config.metrics_bind_address, self.metrics_port),
        ] {
            match port {
                None => {}
                Some(0) => field.clear(),
                Some(port) => {
                    let host = field.rsplit_once(':').map_or(field.as_str(), |(host, _)| host);
                    *field = format!("{host}:{port}");
                }
            }
        }
        set(
            &mut config.bind_address_hard_fail,
            self.bind_address_hard_fail.as_ref(),
        );
        set(&mut config.mode, self.proxy_mode.as_ref());
        set(&mut config.cluster_cidr, self.cluster_cidr.as_ref());
        set(&mut config.detect_local_mode, self.detect_local_mode.as_ref());
        set(
            &mut config.detect_local.bridge_interface,
            self.pod_bridge_interface.as_ref(),
        );
        set(
            &mut config.detect_local.interface_name_prefix,
            self.pod_interface_name_prefix.as_ref(),
        );
        if let Some(addresses) = &self.nodeport_addresses {
            config.node_port_addresses = list(addresses);
        }
        set(&mut config.iptables.masquerade_all, self.masquerade_all.as_ref());
        set(&mut config.nftables.masquerade_all, self.masquerade_all.as_ref());
        if self.oom_score_adj.is_some() {
            config.oom_score_adj = self.oom_score_adj;
        }
        self.apply_conntrack(config);
        for mode in [&mut config.iptables.sync_period, &mut config.nftables.sync_period] {
            set(mode, self.iptables_sync_period.as_ref());
        }
        for mode in [
            &mut config.iptables.min_sync_period,
            &mut config.nftables.min_sync_period,
        ] {
            set(mode, self.iptables_min_sync_period.as_ref());
        }
        for bit in [
            &mut config.iptables.masquerade_bit,
            &mut config.nftables.masquerade_bit,
        ] {
            if self.iptables_masquerade_bit.is_some() {
                *bit = self.iptables_masquerade_bit;
            }
        }
        if self.iptables_localhost_nodeports.is_some() {
            config.iptables.localhost_node_ports = self.iptables_localhost_nodeports;
        }
        self.apply_ipvs(config);
        set(&mut config.config_sync_period, self.config_sync_period.as_ref());
        set(&mut config.enable_profiling, self.profiling.as_ref());
        for gate in list(self.feature_gates.as_deref().unwrap_or_default()) {
            let parsed = gate
                .split_once('=')
                .and_then(|(name, on)| Some((name, on.parse().ok()?)));
            let (name, on) =
                parsed.ok_or_else(|| format!("--feature-gates {gate}: is not NAME=true or NAME=false"))?;
            config.feature_gates.insert(name.into(), on);
        }
        set(
            &mut config.show_hidden_metrics_for_version,
            self.show_hidden_metrics_for_version.as_ref(),
        );
        let client = &mut config.client_connection;
        set(&mut client.content_type, self.kube_api_content_type.as_ref());
        set(&mut client.qps, self.kube_api_qps.as_ref());
        set(&mut client.burst, self.kube_api_burst.as_ref());
        // an address without a port gets one; what was emptied on purpose stays so
        let emptied = (
            config.healthz_bind_address.is_empty(),
            config.metrics_bind_address.is_empty(),
        );
        config.set_defaults();
        if emptied.0 {
            config.healthz_bind_address.clear();
        }
        if emptied.1 {
            config.metrics_bind_address.clear();
        }
        Ok(())
    }

    fn apply_conntrack(&self, config: &mut KubeProxyConfiguration) {
        let conntrack = &mut config.conntrack;
        if self.conntrack_max_per_core.is_some() {
            conntrack.max_per_core = self.conntrack_max_per_core;
        }
        if self.conntrack_min.is_some() {
            conntrack.min = self.conntrack_min;
        }
        if self.conntrack_tcp_timeout_established.is_some() {
            conntrack.tcp_established_timeout = self.conntrack_tcp_timeout_established;
        }
        if self.conntrack_tcp_timeout_close_wait.is_some() {
            conntrack.tcp_close_wait_timeout = self.conntrack_tcp_timeout_close_wait;
        }
        set(
            &mut conntrack.tcp_be_liberal,
            self.conntrack_tcp_be_liberal.as_ref(),
        );
        set(&mut conntrack.udp_timeout, self.conntrack_udp_timeout.as_ref());
        set(
            &mut conntrack.udp_stream_timeout,
            self.conntrack_udp_timeout_stream.as_ref(),
        );
    }

    fn apply_ipvs(&self, config: &mut KubeProxyConfiguration) {
        let ipvs = &mut config.ipvs;
        set(&mut ipvs.sync_period, self.ipvs_sync_period.as_ref());
        set(&mut ipvs.min_sync_period, self.ipvs_min_sync_period.as_ref());
        set(&mut ipvs.scheduler, self.ipvs_scheduler.as_ref());
        if let Some(cidrs) = &self.ipvs_exclude_cidrs {
            ipvs.exclude_cidrs = list(cidrs);
        }
        set(&mut ipvs.strict_arp, self.ipvs_strict_arp.as_ref());
        set(&mut ipvs.tcp_timeout, self.ipvs_tcp_timeout.as_ref());
        set(&mut ipvs.tcp_fin_timeout, self.ipvs_tcpfin_timeout.as_ref());
        set(&mut ipvs.udp_timeout, self.ipvs_udp_timeout.as_ref());
    }
}
