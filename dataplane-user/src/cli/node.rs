//! `beeline node`: the agent and the pods of a node in one process.

use std::collections::BTreeMap;

use anyhow::Context as _;
use beeline_node::config::{NodeArgs, Shared};
use clap::Args;
use tokio::sync::oneshot;

use super::{LogArgs, agent_config, single_thread};
use crate::config::{AgentArgs, AgentConfig, SourceConfig, Unusable};
use crate::{agent, kernel};

/// Flags of `beeline node`.
#[derive(Debug, Args)]
pub(super) struct NodeCommand {
    #[command(flatten)]
    node: NodeArgs,
    #[command(flatten)]
    agent: AgentArgs,
}

/// Runs both until one of them ends. Pods go on.
pub(super) fn run(
    command: NodeCommand,
    log: &LogArgs,
    flags: BTreeMap<String, String>,
) -> anyhow::Result<()> {
    let mut config = agent_config(command.agent, log, flags)?;
    let shared = shared(&mut config)?;
    let args = command.node;
    let (sender, ended) = oneshot::channel();
    // A thread of its own: to start a pod takes longer than the agent should wait with a change of a Service.
    std::thread::Builder::new().name("pods".into()).spawn(move || {
        let result = single_thread()
            .context("start the runtime for pods")
            .and_then(|runtime| runtime.block_on(beeline_node::run::run(args, shared)));
        let _agent_has_ended = sender.send(result);
    })?;
    single_thread()?.block_on(async {
        tokio::select! {
            result = agent::run(config) => result,
            result = ended => result.context("the thread for pods has ended badly")?,
        }
    })
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
