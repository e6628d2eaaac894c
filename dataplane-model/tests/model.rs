//! Objects in, desired services out: what counts is used, and what is bad is named and harms nothing else.

mod common;

use std::collections::BTreeMap;

use common::{CAPACITY, program, ready, service, slice};
use dataplane_model::program::{FakeMaps, Programmer};
use dataplane_model::{Event, Model};
use serde_json::{Value, json};

/// Frontend to the addresses of its cluster set, as text.
fn offered(model: &Model) -> BTreeMap<String, Vec<String>> {
    let mut out = BTreeMap::new();
    for service in model.desired_all().services.values() {
        for frontend in service.frontends.keys() {
            let set = service.cluster.iter().map(|m| m.backend.to_string()).collect();
            out.insert(format!("{}:{}", frontend.addr, frontend.port), set);
        }
    }
    out
}

fn offers(entries: &[(&str, &[&str])]) -> BTreeMap<String, Vec<String>> {
    let texts = |set: &[&str]| set.iter().map(|s| (*s).into()).collect();
    entries.iter().map(|(f, set)| ((*f).into(), texts(set))).collect()
}

/// Applies it beside a good service, which must stay, and gives the problems as text.
fn beside_a_good_one(event: Event) -> (Model, Vec<String>) {
    let mut model = Model::new("n1");
    assert_eq!(model.apply(service("good", "10.96.0.1", &json!({}))), []);
    assert_eq!(
        model.apply(slice("good-1", "good", &ready(&["10.0.0.1"]), &json!({}))),
        []
    );
    let problems = model.apply(event).iter().map(ToString::to_string).collect();
    assert_eq!(offered(&model)["10.96.0.1:80"], ["10.0.0.1:8080/TCP"]);
    (model, problems)
}

#[test]
fn bad_services_are_named_and_the_rest_of_them_is_used() {
    let spec = |spec: Value| json!({ "spec": spec });
    for (event, problem, still_offered) in [
        (
            service("bad", "300.1.1.1", &json!({})),
            "Service ns/bad: cluster IP \"300.1.1.1\" is not an IP address",
            0,
        ),
        (
            service(
                "bad",
                "10.96.0.9",
                &spec(json!({"ports": [{"name": "p", "port": 0}, {"name": "q", "port": 81}]})),
            ),
            "Service ns/bad: port \"p\": 0 is not a port number (1 to 65535)",
            1,
        ),
        (
            service(
                "bad",
                "10.96.0.9",
                &spec(json!({"ports": [{"name": "p", "port": 65536}]})),
            ),
            "Service ns/bad: port \"p\": 65536 is not a port number (1 to 65535)",
            0,
        ),
        (
            service(
                "bad",
                "10.96.0.9",
                &spec(json!({"ports": [{"name": "p", "port": -1}]})),
            ),
            "Service ns/bad: port \"p\": -1 is not a port number (1 to 65535)",
            0,
        ),
        (
            service(
                "bad",
                "10.96.0.9",
                &spec(
                    json!({"ports": [{"name": "p", "port": 80, "protocol": "QUIC"}, {"name": "q", "port": 80}]}),
                ),
            ),
            "Service ns/bad: port \"p\": unknown protocol \"QUIC\"",
            1,
        ),
        (
            service(
                "bad",
                "10.96.0.9",
                &spec(json!({"externalIPs": ["", "nonsense"]})),
            ),
            "Service ns/bad: external IP \"nonsense\" is not an IP address",
            1,
        ),
        (
            service("bad", "10.96.0.9", &json!({"metadata": {"name": null}})),
            "Service ns/: has no name or no namespace",
            0,
        ),
        (
            service(
                "bad",
                "10.96.0.9",
                &spec(json!({"clusterIPs": ["10.96.0.9", "fd00::x"], "ipFamilies": ["IPv4", "IPv6"]})),
            ),
            "Service ns/bad: cluster IP \"fd00::x\" is not an IP address",
            1,
        ),
        (
            service(
                "bad",
                "10.96.0.9",
                &spec(json!({"clusterIPs": ["10.96.0.9"], "ipFamilies": ["IPv6"]})),
            ),
            "Service ns/bad: cluster IP 10.96.0.9 is not of its family IPv6",
            0,
        ),
    ] {
        let (model, problems) = beside_a_good_one(event);
        assert_eq!(problems, [problem]);
        assert_eq!(offered(&model).len(), 1 + still_offered, "{problem}");
    }
}

#[test]
fn bad_slices_are_named_and_the_rest_of_them_is_used() {
    let good = ready(&["10.0.0.2"]);
    for (event, problem, usable) in [
        (
            slice("x", "t", &ready(&["10.0.0.2", "10.0.0.256", "::1"]), &json!({})),
            vec![
                "endpoint address \"10.0.0.256\" is not an IP address",
                "endpoint address ::1 is not of the slice's addressType IPv4",
            ],
            1,
        ),
        (
            slice("x", "t", &ready(&["0.0.0.0", "224.0.0.1"]), &json!({})),
            vec![
                "endpoint address 0.0.0.0 cannot be connected to",
                "endpoint address 224.0.0.1 cannot be connected to",
            ],
            0,
        ),
        (
            slice("x", "", &good, &json!({})),
            vec!["has no label kubernetes.io/service-name, so it belongs to no Service"],
            0,
        ),
        (
            slice("x", "t", &good, &json!({"metadata": {"labels": null}})),
            vec!["has no label kubernetes.io/service-name, so it belongs to no Service"],
            0,
        ),
        (
            slice("x", "t", &good, &json!({"addressType": "IPX"})),
            vec!["unknown addressType \"IPX\""],
            0,
        ),
        (slice("x", "t", &good, &json!({"addressType": "FQDN"})), vec![], 0),
        (
            slice("x", "t", &good, &json!({"ports": [{"port": 8080}]})),
            vec!["a port has no name field"],
            0,
        ),
        (
            slice("x", "t", &good, &json!({"ports": [{"name": "p"}]})),
            vec!["port \"p\" has no number: all ports is not supported"],
            0,
        ),
        (
            slice(
                "x",
                "t",
                &good,
                &json!({"ports": [{"name": "p", "port": 8080}, {"name": "p", "port": 1, "protocol": "X"}]}),
            ),
            vec!["port \"p\": unknown protocol \"X\""],
            1,
        ),
        (
            slice(
                "x",
                "t",
                &json!([{"addresses": []}, {"addresses": ["10.0.0.2", "ignored"]}]),
                &json!({}),
            ),
            vec![],
            1,
        ),
        (
            slice(
                "x",
                "t",
                &good,
                &json!({"metadata": {"labels": {"noise \u{202e}\u{0}\u{1f980}": "\u{feff}\u{7f}"}}}),
            ),
            vec!["label \"noise \\u{202e}\\0🦀\" = \"\\u{feff}\\u{7f}\" is not a valid label: it is ignored"],
            1,
        ),
    ] {
        let (mut model, problems) = beside_a_good_one(event);
        let named: Vec<_> = problem
            .iter()
            .map(|p| format!("EndpointSlice ns/x: {p}"))
            .collect();
        assert_eq!(problems, named);
        model.apply(service("t", "10.96.0.2", &json!({})));
        assert_eq!(offered(&model)["10.96.0.2:80"].len(), usable, "{problem:?}");
    }
}

#[test]
fn five_thousand_endpoints_and_duplicates_are_one_set() {
    let addresses: Vec<String> = (0..5000)
        .map(|i| format!("10.1.{}.{}", i / 250, i % 250))
        .collect();
    let all: Vec<&str> = addresses
        .iter()
        .map(String::as_str)
        .chain(["10.1.0.0", "10.1.000.0"])
        .collect();
    let (mut model, problems) = beside_a_good_one(slice("x", "big", &ready(&all), &json!({})));
    assert_eq!(
        problems,
        [
            "EndpointSlice ns/x: has 5002 endpoints, more than 1000: all are used",
            "EndpointSlice ns/x: lists 2 endpoint addresses more than once: each is used once",
        ]
    );
    model.apply(service("big", "10.96.0.2", &json!({})));
    let set = &offered(&model)["10.96.0.2:80"];
    assert_eq!(set.len(), 5000);
    let mut programmer = Programmer::new(FakeMaps::new(CAPACITY)).unwrap();
    let outcome = program(&mut programmer, &mut model);
    assert_eq!(outcome, 2);
}

#[test]
fn of_duplicates_a_terminating_one_never_replaces_another() {
    let endpoint = |terminating: bool| json!([{"addresses": ["10.0.0.1"], "conditions": {"ready": !terminating, "serving": true, "terminating": terminating}}]);
    for (first, second) in [(false, true), (true, false)] {
        for order in [["a", "b"], ["b", "a"]] {
            let mut model = Model::new("n1");
            model.apply(service("s", "10.96.0.1", &json!({})));
            for name in order {
                let terminating = if name == "a" { first } else { second };
                model.apply(slice(name, "s", &endpoint(terminating), &json!({})));
            }
            let desired = model.desired_all();
            let set = &desired.services.values().next().unwrap().cluster;
            assert_eq!(set.len(), 1);
            assert_eq!(
                set[0].state,
                dataplane_model::BackendState::Active,
                "{first} {second} {order:?}"
            );
        }
    }
}

#[test]
fn labels_count_live() {
    let mut model = Model::new("n1");
    model.apply(service("s", "172.30.0.041", &json!({})));
    model.apply(slice("s-1", "s", &ready(&["10.0.0.1"]), &json!({})));
    let with = offers(&[("172.30.0.41:80", &["10.0.0.1:8080/TCP"])]);
    let empty = offers(&[("172.30.0.41:80", &[])]);
    assert_eq!(offered(&model), with);

    let proxied = json!({"metadata": {"labels": {"service.kubernetes.io/service-proxy-name": ""}}});
    assert_eq!(model.apply(service("s", "172.30.0.041", &proxied)), []);
    assert_eq!(offered(&model), offers(&[]));
    model.apply(service("s", "172.30.0.041", &json!({})));
    assert_eq!(offered(&model), with);

    let headless = json!({"metadata": {"labels": {"service.kubernetes.io/headless": ""}}});
    assert_eq!(
        model.apply(slice("s-1", "s", &ready(&["10.0.0.1"]), &headless)),
        []
    );
    assert_eq!(offered(&model), empty);
    // the slice comes to belong to the service again, then to another
    model.apply(slice("s-1", "s", &ready(&["10.0.0.1"]), &json!({})));
    assert_eq!(offered(&model), with);
    model.take_dirty();
    model.apply(slice("s-1", "other", &ready(&["10.0.0.1"]), &json!({})));
    assert_eq!(offered(&model), empty);
    assert_eq!(model.take_dirty().len(), 1, "the service that lost its slice");

    for kind in [
        json!({"spec": {"type": "ExternalName"}}),
        json!({"spec": {"clusterIP": "None"}}),
    ] {
        model.apply(service("s", "172.30.0.041", &kind));
        assert_eq!(offered(&model), offers(&[]), "{kind}");
    }
}

#[test]
fn one_address_claimed_twice_goes_to_the_older_whatever_the_order() {
    let made = |at: &str| json!({"metadata": {"creationTimestamp": at}});
    let (old, new) = (made("2020-01-01T00:00:00Z"), made("2021-01-01T00:00:00Z"));
    for order in [["z", "a"], ["a", "z"]] {
        let mut model = Model::new("n1");
        let mut problems = Vec::new();
        for name in order {
            // the older one is last by name, so that age decides
            let more = if name == "z" { &old } else { &new };
            problems.extend(model.apply(service(name, "10.96.0.1", more)));
            model.apply(slice(
                name,
                name,
                &ready(&[if name == "z" { "10.0.0.26" } else { "10.0.0.1" }]),
                &json!({}),
            ));
        }
        assert_eq!(
            offered(&model),
            offers(&[("10.96.0.1:80", &["10.0.0.26:8080/TCP"])])
        );
        let texts: Vec<_> = problems.iter().map(ToString::to_string).collect();
        assert_eq!(
            texts,
            ["Service ns/a: 10.96.0.1:80 already belongs to ns/z:p/TCP IPv4"]
        );
        // the heir takes over
        model.take_dirty();
        model.apply(Event::ServiceDeleted {
            namespace: "ns".into(),
            name: "z".into(),
        });
        assert_eq!(
            offered(&model),
            offers(&[("10.96.0.1:80", &["10.0.0.1:8080/TCP"])])
        );
        assert!(model.take_dirty().iter().any(|k| &*k.service.name == "a"));
    }
}

#[test]
fn a_complete_list_replaces_without_false_conflicts() {
    let mut model = Model::new("n1");
    model.apply(service("a", "10.96.0.1", &json!({})));
    let Event::ServiceApplied(heir) = service("b", "10.96.0.1", &json!({})) else {
        return;
    };
    assert_eq!(model.apply(Event::ServicesReplaced(vec![*heir])), []);
    assert_eq!(model.object_counts(), (1, 0));
    let mut dirty: Vec<_> = model
        .take_dirty()
        .iter()
        .map(|k| k.service.name.to_string())
        .collect();
    dirty.sort();
    assert_eq!(dirty, ["a", "b"]);
    model.apply(slice("b-1", "b", &ready(&["10.0.0.1"]), &json!({})));
    assert_eq!(model.apply(Event::SlicesReplaced(vec![])), []);
    assert_eq!(offered(&model), offers(&[("10.96.0.1:80", &[])]));
}

#[test]
fn dual_stack_is_two_services() {
    let mut model = Model::new("n1");
    let both = json!({"spec": {"clusterIPs": ["10.96.0.1", "fd00::1"], "ipFamilies": ["IPv4", "IPv6"]}});
    model.apply(service("s", "10.96.0.1", &both));
    model.apply(slice("s-4", "s", &ready(&["10.0.0.1"]), &json!({})));
    model.apply(slice(
        "s-6",
        "s",
        &ready(&["fd01::1"]),
        &json!({"addressType": "IPv6"}),
    ));
    let both = [
        ("10.96.0.1:80", &["10.0.0.1:8080/TCP"][..]),
        ("fd00::1:80", &["[fd01::1]:8080/TCP"][..]),
    ];
    assert_eq!(offered(&model), offers(&both));
}
