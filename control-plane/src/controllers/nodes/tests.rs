use rstest::rstest;

use super::*;
use lifecycle::GRACE;

fn of<T: k8s_openapi::serde::de::DeserializeOwned>(value: Value) -> T {
    serde_json::from_value(value).unwrap()
}

fn node(ready: &str, spec: &Value) -> Node {
    let conditions = if ready.is_empty() {
        json!([])
    } else {
        json!([{"type": "Ready", "status": ready}])
    };
    of(json!({
        "metadata": {"name": "n", "resourceVersion": "1"}, "spec": spec, "status": {"conditions": conditions},
    }))
}

fn at(seconds: i64) -> Timestamp {
    Timestamp::from_second(1_000_000 + seconds).unwrap()
}

fn pod(tolerations: &Value) -> Arc<Pod> {
    Arc::new(of(json!({
        "metadata": {"name": "p", "namespace": "d", "uid": "u"},
        "spec": {"nodeName": "n", "containers": [], "tolerations": tolerations},
        "status": {"conditions": [{"type": "Ready", "status": "True"}]},
    })))
}

fn taints(actions: &[Action]) -> Option<Vec<String>> {
    actions.iter().find_map(|action| match action {
        Action::Patch { patch, .. } => Some(
            patch["spec"]["taints"]
                .as_array()
                .into_iter()
                .flatten()
                .map(|taint| {
                    let key = taint["key"].as_str().unwrap();
                    format!(
                        "{}:{}",
                        key.rsplit('/').next().unwrap(),
                        taint["effect"].as_str().unwrap()
                    )
                })
                .collect(),
        ),
        _ => None,
    })
}

#[rstest]
#[case("", json!({"taints": [{"key": "node.kubernetes.io/not-ready", "effect": "NoSchedule"}]}), None)]
#[case("True", json!({"taints": [{"key": "node.kubernetes.io/not-ready", "effect": "NoSchedule"}]}), Some(vec![]))]
#[case("True", json!({}), None)]
#[case("True", json!({"taints": [{"key": "mine", "effect": "NoExecute"}]}), None)]
#[case("False", json!({}), Some(vec!["not-ready:NoSchedule", "not-ready:NoExecute"]))]
#[case("Unknown", json!({"taints": [{"key": "node.kubernetes.io/not-ready", "effect": "NoExecute"}]}),
    Some(vec!["unreachable:NoSchedule", "unreachable:NoExecute"]))]
#[case("True", json!({"unschedulable": true}), Some(vec!["unschedulable:NoSchedule"]))]
#[case("True", json!({"taints": [{"key": "node.kubernetes.io/unschedulable", "effect": "NoSchedule"}]}), Some(vec![]))]
fn taints_follow_conditions(#[case] ready: &str, #[case] spec: Value, #[case] wanted: Option<Vec<&str>>) {
    let now = Instant::now();
    let (actions, _) = lifecycle::plan(&node(ready, &spec), &Signs::new(now), &[], now, at(0));
    let wanted = wanted.map(|list| list.into_iter().map(str::to_owned).collect::<Vec<_>>());
    assert_eq!(taints(&actions), wanted);
}

#[test]
fn a_silent_node_becomes_unknown_and_only_if_it_ever_spoke() {
    let start = Instant::now();
    let node = node("True", &json!({}));
    let mut signs = Signs::new(start);
    let late = start + GRACE;
    assert_eq!(
        lifecycle::plan(&node, &signs, &[], late, at(50)),
        (Vec::new(), None)
    );
    signs.observe(Some(at(0)), &node, start);
    let (actions, again) = lifecycle::plan(&node, &signs, &[], start, at(0));
    assert_eq!((actions, again), (Vec::new(), Some(GRACE)));
    // The same lease again is no sign of life; a renewed one is, whatever time it tells.
    signs.observe(Some(at(0)), &node, late);
    let (actions, _) = lifecycle::plan(&node, &signs, &[], late, at(50));
    let [Action::Status { patch, .. }] = &actions[..] else {
        panic!("{actions:?}")
    };
    assert_eq!(patch["status"]["conditions"][0]["status"], "Unknown");
    assert_eq!(patch["status"]["conditions"].as_array().unwrap().len(), 4);
    signs.observe(Some(at(-500)), &node, late);
    assert_eq!(
        lifecycle::plan(&node, &signs, &[], late, at(50)),
        (Vec::new(), Some(GRACE))
    );
}

#[test]
fn pods_leave_when_they_do_not_tolerate_it_any_longer() {
    let now = Instant::now();
    let mut lost = node("Unknown", &json!({}));
    let added = at(0).strftime("%Y-%m-%dT%H:%M:%SZ").to_string();
    lost.spec = Some(of(json!({"taints": [
        {"key": "node.kubernetes.io/unreachable", "effect": "NoSchedule"},
        {"key": "node.kubernetes.io/unreachable", "effect": "NoExecute", "timeAdded": added},
    ]})));
    let plan = |tolerations: Value, seconds: i64| {
        lifecycle::plan(&lost, &Signs::new(now), &[pod(&tolerations)], now, at(seconds))
    };
    let five = json!([{"key": "node.kubernetes.io/unreachable", "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 300}]);
    let (actions, again) = plan(five.clone(), 100);
    assert_eq!((actions.len(), again), (0, Some(Duration::from_secs(200))));
    let (actions, _) = plan(five, 300);
    assert!(
        matches!(&actions[..], [Action::Delete { force: false, .. }]),
        "{actions:?}"
    );
    let (actions, _) = plan(json!([]), 0);
    assert!(matches!(&actions[..], [Action::Delete { .. }]), "{actions:?}");
    let ever = json!([{"operator": "Exists"}]);
    assert_eq!(plan(ever, 10_000), (Vec::new(), None));
}

#[rstest]
#[case("10.244.0.0/16", &[], Some("10.244.0.0/24"))]
#[case("10.244.0.0/16", &["10.244.0.0/24", "fd00::/64"], Some("10.244.1.0/24"))]
#[case("10.244.0.0/23", &["10.244.0.0/24", "10.244.1.128/25"], None)]
#[case("10.244.0.0/16", &["10.244.0.0/17"], Some("10.244.128.0/24"))]
#[case("10.9.9.0/26", &[], Some("10.9.9.0/26"))]
#[case("fd00:1::/48", &["fd00:1::/64"], Some("fd00:1:0:1::/64"))]
#[case("::/0", &[], Some("::/64"))]
#[case("255.255.0.0/16", &["255.255.0.0/17", "255.255.128.0/17"], None)]
fn nodes_get_their_own_addresses(#[case] range: &str, #[case] taken: &[&str], #[case] wanted: Option<&str>) {
    let taken: Vec<IpNet> = taken.iter().map(|net| net.parse().unwrap()).collect();
    let mut range = ipam::Range::new(range.parse().unwrap());
    assert_eq!(range.next(&taken).map(|net| net.to_string()).as_deref(), wanted);
}

#[test]
fn addresses_are_not_given_twice_in_a_row() {
    let mut range = ipam::Range::new("10.244.0.0/22".parse().unwrap());
    let given: Vec<String> = (0..5).map(|_| range.next(&[]).unwrap().to_string()).collect();
    assert_eq!(
        given,
        [
            "10.244.0.0/24",
            "10.244.1.0/24",
            "10.244.2.0/24",
            "10.244.3.0/24",
            "10.244.0.0/24"
        ]
    );
}
