//! Pods and pod templates: defaults and the little validation that a server without admission plugins needs.

use serde_json::{Map, Value, json};

use super::{ResourceInfo, meta, names};
use crate::error::{ApiError, Cause};

/// Sets a field that was not given.
fn default(map: &mut Map<String, Value>, field: &str, value: impl Into<Value>) {
    if !map.contains_key(field) {
        map.insert(field.to_owned(), value.into());
    }
}

/// Elements of a list field that are objects.
fn objects<'a>(
    map: &'a mut Map<String, Value>,
    field: &str,
) -> impl Iterator<Item = &'a mut Map<String, Value>> {
    map.get_mut(field)
        .and_then(Value::as_array_mut)
        .into_iter()
        .flatten()
        .filter_map(Value::as_object_mut)
}

/// Completes a new Pod as the API and its default admission plugins do. No token volume is added: there is no token
/// controller.
pub(super) fn create(pod: &mut Value) {
    let Some(spec) = pod.get_mut("spec").and_then(Value::as_object_mut) else {
        return;
    };
    let account = spec
        .get("serviceAccountName")
        .or_else(|| spec.get("serviceAccount"))
        .cloned()
        .unwrap_or_else(|| "default".into());
    default(spec, "serviceAccountName", account.clone());
    default(spec, "serviceAccount", account);
    default(spec, "priority", 0);
    default(spec, "preemptionPolicy", "PreemptLowerPriority");
    add_tolerations(spec);
    let qos = qos_class(spec);
    pod["status"] = json!({"phase": "Pending", "qosClass": qos});
}

/// Defaults of a Pod.
pub(super) fn defaults(pod: &mut Value) {
    template_defaults(pod);
    if let Some(spec) = pod.get_mut("spec").and_then(Value::as_object_mut) {
        default(spec, "enableServiceLinks", true);
    }
}

/// Values that the server chose for a pod stay when an update leaves them out.
pub(super) fn keep(old: &Value, new: &mut Value) {
    for field in [
        "enableServiceLinks",
        "serviceAccountName",
        "serviceAccount",
        "priority",
        "preemptionPolicy",
        "tolerations",
        "nodeName",
    ] {
        if new["spec"].get(field).is_none()
            && let Some(value) = old["spec"].get(field)
        {
            new["spec"][field] = value.clone();
        }
    }
}

/// What is wrong with a pod.
pub(super) fn validate(pod: &Value) -> Vec<Cause> {
    validate_spec(&pod["spec"], "spec")
}

/// Completes a changed status. The owner and the end of a pod are not for its node to decide.
pub(super) fn status(old: &Value, new: &mut Value) -> Vec<Cause> {
    if let Some(owners) = old["metadata"].get("ownerReferences") {
        new["metadata"]["ownerReferences"] = owners.clone();
    }
    sync_ips(new);
    let conditions = new
        .get_mut("status")
        .and_then(|s| s.get_mut("conditions"))
        .and_then(Value::as_array_mut);
    // Times of a condition are null rather than missing.
    for condition in conditions.into_iter().flatten().filter_map(Value::as_object_mut) {
        for field in ["lastProbeTime", "lastTransitionTime"] {
            condition.entry(field).or_insert(Value::Null);
        }
    }
    if new["status"].get("qosClass").is_none() && old["status"].get("qosClass").is_some() {
        new["status"]["qosClass"] = old["status"]["qosClass"].clone();
    }
    validate_status(new)
}

/// Defaults that a Pod and the template of a controller share (`SetDefaults_PodSpec`, `SetDefaults_Container`, …).
pub(super) fn template_defaults(pod: &mut Value) {
    let Some(pod) = pod.as_object_mut() else { return };
    default(pod, "spec", json!({}));
    let Some(spec) = pod.get_mut("spec").and_then(Value::as_object_mut) else {
        return;
    };
    let host_network = spec.get("hostNetwork") == Some(&Value::Bool(true));
    for list in ["containers", "initContainers"] {
        for container in objects(spec, list) {
            container_defaults(container, host_network);
        }
    }
    for volume in objects(spec, "volumes") {
        for kind in ["secret", "configMap", "projected", "downwardAPI"] {
            if let Some(source) = volume.get_mut(kind).and_then(Value::as_object_mut) {
                default(source, "defaultMode", 0o644);
            }
        }
        if volume.len() == 1 {
            volume.insert("emptyDir".into(), json!({}));
        }
    }
    default(spec, "restartPolicy", "Always");
    default(spec, "terminationGracePeriodSeconds", 30);
    default(spec, "dnsPolicy", "ClusterFirst");
    default(spec, "securityContext", json!({}));
    default(spec, "schedulerName", "default-scheduler");
}

fn container_defaults(container: &mut Map<String, Value>, host_network: bool) {
    let image = container.get("image").and_then(Value::as_str).unwrap_or_default();
    let policy = if pulls_always(image) {
        "Always"
    } else {
        "IfNotPresent"
    };
    default(container, "imagePullPolicy", policy);
    default(container, "resources", json!({}));
    default(container, "terminationMessagePath", "/dev/termination-log");
    default(container, "terminationMessagePolicy", "File");
    if let Some(resources) = container.get_mut("resources").and_then(Value::as_object_mut)
        && let Some(limits) = resources.get("limits").and_then(Value::as_object).cloned()
    {
        default(resources, "requests", json!({}));
        if let Some(requests) = resources.get_mut("requests").and_then(Value::as_object_mut) {
            for (name, limit) in limits {
                default(requests, &name, limit);
            }
        }
    }
    for port in objects(container, "ports") {
        default(port, "protocol", "TCP");
        if host_network {
            let number = port.get("containerPort").cloned().unwrap_or_else(|| 0.into());
            default(port, "hostPort", number);
        }
    }
    for env in objects(container, "env") {
        let field = env
            .get_mut("valueFrom")
            .and_then(|v| v.get_mut("fieldRef"))
            .and_then(Value::as_object_mut);
        if let Some(field) = field {
            default(field, "apiVersion", "v1");
        }
    }
    for probe in ["livenessProbe", "readinessProbe", "startupProbe"] {
        let Some(probe) = container.get_mut(probe).and_then(Value::as_object_mut) else {
            continue;
        };
        default(probe, "timeoutSeconds", 1);
        default(probe, "periodSeconds", 10);
        default(probe, "successThreshold", 1);
        default(probe, "failureThreshold", 3);
        if let Some(get) = probe.get_mut("httpGet").and_then(Value::as_object_mut) {
            default(get, "path", "/");
            default(get, "scheme", "HTTP");
        }
    }
}

/// Without a tag, or with `latest`, an image may change under its name.
fn pulls_always(image: &str) -> bool {
    if image.contains('@') {
        return false;
    }
    let last = image.rsplit('/').next().unwrap_or(image);
    match last.split_once(':') {
        None => true,
        Some((_, tag)) => tag == "latest",
    }
}

/// A pod leaves a node that is gone for five minutes (admission plugin DefaultTolerationSeconds).
fn add_tolerations(spec: &mut Map<String, Value>) {
    default(spec, "tolerations", json!([]));
    let Some(list) = spec.get_mut("tolerations").and_then(Value::as_array_mut) else {
        return;
    };
    for key in ["node.kubernetes.io/not-ready", "node.kubernetes.io/unreachable"] {
        let tolerated = list.iter().any(|t| {
            let same_key = match t.get("key").and_then(Value::as_str) {
                Some(k) => k == key,
                None => true,
            };
            let same_effect = matches!(t.get("effect").and_then(Value::as_str), None | Some("NoExecute"));
            same_key && same_effect
        });
        if !tolerated {
            list.push(
                json!({"key": key, "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 300}),
            );
        }
    }
}

/// Quality of service class from the requests and limits for CPU and memory.
fn qos_class(spec: &Map<String, Value>) -> &'static str {
    let mut any = false;
    let mut guaranteed = true;
    for list in ["containers", "initContainers"] {
        for container in spec.get(list).and_then(Value::as_array).into_iter().flatten() {
            let resources = &container["resources"];
            for name in ["cpu", "memory"] {
                let limit = resources["limits"].get(name);
                let request = resources["requests"].get(name);
                any |= limit.is_some() || request.is_some();
                guaranteed &= limit.is_some() && (request.is_none() || request == limit);
            }
        }
    }
    match (any, guaranteed) {
        (false, _) => "BestEffort",
        (true, true) => "Guaranteed",
        (true, false) => "Burstable",
    }
}

/// What is wrong with a pod's specification at `field`.
pub(super) fn validate_spec(spec: &Value, field: &str) -> Vec<Cause> {
    let mut causes = Vec::new();
    let containers = spec["containers"].as_array();
    if containers.is_none_or(Vec::is_empty) {
        causes.push(Cause::required(format!("{field}.containers"), ""));
    }
    let mut seen = Vec::new();
    for list in ["initContainers", "containers"] {
        for (i, container) in spec[list].as_array().into_iter().flatten().enumerate() {
            validate_container(container, &format!("{field}.{list}[{i}]"), &mut seen, &mut causes);
        }
    }
    for (name, supported) in [
        ("restartPolicy", &["Always", "OnFailure", "Never"][..]),
        (
            "dnsPolicy",
            &["ClusterFirstWithHostNet", "ClusterFirst", "Default", "None"][..],
        ),
    ] {
        if let Some(value) = spec[name].as_str()
            && !supported.contains(&value)
        {
            causes.push(Cause::not_supported(
                format!("{field}.{name}"),
                &value.into(),
                supported,
            ));
        }
    }
    if let Some(node) = spec["nodeName"].as_str() {
        for why in names::dns1123_subdomain(node) {
            causes.push(Cause::invalid(format!("{field}.nodeName"), &node.into(), &why));
        }
    }
    meta::labels(
        &spec["nodeSelector"],
        &format!("{field}.nodeSelector"),
        &mut causes,
    );
    causes
}

fn validate_container(container: &Value, field: &str, seen: &mut Vec<String>, causes: &mut Vec<Cause>) {
    match container["name"].as_str().filter(|n| !n.is_empty()) {
        None => causes.push(Cause::required(format!("{field}.name"), "")),
        Some(name) => {
            for why in names::dns1123_label(name) {
                causes.push(Cause::invalid(format!("{field}.name"), &name.into(), &why));
            }
            if seen.iter().any(|s| s == name) {
                causes.push(Cause::duplicate(format!("{field}.name"), &name.into()));
            }
            seen.push(name.to_owned());
        }
    }
    if container["image"].as_str().unwrap_or_default().is_empty() {
        causes.push(Cause::required(format!("{field}.image"), ""));
    }
    let mut port_names = Vec::new();
    for (i, port) in container["ports"].as_array().into_iter().flatten().enumerate() {
        let field = format!("{field}.ports[{i}]");
        if let Some(name) = port["name"].as_str() {
            for why in names::port_name(name) {
                causes.push(Cause::invalid(format!("{field}.name"), &name.into(), &why));
            }
            if port_names.contains(&name) {
                causes.push(Cause::duplicate(format!("{field}.name"), &name.into()));
            }
            port_names.push(name);
        }
        match port["containerPort"].as_i64() {
            None | Some(0) => causes.push(Cause::required(format!("{field}.containerPort"), "")),
            Some(number) => {
                for why in names::port_number(number) {
                    causes.push(Cause::invalid(
                        format!("{field}.containerPort"),
                        &number.into(),
                        &why,
                    ));
                }
            }
        }
        let protocol = port["protocol"].as_str().unwrap_or_default();
        if !["TCP", "UDP", "SCTP"].contains(&protocol) {
            causes.push(Cause::not_supported(
                format!("{field}.protocol"),
                &protocol.into(),
                &["TCP", "UDP", "SCTP"],
            ));
        }
    }
}

/// Most of a pod's specification never changes.
pub(super) fn validate_update(old: &Value, new: &Value) -> Vec<Cause> {
    let strip = |pod: &Value| -> Value {
        let mut spec = pod["spec"].clone();
        if let Some(map) = spec.as_object_mut() {
            for field in [
                "activeDeadlineSeconds",
                "tolerations",
                "terminationGracePeriodSeconds",
                "schedulingGates",
            ] {
                map.remove(field);
            }
            for list in ["containers", "initContainers"] {
                for container in objects(map, list) {
                    container.remove("image");
                }
            }
        }
        spec
    };
    let mut causes = Vec::new();
    if strip(old) != strip(new) {
        causes.push(Cause::forbidden(
            "spec",
            "pod updates may not change fields other than \
             `spec.containers[*].image`,`spec.initContainers[*].image`,`spec.activeDeadlineSeconds`,\
             `spec.tolerations` (only additions to existing tolerations),`spec.terminationGracePeriodSeconds` (allow it \
             to be set to 1 if it was previously negative)",
        ));
    }
    let before = old["spec"]["tolerations"].as_array();
    let after = new["spec"]["tolerations"].as_array();
    if before
        .into_iter()
        .flatten()
        .any(|t| !after.is_some_and(|a| a.contains(t)))
    {
        causes.push(Cause::forbidden(
            "spec.tolerations",
            "existing toleration can not be modified except its tolerationSeconds",
        ));
    }
    causes
}

/// What is wrong with a status.
pub(super) fn validate_status(pod: &Value) -> Vec<Cause> {
    let mut causes = Vec::new();
    let status = &pod["status"];
    for (i, entry) in status["podIPs"].as_array().into_iter().flatten().enumerate() {
        let ip = entry["ip"].as_str().unwrap_or_default();
        if names::parse_ip(ip).is_none() {
            causes.push(Cause::invalid(
                format!("status.podIPs[{i}].ip"),
                &ip.into(),
                names::BAD_IP,
            ));
        }
    }
    let phases = ["Pending", "Running", "Succeeded", "Failed", "Unknown"];
    if let Some(phase) = status["phase"].as_str()
        && !phases.contains(&phase)
    {
        causes.push(Cause::not_supported("status.phase", &phase.into(), &phases));
    }
    causes
}

/// Keeps `podIP` and `podIPs[0]` the same, whichever a client wrote (`pkg/apis/core/v1/conversion.go`).
pub(super) fn sync_ips(pod: &mut Value) {
    let Some(status) = pod.get_mut("status").and_then(Value::as_object_mut) else {
        return;
    };
    let first = status
        .get("podIPs")
        .and_then(|l| l.get(0))
        .and_then(|e| e.get("ip"))
        .cloned();
    match (status.get("podIP").cloned(), first) {
        (Some(ip), None) => {
            status.insert("podIPs".into(), json!([{"ip": ip}]));
        }
        (None, Some(ip)) => {
            status.insert("podIP".into(), ip);
        }
        // A client that knows only the single field has changed it.
        (Some(ip), Some(first)) if ip != first => {
            status.insert("podIPs".into(), json!([{"ip": ip}]));
        }
        _ => {}
    }
}

/// The Pod after `binding` assigned it to a node.
///
/// # Errors
/// Invalid if the binding names no node, conflict if the pod has another one.
pub fn bind(r: &ResourceInfo, pod: &Value, binding: &Value, now: &str) -> Result<Value, ApiError> {
    let name = meta::name(pod);
    let target = &binding["target"];
    let node = target["name"].as_str().unwrap_or_default();
    let mut causes = Vec::new();
    let kind = target["kind"].as_str().unwrap_or_default();
    if !kind.is_empty() && kind != "Node" {
        causes.push(Cause::not_supported(
            "target.kind",
            &kind.into(),
            &["<empty>", "Node"],
        ));
    }
    if node.is_empty() {
        causes.push(Cause::required("target.name", ""));
    }
    if !causes.is_empty() {
        return Err(ApiError::invalid(r, name, &causes));
    }
    let why = if pod["metadata"].get("deletionTimestamp").is_some() {
        Some(format!(
            "pod {name} is being deleted, cannot be assigned to a host"
        ))
    } else {
        pod["spec"]["nodeName"]
            .as_str()
            .filter(|n| !n.is_empty())
            .map(|n| format!("pod {name} is already assigned to node \"{n}\""))
    };
    if let Some(why) = why {
        return Err(ApiError::conflict_in_subresource(r, "binding", name, &why));
    }
    let mut bound = pod.clone();
    bound["spec"]["nodeName"] = node.into();
    for (key, value) in binding["metadata"]["annotations"]
        .as_object()
        .into_iter()
        .flatten()
    {
        bound["metadata"]["annotations"][key.as_str()] = value.clone();
    }
    if !bound["status"].is_object() {
        bound["status"] = json!({});
    }
    let conditions = bound["status"]
        .as_object_mut()
        .map(|s| s.entry("conditions").or_insert_with(|| json!([])));
    if let Some(list) = conditions.and_then(Value::as_array_mut) {
        list.retain(|c| c["type"] != "PodScheduled");
        list.push(json!({
            "type": "PodScheduled",
            "status": "True",
            "lastProbeTime": null,
            "lastTransitionTime": now,
        }));
    }
    Ok(bound)
}
