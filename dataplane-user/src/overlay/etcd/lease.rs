//! What flannel's etcd subnet manager keeps in etcd, and which subnet a node takes (spec cni-overlay 1.4).

use std::fmt;
use std::iter::successors;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

use beeline_cni::mac::Mac;
use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use rand::RngCore;
use rand::seq::IndexedRandom as _;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::overlay::flannel::{self, Announcement, Lease, Peer};
use crate::overlay::netconf::{Backend, NetConf, Subnets};
use crate::overlay::plan;

/// Of so many free subnets one is taken by chance, as flannel does: two nodes that start together rarely choose the same.
const CHOICE: usize = 100;

/// The subnets of a node, one of each family that is used. As text it is the end of a key in etcd.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Taken {
    /// IPv4.
    pub v4: Option<Ipv4Net>,
    /// IPv6.
    pub v6: Option<Ipv6Net>,
}

impl fmt::Display for Taken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let v4 = self.v4.unwrap_or_default();
        write!(f, "{}-{}", v4.network(), v4.prefix_len())?;
        match self.v6 {
            Some(v6) => write!(f, "&{}-{}", v6.network(), v6.prefix_len()),
            None => Ok(()),
        }
    }
}

/// A key that is no subnet's.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{0:?} does not name subnets")]
pub struct BadKey(String);

impl FromStr for Taken {
    type Err = BadKey;

    fn from_str(text: &str) -> Result<Self, BadKey> {
        fn net<T: FromStr>(text: &str) -> Option<T> {
            let (address, length) = text.rsplit_once('-')?;
            format!("{address}/{length}").parse().ok()
        }
        let (v4, v6) = match text.split_once('&') {
            Some((v4, v6)) => (v4, Some(v6)),
            None => (text, None),
        };
        let bad = || BadKey(text.to_owned());
        let v4: Ipv4Net = net(v4).ok_or_else(bad)?;
        Ok(Self {
            // where IPv4 is not used flannel writes nothing at all of nothing
            v4: (v4 != Ipv4Net::default()).then(|| v4.trunc()),
            v6: v6
                .map(|v6| net(v6).ok_or_else(bad))
                .transpose()?
                .map(|v6: Ipv6Net| v6.trunc()),
        })
    }
}

impl Taken {
    /// Whether a part of it is in a part of the other.
    #[must_use]
    pub fn overlaps(&self, other: &Self) -> bool {
        let v4 = self.v4.zip(other.v4).map(|(a, b)| (IpNet::V4(a), IpNet::V4(b)));
        let v6 = self.v6.zip(other.v6).map(|(a, b)| (IpNet::V6(a), IpNet::V6(b)));
        v4.into_iter().chain(v6).any(|(a, b)| plan::overlap(a, b))
    }

    /// Whether it is what this configuration gives nodes.
    #[must_use]
    pub fn fits(&self, conf: &NetConf) -> bool {
        fn one<A: PartialOrd>(net: Option<(A, u8)>, all: Option<Subnets<A>>) -> bool {
            match (net, all) {
                (Some((first, len)), Some(all)) => len == all.len && (all.min..=all.max).contains(&first),
                (None, None) => true,
                _ => false,
            }
        }
        let v4 = self.v4.map(|net| (net.network(), net.prefix_len()));
        let v6 = self.v6.map(|net| (net.network(), net.prefix_len()));
        one(v4, conf.subnets_v4) && one(v6, conf.subnets_v6)
    }

    /// What `subnet.env` says that this node had.
    #[must_use]
    pub fn from_subnet_env(text: &str) -> Self {
        fn value<T: FromStr>(text: &str, name: &str) -> Option<T> {
            let mut values = text.lines().filter_map(|line| line.strip_prefix(name));
            values.next()?.strip_prefix('=')?.trim().parse().ok()
        }
        Self {
            v4: value(text, "FLANNEL_SUBNET").map(|net: Ipv4Net| net.trunc()),
            v6: value(text, "FLANNEL_IPV6_SUBNET").map(|net: Ipv6Net| net.trunc()),
        }
    }
}

/// A free subnet of each family that is used.
///
/// # Errors
///
/// Names the family of which none is free.
pub fn choose(conf: &NetConf, leases: &[Taken], random: &mut impl RngCore) -> Result<Taken, String> {
    let mut pick = |family: &str, range: (u128, u128), len: u32, subnet: &dyn Fn(u128) -> Option<Taken>| {
        let step = 1u128.checked_shl(len).unwrap_or(0);
        let all = successors(Some(range.0), |bits| bits.checked_add(step));
        let free: Vec<Taken> = all
            .take_while(|bits| *bits <= range.1)
            .filter_map(subnet)
            .filter(|subnet| leases.iter().all(|lease| !lease.overlaps(subnet)))
            .take(CHOICE)
            .collect();
        free.choose(random)
            .copied()
            .ok_or_else(|| format!("no {family} subnet is free: there are {} leases", leases.len()))
    };
    let mut chosen = Taken::default();
    if let Some(all) = conf.subnets_v4 {
        let range = (all.min.to_bits().into(), all.max.to_bits().into());
        let subnet = |bits: u128| {
            let first = Ipv4Addr::from_bits(u32::try_from(bits).ok()?);
            let v4 = Some(Ipv4Net::new(first, all.len).ok()?);
            Some(Taken { v4, v6: None })
        };
        chosen.v4 = pick("IPv4", range, 32 - u32::from(all.len), &subnet)?.v4;
    }
    if let Some(all) = conf.subnets_v6 {
        let range = (all.min.to_bits(), all.max.to_bits());
        let subnet = |bits: u128| {
            let v6 = Some(Ipv6Net::new(Ipv6Addr::from_bits(bits), all.len).ok()?);
            Some(Taken { v4: None, v6 })
        };
        chosen.v6 = pick("IPv6", range, 128 - u32::from(all.len), &subnet)?.v6;
    }
    Ok(chosen)
}

/// What the value of a lease says; flannel's names and order.
#[derive(Clone, PartialEq, Debug, Serialize, Deserialize)]
pub struct Attributes {
    /// Where packets are sent to; 0.0.0.0 where IPv4 is not used.
    #[serde(rename = "PublicIP")]
    pub public_v4: Ipv4Addr,
    /// Where packets are sent to.
    #[serde(rename = "PublicIPv6", default)]
    pub public_v6: Option<Ipv6Addr>,
    /// As `Backend::name`.
    #[serde(rename = "BackendType", default, skip_serializing_if = "String::is_empty")]
    pub backend: String,
    /// The overlay device of IPv4.
    #[serde(rename = "BackendData", default, skip_serializing_if = "Value::is_null")]
    pub data_v4: Value,
    /// The overlay device of IPv6.
    #[serde(rename = "BackendV6Data", default, skip_serializing_if = "Value::is_null")]
    pub data_v6: Value,
}

impl Attributes {
    /// What this node says.
    #[must_use]
    pub fn of(announcement: &Announcement) -> Self {
        let Announcement { v4, v6, backend } = announcement;
        let data = |family: Option<Option<Mac>>| match family {
            Some(vtep) => serde_json::from_str(&flannel::backend_data(backend, vtep)).unwrap_or_default(),
            None => Value::Null,
        };
        Self {
            public_v4: v4.map_or(Ipv4Addr::UNSPECIFIED, |(public, _)| public),
            public_v6: v6.map(|(public, _)| public),
            backend: backend.name().to_owned(),
            data_v4: data(v4.map(|(_, vtep)| vtep)),
            data_v6: data(v6.map(|(_, vtep)| vtep)),
        }
    }

    /// Addresses of the overlay devices, IPv4 and IPv6.
    #[must_use]
    pub fn vteps(&self) -> (Option<Mac>, Option<Mac>) {
        let vtep = |data: &Value| flannel::vtep(&data.to_string()).ok();
        (vtep(&self.data_v4), vtep(&self.data_v6))
    }

    /// Whether a node with these addresses wrote it.
    #[must_use]
    pub fn is_of(&self, (v4, v6): (Option<Ipv4Addr>, Option<Ipv6Addr>)) -> bool {
        match v4 {
            Some(v4) => self.public_v4 == v4,
            None => v6.is_some() && self.public_v6 == v6,
        }
    }

    /// The node as a peer: `None` if it takes no part, or with another backend. What is wrong in one family is told and
    /// does not take away the other.
    #[must_use]
    pub fn peer(&self, subnets: Taken, backend: &Backend) -> (Option<Peer>, Vec<String>) {
        if self.backend != backend.name() {
            return (None, Vec::new());
        }
        let mut problems = Vec::new();
        let mut vtep = |name: &str, data: &Value| match backend {
            Backend::HostGw => Some(None),
            Backend::Vxlan(_) => match flannel::vtep(&data.to_string()) {
                Ok(vtep) => Some(Some(vtep)),
                Err(error) => {
                    problems.push(format!("{name}: {error}"));
                    None
                }
            },
        };
        let v4 = subnets.v4.and_then(|subnet| {
            let vtep = vtep("BackendData", &self.data_v4)?;
            let public = self.public_v4;
            Some(Lease { subnet, public, vtep })
        });
        let v6 = subnets.v6.zip(self.public_v6).and_then(|(subnet, public)| {
            let vtep = vtep("BackendV6Data", &self.data_v6)?;
            Some(Lease { subnet, public, vtep })
        });
        (
            (v4.is_some() || v6.is_some()).then_some(Peer { v4, v6 }),
            problems,
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::overlay::netconf::Vxlan;

    fn taken(text: &str) -> Taken {
        text.parse().unwrap()
    }

    #[test]
    fn keys_are_flannels() {
        for text in [
            "10.5.52.0-24",
            "10.5.52.0-24&2001:cafe:42::-64",
            "0.0.0.0-0&2001:cafe:42::-64",
        ] {
            assert_eq!(taken(text).to_string(), text);
        }
        assert_eq!(taken("0.0.0.0-0&2001:cafe:42::-64").v4, None);
        for text in [
            "",
            "10.5.52.0",
            "10.5.52.0-33",
            "10.5.52.0-24&",
            "x-24",
            "10.5.52.0-24&y-64",
        ] {
            assert!(text.parse::<Taken>().is_err(), "{text}");
        }
    }

    #[test]
    fn values_are_flannels() {
        let announcement = Announcement {
            v4: Some((
                "192.168.64.3".parse().unwrap(),
                Some("52:12:34:56:78:9a".parse().unwrap()),
            )),
            v6: None,
            backend: Backend::Vxlan(Vxlan::default()),
        };
        let text = r#"{"PublicIP":"192.168.64.3","PublicIPv6":null,"BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"52:12:34:56:78:9a"}}"#;
        let written = Attributes::of(&announcement);
        assert_eq!(serde_json::to_string(&written).unwrap(), text);
        let (peer, problems) = written.peer(taken("10.5.52.0-24"), &announcement.backend);
        let lease = peer.unwrap().v4.unwrap();
        assert_eq!(
            (lease.public.to_string(), lease.subnet.to_string()),
            ("192.168.64.3".into(), "10.5.52.0/24".into())
        );
        assert_eq!(
            (lease.vtep, problems),
            (Some("52:12:34:56:78:9a".parse().unwrap()), Vec::new())
        );

        let routes = Announcement {
            backend: Backend::HostGw,
            v4: Some(("192.168.64.3".parse().unwrap(), None)),
            v6: None,
        };
        let written = Attributes::of(&routes);
        assert_eq!(
            serde_json::to_string(&written).unwrap(),
            r#"{"PublicIP":"192.168.64.3","PublicIPv6":null,"BackendType":"host-gw"}"#
        );
        assert!(written.peer(taken("10.5.52.0-24"), &Backend::HostGw).0.is_some());
        // another backend takes no part
        assert_eq!(
            written.peer(taken("10.5.52.0-24"), &announcement.backend),
            (None, Vec::new())
        );
    }

    #[test]
    fn one_family_that_is_wrong_does_not_take_away_the_other() {
        let text = r#"{"PublicIP":"192.168.64.3","PublicIPv6":"fd00::3","BackendType":"vxlan",
            "BackendData":{"VNI":1,"VtepMAC":"nothing"},"BackendV6Data":{"VNI":1,"VtepMAC":"52:12:34:56:78:9a"}}"#;
        let found: Attributes = serde_json::from_str(text).unwrap();
        let (peer, problems) = found.peer(taken("10.5.52.0-24&fd01::-64"), &Backend::Vxlan(Vxlan::default()));
        let peer = peer.unwrap();
        assert!(peer.v4.is_none() && peer.v6.is_some());
        assert!(problems[0].starts_with("BackendData:"), "{problems:?}");
    }

    #[test]
    fn only_free_subnets_between_the_first_and_the_last_are_taken() {
        let conf = NetConf::parse(
            r#"{"Network": "10.0.0.0/16", "SubnetLen": 24, "SubnetMin": "10.0.10.0", "SubnetMax": "10.0.12.0",
                "EnableIPv6": true, "IPv6Network": "fd00::/48", "IPv6SubnetLen": 64}"#,
        )
        .unwrap();
        let mut random = rand::rng();
        let mut leases = Vec::new();
        for _ in 0..3 {
            let next = choose(&conf, &leases, &mut random).unwrap();
            assert!(next.fits(&conf), "{next}");
            assert!(
                leases.iter().all(|lease: &Taken| !lease.overlaps(&next)),
                "{next} {leases:?}"
            );
            leases.push(next);
        }
        let error = choose(&conf, &leases, &mut random).unwrap_err();
        assert!(error.contains("no IPv4 subnet is free"), "{error}");
        // a larger one takes all that are in it
        let large = vec![taken("10.0.8.0-22")];
        assert_eq!(
            choose(&conf, &large, &mut random)
                .unwrap()
                .v4
                .unwrap()
                .to_string(),
            "10.0.12.0/24"
        );
        for (text, fits) in [
            ("10.0.11.0-24&fd00:0:0:5::-64", true),
            ("10.0.9.0-24&fd00:0:0:5::-64", false),
            ("10.0.13.0-24&fd00:0:0:5::-64", false),
            ("10.0.11.0-25&fd00:0:0:5::-64", false),
            ("10.0.11.0-24&fd00::-64", false),
            ("10.0.11.0-24", false),
        ] {
            assert_eq!(taken(text).fits(&conf), fits, "{text}");
        }
    }

    #[test]
    fn what_the_node_had_is_in_subnet_env() {
        let text = "FLANNEL_NETWORK=10.0.0.0/16\nFLANNEL_SUBNET=10.0.5.1/24\nFLANNEL_IPV6_SUBNET=fd00:0:0:5::1/64\nFLANNEL_MTU=1450\n";
        assert_eq!(Taken::from_subnet_env(text), taken("10.0.5.0-24&fd00:0:0:5::-64"));
        assert_eq!(Taken::from_subnet_env("FLANNEL_SUBNET=noise\n"), Taken::default());
    }
}
