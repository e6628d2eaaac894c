//! Who may still have flows to endpoints that are gone (spec kube-proxy 2.7).
#![expect(clippy::unwrap_used, reason = "a test that cannot go on must fail")]

mod common;

use common::{CAPACITY, ready, service, slice};
use dataplane_model::program::{FakeMaps, Outcome, Programmer};
use dataplane_model::{Event, Family, Model, ObjectName, Protocol, ServiceKey};
use serde_json::{Value, json};

fn key(name: &str, protocol: Protocol) -> ServiceKey {
    ServiceKey {
        service: ObjectName::new("ns", name),
        port_name: "p".into(),
        protocol,
        family: Family::V4,
    }
}

/// A model with a Service of this protocol, and the way to give its slice `s-1` these endpoints.
fn of(protocol: &str) -> (Model, impl Fn(&Value) -> Event) {
    let mut model = Model::new("n1");
    let ports = json!({"spec": {"type": "NodePort", "externalIPs": ["192.0.2.1"],
        "ports": [{"name": "p", "port": 53, "nodePort": 30053, "protocol": protocol}]}});
    assert_eq!(model.apply(service("s", "10.96.0.1", &ports)), []);
    let ports = json!({"ports": [{"name": "p", "port": 5353, "protocol": protocol}]});
    (model, move |endpoints: &Value| {
        slice("s-1", "s", endpoints, &ports)
    })
}

/// What became stale, as text: backend, and whether it is still listed.
fn stale(model: &mut Model) -> Vec<String> {
    let text = |s: dataplane_model::Stale| {
        let how = if s.listed { "listed" } else { "gone" };
        assert_eq!(&*s.service.service.name, "s");
        format!("{} {how}", s.backend)
    };
    model.take_stale().into_iter().map(text).collect()
}

fn endpoint(address: &str, conditions: &Value) -> Value {
    json!({"addresses": [address], "conditions": conditions})
}

#[test]
fn serving_is_everybody_who_serves_whatever_the_policies_say() {
    let (mut model, endpoints) = of("UDP");
    let policy = json!({"spec": {"type": "NodePort", "externalIPs": ["192.0.2.1"],
        "internalTrafficPolicy": "Local", "externalTrafficPolicy": "Local",
        "ports": [{"name": "p", "port": 53, "nodePort": 30053, "protocol": "UDP"}]}});
    model.apply(service("s", "10.96.0.1", &policy));
    model.apply(endpoints(&json!([
        endpoint("10.0.0.3", &json!({})),
        endpoint(
            "10.0.0.2",
            &json!({"ready": false, "serving": true, "terminating": true})
        ),
        endpoint("10.0.0.1", &json!({"ready": false, "serving": false})),
    ])));
    let serving = model.serving(&key("s", Protocol::Udp)).unwrap();
    let backends: Vec<String> = serving.backends.iter().map(ToString::to_string).collect();
    assert_eq!(backends, ["10.0.0.2:5353/UDP", "10.0.0.3:5353/UDP"]);
    let at: Vec<String> = serving
        .frontends
        .iter()
        .map(|f| format!("{}:{}", f.addr, f.port))
        .collect();
    assert_eq!(at, ["0.0.0.0:30053", "10.96.0.1:53", "192.0.2.1:53"]);
    assert_eq!(model.serving(&key("s", Protocol::Tcp)), None);
}

#[test]
fn an_endpoint_is_stale_when_it_stops_serving_not_when_it_leaves_the_sets() {
    let (mut model, endpoints) = of("UDP");
    model.apply(endpoints(&ready(&["10.0.0.1", "10.0.0.2"])));
    assert_eq!(stale(&mut model), [] as [&str; 0]);
    let other = endpoint("10.0.0.2", &json!({}));
    let draining = endpoint(
        "10.0.0.1",
        &json!({"ready": false, "serving": true, "terminating": true}),
    );
    model.apply(endpoints(&json!([draining, other])));
    assert_eq!(
        stale(&mut model),
        [] as [&str; 0],
        "it keeps the flows that it has"
    );
    let down = endpoint(
        "10.0.0.1",
        &json!({"ready": false, "serving": false, "terminating": true}),
    );
    model.apply(endpoints(&json!([down, other])));
    assert_eq!(stale(&mut model), ["10.0.0.1:5353/UDP listed"]);
    assert_eq!(stale(&mut model), [] as [&str; 0], "said once");
    model.apply(endpoints(&json!([other])));
    assert_eq!(stale(&mut model), [] as [&str; 0]);
}

#[test]
fn another_number_for_the_same_port_makes_the_old_one_stale() {
    let (mut model, endpoints) = of("UDP");
    model.apply(endpoints(&ready(&["10.0.0.1"])));
    let ports = json!({"ports": [{"name": "p", "port": 9090, "protocol": "UDP"}]});
    model.apply(slice("s-1", "s", &ready(&["10.0.0.1"]), &ports));
    assert_eq!(stale(&mut model), ["10.0.0.1:5353/UDP gone"]);
}

#[test]
fn flows_of_udp_stay_until_somebody_can_take_them() {
    let (mut model, endpoints) = of("UDP");
    model.apply(endpoints(&ready(&["10.0.0.1", "10.0.0.2"])));
    model.apply(endpoints(&json!([])));
    assert_eq!(stale(&mut model), [] as [&str; 0]);
    // one comes back before anybody else does
    model.apply(endpoints(&ready(&["10.0.0.2"])));
    assert_eq!(stale(&mut model), ["10.0.0.1:5353/UDP gone"]);

    let (mut model, endpoints) = of("TCP");
    model.apply(endpoints(&ready(&["10.0.0.1"])));
    model.apply(endpoints(&json!([])));
    assert_eq!(stale(&mut model), ["10.0.0.1:5353/TCP gone"]);
}

#[test]
fn an_endpoint_that_moves_to_another_slice_is_not_stale() {
    let (mut model, endpoints) = of("UDP");
    model.apply(endpoints(&ready(&["10.0.0.1"])));
    let ports = json!({"ports": [{"name": "p", "port": 5353, "protocol": "UDP"}]});
    model.apply(endpoints(&json!([])));
    model.apply(slice("s-2", "s", &ready(&["10.0.0.1", "10.0.0.2"]), &ports));
    assert_eq!(stale(&mut model), [] as [&str; 0]);
    // a slice that goes, and one that becomes another Service's
    let gone = ("ns".to_owned(), "s-2".to_owned());
    model.apply(endpoints(&ready(&["10.0.0.2"])));
    model.apply(Event::SliceDeleted {
        namespace: gone.0,
        name: gone.1,
    });
    assert_eq!(stale(&mut model), ["10.0.0.1:5353/UDP gone"]);
    model.apply(slice("s-3", "s", &ready(&["10.0.0.3"]), &ports));
    model.apply(slice("s-1", "t", &ready(&["10.0.0.2"]), &ports));
    assert_eq!(stale(&mut model), ["10.0.0.2:5353/UDP gone"]);
}

#[test]
fn a_service_that_comes_again_knows_who_served_it() {
    let (mut model, endpoints) = of("UDP");
    model.apply(endpoints(&ready(&["10.0.0.1", "10.0.0.2"])));
    let ports = json!({"spec": {"ports": [{"name": "p", "port": 53, "protocol": "UDP"}]}});
    model.apply(Event::ServiceDeleted {
        namespace: "ns".into(),
        name: "s".into(),
    });
    assert_eq!(stale(&mut model), [] as [&str; 0]);
    model.apply(endpoints(&ready(&["10.0.0.2", "10.0.0.3"])));
    assert_eq!(stale(&mut model), [] as [&str; 0]);
    model.apply(service("s", "10.96.0.1", &ports));
    assert_eq!(stale(&mut model), ["10.0.0.1:5353/UDP gone"]);
}

/// Programs what is dirty; gives what left, as text.
fn released(programmer: &mut Programmer<FakeMaps>, model: &mut Model) -> Vec<String> {
    let dirty = model.take_dirty();
    let changes: Vec<_> = dirty
        .into_iter()
        .map(|k| (k.clone(), model.desired(&k)))
        .collect();
    let Outcome { failed, released, .. } = programmer.reconcile(changes, 0);
    assert!(failed.is_empty(), "{failed:?}");
    released
        .iter()
        .map(|r| format!("{} {}", r.service.as_ref().unwrap(), r.backend))
        .collect()
}

#[test]
fn what_leaves_a_service_is_named_once() {
    let (mut model, endpoints) = of("UDP");
    let mut programmer = Programmer::new(FakeMaps::new(CAPACITY)).unwrap();
    model.apply(endpoints(&ready(&["10.0.0.1", "10.0.0.2"])));
    assert_eq!(released(&mut programmer, &mut model), [] as [&str; 0]);
    let ids: Vec<u32> = programmer.services()[0]
        .cluster
        .iter()
        .map(|(id, _)| *id)
        .collect();
    model.apply(endpoints(&ready(&["10.0.0.2", "10.0.0.3"])));
    assert_eq!(
        released(&mut programmer, &mut model),
        ["ns/s:p/UDP IPv4 10.0.0.1:5353/UDP"]
    );
    assert_eq!(ids.len(), 2);
    // from one set to the other it does not leave
    let local =
        json!([{"addresses": ["10.0.0.2"], "nodeName": "n1"}, {"addresses": ["10.0.0.3"], "nodeName": "n2"}]);
    model.apply(endpoints(&local));
    let ports = json!([{"name": "p", "port": 53, "protocol": "UDP"}]);
    let spec = json!({"spec": {"internalTrafficPolicy": "Local", "ports": ports}});
    model.apply(service("s", "10.96.0.1", &spec));
    assert_eq!(
        released(&mut programmer, &mut model),
        ["ns/s:p/UDP IPv4 10.0.0.3:5353/UDP"]
    );
    // with the Service everything leaves
    model.apply(Event::ServiceDeleted {
        namespace: "ns".into(),
        name: "s".into(),
    });
    assert_eq!(
        released(&mut programmer, &mut model),
        ["ns/s:p/UDP IPv4 10.0.0.2:5353/UDP"]
    );
}
