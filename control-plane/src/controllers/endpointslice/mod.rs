//! Keeps the EndpointSlices of every Service that has a selector in step with Pods and Nodes.
//!
//! [`desired_slices`] decides, without I/O, what to change; [`run`] watches and writes. Slices that others made, that is
//! without this controller's `managed-by` label, are never touched. As there is no garbage collector, the slices of a
//! deleted Service are deleted here.

mod cache;
mod desired;
mod endpoints;
mod runner;
#[cfg(test)]
mod tests;

pub use desired::{SliceChange, desired_slices};
pub use runner::run;

/// Label of slices that says who keeps them.
pub const MANAGED_BY: &str = "endpointslice.kubernetes.io/managed-by";
/// Value of [`MANAGED_BY`] for this controller; the one of kube-controller-manager, which it stands in for.
pub const CONTROLLER: &str = "endpointslice-controller.k8s.io";
/// Label of slices that names their Service.
pub const SERVICE_NAME: &str = "kubernetes.io/service-name";
/// Label of slices of headless Services, which proxies need not watch.
pub const HEADLESS: &str = "service.kubernetes.io/headless";
/// Annotation of slices: when the change happened that led to this version of them.
pub const TRIGGER_TIME: &str = "endpoints.kubernetes.io/last-change-trigger-time";
