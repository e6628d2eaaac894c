//! What makes a machine a node of a cluster: registers it, runs its pods, reports on both.
//!
//! Data flows one way: the API's pods -> `pods` (one worker for each pod) -> `runtime` -> status -> the API. Two rules keep it
//! simple: a worker looks at everything again whenever anything has changed, and what runs is asked of the runtime, never
//! remembered, so that the program can be killed and started at any time.

pub mod config;
mod node;
mod pods;
pub mod run;
mod runtime;
