use std::collections::{BTreeMap, BTreeSet};

use k8s_openapi::api::core::v1::{Node, Pod, Service};
use k8s_openapi::api::discovery::v1::{Endpoint, EndpointSlice};
use kube::ResourceExt as _;
use kube::runtime::watcher::Event;
use proptest::prelude::*;
use serde_json::{Value, json};

use super::cache::{Cache, Change};
use super::*;

fn fixture(name: &str) -> Value {
    let path = format!(
        "{}/tests/fixtures/apiserver-1.36/{name}.json",
        env!("CARGO_MANIFEST_DIR")
    );
    let file: Value = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
    file["response"]["body"].clone()
}

fn service(change: impl FnOnce(&mut Value)) -> Service {
    let mut value = json!({
        "metadata": {"name": "web", "namespace": "d", "uid": "svc-1", "creationTimestamp": "2026-01-01T00:00:00Z",
            "labels": {"team": "x"}},
        "spec": {"selector": {"app": "web"}, "ipFamilies": ["IPv4"], "clusterIP": "10.96.0.9",
            "ports": [{"name": "http", "port": 80, "protocol": "TCP", "targetPort": 8080}]},
    });
    change(&mut value);
    serde_json::from_value(value).unwrap()
}

fn pod_with(i: usize, change: impl FnOnce(&mut Value)) -> Pod {
    let mut value = json!({
        "metadata": {"name": format!("p{i:04}"), "namespace": "d", "uid": format!("uid-{i}"), "labels": {"app": "web"}},
        "spec": {"nodeName": "n1", "containers": [{"name": "c", "ports": [{"name": "web", "containerPort": 9000 + i % 2}]}]},
        "status": {
            "phase": "Running",
            "podIPs": [{"ip": format!("10.1.{}.{}", i / 250, i % 250 + 1)}, {"ip": format!("fd00::{:x}", i + 1)}],
            "conditions": [{"type": "Ready", "status": "True", "lastTransitionTime": "2026-01-01T00:00:05Z"}],
        },
    });
    change(&mut value);
    serde_json::from_value(value).unwrap()
}

fn pod(i: usize) -> Pod {
    pod_with(i, |_| {})
}

fn nodes() -> BTreeMap<String, Node> {
    let node = json!({"metadata": {"name": "n1", "labels": {"topology.kubernetes.io/zone": "z1"}}});
    [("n1".to_owned(), serde_json::from_value(node).unwrap())].into()
}

/// An API without a server: applies changes and gives names and versions.
#[derive(Default, Clone)]
struct Slices {
    slices: BTreeMap<String, EndpointSlice>,
    next: usize,
    /// Creations, updates and deletions so far.
    writes: [usize; 3],
}

impl Slices {
    fn apply(&mut self, changes: Vec<SliceChange>) {
        for change in changes {
            self.next += 1;
            match change {
                SliceChange::Create(mut slice) => {
                    self.writes[0] += 1;
                    let name = format!("{}{}", slice.metadata.generate_name.clone().unwrap(), self.next);
                    slice.metadata.name = Some(name.clone());
                    slice.metadata.uid = Some(format!("slice-{}", self.next));
                    self.slices.insert(name, slice);
                }
                SliceChange::Update(slice) => {
                    self.writes[1] += 1;
                    let old = self
                        .slices
                        .insert(slice.name_any(), slice)
                        .expect("updates name a slice");
                    assert!(self.slices.contains_key(&old.name_any()));
                }
                SliceChange::Delete { name, uid } => {
                    self.writes[2] += 1;
                    assert_eq!(self.slices.remove(&name).unwrap().metadata.uid, Some(uid));
                }
            }
        }
    }

    fn sync(&mut self, service: &Service, pods: &[Pod]) {
        let pods: Vec<&Pod> = pods.iter().collect();
        let existing: Vec<&EndpointSlice> = self.slices.values().collect();
        let changes = desired_slices(service, &pods, &nodes(), &existing);
        self.apply(changes);
        // Doing it again does nothing.
        let existing: Vec<&EndpointSlice> = self.slices.values().collect();
        assert_eq!(desired_slices(service, &pods, &nodes(), &existing), []);
    }

    fn only(&self) -> &EndpointSlice {
        assert_eq!(self.slices.len(), 1, "{:?}", self.slices);
        self.slices.values().next().unwrap()
    }

    fn endpoints(&self) -> Vec<&Endpoint> {
        self.slices
            .values()
            .flat_map(|s| s.endpoints.iter().flatten())
            .collect()
    }
}

/// Without pods, the slice that kube-controller-manager writes for the recorded Services.
#[test]
fn empty_slices_are_as_recorded() {
    let recorded = fixture("endpointslice-list");
    for (name, file) in [
        ("headless", "service-create-headless"),
        ("applied", "service-apply-ssa"),
    ] {
        let service: Service = serde_json::from_value(fixture(file)).unwrap();
        let changes = desired_slices(&service, &[], &BTreeMap::new(), &[]);
        let [SliceChange::Create(slice)] = changes.as_slice() else {
            panic!("{changes:?}");
        };
        let slice = serde_json::to_value(slice).unwrap();
        let expected = recorded["items"]
            .as_array()
            .unwrap()
            .iter()
            .find(|s| s["metadata"]["generateName"] == format!("{name}-"))
            .unwrap();
        for field in [
            "generateName",
            "namespace",
            "labels",
            "annotations",
            "ownerReferences",
        ] {
            assert_eq!(
                slice["metadata"][field], expected["metadata"][field],
                "{name} {field}"
            );
        }
        assert_eq!(slice["addressType"], expected["addressType"]);
        assert!(slice["endpoints"].is_null() && slice["ports"].is_null());
    }
}

#[test]
fn an_endpoint_has_everything() {
    let mut api = Slices::default();
    let named = pod_with(1, |p| {
        p["spec"]["hostname"] = "h".into();
        p["spec"]["subdomain"] = "web".into();
    });
    api.sync(
        &service(|s| s["spec"]["trafficDistribution"] = "PreferClose".into()),
        &[named],
    );
    let slice = serde_json::to_value(api.only()).unwrap();
    assert_eq!(
        slice["endpoints"],
        json!([{
            "addresses": ["10.1.0.2"],
            "conditions": {"ready": true, "serving": true, "terminating": false},
            "hints": {"forZones": [{"name": "z1"}]},
            "hostname": "h",
            "nodeName": "n1",
            "targetRef": {"kind": "Pod", "namespace": "d", "name": "p0001", "uid": "uid-1"},
            "zone": "z1",
        }])
    );
    assert_eq!(
        slice["ports"],
        json!([{"name": "http", "port": 8080, "protocol": "TCP"}])
    );
    assert_eq!(
        slice["metadata"]["labels"],
        json!({"team": "x", MANAGED_BY: CONTROLLER, SERVICE_NAME: "web"})
    );
    assert_eq!(
        slice["metadata"]["annotations"][TRIGGER_TIME],
        "2026-01-01T00:00:05Z"
    );
}

#[rstest::rstest]
#[case::ready(false, json!({}), Some([true, true, false]))]
#[case::not_ready(false, json!({"status": {"conditions": [{"type": "Ready", "status": "False"}]}}), Some([false, false, false]))]
#[case::no_condition(false, json!({"status": {"conditions": []}}), Some([false, false, false]))]
#[case::terminating(false, json!({"metadata": {"deletionTimestamp": "2026-01-01T00:00:00Z"}}), Some([false, true, true]))]
#[case::published(true, json!({"status": {"conditions": []}}), Some([true, false, false]))]
#[case::published_terminating(true, json!({"metadata": {"deletionTimestamp": "2026-01-01T00:00:00Z"}}), Some([true, true, true]))]
#[case::done(false, json!({"status": {"phase": "Succeeded"}}), None)]
#[case::failed(true, json!({"status": {"phase": "Failed"}}), None)]
#[case::no_address(false, json!({"status": {"podIPs": []}}), None)]
#[case::bad_address(false, json!({"status": {"podIPs": [{"ip": "nonsense"}]}}), None)]
#[case::other_labels(false, json!({"metadata": {"labels": {"app": "other"}}}), None)]
#[case::unknown_node(false, json!({"spec": {"nodeName": "gone"}}), None)]
#[case::unknown_node_published(true, json!({"spec": {"nodeName": "gone"}}), Some([true, true, false]))]
#[case::no_node(false, json!({"spec": {"nodeName": null}}), Some([true, true, false]))]
fn conditions(#[case] publish: bool, #[case] change: Value, #[case] expected: Option<[bool; 3]>) {
    let pod = pod_with(1, |p| {
        for (section, fields) in change.as_object().unwrap() {
            for (field, value) in fields.as_object().unwrap() {
                p[section][field] = value.clone();
            }
        }
    });
    let mut api = Slices::default();
    api.sync(
        &service(|s| s["spec"]["publishNotReadyAddresses"] = publish.into()),
        &[pod],
    );
    let found = api.endpoints().first().map(|e| {
        let c = e.conditions.as_ref().unwrap();
        [c.ready, c.serving, c.terminating].map(Option::unwrap)
    });
    assert_eq!(found, expected);
}

#[test]
fn both_families_have_slices_of_their_own() {
    let mut api = Slices::default();
    let dual = service(|s| s["spec"]["ipFamilies"] = json!(["IPv6", "IPv4"]));
    let only_v4 = pod_with(2, |p| p["status"]["podIPs"] = json!([{"ip": "10.1.0.3"}]));
    api.sync(&dual, &[pod(1), only_v4]);
    let count = |family: &str| -> usize {
        api.slices
            .values()
            .filter(|s| s.address_type == family)
            .map(|s| s.endpoints.as_ref().unwrap().len())
            .sum()
    };
    assert_eq!((count("IPv4"), count("IPv6")), (2, 1));
    api.sync(&service(|_| {}), &[pod(1)]);
    assert_eq!(api.only().address_type, "IPv4");
    api.sync(&service(|s| s["spec"]["type"] = "ExternalName".into()), &[pod(1)]);
    assert!(api.slices.is_empty());
}

#[test]
fn named_ports_may_have_different_numbers() {
    let named = |name: &str| service(|s| s["spec"]["ports"][0]["targetPort"] = name.into());
    let mut api = Slices::default();
    api.sync(&named("web"), &[pod(0), pod(1), pod(2)]);
    let mut ports: Vec<(i32, usize)> = api
        .slices
        .values()
        .map(|s| {
            (
                s.ports.as_ref().unwrap()[0].port.unwrap(),
                s.endpoints.as_ref().unwrap().len(),
            )
        })
        .collect();
    ports.sort_unstable();
    assert_eq!(ports, [(9000, 2), (9001, 1)]);
    let mut api = Slices::default();
    api.sync(&named("nope"), &[pod(0)]);
    assert_eq!(api.only().ports, None, "a port that the pod lacks is left out");
}

#[test]
fn slices_hold_a_hundred_and_stay_as_they_are() {
    let service = service(|_| {});
    let mut pods: Vec<Pod> = (0..250).map(pod).collect();
    let mut api = Slices::default();
    api.sync(&service, &pods);
    let sizes = |api: &Slices| -> Vec<usize> {
        let mut sizes: Vec<usize> = api
            .slices
            .values()
            .map(|s| s.endpoints.as_ref().unwrap().len())
            .collect();
        sizes.sort_unstable();
        sizes
    };
    assert_eq!(sizes(&api), [50, 100, 100]);
    assert_eq!(api.writes, [3, 0, 0]);
    // One pod comes: it goes where there is room, the other slices are not written.
    pods.push(pod(300));
    api.sync(&service, &pods);
    assert_eq!((sizes(&api), api.writes), (vec![51, 100, 100], [3, 1, 0]));
    // One pod goes from a full slice, another comes: one write.
    pods.remove(0);
    pods.push(pod(301));
    api.sync(&service, &pods);
    assert_eq!((sizes(&api), api.writes), (vec![51, 100, 100], [3, 2, 0]));
    // Everything goes: one slice becomes the empty one, the others are deleted.
    api.sync(&service, &[]);
    assert_eq!(api.writes[0], 3, "a slice is used again");
    assert_eq!(api.only().endpoints, None);
    api.sync(&service, &pods);
    assert_eq!(api.writes[0], 5, "and again");
}

#[test]
fn slices_of_others_are_left_alone() {
    let mine = service(|_| {});
    let mut foreign: EndpointSlice = serde_json::from_value(json!({
        "metadata": {"name": "hand", "namespace": "d", "labels": {SERVICE_NAME: "web"}}, "addressType": "IPv6"
    }))
    .unwrap();
    let pods = [pod(1)];
    let pods: Vec<&Pod> = pods.iter().collect();
    let changes = desired_slices(&mine, &pods, &nodes(), &[&foreign]);
    assert!(
        matches!(changes.as_slice(), [SliceChange::Create(_)]),
        "{changes:?}"
    );
    for (key, value) in [(MANAGED_BY, "someone"), (SERVICE_NAME, "other")] {
        foreign.labels_mut().insert(MANAGED_BY.into(), CONTROLLER.into());
        foreign.labels_mut().insert(key.into(), value.into());
        let changes = desired_slices(&mine, &pods, &nodes(), &[&foreign]);
        assert!(
            matches!(changes.as_slice(), [SliceChange::Create(_)]),
            "{changes:?}"
        );
    }
    let none = service(|s| s["spec"]["selector"] = Value::Null);
    assert_eq!(desired_slices(&none, &pods, &nodes(), &[&foreign]), []);
}

#[test]
fn labels_follow_the_service() {
    let mut api = Slices::default();
    api.sync(&service(|_| {}), &[pod(1)]);
    let changed = service(|s| {
        s["metadata"]["labels"] = json!({"a": "c"});
        s["spec"]["clusterIP"] = "None".into();
    });
    api.sync(&changed, &[pod(1)]);
    assert_eq!(api.writes, [1, 1, 0]);
    let labels = api.only().labels();
    assert_eq!(labels.get("a").map(String::as_str), Some("c"));
    assert_eq!(labels.get(HEADLESS).map(String::as_str), Some(""));
    assert!(!labels.contains_key("team"));
    // Nothing happened to an endpoint, so there is no time of a change.
    assert!(!api.only().annotations().contains_key(TRIGGER_TIME));
}

#[test]
fn the_cache_knows_which_services_a_change_concerns() {
    let mut cache = Cache::default();
    let mut seen = |change: Change| {
        let mut dirty = BTreeSet::new();
        cache.observe(change, &mut dirty);
        let names: Vec<String> = dirty
            .into_iter()
            .map(|(ns, name)| format!("{ns}/{name}"))
            .collect();
        (names.join(" "), cache.is_complete())
    };
    let versioned = |mut p: Pod, v: &str| {
        p.metadata.resource_version = Some(v.into());
        p
    };
    assert_eq!(seen(Change::Service(Event::Init)), (String::new(), false));
    assert_eq!(
        seen(Change::Service(Event::InitApply(service(|_| {})))),
        (String::new(), false)
    );
    assert_eq!(seen(Change::Service(Event::InitDone)), ("d/web".into(), false));
    seen(Change::Node(Event::InitDone));
    seen(Change::Pod(Event::InitDone));
    assert_eq!(seen(Change::Slice(Event::InitDone)), (String::new(), true));
    assert_eq!(seen(Change::Pod(Event::Apply(versioned(pod(1), "1")))).0, "d/web");
    let other = pod_with(2, |p| p["metadata"]["namespace"] = "e".into());
    assert_eq!(seen(Change::Pod(Event::Apply(other))).0, "");
    // The same list again concerns nobody; a list without the pod does.
    seen(Change::Pod(Event::Init));
    seen(Change::Pod(Event::InitApply(versioned(pod(1), "1"))));
    assert_eq!(seen(Change::Pod(Event::InitDone)).0, "");
    let node = nodes().remove("n1").unwrap();
    assert_eq!(seen(Change::Node(Event::Apply(node.clone()))).0, "d/web");
    assert_eq!(seen(Change::Node(Event::Apply(node))).0, "", "a heartbeat");
    seen(Change::Pod(Event::Init));
    assert_eq!(seen(Change::Pod(Event::InitDone)).0, "d/web");
    assert_eq!(seen(Change::Service(Event::Delete(service(|_| {})))).0, "d/web");
}

#[test]
fn slices_of_a_deleted_service_go() {
    let mut cache = Cache::default();
    let mut dirty = BTreeSet::new();
    let slice: EndpointSlice = serde_json::from_value(json!({
        "metadata": {"name": "web-1", "namespace": "d", "uid": "u", "resourceVersion": "5",
            "labels": {SERVICE_NAME: "web", MANAGED_BY: CONTROLLER}},
        "addressType": "IPv4",
    }))
    .unwrap();
    cache.observe(Change::Slice(Event::Apply(slice.clone())), &mut dirty);
    let key = ("d".to_owned(), "web".to_owned());
    assert!(dirty.contains(&key));
    let gone = SliceChange::Delete {
        name: "web-1".into(),
        uid: "u".into(),
    };
    assert_eq!(cache.changes(&key), [gone]);
    cache.deleted("d", "web-1", "u");
    // A late word of it does not bring it back.
    cache.observe(Change::Slice(Event::Apply(slice)), &mut dirty);
    assert_eq!(cache.changes(&key), []);
}

proptest! {
    /// From any set of pods to any other: afterwards exactly the right endpoints are there, each once, no slice is
    /// overfull, and a second look finds nothing to do (checked in `sync`).
    #[test]
    fn slices_converge(
        rounds in prop::collection::vec(prop::collection::btree_set(0..260_usize, 0..260), 1..4),
        named in any::<bool>(),
    ) {
        let service = service(|s| if named { s["spec"]["ports"][0]["targetPort"] = "web".into() });
        let mut api = Slices::default();
        for round in rounds {
            let pods: Vec<Pod> = round.iter().map(|i| pod(*i)).collect();
            api.sync(&service, &pods);
            let mut names: Vec<String> = api
                .endpoints()
                .iter()
                .map(|e| e.target_ref.as_ref().unwrap().name.clone().unwrap())
                .collect();
            names.sort();
            let expected: Vec<String> = round.iter().map(|i| format!("p{i:04}")).collect();
            prop_assert_eq!(names, expected);
            let sizes: Vec<usize> = api.slices.values().map(|s| s.endpoints.as_ref().map_or(0, Vec::len)).collect();
            prop_assert!(sizes.iter().all(|n| *n <= 100));
            prop_assert!(round.is_empty() || sizes.iter().all(|n| *n > 0));
            prop_assert!(!api.slices.is_empty());
        }
    }
}
