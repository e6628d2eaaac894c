//! Processes that outlive the one that started them.

use std::fs;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};

/// A process, told from others that get its number later.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Process {
    /// Its number.
    pub pid: u32,
    /// Clock ticks after boot, field 22 of proc_pid_stat(5).
    pub start: String,
}

impl Process {
    /// The process that has this number now.
    #[must_use]
    pub fn of(pid: u32) -> Option<Self> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        let (_, after_name) = stat.rsplit_once(") ")?;
        let mut fields = after_name.split(' ');
        if fields.next() == Some("Z") {
            return None;
        }
        Some(Self {
            pid,
            start: fields.nth(18)?.to_owned(),
        })
    }

    /// Whether it has not ended.
    #[must_use]
    pub fn runs(&self) -> bool {
        Self::of(self.pid).is_some_and(|now| now.start == self.start)
    }

    /// Sends a signal, if it has not ended.
    pub fn signal(&self, signal: Signal) {
        if self.runs()
            && let Ok(pid) = i32::try_from(self.pid)
        {
            // It may have ended meanwhile.
            let _gone = kill(Pid::from_raw(pid), signal);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn processes_are_told_apart() {
        let me = Process::of(std::process::id()).unwrap();
        assert!(me.runs());
        let other = Process {
            start: "1".into(),
            ..me
        };
        assert!(!other.runs());
        assert_eq!(Process::of(u32::MAX), None);
    }
}
