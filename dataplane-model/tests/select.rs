//! Which endpoints a service uses, as a table: the cases that the specification of kube-proxy names (spec 1.3, 7.7), from
//! objects to sets.
#![expect(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test that cannot go on must fail"
)]

use dataplane_model::{Event, Family, Model, ObjectName, Protocol, ServiceKey};
use serde_json::{Value, json};

/// One case. This node is `n1`, in zone `a` unless the case says otherwise.
struct Case {
    name: &'static str,
    /// Words: `itp`, `etp` (policy Local), `nodeport`, `lb`, `proxy-lb`, `eip` (external access).
    service: &'static str,
    /// `None`: the node has no zone label.
    zone: Option<&'static str>,
    /// `<state> <node> [n=<node>,…] [z=<zone>,…]` with the states of [`endpoint`]; called 1, 2, … in the expectations.
    endpoints: &'static [&'static str],
    cluster: &'static [u8],
    local: &'static [u8],
    reachable: &'static [u8],
    has_any: bool,
}

/// States: `R` ready, `N` not ready and not serving, `T` terminating and serving, `D` terminating and not serving, `S`
/// serving but neither ready nor terminating, `P` ready although terminating (publishNotReadyAddresses), `-` no conditions.
fn endpoint(number: usize, text: &str) -> Value {
    let mut words = text.split(' ');
    let conditions = match words.next().unwrap() {
        "R" => json!({"ready": true, "serving": true, "terminating": false}),
        "N" => json!({"ready": false, "serving": false, "terminating": false}),
        "T" => json!({"ready": false, "serving": true, "terminating": true}),
        "D" => json!({"ready": false, "serving": false, "terminating": true}),
        "S" => json!({"ready": false, "serving": true, "terminating": false}),
        "P" => json!({"ready": true, "serving": true, "terminating": true}),
        "-" => json!({}),
        other => panic!("state {other}"),
    };
    let node = words.next().unwrap();
    let mut hints = json!({});
    for word in words {
        let (kind, names) = word.split_once('=').unwrap();
        let names: Vec<Value> = names.split(',').map(|n| json!({"name": n})).collect();
        hints[if kind == "n" { "forNodes" } else { "forZones" }] = names.into();
    }
    let mut out =
        json!({"addresses": [format!("10.0.0.{number}")], "conditions": conditions, "hints": hints});
    if node != "-" {
        out["nodeName"] = node.into();
    }
    out
}

fn model(case: &Case) -> Model {
    let mut service = json!({
        "metadata": {"namespace": "ns", "name": "s"},
        "spec": {"type": "ClusterIP", "clusterIP": "10.96.0.1", "ports": [{"name": "p", "port": 80}]},
    });
    for word in case.service.split_whitespace() {
        match word {
            "itp" => service["spec"]["internalTrafficPolicy"] = "Local".into(),
            "etp" => service["spec"]["externalTrafficPolicy"] = "Local".into(),
            "nodeport" => {
                service["spec"]["type"] = "NodePort".into();
                service["spec"]["ports"][0]["nodePort"] = 30001.into();
            }
            "lb" | "proxy-lb" => {
                let mode = if word == "lb" { "VIP" } else { "Proxy" };
                service["spec"]["type"] = "LoadBalancer".into();
                service["status"] = json!({"loadBalancer": {"ingress": [{"ip": "1.2.3.4", "ipMode": mode}]}});
            }
            "eip" => service["spec"]["externalIPs"] = json!(["192.0.2.1"]),
            other => panic!("word {other}"),
        }
    }
    let endpoints: Vec<Value> = (1..)
        .zip(case.endpoints)
        .map(|(i, text)| endpoint(i, text))
        .collect();
    let slice = json!({
        "metadata": {"namespace": "ns", "name": "s-1", "labels": {"kubernetes.io/service-name": "s"}},
        "addressType": "IPv4",
        "ports": [{"name": "p", "port": 8080}],
        "endpoints": endpoints,
    });
    let mut node = json!({"metadata": {"name": "n1", "labels": {"kubernetes.io/os": "linux"}}});
    if let Some(zone) = case.zone {
        node["metadata"]["labels"]["topology.kubernetes.io/zone"] = zone.into();
    }
    let mut model = Model::new("n1");
    for event in [
        Event::ServiceApplied(serde_json::from_value(service).unwrap()),
        Event::SliceApplied(serde_json::from_value(slice).unwrap()),
        Event::NodeApplied(serde_json::from_value(node).unwrap()),
    ] {
        assert_eq!(model.apply(event), [], "{}", case.name);
    }
    model
}

const A: Option<&str> = Some("a");

#[rustfmt::skip]
const CASES: &[Case] = &[
    // nothing special
    Case { name: "no endpoints", service: "", zone: A, endpoints: &[], cluster: &[], local: &[], reachable: &[], has_any: false },
    Case { name: "all ready", service: "", zone: A, endpoints: &["R n1", "R n2", "R n3"], cluster: &[1, 2, 3], local: &[], reachable: &[1, 2, 3], has_any: true },
    Case { name: "conditions absent mean ready", service: "itp", zone: A, endpoints: &["- n1"], cluster: &[], local: &[1], reachable: &[1], has_any: true },
    Case { name: "ready although terminating is ready", service: "", zone: A, endpoints: &["P n1", "T n2"], cluster: &[1], local: &[], reachable: &[1], has_any: true },
    Case { name: "some ready", service: "", zone: A, endpoints: &["R n1", "N n2"], cluster: &[1], local: &[], reachable: &[1], has_any: true },
    Case { name: "none ready", service: "", zone: A, endpoints: &["N n1", "N n2"], cluster: &[], local: &[], reachable: &[], has_any: false },
    Case { name: "serving alone is not enough", service: "", zone: A, endpoints: &["S n1"], cluster: &[], local: &[], reachable: &[], has_any: false },
    // terminating fallback
    Case { name: "all terminating: those that serve", service: "", zone: A, endpoints: &["T n1", "T n2", "D n3"], cluster: &[1, 2], local: &[], reachable: &[1, 2], has_any: true },
    Case { name: "one ready: no terminating", service: "", zone: A, endpoints: &["T n1", "R n2", "T n3"], cluster: &[2], local: &[], reachable: &[2], has_any: true },
    Case { name: "terminating and not serving is never used", service: "", zone: A, endpoints: &["D n1", "N n2"], cluster: &[], local: &[], reachable: &[], has_any: false },
    // zone hints
    Case { name: "hints for the own zone filter", service: "", zone: A, endpoints: &["R n1 z=a", "R n2 z=b", "R n3 z=c", "R n4 z=a"], cluster: &[1, 4], local: &[], reachable: &[1, 4], has_any: true },
    Case { name: "an endpoint with several zones counts for each", service: "", zone: A, endpoints: &["R n1 z=c", "R n2 z=b,a", "R n3 z=b,d", "R n4 z=c,a"], cluster: &[2, 4], local: &[], reachable: &[2, 4], has_any: true },
    Case { name: "node without a zone label: no filter", service: "", zone: None, endpoints: &["R n1 z=a", "R n2 z=b"], cluster: &[1, 2], local: &[], reachable: &[1, 2], has_any: true },
    Case { name: "node with an empty zone label: no filter", service: "", zone: Some(""), endpoints: &["R n1 z=a", "R n2 z=b"], cluster: &[1, 2], local: &[], reachable: &[1, 2], has_any: true },
    Case { name: "node in a zone that no hint names: no filter", service: "", zone: Some("x"), endpoints: &["R n1 z=a", "R n2 z=b"], cluster: &[1, 2], local: &[], reachable: &[1, 2], has_any: true },
    Case { name: "a ready endpoint without hints: no filter", service: "", zone: A, endpoints: &["R n1 z=a", "R n2", "R n3 z=b"], cluster: &[1, 2, 3], local: &[], reachable: &[1, 2, 3], has_any: true },
    Case { name: "an unready endpoint in the zone is left out", service: "", zone: A, endpoints: &["R n1 z=a", "N n2 z=a", "R n3 z=b"], cluster: &[1], local: &[], reachable: &[1], has_any: true },
    Case { name: "only unready endpoints in the zone: no filter", service: "", zone: A, endpoints: &["N n1 z=a", "R n2 z=b", "R n3 z=c"], cluster: &[2, 3], local: &[], reachable: &[2, 3], has_any: true },
    Case { name: "an unready endpoint without hints does not disable hints", service: "", zone: A, endpoints: &["R n1 z=a", "N n2", "R n3 z=b"], cluster: &[1], local: &[], reachable: &[1], has_any: true },
    Case { name: "the fallback knows no zones", service: "", zone: A, endpoints: &["T n1 z=a", "T n2 z=b"], cluster: &[1, 2], local: &[], reachable: &[1, 2], has_any: true },
    // node hints
    Case { name: "hints for this node filter", service: "", zone: A, endpoints: &["R n1 n=n1 z=a", "R n2 n=n2 z=a", "R n3 n=n3 z=b"], cluster: &[1], local: &[], reachable: &[1], has_any: true },
    Case { name: "no hint for this node: the zone decides", service: "", zone: A, endpoints: &["R n2 n=n2 z=a", "R n3 n=n3 z=b"], cluster: &[1], local: &[], reachable: &[1], has_any: true },
    Case { name: "no hint for this node or zone: no filter", service: "", zone: A, endpoints: &["R n2 n=n2 z=c", "R n3 n=n3 z=b"], cluster: &[1, 2], local: &[], reachable: &[1, 2], has_any: true },
    Case { name: "mixed hints: one without node hint, the zone decides", service: "", zone: A, endpoints: &["R n1 n=n1 z=a", "R n2 z=a", "R n3 n=n3 z=b"], cluster: &[1, 2], local: &[], reachable: &[1, 2], has_any: true },
    Case { name: "node hints work without a zone label", service: "", zone: None, endpoints: &["R n1 n=n1 z=a", "R n2 n=n2 z=b"], cluster: &[1], local: &[], reachable: &[1], has_any: true },
    Case { name: "a node hint may name a node that is not the endpoint's", service: "", zone: A, endpoints: &["R n2 n=n1,n2", "R n1 n=n2"], cluster: &[1], local: &[], reachable: &[1], has_any: true },
    Case { name: "the own node's endpoint is unready: the zone decides", service: "", zone: A, endpoints: &["N n1 n=n1 z=a", "R n2 n=n2 z=a", "R n3 n=n3 z=b"], cluster: &[2], local: &[], reachable: &[2], has_any: true },
    // internalTrafficPolicy: Local
    Case { name: "iTP Local, no endpoints", service: "itp", zone: A, endpoints: &[], cluster: &[], local: &[], reachable: &[], has_any: false },
    Case { name: "iTP Local, all remote", service: "itp", zone: A, endpoints: &["R n2", "R n3"], cluster: &[], local: &[], reachable: &[], has_any: true },
    Case { name: "iTP Local, all local", service: "itp", zone: A, endpoints: &["R n1", "R n1"], cluster: &[], local: &[1, 2], reachable: &[1, 2], has_any: true },
    Case { name: "iTP Local, some local", service: "itp", zone: A, endpoints: &["R n1", "R n2"], cluster: &[], local: &[1], reachable: &[1], has_any: true },
    Case { name: "iTP Local ignores hints", service: "itp", zone: A, endpoints: &["R n1 z=b", "R n1 z=a", "R n2 z=a"], cluster: &[], local: &[1, 2], reachable: &[1, 2], has_any: true },
    Case { name: "iTP Local, local terminating", service: "itp", zone: A, endpoints: &["T n1", "D n1", "R n2"], cluster: &[], local: &[1], reachable: &[1], has_any: true },
    Case { name: "iTP Local, terminating elsewhere only", service: "itp", zone: A, endpoints: &["T n2", "N n1"], cluster: &[], local: &[], reachable: &[], has_any: true },
    Case { name: "iTP Local, none usable anywhere", service: "itp", zone: A, endpoints: &["N n1", "D n2"], cluster: &[], local: &[], reachable: &[], has_any: false },
    Case { name: "an endpoint without node name is never local", service: "itp", zone: A, endpoints: &["R -", "R n2"], cluster: &[], local: &[], reachable: &[], has_any: true },
    // externalTrafficPolicy: Local
    Case { name: "eTP Local without external access is ignored", service: "etp", zone: A, endpoints: &["R n1", "R n2"], cluster: &[1, 2], local: &[], reachable: &[1, 2], has_any: true },
    Case { name: "eTP Local, node port: some local", service: "etp nodeport", zone: A, endpoints: &["R n1", "R n2"], cluster: &[1, 2], local: &[1], reachable: &[1, 2], has_any: true },
    Case { name: "eTP Local, load balancer: all remote", service: "etp lb", zone: A, endpoints: &["R n2", "R n3"], cluster: &[1, 2], local: &[], reachable: &[1, 2], has_any: true },
    Case { name: "eTP Local, balancer that is a proxy gives no access", service: "etp proxy-lb", zone: A, endpoints: &["R n1", "R n2"], cluster: &[1, 2], local: &[], reachable: &[1, 2], has_any: true },
    Case { name: "eTP Local, external IP on a ClusterIP service", service: "etp eip", zone: A, endpoints: &["R n1", "R n2"], cluster: &[1, 2], local: &[1], reachable: &[1, 2], has_any: true },
    Case { name: "eTP Local ignores hints for the local set; both sets are reachable", service: "etp nodeport", zone: A, endpoints: &["R n1 z=b", "R n2 z=a", "R n3 z=b"], cluster: &[2], local: &[1], reachable: &[1, 2], has_any: true },
    Case { name: "eTP Local, local ones terminate, remote ones are ready", service: "etp nodeport", zone: A, endpoints: &["T n1", "R n2"], cluster: &[2], local: &[1], reachable: &[1, 2], has_any: true },
    Case { name: "eTP Local, everything terminates", service: "etp nodeport", zone: A, endpoints: &["T n1", "T n2", "D n1"], cluster: &[1, 2], local: &[1], reachable: &[1, 2], has_any: true },
    Case { name: "eTP Local, none usable", service: "etp nodeport", zone: A, endpoints: &["N n1", "D n2"], cluster: &[], local: &[], reachable: &[], has_any: false },
    // both
    Case { name: "iTP Local, eTP Cluster, some local", service: "itp nodeport", zone: A, endpoints: &["R n1", "R n2"], cluster: &[1, 2], local: &[1], reachable: &[1, 2], has_any: true },
    Case { name: "iTP Local, eTP Cluster, all remote", service: "itp nodeport", zone: A, endpoints: &["R n2", "R n3"], cluster: &[1, 2], local: &[], reachable: &[1, 2], has_any: true },
    Case { name: "both Local, some local", service: "itp etp nodeport", zone: A, endpoints: &["R n1", "R n2"], cluster: &[1, 2], local: &[1], reachable: &[1, 2], has_any: true },
    Case { name: "both Local, all remote", service: "itp etp lb", zone: A, endpoints: &["R n2"], cluster: &[1], local: &[], reachable: &[1], has_any: true },
    Case { name: "both Local without external access: no cluster set", service: "itp etp", zone: A, endpoints: &["R n1", "R n2"], cluster: &[], local: &[1], reachable: &[1], has_any: true },
    // hints and policies, hints and readiness
    Case { name: "hints filter external traffic too", service: "nodeport", zone: A, endpoints: &["R n1 z=a", "R n2 z=b"], cluster: &[1], local: &[], reachable: &[1], has_any: true },
    Case { name: "a local endpoint is no exception from hints", service: "", zone: A, endpoints: &["R n1 z=b", "R n2 z=a"], cluster: &[2], local: &[], reachable: &[2], has_any: true },
    Case { name: "a terminating endpoint without hints does not disable hints", service: "", zone: A, endpoints: &["R n1 z=a", "R n2 z=b", "T n3"], cluster: &[1], local: &[], reachable: &[1], has_any: true },
    Case { name: "a terminating endpoint in the zone does not enable hints", service: "", zone: A, endpoints: &["T n1 z=a", "R n2 z=b"], cluster: &[2], local: &[], reachable: &[2], has_any: true },
    Case { name: "hints of both kinds, neither on all: no filter", service: "", zone: A, endpoints: &["R n1 n=n1", "R n2 z=a"], cluster: &[1, 2], local: &[], reachable: &[1, 2], has_any: true },
    Case { name: "node hints: the fallback knows none", service: "", zone: A, endpoints: &["T n1 n=n1", "T n2 n=n2"], cluster: &[1, 2], local: &[], reachable: &[1, 2], has_any: true },
    Case { name: "eTP Local, hints for this node elsewhere", service: "etp nodeport", zone: A, endpoints: &["R n2 n=n1", "R n1 n=n2"], cluster: &[1], local: &[2], reachable: &[1, 2], has_any: true },
    Case { name: "eTP Local, hints, local ones terminate", service: "etp lb", zone: A, endpoints: &["T n1", "R n2 z=a", "R n3 z=b"], cluster: &[2], local: &[1], reachable: &[1, 2], has_any: true },
    Case { name: "eTP Local, hints, none local", service: "etp nodeport", zone: A, endpoints: &["R n2 z=a", "R n3 z=b"], cluster: &[1], local: &[], reachable: &[1], has_any: true },
    Case { name: "eTP Local, ready here, terminating elsewhere", service: "etp eip", zone: A, endpoints: &["R n1", "T n2"], cluster: &[1], local: &[1], reachable: &[1], has_any: true },
    Case { name: "both Local, local terminating, others ready and terminating", service: "itp etp nodeport", zone: A, endpoints: &["T n1", "R n2", "T n3"], cluster: &[2], local: &[1], reachable: &[1, 2], has_any: true },
    Case { name: "eTP Local, terminating elsewhere only", service: "etp nodeport", zone: A, endpoints: &["T n2", "N n1"], cluster: &[1], local: &[], reachable: &[1], has_any: true },
];

#[test]
fn endpoints_are_selected_as_by_kube_proxy() {
    let key = ServiceKey {
        service: ObjectName::new("ns", "s"),
        port_name: "p".into(),
        protocol: Protocol::Tcp,
        family: Family::V4,
    };
    let mut wrong = Vec::new();
    for case in CASES {
        let model = model(case);
        let selection = model.selection(&key).unwrap();
        let numbers = |set: &[dataplane_model::SetBackend]| -> Vec<u8> {
            let mut out: Vec<u8> = set
                .iter()
                .map(|m| m.backend.addr.v4_be().to_ne_bytes()[3])
                .collect();
            out.sort_unstable();
            out
        };
        let found = (
            numbers(&selection.cluster),
            numbers(&selection.local),
            numbers(&selection.reachable()),
            selection.has_any,
        );
        let expected = (
            case.cluster.to_vec(),
            case.local.to_vec(),
            case.reachable.to_vec(),
            case.has_any,
        );
        if found != expected {
            wrong.push(format!("{}: {found:?}, expected {expected:?}", case.name));
        }
        let desired = model.desired(&key).unwrap();
        assert_eq!(
            (numbers(&desired.cluster), numbers(&desired.local)),
            (found.0, found.1),
            "{}",
            case.name
        );
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    let mut names: Vec<_> = CASES.iter().map(|c| c.name).collect();
    names.sort_unstable();
    names.dedup();
    assert_eq!(names.len(), CASES.len(), "every case has its own name");
}
