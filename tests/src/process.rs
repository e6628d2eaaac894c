//! Processes inside a network namespace and a cgroup.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::io::Write;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use nix::sched::{CloneFlags, setns};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::netns::NetNs;
use crate::{program, wait_for};

/// Where a process runs: a network namespace and a cgroup.
#[derive(Debug, Clone)]
pub struct Place {
    netns: Arc<NetNs>,
    cgroup: PathBuf,
    /// Whether processes outlive us.
    keep: bool,
}

impl Place {
    /// A place in a cgroup that is there; its processes end with us unless `keep`.
    #[must_use]
    pub fn new(netns: Arc<NetNs>, cgroup: PathBuf, keep: bool) -> Self {
        Self { netns, cgroup, keep }
    }

    /// The same network namespace, with the cgroup of another place.
    #[must_use]
    pub fn in_cgroup_of(&self, other: &Self) -> Self {
        Self {
            cgroup: other.cgroup.clone(),
            ..self.clone()
        }
    }

    /// The network namespace.
    #[must_use]
    pub fn netns(&self) -> &NetNs {
        &self.netns
    }

    pub(crate) fn keeps(&self) -> bool {
        self.keep
    }

    /// The cgroup's directory.
    #[must_use]
    pub fn cgroup(&self) -> &Path {
        &self.cgroup
    }

    /// A command that will run in this place, from its first instruction on, and that ends when we do (unless the
    /// cluster is to be kept).
    ///
    /// # Errors
    /// When the cgroup is gone.
    pub fn command(&self, program: impl AsRef<OsStr>) -> Result<Command> {
        let procs = self.cgroup.join("cgroup.procs");
        let procs = File::options()
            .write(true)
            .open(&procs)
            .with_context(|| format!("cannot open {}", procs.display()))?;
        let netns: OwnedFd = self
            .netns
            .file()
            .as_fd()
            .try_clone_to_owned()
            .context("cannot duplicate a file descriptor")?;
        let keep = self.keep;
        let mut command = Command::new(program);
        let enter = move || -> std::io::Result<()> {
            // "0" is the writing process itself: cgroups(7).
            (&procs).write_all(b"0")?;
            setns(&netns, CloneFlags::CLONE_NEWNET)?;
            if keep {
                nix::unistd::setsid()?;
            } else {
                nix::sys::prctl::set_pdeathsig(Signal::SIGKILL)?;
            }
            Ok(())
        };
        // SAFETY: between fork and exec only system calls are made: write, setns, and prctl or setsid. Nothing
        // allocates or locks.
        unsafe { command.pre_exec(enter) };
        Ok(command)
    }

    /// Runs a command to its end and returns what it printed.
    ///
    /// # Errors
    /// When it fails; what it wrote to stderr is in the error.
    pub fn output(&self, program: impl AsRef<OsStr>, args: &[&str]) -> Result<String> {
        let mut command = self.command(program)?;
        command.args(args).stdin(Stdio::null());
        output(command)
    }
}

/// Runs a command to its end and returns what it printed.
///
/// # Errors
/// When it fails; what it wrote to stderr is in the error.
pub fn output(mut command: Command) -> Result<String> {
    let output = command
        .output()
        .with_context(|| format!("cannot start {command:?}"))?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        bail!("{command:?} failed ({}): {}", output.status, said.trim());
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Starts a server that answers with this name at this port, TCP and UDP, and waits until it listens.
///
/// # Errors
/// When it does not come up.
pub fn echo(place: &Place, name: &str, port: u16, log: &Path) -> Result<Process> {
    listening(place, place.command(program("beeline-echo")?)?, name, port, log)
}

/// The same with a command that runs `beeline-echo` somewhere else, as `ip netns exec` does.
///
/// # Errors
/// When it does not come up.
pub fn listening(place: &Place, mut command: Command, name: &str, port: u16, log: &Path) -> Result<Process> {
    command.args(["--name", name, "--port", &port.to_string()]);
    let process = Process::spawn(place, &format!("echo {name}"), command, log)?;
    let listens = format!("{name} listening at port {port}");
    process.wait_log("its listening", Duration::from_secs(10), |line| line == listens)?;
    Ok(process)
}

/// A process in the background with its output in a file. Killed on drop, unless the cluster is kept.
#[derive(Debug)]
pub struct Process {
    name: String,
    child: Child,
    log: PathBuf,
    keep: bool,
}

impl Process {
    /// Starts `command` (from [`Place::command`]); stdout and stderr are appended to `log`.
    ///
    /// # Errors
    /// When the log cannot be opened or the program not started.
    pub fn spawn(place: &Place, name: &str, mut command: Command, log: &Path) -> Result<Self> {
        let file = File::options()
            .create(true)
            .append(true)
            .open(log)
            .with_context(|| format!("cannot open {}", log.display()))?;
        let child = command
            .stdin(Stdio::null())
            .stdout(file.try_clone().context("cannot duplicate a file descriptor")?)
            .stderr(file)
            .spawn()
            .with_context(|| format!("cannot start {name}: {command:?}"))?;
        Ok(Self {
            name: name.to_owned(),
            child,
            log: log.to_owned(),
            keep: place.keep,
        })
    }

    /// The process id.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// All that it has written so far.
    #[must_use]
    pub fn log(&self) -> String {
        fs::read(&self.log)
            .map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
            .unwrap_or_default()
    }

    /// Waits until a line of its log satisfies `wanted`; returns the line.
    ///
    /// # Errors
    /// After `limit`, with the end of the log.
    pub fn wait_log(&self, what: &str, limit: Duration, wanted: impl Fn(&str) -> bool) -> Result<String> {
        wait_for(&format!("{what} in the log of {}", self.name), limit, || {
            Ok(self.log().lines().find(|line| wanted(line)).map(str::to_owned))
        })
        .with_context(|| self.log_end())
    }

    /// Fails, with the end of its log, if it has ended.
    ///
    /// # Errors
    /// See above.
    pub fn check_running(&mut self) -> Result<()> {
        if let Some(status) = self.child.try_wait().context("cannot wait for a child")? {
            bail!("{} has ended ({status}). {}", self.name, self.log_end());
        }
        Ok(())
    }

    /// The last lines of its log, for error messages.
    #[must_use]
    pub fn log_end(&self) -> String {
        let log = self.log();
        let lines: Vec<&str> = log.lines().collect();
        let from = lines.len().saturating_sub(25);
        format!(
            "log of {} ({}), last lines:\n{}",
            self.name,
            self.log.display(),
            lines[from..].join("\n")
        )
    }

    /// Sends a signal.
    ///
    /// # Errors
    /// When the process is gone.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        let pid = Pid::from_raw(i32::try_from(self.child.id()).context("process id out of range")?);
        kill(pid, signal).with_context(|| format!("cannot send {signal} to {}", self.name))
    }

    /// SIGKILL, and waits for the end.
    ///
    /// # Errors
    /// When it had ended before.
    pub fn kill(&mut self) -> Result<()> {
        self.check_running()?;
        self.child
            .kill()
            .with_context(|| format!("cannot kill {}", self.name))?;
        self.child.wait().context("cannot wait for a child")?;
        Ok(())
    }

    /// SIGTERM, and waits for the end.
    ///
    /// # Errors
    /// When it does not end in 10 s.
    pub fn terminate(&mut self) -> Result<ExitStatus> {
        self.check_running()?;
        self.signal(Signal::SIGTERM)?;
        let status = wait_for(
            &format!("{} to end after SIGTERM", self.name),
            Duration::from_secs(10),
            || self.child.try_wait().context("cannot wait for a child"),
        );
        status.with_context(|| self.log_end())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if !self.keep {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}
