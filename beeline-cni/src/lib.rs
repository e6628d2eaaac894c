//! The CNI plugin, and what it shares with the agent.
//!
//! The plugin does nothing itself: it checks what the runtime says, asks the agent over a unix socket and writes the answer
//! in the format of the version that the network configuration names.

pub mod client;
pub mod config;
pub mod mac;
pub mod plugin;
pub mod protocol;
pub mod result;
pub mod version;
