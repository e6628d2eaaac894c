//! What a configuration asks for and this dataplane does not do.

use serde_json::Value;

use super::KubeProxyConfiguration;
use super::defaults::EXTERNAL_IPS_GATE;

/// Fields that have no meaning here, as JSON pointers.
const UNSUPPORTED: &[&str] = &[
    "/clientConnection/acceptContentTypes",
    "/clientConnection/qps",
    "/clientConnection/burst",
    "/showHiddenMetricsForVersion",
    "/mode",
    "/iptables/minSyncPeriod",
    "/ipvs/minSyncPeriod",
    "/ipvs/excludeCIDRs",
    "/ipvs/strictARP",
    "/ipvs/tcpTimeout",
    "/ipvs/tcpFinTimeout",
    "/ipvs/udpTimeout",
    "/nftables/minSyncPeriod",
    "/configSyncPeriod",
    "/logging/vmodule",
    "/portRange",
    "/winkernel",
    "/windowsRunAsService",
];

/// Fields that are set to something else than kube-proxy's default and have no meaning here, with their values.
#[must_use]
pub fn unsupported(config: &KubeProxyConfiguration) -> Vec<String> {
    let mut found = differing(config, UNSUPPORTED);
    for (gate, on) in &config.feature_gates {
        if gate != EXTERNAL_IPS_GATE {
            found.push(format!("featureGates.{gate} ({on})"));
        }
    }
    if !config.ipvs.scheduler.is_empty() && config.algorithm().is_none() {
        found.push(format!("ipvs.scheduler ({:?})", config.ipvs.scheduler));
    }
    // objects are read as JSON whatever is asked for; the default, protobuf, goes without saying
    let content_type = config.client_connection.content_type.as_str();
    if !["application/vnd.kubernetes.protobuf", "application/json"].contains(&content_type) {
        found.push(format!("clientConnection.contentType ({content_type:?})"));
    }
    found
}

fn differing(config: &KubeProxyConfiguration, fields: &[&str]) -> Vec<String> {
    let value = |config: &KubeProxyConfiguration| serde_json::to_value(config).unwrap_or(Value::Null);
    let (found, default) = (value(config), value(&KubeProxyConfiguration::defaults()));
    fields
        .iter()
        .filter_map(|field| {
            let value = found.pointer(field)?;
            (default.pointer(field) != Some(value)).then(|| {
                let name = field.trim_start_matches('/').replace('/', ".");
                format!("{name} ({value})")
            })
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_has_no_meaning_is_named_with_its_value() {
        let mut config = KubeProxyConfiguration::defaults();
        assert_eq!(unsupported(&config), [""; 0]);
        config.mode = "ipvs".into();
        config.ipvs.scheduler = "mh".into();
        for gate in ["A", EXTERNAL_IPS_GATE] {
            config.feature_gates.insert(gate.into(), true);
        }
        config.conntrack.min = Some(1);
        config.client_connection.content_type = "text/plain".into();
        config.detect_local.bridge_interface = "br0".into();
        assert_eq!(
            unsupported(&config),
            [
                r#"mode ("ipvs")"#,
                "featureGates.A (true)",
                r#"clientConnection.contentType ("text/plain")"#,
            ]
        );
        config.ipvs.scheduler = "dh".into();
        let all = unsupported(&config);
        assert!(all.contains(&r#"ipvs.scheduler ("dh")"#.to_owned()), "{all:?}");
    }

    #[test]
    fn every_pointer_leads_somewhere() {
        let default = serde_json::to_value(KubeProxyConfiguration::defaults()).unwrap();
        for field in UNSUPPORTED {
            assert!(default.pointer(field).is_some(), "{field}");
        }
    }
}
