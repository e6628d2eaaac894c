//! Which nodes a pod may be on: selectors, affinity, taints; and whose it is.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::{
    Node, NodeSelectorRequirement, NodeSelectorTerm, PodSpec, Taint, Toleration,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference};

/// The controller of an object.
pub(super) fn controller(meta: &ObjectMeta) -> Option<&OwnerReference> {
    meta.owner_references
        .iter()
        .flatten()
        .find(|owner| owner.controller == Some(true))
}

/// Whether the node has what the pod's `nodeSelector` and required node affinity ask for.
pub(super) fn selects_node(spec: &PodSpec, node: &Node) -> bool {
    let none = BTreeMap::new();
    let labels = node.metadata.labels.as_ref().unwrap_or(&none);
    let selected = spec
        .node_selector
        .iter()
        .flatten()
        .all(|(key, value)| labels.get(key) == Some(value));
    let required = spec
        .affinity
        .as_ref()
        .and_then(|affinity| affinity.node_affinity.as_ref())
        .and_then(|affinity| {
            affinity
                .required_during_scheduling_ignored_during_execution
                .as_ref()
        });
    selected
        && required.is_none_or(|required| {
            required
                .node_selector_terms
                .iter()
                .any(|term| matches(term, node))
        })
}

/// Whether the node fits one term of a node selector. A term without conditions fits nothing.
pub(super) fn matches(term: &NodeSelectorTerm, node: &Node) -> bool {
    let none = BTreeMap::new();
    let labels = node.metadata.labels.as_ref().unwrap_or(&none);
    let expressions = term.match_expressions.as_deref().unwrap_or_default();
    let fields = term.match_fields.as_deref().unwrap_or_default();
    let field = |key: &str| match key {
        "metadata.name" => node.metadata.name.as_deref(),
        _ => None,
    };
    !(expressions.is_empty() && fields.is_empty())
        && expressions
            .iter()
            .all(|requirement| fits(requirement, labels.get(&requirement.key).map(String::as_str)))
        && fields
            .iter()
            .all(|requirement| fits(requirement, field(&requirement.key)))
}

fn fits(requirement: &NodeSelectorRequirement, value: Option<&str>) -> bool {
    let listed = || {
        let values = requirement.values.iter().flatten();
        value.is_some_and(|value| values.clone().any(|listed| listed == value))
    };
    let compare = |larger: bool| {
        let wanted = requirement
            .values
            .iter()
            .flatten()
            .next()
            .and_then(|v| v.parse::<i64>().ok());
        match (value.and_then(|value| value.parse::<i64>().ok()), wanted) {
            (Some(value), Some(wanted)) => value != wanted && (value > wanted) == larger,
            _ => false,
        }
    };
    match requirement.operator.as_str() {
        "In" => listed(),
        "NotIn" => !listed(),
        "Exists" => value.is_some(),
        "DoesNotExist" => value.is_none(),
        "Gt" => compare(true),
        "Lt" => compare(false),
        _ => false,
    }
}

/// Whether one of the tolerations is for this taint.
pub(super) fn tolerates(tolerations: &[Toleration], taint: &Taint) -> bool {
    toleration(tolerations, taint).is_some()
}

/// The first toleration for this taint.
pub(super) fn toleration<'a>(tolerations: &'a [Toleration], taint: &Taint) -> Option<&'a Toleration> {
    tolerations.iter().find(|toleration| {
        let text = |text: &Option<String>| text.clone().unwrap_or_default();
        let (key, effect) = (text(&toleration.key), text(&toleration.effect));
        let same_value = || text(&toleration.value) == text(&taint.value);
        let operator = text(&toleration.operator);
        (effect.is_empty() || effect == taint.effect)
            && (key.is_empty() && operator == "Exists" || key == taint.key)
            && (operator == "Exists" || (operator.is_empty() || operator == "Equal") && same_value())
    })
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn of<T: k8s_openapi::serde::de::DeserializeOwned>(value: Value) -> T {
        serde_json::from_value(value).unwrap()
    }

    #[test]
    fn nodes_are_selected_by_labels_names_and_numbers() {
        let node: Node = of(json!({"metadata": {"name": "n1", "labels": {"disk": "ssd", "cores": "8"}}}));
        let spec = |spec: Value| -> PodSpec {
            let mut full = json!({"containers": []});
            json_patch::merge(&mut full, &spec);
            of(full)
        };
        let affinity = |terms: Value| {
            spec(json!({"affinity": {"nodeAffinity": {
                "requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": terms},
            }}}))
        };
        let term = |key: &str, operator: &str, values: Value| {
            affinity(json!([{"matchExpressions": [{"key": key, "operator": operator, "values": values}]}]))
        };
        for (spec, wanted) in [
            (spec(json!({})), true),
            (spec(json!({"nodeSelector": {"disk": "ssd"}})), true),
            (spec(json!({"nodeSelector": {"disk": "hdd"}})), false),
            (term("disk", "In", json!(["ssd", "nvme"])), true),
            (term("disk", "NotIn", json!(["ssd"])), false),
            (term("gpu", "NotIn", json!(["x"])), true),
            (term("gpu", "Exists", Value::Null), false),
            (term("gpu", "DoesNotExist", Value::Null), true),
            (term("cores", "Gt", json!(["4"])), true),
            (term("cores", "Lt", json!(["8"])), false),
            (affinity(json!([{}])), false),
            (
                affinity(
                    json!([{"matchFields": [{"key": "metadata.name", "operator": "In", "values": ["n1"]}]}]),
                ),
                true,
            ),
        ] {
            assert_eq!(selects_node(&spec, &node), wanted, "{spec:?}");
        }
    }

    #[test]
    fn taints_are_tolerated() {
        let taint: Taint = of(json!({"key": "k", "value": "v", "effect": "NoSchedule"}));
        for (toleration, wanted) in [
            (json!({"operator": "Exists"}), true),
            (json!({"key": "k", "operator": "Exists"}), true),
            (json!({"key": "k", "value": "v"}), true),
            (json!({"key": "k", "value": "w"}), false),
            (json!({"key": "other", "operator": "Exists"}), false),
            (
                json!({"key": "k", "operator": "Exists", "effect": "NoExecute"}),
                false,
            ),
        ] {
            assert_eq!(
                tolerates(&[of(toleration.clone())], &taint),
                wanted,
                "{toleration}"
            );
        }
    }
}
