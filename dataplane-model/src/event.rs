//! What a source reports.

use std::collections::HashSet;
use std::net::{IpAddr, SocketAddr};

use k8s_openapi::api::core::v1::{Node, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use k8s_openapi::api::networking::v1::ServiceCIDR;

use crate::key::{ObjectName, Protocol};

/// A port of the node that leads to a pod on it (`hostPort`).
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct HostPort {
    /// Namespace of the pod.
    pub namespace: String,
    /// Name of the pod.
    pub pod: String,
    /// `hostIP`; absent or unspecified means all addresses of the node of the backend's family.
    pub host_ip: Option<IpAddr>,
    /// `hostPort`, 1 to 65535.
    pub port: u16,
    /// Transport protocol.
    pub protocol: Protocol,
    /// The pod's address and `containerPort`. A pod of two families has an entry for each.
    pub backend: SocketAddr,
}

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
    /// The Services of a complete list have all been applied, one by one; what is not named here is gone. For sources that
    /// need not hold a whole list in memory.
    ServicesListed(HashSet<ObjectName>),
    /// The same for endpoint slices.
    SlicesListed(HashSet<ObjectName>),
    /// A range of service addresses was added or changed.
    ServiceCidrApplied(Box<ServiceCIDR>),
    /// A range of service addresses is gone.
    ServiceCidrDeleted {
        /// `metadata.name`.
        name: String,
    },
    /// A complete list of ranges of service addresses: what is not in it is gone.
    ServiceCidrsReplaced(Vec<ServiceCIDR>),
    /// The ranges of a complete list have all been applied, one by one; what is not named here is gone.
    ServiceCidrsListed(HashSet<String>),
    /// All host ports of this node's pods: what is not in it is gone.
    HostPorts(Vec<HostPort>),
}
