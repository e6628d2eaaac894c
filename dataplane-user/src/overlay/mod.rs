//! The network between nodes, in flannel's shape: `vxlan` and `host-gw` as ordinary kernel state that `ip`, `bridge` and a
//! flannel node next door understand, and that carries traffic whether the agent runs or not.
//!
//! `nodes` watches Node objects, `etcd` flannel's leases in their place; `plan` says what the kernel should hold, `diff` what is to be done for that, `netlink` does
//! it; `engine` drives them whenever nodes or the kernel change.

mod bridge;
pub mod diff;
pub mod engine;
pub mod etcd;
pub mod flags;
pub mod flannel;
pub mod handover;
pub mod metrics;
pub mod netconf;
pub mod netlink;
pub mod nodes;
pub mod path;
pub mod plan;
pub mod run;
mod show;
pub mod snapshot;
pub(crate) mod sysctl;
pub mod uplink;
pub mod view;

pub use engine::{Engine, Settings, View};
pub use netconf::NetConf;
