//! From Kubernetes objects to ordered operations on the kernel's maps, without any I/O.
//!
//! `Event -> Model -> Desired -> diff -> Op -> Programmer -> Maps`: each arrow is one function with its own tests. The
//! [`program::Maps`] behind it are the kernel's, or a fake in memory, or one that fails.
#![forbid(unsafe_code)]

pub mod desired;
pub mod diff;
pub mod event;
pub mod key;
pub mod model;
mod names;
pub mod object;
pub mod program;
pub mod select;
pub mod settings;
pub mod sloppy;

pub use desired::{
    BackendState, Desired, DesiredService, Frontends, Offer, ServiceConfig, SetBackend, table,
};
pub use diff::{Keeps, Op, diff};
pub use event::{Event, HostPort};
pub use key::{BackendKey, Family, ObjectName, Protocol, ServiceKey};
pub use model::{HealthCheckNodePort, Model, Serving, Stale};
pub use object::Problem;
pub use settings::Settings;
