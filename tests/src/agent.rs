//! An agent on a node, and the command line that talks to it.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::cluster::Node;
use crate::process::Process;
use crate::{http, process, program, wait_for};

/// Where the agent's health server listens.
pub const HEALTH: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 10256);
/// Where the agent's metrics server listens.
pub const METRICS: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 10249);

/// Where an agent's objects come from.
#[derive(Debug, Clone)]
pub enum Source {
    /// A directory of YAML files.
    Dir(PathBuf),
    /// A Kubernetes API.
    Kubeconfig(PathBuf),
}

/// How to start an agent.
#[derive(Debug, Clone)]
pub struct AgentOptions {
    /// Where its objects come from.
    pub source: Source,
    /// Further flags.
    pub flags: Vec<String>,
    /// A program that starts the agent, with its arguments; none: directly.
    pub starter: Vec<String>,
}

impl AgentOptions {
    /// Objects from a directory, no further flags.
    #[must_use]
    pub fn dir(dir: impl Into<PathBuf>) -> Self {
        Self {
            source: Source::Dir(dir.into()),
            flags: Vec::new(),
            starter: Vec::new(),
        }
    }

    /// Objects from an API, no further flags.
    #[must_use]
    pub fn kubeconfig(file: impl Into<PathBuf>) -> Self {
        Self {
            source: Source::Kubeconfig(file.into()),
            flags: Vec::new(),
            starter: Vec::new(),
        }
    }

    /// With one more flag.
    #[must_use]
    pub fn flag(mut self, name: &str, value: impl std::fmt::Display) -> Self {
        self.flags.extend([name.to_owned(), value.to_string()]);
        self
    }
}

/// An agent of a node; killed on drop, which leaves its dataplane in force.
#[derive(Debug)]
pub struct Agent {
    /// The process.
    pub process: Process,
}

impl Agent {
    /// Starts an agent without waiting for anything.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn start(node: &Node, options: &AgentOptions) -> Result<Self> {
        let beeline = program("beeline")?;
        let mut command = match options.starter.split_first() {
            Some((starter, args)) => {
                let mut command = node.host().command(starter)?;
                command.args(args).arg(beeline);
                command
            }
            None => node.host().command(beeline)?,
        };
        command.args(["agent", "--node-name", node.name()]);
        match &options.source {
            Source::Dir(dir) => command.arg("--dir").arg(dir),
            Source::Kubeconfig(file) => command.arg("--kubeconfig").arg(file),
        };
        command
            .arg("--cgroup-root")
            .arg(node.cgroup())
            .arg("--bpffs-root")
            .arg(node.bpffs())
            .arg("--state-dir")
            .arg(node.state())
            .args(&options.flags);
        let log = node.state().join("agent.log");
        let process = Process::spawn(node.host(), &format!("agent of {}", node.name()), command, &log)?;
        Ok(Self { process })
    }

    /// Starts an agent and waits until it has programmed all that its source had.
    ///
    /// # Errors
    /// When it ends, or is not ready within 30 s; with the end of its log.
    pub fn start_synced(node: &Node, options: &AgentOptions) -> Result<Self> {
        let mut agent = Self::start(node, options)?;
        agent.wait_synced(node)?;
        Ok(agent)
    }

    /// Waits until it has programmed all that its source had.
    ///
    /// # Errors
    /// When it ends, or is not ready within 30 s; with the end of its log.
    pub fn wait_synced(&mut self, node: &Node) -> Result<()> {
        let process = &mut self.process;
        wait_for(
            &format!("the first sync of {}", node.name()),
            Duration::from_secs(30),
            || {
                process.check_running()?;
                Ok(metric(node, "kubeproxy_sync_proxy_rules_last_timestamp_seconds")?
                    .is_some_and(|time| time > 0.0)
                    .then_some(()))
            },
        )
        .with_context(|| self.process.log_end())
    }
}

/// Waits until the node's agent has programmed all that there is: Services, the node's addresses, its devices.
///
/// # Errors
/// When it has not within 30 s, with what is missing.
pub fn wait_complete(node: &Node) -> Result<()> {
    let what = format!("the agent of {} to program everything", node.name());
    wait_for(&what, Duration::from_secs(30), || {
        let status = beeline_json(node, &["status"])?;
        let missing = &status["missing"];
        if missing.as_array().is_some_and(Vec::is_empty) {
            return Ok(Some(()));
        }
        bail!("missing: {missing}")
    })
}

/// The largest value of all series of a metric of the node's agent; none when there is no such series.
///
/// # Errors
/// When the agent does not answer.
pub fn metric(node: &Node, name: &str) -> Result<Option<f64>> {
    let (_, text) = http::get(node.host().netns(), METRICS, "/metrics")?;
    let values = text.lines().filter_map(|line| {
        let rest = line.strip_prefix(name)?;
        let value = match rest.chars().next()? {
            '{' => rest.rsplit_once("} ")?.1,
            ' ' => rest.trim(),
            _ => return None,
        };
        value.parse::<f64>().ok()
    });
    Ok(values.reduce(f64::max))
}

/// A `beeline` command that talks to the node's agent.
///
/// # Errors
/// When the program is not built.
pub fn beeline(node: &Node, args: &[&str]) -> Result<Command> {
    let mut command = node.host().command(program("beeline")?)?;
    command.args(args).arg("--state-dir").arg(node.state());
    Ok(command)
}

/// What `beeline <args> -o json` of the node prints.
///
/// # Errors
/// When it fails or prints no JSON.
pub fn beeline_json(node: &Node, args: &[&str]) -> Result<Value> {
    let mut command = beeline(node, args)?;
    command.args(["-o", "json"]);
    let text = process::output(command)?;
    serde_json::from_str(&text).with_context(|| format!("beeline {} printed {text:?}", args.join(" ")))
}

/// Removes the node's dataplane with `beeline cleanup`.
///
/// # Errors
/// When it fails.
pub fn cleanup(node: &Node) -> Result<String> {
    let mut command = beeline(node, &["cleanup"])?;
    command
        .arg("--bpffs-root")
        .arg(node.bpffs())
        .arg("--cgroup-root")
        .arg(node.cgroup());
    process::output(command)
}

/// The backends that the node's agent uses for new TCP connections to this frontend, from `beeline service list`.
///
/// # Errors
/// When the agent does not answer, or does not know the frontend.
pub fn usable_backends(node: &Node, frontend: SocketAddr) -> Result<Vec<SocketAddr>> {
    let list = beeline_json(node, &["service", "list"])?;
    let services = list["services"]
        .as_array()
        .context("`beeline service list -o json` has no services")?;
    let offers = |service: &&Value| {
        let frontends = service["frontends"].as_array().into_iter().flatten();
        service["protocol"] == "TCP"
            && frontends
                .filter_map(socket_address)
                .any(|address| address == frontend)
    };
    let service = services
        .iter()
        .find(offers)
        .with_context(|| format!("no frontend {frontend} in {list}"))?;
    let backends = service["backends"]
        .as_array()
        .context("a service without a list of backends")?;
    let in_cluster_set = |backend: &&Value| {
        backend["sets"]
            .as_array()
            .is_some_and(|sets| sets.iter().any(|set| set == "cluster"))
    };
    backends
        .iter()
        .filter(in_cluster_set)
        .map(|backend| {
            socket_address(backend).with_context(|| format!("a backend without an address: {backend}"))
        })
        .collect()
}

fn socket_address(object: &Value) -> Option<SocketAddr> {
    let port = u16::try_from(object["port"].as_u64()?).ok()?;
    Some(SocketAddr::new(object["address"].as_str()?.parse().ok()?, port))
}
