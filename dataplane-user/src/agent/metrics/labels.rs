//! Labels of the metrics.

use dataplane_model::Family;
use prometheus_client::encoding::EncodeLabelSet;

/// Label of a map.
#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
pub(super) struct MapLabel {
    pub(super) map: &'static str,
}

/// Labels of flows that were removed.
#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
pub(super) struct RemovedLabel {
    pub(super) map: &'static str,
    pub(super) reason: &'static str,
}

/// Label of an event in the programs.
#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
pub(super) struct EventLabel {
    pub(super) event: &'static str,
}

/// Label of an address family, spelled as kube-proxy does.
#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
pub struct FamilyLabel {
    /// `IPv4` or `IPv6`.
    pub ip_family: &'static str,
}

impl FamilyLabel {
    /// The label of a family.
    #[must_use]
    pub const fn of(family: Family) -> Self {
        Self {
            ip_family: match family {
                Family::V4 => "IPv4",
                Family::V6 => "IPv6",
            },
        }
    }
}

/// Labels of the services that a `Local` policy leaves without endpoints.
#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
pub struct PolicyLabel {
    /// `internal` or `external`.
    pub traffic_policy: &'static str,
    /// `IPv4` or `IPv6`.
    pub ip_family: &'static str,
}

/// Label of a HTTP answer.
#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
pub struct CodeLabel {
    /// 200 or 503.
    pub code: u32,
}

/// Label of a kind of object.
#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
pub struct KindLabel {
    /// `Service`, `EndpointSlice` or `Node`.
    pub kind: &'static str,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
pub(super) struct VersionLabel {
    pub(super) version: &'static str,
}

/// Labels of `kubernetes_build_info`, as every Kubernetes component has them.
#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
pub(in crate::agent) struct BuildLabels {
    pub(in crate::agent) major: &'static str,
    pub(in crate::agent) minor: &'static str,
    pub(in crate::agent) git_version: &'static str,
    git_commit: &'static str,
    git_tree_state: &'static str,
    build_date: &'static str,
    go_version: &'static str,
    compiler: &'static str,
    platform: &'static str,
}

/// Label of a probe.
#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
pub(super) struct ProbeLabel {
    /// `answered`, `refused` or `silent`.
    pub(super) result: &'static str,
}

/// What this build says of itself to those who compare components' versions. A skew alert compares major and minor.
pub(in crate::agent) const BUILD: BuildLabels = BuildLabels {
    major: "1",
    minor: "36",
    git_version: concat!("v1.36.0+beeline-", env!("CARGO_PKG_VERSION")),
    git_commit: "",
    git_tree_state: "",
    build_date: "",
    go_version: "",
    compiler: "rustc",
    platform: if cfg!(target_arch = "aarch64") {
        "linux/arm64"
    } else {
        "linux/amd64"
    },
};
