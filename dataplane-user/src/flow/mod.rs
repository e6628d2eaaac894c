//! Flows that the packet programs know.

pub mod gc;
