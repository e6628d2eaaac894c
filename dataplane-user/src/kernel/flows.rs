//! The flows that the packet programs know.

use std::path::Path;

use dataplane_common::abi::{Flow, FlowKey};

use super::transfer::{RawMap, read};
use super::{KernelError, pins};

/// `CONNTRACK` or `NAT`. Reading it is no use of a flow: the kernel forgets the same ones as without.
#[derive(Debug)]
pub struct FlowTable(RawMap);

const KEY: usize = size_of::<FlowKey>();
const VALUE: usize = size_of::<Flow>();

fn bytes(key: &FlowKey) -> [u8; KEY] {
    // SAFETY: the key is integers without padding, of exactly this size.
    unsafe { std::mem::transmute_copy(key) }
}

impl FlowTable {
    pub(super) fn open(pin_dir: &Path, name: &'static str) -> Result<Self, KernelError> {
        RawMap::open(&pins::map_path(pin_dir, name)).map(Self)
    }

    /// Most entries that it holds.
    #[must_use]
    pub fn capacity(&self) -> u32 {
        self.0.max_entries()
    }

    /// Shows every entry to `visit`, and gives how many there were. What changes meanwhile may be shown or not, or twice.
    ///
    /// # Errors
    ///
    /// If the kernel refuses.
    pub fn visit(&self, mut visit: impl FnMut(&FlowKey, &Flow)) -> Result<usize, KernelError> {
        self.0.visit(&mut |key, value| {
            if let (Some(key), Some(flow)) = (read::<FlowKey, KEY>(key), read::<Flow, VALUE>(value)) {
                visit(&key, &flow);
            }
        })
    }

    /// The entry of a key.
    ///
    /// # Errors
    ///
    /// If the kernel refuses.
    pub fn get(&self, key: &FlowKey) -> Result<Option<Flow>, KernelError> {
        let mut value = [0; VALUE];
        let found = self.0.get(&bytes(key), &mut value)?;
        Ok(read::<Flow, VALUE>(&value).filter(|_| found))
    }

    /// Removes an entry. False if there is none.
    ///
    /// # Errors
    ///
    /// If the kernel refuses.
    pub fn remove(&self, key: &FlowKey) -> Result<bool, KernelError> {
        self.0.remove(&bytes(key))
    }
}
