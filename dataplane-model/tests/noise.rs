//! Objects of noise: nothing panics, problems stay bounded, and a good service is served as if they were not there.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on must fail")]

mod common;

use common::{CAPACITY, program, ready, service, slice};
use dataplane_model::object::{MAX_MESSAGE, MAX_PROBLEMS};
use dataplane_model::program::{FakeMaps, Maps, Programmer};
use dataplane_model::{Event, Model};
use k8s_openapi::serde::de::DeserializeOwned;
use proptest::prelude::*;
use serde_json::{Value, json};

/// What somebody may write where an address, a name or a word belongs.
fn text() -> impl Strategy<Value = Value> {
    let known = prop::sample::select(vec![
        "",
        "None",
        "10.96.0.1",
        "10.96.0.7",
        "010.096.0.7",
        "::",
        "::1",
        "fd00::7",
        "::ffff:10.96.0.1",
        "0.0.0.0",
        "255.255.255.255",
        "127.0.0.1",
        "224.0.0.1",
        "ff02::1",
        "fe80::1%eth0",
        "10.96.0.0/12",
        "0.0.0.0/0",
        "::/0",
        "10.0.0.0/33",
        "1.2.3.4/",
        "/8",
        "TCP",
        "UDP",
        "SCTP",
        "tcp",
        "IPv4",
        "IPv6",
        "FQDN",
        "Local",
        "Cluster",
        "ClientIP",
        "LoadBalancer",
        "NodePort",
        "ExternalName",
        "VIP",
        "Proxy",
        "p",
        "s",
        "maglev",
        "n1",
        "\u{0}",
        "\u{202e}x",
        "🦀",
    ]);
    prop_oneof![
        6 => known.prop_map(Value::from),
        1 => any::<String>().prop_map(Value::from),
        1 => Just(Value::Null),
    ]
}

fn number() -> impl Strategy<Value = Value> {
    let known = prop::sample::select(vec![
        -1i32,
        0,
        1,
        80,
        8080,
        30_001,
        65_535,
        65_536,
        i32::MIN,
        i32::MAX,
    ]);
    prop_oneof![4 => known.prop_map(Value::from), 1 => any::<i32>().prop_map(Value::from), 1 => Just(Value::Null)]
}

fn texts() -> impl Strategy<Value = Value> {
    prop::collection::vec(text(), 0..4).prop_map(|list| list.into_iter().filter(|t| !t.is_null()).collect())
}

fn noisy_service() -> impl Strategy<Value = Value> {
    let port = (text(), number(), number(), text());
    let port = port.prop_map(|(name, port, node_port, protocol)| {
        let port = if port.is_null() { json!(0) } else { port };
        json!({"name": name, "port": port, "nodePort": node_port, "protocol": protocol})
    });
    let spec = (
        (
            text(),
            text(),
            texts(),
            texts(),
            prop::collection::vec(port, 0..4),
        ),
        (texts(), texts(), text(), text(), text(), number()),
        (number(), text(), prop::collection::vec((text(), text()), 0..3)),
    );
    let names = (text(), prop::sample::select(vec!["s", "t", "good", ""]));
    (spec, names).prop_map(|((a, b, c), (annotation, name))| {
        let ingress: Vec<Value> = c.2.into_iter().map(|(ip, mode)| json!({"ip": ip, "ipMode": mode})).collect();
        let annotation = annotation.as_str().unwrap_or_default().to_owned();
        json!({
            "metadata": {"namespace": "noise", "name": name,
                "annotations": {"beeline.dev/algorithm": annotation, "beeline.dev/failure-detection": annotation},
                "labels": {annotation.as_str(): annotation}},
            "spec": {"type": a.0, "clusterIP": a.1, "clusterIPs": a.2, "ipFamilies": a.3, "ports": a.4,
                "externalIPs": b.0, "loadBalancerSourceRanges": b.1, "externalTrafficPolicy": b.2,
                "internalTrafficPolicy": b.3, "sessionAffinity": b.4, "healthCheckNodePort": b.5,
                "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": c.0}}},
            "status": {"loadBalancer": {"ingress": ingress}},
        })
    })
}

fn noisy_slice() -> impl Strategy<Value = Value> {
    let flag = || prop::option::of(any::<bool>());
    let endpoint = (texts(), flag(), flag(), flag(), text(), texts());
    let endpoint = endpoint.prop_map(|(addresses, ready, serving, terminating, node, zones)| {
        let named = |list: &Value| -> Value {
            let names = list.as_array().unwrap().iter();
            names.map(|name| json!({"name": name})).collect()
        };
        json!({"addresses": addresses, "nodeName": node, "hints": {"forZones": named(&zones), "forNodes": named(&zones)},
            "conditions": {"ready": ready, "serving": serving, "terminating": terminating}})
    });
    let port = (text(), number(), text());
    let port =
        port.prop_map(|(name, port, protocol)| json!({"name": name, "port": port, "protocol": protocol}));
    let parts = (
        prop::sample::select(vec!["s", "t", "good", "x", ""]),
        text(),
        prop::collection::vec(port, 0..3),
        prop::collection::vec(endpoint, 0..5),
    );
    (text(), parts).prop_map(|(name, (service, family, ports, endpoints))| {
        let family = if family.is_null() { json!("IPv4") } else { family };
        json!({
            "metadata": {"namespace": "noise", "name": name, "labels": {"kubernetes.io/service-name": service}},
            "addressType": family, "ports": ports, "endpoints": endpoints,
        })
    })
}

fn noisy_node() -> impl Strategy<Value = Value> {
    (text(), prop::collection::vec((text(), text()), 0..4)).prop_map(|(zone, addresses)| {
        let addresses: Vec<Value> = addresses
            .into_iter()
            .map(|(kind, address)| json!({"type": kind.as_str().unwrap_or("InternalIP"), "address": address.as_str().unwrap_or("x")}))
            .collect();
        let zone = zone.as_str().unwrap_or_default().to_owned();
        json!({"metadata": {"name": "n1", "labels": {"topology.kubernetes.io/zone": zone}}, "status": {"addresses": addresses}})
    })
}

fn parsed<T: DeserializeOwned>(object: Value) -> Box<T> {
    Box::new(serde_json::from_value(object).unwrap())
}

fn noise() -> impl Strategy<Value = Event> {
    let cidr = (text(), texts());
    prop_oneof![
        4 => noisy_service().prop_map(|object| Event::ServiceApplied(parsed(object))),
        4 => noisy_slice().prop_map(|object| Event::SliceApplied(parsed(object))),
        1 => noisy_node().prop_map(|object| Event::NodeApplied(parsed(object))),
        1 => cidr.prop_map(|(name, cidrs)| {
            let object = json!({"metadata": {"name": name}, "spec": {"cidrs": cidrs}});
            Event::ServiceCidrApplied(parsed(object))
        }),
        1 => Just(Event::ServiceDeleted { namespace: "noise".into(), name: "s".into() }),
        1 => Just(Event::SlicesListed([dataplane_model::ObjectName::new("ns", "web-1")].into())),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, ..ProptestConfig::default() })]

    #[test]
    fn noise_harms_nobody(events in prop::collection::vec(noise(), 1..24)) {
        let mut model = Model::new("n1");
        let mut programmer = Programmer::new(FakeMaps::new(CAPACITY)).unwrap();
        model.apply(service("web", "10.99.99.99", &json!({})));
        model.apply(slice("web-1", "web", &ready(&["10.0.0.1", "10.0.0.2"]), &json!({})));
        for event in events {
            let problems = model.apply(event);
            // each object has at most so many, and each claim of its frontends one
            prop_assert!(problems.len() <= 8 * MAX_PROBLEMS, "{problems:?}");
            for problem in problems {
                prop_assert!(problem.message.chars().count() <= MAX_MESSAGE + 1, "{problem}");
                prop_assert!(!problem.to_string().contains('\n'), "{problem:?}");
            }
            program(&mut programmer, &mut model);
            model.take_stale();
            prop_assert!(model.health_check_node_ports().iter().all(|check| check.port != 0));
            prop_assert!(model.service_ranges().is_sorted());
        }
        prop_assert!(programmer.audit(0).unwrap().is_clean());
        let services = programmer.services();
        let web = services.iter().find(|s| s.key.as_ref().is_some_and(|k| &*k.service.name == "web")).unwrap();
        let word = programmer.maps().service(web.id).unwrap().cluster;
        prop_assert_eq!((web.frontends.len(), word.count()), (1, 2));
        // what is offered anywhere can be reached there: nothing unspecified but node ports
        for service in &services {
            for frontend in service.frontends.keys().filter(|f| f.class == 0) {
                let ip = frontend.addr.to_ip();
                prop_assert!(!ip.is_unspecified() && !ip.is_multicast() && !ip.is_loopback(), "{ip}");
            }
        }
    }
}
