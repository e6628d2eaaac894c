use serde_json::{Value, json};

use super::mirror::plan;
use super::*;

fn of<T: k8s_openapi::serde::de::DeserializeOwned>(value: Value) -> T {
    serde_json::from_value(value).unwrap()
}

fn service(selector: &Value) -> Service {
    of(json!({
        "metadata": {"name": "web", "namespace": "d", "labels": {"tier": "front"}},
        "spec": {"selector": selector, "ipFamilies": ["IPv4", "IPv6"], "ports": [{"port": 80}]},
    }))
}

fn slice(name: &str, family: &str, endpoints: &Value) -> EndpointSlice {
    of(json!({
        "metadata": {"name": name, "namespace": "d", "labels": {
            SERVICE_NAME: "web", "endpointslice.kubernetes.io/managed-by": "endpointslice-controller.k8s.io",
        }},
        "addressType": family, "ports": [{"name": "http", "port": 8080, "protocol": "TCP"}], "endpoints": endpoints,
    }))
}

#[test]
fn slices_are_shown_as_endpoints() {
    let service = service(&json!({"app": "web"}));
    let v4 = slice(
        "a",
        "IPv4",
        &json!([
            {"addresses": ["10.0.0.2"], "conditions": {"ready": true}, "nodeName": "n1"},
            {"addresses": ["10.0.0.1"], "conditions": {"ready": true}},
            {"addresses": ["10.0.0.3"], "conditions": {"ready": false}},
            {"addresses": ["10.0.0.4"], "conditions": {"ready": false, "terminating": true}},
        ]),
    );
    let v6 = slice(
        "b",
        "IPv6",
        &json!([{"addresses": ["fd00::1"], "conditions": {"ready": true}}]),
    );
    let actions = plan(Some(&service), None, &[&v4, &v6]);
    let [Action::CreateEndpoints(endpoints)] = &actions[..] else {
        panic!("{actions:?}")
    };
    assert_eq!(
        json!(endpoints.subsets),
        json!([{
            "addresses": [{"ip": "10.0.0.1"}, {"ip": "10.0.0.2", "nodeName": "n1"}],
            "notReadyAddresses": [{"ip": "10.0.0.3"}],
            "ports": [{"name": "http", "port": 8080, "protocol": "TCP"}],
        }])
    );
    assert_eq!(endpoints.metadata.labels.as_ref().unwrap()["tier"], "front");
    assert_eq!(plan(Some(&service), Some(endpoints), &[&v4, &v6]), []);
    let actions = plan(Some(&service), Some(endpoints), &[&v6]);
    assert!(
        matches!(&actions[..], [Action::ReplaceEndpoints(e)] if e.subsets.is_none()),
        "{actions:?}"
    );
    assert_eq!(
        plan(None, Some(endpoints), &[]),
        [Action::DeleteEndpoints("web".into())]
    );
}

#[test]
fn endpoints_of_a_service_without_selector_become_slices() {
    let service = service(&Value::Null);
    let endpoints = |subsets: Value| -> Endpoints {
        of(json!({"metadata": {"name": "web", "namespace": "d", "uid": "u"}, "subsets": subsets}))
    };
    let one = endpoints(
        json!([{"addresses": [{"ip": "192.0.2.7"}, {"ip": "2001:db8::7"}], "ports": [{"port": 5432}]}]),
    );
    let actions = plan(Some(&service), Some(&one), &[]);
    let [Action::CreateSlice(v4), Action::CreateSlice(v6)] = &actions[..] else {
        panic!("{actions:?}")
    };
    assert_eq!(
        (v4.address_type.as_str(), v6.address_type.as_str()),
        ("IPv4", "IPv6")
    );
    assert_eq!(v4.endpoints.as_ref().unwrap()[0].addresses, ["192.0.2.7"]);
    assert_eq!(plan(Some(&service), Some(&one), &[v4, v6]), []);
    let mut named = (**v4).clone();
    named.metadata.name = Some("web-1".into());
    let other = endpoints(json!([{"addresses": [{"ip": "192.0.2.8"}], "ports": [{"port": 5432}]}]));
    let actions = plan(Some(&service), Some(&other), &[&named]);
    assert!(
        matches!(&actions[..], [Action::ReplaceSlice(s)] if s.name_any() == "web-1"),
        "{actions:?}"
    );
    assert_eq!(
        plan(Some(&service), None, &[&named]),
        [Action::DeleteSlice("web-1".into())]
    );
    // Endpoints of nobody's Service, and those that are not to be mirrored.
    assert_eq!(plan(None, Some(&one), &[]), []);
    let mut skipped = one;
    skipped.metadata.labels =
        Some([("endpointslice.kubernetes.io/skip-mirror".into(), "true".into())].into());
    assert_eq!(plan(Some(&service), Some(&skipped), &[]), []);
}
