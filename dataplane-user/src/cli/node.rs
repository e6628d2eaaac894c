//! `beeline node`: the agent and the pods of a node in one process.

use std::collections::BTreeMap;
use std::os::unix::process::CommandExt as _;

use anyhow::Context as _;
use beeline_node::config::{NodeArgs, Shared};
use clap::{Args, Subcommand};
use tokio::sync::oneshot;

use super::{LogArgs, ShowArgs, agent_config, client, show, single_thread, start_log};
use crate::cluster::Renewal;
use crate::config::{AgentArgs, AgentConfig, LogWish, SourceConfig, Unusable};
use crate::overlay::view::Nodes;
use crate::{agent, kernel};

/// `beeline node` with its flags, or `beeline node list`.
#[derive(Debug, Args)]
#[command(args_conflicts_with_subcommands = true)]
pub(super) struct NodeCommand {
    #[command(subcommand)]
    command: Option<NodeSubcommand>,
    #[command(flatten)]
    node: NodeArgs,
    #[command(flatten)]
    agent: AgentArgs,
}

#[derive(Debug, Subcommand)]
enum NodeSubcommand {
    /// List the nodes of the pod network, and whether packets get there
    List(ShowArgs),
}

/// What `beeline node list` prints.
fn list(args: &ShowArgs) -> anyhow::Result<()> {
    let nodes: Nodes = single_thread()?.block_on(client::get(&args.state_dir, "/nodes"))?;
    show::print(&args.output_of(&nodes, |_| show::nodes(&nodes))?)
}

/// Runs both until one of them ends. Pods go on.
pub(super) fn run(
    command: NodeCommand,
    log: &LogArgs,
    flags: BTreeMap<String, String>,
) -> anyhow::Result<()> {
    if let Some(NodeSubcommand::List(args)) = &command.command {
        start_log(log, LogWish::default())?;
        return list(args);
    }
    let mut config = agent_config(command.agent, log, flags)?;
    let shared = shared(&mut config)?;
    let args = command.node;
    let renewal = Renewal {
        kubeconfig: shared.kubeconfig.clone(),
        node: shared.node_name.clone(),
    };
    let runtime = single_thread()?;
    // Before anybody reads the credentials.
    runtime.block_on(renewal.try_renew());
    let (sender, ended) = oneshot::channel();
    // A thread of its own: to start a pod takes longer than the agent should wait with a change of a Service.
    std::thread::Builder::new().name("pods".into()).spawn(move || {
        let result = single_thread()
            .context("start the runtime for pods")
            .and_then(|runtime| runtime.block_on(beeline_node::run::run(args, shared)));
        let _agent_has_ended = sender.send(result);
    })?;
    let ended = runtime.block_on(async {
        tokio::select! {
            result = agent::run(config) => Some(result),
            result = ended => Some(result.context("the thread for pods has ended badly").flatten()),
            () = renewal.wait() => None,
        }
    });
    match ended {
        Some(result) => result,
        None => start_again(),
    }
}

/// Becomes this program anew, with the same arguments: whatever was set up with the old credentials begins with the new ones.
/// Pods and traffic go on meanwhile, as when the program is killed.
fn start_again() -> anyhow::Result<()> {
    let mut arguments = std::env::args_os();
    let name = arguments.next().unwrap_or_default();
    let program = std::env::current_exe().context("find this program")?;
    let error = std::process::Command::new(&program)
        .arg0(name)
        .args(arguments)
        .exec();
    Err(error).with_context(|| format!("start {} again", program.display()))
}

/// What the pods' side needs to know of the agent.
fn shared(config: &mut AgentConfig) -> anyhow::Result<Shared> {
    let SourceConfig::Kubeconfig(kubeconfig) = &config.source else {
        return Err(Unusable("--kubeconfig: a node needs one".into()).into());
    };
    let cgroup_root = match &config.cgroup_root {
        Some(path) => path.clone(),
        None => kernel::mounts::discover_cgroup2()?,
    };
    config.cgroup_root = Some(cgroup_root.clone());
    Ok(Shared {
        node_name: config.node_name.clone(),
        cgroup_root,
        cni_socket: config
            .network
            .as_ref()
            .map_or_else(Shared::default_socket, |network| network.socket.clone()),
        kubeconfig: kubeconfig.clone(),
    })
}
