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
pub mod object;
pub mod program;
pub mod select;
pub mod sloppy;

pub use desired::{BackendState, Desired, DesiredService, ServiceConfig, SetBackend};
pub use diff::{Op, diff};
pub use event::Event;
pub use key::{BackendKey, Family, ObjectName, Protocol, ServiceKey};
pub use model::Model;
pub use object::Problem;
