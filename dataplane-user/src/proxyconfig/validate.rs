//! What a configuration must not say (spec kube-proxy 5).

use std::net::{IpAddr, SocketAddr};

use ipnet::IpNet;

use super::{GoDuration, KubeProxyConfiguration};

/// `nodePortAddresses`: the node's own addresses, as its Node object says.
const PRIMARY: &str = "primary";

/// Every reason why the configuration, with defaults filled in, cannot be used: field, value, rule.
#[must_use]
pub fn validate(config: &KubeProxyConfiguration) -> Vec<String> {
    let mut errors = Vec::new();
    let mut check = |ok: bool, field: &str, value: &dyn std::fmt::Display, rule: &str| {
        if !ok {
            errors.push(format!("{field}: {value}: {rule}"));
        }
    };
    let zero = GoDuration::default();
    let positive = "must be greater than 0";
    let natural = "must not be negative";

    let mut periods = vec![
        (
            "iptables",
            config.iptables.sync_period,
            config.iptables.min_sync_period,
        ),
        (
            "nftables",
            config.nftables.sync_period,
            config.nftables.min_sync_period,
        ),
    ];
    if config.mode == "ipvs" {
        periods.push(("ipvs", config.ipvs.sync_period, config.ipvs.min_sync_period));
    }
    for (mode, sync, min) in periods {
        check(sync > zero, &format!("{mode}.syncPeriod"), &sync, positive);
        let field = format!("{mode}.minSyncPeriod");
        check(min >= zero, &field, &min, natural);
        check(
            sync <= zero || min <= sync,
            &field,
            &min,
            &format!("must not be greater than {mode}.syncPeriod"),
        );
    }
    check(
        config.config_sync_period > zero,
        "configSyncPeriod",
        &config.config_sync_period,
        positive,
    );
    for (field, bit) in [
        ("iptables.masqueradeBit", config.iptables.masquerade_bit),
        ("nftables.masqueradeBit", config.nftables.masquerade_bit),
    ] {
        let bit = bit.unwrap_or_default();
        check((0..=31).contains(&bit), field, &bit, "must be within 0 to 31");
    }
    let oom = config.oom_score_adj.unwrap_or_default();
    check(
        (-1000..=1000).contains(&oom),
        "oomScoreAdj",
        &oom,
        "must be within -1000 to 1000",
    );
    let client = &config.client_connection;
    check(
        client.burst >= 0,
        "clientConnection.burst",
        &client.burst,
        natural,
    );

    check(
        ["", "iptables", "ipvs", "nftables", "ebpf"].contains(&config.mode.as_str()),
        "mode",
        &config.mode,
        "must be iptables, ipvs or nftables",
    );
    check(
        config.bind_address.parse::<IpAddr>().is_ok(),
        "bindAddress",
        &config.bind_address,
        "must be an IP address",
    );
    for (field, addr) in [
        ("healthzBindAddress", &config.healthz_bind_address),
        ("metricsBindAddress", &config.metrics_bind_address),
    ] {
        let ok = addr.is_empty() || addr.parse::<SocketAddr>().is_ok();
        check(ok, field, addr, "must be IP:port");
    }

    check(
        [
            "",
            "ClusterCIDR",
            "NodeCIDR",
            "BridgeInterface",
            "InterfaceNamePrefix",
        ]
        .contains(&config.detect_local_mode.as_str()),
        "detectLocalMode",
        &config.detect_local_mode,
        "must be ClusterCIDR, NodeCIDR, BridgeInterface or InterfaceNamePrefix",
    );
    for (mode, field, value) in [
        (
            "BridgeInterface",
            "detectLocal.bridgeInterface",
            &config.detect_local.bridge_interface,
        ),
        (
            "InterfaceNamePrefix",
            "detectLocal.interfaceNamePrefix",
            &config.detect_local.interface_name_prefix,
        ),
    ] {
        let ok = config.detect_local_mode != mode || !value.is_empty();
        check(
            ok,
            field,
            &"\"\"",
            &format!("must be given with detectLocalMode {mode}"),
        );
    }
    if !config.cluster_cidr.is_empty() {
        let nets: Vec<Option<IpNet>> = config.cluster_cidr.split(',').map(cidr).collect();
        let well_formed = nets.iter().all(Option::is_some);
        check(
            well_formed,
            "clusterCIDR",
            &config.cluster_cidr,
            "must be a CIDR, or two separated by a comma",
        );
        let families: Vec<bool> = nets.iter().flatten().map(|net| net.addr().is_ipv4()).collect();
        let distinct = families.len() <= 1 || families.len() == 2 && families[0] != families[1];
        check(
            distinct,
            "clusterCIDR",
            &config.cluster_cidr,
            "must not have more than one CIDR of each family",
        );
    }
    let addresses = &config.node_port_addresses;
    if addresses.iter().any(|address| address == PRIMARY) {
        let alone = addresses.len() == 1;
        check(
            alone,
            "nodePortAddresses",
            &addresses.join(","),
            "primary cannot be combined with CIDRs",
        );
    } else {
        for address in addresses {
            check(
                cidr(address).is_some(),
                "nodePortAddresses",
                address,
                "must be a CIDR or primary",
            );
        }
    }

    let conntrack = &config.conntrack;
    for (field, value) in [
        ("conntrack.maxPerCore", conntrack.max_per_core),
        ("conntrack.min", conntrack.min),
    ] {
        let value = value.unwrap_or_default();
        check(value >= 0, field, &value, natural);
    }
    for (field, value) in [
        (
            "conntrack.tcpEstablishedTimeout",
            conntrack.tcp_established_timeout.unwrap_or_default(),
        ),
        (
            "conntrack.tcpCloseWaitTimeout",
            conntrack.tcp_close_wait_timeout.unwrap_or_default(),
        ),
        ("conntrack.udpTimeout", conntrack.udp_timeout),
        ("conntrack.udpStreamTimeout", conntrack.udp_stream_timeout),
        ("ipvs.tcpTimeout", config.ipvs.tcp_timeout),
        ("ipvs.tcpFinTimeout", config.ipvs.tcp_fin_timeout),
        ("ipvs.udpTimeout", config.ipvs.udp_timeout),
    ] {
        check(value >= zero, field, &value, natural);
    }
    errors
}

/// A CIDR; host bits may be set.
fn cidr(text: &str) -> Option<IpNet> {
    text.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_rule_names_its_field() {
        assert_eq!(validate(&KubeProxyConfiguration::defaults()), [""; 0]);
        type Change = fn(&mut KubeProxyConfiguration);
        let bad: &[(&str, Change)] = &[
            ("iptables.syncPeriod: -1s", |c| {
                c.iptables.sync_period = GoDuration::from_secs(-1);
            }),
            ("nftables.minSyncPeriod: -1s", |c| {
                c.nftables.min_sync_period = GoDuration::from_secs(-1);
            }),
            ("iptables.minSyncPeriod: 31s", |c| {
                c.iptables.min_sync_period = GoDuration::from_secs(31);
            }),
            ("ipvs.minSyncPeriod: 1m0s", |c| {
                c.mode = "ipvs".into();
                c.ipvs.min_sync_period = GoDuration::from_secs(60);
            }),
            ("configSyncPeriod: -5s", |c| {
                c.config_sync_period = GoDuration::from_secs(-5);
            }),
            ("iptables.masqueradeBit: 32", |c| {
                c.iptables.masquerade_bit = Some(32);
            }),
            ("oomScoreAdj: -1001", |c| c.oom_score_adj = Some(-1001)),
            ("clientConnection.burst: -1", |c| c.client_connection.burst = -1),
            ("mode: userspace", |c| c.mode = "userspace".into()),
            ("bindAddress: node-1", |c| c.bind_address = "node-1".into()),
            ("healthzBindAddress: :80", |c| {
                c.healthz_bind_address = ":80".into();
            }),
            ("metricsBindAddress: 1.2.3.4:99999", |c| {
                c.metrics_bind_address = "1.2.3.4:99999".into();
            }),
            ("detectLocalMode: Pods", |c| c.detect_local_mode = "Pods".into()),
            ("detectLocal.bridgeInterface: \"\"", |c| {
                c.detect_local_mode = "BridgeInterface".into();
            }),
            ("detectLocal.interfaceNamePrefix: \"\"", |c| {
                c.detect_local_mode = "InterfaceNamePrefix".into();
            }),
            ("clusterCIDR: 10.0.0.0", |c| c.cluster_cidr = "10.0.0.0".into()),
            ("clusterCIDR: 10.0.0.0/8,10.1.0.0/16", |c| {
                c.cluster_cidr = "10.0.0.0/8,10.1.0.0/16".into();
            }),
            ("nodePortAddresses: x", |c| {
                c.node_port_addresses = vec!["x".into()];
            }),
            ("nodePortAddresses: primary,10.0.0.0/8", |c| {
                c.node_port_addresses = vec!["primary".into(), "10.0.0.0/8".into()];
            }),
            ("conntrack.min: -1", |c| c.conntrack.min = Some(-1)),
            ("conntrack.udpTimeout: -1s", |c| {
                c.conntrack.udp_timeout = GoDuration::from_secs(-1);
            }),
        ];
        for (named, change) in bad {
            let mut config = KubeProxyConfiguration::defaults();
            change(&mut config);
            let errors = validate(&config);
            assert_eq!(errors.len(), 1, "{named}: {errors:?}");
            assert!(errors[0].starts_with(named), "{named}: {errors:?}");
        }
        let mut config = KubeProxyConfiguration::defaults();
        config.cluster_cidr = "fd00::/64,10.0.0.0/8".into();
        config.node_port_addresses = vec!["10.0.0.0/8".into(), "::/0".into()];
        config.healthz_bind_address.clear();
        assert_eq!(validate(&config), [""; 0]);
    }
}
