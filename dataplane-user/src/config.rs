//! The agent's settings, from the command line.

use std::collections::BTreeMap;
use std::fmt;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use clap::{ArgAction, ArgMatches, Args, Command, ValueEnum};
use dataplane_common::abi::algorithm;
use dataplane_model::settings::{ALGORITHMS, Settings, algorithm_by_name, algorithm_name};
use serde_json::{Value, json};

use crate::devices;
use crate::kernel::Sizes;
use crate::overlay::flags::{NetworkArgs, NetworkConfig};
use crate::overlay::handover::Places;
use crate::proxyconfig::{self, KubeProxyConfiguration, ProxyFlags};

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
    /// KubeProxyConfiguration (kubeproxy.config.k8s.io/v1alpha1) to use instead of kube-proxy's flags; when it changes, the agent ends
    #[arg(long)]
    config: Option<PathBuf>,
    /// Write the configuration that is in force to this file and end
    #[arg(long)]
    write_config_to: Option<PathBuf>,
    /// Kubeconfig of the API to watch; with neither this nor --dir, the service account of the agent's pod is used
    #[arg(long, conflicts_with = "dir")]
    kubeconfig: Option<PathBuf>,
    /// URL of the API to watch, instead of the kubeconfig's
    #[arg(long, conflicts_with = "dir", value_parser = api_url)]
    master: Option<http::Uri>,
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
    /// Entries for flows from other hosts that fit, two for each flow
    #[arg(long, default_value_t = Sizes::default().conntrack, value_parser = clap::value_parser!(u32).range(1..=MAX_ENTRIES))]
    max_conntrack: u32,
    /// Entries for masqueraded flows that fit, two for each flow
    #[arg(long, default_value_t = Sizes::default().nat, value_parser = clap::value_parser!(u32).range(1..=MAX_ENTRIES))]
    max_nat: u32,
    /// Devices through which other hosts are reached, by name or as PREFIX*, between commas [default: those with a default route or an address of the Node, and tunnels]
    #[arg(long, value_delimiter = ',', value_name = "NAME")]
    devices: Vec<String>,
    /// Open TCP connections through services that are remembered; what is beyond works, but shows the backend's address as
    /// its peer and is not counted as open
    #[arg(long, default_value_t = Sizes::default().sock_connections, value_parser = clap::value_parser!(u32).range(1..=MAX_ENTRIES))]
    max_sock_connections: u32,
    /// How services choose a backend unless their annotation beeline.dev/algorithm says [default: random, or what ipvs.scheduler means]
    #[arg(long, value_parser = ALGORITHMS.map(|(name, _)| name))]
    algorithm: Option<String>,
    /// Whether traffic from other hosts is spread by Maglev tables, so that a flow keeps its backend on another node, or after its entry was lost; they take memory
    #[arg(long, default_value_t = true, action = ArgAction::Set)]
    external_maglev: bool,
    /// Whether backends that seem to have failed get no new connections, unless their Service's annotation beeline.dev/failure-detection says
    #[arg(long, default_value_t = true, action = ArgAction::Set)]
    failure_detection: bool,
    /// Whether TCP connections through a service are closed whose backend has gone from it and does not answer; otherwise they wait for their own time-outs
    #[arg(long, default_value_t = true, action = ArgAction::Set)]
    close_dead_connections: bool,
    /// Do what needs the most rights (the settings of connection tracking), and end
    #[arg(long, num_args = 0..=1, default_value_t = false, default_missing_value = "true", require_equals = true, action = ArgAction::Set)]
    init_only: bool,
    /// As `beeline cleanup`
    #[arg(long, num_args = 0..=1, default_value_t = false, default_missing_value = "true", require_equals = true, action = ArgAction::Set)]
    cleanup: bool,
    /// How often the maps are compared with what they should hold and repaired, in seconds, give or take a tenth; 0: never
    #[arg(long, default_value_t = 3600, value_parser = clap::value_parser!(u32).range(0..=604_800))]
    audit_period: u32,
    /// Remove kube-proxy's rules as soon as everything is programmed and kube-proxy has ended; connections that they translated go on
    #[arg(long)]
    take_over: bool,
    /// What the eBPF programs log, for debugging
    #[arg(long, value_enum, default_value_t = EbpfLogLevel::Off)]
    ebpf_log_level: EbpfLogLevel,
    #[command(flatten)]
    network: NetworkArgs,
    #[command(flatten)]
    log: KlogFlags,
    #[command(flatten)]
    proxy: ProxyFlags,
}

/// Flags of Kubernetes' log library.
#[derive(Debug, Args)]
struct KlogFlags {
    /// Verbosity as in Kubernetes: 4 is debug, 6 is trace
    #[arg(short = 'v', long = "v", hide = true)]
    verbosity: Option<u32>,
    /// text or json
    #[arg(long, hide = true, value_parser = ["text", "json"])]
    logging_format: Option<String>,
    /// Accepted, without effect
    #[arg(long, hide = true)]
    log_flush_frequency: Option<String>,
    /// Accepted, without effect
    #[arg(long, hide = true)]
    vmodule: Option<String>,
    /// Accepted, without effect
    #[arg(long, hide = true, num_args = 0..=1, default_missing_value = "true", require_equals = true)]
    log_text_split_stream: Option<bool>,
    /// Accepted, without effect
    #[arg(long, hide = true, num_args = 0..=1, default_missing_value = "true", require_equals = true)]
    log_json_split_stream: Option<bool>,
    /// Accepted, without effect
    #[arg(long, hide = true)]
    log_text_info_buffer_size: Option<String>,
    /// Accepted, without effect
    #[arg(long, hide = true)]
    log_json_info_buffer_size: Option<String>,
    /// Accepted, without effect
    #[arg(long, hide = true)]
    boot_id_file: Option<String>,
    /// Accepted, without effect
    #[arg(long, hide = true)]
    machine_id_file: Option<String>,
}

/// Flags whose values are nobody's business.
const SECRETS: [&str; 1] = ["etcd-password"];

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

/// How to log, as far as kube-proxy's flags and configuration say.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct LogWish {
    /// As JSON, or as text.
    pub json: Option<bool>,
    /// Kubernetes' verbosity.
    pub verbosity: Option<u32>,
}

/// Changes what is logged while the program runs; by default it cannot.
#[derive(Clone, Default)]
pub struct LogControl(Option<Arc<SetFilter>>);

/// Takes a filter, or says what is wrong with it.
type SetFilter = dyn Fn(&str) -> Result<(), String> + Send + Sync;

impl LogControl {
    /// From what does it.
    pub fn new(set: impl Fn(&str) -> Result<(), String> + Send + Sync + 'static) -> Self {
        Self(Some(Arc::new(set)))
    }

    /// Logs as Kubernetes does at this verbosity.
    ///
    /// # Errors
    ///
    /// Why that cannot be.
    pub fn set_verbosity(&self, verbosity: u32) -> Result<(), String> {
        let set = self.0.as_ref().ok_or("what is logged cannot be changed")?;
        set(log_filter(verbosity))
    }
}

impl fmt::Debug for LogControl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("LogControl")
    }
}

/// The filter that comes nearest to a verbosity of Kubernetes.
#[must_use]
pub const fn log_filter(verbosity: u32) -> &'static str {
    match verbosity {
        0..4 => "info",
        4 | 5 => "debug",
        _ => "trace",
    }
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
    /// Health server; `None`: not served.
    pub healthz_bind_address: Option<SocketAddr>,
    /// Metrics server; `None`: not served.
    pub metrics_bind_address: Option<SocketAddr>,
    /// kube-proxy's configuration as it is in force.
    pub proxy: KubeProxyConfiguration,
    /// The file it is from, and what that says.
    pub config_file: Option<(PathBuf, String)>,
    /// URL of the API, instead of the kubeconfig's.
    pub master: Option<http::Uri>,
    /// What an operator should know about the settings.
    pub warnings: Vec<String>,
    /// How to log, as far as kube-proxy's settings say.
    pub log: LogWish,
    /// Changes what is logged.
    pub log_control: LogControl,
    /// The flags that have a value, given or by default, as `/flagz` shows them.
    pub flags: BTreeMap<String, String>,
    /// Devices that the packet programs serve.
    pub devices: devices::Wanted,
    /// Sizes of the maps.
    pub sizes: Sizes,
    /// What holds for all services.
    pub settings: Settings,
    /// How often the maps are audited; zero: never.
    pub audit_period: Duration,
    /// The pod network; `None`: it is somebody else's business.
    pub network: Option<NetworkConfig>,
    /// kube-proxy's rules are removed.
    pub take_over: bool,
    /// TCP connections to a backend that has gone and does not answer are closed.
    pub close_tcp: bool,
    /// 0 (off) to 5.
    pub ebpf_log_level: u8,
}

impl TryFrom<AgentArgs> for AgentConfig {
    type Error = anyhow::Error;

    fn try_from(args: AgentArgs) -> anyhow::Result<Self> {
        let mut warnings = Vec::new();
        let (proxy, config_file) = proxy_configuration(&args, &mut warnings)?;
        let configured = Some(proxy.hostname_override.as_str()).filter(|name| !name.is_empty());
        let node_name = match (args.node_name, configured) {
            (Some(name), _) => name,
            (None, Some(name)) => {
                node_name(name).map_err(|error| Unusable(format!("hostnameOverride {name:?}: {error}")))?
            }
            (None, None) => {
                let host = nix::unistd::gethostname()?;
                node_name(&host.to_string_lossy()).map_err(|error| {
                    Unusable(format!("--node-name is not given and the host's name {error}"))
                })?
            }
        };
        let algorithm = args.algorithm.as_deref().and_then(algorithm_by_name);
        let settings = Settings {
            algorithm: algorithm.or(proxy.algorithm()).unwrap_or(algorithm::RANDOM),
            external_maglev: args.external_maglev,
            external_ips: proxy.external_ips(),
            failure_detection: args.failure_detection,
        };
        let kubeconfig = &proxy.client_connection.kubeconfig;
        let source = match args.dir {
            Some(dir) if dir.is_dir() => SourceConfig::Dir(dir),
            Some(dir) => {
                return Err(Unusable(format!("--dir {}: is no directory", dir.display())).into());
            }
            None if kubeconfig.is_empty() => SourceConfig::InCluster,
            None => SourceConfig::Kubeconfig(kubeconfig.into()),
        };
        let address = |field: &str, text: &str| match text {
            "" => Ok(None),
            text => text
                .parse()
                .map(Some)
                .map_err(|_| Unusable(format!("{field}: {text}: must be IP:port"))),
        };
        let logging = &proxy.logging;
        let format = args
            .log
            .logging_format
            .as_deref()
            .or((logging.format != "text").then_some(&logging.format));
        if proxy.enable_profiling {
            warnings.push(
                "with enableProfiling /debug/flags/v is served, but not /debug/pprof: this is no Go program"
                    .into(),
            );
        }
        if args.log.vmodule.is_some() {
            warnings.push("--vmodule has no effect here; use --log-level".into());
        }
        let log = LogWish {
            json: format.map(|format| format == "json"),
            verbosity: args
                .log
                .verbosity
                .or((logging.verbosity > 0).then_some(logging.verbosity)),
        };
        let network = args.network.config(&node_name)?;
        Ok(Self {
            node_name,
            network,
            source,
            healthz_bind_address: address("healthzBindAddress", &proxy.healthz_bind_address)?,
            metrics_bind_address: address("metricsBindAddress", &proxy.metrics_bind_address)?,
            config_file,
            master: args.master,
            warnings,
            log,
            proxy,
            log_control: LogControl::default(),
            flags: BTreeMap::new(),
            cgroup_root: args.cgroup_root,
            bpffs_root: args.bpffs_root,
            state_dir: args.state_dir,
            devices: devices::Wanted::parse(&args.devices),
            sizes: Sizes {
                services: args.max_services,
                backends: args.max_backends,
                slots: args.max_slots,
                frontends: args.max_frontends,
                sock_origins: args.max_sock_origins,
                conntrack: args.max_conntrack,
                nat: args.max_nat,
                sock_connections: args.max_sock_connections,
            },
            settings,
            audit_period: Duration::from_secs(args.audit_period.into()),
            take_over: args.take_over,
            close_tcp: args.close_dead_connections,
            ebpf_log_level: args.ebpf_log_level as u8,
        })
    }
}

/// The flags of a command that have a value, given or by default.
#[must_use]
pub fn flag_values(command: &Command, matches: &ArgMatches) -> BTreeMap<String, String> {
    let named = command
        .get_arguments()
        .filter_map(|arg| Some((arg.get_id().as_str(), arg.get_long()?)));
    named
        .filter_map(|(id, name)| {
            // not every argument has values: --help
            let values = matches.try_get_raw(id).ok().flatten()?;
            if SECRETS.contains(&name) {
                return Some((name.to_owned(), "***".to_owned()));
            }
            let values: Vec<_> = values.map(|value| value.to_string_lossy()).collect();
            Some((name.to_owned(), values.join(",")))
        })
        .collect()
}

/// kube-proxy's configuration from its file, or from flags, with its defaults; and the file it is from.
fn proxy_configuration(
    args: &AgentArgs,
    warnings: &mut Vec<String>,
) -> anyhow::Result<(KubeProxyConfiguration, Option<(PathBuf, String)>)> {
    let (mut config, file) = match &args.config {
        Some(path) => {
            let loaded = proxyconfig::load(path)
                .with_context(|| Unusable(format!("--config {}: cannot be used", path.display())))?;
            let name = path.display();
            warnings.extend(loaded.warnings.iter().map(|warning| format!("{name}: {warning}")));
            let mut ignored = args.proxy.given();
            ignored.extend(args.kubeconfig.is_some().then_some("--kubeconfig"));
            if !ignored.is_empty() {
                warnings.push(format!(
                    "with --config these flags are ignored: {}",
                    ignored.join(", ")
                ));
            }
            let mut config = loaded.config;
            config.set_defaults();
            (config, Some((path.clone(), loaded.text)))
        }
        None => {
            let mut config = KubeProxyConfiguration::defaults();
            args.proxy.apply(&mut config).map_err(Unusable)?;
            if let Some(path) = &args.kubeconfig {
                config.client_connection.kubeconfig = path.display().to_string();
            }
            (config, None)
        }
    };
    if let Some(name) = &args.node_name {
        config.hostname_override.clone_from(name);
    }
    let errors = proxyconfig::validate(&config);
    if !errors.is_empty() {
        return Err(Unusable(format!("invalid configuration: {}", errors.join("; "))).into());
    }
    let unsupported = proxyconfig::unsupported(&config);
    if !unsupported.is_empty() {
        warnings.push(format!(
            "these settings of kube-proxy have no effect here: {}",
            unsupported.join(", ")
        ));
    }
    Ok((config, file))
}

impl AgentArgs {
    /// Only what needs the most rights is to be done.
    #[must_use]
    pub const fn init_only(&self) -> bool {
        self.init_only
    }

    /// Everything is to be removed, instead of running.
    #[must_use]
    pub const fn cleanup(&self) -> bool {
        self.cleanup
    }

    /// The directory on a bpffs, and the state directory.
    #[must_use]
    pub fn places(&self) -> (Option<PathBuf>, PathBuf, Places) {
        (
            self.bpffs_root.clone(),
            self.state_dir.clone(),
            self.network.places(),
        )
    }

    /// Where the configuration is to be written to, instead of running.
    #[must_use]
    pub fn write_config_to(&self) -> Option<&Path> {
        self.write_config_to.as_deref()
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
        let mut proxy = json!(self.proxy);
        proxy["mode"] = "ebpf".into();
        json!({
            "kubeproxy.config.k8s.io": proxy,
            "beeline.dev": {
                "nodeName": self.node_name,
                "source": {"kind": source, "path": path},
                "stateDir": self.state_dir,
                "cgroupRoot": self.cgroup_root,
                "bpffsRoot": self.bpffs_root,
                "algorithm": algorithm_name(self.settings.algorithm),
                "externalMaglev": self.settings.external_maglev,
                "failureDetection": self.settings.failure_detection,
                "closeDeadConnections": self.close_tcp,
                "mapSizes": self.sizes,
                "auditPeriodSeconds": self.audit_period.as_secs(),
                "takeOver": self.take_over,
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

/// A URL with a host.
fn api_url(text: &str) -> Result<http::Uri, String> {
    let full = if text.contains("://") {
        text.into()
    } else {
        format!("http://{text}")
    };
    full.parse::<http::Uri>()
        .ok()
        .filter(|uri| uri.host().is_some() && matches!(uri.scheme_str(), Some("http" | "https")))
        .ok_or_else(|| "is no URL".into())
}

#[cfg(test)]
mod tests {
    use clap::{Args as _, FromArgMatches as _};

    use super::*;

    fn config(args: &[&str]) -> anyhow::Result<AgentConfig> {
        let command = AgentArgs::augment_args(Command::new("agent"));
        let matches = command.try_get_matches_from([&["agent"], args].concat())?;
        AgentConfig::try_from(AgentArgs::from_arg_matches(&matches)?)
    }

    #[test]
    fn flags_fill_the_configuration() {
        let found = config(&[
            "--node-name",
            " Node-1",
            "--kubeconfig",
            "/k",
            "--bind-address=fd00::1",
            "--healthz-bind-address",
            "::1",
            "--masquerade-all",
            "--conntrack-min=7",
            "--conntrack-tcp-timeout-established=2h",
            "--oom-score-adj",
            "-5",
            "--nodeport-addresses",
            "10.0.0.0/8, 192.168.0.0/16",
            "--bind-address-hard-fail=true",
            "-v",
            "4",
            "--cluster-cidr=10.244.0.0/16",
            "--iptables-sync-period=10s",
            "--master",
            "10.0.0.1:8080",
        ])
        .unwrap();
        assert_eq!(found.node_name, "node-1");
        assert_eq!(found.source, SourceConfig::Kubeconfig("/k".into()));
        assert_eq!(found.healthz_bind_address, Some("[::1]:10256".parse().unwrap()));
        // follows the family of --bind-address
        assert_eq!(found.metrics_bind_address, Some("[::1]:10249".parse().unwrap()));
        let proxy = &found.proxy;
        assert!(proxy.masquerade_all() && proxy.bind_address_hard_fail);
        assert_eq!((proxy.conntrack.min, proxy.oom_score_adj), (Some(7), Some(-5)));
        assert_eq!(
            proxy.conntrack.tcp_established_timeout.unwrap().to_string(),
            "2h0m0s"
        );
        assert_eq!(proxy.node_port_addresses, ["10.0.0.0/8", "192.168.0.0/16"]);
        assert_eq!(proxy.sync_period(), Duration::from_secs(10));
        assert_eq!(found.log.verbosity, Some(4));
        assert_eq!(found.master.unwrap(), "http://10.0.0.1:8080");
        assert_eq!(found.warnings, [""; 0]);
    }

    #[test]
    fn without_flags_it_is_kube_proxys_defaults() {
        let found = config(&["--node-name", "n"]).unwrap();
        let mut expected = KubeProxyConfiguration::defaults();
        expected.hostname_override = "n".into();
        assert_eq!(found.proxy, expected);
        assert_eq!(found.warnings, [""; 0]);
        assert_eq!(found.healthz_bind_address, Some("0.0.0.0:10256".parse().unwrap()));
        assert_eq!(found.source, SourceConfig::InCluster);
        let shown = found.configz();
        assert_eq!(shown["kubeproxy.config.k8s.io"]["mode"], "ebpf");
        assert_eq!(shown["kubeproxy.config.k8s.io"]["conntrack"]["maxPerCore"], 32768);
        let found = config(&["--healthz-port=0", "--metrics-bind-address="]).unwrap();
        assert_eq!(
            (found.healthz_bind_address, found.metrics_bind_address),
            (None, None)
        );
    }

    #[test]
    fn a_file_wins_over_flags_but_not_over_the_name() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("config.conf");
        let text = "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\nmode: ipvs\n\
                    hostnameOverride: Other\nmetricsBindAddress: 0.0.0.0:9\noddity: 1\n\
                    clientConnection: {kubeconfig: /in/file}\nlogging: {format: json, verbosity: 2}\n";
        std::fs::write(&path, text).unwrap();
        let file = path.to_str().unwrap();
        let found = config(&["--config", file, "--kubeconfig=/k", "--conntrack-min=7", "-v=1"]).unwrap();
        assert_eq!(found.node_name, "other");
        assert_eq!(found.source, SourceConfig::Kubeconfig("/in/file".into()));
        assert_eq!(found.metrics_bind_address, Some("0.0.0.0:9".parse().unwrap()));
        assert_eq!(found.proxy.conntrack.min, Some(131_072));
        assert_eq!(
            found.log,
            LogWish {
                json: Some(true),
                verbosity: Some(1)
            }
        );
        assert_eq!(found.config_file, Some((path.clone(), text.into())));
        let all = found.warnings.join("\n");
        for named in ["oddity", "--conntrack-min, --kubeconfig", "mode (\"ipvs\")"] {
            assert!(all.contains(named), "{named} is not in {all}");
        }
        let found = config(&["--config", file, "--hostname-override", "mine"]).unwrap();
        assert_eq!(found.node_name, "mine");
    }

    #[test]
    fn what_cannot_be_used_is_named() {
        for (args, named) in [
            (&["--healthz-bind-address=host"][..], "healthzBindAddress: host"),
            (&["--proxy-mode=userspace"], "mode: userspace"),
            (&["--conntrack-min=-1"], "conntrack.min: -1"),
            (&["--conntrack-udp-timeout=soon"], "--conntrack-udp-timeout"),
            (&["--feature-gates=A"], "--feature-gates A"),
            (&["--config=/nonexistent"], "--config /nonexistent"),
            (&["--hostname-override= "], "is empty"),
            (&["--master=http://"], "--master"),
        ] {
            let error = format!("{:#}", config(args).unwrap_err());
            assert!(error.contains(named), "{args:?}: {error}");
        }
    }

    #[test]
    fn what_holds_for_all_services_is_set() {
        let settings = |args: &[&str]| config(args).unwrap().settings;
        assert_eq!(settings(&[]), Settings::default());
        let found = settings(&[
            "--algorithm=least-conn",
            "--external-maglev=false",
            "--failure-detection=false",
            "--feature-gates=AllowServiceExternalIPs=false",
        ]);
        assert_eq!(
            found,
            Settings {
                algorithm: algorithm::LEAST_CONN,
                external_maglev: false,
                external_ips: false,
                failure_detection: false,
            }
        );
        // what the scheduler of IPVS means, unless something is said
        let ipvs = ["--proxy-mode=ipvs", "--ipvs-scheduler=sh"];
        assert_eq!(settings(&ipvs).algorithm, algorithm::SOURCE_HASH);
        let said = [&ipvs[..], &["--algorithm=random"]].concat();
        assert_eq!(settings(&said).algorithm, algorithm::RANDOM);
        assert_eq!(settings(&["--ipvs-scheduler=sh"]).algorithm, algorithm::RANDOM);
        assert!(config(&["--algorithm=best"]).is_err());
    }

    #[test]
    fn every_flag_is_in_the_documentation() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/configuration.md");
        let text = std::fs::read_to_string(path).unwrap();
        let command = AgentArgs::augment_args(Command::new("agent"));
        let missing: Vec<&str> = command
            .get_arguments()
            .filter_map(|arg| arg.get_long())
            .filter(|name| !text.contains(&format!("`--{name}`")))
            .collect();
        assert_eq!(missing, [""; 0], "not in docs/configuration.md");
        for arg in command
            .get_arguments()
            .filter(|arg| !arg.get_default_values().is_empty())
        {
            let name = arg.get_long().unwrap();
            let default = arg.get_default_values()[0].to_string_lossy();
            let row = text
                .lines()
                .find(|line| line.contains(&format!("`--{name}`")))
                .unwrap();
            assert!(row.contains(&*default), "--{name}: {default} is not in {row}");
        }
    }

    #[test]
    fn flags_that_kube_proxy_has_are_taken() {
        config(&[
            "--cleanup=false",
            "--init-only",
            "--log-text-split-stream",
            "--log-json-info-buffer-size=0",
            "--boot-id-file=/proc/sys/kernel/random/boot_id",
            "--machine-id-file=/etc/machine-id",
            "--log-flush-frequency=5s",
        ])
        .unwrap();
    }

    #[test]
    fn flags_that_have_a_value_are_shown() {
        let command = AgentArgs::augment_args(Command::new("agent"));
        let args = [
            "agent",
            "-v",
            "4",
            "--conntrack-min=7",
            "--masquerade-all",
            "--dir=/d",
            "--etcd-username=u",
            "--etcd-password=p",
        ];
        let matches = command.clone().try_get_matches_from(args).unwrap();
        let found = flag_values(&command, &matches);
        let of = |name: &str| found.get(name).map(String::as_str);
        assert_eq!(of("v"), Some("4"));
        assert_eq!(of("conntrack-min"), Some("7"));
        assert_eq!(of("masquerade-all"), Some("true"));
        assert_eq!(of("dir"), Some("/d"));
        assert_eq!(of("state-dir"), Some(STATE_DIR));
        assert_eq!(of("cluster-cidr"), None);
        assert_eq!(of("etcd-password"), Some("***"));
    }

    #[test]
    fn node_names_are_trimmed_and_lower_case() {
        assert_eq!(node_name(" Node-1\n").as_deref(), Ok("node-1"));
        assert!(node_name("  ").is_err());
    }
}
