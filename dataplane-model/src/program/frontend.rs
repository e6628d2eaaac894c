//! Steps on frontends, and on the addresses that services have as such.

use dataplane_common::abi::{Addr, BePort, FrontendKey, FrontendValue, frontend_class, frontend_kind};

use super::Programmer;
use super::error::ProgramError;
use super::maps::{MapError, Maps, Write};
use crate::desired::Offer;
use crate::key::ServiceKey;

/// A service address, [`frontend_class::ACTIVE_ADDRESS`] in `FRONTENDS`: what is no frontend there is rejected.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct ActiveAddress {
    /// How many ClusterIP frontends are there.
    pub(super) frontends: u32,
    /// It is in the map.
    pub(super) written: bool,
}

pub(super) const fn active_key(addr: Addr) -> FrontendKey {
    FrontendKey {
        addr,
        port: BePort::from_host(0),
        protocol: 0,
        class: frontend_class::ACTIVE_ADDRESS,
    }
}

pub(super) const ACTIVE_VALUE: FrontendValue = FrontendValue {
    service: 0,
    kind: frontend_kind::ACTIVE_ADDRESS,
    flags: 0,
    pad: 0,
};

impl<M: Maps> Programmer<M> {
    pub(super) fn put_frontend(
        &mut self,
        key: &ServiceKey,
        frontend: FrontendKey,
        offer: Offer,
    ) -> Result<(), ProgramError> {
        let Some(id) = self.services.find(key) else {
            return Ok(());
        };
        let is_cluster_ip = offer.kind == frontend_kind::CLUSTER_IP;
        if is_cluster_ip {
            self.activate(frontend.addr)?;
        }
        let value = FrontendValue {
            service: id,
            kind: offer.kind,
            flags: offer.flags,
            pad: 0,
        };
        self.write(&Write::PutFrontend { key: frontend, value })?;
        let before = self.by_frontend.insert(frontend, (id, offer.kind));
        self.orphans.remove(&frontend);
        if let Some((before, _)) = before.filter(|(before, _)| *before != id)
            && let Some(service) = self.services.get_mut(before)
        {
            service.frontends.remove(&frontend);
        }
        if let Some(service) = self.services.get_mut(id) {
            service.frontends.insert(frontend, offer);
        }
        let was_cluster_ip = before.is_some_and(|(_, kind)| kind == frontend_kind::CLUSTER_IP);
        if was_cluster_ip != is_cluster_ip {
            self.count_active(frontend.addr, is_cluster_ip);
        }
        Ok(())
    }

    pub(super) fn delete_frontend(&mut self, frontend: FrontendKey) -> Result<(), MapError> {
        self.write(&Write::DeleteFrontend { key: frontend })?;
        self.orphans.remove(&frontend);
        if let Some((id, kind)) = self.by_frontend.remove(&frontend) {
            if let Some(service) = self.services.get_mut(id) {
                service.frontends.remove(&frontend);
            }
            if kind == frontend_kind::CLUSTER_IP {
                self.count_active(frontend.addr, false);
            }
        }
        Ok(())
    }

    /// Puts an address into the map before its first frontend.
    fn activate(&mut self, addr: Addr) -> Result<(), MapError> {
        if self.active.get(&addr).is_none_or(|active| !active.written) {
            self.write(&Write::PutFrontend {
                key: active_key(addr),
                value: ACTIVE_VALUE,
            })?;
            self.active.entry(addr).or_default().written = true;
            self.addresses += 1;
            // until it is counted it is to be removed
            self.idle.insert(addr);
        }
        Ok(())
    }

    pub(super) fn count_active(&mut self, addr: Addr, add: bool) {
        let active = self.active.entry(addr).or_default();
        if add {
            active.frontends += 1;
            self.idle.remove(&addr);
        } else {
            active.frontends = active.frontends.saturating_sub(1);
            if active.frontends == 0 {
                self.idle.insert(addr);
            }
        }
    }

    /// Removes the addresses that no service has any more.
    pub(super) fn settle_active(&mut self) -> Result<(), MapError> {
        let mut result = Ok(());
        for addr in std::mem::take(&mut self.idle) {
            let Some(active) = self.active.get(&addr).filter(|active| active.frontends == 0) else {
                continue;
            };
            let written = active.written;
            let key = active_key(addr);
            match if written {
                self.write(&Write::DeleteFrontend { key })
            } else {
                Ok(())
            } {
                Ok(()) => {
                    self.active.remove(&addr);
                    self.addresses -= usize::from(written);
                }
                Err(error) => {
                    self.idle.insert(addr);
                    result = Err(error);
                }
            }
        }
        result
    }
}
