//! Flags of the agent for the pod network, with flannel's names where flannel has them (spec cni-overlay 1.2).

use std::net::{Ipv4Addr, Ipv6Addr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use beeline_cni::protocol::{DEFAULT_SOCKET, DEFAULT_STATE_DIR};
use beeline_etcd::Access;
use clap::Args;
use ipnet::IpNet;

use super::engine::Settings;
use super::etcd;
use super::flannel::{DEFAULT_PREFIX, Prefix};
use super::handover::Places;
use super::netconf::NetConf;
use crate::cni;
use crate::config::Unusable;

/// Where host-local keeps the addresses of flannel's pods.
pub const HOST_LOCAL_DIR: &str = "/var/lib/cni/networks/cbr0";

/// Flags of `beeline agent` for the pod network.
#[derive(Debug, Args)]
#[command(next_help_heading = "Pod network")]
pub struct NetworkArgs {
    /// flannel's net-conf.json: connect this node's pods with those of other nodes, and serve the CNI plugin
    #[arg(long, value_name = "FILE", conflicts_with = "dir")]
    net_config_path: Option<PathBuf>,
    #[command(flatten)]
    etcd: EtcdArgs,
    /// Device that reaches other nodes, by name or address [default: that of the default route]
    #[arg(long, value_name = "NAME")]
    iface: Option<String>,
    /// Where other nodes send to [default: the address of the device]
    #[arg(long)]
    public_ip: Option<Ipv4Addr>,
    /// Where other nodes send to [default: the address of the device]
    #[arg(long)]
    public_ipv6: Option<Ipv6Addr>,
    /// Start of the names of the annotations that nodes tell each other
    #[arg(long, default_value = DEFAULT_PREFIX, value_parser = Prefix::new)]
    kube_annotation_prefix: Prefix,
    /// Where flannel's CNI plugin finds the network; empty: not written
    #[arg(long, default_value = "/run/flannel/subnet.env")]
    subnet_file: PathBuf,
    /// Whether packets of pods to the world get this node's address
    #[arg(long, value_name = "BOOL", num_args = 0..=1, default_value_t = true, default_missing_value = "true",
          require_equals = true, action = clap::ArgAction::Set)]
    ip_masq: bool,
    /// Networks that are not the world: pods' packets go there with their own address, as to other pods
    #[arg(long, value_delimiter = ',', value_name = "CIDR")]
    non_masquerade_cidrs: Vec<IpNet>,
    /// Whether packets between pods go straight from device to device where they can, past this node's routing and netfilter;
    /// switch it off where other programs' rules for pods are to be obeyed
    #[arg(long, value_name = "BOOL", num_args = 0..=1, default_value_t = true, default_missing_value = "true",
          require_equals = true, action = clap::ArgAction::Set)]
    pod_shortcut: bool,
    /// How often the way to each other node is looked at, in seconds; 0: never
    #[arg(long, value_name = "SECONDS", default_value_t = 30)]
    path_probe_interval: u32,
    /// Socket of the CNI plugin
    #[arg(long, default_value = DEFAULT_SOCKET)]
    cni_socket: PathBuf,
    /// Network configuration for the runtime, written as soon as pods can have a network [default: not written]
    #[arg(long, value_name = "FILE")]
    cni_conf_file: Option<PathBuf>,
    /// Where attachments and addresses of pods are kept
    #[arg(long, default_value = DEFAULT_STATE_DIR)]
    cni_state_dir: PathBuf,
    /// Addresses that the host-local plugin gave out: they are not given out again
    #[arg(long, default_value = HOST_LOCAL_DIR)]
    host_local_dir: PathBuf,
}

/// Flags of flannel's etcd subnet manager.
#[derive(Debug, Args)]
struct EtcdArgs {
    /// etcd servers where flannel's configuration and leases are, instead of net-conf.json and the Node objects of an API
    #[arg(
        long,
        value_delimiter = ',',
        value_name = "URL",
        env = "FLANNELD_ETCD_ENDPOINTS",
        conflicts_with = "net_config_path"
    )]
    etcd_endpoints: Vec<String>,
    /// What flannel's keys in etcd begin with
    #[arg(
        long,
        value_name = "KEY",
        env = "FLANNELD_ETCD_PREFIX",
        default_value = "/coreos.com/network"
    )]
    etcd_prefix: String,
    /// Certificate of the authority that signed etcd's certificates
    #[arg(long, value_name = "FILE", env = "FLANNELD_ETCD_CAFILE")]
    etcd_cafile: Option<PathBuf>,
    /// Certificate that etcd knows this node by
    #[arg(
        long,
        value_name = "FILE",
        env = "FLANNELD_ETCD_CERTFILE",
        requires = "etcd_keyfile"
    )]
    etcd_certfile: Option<PathBuf>,
    /// Key of that certificate
    #[arg(
        long,
        value_name = "FILE",
        env = "FLANNELD_ETCD_KEYFILE",
        requires = "etcd_certfile"
    )]
    etcd_keyfile: Option<PathBuf>,
    /// User of etcd
    #[arg(
        long,
        value_name = "NAME",
        env = "FLANNELD_ETCD_USERNAME",
        requires = "etcd_password"
    )]
    etcd_username: Option<String>,
    /// Password of that user; better in the environment, where other users of this host do not see it
    #[arg(
        long,
        value_name = "PASSWORD",
        env = "FLANNELD_ETCD_PASSWORD",
        hide_env_values = true,
        requires = "etcd_username"
    )]
    etcd_password: Option<String>,
    /// How long before its end this node's lease is renewed, in minutes
    #[arg(long, value_name = "MINUTES", env = "FLANNELD_SUBNET_LEASE_RENEW_MARGIN", default_value_t = 60, value_parser = clap::value_parser!(u32).range(1..1440))]
    subnet_lease_renew_margin: u32,
}

impl EtcdArgs {
    /// `None`: etcd has nothing to do with it.
    fn manager(&self) -> Result<Option<Arc<etcd::Manager>>, Unusable> {
        if self.etcd_endpoints.is_empty() {
            return Ok(None);
        }
        let access = Access {
            servers: self.etcd_endpoints.clone(),
            ca_file: self.etcd_cafile.clone(),
            identity: self.etcd_certfile.clone().zip(self.etcd_keyfile.clone()),
            user: self.etcd_username.clone().zip(self.etcd_password.clone()),
        };
        let margin = Duration::from_mins(self.subnet_lease_renew_margin.into());
        let manager = etcd::Manager::new(etcd::Settings::new(access, &self.etcd_prefix, margin))
            .map_err(|error| Unusable(format!("--etcd-endpoints: {error}")))?;
        Ok(Some(Arc::new(manager)))
    }
}

/// The pod network's settings.
#[derive(Clone, Debug)]
pub struct NetworkConfig {
    /// Of the overlay; with etcd, what etcd says takes the place of the network's configuration.
    pub settings: Settings,
    /// flannel's leases in etcd; `None`: nodes are objects of an API.
    pub etcd: Option<Arc<etcd::Manager>>,
    /// Of the CNI plugin's requests.
    pub cni: cni::Config,
    /// Socket of the CNI plugin.
    pub socket: PathBuf,
    /// The runtime's network configuration, if it is to be written.
    pub cni_conf: Option<cni::install::Conf>,
    /// How often the way to each other node is looked at; `None`: never.
    pub probe_period: Option<Duration>,
    /// Networks that pods reach with their own address, besides the pods'.
    pub non_masquerade_cidrs: Vec<IpNet>,
    /// Whether packets between pods go past the node's routing and netfilter.
    pub pod_shortcut: bool,
}

impl NetworkArgs {
    /// Where pods are noted.
    #[must_use]
    pub fn places(&self) -> Places {
        Places {
            cni_state_dir: self.cni_state_dir.clone(),
            host_local_dir: self.host_local_dir.clone(),
        }
    }

    /// Settings for a node; `None`: the pod network is somebody else's business.
    ///
    /// # Errors
    ///
    /// When net-conf.json or a flag for etcd cannot be used.
    pub fn config(&self, node_name: &str) -> Result<Option<NetworkConfig>, Unusable> {
        let etcd = self.etcd.manager()?;
        let conf = match (&self.net_config_path, &etcd) {
            (Some(path), _) => {
                let wrong = |error: &dyn std::fmt::Display| {
                    Unusable(format!("--net-config-path {}: {error}", path.display()))
                };
                let text = std::fs::read_to_string(path).map_err(|error| wrong(&error))?;
                NetConf::parse(&text).map_err(|error| wrong(&error))?
            }
            (None, Some(_)) => NetConf::default(),
            (None, None) => return Ok(None),
        };
        let settings = Settings {
            prefix: self.kube_annotation_prefix.clone(),
            iface: self.iface.clone(),
            public_v4: self.public_ip,
            public_v6: self.public_ipv6,
            subnet_file: Some(self.subnet_file.clone()).filter(|path| !path.as_os_str().is_empty()),
            masquerade: self.ip_masq,
            own_range: true,
            ..Settings::new(conf, node_name)
        };
        let cni = cni::Config {
            state_dir: self.cni_state_dir.clone(),
            host_local: Some(self.host_local_dir.clone()),
            ..cni::Config::default()
        };
        Ok(Some(NetworkConfig {
            settings,
            etcd,
            cni,
            socket: self.cni_socket.clone(),
            cni_conf: self.cni_conf_file.clone().map(|path| cni::install::Conf {
                path,
                socket: self.cni_socket.clone(),
                state_dir: self.cni_state_dir.clone(),
            }),
            probe_period: (self.path_probe_interval > 0)
                .then(|| Duration::from_secs(self.path_probe_interval.into())),
            non_masquerade_cidrs: self.non_masquerade_cidrs.clone(),
            pod_shortcut: self.pod_shortcut,
        }))
    }
}
