//! What the programs log, when they are told to.

use aya::Ebpf;
use aya_log::EbpfLogger;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tracing::{error, warn};

/// Starts a task that passes records on. They go through `log`; the subscriber takes them over from there.
pub(super) fn forward(ebpf: &mut Ebpf) {
    let logger = match EbpfLogger::init(ebpf) {
        Ok(logger) => logger,
        Err(error) => {
            warn!(%error, "eBPF programs cannot log");
            return;
        }
    };
    // SAFETY: the logger owns the ring buffer's descriptor and gives the same one out as long as it lives.
    let registered = unsafe { AsyncFd::register_with_interest(logger, Interest::READABLE) };
    let mut logger = match registered {
        Ok(logger) => logger,
        Err(error) => {
            warn!(%error, "eBPF log cannot be awaited");
            return;
        }
    };
    tokio::spawn(async move {
        loop {
            match logger.readable_mut().await {
                Ok(mut guard) => {
                    guard.get_inner_mut().flush();
                    guard.clear_ready();
                }
                Err(error) => {
                    error!(%error, "eBPF log ended");
                    return;
                }
            }
        }
    });
}
