//! Reading the file.

use std::path::{Path, PathBuf};

use serde_json::Value;
use serde_saphyr::options::DuplicateKeyPolicy;

use super::{API_VERSION, KIND, KubeProxyConfiguration};

/// Why a configuration cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The file cannot be read.
    #[error("cannot read {}: {source}", path.display())]
    Read {
        /// Its path.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// It is no YAML, or a field has the wrong type.
    #[error("cannot understand the configuration: {0}")]
    Syntax(String),
    /// It is something else.
    #[error(
        "the configuration is apiVersion {found_version:?}, kind {found_kind:?}, not {API_VERSION}, {KIND}"
    )]
    Kind {
        /// Its `apiVersion`.
        found_version: String,
        /// Its `kind`.
        found_kind: String,
    },
}

/// A configuration that has been read. No defaults are filled in yet.
#[derive(Clone, PartialEq, Debug)]
pub struct Loaded {
    /// What it says.
    pub config: KubeProxyConfiguration,
    /// What was not strictly right in it, by field.
    pub warnings: Vec<String>,
    /// The text, to notice a change by.
    pub text: String,
}

/// Reads a file.
///
/// # Errors
///
/// If it cannot be read or understood.
pub fn load(path: &Path) -> Result<Loaded, LoadError> {
    let text = std::fs::read_to_string(path).map_err(|source| LoadError::Read {
        path: path.to_owned(),
        source,
    })?;
    parse(text)
}

/// Reads a configuration: strictly; if that fails because of unknown or duplicate fields, leniently with a warning for
/// each, as kube-proxy does.
///
/// # Errors
///
/// If it is no YAML, is of another kind, or a field has the wrong type.
pub fn parse(text: String) -> Result<Loaded, LoadError> {
    let mut warnings = Vec::new();
    let syntax = |error: serde_saphyr::Error| LoadError::Syntax(error.to_string());
    let raw: Value = match serde_saphyr::from_str(&text) {
        Ok(raw) => raw,
        Err(strict) => {
            let raw = serde_saphyr::from_str_with_options(&text, lenient()).map_err(syntax)?;
            let reason = strict.to_string();
            warnings.push(format!(
                "the last of duplicate fields is used: {}",
                first_line(&reason)
            ));
            raw
        }
    };
    let kind = |field: &str| {
        raw.get(field)
            .and_then(Value::as_str)
            .unwrap_or_default()
            .to_owned()
    };
    let (found_version, found_kind) = (kind("apiVersion"), kind("kind"));
    if (found_version.as_str(), found_kind.as_str()) != (API_VERSION, KIND) {
        return Err(LoadError::Kind {
            found_version,
            found_kind,
        });
    }
    let config: KubeProxyConfiguration =
        serde_saphyr::from_str_with_options(&text, lenient()).map_err(syntax)?;
    let known = serde_json::to_value(&config).map_err(|error| LoadError::Syntax(error.to_string()))?;
    unknown("", &raw, &known, &mut warnings);
    Ok(Loaded {
        config,
        warnings,
        text,
    })
}

fn lenient() -> serde_saphyr::Options {
    serde_saphyr::options! { duplicate_keys: DuplicateKeyPolicy::LastWins }
}

fn first_line(text: &str) -> &str {
    text.lines().next().unwrap_or(text)
}

/// Names fields that no such configuration has.
fn unknown(path: &str, raw: &Value, known: &Value, warnings: &mut Vec<String>) {
    if let (Value::Object(raw), Value::Object(known)) = (raw, known) {
        for (name, value) in raw {
            match known.get(name) {
                Some(known) => unknown(&format!("{path}{name}."), value, known, warnings),
                None => warnings.push(format!("unknown field {path}{name} is ignored")),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEAD: &str = "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\n";

    /// What kubeadm writes into its ConfigMap.
    const KUBEADM: &str = r#"apiVersion: kubeproxy.config.k8s.io/v1alpha1
bindAddress: 0.0.0.0
bindAddressHardFail: false
clientConnection:
  acceptContentTypes: ""
  burst: 0
  contentType: ""
  kubeconfig: /var/lib/kube-proxy/kubeconfig.conf
  qps: 0
clusterCIDR: 10.244.0.0/16
configSyncPeriod: 0s
conntrack:
  maxPerCore: null
  min: null
  tcpBeLiberal: false
  tcpCloseWaitTimeout: null
  tcpEstablishedTimeout: null
  udpStreamTimeout: 0s
  udpTimeout: 0s
detectLocal:
  bridgeInterface: ""
  interfaceNamePrefix: ""
detectLocalMode: ""
enableProfiling: false
healthzBindAddress: ""
hostnameOverride: ""
iptables:
  localhostNodePorts: null
  masqueradeAll: false
  masqueradeBit: null
  minSyncPeriod: 0s
  syncPeriod: 0s
ipvs:
  excludeCIDRs: null
  minSyncPeriod: 0s
  scheduler: ""
  strictARP: false
  syncPeriod: 0s
  tcpFinTimeout: 0s
  tcpTimeout: 0s
  udpTimeout: 0s
kind: KubeProxyConfiguration
logging:
  flushFrequency: 0
  options:
    json:
      infoBufferSize: "0"
    text:
      infoBufferSize: "0"
  verbosity: 0
metricsBindAddress: ""
mode: ""
nftables:
  masqueradeAll: false
  masqueradeBit: null
  minSyncPeriod: 0s
  syncPeriod: 0s
nodePortAddresses: null
oomScoreAdj: null
portRange: ""
showHiddenMetricsForVersion: ""
winkernel:
  enableDSR: false
  forwardHealthCheckVip: false
  networkName: ""
  rootHnsEndpointName: ""
  sourceVip: ""
"#;

    #[test]
    fn what_kubeadm_writes_is_the_defaults() {
        let mut loaded = parse(KUBEADM.into()).unwrap();
        assert_eq!(loaded.warnings, [""; 0]);
        loaded.config.set_defaults();
        let mut expected = KubeProxyConfiguration::defaults();
        expected.client_connection.kubeconfig = "/var/lib/kube-proxy/kubeconfig.conf".into();
        expected.cluster_cidr = "10.244.0.0/16".into();
        expected.logging = loaded.config.logging.clone();
        assert_eq!(loaded.config, expected);
    }

    #[test]
    fn every_field_is_read() {
        let mut everything = KubeProxyConfiguration::defaults();
        everything.feature_gates.insert("A".into(), true);
        let mut value = serde_json::to_value(&everything).unwrap();
        /// Changes every leaf to something else of the same type.
        fn change(value: &mut Value) {
            match value {
                Value::Object(fields) => fields.values_mut().for_each(change),
                Value::Bool(b) => *b = !*b,
                Value::Number(n) => *value = (n.as_f64().unwrap() + 1.0).round().into(),
                Value::String(s) if s.ends_with('s') && s.starts_with(|c: char| c.is_ascii_digit()) => {
                    *value = "7s".into();
                }
                Value::String(s) => s.push('x'),
                Value::Array(items) => items.push("10.0.0.0/8".into()),
                Value::Null => {}
            }
        }
        change(&mut value);
        value["apiVersion"] = API_VERSION.into();
        value["kind"] = KIND.into();
        // whole numbers where the type wants them
        let text = value.to_string().replace(".0,", ",").replace(".0}", "}");
        let loaded = parse(text).unwrap();
        assert_eq!(loaded.warnings, [""; 0]);
        let again = serde_json::to_value(&loaded.config).unwrap();
        let original = serde_json::to_value(&everything).unwrap();
        fn leaves(path: String, a: &Value, b: &Value, out: &mut Vec<String>) {
            match (a, b) {
                (Value::Object(a), Value::Object(b)) => {
                    for (name, a) in a {
                        leaves(format!("{path}/{name}"), a, &b[name], out);
                    }
                }
                (a, b) if a == b => out.push(path),
                _ => {}
            }
        }
        let mut same = Vec::new();
        leaves(String::new(), &again, &original, &mut same);
        assert_eq!(
            same,
            ["/apiVersion", "/kind", "/logging/options", "/logging/vmodule"]
        );
    }

    #[test]
    fn unknown_and_duplicate_fields_are_named_and_the_rest_is_used() {
        let text =
            format!("{HEAD}mode: ipvs\nmoed: x\nconntrack: {{min: 5, mni: 6}}\nfeatureGates: {{B: false}}\n");
        let loaded = parse(text).unwrap();
        assert_eq!(
            loaded.warnings,
            [
                "unknown field conntrack.mni is ignored",
                "unknown field moed is ignored"
            ]
        );
        assert_eq!(
            (loaded.config.mode.as_str(), loaded.config.conntrack.min),
            ("ipvs", Some(5))
        );
        let loaded = parse(format!("{HEAD}mode: ipvs\nmode: nftables\n")).unwrap();
        assert_eq!(loaded.config.mode, "nftables");
        assert_eq!(loaded.warnings.len(), 1, "{:?}", loaded.warnings);
        assert!(loaded.warnings[0].contains("mode"), "{:?}", loaded.warnings);
    }

    #[test]
    fn what_cannot_be_understood_is_named() {
        for (text, named) in [
            ("mode: [\n", "line"),
            ("", "apiVersion \"\""),
            ("apiVersion: v1\nkind: ConfigMap\n", "ConfigMap"),
            (&format!("{HEAD}oomScoreAdj: much\n"), "oomScoreAdj"),
            (&format!("{HEAD}configSyncPeriod: 15\n"), "15"),
            (&format!("{HEAD}configSyncPeriod: soon\n"), "soon"),
            (
                &format!("{HEAD}nodePortAddresses: 10.0.0.0/8\n"),
                "nodePortAddresses",
            ),
        ] {
            let error = parse(text.into()).unwrap_err().to_string();
            assert!(error.contains(named), "{text:?}: {error}");
        }
        let error = load(Path::new("/nonexistent/config.conf"))
            .unwrap_err()
            .to_string();
        assert!(
            error.starts_with("cannot read /nonexistent/config.conf"),
            "{error}"
        );
    }
}
