//! The verbs that a learner types, each against a server of its own making.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test stops where it fails"
)]

mod common;
#[path = "common/fake_node.rs"]
mod fake_node;
#[path = "common/kubectl.rs"]
mod kubectl;

use fake_node::FakeNodes;
use kubectl::{Kubectl, described, row};
use serde_json::{Value, json};

const WEB: &str = r#"
apiVersion: apps/v1
kind: Deployment
metadata: {name: web, labels: {app: web}}
spec:
  replicas: 2
  selector: {matchLabels: {app: web}}
  template: {metadata: {labels: {app: web}}, spec: {containers: [{name: c, image: "web:1", ports: [{containerPort: 80}]}]}}
"#;

#[tokio::test(flavor = "multi_thread")]
async fn apply_on_the_server_owns_fields_and_meets_conflicts() {
    let k = Kubectl::new().await;
    let apply = "apply --server-side -f -";
    assert_eq!(
        k.feed(apply, WEB).await,
        "deployment.apps/web serverside-applied\n"
    );
    assert_eq!(
        k.feed(apply, WEB).await,
        "deployment.apps/web serverside-applied\n"
    );
    let object = k.json("get deployment web --show-managed-fields").await;
    let entry = &object["metadata"]["managedFields"][0];
    assert_eq!(
        (&entry["manager"], &entry["operation"]),
        (&json!("kubectl"), &json!("Apply"))
    );
    // Who scales by hand takes the number over.
    k.ok("scale deployment web --replicas=3").await;
    let err = k.fails(apply, WEB).await;
    assert!(
        err.contains("conflict with \"kubectl\" with subresource \"scale\" using apps/v1: .spec.replicas"),
        "{err}"
    );
    k.feed(&format!("{apply} --force-conflicts"), WEB).await;
    assert_eq!(k.json("get deployment web").await["spec"]["replicas"], 2);
    let other = "apiVersion: apps/v1\nkind: Deployment\nmetadata: {name: web, annotations: {team: a}}\n";
    k.feed("apply --server-side --field-manager=team -f -", other)
        .await;
    let bare = "apiVersion: apps/v1\nkind: Deployment\nmetadata: {name: web}\n";
    k.feed("apply --server-side --field-manager=team -f -", bare)
        .await;
    assert_eq!(
        k.json("get deployment web").await["metadata"]["annotations"]["team"],
        Value::Null
    );
    // From the client's way to the server's, and what one leaves out goes.
    let map = "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: m}\ndata: {a: one, b: two}\n";
    k.feed("apply -f -", map).await;
    let less = map.replace(", b: two", "");
    k.feed(apply, &less).await;
    assert_eq!(k.json("get cm m").await["data"], json!({"a": "one"}));
    let err = k.fails(apply, &less.replace("\ndata:", "\ndato:")).await;
    assert!(err.contains("field not declared in schema"), "{err}");
    let out = k
        .feed(&format!("{apply} --dry-run=server"), &map.replace("one", "three"))
        .await;
    assert!(out.contains("(server dry run)"), "{out}");
    assert_eq!(k.json("get cm m").await["data"]["a"], "one");
}

#[tokio::test(flavor = "multi_thread")]
async fn edit_and_diff() {
    let k = Kubectl::new().await;
    k.feed("apply -f -", WEB).await;
    let (ok, out, _) = k.run("diff -f -", WEB).await;
    assert!(ok && out.is_empty(), "{out}");
    let (ok, out, _) = k.run("diff -f -", &WEB.replace("web:1", "web:2")).await;
    assert!(
        !ok && out.contains("-        image: web:1") || out.contains("-      - image: web:1"),
        "{out}"
    );
    let (ok, out, err) = k
        .run(
            "diff --server-side --force-conflicts -f -",
            &WEB.replace("replicas: 2", "replicas: 5"),
        )
        .await;
    assert!(!ok && out.contains("+  replicas: 5"), "{out}{err}");
    let editor = k.server.dir.path().join("editor");
    std::fs::write(&editor, "#!/bin/sh\nsed -i 's/web:1/web:3/' \"$1\"\n").unwrap();
    std::fs::set_permissions(&editor, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
    let output = k
        .command("edit deployment web")
        .env("KUBE_EDITOR", &editor)
        .output()
        .await
        .unwrap();
    assert_eq!(
        String::from_utf8_lossy(&output.stdout),
        "deployment.apps/web edited\n"
    );
    let object = k.json("get deployment web").await;
    assert_eq!(
        object["spec"]["template"]["spec"]["containers"][0]["image"],
        "web:3"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn pods_and_nodes_as_a_learner_looks_after_them() {
    let k = Kubectl::new().await;
    let client = k.server.client().await;
    let _nodes = FakeNodes::start(&client, &["n1", "n2"]).await;
    k.ok("wait --for=condition=Ready node/n1 node/n2 --timeout=20s")
        .await;
    // The taint of a new node goes when it is ready, and it has pod addresses.
    k.ok("wait --for=jsonpath={.spec.podCIDR} node/n1 --timeout=20s")
        .await;
    let range = k.ok("get node n1 -o jsonpath={.spec.podCIDR}").await;
    assert!(
        range.starts_with("10.244.") && range.ends_with(".0/24"),
        "{range}"
    );
    let mut untainted = json!({});
    for _ in 0..200 {
        untainted = k.json("get node n1").await;
        if untainted["spec"]["taints"].is_null() {
            break;
        }
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    }
    assert_eq!(untainted["spec"]["taints"], Value::Null);
    k.feed("create -f -", WEB).await;
    k.ok("wait --for=condition=Available deployment/web --timeout=30s")
        .await;
    k.ok("expose deployment web --port=80").await;
    k.ok("wait --for=jsonpath={.subsets[0].addresses[1].ip} endpoints/web --timeout=20s")
        .await;
    let out = k.ok("describe service web").await;
    assert_eq!(described(&out, "Endpoints").split(',').count(), 2, "{out}");
    let out = k.ok("get pods -o wide -l app=web").await;
    assert_eq!(out.lines().count(), 3, "{out}");
    let nodes = k
        .ok("get pods -o custom-columns=NODE:.spec.nodeName --no-headers")
        .await;
    assert!(nodes.lines().all(|node| node == "n1" || node == "n2"), "{nodes}");
    let images = k
        .ok("get deployment web -o jsonpath={.spec.template.spec.containers[*].image}")
        .await;
    assert_eq!(images, "web:1");
    let sorted = k.ok("get pods --sort-by=.metadata.name -o name").await;
    assert_eq!(sorted.lines().count(), 2);
    let out = k.ok("get all").await;
    for word in [
        "pod/web-",
        "service/web",
        "deployment.apps/web",
        "replicaset.apps/web-",
    ] {
        assert!(out.contains(word), "{out}");
    }
    assert!(k.ok("get events").await.contains("ScalingReplicaSet"));

    assert_eq!(k.ok("label node n1 disk=ssd").await, "node/n1 labeled\n");
    assert_eq!(k.ok("annotate node n1 note=x").await, "node/n1 annotated\n");
    assert_eq!(
        k.ok("taint node n1 gpu=yes:NoSchedule").await,
        "node/n1 tainted\n"
    );
    let out = k.ok("describe node n1").await;
    assert_eq!(described(&out, "Taints"), "gpu=yes:NoSchedule");
    assert_eq!(k.ok("taint node n1 gpu-").await, "node/n1 untainted\n");
    assert_eq!(k.ok("cordon n1").await, "node/n1 cordoned\n");
    assert_eq!(row(&k.ok("get nodes").await, "n1")[1], "Ready,SchedulingDisabled");
    assert_eq!(k.ok("uncordon n1").await, "node/n1 uncordoned\n");
    let (ok, out, err) = k.run("drain n1 --timeout=30s", "").await;
    assert!(ok && out.contains("node/n1 drained"), "{out}{err}");
    k.ok("uncordon n1").await;
    k.ok("wait --for=condition=Available deployment/web --timeout=30s")
        .await;

    let pod = k
        .ok("get pods -l app=web -o jsonpath={.items[0].metadata.name}")
        .await;
    assert_eq!(
        k.ok(&format!("delete pod {pod}")).await,
        format!("pod \"{pod}\" deleted\n")
    );
    assert_eq!(
        k.ok("delete deployment web --cascade=orphan").await,
        "deployment.apps \"web\" deleted\n"
    );
    assert_eq!(k.json("get rs").await["items"].as_array().unwrap().len(), 1);
    assert!(
        k.ok("delete rs -l app=web --cascade=foreground --timeout=30s")
            .await
            .contains("deleted")
    );
    assert_eq!(k.json("get pods -l app=web").await["items"], json!([]));
    let (ok, _, err) = k.run("delete pod nope --now", "").await;
    assert!(!ok && err.contains("not found"), "{err}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_there_is_and_what_it_means() {
    let k = Kubectl::new().await;
    let out = k.ok("api-resources -o wide").await;
    for line in [
        "deployments deploy apps/v1 true Deployment",
        "nodes no v1 false Node",
        "rolebindings rbac.authorization.k8s.io/v1 true RoleBinding",
    ] {
        let found = out.lines().any(|printed| {
            let words: Vec<&str> = printed.split_whitespace().collect();
            words.join(" ").starts_with(line)
        });
        assert!(found, "{line} is not in\n{out}");
    }
    let out = k.ok("api-versions").await;
    assert!(out.lines().any(|line| line == "apps/v1"), "{out}");
    let out = k
        .ok("explain deployment.spec.strategy.rollingUpdate.maxSurge")
        .await;
    assert!(
        out.contains("KIND:       Deployment") && out.contains("IntOrString"),
        "{out}"
    );
    assert!(
        k.ok("explain pod.spec --recursive")
            .await
            .contains("containerPort\t<integer>")
    );
    let (ok, out, _) = k.run("version", "").await;
    assert!(ok && out.contains("Server Version: v1.36"), "{out}");
    assert!(k.ok("cluster-info").await.contains("is running at"));
    let bad = "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: m}\ndatum: {a: b}\n";
    let err = k.fails("create -f -", bad).await;
    assert!(err.contains("unknown field \"datum\""), "{err}");
    let (ok, _, err) = k.run("create -f - --validate=warn", bad).await;
    assert!(ok && err.contains("Warning: unknown field \"datum\""), "{err}");
    let (ok, _, err) = k
        .run(
            "apply -f - --validate=ignore",
            &bad.replace("name: m", "name: other"),
        )
        .await;
    assert!(ok && err.is_empty(), "{err}");
    let err = k.fails("get widgets", "").await;
    assert!(
        err.contains("the server doesn't have a resource type \"widgets\""),
        "{err}"
    );
    let err = k
        .fails(
            "apply -f -",
            "apiVersion: batch/v1\nkind: Job\nmetadata: {name: j}\n",
        )
        .await;
    assert!(
        err.contains("no matches for kind \"Job\" in version \"batch/v1\""),
        "{err}"
    );
}
