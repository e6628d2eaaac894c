//! Addresses for pods, from the node's podCIDRs.
//!
//! One file holds everything, so that the addresses of both families of a pod are written in one go. An address that was
//! given back waits in quarantine, so that what others still remember of its last pod (connections, caches) ages out; only
//! when nothing else is free the one that has waited longest is given out early.

mod hostlocal;
mod range;

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use beeline_cni::protocol::Key;
use dataplane_model::Family;
use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use crate::persist::{self, Faults};

pub use hostlocal::HostLocal;
pub use range::Range;

/// Version of the file's format.
const VERSION: u32 = 1;

/// Settings of [`Ipam`].
#[derive(Clone, Debug)]
pub struct Config {
    /// Where the state is kept.
    pub file: PathBuf,
    /// The node's podCIDRs: a pod gets one address of each family that has one.
    pub cidrs: Vec<IpNet>,
    /// How long an address waits before it is given out again.
    pub quarantine: Duration,
    /// Directory of host-local whose addresses are in use by pods that another plugin made.
    pub host_local: Option<PathBuf>,
    /// For tests.
    pub faults: Faults,
}

/// What can go wrong.
#[derive(Debug, thiserror::Error)]
pub enum IpamError {
    /// The state cannot be read or written.
    #[error("cannot {operation} address state {}: {source}", path.display())]
    Io {
        /// What was being done.
        operation: &'static str,
        /// The file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// The file is not what we write.
    #[error("address state {} cannot be used: {cause}", path.display())]
    Corrupt {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        cause: String,
    },
    /// A range that no pod can get an address from.
    #[error("pod range {0} cannot be used: it has no address for a pod")]
    TooSmall(IpNet),
    /// No range at all.
    #[error("this node has no pod range yet (spec.podCIDRs is empty)")]
    NoRange,
    /// All addresses are in use.
    #[error("no address is free in {ranges}: {used} in use")]
    Full {
        /// The ranges of the family.
        ranges: String,
        /// Addresses in use.
        used: usize,
    },
    /// The attachment has addresses already.
    #[error("{0} has addresses already")]
    Exists(Key),
    /// An address that was asked for is not to be had.
    #[error("requested address {address} {cause}")]
    Requested {
        /// The address.
        address: IpAddr,
        /// Why not.
        cause: String,
    },
}

#[derive(Clone, Debug, Default, Serialize, Deserialize)]
struct State {
    version: u32,
    used: BTreeMap<IpAddr, Key>,
    /// Second of the Unix epoch at which an address is free again.
    quarantine: BTreeMap<IpAddr, u64>,
    /// Where the search goes on, by family.
    last_v4: Option<IpAddr>,
    last_v6: Option<IpAddr>,
}

/// What an address is used for.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Use {
    /// By an attachment.
    Used(Key),
    /// Waits.
    Quarantine,
    /// By a pod of another plugin: its container's id.
    HostLocal(String),
}

/// The addresses of this node's pods.
#[derive(Debug)]
pub struct Ipam {
    config: Config,
    ranges: Vec<Range>,
    state: State,
}

impl Ipam {
    /// Reads what is known; a file that is not there yet is an empty one.
    ///
    /// # Errors
    ///
    /// When a range is too small, or the state cannot be read or is corrupt.
    pub fn open(config: Config) -> Result<Self, IpamError> {
        let ranges = ranges(&config.cidrs)?;
        let state = match std::fs::read(&config.file) {
            Ok(text) => parse(&config.file, &text)?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => State {
                version: VERSION,
                ..State::default()
            },
            Err(source) => {
                return Err(IpamError::Io {
                    operation: "read",
                    path: config.file,
                    source,
                });
            }
        };
        Ok(Self {
            config,
            ranges,
            state,
        })
    }

    /// Puts a corrupt file aside and starts anew; the caller then tells what it knows with [`Ipam::adopt`].
    ///
    /// # Errors
    ///
    /// When the file cannot be renamed, or as [`Ipam::open`].
    pub fn rebuild(config: Config) -> Result<Self, IpamError> {
        let aside = config.file.with_extension("corrupt");
        std::fs::rename(&config.file, &aside).map_err(|source| IpamError::Io {
            operation: "put aside",
            path: config.file.clone(),
            source,
        })?;
        Self::open(config)
    }

    /// New podCIDRs. Addresses of the old ones stay with their pods and are not given out again.
    ///
    /// # Errors
    ///
    /// When a range is too small; the old ones then stay.
    pub fn set_cidrs(&mut self, cidrs: &[IpNet]) -> Result<(), IpamError> {
        self.ranges = ranges(cidrs)?;
        self.config.cidrs = cidrs.to_vec();
        Ok(())
    }

    /// The podCIDRs.
    #[must_use]
    pub fn cidrs(&self) -> &[IpNet] {
        &self.config.cidrs
    }

    /// One address of each family that has a range, and written down when this returns. `requested` are taken where given.
    ///
    /// # Errors
    ///
    /// When there is none, or it cannot be written down; nothing is allocated then.
    pub fn allocate(&mut self, key: &Key, requested: &[IpAddr]) -> Result<Vec<IpAddr>, IpamError> {
        if self.ranges.is_empty() {
            return Err(IpamError::NoRange);
        }
        if self.state.used.values().any(|owner| owner == key) {
            return Err(IpamError::Exists(key.clone()));
        }
        let foreign = self.foreign()?;
        let mut next = self.state.clone();
        let now = now();
        next.quarantine
            .retain(|_, until| still_waits(*until, now, self.config.quarantine));
        let mut got = Vec::new();
        for family in [Family::V4, Family::V6] {
            let ranges: Vec<&Range> = self
                .ranges
                .iter()
                .filter(|range| range.family() == family)
                .collect();
            let wanted: Vec<IpAddr> = requested
                .iter()
                .filter(|address| address.is_ipv4() == (family == Family::V4))
                .copied()
                .collect();
            let address = match &wanted[..] {
                [] if ranges.is_empty() => continue,
                [] => next.find(family, &ranges, &foreign)?,
                [address] => next.want(*address, &ranges, &foreign)?,
                [_, second, ..] => {
                    return Err(IpamError::Requested {
                        address: *second,
                        cause: "is the second of its family: a pod gets one of each".into(),
                    });
                }
            };
            next.quarantine.remove(&address);
            next.used.insert(address, key.clone());
            got.push(address);
        }
        self.save(&next)?;
        self.state = next;
        Ok(got)
    }

    /// Gives back what an attachment has. Fine if that is nothing.
    ///
    /// # Errors
    ///
    /// When it cannot be written down. The addresses are free all the same: what the file then holds too much is
    /// found by [`Ipam::retain`].
    pub fn release(&mut self, key: &Key) -> Result<Vec<IpAddr>, IpamError> {
        self.release_if(|owner| owner == key)
    }

    /// Gives back the addresses of all attachments that `live` does not know.
    ///
    /// # Errors
    ///
    /// As [`Ipam::release`].
    pub fn retain(&mut self, live: impl Fn(&Key) -> bool) -> Result<Vec<IpAddr>, IpamError> {
        self.release_if(|owner| !live(owner))
    }

    fn release_if(&mut self, gone: impl Fn(&Key) -> bool) -> Result<Vec<IpAddr>, IpamError> {
        let freed: Vec<IpAddr> = self
            .state
            .used
            .iter()
            .filter(|(_, owner)| gone(owner))
            .map(|(address, _)| *address)
            .collect();
        if freed.is_empty() {
            return Ok(freed);
        }
        let until = now().saturating_add(self.config.quarantine.as_secs());
        for address in &freed {
            self.state.used.remove(address);
            self.state.quarantine.insert(*address, until);
        }
        self.save(&self.state)?;
        Ok(freed)
    }

    /// Notes that an attachment has these addresses, whatever the file says: the attachment is the truth.
    ///
    /// # Errors
    ///
    /// When another attachment has one of them, or it cannot be written down.
    pub fn adopt(&mut self, key: &Key, addresses: &[IpAddr]) -> Result<(), IpamError> {
        let mut next = self.state.clone();
        for address in addresses {
            if let Some(owner) = next.used.insert(*address, key.clone())
                && owner != *key
            {
                return Err(IpamError::Requested {
                    address: *address,
                    cause: format!("is used by {owner}"),
                });
            }
            next.quarantine.remove(address);
        }
        if next.used == self.state.used {
            return Ok(());
        }
        self.save(&next)?;
        self.state = next;
        Ok(())
    }

    /// All addresses that are not free, in order.
    ///
    /// # Errors
    ///
    /// When the directory of host-local cannot be read.
    pub fn list(&self) -> Result<BTreeMap<IpAddr, Use>, IpamError> {
        let foreign = self.foreign()?;
        let mut all: BTreeMap<IpAddr, Use> = foreign
            .into_iter()
            .map(|(address, id)| (address, Use::HostLocal(id)))
            .collect();
        let now = now();
        let waiting = self.state.quarantine.iter();
        let waiting = waiting.filter(|(_, until)| still_waits(**until, now, self.config.quarantine));
        all.extend(waiting.map(|(address, _)| (*address, Use::Quarantine)));
        all.extend(
            self.state
                .used
                .iter()
                .map(|(address, key)| (*address, Use::Used(key.clone()))),
        );
        Ok(all)
    }

    /// Addresses in use by attachments.
    #[must_use]
    pub fn used(&self) -> usize {
        self.state.used.len()
    }

    fn foreign(&self) -> Result<BTreeMap<IpAddr, String>, IpamError> {
        let Some(dir) = &self.config.host_local else {
            return Ok(BTreeMap::new());
        };
        HostLocal::read(dir).map_err(|source| IpamError::Io {
            operation: "read",
            path: dir.clone(),
            source,
        })
    }

    fn save(&self, state: &State) -> Result<(), IpamError> {
        let failed = |source| IpamError::Io {
            operation: "write",
            path: self.config.file.clone(),
            source,
        };
        let mut text = serde_json::to_vec(state).map_err(|error| failed(error.into()))?;
        text.push(b'\n');
        persist::replace(&self.config.file, &text, &self.config.faults).map_err(failed)
    }
}

impl State {
    fn find(
        &mut self,
        family: Family,
        ranges: &[&Range],
        foreign: &BTreeMap<IpAddr, String>,
    ) -> Result<IpAddr, IpamError> {
        let last = match family {
            Family::V4 => &mut self.last_v4,
            Family::V6 => &mut self.last_v6,
        };
        let taken: BTreeSet<IpAddr> = self.used.keys().chain(foreign.keys()).copied().collect();
        let is_free = |address: &IpAddr| !taken.contains(address) && !self.quarantine.contains_key(address);
        let found = range::search(ranges, *last, is_free).or_else(|| {
            let mut waiting: Vec<(&IpAddr, &u64)> = self
                .quarantine
                .iter()
                .filter(|(address, _)| !taken.contains(*address))
                .filter(|(address, _)| ranges.iter().any(|range| range.offers(**address)))
                .collect();
            waiting.sort_by_key(|(_, until)| **until);
            waiting.first().map(|(address, _)| **address)
        });
        let Some(address) = found else {
            let ranges: Vec<String> = ranges.iter().map(|range| range.to_string()).collect();
            let used = taken
                .iter()
                .filter(|address| address.is_ipv4() == (family == Family::V4))
                .count();
            return Err(IpamError::Full {
                ranges: ranges.join(", "),
                used,
            });
        };
        *last = Some(address);
        Ok(address)
    }

    fn want(
        &self,
        address: IpAddr,
        ranges: &[&Range],
        foreign: &BTreeMap<IpAddr, String>,
    ) -> Result<IpAddr, IpamError> {
        let cause = if !ranges.iter().any(|range| range.offers(address)) {
            "is not one that pods of this node can have".into()
        } else if let Some(owner) = self.used.get(&address) {
            format!("is used by {owner}")
        } else if let Some(id) = foreign.get(&address) {
            format!("is used by container {id} of another plugin")
        } else {
            return Ok(address);
        };
        Err(IpamError::Requested { address, cause })
    }
}

/// A clock that was set back must not keep addresses waiting for years.
fn still_waits(until: u64, now: u64, quarantine: Duration) -> bool {
    until > now && until - now <= quarantine.as_secs()
}

fn now() -> u64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_secs())
}

fn ranges(cidrs: &[IpNet]) -> Result<Vec<Range>, IpamError> {
    cidrs
        .iter()
        .map(|cidr| Range::new(*cidr).ok_or(IpamError::TooSmall(*cidr)))
        .collect()
}

fn parse(path: &Path, text: &[u8]) -> Result<State, IpamError> {
    let corrupt = |cause: String| IpamError::Corrupt {
        path: path.into(),
        cause,
    };
    let state: State = serde_json::from_slice(text).map_err(|error| corrupt(error.to_string()))?;
    if state.version > VERSION {
        return Err(corrupt(format!(
            "version {} is newer than {VERSION}",
            state.version
        )));
    }
    Ok(State {
        version: VERSION,
        ..state
    })
}
