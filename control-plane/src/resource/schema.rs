//! The OpenAPI schemas of the served kinds, from `k8s-openapi`. Built when first needed, so that programs that only link
//! this crate pay nothing for them.

use std::sync::LazyLock;

use k8s_openapi::api::apps::v1::{DaemonSet, Deployment, ReplicaSet};
use k8s_openapi::api::autoscaling::v1::Scale;
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::{
    Binding, ConfigMap, Endpoints, Event, Namespace, Node, Pod, ReplicationController, Secret, Service,
    ServiceAccount,
};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use k8s_openapi::api::networking::v1::{IPAddress, NetworkPolicy, ServiceCIDR};
use k8s_openapi::api::rbac::v1::{ClusterRole, ClusterRoleBinding, Role, RoleBinding};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{DeleteOptions, ListMeta, Status};
use schemars::generate::SchemaSettings;
use serde_json::{Map, Value};

/// Where references to other schemas point.
pub(crate) const PREFIX: &str = "#/components/schemas/";

static DEFINITIONS: LazyLock<Map<String, Value>> = LazyLock::new(|| {
    let mut generator = SchemaSettings::openapi3().into_generator();
    macro_rules! add {
        ($($kind:ty),* $(,)?) => {
            $(generator.subschema_for::<$kind>();)*
        };
    }
    add!(
        Binding,
        ClusterRole,
        ClusterRoleBinding,
        ConfigMap,
        DaemonSet,
        Deployment,
        EndpointSlice,
        Endpoints,
        Event,
        IPAddress,
        Lease,
        Namespace,
        NetworkPolicy,
        Node,
        Pod,
        ReplicaSet,
        ReplicationController,
        Role,
        RoleBinding,
        Scale,
        Secret,
        Service,
        ServiceAccount,
        ServiceCIDR,
        DeleteOptions,
        ListMeta,
        Status,
    );
    generator.take_definitions(true)
});

/// All schemas by name.
#[cfg(test)]
pub(crate) fn definitions() -> &'static Map<String, Value> {
    &DEFINITIONS
}

/// The schema of that name.
pub(crate) fn named(name: &str) -> Option<&'static Value> {
    DEFINITIONS.get(name)
}

/// The schema of that name, and its name for as long as the program runs.
pub(crate) fn entry(name: &str) -> Option<(&'static str, &'static Value)> {
    DEFINITIONS
        .get_key_value(name)
        .map(|(name, schema)| (name.as_str(), schema))
}

/// The name of the schema that this one refers to, if it does.
pub(crate) fn reference(schema: &Value) -> Option<&str> {
    schema
        .get("$ref")
        .or_else(|| schema.get("allOf")?.get(0)?.get("$ref"))?
        .as_str()?
        .strip_prefix(PREFIX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::resource::RESOURCES;

    #[test]
    fn every_kind_has_a_schema_and_every_reference_resolves() {
        for r in RESOURCES {
            assert!(named(r.schema).is_some(), "{}", r.schema);
        }
        fn walk(v: &Value) {
            match v {
                Value::Object(map) => {
                    if let Some(Value::String(r)) = map.get("$ref") {
                        let name = r.strip_prefix(PREFIX).unwrap();
                        assert!(named(name).is_some(), "{name}");
                    }
                    map.values().for_each(walk);
                }
                Value::Array(list) => list.iter().for_each(walk),
                _ => {}
            }
        }
        definitions().values().for_each(walk);
    }
}
