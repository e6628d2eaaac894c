//! The rules by which kube-proxy reads Services, endpoint slices and Nodes (spec kube-proxy 1.1, 1.2), and what a real API
//! server said.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on must fail")]

mod common;

use common::{merge, ready, service, slice};
use dataplane_common::abi::service_flag::{EXTERNAL_LOCAL, HAS_ENDPOINTS, INTERNAL_LOCAL};
use dataplane_model::object::{MAX_MESSAGE, MAX_PROBLEMS};
use dataplane_model::{DesiredService, Event, Model, SetBackend};
use k8s_openapi::serde::de::DeserializeOwned;
use serde_json::{Value, json};

/// Service key to frontends and both sets, as text, in order of key.
fn shown(model: &Model) -> Vec<String> {
    let set = |set: &[SetBackend]| {
        let members = set.iter().map(|m| m.backend.to_string());
        members.collect::<Vec<_>>().join(" ")
    };
    let services = model.desired_all().services;
    let shown = services.iter().map(|(key, service)| {
        let frontends = service.frontends.keys();
        let at: Vec<_> = frontends.map(|f| format!("{}:{}", f.addr, f.port)).collect();
        let (cluster, local) = (set(&service.cluster), set(&service.local));
        format!("{key} at {}: [{cluster}] [{local}]", at.join(" "))
    });
    shown.collect()
}

/// The only service of the model.
fn only(model: &Model) -> DesiredService {
    let mut services = model.desired_all().services;
    assert_eq!(services.len(), 1, "{services:?}");
    services.pop_first().unwrap().1
}

fn texts(model: &mut Model, event: Event) -> Vec<String> {
    model.apply(event).iter().map(ToString::to_string).collect()
}

fn node(name: &str, zone: Option<&str>) -> Event {
    let mut node = json!({"metadata": {"name": name, "labels": {}}});
    if let Some(zone) = zone {
        node["metadata"]["labels"]["topology.kubernetes.io/zone"] = zone.into();
    }
    Event::NodeApplied(serde_json::from_value(node).unwrap())
}

/// The body of a recorded answer.
fn recorded(text: &str) -> Value {
    let mut record: Value = serde_json::from_str(text).unwrap();
    record["response"]["body"].take()
}

fn objects<T: DeserializeOwned>(list: &Value) -> Vec<T> {
    let items = list["items"].as_array().unwrap();
    items
        .iter()
        .map(|item| serde_json::from_value(item.clone()).unwrap())
        .collect()
}

#[test]
fn what_a_real_api_server_lists_is_understood() {
    let mut model = Model::new("rec1");
    let node = recorded(include_str!("fixtures/node-get.json"));
    let services = recorded(include_str!("fixtures/service-list.json"));
    let slices = recorded(include_str!("fixtures/endpointslice-list.json"));
    for event in [
        Event::NodesReplaced(vec![serde_json::from_value(node).unwrap()]),
        Event::ServicesReplaced(objects(&services)),
        Event::SlicesReplaced(objects(&slices)),
    ] {
        assert_eq!(model.apply(event), []);
    }
    assert_eq!(model.zone(), Some("z1"));
    // the headless Service is none of ours, nor is its slice
    assert_eq!(model.object_counts(), (2, 4));
    assert_eq!(
        shown(&model),
        [
            "demo/lb/TCP IPv4 at 0.0.0.0:32134 10.96.88.94:80: [] []",
            "demo/myweb:http/TCP IPv4 at 0.0.0.0:30001 10.109.216.163:8080: [10.244.1.3:8080/TCP] []",
        ]
    );
    let balanced = recorded(include_str!("fixtures/service-status-patch.json"));
    model.take_dirty();
    let event = Event::ServiceApplied(serde_json::from_value(balanced).unwrap());
    assert_eq!(model.apply(event), []);
    assert_eq!(
        model.take_dirty().len(),
        1,
        "the load balancer's address came: the service may use local endpoints"
    );
}

#[test]
fn what_a_real_api_server_reports_is_followed() {
    let mut model = Model::new("rec1");
    let mut most = Vec::new();
    for entry in recorded(include_str!("fixtures/service-watch-stream.json"))
        .as_array()
        .unwrap()
    {
        let object = &entry["object"];
        let text = |field: &str| object["metadata"][field].as_str().unwrap().to_owned();
        let event = match entry["type"].as_str().unwrap() {
            "ADDED" | "MODIFIED" => Event::ServiceApplied(serde_json::from_value(object.clone()).unwrap()),
            "DELETED" => Event::ServiceDeleted {
                namespace: text("namespace"),
                name: text("name"),
            },
            _ => continue,
        };
        assert_eq!(model.apply(event), []);
        let now = shown(&model);
        if now.len() >= most.len() {
            most = now;
        }
    }
    assert_eq!(
        most,
        [
            "demo/applied/TCP IPv4 at 10.111.217.100:80: [] []",
            "demo/lb/TCP IPv4 at 0.0.0.0:32134 203.0.113.7:80 10.96.88.94:80: [] []",
            "demo/myweb:extra/TCP IPv4 at 0.0.0.0:32512 10.109.216.163:9090: [] []",
            "demo/myweb:http/TCP IPv4 at 0.0.0.0:30001 10.109.216.163:8080: [] []",
        ]
    );
    assert_eq!(model.desired_all().services.len(), 0, "all were deleted");
    assert_eq!(model.take_dirty().len(), 4);
}

#[test]
fn ports_are_joined_by_name_and_protocol_over_all_slices() {
    let mut model = Model::new("n1");
    let ports = json!({"spec": {"ports": [
        {"name": "web", "port": 80},
        {"name": "dns", "port": 53, "protocol": "UDP"},
        {"name": "dns-tcp", "port": 53, "protocol": "TCP"},
    ]}});
    model.apply(service("s", "10.96.0.1", &ports));
    let slices = [
        (
            json!([{"name": "web", "port": 8080}, {"name": "dns", "port": 5353, "protocol": "UDP"}]),
            "10.0.0.1",
        ),
        // another number for the same port, and names or protocols that the Service does not have
        (
            json!([{"name": "web", "port": 8081}, {"name": "Web", "port": 1}, {"name": "web", "port": 2, "protocol": "UDP"}]),
            "10.0.0.2",
        ),
        (
            json!([{"name": "dns-tcp", "port": 5354}, {"name": "", "port": 3}]),
            "10.0.0.3",
        ),
    ];
    for (i, (ports, address)) in slices.into_iter().enumerate() {
        model.apply(slice(
            &format!("s-{i}"),
            "s",
            &ready(&[address]),
            &json!({"ports": ports}),
        ));
    }
    assert_eq!(
        shown(&model),
        [
            "ns/s:dns/UDP IPv4 at 10.96.0.1:53: [10.0.0.1:5353/UDP] []",
            "ns/s:dns-tcp/TCP IPv4 at 10.96.0.1:53: [10.0.0.3:5354/TCP] []",
            "ns/s:web/TCP IPv4 at 10.96.0.1:80: [10.0.0.1:8080/TCP 10.0.0.2:8081/TCP] []",
        ]
    );
}

/// A Service with one local and one remote endpoint.
fn with_two_endpoints(more: &Value) -> DesiredService {
    let mut model = Model::new("n1");
    assert_eq!(model.apply(service("s", "10.96.0.1", more)), []);
    let endpoints = json!([
        {"addresses": ["10.0.0.1"], "nodeName": "n1"},
        {"addresses": ["10.0.0.2"], "nodeName": "n2"},
    ]);
    assert_eq!(model.apply(slice("s-1", "s", &endpoints, &json!({}))), []);
    only(&model)
}

#[test]
fn external_policy_counts_for_some_types_only() {
    let port = json!([{"name": "p", "port": 80, "nodePort": 30001}]);
    for (name, more, flags, local) in [
        ("ClusterIP", json!({"type": "ClusterIP"}), 0, 0),
        (
            "ClusterIP that still has a node port",
            json!({"type": "ClusterIP", "ports": port}),
            0,
            0,
        ),
        (
            "ClusterIP with external IP",
            json!({"type": "ClusterIP", "externalIPs": ["192.0.2.1"]}),
            EXTERNAL_LOCAL,
            1,
        ),
        (
            "ClusterIP with external IP of the other family",
            json!({"type": "ClusterIP", "externalIPs": ["2001:db8::1"]}),
            EXTERNAL_LOCAL,
            0,
        ),
        (
            "NodePort",
            json!({"type": "NodePort", "ports": port}),
            EXTERNAL_LOCAL,
            1,
        ),
        (
            "LoadBalancer",
            json!({"type": "LoadBalancer", "ports": port}),
            EXTERNAL_LOCAL,
            1,
        ),
        (
            "LoadBalancer without node port or address",
            json!({"type": "LoadBalancer"}),
            EXTERNAL_LOCAL,
            0,
        ),
    ] {
        let mut spec = json!({"spec": {"externalTrafficPolicy": "Local"}});
        merge(&mut spec["spec"], &more);
        let desired = with_two_endpoints(&spec);
        assert_eq!(
            (desired.config.flags, desired.local.len()),
            (flags | HAS_ENDPOINTS, local),
            "{name}"
        );
        assert_eq!(
            desired.cluster.len(),
            2,
            "{name}: internal traffic is not affected"
        );
    }
}

#[test]
fn internal_policy_is_cluster_unless_local() {
    for (policy, flags, sets) in [
        (json!(null), 0, (2, 0)),
        (json!("Cluster"), 0, (2, 0)),
        (json!("Local"), INTERNAL_LOCAL, (0, 1)),
    ] {
        let desired = with_two_endpoints(&json!({"spec": {"internalTrafficPolicy": policy}}));
        let found = (desired.cluster.len(), desired.local.len());
        assert_eq!(
            (desired.config.flags, found),
            (flags | HAS_ENDPOINTS, sets),
            "{policy}"
        );
    }
}

#[test]
fn a_load_balancer_counts_by_address_and_mode() {
    for (name, ingress, accessible) in [
        ("mode absent", json!([{"ip": "203.0.113.7"}]), true),
        ("VIP", json!([{"ip": "203.0.113.7", "ipMode": "VIP"}]), true),
        ("with leading zeros", json!([{"ip": "203.0.113.007"}]), true),
        ("Proxy", json!([{"ip": "203.0.113.7", "ipMode": "Proxy"}]), false),
        (
            "one of each",
            json!([{"ip": "203.0.113.7", "ipMode": "Proxy"}, {"ip": "203.0.113.8"}]),
            true,
        ),
        ("host name", json!([{"hostname": "lb.example"}]), false),
        (
            "empty address",
            json!([{"ip": "", "hostname": "lb.example"}]),
            false,
        ),
        ("other family", json!([{"ip": "2001:db8::1"}]), false),
        ("none", json!(null), false),
    ] {
        let desired = with_two_endpoints(&json!({
            "spec": {"type": "LoadBalancer", "externalTrafficPolicy": "Local"},
            "status": {"loadBalancer": {"ingress": ingress}},
        }));
        assert_eq!(desired.local.len(), usize::from(accessible), "{name}");
    }
}

#[test]
fn cluster_ips_are_taken_by_family() {
    for (name, ip, more, at) in [
        ("no families, IPv4", "10.96.0.1", json!({}), vec!["10.96.0.1"]),
        ("no families, IPv6", "fd00::1", json!({}), vec!["fd00::1"]),
        (
            "no families: the list is not read",
            "10.96.0.1",
            json!({"clusterIPs": ["10.96.0.1", "fd00::1"]}),
            vec!["10.96.0.1"],
        ),
        (
            "families without a list",
            "10.96.0.1",
            json!({"ipFamilies": ["IPv4"]}),
            vec!["10.96.0.1"],
        ),
        (
            "both",
            "10.96.0.1",
            json!({"ipFamilies": ["IPv4", "IPv6"], "clusterIPs": ["10.96.0.1", "fd00::1"]}),
            vec!["10.96.0.1", "fd00::1"],
        ),
        (
            "both, IPv6 first",
            "fd00::1",
            json!({"ipFamilies": ["IPv6", "IPv4"], "clusterIPs": ["fd00::1", "10.96.0.1"]}),
            vec!["10.96.0.1", "fd00::1"],
        ),
        (
            "more addresses than families",
            "10.96.0.1",
            json!({"ipFamilies": ["IPv4"], "clusterIPs": ["10.96.0.1", "fd00::1"]}),
            vec!["10.96.0.1"],
        ),
        (
            "more families than addresses",
            "10.96.0.1",
            json!({"ipFamilies": ["IPv4", "IPv6"], "clusterIPs": ["10.96.0.1"]}),
            vec!["10.96.0.1"],
        ),
        (
            "a family twice: the first",
            "10.96.0.1",
            json!({"ipFamilies": ["IPv4", "IPv4"], "clusterIPs": ["10.96.0.1", "10.96.0.2"]}),
            vec!["10.96.0.1"],
        ),
        (
            "leading zeros",
            "010.096.000.001",
            json!({"ipFamilies": ["IPv4"]}),
            vec!["10.96.0.1"],
        ),
        (
            "IPv4 in IPv6",
            "::ffff:10.96.0.1",
            json!({"ipFamilies": ["IPv4"]}),
            vec!["10.96.0.1"],
        ),
    ] {
        let mut model = Model::new("n1");
        assert_eq!(
            model.apply(service("s", ip, &json!({"spec": more}))),
            [],
            "{name}"
        );
        let services = model.desired_all().services;
        let frontends = services.values().flat_map(|s| s.frontends.keys());
        let found: Vec<_> = frontends.map(|f| f.addr.to_string()).collect();
        assert_eq!(found, at, "{name}");
    }
}

#[test]
fn a_new_zone_touches_services_with_hints_only() {
    let mut model = Model::new("n1");
    for name in ["hinted", "plain", "unhinted-zone"] {
        let i = name.len();
        model.apply(service(name, &format!("10.96.0.{i}"), &json!({})));
        let hints = match name {
            "hinted" => json!({"forZones": [{"name": "a"}]}),
            "plain" => json!(null),
            _ => json!({"forNodes": [{"name": "n1"}], "forZones": []}),
        };
        let endpoints =
            json!([{"addresses": [format!("10.0.0.{i}")], "hints": hints}, {"addresses": ["10.0.1.1"]}]);
        model.apply(slice(name, name, &endpoints, &json!({})));
    }
    model.take_dirty();
    let touched = |model: &mut Model, event: Event| -> Vec<String> {
        assert_eq!(model.apply(event), []);
        model
            .take_dirty()
            .iter()
            .map(|k| k.service.name.to_string())
            .collect()
    };
    assert_eq!(touched(&mut model, node("n1", Some("a"))), ["hinted"]);
    assert_eq!(touched(&mut model, node("n1", Some("a"))), [""; 0], "known");
    assert_eq!(
        touched(&mut model, node("n2", Some("b"))),
        [""; 0],
        "another node"
    );
    assert_eq!(
        touched(&mut model, Event::NodeDeleted { name: "n2".into() }),
        [""; 0]
    );
    assert_eq!(model.zone(), Some("a"));
    assert_eq!(touched(&mut model, node("n1", None)), ["hinted"]);
    model.apply(node("n1", Some("a")));
    assert_eq!(
        touched(&mut model, Event::NodeDeleted { name: "n1".into() }),
        ["hinted"]
    );
    model.apply(node("n1", Some("a")));
    assert_eq!(touched(&mut model, Event::NodesReplaced(vec![])), ["hinted"]);
    assert_eq!(model.zone(), None);
}

#[test]
fn without_a_node_name_no_endpoint_is_local() {
    let mut model = Model::new("");
    model.apply(service(
        "s",
        "10.96.0.1",
        &json!({"spec": {"internalTrafficPolicy": "Local"}}),
    ));
    let endpoints = json!([{"addresses": ["10.0.0.1"], "nodeName": ""}, {"addresses": ["10.0.0.2"]}]);
    model.apply(slice("s-1", "s", &endpoints, &json!({})));
    let desired = only(&model);
    let has_endpoints = desired.config.flags & HAS_ENDPOINTS != 0;
    assert_eq!((desired.local.len(), has_endpoints), (0, true));
}

#[test]
fn addresses_that_nobody_can_connect_to_and_bad_node_ports_are_named() {
    for (ip, more, problems, offered) in [
        (
            "0.0.0.0",
            json!({}),
            vec!["cluster IP 0.0.0.0 cannot be offered"],
            0,
        ),
        ("::", json!({}), vec!["cluster IP :: cannot be offered"], 0),
        (
            "224.0.0.1",
            json!({}),
            vec!["cluster IP 224.0.0.1 cannot be offered"],
            0,
        ),
        (
            "10.96.0.1",
            json!({"ports": [{"name": "p", "port": 80, "nodePort": 70000}, {"name": "q", "port": 81, "nodePort": -1}]}),
            vec![
                "port \"p\": node port 70000 is not a port number (1 to 65535)",
                "port \"q\": node port -1 is not a port number (1 to 65535)",
            ],
            2,
        ),
        (
            "10.96.0.1",
            json!({"ports": [{"name": "p", "port": 80}, {"name": "p", "port": 81}, {"name": "p", "port": 80, "protocol": "UDP"}]}),
            vec!["port \"p\"/TCP is there twice"],
            2,
        ),
    ] {
        let mut model = Model::new("n1");
        let found = texts(&mut model, service("s", ip, &json!({"spec": more})));
        let named: Vec<_> = problems.iter().map(|p| format!("Service ns/s: {p}")).collect();
        assert_eq!(found, named);
        let services = model.desired_all().services;
        assert_eq!(
            services.values().map(|s| s.frontends.len()).sum::<usize>(),
            offered,
            "{ip}"
        );
    }
}

#[test]
fn thousands_of_problems_are_counted_and_long_values_are_cut() {
    let mut model = Model::new("n1");
    model.apply(service("s", "10.96.0.1", &json!({})));
    let mut addresses = vec!["no address"; 5000];
    addresses[4000] = "10.0.0.1";
    let found = texts(&mut model, slice("s-1", "s", &ready(&addresses), &json!({})));
    assert_eq!(found.len(), MAX_PROBLEMS + 1);
    assert_eq!(
        found[0],
        "EndpointSlice ns/s-1: endpoint address \"no address\" is not an IP address"
    );
    assert_eq!(
        found[MAX_PROBLEMS],
        "EndpointSlice ns/s-1: and 4983 more problems"
    );
    assert_eq!(only(&model).cluster.len(), 1, "the good one among them is used");

    let long = "é".repeat(100_000);
    let found = texts(
        &mut model,
        slice("s-1", "s", &ready(&[&long, "10.0.0.1"]), &json!({})),
    );
    assert_eq!(found.len(), 1);
    assert!(found[0].chars().count() < MAX_MESSAGE + 40, "{}", found[0].len());
    assert_eq!(only(&model).cluster.len(), 1);
}

#[test]
fn names_of_any_text_work_and_cannot_forge_a_log_line() {
    let noise = "ü\u{202e}\u{0}\n\"\u{1f980}";
    let mut model = Model::new("n1");
    let ports = json!({
        "metadata": {"labels": {noise: noise}, "annotations": {noise: noise}},
        "spec": {"ports": [{"name": noise, "port": 80}, {"name": "", "port": 0}]},
    });
    let printable = |problems: &[String]| problems.iter().all(|p| !p.chars().any(char::is_control));
    let found = texts(&mut model, service(noise, "10.96.0.1", &ports));
    assert_eq!(found.len(), 2, "the label and the port: {found:?}");
    assert!(found[0].contains("\\n") && printable(&found), "{found:?}");
    let of_slice = json!({"ports": [{"name": noise, "port": 8080}]});
    let found = texts(&mut model, slice(noise, noise, &ready(&["10.0.0.1"]), &of_slice));
    assert_eq!(found.len(), 1, "the label: {found:?}");
    assert!(printable(&found), "{found:?}");
    assert_eq!(only(&model).cluster.len(), 1);
    model.apply(Event::SliceDeleted {
        namespace: "ns".into(),
        name: noise.into(),
    });
    assert_eq!(only(&model).cluster.len(), 0);
    model.apply(Event::ServiceDeleted {
        namespace: "ns".into(),
        name: noise.into(),
    });
    assert_eq!(model.desired_all().services.len(), 0);
}

#[test]
fn an_unknown_algorithm_is_named_and_random_is_used() {
    let mut model = Model::new("n1");
    let annotated = |value: &str| json!({"metadata": {"annotations": {"beeline.dev/algorithm": value}}});
    assert_eq!(model.apply(service("s", "10.96.0.1", &annotated("random"))), []);
    let found = texts(&mut model, service("s", "10.96.0.1", &annotated("best")));
    assert_eq!(
        found,
        ["Service ns/s: annotation beeline.dev/algorithm: \"best\" is not supported, random is used"]
    );
    assert_eq!(only(&model).frontends.len(), 1);
}
