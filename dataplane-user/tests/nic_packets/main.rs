//! Packets run through the programs one by one: packet and maps in; verdict, packet, mark and counters out.
#![allow(clippy::unwrap_used, reason = "a test that cannot be set up fails")]
#![allow(clippy::panic, reason = "a test that fails says so")]
#![allow(clippy::cast_possible_truncation, reason = "packets are short")]

mod bench;
#[path = "../../../dataplane-common/tests/build/mod.rs"]
mod build;
mod collect;
#[path = "../common/mod.rs"]
mod common;
mod errors;
mod flows;
mod forgotten;
mod from_pods;
mod pods;
mod random;
mod rules;
mod scene;
