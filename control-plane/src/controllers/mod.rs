//! Controllers: clients of the API like any other.

pub mod accounts;
pub mod endpoints;
pub mod endpointslice;
mod events;
pub mod gc;
mod labels;
pub mod leader;
pub mod nodes;
mod objects;
mod placement;
mod queue;
pub mod scheduler;
mod work;
pub mod workloads;
