//! What is attached, in one file each, so that a crash at any moment loses nothing that a runtime was told.

use std::collections::BTreeMap;
use std::io;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use beeline_cni::mac::Mac;
use beeline_cni::protocol::{Bandwidth, Key, Pod, PortMapping};
use serde::{Deserialize, Serialize};
use tracing::warn;

use crate::persist::{self, Faults};

/// Version of the files' format.
const VERSION: u32 = 1;
/// Start of the names of our devices.
const PREFIX: &str = "bee";
/// Hexadecimal digits after it: together 14, and the kernel allows 15.
const DIGITS: usize = 11;

/// A pod's network.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Attachment {
    /// Of the file's format.
    pub version: u32,
    /// What it is known by.
    pub key: Key,
    /// The pod, if the runtime says.
    pub pod: Option<Pod>,
    /// `CNI_NETNS`.
    pub netns: String,
    /// The kernel's boot id: after a reboot nothing of it is left.
    pub boot: String,
    /// Our device; `None` where another plugin made it.
    pub device: Option<Device>,
    /// Addresses of the pod.
    pub ips: Vec<IpAddr>,
    /// hostPorts.
    pub port_mappings: Vec<PortMapping>,
    /// Limits.
    pub bandwidth: Option<Bandwidth>,
}

/// A pair of devices.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Device {
    /// Name in the node.
    pub name: String,
    /// Address in the node.
    pub host_mac: Mac,
    /// Address in the pod.
    pub mac: Mac,
    /// Bytes.
    pub mtu: u32,
}

impl Attachment {
    /// Of a key, still without anything.
    #[must_use]
    pub fn new(key: Key) -> Self {
        Self {
            version: VERSION,
            key,
            pod: None,
            netns: String::new(),
            boot: boot_id(),
            device: None,
            ips: Vec::new(),
            port_mappings: Vec::new(),
            bandwidth: None,
        }
    }
}

/// Identifies the running kernel; empty where there is none.
#[must_use]
pub fn boot_id() -> String {
    std::fs::read_to_string("/proc/sys/kernel/random/boot_id")
        .map(|text| text.trim().to_owned())
        .unwrap_or_default()
}

/// FNV-1a: the same for ever, whatever the standard library does.
fn hash(key: &Key) -> u64 {
    let parts = [&key.network, &key.container_id, &key.ifname];
    let bytes = parts.iter().flat_map(|part| part.bytes().chain([0]));
    bytes.fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    })
}

/// Name of the device in the node: short, and the same each time.
#[must_use]
pub fn device_name(key: &Key) -> String {
    let digits = format!("{:016x}", hash(key));
    format!("{PREFIX}{}", digits.get(..DIGITS).unwrap_or(&digits))
}

/// Whether a device has a name that only we give.
#[must_use]
pub fn is_device(name: &str) -> bool {
    name.strip_prefix(PREFIX).is_some_and(|digits| {
        digits.len() == DIGITS
            && digits
                .bytes()
                .all(|digit| digit.is_ascii_digit() || (b'a'..=b'f').contains(&digit))
    })
}

/// All attachments.
#[derive(Debug)]
pub struct Store {
    dir: PathBuf,
    all: BTreeMap<Key, Attachment>,
    faults: Faults,
}

impl Store {
    /// Reads what is there. A file that cannot be used is put aside and told; the rest counts.
    ///
    /// # Errors
    ///
    /// When the directory cannot be made or read.
    pub fn open(dir: PathBuf, faults: Faults) -> io::Result<Self> {
        std::fs::create_dir_all(&dir)?;
        let mut all = BTreeMap::new();
        for entry in std::fs::read_dir(&dir)? {
            let path = entry?.path();
            let name = path
                .file_name()
                .unwrap_or_default()
                .to_string_lossy()
                .into_owned();
            if persist::is_temporary(&name) {
                std::fs::remove_file(&path)?;
            } else if name.ends_with(".json") {
                match read(&path) {
                    Ok(attachment) => {
                        all.insert(attachment.key.clone(), attachment);
                    }
                    Err(error) => {
                        warn!(file = %path.display(), %error, "an attachment cannot be used; it is put aside");
                        std::fs::rename(&path, path.with_extension("corrupt"))?;
                    }
                }
            }
        }
        Ok(Self { dir, all, faults })
    }

    fn path(&self, key: &Key) -> PathBuf {
        self.dir.join(format!("{:016x}.json", hash(key)))
    }

    /// One.
    #[must_use]
    pub fn get(&self, key: &Key) -> Option<&Attachment> {
        self.all.get(key)
    }

    /// All, by key.
    #[must_use]
    pub fn all(&self) -> &BTreeMap<Key, Attachment> {
        &self.all
    }

    /// Writes one down; when this returns it survives a crash.
    ///
    /// # Errors
    ///
    /// When it cannot be written; it is not there then.
    pub fn put(&mut self, attachment: Attachment) -> io::Result<()> {
        let mut text = serde_json::to_vec(&attachment)?;
        text.push(b'\n');
        let path = self.path(&attachment.key);
        if let Err(error) = persist::replace(&path, &text, &self.faults) {
            // it may be in place, though not for sure
            let _gone = std::fs::remove_file(&path);
            return Err(error);
        }
        self.all.insert(attachment.key.clone(), attachment);
        Ok(())
    }

    /// Forgets one.
    ///
    /// # Errors
    ///
    /// When its file cannot be removed; it is still there then.
    pub fn remove(&mut self, key: &Key) -> io::Result<()> {
        persist::remove(&self.path(key), &self.faults)?;
        self.all.remove(key);
        Ok(())
    }
}

fn read(path: &Path) -> io::Result<Attachment> {
    let attachment: Attachment = serde_json::from_slice(&std::fs::read(path)?)?;
    if attachment.version > VERSION {
        let text = format!("version {} is newer than {VERSION}", attachment.version);
        return Err(io::Error::new(io::ErrorKind::InvalidData, text));
    }
    Ok(attachment)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(id: &str) -> Key {
        Key {
            network: "net".into(),
            container_id: id.into(),
            ifname: "eth0".into(),
        }
    }

    #[test]
    fn names_are_short_stable_and_recognised() {
        let name = device_name(&key("0123456789abcdef"));
        assert_eq!(name, device_name(&key("0123456789abcdef")));
        assert_eq!(name.len(), 14);
        assert!(is_device(&name));
        // the same characters, cut elsewhere
        let other = Key {
            network: "ne".into(),
            container_id: "t0123456789abcdef".into(),
            ifname: "eth0".into(),
        };
        assert_ne!(device_name(&other), name);
        for foreign in [
            "beer0",
            "bee",
            "bee0123456789",
            "beeABCDEF01234",
            "eth0",
            "bee0123456789ag",
        ] {
            assert!(!is_device(foreign), "{foreign}");
        }
    }

    #[test]
    fn what_was_put_is_read_again_and_a_broken_file_takes_only_itself() {
        let dir = tempfile::tempdir().unwrap();
        let mut store = Store::open(dir.path().into(), Faults::default()).unwrap();
        for id in ["a", "b", "c"] {
            store.put(Attachment::new(key(id))).unwrap();
        }
        store.remove(&key("b")).unwrap();
        std::fs::write(store.path(&key("c")), "{").unwrap();
        std::fs::write(dir.path().join(".x.json.tmp"), "{").unwrap();
        let store = Store::open(dir.path().into(), Faults::default()).unwrap();
        assert_eq!(store.all().keys().collect::<Vec<_>>(), [&key("a")]);
        assert!(!dir.path().join(".x.json.tmp").exists());
    }

    #[test]
    fn a_full_disk_leaves_nothing() {
        for step in [
            "create file",
            "write file",
            "flush file",
            "rename file",
            "flush directory",
        ] {
            let dir = tempfile::tempdir().unwrap();
            let faults = Faults::new(move |now| {
                if now == step {
                    Err(io::ErrorKind::StorageFull.into())
                } else {
                    Ok(())
                }
            });
            let mut store = Store::open(dir.path().into(), faults).unwrap();
            store.put(Attachment::new(key("a"))).unwrap_err();
            assert!(store.get(&key("a")).is_none());
            assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0, "{step}");
        }
    }
}
