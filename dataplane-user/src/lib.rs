//! The node agent and the command line.
//!
//! `source` reads objects, `agent` drives them through the model, `kernel` holds programs and maps, `cli` is what an
//! operator types.

pub mod agent;
pub mod cli;
pub mod config;
pub mod kernel;
pub mod nodeaddr;
pub mod source;
