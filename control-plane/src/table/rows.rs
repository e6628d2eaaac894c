//! Cells of each kind's rows (kube-apiserver `pkg/printers/internalversion`).

use jiff::Timestamp;
use serde_json::{Value, json};

use super::age::since;
use crate::resource::ResourceInfo;

const NONE: &str = "<none>";
const UNSET: &str = "<unset>";
const UNKNOWN: &str = "<unknown>";

fn list(value: &Value) -> &[Value] {
    value.as_array().map_or(&[], Vec::as_slice)
}

/// The text, or what stands for nothing.
fn text<'a>(value: &'a Value, otherwise: &'a str) -> &'a str {
    value.as_str().filter(|s| !s.is_empty()).unwrap_or(otherwise)
}

fn count(value: &Value) -> usize {
    match value {
        Value::Array(list) => list.len(),
        Value::Object(map) => map.len(),
        _ => 0,
    }
}

/// `a=b,c=d`
fn labels(map: &Value) -> String {
    let pairs: Vec<String> = map
        .as_object()
        .into_iter()
        .flatten()
        .map(|(k, v)| format!("{k}={}", v.as_str().unwrap_or_default()))
        .collect();
    if pairs.is_empty() {
        NONE.to_owned()
    } else {
        pairs.join(",")
    }
}

/// A number, or none as zero.
fn number(value: &Value) -> Value {
    value.as_i64().unwrap_or(0).into()
}

/// A `LabelSelector` as text.
fn selector(value: &Value) -> String {
    match crate::selector::selector_text(value) {
        text if text.is_empty() => NONE.to_owned(),
        text => text,
    }
}

/// Names and images of the containers of a template.
fn template(spec: &Value) -> (Value, Value) {
    let containers = list(&spec["template"]["spec"]["containers"]);
    let join = |field: &str| -> Value {
        let texts: Vec<&str> = containers.iter().map(|c| text(&c[field], "")).collect();
        texts.join(",").into()
    };
    (join("name"), join("image"))
}

/// The first three, and how many more there are.
fn first_three(items: &[String]) -> String {
    match items {
        [] => UNSET.to_owned(),
        [a, b, c, rest @ ..] if !rest.is_empty() => format!("{a},{b},{c} + {} more...", rest.len()),
        few => few.join(","),
    }
}

/// Cells of one object, in the order of the columns.
pub(super) fn cells(r: &ResourceInfo, object: &Value, now: Option<Timestamp>) -> Vec<Value> {
    let name = object["metadata"]["name"].clone();
    let age: Value = since(&object["metadata"]["creationTimestamp"], now).into();
    let spec = &object["spec"];
    match r.kind {
        "Service" => service(object, name, age),
        "Node" => node(object, name, age),
        "Pod" => pod(object, name, age, now),
        "EndpointSlice" => {
            let ports: Vec<String> = list(&object["ports"])
                .iter()
                .map(|p| match p["port"].as_i64() {
                    Some(number) => number.to_string(),
                    None => text(&p["name"], "*").to_owned(),
                })
                .collect();
            let addresses: Vec<String> = list(&object["endpoints"])
                .iter()
                .flat_map(|e| list(&e["addresses"]))
                .map(|a| text(a, "").to_owned())
                .collect();
            vec![
                name,
                object["addressType"].clone(),
                first_three(&ports).into(),
                first_three(&addresses).into(),
                age,
            ]
        }
        "Namespace" => vec![name, text(&object["status"]["phase"], "").into(), age],
        "Event" => event(object, name, now),
        "ReplicationController" | "ReplicaSet" => {
            let (containers, images) = template(spec);
            let selector = match r.kind {
                "ReplicationController" => labels(&spec["selector"]),
                _ => selector(&spec["selector"]),
            };
            vec![
                name,
                number(&spec["replicas"]),
                number(&object["status"]["replicas"]),
                number(&object["status"]["readyReplicas"]),
                age,
                containers,
                images,
                selector.into(),
            ]
        }
        "Deployment" => {
            let (containers, images) = template(spec);
            let status = &object["status"];
            let ready = format!(
                "{}/{}",
                number(&status["readyReplicas"]),
                number(&spec["replicas"])
            );
            vec![
                name,
                ready.into(),
                number(&status["updatedReplicas"]),
                number(&status["availableReplicas"]),
                age,
                containers,
                images,
                selector(&spec["selector"]).into(),
            ]
        }
        "DaemonSet" => {
            let (containers, images) = template(spec);
            let status = &object["status"];
            vec![
                name,
                number(&status["desiredNumberScheduled"]),
                number(&status["currentNumberScheduled"]),
                number(&status["numberReady"]),
                number(&status["updatedNumberScheduled"]),
                number(&status["numberAvailable"]),
                labels(&spec["template"]["spec"]["nodeSelector"]).into(),
                age,
                containers,
                images,
                selector(&spec["selector"]).into(),
            ]
        }
        "NetworkPolicy" => vec![name, selector(&spec["podSelector"]).into(), age],
        "IPAddress" => {
            let parent = &spec["parentRef"];
            let group = text(&parent["group"], "");
            let mut shown = text(&parent["resource"], "").to_lowercase();
            if !group.is_empty() {
                shown.push_str(&format!(".{}", group.to_lowercase()));
            }
            for part in [text(&parent["namespace"], ""), text(&parent["name"], "")] {
                if !part.is_empty() {
                    shown.push_str(&format!("/{part}"));
                }
            }
            if shown.is_empty() {
                NONE.clone_into(&mut shown);
            }
            vec![name, shown.into(), age]
        }
        "Role" | "ClusterRole" => {
            let created = object["metadata"]["creationTimestamp"].clone();
            vec![name, text(&created, UNKNOWN).into()]
        }
        "RoleBinding" | "ClusterRoleBinding" => {
            let role = &object["roleRef"];
            let subjects = |kind: &str| -> Value {
                let names: Vec<String> = list(&object["subjects"])
                    .iter()
                    .filter(|s| s["kind"] == kind)
                    .map(|s| match kind {
                        "ServiceAccount" => format!("{}/{}", text(&s["namespace"], ""), text(&s["name"], "")),
                        _ => text(&s["name"], "").to_owned(),
                    })
                    .collect();
                names.join(", ").into()
            };
            vec![
                name,
                format!("{}/{}", text(&role["kind"], ""), text(&role["name"], "")).into(),
                age,
                subjects("User"),
                subjects("Group"),
                subjects("ServiceAccount"),
            ]
        }
        "Endpoints" => {
            let mut addresses = Vec::new();
            for subset in list(&object["subsets"]) {
                for address in list(&subset["addresses"]) {
                    let ip = text(&address["ip"], "");
                    if list(&subset["ports"]).is_empty() {
                        addresses.push(ip.to_owned());
                    }
                    for port in list(&subset["ports"]) {
                        let host = if ip.contains(':') {
                            format!("[{ip}]")
                        } else {
                            ip.to_owned()
                        };
                        addresses.push(format!("{host}:{}", port["port"]));
                    }
                }
            }
            let shown = match first_three(&addresses) {
                s if s == UNSET => NONE.to_owned(),
                s => s,
            };
            vec![name, shown.into(), age]
        }
        "ConfigMap" => {
            let data = count(&object["data"]) + count(&object["binaryData"]);
            vec![name, data.into(), age]
        }
        "Secret" => vec![name, object["type"].clone(), count(&object["data"]).into(), age],
        "ServiceAccount" => vec![name, count(&object["secrets"]).into(), age],
        "Lease" => vec![name, text(&spec["holderIdentity"], "").into(), age],
        "ServiceCIDR" => {
            let cidrs: Vec<&str> = list(&spec["cidrs"]).iter().map(|c| text(c, "")).collect();
            vec![name, cidrs.join(",").into(), age]
        }
        _ => vec![name, age],
    }
}

fn service(object: &Value, name: Value, age: Value) -> Vec<Value> {
    let spec = &object["spec"];
    let kind = text(&spec["type"], "");
    let cluster_ip = match list(&spec["clusterIPs"]).first() {
        Some(ip) => text(ip, NONE),
        None => text(&spec["clusterIP"], NONE),
    };
    let external: Vec<&str> = list(&spec["externalIPs"]).iter().map(|ip| text(ip, "")).collect();
    let external_ip = match kind {
        "LoadBalancer" => {
            let mut ingress: Vec<&str> = list(&object["status"]["loadBalancer"]["ingress"])
                .iter()
                .map(|i| text(&i["ip"], text(&i["hostname"], "")))
                .filter(|i| !i.is_empty())
                .collect();
            ingress.sort_unstable();
            ingress.dedup();
            ingress.extend(&external);
            if ingress.is_empty() {
                "<pending>".to_owned()
            } else {
                ingress.join(",")
            }
        }
        "ExternalName" => text(&spec["externalName"], "").to_owned(),
        _ if external.is_empty() => NONE.to_owned(),
        _ => external.join(","),
    };
    let ports: Vec<String> = list(&spec["ports"])
        .iter()
        .map(|p| {
            let node_port = p["nodePort"].as_i64().filter(|n| *n != 0);
            let node_port = node_port.map(|n| format!(":{n}")).unwrap_or_default();
            format!("{}{node_port}/{}", p["port"], text(&p["protocol"], ""))
        })
        .collect();
    let ports = if ports.is_empty() {
        NONE.to_owned()
    } else {
        ports.join(",")
    };
    vec![
        name,
        kind.into(),
        cluster_ip.into(),
        external_ip.into(),
        ports.into(),
        age,
        labels(&spec["selector"]).into(),
    ]
}

fn node(object: &Value, name: Value, age: Value) -> Vec<Value> {
    let status = &object["status"];
    let ready = list(&status["conditions"]).iter().find(|c| c["type"] == "Ready");
    let mut state = match ready {
        None => "Unknown".to_owned(),
        Some(c) if c["status"] == "True" => "Ready".to_owned(),
        Some(_) => "NotReady".to_owned(),
    };
    if object["spec"]["unschedulable"] == true {
        state.push_str(",SchedulingDisabled");
    }
    let mut roles: Vec<&str> = object["metadata"]["labels"]
        .as_object()
        .into_iter()
        .flatten()
        .filter_map(
            |(key, value)| match key.strip_prefix("node-role.kubernetes.io/") {
                Some(role) => Some(role),
                None if key == "kubernetes.io/role" => value.as_str(),
                None => None,
            },
        )
        .filter(|r| !r.is_empty())
        .collect();
    roles.sort_unstable();
    roles.dedup();
    let roles = if roles.is_empty() {
        NONE.to_owned()
    } else {
        roles.join(",")
    };
    let address = |kind: &str| {
        list(&status["addresses"])
            .iter()
            .find(|a| a["type"] == kind)
            .map_or(NONE, |a| text(&a["address"], NONE))
    };
    let info = &status["nodeInfo"];
    vec![
        name,
        state.into(),
        roles.into(),
        age,
        text(&info["kubeletVersion"], "").into(),
        address("InternalIP").into(),
        address("ExternalIP").into(),
        text(&info["osImage"], UNKNOWN).into(),
        text(&info["kernelVersion"], UNKNOWN).into(),
        text(&info["containerRuntimeVersion"], UNKNOWN).into(),
    ]
}

/// How a terminated container ended.
fn ending(terminated: &Value) -> String {
    if let Some(reason) = terminated["reason"].as_str().filter(|r| !r.is_empty()) {
        return reason.to_owned();
    }
    match terminated["signal"].as_i64().filter(|s| *s != 0) {
        Some(signal) => format!("Signal:{signal}"),
        None => format!("ExitCode:{}", terminated["exitCode"].as_i64().unwrap_or(0)),
    }
}

/// What the containers of a pod are up to, taken together.
#[derive(Default)]
struct Containers {
    reason: String,
    ready: usize,
    total: usize,
    restarts: i64,
    last_restart: String,
    initializing: bool,
}

impl Containers {
    fn restarted(&mut self, status: &Value) {
        self.restarts += status["restartCount"].as_i64().unwrap_or(0);
        let finished = text(&status["lastState"]["terminated"]["finishedAt"], "");
        // RFC 3339 times in UTC sort as text.
        if finished > self.last_restart.as_str() {
            finished.clone_into(&mut self.last_restart);
        }
    }

    fn of(pod: &Value) -> Self {
        let (spec, status) = (&pod["spec"], &pod["status"]);
        let mut all = Self {
            reason: text(&status["reason"], text(&status["phase"], "")).to_owned(),
            total: list(&spec["containers"]).len(),
            ..Self::default()
        };
        let gated = |c: &&Value| c["type"] == "PodScheduled" && c["reason"] == "SchedulingGated";
        if list(&status["conditions"]).iter().any(|c| gated(&c)) {
            all.reason = "SchedulingGated".to_owned();
        }
        let sidecars = all.init_containers(spec, status);
        let initialized = list(&status["conditions"])
            .iter()
            .any(|c| c["type"] == "Initialized" && c["status"] == "True");
        if !all.initializing || initialized {
            // Restarts while starting up count no more, but for containers that keep running.
            all.restarts = sidecars.restarts;
            all.last_restart = sidecars.last_restart;
            all.main_containers(status);
        }
        all
    }

    fn init_containers(&mut self, spec: &Value, status: &Value) -> Self {
        let mut sidecars = Self::default();
        let inits = list(&spec["initContainers"]);
        let is_sidecar = |name: &Value| {
            inits
                .iter()
                .any(|c| &c["name"] == name && c["restartPolicy"] == "Always")
        };
        self.total += inits.iter().filter(|c| c["restartPolicy"] == "Always").count();
        for (i, container) in list(&status["initContainerStatuses"]).iter().enumerate() {
            self.restarted(container);
            let sidecar = is_sidecar(&container["name"]);
            if sidecar {
                sidecars.restarted(container);
            }
            let state = &container["state"];
            if state["terminated"].is_object() && state["terminated"]["exitCode"] == 0 {
                continue;
            }
            if sidecar && container["started"] == true {
                self.ready += usize::from(container["ready"] == true);
                continue;
            }
            self.reason = if state["terminated"].is_object() {
                format!("Init:{}", ending(&state["terminated"]))
            } else {
                match text(&state["waiting"]["reason"], "") {
                    "" | "PodInitializing" => format!("Init:{i}/{}", inits.len()),
                    waiting => format!("Init:{waiting}"),
                }
            };
            self.initializing = true;
            break;
        }
        sidecars
    }

    fn main_containers(&mut self, status: &Value) {
        let mut running = false;
        for container in list(&status["containerStatuses"]).iter().rev() {
            self.restarted(container);
            let state = &container["state"];
            let waiting = text(&state["waiting"]["reason"], "");
            if !waiting.is_empty() {
                waiting.clone_into(&mut self.reason);
            } else if state["terminated"].is_object() {
                self.reason = ending(&state["terminated"]);
            } else if container["ready"] == true && state["running"].is_object() {
                running = true;
                self.ready += 1;
            }
        }
        if self.reason == "Completed" && running {
            let ready = list(&status["conditions"])
                .iter()
                .any(|c| c["type"] == "Ready" && c["status"] == "True");
            self.reason = if ready { "Running" } else { "NotReady" }.to_owned();
        }
    }
}

fn pod(object: &Value, name: Value, age: Value, now: Option<Timestamp>) -> Vec<Value> {
    let (spec, status) = (&object["spec"], &object["status"]);
    let containers = Containers::of(object);
    let mut reason = containers.reason;
    if object["metadata"].get("deletionTimestamp").is_some() {
        if status["reason"] == "NodeLost" {
            reason = "Unknown".to_owned();
        } else if status["phase"] != "Succeeded" && status["phase"] != "Failed" {
            reason = "Terminating".to_owned();
        }
    }
    let mut restarts = containers.restarts.to_string();
    if containers.restarts != 0 && !containers.last_restart.is_empty() {
        restarts.push_str(&format!(" ({} ago)", since(&containers.last_restart.into(), now)));
    }
    let gates = list(&spec["readinessGates"]);
    let gates = if gates.is_empty() {
        NONE.to_owned()
    } else {
        let open = gates
            .iter()
            .filter(|gate| {
                list(&status["conditions"])
                    .iter()
                    .any(|c| c["type"] == gate["conditionType"] && c["status"] == "True")
            })
            .count();
        format!("{open}/{}", gates.len())
    };
    let ip = match list(&status["podIPs"]).first() {
        Some(first) => text(&first["ip"], NONE),
        None => text(&status["podIP"], NONE),
    };
    vec![
        name,
        format!("{}/{}", containers.ready, containers.total).into(),
        reason.into(),
        restarts.into(),
        age,
        ip.into(),
        text(&spec["nodeName"], NONE).into(),
        text(&status["nominatedNodeName"], NONE).into(),
        gates.into(),
    ]
}

fn event(object: &Value, name: Value, now: Option<Timestamp>) -> Vec<Value> {
    let first = match &object["firstTimestamp"] {
        Value::Null => since(&object["eventTime"], now),
        time => since(time, now),
    };
    let mut last = match &object["lastTimestamp"] {
        Value::Null => first.clone(),
        time => since(time, now),
    };
    let mut count = object["count"].as_i64().filter(|c| *c != 0).unwrap_or(1);
    if object["series"].is_object() {
        last = since(&object["series"]["lastObservedTime"], now);
        count = object["series"]["count"].as_i64().unwrap_or(count);
    }
    let involved = &object["involvedObject"];
    let kind = text(&involved["kind"], "").to_lowercase();
    let target = match text(&involved["name"], "") {
        "" => kind,
        name => format!("{kind}/{name}"),
    };
    let component = text(
        &object["source"]["component"],
        text(&object["reportingComponent"], ""),
    );
    let host = text(&object["source"]["host"], text(&object["reportingInstance"], ""));
    let source = if host.is_empty() {
        component.to_owned()
    } else {
        format!("{component}, {host}")
    };
    vec![
        last.into(),
        text(&object["type"], "").into(),
        text(&object["reason"], "").into(),
        target.into(),
        text(&involved["fieldPath"], "").into(),
        source.into(),
        text(&object["message"], "").trim().into(),
        first.into(),
        count.into(),
        name,
    ]
}

/// Marks rows that `kubectl get --watch` shows differently: pods that are done.
pub(super) fn conditions(r: &ResourceInfo, object: &Value) -> Option<Value> {
    if r.kind != "Pod" {
        return None;
    }
    match object["status"]["phase"].as_str()? {
        phase @ "Succeeded" => Some(json!([{
            "type": "Completed", "status": "True", "reason": phase, "message": "The pod has completed successfully."
        }])),
        phase @ "Failed" => Some(json!([{
            "type": "Completed", "status": "True", "reason": phase, "message": "The pod failed."
        }])),
        _ => None,
    }
}
