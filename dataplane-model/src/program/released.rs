//! Backends that left services, for those who look after the flows to them.

use hashbrown::HashSet;

use super::Programmer;
use super::held::Member;
use super::maps::Maps;
use crate::key::{BackendKey, ServiceKey};

/// A backend that no set of a service has any more.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Released {
    /// Row of the service in `SERVICES`.
    pub service_id: u32,
    /// The service; `None` if it was restored and is not known.
    pub service: Option<ServiceKey>,
    /// Row of the backend in `BACKENDS`; it may rest by now.
    pub id: u32,
    /// The backend: address, port, protocol.
    pub backend: BackendKey,
}

impl<M: Maps> Programmer<M> {
    pub(super) fn release_of(
        &self,
        service_id: u32,
        service: Option<&ServiceKey>,
        id: u32,
    ) -> Option<Released> {
        Some(Released {
            service_id,
            service: service.cloned(),
            id,
            backend: self.backends.get(id)?.key,
        })
    }

    /// A set of a service had some members and has others now.
    pub(super) fn note_released(&mut self, service_id: u32, old: &[Member], new: &[Member]) {
        let new: HashSet<u32> = new.iter().map(|m| m.id()).collect();
        let gone = old.iter().map(|m| m.id()).filter(|id| !new.contains(id));
        let key = self.services.get(service_id).and_then(|s| s.key.as_ref());
        let gone: Vec<Released> = gone
            .filter_map(|id| self.release_of(service_id, key, id))
            .collect();
        self.released.extend(gone);
    }

    /// A service moved to another row: what was released with the old one and is not in the new one has left it.
    pub(super) fn rename_released(&mut self, old_id: u32, key: &ServiceKey) {
        let new = self
            .services
            .find(key)
            .and_then(|id| Some((id, self.services.get(id)?)));
        let (service_id, members) = match new {
            Some((id, service)) => (id, service.members().map(Member::id).collect()),
            None => (old_id, HashSet::new()),
        };
        self.released
            .retain(|r| r.service_id != old_id || !members.contains(&r.id));
        for released in self.released.iter_mut().filter(|r| r.service_id == old_id) {
            released.service_id = service_id;
            released.service = Some(key.clone());
        }
    }

    /// What left since the last call and has not come back, nor is in the service's other set.
    pub(super) fn take_released(&mut self) -> Vec<Released> {
        let mut released = std::mem::take(&mut self.released);
        released.sort_unstable();
        released.dedup();
        // they are in order of service
        let mut of: Option<(u32, HashSet<u32>)> = None;
        released.retain(|r| {
            let known = of.take().filter(|(id, _)| *id == r.service_id);
            let (_, members) = of.insert(known.unwrap_or_else(|| {
                let members = self.services.get(r.service_id).into_iter();
                (
                    r.service_id,
                    members.flat_map(|s| s.members()).map(Member::id).collect(),
                )
            }));
            !members.contains(&r.id)
        });
        released
    }
}
