//! Roles: what the bindings of a user allow (kube-apiserver `plugin/pkg/auth/authorizer/rbac`).

use serde_json::{Value, json};

use super::auth::{Ask, User};
use super::{Api, codec, write};
use crate::error::ApiError;
use crate::resource::ResourceInfo;

const GROUP: &str = "rbac.authorization.k8s.io";

fn list<'a>(value: &'a Value, field: &str) -> impl Iterator<Item = &'a str> {
    value[field]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(Value::as_str)
}

fn any(rule: &Value, field: &str, wanted: &str) -> bool {
    list(rule, field).any(|item| item == "*" || item == wanted)
}

/// Whether a rule allows it.
pub(super) fn allows(rule: &Value, ask: &Ask) -> bool {
    match ask {
        Ask::Resource {
            verb,
            group,
            resource,
            name,
            ..
        } => {
            let sub = resource.split_once('/').map(|(_, sub)| sub);
            let of_resource = list(rule, "resources").any(|item| {
                item == "*" || item == resource || sub.is_some_and(|sub| item.strip_prefix("*/") == Some(sub))
            });
            let mut names = list(rule, "resourceNames").peekable();
            let of_name = names.peek().is_none() || !name.is_empty() && names.any(|item| item == name);
            any(rule, "verbs", verb) && any(rule, "apiGroups", group) && of_resource && of_name
        }
        Ask::Path { verb, path } => {
            let of_path = list(rule, "nonResourceURLs").any(|item| {
                item == "*"
                    || item == path
                    || item
                        .strip_suffix('*')
                        .is_some_and(|start| path.starts_with(start))
            });
            any(rule, "verbs", verb) && of_path
        }
    }
}

fn is_subject(user: &User, subject: &Value, namespace: &str) -> bool {
    let name = subject["name"].as_str().unwrap_or_default();
    match subject["kind"].as_str().unwrap_or_default() {
        "User" => user.name == name,
        "Group" => user.in_group(name),
        "ServiceAccount" => {
            let namespace = subject["namespace"].as_str().unwrap_or(namespace);
            user.name == format!("system:serviceaccount:{namespace}:{name}")
        }
        _ => false,
    }
}

impl Api {
    async fn all(&self, plural: &str, namespace: &str) -> Result<Vec<Value>, ApiError> {
        let target = write::collection(GROUP, plural, namespace)?;
        self.items(&target)
            .await?
            .iter()
            .map(|item| codec::decode(target.resource, item.revision, &item.value))
            .collect()
    }

    /// The rules of the role that a binding names.
    async fn rules_of(&self, binding: &Value, namespace: &str) -> Result<Vec<Value>, ApiError> {
        let role = &binding["roleRef"];
        let (plural, namespace) = match role["kind"].as_str() {
            Some("ClusterRole") => ("clusterroles", ""),
            _ => ("roles", namespace),
        };
        let target = write::collection(GROUP, plural, namespace)?;
        let Some(stored) = self
            .find(&target, role["name"].as_str().unwrap_or_default())
            .await?
        else {
            return Ok(Vec::new());
        };
        let role = codec::decode(target.resource, stored.revision, &stored.value)?;
        Ok(role["rules"].as_array().cloned().unwrap_or_default())
    }

    /// All rules that hold for the user in the namespace (none: for what is in no namespace).
    pub(super) async fn rules_for(&self, user: &User, namespace: &str) -> Result<Vec<Value>, ApiError> {
        if user.is_master() {
            return Ok(vec![
                json!({"verbs": ["*"], "apiGroups": ["*"], "resources": ["*"]}),
                json!({"verbs": ["*"], "nonResourceURLs": ["*"]}),
            ]);
        }
        let mut rules = Vec::new();
        let mut scopes = vec![("clusterrolebindings", "")];
        if !namespace.is_empty() {
            scopes.push(("rolebindings", namespace));
        }
        for (plural, scope) in scopes {
            for binding in self.all(plural, scope).await? {
                let subjects = binding["subjects"].as_array().into_iter().flatten();
                if subjects
                    .into_iter()
                    .any(|subject| is_subject(user, subject, scope))
                {
                    rules.extend(self.rules_of(&binding, scope).await?);
                }
            }
        }
        Ok(rules)
    }

    /// Whether a role of the user allows it.
    pub(super) async fn role_allows(&self, user: &User, ask: &Ask) -> Result<bool, ApiError> {
        let namespace = match ask {
            Ask::Resource { namespace, .. } => namespace.as_str(),
            Ask::Path { .. } => "",
        };
        let rules = self.rules_for(user, namespace).await?;
        Ok(rules.iter().any(|rule| allows(rule, ask)))
    }

    /// Refuses to hand out rights that the user does not have.
    ///
    /// # Errors
    /// 403 that names what is missing.
    pub(super) async fn check_escalation(
        &self,
        user: &User,
        r: &ResourceInfo,
        namespace: &str,
        object: &Value,
    ) -> Result<(), ApiError> {
        if r.group != GROUP || user.is_master() {
            return Ok(());
        }
        let name = object["metadata"]["name"].as_str().unwrap_or_default();
        let (verb, plural, role, rules) = match r.kind {
            "Role" | "ClusterRole" => {
                let rules = object["rules"].as_array().cloned().unwrap_or_default();
                ("escalate", r.plural, name, rules)
            }
            _ => {
                let role = &object["roleRef"];
                let plural = if role["kind"] == "ClusterRole" {
                    "clusterroles"
                } else {
                    "roles"
                };
                let rules = self.rules_of(object, namespace).await?;
                ("bind", plural, role["name"].as_str().unwrap_or_default(), rules)
            }
        };
        let direct = Ask::Resource {
            verb: verb.to_owned(),
            group: GROUP.to_owned(),
            resource: plural.to_owned(),
            namespace: namespace.to_owned(),
            name: role.to_owned(),
        };
        let own = self.rules_for(user, namespace).await?;
        if own.iter().any(|rule| allows(rule, &direct)) {
            return Ok(());
        }
        let missing: Vec<String> = rules
            .iter()
            .flat_map(asks)
            .filter(|ask| !own.iter().any(|rule| covers(rule, ask)))
            .map(|ask| match ask {
                Ask::Resource {
                    verb,
                    group,
                    resource,
                    ..
                } => format!("{{APIGroups:[{group:?}], Resources:[{resource:?}], Verbs:[{verb:?}]}}"),
                Ask::Path { verb, path } => format!("{{NonResourceURLs:[{path:?}], Verbs:[{verb:?}]}}"),
            })
            .collect();
        if missing.is_empty() {
            return Ok(());
        }
        let why = format!(
            "user {:?} (groups={:?}) is attempting to grant RBAC permissions not currently held:\n{}",
            user.name,
            user.groups,
            missing.join("\n")
        );
        Err(ApiError::forbidden(r, name, &why))
    }
}

/// Each single right of a rule. A wildcard stays one, which only a wildcard covers.
fn asks(rule: &Value) -> Vec<Ask> {
    let mut found = Vec::new();
    for verb in list(rule, "verbs") {
        for path in list(rule, "nonResourceURLs") {
            found.push(Ask::Path {
                verb: verb.to_owned(),
                path: path.to_owned(),
            });
        }
        for group in list(rule, "apiGroups") {
            for resource in list(rule, "resources") {
                let names: Vec<&str> = list(rule, "resourceNames").collect();
                let names = if names.is_empty() { vec![""] } else { names };
                found.extend(names.into_iter().map(|name| Ask::Resource {
                    verb: verb.to_owned(),
                    group: group.to_owned(),
                    resource: resource.to_owned(),
                    namespace: String::new(),
                    name: name.to_owned(),
                }));
            }
        }
    }
    found
}

fn covers(rule: &Value, ask: &Ask) -> bool {
    allows(rule, ask)
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;

    fn ask(verb: &str, group: &str, resource: &str, name: &str) -> Ask {
        Ask::Resource {
            verb: verb.into(),
            group: group.into(),
            resource: resource.into(),
            namespace: "d".into(),
            name: name.into(),
        }
    }

    #[rstest]
    #[case(json!({"verbs": ["get"], "apiGroups": [""], "resources": ["pods"]}), ask("get", "", "pods", "a"), true)]
    #[case(json!({"verbs": ["get"], "apiGroups": [""], "resources": ["pods"]}), ask("list", "", "pods", ""), false)]
    #[case(json!({"verbs": ["get"], "apiGroups": [""], "resources": ["pods"]}), ask("get", "apps", "pods", ""), false)]
    #[case(json!({"verbs": ["get"], "apiGroups": [""], "resources": ["pods"]}), ask("get", "", "pods/log", "a"), false)]
    #[case(json!({"verbs": ["*"], "apiGroups": ["*"], "resources": ["*"]}), ask("get", "apps", "a/status", "x"), true)]
    #[case(json!({"verbs": ["get"], "apiGroups": [""], "resources": ["*/scale"]}), ask("get", "", "rc/scale", "x"), true)]
    #[case(json!({"verbs": ["get"], "apiGroups": [""], "resources": ["cm"], "resourceNames": ["a"]}), ask("get", "", "cm", "a"), true)]
    #[case(json!({"verbs": ["get"], "apiGroups": [""], "resources": ["cm"], "resourceNames": ["a"]}), ask("get", "", "cm", "b"), false)]
    #[case(json!({"verbs": ["list"], "apiGroups": [""], "resources": ["cm"], "resourceNames": ["a"]}), ask("list", "", "cm", ""), false)]
    #[case(json!({"verbs": ["get"], "nonResourceURLs": ["/api/*"]}), Ask::Path { verb: "get".into(), path: "/api/v1".into() }, true)]
    #[case(json!({"verbs": ["get"], "nonResourceURLs": ["/api"]}), Ask::Path { verb: "get".into(), path: "/apis".into() }, false)]
    #[case(json!({"verbs": ["get"], "nonResourceURLs": ["*"]}), ask("get", "", "pods", ""), false)]
    #[case(json!({}), ask("get", "", "pods", ""), false)]
    fn rules_allow(#[case] rule: Value, #[case] ask: Ask, #[case] wanted: bool) {
        assert_eq!(allows(&rule, &ask), wanted);
    }

    #[test]
    fn a_rule_is_covered_by_nothing_smaller() {
        let rule = json!({"verbs": ["get", "list"], "apiGroups": [""], "resources": ["pods"]});
        let every = json!({"verbs": ["*"], "apiGroups": [""], "resources": ["pods"]});
        let named = json!({"verbs": ["get", "list"], "apiGroups": [""], "resources": ["pods"], "resourceNames": ["a"]});
        let covered = |small: &Value, large: &Value| asks(small).iter().all(|ask| covers(large, ask));
        assert!(covered(&rule, &every) && covered(&named, &rule) && covered(&rule, &rule));
        assert!(!covered(&every, &rule) && !covered(&rule, &named));
    }
}
