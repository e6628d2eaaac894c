//! Network namespaces, named as `ip netns` names them.

use std::fs::File;
use std::io::Write;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, anyhow, bail};
use nix::sched::{CloneFlags, setns};

/// Where iproute2 keeps named namespaces.
pub(crate) const DIR: &str = "/run/netns";

/// A named network namespace; its links go with it.
///
/// Nothing here moves the calling thread: [`NetNs::run`] has a thread of its own, so that no code can be left in the
/// wrong namespace by an early return or a panic.
#[derive(Debug)]
pub struct NetNs {
    name: String,
    file: File,
}

impl NetNs {
    /// Makes a namespace with its loopback up, and IPv6 addresses usable at once.
    ///
    /// # Errors
    /// When it exists already, or `ip` fails.
    pub fn create(name: &str) -> Result<Self> {
        ip(&["netns", "add", name])?;
        let file = File::open(path(name)).with_context(|| format!("cannot open network namespace {name}"))?;
        let netns = Self {
            name: name.to_owned(),
            file,
        };
        netns.run(|| -> Result<()> {
            for (key, value) in [
                ("ipv4/ip_forward", "1"),
                ("ipv6/conf/all/forwarding", "1"),
                // Duplicate address detection would keep addresses unusable for a second.
                ("ipv6/conf/all/accept_dad", "0"),
                ("ipv6/conf/default/accept_dad", "0"),
            ] {
                let key = format!("/proc/sys/net/{key}");
                std::fs::write(&key, value).with_context(|| format!("cannot set {key}"))?;
            }
            Ok(())
        })??;
        netns.ip_batch(&["link set lo up".to_owned()])?;
        Ok(netns)
    }

    /// The name, for `ip netns exec`.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// For setns(2) in a child.
    pub(crate) fn file(&self) -> &File {
        &self.file
    }

    /// Runs `work` in a thread inside this namespace. Sockets that it opens stay in the namespace wherever they go.
    ///
    /// # Errors
    /// When the thread cannot enter the namespace, or `work` panics.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T> {
        std::thread::scope(|scope| {
            let thread = scope.spawn(|| {
                setns(&self.file, CloneFlags::CLONE_NEWNET)
                    .with_context(|| format!("cannot enter network namespace {}", self.name))?;
                Ok(work())
            });
            thread
                .join()
                .map_err(|_| anyhow!("a thread in network namespace {} panicked", self.name))?
        })
    }

    /// Runs `ip` commands inside the namespace, all or none reported: the first failure names its line.
    ///
    /// # Errors
    /// When `ip` cannot be started or refuses a line.
    pub fn ip_batch(&self, lines: &[String]) -> Result<()> {
        let mut child = Command::new("ip")
            .args(["-n", &self.name, "-batch", "-"])
            .stdin(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .context("cannot start ip")?;
        if let Some(mut stdin) = child.stdin.take() {
            // Should ip stop early, its own message is the one to show.
            let _ = stdin.write_all((lines.join("\n") + "\n").as_bytes());
        }
        let output = child.wait_with_output().context("cannot wait for ip")?;
        if !output.status.success() {
            let said = String::from_utf8_lossy(&output.stderr);
            bail!(
                "ip in network namespace {} failed: {}\n{}",
                self.name,
                said.trim(),
                lines.join("\n")
            );
        }
        Ok(())
    }
}

pub(crate) fn path(name: &str) -> PathBuf {
    PathBuf::from(DIR).join(name)
}

/// Removes the name; the namespace goes when the last process and socket in it is gone.
pub(crate) fn delete(name: &str) -> Result<()> {
    ip(&["netns", "delete", name])
}

fn ip(args: &[&str]) -> Result<()> {
    let output = Command::new("ip")
        .args(args)
        .output()
        .context("cannot start ip")?;
    if !output.status.success() {
        bail!(
            "ip {} failed: {}",
            args.join(" "),
            String::from_utf8_lossy(&output.stderr).trim()
        );
    }
    Ok(())
}
