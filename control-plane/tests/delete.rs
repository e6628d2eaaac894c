//! What a deletion does: to the object, to what it owns, and when.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test fails by panicking")]

mod common;

use std::time::Duration;

use common::{Server, call};
use serde_json::{Value, json};

const DEFAULT: &str = "/api/v1/namespaces/default";
const APPS: &str = "/apis/apps/v1/namespaces/default";

async fn ok(client: &kube::Client, method: &str, path: &str, body: &Value) -> Value {
    let (status, answer) = call(client, method, path, body).await;
    assert!((200..300).contains(&status), "{method} {path}: {answer}");
    answer
}

async fn code(client: &kube::Client, method: &str, path: &str, body: &Value) -> u16 {
    call(client, method, path, body).await.0
}

/// Waits until the path answers with the code, as the garbage collector gets there.
async fn until(client: &kube::Client, path: &str, wanted: u16) {
    let waiting = async {
        loop {
            let (status, body) = call(client, "GET", path, &Value::Null).await;
            if status == wanted {
                return;
            }
            // The next change of the collection.
            let version = body["metadata"]["resourceVersion"]
                .as_str()
                .unwrap_or("0")
                .to_owned();
            let (collection, name) = path.rsplit_once('/').unwrap();
            let watch = format!(
                "{collection}?watch=1&fieldSelector=metadata.name%3D{name}&resourceVersion={version}&timeoutSeconds=1"
            );
            call(client, "GET", &watch, &Value::Null).await;
        }
    };
    let waited = tokio::time::timeout(Duration::from_secs(20), waiting).await;
    assert!(waited.is_ok(), "{path} does not become {wanted}");
}

async fn pod(client: &kube::Client, name: &str, node: &str, owner: Option<&Value>) -> Value {
    let mut pod = json!({
        "metadata": {"name": name, "labels": {"app": "a"}},
        "spec": {"containers": [{"name": "c", "image": "i"}]},
    });
    if !node.is_empty() {
        pod["spec"]["nodeName"] = node.into();
    }
    if let Some(owner) = owner {
        pod["metadata"]["ownerReferences"] = json!([{
            "apiVersion": owner["apiVersion"], "kind": owner["kind"], "name": owner["metadata"]["name"],
            "uid": owner["metadata"]["uid"], "blockOwnerDeletion": true,
        }]);
    }
    ok(client, "POST", &format!("{DEFAULT}/pods"), &pod).await
}

async fn config_map(client: &kube::Client, name: &str, meta: &Value) -> Value {
    let mut object = json!({"metadata": {"name": name}});
    json_patch::merge(&mut object["metadata"], meta);
    ok(client, "POST", &format!("{DEFAULT}/configmaps"), &object).await
}

#[tokio::test]
async fn pods_that_run_get_time_to_end() {
    let server = Server::start().await;
    let client = server.client().await;
    let node = json!({"metadata": {"name": "n1"}, "status": {"nodeInfo": {"kubeletVersion": "v1"}}});
    ok(&client, "POST", "/api/v1/nodes", &node).await;
    for (name, node) in [("runs", "n1"), ("waits", ""), ("lost", "n2"), ("ended", "n1")] {
        pod(&client, name, node, None).await;
    }
    let ended = json!({"status": {"phase": "Succeeded"}});
    let mut object = ok(&client, "GET", &format!("{DEFAULT}/pods/ended"), &Value::Null).await;
    json_patch::merge(&mut object, &ended);
    ok(&client, "PUT", &format!("{DEFAULT}/pods/ended/status"), &object).await;
    for gone in ["waits", "lost", "ended"] {
        let path = format!("{DEFAULT}/pods/{gone}");
        let last = ok(&client, "DELETE", &path, &Value::Null).await;
        assert_eq!(last["kind"], "Pod");
        assert_eq!(code(&client, "GET", &path, &Value::Null).await, 404, "{gone}");
    }
    let path = format!("{DEFAULT}/pods/runs");
    // Nothing happens in a dry run, or when it is not the object that was meant.
    ok(&client, "DELETE", &format!("{path}?dryRun=All"), &Value::Null).await;
    for (field, value) in [("uid", "other"), ("resourceVersion", "1")] {
        let options = json!({"preconditions": {field: value}});
        let (code, answer) = call(&client, "DELETE", &path, &options).await;
        assert_eq!((code, &answer["reason"]), (409, &json!("Conflict")));
        assert!(
            answer["message"]
                .as_str()
                .unwrap()
                .contains("Precondition failed"),
            "{answer}"
        );
    }
    let marked = ok(&client, "DELETE", &path, &Value::Null).await;
    assert_eq!(marked["metadata"]["deletionGracePeriodSeconds"], 30);
    let end: jiff::Timestamp = marked["metadata"]["deletionTimestamp"]
        .as_str()
        .unwrap()
        .parse()
        .unwrap();
    let left = end.duration_since(jiff::Timestamp::now()).as_secs();
    assert!((25..=30).contains(&left), "{left}");
    // The time can be cut, not stretched.
    for (asked, wanted) in [(60, 30), (10, 10), (20, 10)] {
        let marked = ok(&client, "DELETE", &path, &json!({"gracePeriodSeconds": asked})).await;
        assert_eq!(marked["metadata"]["deletionGracePeriodSeconds"], wanted);
    }
    // A node's report does not end it; the node's last word does.
    let mut object = ok(&client, "GET", &path, &Value::Null).await;
    object["status"]["phase"] = "Running".into();
    ok(&client, "PUT", &format!("{path}/status"), &object).await;
    assert_eq!(code(&client, "GET", &path, &Value::Null).await, 200);
    ok(
        &client,
        "DELETE",
        &format!("{path}?gracePeriodSeconds=0"),
        &Value::Null,
    )
    .await;
    assert_eq!(code(&client, "GET", &path, &Value::Null).await, 404);
    server.stop().await;
}

#[tokio::test]
async fn evictions_delete() {
    let server = Server::start().await;
    let client = server.client().await;
    pod(&client, "p", "", None).await;
    let path = format!("{DEFAULT}/pods/p");
    let eviction = json!({"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": "p", "namespace": "default"}});
    let mut dry = eviction.clone();
    dry["deleteOptions"] = json!({"dryRun": ["All"]});
    assert_eq!(
        code(&client, "POST", &format!("{path}/eviction"), &dry).await,
        201
    );
    assert_eq!(code(&client, "GET", &path, &Value::Null).await, 200);
    let mut other = eviction.clone();
    other["metadata"]["name"] = "q".into();
    assert_eq!(
        code(&client, "POST", &format!("{path}/eviction"), &other).await,
        400
    );
    assert_eq!(
        code(&client, "POST", &format!("{path}/eviction"), &eviction).await,
        201
    );
    assert_eq!(code(&client, "GET", &path, &Value::Null).await, 404);
    server.stop().await;
}

async fn replica_set(client: &kube::Client, name: &str) -> Value {
    let template =
        json!({"metadata": {"labels": {"app": name}}, "spec": {"containers": [{"name": "c", "image": "i"}]}});
    let object = json!({
        "metadata": {"name": name},
        "spec": {"replicas": 0, "selector": {"matchLabels": {"app": name}}, "template": template},
    });
    ok(client, "POST", &format!("{APPS}/replicasets"), &object).await
}

#[tokio::test]
async fn dependents_go_or_stay_as_the_deletion_says() {
    let server = Server::start().await;
    let client = server.client().await;
    for (name, policy) in [
        ("bg", "Background"),
        ("fg", "Foreground"),
        ("or", "Orphan"),
        ("none", ""),
    ] {
        let owner = replica_set(&client, name).await;
        let held = json!({"finalizers": ["example.com/hold"], "ownerReferences": [{
            "apiVersion": "apps/v1", "kind": "ReplicaSet", "name": name, "uid": owner["metadata"]["uid"],
            "blockOwnerDeletion": true,
        }]});
        let child = config_map(&client, name, &held).await;
        let path = format!("{APPS}/replicasets/{name}");
        let options = if policy.is_empty() {
            Value::Null
        } else {
            json!({"propagationPolicy": policy})
        };
        ok(&client, "DELETE", &path, &options).await;
        let child_path = format!("{DEFAULT}/configmaps/{name}");
        match policy {
            "Foreground" => {
                let owner = ok(&client, "GET", &path, &Value::Null).await;
                assert_eq!(owner["metadata"]["finalizers"], json!(["foregroundDeletion"]));
            }
            _ => until(&client, &path, 404).await,
        }
        let child = if policy == "Orphan" {
            ok(&client, "GET", &child_path, &Value::Null).await
        } else {
            // Marked by the garbage collector, held by its finalizer.
            let waiting = async {
                loop {
                    let now = ok(&client, "GET", &child_path, &Value::Null).await;
                    if now["metadata"]["deletionTimestamp"].is_string() {
                        return now;
                    }
                    let version = &child["metadata"]["resourceVersion"];
                    let watch = format!(
                        "{DEFAULT}/configmaps?watch=1&resourceVersion={}&timeoutSeconds=1",
                        version.as_str().unwrap()
                    );
                    call(&client, "GET", &watch, &Value::Null).await;
                }
            };
            tokio::time::timeout(Duration::from_secs(20), waiting)
                .await
                .unwrap()
        };
        if policy == "Orphan" {
            assert_eq!(
                (
                    &child["metadata"]["ownerReferences"],
                    &child["metadata"]["deletionTimestamp"]
                ),
                (&Value::Null, &Value::Null)
            );
            continue;
        }
        let mut free = child;
        free["metadata"]["finalizers"] = json!([]);
        ok(&client, "PUT", &child_path, &free).await;
        until(&client, &child_path, 404).await;
        until(&client, &path, 404).await;
    }
    server.stop().await;
}

#[tokio::test]
async fn collections_and_bad_options() {
    let server = Server::start().await;
    let client = server.client().await;
    for name in ["a", "b", "c"] {
        config_map(&client, name, &json!({"labels": {"n": name}})).await;
    }
    let all = format!("{DEFAULT}/configmaps");
    let selected = format!("{all}?labelSelector=n%20in%20(a,b)");
    let list = ok(&client, "DELETE", &format!("{selected}&dryRun=All"), &Value::Null).await;
    assert_eq!(list["items"].as_array().unwrap().len(), 2);
    ok(
        &client,
        "DELETE",
        &selected,
        &json!({"propagationPolicy": "Background"}),
    )
    .await;
    // Every namespace has one from the start.
    let own = format!("{all}?fieldSelector=metadata.name!%3Dkube-root-ca.crt");
    let left = ok(&client, "GET", &own, &Value::Null).await;
    assert_eq!(left["items"][0]["metadata"]["name"], "c");
    assert_eq!(left["items"].as_array().unwrap().len(), 1);
    for (options, wanted) in [
        (json!({"propagationPolicy": "Sideways"}), 422),
        (
            json!({"propagationPolicy": "Orphan", "orphanDependents": true}),
            422,
        ),
        (json!({"gracePeriodSeconds": "soon"}), 400),
        (json!({"dryRun": ["Some"]}), 400),
    ] {
        let (code, answer) = call(&client, "DELETE", &format!("{all}/c"), &options).await;
        assert_eq!(code, wanted, "{options}: {answer}");
    }
    assert_eq!(
        code(
            &client,
            "DELETE",
            &format!("{all}/c?gracePeriodSeconds=x"),
            &Value::Null
        )
        .await,
        400
    );
    // The old way to say Background answers that it is accepted when something holds the object.
    config_map(&client, "held", &json!({"finalizers": ["example.com/hold"]})).await;
    let held = format!("{all}/held");
    assert_eq!(
        code(&client, "DELETE", &held, &json!({"orphanDependents": false})).await,
        202
    );
    assert_eq!(code(&client, "DELETE", &held, &Value::Null).await, 200);
    server.stop().await;
}
