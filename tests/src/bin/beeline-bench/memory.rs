//! Resident memory of the agent after its first sync from an API, as `/proc/<pid>/status` has it.

use std::fs;

use anyhow::{Context, Result};
use beeline_tests::{Agent, AgentOptions, Cluster};

use crate::figures::{Figures, Target};
use crate::mock_api;
use crate::population::Population;

pub(crate) fn run(figures: &mut Figures) -> Result<()> {
    let cases = [
        (
            "idle",
            Population {
                services: 0,
                endpoints: 0,
            },
            20.0,
        ),
        (
            "10k x 3",
            Population {
                services: 10_000,
                endpoints: 3,
            },
            48.0,
        ),
    ];
    for (name, population, target) in cases {
        figures.progress(&format!("memory: {name}"));
        let cluster = Cluster::new()?;
        let node = cluster.add_node()?;
        let kubeconfig = mock_api::serve(&node, population, 0, cluster.state())?;
        let agent = Agent::start_synced(&node, &population.room(AgentOptions::kubeconfig(kubeconfig)))?;
        let [rss, anonymous] = resident(agent.process.pid())?;
        figures.add(
            format!("memory/{name}/resident"),
            rss,
            "MiB",
            Target::AtMost(target),
        );
        figures.add(format!("memory/{name}/anonymous"), anonymous, "MiB", Target::None);
    }
    Ok(())
}

/// VmRSS and RssAnon in MiB.
pub(crate) fn resident(pid: u32) -> Result<[f64; 2]> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).context("the agent is gone")?;
    let field = |name: &str| -> Result<f64> {
        let line = status
            .lines()
            .find_map(|line| line.strip_prefix(name))
            .with_context(|| format!("no {name}"))?;
        let kib: f64 = line
            .trim()
            .trim_end_matches(" kB")
            .parse()
            .with_context(|| format!("{name}{line}"))?;
        Ok(kib / 1024.0)
    };
    Ok([field("VmRSS:")?, field("RssAnon:")?])
}
