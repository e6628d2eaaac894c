use serde_json::{Value, json};

use super::graph::{Action, Graph, Place, Policy};
use super::*;

fn kind(name: &str) -> usize {
    RESOURCES.iter().position(|r| r.kind == name).unwrap()
}

fn put(graph: &mut Graph, name: &str, object: &str, meta: &Value) -> Vec<String> {
    let mut full = json!({"name": object, "namespace": "d", "uid": object});
    json_patch::merge(&mut full, meta);
    graph.put(kind(name), &serde_json::from_value(full).unwrap())
}

fn place(name: &str, object: &str) -> Place {
    Place {
        kind: kind(name),
        namespace: "d".into(),
        name: object.into(),
    }
}

fn owner(name: &str, uid: &str) -> Value {
    let r = &RESOURCES[kind(name)];
    json!({"apiVersion": r.api_version(), "kind": name, "name": uid, "uid": uid, "blockOwnerDeletion": true})
}

fn chain(graph: &mut Graph) {
    put(graph, "Deployment", "dep", &json!({}));
    put(
        graph,
        "ReplicaSet",
        "rs",
        &json!({"ownerReferences": [owner("Deployment", "dep")]}),
    );
    put(
        graph,
        "Pod",
        "pod",
        &json!({"ownerReferences": [owner("ReplicaSet", "rs")]}),
    );
}

fn deletes(actions: &[Action], uid: &str, wanted: Policy) -> bool {
    matches!(actions, [Action::Delete { uid: found, policy, .. }] if found == uid && *policy == wanted)
}

#[test]
fn nothing_happens_to_what_has_an_owner() {
    let mut graph = Graph::default();
    chain(&mut graph);
    for uid in ["dep", "rs", "pod", "nobody"] {
        assert_eq!(graph.decide(uid), []);
    }
    // A kind that is not served may exist elsewhere.
    let foreign = json!({"apiVersion": "example.com/v1", "kind": "Thing", "name": "t", "uid": "t"});
    put(&mut graph, "Pod", "other", &json!({"ownerReferences": [foreign]}));
    assert_eq!(graph.decide("other"), []);
}

#[test]
fn in_the_background_dependents_go_after_their_owner() {
    let mut graph = Graph::default();
    chain(&mut graph);
    let dirty = graph.remove(&place("Deployment", "dep"));
    assert_eq!(dirty, ["rs"]);
    assert!(deletes(&graph.decide("rs"), "rs", Policy::Background));
    let Action::Delete { unseen, .. } = &graph.decide("rs")[0] else {
        panic!()
    };
    assert_eq!(unseen, &[(place("Deployment", "dep"), "dep".to_owned())]);
    assert_eq!(graph.decide("pod"), []);
    assert_eq!(graph.remove(&place("ReplicaSet", "rs")), ["pod", "dep"]);
    assert!(deletes(&graph.decide("pod"), "pod", Policy::Background));
}

#[test]
fn in_the_foreground_dependents_go_first() {
    let mut graph = Graph::default();
    chain(&mut graph);
    let going =
        |finalizers: Value| json!({"deletionTimestamp": "2026-11-21T01:25:30Z", "finalizers": finalizers});
    let dirty = put(&mut graph, "Deployment", "dep", &going(json!([FOREGROUND])));
    assert!(dirty.contains(&"rs".to_owned()));
    assert_eq!(graph.decide("dep"), []);
    assert!(deletes(&graph.decide("rs"), "rs", Policy::Foreground));
    let mut rs = going(json!([FOREGROUND]));
    rs["ownerReferences"] = json!([owner("Deployment", "dep")]);
    put(&mut graph, "ReplicaSet", "rs", &rs);
    assert!(deletes(&graph.decide("pod"), "pod", Policy::Background));
    let dirty = graph.remove(&place("Pod", "pod"));
    assert_eq!(dirty, ["rs"]);
    let release = |name: &str, uid: &str| Action::Release {
        place: place(name, uid),
        uid: uid.into(),
        finalizer: FOREGROUND,
    };
    assert_eq!(graph.decide("rs"), [release("ReplicaSet", "rs")]);
    assert_eq!(graph.remove(&place("ReplicaSet", "rs")), ["dep"]);
    assert_eq!(graph.decide("dep"), [release("Deployment", "dep")]);
}

#[test]
fn orphans_lose_their_owner_and_stay() {
    let mut graph = Graph::default();
    chain(&mut graph);
    put(
        &mut graph,
        "ReplicaSet",
        "rs",
        &json!({
            "deletionTimestamp": "2026-11-21T01:25:30Z", "finalizers": [ORPHAN, "example.com/other"],
            "ownerReferences": [owner("Deployment", "dep")],
        }),
    );
    assert_eq!(
        graph.decide("rs"),
        [
            Action::Disown {
                place: place("Pod", "pod"),
                uid: "pod".into(),
                owners: vec!["rs".into()],
                unseen: Vec::new(),
            },
            Action::Release {
                place: place("ReplicaSet", "rs"),
                uid: "rs".into(),
                finalizer: ORPHAN,
            },
        ]
    );
}

#[test]
fn one_owner_of_two_is_enough() {
    let mut graph = Graph::default();
    chain(&mut graph);
    let owners = json!({"ownerReferences": [owner("ReplicaSet", "rs"), owner("ReplicaSet", "gone")]});
    put(&mut graph, "Pod", "two", &owners);
    let actions = graph.decide("two");
    assert!(
        matches!(&actions[..], [Action::Disown { owners, .. }] if owners == &["gone"]),
        "{actions:?}"
    );
}

#[test]
fn another_object_of_the_same_name_is_another_owner() {
    let mut graph = Graph::default();
    chain(&mut graph);
    let dirty = put(&mut graph, "ReplicaSet", "rs", &json!({"uid": "new"}));
    assert!(dirty.contains(&"pod".to_owned()));
    assert!(deletes(&graph.decide("pod"), "pod", Policy::Background));
}
