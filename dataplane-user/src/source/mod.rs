//! Where objects come from.

pub mod dir;
pub mod kube;

use dataplane_model::{Event, Problem};
use tokio::sync::mpsc;

/// A kind of object that a source lists.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Kind {
    /// core/v1 Service.
    Service,
    /// discovery.k8s.io/v1 EndpointSlice.
    EndpointSlice,
    /// core/v1 Node; only this node's.
    Node,
    /// networking.k8s.io/v1 ServiceCIDR. Clusters before Kubernetes 1.33 have none.
    ServiceCidr,
}

impl Kind {
    /// As Kubernetes spells it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Service => "Service",
            Self::EndpointSlice => "EndpointSlice",
            Self::Node => "Node",
            Self::ServiceCidr => "ServiceCIDR",
        }
    }
}

/// What a source tells the agent.
#[derive(Debug)]
pub enum Update {
    /// Objects changed.
    Event(Event),
    /// A complete list of this kind has been sent.
    Listed(Kind),
    /// An object could not be read at all.
    Problem(Problem),
    /// The source of this kind fails (once per outage), or works again.
    State {
        /// Of what.
        kind: Kind,
        /// `None` when it works.
        error: Option<String>,
    },
}

/// Where sources send to. Bounded, so that a source does not read faster than the agent works.
pub type Sender = mpsc::Sender<Update>;
