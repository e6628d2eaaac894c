//! Controllers: clients of the API like any other.

pub mod accounts;
pub mod endpoints;
pub mod endpointslice;
mod events;
pub mod gc;
mod labels;
pub mod leader;
pub mod nodes;
pub(crate) mod objects;
mod placement;
mod queue;
pub mod scheduler;
pub(crate) mod work;
pub mod workloads;
