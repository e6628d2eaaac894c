//! Columns of each kind. Most descriptions are those of the field that a column shows.

use serde_json::{Value, json};

use crate::resource::{ResourceInfo, schema};

/// One column: its name, whether only `-o wide` shows it, and where its description comes from.
struct Column(&'static str, Width, Text);

#[derive(Clone, Copy, PartialEq, Eq)]
enum Width {
    Always,
    Wide,
}

enum Text {
    /// Description of a field of a schema.
    Field(&'static str, &'static str),
    Literal(&'static str),
}

use Text::{Field, Literal};
use Width::{Always, Wide};

const META: &str = "io.k8s.apimachinery.pkg.apis.meta.v1.ObjectMeta";
const NODE_STATUS: &str = "io.k8s.api.core.v1.NodeStatus";
const POD_SPEC: &str = "io.k8s.api.core.v1.PodSpec";
const POD_STATUS: &str = "io.k8s.api.core.v1.PodStatus";
const SERVICE_SPEC: &str = "io.k8s.api.core.v1.ServiceSpec";
const SLICE: &str = "io.k8s.api.discovery.v1.EndpointSlice";
const EVENT: &str = "io.k8s.api.core.v1.Event";
const RC_SPEC: &str = "io.k8s.api.core.v1.ReplicationControllerSpec";
const RC_STATUS: &str = "io.k8s.api.core.v1.ReplicationControllerStatus";

const NAME: Column = Column("Name", Always, Field(META, "name"));
const AGE: Column = Column("Age", Always, Field(META, "creationTimestamp"));

static SERVICE: &[Column] = &[
    NAME,
    Column("Type", Always, Field(SERVICE_SPEC, "type")),
    Column("Cluster-IP", Always, Field(SERVICE_SPEC, "clusterIP")),
    Column("External-IP", Always, Field(SERVICE_SPEC, "externalIPs")),
    Column("Port(s)", Always, Field(SERVICE_SPEC, "ports")),
    AGE,
    Column("Selector", Wide, Field(SERVICE_SPEC, "selector")),
];

static NODE: &[Column] = &[
    NAME,
    Column("Status", Always, Literal("The status of the node")),
    Column("Roles", Always, Literal("The roles of the node")),
    AGE,
    Column(
        "Version",
        Always,
        Field("io.k8s.api.core.v1.NodeSystemInfo", "kubeletVersion"),
    ),
    Column("Internal-IP", Wide, Field(NODE_STATUS, "addresses")),
    Column("External-IP", Wide, Field(NODE_STATUS, "addresses")),
    Column(
        "OS-Image",
        Wide,
        Field("io.k8s.api.core.v1.NodeSystemInfo", "osImage"),
    ),
    Column(
        "Kernel-Version",
        Wide,
        Field("io.k8s.api.core.v1.NodeSystemInfo", "kernelVersion"),
    ),
    Column(
        "Container-Runtime",
        Wide,
        Field("io.k8s.api.core.v1.NodeSystemInfo", "containerRuntimeVersion"),
    ),
];

static POD: &[Column] = &[
    NAME,
    Column(
        "Ready",
        Always,
        Literal("The aggregate readiness state of this pod for accepting traffic."),
    ),
    Column(
        "Status",
        Always,
        Literal("The aggregate status of the containers in this pod."),
    ),
    Column(
        "Restarts",
        Always,
        Literal(
            "The number of times the containers in this pod have been restarted and when the last container in this pod \
             has restarted.",
        ),
    ),
    AGE,
    Column("IP", Wide, Field(POD_STATUS, "podIP")),
    Column("Node", Wide, Field(POD_SPEC, "nodeName")),
    Column("Nominated Node", Wide, Field(POD_STATUS, "nominatedNodeName")),
    Column("Readiness Gates", Wide, Field(POD_SPEC, "readinessGates")),
];

static ENDPOINT_SLICE: &[Column] = &[
    NAME,
    Column("AddressType", Always, Field(SLICE, "addressType")),
    Column("Ports", Always, Field(SLICE, "ports")),
    Column("Endpoints", Always, Field(SLICE, "endpoints")),
    AGE,
];

static NAMESPACE: &[Column] = &[
    NAME,
    Column("Status", Always, Literal("The status of the namespace")),
    AGE,
];

static EVENTS: &[Column] = &[
    Column("Last Seen", Always, Field(EVENT, "lastTimestamp")),
    Column("Type", Always, Field(EVENT, "type")),
    Column("Reason", Always, Field(EVENT, "reason")),
    Column("Object", Always, Field(EVENT, "involvedObject")),
    Column(
        "Subobject",
        Wide,
        Field("io.k8s.api.core.v1.ObjectReference", "fieldPath"),
    ),
    Column("Source", Wide, Field(EVENT, "source")),
    Column("Message", Always, Field(EVENT, "message")),
    Column("First Seen", Wide, Field(EVENT, "firstTimestamp")),
    Column("Count", Wide, Field(EVENT, "count")),
    Column("Name", Wide, Field(META, "name")),
];

static REPLICATION_CONTROLLER: &[Column] = &[
    NAME,
    Column("Desired", Always, Field(RC_SPEC, "replicas")),
    Column("Current", Always, Field(RC_STATUS, "replicas")),
    Column("Ready", Always, Field(RC_STATUS, "readyReplicas")),
    AGE,
    CONTAINERS,
    IMAGES,
    Column("Selector", Wide, Field(RC_SPEC, "selector")),
];

static ENDPOINTS: &[Column] = &[
    NAME,
    Column(
        "Endpoints",
        Always,
        Field("io.k8s.api.core.v1.Endpoints", "subsets"),
    ),
    AGE,
];

static CONFIG_MAP: &[Column] = &[
    NAME,
    Column("Data", Always, Field("io.k8s.api.core.v1.ConfigMap", "data")),
    AGE,
];

static SECRET: &[Column] = &[
    NAME,
    Column("Type", Always, Field("io.k8s.api.core.v1.Secret", "type")),
    Column("Data", Always, Field("io.k8s.api.core.v1.Secret", "data")),
    AGE,
];

static SERVICE_ACCOUNT: &[Column] = &[
    NAME,
    Column(
        "Secrets",
        Always,
        Field("io.k8s.api.core.v1.ServiceAccount", "secrets"),
    ),
    AGE,
];

static LEASE: &[Column] = &[
    NAME,
    Column(
        "Holder",
        Always,
        Field("io.k8s.api.coordination.v1.LeaseSpec", "holderIdentity"),
    ),
    AGE,
];

static SERVICE_CIDR: &[Column] = &[
    NAME,
    Column(
        "CIDRs",
        Always,
        Field("io.k8s.api.networking.v1.ServiceCIDRSpec", "cidrs"),
    ),
    AGE,
];

const RS_SPEC: &str = "io.k8s.api.apps.v1.ReplicaSetSpec";
const RS_STATUS: &str = "io.k8s.api.apps.v1.ReplicaSetStatus";
const DEPLOYMENT_STATUS: &str = "io.k8s.api.apps.v1.DeploymentStatus";
const DAEMON_STATUS: &str = "io.k8s.api.apps.v1.DaemonSetStatus";
const POLICY_SPEC: &str = "io.k8s.api.networking.v1.NetworkPolicySpec";

const CONTAINERS: Column = Column(
    "Containers",
    Wide,
    Literal("Names of each container in the template."),
);
const IMAGES: Column = Column(
    "Images",
    Wide,
    Literal("Images referenced by each container in the template."),
);

static REPLICA_SET: &[Column] = &[
    NAME,
    Column("Desired", Always, Field(RS_SPEC, "replicas")),
    Column("Current", Always, Field(RS_STATUS, "replicas")),
    Column("Ready", Always, Field(RS_STATUS, "readyReplicas")),
    AGE,
    CONTAINERS,
    IMAGES,
    Column("Selector", Wide, Field(RS_SPEC, "selector")),
];

static DEPLOYMENT: &[Column] = &[
    NAME,
    Column("Ready", Always, Literal("Number of the pod with ready state")),
    Column("Up-to-date", Always, Field(DEPLOYMENT_STATUS, "updatedReplicas")),
    Column("Available", Always, Field(DEPLOYMENT_STATUS, "availableReplicas")),
    AGE,
    CONTAINERS,
    IMAGES,
    Column(
        "Selector",
        Wide,
        Field("io.k8s.api.apps.v1.DeploymentSpec", "selector"),
    ),
];

static DAEMON_SET: &[Column] = &[
    NAME,
    Column("Desired", Always, Field(DAEMON_STATUS, "desiredNumberScheduled")),
    Column("Current", Always, Field(DAEMON_STATUS, "currentNumberScheduled")),
    Column("Ready", Always, Field(DAEMON_STATUS, "numberReady")),
    Column(
        "Up-to-date",
        Always,
        Field(DAEMON_STATUS, "updatedNumberScheduled"),
    ),
    Column("Available", Always, Field(DAEMON_STATUS, "numberAvailable")),
    Column("Node Selector", Always, Field(POD_SPEC, "nodeSelector")),
    AGE,
    CONTAINERS,
    IMAGES,
    Column(
        "Selector",
        Wide,
        Field("io.k8s.api.apps.v1.DaemonSetSpec", "selector"),
    ),
];

static NETWORK_POLICY: &[Column] = &[
    NAME,
    Column("Pod-Selector", Always, Field(POLICY_SPEC, "podSelector")),
    AGE,
];

static IP_ADDRESS: &[Column] = &[
    NAME,
    Column(
        "ParentRef",
        Always,
        Field("io.k8s.api.networking.v1.IPAddressSpec", "parentRef"),
    ),
    AGE,
];

static ROLE: &[Column] = &[
    NAME,
    Column("Created At", Always, Field(META, "creationTimestamp")),
];

static ROLE_BINDING: &[Column] = &[
    NAME,
    Column("Role", Always, Field("io.k8s.api.rbac.v1.RoleBinding", "roleRef")),
    AGE,
    Column("Users", Wide, Literal("Users in the roleBinding")),
    Column("Groups", Wide, Literal("Groups in the roleBinding")),
    Column(
        "ServiceAccounts",
        Wide,
        Literal("ServiceAccounts in the roleBinding"),
    ),
];

static CLUSTER_ROLE_BINDING: &[Column] = &[
    NAME,
    Column(
        "Role",
        Always,
        Field("io.k8s.api.rbac.v1.ClusterRoleBinding", "roleRef"),
    ),
    AGE,
    Column("Users", Wide, Literal("Users in the clusterRoleBinding")),
    Column("Groups", Wide, Literal("Groups in the clusterRoleBinding")),
    Column(
        "ServiceAccounts",
        Wide,
        Literal("ServiceAccounts in the clusterRoleBinding"),
    ),
];

static PLAIN: &[Column] = &[NAME, AGE];

fn of(r: &ResourceInfo) -> &'static [Column] {
    match r.kind {
        "ClusterRole" | "Role" => ROLE,
        "ClusterRoleBinding" => CLUSTER_ROLE_BINDING,
        "ConfigMap" => CONFIG_MAP,
        "DaemonSet" => DAEMON_SET,
        "Deployment" => DEPLOYMENT,
        "EndpointSlice" => ENDPOINT_SLICE,
        "Endpoints" => ENDPOINTS,
        "Event" => EVENTS,
        "IPAddress" => IP_ADDRESS,
        "Lease" => LEASE,
        "Namespace" => NAMESPACE,
        "NetworkPolicy" => NETWORK_POLICY,
        "Node" => NODE,
        "Pod" => POD,
        "ReplicaSet" => REPLICA_SET,
        "ReplicationController" => REPLICATION_CONTROLLER,
        "RoleBinding" => ROLE_BINDING,
        "Secret" => SECRET,
        "Service" => SERVICE,
        "ServiceAccount" => SERVICE_ACCOUNT,
        "ServiceCIDR" => SERVICE_CIDR,
        _ => PLAIN,
    }
}

/// Columns that hold numbers.
fn type_of(r: &ResourceInfo, name: &str) -> &'static str {
    match (r.kind, name) {
        ("ReplicationController" | "ReplicaSet", "Desired" | "Current" | "Ready") => "integer",
        ("Event", "Count") => "integer",
        ("DaemonSet", "Desired" | "Current" | "Ready" | "Up-to-date" | "Available") => "integer",
        (_, "Data") => "integer",
        ("ServiceAccount", "Secrets") => "integer",
        _ => "string",
    }
}

/// `columnDefinitions` of the kind's table.
pub(super) fn definitions(r: &ResourceInfo) -> Value {
    of(r)
        .iter()
        .map(|Column(name, width, text)| {
            let description = match text {
                Literal(text) => text,
                Field(schema, field) => describe(schema, field),
            };
            json!({
                "name": name,
                "type": type_of(r, name),
                "format": if *name == "Name" { "name" } else { "" },
                "description": description,
                "priority": i32::from(*width == Wide),
            })
        })
        .collect()
}

fn describe(name: &str, field: &str) -> &'static str {
    schema::named(name)
        .and_then(|s| s.get("properties")?.get(field)?.get("description")?.as_str())
        .unwrap_or_default()
}
