//! What an operator can set.

use std::net::IpAddr;
use std::path::PathBuf;

use beeline_cni::protocol::DEFAULT_SOCKET;
use clap::{Args, ValueEnum};

/// Flags of `beeline node` beside those of the agent.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Pods")]
pub struct NodeArgs {
    /// Addresses of this node, at most one per address family [default: what this host reaches the API and the world from]
    #[arg(long, value_delimiter = ',')]
    pub node_ip: Vec<IpAddr>,
    /// Labels of this node, as KEY=VALUE
    #[arg(long, value_delimiter = ',', value_parser = label)]
    pub node_labels: Vec<(String, String)>,
    /// Where what is known of pods is kept
    #[arg(long, default_value = "/var/lib/beeline/pods")]
    pub pod_dir: PathBuf,
    /// Directory with the manifests of static pods
    #[arg(long)]
    pub pod_manifest_path: Option<PathBuf>,
    /// Where the output of containers is kept
    #[arg(long, default_value = "/var/log/pods")]
    pub pod_log_dir: PathBuf,
    /// What containers run whose pod gives no command: an executable named like the image, with or without its tag
    #[arg(long, default_value = "/etc/beeline/images")]
    pub image_dir: PathBuf,
    /// What runs pods
    #[arg(long, value_enum, default_value_t)]
    pub runtime: RuntimeKind,
    /// Where the container runtime of `--runtime cri` listens
    #[arg(long, default_value = "unix:///run/containerd/containerd.sock")]
    pub container_runtime_endpoint: String,
    /// Start of the names of pods' network namespaces in /run/netns
    #[arg(long, default_value = "beeline-")]
    pub netns_prefix: String,
    /// Addresses of the cluster's DNS, for pods
    #[arg(long, value_delimiter = ',')]
    pub cluster_dns: Vec<IpAddr>,
    /// Domain of the cluster's DNS
    #[arg(long, default_value = "cluster.local")]
    pub cluster_domain: String,
    /// Port at which the API asks for logs
    #[arg(long, default_value_t = 10250)]
    pub kubelet_port: u16,
    /// Pods that fit on this node
    #[arg(long, default_value_t = 110)]
    pub max_pods: u32,
}

/// What runs pods.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum RuntimeKind {
    /// Programs of the host
    #[default]
    Process,
    /// A container runtime with the CRI, such as containerd
    Cri,
}

/// What the agent of the same process knows.
#[derive(Clone, Debug)]
pub struct Shared {
    /// Name of this node.
    pub node_name: String,
    /// Directory of the cgroup whose sockets the agent serves.
    pub cgroup_root: PathBuf,
    /// Where the agent listens for the CNI plugin.
    pub cni_socket: PathBuf,
    /// Kubeconfig with the node's credentials.
    pub kubeconfig: PathBuf,
}

impl Shared {
    /// The default place of the CNI plugin's socket.
    #[must_use]
    pub fn default_socket() -> PathBuf {
        DEFAULT_SOCKET.into()
    }
}

fn label(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((key, value)) if !key.is_empty() => Ok((key.to_owned(), value.to_owned())),
        _ => Err(format!("{text:?} is no KEY=VALUE")),
    }
}
