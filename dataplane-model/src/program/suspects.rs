//! Backends that are suspected to have failed get no new connections, within bounds: never more than half of a set is left
//! out, so never a single backend.

use dataplane_common::abi::service_flag;
use hashbrown::HashSet;

use super::held::Member;
use super::maps::{Maps, SetKind};
use super::{Outcome, Programmer};
use crate::desired::ServiceConfig;

impl<M: Maps> Programmer<M> {
    /// From now on these rows of `BACKENDS` are suspected, and no others; where not all of them can be left out of a set,
    /// those that come first are. Rows that nobody uses are ignored.
    ///
    /// What fails is reported and tried again by [`Self::retry`].
    pub fn set_suspects(&mut self, ids: &[u32], now_ms: u64) -> Outcome {
        self.release(now_ms);
        let mut outcome = Outcome::default();
        let mut seen = HashSet::new();
        let known = |id: &u32| self.backends.get(*id).is_some();
        let new: Vec<u32> = ids
            .iter()
            .copied()
            .filter(known)
            .filter(|id| seen.insert(*id))
            .collect();
        if new == self.suspects {
            return outcome;
        }
        let old = std::mem::replace(&mut self.suspects, new);
        seen.extend(old);
        let before = self.writes;
        let touched = |service: &super::held::Applied| service.members().any(|m| seen.contains(&m.id()));
        let services = self.services.iter().filter(|(_, service)| touched(service));
        for id in services.map(|(id, _)| id).collect::<Vec<_>>() {
            let result = self.publish_again(id, now_ms);
            let Some(key) = self.services.get(id).and_then(|s| s.key.clone()) else {
                continue;
            };
            match result {
                Ok(()) => outcome.applied += 1,
                Err(error) => {
                    self.want_again(id, &key);
                    outcome.failed.push((key, error));
                }
            }
        }
        outcome.writes = self.writes - before;
        outcome
    }

    /// The rows that are suspected.
    #[must_use]
    pub fn suspects(&self) -> &[u32] {
        &self.suspects
    }

    fn publish_again(&mut self, id: u32, now_ms: u64) -> Result<(), super::ProgramError> {
        for which in [SetKind::Cluster, SetKind::Local] {
            let members = self.services.get(id).map(|s| s.set(which).members.clone());
            self.change_set(id, which, &members.unwrap_or_default(), now_ms)?;
        }
        self.change_tables(id, now_ms)
    }

    /// What of a set is left out, sorted: nothing if the service does not want its backends to be watched.
    pub(super) fn left_out(&self, members: &[Member], config: ServiceConfig) -> Box<[u32]> {
        if self.suspects.is_empty() || config.flags & service_flag::NO_FAILURE_DETECTION != 0 {
            return Box::default();
        }
        let ids: HashSet<u32> = members.iter().map(|member| member.id()).collect();
        let suspects = self.suspects.iter().filter(|id| ids.contains(*id));
        let mut out: Box<[u32]> = suspects.take(members.len() / 2).copied().collect();
        out.sort_unstable();
        out
    }
}
