//! Every door of the API, tried by those who may and those who may not.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test stops where it fails"
)]

mod common;
#[path = "common/kubectl.rs"]
mod kubectl;

use std::time::Duration;

use base64::Engine as _;
use common::{Server, call, send};
use kube::config::AuthInfo;
use kubectl::Kubectl;
use serde_json::{Value, json};

const BASE64: base64::engine::GeneralPurpose = base64::engine::general_purpose::STANDARD;

async fn with(server: &Server, auth: AuthInfo) -> kube::Client {
    let mut config = server.config();
    config.auth_infos[0].auth_info = Some(auth);
    common::client(config).await
}

/// A client with a certificate of the cluster's authority.
async fn as_user(server: &Server, user: &str, group: Option<&str>) -> kube::Client {
    let pair = server.plane.pki().client(user, group).unwrap();
    let auth: AuthInfo = serde_json::from_value(json!({
        "client-certificate-data": BASE64.encode(pair.certificate), "client-key-data": BASE64.encode(pair.key),
    }))
    .unwrap();
    with(server, auth).await
}

async fn with_token(server: &Server, token: &str) -> kube::Client {
    with(server, serde_json::from_value(json!({"token": token})).unwrap()).await
}

async fn ok(client: &kube::Client, method: &str, path: &str, body: &Value) -> Value {
    let (status, answer) = call(client, method, path, body).await;
    assert!((200..300).contains(&status), "{method} {path}: {answer}");
    answer
}

async fn get(client: &kube::Client, path: &str) -> u16 {
    call(client, "GET", path, &Value::Null).await.0
}

async fn until<F: AsyncFn() -> bool>(what: &str, wanted: F) {
    let waiting = async {
        while !wanted().await {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    assert!(
        tokio::time::timeout(Duration::from_secs(20), waiting)
            .await
            .is_ok(),
        "{what}"
    );
}

#[tokio::test]
async fn strangers_see_health_and_version_only() {
    let server = Server::start().await;
    let stranger = with(&server, AuthInfo::default()).await;
    for path in ["/healthz", "/livez", "/readyz", "/version"] {
        assert_eq!(get(&stranger, path).await, 200, "{path}");
    }
    for path in ["/api", "/apis", "/openapi/v3", "/api/v1/namespaces", "/nope"] {
        assert_eq!(get(&stranger, path).await, 403, "{path}");
    }
    for token in [
        "nonsense",
        "a.b.c",
        "abcdef.0123456789abcdef",
        "eyJhbGciOiJub25lIn0.e30.",
    ] {
        let client = with_token(&server, token).await;
        assert_eq!(get(&client, "/api/v1/namespaces").await, 401, "{token}");
    }
    // A certificate of another authority does not even get a connection, or is nobody's.
    let other = Server::start().await;
    let pair = other
        .plane
        .pki()
        .client("kubernetes-admin", Some("system:masters"))
        .unwrap();
    let auth: AuthInfo = serde_json::from_value(json!({
        "client-certificate-data": BASE64.encode(pair.certificate), "client-key-data": BASE64.encode(pair.key),
    }))
    .unwrap();
    let forger = with(&server, auth).await;
    let request = http::Request::get("/api/v1/namespaces")
        .body(kube::client::Body::empty())
        .unwrap();
    if let Ok(answer) = forger.send(request).await {
        assert_eq!(answer.status(), 403);
    }
    // A server whose authority is another one is not talked to.
    let mut config = server.config();
    config.clusters[0]
        .cluster
        .as_mut()
        .unwrap()
        .certificate_authority_data = Some(BASE64.encode(&other.plane.pki().ca));
    let client = common::client(config).await;
    let request = http::Request::get("/version")
        .body(kube::client::Body::empty())
        .unwrap();
    assert!(client.send(request).await.is_err());
    let admin = server.client().await;
    let large = json!({"metadata": {"name": "large"}, "data": {"a": "x".repeat(4 << 20)}});
    assert_eq!(
        call(&admin, "POST", "/api/v1/namespaces/default/configmaps", &large)
            .await
            .0,
        413
    );
    other.stop().await;
    server.stop().await;
}

#[tokio::test]
async fn users_have_the_rights_of_their_roles() {
    let server = Server::start().await;
    let admin = server.client().await;
    let ann = as_user(&server, "ann", Some("staff")).await;
    ok(
        &admin,
        "POST",
        "/api/v1/namespaces",
        &json!({"metadata": {"name": "a"}}),
    )
    .await;
    let pods = "/api/v1/namespaces/a/pods";
    // Known, but without any role: discovery and questions about oneself.
    assert_eq!(get(&ann, "/api").await, 200);
    assert_eq!(get(&ann, "/openapi/v3").await, 200);
    let (code, answer) = call(&ann, "GET", pods, &Value::Null).await;
    assert_eq!(code, 403);
    assert_eq!(
        answer["message"],
        "pods is forbidden: User \"ann\" cannot list resource \"pods\" in API group \"\" in the namespace \"a\""
    );
    // What is not served is not told apart by those who may not see it.
    let unserved = "/apis/batch/v1/namespaces/a/jobs/j";
    let (code, answer) = call(&ann, "DELETE", unserved, &Value::Null).await;
    assert_eq!(code, 403);
    assert_eq!(
        answer["message"],
        "jobs.batch \"j\" is forbidden: User \"ann\" cannot delete resource \"jobs\" in API group \"batch\" in the namespace \"a\""
    );
    let rbac = "/apis/rbac.authorization.k8s.io/v1";
    let everything = json!({"metadata": {"name": "jobs"}, "rules": [{"apiGroups": ["batch"], "resources": ["*"], "verbs": ["*"]}]});
    ok(&admin, "POST", &format!("{rbac}/clusterroles"), &everything).await;
    let eve = as_user(&server, "eve", None).await;
    let group = json!({
        "metadata": {"name": "eve"},
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "jobs"},
        "subjects": [{"apiGroup": "rbac.authorization.k8s.io", "kind": "User", "name": "eve"}],
    });
    ok(&admin, "POST", &format!("{rbac}/clusterrolebindings"), &group).await;
    for client in [&admin, &eve] {
        assert_eq!(get(client, unserved).await, 404);
    }
    let roles = "/apis/rbac.authorization.k8s.io/v1/namespaces/a";
    let bind = |role: &str, subject: Value| {
        json!({
            "metadata": {"name": format!("{role}-{}", subject["name"].as_str().unwrap())},
            "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": role},
            "subjects": [subject],
        })
    };
    ok(
        &admin,
        "POST",
        &format!("{roles}/rolebindings"),
        &bind("view", json!({"kind": "Group", "name": "staff"})),
    )
    .await;
    assert_eq!(get(&ann, pods).await, 200);
    assert_eq!(get(&ann, &format!("{pods}?watch=1&timeoutSeconds=1")).await, 200);
    for path in [
        "/api/v1/pods",
        "/api/v1/namespaces/default/pods",
        "/api/v1/namespaces/a/secrets",
        "/api/v1/nodes",
    ] {
        assert_eq!(get(&ann, path).await, 403, "{path}");
    }
    let map = json!({"metadata": {"name": "m"}});
    let maps = "/api/v1/namespaces/a/configmaps";
    assert_eq!(call(&ann, "POST", maps, &map).await.0, 403);
    ok(
        &admin,
        "POST",
        &format!("{roles}/rolebindings"),
        &bind("edit", json!({"kind": "User", "name": "ann"})),
    )
    .await;
    ok(&ann, "POST", maps, &map).await;
    assert_eq!(
        call(&ann, "DELETE", "/api/v1/namespaces/a", &Value::Null).await.0,
        403
    );
    assert_eq!(call(&ann, "POST", &format!("{roles}/roles"), &map).await.0, 403);

    // An administrator of a namespace hands out what he has, and no more.
    let bob = as_user(&server, "bob", None).await;
    ok(
        &admin,
        "POST",
        &format!("{roles}/rolebindings"),
        &bind("admin", json!({"kind": "User", "name": "bob"})),
    )
    .await;
    ok(
        &bob,
        "POST",
        &format!("{roles}/rolebindings"),
        &bind("view", json!({"kind": "User", "name": "eve"})),
    )
    .await;
    let (code, answer) = call(
        &bob,
        "POST",
        &format!("{roles}/rolebindings"),
        &bind("cluster-admin", json!({"kind": "User", "name": "bob"})),
    )
    .await;
    assert_eq!(code, 403, "{answer}");
    assert!(
        answer["message"].as_str().unwrap().contains("not currently held"),
        "{answer}"
    );
    let role = json!({
        "metadata": {"name": "small"}, "rules": [{"apiGroups": [""], "resources": ["pods"], "verbs": ["get"]}],
    });
    ok(&bob, "POST", &format!("{roles}/roles"), &role).await;
    let patch = json!({"rules": [{"apiGroups": ["*"], "resources": ["*"], "verbs": ["*"]}]});
    let request = http::Request::patch(format!("{roles}/roles/small"))
        .header("content-type", "application/merge-patch+json")
        .body(patch.to_string().into_bytes())
        .unwrap();
    assert_eq!(send(&bob, request).await.status(), 403);
    // One object by its name.
    let one = json!({
        "metadata": {"name": "one"},
        "rules": [{"apiGroups": [""], "resources": ["configmaps"], "resourceNames": ["m"], "verbs": ["get", "list"]}],
    });
    ok(&admin, "POST", &format!("{roles}/roles"), &one).await;
    let mut binding = bind("one", json!({"kind": "User", "name": "carl"}));
    binding["roleRef"]["kind"] = "Role".into();
    ok(&admin, "POST", &format!("{roles}/rolebindings"), &binding).await;
    let carl = as_user(&server, "carl", None).await;
    assert_eq!(get(&carl, &format!("{maps}/m")).await, 200);
    assert_eq!(
        get(&carl, &format!("{maps}?fieldSelector=metadata.name%3Dm")).await,
        200
    );
    assert_eq!(get(&carl, &format!("{maps}/kube-root-ca.crt")).await, 403);
    assert_eq!(get(&carl, maps).await, 403);
    server.stop().await;
}

#[tokio::test]
async fn service_accounts_have_tokens_that_end_with_what_they_are_bound_to() {
    let server = Server::start().await;
    let admin = server.client().await;
    let account = "/api/v1/namespaces/default/serviceaccounts/default";
    until("no account", async || get(&admin, account).await == 200).await;
    let root = "/api/v1/namespaces/default/configmaps/kube-root-ca.crt";
    until("no authority", async || get(&admin, root).await == 200).await;
    assert_eq!(
        ok(&admin, "GET", root, &Value::Null).await["data"]["ca.crt"],
        *server.plane.pki().ca
    );
    let pod = json!({"metadata": {"name": "p"}, "spec": {"containers": [{"name": "c", "image": "i"}]}});
    let pod = ok(&admin, "POST", "/api/v1/namespaces/default/pods", &pod).await;
    let token =
        |spec: Value| json!({"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": spec});
    let path = format!("{account}/token");
    let free = ok(&admin, "POST", &path, &token(json!({}))).await;
    let free = free["status"]["token"].as_str().unwrap().to_owned();
    let bound = json!({"boundObjectRef": {"apiVersion": "v1", "kind": "Pod", "name": "p", "uid": pod["metadata"]["uid"]}});
    let bound = ok(&admin, "POST", &path, &token(bound)).await;
    let bound = bound["status"]["token"].as_str().unwrap().to_owned();
    let elsewhere = ok(&admin, "POST", &path, &token(json!({"audiences": ["vault"]}))).await;
    let elsewhere = elsewhere["status"]["token"].as_str().unwrap().to_owned();
    assert_eq!(
        call(&admin, "POST", &path, &token(json!({"expirationSeconds": 1})))
            .await
            .0,
        422
    );
    let wrong = json!({"boundObjectRef": {"kind": "Pod", "name": "p", "uid": "other"}});
    assert_eq!(call(&admin, "POST", &path, &token(wrong)).await.0, 409);

    for good in [&free, &bound] {
        let client = with_token(&server, good).await;
        // Known, without rights.
        assert_eq!(get(&client, "/api").await, 200);
        assert_eq!(get(&client, "/api/v1/namespaces/default/pods").await, 403);
    }
    assert_eq!(get(&with_token(&server, &elsewhere).await, "/api").await, 401);
    let mut changed = free.clone();
    changed.replace_range(
        changed.len() - 6..changed.len() - 5,
        if changed.ends_with('A') { "B" } else { "A" },
    );
    assert_eq!(
        get(&with_token(&server, &format!("{changed}x")).await, "/api").await,
        401
    );
    let review = |token: &str, audiences: Value| json!({"spec": {"token": token, "audiences": audiences}});
    let reviews = "/apis/authentication.k8s.io/v1/tokenreviews";
    let answer = ok(&admin, "POST", reviews, &review(&elsewhere, json!(["vault"]))).await;
    assert_eq!(
        answer["status"]["user"]["username"],
        "system:serviceaccount:default:default"
    );
    let answer = ok(&admin, "POST", reviews, &review(&elsewhere, json!([]))).await;
    assert_eq!(answer["status"]["authenticated"], false);

    let binding = json!({
        "metadata": {"name": "pods"}, "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "view"},
        "subjects": [{"kind": "ServiceAccount", "name": "default", "namespace": "default"}],
    });
    let bindings = "/apis/rbac.authorization.k8s.io/v1/namespaces/default/rolebindings";
    ok(&admin, "POST", bindings, &binding).await;
    let client = with_token(&server, &bound).await;
    assert_eq!(get(&client, "/api/v1/namespaces/default/pods").await, 200);
    // With the pod its token ends, with the account all do.
    ok(
        &admin,
        "DELETE",
        "/api/v1/namespaces/default/pods/p",
        &Value::Null,
    )
    .await;
    assert_eq!(get(&client, "/api").await, 401);
    let client = with_token(&server, &free).await;
    assert_eq!(get(&client, "/api").await, 200);
    ok(&admin, "DELETE", account, &Value::Null).await;
    // A new one of the same name is another one.
    until("no new account", async || get(&admin, account).await == 200).await;
    assert_eq!(get(&client, "/api").await, 401);
    server.stop().await;
}

#[tokio::test]
async fn bootstrap_tokens_let_in_until_they_end() {
    let server = Server::start().await;
    let admin = server.client().await;
    let in_seconds = |seconds: i64| {
        let end = jiff::Timestamp::now() + jiff::SignedDuration::from_secs(seconds);
        end.strftime("%Y-%m-%dT%H:%M:%SZ").to_string()
    };
    let secret = |id: &str, expiration: &str, more: Value| {
        let mut data = json!({
            "token-id": id, "token-secret": "0123456789abcdef", "usage-bootstrap-authentication": "true",
            "expiration": expiration, "auth-extra-groups": "system:bootstrappers:kubeadm:default-node-token,system:masters",
        });
        json_patch::merge(&mut data, &more);
        json!({
            "metadata": {"name": format!("bootstrap-token-{id}"), "namespace": "kube-system"},
            "type": "bootstrap.kubernetes.io/token", "stringData": data,
        })
    };
    let secrets = "/api/v1/namespaces/kube-system/secrets";
    for (id, expiration, more) in [
        ("goodgo", in_seconds(3600), json!({})),
        ("toolat", in_seconds(-1), json!({})),
        ("sooner", in_seconds(2), json!({})),
        (
            "nousag",
            in_seconds(3600),
            json!({"usage-bootstrap-authentication": "false"}),
        ),
    ] {
        ok(&admin, "POST", secrets, &secret(id, &expiration, more)).await;
    }
    let client = with_token(&server, "goodgo.0123456789abcdef").await;
    assert_eq!(get(&client, "/api").await, 200);
    assert_eq!(get(&client, "/api/v1/nodes").await, 403);
    let who = ok(
        &client,
        "POST",
        "/apis/authentication.k8s.io/v1/selfsubjectreviews",
        &json!({}),
    )
    .await;
    assert_eq!(who["status"]["userInfo"]["username"], "system:bootstrap:goodgo");
    // Nobody becomes an administrator by a token's groups.
    assert_eq!(
        who["status"]["userInfo"]["groups"],
        json!([
            "system:bootstrappers",
            "system:bootstrappers:kubeadm:default-node-token",
            "system:authenticated"
        ])
    );
    for token in [
        "toolat.0123456789abcdef",
        "nousag.0123456789abcdef",
        "goodgo.0123456789abcdeX",
        "goodgo.0123456789abcdee",
    ] {
        assert_eq!(
            get(&with_token(&server, token).await, "/api").await,
            401,
            "{token}"
        );
    }
    // What has ended is deleted.
    for gone in ["toolat", "sooner"] {
        until(gone, async || {
            get(&admin, &format!("{secrets}/bootstrap-token-{gone}")).await == 404
        })
        .await;
    }
    assert_eq!(
        get(&admin, &format!("{secrets}/bootstrap-token-goodgo")).await,
        200
    );
    server.stop().await;
}

#[tokio::test]
async fn a_node_speaks_for_itself_only() {
    let server = Server::start().await;
    let admin = server.client().await;
    let one = as_user(&server, "system:node:n1", Some("system:nodes")).await;
    let node =
        |name: &str| json!({"metadata": {"name": name}, "status": {"nodeInfo": {"kubeletVersion": "v1"}}});
    ok(&one, "POST", "/api/v1/nodes", &node("n1")).await;
    assert_eq!(call(&one, "POST", "/api/v1/nodes", &node("n2")).await.0, 403);
    ok(&admin, "POST", "/api/v1/nodes", &node("n2")).await;
    let patch = async |client: &kube::Client, path: &str, patch: Value| -> u16 {
        let request = http::Request::patch(path)
            .header("content-type", "application/merge-patch+json")
            .body(patch.to_string().into_bytes())
            .unwrap();
        send(client, request).await.status().as_u16()
    };
    let ready = json!({"status": {"conditions": [{"type": "Ready", "status": "True"}]}});
    assert_eq!(patch(&one, "/api/v1/nodes/n1/status", ready.clone()).await, 200);
    assert_eq!(patch(&one, "/api/v1/nodes/n2/status", ready).await, 403);
    let label = |key: &str| json!({"metadata": {"labels": {key: "x"}}});
    assert_eq!(patch(&one, "/api/v1/nodes/n1", label("own")).await, 200);
    assert_eq!(
        patch(
            &one,
            "/api/v1/nodes/n1",
            label("node-restriction.kubernetes.io/tier")
        )
        .await,
        403
    );
    assert_eq!(
        patch(
            &one,
            "/api/v1/nodes/n1",
            json!({"spec": {"taints": [{"key": "k", "effect": "NoSchedule"}]}})
        )
        .await,
        403
    );
    assert_eq!(
        call(&one, "DELETE", "/api/v1/nodes/n1", &Value::Null).await.0,
        403
    );
    let lease = |name: &str| json!({"metadata": {"name": name}, "spec": {"holderIdentity": name}});
    let leases = "/apis/coordination.k8s.io/v1/namespaces/kube-node-lease/leases";
    ok(&one, "POST", leases, &lease("n1")).await;
    assert_eq!(call(&one, "POST", leases, &lease("n2")).await.0, 403);
    assert_eq!(
        call(
            &one,
            "POST",
            &leases.replace("kube-node-lease", "default"),
            &lease("n1")
        )
        .await
        .0,
        403
    );
    ok(&admin, "POST", leases, &lease("n2")).await;
    assert_eq!(
        call(&one, "PUT", &format!("{leases}/n2"), &lease("n2")).await.0,
        403
    );

    for path in [
        "/api/v1/services",
        "/api/v1/nodes",
        "/api/v1/pods",
        "/apis/discovery.k8s.io/v1/endpointslices",
    ] {
        assert_eq!(get(&one, path).await, 200, "{path}");
    }
    for path in [
        "/api/v1/secrets",
        "/api/v1/configmaps",
        "/apis/apps/v1/deployments",
        "/api/v1/namespaces/kube-system/secrets",
    ] {
        assert_eq!(get(&one, path).await, 403, "{path}");
    }
    for name in ["used", "unused"] {
        ok(
            &admin,
            "POST",
            "/api/v1/namespaces/default/secrets",
            &json!({"metadata": {"name": name}}),
        )
        .await;
    }
    let pod = |name: &str, node: &str, secret: &str| {
        json!({
            "metadata": {"name": name},
            "spec": {
                "nodeName": node, "containers": [{"name": "c", "image": "i"}],
                "volumes": [{"name": "v", "secret": {"secretName": secret}}],
            },
        })
    };
    let pods = "/api/v1/namespaces/default/pods";
    ok(&admin, "POST", pods, &pod("mine", "n1", "used")).await;
    ok(&admin, "POST", pods, &pod("other", "n2", "unused")).await;
    assert_eq!(get(&one, "/api/v1/namespaces/default/secrets/used").await, 200);
    assert_eq!(get(&one, "/api/v1/namespaces/default/secrets/unused").await, 403);
    let running = json!({"status": {"phase": "Running"}});
    assert_eq!(
        patch(&one, &format!("{pods}/mine/status"), running.clone()).await,
        200
    );
    assert_eq!(patch(&one, &format!("{pods}/other/status"), running).await, 403);
    assert_eq!(patch(&one, &format!("{pods}/mine"), label("x")).await, 403);
    assert_eq!(call(&one, "POST", pods, &pod("new", "n1", "used")).await.0, 403);
    let mirror = |node: &str| {
        json!({
            "metadata": {"name": "static", "annotations": {"kubernetes.io/config.mirror": "x"}},
            "spec": {"nodeName": node, "containers": [{"name": "c", "image": "i"}]},
        })
    };
    assert_eq!(call(&one, "POST", pods, &mirror("n2")).await.0, 403);
    ok(&one, "POST", pods, &mirror("n1")).await;
    assert_eq!(
        call(&one, "DELETE", &format!("{pods}/other"), &Value::Null)
            .await
            .0,
        403
    );
    ok(
        &one,
        "DELETE",
        &format!("{pods}/mine?gracePeriodSeconds=0"),
        &Value::Null,
    )
    .await;
    let token = json!({"spec": {}});
    let account = "/api/v1/namespaces/default/serviceaccounts/default/token";
    assert_eq!(
        call(
            &one,
            "POST",
            &account.replace("/default/token", "/robot/token"),
            &token
        )
        .await
        .0,
        403
    );
    // Without the group the name alone is nobody's.
    let posing = as_user(&server, "system:node:n2", None).await;
    assert_eq!(get(&posing, "/api/v1/nodes").await, 403);
    server.stop().await;
}

#[tokio::test]
async fn kubectl_asks_who_may_do_what() {
    let k = Kubectl::new().await;
    assert_eq!(k.ok("auth can-i create deployments").await, "yes\n");
    let (ok, out, _) = k.run("auth can-i create deployments --as=ann", "").await;
    assert!(!ok && out == "no\n", "{out}");
    k.ok("create rolebinding ann --clusterrole=edit --user=ann").await;
    assert_eq!(k.ok("auth can-i create deployments --as=ann").await, "yes\n");
    let (ok, out, _) = k
        .run("auth can-i create deployments -n kube-system --as=ann", "")
        .await;
    assert!(!ok && out == "no\n", "{out}");
    let out = k.ok("auth can-i --list --as=ann").await;
    assert!(
        out.contains("deployments.apps") && out.contains("selfsubjectreviews.authentication.k8s.io"),
        "{out}"
    );
    let out = k.ok("auth whoami").await;
    assert!(
        out.contains("kubernetes-admin") && out.contains("system:masters"),
        "{out}"
    );
    let out = k.ok("auth whoami --as=ann --as-group=staff").await;
    assert!(
        out.contains("ann") && out.contains("staff") && !out.contains("masters"),
        "{out}"
    );
    let err = k.fails("get nodes --as=ann", "").await;
    assert!(
        err.contains("nodes is forbidden: User \"ann\" cannot list resource \"nodes\""),
        "{err}"
    );
    k.ok("create deployment web --image=i --as=ann").await;
    let token = k.ok("create token default").await;
    assert_eq!(token.split('.').count(), 3, "{token}");
}
