//! The API's edges: who may ask, what bodies and answers look like, what is refused and how.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test stops where it fails"
)]

mod common;

use std::time::{Duration, Instant};

use bytes::Bytes;
use common::{Server, call, client, send};
use futures::StreamExt as _;
use http::{Request, Response};
use kube::api::WatchEvent;
use kube::config::AuthInfo;
use serde_json::{Value, json};

const MAPS: &str = "/api/v1/namespaces/default/configmaps";
/// Every namespace has one from the start.
const OWN: &str = "fieldSelector=metadata.name!%3Dkube-root-ca.crt";

fn map(name: &str) -> Value {
    json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}})
}

async fn ask(
    client: &kube::Client,
    method: &str,
    path: &str,
    headers: &[(&str, &str)],
    body: &str,
) -> Response<Bytes> {
    let mut request = Request::builder().method(method).uri(path);
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    send(client, request.body(body.as_bytes().to_vec()).unwrap()).await
}

fn body(answer: &Response<Bytes>) -> Value {
    serde_json::from_slice(answer.body()).unwrap()
}

#[tokio::test]
async fn strangers_see_health_and_version_only() {
    let server = Server::start().await;
    let mut config = server.config();
    config.auth_infos[0].auth_info = Some(AuthInfo::default());
    let stranger = client(config).await;
    for path in [
        "/version",
        "/healthz",
        "/livez",
        "/readyz",
        "/readyz?verbose",
        "/livez/ping",
    ] {
        assert_eq!(ask(&stranger, "GET", path, &[], "").await.status(), 200, "{path}");
    }
    for (path, message) in [
        (
            "/api",
            r#"forbidden: User "system:anonymous" cannot get path "/api""#,
        ),
        (
            "/api/v1/namespaces/default/pods/p/status",
            r#"pods "p" is forbidden: User "system:anonymous" cannot get resource "pods/status" in API group "" in the namespace "default""#,
        ),
    ] {
        let answer = ask(&stranger, "GET", path, &[], "").await;
        assert_eq!(
            (answer.status().as_u16(), &body(&answer)["message"]),
            (403, &json!(message))
        );
    }
    // Writing is refused before the body is looked at.
    assert_eq!(ask(&stranger, "POST", MAPS, &[], "{").await.status(), 403);
    server.stop().await;
}

#[tokio::test]
async fn a_certificate_alone_does_not_make_an_administrator() {
    let server = Server::start().await;
    let pki = server.dir.path().join("data/pki");
    let read = |name: &str| std::fs::read_to_string(pki.join(name)).unwrap();
    let key = rcgen::KeyPair::from_pem(&read("ca.key")).unwrap();
    let issuer = rcgen::Issuer::from_ca_cert_pem(&read("ca.crt"), key).unwrap();
    let mut params = rcgen::CertificateParams::default();
    params.distinguished_name.push(rcgen::DnType::CommonName, "jane");
    params.extended_key_usages = vec![rcgen::ExtendedKeyUsagePurpose::ClientAuth];
    let key = rcgen::KeyPair::generate().unwrap();
    let certificate = params.signed_by(&key, &issuer).unwrap();
    let encode = |pem: &str| {
        use base64::Engine as _;
        base64::engine::general_purpose::STANDARD.encode(pem)
    };
    let mut config = server.config();
    config.auth_infos[0].auth_info = Some(AuthInfo {
        client_certificate_data: Some(encode(&certificate.pem())),
        client_key_data: Some(encode(&key.serialize_pem()).into()),
        ..AuthInfo::default()
    });
    let (code, answer) = call(&client(config).await, "GET", MAPS, &Value::Null).await;
    assert_eq!(code, 403);
    assert!(
        answer["message"]
            .as_str()
            .unwrap()
            .contains(r#"User "jane" cannot list"#),
        "{answer}"
    );
    server.stop().await;
}

#[tokio::test]
async fn bodies_in_other_formats() {
    let server = Server::start().await;
    let client = server.client().await;
    let yaml = "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: yes-1}\ndata: {a: 'true'}\n";
    let answer = ask(
        &client,
        "POST",
        MAPS,
        &[("content-type", "application/yaml")],
        yaml,
    )
    .await;
    assert_eq!(
        (answer.status().as_u16(), &body(&answer)["data"]),
        (201, &json!({"a": "true"}))
    );
    let answer = ask(
        &client,
        "GET",
        &format!("{MAPS}/yes-1"),
        &[("accept", "application/yaml")],
        "",
    )
    .await;
    assert_eq!(answer.headers()["content-type"], "application/yaml");
    assert!(String::from_utf8_lossy(answer.body()).contains("kind: ConfigMap"));
    for (content_type, text, code) in [
        ("text/plain", "x", 415),
        ("application/yaml", "a: [", 400),
        ("application/json", "[]", 400),
        ("application/json", r#"{"kind":"Secret","apiVersion":"v1"}"#, 400),
        ("application/vnd.kubernetes.protobuf", "k8s", 400),
    ] {
        let answer = ask(&client, "POST", MAPS, &[("content-type", content_type)], text).await;
        assert_eq!(
            answer.status(),
            code,
            "{content_type} {text}: {:?}",
            answer.body()
        );
        assert_eq!(body(&answer)["kind"], "Status");
    }
    let large = format!(
        r#"{{"metadata":{{"name":"x"}},"data":{{"a":"{}"}}}}"#,
        "x".repeat(4 << 20)
    );
    let answer = ask(&client, "POST", MAPS, &[], &large).await;
    assert_eq!(
        (answer.status().as_u16(), &body(&answer)["reason"]),
        (413, &json!("RequestEntityTooLarge"))
    );
    let answer = ask(
        &client,
        "GET",
        MAPS,
        &[("accept", "application/vnd.kubernetes.protobuf")],
        "",
    )
    .await;
    assert_eq!(answer.status(), 406);
    let answer = ask(
        &client,
        "PATCH",
        &format!("{MAPS}/yes-1"),
        &[("content-type", "application/json")],
        "{}",
    )
    .await;
    assert_eq!(answer.status(), 415);
    let accept = "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1";
    let answer = ask(&client, "GET", MAPS, &[("accept", accept)], "").await;
    let list = body(&answer);
    assert_eq!(
        (&list["kind"], &list["items"][0]["kind"]),
        (
            &json!("PartialObjectMetadataList"),
            &json!("PartialObjectMetadata")
        )
    );
    assert_eq!(list["items"][0].get("data"), None);
    server.stop().await;
}

#[tokio::test]
async fn writes_that_must_not_happen() {
    let server = Server::start().await;
    let client = server.client().await;
    let (code, missing) = call(&client, "POST", "/api/v1/namespaces/nope/configmaps", &map("m")).await;
    assert_eq!(
        (code, &missing["message"]),
        (404, &json!("namespaces \"nope\" not found"))
    );
    let mut elsewhere = map("m");
    elsewhere["metadata"]["namespace"] = "kube-system".into();
    let (code, refused) = call(&client, "POST", MAPS, &elsewhere).await;
    assert_eq!(code, 400, "{refused}");
    let (code, dry) = call(&client, "POST", &format!("{MAPS}?dryRun=All"), &map("m")).await;
    assert_eq!((code, dry["metadata"].get("resourceVersion")), (201, None));
    let (code, _) = call(&client, "GET", &format!("{MAPS}/m"), &Value::Null).await;
    assert_eq!(code, 404);
    let (code, _) = call(&client, "POST", &format!("{MAPS}?dryRun=Some"), &map("m")).await;
    assert_eq!(code, 400);
    let (code, _) = call(&client, "PUT", &format!("{MAPS}/m"), &map("m")).await;
    assert_eq!(code, 404);
    let (_, created) = call(&client, "POST", MAPS, &map("m")).await;
    let (code, refused) = call(&client, "PUT", &format!("{MAPS}/m"), &map("other")).await;
    assert_eq!(code, 400, "{refused}");
    for precondition in [json!({"uid": "x"}), json!({"resourceVersion": "1"})] {
        let (code, refused) = call(
            &client,
            "DELETE",
            &format!("{MAPS}/m"),
            &json!({"preconditions": precondition}),
        )
        .await;
        assert_eq!((code, &refused["reason"]), (409, &json!("Conflict")), "{refused}");
    }
    let (code, _) = call(
        &client,
        "DELETE",
        &format!("{MAPS}/m"),
        &json!({"dryRun": ["All"]}),
    )
    .await;
    assert_eq!(code, 200);
    let uid = json!({"preconditions": {"uid": created["metadata"]["uid"]}});
    let (code, gone) = call(&client, "DELETE", &format!("{MAPS}/m"), &uid).await;
    assert_eq!((code, &gone["status"]), (200, &json!("Success")));
    for method in ["DELETE", "POST"] {
        let (code, refused) = call(&client, method, "/api/v1/configmaps", &map("m")).await;
        assert_eq!(code, 405, "{method} without a namespace: {refused}");
    }
    server.stop().await;
}

#[tokio::test]
async fn collections_are_deleted_by_selector() {
    let server = Server::start().await;
    let client = server.client().await;
    for (name, colour) in [("a", "red"), ("b", "blue"), ("c", "red")] {
        let mut map = map(name);
        map["metadata"]["labels"] = json!({"colour": colour});
        assert_eq!(call(&client, "POST", MAPS, &map).await.0, 201);
    }
    let (code, deleted) = call(
        &client,
        "DELETE",
        &format!("{MAPS}?labelSelector=colour%3Dred"),
        &Value::Null,
    )
    .await;
    assert_eq!((code, deleted["items"].as_array().unwrap().len()), (200, 2));
    let (_, left) = call(&client, "GET", &format!("{MAPS}?{OWN}"), &Value::Null).await;
    let names: Vec<&Value> = left["items"]
        .as_array()
        .unwrap()
        .iter()
        .map(|item| &item["metadata"]["name"])
        .collect();
    assert_eq!(names, ["b"]);
    server.stop().await;
}

#[tokio::test]
async fn lists_at_a_revision() {
    let server = Server::start().await;
    let client = server.client().await;
    let (_, a) = call(&client, "POST", MAPS, &map("a")).await;
    call(&client, "POST", MAPS, &map("b")).await;
    let revision = a["metadata"]["resourceVersion"].as_str().unwrap();
    for (query, expected) in [
        (
            format!("resourceVersion={revision}&resourceVersionMatch=Exact"),
            1,
        ),
        (
            format!("resourceVersion={revision}&resourceVersionMatch=NotOlderThan"),
            2,
        ),
        (format!("resourceVersion={revision}"), 2),
        ("resourceVersion=0".to_owned(), 2),
        (String::new(), 2),
    ] {
        let (code, list) = call(&client, "GET", &format!("{MAPS}?{query}&{OWN}"), &Value::Null).await;
        assert_eq!(
            (code, list["items"].as_array().map(Vec::len)),
            (200, Some(expected)),
            "{query}: {list}"
        );
    }
    for query in [
        "resourceVersion=x",
        "resourceVersionMatch=Exact",
        "resourceVersion=0&resourceVersionMatch=Exact",
        "resourceVersion=1&resourceVersionMatch=Odd",
        "continue=x",
        "limit=-1",
    ] {
        let (code, refused) = call(&client, "GET", &format!("{MAPS}?{query}"), &Value::Null).await;
        assert_eq!(code, 400, "{query}: {refused}");
    }
    server.stop().await;
}

#[tokio::test]
async fn watches_end_with_a_bookmark_and_with_the_server() {
    let server = Server::start().await;
    let client = server.client().await;
    call(&client, "POST", MAPS, &map("a")).await;
    let path = format!("{MAPS}?watch=1&resourceVersion=1&timeoutSeconds=1&allowWatchBookmarks=true&{OWN}");
    let accept = "application/json;as=Table;g=meta.k8s.io;v=v1";
    let answer = ask(&client, "GET", &path, &[("accept", accept)], "").await;
    let events: Vec<Value> = answer
        .body()
        .split(|byte| *byte == b'\n')
        .filter(|line| !line.is_empty())
        .map(|line| serde_json::from_slice(line).unwrap())
        .collect();
    let kinds: Vec<&Value> = events.iter().map(|event| &event["type"]).collect();
    assert_eq!(kinds, ["ADDED", "BOOKMARK"]);
    assert_eq!(events[0]["object"]["rows"][0]["cells"][0], "a");
    // Columns are sent once.
    assert_ne!(events[0]["object"]["columnDefinitions"], json!([]));
    assert_eq!(events[1]["object"]["columnDefinitions"], json!([]));

    let api = kube::Api::<k8s_openapi::api::core::v1::ConfigMap>::default_namespaced(client.clone());
    let mut watching = api
        .watch(&kube::api::WatchParams::default().fields("metadata.name=a"), "0")
        .await
        .unwrap()
        .boxed();
    assert!(matches!(watching.next().await, Some(Ok(WatchEvent::Added(_)))));
    let start = Instant::now();
    server.stop().await;
    assert!(
        start.elapsed() < Duration::from_secs(4),
        "an open watch held up the end for {:?}",
        start.elapsed()
    );
    assert!(watching.next().await.is_none());
}

#[tokio::test]
async fn replicas_are_applied_through_the_scale() {
    let server = Server::start().await;
    let client = server.client().await;
    let path = "/apis/apps/v1/namespaces/default/deployments";
    let template =
        json!({"metadata": {"labels": {"app": "a"}}, "spec": {"containers": [{"name": "c", "image": "i"}]}});
    let spec = json!({"replicas": 1, "selector": {"matchLabels": {"app": "a"}}, "template": template});
    let object = json!({"metadata": {"name": "web"}, "spec": spec}).to_string();
    let created = format!("{path}?fieldManager=maker");
    assert_eq!(ask(&client, "POST", &created, &[], &object).await.status(), 201);
    let apply = async |manager: &str, scale: &str| {
        let path = format!("{path}/web/scale?{manager}");
        let answer = ask(
            &client,
            "PATCH",
            &path,
            &[("content-type", "application/apply-patch+yaml")],
            scale,
        )
        .await;
        (answer.status().as_u16(), body(&answer))
    };
    let scale = "apiVersion: autoscaling/v1\nkind: Scale\nspec: {replicas: 4}\n";
    let (code, answer) = apply("fieldManager=scaler", scale).await;
    assert_eq!(code, 409, "{answer}");
    let text = answer["message"].as_str().unwrap();
    assert!(
        text.contains("conflict with \"maker\"") && text.contains(".spec.replicas"),
        "{text}"
    );
    let (code, answer) = apply("fieldManager=scaler&force=true", scale).await;
    assert_eq!(
        (code, &answer["kind"], &answer["spec"]["replicas"]),
        (200, &json!("Scale"), &json!(4))
    );
    let web = body(&ask(&client, "GET", &format!("{path}/web"), &[], "").await);
    assert_eq!(web["spec"]["replicas"], 4);
    let entries = web["metadata"]["managedFields"].as_array().unwrap();
    let mine = entries.iter().find(|entry| entry["manager"] == "scaler").unwrap();
    assert_eq!(
        (&mine["operation"], &mine["subresource"]),
        (&json!("Apply"), &json!("scale"))
    );
    assert_eq!(mine["fieldsV1"], json!({"f:spec": {"f:replicas": {}}}));
    for (manager, bad, wanted) in [
        ("", scale, 422),
        (
            "fieldManager=scaler",
            "apiVersion: apps/v1\nkind: Deployment\n",
            400,
        ),
        (
            "fieldManager=scaler",
            "apiVersion: autoscaling/v1\nkind: Scale\nspec: {replicas: -1}\n",
            422,
        ),
        (
            "fieldManager=scaler",
            "apiVersion: autoscaling/v1\nkind: Scale\nmetadata: {name: other}\nspec: {replicas: 2}\n",
            400,
        ),
        (
            "fieldManager=scaler",
            "apiVersion: autoscaling/v1\nkind: Scale\nmetadata: {resourceVersion: '1'}\nspec: {replicas: 2}\n",
            409,
        ),
        ("fieldManager=scaler", "{", 400),
    ] {
        let (code, answer) = apply(manager, bad).await;
        assert_eq!(code, wanted, "{bad}: {answer}");
    }
    let web = body(&ask(&client, "GET", &format!("{path}/web"), &[], "").await);
    assert_eq!(web["spec"]["replicas"], 4);
    server.stop().await;
}
