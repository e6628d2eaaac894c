//! Cluster addresses and node ports of Services.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::ops::RangeInclusive;

use ipnet::IpNet;
use rand::Rng;
use serde_json::Value;

/// Hands out cluster addresses and node ports, each to one Service at a time.
///
/// Changes made between [`Allocator::begin`] and [`Allocator::rollback`] are undone by the latter; [`Allocator::commit`]
/// keeps them. Calls do not nest. It keeps no files: at start the stored Services are adopted one by one.
#[derive(Debug)]
pub struct Allocator {
    cidrs: Vec<IpNet>,
    node_port_range: RangeInclusive<u16>,
    addresses: BTreeSet<IpAddr>,
    ports: BTreeSet<u16>,
    journal: Vec<Change>,
}

#[derive(Debug)]
enum Change {
    TookAddress(IpAddr),
    GaveAddress(IpAddr),
    TookPort(u16),
    GavePort(u16),
}

/// Why an address or port cannot be had. The texts are those of kube-apiserver.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum AllocError {
    #[error("provided IP is already allocated")]
    AddressTaken,
    #[error("the provided IP ({0}) is not in the valid range. The range of valid IPs is {1}")]
    AddressOutOfRange(IpAddr, String),
    #[error("range is full")]
    Full,
    #[error("provided port is already allocated")]
    PortTaken,
    #[error("provided port is not in the valid range. The range of valid ports is {0}-{1}")]
    PortOutOfRange(u16, u16),
}

/// Random attempts before the range is searched in order.
const RANDOM_TRIES: u32 = 64;

impl Allocator {
    /// One range per address family, the first is the family that Services get by default; at most two are used.
    #[expect(clippy::needless_pass_by_value, reason = "callers hand over their settings")]
    pub fn new(service_cidrs: Vec<IpNet>, node_port_range: RangeInclusive<u16>) -> Self {
        Self {
            cidrs: service_cidrs.iter().map(IpNet::trunc).collect(),
            node_port_range,
            addresses: BTreeSet::new(),
            ports: BTreeSet::new(),
            journal: Vec::new(),
        }
    }

    /// Marks the addresses and ports of a stored Service as taken. Fields that cannot be read are skipped.
    pub fn adopt(&mut self, service: &Value) {
        self.addresses.extend(addresses_of(service));
        self.ports.extend(ports_of(service));
    }

    /// Starts recording, so that what follows can be undone.
    pub fn begin(&mut self) {
        self.journal.clear();
    }

    /// Keeps everything since [`Allocator::begin`].
    pub fn commit(&mut self) {
        self.journal.clear();
    }

    /// Undoes everything since [`Allocator::begin`].
    pub fn rollback(&mut self) {
        while let Some(change) = self.journal.pop() {
            match change {
                Change::TookAddress(a) => {
                    self.addresses.remove(&a);
                }
                Change::GaveAddress(a) => {
                    self.addresses.insert(a);
                }
                Change::TookPort(p) => {
                    self.ports.remove(&p);
                }
                Change::GavePort(p) => {
                    self.ports.insert(p);
                }
            }
        }
    }

    /// Gives back everything that the Service holds.
    pub fn release(&mut self, service: &Value) {
        for address in addresses_of(service) {
            self.release_address(address);
        }
        for port in ports_of(service) {
            self.release_port(port);
        }
    }

    /// Whether Services can have addresses of this family.
    pub(super) fn has_family(&self, v6: bool) -> bool {
        self.cidrs.iter().any(|c| is_v6(c) == v6)
    }

    /// Whether the default family is IPv6.
    pub(super) fn default_is_v6(&self) -> bool {
        self.cidrs.first().is_some_and(is_v6)
    }

    pub(super) fn take_address(&mut self, address: IpAddr) -> Result<(), AllocError> {
        let Some(cidr) = self.cidrs.iter().find(|c| is_v6(c) == address.is_ipv6()) else {
            return Err(AllocError::AddressOutOfRange(address, String::new()));
        };
        let (first, last) = usable(cidr);
        let n = number(address);
        if n < first || n > last {
            return Err(AllocError::AddressOutOfRange(address, cidr.to_string()));
        }
        if !self.addresses.insert(address) {
            return Err(AllocError::AddressTaken);
        }
        self.journal.push(Change::TookAddress(address));
        Ok(())
    }

    /// A free address, taken from the upper part of the range while that has one: the lower part is where people pick
    /// fixed addresses (KEP-3070), beginning with the API's own.
    pub(super) fn take_any_address(&mut self, v6: bool) -> Result<IpAddr, AllocError> {
        let cidr = *self
            .cidrs
            .iter()
            .find(|c| is_v6(c) == v6)
            .ok_or(AllocError::Full)?;
        let (first, last) = usable(&cidr);
        if last < first {
            return Err(AllocError::Full);
        }
        let size = last - first + 1;
        let band = if size <= 16 { 0 } else { (size / 16).clamp(16, 256) };
        let lower = first + band;
        let mut rng = rand::rng();
        let random = (0..RANDOM_TRIES).map(|_| rng.random_range(lower..=last));
        let free = |n: &u128| !self.addresses.contains(&address(*n, v6));
        let found = random
            .into_iter()
            .find(free)
            .or_else(|| (lower..=last).find(free))
            .or_else(|| (first..lower).find(free))
            .ok_or(AllocError::Full)?;
        let address = address(found, v6);
        self.addresses.insert(address);
        self.journal.push(Change::TookAddress(address));
        Ok(address)
    }

    pub(super) fn release_address(&mut self, address: IpAddr) {
        if self.addresses.remove(&address) {
            self.journal.push(Change::GaveAddress(address));
        }
    }

    /// The error for a number that is no node port of this cluster.
    pub(super) fn port_out_of_range(&self) -> AllocError {
        AllocError::PortOutOfRange(*self.node_port_range.start(), *self.node_port_range.end())
    }

    pub(super) fn take_port(&mut self, port: u16) -> Result<(), AllocError> {
        if !self.node_port_range.contains(&port) {
            return Err(self.port_out_of_range());
        }
        if !self.ports.insert(port) {
            return Err(AllocError::PortTaken);
        }
        self.journal.push(Change::TookPort(port));
        Ok(())
    }

    /// A free node port; the lower part of the range is left to people, as for addresses (KEP-3668).
    pub(super) fn take_any_port(&mut self) -> Result<u16, AllocError> {
        let (first, last) = (*self.node_port_range.start(), *self.node_port_range.end());
        if last < first {
            return Err(AllocError::Full);
        }
        let size = last - first;
        let band = if size < 16 {
            0
        } else {
            (size / 32).clamp(16, 128).min(size)
        };
        let lower = first + band;
        let mut rng = rand::rng();
        let found = (0..RANDOM_TRIES)
            .map(|_| rng.random_range(lower..=last))
            .find(|p| !self.ports.contains(p))
            .or_else(|| {
                (lower..=last)
                    .chain(first..lower)
                    .find(|p| !self.ports.contains(p))
            })
            .ok_or(AllocError::Full)?;
        self.ports.insert(found);
        self.journal.push(Change::TookPort(found));
        Ok(found)
    }

    pub(super) fn release_port(&mut self, port: u16) {
        if self.ports.remove(&port) {
            self.journal.push(Change::GavePort(port));
        }
    }
}

fn is_v6(cidr: &IpNet) -> bool {
    matches!(cidr, IpNet::V6(_))
}

fn number(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(a) => u128::from(u32::from(a)),
        IpAddr::V6(a) => u128::from(a),
    }
}

fn address(number: u128, v6: bool) -> IpAddr {
    if v6 {
        IpAddr::V6(number.into())
    } else {
        IpAddr::V4(u32::try_from(number).unwrap_or(u32::MAX).into())
    }
}

/// First and last address that a Service may have: not the network's own, not the IPv4 broadcast address.
fn usable(cidr: &IpNet) -> (u128, u128) {
    let first = number(cidr.network());
    let last = match cidr {
        IpNet::V4(c) => u128::from(u32::from(c.broadcast())),
        IpNet::V6(c) => u128::from(c.broadcast()),
    };
    if first == last {
        return (first, last);
    }
    match cidr {
        IpNet::V4(_) => (first + 1, last.saturating_sub(1)),
        IpNet::V6(_) => (first + 1, last),
    }
}

/// What a Service object holds that no other one may, as text.
pub fn allocated(service: &Value) -> Vec<String> {
    let addresses = addresses_of(service);
    let ports = ports_of(service);
    addresses
        .iter()
        .map(|address| format!("address/{address}"))
        .chain(ports.iter().map(|port| format!("port/{port}")))
        .collect()
}

/// Cluster addresses of a Service object.
pub(super) fn addresses_of(service: &Value) -> Vec<IpAddr> {
    let spec = &service["spec"];
    let list = spec["clusterIPs"].as_array();
    let one = spec["clusterIP"].as_str();
    let mut found: Vec<IpAddr> = list
        .into_iter()
        .flatten()
        .filter_map(Value::as_str)
        .chain(one)
        .filter_map(|s| s.parse().ok())
        .collect();
    found.sort_unstable();
    found.dedup();
    found
}

/// Node ports of a Service object, the health check port included.
pub(super) fn ports_of(service: &Value) -> Vec<u16> {
    let spec = &service["spec"];
    let mut found: Vec<u16> = spec["ports"]
        .as_array()
        .into_iter()
        .flatten()
        .map(|p| &p["nodePort"])
        .chain(std::iter::once(&spec["healthCheckNodePort"]))
        .filter_map(Value::as_u64)
        .filter_map(|p| u16::try_from(p).ok())
        .filter(|p| *p != 0)
        .collect();
    found.sort_unstable();
    found.dedup();
    found
}
