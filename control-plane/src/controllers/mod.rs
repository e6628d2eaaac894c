//! Controllers: clients of the API like any other.

pub mod endpointslice;
pub mod gc;
mod queue;
