//! What runs pods. Modelled on the container runtime interface: a sandbox is a pod's place, containers run in it.

mod process;
mod session;

use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

pub(crate) use process::{ProcessRuntime, Settings};
pub(crate) use session::{Input, Output, Session, Wish};

/// A pod as the runtime knows it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct PodRef {
    pub(crate) namespace: String,
    pub(crate) name: String,
    pub(crate) uid: String,
}

/// What a pod's sandbox is to be like.
#[derive(Clone, Debug)]
pub(crate) struct SandboxSpec {
    pub(crate) pod: PodRef,
    /// In the node's own network namespace.
    pub(crate) host_network: bool,
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
    pub(crate) mounts: Vec<Mount>,
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
