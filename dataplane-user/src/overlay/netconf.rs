//! flannel's `net-conf.json` (spec cni-overlay 1.1).

use std::net::{Ipv4Addr, Ipv6Addr};

use ipnet::{Ipv4Net, Ipv6Net};
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Map, Value};

/// Largest VNI (RFC 7348: 24 bits).
const MAX_VNI: u32 = (1 << 24) - 1;

/// A configuration that cannot be used.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum NetConfError {
    /// No JSON of the right shape.
    #[error("net-conf.json cannot be read: {0}")]
    Decode(String),
    /// A key that is missing or has a wrong value.
    #[error("net-conf.json: {key}: {cause}")]
    Key {
        /// The key as flannel writes it.
        key: &'static str,
        /// What is wrong.
        cause: String,
    },
}

fn key<T>(key: &'static str, cause: impl Into<String>) -> Result<T, NetConfError> {
    Err(NetConfError::Key {
        key,
        cause: cause.into(),
    })
}

/// The file, with flannel's defaults. By default no family is enabled.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct NetConf {
    /// The cluster's pod networks; one that is not enabled is `None`, whatever is written there (spec 1.10).
    pub network_v4: Option<Ipv4Net>,
    /// See `network_v4`.
    pub network_v6: Option<Ipv6Net>,
    /// Whether flannel would use nftables; we need neither.
    pub enable_nftables: bool,
    /// Only for the etcd subnet manager.
    pub subnets_v4: Option<Subnets<Ipv4Addr>>,
    /// Only for the etcd subnet manager.
    pub subnets_v6: Option<Subnets<Ipv6Addr>>,
    /// How packets get to other nodes.
    pub backend: Backend,
}

/// Which part of a network nodes get, for the etcd subnet manager.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Subnets<A> {
    /// Prefix length of a node's range.
    pub len: u8,
    /// First range, by its network address.
    pub min: A,
    /// Last range, by its network address.
    pub max: A,
}

/// How packets get to other nodes.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Backend {
    /// In UDP.
    Vxlan(Vxlan),
    /// By routes to the nodes, which must be on the same link.
    HostGw,
}

impl Default for Backend {
    fn default() -> Self {
        Self::Vxlan(Vxlan::default())
    }
}

impl Backend {
    /// As in the annotation `backend-type`.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::Vxlan(_) => "vxlan",
            Self::HostGw => "host-gw",
        }
    }
}

/// Options of the vxlan backend.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Vxlan {
    /// VXLAN network identifier, 24 bits.
    pub vni: u32,
    /// UDP destination port; `None`: the kernel's, 8472.
    pub port: Option<u16>,
    /// Of the underlay, in bytes; `None`: that of the uplink.
    pub mtu: Option<u32>,
    /// Group based policy extension.
    pub gbp: bool,
    /// Learning of addresses from packets.
    pub learning: bool,
    /// Plain routes to nodes on the same link.
    pub direct_routing: bool,
}

impl Default for Vxlan {
    fn default() -> Self {
        Self {
            vni: 1,
            port: None,
            mtu: None,
            gbp: false,
            learning: false,
            direct_routing: false,
        }
    }
}

#[derive(Deserialize)]
#[serde(default)]
struct Raw {
    enableipv4: bool,
    enableipv6: bool,
    enablenftables: bool,
    network: Option<String>,
    ipv6network: Option<String>,
    subnetlen: u8,
    subnetmin: Option<Ipv4Addr>,
    subnetmax: Option<Ipv4Addr>,
    ipv6subnetlen: u8,
    ipv6subnetmin: Option<Ipv6Addr>,
    ipv6subnetmax: Option<Ipv6Addr>,
    backend: Option<Map<String, Value>>,
}

impl Default for Raw {
    fn default() -> Self {
        Self {
            enableipv4: true,
            enableipv6: false,
            enablenftables: false,
            network: None,
            ipv6network: None,
            subnetlen: 0,
            subnetmin: None,
            subnetmax: None,
            ipv6subnetlen: 0,
            ipv6subnetmin: None,
            ipv6subnetmax: None,
            backend: None,
        }
    }
}

#[derive(Deserialize)]
#[serde(default)]
struct RawVxlan {
    vni: u32,
    port: u16,
    mtu: u32,
    gbp: bool,
    learning: bool,
    directrouting: bool,
}

impl Default for RawVxlan {
    fn default() -> Self {
        Self {
            vni: 1,
            port: 0,
            mtu: 0,
            gbp: false,
            learning: false,
            directrouting: false,
        }
    }
}

/// Go reads keys whatever their case.
fn lower_keys(fields: Map<String, Value>) -> Map<String, Value> {
    fields
        .into_iter()
        .map(|(key, value)| (key.to_lowercase(), value))
        .collect()
}

fn decode<T: DeserializeOwned>(fields: Map<String, Value>) -> Result<T, NetConfError> {
    // null is as if the key were not there
    let fields = lower_keys(fields)
        .into_iter()
        .filter(|(_, value)| !value.is_null())
        .collect();
    serde_json::from_value(Value::Object(fields)).map_err(|error| NetConfError::Decode(error.to_string()))
}

impl NetConf {
    /// Reads the file. Without `Backend` it is vxlan with its defaults, as flannel's documentation says (its code says udp,
    /// which nobody can have wanted).
    ///
    /// # Errors
    ///
    /// Names the key that is missing or wrong.
    pub fn parse(text: &str) -> Result<Self, NetConfError> {
        let fields = serde_json::from_str(text).map_err(|error| NetConfError::Decode(error.to_string()))?;
        let raw: Raw = decode(fields)?;
        if !raw.enableipv4 && !raw.enableipv6 {
            return key("EnableIPv4", "neither IPv4 nor IPv6 is enabled");
        }
        let network_v4 = if raw.enableipv4 {
            Some(network_v4(raw.network.as_deref())?)
        } else {
            None
        };
        let network_v6 = if raw.enableipv6 {
            Some(network_v6(raw.ipv6network.as_deref())?)
        } else {
            None
        };
        let subnets_v4 = match network_v4 {
            Some(network) => Some(subnets_v4(network, raw.subnetlen, raw.subnetmin, raw.subnetmax)?),
            None => None,
        };
        let subnets_v6 = match network_v6 {
            Some(network) => Some(subnets_v6(
                network,
                raw.ipv6subnetlen,
                raw.ipv6subnetmin,
                raw.ipv6subnetmax,
            )?),
            None => None,
        };
        Ok(Self {
            network_v4,
            network_v6,
            enable_nftables: raw.enablenftables,
            subnets_v4,
            subnets_v6,
            backend: backend(raw.backend)?,
        })
    }
}

fn backend(fields: Option<Map<String, Value>>) -> Result<Backend, NetConfError> {
    let Some(fields) = fields else {
        return Ok(Backend::default());
    };
    let fields = lower_keys(fields);
    match fields
        .get("type")
        .and_then(Value::as_str)
        .map(str::to_lowercase)
        .as_deref()
    {
        Some("vxlan") => {
            let raw: RawVxlan = decode(fields)?;
            if raw.vni > MAX_VNI {
                return key("Backend.VNI", format!("{} is more than {MAX_VNI}", raw.vni));
            }
            Ok(Backend::Vxlan(Vxlan {
                vni: raw.vni,
                port: (raw.port != 0).then_some(raw.port),
                mtu: (raw.mtu != 0).then_some(raw.mtu),
                gbp: raw.gbp,
                learning: raw.learning,
                direct_routing: raw.directrouting,
            }))
        }
        Some("host-gw") => Ok(Backend::HostGw),
        Some(other) => key(
            "Backend.Type",
            format!("{other:?} is not supported (vxlan and host-gw are)"),
        ),
        None => key("Backend.Type", "is missing"),
    }
}

fn network_v4(text: Option<&str>) -> Result<Ipv4Net, NetConfError> {
    let Some(text) = text else {
        return key("Network", "is missing, and IPv4 is enabled");
    };
    let net: Ipv4Net = match text.parse() {
        Ok(net) => net,
        Err(_) => return key("Network", format!("{text:?} is no IPv4 CIDR")),
    };
    if net.prefix_len() > 28 {
        return key("Network", format!("{text} is smaller than /28"));
    }
    Ok(net.trunc())
}

fn network_v6(text: Option<&str>) -> Result<Ipv6Net, NetConfError> {
    let Some(text) = text else {
        return key("IPv6Network", "is missing, and IPv6 is enabled");
    };
    let net: Ipv6Net = match text.parse() {
        Ok(net) => net,
        Err(_) => return key("IPv6Network", format!("{text:?} is no IPv6 CIDR")),
    };
    if net.prefix_len() > 124 {
        return key("IPv6Network", format!("{text} is smaller than /124"));
    }
    Ok(net.trunc())
}

fn subnets_v4(
    network: Ipv4Net,
    len: u8,
    min: Option<Ipv4Addr>,
    max: Option<Ipv4Addr>,
) -> Result<Subnets<Ipv4Addr>, NetConfError> {
    let prefix = network.prefix_len();
    let len = match len {
        0 if prefix <= 22 => 24,
        0 => prefix + 2,
        len => len,
    };
    if len < prefix + 2 || len > 30 {
        return key("SubnetLen", format!("{len} is not between {} and 30", prefix + 2));
    }
    let size = 1u32 << (32 - u32::from(len));
    let first = network.network().to_bits();
    let min = min.unwrap_or_else(|| Ipv4Addr::from_bits(first + size));
    let max = max.unwrap_or_else(|| Ipv4Addr::from_bits(network.broadcast().to_bits() - (size - 1)));
    for (name, address) in [("SubnetMin", min), ("SubnetMax", max)] {
        if !network.contains(&address) || address.to_bits() % size != 0 {
            return key(name, format!("{address} is no /{len} in {network}"));
        }
    }
    Ok(Subnets { len, min, max })
}

fn subnets_v6(
    network: Ipv6Net,
    len: u8,
    min: Option<Ipv6Addr>,
    max: Option<Ipv6Addr>,
) -> Result<Subnets<Ipv6Addr>, NetConfError> {
    let prefix = network.prefix_len();
    let len = match len {
        0 if prefix <= 62 => 64,
        0 => prefix + 2,
        len => len,
    };
    if len < prefix + 2 || len > 126 {
        return key(
            "IPv6SubnetLen",
            format!("{len} is not between {} and 126", prefix + 2),
        );
    }
    let size = 1u128 << (128 - u32::from(len));
    let first = network.network().to_bits();
    let min = min.unwrap_or_else(|| Ipv6Addr::from_bits(first + size));
    let max = max.unwrap_or_else(|| Ipv6Addr::from_bits(network.broadcast().to_bits() - (size - 1)));
    for (name, address) in [("IPv6SubnetMin", min), ("IPv6SubnetMax", max)] {
        if !network.contains(&address) || address.to_bits() % size != 0 {
            return key(name, format!("{address} is no /{len} in {network}"));
        }
    }
    Ok(Subnets { len, min, max })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flannels_own_example_and_the_shortest_one_are_read() {
        let conf = NetConf::parse(
            r#"{"Network": "10.244.0.0/16", "EnableNFTables": false, "Backend": {"Type": "VXLAN"}}"#,
        )
        .unwrap();
        assert_eq!(conf.network_v4.unwrap().to_string(), "10.244.0.0/16");
        assert_eq!(conf.network_v6, None);
        assert_eq!(conf.backend, Backend::Vxlan(Vxlan::default()));
        let subnets = conf.subnets_v4.unwrap();
        assert_eq!(
            (subnets.len, subnets.min.to_string(), subnets.max.to_string()),
            (24, "10.244.1.0".into(), "10.244.255.0".into())
        );
        let short = NetConf::parse(r#"{"Network":"172.16.0.0/16"}"#).unwrap();
        assert_eq!(short.backend, Backend::Vxlan(Vxlan::default()));
    }

    #[test]
    fn keys_match_whatever_their_case_and_unknown_ones_are_left_out() {
        let conf = NetConf::parse(
            r#"{"network": "10.0.0.0/8", "enableipv6": true, "IPV6NETWORK": "fd00::/48", "Colour": "red",
                "backend": {"type": "vxlan", "vni": 42, "PORT": 8473, "mtu": 1400, "gbp": true, "DirectRouting": true,
                            "Learning": true, "MacPrefix": "0E-2A"}}"#,
        )
        .unwrap();
        let expected = Vxlan {
            vni: 42,
            port: Some(8473),
            mtu: Some(1400),
            gbp: true,
            learning: true,
            direct_routing: true,
        };
        assert_eq!(conf.backend, Backend::Vxlan(expected));
        assert_eq!(conf.subnets_v6.unwrap().min.to_string(), "fd00:0:0:1::");
    }

    #[test]
    fn a_disabled_family_is_not_looked_at() {
        let conf = NetConf::parse(
            r#"{"EnableIPv4": false, "Network": "0.0.0.0/0", "EnableIPv6": true, "IPv6Network": "fd00::/56",
                "Backend": {"Type": "host-gw"}}"#,
        )
        .unwrap();
        assert_eq!((conf.network_v4, &conf.backend), (None, &Backend::HostGw));
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (text, expected) in [
            ("[]", "cannot be read"),
            ("{}", "Network: is missing"),
            (r#"{"EnableIPv4": false}"#, "neither"),
            (r#"{"Network": "10.0.0.0/29"}"#, "smaller than /28"),
            (r#"{"Network": "10.0.0.0/16", "SubnetLen": 17}"#, "SubnetLen: 17"),
            (
                r#"{"Network": "10.0.0.0/16", "SubnetMin": "10.0.0.7"}"#,
                "SubnetMin: 10.0.0.7",
            ),
            (
                r#"{"Network": "10.0.0.0/16", "SubnetMax": "10.1.0.0"}"#,
                "SubnetMax: 10.1.0.0",
            ),
            (
                r#"{"Network": "10.0.0.0/16", "EnableIPv6": true}"#,
                "IPv6Network: is missing",
            ),
            (
                r#"{"Network": "10.0.0.0/16", "Backend": {}}"#,
                "Backend.Type: is missing",
            ),
            (
                r#"{"Network": "10.0.0.0/16", "Backend": {"Type": "udp"}}"#,
                "\"udp\" is not supported",
            ),
            (
                r#"{"Network": "10.0.0.0/16", "Backend": {"Type": "vxlan", "VNI": 16777216}}"#,
                "VNI",
            ),
            (
                r#"{"Network": "10.0.0.0/16", "Backend": {"Type": "vxlan", "Port": 99999}}"#,
                "cannot be read",
            ),
        ] {
            let error = NetConf::parse(text).unwrap_err().to_string();
            assert!(error.contains(expected), "{text}: {error}");
        }
    }
}
