use proptest::prelude::*;
use rstest::rstest;
use serde_json::json;

use super::*;
use crate::resource::find;

fn fixture(name: &str) -> Value {
    let path = format!(
        "{}/tests/fixtures/apiserver-1.36/{name}.json",
        env!("CARGO_MANIFEST_DIR")
    );
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

fn resource(plural: &str) -> &'static ResourceInfo {
    find("", "v1", plural).unwrap()
}

fn patched(plural: &str, kind: &str, old: &Value, patch: &Value) -> Result<Value, ApiError> {
    apply(resource(plural), kind, old, patch.to_string().as_bytes())
}

fn strategic(plural: &str, old: &Value, patch: &Value) -> Value {
    patched(plural, STRATEGIC_MERGE_PATCH, old, patch).unwrap()
}

#[test]
fn patches_give_what_was_recorded() {
    let mut object = fixture("service-get")["response"]["body"].clone();
    for (name, kind) in [
        ("service-patch-strategic", STRATEGIC_MERGE_PATCH),
        ("service-patch-merge", MERGE_PATCH),
        ("service-patch-json", JSON_PATCH),
    ] {
        let f = fixture(name);
        let expected = &f["response"]["body"];
        object = patched("services", kind, &object, &f["request"]["body"]).unwrap();
        if name == "service-patch-strategic" {
            // Completed by the defaults.
            let port = &mut object["spec"]["ports"][0];
            assert_eq!(port, &json!({"name": "extra", "port": 9090}));
            *port = expected["spec"]["ports"][0].clone();
        }
        assert_eq!(object["spec"], expected["spec"], "{name}");
        assert_eq!(
            object["metadata"]["labels"], expected["metadata"]["labels"],
            "{name}"
        );
    }
    let f = fixture("service-patch-json-fails");
    let error = patched("services", JSON_PATCH, &object, &f["request"]["body"]).unwrap_err();
    assert_eq!(error.status(), f["response"]["body"]);
}

#[rstest]
#[case::containers("containers", json!({"name": "a", "image": "1"}), json!({"name": "b", "image": "2"}), json!({"name": "a", "image": "3"}))]
#[case::volumes("volumes", json!({"name": "a", "secret": {}}), json!({"name": "b", "emptyDir": {}}), json!({"name": "a", "secret": {"optional": true}}))]
#[case::host_aliases("hostAliases", json!({"ip": "1.1.1.1"}), json!({"ip": "1.1.1.2"}), json!({"ip": "1.1.1.1", "hostnames": ["x"]}))]
fn pod_lists_merge_by_key(#[case] list: &str, #[case] a: Value, #[case] b: Value, #[case] change: Value) {
    let old = json!({"spec": {list: [a, b]}});
    let new = strategic("pods", &old, &json!({"spec": {list: [change]}}));
    assert_eq!(new["spec"][list], json!([change, b]));
}

#[rstest]
#[case::ports("ports", json!({"containerPort": 80}), json!({"containerPort": 443}), json!({"containerPort": 80, "name": "x"}))]
#[case::env("env", json!({"name": "A", "value": "1"}), json!({"name": "B", "value": "2"}), json!({"name": "A", "value": "3"}))]
#[case::mounts("volumeMounts", json!({"mountPath": "/a", "name": "x"}), json!({"mountPath": "/b", "name": "x"}), json!({"mountPath": "/a", "name": "y"}))]
fn container_lists_merge_by_key(
    #[case] list: &str,
    #[case] a: Value,
    #[case] b: Value,
    #[case] change: Value,
) {
    let old = json!({"spec": {"containers": [{"name": "c", list: [a, b]}]}});
    let new = strategic(
        "pods",
        &old,
        &json!({"spec": {"containers": [{"name": "c", list: [change]}]}}),
    );
    assert_eq!(new["spec"]["containers"][0][list], json!([change, b]));
    // Also in the template of a controller, whose types are nested deeper.
    let old = json!({"spec": {"template": {"spec": {"containers": [{"name": "c", list: [a, b]}]}}}});
    let delete = json!({"spec": {"template": {"spec": {"containers": [{"$patch": "delete", "name": "c"}]}}}});
    let new = strategic("replicationcontrollers", &old, &delete);
    assert_eq!(new["spec"]["template"]["spec"]["containers"], json!([]));
}

#[test]
fn lists_without_a_key_are_replaced() {
    let old = json!({"spec": {"tolerations": [{"key": "a"}], "nodeSelector": {"x": "1", "y": "2"}}});
    let new = strategic(
        "pods",
        &old,
        &json!({"spec": {"tolerations": [{"key": "b"}], "nodeSelector": {"x": null}}}),
    );
    assert_eq!(
        new,
        json!({"spec": {"tolerations": [{"key": "b"}], "nodeSelector": {"y": "2"}}})
    );
    let slices = find("discovery.k8s.io", "v1", "endpointslices").unwrap();
    let old = json!({"endpoints": [{"addresses": ["1.1.1.1"]}]});
    let patch = json!({"endpoints": [{"addresses": ["1.1.1.2"]}]});
    assert_eq!(
        apply(slices, STRATEGIC_MERGE_PATCH, &old, patch.to_string().as_bytes()).unwrap(),
        patch
    );
}

#[test]
fn primitive_lists_are_sets() {
    let old = json!({"metadata": {"finalizers": ["a/1", "a/2"]}});
    let add = json!({"metadata": {"finalizers": ["a/3", "a/1"]}});
    let new = strategic("pods", &old, &add);
    assert_eq!(new["metadata"]["finalizers"], json!(["a/3", "a/1", "a/2"]));
    let remove = json!({"metadata": {"$deleteFromPrimitiveList/finalizers": ["a/1"]}});
    assert_eq!(
        strategic("pods", &old, &remove)["metadata"]["finalizers"],
        json!(["a/2"])
    );
    let both = json!({"metadata": {
        "$deleteFromPrimitiveList/finalizers": ["a/1"],
        "$setElementOrder/finalizers": ["a/9", "a/2"],
        "finalizers": ["a/9"],
    }});
    assert_eq!(
        strategic("pods", &old, &both)["metadata"]["finalizers"],
        json!(["a/9", "a/2"])
    );
}

#[test]
fn conditions_merge_by_type() {
    let old =
        json!({"status": {"conditions": [{"type": "A", "status": "True"}, {"type": "B", "status": "True"}]}});
    let new = strategic(
        "nodes",
        &old,
        &json!({"status": {"conditions": [{"type": "B", "status": "False"}]}}),
    );
    assert_eq!(
        new["status"]["conditions"],
        json!([{"type": "A", "status": "True"}, {"type": "B", "status": "False"}])
    );
}

#[test]
fn directives() {
    let old = json!({"spec": {
        "containers": [{"name": "a", "image": "1"}, {"name": "b", "image": "2"}],
        "volumes": [{"name": "v", "emptyDir": {}}],
        "securityContext": {"runAsUser": 1},
    }});
    let patch = json!({"spec": {
        "containers": [{"$patch": "delete", "name": "a"}, {"name": "c", "image": null, "tty": true}],
        "volumes": [{"$retainKeys": ["name", "secret"], "name": "v", "secret": {"secretName": "s"}}],
        "securityContext": {"$patch": "replace", "runAsGroup": 2},
    }});
    let new = strategic("pods", &old, &patch);
    assert_eq!(
        new,
        json!({"spec": {
            "containers": [{"name": "c", "tty": true}, {"name": "b", "image": "2"}],
            "volumes": [{"name": "v", "secret": {"secretName": "s"}}],
            "securityContext": {"runAsGroup": 2},
        }})
    );
    let patch = json!({"spec": {"containers": [{"$patch": "replace"}, {"name": "z"}], "securityContext": {"$patch": "delete"}}});
    let new = strategic("pods", &old, &patch);
    assert_eq!(new["spec"]["containers"], json!([{"name": "z"}]));
    assert_eq!(new["spec"]["securityContext"], json!({}));
}

#[test]
fn element_order_keeps_what_only_the_server_knows_in_place() {
    let old = json!({"spec": {"containers": [{"name": "a"}, {"name": "side"}, {"name": "b"}]}});
    let patch = json!({"spec": {
        "$setElementOrder/containers": [{"name": "b"}, {"name": "a"}, {"name": "new"}],
        "containers": [{"name": "new", "image": "n"}],
    }});
    let new = strategic("pods", &old, &patch);
    let names: Vec<&str> = new["spec"]["containers"]
        .as_array()
        .unwrap()
        .iter()
        .map(|c| c["name"].as_str().unwrap())
        .collect();
    assert_eq!(names, ["side", "b", "a", "new"]);
    assert!(
        new["spec"]
            .as_object()
            .unwrap()
            .keys()
            .all(|k| !k.starts_with('$'))
    );
    // An order without a list only reorders.
    let patch =
        json!({"spec": {"$setElementOrder/containers": [{"name": "b"}, {"name": "side"}, {"name": "a"}]}});
    let new = strategic("pods", &old, &patch);
    assert_eq!(
        new["spec"]["containers"],
        json!([{"name": "b"}, {"name": "side"}, {"name": "a"}])
    );
}

/// What `kubectl apply` sends when a port's number and the selector change, `kubectl label` and `kubectl edit`.
#[test]
fn patches_of_kubectl() {
    let mut object = fixture("service-get-2")["response"]["body"].clone();
    let applied = json!({
        "metadata": {"annotations": {"kubectl.kubernetes.io/last-applied-configuration": "{}\n"}},
        "spec": {
            "$setElementOrder/ports": [{"port": 8081}, {"port": 9090}],
            "ports": [{"name": "http", "port": 8081}, {"$patch": "delete", "port": 8080}],
            "selector": {"app": null, "tier": "front"},
        },
    });
    object = strategic("services", &object, &applied);
    assert_eq!(object["spec"]["selector"], json!({"tier": "front"}));
    let ports: Vec<i64> = object["spec"]["ports"]
        .as_array()
        .unwrap()
        .iter()
        .map(|p| p["port"].as_i64().unwrap())
        .collect();
    assert_eq!(ports, [8081, 9090]);
    assert_eq!(object["spec"]["ports"][1]["nodePort"], 32512);
    let label = json!({"metadata": {"labels": {"a": null, "é": "ü"}}});
    object = patched("services", MERGE_PATCH, &object, &label).unwrap();
    assert_eq!(object["metadata"]["labels"], json!({"é": "ü"}));
    let edit = json!({"spec": {"$setElementOrder/ports": [{"port": 8081}], "ports": [{"$patch": "delete", "port": 9090}]}});
    object = strategic("services", &object, &edit);
    assert_eq!(object["spec"]["ports"], json!([{"name": "http", "port": 8081}]));
}

#[test]
fn bad_patches_are_refused() {
    let old = json!({"spec": {"ports": [{"port": 1}]}, "a": ["x"]});
    for (kind, patch, code) in [
        (MERGE_PATCH, "[]", 400),
        (MERGE_PATCH, "{", 400),
        (STRATEGIC_MERGE_PATCH, "3", 400),
        (STRATEGIC_MERGE_PATCH, r#"{"$patch":"explode"}"#, 400),
        (STRATEGIC_MERGE_PATCH, r#"{"$patch":7}"#, 400),
        (STRATEGIC_MERGE_PATCH, r#"{"spec":{"ports":[{"name":"x"}]}}"#, 400),
        (STRATEGIC_MERGE_PATCH, r#"{"spec":{"ports":[7]}}"#, 400),
        (
            STRATEGIC_MERGE_PATCH,
            r#"{"spec":{"$setElementOrder/ports":7}}"#,
            400,
        ),
        (
            STRATEGIC_MERGE_PATCH,
            r#"{"spec":{"$retainKeys":["a"],"ports":[]}}"#,
            400,
        ),
        (JSON_PATCH, r#"{"op":"add"}"#, 400),
        (JSON_PATCH, r#"[{"op":"remove","path":"/nope"}]"#, 422),
        (JSON_PATCH, r#"[{"op":"replace","path":"/a/5","value":1}]"#, 422),
        (APPLY_PATCH, "a: b", 415),
        ("text/plain", "{}", 415),
    ] {
        let error = apply(resource("services"), kind, &old, patch.as_bytes()).unwrap_err();
        assert_eq!(error.code, code, "{kind} {patch}: {error}");
    }
    let deep = format!("{}1{}", "{\"a\":".repeat(5000), "}".repeat(5000));
    for kind in [MERGE_PATCH, STRATEGIC_MERGE_PATCH, JSON_PATCH] {
        assert_eq!(
            apply(resource("services"), kind, &old, deep.as_bytes())
                .unwrap_err()
                .code,
            400,
            "{kind}"
        );
        assert_eq!(
            apply(resource("services"), kind, &old, b"\xff").unwrap_err().code,
            400,
            "{kind}"
        );
    }
    let double = r#"{"op":"copy","from":"/a","path":"/a/0"}"#;
    let bomb = format!("[{}]", vec![double; 40].join(","));
    assert_eq!(
        apply(resource("services"), JSON_PATCH, &old, bomb.as_bytes())
            .unwrap_err()
            .code,
        413
    );
}

fn json_value() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        any::<bool>().prop_map(Value::from),
        any::<i32>().prop_map(Value::from),
        "[a-zé]{0,3}".prop_map(Value::from),
    ];
    leaf.prop_recursive(4, 24, 4, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..3).prop_map(Value::from),
            prop::collection::btree_map("[a-d]", inner, 0..4)
                .prop_map(|m| Value::Object(m.into_iter().collect())),
        ]
    })
}

fn json_object() -> impl Strategy<Value = Value> {
    prop::collection::btree_map("[a-d]", json_value(), 0..4)
        .prop_map(|m| Value::Object(m.into_iter().collect()))
}

/// The merge patch that leads from one object to another.
fn difference(from: &Value, to: &Value) -> Value {
    let (Some(a), Some(b)) = (from.as_object(), to.as_object()) else {
        return to.clone();
    };
    let mut patch = Map::new();
    for key in a.keys().filter(|k| !b.contains_key(*k)) {
        patch.insert(key.clone(), Value::Null);
    }
    for (key, value) in b {
        match a.get(key) {
            Some(old) if old == value => {}
            Some(old) => {
                patch.insert(key.clone(), difference(old, value));
            }
            None => {
                patch.insert(key.clone(), value.clone());
            }
        }
    }
    patch.into()
}

proptest! {
    #[test]
    fn a_difference_leads_to_the_second_object(a in json_object(), b in json_object()) {
        let patch = difference(&a, &b);
        let merged = patched("services", MERGE_PATCH, &a, &patch).unwrap();
        prop_assert_eq!(&merged, &b);
        // Where no schema says otherwise, a strategic merge patch does the same.
        let merged = patched("services", STRATEGIC_MERGE_PATCH, &a, &patch).unwrap();
        prop_assert_eq!(&merged, &b);
    }

    #[test]
    fn no_bytes_panic(bytes in prop::collection::vec(any::<u8>(), 0..64), object in json_object()) {
        for kind in [MERGE_PATCH, STRATEGIC_MERGE_PATCH, JSON_PATCH] {
            let _ = apply(resource("services"), kind, &object, &bytes);
        }
    }
}
