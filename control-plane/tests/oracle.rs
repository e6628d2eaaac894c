//! Replays what a real kube-apiserver 1.36 was asked and compares the answers.
//!
//! What differs from run to run (uids, times, revisions, addresses and ports that were not asked for) is learned from the
//! answers: the first time a recorded value is seen its counterpart is noted, afterwards it must be that one, also inside
//! later requests. Everything else must be equal, except what is listed here with its reason.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test stops where it fails"
)]

mod common;

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use common::{Server, call, send};
use http::Request;
use serde_json::{Map, Value, json};

/// Documents that list more than we serve: what we serve must be there in the same words, and only this is missing.
/// Fixture, the list's place, what names its entries, what is missing.
const PARTLY: &[(&str, &str, &str, &[&str])] = &[
    (
        "api-v1",
        "/resources",
        "name",
        &[
            "bindings",
            "componentstatuses",
            "limitranges",
            "nodes/proxy",
            "persistentvolumeclaims",
            "persistentvolumeclaims/status",
            "persistentvolumes",
            "persistentvolumes/status",
            "pods/ephemeralcontainers",
            "pods/portforward",
            "pods/proxy",
            "pods/resize",
            "podtemplates",
            "resourcequotas",
            "resourcequotas/status",
            "services/proxy",
        ],
    ),
    (
        "api-aggregated",
        "/items/0/versions/0/resources",
        "resource",
        &[
            "bindings",
            "componentstatuses",
            "limitranges",
            "persistentvolumeclaims",
            "persistentvolumes",
            "podtemplates",
            "resourcequotas",
        ],
    ),
    (
        "apis-apps-v1",
        "/resources",
        "name",
        &[
            "controllerrevisions",
            "statefulsets",
            "statefulsets/scale",
            "statefulsets/status",
        ],
    ),
    (
        "apis",
        "/groups",
        "name",
        &[
            "admissionregistration.k8s.io",
            "apiextensions.k8s.io",
            "apiregistration.k8s.io",
            "authentication.k8s.io",
            "authorization.k8s.io",
            "autoscaling",
            "batch",
            "certificates.k8s.io",
            "events.k8s.io",
            "flowcontrol.apiserver.k8s.io",
            "node.k8s.io",
            "policy",
            "resource.k8s.io",
            "scheduling.k8s.io",
            "storage.k8s.io",
        ],
    ),
];

/// Not replayed, and why.
const SKIPPED: &[(&str, &str)] = &[
    (
        "openapi-v3-index",
        "lists groups that are not served, under hashes that were cut out; the documents have their own tests",
    ),
    (
        "endpointslice-list",
        "holds the endpoint slice controller's slices, with random names, as they were at one moment",
    ),
    ("endpointslice-list-table", "as endpointslice-list"),
];

/// In the order in which they were recorded, so that each finds the state that it needs.
const REPLAYED: &[&str] = &[
    "version",
    "healthz",
    "readyz-verbose",
    "api",
    "apis-discovery-group",
    "apis-discovery-v1",
    "unknown-path",
    "method-not-allowed",
    "anonymous-forbidden",
    "bad-token-unauthorized",
    "namespace-create",
    "service-create-nodeport",
    "service-get",
    "service-create-conflict",
    "service-get-notfound",
    "service-create-nodeport-taken",
    "service-create-nodeport-out-of-range",
    "service-create-invalid-empty-ports",
    "service-create-bad-name",
    "service-create-unknown-field-strict",
    "service-create-unknown-field-warn",
    "service-create-bad-json",
    "service-create-headless",
    "service-create-affinity-lb",
    "service-list",
    "service-list-table",
    "service-list-limit",
    "service-patch-strategic",
    "service-patch-merge",
    "service-patch-json",
    "service-patch-json-fails",
    "service-get-2",
    "service-put-conflict-stale-rv",
    "service-put-immutable-clusterip",
    "service-apply-ssa",
    "service-status-patch",
    "endpointslice-create",
    "node-create",
    "node-status-patch-strategic",
    "node-get",
    "pod-create",
    "pod-status-patch",
    "pod-list-table",
    "pod-list-selectors",
    "pod-list-bad-selector",
    "pod-list-bad-field",
    "pod-binding",
    "deployment-create",
    "deployment-scale-get",
    "deployment-list-table",
    "node-list-table",
    "rc-create",
    "networkpolicy-create",
    "list-rv-too-large",
    "watch-expired-rv",
    "service-delete",
    "service-delete-notfound",
    "services-deletecollection",
    "node-delete",
    "namespace-delete",
];

/// Watches while the others run.
const WATCH: &str = "service-watch-stream";

/// A controller takes the taint of a node that has become ready away, in both clusters whenever it gets to it.
const CONTROLLED: (&str, &str) = ("node-get", "/spec/taints");

/// Differences that are meant: fixture (or `*`), the path's end, reason.
const DIFFERENT: &[(&str, &str, &str)] = &[
    (
        "deployment-list-table",
        "/annotations",
        "depends on whether the controller has been there already",
    ),
    (
        "deployment-list-table",
        "/cells/2",
        "depends on how many pods the controller has made by then",
    ),
    (
        "deployment-scale-get",
        "/status/replicas",
        "depends on how many pods the controller has made by then",
    ),
    ("version", "", "another program says another version"),
    ("readyz-verbose", "", "another program has other checks"),
    (
        "service-create-unknown-field-warn",
        "/spec/clusterIP",
        "a dry run there shows the range's base address",
    ),
    (
        "service-create-unknown-field-warn",
        "/spec/clusterIPs",
        "a dry run there shows the range's base address",
    ),
    (
        "service-list-limit",
        "/remainingItemCount",
        "there were 10,000 more services",
    ),
    ("service-list-limit", "/continue", "opaque"),
    (
        "node-get",
        "/annotations",
        "there is no node controller that adds a ttl",
    ),
    (
        "node-status-patch-strategic",
        "/annotations",
        "there is no node controller that adds a ttl",
    ),
    (
        "node-list-table",
        "/annotations",
        "there is no node controller that adds a ttl",
    ),
    (
        "node-list-table",
        "rows/0/object/metadata/managedFields",
        "a node that registered in another way",
    ),
    ("watch-expired-rv", "/message", "names the oldest revision"),
    (
        WATCH,
        "bookmark:/spec",
        "a bookmark there shows the zero value of its kind",
    ),
    (
        WATCH,
        "bookmark:/status",
        "a bookmark there shows the zero value of its kind",
    ),
];

/// Values that are chosen by the server: learned, not compared.
const CHOSEN: &[&str] = &[
    "uid",
    "resourceVersion",
    "clusterIP",
    "nodePort",
    "healthCheckNodePort",
    "creationTimestamp",
    "deletionTimestamp",
    "lastTransitionTime",
    "serverAddress",
    "time",
];

fn fixture(name: &str) -> Value {
    let path = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/fixtures/apiserver-1.36")
        .join(format!("{name}.json"));
    let text = std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    serde_json::from_str(&text).unwrap()
}

#[derive(Default)]
struct Oracle {
    /// Recorded value -> ours.
    known: BTreeMap<String, Value>,
    /// Whether the answer being compared is a list.
    list: bool,
    problems: Vec<String>,
    /// Which of [`DIFFERENT`] occurred.
    met: BTreeSet<usize>,
}

fn key(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}

/// `5s`, `2m3s`, … as tables show ages.
fn is_age(value: &Value) -> bool {
    value.as_str().is_some_and(|text| {
        text.ends_with(['s', 'm', 'h', 'd']) && text.chars().all(|c| c.is_ascii_digit() || "smhd".contains(c))
    })
}

impl Oracle {
    /// The recorded value with everything replaced that is known to be different here.
    fn translate(&self, value: &Value) -> Value {
        match value {
            Value::Object(fields) => {
                let fields: Map<_, _> = fields
                    .iter()
                    .map(|(name, value)| (name.clone(), self.translate(value)))
                    .collect();
                fields.into()
            }
            Value::Array(items) => items.iter().map(|item| self.translate(item)).collect(),
            Value::Number(_) => self
                .known
                .get(&key(value))
                .cloned()
                .unwrap_or_else(|| value.clone()),
            Value::String(text) => {
                if let Some(known) = self.known.get(text) {
                    return known.clone();
                }
                // Addresses and ports inside texts such as "80:32134/TCP".
                let mut text = text.clone();
                for (recorded, ours) in &self.known {
                    if recorded.len() >= 5 && (recorded.contains('.') || recorded.parse::<u16>().is_ok()) {
                        text = text.replace(recorded.as_str(), &key(ours));
                    }
                }
                text.into()
            }
            other => other.clone(),
        }
    }

    fn different(&mut self, name: &str, path: &str) -> bool {
        let found = DIFFERENT.iter().position(|(fixture, end, _)| {
            (*fixture == "*" || *fixture == name)
                && match end.strip_prefix("bookmark:") {
                    Some(end) => path.starts_with("bookmark") && path.ends_with(end),
                    None => path.ends_with(end),
                }
        });
        self.met.extend(found);
        found.is_some()
    }

    fn compare(&mut self, name: &str, path: &str, recorded: &Value, ours: &Value) {
        if self.different(name, path) || (name, path) == CONTROLLED {
            return;
        }
        if path.ends_with("/managedFields") {
            // What controllers wrote by then was not asked for.
            let asked = |entries: &Value| -> Value {
                let entries = entries.as_array().into_iter().flatten();
                entries
                    .filter(|entry| entry["manager"] != "kube-controller-manager")
                    .cloned()
                    .collect()
            };
            let (theirs, mine) = (asked(recorded), asked(ours));
            if theirs != *recorded || mine != *ours {
                return self.compare(name, path, &theirs, &mine);
            }
        }
        let field = path.rsplit('/').next().unwrap_or_default();
        if (CHOSEN.contains(&field) || path.ends_with("/clusterIPs/0")) && recorded != "None" {
            if std::mem::discriminant(recorded) != std::mem::discriminant(ours) {
                self.problems
                    .push(format!("{name}{path}: {recorded} there, {ours} here"));
            } else if field.ends_with("imestamp")
                || matches!(field, "lastTransitionTime" | "time")
                || self.list && path == "/metadata/resourceVersion"
            {
                // Times, and how many writes there were before a list.
            } else if let Some(known) = self.known.get(&key(recorded)) {
                // Controllers write these kinds as well, whenever they get to it.
                let controlled = ["node-", "deployment-", "pod-"]
                    .iter()
                    .any(|kind| name.starts_with(kind));
                if known != ours && !(controlled && field == "resourceVersion") {
                    self.problems
                        .push(format!("{name}{path}: {recorded} was {known} before, now {ours}"));
                }
            } else {
                self.known.insert(key(recorded), ours.clone());
            }
            return;
        }
        match (recorded, ours) {
            (Value::Object(recorded), Value::Object(ours)) => {
                let names: BTreeSet<&String> = recorded.keys().chain(ours.keys()).collect();
                for field in names {
                    let path = format!("{path}/{field}");
                    match (recorded.get(field), ours.get(field)) {
                        (Some(recorded), Some(ours)) => self.compare(name, &path, recorded, ours),
                        (recorded, ours)
                            if !self.different(name, &path) && (name, path.as_str()) != CONTROLLED =>
                        {
                            self.problems
                                .push(format!("{name}{path}: {recorded:?} there, {ours:?} here"));
                        }
                        _ => {}
                    }
                }
            }
            (Value::Array(recorded), Value::Array(ours)) if recorded.len() == ours.len() => {
                for (index, (recorded, ours)) in recorded.iter().zip(ours).enumerate() {
                    self.compare(name, &format!("{path}/{index}"), recorded, ours);
                }
            }
            (recorded, ours) if is_age(recorded) && is_age(ours) => {}
            (recorded, ours) => {
                let expected = self.translate(recorded);
                if &expected != ours {
                    self.problems
                        .push(format!("{name}{path}: {expected} there, {ours} here"));
                }
            }
        }
    }
}

fn request(recorded: &Value, oracle: &Oracle) -> Request<Vec<u8>> {
    let mut request = Request::builder()
        .method(recorded["method"].as_str().unwrap())
        .uri(recorded["path"].as_str().unwrap());
    for (field, header) in [("accept", "accept"), ("content_type", "content-type")] {
        if let Some(value) = recorded[field].as_str() {
            request = request.header(header, value);
        }
    }
    if let Some(token) = recorded["bearer"].as_str() {
        request = request.header("authorization", format!("Bearer {token}"));
    }
    let body = match &recorded["body"] {
        Value::Null => Vec::new(),
        // Deliberately broken JSON.
        Value::String(text) => text.clone().into_bytes(),
        body => serde_json::to_vec(&oracle.translate(body)).unwrap(),
    };
    request.body(body).unwrap()
}

/// What else happened between the recorded requests.
async fn prepare(name: &str, client: &kube::Client) {
    let ok = |(code, body): (u16, Value)| assert!(code < 300, "prepare {name}: {code} {body}");
    match name {
        "service-list-limit" => {
            for n in 0..3 {
                let cluster_ip = format!("10.100.0.{}", n + 1);
                let ports = json!([{"name": "p", "port": 80, "targetPort": 8080}]);
                let service = json!({
                    "apiVersion": "v1", "kind": "Service",
                    "metadata": {"name": format!("fill-{n}")}, "spec": {"clusterIP": cluster_ip, "ports": ports},
                });
                ok(call(client, "POST", "/api/v1/namespaces/default/services", &service).await);
            }
        }
        // The scheduler's work.
        "pod-status-patch" => {
            let binding = json!({
                "apiVersion": "v1", "kind": "Binding", "metadata": {"name": "p1"},
                "target": {"apiVersion": "v1", "kind": "Node", "name": "node-1"},
            });
            ok(call(
                client,
                "POST",
                "/api/v1/namespaces/demo/pods/p1/binding",
                &binding,
            )
            .await);
        }
        // A node of the recorded cluster that registered long before.
        "node-list-table" => {
            let node = json!({
                "apiVersion": "v1", "kind": "Node", "metadata": {"name": "n1", "labels": {"kubernetes.io/hostname": "n1"}},
                "status": {
                    "addresses": [{"type": "InternalIP", "address": "10.99.0.11"}],
                    "conditions": [{"type": "Ready", "status": "False"}],
                },
            });
            ok(call(client, "POST", "/api/v1/nodes", &node).await);
        }
        _ => {}
    }
}

#[tokio::test]
async fn answers_are_those_of_a_kube_apiserver() {
    let server = Server::start().await;
    let client = server.client().await;
    let anonymous = {
        let mut config = server.config();
        config.auth_infos[0].auth_info = Some(kube::config::AuthInfo::default());
        common::client(config).await
    };
    let mut oracle = Oracle::default();
    let mut watch = None;
    for name in REPLAYED {
        if *name == "watch-expired-rv" {
            server.plane.forget_history().await.unwrap();
        }
        prepare(name, &client).await;
        let recorded = fixture(name);
        let asks = &recorded["request"];
        let stranger = asks["anonymous"] == true || asks["bearer"].is_string();
        let asked = request(asks, &oracle);
        let answer = send(if stranger { &anonymous } else { &client }, asked).await;
        let response = &recorded["response"];
        let expected = response["status"].as_u64().unwrap();
        let text = String::from_utf8_lossy(answer.body()).into_owned();
        if u64::from(answer.status().as_u16()) != expected {
            oracle.problems.push(format!(
                "{name}: status {expected} there, {} here: {text}",
                answer.status()
            ));
            continue;
        }
        for header in ["Content-Type", "Warning"] {
            let ours: Vec<&str> = answer
                .headers()
                .get_all(header)
                .iter()
                .map(|value| value.to_str().unwrap())
                .collect();
            match response["headers"][header].as_str() {
                Some(recorded) if ours != [recorded] => {
                    oracle
                        .problems
                        .push(format!("{name}: {header} {recorded} there, {ours:?} here"));
                }
                None if header == "Warning" && !ours.is_empty() => {
                    oracle.problems.push(format!("{name}: {header} {ours:?} here"));
                }
                _ => {}
            }
        }
        let ours: Value = serde_json::from_str(&text).unwrap_or_else(|_| text.into());
        oracle.list = ours["items"].is_array() || ours["kind"] == "Table";
        oracle.compare(name, "", &response["body"], &ours);
        oracle.list = false;
        if *name == "namespace-create" {
            watch = Some(start_watch(&client, &oracle));
        }
    }
    let ours = watch.unwrap().await.unwrap();
    compare_watch(&mut oracle, &ours);
    let unmet: Vec<_> = (0..DIFFERENT.len())
        .filter(|index| !oracle.met.contains(index))
        .map(|index| DIFFERENT[index])
        .collect();
    assert!(unmet.is_empty(), "not a difference any more: {unmet:?}");
    assert!(
        oracle.problems.is_empty(),
        "{} differences:\n{}",
        oracle.problems.len(),
        oracle.problems.join("\n")
    );
    server.stop().await;
}

/// Starts the recorded watch; it ends after its recorded time.
fn start_watch(client: &kube::Client, oracle: &Oracle) -> tokio::task::JoinHandle<Vec<Value>> {
    let request = request(&fixture(WATCH)["request"], oracle);
    let client = client.clone();
    tokio::spawn(async move {
        let answer = send(&client, request).await;
        answer
            .body()
            .split(|byte| *byte == b'\n')
            .filter(|line| !line.is_empty())
            .map(|line| serde_json::from_slice(line).unwrap())
            .collect()
    })
}

fn compare_watch(oracle: &mut Oracle, ours: &[Value]) {
    let recorded = fixture(WATCH);
    let recorded = recorded["response"]["body"].as_array().unwrap();
    // How many bookmarks come when depends on the clock; the first and the last one are part of the protocol.
    let events = |list: &[Value]| -> Vec<Value> {
        list.iter()
            .filter(|event| event["type"] != "BOOKMARK")
            .cloned()
            .collect()
    };
    for (place, recorded, ours) in [
        ("first", recorded.first(), ours.first()),
        ("last", recorded.last(), ours.last()),
    ] {
        let (recorded, ours) = (recorded.unwrap(), ours.unwrap());
        oracle.compare(WATCH, &format!("bookmark {place}"), recorded, ours);
    }
    let (recorded, ours) = (events(recorded), events(ours));
    let names = |list: &[Value]| -> Vec<String> {
        list.iter()
            .map(|event| format!("{} {}", event["type"], event["object"]["metadata"]["name"]))
            .collect()
    };
    if names(&recorded) != names(&ours) {
        oracle.problems.push(format!(
            "{WATCH}: {:?} there, {:?} here",
            names(&recorded),
            names(&ours)
        ));
    }
    for (recorded, ours) in recorded.iter().zip(&ours) {
        oracle.compare(WATCH, "", recorded, ours);
    }
}

#[tokio::test]
async fn documents_that_list_more_say_the_same_about_what_is_served() {
    let server = Server::start().await;
    let client = server.client().await;
    for (name, place, key, missing) in PARTLY {
        let recorded = fixture(name);
        let answer = send(&client, request(&recorded["request"], &Oracle::default())).await;
        assert_eq!(
            u64::from(answer.status().as_u16()),
            recorded["response"]["status"]
        );
        assert_eq!(
            answer.headers()["content-type"],
            recorded["response"]["headers"]["Content-Type"].as_str().unwrap()
        );
        let mut ours: Value = serde_json::from_slice(answer.body()).unwrap();
        let mut theirs = recorded["response"]["body"].clone();
        let entries = |body: &mut Value| -> BTreeMap<String, Value> {
            let list = body.pointer_mut(place).unwrap().take();
            let list = list.as_array().unwrap().clone();
            list.into_iter()
                .map(|entry| (entry[key].as_str().unwrap().to_owned(), entry))
                .collect()
        };
        let (mine, all) = (entries(&mut ours), entries(&mut theirs));
        assert_eq!(ours, theirs, "{name}");
        let missed: Vec<&str> = all
            .keys()
            .filter(|entry| !mine.contains_key(*entry))
            .map(String::as_str)
            .collect();
        assert_eq!(&missed, missing, "{name}");
        for (entry, mine) in mine {
            let (mut mine, mut theirs) = (mine, all[&entry].clone());
            // Subresources are compared in the plain document, which has each as an entry.
            for side in [&mut mine, &mut theirs] {
                side.as_object_mut().unwrap().remove("subresources");
            }
            assert_eq!(mine, theirs, "{name} {entry}");
        }
    }
    server.stop().await;
}

#[test]
fn every_recording_is_replayed_or_says_why_not() {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/apiserver-1.36");
    let there: BTreeSet<String> = std::fs::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "json"))
        .map(|path| path.file_stem().unwrap().to_str().unwrap().to_owned())
        .collect();
    let listed: BTreeSet<String> = REPLAYED
        .iter()
        .copied()
        .chain([WATCH])
        .chain(PARTLY.iter().map(|(name, ..)| *name))
        .chain(SKIPPED.iter().map(|(name, _)| *name))
        .map(str::to_owned)
        .collect();
    assert_eq!(
        there.difference(&listed).collect::<Vec<_>>(),
        Vec::<&String>::new()
    );
}
