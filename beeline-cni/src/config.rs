//! What the runtime says: the network configuration on stdin and the environment (CNI specification 1.1, section 2).

use std::net::IpAddr;
use std::path::PathBuf;

use serde::Deserialize;
use serde_json::Value;

use crate::mac::Mac;
use crate::protocol::{
    Bandwidth, Chained, DEFAULT_SOCKET, DEFAULT_STATE_DIR, Failure, Key, Pod, PortMapping, code,
};
use crate::version::Version;

/// Longest name of a file that is made of an attachment's key, less our own suffix.
const LONGEST_ID: usize = 128;

/// The network configuration, as far as it is ours.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct Config {
    /// Version of configuration and result.
    pub cni_version: String,
    /// Name of the network.
    pub name: String,
    /// Socket of the agent.
    pub socket: Option<PathBuf>,
    /// State directory of the agent.
    pub state_dir: Option<PathBuf>,
    /// Bytes; 0 or none: the agent decides.
    pub mtu: Option<u32>,
    /// Copied to the result.
    pub dns: Option<Dns>,
    runtime_config: RuntimeConfig,
    args: Args,
    /// Result of the plugin before us (CHECK and DEL: of the last).
    pub prev_result: Option<Value>,
    #[serde(rename = "cni.dev/valid-attachments")]
    valid_attachments: Option<Vec<Attachment>>,
}

/// DNS settings of a configuration or result.
#[derive(Clone, PartialEq, Eq, Debug, Default, Deserialize, serde::Serialize)]
#[serde(default)]
pub struct Dns {
    /// Addresses.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub nameservers: Vec<String>,
    /// The pod's own domain.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub domain: Option<String>,
    /// Search list.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub search: Vec<String>,
    /// As in resolv.conf(5).
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub options: Vec<String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct RuntimeConfig {
    port_mappings: Option<Vec<RawPortMapping>>,
    bandwidth: Option<Bandwidth>,
    ips: Option<Vec<String>>,
    mac: Option<String>,
    dns: Option<RuntimeDns>,
}

/// Capability `dns`, whose names differ from those of a configuration.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct RuntimeDns {
    servers: Vec<String>,
    searches: Vec<String>,
    options: Vec<String>,
}

/// hostIP may be an empty text.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawPortMapping {
    #[serde(default)]
    host_port: i64,
    #[serde(default)]
    container_port: i64,
    #[serde(default)]
    protocol: String,
    #[serde(default, rename = "hostIP")]
    host_ip: String,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Args {
    cni: CniArgs,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct CniArgs {
    ips: Option<Vec<String>>,
    mac: Option<String>,
}

#[derive(Debug, Deserialize)]
struct Attachment {
    #[serde(rename = "containerID", alias = "containerId")]
    container_id: String,
    ifname: String,
}

fn bad(key: &str, value: impl std::fmt::Display) -> Failure {
    let shown: String = value.to_string().chars().take(80).collect();
    Failure::because(
        code::BAD_CONFIG,
        "invalid network configuration",
        format!("{key}: {shown}"),
    )
}

impl Config {
    /// Reads the configuration.
    ///
    /// # Errors
    ///
    /// Code 6 when it is no JSON of the right shape.
    pub fn parse(input: &[u8]) -> Result<Self, Failure> {
        serde_json::from_slice(input)
            .map_err(|error| Failure::because(code::DECODE, "cannot decode the network configuration", error))
    }

    /// # Errors
    ///
    /// Code 1.
    pub fn version(&self) -> Result<Version, Failure> {
        Version::parse(&self.cni_version)
    }

    /// # Errors
    ///
    /// Code 7 when there is no name or it has other characters than the specification allows.
    pub fn network(&self) -> Result<String, Failure> {
        if is_identifier(&self.name) {
            Ok(self.name.clone())
        } else {
            Err(bad("name", format!("{:?}", self.name)))
        }
    }

    /// Socket of the agent.
    #[must_use]
    pub fn socket(&self) -> PathBuf {
        self.socket.clone().unwrap_or_else(|| DEFAULT_SOCKET.into())
    }

    /// State directory of the agent.
    #[must_use]
    pub fn state_dir(&self) -> PathBuf {
        self.state_dir.clone().unwrap_or_else(|| DEFAULT_STATE_DIR.into())
    }

    /// MTU that the configuration asks for.
    ///
    /// # Errors
    ///
    /// Code 7 for one that no Ethernet device can have.
    pub fn mtu(&self) -> Result<Option<u32>, Failure> {
        match self.mtu {
            None | Some(0) => Ok(None),
            // 68: smallest that IPv4 allows (RFC 791)
            Some(mtu @ 68..=65535) => Ok(Some(mtu)),
            Some(mtu) => Err(bad("mtu", mtu)),
        }
    }

    /// Addresses that were asked for: runtimeConfig.ips, args.cni.ips and `IP` in `CNI_ARGS`, as host-local reads them.
    ///
    /// # Errors
    ///
    /// Code 7 for one that is no address.
    pub fn ips(&self, args: &CniEnvArgs) -> Result<Vec<IpAddr>, Failure> {
        let mut ips = Vec::new();
        let lists = [&self.runtime_config.ips, &self.args.cni.ips];
        let texts = lists.into_iter().flatten().flatten().map(String::as_str);
        for text in texts.chain(args.get("IP")) {
            let address = text.split_once('/').map_or(text, |(address, _)| address);
            let address = address
                .parse()
                .map_err(|_| bad("requested address", format!("{text:?}")))?;
            if !ips.contains(&address) {
                ips.push(address);
            }
        }
        Ok(ips)
    }

    /// The MAC that was asked for: runtimeConfig.mac, else args.cni.mac, else `MAC` in `CNI_ARGS`, as the bridge plugin does.
    ///
    /// # Errors
    ///
    /// Code 7 for one that no device can have.
    pub fn mac(&self, args: &CniEnvArgs) -> Result<Option<Mac>, Failure> {
        let lists = [
            self.runtime_config.mac.as_deref(),
            self.args.cni.mac.as_deref(),
            args.get("MAC"),
        ];
        let Some(text) = lists.into_iter().flatten().find(|text| !text.is_empty()) else {
            return Ok(None);
        };
        let mac: Mac = text.parse().map_err(|error| bad("mac", error))?;
        if mac.is_unicast() {
            Ok(Some(mac))
        } else {
            Err(bad("mac", format!("{text:?} is no unicast address")))
        }
    }

    /// Capability portMappings.
    ///
    /// # Errors
    ///
    /// Code 7 for a wrong port, protocol or address.
    pub fn port_mappings(&self) -> Result<Vec<PortMapping>, Failure> {
        let mut mappings = Vec::new();
        for raw in self.runtime_config.port_mappings.iter().flatten() {
            // containerd sends those without a hostPort as 0; portmap leaves them out
            if raw.host_port == 0 {
                continue;
            }
            let port = |key, value: i64| {
                u16::try_from(value)
                    .ok()
                    .filter(|port| *port != 0)
                    .ok_or_else(|| bad(key, value))
            };
            let protocol = raw.protocol.to_ascii_lowercase();
            let protocol = if protocol.is_empty() {
                "tcp".into()
            } else {
                protocol
            };
            if !["tcp", "udp", "sctp"].contains(&protocol.as_str()) {
                return Err(bad("portMappings.protocol", format!("{:?}", raw.protocol)));
            }
            let host_ip = match raw.host_ip.as_str() {
                "" => None,
                text => Some(
                    text.parse()
                        .map_err(|_| bad("portMappings.hostIP", format!("{text:?}")))?,
                ),
            };
            mappings.push(PortMapping {
                host_port: port("portMappings.hostPort", raw.host_port)?,
                container_port: port("portMappings.containerPort", raw.container_port)?,
                protocol,
                host_ip,
            });
        }
        Ok(mappings)
    }

    /// Capability bandwidth.
    #[must_use]
    pub fn bandwidth(&self) -> Option<Bandwidth> {
        self.runtime_config
            .bandwidth
            .clone()
            .filter(|limits| *limits != Bandwidth::default())
    }

    /// DNS settings for the result: those of the runtime, else those of the configuration.
    #[must_use]
    pub fn dns(&self) -> Dns {
        match &self.runtime_config.dns {
            Some(dns) => Dns {
                nameservers: dns.servers.clone(),
                domain: None,
                search: dns.searches.clone(),
                options: dns.options.clone(),
            },
            None => self.dns.clone().unwrap_or_default(),
        }
    }

    /// The addresses in prevResult, whatever version it has.
    ///
    /// # Errors
    ///
    /// Code 7 for an address that cannot be read.
    pub fn previous_ips(&self) -> Result<Option<Vec<IpAddr>>, Failure> {
        let Some(result) = &self.prev_result else {
            return Ok(None);
        };
        let fields = result
            .as_object()
            .ok_or_else(|| bad("prevResult", "is no object"))?;
        let list = fields.get("ips").and_then(Value::as_array).into_iter().flatten();
        let new = list.map(|ip| ip.get("address"));
        let old = ["ip4", "ip6"].map(|family| {
            fields
                .get(family)
                .filter(|value| !value.is_null())
                .map(|ip| ip.get("ip"))
        });
        let mut ips = Vec::new();
        for address in new.chain(old.into_iter().flatten()) {
            let text = address
                .and_then(Value::as_str)
                .ok_or_else(|| bad("prevResult", "an address is missing"))?;
            let bare = text.split_once('/').map_or(text, |(address, _)| address);
            ips.push(
                bare.parse()
                    .map_err(|_| bad("prevResult address", format!("{text:?}")))?,
            );
        }
        Ok(Some(ips))
    }

    /// `cni.dev/valid-attachments` of a GC.
    ///
    /// # Errors
    ///
    /// Code 7 when there is no such list: to remove everything for want of a key would be wrong.
    pub fn valid_attachments(&self) -> Result<Vec<(String, String)>, Failure> {
        let list = self
            .valid_attachments
            .as_ref()
            .ok_or_else(|| bad("cni.dev/valid-attachments", "is missing"))?;
        Ok(list
            .iter()
            .map(|a| (a.container_id.clone(), a.ifname.clone()))
            .collect())
    }
}

/// `CNI_ARGS`: `K=V;K=V`.
#[derive(Debug, Default)]
pub struct CniEnvArgs(Vec<(String, String)>);

impl CniEnvArgs {
    /// # Errors
    ///
    /// Code 4 for a part without `=`.
    pub fn parse(text: &str) -> Result<Self, Failure> {
        let mut pairs = Vec::new();
        for part in text.split(';').filter(|part| !part.is_empty()) {
            let (key, value) = part.split_once('=').ok_or_else(|| {
                Failure::because(
                    code::BAD_ENVIRONMENT,
                    "invalid CNI_ARGS",
                    format!("{part:?} is no pair"),
                )
            })?;
            pairs.push((key.to_owned(), value.to_owned()));
        }
        Ok(Self(pairs))
    }

    /// Value of a key, if it is there and not empty.
    #[must_use]
    pub fn get(&self, key: &str) -> Option<&str> {
        let (_, value) = self
            .0
            .iter()
            .find(|(name, value)| name == key && !value.is_empty())?;
        Some(value)
    }

    /// The pod that the sandbox is for.
    #[must_use]
    pub fn pod(&self) -> Option<Pod> {
        let text = |key| self.get(key).unwrap_or_default().to_owned();
        let pod = Pod {
            namespace: text("K8S_POD_NAMESPACE"),
            name: text("K8S_POD_NAME"),
            uid: text("K8S_POD_UID"),
        };
        (!pod.name.is_empty()).then_some(pod)
    }
}

/// The environment, checked as far as the command needs it.
#[derive(Debug)]
pub struct Environment {
    /// Container id.
    pub container_id: String,
    /// Path, or empty.
    pub netns: String,
    /// Name of the pod's device.
    pub ifname: String,
    /// `CNI_ARGS`.
    pub args: CniEnvArgs,
    /// `CNI_NETNS_OVERRIDE`: the namespace may be our own.
    pub netns_override: bool,
}

impl Environment {
    /// Reads the variables; `required` are the names that the command cannot do without.
    ///
    /// # Errors
    ///
    /// Code 4 naming all that are missing, or the first that is wrong.
    pub fn read(get: &dyn Fn(&str) -> Option<String>, required: &[&str]) -> Result<Self, Failure> {
        let value = |name: &str| get(name).unwrap_or_default();
        let missing: Vec<&str> = required
            .iter()
            .filter(|name| value(name).is_empty())
            .copied()
            .collect();
        if !missing.is_empty() {
            let names = missing.join(", ");
            return Err(Failure::new(
                code::BAD_ENVIRONMENT,
                format!("required env variables [{names}] missing"),
            ));
        }
        let wrong = |name: &str, value: &str| {
            let shown: String = value.chars().take(80).collect();
            Failure::because(
                code::BAD_ENVIRONMENT,
                format!("invalid {name}"),
                format!("{shown:?}"),
            )
        };
        let container_id = value("CNI_CONTAINERID");
        if required.contains(&"CNI_CONTAINERID") && !is_identifier(&container_id) {
            return Err(wrong("CNI_CONTAINERID", &container_id));
        }
        let ifname = value("CNI_IFNAME");
        if required.contains(&"CNI_IFNAME") && !is_ifname(&ifname) {
            return Err(wrong("CNI_IFNAME", &ifname));
        }
        Ok(Self {
            container_id,
            netns: value("CNI_NETNS"),
            ifname,
            args: CniEnvArgs::parse(&value("CNI_ARGS"))?,
            netns_override: ["1", "true"].contains(&value("CNI_NETNS_OVERRIDE").to_lowercase().as_str()),
        })
    }

    /// What the attachment is known by.
    #[must_use]
    pub fn key(&self, network: String) -> Key {
        Key {
            network,
            container_id: self.container_id.clone(),
            ifname: self.ifname.clone(),
        }
    }
}

/// Names of networks and containers: `[a-zA-Z0-9][a-zA-Z0-9_.-]*`, and not longer than a file name can be made of.
fn is_identifier(text: &str) -> bool {
    text.len() <= LONGEST_ID
        && text.starts_with(|c: char| c.is_ascii_alphanumeric())
        && text
            .chars()
            .all(|c| c.is_ascii_alphanumeric() || "_.-".contains(c))
}

/// What the kernel takes as a device's name (net/core/dev.c, `dev_valid_name`).
fn is_ifname(text: &str) -> bool {
    (1..=15).contains(&text.len())
        && text != "."
        && text != ".."
        && !text
            .chars()
            .any(|c| c == '/' || c == ':' || c.is_whitespace() || c.is_control())
}

impl From<Vec<IpAddr>> for Chained {
    fn from(ips: Vec<IpAddr>) -> Self {
        Self { ips }
    }
}
