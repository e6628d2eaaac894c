//! What guards the API beside rights: how much is asked at a time, and the audit log.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test stops where it fails"
)]

mod common;

use std::time::Duration;

use base64::Engine as _;
use common::{Server, call, send};
use kube::config::AuthInfo;
use serde_json::{Value, json};

const MAPS: &str = "/api/v1/namespaces/default/configmaps";

/// A client with a certificate of the cluster's authority, and a role that lets it do everything in `default`.
async fn bob(server: &Server) -> kube::Client {
    let binding = json!({
        "metadata": {"name": "bob"},
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "admin"},
        "subjects": [{"apiGroup": "rbac.authorization.k8s.io", "kind": "User", "name": "bob"}],
    });
    let path = "/apis/rbac.authorization.k8s.io/v1/namespaces/default/rolebindings";
    assert_eq!(call(&server.client().await, "POST", path, &binding).await.0, 201);
    let pair = server.plane.pki().client("bob", None).unwrap();
    let base64 = base64::engine::general_purpose::STANDARD;
    let auth: AuthInfo = serde_json::from_value(json!({
        "client-certificate-data": base64.encode(pair.certificate), "client-key-data": base64.encode(pair.key),
    }))
    .unwrap();
    let mut config = server.config();
    config.auth_infos[0].auth_info = Some(auth);
    common::client(config).await
}

#[tokio::test(flavor = "multi_thread")]
async fn who_asks_too_much_at_a_time_is_told_to_wait() {
    let server = Server::start_with(|config| {
        config.max_requests_inflight = 1;
        config.max_user_requests_per_second = 0;
    })
    .await;
    let (bob, admin) = (bob(&server).await, server.client().await);
    // Waits for a revision that does not come, and holds the only place meanwhile.
    let waiting = tokio::spawn({
        let bob = bob.clone();
        async move {
            let path = format!("{MAPS}?resourceVersion=99999999");
            loop {
                // Not before it has the place, which the others below may have for a moment.
                let (code, _) = call(&bob, "GET", &path, &Value::Null).await;
                if code != 429 {
                    return code;
                }
            }
        }
    });
    let refused = async {
        loop {
            let request = http::Request::get(MAPS).body(Vec::new()).unwrap();
            let answer = send(&bob, request).await;
            if answer.status() == 429 {
                return answer;
            }
            assert!(!waiting.is_finished(), "both had a place");
        }
    };
    let refused = tokio::time::timeout(Duration::from_secs(10), refused)
        .await
        .unwrap();
    assert_eq!(refused.headers()["retry-after"], "1");
    let status: Value = serde_json::from_slice(refused.body()).unwrap();
    assert_eq!(status["reason"], "TooManyRequests");
    assert_eq!(status["details"]["retryAfterSeconds"], 1);
    // Writes have places of their own, and administrators need none.
    let map = json!({"metadata": {"name": "a"}});
    assert_eq!(call(&bob, "POST", MAPS, &map).await.0, 201);
    assert_eq!(call(&admin, "GET", MAPS, &Value::Null).await.0, 200);
    assert_eq!(waiting.await.unwrap(), 504);
    assert_eq!(call(&bob, "GET", MAPS, &Value::Null).await.0, 200);
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn who_asks_too_often_is_told_to_wait() {
    let server = Server::start_with(|config| config.max_user_requests_per_second = 1).await;
    let (bob, admin) = (bob(&server).await, server.client().await);
    let mut codes = Vec::new();
    // Two at once are granted; that three come within a second is nearly sure, and that one does in some ten.
    while codes.len() < 30 && !codes.contains(&429) {
        codes.push(call(&bob, "GET", MAPS, &Value::Null).await.0);
    }
    assert_eq!(codes[..2], [200, 200]);
    assert_eq!(codes.last(), Some(&429));
    for _ in 0..10 {
        assert_eq!(call(&admin, "GET", MAPS, &Value::Null).await.0, 200);
    }
    // And then served again.
    let again = async { while call(&bob, "GET", MAPS, &Value::Null).await.0 != 200 {} };
    tokio::time::timeout(Duration::from_secs(20), again)
        .await
        .unwrap();
    server.stop().await;
}

/// Who says nothing, or something in bits, holds no place that others need, and is cut off.
#[tokio::test(flavor = "multi_thread")]
async fn slow_clients_are_in_nobodys_way() {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    let server = Server::start().await;
    let address = ("127.0.0.1", server.port());
    let mut silent = Vec::new();
    for _ in 0..200 {
        silent.push(tokio::net::TcpStream::connect(address).await.unwrap());
    }
    // No TLS: the start of a request that would be fine without.
    silent[0].write_all(b"GET /healthz HTTP/1.1\r\n").await.unwrap();
    let admin = server.client().await;
    assert_eq!(call(&admin, "GET", MAPS, &Value::Null).await.0, 200);
    let mut byte = [0; 64];
    let cut = async { while silent[0].read(&mut byte).await.is_ok_and(|length| length > 0) {} };
    tokio::time::timeout(Duration::from_secs(30), cut)
        .await
        .expect("what is no TLS is refused");
    let last = silent.last_mut().unwrap();
    let cut = async { while last.read(&mut byte).await.is_ok_and(|length| length > 0) {} };
    tokio::time::timeout(Duration::from_secs(30), cut)
        .await
        .expect("who never begins a handshake is cut off");
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_audit_log_says_who_asked_for_what() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("audit.log");
    let server = Server::start_with(|config| config.audit_log_path = Some(path.clone())).await;
    let bob = bob(&server).await;
    assert_eq!(
        call(
            &bob,
            "POST",
            MAPS,
            &json!({"metadata": {"name": "a"}, "data": {"k": "hidden"}})
        )
        .await
        .0,
        201
    );
    assert_eq!(
        call(&bob, "GET", "/api/v1/nodes/n?x=1", &Value::Null).await.0,
        403
    );
    server.stop().await;
    let log = std::fs::read_to_string(&path).unwrap();
    assert!(!log.contains("hidden"), "bodies are not logged");
    let of_bob: Vec<Value> = log
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .filter(|event: &Value| event["user"]["username"] == "bob")
        .collect();
    let [created, refused] = &of_bob[..] else {
        panic!("{of_bob:?}")
    };
    assert_eq!(
        (&created["kind"], &created["apiVersion"], &created["stage"]),
        (
            &json!("Event"),
            &json!("audit.k8s.io/v1"),
            &json!("ResponseComplete")
        )
    );
    assert_eq!(
        (&created["verb"], &created["responseStatus"]["code"]),
        (&json!("create"), &json!(201))
    );
    assert_eq!(
        created["objectRef"],
        json!({"resource": "configmaps", "namespace": "default", "apiVersion": "v1"})
    );
    assert_eq!(created["sourceIPs"], json!(["127.0.0.1"]));
    assert_eq!(refused["requestURI"], "/api/v1/nodes/n?x=1");
    assert_eq!(
        (&refused["verb"], &refused["responseStatus"]["code"]),
        (&json!("get"), &json!(403))
    );
    assert_eq!(refused["objectRef"]["name"], "n");
    assert!(
        refused["user"]["groups"]
            .as_array()
            .unwrap()
            .contains(&json!("system:authenticated"))
    );
}
