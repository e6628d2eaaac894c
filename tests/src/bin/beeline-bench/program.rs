//! From objects to maps: all services at once as after a start, and one endpoint change as in daily life.
//!
//! Measured is what the agent does between the event and the last write: model, desired state, difference, writes to
//! maps of the kernel. Reading the objects from the network is not part of it.

use anyhow::{Context, Result};
use beeline_tests::Cluster;
use clap::Args;
use dataplane_model::Event;

use crate::figures::{Figures, Target, quantile};
use crate::maps::Plane;
use crate::population::Population;

#[derive(Args, Clone, Copy)]
pub(crate) struct Options {
    /// Single changes to measure
    #[arg(long, default_value_t = 2000)]
    changes: u32,
    /// Times that everything is programmed; the median counts
    #[arg(long, default_value_t = 5)]
    rounds: u32,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            changes: 2000,
            rounds: 5,
        }
    }
}

pub(crate) fn run(options: &Options, figures: &mut Figures) -> Result<()> {
    let cases = [
        (
            "10k x 3",
            Population {
                services: 10_000,
                endpoints: 3,
            },
            0.3,
        ),
        (
            "50k x 1",
            Population {
                services: 50_000,
                endpoints: 1,
            },
            0.7,
        ),
    ];
    for (name, population, target) in cases {
        figures.progress(&format!("program: {name}"));
        let lists = (population.services()?, population.slices()?);
        let mut times = Vec::new();
        let mut last = None;
        for _ in 0..options.rounds {
            let cluster = Cluster::new()?;
            let node = cluster.add_node()?;
            let mut plane = Plane::new(&node, population)?;
            let events = [
                Event::ServicesReplaced(lists.0.clone()),
                Event::SlicesReplaced(lists.1.clone()),
            ];
            let time = plane.take(events, usize::try_from(population.services)?)?;
            times.push(time.as_secs_f64());
            last = Some((cluster, plane));
        }
        figures.add(
            format!("program/{name}/all at once"),
            quantile(&mut times, 0.5),
            "s",
            Target::AtMost(target),
        );
        let (_cluster, plane) = last.context("no rounds")?;
        changes(name, plane, population, options.changes, figures)?;
    }
    Ok(())
}

fn changes(
    name: &str,
    mut plane: Plane,
    population: Population,
    count: u32,
    figures: &mut Figures,
) -> Result<()> {
    let mut times = Vec::new();
    for number in 0..count {
        // Spread over all services, in no order that memory would like.
        let service = u32::try_from(u64::from(number) * 7919 % u64::from(population.services))?;
        let slice = population.slice(service, number + 1)?;
        let time = plane.take([Event::SliceApplied(Box::new(slice))], 1)?;
        times.push(time.as_secs_f64() * 1000.0);
    }
    let figure = |what: &str| format!("program/{name}/one endpoint change, {what}");
    figures.add(
        figure("p50"),
        quantile(&mut times, 0.5),
        "ms",
        Target::AtMost(1.0),
    );
    figures.add(
        figure("p99"),
        quantile(&mut times, 0.99),
        "ms",
        Target::AtMost(5.0),
    );
    Ok(())
}
