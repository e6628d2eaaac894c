//! Harness for Beeline's end-to-end tests, demo and benches: a cluster on one machine.
//!
//! A [`Cluster`] is a switch (a network namespace that routes between nodes, and holds the control plane) and nodes.
//! A [`Node`] is a network namespace, a cgroup v2 subtree, a bpffs directory and a state directory: all that an agent
//! needs to believe that it has a machine to itself. A [`Pod`] is a network namespace joined to its node by a veth,
//! and a cgroup below its node's. Everything needs root.
//!
//! Whatever is made on the system carries the name `bl<pid>-<n>`, so that it can be found and removed by name: by
//! `Drop`, by the handler of Ctrl-C, or by `cargo xtask sweep` after a SIGKILL. See [`residue`].

pub mod agent;
pub mod cgroup;
pub mod client;
pub mod cluster;
pub mod control_plane;
pub mod http;
pub mod netns;
pub mod objects;
pub mod pod_network;
pub mod process;
pub mod residue;
pub mod signals;

pub use agent::{Agent, AgentOptions, Source};
pub use client::{Load, LoadReport};
pub use cluster::{Cluster, Node, OutsideHost, Pod};
pub use control_plane::ControlPlane;
pub use objects::ObjectDir;
pub use process::{Place, Process};

use std::path::PathBuf;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

/// How many times slower than usual this machine is: `BEELINE_SLOW`, set where the processor is emulated.
#[must_use]
pub fn slowness() -> u32 {
    static SLOWNESS: OnceLock<u32> = OnceLock::new();
    *SLOWNESS.get_or_init(|| {
        let value = std::env::var("BEELINE_SLOW").ok();
        value.and_then(|value| value.parse().ok()).unwrap_or(1)
    })
}

/// Looks at `probe` every few milliseconds until it answers, or fails naming `what` after `limit`, which is longer on a
/// slow machine.
///
/// # Errors
/// When the limit passes, with the last error of `probe` if there was one.
pub fn wait_for<T>(what: &str, limit: Duration, mut probe: impl FnMut() -> Result<Option<T>>) -> Result<T> {
    let start = Instant::now();
    let limit = limit * slowness();
    loop {
        let answer = probe();
        if let Ok(Some(value)) = answer {
            return Ok(value);
        }
        if start.elapsed() > limit {
            let why = answer
                .err()
                .map(|error| format!(": {error:#}"))
                .unwrap_or_default();
            bail!(
                "gave up waiting for {what} after {:.1} s{why}",
                limit.as_secs_f64()
            );
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// A program of this workspace, built beside the running one: `BEELINE_BIN_DIR`, or the directory of the running
/// program, or the one above it (test programs are in `deps`).
///
/// # Errors
/// When it is not there, with the command that builds it.
pub fn program(name: &str) -> Result<PathBuf> {
    let exe = std::env::current_exe().context("cannot find the running program's path")?;
    let dirs = [
        std::env::var_os("BEELINE_BIN_DIR").map(PathBuf::from),
        exe.parent().map(PathBuf::from),
        exe.parent().and_then(|dir| dir.parent()).map(PathBuf::from),
    ];
    dirs.into_iter()
        .flatten()
        .map(|dir| dir.join(name))
        .find(|file| file.is_file())
        .with_context(|| {
            format!(
                "no program `{name}` beside {}: run `cargo xtask build --debug` first",
                exe.display()
            )
        })
}
