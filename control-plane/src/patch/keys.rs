//! How lists are merged: the `patchMergeKey` and `patchStrategy` tags of the Kubernetes Go types, for the kinds served.
//! The same table goes into the OpenAPI documents, where kubectl looks it up.

/// How a list field is merged; a field without a strategy is replaced.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Strategy {
    /// Elements are objects, told apart by this field.
    ByKey(&'static str),
    /// Elements are plain values; the result is their union.
    Union,
}

use Strategy::{ByKey, Union};

/// The strategy of a list field of a schema such as `io.k8s.api.core.v1.PodSpec`.
pub(crate) fn strategy(schema: &str, field: &str) -> Option<Strategy> {
    let kind = schema
        .strip_prefix("io.k8s.api.")
        .or_else(|| schema.strip_prefix("io.k8s.apimachinery.pkg.apis."))?;
    let found = match (kind, field) {
        ("meta.v1.ObjectMeta", "ownerReferences") => ByKey("uid"),
        ("meta.v1.ObjectMeta", "finalizers") => Union,
        ("core.v1.ServiceSpec", "ports") => ByKey("port"),
        ("core.v1.ServiceStatus", "conditions") => ByKey("type"),
        ("core.v1.PodSpec", "containers" | "initContainers" | "ephemeralContainers" | "volumes") => {
            ByKey("name")
        }
        ("core.v1.PodSpec", "imagePullSecrets" | "resourceClaims" | "schedulingGates") => ByKey("name"),
        ("core.v1.PodSpec", "hostAliases") => ByKey("ip"),
        ("core.v1.PodSpec", "topologySpreadConstraints") => ByKey("topologyKey"),
        ("core.v1.Container" | "core.v1.EphemeralContainer", "ports") => ByKey("containerPort"),
        ("core.v1.Container" | "core.v1.EphemeralContainer", "env") => ByKey("name"),
        ("core.v1.Container" | "core.v1.EphemeralContainer", "volumeMounts") => ByKey("mountPath"),
        ("core.v1.Container" | "core.v1.EphemeralContainer", "volumeDevices") => ByKey("devicePath"),
        ("core.v1.PodStatus", "conditions") => ByKey("type"),
        ("core.v1.PodStatus", "podIPs" | "hostIPs") => ByKey("ip"),
        ("core.v1.PodStatus", "resourceClaimStatuses") => ByKey("name"),
        ("core.v1.NodeSpec", "podCIDRs") => Union,
        ("core.v1.NodeStatus", "conditions" | "addresses") => ByKey("type"),
        ("core.v1.NamespaceStatus", "conditions") => ByKey("type"),
        ("core.v1.ReplicationControllerStatus", "conditions") => ByKey("type"),
        ("core.v1.ServiceAccount", "secrets") => ByKey("name"),
        ("networking.v1.ServiceCIDRStatus", "conditions") => ByKey("type"),
        ("apps.v1.DeploymentStatus" | "apps.v1.ReplicaSetStatus", "conditions") => ByKey("type"),
        ("apps.v1.DaemonSetStatus", "conditions") => ByKey("type"),
        _ => return None,
    };
    Some(found)
}
