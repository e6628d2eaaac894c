//! End-to-end tests in network namespaces. One program, so that it is linked once; need root.

mod harness;
