//! What clients notice while the agent is killed and started again and again.

use std::net::SocketAddr;

use anyhow::Result;
use beeline_tests::client::Mode;
use beeline_tests::{Agent, AgentOptions, Cluster, Load, ObjectDir, Pod};
use clap::Args;

use crate::figures::{Figures, Target};

#[derive(Args, Clone, Copy)]
pub(crate) struct Options {
    /// Times that the agent is killed and started
    #[arg(long, default_value_t = 50)]
    rounds: u32,
    /// New connections per second
    #[arg(long, default_value_t = 2000)]
    rate: u32,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            rounds: 50,
            rate: 2000,
        }
    }
}

pub(crate) fn run(options: &Options, figures: &mut Figures) -> Result<()> {
    figures.progress(&format!(
        "restart: {} rounds at {} connections/s",
        options.rounds, options.rate
    ));
    let cluster = Cluster::new()?;
    let node = cluster.add_node()?;
    let servers: Vec<Pod> = ["web-1", "web-2"]
        .iter()
        .map(|name| node.add_echo_pod(name))
        .collect::<Result<_>>()?;
    let client = node.add_pod("client")?;
    let objects = ObjectDir::new(cluster.state().join("objects"))?;
    objects.put_service("web", &["10.96.0.10"], &servers.iter().collect::<Vec<_>>())?;
    let agent_options = AgentOptions::dir(objects.path());
    let mut agent = Agent::start_synced(&node, &agent_options)?;
    let address = |port| SocketAddr::from(([10, 96, 0, 10], port));
    let loads = [
        (
            "new connections",
            Load::start(client.place(), address(80), Mode::Http, options.rate, 16)?,
        ),
        (
            "requests on 200 open connections",
            Load::start(client.place(), address(80), Mode::Hold, 1000, 200)?,
        ),
        (
            "datagrams of 50 sockets",
            Load::start(client.place(), address(53), Mode::UdpConnected, 500, 50)?,
        ),
    ];
    for _ in 0..options.rounds {
        agent.process.kill()?;
        agent = Agent::start_synced(&node, &agent_options)?;
    }
    for (name, load) in loads {
        let report = load.stop()?;
        #[expect(clippy::cast_precision_loss, reason = "far below 2^52")]
        let (ok, failed) = (report.ok as f64, report.failed as f64);
        figures.add(format!("restart/{name}"), ok, "ok", Target::None);
        figures.add(format!("restart/{name}"), failed, "failed", Target::AtMost(0.0));
    }
    Ok(())
}
