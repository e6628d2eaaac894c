//! Rules of what makes pods: ReplicationController, ReplicaSet, Deployment, DaemonSet (`pkg/apis/apps/validation`).

use serde_json::{Value, json};

use super::rules::{child, default, immutable, list, not_negative};
use super::{meta, names, pod};
use crate::error::Cause;

/// Completes a new ReplicationController: selector and labels come from its template.
pub(super) fn replication_controller_defaults(rc: &mut Value) {
    replicas_and_template(rc);
    let labels = rc["spec"]["template"]["metadata"]["labels"].clone();
    if labels.is_object() {
        if rc["spec"]["selector"].is_null() {
            rc["spec"]["selector"] = labels.clone();
        }
        if rc["metadata"]["labels"].is_null() {
            rc["metadata"]["labels"] = labels;
        }
    }
}

fn replicas_and_template(object: &mut Value) {
    let Some(spec) = child(object, "spec") else { return };
    default(spec, "replicas", 1);
    template(spec);
}

fn template(spec: &mut Value) {
    if spec["template"].is_object() {
        pod::template_defaults(&mut spec["template"]);
    }
}

/// What is wrong with a ReplicationController.
pub(super) fn validate_replication_controller(rc: &Value) -> Vec<Cause> {
    let mut causes = Vec::new();
    let spec = &rc["spec"];
    if spec["selector"].as_object().is_none_or(serde_json::Map::is_empty) {
        causes.push(Cause::required("spec.selector", ""));
    }
    not_negative(spec, "replicas", "spec", &mut causes);
    not_negative(spec, "minReadySeconds", "spec", &mut causes);
    let selector = json!({"matchLabels": spec["selector"]});
    validate_template(spec, &selector, &mut causes);
    causes
}

pub(super) fn create_replicas_status(object: &mut Value) {
    object["status"] = json!({"replicas": 0});
}

/// Completes a ReplicaSet.
pub(super) fn replica_set_defaults(object: &mut Value) {
    replicas_and_template(object);
}

/// What is wrong with a ReplicaSet.
pub(super) fn validate_replica_set(object: &Value) -> Vec<Cause> {
    let mut causes = Vec::new();
    let spec = &object["spec"];
    not_negative(spec, "replicas", "spec", &mut causes);
    not_negative(spec, "minReadySeconds", "spec", &mut causes);
    validate_selector(spec, "ReplicaSet", &mut causes);
    validate_template(spec, &spec["selector"], &mut causes);
    causes
}

/// Completes a Deployment.
pub(super) fn deployment_defaults(object: &mut Value) {
    replicas_and_template(object);
    let Some(spec) = child(object, "spec") else { return };
    default(spec, "revisionHistoryLimit", 10);
    default(spec, "progressDeadlineSeconds", 600);
    let Some(strategy) = child(spec, "strategy") else {
        return;
    };
    default(strategy, "type", "RollingUpdate");
    if strategy["type"] == "RollingUpdate"
        && let Some(rolling) = child(strategy, "rollingUpdate")
    {
        default(rolling, "maxUnavailable", "25%");
        default(rolling, "maxSurge", "25%");
    }
}

pub(super) fn create_empty_status(object: &mut Value) {
    object["status"] = json!({});
}

/// What is wrong with a Deployment.
pub(super) fn validate_deployment(object: &Value) -> Vec<Cause> {
    let mut causes = Vec::new();
    let spec = &object["spec"];
    for field in [
        "replicas",
        "minReadySeconds",
        "revisionHistoryLimit",
        "progressDeadlineSeconds",
    ] {
        not_negative(spec, field, "spec", &mut causes);
    }
    validate_selector(spec, "deployment", &mut causes);
    validate_template(spec, &spec["selector"], &mut causes);
    let strategy = &spec["strategy"];
    match strategy["type"].as_str().unwrap_or_default() {
        "RollingUpdate" => rolling(
            &strategy["rollingUpdate"],
            "spec.strategy.rollingUpdate",
            &mut causes,
        ),
        "Recreate" if !strategy["rollingUpdate"].is_null() => causes.push(Cause::forbidden(
            "spec.strategy.rollingUpdate",
            "may not be specified when strategy `type` is 'Recreate'",
        )),
        "Recreate" => {}
        _ => causes.push(Cause::not_supported(
            "spec.strategy",
            strategy,
            &["Recreate", "RollingUpdate"],
        )),
    }
    if let Some(deadline) = spec["progressDeadlineSeconds"].as_i64()
        && deadline >= 0
        && deadline <= spec["minReadySeconds"].as_i64().unwrap_or(0)
    {
        causes.push(Cause::invalid(
            "spec.progressDeadlineSeconds",
            &deadline.into(),
            "must be greater than minReadySeconds",
        ));
    }
    causes
}

/// Selectors of these kinds never change.
pub(super) fn validate_selector_update(old: &Value, new: &Value) -> Vec<Cause> {
    let mut causes = Vec::new();
    immutable(
        &old["spec"]["selector"],
        &new["spec"]["selector"],
        "spec.selector",
        &mut causes,
    );
    causes
}

/// Completes a DaemonSet.
pub(super) fn daemon_set_defaults(object: &mut Value) {
    let Some(spec) = child(object, "spec") else { return };
    template(spec);
    default(spec, "revisionHistoryLimit", 10);
    let Some(strategy) = child(spec, "updateStrategy") else {
        return;
    };
    default(strategy, "type", "RollingUpdate");
    if strategy["type"] == "RollingUpdate"
        && let Some(rolling) = child(strategy, "rollingUpdate")
    {
        default(rolling, "maxUnavailable", 1);
        default(rolling, "maxSurge", 0);
    }
}

pub(super) fn create_daemon_set(object: &mut Value) {
    object["metadata"]["annotations"]["deprecated.daemonset.template.generation"] = "1".into();
    object["status"] = json!({
        "currentNumberScheduled": 0, "numberMisscheduled": 0, "desiredNumberScheduled": 0, "numberReady": 0,
    });
}

/// What is wrong with a DaemonSet.
pub(super) fn validate_daemon_set(object: &Value) -> Vec<Cause> {
    let mut causes = Vec::new();
    let spec = &object["spec"];
    not_negative(spec, "minReadySeconds", "spec", &mut causes);
    not_negative(spec, "revisionHistoryLimit", "spec", &mut causes);
    validate_selector(spec, "daemonset", &mut causes);
    validate_template(spec, &spec["selector"], &mut causes);
    let strategy = &spec["updateStrategy"];
    match strategy["type"].as_str().unwrap_or_default() {
        "OnDelete" => {}
        "RollingUpdate" => rolling(
            &strategy["rollingUpdate"],
            "spec.updateStrategy.rollingUpdate",
            &mut causes,
        ),
        _ => causes.push(Cause::not_supported(
            "spec.updateStrategy",
            strategy,
            &["OnDelete", "RollingUpdate"],
        )),
    }
    causes
}

fn rolling(rolling: &Value, path: &str, causes: &mut Vec<Cause>) {
    let mut zeros = 0;
    for field in ["maxUnavailable", "maxSurge"] {
        let value = &rolling[field];
        let number = match value {
            Value::Number(number) => number.as_i64(),
            Value::String(text) => match text.strip_suffix('%').map(str::parse::<u32>) {
                Some(Ok(percent)) => {
                    if percent > 100 && field == "maxUnavailable" {
                        causes.push(Cause::invalid(
                            format!("{path}.{field}"),
                            value,
                            "must not be greater than 100%",
                        ));
                    }
                    Some(i64::from(percent))
                }
                _ => {
                    causes.push(Cause::invalid(
                        format!("{path}.{field}"),
                        value,
                        "must be an integer or percentage (e.g '5%%')",
                    ));
                    Some(1)
                }
            },
            _ => Some(0),
        };
        not_negative(rolling, field, path, causes);
        zeros += usize::from(number == Some(0));
    }
    if zeros == 2 {
        causes.push(Cause::invalid(
            format!("{path}.maxUnavailable"),
            &rolling["maxUnavailable"],
            "may not be 0 when `maxSurge` is 0",
        ));
    }
}

fn validate_selector(spec: &Value, of: &str, causes: &mut Vec<Cause>) {
    let selector = &spec["selector"];
    if selector.is_null() {
        causes.push(Cause::required("spec.selector", ""));
        return;
    }
    label_selector(selector, "spec.selector", causes);
    let nothing = list(&selector["matchExpressions"]).next().is_none()
        && selector["matchLabels"]
            .as_object()
            .is_none_or(serde_json::Map::is_empty);
    if nothing {
        causes.push(Cause::invalid(
            "spec.selector",
            selector,
            &format!("empty selector is invalid for {of}"),
        ));
    }
}

/// What is wrong with a `LabelSelector` at `path`.
pub(super) fn label_selector(selector: &Value, path: &str, causes: &mut Vec<Cause>) {
    meta::labels(&selector["matchLabels"], &format!("{path}.matchLabels"), causes);
    for (i, term) in list(&selector["matchExpressions"]).enumerate() {
        let path = format!("{path}.matchExpressions[{i}]");
        let values = list(&term["values"]).count();
        match term["operator"].as_str().unwrap_or_default() {
            "In" | "NotIn" if values == 0 => causes.push(Cause::required(
                format!("{path}.values"),
                "must be specified when `operator` is 'In' or 'NotIn'",
            )),
            "Exists" | "DoesNotExist" if values > 0 => causes.push(Cause::forbidden(
                format!("{path}.values"),
                "may not be specified when `operator` is 'Exists' or 'DoesNotExist'",
            )),
            "In" | "NotIn" | "Exists" | "DoesNotExist" => {}
            _ => causes.push(Cause::invalid(
                format!("{path}.operator"),
                &term["operator"],
                "not a valid selector operator",
            )),
        }
        let key = term["key"].as_str().unwrap_or_default();
        for why in names::qualified_name(key) {
            causes.push(Cause::invalid(format!("{path}.key"), &key.into(), &why));
        }
        for (j, value) in list(&term["values"]).enumerate() {
            for why in names::label_value(value.as_str().unwrap_or_default()) {
                causes.push(Cause::invalid(format!("{path}.values[{j}]"), value, &why));
            }
        }
    }
}

/// The template of pods that run for ever and that the selector selects.
fn validate_template(spec: &Value, selector: &Value, causes: &mut Vec<Cause>) {
    let template = &spec["template"];
    if template.is_null() {
        causes.push(Cause::required("spec.template", ""));
        return;
    }
    let labels = &template["metadata"]["labels"];
    if !crate::selector::matches_selector(selector, labels) {
        causes.push(Cause::invalid(
            "spec.template.metadata.labels",
            labels,
            "`selector` does not match template `labels`",
        ));
    }
    meta::labels(labels, "spec.template.labels", causes);
    causes.extend(pod::validate_spec(&template["spec"], "spec.template.spec"));
    let policy = &template["spec"]["restartPolicy"];
    if policy != "Always" {
        causes.push(Cause::not_supported(
            "spec.template.spec.restartPolicy",
            policy,
            &["Always"],
        ));
    }
    if !template["spec"]["activeDeadlineSeconds"].is_null() {
        causes.push(Cause::forbidden(
            "spec.template.spec.activeDeadlineSeconds",
            "activeDeadlineSeconds in ReplicaSet is not Supported",
        ));
    }
}
