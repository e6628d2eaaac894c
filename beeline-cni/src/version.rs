//! Versions of the CNI specification.

use crate::protocol::{Failure, code};

/// All released versions, oldest first.
pub const SUPPORTED: [&str; 7] = ["0.1.0", "0.2.0", "0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"];

/// A version of the specification.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Version {
    /// One address of each family, no interfaces.
    V0_1,
    /// The same, and VERSION.
    V0_2,
    /// Interfaces and chains.
    V0_3_0,
    /// The same.
    V0_3_1,
    /// CHECK.
    V0_4,
    /// Addresses without their family.
    V1_0,
    /// GC, STATUS, MTU in results.
    V1_1,
}

const ALL: [Version; 7] = [
    Version::V0_1,
    Version::V0_2,
    Version::V0_3_0,
    Version::V0_3_1,
    Version::V0_4,
    Version::V1_0,
    Version::V1_1,
];

impl Version {
    /// The version that a configuration names; none is 0.1.0 (specification 0.2.0, "cniVersion").
    ///
    /// # Errors
    ///
    /// Code 1 for one that we do not know.
    pub fn parse(text: &str) -> Result<Self, Failure> {
        if text.is_empty() {
            return Ok(Self::V0_1);
        }
        SUPPORTED
            .iter()
            .zip(ALL)
            .find(|(name, _)| **name == text)
            .map(|(_, version)| version)
            .ok_or_else(|| {
                Failure::because(
                    code::INCOMPATIBLE_VERSION,
                    "incompatible CNI versions",
                    format!("config is {text:?}, plugin supports {SUPPORTED:?}"),
                )
            })
    }

    /// As in `cniVersion`.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::V0_1 => "0.1.0",
            Self::V0_2 => "0.2.0",
            Self::V0_3_0 => "0.3.0",
            Self::V0_3_1 => "0.3.1",
            Self::V0_4 => "0.4.0",
            Self::V1_0 => "1.0.0",
            Self::V1_1 => "1.1.0",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_known_by_name() {
        for name in SUPPORTED {
            assert_eq!(Version::parse(name).unwrap().name(), name);
        }
        assert_eq!(Version::parse("").unwrap(), Version::V0_1);
        for wrong in ["1.2.0", "0.3", "v1.0.0"] {
            assert_eq!(Version::parse(wrong).unwrap_err().code, 1, "{wrong}");
        }
    }
}
