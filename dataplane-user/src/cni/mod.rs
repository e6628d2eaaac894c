//! The agent's side of the CNI plugin: gives pods their device and addresses, and takes them away.
//!
//! Everything is known by container id: a DEL that comes late for an old sandbox of a pod finds nothing of the new one.
//! `server` speaks with the plugin, `service` decides, `device` works on the kernel, `serving` tells the
//! packet programs, `store` remembers.

pub mod device;
pub mod hostports;
pub mod install;
pub mod list;
pub(crate) mod netns;
pub mod server;
pub mod service;
pub mod serving;
pub mod store;

pub use server::Server;
pub use service::{Config, Service};
pub use serving::Serving;
pub use store::Attachment;
