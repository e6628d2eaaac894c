//! What a source reports.

use k8s_openapi::api::core::v1::{Node, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;

/// A change of the cluster's objects. Order between kinds does not matter.
#[derive(Clone, Debug)]
pub enum Event {
    /// A Service was added or changed.
    ServiceApplied(Box<Service>),
    /// A Service is gone (or no longer selected).
    ServiceDeleted {
        /// `metadata.namespace`.
        namespace: String,
        /// `metadata.name`.
        name: String,
    },
    /// An endpoint slice was added or changed.
    SliceApplied(Box<EndpointSlice>),
    /// An endpoint slice is gone (or no longer selected).
    SliceDeleted {
        /// `metadata.namespace`.
        namespace: String,
        /// `metadata.name`.
        name: String,
    },
    /// A Node was added or changed; only this node's matters.
    NodeApplied(Box<Node>),
    /// A Node is gone.
    NodeDeleted {
        /// `metadata.name`.
        name: String,
    },
    /// A complete list of Services: what is not in it is gone.
    ServicesReplaced(Vec<Service>),
    /// A complete list of endpoint slices: what is not in it is gone.
    SlicesReplaced(Vec<EndpointSlice>),
    /// A complete list of Nodes: what is not in it is gone.
    NodesReplaced(Vec<Node>),
}
