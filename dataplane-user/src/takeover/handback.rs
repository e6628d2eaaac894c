//! Handing back to kube-proxy.

use std::collections::BTreeSet;
use std::io;
use std::path::Path;
use std::time::{Duration, Instant};

use tracing::info;

use super::netlink::Socket;
use super::{Family, survey};
use crate::kernel::{self, KernelError};

/// Between two looks at kube-proxy's rules.
const LOOK: Duration = Duration::from_millis(500);
/// For answers to datagrams that went out translated.
const ANSWERS: Duration = Duration::from_secs(2);

/// Why it was not handed back.
#[derive(Debug, thiserror::Error)]
pub enum HandBackError {
    /// kube-proxy did not come.
    #[error(
        "kube-proxy has written no rules for {missing} within {timeout:?}: everything is left as it was. Start kube-proxy \
         and run this again, or give it more time with --timeout"
    )]
    NoRules {
        /// Families, as nftables names them.
        missing: String,
        /// How long was waited.
        timeout: Duration,
    },
    /// Its rules cannot be read.
    #[error("read kube-proxy's rules: {0}")]
    Rules(#[from] io::Error),
    /// Something of ours cannot be detached.
    #[error(transparent)]
    Kernel(#[from] KernelError),
}

/// What was done.
#[derive(Debug)]
pub struct HandBack {
    /// How long kube-proxy's rules were waited for.
    pub waited: Duration,
    /// Flows that packet programs still translated when they were removed, after the time given.
    pub cut: usize,
    /// Everything that was removed.
    pub removed: Vec<String>,
}

/// Waits until kube-proxy's rules serve the families that we serve, then gives new connections to it, then removes
/// everything of ours. Connections that our socket programs translated are direct ones and go on by themselves; flows that
/// the packet programs translate are waited for until `timeout`, counted from the start.
///
/// # Errors
///
/// If kube-proxy's rules do not come in time, or something cannot be removed.
pub fn hand_back(bpffs_root: &Path, timeout: Duration) -> Result<HandBack, HandBackError> {
    let begun = Instant::now();
    let wanted: BTreeSet<Family> = kernel::served_families(bpffs_root)?
        .into_iter()
        .map(|v6| if v6 { Family::V6 } else { Family::V4 })
        .collect();
    let mut socket = Socket::open()?;
    loop {
        let complete = survey(&mut socket)?.complete;
        let missing: Vec<String> = wanted.difference(&complete).map(ToString::to_string).collect();
        if missing.is_empty() {
            break;
        }
        if begun.elapsed() >= timeout {
            return Err(HandBackError::NoRules {
                missing: missing.join(" and "),
                timeout,
            });
        }
        std::thread::sleep(LOOK);
    }
    let waited = begun.elapsed();
    let mut removed = kernel::stop_new_connections(bpffs_root)?;
    if !removed.is_empty() {
        std::thread::sleep(ANSWERS);
    }
    let mut cut = kernel::running_flows(bpffs_root)?;
    if cut > 0 {
        info!(
            flows = cut,
            "flows of other hosts run on; the programs stay until these have ended"
        );
    }
    while cut > 0 && begun.elapsed() < timeout {
        std::thread::sleep(LOOK);
        cut = kernel::running_flows(bpffs_root)?;
    }
    removed.extend(kernel::cleanup(bpffs_root)?);
    removed.extend(super::cleanup()?);
    Ok(HandBack { waited, cut, removed })
}
