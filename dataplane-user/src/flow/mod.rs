//! Flows that the packet programs know, and flows and sockets that outlive what they were made for.

pub mod destroy;
mod diag;
pub mod gc;
pub mod namespaces;
pub mod sources;
pub mod stale;
pub mod sweep;
