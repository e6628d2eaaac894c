//! What `beeline node list` shows: JSON with stable field names.

use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::sync::watch;

use super::View;
use super::path::Paths;

/// One family of a node.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct NodeView {
    /// Its name.
    pub name: String,
    /// Its podCIDR.
    pub pod_cidr: String,
    /// Where its packets are sent to.
    pub address: String,
    /// `this node`, the device of a tunnel, or `direct`; empty if it is left out.
    pub via: String,
    /// `ok`, `failed`, `unknown`; empty of this node and those that are left out.
    pub path: String,
    /// Round trip time, in microseconds.
    pub rtt_us: Option<u64>,
    /// Why packets do not get there, for programs.
    pub cause: Option<String>,
    /// What is wrong, for people.
    pub problem: Option<String>,
}

/// Body of `/nodes`.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Nodes {
    /// This node first, then the others by name.
    pub nodes: Vec<NodeView>,
    /// Why the network of this node does not work, if so.
    pub failure: Option<String>,
}

/// Where it is read.
#[derive(Clone, Debug)]
pub struct Reader {
    /// This node.
    pub node_name: String,
    /// How things are.
    pub view: watch::Receiver<View>,
    /// The ways to the others.
    pub paths: Arc<Paths>,
}

impl Reader {
    /// How things are now.
    #[must_use]
    pub fn read(&self) -> Nodes {
        let view = self.view.borrow();
        let mut nodes: Vec<NodeView> = Vec::new();
        for subnet in &view.subnets {
            let announcement = view.announcement.as_ref();
            let address = announcement.and_then(|all| match subnet {
                ipnet::IpNet::V4(_) => all.v4.map(|(ip, _)| ip.to_string()),
                ipnet::IpNet::V6(_) => all.v6.map(|(ip, _)| ip.to_string()),
            });
            nodes.push(NodeView {
                name: self.node_name.clone(),
                pod_cidr: subnet.to_string(),
                address: address.unwrap_or_default(),
                via: "this node".into(),
                ..NodeView::default()
            });
        }
        let mut others: Vec<NodeView> = Vec::new();
        for path in self.paths.all() {
            let way = &path.way;
            let micros = |rtt: Duration| u64::try_from(rtt.as_micros()).unwrap_or(u64::MAX);
            others.push(NodeView {
                name: way.node.clone(),
                pod_cidr: way.subnet.to_string(),
                address: way.public.to_string(),
                via: if way.tunnel.is_some() {
                    way.device.clone()
                } else {
                    "direct".into()
                },
                path: match path.state {
                    None => "unknown",
                    Some(Ok(_)) => "ok",
                    Some(Err(_)) => "failed",
                }
                .into(),
                rtt_us: path.state.and_then(Result::ok).map(micros),
                cause: path.state.and_then(Result::err).map(|cause| cause.name().into()),
                problem: path.problem(),
            });
        }
        for (node, problem) in &view.problems {
            others.push(NodeView {
                name: node.clone(),
                problem: Some(format!("left out: {problem}")),
                ..NodeView::default()
            });
        }
        others.sort_by(|a, b| a.name.cmp(&b.name));
        nodes.extend(others);
        Nodes {
            nodes,
            failure: view.failure.clone(),
        }
    }
}
