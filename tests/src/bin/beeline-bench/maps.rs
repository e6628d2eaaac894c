//! Maps and programs of the kernel, as the agent makes them.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use beeline_tests::Node;
use dataplane_model::program::Programmer;
use dataplane_model::{Event, Model};
use dataplane_user::kernel::{Config, Kernel, RealMaps, Sizes};

use crate::population::Population;

/// What an agent has between its source and the kernel, without the agent around it.
pub(crate) struct Plane {
    model: Model,
    programmer: Programmer<RealMaps>,
    clock: Instant,
    /// Kept for its `Drop`; the pins outlive it.
    _kernel: Kernel,
}

impl Plane {
    /// Empty maps with enough room, and attached programs.
    pub(crate) fn new(node: &Node, population: Population) -> Result<Self> {
        let (services, backends) = population.capacity();
        let config = Config {
            bpffs_root: node.bpffs().to_owned(),
            cgroup_root: node.cgroup().to_owned(),
            sizes: Sizes {
                services,
                backends,
                slots: backends,
                frontends: 2 * services,
                ..Sizes::default()
            },
            ebpf_log_level: 0,
        };
        let kernel = Kernel::open(&config).context("cannot set up the kernel side")?;
        let maps = kernel.maps().context("cannot open the maps")?;
        Ok(Self {
            model: Model::new(node.name()),
            programmer: Programmer::new(maps).context("cannot read the maps")?,
            clock: Instant::now(),
            _kernel: kernel,
        })
    }

    /// Takes events to the maps, as the agent does; returns how long it took.
    pub(crate) fn take(
        &mut self,
        events: impl IntoIterator<Item = Event>,
        services: usize,
    ) -> Result<Duration> {
        let start = Instant::now();
        for event in events {
            let problems = self.model.apply(event);
            ensure!(
                problems.is_empty(),
                "the objects of the bench have problems: {:?}",
                problems.first()
            );
        }
        let dirty = self.model.take_dirty();
        let changes: Vec<_> = dirty
            .into_iter()
            .map(|key| {
                let desired = self.model.desired(&key);
                (key, desired)
            })
            .collect();
        let now = u64::try_from(self.clock.elapsed().as_millis())?;
        let outcome = self.programmer.reconcile(changes, now);
        let time = start.elapsed();
        ensure!(
            outcome.failed.is_empty(),
            "could not be programmed: {:?}",
            outcome.failed.first()
        );
        ensure!(
            outcome.applied == services,
            "{} services were programmed, not {services}",
            outcome.applied
        );
        ensure!(outcome.writes > 0, "nothing was written");
        Ok(time)
    }
}
