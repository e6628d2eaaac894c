//! The node agent and the command line.
//!
//! `source` reads objects, `agent` drives them through the model, `kernel` holds programs and maps, `devices` says where
//! the packet programs go, `cni` gives pods their device and `ipam` their addresses, `overlay` connects the nodes' pods, `healthcheck` answers load
//! balancers, `takeover` takes over from kube-proxy and hands back to it, `cli` is what an operator types.

pub mod agent;
pub mod cli;
pub mod cluster;
pub mod cni;
pub mod config;
pub mod devices;
pub mod failure;
pub mod flow;
pub mod healthcheck;
pub mod ipam;
pub mod kernel;
pub mod memory;
pub mod nodeaddr;
pub mod overlay;
pub mod persist;
pub mod proxyconfig;
mod rtnl;
mod serve;
pub mod source;
pub mod takeover;
