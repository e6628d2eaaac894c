//! OpenAPI v3 documents, built from the schemas of `k8s-openapi` when they are first asked for.
//!
//! kubectl reads three things in them: whether the PATCH of a kind knows `fieldValidation` (create, apply), how lists are
//! merged (apply, edit), and the descriptions (explain).

mod paths;

use std::collections::{BTreeMap, BTreeSet};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::LazyLock;

use serde_json::{Map, Value, json};

use crate::patch::keys::{Strategy, strategy};
use crate::resource::{RESOURCES, ResourceInfo, schema};

/// Content type of [`V2`].
pub const V2_TYPE: &str = "application/com.github.proto-openapi.spec.v2.v1.0+protobuf";

/// The older document (`openapi.v2.Document` of gnostic) without any definition. kubectl asks for it about kinds that the
/// newer ones do not have, to learn that nobody knows them.
pub const V2: &[u8] = b"\x0a\x032.0\x12\x15\x0a\x0aKubernetes\x12\x07v1.36.2\x42\x00";

/// Documents by `api/v1` or `apis/{group}/{version}`.
static DOCUMENTS: LazyLock<BTreeMap<String, Value>> = LazyLock::new(|| {
    let names: BTreeSet<String> = RESOURCES.iter().map(document_name).collect();
    names
        .into_iter()
        .map(|name| {
            let document = build(&name);
            (name, document)
        })
        .collect()
});

fn document_name(r: &ResourceInfo) -> String {
    if r.group.is_empty() {
        format!("api/{}", r.version)
    } else {
        format!("apis/{}/{}", r.group, r.version)
    }
}

/// The body of `/openapi/v3`: where the document of each group and version is. The hash changes with the content, so
/// that clients may keep a document as long as it stays the same.
pub fn index() -> Value {
    let paths: Map<String, Value> = DOCUMENTS
        .iter()
        .map(|(name, document)| {
            let mut hasher = DefaultHasher::new();
            document.to_string().hash(&mut hasher);
            let url = format!("/openapi/v3/{name}?hash={:016X}", hasher.finish());
            (name.clone(), json!({"serverRelativeURL": url}))
        })
        .collect();
    json!({"paths": paths})
}

/// The document of `api/v1` or `apis/{group}/{version}`.
pub fn document(group_version: &str) -> Option<Value> {
    DOCUMENTS.get(group_version.trim_matches('/')).cloned()
}

fn build(name: &str) -> Value {
    let resources: Vec<&ResourceInfo> = RESOURCES.iter().filter(|r| document_name(r) == name).collect();
    let mut schemas = Map::new();
    let mut paths = Map::new();
    let mut wanted: Vec<String> = ["DeleteOptions", "ListMeta", "Status"]
        .iter()
        .map(|n| format!("io.k8s.apimachinery.pkg.apis.meta.v1.{n}"))
        .collect();
    for r in &resources {
        wanted.push(r.schema.to_owned());
        schemas.insert(format!("{}List", r.schema), list_schema(r));
        paths::add(r, name, &mut paths);
        if r.kind == "Pod" {
            wanted.push("io.k8s.api.core.v1.Binding".to_owned());
        }
        if r.subresource("scale").is_some() {
            wanted.push("io.k8s.api.autoscaling.v1.Scale".to_owned());
        }
    }
    while let Some(name) = wanted.pop() {
        if schemas.contains_key(&name) {
            continue;
        }
        let Some(schema) = schema::named(&name) else {
            continue;
        };
        references(schema, &mut wanted);
        schemas.insert(name.clone(), decorated(&name, schema));
    }
    json!({
        "openapi": "3.0.0",
        "info": {"title": "Kubernetes", "version": "v1.36.2"},
        "paths": paths,
        "components": {"schemas": schemas},
    })
}

fn references(value: &Value, found: &mut Vec<String>) {
    match value {
        Value::Object(map) => {
            if let Some(name) = schema::reference(value) {
                found.push(name.to_owned());
            }
            map.values().for_each(|v| references(v, found));
        }
        Value::Array(list) => list.iter().for_each(|v| references(v, found)),
        _ => {}
    }
}

/// The schema with what Kubernetes adds: the kind it describes and how its lists are merged.
fn decorated(name: &str, schema: &Value) -> Value {
    let mut schema = schema.clone();
    if schema.get("x-kubernetes-int-or-string").is_some() {
        schema["oneOf"] = json!([{"type": "integer"}, {"type": "string"}]);
    }
    if let Some(properties) = schema.get_mut("properties").and_then(Value::as_object_mut) {
        for (field, property) in properties {
            match strategy(name, field) {
                Some(Strategy::ByKey(key)) => {
                    property["x-kubernetes-list-type"] = "map".into();
                    property["x-kubernetes-list-map-keys"] = json!([key]);
                    property["x-kubernetes-patch-merge-key"] = key.into();
                    // One of several alternatives: the others go when a patch picks one.
                    let alternatives = matches!(
                        field.as_str(),
                        "volumes" | "resourceClaims" | "resourceClaimStatuses"
                    );
                    property["x-kubernetes-patch-strategy"] =
                        if alternatives { "merge,retainKeys" } else { "merge" }.into();
                }
                Some(Strategy::Union) => {
                    property["x-kubernetes-list-type"] = "set".into();
                    property["x-kubernetes-patch-strategy"] = "merge".into();
                }
                None => {}
            }
        }
    }
    if let Some(r) = RESOURCES.iter().find(|r| r.schema == name) {
        schema["x-kubernetes-group-version-kind"] = json!([gvk(r, r.kind)]);
    }
    schema
}

fn gvk(r: &ResourceInfo, kind: &str) -> Value {
    json!({"group": r.group, "version": r.version, "kind": kind})
}

fn refer(name: &str) -> Value {
    json!({"$ref": format!("{}{name}", schema::PREFIX)})
}

fn list_schema(r: &ResourceInfo) -> Value {
    let text = |description: &str| json!({"type": "string", "description": description});
    json!({
        "description": format!("{} is a list of {} objects.", r.list_kind, r.kind),
        "type": "object",
        "required": ["items"],
        "properties": {
            "apiVersion": text("APIVersion defines the versioned schema of this representation of an object."),
            "kind": text("Kind is a string value representing the REST resource this object represents."),
            "metadata": {
                "description": "Standard list metadata.",
                "allOf": [refer("io.k8s.apimachinery.pkg.apis.meta.v1.ListMeta")],
            },
            "items": {"description": "The objects.", "type": "array", "items": refer(r.schema)},
        },
        "x-kubernetes-group-version-kind": [gvk(r, r.list_kind)],
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_document_is_in_the_index_and_complete() {
        let index = index();
        let names: Vec<&String> = index["paths"].as_object().unwrap().keys().collect();
        assert_eq!(
            names,
            [
                "api/v1",
                "apis/apps/v1",
                "apis/coordination.k8s.io/v1",
                "apis/discovery.k8s.io/v1",
                "apis/networking.k8s.io/v1",
                "apis/rbac.authorization.k8s.io/v1"
            ]
        );
        assert!(document("apis/nope/v1").is_none());
        for name in names {
            let url = index["paths"][name]["serverRelativeURL"].as_str().unwrap();
            assert!(url.starts_with(&format!("/openapi/v3/{name}?hash=")));
            let document = document(name).unwrap();
            let schemas = document["components"]["schemas"].as_object().unwrap();
            let mut wanted = Vec::new();
            references(&document, &mut wanted);
            assert!(!wanted.is_empty());
            for schema in wanted {
                assert!(schemas.contains_key(&schema), "{name}: {schema}");
            }
        }
    }

    /// What kubectl 1.32 looks for before it creates or applies an object of the kind.
    #[test]
    fn every_kind_can_be_found_and_validated_by_the_server() {
        for r in RESOURCES {
            let document = document(&document_name(r)).unwrap();
            let wanted = gvk(r, r.kind);
            let patches: Vec<&Value> = document["paths"]
                .as_object()
                .unwrap()
                .values()
                .filter_map(|p| p.get("patch"))
                .filter(|p| p["x-kubernetes-group-version-kind"] == wanted)
                .collect();
            assert!(!patches.is_empty(), "{}", r.kind);
            for patch in patches {
                let names: Vec<&str> = patch["parameters"]
                    .as_array()
                    .unwrap()
                    .iter()
                    .map(|p| p["name"].as_str().unwrap())
                    .collect();
                for name in ["fieldValidation", "fieldManager", "force", "dryRun"] {
                    assert!(names.contains(&name), "{} {name}", r.kind);
                }
                assert!(
                    patch["requestBody"]["content"]
                        .get("application/strategic-merge-patch+json")
                        .is_some()
                );
            }
            let schema = &document["components"]["schemas"][r.schema];
            assert_eq!(schema["x-kubernetes-group-version-kind"], json!([wanted]));
            // Where explain looks for the kind behind a resource name.
            let scope = if r.namespaced {
                "/namespaces/{namespace}"
            } else {
                ""
            };
            let path = format!("/{}{scope}/{}", document_name(r), r.plural);
            assert_eq!(
                document["paths"][&path]["get"]["x-kubernetes-group-version-kind"], wanted,
                "{path}"
            );
        }
    }

    #[test]
    fn lists_say_how_they_are_merged_and_fields_what_they_mean() {
        let document = document("api/v1").unwrap();
        let schemas = &document["components"]["schemas"];
        let ports = &schemas["io.k8s.api.core.v1.ServiceSpec"]["properties"]["ports"];
        assert_eq!(ports["x-kubernetes-patch-merge-key"], "port");
        assert_eq!(ports["x-kubernetes-patch-strategy"], "merge");
        let item = schema::reference(&ports["items"]).unwrap();
        assert_eq!(item, "io.k8s.api.core.v1.ServicePort");
        for (_, field) in schemas[item]["properties"].as_object().unwrap() {
            assert!(field["description"].as_str().unwrap().len() > 10);
        }
        let volumes = &schemas["io.k8s.api.core.v1.PodSpec"]["properties"]["volumes"];
        assert_eq!(volumes["x-kubernetes-patch-strategy"], "merge,retainKeys");
    }

    /// Each entry of the merge table names a list that exists.
    #[test]
    fn every_merged_list_is_a_list() {
        let mut found = 0;
        for (name, schema) in schema::definitions() {
            for (field, property) in schema["properties"].as_object().into_iter().flatten() {
                match strategy(name, field) {
                    Some(Strategy::ByKey(key)) => {
                        let item = schema::reference(&property["items"])
                            .and_then(schema::named)
                            .unwrap();
                        assert!(item["properties"].get(key).is_some(), "{name}.{field} by {key}");
                        found += 1;
                    }
                    Some(Strategy::Union) => {
                        assert_eq!(property["items"]["type"], "string");
                        found += 1;
                    }
                    None => {}
                }
            }
        }
        assert!(found >= 30, "{found}");
    }
}
