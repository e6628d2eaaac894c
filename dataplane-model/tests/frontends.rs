//! Where Services are offered, to whom, and who has an address that several want (spec kube-proxy 1.1, 2.1 to 2.6, 3.3).
#![expect(clippy::unwrap_used, reason = "a test that cannot go on must fail")]

mod common;

use common::{merge, ready, service, slice};
use dataplane_common::abi::{algorithm, frontend_class, frontend_flag, frontend_kind as kind, service_flag};
use dataplane_model::{
    DesiredService, Event, Family, HostPort, Model, ObjectName, Protocol, ServiceKey, Settings, table,
};
use serde_json::{Value, json};

fn key(name: &str, family: Family) -> ServiceKey {
    ServiceKey {
        service: ObjectName::new("ns", name),
        port_name: "p".into(),
        protocol: Protocol::Tcp,
        family,
    }
}

/// Frontends, in order of their text: address and port, class, kind.
fn shown(service: &DesiredService) -> Vec<(String, u8, u8)> {
    let text = |f: &dataplane_common::abi::FrontendKey| format!("{}:{}", f.addr, f.port);
    let frontends = service.frontends.iter();
    let mut out: Vec<_> = frontends
        .map(|(f, offer)| (text(&f), f.class, offer.kind))
        .collect();
    out.sort();
    out
}

fn at(text: &str, kind: u8) -> (String, u8, u8) {
    (text.into(), frontend_class::ADDRESS, kind)
}

fn on_node(text: &str, kind: u8) -> (String, u8, u8) {
    (text.into(), frontend_class::NODE_PORT, kind)
}

/// A dual-stack Service in a model of its own.
fn dual(more: &Value, settings: Settings) -> Model {
    let mut model = Model::with_settings("n1", settings);
    let mut object =
        json!({"spec": {"clusterIPs": ["10.96.0.1", "fd00::1"], "ipFamilies": ["IPv4", "IPv6"]}});
    merge(&mut object, more);
    assert_eq!(model.apply(service("s", "10.96.0.1", &object)), []);
    model
}

fn both(model: &Model) -> [DesiredService; 2] {
    [Family::V4, Family::V6].map(|family| model.desired(&key("s", family)).unwrap())
}

#[test]
fn every_kind_of_frontend_is_offered_in_its_family() {
    let more = json!({
        "spec": {"type": "LoadBalancer", "ports": [{"name": "p", "port": 80, "nodePort": 30001}],
            "externalIPs": ["192.0.2.1", "2001:db8::1", "192.0.2.001"]},
        "status": {"loadBalancer": {"ingress": [
            {"ip": "203.0.113.7"}, {"ip": "203.0.113.8", "ipMode": "Proxy"}, {"ip": "2001:db8::7", "ipMode": "VIP"},
            {"hostname": "lb.example"}]}},
    });
    let [v4, v6] = both(&dual(&more, Settings::default()));
    assert_eq!(
        shown(&v4),
        [
            on_node("0.0.0.0:30001", kind::NODE_PORT),
            at("10.96.0.1:80", kind::CLUSTER_IP),
            at("192.0.2.1:80", kind::EXTERNAL_IP),
            at("203.0.113.7:80", kind::LOAD_BALANCER),
        ]
    );
    assert_eq!(
        shown(&v6),
        [
            at("2001:db8::1:80", kind::EXTERNAL_IP),
            at("2001:db8::7:80", kind::LOAD_BALANCER),
            on_node(":::30001", kind::NODE_PORT),
            at("fd00::1:80", kind::CLUSTER_IP),
        ]
    );
    // the type has no part in it: what is there is served
    let kept =
        json!({"spec": {"type": "ClusterIP", "ports": [{"name": "p", "port": 80, "nodePort": 30001}]}});
    let [v4, _] = both(&dual(&kept, Settings::default()));
    assert_eq!(shown(&v4).len(), 2);
}

#[test]
fn external_ips_can_be_forbidden_but_still_count_for_the_policy() {
    let more = json!({"spec": {"externalIPs": ["192.0.2.1"], "externalTrafficPolicy": "Local",
        "internalTrafficPolicy": "Local"}});
    let settings = Settings {
        external_ips: false,
        ..Settings::default()
    };
    let mut model = dual(&more, settings);
    model.apply(slice("s-1", "s", &ready(&["10.0.0.1"]), &json!({})));
    let [v4, v6] = both(&model);
    assert_eq!(shown(&v4), [at("10.96.0.1:80", kind::CLUSTER_IP)]);
    // spec 1.3: the raw list says that the cluster set is used
    assert_eq!((v4.cluster.len(), v6.cluster.len()), (1, 0));
    assert_eq!(v4.config.tables, 0, "nobody outside can reach it");
}

#[test]
fn source_ranges_count_by_family_and_for_load_balancers_only() {
    let balanced = |ranges: Value| {
        json!({
            "spec": {"type": "LoadBalancer", "externalIPs": ["192.0.2.1"], "loadBalancerSourceRanges": ranges},
            "status": {"loadBalancer": {"ingress": [{"ip": "203.0.113.7"}, {"ip": "2001:db8::7"}]}},
        })
    };
    for (ranges, v4, v6) in [
        (json!(null), &[][..], &[][..]),
        (
            json!([" 198.51.100.0/24\t", "", "198.51.100.7/24"]),
            &["198.51.100.0/24"],
            &[],
        ),
        (
            json!(["203.0.113.000/025", "2001:db8:1::/48"]),
            &["203.0.113.0/25"],
            &["2001:db8:1::/48"],
        ),
        // everybody, in one range, but not in two
        (
            json!(["198.51.100.0/24", "0.0.0.0/0", "::1/128"]),
            &[],
            &["::1/128"],
        ),
        (
            json!(["0.0.0.0/1", "128.0.0.0/1"]),
            &["0.0.0.0/1", "128.0.0.0/1"],
            &[],
        ),
    ] {
        for (found, wanted) in both(&dual(&balanced(ranges.clone()), Settings::default()))
            .iter()
            .zip([v4, v6])
        {
            let list: Vec<String> = found.source_ranges.iter().map(ToString::to_string).collect();
            assert_eq!(list, wanted, "{ranges}");
            for (_, offer) in found.frontends.iter() {
                let asks = offer.flags & frontend_flag::SOURCE_RANGES != 0;
                assert_eq!(
                    asks,
                    offer.kind == kind::LOAD_BALANCER && !wanted.is_empty(),
                    "{ranges}"
                );
            }
        }
    }
    let mut model = Model::new("n1");
    let problems = model.apply(service(
        "s",
        "10.96.0.1",
        &balanced(json!(["nonsense", "10.0.0.0/33", "10.0.0.0/8"])),
    ));
    assert_eq!(problems.len(), 2, "{problems:?}");
    assert_eq!(
        model.desired(&key("s", Family::V4)).unwrap().source_ranges.len(),
        1
    );
}

#[test]
fn a_range_that_covers_this_node_is_known_and_follows_its_address() {
    let more = json!({
        "spec": {"type": "LoadBalancer", "loadBalancerSourceRanges": ["198.51.100.0/24"]},
        "status": {"loadBalancer": {"ingress": [{"ip": "203.0.113.7"}]}},
    });
    let mut model = dual(&more, Settings::default());
    model.take_dirty();
    let node = |addresses: Value| {
        let node = json!({"metadata": {"name": "n1"}, "status": {"addresses": addresses}});
        Event::NodeApplied(serde_json::from_value(node).unwrap())
    };
    let flag = |model: &Model| both(model).map(|s| s.config.flags & service_flag::NODE_IN_RANGES != 0);
    assert_eq!(flag(&model), [false, false]);
    let external = json!({"type": "ExternalIP", "address": "198.51.100.9"});
    model.apply(node(json!([external])));
    assert_eq!(flag(&model), [true, false]);
    assert_eq!(model.take_dirty().len(), 2);
    // an internal address goes before an external one
    model.apply(node(
        json!([external, {"type": "InternalIP", "address": "10.0.0.9"}]),
    ));
    assert_eq!(flag(&model), [false, false]);
    model.take_dirty();
    model.apply(node(
        json!([{"type": "InternalIP", "address": "10.0.0.9"}, external]),
    ));
    assert_eq!(model.take_dirty(), [], "nothing new");
}

#[test]
fn client_affinity_has_the_time_that_is_asked_for() {
    let asked = |seconds: Value| {
        json!({"spec": {"sessionAffinity": "ClientIP",
            "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": seconds}}}})
    };
    for (more, seconds, problems) in [
        (json!({}), 0, 0),
        (json!({"spec": {"sessionAffinity": "None"}}), 0, 0),
        (json!({"spec": {"sessionAffinity": "ClientIP"}}), 10_800, 0),
        (asked(json!(125)), 125, 0),
        (asked(json!(86_400)), 86_400, 0),
        (asked(json!(86_401)), 10_800, 1),
        (asked(json!(0)), 10_800, 1),
        (asked(json!(-1)), 10_800, 1),
        (json!({"spec": {"sessionAffinity": "Cookie"}}), 0, 1),
    ] {
        let mut model = Model::new("n1");
        assert_eq!(
            model.apply(service("s", "10.96.0.1", &more)).len(),
            problems,
            "{more}"
        );
        let desired = model.desired(&key("s", Family::V4)).unwrap();
        assert_eq!(desired.config.affinity_seconds, seconds, "{more}");
    }
}

#[test]
fn annotations_choose_the_algorithm_and_switch_failure_detection() {
    let with = |name: &str, value: &str| json!({"metadata": {"annotations": {format!("beeline.dev/{name}"): value}}});
    for (more, wanted, off) in [
        (json!({}), algorithm::LEAST_CONN, true),
        (with("algorithm", "random"), algorithm::RANDOM, true),
        (with("algorithm", "round-robin"), algorithm::ROUND_ROBIN, true),
        (with("algorithm", "maglev"), algorithm::MAGLEV, true),
        (with("algorithm", "source-hash"), algorithm::SOURCE_HASH, true),
        (with("failure-detection", "on"), algorithm::LEAST_CONN, false),
        (with("failure-detection", "off"), algorithm::LEAST_CONN, true),
    ] {
        let settings = Settings {
            algorithm: algorithm::LEAST_CONN,
            failure_detection: false,
            ..Settings::default()
        };
        let [v4, _] = both(&dual(&more, settings));
        assert_eq!(v4.config.algorithm, wanted, "{more}");
        assert_eq!(
            v4.config.flags & service_flag::NO_FAILURE_DETECTION != 0,
            off,
            "{more}"
        );
    }
    let mut model = Model::new("n1");
    let problems = model.apply(service("s", "10.96.0.1", &with("failure-detection", "maybe")));
    assert_eq!(
        problems[0].message,
        "annotation beeline.dev/failure-detection: \"maybe\" is neither on nor off, on is used"
    );
}

#[test]
fn sets_have_tables_where_somebody_chooses_by_hash() {
    let port = json!([{"name": "p", "port": 80, "nodePort": 30001}]);
    let maglev = json!({"annotations": {"beeline.dev/algorithm": "maglev"}});
    for (name, more, tables, without_external) in [
        ("ClusterIP", json!({}), 0, 0),
        ("NodePort", json!({"spec": {"ports": port}}), table::CLUSTER, 0),
        (
            "NodePort, external Local",
            json!({"spec": {"type": "NodePort", "ports": port, "externalTrafficPolicy": "Local"}}),
            table::LOCAL,
            0,
        ),
        (
            "ClusterIP by maglev",
            json!({"metadata": maglev}),
            table::CLUSTER,
            table::CLUSTER,
        ),
        (
            "ClusterIP by maglev, internal Local",
            json!({"metadata": maglev, "spec": {"internalTrafficPolicy": "Local"}}),
            table::CLUSTER | table::LOCAL,
            table::CLUSTER | table::LOCAL,
        ),
        (
            "NodePort by maglev, external Local",
            json!({"metadata": maglev, "spec": {"type": "NodePort", "ports": port, "externalTrafficPolicy": "Local"}}),
            table::CLUSTER | table::LOCAL,
            table::CLUSTER,
        ),
    ] {
        for (external_maglev, tables) in [(true, tables), (false, without_external)] {
            let settings = Settings {
                external_maglev,
                ..Settings::default()
            };
            let [v4, _] = both(&dual(&more, settings));
            assert_eq!(v4.config.tables, tables, "{name}, {external_maglev}");
        }
    }
}

#[test]
fn a_cluster_ip_is_never_lost_to_what_others_write_into_their_services() {
    let external = json!({"spec": {"externalIPs": ["10.96.0.1"]},
        "metadata": {"creationTimestamp": "2001-01-01T00:00:00Z"}});
    for order in [["victim", "thief"], ["thief", "victim"]] {
        let mut model = Model::new("n1");
        for name in order {
            match name {
                "victim" => model.apply(service("victim", "10.96.0.1", &json!({}))),
                _ => model.apply(service("thief", "10.96.0.2", &external)),
            };
        }
        let of = |model: &Model, name: &str| shown(&model.desired(&key(name, Family::V4)).unwrap());
        assert_eq!(of(&model, "victim"), [at("10.96.0.1:80", kind::CLUSTER_IP)]);
        assert_eq!(of(&model, "thief"), [at("10.96.0.2:80", kind::CLUSTER_IP)]);
        model.take_dirty();
        let gone = Event::ServiceDeleted {
            namespace: "ns".into(),
            name: "victim".into(),
        };
        model.apply(gone);
        assert!(model.take_dirty().contains(&key("thief", Family::V4)));
        assert_eq!(of(&model, "thief").len(), 2);
    }
    // its own address as an external one as well, or external and of a load balancer: one frontend, of the stronger kind
    let more = json!({"spec": {"externalIPs": ["10.96.0.1", "192.0.2.1"]},
        "status": {"loadBalancer": {"ingress": [{"ip": "192.0.2.1"}]}}});
    let [v4, _] = both(&dual(&more, Settings::default()));
    assert_eq!(
        shown(&v4),
        [
            at("10.96.0.1:80", kind::CLUSTER_IP),
            at("192.0.2.1:80", kind::LOAD_BALANCER)
        ]
    );
}

#[test]
fn the_same_node_port_serves_two_protocols() {
    let mut model = Model::new("n1");
    let ports = json!({"spec": {"ports": [
        {"name": "p", "port": 80, "nodePort": 30001}, {"name": "u", "port": 80, "nodePort": 30001, "protocol": "UDP"},
        {"name": "s", "port": 80, "nodePort": 30001, "protocol": "SCTP"}]}});
    assert_eq!(model.apply(service("s", "10.96.0.1", &ports)), []);
    let services = model.desired_all().services;
    assert_eq!(services.len(), 3);
    assert!(services.values().all(|s| s.frontends.len() == 2), "{services:?}");
}

fn host_port(pod: &str, host_ip: Option<&str>, port: u16, backend: &str) -> HostPort {
    HostPort {
        namespace: "ns".into(),
        pod: pod.into(),
        host_ip: host_ip.map(|ip| ip.parse().unwrap()),
        port,
        protocol: Protocol::Tcp,
        backend: backend.parse().unwrap(),
    }
}

/// Every host port as text: where, and the backend.
fn hosted(model: &Model) -> Vec<String> {
    let services = model.desired_all().services;
    let hosted = services
        .values()
        .filter(|s| s.frontends.iter().any(|(_, o)| o.kind == kind::HOST_PORT));
    let mut out: Vec<String> = hosted
        .flat_map(|s| {
            assert!(s.cluster.iter().all(|m| m.local));
            let backend = s.cluster[0].backend.to_string();
            shown(s)
                .into_iter()
                .map(move |(text, class, _)| format!("{text} class {class} to {backend}"))
        })
        .collect();
    out.sort();
    out
}

#[test]
fn host_ports_lead_to_their_pods() {
    let mut model = Model::new("n1");
    let list = vec![
        host_port("a", None, 8080, "10.1.0.2:80"),
        host_port("a", None, 8080, "[fd01::2]:80"),
        host_port("b", Some("127.0.0.1"), 54323, "10.1.0.3:80"),
        host_port("c", Some("192.0.2.9"), 54323, "10.1.0.4:80"),
        host_port("d", Some("0.0.0.0"), 54324, "10.1.0.5:80"),
    ];
    assert_eq!(model.apply(Event::HostPorts(list.clone())), []);
    let all = [
        "0.0.0.0:54324 class 1 to 10.1.0.5:80/TCP",
        "0.0.0.0:8080 class 1 to 10.1.0.2:80/TCP",
        "127.0.0.1:54323 class 0 to 10.1.0.3:80/TCP",
        "192.0.2.9:54323 class 0 to 10.1.0.4:80/TCP",
        ":::8080 class 1 to [fd01::2]:80/TCP",
    ];
    assert_eq!(hosted(&model), all);
    assert_eq!(model.object_counts(), (0, 0), "they are no Services");
    model.take_dirty();
    assert_eq!(model.apply(Event::HostPorts(list.clone())), []);
    assert_eq!(model.take_dirty(), [], "the same again");
    // a complete list of Services says nothing of them
    assert_eq!(model.apply(Event::ServicesReplaced(vec![])), []);
    assert_eq!(hosted(&model), all);
    // a pod goes, another gets a new address
    let mut list = list;
    list.remove(3);
    list[2] = host_port("b", Some("127.0.0.1"), 54323, "10.1.0.33:80");
    assert_eq!(model.apply(Event::HostPorts(list)), []);
    assert_eq!(model.take_dirty().len(), 2);
    assert_eq!(hosted(&model).len(), 4);
    assert!(hosted(&model).contains(&"127.0.0.1:54323 class 0 to 10.1.0.33:80/TCP".to_owned()));
    assert_eq!(model.apply(Event::HostPorts(vec![])), []);
    assert_eq!(hosted(&model), [] as [&str; 0]);
}

#[test]
fn bad_host_ports_are_named_and_the_others_are_used() {
    let mut model = Model::new("n1");
    let list = vec![
        host_port("a", None, 0, "10.1.0.2:80"),
        host_port("a", None, 1, "10.1.0.2:0"),
        host_port("a", Some("::1"), 2, "10.1.0.2:80"),
        host_port("a", None, 3, "10.1.0.2:80"),
        host_port("a", None, 3, "10.1.0.2:81"),
    ];
    let problems: Vec<String> = model
        .apply(Event::HostPorts(list))
        .iter()
        .map(ToString::to_string)
        .collect();
    assert_eq!(
        problems,
        [
            "Pod ns/a: host port 0/TCP has port 0",
            "Pod ns/a: host port 1/TCP has port 0",
            "Pod ns/a: host port 2/TCP at ::1 leads to 10.1.0.2:80, of another family",
            "Pod ns/a: host port 3/TCP is there twice",
        ]
    );
    assert_eq!(hosted(&model), ["0.0.0.0:3 class 1 to 10.1.0.2:80/TCP"]);
}

#[test]
fn a_node_port_goes_before_a_host_port() {
    for first in [true, false] {
        let mut model = Model::new("n1");
        let ports = json!({"spec": {"ports": [{"name": "p", "port": 80, "nodePort": 30001}]}});
        let hosts = Event::HostPorts(vec![host_port("a", None, 30001, "10.1.0.2:80")]);
        let mut events = vec![service("s", "10.96.0.1", &ports), hosts];
        if first {
            events.reverse();
        }
        let problems: usize = events.into_iter().map(|event| model.apply(event).len()).sum();
        assert_eq!(problems, 1);
        assert_eq!(shown(&model.desired(&key("s", Family::V4)).unwrap()).len(), 2);
        assert_eq!(hosted(&model), [] as [&str; 0]);
        model.apply(Event::ServicesReplaced(vec![]));
        assert_eq!(hosted(&model).len(), 1, "the heir");
    }
}

#[test]
fn load_balancers_ask_for_different_local_endpoints() {
    let mut model = Model::new("n1");
    let of = |kind: &str, policy: &str, port: Value| {
        json!({"spec": {"type": kind, "externalTrafficPolicy": policy, "healthCheckNodePort": port,
            "ports": [{"name": "p", "port": 80, "nodePort": 30001}, {"name": "q", "port": 81, "nodePort": 30002}]}})
    };
    model.apply(service(
        "s",
        "10.96.0.1",
        &of("LoadBalancer", "Local", json!(32000)),
    ));
    let endpoints = json!([
        {"addresses": ["10.0.0.1"], "nodeName": "n1"},
        {"addresses": ["10.0.0.2"], "nodeName": "n1", "conditions": {"ready": false, "serving": true, "terminating": true}},
        {"addresses": ["10.0.0.3"], "nodeName": "n2"},
    ]);
    let ports = json!({"ports": [{"name": "p", "port": 8080}, {"name": "q", "port": 8081}]});
    model.apply(slice("s-1", "s", &endpoints, &ports));
    let found = model.health_check_node_ports();
    assert_eq!(found.len(), 1);
    assert_eq!(
        (found[0].namespace.as_str(), found[0].name.as_str(), found[0].port),
        ("ns", "s", 32000)
    );
    assert_eq!(
        (found[0].local_endpoints_v4, found[0].local_endpoints_v6),
        (Some(1), None)
    );
    for (kind, policy, port) in [
        ("NodePort", "Local", json!(32000)),
        ("LoadBalancer", "Cluster", json!(32000)),
        ("LoadBalancer", "Local", json!(0)),
        ("LoadBalancer", "Local", json!(null)),
        ("LoadBalancer", "Local", json!(65536)),
    ] {
        model.apply(service("s", "10.96.0.1", &of(kind, policy, port.clone())));
        assert_eq!(model.health_check_node_ports(), [], "{kind} {policy} {port}");
    }
}

#[test]
fn ranges_of_service_addresses_follow_their_objects() {
    let cidr = |name: &str, cidrs: Value| -> k8s_openapi::api::networking::v1::ServiceCIDR {
        serde_json::from_value(json!({"metadata": {"name": name}, "spec": {"cidrs": cidrs}})).unwrap()
    };
    let texts =
        |model: &Model| -> Vec<String> { model.service_ranges().iter().map(ToString::to_string).collect() };
    let mut model = Model::new("n1");
    let first = cidr("kubernetes", json!(["10.96.0.0/12", "fd00::/108"]));
    assert_eq!(
        model.apply(Event::ServiceCidrApplied(Box::new(first.clone()))),
        []
    );
    let more = cidr("more", json!(["203.0.113.0/24", "nonsense"]));
    assert_eq!(model.apply(Event::ServiceCidrApplied(Box::new(more))).len(), 1);
    assert_eq!(texts(&model), ["10.96.0.0/12", "203.0.113.0/24", "fd00::/108"]);
    model.apply(Event::ServiceCidrDeleted { name: "more".into() });
    assert_eq!(texts(&model), ["10.96.0.0/12", "fd00::/108"]);
    model.apply(Event::ServiceCidrsListed(["other".to_owned()].into()));
    assert_eq!(texts(&model), [] as [&str; 0]);
    model.apply(Event::ServiceCidrsReplaced(vec![first]));
    assert_eq!(texts(&model).len(), 2);
}
