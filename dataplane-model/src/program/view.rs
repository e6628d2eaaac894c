//! What the programmer holds, for listings and metrics.

use dataplane_common::abi::map_name;

use super::Programmer;
use super::held::{AppliedService, Member, Resting};
use super::maps::Maps;
use crate::desired::SetBackend;
use crate::key::ServiceKey;

/// Fill of one map.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Fill {
    /// Name of the map.
    pub map: &'static str,
    /// Entries in use or resting.
    pub used: u32,
    /// Size.
    pub max: u32,
}

impl<M: Maps> Programmer<M> {
    /// How full the maps are.
    #[must_use]
    pub fn usage(&self) -> [Fill; 5] {
        let max = self.maps.capacity();
        let (mut services, mut backends) = (self.services.len(), self.backends.len());
        for item in self.resting.items() {
            match item {
                Resting::Slots(_) | Resting::SourceRanges { .. } => {}
                Resting::Backend(_) => backends += 1,
                Resting::Service(_) => services += 1,
            }
        }
        let count = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
        let fill = |map, used, max| Fill { map, used, max };
        [
            fill(
                map_name::FRONTENDS,
                count(self.by_frontend.len() + self.addresses),
                max.frontends,
            ),
            fill(map_name::SERVICES, count(services), max.services),
            fill(map_name::SLOTS, max.slots - self.arena.free(), max.slots),
            fill(map_name::BACKENDS, count(backends), max.backends),
            fill(map_name::SOURCE_RANGES, self.range_entries, max.source_ranges),
        ]
    }

    /// The row in `SERVICES` of a service; `None` if the kernel does not hold it.
    #[must_use]
    pub fn service_id(&self, key: &ServiceKey) -> Option<u32> {
        self.services.find(key)
    }

    /// What the kernel holds, in order of key.
    #[must_use]
    pub fn services(&self) -> Vec<AppliedService> {
        let set = |members: &[Member]| -> Vec<(u32, SetBackend)> {
            let found = |m: &Member| Some((m.id(), self.member(*m)?));
            members.iter().filter_map(found).collect()
        };
        let mut out: Vec<AppliedService> = self
            .services
            .iter()
            .map(|(id, service)| {
                let mut left_out = [&*service.cluster.left_out, &*service.local.left_out].concat();
                left_out.sort_unstable();
                left_out.dedup();
                let tables = service.tables.as_ref();
                AppliedService {
                    id,
                    key: service.key.clone(),
                    frontends: service
                        .frontends
                        .iter()
                        .map(|(f, offer)| (f, offer.kind))
                        .collect(),
                    config: service.config,
                    cluster: set(&service.cluster.members),
                    local: set(&service.local.members),
                    left_out,
                    maglev: [0, 1].map(|at| tables.map_or(0, |tables| tables[at].range.len)),
                    source_ranges: service.ranges.as_ref().map_or_else(Vec::new, |r| r.list.to_vec()),
                }
            })
            .collect();
        out.sort_by(|a, b| (&a.key, a.id).cmp(&(&b.key, b.id)));
        out
    }
}
