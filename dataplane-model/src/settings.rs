//! What the operator of a node chooses for all services.

use dataplane_common::abi::algorithm;

/// Names of the algorithms, as the annotation and the flag spell them.
pub const ALGORITHMS: [(&str, u32); 5] = [
    ("random", algorithm::RANDOM),
    ("round-robin", algorithm::ROUND_ROBIN),
    ("maglev", algorithm::MAGLEV),
    ("source-hash", algorithm::SOURCE_HASH),
    ("least-conn", algorithm::LEAST_CONN),
];

/// The algorithm of this name; `None` if there is none.
#[must_use]
pub fn algorithm_by_name(name: &str) -> Option<u32> {
    ALGORITHMS
        .iter()
        .find(|(known, _)| *known == name)
        .map(|(_, number)| *number)
}

/// The name of an algorithm; `unknown` if there is none of this number.
#[must_use]
pub fn algorithm_name(number: u32) -> &'static str {
    ALGORITHMS
        .iter()
        .find(|(_, known)| *known == number)
        .map_or("unknown", |(name, _)| name)
}

/// Settings of the model.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Settings {
    /// The algorithm of services that choose none, see [`algorithm`].
    pub algorithm: u32,
    /// Traffic from other hosts is spread by Maglev tables: services that it can reach get some.
    pub external_maglev: bool,
    /// `spec.externalIPs` count (feature gate `AllowServiceExternalIPs`).
    pub external_ips: bool,
    /// Backends are watched for failures unless their service says otherwise.
    pub failure_detection: bool,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            algorithm: algorithm::RANDOM,
            external_maglev: true,
            external_ips: true,
            failure_detection: true,
        }
    }
}
