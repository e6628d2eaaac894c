//! What holds for the whole node: its configuration and its addresses, kept in step with the settings, the host, the Node
//! object and the cluster's ranges.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::time::Duration;

use dataplane_common::abi::{NodeConfig, config_flag};
use ipnet::IpNet;
use tokio::sync::watch;
use tracing::{error, warn};

use crate::config::{AgentConfig, SourceConfig};
use crate::kernel::{self, NodeTables};
use crate::nodeaddr;
use crate::proxyconfig::KubeProxyConfiguration;
use crate::takeover::Programmed;

/// How long the addresses of the Node object are waited for, kube-proxy's.
const NODE_ADDRESS_WAIT: Duration = Duration::from_secs(30);
/// First and last port (host order) that translation gives out. Linux gives its own sockets 32768 to 60999 unless it is
/// told otherwise (these are reserved then, too), and node ports are between. That a server of the host listens in the
/// range does no harm: only packets from a backend's address and port are taken for answers.
pub const NAT_PORTS: (u16, u16) = (15_000, 29_999);

/// The cluster's ranges; `None` while they are not known.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Ranges {
    /// Of ServiceCIDR objects.
    pub services: Option<Vec<IpNet>>,
    /// Of the Node object (`spec.podCIDRs`).
    pub pods: Option<Vec<IpNet>>,
}

/// Where the addresses that serve NodePorts come from.
pub(super) fn address_settings(config: &AgentConfig) -> nodeaddr::Settings {
    let bind_address: Option<IpAddr> = config.proxy.bind_address.parse().ok();
    nodeaddr::Settings {
        bind_address: bind_address.filter(|ip| !ip.is_unspecified()),
        node_port_addresses: nodeaddr::NodePortAddresses::parse(&config.proxy.node_port_addresses),
        wait: match config.source {
            // files may never tell of a Node
            SourceConfig::Dir(_) => Duration::from_secs(1),
            _ => NODE_ADDRESS_WAIT,
        },
    }
}

/// The row of `CONFIG`. What is not known yet stays as it is in `held`: an earlier agent knew it.
#[must_use]
pub fn configuration(proxy: &KubeProxyConfiguration, ranges: &Ranges, held: &NodeConfig) -> NodeConfig {
    let mut config = NodeConfig {
        // Not kube-proxy's own bit but the one beside it: while one takes over from the other, its rules would masquerade
        // what our programs have marked, in the middle of connections.
        mark: proxy.masquerade_mark().rotate_right(1),
        nat_first: NAT_PORTS.0,
        nat_last: NAT_PORTS.1,
        ..NodeConfig::default()
    };
    if proxy.masquerade_all() {
        config.flags |= config_flag::MASQUERADE_ALL;
    }
    if proxy.localhost_node_ports() {
        config.flags |= config_flag::LOCALHOST_NODE_PORTS;
    }
    match &ranges.services {
        Some(services) => fill(&mut config.service_ranges, services, "service"),
        None => config.service_ranges = held.service_ranges,
    }
    match pod_ranges(proxy, ranges) {
        Some(pods) => fill(&mut config.pod_ranges, &pods, "pod"),
        None => config.pod_ranges = held.pod_ranges,
    }
    config
}

fn fill(rows: &mut [dataplane_common::abi::Range], ranges: &[IpNet], what: &str) {
    if ranges.len() > rows.len() {
        let (known, ignored) = (rows.len(), ranges.len() - rows.len());
        warn!(
            "the cluster has more {what} ranges than the {known} that the programs take: {ignored} are ignored"
        );
    }
    for (row, net) in rows.iter_mut().zip(ranges) {
        *row = kernel::range(net.network(), net.prefix_len());
    }
}

/// Which sources are pods: the first range of each family, as kube-proxy (spec kube-proxy 2.1, detect-local). `None` if
/// it is not known yet.
fn pod_ranges(proxy: &KubeProxyConfiguration, ranges: &Ranges) -> Option<Vec<IpNet>> {
    let all: Vec<IpNet> = match proxy.detect_local_mode.as_str() {
        "NodeCIDR" => ranges.pods.clone()?,
        // a pod's device says it
        "BridgeInterface" | "InterfaceNamePrefix" => Vec::new(),
        _ => match proxy.cluster_cidrs() {
            // what comes from there by a device of this node is a pod's in any case
            none if none.is_empty() => ranges.pods.clone()?,
            cluster => cluster,
        },
    };
    let first = |v4: bool| all.iter().find(|net| net.addr().is_ipv4() == v4).copied();
    Some([first(true), first(false)].into_iter().flatten().collect())
}

/// Keeps the tables in step. Until the Node is known, or the wait for it is over, the addresses stay as an earlier agent
/// left them; the configuration is written at once.
pub(super) async fn keep(
    proxy: KubeProxyConfiguration,
    settings: nodeaddr::Settings,
    node: watch::Receiver<Option<Vec<IpAddr>>>,
    mut ranges: watch::Receiver<Ranges>,
    health_checks_at: watch::Sender<BTreeSet<IpAddr>>,
    programmed: watch::Sender<Programmed>,
    mut tables: NodeTables,
) {
    let configure = |tables: &NodeTables, ranges: &Ranges| {
        tables.set_config(&configuration(&proxy, ranges, &tables.config()));
    };
    configure(&tables, &ranges.borrow_and_update());
    let mut addresses = match nodeaddr::watch(settings, node).await {
        Ok(addresses) => Some(addresses),
        Err(error) => {
            error!(%error, "the addresses of this host cannot be read: NodePorts are served where they were before");
            None
        }
    };
    loop {
        if let Some(addresses) = &mut addresses {
            let (flags, at) = {
                let addresses = addresses.borrow_and_update();
                (addresses.flags(), addresses.health_checks_at())
            };
            health_checks_at.send_if_modified(|known| {
                let changed = *known != at;
                *known = at;
                changed
            });
            let written = tables.set_addrs(&flags);
            if let Err(error) = &written {
                error!(%error, "the addresses of this node cannot be written");
            }
            programmed.send_if_modified(|programmed| {
                std::mem::replace(&mut programmed.addresses, written.is_ok()) != written.is_ok()
            });
        }
        configure(&tables, &ranges.borrow_and_update());
        let changed = async {
            match &mut addresses {
                Some(addresses) => addresses.changed().await,
                None => std::future::pending().await,
            }
        };
        let ended = tokio::select! {
            result = changed => result,
            result = ranges.changed() => result,
        };
        if ended.is_err() {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use dataplane_common::abi::Range;

    use super::*;

    fn nets(texts: &[&str]) -> Vec<IpNet> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    #[test]
    fn the_settings_become_the_configuration() {
        let mut proxy = KubeProxyConfiguration::defaults();
        let mut held = NodeConfig::default();
        held.service_ranges[0] = kernel::range("10.1.0.0".parse().unwrap(), 16);
        held.pod_ranges[0] = kernel::range("10.2.0.0".parse().unwrap(), 16);
        let config = configuration(&proxy, &Ranges::default(), &held);
        assert_eq!(config.mark, 0x2000);
        assert_eq!(config.flags, config_flag::LOCALHOST_NODE_PORTS);
        assert_eq!((config.nat_first, config.nat_last), NAT_PORTS);
        assert_eq!(config.service_ranges, held.service_ranges);

        proxy.mode = "nftables".into();
        proxy.nftables.masquerade_all = true;
        proxy.nftables.masquerade_bit = Some(3);
        proxy.iptables.localhost_node_ports = Some(false);
        let ranges = Ranges {
            services: Some(nets(&["10.96.0.0/16", "fd00:96::/108"])),
            pods: Some(nets(&["10.244.1.0/24"])),
        };
        let config = configuration(&proxy, &ranges, &held);
        assert_eq!((config.mark, config.flags), (4, config_flag::MASQUERADE_ALL));
        assert_eq!(config.service_ranges[0].addr.to_string(), "10.96.0.0");
        assert_eq!(config.service_ranges[1].addr.to_string(), "fd00:96::");
        // ClusterCIDR without one: the node's own
        assert_eq!(config.pod_ranges[0].addr.to_string(), "10.244.1.0");
        assert_eq!(config.pod_ranges[1], Range::default());
    }

    #[test]
    fn pods_are_who_detect_local_says() {
        let mut proxy = KubeProxyConfiguration::defaults();
        proxy.cluster_cidr = "10.244.0.0/16,fd00:244::/56".into();
        let ranges = Ranges {
            services: None,
            pods: Some(nets(&["10.244.1.0/24", "10.245.1.0/24", "fd00:244:1::/64"])),
        };
        assert_eq!(
            pod_ranges(&proxy, &ranges),
            Some(nets(&["10.244.0.0/16", "fd00:244::/56"]))
        );
        proxy.detect_local_mode = "NodeCIDR".into();
        assert_eq!(
            pod_ranges(&proxy, &ranges),
            Some(nets(&["10.244.1.0/24", "fd00:244:1::/64"]))
        );
        assert_eq!(pod_ranges(&proxy, &Ranges::default()), None);
        proxy.detect_local_mode = "BridgeInterface".into();
        assert_eq!(pod_ranges(&proxy, &ranges), Some(Vec::new()));
    }
}
