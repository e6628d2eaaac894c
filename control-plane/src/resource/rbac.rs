//! Rules of Role, ClusterRole and their bindings (`pkg/apis/rbac/validation`).

use serde_json::Value;

use super::rules::{default, list, list_mut};
use crate::error::Cause;

const GROUP: &str = "rbac.authorization.k8s.io";

/// Names of roles may hold anything that fits into one segment of a path, such as `system:node`.
pub(super) fn path_segment(name: &str) -> Vec<String> {
    if name == "." || name == ".." {
        return vec![format!("may not be '{name}'")];
    }
    ['/', '%']
        .into_iter()
        .filter(|c| name.contains(*c))
        .map(|c| format!("may not contain '{c}'"))
        .collect()
}

/// The rules of a role are null rather than missing.
pub(super) fn role_defaults(object: &mut Value) {
    default(object, "rules", Value::Null);
}

/// What is wrong with a Role.
pub(super) fn validate_role(object: &Value) -> Vec<Cause> {
    rules(object, true)
}

/// What is wrong with a ClusterRole.
pub(super) fn validate_cluster_role(object: &Value) -> Vec<Cause> {
    rules(object, false)
}

fn rules(object: &Value, namespaced: bool) -> Vec<Cause> {
    let mut causes = Vec::new();
    let some = |rule: &Value, field: &str| list(&rule[field]).next().is_some();
    for (i, rule) in list(&object["rules"]).enumerate() {
        let path = format!("rules[{i}]");
        if !some(rule, "verbs") {
            causes.push(Cause::required(
                format!("{path}.verbs"),
                "verbs must contain at least one value",
            ));
        }
        if some(rule, "nonResourceURLs") {
            let field = format!("{path}.nonResourceURLs");
            if namespaced {
                let why = "namespaced rules cannot apply to non-resource URLs";
                causes.push(Cause::invalid(field.clone(), &rule["nonResourceURLs"], why));
            }
            if ["apiGroups", "resources", "resourceNames"]
                .iter()
                .any(|f| some(rule, f))
            {
                let why = "rules cannot apply to both regular resources and non-resource URLs";
                causes.push(Cause::invalid(field, &rule["nonResourceURLs"], why));
            }
            continue;
        }
        for (field, why) in [
            ("apiGroups", "resource rules must supply at least one api group"),
            ("resources", "resource rules must supply at least one resource"),
        ] {
            if !some(rule, field) {
                causes.push(Cause::required(format!("{path}.{field}"), why));
            }
        }
    }
    causes
}

/// Users, groups and roles are of this group unless the client says otherwise.
pub(super) fn binding_defaults(object: &mut Value) {
    if object["roleRef"].is_object() {
        default(&mut object["roleRef"], "apiGroup", GROUP);
    }
    let namespace = object["metadata"]["namespace"].clone();
    for subject in list_mut(object, "subjects") {
        match subject["kind"].as_str() {
            Some("User" | "Group") => default(subject, "apiGroup", GROUP),
            Some("ServiceAccount") if namespace.is_string() => {
                default(subject, "namespace", namespace.clone());
            }
            _ => {}
        }
    }
}

/// What is wrong with a RoleBinding.
pub(super) fn validate_role_binding(object: &Value) -> Vec<Cause> {
    binding(object, &["ClusterRole", "Role"])
}

/// What is wrong with a ClusterRoleBinding.
pub(super) fn validate_cluster_role_binding(object: &Value) -> Vec<Cause> {
    binding(object, &["ClusterRole"])
}

fn binding(object: &Value, roles: &[&str]) -> Vec<Cause> {
    let mut causes = Vec::new();
    let role = &object["roleRef"];
    if role["apiGroup"] != GROUP {
        causes.push(Cause::not_supported(
            "roleRef.apiGroup",
            &role["apiGroup"],
            &[GROUP],
        ));
    }
    if !roles.iter().any(|kind| role["kind"] == *kind) {
        causes.push(Cause::not_supported("roleRef.kind", &role["kind"], roles));
    }
    match role["name"].as_str().filter(|n| !n.is_empty()) {
        None => causes.push(Cause::required("roleRef.name", "")),
        Some(name) => {
            for why in path_segment(name) {
                causes.push(Cause::invalid("roleRef.name", &name.into(), &why));
            }
        }
    }
    for (i, subject) in list(&object["subjects"]).enumerate() {
        let path = format!("subjects[{i}]");
        if subject["name"].as_str().unwrap_or_default().is_empty() {
            causes.push(Cause::required(format!("{path}.name"), ""));
        }
        let group = subject["apiGroup"].as_str().unwrap_or_default();
        let wanted = match subject["kind"].as_str().unwrap_or_default() {
            "ServiceAccount" => {
                if subject["namespace"].as_str().unwrap_or_default().is_empty() {
                    causes.push(Cause::required(format!("{path}.namespace"), ""));
                }
                ""
            }
            "User" | "Group" => GROUP,
            _ => {
                causes.push(Cause::not_supported(
                    format!("{path}.kind"),
                    &subject["kind"],
                    &["Group", "ServiceAccount", "User"],
                ));
                continue;
            }
        };
        if group != wanted {
            causes.push(Cause::not_supported(
                format!("{path}.apiGroup"),
                &group.into(),
                &[wanted],
            ));
        }
    }
    causes
}

/// A binding stays with its role.
pub(super) fn validate_binding_update(old: &Value, new: &Value) -> Vec<Cause> {
    if old["roleRef"] == new["roleRef"] {
        Vec::new()
    } else {
        vec![Cause::invalid(
            "roleRef",
            &new["roleRef"],
            "cannot change roleRef",
        )]
    }
}
