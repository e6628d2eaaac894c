//! What is not said (spec kube-proxy 5). A zero of most fields means "not said", because Go cannot tell.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use dataplane_common::abi::algorithm;
use ipnet::IpNet;

use super::{API_VERSION, GoDuration, KIND, KubeProxyConfiguration};

/// Port of the health server.
pub(super) const HEALTH_PORT: u16 = 10256;
/// The feature gate that has a meaning here.
pub(super) const EXTERNAL_IPS_GATE: &str = "AllowServiceExternalIPs";
/// Port of the metrics server.
pub(super) const METRICS_PORT: u16 = 10249;

fn text(field: &mut String, default: &str) {
    if field.is_empty() {
        default.clone_into(field);
    }
}

fn duration(field: &mut GoDuration, seconds: i64) {
    if field.is_zero() {
        *field = GoDuration::from_secs(seconds);
    }
}

impl KubeProxyConfiguration {
    /// Fills in kube-proxy's defaults.
    pub fn set_defaults(&mut self) {
        text(&mut self.api_version, API_VERSION);
        text(&mut self.kind, KIND);
        text(&mut self.bind_address, "0.0.0.0");
        let v6 = self.bind_address.parse::<IpAddr>().is_ok_and(|ip| ip.is_ipv6());
        let (any, local) = if v6 {
            ("[::]", "[::1]")
        } else {
            ("0.0.0.0", "127.0.0.1")
        };
        text(&mut self.healthz_bind_address, any);
        text(&mut self.metrics_bind_address, local);
        append_port(&mut self.healthz_bind_address, HEALTH_PORT);
        append_port(&mut self.metrics_bind_address, METRICS_PORT);

        let client = &mut self.client_connection;
        text(&mut client.content_type, "application/vnd.kubernetes.protobuf");
        if client.qps == 0.0 {
            client.qps = 5.0;
        }
        if client.burst == 0 {
            client.burst = 10;
        }
        text(&mut self.logging.format, "text");
        if self.logging.flush_frequency.is_null() {
            self.logging.flush_frequency = "5s".into();
        }

        self.iptables.masquerade_bit.get_or_insert(14);
        self.iptables.localhost_node_ports.get_or_insert(true);
        duration(&mut self.iptables.sync_period, 30);
        duration(&mut self.iptables.min_sync_period, 1);
        duration(&mut self.ipvs.sync_period, 30);
        self.nftables.masquerade_bit.get_or_insert(14);
        duration(&mut self.nftables.sync_period, 30);
        duration(&mut self.nftables.min_sync_period, 1);
        duration(&mut self.config_sync_period, 15 * 60);
        self.oom_score_adj.get_or_insert(-999);

        let conntrack = &mut self.conntrack;
        conntrack.max_per_core.get_or_insert(32_768);
        conntrack.min.get_or_insert(131_072);
        conntrack
            .tcp_established_timeout
            .get_or_insert(GoDuration::from_secs(24 * 3600));
        conntrack
            .tcp_close_wait_timeout
            .get_or_insert(GoDuration::from_secs(3600));
    }

    /// kube-proxy's configuration where nothing is said.
    #[must_use]
    pub fn defaults() -> Self {
        let mut config = Self::default();
        config.set_defaults();
        config
    }

    /// The sync period of the mode that is asked for.
    #[must_use]
    pub fn sync_period(&self) -> Duration {
        match self.mode.as_str() {
            "ipvs" => self.ipvs.sync_period,
            "nftables" => self.nftables.sync_period,
            _ => self.iptables.sync_period,
        }
        .to_std()
    }

    /// The algorithm ([`algorithm`]) that comes nearest to the scheduler of mode `ipvs`; `None` if that is not the mode, or
    /// there is none like it.
    #[must_use]
    pub fn algorithm(&self) -> Option<u32> {
        if self.mode != "ipvs" {
            return None;
        }
        match self.ipvs.scheduler.as_str() {
            // what kube-proxy takes where nothing is said
            "" | "rr" | "wrr" => Some(algorithm::ROUND_ROBIN),
            "lc" | "wlc" | "sed" | "nq" => Some(algorithm::LEAST_CONN),
            "sh" => Some(algorithm::SOURCE_HASH),
            "mh" => Some(algorithm::MAGLEV),
            _ => None,
        }
    }

    /// Whether `spec.externalIPs` of Services are served (feature gate `AllowServiceExternalIPs`).
    #[must_use]
    pub fn external_ips(&self) -> bool {
        self.feature_gates.get(EXTERNAL_IPS_GATE).copied().unwrap_or(true)
    }

    /// Whether all traffic to ClusterIPs is to be masqueraded, in the mode that is asked for.
    #[must_use]
    pub fn masquerade_all(&self) -> bool {
        match self.mode.as_str() {
            "nftables" => self.nftables.masquerade_all,
            _ => self.iptables.masquerade_all,
        }
    }

    /// The ranges of pods of the whole cluster, as far as they are readable.
    #[must_use]
    pub fn cluster_cidrs(&self) -> Vec<IpNet> {
        let texts = self.cluster_cidr.split(',');
        texts.filter_map(|text| text.trim().parse().ok()).collect()
    }

    /// The bit of a packet's mark that asks for masquerade, in the mode that is asked for. 0 is bit 0.
    #[must_use]
    pub fn masquerade_mark(&self) -> u32 {
        let bit = match self.mode.as_str() {
            "nftables" => self.nftables.masquerade_bit,
            _ => self.iptables.masquerade_bit,
        };
        let bit = bit.and_then(|bit| u32::try_from(bit).ok()).unwrap_or(14);
        1_u32.checked_shl(bit).unwrap_or(1 << 14)
    }

    /// Whether host processes reach node ports at 127.0.0.1 and ::1. Beeline does that in sockets, without
    /// `route_localnet`, so it is not bound to the iptables mode.
    #[must_use]
    pub fn localhost_node_ports(&self) -> bool {
        self.iptables.localhost_node_ports.unwrap_or(true)
    }
}

/// An address without a port gets one.
fn append_port(field: &mut String, port: u16) {
    let bare = field.strip_prefix('[').and_then(|text| text.strip_suffix(']'));
    if let Ok(ip) = bare.unwrap_or(field).parse::<IpAddr>() {
        *field = SocketAddr::from((ip, port)).to_string();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn defaults_are_kube_proxys() {
        let found = serde_json::to_value(KubeProxyConfiguration::defaults()).unwrap();
        let expected = serde_json::json!({
            "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
            "kind": "KubeProxyConfiguration",
            "featureGates": {},
            "clientConnection": {"kubeconfig": "", "acceptContentTypes": "",
                "contentType": "application/vnd.kubernetes.protobuf", "qps": 5.0, "burst": 10},
            "logging": {"format": "text", "flushFrequency": "5s", "verbosity": 0, "vmodule": null, "options": null},
            "hostnameOverride": "",
            "bindAddress": "0.0.0.0",
            "healthzBindAddress": "0.0.0.0:10256",
            "metricsBindAddress": "127.0.0.1:10249",
            "bindAddressHardFail": false,
            "enableProfiling": false,
            "showHiddenMetricsForVersion": "",
            "mode": "",
            "iptables": {"masqueradeBit": 14, "masqueradeAll": false, "localhostNodePorts": true,
                "syncPeriod": "30s", "minSyncPeriod": "1s"},
            "ipvs": {"syncPeriod": "30s", "minSyncPeriod": "0s", "scheduler": "", "excludeCIDRs": [],
                "strictARP": false, "tcpTimeout": "0s", "tcpFinTimeout": "0s", "udpTimeout": "0s"},
            "nftables": {"masqueradeBit": 14, "masqueradeAll": false, "syncPeriod": "30s", "minSyncPeriod": "1s"},
            "winkernel": {"networkName": "", "sourceVip": "", "enableDSR": false, "rootHnsEndpointName": "",
                "forwardHealthCheckVip": false},
            "detectLocalMode": "",
            "detectLocal": {"bridgeInterface": "", "interfaceNamePrefix": ""},
            "clusterCIDR": "",
            "nodePortAddresses": [],
            "oomScoreAdj": -999,
            "conntrack": {"maxPerCore": 32768, "min": 131_072, "tcpEstablishedTimeout": "24h0m0s",
                "tcpCloseWaitTimeout": "1h0m0s", "tcpBeLiberal": false, "udpTimeout": "0s", "udpStreamTimeout": "0s"},
            "configSyncPeriod": "15m0s",
            "portRange": "",
            "windowsRunAsService": false,
        });
        assert_eq!(found, expected);
    }

    #[test]
    fn addresses_follow_the_family_of_the_bind_address_and_get_a_port() {
        for (bind, health, metrics, expected) in [
            ("::", "", "", ("[::]:10256", "[::1]:10249")),
            ("10.0.0.1", "", "", ("0.0.0.0:10256", "127.0.0.1:10249")),
            ("", "1.2.3.4", "[::1]", ("1.2.3.4:10256", "[::1]:10249")),
            ("", "::1", "1.2.3.4:5", ("[::1]:10256", "1.2.3.4:5")),
        ] {
            let mut config = KubeProxyConfiguration {
                bind_address: bind.into(),
                healthz_bind_address: health.into(),
                metrics_bind_address: metrics.into(),
                ..KubeProxyConfiguration::default()
            };
            config.set_defaults();
            assert_eq!(
                (&*config.healthz_bind_address, &*config.metrics_bind_address),
                expected
            );
        }
    }
}
