//! Paths and operations of a resource.

use serde_json::{Map, Value, json};

use super::{gvk, refer};
use crate::patch::{APPLY_PATCH, JSON_PATCH, MERGE_PATCH, STRATEGIC_MERGE_PATCH};
use crate::resource::ResourceInfo;

const JSON: &str = "application/json";
const YAML: &str = "application/yaml";

/// Adds everything below the resource; `root` is the name of the document, such as `api/v1`.
pub(super) fn add(r: &ResourceInfo, root: &str, paths: &mut Map<String, Value>) {
    let scope = if r.namespaced {
        "/namespaces/{namespace}"
    } else {
        ""
    };
    let all = format!("/{root}{scope}/{}", r.plural);
    let one = format!("{all}/{{name}}");
    if r.namespaced {
        let mut item = path_item(&[]);
        item.insert("get".into(), operation(r, "list", &Body::None, true));
        paths.insert(format!("/{root}/{}", r.plural), item.into());
    }
    let namespace: &[&str] = if r.namespaced { &["namespace"] } else { &[] };
    let mut item = path_item(namespace);
    item.insert("get".into(), operation(r, "list", &Body::None, true));
    item.insert("post".into(), operation(r, "post", &Body::Object, false));
    if r.allows("deletecollection") {
        item.insert(
            "delete".into(),
            operation(r, "deletecollection", &Body::Delete, true),
        );
    }
    paths.insert(all, item.into());

    let parameters = [namespace, &["name"]].concat();
    let mut item = path_item(&parameters);
    item.insert("get".into(), operation(r, "get", &Body::None, false));
    item.insert("put".into(), operation(r, "put", &Body::Object, false));
    item.insert("patch".into(), operation(r, "patch", &Body::Patch, false));
    item.insert("delete".into(), operation(r, "delete", &Body::Delete, false));
    paths.insert(one.clone(), item.into());

    for sub in r.subresources {
        let scale;
        let r = match sub.kind {
            kind if kind == r.kind => r,
            "Scale" => {
                scale = ResourceInfo {
                    group: sub.group,
                    version: sub.version,
                    kind: sub.kind,
                    schema: "io.k8s.api.autoscaling.v1.Scale",
                    ..*r
                };
                &scale
            }
            // A binding is no object that can be read or patched.
            _ => continue,
        };
        let mut item = path_item(&parameters);
        for verb in sub.verbs {
            match *verb {
                "get" => item.insert("get".into(), operation(r, "get", &Body::None, false)),
                "update" => item.insert("put".into(), operation(r, "put", &Body::Object, false)),
                "patch" => item.insert("patch".into(), operation(r, "patch", &Body::Patch, false)),
                _ => None,
            };
        }
        paths.insert(format!("{one}/{}", sub.name), item.into());
    }
}

fn path_item(parameters: &[&str]) -> Map<String, Value> {
    let mut item = Map::new();
    if !parameters.is_empty() {
        let list: Vec<Value> = parameters
            .iter()
            .map(|name| {
                json!({
                    "name": name,
                    "in": "path",
                    "required": true,
                    "description": match *name {
                        "namespace" => "object name and auth scope, such as for teams and projects",
                        _ => "name of the object",
                    },
                    "schema": {"type": "string", "uniqueItems": true},
                })
            })
            .collect();
        item.insert("parameters".into(), list.into());
    }
    item
}

enum Body {
    None,
    Object,
    Patch,
    Delete,
}

fn content(types: &[&str], schema: &Value) -> Value {
    let map: Map<String, Value> = types
        .iter()
        .map(|t| ((*t).to_owned(), json!({"schema": schema})))
        .collect();
    map.into()
}

fn operation(r: &ResourceInfo, action: &str, body: &Body, list: bool) -> Value {
    let answer = if list && action == "list" {
        refer(&format!("{}List", r.schema))
    } else if action.starts_with("delete") {
        refer("io.k8s.apimachinery.pkg.apis.meta.v1.Status")
    } else {
        refer(r.schema)
    };
    let mut operation = json!({
        "description": format!("{action} {}", r.plural),
        "responses": {
            "200": {"description": "OK", "content": content(&[JSON, YAML], &answer)},
            "401": {"description": "Unauthorized"},
        },
        "parameters": parameters(action, list),
        "x-kubernetes-action": action,
        "x-kubernetes-group-version-kind": gvk(r, r.kind),
    });
    let request = match body {
        Body::None => return operation,
        Body::Object => content(&[JSON, YAML], &refer(r.schema)),
        Body::Patch => content(
            &[JSON_PATCH, MERGE_PATCH, STRATEGIC_MERGE_PATCH, APPLY_PATCH],
            &json!({"type": "object"}),
        ),
        Body::Delete => content(
            &[JSON, YAML],
            &refer("io.k8s.apimachinery.pkg.apis.meta.v1.DeleteOptions"),
        ),
    };
    operation["requestBody"] = json!({"content": request});
    operation
}

/// Query parameters of an action.
fn parameters(action: &str, list: bool) -> Vec<Value> {
    let mut names: Vec<(&str, &str, &str)> = Vec::new();
    if matches!(action, "post" | "put" | "patch") {
        names.extend([
            (
                "dryRun",
                "string",
                "When present, indicates that modifications should not be persisted. The only valid value is All.",
            ),
            (
                "fieldManager",
                "string",
                "The name of the actor or entity that is making these changes.",
            ),
            (
                "fieldValidation",
                "string",
                "What the server does about unknown fields: Ignore drops them, Warn also sends a warning, Strict refuses \
                 the request.",
            ),
        ]);
    }
    if action == "patch" {
        names.push((
            "force",
            "boolean",
            "Force is going to \"force\" Apply requests. It must be unset for non-apply patch requests.",
        ));
    }
    if action.starts_with("delete") {
        names.extend([
            (
                "dryRun",
                "string",
                "When present, indicates that modifications should not be persisted. The only valid value is All.",
            ),
            ("gracePeriodSeconds", "integer", "Seconds before the object is deleted."),
            (
                "propagationPolicy",
                "string",
                "Whether and how dependents are deleted: Orphan, Background or Foreground.",
            ),
        ]);
    }
    if list {
        names.extend([
            (
                "allowWatchBookmarks",
                "boolean",
                "Whether a watch sends BOOKMARK events.",
            ),
            ("continue", "string", "Where a list that came in pieces goes on."),
            (
                "fieldSelector",
                "string",
                "Restricts the objects by their fields.",
            ),
            (
                "labelSelector",
                "string",
                "Restricts the objects by their labels.",
            ),
            ("limit", "integer", "How many objects to return at most."),
            (
                "resourceVersion",
                "string",
                "The version that the answer must not be older than.",
            ),
            (
                "resourceVersionMatch",
                "string",
                "How resourceVersion is applied: Exact or NotOlderThan.",
            ),
            (
                "sendInitialEvents",
                "boolean",
                "Whether a watch starts with the existing objects.",
            ),
            ("timeoutSeconds", "integer", "How long the call may take."),
            ("watch", "boolean", "Send changes as they happen."),
        ]);
    }
    names
        .into_iter()
        .map(|(name, kind, description)| {
            json!({
                "name": name,
                "in": "query",
                "description": description,
                "schema": {"type": kind, "uniqueItems": true},
            })
        })
        .collect()
}
