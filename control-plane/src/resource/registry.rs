//! The kinds that are served: names, scope and verbs, as the discovery documents show them, and their rules.

use super::rules::Rules;
use super::{config, kinds, names, network, pod, rbac, workloads};

/// One subresource, such as `services/status`.
#[derive(Debug, Clone, Copy)]
pub struct SubresourceInfo {
    /// Last path segment.
    pub name: &'static str,
    /// Group and version of the body, empty when they are those of the resource.
    pub group: &'static str,
    /// See [`SubresourceInfo::group`].
    pub version: &'static str,
    /// Kind of the body.
    pub kind: &'static str,
    /// What may be done, sorted.
    pub verbs: &'static [&'static str],
}

/// One kind of object and how it is reached.
#[derive(Debug)]
pub struct ResourceInfo {
    /// API group, empty for the core group.
    pub group: &'static str,
    /// API version.
    pub version: &'static str,
    /// Kind of one object.
    pub kind: &'static str,
    /// Kind of a list.
    pub list_kind: &'static str,
    /// Name in paths.
    pub plural: &'static str,
    /// What kubectl accepts for one object.
    pub singular: &'static str,
    /// What kubectl accepts instead.
    pub short_names: &'static [&'static str],
    /// `all` makes `kubectl get all` include it.
    pub categories: &'static [&'static str],
    /// Whether objects live in a namespace.
    pub namespaced: bool,
    /// Whether `/status` is a subresource of its own.
    pub has_status: bool,
    /// Whether `metadata.generation` counts changes of the specification.
    pub has_generation: bool,
    /// What may be done, sorted.
    pub verbs: &'static [&'static str],
    /// Subresources, sorted by name.
    pub subresources: &'static [SubresourceInfo],
    /// Opaque identifier of the storage encoding that discovery reports; clients only compare it.
    pub storage_version_hash: &'static str,
    /// Name of the OpenAPI schema of the kind.
    pub schema: &'static str,
    /// Defaults and validation.
    pub(crate) rules: Rules,
}

impl ResourceInfo {
    /// Whether this is the kind of that group.
    pub fn is(&self, group: &str, kind: &str) -> bool {
        self.group == group && self.kind == kind
    }

    /// `apiVersion` of the objects.
    pub fn api_version(&self) -> String {
        if self.group.is_empty() {
            self.version.to_owned()
        } else {
            format!("{}/{}", self.group, self.version)
        }
    }

    /// `plural.group`, as errors name the resource.
    pub fn qualified(&self) -> String {
        if self.group.is_empty() {
            self.plural.to_owned()
        } else {
            format!("{}.{}", self.plural, self.group)
        }
    }

    /// The subresource of that name.
    pub fn subresource(&self, name: &str) -> Option<&'static SubresourceInfo> {
        self.subresources.iter().find(|s| s.name == name)
    }

    /// Whether the verb is allowed on the resource itself.
    pub fn allows(&self, verb: &str) -> bool {
        self.verbs.contains(&verb)
    }
}

const VERBS: &[&str] = &[
    "create",
    "delete",
    "deletecollection",
    "get",
    "list",
    "patch",
    "update",
    "watch",
];
/// A namespace is deleted one at a time.
const NAMESPACE_VERBS: &[&str] = &["create", "delete", "get", "list", "patch", "update", "watch"];
const STATUS_VERBS: &[&str] = &["get", "patch", "update"];

const fn status(kind: &'static str) -> SubresourceInfo {
    SubresourceInfo {
        name: "status",
        group: "",
        version: "",
        kind,
        verbs: STATUS_VERBS,
    }
}

/// How many replicas there are to be, the same for every kind that has them.
const SCALE: SubresourceInfo = SubresourceInfo {
    name: "scale",
    group: "autoscaling",
    version: "v1",
    kind: "Scale",
    verbs: STATUS_VERBS,
};

/// A namespaced core kind without anything special.
const PLAIN: ResourceInfo = ResourceInfo {
    group: "",
    version: "v1",
    kind: "",
    list_kind: "",
    plural: "",
    singular: "",
    short_names: &[],
    categories: &[],
    namespaced: true,
    has_status: false,
    has_generation: false,
    verbs: VERBS,
    subresources: &[],
    storage_version_hash: "",
    schema: "",
    rules: Rules::NONE,
};

/// Namespaces, which the rules of other kinds refer to.
pub(super) const NAMESPACES: ResourceInfo = ResourceInfo {
    kind: "Namespace",
    list_kind: "NamespaceList",
    plural: "namespaces",
    singular: "namespace",
    short_names: &["ns"],
    namespaced: false,
    has_status: true,
    verbs: NAMESPACE_VERBS,
    subresources: &[
        SubresourceInfo {
            name: "finalize",
            group: "",
            version: "",
            kind: "Namespace",
            verbs: &["update"],
        },
        status("Namespace"),
    ],
    storage_version_hash: "Q3oi5N2YM8M=",
    schema: "io.k8s.api.core.v1.Namespace",
    rules: Rules {
        name: names::dns1123_label,
        defaults: kinds::label_namespace,
        create: Some(kinds::create_namespace),
        keep: kinds::keep_namespace,
        ..Rules::NONE
    },
    ..PLAIN
};

/// Everything that is served, sorted by group and plural.
pub static RESOURCES: &[ResourceInfo] = &[
    ResourceInfo {
        kind: "ConfigMap",
        list_kind: "ConfigMapList",
        plural: "configmaps",
        singular: "configmap",
        short_names: &["cm"],
        storage_version_hash: "qFsyl6wFWjQ=",
        schema: "io.k8s.api.core.v1.ConfigMap",
        rules: Rules {
            validate: config::validate_config_map,
            validate_update: config::frozen,
            ..Rules::NONE
        },
        ..PLAIN
    },
    ResourceInfo {
        kind: "Endpoints",
        list_kind: "EndpointsList",
        plural: "endpoints",
        singular: "endpoints",
        short_names: &["ep"],
        storage_version_hash: "fWeeMqaN/OA=",
        schema: "io.k8s.api.core.v1.Endpoints",
        rules: Rules {
            defaults: network::endpoints_defaults,
            validate: network::validate_endpoints,
            ..Rules::NONE
        },
        ..PLAIN
    },
    ResourceInfo {
        kind: "Event",
        list_kind: "EventList",
        plural: "events",
        singular: "event",
        short_names: &["ev"],
        storage_version_hash: "r2yiGXH7wu8=",
        schema: "io.k8s.api.core.v1.Event",
        rules: Rules {
            defaults: kinds::event_defaults,
            validate: kinds::validate_event,
            ..Rules::NONE
        },
        ..PLAIN
    },
    NAMESPACES,
    ResourceInfo {
        kind: "Node",
        list_kind: "NodeList",
        plural: "nodes",
        singular: "node",
        short_names: &["no"],
        namespaced: false,
        has_status: true,
        subresources: &[status("Node")],
        storage_version_hash: "XwShjMxG9Fs=",
        schema: "io.k8s.api.core.v1.Node",
        rules: Rules {
            defaults: kinds::node_defaults,
            create: Some(kinds::create_node),
            validate: kinds::validate_node,
            validate_update: kinds::validate_node_update,
            status: kinds::node_status,
            ..Rules::NONE
        },
        ..PLAIN
    },
    ResourceInfo {
        kind: "Pod",
        list_kind: "PodList",
        plural: "pods",
        singular: "pod",
        short_names: &["po"],
        categories: &["all"],
        has_status: true,
        has_generation: true,
        subresources: &[
            SubresourceInfo {
                name: "attach",
                group: "",
                version: "",
                kind: "PodAttachOptions",
                verbs: &["create", "get"],
            },
            SubresourceInfo {
                name: "binding",
                group: "",
                version: "",
                kind: "Binding",
                verbs: &["create"],
            },
            SubresourceInfo {
                name: "eviction",
                group: "policy",
                version: "v1",
                kind: "Eviction",
                verbs: &["create"],
            },
            SubresourceInfo {
                name: "exec",
                group: "",
                version: "",
                kind: "PodExecOptions",
                verbs: &["create", "get"],
            },
            SubresourceInfo {
                name: "log",
                group: "",
                version: "",
                kind: "Pod",
                verbs: &["get"],
            },
            status("Pod"),
        ],
        storage_version_hash: "xPOwRZ+Yhw8=",
        schema: "io.k8s.api.core.v1.Pod",
        rules: Rules {
            defaults: pod::defaults,
            create: Some(pod::create),
            keep: pod::keep,
            validate: pod::validate,
            validate_update: pod::validate_update,
            status: pod::status,
            ..Rules::NONE
        },
        ..PLAIN
    },
    ResourceInfo {
        kind: "ReplicationController",
        list_kind: "ReplicationControllerList",
        plural: "replicationcontrollers",
        singular: "replicationcontroller",
        short_names: &["rc"],
        categories: &["all"],
        has_status: true,
        has_generation: true,
        subresources: &[SCALE, status("ReplicationController")],
        storage_version_hash: "Jond2If31h0=",
        schema: "io.k8s.api.core.v1.ReplicationController",
        rules: Rules {
            defaults: workloads::replication_controller_defaults,
            create: Some(workloads::create_replicas_status),
            validate: workloads::validate_replication_controller,
            ..Rules::NONE
        },
        ..PLAIN
    },
    ResourceInfo {
        kind: "Secret",
        list_kind: "SecretList",
        plural: "secrets",
        singular: "secret",
        storage_version_hash: "S6u1pOWzb84=",
        schema: "io.k8s.api.core.v1.Secret",
        rules: Rules {
            defaults: config::secret_defaults,
            validate: config::validate_secret,
            validate_update: config::validate_secret_update,
            ..Rules::NONE
        },
        ..PLAIN
    },
    ResourceInfo {
        kind: "ServiceAccount",
        list_kind: "ServiceAccountList",
        plural: "serviceaccounts",
        singular: "serviceaccount",
        short_names: &["sa"],
        subresources: &[SubresourceInfo {
            name: "token",
            group: "authentication.k8s.io",
            version: "v1",
            kind: "TokenRequest",
            verbs: &["create"],
        }],
        storage_version_hash: "pbx9ZvyFpBE=",
        schema: "io.k8s.api.core.v1.ServiceAccount",
        ..PLAIN
    },
    ResourceInfo {
        kind: "Service",
        list_kind: "ServiceList",
        plural: "services",
        singular: "service",
        short_names: &["svc"],
        categories: &["all"],
        has_status: true,
        subresources: &[status("Service")],
        storage_version_hash: "0/CO1lhkEBI=",
        schema: "io.k8s.api.core.v1.Service",
        rules: Rules {
            name: names::dns1035_label,
            ..Rules::NONE
        },
        ..PLAIN
    },
    ResourceInfo {
        group: "apps",
        kind: "DaemonSet",
        list_kind: "DaemonSetList",
        plural: "daemonsets",
        singular: "daemonset",
        short_names: &["ds"],
        categories: &["all"],
        has_status: true,
        has_generation: true,
        subresources: &[status("DaemonSet")],
        storage_version_hash: "dd7pWHUlMKQ=",
        schema: "io.k8s.api.apps.v1.DaemonSet",
        rules: Rules {
            defaults: workloads::daemon_set_defaults,
            create: Some(workloads::create_daemon_set),
            validate: workloads::validate_daemon_set,
            validate_update: workloads::validate_selector_update,
            ..Rules::NONE
        },
        ..PLAIN
    },
    ResourceInfo {
        group: "apps",
        kind: "Deployment",
        list_kind: "DeploymentList",
        plural: "deployments",
        singular: "deployment",
        short_names: &["deploy"],
        categories: &["all"],
        has_status: true,
        has_generation: true,
        subresources: &[SCALE, status("Deployment")],
        storage_version_hash: "8aSe+NMegvE=",
        schema: "io.k8s.api.apps.v1.Deployment",
        rules: Rules {
            defaults: workloads::deployment_defaults,
            create: Some(workloads::create_empty_status),
            validate: workloads::validate_deployment,
            validate_update: workloads::validate_selector_update,
            ..Rules::NONE
        },
        ..PLAIN
    },
    ResourceInfo {
        group: "apps",
        kind: "ReplicaSet",
        list_kind: "ReplicaSetList",
        plural: "replicasets",
        singular: "replicaset",
        short_names: &["rs"],
        categories: &["all"],
        has_status: true,
        has_generation: true,
        subresources: &[SCALE, status("ReplicaSet")],
        storage_version_hash: "P1RzHs8/mWQ=",
        schema: "io.k8s.api.apps.v1.ReplicaSet",
        rules: Rules {
            defaults: workloads::replica_set_defaults,
            create: Some(workloads::create_replicas_status),
            validate: workloads::validate_replica_set,
            validate_update: workloads::validate_selector_update,
            ..Rules::NONE
        },
        ..PLAIN
    },
    ResourceInfo {
        group: "coordination.k8s.io",
        kind: "Lease",
        list_kind: "LeaseList",
        plural: "leases",
        singular: "lease",
        storage_version_hash: "gqkMMb/YqFM=",
        schema: "io.k8s.api.coordination.v1.Lease",
        rules: Rules {
            validate: config::validate_lease,
            ..Rules::NONE
        },
        ..PLAIN
    },
    ResourceInfo {
        group: "discovery.k8s.io",
        kind: "EndpointSlice",
        list_kind: "EndpointSliceList",
        plural: "endpointslices",
        singular: "endpointslice",
        has_generation: true,
        storage_version_hash: "qgS0xkrxYAI=",
        schema: "io.k8s.api.discovery.v1.EndpointSlice",
        rules: Rules {
            defaults: kinds::slice_defaults,
            validate: kinds::validate_slice,
            validate_update: kinds::validate_slice_update,
            ..Rules::NONE
        },
        ..PLAIN
    },
    ResourceInfo {
        group: "networking.k8s.io",
        kind: "IPAddress",
        list_kind: "IPAddressList",
        plural: "ipaddresses",
        singular: "ipaddress",
        short_names: &["ip"],
        namespaced: false,
        storage_version_hash: "O4H8VxQhW5Y=",
        schema: "io.k8s.api.networking.v1.IPAddress",
        rules: Rules {
            name: network::ip_name,
            validate: network::validate_ip_address,
            validate_update: network::validate_ip_address_update,
            ..Rules::NONE
        },
        ..PLAIN
    },
    ResourceInfo {
        group: "networking.k8s.io",
        kind: "NetworkPolicy",
        list_kind: "NetworkPolicyList",
        plural: "networkpolicies",
        singular: "networkpolicy",
        short_names: &["netpol"],
        has_generation: true,
        storage_version_hash: "YpfwF18m1G8=",
        schema: "io.k8s.api.networking.v1.NetworkPolicy",
        rules: Rules {
            defaults: network::policy_defaults,
            validate: network::validate_policy,
            ..Rules::NONE
        },
        ..PLAIN
    },
    ResourceInfo {
        group: "networking.k8s.io",
        kind: "ServiceCIDR",
        list_kind: "ServiceCIDRList",
        plural: "servicecidrs",
        singular: "servicecidr",
        namespaced: false,
        has_status: true,
        subresources: &[status("ServiceCIDR")],
        storage_version_hash: "8ufAXOnr3Yg=",
        schema: "io.k8s.api.networking.v1.ServiceCIDR",
        rules: Rules {
            validate: network::validate_service_cidr,
            validate_update: network::validate_service_cidr_update,
            ..Rules::NONE
        },
        ..PLAIN
    },
    ResourceInfo {
        group: "rbac.authorization.k8s.io",
        kind: "ClusterRoleBinding",
        list_kind: "ClusterRoleBindingList",
        plural: "clusterrolebindings",
        singular: "clusterrolebinding",
        namespaced: false,
        storage_version_hash: "48tpQ8gZHFc=",
        schema: "io.k8s.api.rbac.v1.ClusterRoleBinding",
        rules: Rules {
            name: rbac::path_segment,
            defaults: rbac::binding_defaults,
            validate: rbac::validate_cluster_role_binding,
            validate_update: rbac::validate_binding_update,
            ..Rules::NONE
        },
        ..PLAIN
    },
    ResourceInfo {
        group: "rbac.authorization.k8s.io",
        kind: "ClusterRole",
        list_kind: "ClusterRoleList",
        plural: "clusterroles",
        singular: "clusterrole",
        namespaced: false,
        storage_version_hash: "bYE5ZWDrJ44=",
        schema: "io.k8s.api.rbac.v1.ClusterRole",
        rules: Rules {
            name: rbac::path_segment,
            defaults: rbac::role_defaults,
            validate: rbac::validate_cluster_role,
            ..Rules::NONE
        },
        ..PLAIN
    },
    ResourceInfo {
        group: "rbac.authorization.k8s.io",
        kind: "RoleBinding",
        list_kind: "RoleBindingList",
        plural: "rolebindings",
        singular: "rolebinding",
        storage_version_hash: "eGsCzGH6b1g=",
        schema: "io.k8s.api.rbac.v1.RoleBinding",
        rules: Rules {
            name: rbac::path_segment,
            defaults: rbac::binding_defaults,
            validate: rbac::validate_role_binding,
            validate_update: rbac::validate_binding_update,
            ..Rules::NONE
        },
        ..PLAIN
    },
    ResourceInfo {
        group: "rbac.authorization.k8s.io",
        kind: "Role",
        list_kind: "RoleList",
        plural: "roles",
        singular: "role",
        storage_version_hash: "7FuwZcIIItM=",
        schema: "io.k8s.api.rbac.v1.Role",
        rules: Rules {
            name: rbac::path_segment,
            defaults: rbac::role_defaults,
            validate: rbac::validate_role,
            ..Rules::NONE
        },
        ..PLAIN
    },
];

/// The resource at `/api/{version}/…/{plural}` or `/apis/{group}/{version}/…/{plural}`.
pub fn find(group: &str, version: &str, plural: &str) -> Option<&'static ResourceInfo> {
    RESOURCES
        .iter()
        .find(|r| r.group == group && r.version == version && r.plural == plural)
}
