//! The command line.

mod client;
mod control_plane;
mod node;
mod show;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context as _;
use clap::{Args, CommandFactory as _, FromArgMatches as _, Parser, Subcommand, ValueEnum};
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::SubscriberInitExt as _;
use tracing_subscriber::{EnvFilter, reload};

use crate::agent::view::{Services, Status};
use crate::config::{
    AgentArgs, AgentConfig, LogControl, LogWish, STATE_DIR, Unusable, flag_values, log_filter,
};
use crate::overlay::handover::{self, Places};
use crate::{agent, cluster, kernel, takeover};

/// Exit code for a command line or a configuration that cannot be used (EX_USAGE of sysexits.h).
const USAGE: u8 = 64;

/// eBPF in place of kube-proxy and flannel
#[derive(Debug, Parser)]
#[command(
    name = "beeline",
    version,
    propagate_version = true,
    arg_required_else_help = true
)]
struct Cli {
    #[command(flatten)]
    log: LogArgs,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Args)]
struct LogArgs {
    /// What is logged: off, error, warn, info, debug, trace, or a filter such as info,dataplane_user=debug [default: info]
    #[arg(long, global = true, env = "BEELINE_LOG")]
    log_level: Option<String>,
    /// How it is logged [default: text]
    #[arg(long, global = true, value_enum)]
    log_format: Option<LogFormat>,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum LogFormat {
    Text,
    Json,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the node daemon
    Agent(Box<AgentArgs>),
    /// Run a small Kubernetes API for machines without one; or back up what it keeps
    ControlPlane(Box<control_plane::ControlPlaneCommand>),
    /// Run a node of a cluster: its agent, and its pods; or list nodes
    Node(Box<node::NodeCommand>),
    /// Start a cluster: this machine becomes its control plane and first node
    Init(Box<cluster::InitArgs>),
    /// Make this machine a node of a cluster
    Join(Box<cluster::JoinArgs>),
    /// Tokens with which nodes join
    Token(Box<cluster::TokenCommand>),
    /// Undo init or join on this machine
    Reset(Box<cluster::ResetArgs>),
    /// Services as the kernel has them
    #[command(subcommand)]
    Service(ListCommand),
    /// Backends as the kernel has them
    #[command(subcommand)]
    Backend(ListCommand),
    /// Addresses of this node's pods
    #[command(subcommand)]
    Ipam(IpamCommand),
    /// What the agent of this node does
    Status(ShowArgs),
    /// Remove every trace of Beeline from the kernel
    Cleanup(CleanupArgs),
    /// Print the version
    Version,
}

#[derive(Debug, Subcommand)]
enum ListCommand {
    /// List them
    List(ShowArgs),
}

#[derive(Debug, Subcommand)]
enum IpamCommand {
    /// List them
    List(IpamArgs),
}

#[derive(Debug, Args)]
struct IpamArgs {
    /// Output format
    #[arg(short, long, value_enum, default_value_t = Output::Text)]
    output: Output,
    /// Socket of the CNI plugin
    #[arg(long, default_value = beeline_cni::protocol::DEFAULT_SOCKET)]
    cni_socket: PathBuf,
}

#[derive(Debug, Args)]
struct ShowArgs {
    /// Output format
    #[arg(short, long, value_enum, default_value_t = Output::Text)]
    output: Output,
    /// State directory of the agent
    #[arg(long, default_value = STATE_DIR)]
    state_dir: PathBuf,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
enum Output {
    Text,
    Wide,
    Json,
}

#[derive(Debug, Args)]
struct CleanupArgs {
    /// Directory on a bpffs that the agent used [default: beeline/ where a bpffs is mounted]
    #[arg(long)]
    bpffs_root: Option<PathBuf>,
    /// Accepted for symmetry with `agent`: what is attached to the cgroup goes with its link below --bpffs-root
    #[arg(long)]
    cgroup_root: Option<PathBuf>,
    /// State directory of the agent
    #[arg(long, default_value = STATE_DIR)]
    state_dir: PathBuf,
    #[command(flatten)]
    pods: Places,
    /// Wait for kube-proxy's rules first, then give new connections to them; connections that run go on
    #[arg(long)]
    hand_back: bool,
    /// How long --hand-back waits for kube-proxy's rules and for flows of other hosts to end, in seconds
    #[arg(long, default_value_t = 300, requires = "hand_back")]
    timeout: u64,
}

/// Runs what the arguments say.
#[must_use]
pub fn main() -> ExitCode {
    let mut flags = BTreeMap::new();
    let parsed = Cli::command().try_get_matches().and_then(|matches| {
        if let Some((name, matches)) = matches.subcommand()
            && let Some(command) = Cli::command().find_subcommand(name)
        {
            flags = flag_values(command, matches);
        }
        Cli::from_arg_matches(&matches)
    });
    let cli = match parsed {
        Ok(cli) => cli,
        Err(error) => {
            let _closed = error.print();
            // help and version are no errors
            return if error.use_stderr() {
                ExitCode::from(USAGE)
            } else {
                ExitCode::SUCCESS
            };
        }
    };
    match run(cli.command, &cli.log, flags) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            if error.is::<Unusable>() {
                ExitCode::from(USAGE)
            } else {
                ExitCode::FAILURE
            }
        }
    }
}

/// Starts logging. What Beeline's own flags say wins over kube-proxy's.
fn start_log(args: &LogArgs, wish: LogWish) -> anyhow::Result<LogControl> {
    let verbosity = log_filter(wish.verbosity.unwrap_or_default());
    let level = args.log_level.as_deref().unwrap_or(verbosity);
    let filter =
        EnvFilter::try_new(level).with_context(|| Unusable(format!("--log-level {level}: is no filter")))?;
    let format = match (args.log_format, wish.json) {
        (Some(format), _) => format,
        (None, Some(true)) => LogFormat::Json,
        (None, _) => LogFormat::Text,
    };
    let (filter, handle) = reload::Layer::new(filter);
    let registry = tracing_subscriber::registry().with(filter);
    let output = tracing_subscriber::fmt::layer().with_writer(std::io::stderr);
    match format {
        LogFormat::Text => registry
            .with(
                output
                    .with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr()))
                    .with_target(false),
            )
            .init(),
        LogFormat::Json => registry.with(output.json()).init(),
    }
    Ok(LogControl::new(move |text| {
        let filter = EnvFilter::try_new(text).map_err(|error| error.to_string())?;
        handle.reload(filter).map_err(|error| error.to_string())
    }))
}

fn run(command: Command, log: &LogArgs, flags: BTreeMap<String, String>) -> anyhow::Result<()> {
    // kube-proxy's configuration says how the agent logs
    let command = match command {
        Command::Agent(args) => return run_agent(*args, log, flags),
        Command::Node(command) => return node::run(*command, log, flags),
        other => other,
    };
    start_log(log, LogWish::default())?;
    match command {
        // above
        Command::Agent(_) | Command::Node(_) => Ok(()),
        Command::ControlPlane(command) => control_plane::run(*command),
        Command::Service(ListCommand::List(args)) => {
            let services: Services = single_thread()?.block_on(client::get(&args.state_dir, "/services"))?;
            show::print(&args.output_of(&services, |wide| show::services(&services, wide))?)
        }
        Command::Backend(ListCommand::List(args)) => {
            let services: Services = single_thread()?.block_on(client::get(&args.state_dir, "/services"))?;
            let backends = show::backends(&services);
            show::print(&args.output_of(&backends, |_| show::backend_table(&backends))?)
        }
        Command::Ipam(IpamCommand::List(args)) => {
            let list = crate::cni::list::ask(&args.cni_socket)?;
            show::print(&match args.output {
                Output::Json => format!("{}\n", serde_json::to_string_pretty(&list)?),
                Output::Text | Output::Wide => crate::cni::list::table(&list),
            })
        }
        Command::Status(args) => {
            let status: Status = single_thread()?.block_on(client::get(&args.state_dir, "/status"))?;
            show::print(&args.output_of(&status, |_| show::status(&status))?)
        }
        Command::Cleanup(args) => clean_up(&args),
        Command::Init(args) => show::print(&single_thread()?.block_on(cluster::init(*args))?),
        Command::Join(args) => show::print(&single_thread()?.block_on(cluster::join(*args))?),
        Command::Token(command) => show::print(&single_thread()?.block_on(cluster::token(*command))?),
        Command::Reset(args) => {
            let traces = CleanupArgs {
                bpffs_root: args.bpffs_root(),
                cgroup_root: None,
                state_dir: args.state_dir(),
                pods: args.pods(),
                hand_back: false,
                timeout: 0,
            };
            show::print(&cluster::reset(&args, || clean_up(&traces))?)
        }
        Command::Version => show::print(&format!("beeline {}\n", env!("CARGO_PKG_VERSION"))),
    }
}

fn run_agent(args: AgentArgs, log: &LogArgs, flags: BTreeMap<String, String>) -> anyhow::Result<()> {
    if args.cleanup() {
        start_log(log, LogWish::default())?;
        let (bpffs_root, state_dir, pods) = args.places();
        return clean_up(&CleanupArgs {
            bpffs_root,
            cgroup_root: None,
            state_dir,
            pods,
            hand_back: false,
            timeout: 0,
        });
    }
    let init_only = args.init_only();
    let write_to = args.write_config_to().map(ToOwned::to_owned);
    let config = agent_config(args, log, flags)?;
    if let Some(path) = write_to {
        let text = serde_saphyr::to_string(&config.proxy)?;
        return std::fs::write(&path, text).with_context(|| format!("write {}", path.display()));
    }
    if init_only {
        agent::init_only(&config);
        return Ok(());
    }
    single_thread()?.block_on(agent::run(config))
}

/// The agent's settings; from here on it is logged as they say.
fn agent_config(
    args: AgentArgs,
    log: &LogArgs,
    flags: BTreeMap<String, String>,
) -> anyhow::Result<AgentConfig> {
    let mut config = AgentConfig::try_from(args)?;
    config.flags = flags;
    config.log_control = start_log(log, config.log)?;
    for warning in &config.warnings {
        tracing::warn!("{warning}");
    }
    Ok(config)
}

/// The work of the agent is short and in order: one thread needs less memory and no locks.
fn single_thread() -> std::io::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_current_thread().enable_all().build()
}

impl ShowArgs {
    fn output_of<T: serde::Serialize>(
        &self,
        value: &T,
        text: impl FnOnce(bool) -> String,
    ) -> anyhow::Result<String> {
        Ok(match self.output {
            Output::Json => format!("{}\n", serde_json::to_string_pretty(value)?),
            Output::Text => text(false),
            Output::Wide => text(true),
        })
    }
}

/// Ends at the first SIGTERM or SIGINT.
fn stop_signal() -> anyhow::Result<impl Future<Output = ()>> {
    use tokio::signal::unix::{SignalKind, signal};
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    Ok(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    })
}

fn clean_up(args: &CleanupArgs) -> anyhow::Result<()> {
    agent::check_stopped(&args.state_dir)?;
    let root = match &args.bpffs_root {
        Some(path) => path.clone(),
        None => kernel::mounts::discover_or_mount_bpffs()?.join("beeline"),
    };
    let mut removed = if args.hand_back {
        let done = takeover::hand_back(&root, Duration::from_secs(args.timeout))?;
        if done.cut > 0 {
            eprintln!(
                "{} flows of other hosts had not ended after {} s and were cut",
                done.cut, args.timeout
            );
        }
        done.removed
    } else {
        let mut removed = kernel::cleanup(&root)?;
        removed.extend(takeover::cleanup().context("remove what --take-over left")?);
        removed.extend(takeover::forward::cleanup().context("remove rules for pods")?);
        removed
    };
    removed.extend(handover::hand_over(&args.pods).context("make the pod network flannel's")?);
    removed.extend(agent::remove_state(&args.state_dir)?);
    let mut text = String::new();
    for path in &removed {
        text.push_str(&format!("removed {path}\n"));
    }
    if removed.is_empty() {
        text = format!("nothing of Beeline is left below {}\n", root.display());
    }
    show::print(&text)
}
