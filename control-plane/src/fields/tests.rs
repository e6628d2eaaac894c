use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;
use crate::resource::RESOURCES;

fn kind(kind: &str) -> &'static ResourceInfo {
    RESOURCES.iter().find(|r| r.kind == kind).unwrap()
}

fn by(name: &str) -> Manager {
    Manager {
        name: name.into(),
        subresource: String::new(),
        now: "2026-11-21T01:25:30Z".into(),
    }
}

fn deployment(spec: &Value) -> Value {
    let mut object = json!({
        "apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "d", "namespace": "demo"},
        "spec": {"selector": {"matchLabels": {"app": "d"}}},
    });
    json_patch::merge(&mut object["spec"], spec);
    object
}

/// Who owns what, as `manager: path`.
fn owners(object: &Value) -> Vec<String> {
    decode(&object["metadata"]["managedFields"])
        .unwrap()
        .iter()
        .flat_map(|entry| {
            entry
                .set
                .paths()
                .into_iter()
                .map(|path| format!("{}: {path}", entry.manager))
        })
        .collect()
}

fn applied(live: Option<&Value>, config: &Value, name: &str) -> Result<Value, ApiError> {
    let r = RESOURCES.iter().find(|r| r.kind == config["kind"]).unwrap();
    apply(r, live, config, &by(name), false)
}

#[test]
fn what_is_left_out_goes_unless_someone_else_owns_it() {
    let both = json!({
        "apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "c", "labels": {"a": "1", "b": "2"}}, "data": {"x": "1"},
    });
    let one =
        json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "c", "labels": {"a": "1"}}});
    let first = applied(None, &both, "x").unwrap();
    let second = applied(Some(&first), &one, "x").unwrap();
    assert_eq!(second["metadata"]["labels"], json!({"a": "1"}));
    assert_eq!(second["data"], Value::Null);
    assert_eq!(owners(&second), ["x: .metadata.labels.a"]);

    let shared = applied(Some(&first), &both, "y").unwrap();
    let kept = applied(Some(&shared), &one, "x").unwrap();
    assert_eq!(
        (&kept["metadata"]["labels"], &kept["data"]),
        (&both["metadata"]["labels"], &both["data"])
    );
    let gone = applied(Some(&kept), &one, "y").unwrap();
    assert_eq!(gone["metadata"]["labels"], json!({"a": "1"}));
}

#[test]
fn changing_what_another_owns_is_a_conflict_that_force_settles() {
    let r = kind("Deployment");
    let live = applied(None, &deployment(&json!({"replicas": 1})), "one").unwrap();
    let same = applied(Some(&live), &deployment(&json!({"replicas": 1})), "two").unwrap();
    assert_eq!(
        owners(&same),
        [
            "one: .spec.replicas",
            "one: .spec.selector",
            "two: .spec.replicas",
            "two: .spec.selector"
        ]
    );
    let wanted = deployment(&json!({"replicas": 2, "minReadySeconds": 3}));
    let error = applied(Some(&live), &wanted, "two").unwrap_err();
    assert_eq!((error.code, error.reason), (409, "Conflict"));
    assert_eq!(
        error.message,
        "Apply failed with 1 conflict: conflict with \"one\": .spec.replicas"
    );
    assert_eq!(
        error.details.unwrap()["causes"],
        json!([{"reason": "FieldManagerConflict", "message": "conflict with \"one\"", "field": ".spec.replicas"}])
    );
    let forced = apply(r, Some(&live), &wanted, &by("two"), true).unwrap();
    assert_eq!(forced["spec"]["replicas"], 2);
    assert_eq!(
        owners(&forced),
        [
            "one: .spec.selector",
            "two: .spec.minReadySeconds",
            "two: .spec.replicas",
            "two: .spec.selector"
        ]
    );
    // Several at once are listed.
    let selector = deployment(&json!({"replicas": 5, "selector": {"matchLabels": {"app": "e"}}}));
    let error = applied(Some(&live), &selector, "two").unwrap_err();
    assert_eq!(
        error.message,
        "Apply failed with 2 conflicts: conflicts with \"one\":\n- .spec.replicas\n- .spec.selector"
    );
}

#[test]
fn an_update_takes_what_it_changes() {
    let r = kind("Deployment");
    let live = applied(None, &deployment(&json!({"replicas": 1})), "one").unwrap();
    let mut scaled = live.clone();
    scaled["spec"]["replicas"] = 4.into();
    let scale = Manager {
        subresource: "scale".into(),
        ..by("kubectl")
    };
    scaled["metadata"]["managedFields"] = updated(r, &live, &scaled, &Value::Null, &scale).unwrap();
    assert_eq!(
        owners(&scaled),
        ["one: .spec.selector", "kubectl: .spec.replicas"]
    );
    let error = applied(Some(&scaled), &deployment(&json!({"replicas": 1})), "one").unwrap_err();
    assert_eq!(
        error.message,
        "Apply failed with 1 conflict: conflict with \"kubectl\" with subresource \"scale\" using apps/v1: .spec.replicas"
    );
    // Without the field there is nothing to quarrel about, and it stays.
    let left = applied(Some(&scaled), &deployment(&json!({})), "one").unwrap();
    assert_eq!(left["spec"]["replicas"], 4);
}

#[test]
fn elements_of_lists_are_owned_one_by_one() {
    let pod = |containers: Value| json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p"}, "spec": {"containers": containers}});
    let live = applied(
        None,
        &pod(json!([{"name": "a", "image": "a:1", "ports": [{"containerPort": 80}]}])),
        "one",
    )
    .unwrap();
    let sidecar = applied(Some(&live), &pod(json!([{"name": "b", "image": "b:1"}])), "two").unwrap();
    let names = |object: &Value| -> Vec<String> {
        let list = object["spec"]["containers"].as_array().unwrap();
        list.iter()
            .map(|c| c["name"].as_str().unwrap().to_owned())
            .collect()
    };
    assert_eq!(names(&sidecar), ["a", "b"]);
    // The key of a port is complete even if the protocol is left out.
    let path = "one: .spec.containers[name=\"a\"].ports[containerPort=80,protocol=\"TCP\"].containerPort";
    assert!(
        owners(&sidecar).contains(&path.to_owned()),
        "{:?}",
        owners(&sidecar)
    );
    let order = applied(
        Some(&sidecar),
        &pod(json!([{"name": "n", "image": "n"}, {"name": "b", "image": "b:1"}])),
        "two",
    )
    .unwrap();
    assert_eq!(names(&order), ["a", "n", "b"]);
    let gone = applied(Some(&order), &pod(json!([])), "two").unwrap();
    assert_eq!(names(&gone), ["a"]);
    let twice = pod(json!([{"name": "a", "env": [{"name": "E"}, {"name": "E"}]}]));
    let error = applied(None, &twice, "one").unwrap_err();
    assert!(
        error
            .message
            .ends_with(".spec.containers[name=\"a\"].env: duplicate entries for key [name=\"E\"]"),
        "{error}"
    );
}

#[test]
fn objects_from_before_have_an_owner_at_the_first_apply() {
    let live = deployment(&json!({"replicas": 3}));
    let error = applied(Some(&live), &deployment(&json!({"replicas": 1})), "x").unwrap_err();
    assert_eq!(
        error.message,
        "Apply failed with 1 conflict: conflict with \"before-first-apply\" using apps/v1: .spec.replicas"
    );
    // Nobody is recorded for a mere update of such an object.
    assert_eq!(
        updated(kind("Deployment"), &live, &live, &Value::Null, &by("x")),
        None
    );
}

#[test]
fn kubectl_takes_over_from_its_client_side_apply() {
    let r = kind("Deployment");
    let config = deployment(&json!({"replicas": 3}));
    let mut live = config.clone();
    live["metadata"]["annotations"][LAST_APPLIED] = config.to_string().into();
    live["metadata"]["managedFields"] = created(r, &live, &by("kubectl-client-side-apply"));
    let wanted = deployment(&json!({"replicas": 1}));
    assert_eq!(applied(Some(&live), &wanted, "other").unwrap_err().code, 409);
    let taken = applied(Some(&live), &wanted, "kubectl").unwrap();
    assert_eq!(taken["spec"]["replicas"], 1);
    let noted = taken["metadata"]["annotations"][LAST_APPLIED].as_str().unwrap();
    assert_eq!(serde_json::from_str::<Value>(noted).unwrap(), wanted);
}

#[test]
fn what_clients_send_as_managed_fields() {
    let r = kind("ConfigMap");
    let object = json!({"metadata": {"name": "c"}, "data": {"a": "1"}});
    let mut live = object.clone();
    live["metadata"]["managedFields"] = created(r, &object, &by("x"));
    assert_eq!(owners(&live), ["x: .data", "x: .data.a"]);
    assert_eq!(updated(r, &live, &live, &json!([{}]), &by("y")), None);
    let other = created(r, &object, &by("z"));
    assert_eq!(updated(r, &live, &live, &other, &by("y")), Some(other));
    let kept = updated(r, &live, &live, &json!([{"manager": 7}]), &by("y"));
    assert_eq!(kept.as_ref(), Some(&live["metadata"]["managedFields"]));
}

#[test]
fn old_updates_are_put_together() {
    let r = kind("ConfigMap");
    let mut live = json!({"metadata": {"name": "c"}, "data": {}});
    live["metadata"]["managedFields"] =
        created(r, &json!({"metadata": {"labels": {"first": "1"}}}), &by("m0"));
    for n in 1..40 {
        let mut new = live.clone();
        new["data"][format!("k{n}")] = "v".into();
        let manager = Manager {
            now: format!("2026-11-21T01:25:{n:02}Z"),
            ..by(&format!("m{n}"))
        };
        new["metadata"]["managedFields"] = updated(r, &live, &new, &Value::Null, &manager).unwrap();
        live = new;
    }
    let entries = decode(&live["metadata"]["managedFields"]).unwrap();
    assert_eq!(entries.len(), MAX_UPDATERS);
    let ancient: Vec<&Entry> = entries.iter().filter(|entry| entry.manager == ANCIENT).collect();
    let [ancient] = ancient[..] else {
        panic!("{ancient:?}")
    };
    assert!(ancient.set.paths().contains(&".data.k1".to_owned()));
    assert_eq!(owners(&live).len(), 39 + 2);
}

fn any_json() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i32>().prop_map(Value::from),
        "[a-c]{0,2}".prop_map(Value::from),
    ];
    let names = prop_oneof![
        Just("metadata"),
        Just("labels"),
        Just("spec"),
        Just("containers"),
        Just("name"),
        Just("ports"),
        Just("finalizers"),
        Just("template"),
        Just("containerPort"),
        Just("data"),
        Just("managedFields"),
        Just("fieldsV1"),
        Just("f:x"),
        Just("selector"),
        Just("annotations"),
    ]
    .prop_map(str::to_owned);
    leaf.prop_recursive(6, 48, 5, move |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            prop::collection::btree_map(names.clone(), inner, 0..4)
                .prop_map(|map| map.into_iter().collect::<Value>()),
        ]
    })
}

fn labels() -> impl Strategy<Value = Value> {
    let map = prop::collection::btree_map("[a-d]", "[x-z]", 0..4);
    let ports = prop::collection::btree_map(1..4_u16, "[a-c]", 0..4).prop_map(|ports| {
        let list = ports
            .into_iter()
            .map(|(port, name)| json!({"port": port, "name": name}));
        list.collect::<Vec<_>>()
    });
    (map, ports).prop_map(|(labels, ports)| {
        json!({
            "apiVersion": "v1", "kind": "Service", "metadata": {"name": "s", "labels": labels},
            "spec": {"ports": ports, "type": "ClusterIP"},
        })
    })
}

proptest! {
    #[test]
    fn anything_is_walked_without_a_panic(old in any_json(), new in any_json(), given in any_json()) {
        for name in ["Service", "Deployment", "ConfigMap"] {
            let r = kind(name);
            let (mut old, mut new) = (old.clone(), new.clone());
            for object in [&mut old, &mut new] {
                if !object.is_object() { *object = json!({}); }
                if !object["metadata"].is_object() { object["metadata"] = json!({}); }
                if !object["metadata"]["annotations"].is_object() { object["metadata"]["annotations"] = json!({}); }
            }
            drop(updated(r, &old, &new, &given, &by("x")));
            drop(created(r, &new, &by("x")));
            drop(apply(r, Some(&old), &new, &by("x"), false));
            drop(apply(r, None, &new, &by("kubectl"), true));
        }
    }

    /// One manager alone: the object is what it applied last; and applying that again changes nothing.
    #[test]
    fn the_last_apply_of_a_lone_manager_decides(configs in prop::collection::vec(labels(), 1..5)) {
        let mut live: Option<Value> = None;
        for config in &configs {
            live = Some(applied(live.as_ref(), config, "x").unwrap());
        }
        let live = live.unwrap();
        let config = configs.last().unwrap();
        let some = |value: &Value| -> Value {
            if value.as_object().is_some_and(serde_json::Map::is_empty) || value == &json!([]) { Value::Null } else { value.clone() }
        };
        prop_assert_eq!(some(&live["metadata"]["labels"]), some(&config["metadata"]["labels"]));
        prop_assert_eq!(some(&live["spec"]["ports"]), some(&config["spec"]["ports"]));
        let mut again = applied(Some(&live), config, "x").unwrap();
        let mut live = live;
        for object in [&mut again, &mut live] {
            object["metadata"]["labels"] = some(&object["metadata"]["labels"]);
            object["spec"]["ports"] = some(&object["spec"]["ports"]);
        }
        prop_assert_eq!(again, live);
    }

    /// Two managers that force: each field is what the last one to apply it said, and nobody owns what is not there.
    #[test]
    fn owners_own_only_what_is_there(configs in prop::collection::vec((labels(), any::<bool>()), 1..6)) {
        let r = kind("Service");
        let mut live: Option<Value> = None;
        for (config, first) in &configs {
            let manager = by(if *first { "x" } else { "y" });
            live = Some(apply(r, live.as_ref(), config, &manager, true).unwrap());
        }
        let live = live.unwrap();
        let there = walk::field_set(types::object(r), &live);
        let there = walk::with_parents(types::object(r), &there);
        for entry in decode(&live["metadata"]["managedFields"]).unwrap() {
            let missing = entry.set.difference(&there);
            let missing: Vec<String> = missing.paths().into_iter().filter(|p| p != ".metadata.labels").collect();
            prop_assert!(missing.is_empty(), "{:?}", missing);
        }
    }
}
