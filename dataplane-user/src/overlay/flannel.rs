//! What flannel nodes tell each other: annotations of Node objects (spec cni-overlay 1.3, 1.9), and `subnet.env` (1.5).

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::net::{Ipv4Addr, Ipv6Addr};

use beeline_cni::mac::Mac;
use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use k8s_openapi::api::core::v1::Node;
use serde::Deserialize;
use serde_json::{Value, json};

use super::netconf::Backend;

/// flannel's `--kube-annotation-prefix`.
pub const DEFAULT_PREFIX: &str = "flannel.alpha.coreos.com";

/// Names of flannel's annotations.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Prefix(String);

/// A prefix that flannel refuses, too.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("annotation prefix {0:?} is not of the form domain/[0-9a-z-_]*")]
pub struct BadPrefix(String);

impl Prefix {
    /// As flannel completes it: a `/` is added if there is none, a `-` if what follows it does not end in one.
    ///
    /// # Errors
    ///
    /// When it has another shape.
    pub fn new(text: &str) -> Result<Self, BadPrefix> {
        let bad = || BadPrefix(text.to_owned());
        let (domain, rest) = text.split_once('/').unwrap_or((text, ""));
        let domain_char = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || "-.".contains(c);
        let rest_char = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || "-_".contains(c);
        if domain.is_empty() || !domain.chars().all(domain_char) || !rest.chars().all(rest_char) {
            return Err(bad());
        }
        let dash = if rest.is_empty() || rest.ends_with('-') {
            ""
        } else {
            "-"
        };
        Ok(Self(format!("{domain}/{rest}{dash}")))
    }

    fn key(&self, name: &str) -> String {
        format!("{}{name}", self.0)
    }
}

impl Default for Prefix {
    fn default() -> Self {
        Self(format!("{DEFAULT_PREFIX}/"))
    }
}

/// One family of a node.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Lease<N, A> {
    /// The node's podCIDR.
    pub subnet: N,
    /// Where its packets are sent to.
    pub public: A,
    /// Address of its overlay device; only vxlan has one.
    pub vtep: Option<Mac>,
}

/// Another node.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Peer {
    /// IPv4.
    pub v4: Option<Lease<Ipv4Net, Ipv4Addr>>,
    /// IPv6.
    pub v6: Option<Lease<Ipv6Net, Ipv6Addr>>,
}

/// What this node's object says of it, by an administrator or by an earlier run.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Local {
    /// The node's podCIDR.
    pub subnet_v4: Option<Ipv4Net>,
    /// The node's podCIDR.
    pub subnet_v6: Option<Ipv6Net>,
    /// The overlay device's address: peers know it, so it should stay.
    pub vtep_v4: Option<Mac>,
    /// The overlay device's address: peers know it, so it should stay.
    pub vtep_v6: Option<Mac>,
    /// `public-ip-overwrite`.
    pub public_v4: Option<Ipv4Addr>,
    /// `public-ipv6-overwrite`.
    pub public_v6: Option<Ipv6Addr>,
    /// `node-public-ip`: address that picks the uplink.
    pub uplink_v4: Option<Ipv4Addr>,
    /// `node-public-ipv6`.
    pub uplink_v6: Option<Ipv6Addr>,
}

#[derive(Deserialize)]
struct VxlanData {
    #[serde(rename = "VtepMAC")]
    vtep: Mac,
    // VNI is not compared: flannel does not either
}

/// The address of a node's overlay device, from what flannel tells of the device.
pub(super) fn vtep(text: &str) -> Result<Mac, String> {
    let data: VxlanData = serde_json::from_str(text).map_err(|error| error.to_string())?;
    if data.vtep.is_unicast() {
        Ok(data.vtep)
    } else {
        Err(format!("{} is no unicast address", data.vtep))
    }
}

/// The podCIDRs of a node, one of each family.
fn subnets(node: &Node) -> (Option<Ipv4Net>, Option<Ipv6Net>) {
    let spec = node.spec.as_ref();
    let list = spec.and_then(|spec| spec.pod_cidrs.clone()).unwrap_or_default();
    let single = spec.and_then(|spec| spec.pod_cidr.clone());
    let all: Vec<IpNet> = list
        .iter()
        .chain(&single)
        .filter_map(|text| text.parse().ok())
        .collect();
    let v4 = all.iter().find_map(|net| {
        if let IpNet::V4(net) = net {
            Some(net.trunc())
        } else {
            None
        }
    });
    let v6 = all.iter().find_map(|net| {
        if let IpNet::V6(net) = net {
            Some(net.trunc())
        } else {
            None
        }
    });
    (v4, v6)
}

struct Annotations<'a> {
    map: Option<&'a BTreeMap<String, String>>,
    prefix: &'a Prefix,
}

impl Annotations<'_> {
    fn get(&self, name: &str) -> Option<&str> {
        self.map?.get(&self.prefix.key(name)).map(String::as_str)
    }

    fn parse<T: std::str::FromStr>(&self, name: &str) -> Option<Result<T, String>> {
        let text = self.get(name).filter(|text| !text.is_empty())?;
        Some(
            text.parse()
                .map_err(|_| format!("annotation {name}: {text:?} cannot be used")),
        )
    }

    fn vtep(&self, name: &str) -> Result<Mac, String> {
        let text = self
            .get(name)
            .ok_or_else(|| format!("annotation {name} is missing"))?;
        vtep(text).map_err(|error| format!("annotation {name}: {error}"))
    }

    /// One family of a peer: nothing if it does not have it.
    fn lease<N, A: std::str::FromStr>(
        &self,
        subnet: Option<N>,
        (public, data): (&str, &str),
        vxlan: bool,
    ) -> Option<Result<Lease<N, A>, String>> {
        let subnet = subnet?;
        let public = match self.parse(public)? {
            Ok(public) => public,
            Err(error) => return Some(Err(error)),
        };
        let vtep = match vxlan.then(|| self.vtep(data)).transpose() {
            Ok(vtep) => vtep,
            Err(error) => return Some(Err(error)),
        };
        Some(Ok(Lease { subnet, public, vtep }))
    }
}

/// Reads a node as a peer. `None`: it takes no part, or with another backend. What is wrong in one family is told and does
/// not take away the other.
#[must_use]
pub fn peer(node: &Node, prefix: &Prefix, backend: &Backend) -> (Option<Peer>, Vec<String>) {
    let annotations = Annotations {
        map: node.metadata.annotations.as_ref(),
        prefix,
    };
    if annotations.get("kube-subnet-manager") != Some("true")
        || annotations.get("backend-type") != Some(backend.name())
    {
        return (None, Vec::new());
    }
    let vxlan = matches!(backend, Backend::Vxlan(_));
    let (subnet_v4, subnet_v6) = subnets(node);
    let v4 = annotations.lease(subnet_v4, ("public-ip", "backend-data"), vxlan);
    let v6 = annotations.lease(subnet_v6, ("public-ipv6", "backend-v6-data"), vxlan);
    let mut problems = Vec::new();
    if v4.is_none() && v6.is_none() {
        problems.push("has no podCIDR with an address to send to".to_owned());
    }
    let v4 = v4.and_then(|lease| lease.map_err(|error| problems.push(error)).ok());
    let v6 = v6.and_then(|lease| lease.map_err(|error| problems.push(error)).ok());
    let peer = (v4.is_some() || v6.is_some()).then_some(Peer { v4, v6 });
    (peer, problems)
}

/// Reads this node's own object.
#[must_use]
pub fn local(node: &Node, prefix: &Prefix) -> (Local, Vec<String>) {
    let annotations = Annotations {
        map: node.metadata.annotations.as_ref(),
        prefix,
    };
    let (subnet_v4, subnet_v6) = subnets(node);
    let mut problems = Vec::new();
    fn note<T>(value: Option<Result<T, String>>, problems: &mut Vec<String>) -> Option<T> {
        value?.map_err(|error| problems.push(error)).ok()
    }
    let local = Local {
        subnet_v4,
        subnet_v6,
        vtep_v4: annotations.vtep("backend-data").ok(),
        vtep_v6: annotations.vtep("backend-v6-data").ok(),
        public_v4: note(annotations.parse("public-ip-overwrite"), &mut problems),
        public_v6: note(annotations.parse("public-ipv6-overwrite"), &mut problems),
        uplink_v4: note(annotations.parse("node-public-ip"), &mut problems),
        uplink_v6: note(annotations.parse("node-public-ipv6"), &mut problems),
    };
    (local, problems)
}

/// What this node says of itself.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Announcement {
    /// IPv4: address and, of vxlan, the device's.
    pub v4: Option<(Ipv4Addr, Option<Mac>)>,
    /// IPv6.
    pub v6: Option<(Ipv6Addr, Option<Mac>)>,
    /// How packets get here.
    pub backend: Backend,
}

/// What flannel tells of a node's device.
pub(super) fn backend_data(backend: &Backend, vtep: Option<Mac>) -> String {
    match (backend, vtep) {
        // flannel finds the address again by splitting at `:"`: nothing else here may be text
        (Backend::Vxlan(vxlan), Some(vtep)) => format!(r#"{{"VNI":{},"VtepMAC":"{vtep}"}}"#, vxlan.vni),
        _ => "null".to_owned(),
    }
}

/// The annotations of this node. All in one patch: a peer that reads one family without the other drops the node.
#[must_use]
pub fn annotations(announcement: &Announcement, prefix: &Prefix) -> BTreeMap<String, String> {
    let backend = &announcement.backend;
    let mut all = BTreeMap::from([
        (prefix.key("kube-subnet-manager"), "true".to_owned()),
        (prefix.key("backend-type"), backend.name().to_owned()),
    ]);
    if let Some((public, vtep)) = announcement.v4 {
        all.insert(prefix.key("backend-data"), backend_data(backend, vtep));
        all.insert(prefix.key("public-ip"), public.to_string());
    }
    if let Some((public, vtep)) = announcement.v6 {
        all.insert(prefix.key("backend-v6-data"), backend_data(backend, vtep));
        all.insert(prefix.key("public-ipv6"), public.to_string());
    }
    all
}

/// Whether a node's object says all of this already.
#[must_use]
pub fn is_announced(node: &Node, wanted: &BTreeMap<String, String>) -> bool {
    let has = node.metadata.annotations.as_ref();
    wanted
        .iter()
        .all(|(key, value)| has.and_then(|has| has.get(key)) == Some(value))
}

/// The body of a strategic merge patch of `nodes/status` that sets annotations and, when the network works or has
/// failed, the condition NetworkUnavailable. `now` is RFC 3339.
#[must_use]
pub fn status_patch(
    annotations: &BTreeMap<String, String>,
    network: Option<Result<(), &str>>,
    now: &str,
) -> Value {
    let mut patch = json!({"metadata": {"annotations": annotations}});
    if let Some(network) = network {
        let (status, reason, message) = match network {
            Ok(()) => ("False", "BeelineIsUp", "Beeline is running on this node"),
            Err(cause) => ("True", "BeelineIsNotUp", cause),
        };
        patch["status"] = json!({"conditions": [{
            "type": "NetworkUnavailable",
            "status": status,
            "reason": reason,
            "message": message,
            "lastTransitionTime": now,
            "lastHeartbeatTime": now,
        }]});
    }
    patch
}

/// Status of the condition NetworkUnavailable in a node's object.
#[must_use]
pub fn network_condition(node: &Node) -> Option<&str> {
    let conditions = node.status.as_ref()?.conditions.as_ref()?;
    let condition = conditions
        .iter()
        .find(|condition| condition.type_ == "NetworkUnavailable")?;
    Some(&condition.status)
}

/// The content of `/run/flannel/subnet.env`, which flannel's CNI plugin reads. `mtu` is that of pods, in bytes.
#[must_use]
pub fn subnet_env(
    v4: Option<(Ipv4Net, Ipv4Net)>,
    v6: Option<(Ipv6Net, Ipv6Net)>,
    mtu: u32,
    masquerade: bool,
) -> String {
    let mut text = String::new();
    if let Some((network, subnet)) = v4 {
        let first = Ipv4Addr::from_bits(subnet.network().to_bits().saturating_add(1));
        let _ = write!(
            text,
            "FLANNEL_NETWORK={network}\nFLANNEL_SUBNET={first}/{}\n",
            subnet.prefix_len()
        );
    }
    if let Some((network, subnet)) = v6 {
        let first = Ipv6Addr::from_bits(subnet.network().to_bits().saturating_add(1));
        let len = subnet.prefix_len();
        let _ = write!(
            text,
            "FLANNEL_IPV6_NETWORK={network}\nFLANNEL_IPV6_SUBNET={first}/{len}\n"
        );
    }
    let _ = write!(text, "FLANNEL_MTU={mtu}\nFLANNEL_IPMASQ={masquerade}\n");
    text
}

#[cfg(test)]
#[path = "flannel_tests.rs"]
mod tests;
