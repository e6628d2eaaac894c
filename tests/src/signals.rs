//! Ctrl-C and SIGTERM: clean up, then end.

use std::os::fd::{IntoRawFd, OwnedFd};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};

use anyhow::{Context, Result, anyhow};
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};

use crate::residue;

/// The writing end of the pipe that wakes the cleaner; -1 before there is one.
static WAKE: AtomicI32 = AtomicI32::new(-1);

/// Set by the first signal.
static INTERRUPTED: AtomicBool = AtomicBool::new(false);

extern "C" fn on_signal(signal: i32) {
    INTERRUPTED.store(true, Ordering::Relaxed);
    let byte = [u8::try_from(signal).unwrap_or(0)];
    // SAFETY: write(2) is async-signal-safe, and the buffer lives on this stack.
    unsafe { libc::write(WAKE.load(Ordering::Relaxed), byte.as_ptr().cast(), 1) };
}

/// From now on SIGINT, SIGTERM and SIGHUP remove every cluster of this process and end it. Later calls do nothing.
///
/// # Errors
/// When the handlers cannot be installed.
pub fn clean_up_on_signals() -> Result<()> {
    static DONE: OnceLock<std::result::Result<(), String>> = OnceLock::new();
    DONE.get_or_init(|| install().map_err(|error| format!("{error:#}")))
        .clone()
        .map_err(|error| anyhow!(error))
}

/// Waits for the end of the process if a signal is about to end it: whatever fails then fails because of that.
pub fn leave_to_clean_up() {
    while INTERRUPTED.load(Ordering::Relaxed) {
        std::thread::park();
    }
}

fn install() -> Result<()> {
    let (read, write) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC).context("cannot make a pipe")?;
    WAKE.store(write.into_raw_fd(), Ordering::Relaxed);
    std::thread::Builder::new()
        .name("clean-up".to_owned())
        .spawn(move || clean_up_when_woken(&read))
        .context("cannot start a thread")?;
    let action = SigAction::new(
        SigHandler::Handler(on_signal),
        SaFlags::SA_RESTART,
        SigSet::empty(),
    );
    for signal in [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP] {
        // SAFETY: the handler only writes to a pipe.
        unsafe { sigaction(signal, &action) }.with_context(|| format!("cannot handle {signal}"))?;
    }
    Ok(())
}

fn clean_up_when_woken(read: &OwnedFd) {
    let mut byte = [0_u8];
    while nix::unistd::read(read, &mut byte) == Err(nix::errno::Errno::EINTR) {}
    eprintln!("\ninterrupted: cleaning up");
    let me = std::process::id();
    // Other threads may be making things at this moment: until nothing is left, but not for ever.
    for _ in 0..5 {
        let mine: Vec<String> = residue::clusters()
            .unwrap_or_default()
            .into_iter()
            .filter(|(_, pid)| *pid == me)
            .map(|(name, _)| name)
            .collect();
        if mine.is_empty() {
            break;
        }
        for name in mine {
            let (_, failed) = residue::remove(&name);
            for line in failed {
                eprintln!("cannot remove {line}");
            }
        }
    }
    std::process::exit(128 + i32::from(byte[0]));
}
