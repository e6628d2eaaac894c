//! Maps of the kernel, as the agent makes them.

use anyhow::Result;
use beeline_tests::Node;
use dataplane_model::program::{Capacity, FakeMaps, Maps};

use crate::population::Population;

/// Empty maps for a node.
pub(crate) fn real_maps(_node: &Node, population: Population) -> Result<impl Maps + use<>> {
    let (services, backends) = population.capacity();
    Ok(FakeMaps::new(Capacity {
        services,
        backends,
        slots: backends,
        frontends: services,
    }))
}
