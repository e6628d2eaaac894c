use rstest::rstest;

use super::*;

fn of<T: k8s_openapi::serde::de::DeserializeOwned>(value: Value) -> T {
    serde_json::from_value(value).unwrap()
}

fn node(name: &str, changes: &Value) -> Node {
    let mut node = json!({
        "metadata": {"name": name, "labels": {"kubernetes.io/hostname": name}},
        "spec": {},
        "status": {"allocatable": {"cpu": "2", "memory": "4Gi", "pods": "10"}},
    });
    json_patch::merge(&mut node, changes);
    of(node)
}

fn pod(name: &str, changes: &Value) -> Pod {
    let mut pod = json!({
        "metadata": {"name": name, "namespace": "d", "uid": name, "labels": {"app": "web"}},
        "spec": {"containers": [{"name": "c"}]},
    });
    json_patch::merge(&mut pod, changes);
    of(pod)
}

fn asks(cpu: &str, memory: &str) -> Value {
    json!({"spec": {"containers": [
        {"name": "c", "resources": {"requests": {"cpu": cpu, "memory": memory}}},
    ]}})
}

fn cluster(nodes: Vec<Node>) -> Cluster {
    let mut cluster = Cluster::default();
    for node in nodes {
        cluster.put_node(&Arc::new(node));
    }
    cluster
}

fn put(cluster: &mut Cluster, pod: Pod, node: &str) {
    let key = ("d".to_owned(), pod.name_any());
    cluster.put(&key, node, &Arc::new(pod));
}

/// Gives nodes to pods one after the other and returns where they went.
fn fill(cluster: &mut Cluster, pods: impl IntoIterator<Item = Pod>) -> Vec<Result<String, String>> {
    let mut went = Vec::new();
    for pod in pods {
        let choice = choice::choose(cluster, &pod);
        if let Ok(node) = &choice {
            put(cluster, pod, node);
        }
        went.push(choice);
    }
    went
}

fn refusal(node_changes: &Value, pod_changes: &Value) -> String {
    let mut cluster = cluster(vec![node("n", node_changes)]);
    put(
        &mut cluster,
        pod(
            "there",
            &json!({"metadata": {"labels": {"app": "db"}}, "spec": {"containers": [
                {"name": "c", "ports": [{"containerPort": 80, "hostPort": 80}], "resources": {"requests": {"cpu": "1"}}},
            ]}}),
        ),
        "n",
    );
    choice::choose(&cluster, &pod("new", pod_changes)).unwrap_or_else(|why| why)
}

#[rstest]
#[case(json!({}), json!({}), "n")]
#[case(json!({"spec": {"unschedulable": true}}), json!({}), "0/1 nodes are available: 1 node(s) were unschedulable.")]
#[case(
    json!({"spec": {"unschedulable": true}}),
    json!({"spec": {"tolerations": [{"key": "node.kubernetes.io/unschedulable", "operator": "Exists"}]}}),
    "n"
)]
#[case(
    json!({"spec": {"taints": [{"key": "k", "value": "v", "effect": "NoSchedule"}]}}),
    json!({}),
    "0/1 nodes are available: 1 node(s) had untolerated taint {k: v}."
)]
#[case(
    json!({"spec": {"taints": [{"key": "k", "value": "v", "effect": "NoExecute"}]}}),
    json!({"spec": {"tolerations": [{"key": "k", "value": "v"}]}}),
    "n"
)]
#[case(json!({"spec": {"taints": [{"key": "k", "effect": "PreferNoSchedule"}]}}), json!({}), "n")]
#[case(
    json!({}),
    json!({"spec": {"nodeSelector": {"disk": "ssd"}}}),
    "0/1 nodes are available: 1 node(s) didn't match Pod's node affinity/selector."
)]
#[case(
    json!({}),
    json!({"spec": {"containers": [{"name": "c", "ports": [{"containerPort": 1, "hostPort": 80, "hostIP": "10.0.0.1"}]}]}}),
    "0/1 nodes are available: 1 node(s) didn't have free ports for the requested pod ports."
)]
#[case(
    json!({}),
    json!({"spec": {"containers": [{"name": "c", "ports": [{"containerPort": 1, "hostPort": 80, "protocol": "UDP"}]}]}}),
    "n"
)]
#[case(json!({}), asks("1", "1Gi"), "n")]
#[case(
    json!({}),
    asks("1001m", "5Gi"),
    "0/1 nodes are available: 1 Insufficient cpu, 1 Insufficient memory."
)]
#[case(json!({"status": {"allocatable": {"pods": "1"}}}), json!({}), "0/1 nodes are available: 1 Too many pods.")]
#[case(json!({"status": {"allocatable": null}}), json!({}), "0/1 nodes are available: 1 Too many pods.")]
#[case(
    json!({}),
    json!({"spec": {"affinity": {"podAntiAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": [
        {"labelSelector": {"matchLabels": {"app": "db"}}, "topologyKey": "kubernetes.io/hostname"},
    ]}}}}),
    "0/1 nodes are available: 1 node(s) didn't match pod anti-affinity rules."
)]
#[case(
    json!({}),
    json!({"spec": {"affinity": {"podAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": [
        {"labelSelector": {"matchLabels": {"app": "cache"}}, "topologyKey": "kubernetes.io/hostname"},
    ]}}}}),
    "0/1 nodes are available: 1 node(s) didn't match pod affinity rules."
)]
#[case(
    json!({}),
    json!({"spec": {"affinity": {"podAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": [
        {"labelSelector": {"matchLabels": {"app": "web"}}, "topologyKey": "kubernetes.io/hostname"},
    ]}}}}),
    "n"
)]
#[case(
    json!({}),
    json!({"spec": {"topologySpreadConstraints": [
        {"maxSkew": 1, "topologyKey": "zone", "whenUnsatisfiable": "DoNotSchedule", "labelSelector": {}},
    ]}}),
    "0/1 nodes are available: 1 node(s) didn't match pod topology spread constraints (missing required label)."
)]
fn a_node_takes_a_pod_or_says_why_not(#[case] node: Value, #[case] pod: Value, #[case] wanted: &str) {
    assert_eq!(refusal(&node, &pod), wanted);
}

#[test]
fn without_nodes_that_is_said() {
    let why = choice::choose(&Cluster::default(), &pod("p", &json!({})));
    assert_eq!(why, Err("no nodes available to schedule pods".into()));
}

#[test]
fn each_reason_is_counted() {
    let tainted = json!({"spec": {"taints": [{"key": "k", "effect": "NoSchedule"}]}});
    let nodes = vec![node("a", &tainted), node("b", &json!({})), node("c", &json!({}))];
    let why = choice::choose(&cluster(nodes), &pod("p", &asks("3", "1")));
    assert_eq!(
        why,
        Err("0/3 nodes are available: 1 node(s) had untolerated taint {k: }, 2 Insufficient cpu.".into())
    );
}

fn owned(name: &str, owner: &str) -> Pod {
    let owner = json!({"apiVersion": "apps/v1", "kind": "ReplicaSet", "name": owner, "uid": owner, "controller": true});
    pod(name, &json!({"metadata": {"ownerReferences": [owner]}}))
}

#[test]
fn pods_of_one_set_are_spread_and_nodes_filled_evenly() {
    let mut cluster = cluster(["a", "b", "c"].map(|name| node(name, &json!({}))).to_vec());
    let pods = (0..9).map(|i| owned(&format!("p{i}"), "web"));
    let mut went: Vec<String> = fill(&mut cluster, pods).into_iter().map(Result::unwrap).collect();
    let mut first: Vec<String> = went.drain(..3).collect();
    first.sort();
    assert_eq!(first, ["a", "b", "c"]);
    went.sort();
    assert_eq!(went, ["a", "a", "b", "b", "c", "c"]);
}

#[test]
fn nothing_is_promised_twice_and_what_leaves_makes_room() {
    let mut cluster = cluster(vec![node("a", &json!({}))]);
    let went = fill(
        &mut cluster,
        (0..3).map(|i| pod(&format!("p{i}"), &asks("1", "1"))),
    );
    assert_eq!(went.iter().filter(|went| went.is_ok()).count(), 2, "{went:?}");
    assert!(cluster.remove(&("d".into(), "p0".into())));
    assert!(!cluster.remove(&("d".into(), "p0".into())), "it is gone");
    assert!(choice::choose(&cluster, &pod("p3", &asks("1", "1"))).is_ok());
}

#[test]
fn wishes_decide_among_equals() {
    let nodes = || {
        vec![
            node("a", &json!({"metadata": {"labels": {"disk": "hdd"}}})),
            node("b", &json!({"metadata": {"labels": {"disk": "ssd"}}})),
        ]
    };
    let wish = json!({"spec": {"affinity": {"nodeAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": [
        {"weight": 1, "preference": {"matchExpressions": [{"key": "disk", "operator": "In", "values": ["ssd"]}]}},
    ]}}}});
    assert_eq!(
        choice::choose(&cluster(nodes()), &pod("p", &wish)),
        Ok("b".into())
    );
    assert_eq!(
        choice::choose(&cluster(nodes()), &pod("p", &json!({}))),
        Ok("a".into())
    );
    let mut tainted = nodes();
    tainted[0] = node(
        "a",
        &json!({"spec": {"taints": [{"key": "k", "effect": "PreferNoSchedule"}]}}),
    );
    assert_eq!(
        choice::choose(&cluster(tainted), &pod("p", &json!({}))),
        Ok("b".into())
    );
    let mut near = cluster(nodes());
    put(&mut near, pod("other", &json!({})), "b");
    let together = json!({"spec": {"affinity": {"podAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": [
        {"weight": 50, "podAffinityTerm":
            {"labelSelector": {"matchLabels": {"app": "web"}}, "topologyKey": "kubernetes.io/hostname"}},
    ]}}}});
    assert_eq!(choice::choose(&near, &pod("p", &together)), Ok("b".into()));
    assert_eq!(
        choice::choose(&near, &pod("p", &json!({}))),
        Ok("a".into()),
        "the emptier one"
    );
}

#[test]
fn zones_are_kept_even_where_that_is_required() {
    let zone = |name: &str, zone: &str| node(name, &json!({"metadata": {"labels": {"zone": zone}}}));
    let mut cluster = cluster(vec![zone("a1", "a"), zone("a2", "a"), zone("b1", "b")]);
    let spread = json!({"spec": {"topologySpreadConstraints": [{
        "maxSkew": 1, "topologyKey": "zone", "whenUnsatisfiable": "DoNotSchedule",
        "labelSelector": {"matchLabels": {"app": "web"}},
    }]}});
    let pods = (0..6).map(|i| pod(&format!("p{i}"), &spread));
    let went: Vec<String> = fill(&mut cluster, pods).into_iter().map(Result::unwrap).collect();
    assert_eq!(went.iter().filter(|node| *node == "b1").count(), 3, "{went:?}");
}

#[test]
fn those_that_are_there_may_refuse_a_neighbour() {
    let mut cluster = cluster(vec![node("a", &json!({})), node("b", &json!({}))]);
    let alone = json!({"spec": {"affinity": {"podAntiAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": [
        {"labelSelector": {}, "namespaceSelector": {"matchLabels": {"team": "x"}}, "topologyKey": "kubernetes.io/hostname"},
    ]}}}});
    put(&mut cluster, pod("alone", &alone), "a");
    let new = pod(
        "new",
        &json!({"spec": {"nodeSelector": {"kubernetes.io/hostname": "a"}}}),
    );
    assert_eq!(choice::choose(&cluster, &new), Ok("a".into()), "not of that team");
    cluster.set_namespace("d".into(), Some([("team".into(), "x".into())].into()));
    let why = choice::choose(&cluster, &new).unwrap_err();
    assert!(
        why.contains("1 node(s) didn't satisfy existing pods anti-affinity rules"),
        "{why}"
    );
}

fn scheduler() -> Scheduler {
    let config = kube::Config::new("http://127.0.0.1:1".parse().unwrap());
    Scheduler::new(Client::try_from(config).unwrap())
}

#[tokio::test]
async fn a_pod_that_waits_is_looked_at_when_there_is_room_and_not_before() {
    let mut scheduler = scheduler();
    let key = |name: &str| ("d".to_owned(), name.to_owned());
    scheduler.observe(Change::Node(watcher::Event::Apply(node("a", &json!({})))));
    let big = asks("2", "1");
    for name in ["p", "q"] {
        let dirty = scheduler.observe(Change::Pod(watcher::Event::Apply(pod(name, &big))));
        assert_eq!(dirty, [key(name)]);
        assert!(
            scheduler.decide(&key(name)).requests.is_some(),
            "it is bound, or says why not"
        );
    }
    assert!(scheduler.waiting.contains_key(&key("q")));
    // A second look at what is on its way does nothing.
    assert!(scheduler.decide(&key("p")).requests.is_none());
    // A heartbeat, and the pod being where it was put, are no reasons to look again.
    let beat = json!({"status": {"conditions": [{"type": "Ready", "status": "True"}]}});
    assert!(
        scheduler
            .observe(Change::Node(watcher::Event::Apply(node("a", &beat))))
            .is_empty()
    );
    let mut bound = pod("p", &big);
    bound.spec.as_mut().unwrap().node_name = Some("a".into());
    assert!(
        scheduler
            .observe(Change::Pod(watcher::Event::Apply(bound.clone())))
            .is_empty()
    );
    // More room is; so is the end of a pod.
    let larger = node("a", &json!({"status": {"allocatable": {"cpu": "3"}}}));
    assert_eq!(
        scheduler.observe(Change::Node(watcher::Event::Apply(larger))),
        [key("q")]
    );
    assert_eq!(
        scheduler.observe(Change::Pod(watcher::Event::Delete(bound))),
        [key("q")]
    );
    assert!(scheduler.decide(&key("q")).requests.is_some());
    assert!(scheduler.waiting.is_empty());
    // The API refused: the room is free again.
    scheduler.done(&key("q"), Done::Refused);
    assert_eq!(scheduler.cluster.node_of(&key("q")), None);
}

#[test]
fn pods_of_other_schedulers_and_gated_ones_are_left_alone() {
    assert!(is_ours(&pod("p", &json!({}))));
    for changes in [
        json!({"spec": {"schedulerName": "mine"}}),
        json!({"spec": {"schedulingGates": [{"name": "wait"}]}}),
        json!({"metadata": {"deletionTimestamp": "2026-01-01T00:00:00Z"}}),
    ] {
        assert!(!is_ours(&pod("p", &changes)), "{changes}");
    }
}
