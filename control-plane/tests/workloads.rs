//! What makes pods, as a learner sees it through kubectl.
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

use std::time::Duration;

use fake_node::FakeNodes;
use kubectl::{Kubectl, described, row};
use serde_json::Value;

const WEB: &str = r#"
apiVersion: apps/v1
kind: Deployment
metadata: {name: web}
spec:
  replicas: 4
  selector: {matchLabels: {app: web}}
  template: {metadata: {labels: {app: web}}, spec: {containers: [{name: c, image: "web:1"}]}}
"#;

/// Waits until a property of the listed objects holds, woken up by each change.
async fn until(k: &Kubectl, what: &str, wanted: impl Fn(&[Value]) -> bool) -> Vec<Value> {
    let mut changes = k.watch(&format!("get {what} --watch -o name"));
    let waiting = async {
        loop {
            let items = k.json(&format!("get {what}")).await["items"]
                .as_array()
                .unwrap()
                .clone();
            if wanted(&items) {
                return items;
            }
            let _ = tokio::time::timeout(Duration::from_millis(300), changes.line()).await;
        }
    };
    match tokio::time::timeout(Duration::from_secs(30), waiting).await {
        Ok(items) => items,
        Err(_) => panic!("{what}: {}", k.ok(&format!("get {what} -o yaml")).await),
    }
}

fn running(items: &[Value]) -> usize {
    let runs =
        |pod: &&Value| pod["status"]["phase"] == "Running" && pod["metadata"]["deletionTimestamp"].is_null();
    items.iter().filter(runs).count()
}

fn images(items: &[Value]) -> Vec<&str> {
    let mut images: Vec<&str> = items
        .iter()
        .map(|pod| pod["spec"]["containers"][0]["image"].as_str().unwrap())
        .collect();
    images.sort_unstable();
    images.dedup();
    images
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deployment_is_rolled_out_and_back() {
    let k = Kubectl::new().await;
    let client = k.server.client().await;
    let _nodes = FakeNodes::start(&client, &["n1", "n2"]).await;
    assert_eq!(k.feed("create -f -", WEB).await, "deployment.apps/web created\n");
    let out = k.ok("rollout status deployment/web --timeout=30s").await;
    assert!(
        out.ends_with("deployment \"web\" successfully rolled out\n"),
        "{out}"
    );
    assert_eq!(row(&k.ok("get deployment").await, "web")[1..4], ["4/4", "4", "4"]);
    let sets = k.json("get rs").await["items"].as_array().unwrap().clone();
    let [set] = &sets[..] else { panic!("{sets:#?}") };
    let hash = set["metadata"]["labels"]["pod-template-hash"].as_str().unwrap();
    assert_eq!(set["metadata"]["name"], format!("web-{hash}"));
    let pods = k.json(&format!("get pods -l pod-template-hash={hash}")).await;
    assert_eq!(pods["items"].as_array().unwrap().len(), 4);

    // Another image, one pod after the other: never fewer than three available, never more than five.
    assert_eq!(
        k.ok("set image deployment/web c=web:2").await,
        "deployment.apps/web image updated\n"
    );
    k.ok("annotate deployment/web kubernetes.io/change-cause=second")
        .await;
    let pods = until(&k, "pods -l app=web", |pods| {
        let here = pods
            .iter()
            .filter(|pod| pod["metadata"]["deletionTimestamp"].is_null());
        let available = running(pods);
        assert!(
            here.count() <= 5 && available >= 3,
            "{available} of {}",
            pods.len()
        );
        images(pods) == ["web:2"] && available == 4
    })
    .await;
    assert_eq!(pods.len(), 4);
    k.ok("rollout status deployment/web --timeout=30s").await;
    let history = k.ok("rollout history deployment/web").await;
    assert!(
        history.contains("1         <none>") && history.contains("2         second"),
        "{history}"
    );
    let out = k.ok("describe deployment web").await;
    assert!(
        described(&out, "Replicas").starts_with("4 desired | 4 updated | 4 total | 4 available"),
        "{out}"
    );
    assert!(out.contains("NewReplicaSetAvailable"), "{out}");
    assert!(out.contains("Scaled up replica set web-"), "{out}");

    assert_eq!(
        k.ok("rollout undo deployment/web").await,
        "deployment.apps/web rolled back\n"
    );
    k.ok("rollout status deployment/web --timeout=30s").await;
    until(&k, "pods -l app=web", |pods| {
        images(pods) == ["web:1"] && running(pods) == 4
    })
    .await;
    assert_eq!(k.json("get rs").await["items"].as_array().unwrap().len(), 2);
    let revision =
        k.json("get deployment web").await["metadata"]["annotations"]["deployment.kubernetes.io/revision"]
            .clone();
    assert_eq!(revision, "3");

    // Paused, nothing is rolled out; but it can be scaled.
    k.ok("rollout pause deployment/web").await;
    k.ok("set image deployment/web c=web:3").await;
    k.ok("scale deployment/web --replicas=6").await;
    let pods = until(&k, "pods -l app=web", |pods| running(pods) == 6).await;
    assert_eq!(images(&pods), ["web:1"]);
    k.ok("rollout resume deployment/web").await;
    k.ok("rollout status deployment/web --timeout=30s").await;
    until(&k, "pods -l app=web", |pods| {
        images(pods) == ["web:3"] && running(pods) == 6
    })
    .await;

    // A bad image goes no further than the bounds allow.
    k.ok("set image deployment/web c=broken").await;
    until(&k, "pods -l app=web", |pods| images(pods).contains(&"broken")).await;
    let (ok, _, err) = k.run("rollout status deployment/web --timeout=1s", "").await;
    assert!(!ok && err.contains("timed out"), "{err}");
    let pods = k.json("get pods -l app=web").await;
    assert!(running(pods["items"].as_array().unwrap()) >= 5);
    k.ok("rollout undo deployment/web").await;
    k.ok("rollout status deployment/web --timeout=30s").await;

    // With its deployment everything goes.
    k.ok("delete deployment web --cascade=foreground --timeout=30s")
        .await;
    for kind in ["rs", "pods"] {
        assert_eq!(
            k.json(&format!("get {kind} -l app=web")).await["items"],
            serde_json::json!([])
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn recreating_never_mixes_old_and_new() {
    let k = Kubectl::new().await;
    let client = k.server.client().await;
    let _nodes = FakeNodes::start(&client, &["n1"]).await;
    let manifest = WEB.replace("replicas: 4", "replicas: 3\n  strategy: {type: Recreate}");
    k.feed("create -f -", &manifest).await;
    k.ok("rollout status deployment/web --timeout=30s").await;
    k.ok("set image deployment/web c=web:2").await;
    until(&k, "pods -l app=web", |pods| {
        assert!(images(pods).len() <= 1, "{:?}", images(pods));
        images(pods) == ["web:2"] && running(pods) == 3
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replication_controller_keeps_its_number() {
    let k = Kubectl::new().await;
    let client = k.server.client().await;
    let _nodes = FakeNodes::start(&client, &["n1", "n2"]).await;
    let manifest = r#"
apiVersion: v1
kind: ReplicationController
metadata: {name: myweb}
spec:
  replicas: 3
  selector: {app: myweb}
  template: {metadata: {labels: {app: myweb}}, spec: {containers: [{name: c, image: "web:1"}]}}
"#;
    k.feed("create -f -", manifest).await;
    let pods = until(&k, "pods", |pods| running(pods) == 3).await;
    let first = pods[0]["metadata"]["name"].as_str().unwrap().to_owned();
    k.ok(&format!("delete pod {first}")).await;
    until(&k, "pods", |pods| {
        running(pods) == 3 && pods.iter().all(|pod| pod["metadata"]["name"] != *first)
    })
    .await;
    k.ok("scale rc myweb --replicas=1").await;
    until(&k, "pods", |pods| pods.len() == 1).await;
    until(&k, "rc", |rc| {
        rc[0]["status"]["readyReplicas"] == 1 && rc[0]["status"]["replicas"] == 1
    })
    .await;
    assert_eq!(row(&k.ok("get rc").await, "myweb")[1..4], ["1", "1", "1"]);
    // A pod that does not fit any more is let go and replaced; one that begins to fit is taken.
    let kept = k.json("get pods").await["items"][0]["metadata"]["name"]
        .as_str()
        .unwrap()
        .to_owned();
    k.ok(&format!("label pod {kept} app=other --overwrite")).await;
    until(&k, "pods -l app=myweb", |pods| running(pods) == 1).await;
    let free = k.json(&format!("get pod {kept}")).await;
    assert_eq!(free["metadata"]["ownerReferences"], Value::Null);
    k.ok("delete rc myweb --cascade=orphan").await;
    let pods = k.json("get pods -l app=myweb").await;
    assert_eq!(pods["items"].as_array().unwrap().len(), 1);
    assert_eq!(pods["items"][0]["metadata"]["ownerReferences"], Value::Null);
    k.feed("create -f -", manifest).await;
    let orphan = pods["items"][0]["metadata"]["uid"].clone();
    until(&k, "pods -l app=myweb", |pods| {
        running(pods) == 3
            && pods
                .iter()
                .any(|pod| pod["metadata"]["uid"] == orphan && pod["metadata"]["ownerReferences"].is_array())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_daemon_set_has_a_pod_on_every_node_that_fits() {
    let k = Kubectl::new().await;
    let client = k.server.client().await;
    let _nodes = FakeNodes::start(&client, &["n1", "n2", "n3"]).await;
    k.ok("label node n1 n2 disk=ssd").await;
    let manifest = r#"
apiVersion: apps/v1
kind: DaemonSet
metadata: {name: agent}
spec:
  selector: {matchLabels: {app: agent}}
  template:
    metadata: {labels: {app: agent}}
    spec: {nodeSelector: {disk: ssd}, containers: [{name: c, image: "a:1"}]}
"#;
    k.feed("create -f -", manifest).await;
    let on = |pods: &[Value]| {
        let mut nodes: Vec<String> = pods
            .iter()
            .map(|pod| pod["spec"]["nodeName"].as_str().unwrap().to_owned())
            .collect();
        nodes.sort();
        nodes
    };
    until(&k, "pods -l app=agent", |pods| {
        running(pods) == 2 && on(pods) == ["n1", "n2"]
    })
    .await;
    k.ok("rollout status ds/agent --timeout=30s").await;
    k.ok("label node n3 disk=ssd").await;
    k.ok("label node n1 disk-").await;
    until(&k, "pods -l app=agent", |pods| {
        running(pods) == 2 && on(pods) == ["n2", "n3"]
    })
    .await;
    k.ok("set image ds/agent c=a:2").await;
    k.ok("rollout status ds/agent --timeout=30s").await;
    until(&k, "pods -l app=agent", |pods| {
        images(pods) == ["a:2"] && running(pods) == 2
    })
    .await;
    // Cordoning does not matter to it; another taint does.
    k.ok("cordon n2").await;
    k.ok("taint node n3 gpu=yes:NoExecute").await;
    until(&k, "pods -l app=agent", |pods| on(pods) == ["n2"]).await;
    until(&k, "ds", |ds| {
        ds[0]["status"]["desiredNumberScheduled"] == 1 && ds[0]["status"]["numberReady"] == 1
    })
    .await;
}
