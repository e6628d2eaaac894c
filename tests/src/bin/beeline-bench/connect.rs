//! Connections through a ClusterIP against connections to the same pod by its own address.

use std::net::SocketAddr;

use anyhow::Result;
use beeline_tests::Cluster;
use clap::Args;
use dataplane_model::Event;

use crate::figures::{Figures, Target};
use crate::maps::Plane;
use crate::population::{PORT, Population, cluster_ip};
use crate::wire::{self, Block};

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
        let _server = wire::start_server(&server, cluster.state())?;

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
        let block = Block::Connections(options.connections);
        let pairs = wire::measure(client.place(), direct, service, options.pairs, block)?;
        pairs.report(
            figures,
            &format!("connect/{services} services"),
            ["direct", "ClusterIP"],
            block,
            Target::AtLeast(0.98),
        );
    }
    Ok(())
}
