//! The kinds that are served: names, scope and verbs, as the discovery documents show them.

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
}

impl ResourceInfo {
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
                name: "binding",
                group: "",
                version: "",
                kind: "Binding",
                verbs: &["create"],
            },
            status("Pod"),
        ],
        storage_version_hash: "xPOwRZ+Yhw8=",
        schema: "io.k8s.api.core.v1.Pod",
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
        subresources: &[status("ReplicationController")],
        storage_version_hash: "Jond2If31h0=",
        schema: "io.k8s.api.core.v1.ReplicationController",
        ..PLAIN
    },
    ResourceInfo {
        kind: "Secret",
        list_kind: "SecretList",
        plural: "secrets",
        singular: "secret",
        storage_version_hash: "S6u1pOWzb84=",
        schema: "io.k8s.api.core.v1.Secret",
        ..PLAIN
    },
    ResourceInfo {
        kind: "ServiceAccount",
        list_kind: "ServiceAccountList",
        plural: "serviceaccounts",
        singular: "serviceaccount",
        short_names: &["sa"],
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
        ..PLAIN
    },
];

/// The resource at `/api/{version}/…/{plural}` or `/apis/{group}/{version}/…/{plural}`.
pub fn find(group: &str, version: &str, plural: &str) -> Option<&'static ResourceInfo> {
    RESOURCES
        .iter()
        .find(|r| r.group == group && r.version == version && r.plural == plural)
}
