//! The roles that every cluster has (kube-apiserver `plugin/pkg/auth/authorizer/rbac/bootstrappolicy`), for what is served.

use serde_json::{Value, json};

const READ: [&str; 3] = ["get", "list", "watch"];
const WRITE: [&str; 5] = ["create", "delete", "deletecollection", "patch", "update"];

fn rule(group: &str, resources: &[&str], verbs: &[&str]) -> Value {
    json!({"apiGroups": [group], "resources": resources, "verbs": verbs})
}

/// Kinds that users of a namespace read; Secrets and roles are not among them.
const SEEN: &[(&str, &[&str])] = &[
    (
        "",
        &[
            "configmaps",
            "endpoints",
            "events",
            "namespaces",
            "namespaces/status",
            "pods",
            "pods/log",
            "pods/status",
            "replicationcontrollers",
            "replicationcontrollers/scale",
            "replicationcontrollers/status",
            "serviceaccounts",
            "services",
            "services/status",
        ],
    ),
    (
        "apps",
        &[
            "daemonsets",
            "daemonsets/status",
            "deployments",
            "deployments/scale",
            "deployments/status",
            "replicasets",
            "replicasets/scale",
            "replicasets/status",
        ],
    ),
    ("discovery.k8s.io", &["endpointslices"]),
    ("networking.k8s.io", &["networkpolicies"]),
];

/// Kinds that users of a namespace write.
const CHANGED: &[(&str, &[&str])] = &[
    (
        "",
        &[
            "configmaps",
            "pods",
            "pods/attach",
            "pods/exec",
            "pods/portforward",
            "pods/proxy",
            "replicationcontrollers",
            "replicationcontrollers/scale",
            "secrets",
            "serviceaccounts",
            "services",
            "services/proxy",
        ],
    ),
    (
        "apps",
        &[
            "daemonsets",
            "deployments",
            "deployments/rollback",
            "deployments/scale",
            "replicasets",
            "replicasets/scale",
        ],
    ),
    ("networking.k8s.io", &["networkpolicies"]),
];

fn view() -> Vec<Value> {
    SEEN.iter()
        .map(|(group, resources)| rule(group, resources, &READ))
        .collect()
}

fn edit() -> Vec<Value> {
    let mut rules = view();
    rules.extend(
        CHANGED
            .iter()
            .map(|(group, resources)| rule(group, resources, &WRITE)),
    );
    rules.push(rule("", &["secrets"], &READ));
    rules.push(rule("", &["pods/eviction", "serviceaccounts/token"], &["create"]));
    rules.push(rule("", &["serviceaccounts"], &["impersonate"]));
    rules.push(rule(
        "coordination.k8s.io",
        &["leases"],
        &[&READ[..], &WRITE[..]].concat(),
    ));
    rules
}

fn admin() -> Vec<Value> {
    let mut rules = edit();
    let all = [&READ[..], &WRITE[..]].concat();
    rules.push(rule(
        "rbac.authorization.k8s.io",
        &["roles", "rolebindings"],
        &all,
    ));
    rules.push(rule(
        "authorization.k8s.io",
        &["localsubjectaccessreviews"],
        &["create"],
    ));
    rules
}

/// Reading everything that an agent of the network reads.
fn proxier() -> Vec<Value> {
    vec![
        rule("", &["services", "endpoints", "nodes"], &READ),
        rule("discovery.k8s.io", &["endpointslices"], &READ),
        rule("networking.k8s.io", &["servicecidrs"], &READ),
        rule("", &["events"], &["create", "patch", "update"]),
    ]
}

/// The cluster roles by name.
pub(super) fn cluster_roles() -> Vec<(&'static str, Vec<Value>)> {
    let get = |paths: &[&str]| json!({"nonResourceURLs": paths, "verbs": ["get"]});
    let every = vec![
        json!({"apiGroups": ["*"], "resources": ["*"], "verbs": ["*"]}),
        json!({"nonResourceURLs": ["*"], "verbs": ["*"]}),
    ];
    vec![
        ("cluster-admin", every),
        ("admin", admin()),
        ("edit", edit()),
        ("view", view()),
        (
            "system:basic-user",
            vec![
                rule(
                    "authorization.k8s.io",
                    &["selfsubjectaccessreviews", "selfsubjectrulesreviews"],
                    &["create"],
                ),
                rule("authentication.k8s.io", &["selfsubjectreviews"], &["create"]),
            ],
        ),
        (
            "system:discovery",
            vec![get(&[
                "/api",
                "/api/*",
                "/apis",
                "/apis/*",
                "/healthz",
                "/livez",
                "/openapi",
                "/openapi/*",
                "/readyz",
                "/version",
                "/version/",
            ])],
        ),
        (
            "system:public-info-viewer",
            vec![get(&["/healthz", "/livez", "/readyz", "/version", "/version/"])],
        ),
        ("system:node-proxier", proxier()),
        (
            "system:node-bootstrapper",
            vec![rule(
                "certificates.k8s.io",
                &["certificatesigningrequests"],
                &["create", "get", "list", "watch"],
            )],
        ),
    ]
}

/// Binding, role, and its subjects: kind and name of each.
type Binding = (
    &'static str,
    &'static str,
    &'static [(&'static str, &'static str)],
);

/// Which groups and users have which cluster role.
pub(super) const BINDINGS: &[Binding] = &[
    ("cluster-admin", "cluster-admin", &[("Group", "system:masters")]),
    (
        "system:basic-user",
        "system:basic-user",
        &[("Group", "system:authenticated")],
    ),
    (
        "system:discovery",
        "system:discovery",
        &[("Group", "system:authenticated")],
    ),
    (
        "system:public-info-viewer",
        "system:public-info-viewer",
        &[
            ("Group", "system:authenticated"),
            ("Group", "system:unauthenticated"),
        ],
    ),
    (
        "system:node-proxier",
        "system:node-proxier",
        &[("User", "system:kube-proxy")],
    ),
];

/// A role or binding as it is stored at the start.
pub(super) fn object(kind: &str, name: &str, more: &Value) -> Value {
    let mut object = json!({
        "apiVersion": "rbac.authorization.k8s.io/v1", "kind": kind,
        "metadata": {
            "name": name,
            "labels": {"kubernetes.io/bootstrapping": "rbac-defaults"},
            "annotations": {"rbac.authorization.kubernetes.io/autoupdate": "true"},
        },
    });
    json_patch::merge(&mut object, more);
    object
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::resource::RESOURCES;

    /// Whether everything that the rules name is something that is served, or will be by a node's agent.
    fn known(group: &str, resource: &str) -> bool {
        const AGENT: [&str; 7] = [
            "log",
            "attach",
            "exec",
            "portforward",
            "proxy",
            "rollback",
            "token",
        ];
        let (plural, sub) = resource.split_once('/').unwrap_or((resource, ""));
        RESOURCES.iter().any(|r| {
            r.group == group
                && r.plural == plural
                && (sub.is_empty() || AGENT.contains(&sub) || r.subresource(sub).is_some())
        })
    }

    #[test]
    fn roles_name_what_exists() {
        for (name, rules) in cluster_roles() {
            for rule in rules {
                let group = rule["apiGroups"][0].as_str().unwrap_or("*");
                if group == "*" || group.starts_with("auth") || group.starts_with("cert") {
                    continue;
                }
                for resource in rule["resources"].as_array().unwrap() {
                    assert!(known(group, resource.as_str().unwrap()), "{name}: {resource}");
                }
            }
        }
        for (_, role, _) in BINDINGS {
            assert!(cluster_roles().iter().any(|(name, _)| name == role));
        }
    }

    #[test]
    fn viewers_see_no_secrets_and_editors_grant_nothing() {
        let names = |rules: Vec<Value>| -> String { Value::from(rules).to_string() };
        assert!(!names(view()).contains("\"secrets\"") && !names(view()).contains("create"));
        assert!(names(edit()).contains("\"secrets\"") && !names(edit()).contains("rolebindings"));
        assert!(names(admin()).contains("rolebindings"));
    }
}
