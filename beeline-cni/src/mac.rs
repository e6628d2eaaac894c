//! Ethernet addresses as text.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// An Ethernet address; as text six lower-case hexadecimal bytes with colons.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct Mac(pub [u8; 6]);

/// Text that is no Ethernet address.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{0:?} is no MAC address (six hexadecimal bytes with colons)")]
pub struct NotMac(String);

impl Mac {
    /// Whether a device may have it: not all zero, and no group address.
    #[must_use]
    pub fn is_unicast(self) -> bool {
        self.0 != [0; 6] && self.0[0] & 1 == 0
    }
}

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl fmt::Debug for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for Mac {
    type Err = NotMac;

    fn from_str(text: &str) -> Result<Self, NotMac> {
        let wrong = || NotMac(text.chars().take(32).collect());
        let mut bytes = [0; 6];
        let mut parts = text.split([':', '-']);
        for byte in &mut bytes {
            let part = parts.next().ok_or_else(wrong)?;
            if part.len() != 2 || !part.bytes().all(|b| b.is_ascii_hexdigit()) {
                return Err(wrong());
            }
            *byte = u8::from_str_radix(part, 16).map_err(|_| wrong())?;
        }
        if parts.next().is_some() {
            return Err(wrong());
        }
        Ok(Self(bytes))
    }
}

impl From<Mac> for String {
    fn from(mac: Mac) -> Self {
        mac.to_string()
    }
}

impl TryFrom<String> for Mac {
    type Error = NotMac;

    fn try_from(text: String) -> Result<Self, NotMac> {
        text.parse()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_is_read_and_written() {
        let mac: Mac = "0A:1b:2c:3d:4e:ff".parse().unwrap();
        assert_eq!(mac.to_string(), "0a:1b:2c:3d:4e:ff");
        assert!(mac.is_unicast());
        for wrong in [
            "",
            "0a:1b:2c:3d:4e",
            "0a:1b:2c:3d:4e:ff:00",
            "0a:1b:2c:3d:4e:f",
            "+a:1b:2c:3d:4e:ff",
        ] {
            assert!(wrong.parse::<Mac>().is_err(), "{wrong}");
        }
        assert!(!Mac([0; 6]).is_unicast());
        assert!(!Mac([0x01, 0, 0x5e, 0, 0, 1]).is_unicast());
    }
}
