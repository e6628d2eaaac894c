//! What the agent costs while endpoints change: its CPU time, as `/proc/<pid>/stat` has it.

use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use beeline_tests::{Agent, AgentOptions, Cluster, agent};

use crate::figures::{Figures, Target};
use crate::mock_api;
use crate::population::Population;

/// Changed endpoints per second.
const RATE: u32 = 100;
/// How long it is watched.
const TIME: Duration = Duration::from_secs(10);

pub(crate) fn run(figures: &mut Figures) -> Result<()> {
    figures.progress(&format!("churn: {RATE} changes/s"));
    let population = Population {
        services: 10_000,
        endpoints: 3,
    };
    let cluster = Cluster::new()?;
    let node = cluster.add_node()?;
    let kubeconfig = mock_api::serve(&node, population, RATE, cluster.state())?;
    let agent = Agent::start_synced(&node, &population.room(AgentOptions::kubeconfig(kubeconfig)))?;
    let seen = || -> Result<f64> {
        agent::metric(&node, "kubeproxy_sync_proxy_rules_endpoint_changes_total")?
            .context("the agent does not say how many changes it saw")
    };
    let (changes, cpu, start) = (seen()?, cpu(agent.process.pid())?, Instant::now());
    std::thread::sleep(TIME);
    let time = start.elapsed().as_secs_f64();
    let rate = (seen()? - changes) / time;
    ensure!(
        rate > f64::from(RATE) * 0.8,
        "the agent took in only {rate:.0} changes per second"
    );
    let used = self::cpu(agent.process.pid())? - cpu;
    figures.add("churn/agent CPU", used / time * 100.0, "%", Target::None);
    figures.add(
        "churn/CPU per change",
        used / time / rate * 1e3,
        "ms",
        Target::None,
    );
    Ok(())
}

/// Seconds of CPU time, user and system.
fn cpu(pid: u32) -> Result<f64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).context("the agent is gone")?;
    // The name, in parentheses, may hold spaces. utime and stime are the 14th and 15th field, the 12th and 13th after it.
    let (_, rest) = stat.rsplit_once(')').context("no name in stat")?;
    let ticks = rest
        .split_whitespace()
        .skip(11)
        .take(2)
        .map(str::parse::<f64>)
        .sum::<Result<f64, _>>()
        .context("no times in stat")?;
    // USER_HZ, which is 100 on every architecture of Linux that matters here.
    Ok(ticks / 100.0)
}
