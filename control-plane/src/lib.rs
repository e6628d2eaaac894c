//! A small Kubernetes API server for machines that have none.
//!
//! Data flows one way: `server` decodes a request, `resource` defaults and validates the object, `store` makes it durable
//! and tells every watcher. Controllers are clients of the API like any other, so that a real kube-apiserver can take this
//! crate's place at any time.

pub mod backup;
mod bootstrap_token;
pub mod config;
pub mod controllers;
pub mod discovery;
pub mod dns;
pub mod error;
pub mod fields;
pub mod openapi;
pub mod patch;
pub mod pki;
pub mod quantity;
pub mod resource;
pub mod run;
pub mod selector;
pub mod server;
pub mod store;
pub mod table;
