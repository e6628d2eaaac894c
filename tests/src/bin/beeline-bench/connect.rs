//! Connections through a ClusterIP against connections to the same pod by its own address.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, Result};
use beeline_tests::{Cluster, Process};
use clap::Args;
use dataplane_model::Event;

use crate::figures::{Figures, Target, quantile};
use crate::maps::Plane;
use crate::population::{PORT, Population, cluster_ip};
use crate::wire::Pairs;

#[derive(Args, Clone)]
pub(crate) struct Options {
    /// Numbers of services
    #[arg(long, value_delimiter = ',', default_values_t = [1, 10_000, 100_000])]
    services: Vec<u32>,
    /// Pairs of blocks to compare
    #[arg(long, default_value_t = 400)]
    pairs: usize,
    /// Connections per block
    #[arg(long, default_value_t = 200)]
    connections: u32,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            services: vec![1, 10_000, 100_000],
            pairs: 400,
            connections: 200,
        }
    }
}

pub(crate) fn run(options: &Options, figures: &mut Figures) -> Result<()> {
    for &services in &options.services {
        figures.progress(&format!("connect: {services} services"));
        let cluster = Cluster::new()?;
        let node = cluster.add_node()?;
        let (server, client) = (node.add_pod("server")?, node.add_pod("client")?);
        let bench = std::env::current_exe().context("cannot find the running program's path")?;
        let mut command = server.place().command(&bench)?;
        command.args(["server", "--port", &PORT.to_string()]);
        let log = cluster.state().join("server.log");
        let process = Process::spawn(server.place(), "bench server", command, &log)?;
        process.wait_log("its listening", Duration::from_secs(5), |line| {
            line == "listening"
        })?;

        let population = Population {
            services,
            endpoints: 1,
        };
        let mut plane = Plane::new(&node, population)?;
        let mut slices = population.slices()?;
        // The first service has this pod behind it.
        if let Some(first) = slices.first_mut() {
            *first = Population::slice_with(0, &[server.v4().into()])?;
        }
        let events = [
            Event::ServicesReplaced(population.services()?),
            Event::SlicesReplaced(slices),
        ];
        plane.take(events, usize::try_from(services)?)?;

        let direct = SocketAddr::new(server.v4().into(), PORT);
        let service = SocketAddr::new(cluster_ip(0), PORT);
        let printed = client.place().output(
            &bench,
            &[
                "client",
                &format!("--direct={direct}"),
                &format!("--service={service}"),
                &format!("--pairs={}", options.pairs),
                &format!("--connections={}", options.connections),
            ],
        )?;
        let pairs: Pairs = serde_json::from_str(printed.trim()).context("the client printed no result")?;
        report(services, options.connections, pairs, figures);
    }
    Ok(())
}

fn report(services: u32, connections: u32, mut pairs: Pairs, figures: &mut Figures) {
    let mut ratios: Vec<f64> = pairs
        .direct
        .iter()
        .zip(&pairs.service)
        .map(|(direct, service)| direct / service)
        .collect();
    let name = |what: &str| format!("connect/{services} services/{what}");
    let rate = |times: &mut Vec<f64>| f64::from(connections) / quantile(times, 0.5);
    figures.add(
        name("ClusterIP against direct"),
        quantile(&mut ratios, 0.5),
        "ratio",
        Target::AtLeast(0.98),
    );
    figures.add(name("direct"), rate(&mut pairs.direct), "1/s", Target::None);
    figures.add(name("ClusterIP"), rate(&mut pairs.service), "1/s", Target::None);
}
