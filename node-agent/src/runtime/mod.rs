//! What runs pods. Modelled on the container runtime interface: a sandbox is a pod's place, containers run in it.

mod cri;
mod dirs;
mod hosts;
mod process;
mod session;

use std::io;
use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use futures::future::BoxFuture;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

pub(crate) use cri::CriRuntime;
pub(crate) use dirs::Dirs;
pub(crate) use process::{ProcessRuntime, Processes, Settings};
pub(crate) use session::{Input, Output, Session, Wish};

/// What runs pods. Uids of pods in which something has changed go into a queue that it is made with.
pub(crate) trait Runtime: Send + Sync {
    /// Its name and version, as nodes tell it.
    fn version(&self) -> String;

    /// Where what the node keeps of pods is.
    fn dirs(&self) -> &Dirs;

    /// Whether lines of logs have their time, stream and a flag in front, as the container runtime interface has it.
    fn has_times_in_logs(&self) -> bool;

    /// Whether pods can be attached; the text says why not.
    fn network_ready(&self) -> Result<(), String>;

    /// Removes what all pods share.
    fn close(&self) -> io::Result<()>;

    /// All pods of which anything is left.
    fn pods(&self) -> Vec<PodRef>;

    /// The containers of a pod, the last attempt of each.
    fn containers(&self, uid: &str) -> Vec<Container>;

    /// The pod's place, if it has one.
    fn sandbox(&self, uid: &str) -> Option<Sandbox>;

    /// Makes the pod's place unless it has one.
    fn ensure_sandbox(&self, spec: SandboxSpec) -> BoxFuture<'_, Result<Sandbox, Failure>>;

    /// Starts a container; the pod has a sandbox.
    fn start<'a>(&'a self, pod: &'a PodRef, spec: &'a ContainerSpec) -> BoxFuture<'a, Result<(), Failure>>;

    /// Ends a container: SIGTERM, and SIGKILL after the grace. Done when it has ended.
    fn stop<'a>(&'a self, uid: &'a str, name: &'a str, grace: Duration) -> BoxFuture<'a, ()>;

    /// Removes all that is left of a pod whose containers have ended; what still runs is killed. What fails is tried again.
    fn remove<'a>(&'a self, uid: &'a str) -> BoxFuture<'a, Result<(), Failure>>;

    /// Runs a command in a container that runs.
    fn exec<'a>(
        &'a self,
        uid: &'a str,
        name: &'a str,
        wish: &'a Wish,
    ) -> BoxFuture<'a, Result<Session, Failure>>;

    /// The same for one that must end in time: its exit code, and what it said.
    fn run<'a>(
        &'a self,
        uid: &'a str,
        name: &'a str,
        command: &'a [String],
        limit: Duration,
    ) -> BoxFuture<'a, Result<(i32, String), Failure>>;

    /// The streams of what a container runs; `None`: it has only its log.
    fn attach<'a>(
        &'a self,
        uid: &'a str,
        name: &'a str,
        wish: &'a Wish,
    ) -> BoxFuture<'a, Result<Option<Session>, Failure>>;
}

/// A pod as the runtime knows it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct PodRef {
    pub(crate) namespace: String,
    pub(crate) name: String,
    pub(crate) uid: String,
}

/// What a pod's sandbox is to be like.
#[derive(Clone, Debug, Default)]
pub(crate) struct SandboxSpec {
    pub(crate) pod: PodRef,
    /// In the node's own network namespace.
    pub(crate) host_network: bool,
    /// In that of its processes and of what they share.
    pub(crate) host_pid: bool,
    pub(crate) host_ipc: bool,
    /// A container of it may do anything.
    pub(crate) privileged: bool,
    pub(crate) hostname: String,
    pub(crate) port_mappings: Vec<beeline_cni::protocol::PortMapping>,
    /// Text of the pod's `/etc/resolv.conf`; `None`: the node's.
    pub(crate) resolv_conf: Option<String>,
    /// Lines of the pod's `/etc/hosts` beside its own.
    pub(crate) host_aliases: Vec<(IpAddr, Vec<String>)>,
}

/// A pod's place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Sandbox {
    /// Empty: those of the node.
    pub(crate) ips: Vec<IpAddr>,
}

/// A container to start.
#[derive(Clone, Debug, Default)]
pub(crate) struct ContainerSpec {
    pub(crate) name: String,
    /// How often it was started before.
    pub(crate) attempt: u32,
    pub(crate) image: String,
    pub(crate) command: Vec<String>,
    pub(crate) args: Vec<String>,
    pub(crate) env: Vec<(String, String)>,
    pub(crate) working_dir: Option<PathBuf>,
    /// User and group id.
    pub(crate) user: Option<(u32, u32)>,
    pub(crate) memory_limit: Option<u64>,
    /// Thousandths of a CPU.
    pub(crate) cpu_limit: Option<u64>,
    /// Thousandths of a CPU that it has when others want them, too.
    pub(crate) cpu_request: Option<u64>,
    pub(crate) mounts: Vec<Mount>,
    pub(crate) pull: Pull,
    /// Its standard input stays open.
    pub(crate) stdin: bool,
    pub(crate) tty: bool,
    pub(crate) security: Security,
}

/// Whether an image is fetched.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Pull {
    Always,
    #[default]
    IfMissing,
    Never,
}

/// What a container may beside what others may, for runtimes that isolate containers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Security {
    pub(crate) privileged: bool,
    pub(crate) read_only_root: bool,
    pub(crate) no_new_privileges: bool,
    /// Capabilities, without `CAP_`.
    pub(crate) add: Vec<String>,
    pub(crate) drop: Vec<String>,
}

/// Something of the node that a container sees.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Mount {
    pub(crate) source: PathBuf,
    pub(crate) target: PathBuf,
    pub(crate) read_only: bool,
}

/// What a container does.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum State {
    Running {
        started: Timestamp,
    },
    Exited {
        started: Timestamp,
        finished: Timestamp,
        /// As a shell has it: 128 and the signal's number for one that was killed.
        code: i32,
        reason: String,
        message: String,
    },
}

/// A container that was started.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Container {
    /// With the runtime's name in front, as the API has it.
    pub(crate) id: String,
    pub(crate) name: String,
    pub(crate) attempt: u32,
    pub(crate) image: String,
    pub(crate) state: State,
}

/// Why something could not be done, in the words of the API: a short reason and a text.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{reason}: {message}")]
pub(crate) struct Failure {
    pub(crate) reason: &'static str,
    pub(crate) message: String,
}

impl Failure {
    pub(crate) fn new(reason: &'static str, message: impl Into<String>) -> Self {
        Self {
            reason,
            message: message.into(),
        }
    }

    pub(crate) fn because(reason: &'static str, what: &str, cause: impl std::fmt::Display) -> Self {
        Self::new(reason, format!("{what}: {cause}"))
    }
}

/// Grace that a container has at least: a signal that is never looked at costs nothing.
pub(crate) const MIN_GRACE: Duration = Duration::from_millis(100);
