//! The agent's settings, from the command line.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, ValueEnum};
use serde_json::{Value, json};

use crate::kernel::Sizes;

/// Port of the health server, kube-proxy's.
const HEALTH_PORT: u16 = 10256;
/// Port of the metrics server, kube-proxy's.
const METRICS_PORT: u16 = 10249;
/// Where the agent's socket and lock are.
pub const STATE_DIR: &str = "/run/beeline";

/// Levels of what the eBPF programs log.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub enum EbpfLogLevel {
    /// Nothing; costs nothing.
    Off,
    /// Errors.
    Error,
    /// And warnings.
    Warn,
    /// And information.
    Info,
    /// And every decision.
    Debug,
    /// Everything.
    Trace,
}

/// A setting that cannot be used: names flag and value. Context of an error, so that the exit code says whose fault it is.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Unusable(pub String);

/// Flags of `beeline agent`.
#[derive(Debug, Args)]
pub struct AgentArgs {
    /// Name of this node in the cluster [default: the host's name in lower case]
    #[arg(long, alias = "hostname-override", env = "NODE_NAME", value_parser = node_name)]
    node_name: Option<String>,
    /// Kubeconfig of the API to watch; with neither this nor --dir, the service account of the agent's pod is used
    #[arg(long, conflicts_with = "dir")]
    kubeconfig: Option<PathBuf>,
    /// Directory of YAML or JSON files with Services, EndpointSlices and Nodes, watched instead of an API
    #[arg(long)]
    dir: Option<PathBuf>,
    /// The cgroup v2 directory whose sockets are served [default: where cgroup v2 is mounted]
    #[arg(long)]
    cgroup_root: Option<PathBuf>,
    /// Directory on a bpffs for maps and links [default: beeline/ where a bpffs is mounted; one is mounted if there is none]
    #[arg(long)]
    bpffs_root: Option<PathBuf>,
    /// Directory of the agent's socket and lock
    #[arg(long, default_value = STATE_DIR)]
    state_dir: PathBuf,
    /// Where /healthz and /livez are served; an address without a port gets 10256
    #[arg(long, default_value = "0.0.0.0:10256", value_parser = |text: &str| bind_address(text, HEALTH_PORT))]
    healthz_bind_address: SocketAddr,
    /// Where /metrics, /proxyMode and /configz are served; an address without a port gets 10249
    #[arg(long, default_value = "127.0.0.1:10249", value_parser = |text: &str| bind_address(text, METRICS_PORT))]
    metrics_bind_address: SocketAddr,
    /// Services (one per port and family) that fit
    #[arg(long, default_value_t = Sizes::default().services, value_parser = clap::value_parser!(u32).range(2..=MAX_ENTRIES))]
    max_services: u32,
    /// Backends that fit
    #[arg(long, default_value_t = Sizes::default().backends, value_parser = clap::value_parser!(u32).range(2..=MAX_ENTRIES))]
    max_backends: u32,
    /// Places in sets of backends: all sets together, and room for one more of the largest
    #[arg(long, default_value_t = Sizes::default().slots, value_parser = clap::value_parser!(u32).range(1..=MAX_ENTRIES))]
    max_slots: u32,
    /// Frontends that fit
    #[arg(long, default_value_t = Sizes::default().frontends, value_parser = clap::value_parser!(u32).range(1..=MAX_ENTRIES))]
    max_frontends: u32,
    /// Recent destinations of unconnected UDP sockets that are remembered
    #[arg(long, default_value_t = Sizes::default().sock_origins, value_parser = clap::value_parser!(u32).range(1..=MAX_ENTRIES))]
    max_sock_origins: u32,
    /// How often the maps are compared with what they should hold and repaired, in seconds, give or take a tenth; 0: never
    #[arg(long, default_value_t = 3600, value_parser = clap::value_parser!(u32).range(0..=604_800))]
    audit_period: u32,
    /// What the eBPF programs log, for debugging
    #[arg(long, value_enum, default_value_t = EbpfLogLevel::Off)]
    ebpf_log_level: EbpfLogLevel,
}

/// Largest size of a map.
const MAX_ENTRIES: i64 = 16 << 20;

/// Where objects come from.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum SourceConfig {
    /// The API that this kubeconfig names.
    Kubeconfig(PathBuf),
    /// The API of the cluster that the agent is a pod of.
    InCluster,
    /// A directory of files.
    Dir(PathBuf),
}

/// Settings of the agent, checked.
#[derive(Clone, Debug)]
pub struct AgentConfig {
    /// Name of this node.
    pub node_name: String,
    /// Where objects come from.
    pub source: SourceConfig,
    /// `None`: look it up.
    pub cgroup_root: Option<PathBuf>,
    /// `None`: look it up.
    pub bpffs_root: Option<PathBuf>,
    /// Directory of socket and lock.
    pub state_dir: PathBuf,
    /// Health server.
    pub healthz_bind_address: SocketAddr,
    /// Metrics server.
    pub metrics_bind_address: SocketAddr,
    /// Sizes of the maps.
    pub sizes: Sizes,
    /// How often the maps are audited; zero: never.
    pub audit_period: Duration,
    /// 0 (off) to 5.
    pub ebpf_log_level: u8,
}

impl TryFrom<AgentArgs> for AgentConfig {
    type Error = anyhow::Error;

    fn try_from(args: AgentArgs) -> anyhow::Result<Self> {
        let node_name = match args.node_name {
            Some(name) => name,
            None => {
                let host = nix::unistd::gethostname()?;
                node_name(&host.to_string_lossy()).map_err(|error| {
                    Unusable(format!("--node-name is not given and the host's name {error}"))
                })?
            }
        };
        let source = match (args.kubeconfig, args.dir) {
            (Some(path), _) => SourceConfig::Kubeconfig(path),
            (None, Some(dir)) if dir.is_dir() => SourceConfig::Dir(dir),
            (None, Some(dir)) => {
                return Err(Unusable(format!("--dir {}: is no directory", dir.display())).into());
            }
            (None, None) => SourceConfig::InCluster,
        };
        Ok(Self {
            node_name,
            source,
            cgroup_root: args.cgroup_root,
            bpffs_root: args.bpffs_root,
            state_dir: args.state_dir,
            healthz_bind_address: args.healthz_bind_address,
            metrics_bind_address: args.metrics_bind_address,
            sizes: Sizes {
                services: args.max_services,
                backends: args.max_backends,
                slots: args.max_slots,
                frontends: args.max_frontends,
                sock_origins: args.max_sock_origins,
            },
            audit_period: Duration::from_secs(args.audit_period.into()),
            ebpf_log_level: args.ebpf_log_level as u8,
        })
    }
}

impl AgentConfig {
    /// Body of `/configz`: kube-proxy's shape, with our own settings beside it.
    #[must_use]
    pub fn configz(&self) -> Value {
        let (source, path) = match &self.source {
            SourceConfig::Kubeconfig(path) => ("kubeconfig", path.display().to_string()),
            SourceConfig::InCluster => ("in-cluster", String::new()),
            SourceConfig::Dir(dir) => ("dir", dir.display().to_string()),
        };
        let kubeconfig = if source == "kubeconfig" { path.as_str() } else { "" };
        json!({
            "kubeproxy.config.k8s.io": {
                "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
                "kind": "KubeProxyConfiguration",
                "mode": "ebpf",
                "hostnameOverride": self.node_name,
                "healthzBindAddress": self.healthz_bind_address.to_string(),
                "metricsBindAddress": self.metrics_bind_address.to_string(),
                "clientConnection": {"kubeconfig": kubeconfig},
            },
            "beeline.dev": {
                "source": {"kind": source, "path": path},
                "stateDir": self.state_dir,
                "cgroupRoot": self.cgroup_root,
                "bpffsRoot": self.bpffs_root,
                "mapSizes": self.sizes,
                "auditPeriodSeconds": self.audit_period.as_secs(),
                "ebpfLogLevel": self.ebpf_log_level,
            },
        })
    }
}

/// Trimmed and in lower case, as kube-proxy takes it.
fn node_name(text: &str) -> Result<String, String> {
    let name = text.trim().to_lowercase();
    if name.is_empty() {
        Err("is empty".into())
    } else {
        Ok(name)
    }
}

/// `IP:port`, or an IP that gets the port.
fn bind_address(text: &str, port: u16) -> Result<SocketAddr, String> {
    if let Ok(addr) = text.parse() {
        return Ok(addr);
    }
    let bare = text
        .strip_prefix('[')
        .and_then(|t| t.strip_suffix(']'))
        .unwrap_or(text);
    bare.parse::<IpAddr>()
        .map(|ip| (ip, port).into())
        .map_err(|_| "is neither IP:port nor an IP address".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_without_a_port_get_one() {
        for (text, expected) in [
            ("0.0.0.0:1", "0.0.0.0:1"),
            ("127.0.0.1", "127.0.0.1:10256"),
            ("::1", "[::1]:10256"),
            ("[::]", "[::]:10256"),
            ("[::1]:9", "[::1]:9"),
        ] {
            assert_eq!(
                bind_address(text, HEALTH_PORT).map(|a| a.to_string()).as_deref(),
                Ok(expected),
                "{text}"
            );
        }
        for text in ["", "host", "1.2.3.4:70000", ":80", "1.2.3"] {
            assert!(bind_address(text, HEALTH_PORT).is_err(), "{text}");
        }
    }

    #[test]
    fn node_names_are_trimmed_and_lower_case() {
        assert_eq!(node_name(" Node-1\n").as_deref(), Ok("node-1"));
        assert!(node_name("  ").is_err());
    }
}
