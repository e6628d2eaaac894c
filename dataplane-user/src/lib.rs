//! The node agent and the command line.

pub mod kernel;
