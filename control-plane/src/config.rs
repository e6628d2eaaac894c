//! What an operator can set.

use std::net::{IpAddr, SocketAddr};
use std::ops::RangeInclusive;
use std::path::PathBuf;

use clap::Args;
use ipnet::IpNet;

use crate::store::EtcdOptions;

/// The domain of clusters that have none of their own.
const DOMAIN: &str = "cluster.local";

/// Settings of the control plane; the command line flattens this.
#[derive(Debug, Clone, Args)]
pub struct Config {
    /// Directory for the store, certificates and keys; created if missing
    #[arg(long, default_value = "/var/lib/beeline/control-plane")]
    pub data_dir: PathBuf,

    /// Address and port that the API is served on
    #[arg(long, default_value = "127.0.0.1:6443")]
    pub bind: SocketAddr,

    /// Addresses and names under which clients reach the API: they go into the certificate, the first one into the kubeconfig
    #[arg(long, value_delimiter = ',')]
    pub advertise: Vec<String>,

    /// Ranges of ClusterIPs, at most one per address family; the first one's family is the default for Services
    #[arg(long = "service-cidr", value_delimiter = ',', default_value = "10.96.0.0/12")]
    pub service_cidrs: Vec<IpNet>,

    /// Ranges of pod addresses, at most one per address family, of which each node gets a part; an empty list gives none
    #[arg(long = "cluster-cidr", value_delimiter = ',', default_value = "10.244.0.0/16")]
    pub cluster_cidrs: Vec<IpNet>,

    /// Range of NodePorts, first-last
    #[arg(long, default_value = "30000-32767", value_parser = port_range)]
    pub node_port_range: RangeInclusive<u16>,

    /// Where the administrator's kubeconfig is written (default: admin.kubeconfig in the data directory)
    #[arg(long)]
    pub kubeconfig: Option<PathBuf>,

    /// Seconds of history that watchers and paged lists can go back to, at least
    #[arg(long, default_value_t = 300, value_parser = clap::value_parser!(u64).range(1..))]
    pub history_seconds: u64,

    /// Leave giving nodes to pods to a scheduler of your own
    #[arg(long)]
    pub no_scheduler: bool,

    /// Requests that read, of others than administrators, that are worked on at a time; further ones are told to come again (429).
    /// 0 is any number
    #[arg(long, default_value_t = 400)]
    pub max_requests_inflight: usize,

    /// The same for requests that write
    #[arg(long, default_value_t = 200)]
    pub max_mutating_requests_inflight: usize,

    /// Requests in a second of one user who is no administrator, with twice as many at once; further ones are told to come
    /// again (429). 0 is any number
    #[arg(long, default_value_t = 400)]
    pub max_user_requests_per_second: u32,

    /// File to which a line of audit.k8s.io/v1 JSON is appended for each request, without its content
    #[arg(long)]
    pub audit_log_path: Option<PathBuf>,

    /// Address and port at which the cluster's DNS is served; without it there is none. Its clients come through the Service
    /// kube-system/kube-dns, at the tenth address of the range of Services, so that the port can be any
    #[arg(long)]
    pub dns_bind: Option<SocketAddr>,

    /// Domain of the cluster's names
    #[arg(long, default_value = DOMAIN)]
    pub cluster_domain: String,

    /// Servers that are asked for names outside the cluster [default: those of /etc/resolv.conf]
    #[arg(long, value_delimiter = ',')]
    pub dns_upstream: Vec<SocketAddr>,

    /// Seconds for which the control plane that runs the controllers may be silent before another one on the same etcd does
    #[arg(long, default_value_t = 15, value_parser = clap::value_parser!(u64).range(1..))]
    pub leader_lease_seconds: u64,

    /// Where objects are kept if not in the data directory
    #[command(flatten)]
    pub etcd: EtcdOptions,
}

impl Config {
    /// The defaults, with everything kept under `data_dir`.
    pub fn new(data_dir: impl Into<PathBuf>) -> Self {
        Self {
            data_dir: data_dir.into(),
            bind: SocketAddr::from(([127, 0, 0, 1], 6443)),
            advertise: Vec::new(),
            service_cidrs: ipnet::Ipv4Net::new(std::net::Ipv4Addr::new(10, 96, 0, 0), 12)
                .map(IpNet::V4)
                .into_iter()
                .collect(),
            cluster_cidrs: ipnet::Ipv4Net::new(std::net::Ipv4Addr::new(10, 244, 0, 0), 16)
                .map(IpNet::V4)
                .into_iter()
                .collect(),
            node_port_range: 30000..=32767,
            kubeconfig: None,
            history_seconds: 300,
            no_scheduler: false,
            max_requests_inflight: 400,
            max_mutating_requests_inflight: 200,
            max_user_requests_per_second: 400,
            audit_log_path: None,
            dns_bind: None,
            cluster_domain: DOMAIN.to_owned(),
            dns_upstream: Vec::new(),
            leader_lease_seconds: 15,
            etcd: EtcdOptions::default(),
        }
    }

    /// Where the kubeconfig goes.
    pub fn kubeconfig_path(&self) -> PathBuf {
        self.kubeconfig
            .clone()
            .unwrap_or_else(|| self.data_dir.join("admin.kubeconfig"))
    }

    /// The address that pods and other nodes reach the API at, if there is one: the first advertised address, else the
    /// bound one, unless it only means something on this machine.
    pub fn advertised_ip(&self) -> Option<IpAddr> {
        let advertised = self.advertise.iter().filter_map(|name| name.parse().ok());
        advertised
            .chain([self.bind.ip()])
            .find(|ip: &IpAddr| !ip.is_loopback() && !ip.is_unspecified())
    }

    /// The host under which clients on this machine reach the API when it listens on `bound`.
    pub fn host(&self, bound: SocketAddr) -> String {
        let own = match bound.ip() {
            ip if !ip.is_unspecified() => ip.to_string(),
            IpAddr::V4(_) => "127.0.0.1".to_owned(),
            IpAddr::V6(_) => "::1".to_owned(),
        };
        let host = self.advertise.first().cloned().unwrap_or(own);
        if host.parse::<std::net::Ipv6Addr>().is_ok() {
            format!("[{host}]")
        } else {
            host
        }
    }

    /// The first address of each service range: the ClusterIPs of the Service `default/kubernetes`.
    pub fn kubernetes_ips(&self) -> Vec<IpAddr> {
        self.service_cidrs
            .iter()
            .filter_map(|cidr| cidr.hosts().next())
            .collect()
    }

    /// The ClusterIP at which pods find the cluster's DNS, if it is served.
    pub fn dns_ip(&self) -> Option<IpAddr> {
        cluster_dns(&self.service_cidrs, self.dns_bind?.ip())
    }

    /// Everything that the server's certificate is good for.
    pub fn certificate_names(&self) -> Vec<String> {
        let mut names: Vec<String> = [
            "kubernetes",
            "kubernetes.default",
            "kubernetes.default.svc",
            &format!("kubernetes.default.svc.{}", self.cluster_domain),
            "localhost",
            "127.0.0.1",
            "::1",
        ]
        .map(str::to_owned)
        .to_vec();
        names.extend(self.kubernetes_ips().iter().map(IpAddr::to_string));
        if !self.bind.ip().is_unspecified() {
            names.push(self.bind.ip().to_string());
        }
        names.extend(self.advertise.iter().cloned());
        let mut seen = std::collections::HashSet::new();
        names.retain(|name| seen.insert(name.clone()));
        names
    }
}

/// The ClusterIP of DNS that is served at an address of that family: the tenth of the range, as kubeadm has it.
pub fn cluster_dns(service_cidrs: &[IpNet], served_at: IpAddr) -> Option<IpAddr> {
    service_cidrs
        .iter()
        .find(|cidr| cidr.addr().is_ipv4() == served_at.is_ipv4())?
        .hosts()
        .nth(9)
}

fn port_range(text: &str) -> Result<RangeInclusive<u16>, String> {
    let range = text
        .split_once('-')
        .and_then(|(first, last)| Some(first.parse().ok()?..=last.parse().ok()?));
    match range {
        Some(range) if *range.start() > 0 && !range.is_empty() => Ok(range),
        _ => Err(format!("{text:?} is not a range of ports such as 30000-32767")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn port_ranges() {
        assert_eq!(port_range("30000-32767"), Ok(30000..=32767));
        for bad in ["", "30000", "2-1", "0-5", "1-65536", "a-b"] {
            assert!(port_range(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn advertised_address_is_reachable_from_elsewhere() {
        let mut config = Config::new("/x");
        assert_eq!(config.advertised_ip(), None);
        assert_eq!(config.host(config.bind), "127.0.0.1");
        config.advertise = vec!["api.example".into(), "192.0.2.1".into()];
        assert_eq!(config.advertised_ip(), Some(IpAddr::from([192, 0, 2, 1])));
        assert_eq!(config.host(config.bind), "api.example");
    }
}
