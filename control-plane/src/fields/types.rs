//! What the fields of a kind are to ownership: values, structures, maps, and lists by how their elements are told apart.
//!
//! The facts are those of the API's OpenAPI extensions `x-kubernetes-list-type`, `x-kubernetes-list-map-keys` and
//! `x-kubernetes-map-type` for the kinds served, which `k8s-openapi`'s schemas do not carry.

use serde_json::{Map, Value, json};

use super::set::field;
use crate::resource::{ResourceInfo, schema};

/// How elements of a list are told apart.
#[derive(Debug, Clone, Copy)]
pub(super) enum Elements {
    /// By these fields.
    Keys(&'static [&'static str]),
    /// By their value.
    Values,
}

/// What a value is.
#[derive(Debug, Clone, Copy)]
pub(super) enum Type<'a> {
    /// Owned as a whole.
    Leaf,
    /// Named fields; the schema's name.
    Struct(&'a str, &'a Map<String, Value>),
    /// Any keys; owner, field and schema of the values.
    Map(&'a str, &'a str, &'a Value),
    /// Elements with an identity; owner, field and schema of the elements.
    List(Elements, &'a str, &'a str, &'a Value),
}

/// Fields that are lists, and what tells their elements apart.
type Lists = &'static [(&'static str, &'static [&'static str])];

const CONTAINER: Lists = &[
    ("env", &["name"]),
    ("ports", &["containerPort", "protocol"]),
    ("volumeDevices", &["devicePath"]),
    ("volumeMounts", &["mountPath"]),
];

/// Schema (after `io.k8s.api.` or `io.k8s.apimachinery.pkg.apis.`), field, keys. No keys: a set of plain values.
const LISTS: &[(&str, Lists)] = &[
    ("apps.v1.DaemonSetStatus", &[("conditions", &["type"])]),
    ("apps.v1.DeploymentStatus", &[("conditions", &["type"])]),
    ("apps.v1.ReplicaSetStatus", &[("conditions", &["type"])]),
    ("core.v1.Container", CONTAINER),
    ("core.v1.ContainerRestartRuleOnExitCodes", &[("values", &[])]),
    (
        "core.v1.ContainerStatus",
        &[
            ("allocatedResourcesStatus", &["name"]),
            ("volumeMounts", &["mountPath"]),
        ],
    ),
    ("core.v1.EphemeralContainer", CONTAINER),
    ("core.v1.NamespaceStatus", &[("conditions", &["type"])]),
    ("core.v1.NodeSpec", &[("podCIDRs", &[])]),
    (
        "core.v1.NodeStatus",
        &[("addresses", &["type"]), ("conditions", &["type"])],
    ),
    (
        "core.v1.PodSpec",
        &[
            ("containers", &["name"]),
            ("ephemeralContainers", &["name"]),
            ("hostAliases", &["ip"]),
            ("imagePullSecrets", &["name"]),
            ("initContainers", &["name"]),
            ("resourceClaims", &["name"]),
            ("schedulingGates", &["name"]),
            ("topologySpreadConstraints", &["topologyKey", "whenUnsatisfiable"]),
            ("volumes", &["name"]),
        ],
    ),
    (
        "core.v1.PodStatus",
        &[
            ("conditions", &["type"]),
            ("podIPs", &["ip"]),
            ("resourceClaimStatuses", &["name"]),
        ],
    ),
    (
        "core.v1.ReplicationControllerStatus",
        &[("conditions", &["type"])],
    ),
    ("core.v1.ResourceRequirements", &[("claims", &["name"])]),
    ("core.v1.ResourceStatus", &[("resources", &["resourceID"])]),
    ("core.v1.ServiceAccount", &[("secrets", &["name"])]),
    ("core.v1.ServiceSpec", &[("ports", &["port", "protocol"])]),
    ("core.v1.ServiceStatus", &[("conditions", &["type"])]),
    ("networking.v1.ServiceCIDRStatus", &[("conditions", &["type"])]),
    (
        "meta.v1.ObjectMeta",
        &[("finalizers", &[]), ("ownerReferences", &["uid"])],
    ),
];

/// Maps that are owned as a whole.
const ATOMIC_MAPS: &[(&str, &str)] = &[
    ("core.v1.PodSpec", "nodeSelector"),
    ("core.v1.ReplicationControllerSpec", "selector"),
    ("core.v1.ServiceSpec", "selector"),
];

/// Structures that are owned as a whole.
const ATOMIC_STRUCTS: &[&str] = &[
    "core.v1.ConfigMapKeySelector",
    "core.v1.EndpointAddress",
    "core.v1.EndpointPort",
    "core.v1.FileKeySelector",
    "core.v1.LocalObjectReference",
    "core.v1.NodeSelector",
    "core.v1.NodeSelectorTerm",
    "core.v1.ObjectFieldSelector",
    "core.v1.ObjectReference",
    "core.v1.ResourceFieldSelector",
    "core.v1.SecretKeySelector",
    "core.v1.TypedLocalObjectReference",
    "discovery.v1.EndpointPort",
    "rbac.v1.RoleRef",
    "rbac.v1.Subject",
    "meta.v1.LabelSelector",
    "meta.v1.OwnerReference",
];

/// What a key field is that an element leaves out.
fn key_default(key: &str) -> Option<Value> {
    (key == "protocol").then(|| "TCP".into())
}

fn short(name: &str) -> &str {
    name.strip_prefix("io.k8s.api.")
        .or_else(|| name.strip_prefix("io.k8s.apimachinery.pkg.apis."))
        .unwrap_or(name)
}

/// The type of a whole object.
pub(super) fn object<'a>(r: &ResourceInfo) -> Type<'a> {
    named(r.schema)
}

fn named<'a>(name: &str) -> Type<'a> {
    if ATOMIC_STRUCTS.contains(&short(name)) {
        return Type::Leaf;
    }
    let Some((name, schema)) = schema::entry(name) else {
        return Type::Leaf;
    };
    match schema.get("properties").and_then(Value::as_object) {
        Some(fields) => Type::Struct(name, fields),
        None => Type::Leaf,
    }
}

fn of<'a>(owner: &'a str, name: &'a str, schema: &'a Value) -> Type<'a> {
    if let Some(target) = schema::reference(schema) {
        return named(target);
    }
    match schema.get("type").and_then(Value::as_str) {
        Some("array") => {
            let keys = LISTS
                .iter()
                .find(|(schema, _)| *schema == short(owner))
                .and_then(|(_, lists)| lists.iter().find(|(field, _)| *field == name))
                .map(|(_, keys)| *keys);
            match (keys, schema.get("items")) {
                (Some([]), Some(items)) => Type::List(Elements::Values, owner, name, items),
                (Some(keys), Some(items)) => Type::List(Elements::Keys(keys), owner, name, items),
                _ => Type::Leaf,
            }
        }
        Some("object") => match schema.get("additionalProperties") {
            Some(values) if values.is_object() && !ATOMIC_MAPS.contains(&(short(owner), name)) => {
                Type::Map(owner, name, values)
            }
            _ => Type::Leaf,
        },
        _ => Type::Leaf,
    }
}

impl<'a> Type<'a> {
    /// The type of a field or of a map's value.
    pub(super) fn field(&self, key: &str) -> Type<'a> {
        match self {
            Type::Struct(owner, fields) => match fields.get_key_value(key) {
                Some((name, schema)) => of(owner, name, schema),
                None => Type::Leaf,
            },
            Type::Map(owner, name, values) => of(owner, name, values),
            _ => Type::Leaf,
        }
    }

    /// The type of a list's elements.
    pub(super) fn element(&self) -> Type<'a> {
        match self {
            Type::List(_, owner, name, items) => of(owner, name, items),
            _ => Type::Leaf,
        }
    }

    /// Whether `key` is a field rather than any key of a map.
    pub(super) fn has_field(&self, key: &str) -> bool {
        matches!(self, Type::Struct(_, fields) if fields.contains_key(key))
    }

    /// The type that an edge of a path leads to.
    pub(super) fn below(&self, edge: &str) -> Type<'a> {
        match edge.strip_prefix("f:") {
            Some(name) => self.field(name),
            None => self.element(),
        }
    }
}

impl Elements {
    /// The edge that names an element.
    pub(super) fn edge(self, element: &Value) -> String {
        match self {
            Self::Values => format!("v:{element}"),
            Self::Keys(keys) => {
                let keys: Map<String, Value> = keys
                    .iter()
                    .filter_map(|key| {
                        let given = element.get(key).filter(|value| !value.is_null()).cloned();
                        Some(((*key).to_owned(), given.or_else(|| key_default(key))?))
                    })
                    .collect();
                format!("k:{}", Value::Object(keys))
            }
        }
    }
}

/// What an object of the kind is before any field is set: Go writes structures and required fields even if they are empty,
/// and what is there already is not counted as added.
pub(super) fn zero(r: &ResourceInfo) -> Value {
    let template = || json!({"metadata": {}, "spec": {"containers": null}});
    match (r.group, r.kind) {
        ("", "Service") => json!({"metadata": {}, "spec": {}, "status": {"loadBalancer": {}}}),
        ("", "Pod") => json!({"metadata": {}, "spec": {"containers": null}, "status": {}}),
        ("", "ReplicationController") => json!({"metadata": {}, "spec": {}, "status": {"replicas": 0}}),
        ("", "Namespace") => json!({"metadata": {}, "spec": {}, "status": {}}),
        ("", "Node") => {
            let mut node = json!({"metadata": {}, "spec": {}});
            crate::resource::complete_node_status(&mut node);
            node
        }
        ("", "Event") => json!({
            "metadata": {}, "involvedObject": {}, "source": {}, "firstTimestamp": null, "lastTimestamp": null,
            "eventTime": null, "reportingComponent": "", "reportingInstance": "",
        }),
        ("apps", "Deployment") => json!({
            "metadata": {}, "spec": {"selector": null, "template": template(), "strategy": {}}, "status": {},
        }),
        ("apps", "ReplicaSet") => json!({
            "metadata": {}, "spec": {"selector": null, "template": template()}, "status": {"replicas": 0},
        }),
        ("apps", "DaemonSet") => json!({
            "metadata": {}, "spec": {"selector": null, "template": template(), "updateStrategy": {}},
            "status": {"currentNumberScheduled": 0, "numberMisscheduled": 0, "desiredNumberScheduled": 0, "numberReady": 0},
        }),
        ("discovery.k8s.io", "EndpointSlice") => {
            json!({"metadata": {}, "addressType": "", "endpoints": null, "ports": null})
        }
        ("networking.k8s.io", "NetworkPolicy") => json!({"metadata": {}, "spec": {"podSelector": {}}}),
        ("networking.k8s.io" | "coordination.k8s.io", _) => json!({"metadata": {}, "spec": {}, "status": {}}),
        ("rbac.authorization.k8s.io", "Role" | "ClusterRole") => json!({"metadata": {}, "rules": null}),
        ("rbac.authorization.k8s.io", _) => {
            json!({"metadata": {}, "roleRef": {"apiGroup": "", "kind": "", "name": ""}})
        }
        _ => json!({"metadata": {}}),
    }
}

/// Fields of `metadata` that nobody owns.
const UNOWNED: &[&str] = &[
    "name",
    "namespace",
    "creationTimestamp",
    "selfLink",
    "uid",
    "clusterName",
    "generation",
    "managedFields",
    "resourceVersion",
];

/// Drops the paths that a request through this subresource cannot change, and those that nobody owns.
pub(super) fn owned(r: &ResourceInfo, subresource: &str, mut set: super::set::Set) -> super::set::Set {
    for name in ["apiVersion", "kind"] {
        set.cut(&[&field(name)]);
    }
    let metadata = field("metadata");
    for name in UNOWNED {
        set.cut(&[&metadata, &field(name)]);
    }
    if let Some(node) = set.0.get_mut(&metadata) {
        node.member = false;
        if node.below.is_empty() {
            set.0.remove(&metadata);
        }
    }
    match subresource {
        "status" => set.0.retain(|edge, _| edge == "f:status" || *edge == metadata),
        _ if r.has_status => {
            set.0.remove("f:status");
        }
        _ => {}
    }
    set
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Each entry of the tables names something that exists.
    #[test]
    fn tables_agree_with_the_schemas() {
        let full = |name: &str| {
            let prefix = match name.strip_prefix("meta.") {
                Some(_) => "io.k8s.apimachinery.pkg.apis.",
                None => "io.k8s.api.",
            };
            format!("{prefix}{name}")
        };
        for (name, lists) in LISTS {
            let schema = schema::named(&full(name)).unwrap_or_else(|| panic!("{name}"));
            for (list, keys) in *lists {
                let field = &schema["properties"][list];
                assert_eq!(field["type"], "array", "{name}.{list}");
                let item = schema::reference(&field["items"]).and_then(schema::named);
                for key in *keys {
                    assert!(
                        item.unwrap()["properties"].get(key).is_some(),
                        "{name}.{list} by {key}"
                    );
                }
            }
        }
        for (name, map) in ATOMIC_MAPS {
            let schema = schema::named(&full(name)).unwrap();
            assert!(
                schema["properties"][map]["additionalProperties"].is_object(),
                "{name}.{map}"
            );
        }
        for name in ATOMIC_STRUCTS {
            assert!(schema::named(&full(name)).is_some(), "{name}");
        }
    }
}
