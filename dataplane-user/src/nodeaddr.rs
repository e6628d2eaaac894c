//! This node's addresses: which families it has, which addresses are its own, which of them serve NodePorts (spec
//! kube-proxy 2.5 and 6).

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::Path;
use std::time::Duration;

use dataplane_common::abi::{Addr, node_addr_flag};
use dataplane_model::Family;
use futures::TryStreamExt as _;
use ipnet::IpNet;
use k8s_openapi::api::core::v1::Node;
use nix::net::if_::if_nametoindex;
use rtnetlink::MulticastGroup;
use rtnetlink::packet_route::address::AddressMessage;
use tokio::sync::watch::{self, Receiver};
use tokio::time::Instant;
use tracing::{info, warn};

use crate::rtnl::{Socket, own_address};
use crate::takeover::IPVS_DEVICE;

/// How long a burst of changes is waited out before the addresses are read again.
const QUIET: Duration = Duration::from_millis(20);
/// Pause before the kernel is asked again after a failure.
const RETRY: Duration = Duration::from_secs(1);

/// Which addresses serve NodePorts.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum NodePortAddresses {
    /// The node's addresses as its Node object says, one of each family.
    Primary,
    /// The host's addresses in these networks. A family without a network is served at all its addresses.
    Networks(Vec<IpNet>),
}

impl NodePortAddresses {
    /// From `nodePortAddresses`, already validated: nothing means `primary`, as in kube-proxy's nftables mode.
    #[must_use]
    pub fn parse(fields: &[String]) -> Self {
        let networks: Vec<IpNet> = fields
            .iter()
            .filter_map(|field| field.trim().parse().ok())
            .collect();
        if networks.is_empty() {
            Self::Primary
        } else {
            Self::Networks(networks)
        }
    }
}

/// Settings.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Takes the place of the Node's address of its family, and makes this family the primary one.
    pub bind_address: Option<IpAddr>,
    /// Which addresses serve NodePorts.
    pub node_port_addresses: NodePortAddresses,
    /// How long the first answer waits for the Node to have addresses.
    pub wait: Duration,
}

/// The node's addresses.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct NodeAddresses {
    /// Every address of every interface of this host.
    pub all: BTreeSet<IpAddr>,
    /// Those that serve NodePorts. No loopback addresses: NodePorts at these are the socket layer's business.
    pub node_port: BTreeSet<IpAddr>,
    /// Families whose NodePorts are served at every address that this host has of them.
    pub everywhere: BTreeSet<Family>,
    /// The node's addresses as the cluster knows them: the first of the primary family, then the first of the other one.
    /// Empty while the Node has none.
    pub node_ips: Vec<IpAddr>,
}

impl NodeAddresses {
    /// Content of the map `NODE_ADDRS`: flags ([`node_addr_flag`]) by address.
    #[must_use]
    pub fn flags(&self) -> BTreeMap<Addr, u32> {
        let mut flags = BTreeMap::new();
        for ip in self.all.iter().chain(&self.node_port) {
            let node_port = if self.node_port.contains(ip) {
                node_addr_flag::NODE_PORTS
            } else {
                0
            };
            let loopback = if ip.is_loopback() {
                node_addr_flag::LOOPBACK
            } else {
                0
            };
            flags.insert(Addr::from(*ip), node_port | loopback);
        }
        flags
    }

    /// Where health check node ports are listened on (spec kube-proxy 3.3): at the wildcard address of a family that is
    /// served everywhere, otherwise at the addresses that serve NodePorts, as far as they are this host's.
    #[must_use]
    pub fn health_checks_at(&self) -> BTreeSet<IpAddr> {
        let narrow = |ip: &&IpAddr| !self.everywhere.contains(&family(**ip)) && self.all.contains(*ip);
        let narrow = self.node_port.iter().filter(narrow).copied();
        let wide = self.everywhere.iter().map(|family| match family {
            Family::V4 => IpAddr::from(Ipv4Addr::UNSPECIFIED),
            Family::V6 => IpAddr::from(Ipv6Addr::UNSPECIFIED),
        });
        narrow.chain(wide).collect()
    }
}

const fn family(ip: IpAddr) -> Family {
    match ip {
        IpAddr::V4(_) => Family::V4,
        IpAddr::V6(_) => Family::V6,
    }
}

/// A Node's addresses in the order in which kube-proxy looks at them: its internal ones, then its external ones.
#[must_use]
pub fn candidates(node: &Node) -> Vec<IpAddr> {
    let addresses = node
        .status
        .iter()
        .flat_map(|status| status.addresses.iter().flatten());
    let of = |kind: &'static str| {
        let addresses = addresses.clone();
        addresses
            .filter(move |a| a.type_ == kind)
            .filter_map(|a| a.address.trim().parse().ok())
    };
    of("InternalIP").chain(of("ExternalIP")).collect()
}

/// The first address, and the first of the other family. A bind address takes the place of its family's and comes first.
fn choose(candidates: &[IpAddr], bind_address: Option<IpAddr>) -> Vec<IpAddr> {
    let mut chosen: Vec<IpAddr> = Vec::new();
    for ip in bind_address.iter().chain(candidates) {
        if chosen.iter().all(|other| other.is_ipv4() != ip.is_ipv4()) {
            chosen.push(*ip);
        }
    }
    chosen
}

fn compute(all: BTreeSet<IpAddr>, candidates: &[IpAddr], settings: &Settings) -> NodeAddresses {
    let node_ips = choose(candidates, settings.bind_address);
    let usable = |ip: &&IpAddr| match ip {
        _ if ip.is_loopback() || ip.is_multicast() => false,
        IpAddr::V4(_) => true,
        // reachable only with an interface's name, which a NodePort's client does not give
        IpAddr::V6(v6) => !v6.is_unicast_link_local(),
    };
    let networks: Vec<IpNet> = match &settings.node_port_addresses {
        NodePortAddresses::Networks(networks) => networks.clone(),
        NodePortAddresses::Primary => node_ips.iter().copied().map(IpNet::from).collect(),
    };
    let primary = settings.node_port_addresses == NodePortAddresses::Primary;
    let mut node_port = BTreeSet::new();
    let mut everywhere = BTreeSet::new();
    for wanted in [Family::V4, Family::V6] {
        let of_family = |ip: &&IpAddr| family(**ip) == wanted;
        let mut nets = networks
            .iter()
            .filter(|net| family(net.addr()) == wanted)
            .peekable();
        let unnamed = nets.peek().is_none();
        let nets: Vec<&IpNet> = nets.collect();
        if unnamed || nets.iter().any(|net| net.prefix_len() == 0) {
            if all.iter().any(|ip| family(*ip) == wanted) {
                everywhere.insert(wanted);
            }
            node_port.extend(all.iter().filter(of_family).filter(usable));
        } else if primary {
            // the cluster knows the node by it, even if a router in front of the host holds it
            node_port.extend(node_ips.iter().filter(of_family).filter(usable));
        } else {
            let inside = |ip: &&IpAddr| nets.iter().any(|net| net.contains(*ip));
            node_port.extend(all.iter().filter(of_family).filter(usable).filter(inside));
        }
    }
    NodeAddresses {
        all,
        node_port,
        everywhere,
        node_ips,
    }
}

/// Follows the host's addresses and the Node's (`node`: those of [`candidates`], `None` while nothing is known of it, until
/// the sender is gone). Answers when the Node has addresses, or after the wait of the settings.
///
/// # Errors
///
/// If the kernel does not tell this host's addresses.
pub async fn watch(
    settings: Settings,
    mut node: Receiver<Option<Vec<IpAddr>>>,
) -> std::io::Result<Receiver<NodeAddresses>> {
    let host = open()?;
    let known = |candidates: &Option<Vec<IpAddr>>| candidates.as_ref().is_some_and(|list| !list.is_empty());
    let waited = tokio::time::timeout(settings.wait, node.wait_for(known)).await;
    if !matches!(waited, Ok(Ok(_))) && settings.bind_address.is_none() {
        warn!("the Node has no addresses yet: all addresses of this host stand in for them until it has");
    }
    drop(waited);
    let all = addresses(&host).await.map_err(std::io::Error::other)?;
    let candidates = node.borrow_and_update().clone().unwrap_or_default();
    let first = compute(all, &candidates, &settings);
    info!(node_ips = ?first.node_ips, node_ports_at = ?first.node_port, "addresses of this node");
    let (sender, receiver) = watch::channel(first);
    tokio::spawn(follow(settings, node, host, sender));
    Ok(receiver)
}

fn open() -> std::io::Result<Socket> {
    Socket::open(&[MulticastGroup::Ipv4Ifaddr, MulticastGroup::Ipv6Ifaddr])
}

/// Every address of every interface, but for those of Services: kube-proxy's ipvs mode gives them to a device of its own.
async fn addresses(host: &Socket) -> Result<BTreeSet<IpAddr>, rtnetlink::Error> {
    let messages: Vec<AddressMessage> = host.handle.address().get().execute().try_collect().await?;
    let services = if_nametoindex(IPVS_DEVICE).ok();
    let of_host = messages
        .iter()
        .filter(|message| Some(message.header.index) != services);
    Ok(of_host.filter_map(own_address).collect())
}

async fn follow(
    settings: Settings,
    mut node: Receiver<Option<Vec<IpAddr>>>,
    mut host: Socket,
    sender: watch::Sender<NodeAddresses>,
) {
    let mut retry_at: Option<Instant> = None;
    loop {
        tokio::select! {
            alive = host.changed(QUIET, |_| true), if retry_at.is_none() => if !alive {
                retry_at = Some(Instant::now() + RETRY);
                continue;
            },
            () = tokio::time::sleep_until(retry_at.unwrap_or_else(Instant::now)), if retry_at.is_some() => {
                retry_at = None;
                match open() {
                    Ok(opened) => host = opened,
                    Err(error) => {
                        warn!(%error, "addresses of this host cannot be followed");
                        retry_at = Some(Instant::now() + RETRY);
                        continue;
                    }
                }
            },
            changed = node.changed() => if changed.is_err() {
                return;
            },
            () = sender.closed() => return,
        }
        let all = match addresses(&host).await {
            Ok(all) => all,
            Err(error) => {
                warn!(%error, "addresses of this host cannot be read");
                retry_at = Some(Instant::now() + RETRY);
                continue;
            }
        };
        let candidates = node.borrow_and_update().clone().unwrap_or_default();
        let now = compute(all, &candidates, &settings);
        sender.send_if_modified(|before| {
            if *before == now {
                return false;
            }
            if before.node_ips != now.node_ips {
                info!(before = ?before.node_ips, now = ?now.node_ips, "the addresses of the Node have changed");
            }
            if before.node_port != now.node_port {
                info!(now = ?now.node_port, "the addresses that serve NodePorts have changed");
            }
            *before = now;
            true
        });
    }
}

/// The address families that this host can serve (spec kube-proxy 6): IPv6 unless the kernel lacks it or it is switched
/// off for all devices.
#[must_use]
pub fn usable_families() -> Vec<Family> {
    families(Path::new("/proc"))
}

fn families(proc: &Path) -> Vec<Family> {
    let disabled = fs::read_to_string(proc.join("sys/net/ipv6/conf/all/disable_ipv6"));
    let v6 = proc.join("net/if_inet6").exists() && disabled.is_ok_and(|text| text.trim() != "1");
    let mut families = vec![Family::V4];
    families.extend(v6.then_some(Family::V6));
    families
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn ips(list: &[&str]) -> Vec<IpAddr> {
        list.iter().map(|ip| ip.parse().unwrap()).collect()
    }

    const HOST: &[&str] = &[
        "127.0.0.1",
        "10.0.0.1",
        "192.168.7.1",
        "::1",
        "fd00::1",
        "fe80::1",
    ];

    fn computed(bind: Option<&str>, fields: &[&str], node: &[&str]) -> NodeAddresses {
        let settings = Settings {
            bind_address: bind.map(|ip| ip.parse().unwrap()),
            node_port_addresses: NodePortAddresses::parse(
                &fields.iter().map(|f| (*f).into()).collect::<Vec<String>>(),
            ),
            wait: Duration::ZERO,
        };
        compute(ips(HOST).into_iter().collect(), &ips(node), &settings)
    }

    #[test]
    fn internal_addresses_come_before_external_ones_and_one_of_each_family_counts() {
        let node: Node = serde_json::from_value(json!({"status": {"addresses": [
            {"type": "Hostname", "address": "n"}, {"type": "ExternalIP", "address": "198.51.100.1"},
            {"type": "InternalIP", "address": "noise"}, {"type": "InternalIP", "address": "fd00::1"},
            {"type": "InternalIP", "address": "fd00::2"}]}}))
        .unwrap();
        let found = candidates(&node);
        assert_eq!(found, ips(&["fd00::1", "fd00::2", "198.51.100.1"]));
        assert_eq!(choose(&found, None), ips(&["fd00::1", "198.51.100.1"]));
        let bind = "10.0.0.1".parse().ok();
        assert_eq!(
            choose(&found, bind),
            ips(&["10.0.0.1", "fd00::1"]),
            "its family is the primary one"
        );
        assert_eq!(choose(&[], None), ips(&[]));
        assert_eq!(candidates(&Node::default()), ips(&[]));
    }

    #[test]
    fn node_ports_are_served_where_the_settings_say() {
        for (bind, fields, node, expected) in [
            (
                None,
                &[][..],
                &["10.0.0.1", "fd00::1"][..],
                &["10.0.0.1", "fd00::1"][..],
            ),
            (
                None,
                &["primary"],
                &["10.0.0.1", "fd00::1"],
                &["10.0.0.1", "fd00::1"],
            ),
            // of a family without an address of the Node, all
            (None, &["primary"], &["10.0.0.1"], &["10.0.0.1", "fd00::1"]),
            (None, &["primary"], &["198.51.100.1", "::1"], &["198.51.100.1"]),
            (
                Some("192.168.7.1"),
                &[],
                &["10.0.0.1", "fd00::1"],
                &["192.168.7.1", "fd00::1"],
            ),
            // nobody knows better
            (None, &["primary"], &[], &["10.0.0.1", "192.168.7.1", "fd00::1"]),
            (
                None,
                &["192.168.0.0/16"],
                &["10.0.0.1"],
                &["192.168.7.1", "fd00::1"],
            ),
            (
                None,
                &["192.168.0.0/16", "fd01::/16"],
                &["10.0.0.1"],
                &["192.168.7.1"],
            ),
            (
                None,
                &["0.0.0.0/0", "::/0"],
                &[],
                &["10.0.0.1", "192.168.7.1", "fd00::1"],
            ),
            (None, &["172.16.0.0/12", "fd01::/16"], &["10.0.0.1"], &[]),
        ] {
            let found = computed(bind, fields, node);
            let found: Vec<IpAddr> = found.node_port.into_iter().collect();
            assert_eq!(found, ips(expected), "{bind:?} {fields:?} {node:?}");
        }
    }

    #[test]
    fn health_checks_are_answered_where_node_ports_are() {
        for (fields, node, expected) in [
            (
                &[][..],
                &["10.0.0.1", "fd00::1"][..],
                &["10.0.0.1", "fd00::1"][..],
            ),
            (&[], &["10.0.0.1"], &["10.0.0.1", "::"]),
            (&[], &[], &["0.0.0.0", "::"]),
            // not an address of this host: nobody can listen there
            (&[], &["198.51.100.1", "fd00::1"], &["fd00::1"]),
            (&["192.168.0.0/16", "::/0"], &[], &["192.168.7.1", "::"]),
            (&["0.0.0.0/0", "fd00::/16"], &[], &["0.0.0.0", "fd00::1"]),
        ] {
            let found = computed(None, fields, node).health_checks_at();
            assert_eq!(
                found.into_iter().collect::<Vec<_>>(),
                ips(expected),
                "{fields:?} {node:?}"
            );
        }
        let v4 = NodeAddresses {
            all: ips(&["127.0.0.1", "10.0.0.1"]).into_iter().collect(),
            ..NodeAddresses::default()
        };
        let settings = Settings {
            bind_address: None,
            node_port_addresses: NodePortAddresses::Primary,
            wait: Duration::ZERO,
        };
        let found = compute(v4.all, &[], &settings).health_checks_at();
        assert_eq!(
            found.into_iter().collect::<Vec<_>>(),
            ips(&["0.0.0.0"]),
            "there is no IPv6"
        );
    }

    #[test]
    fn flags_say_what_each_address_is() {
        let flags = computed(None, &[], &["10.0.0.1"]).flags();
        let of = |ip: &str| flags.get(&Addr::from(ip.parse::<IpAddr>().unwrap())).copied();
        assert_eq!(of("10.0.0.1"), Some(node_addr_flag::NODE_PORTS));
        assert_eq!(of("192.168.7.1"), Some(0));
        assert_eq!(of("127.0.0.1"), Some(node_addr_flag::LOOPBACK));
        assert_eq!(of("::1"), Some(node_addr_flag::LOOPBACK));
        assert_eq!(of("10.0.0.2"), None);
        assert_eq!(flags.len(), HOST.len());
    }

    #[test]
    fn a_host_without_ipv6_has_one_family() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(families(dir.path()), [Family::V4]);
        let conf = dir.path().join("sys/net/ipv6/conf/all");
        fs::create_dir_all(&conf).unwrap();
        fs::create_dir_all(dir.path().join("net")).unwrap();
        fs::write(dir.path().join("net/if_inet6"), "").unwrap();
        for (value, expected) in [("1\n", 1), ("0\n", 2)] {
            fs::write(conf.join("disable_ipv6"), value).unwrap();
            assert_eq!(families(dir.path()).len(), expected, "disable_ipv6 {value}");
        }
    }
}
