//! The installed kubectl as a client, without any flag that makes it less strict.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test stops where it fails"
)]

mod common;
#[path = "common/kubectl.rs"]
mod kubectl;

use common::call;
use kubectl::{Kubectl, described, row};
use serde_json::{Value, json};

const OBJECTS: &str = r#"
apiVersion: v1
kind: Namespace
metadata: {name: demo}
---
apiVersion: v1
kind: Node
metadata: {name: n1, labels: {kubernetes.io/hostname: n1}}
status: {conditions: [{type: Ready, status: "True"}], addresses: [{type: InternalIP, address: 192.0.2.9}]}
---
apiVersion: v1
kind: Service
metadata: {name: myweb, namespace: demo}
spec: {type: NodePort, ports: [{port: 8080, nodePort: 30001}], selector: {app: myweb}}
---
apiVersion: v1
kind: Pod
metadata: {name: p1, namespace: demo, labels: {app: myweb}}
spec: {nodeName: n1, containers: [{name: c, image: "img:1", ports: [{containerPort: 8080}]}]}
"#;

#[tokio::test]
async fn create_get_describe_delete() {
    let k = Kubectl::new().await;
    let out = k.feed("create -f -", OBJECTS).await;
    assert_eq!(
        out,
        "namespace/demo created\nnode/n1 created\nservice/myweb created\npod/p1 created\n"
    );
    let err = k.fails("create -f -", OBJECTS).await;
    assert!(err.contains(r#"pods "p1" already exists"#), "{err}");
    let err = k
        .fails(
            "create -f -",
            &OBJECTS.replace("nodePort: 30001", "nodPort: 30001"),
        )
        .await;
    assert!(
        err.contains(r#"strict decoding error: unknown field "spec.ports[0].nodPort""#),
        "{err}"
    );

    let status = r#"{"status":{"phase":"Running","podIP":"10.244.0.5","podIPs":[{"ip":"10.244.0.5"}],"conditions":[{"type":"Ready","status":"True"}]}}"#;
    k.ok(&format!(
        "-n demo patch pod p1 --subresource=status --type=merge -p {status}"
    ))
    .await;

    let out = k.ok("-n demo get svc -o wide").await;
    let service = row(&out, "myweb");
    assert_eq!(
        row(&out, "NAME").join(" "),
        "NAME TYPE CLUSTER-IP EXTERNAL-IP PORT(S) AGE SELECTOR"
    );
    assert_eq!(
        (&service[1][..], &service[4][..], &service[6][..]),
        ("NodePort", "8080:30001/TCP", "app=myweb")
    );
    assert!(service[2].starts_with("10."));
    let pod = row(&k.ok("-n demo get pods -o wide").await, "p1");
    assert_eq!(
        (&pod[2][..], &pod[5][..], &pod[6][..]),
        ("Running", "10.244.0.5", "n1")
    );
    let node = row(&k.ok("get nodes -o wide").await, "n1");
    assert_eq!(
        (&node[1][..], &node[2][..], &node[4][..]),
        ("Ready", "<none>", "192.0.2.9")
    );
    let all = k.ok("get all -A").await;
    for line in [
        "demo        pod/p1",
        "default     service/kubernetes",
        "demo        service/myweb",
    ] {
        assert!(all.contains(line), "{line} in\n{all}");
    }
    let yaml = k.ok("-n demo get svc myweb -o yaml").await;
    assert!(
        yaml.starts_with("apiVersion: v1\nkind: Service\n") && yaml.contains("nodePort: 30001"),
        "{yaml}"
    );
    assert_eq!(
        k.json("-n demo get svc myweb").await["spec"]["clusterIP"],
        service[2].as_str()
    );
    let err = k.fails("-n demo get svc nope", "").await;
    assert_eq!(err, "Error from server (NotFound): services \"nope\" not found\n");
    assert_eq!(row(&k.ok("get ns").await, "demo")[1], "Active");
    assert_eq!(
        k.ok("get pods -A --field-selector=spec.nodeName=n1 -o name")
            .await,
        "pod/p1\n"
    );
    assert_eq!(
        k.ok("get svc -A --chunk-size=1 -o name").await,
        "service/kubernetes\nservice/myweb\n"
    );

    let out = k.ok("-n demo describe svc myweb").await;
    assert_eq!(described(&out, "NodePort"), "<unset>  30001/TCP");
    assert_eq!(described(&out, "Selector"), "app=myweb");
    let out = k.ok("-n demo describe pod p1").await;
    assert_eq!(
        (described(&out, "IP"), described(&out, "Status")),
        ("10.244.0.5", "Running")
    );
    let out = k.ok("describe node n1").await;
    assert_eq!(described(&out, "InternalIP"), "192.0.2.9");
    assert!(out.contains("demo                        p1"), "{out}");

    assert_eq!(k.ok("-n demo delete pod p1").await, "pod \"p1\" deleted\n");
    assert_eq!(
        k.ok("delete node n1 --dry-run=server").await,
        "node \"n1\" deleted (server dry run)\n"
    );
    assert_eq!(k.ok("delete node n1").await, "node \"n1\" deleted\n");
    // Waits until the namespace and what is in it are gone.
    assert_eq!(k.ok("delete ns demo").await, "namespace \"demo\" deleted\n");
    assert_eq!(k.ok("get svc -A -o name").await, "service/kubernetes\n");
    let err = k.fails("delete ns default", "").await;
    assert!(err.contains("this namespace may not be deleted"), "{err}");
}

#[tokio::test]
async fn apply_patch_label_annotate() {
    let k = Kubectl::new().await;
    let applied = k.feed("apply -f -", OBJECTS).await;
    assert_eq!(
        applied,
        "namespace/demo created\nnode/n1 created\nservice/myweb created\npod/p1 created\n"
    );
    let again = k.feed("apply -f -", OBJECTS).await;
    assert_eq!(
        again,
        "namespace/demo unchanged\nnode/n1 unchanged\nservice/myweb unchanged\npod/p1 unchanged\n"
    );
    let changed = OBJECTS.replace("port: 8080, nodePort: 30001", "port: 8081, nodePort: 30001");
    let out = k.feed("apply -f -", &changed).await;
    assert_eq!(
        out,
        "namespace/demo unchanged\nnode/n1 unchanged\nservice/myweb configured\npod/p1 unchanged\n"
    );
    let ports = k.json("-n demo get svc myweb").await["spec"]["ports"].clone();
    assert_eq!(
        ports,
        json!([{"nodePort": 30001, "port": 8081, "protocol": "TCP", "targetPort": 8081}])
    );

    let strategic = r#"{"spec":{"ports":[{"port":8081,"name":"a"},{"port":9090,"name":"b"}]}}"#;
    assert_eq!(
        k.ok(&format!("-n demo patch svc myweb -p {strategic}")).await,
        "service/myweb patched\n"
    );
    let merge = r#"{"spec":{"selector":{"tier":"web"}}}"#;
    assert_eq!(
        k.ok(&format!("-n demo patch svc myweb --type=merge -p {merge}"))
            .await,
        "service/myweb patched\n"
    );
    let json_patch = r#"[{"op":"replace","path":"/spec/ports/1/port","value":9091}]"#;
    assert_eq!(
        k.ok(&format!("-n demo patch svc myweb --type=json -p {json_patch}"))
            .await,
        "service/myweb patched\n"
    );
    let service = k.json("-n demo get svc myweb").await;
    assert_eq!(
        service["spec"]["selector"],
        json!({"app": "myweb", "tier": "web"})
    );
    let names: Vec<&Value> = service["spec"]["ports"]
        .as_array()
        .unwrap()
        .iter()
        .map(|port| &port["name"])
        .collect();
    assert_eq!(names, ["a", "b"]);
    assert!(service["spec"]["ports"].to_string().contains("9091"));
    let err = k
        .fails(
            r#"-n demo patch svc myweb -p {"spec":{"clusterIP":"10.96.7.7"}}"#,
            "",
        )
        .await;
    assert!(err.contains("may not change once set"), "{err}");

    assert_eq!(
        k.ok("-n demo label svc myweb tier=web").await,
        "service/myweb labeled\n"
    );
    assert_eq!(
        k.ok("-n demo get svc -l tier=web -o name").await,
        "service/myweb\n"
    );
    assert_eq!(
        k.ok("-n demo label svc myweb tier-").await,
        "service/myweb unlabeled\n"
    );
    let (_, out, err) = k.run("-n demo get svc -l tier=web", "").await;
    assert_eq!(
        (&out[..], &err[..]),
        ("", "No resources found in demo namespace.\n")
    );
    assert_eq!(
        k.ok("-n demo annotate svc myweb note=x").await,
        "service/myweb annotated\n"
    );
    assert_eq!(
        k.json("-n demo get svc myweb").await["metadata"]["annotations"]["note"],
        "x"
    );

    let server_side = "-n demo apply --server-side -f -";
    let map = r#"{"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "c"}, "data": {"a": "b"}}"#;
    assert_eq!(k.feed(server_side, map).await, "configmap/c serverside-applied\n");
    assert_eq!(
        k.feed(server_side, &map.replace(r#""b""#, r#""c""#)).await,
        "configmap/c serverside-applied\n"
    );
    assert_eq!(k.json("-n demo get cm c").await["data"], json!({"a": "c"}));
    assert_eq!(k.ok("cordon n1").await, "node/n1 cordoned\n");
    assert!(row(&k.ok("get nodes").await, "n1")[1].contains("SchedulingDisabled"));
}

#[tokio::test]
async fn explain_and_discovery() {
    let k = Kubectl::new().await;
    let out = k.ok("explain service.spec.clusterIP").await;
    assert!(out.contains("FIELD: clusterIP <string>"), "{out}");
    let out = k.ok("explain endpointslice.endpoints.conditions").await;
    assert!(out.contains("ready\t<boolean>"), "{out}");
    let out = k.ok("api-resources").await;
    assert_eq!(
        row(&out, "services"),
        ["services", "svc", "v1", "true", "Service"]
    );
    assert_eq!(
        row(&out, "endpointslices"),
        ["endpointslices", "discovery.k8s.io/v1", "true", "EndpointSlice"]
    );
    assert_eq!(row(&out, "nodes"), ["nodes", "no", "v1", "false", "Node"]);
    assert!(k.ok("api-versions").await.contains("discovery.k8s.io/v1\n"));
    assert_eq!(k.ok("auth can-i create pods").await, "yes\n");
    assert_eq!(k.ok("get --raw /readyz").await, "ok");
}

#[tokio::test]
async fn get_follows_changes() {
    let k = Kubectl::new().await;
    k.feed("create -f -", OBJECTS).await;
    let mut watched = k.watch("-n demo get svc -w");
    assert_eq!(watched.line().await[0], "NAME");
    let first = watched.line().await;
    assert_eq!((&first[0][..], &first[4][..]), ("myweb", "8080:30001/TCP"));
    let mut labelled = k.watch("-n demo get svc -l tier=web -w --output-watch-events=true");
    k.ok(r#"-n demo patch svc myweb -p {"spec":{"ports":[{"port":8080,"nodePort":30002}]}}"#)
        .await;
    assert_eq!(watched.line().await[4], "8080:30002/TCP");
    k.ok("-n demo label svc myweb tier=web").await;
    assert_eq!(labelled.line().await[..2], ["EVENT", "NAME"]);
    assert_eq!(labelled.line().await[..2], ["ADDED", "myweb"]);
    k.ok("-n demo label svc myweb tier-").await;
    assert_eq!(labelled.line().await[..2], ["DELETED", "myweb"]);
}

/// kubectl sends these as protobuf.
#[tokio::test]
async fn objects_made_from_arguments() {
    let k = Kubectl::new().await;
    assert_eq!(k.ok("create ns demo").await, "namespace/demo created\n");
    assert_eq!(
        k.ok("-n demo create service clusterip s1 --tcp=80:8080").await,
        "service/s1 created\n"
    );
    assert_eq!(
        k.ok("-n demo create service nodeport s2 --tcp=81 --node-port=30007")
            .await,
        "service/s2 created\n"
    );
    assert_eq!(
        k.ok("-n demo create configmap c --from-literal=a=b").await,
        "configmap/c created\n"
    );
    assert_eq!(
        k.ok("-n demo create secret generic s --from-literal=a=b").await,
        "secret/s created\n"
    );
    let services = k.json("-n demo get svc").await;
    let port = |index: usize| services["items"][index]["spec"]["ports"][0].clone();
    assert_eq!(
        port(0),
        json!({"name": "80-8080", "port": 80, "protocol": "TCP", "targetPort": 8080})
    );
    assert_eq!(port(1)["nodePort"], 30007);
    assert_eq!(services["items"][0]["spec"]["selector"], json!({"app": "s1"}));
    assert_eq!(k.json("-n demo get cm c").await["data"], json!({"a": "b"}));
    assert_eq!(k.json("-n demo get secret s").await["data"], json!({"a": "Yg=="}));
    let err = k.fails("create ns demo", "").await;
    assert!(err.contains("already exists"), "{err}");
    assert_eq!(k.ok("-n demo run p --image=i --port=80").await, "pod/p created\n");
    assert_eq!(k.ok("-n demo expose pod p").await, "service/p exposed\n");
    assert_eq!(k.ok("-n demo delete pod,svc --all").await.lines().count(), 4);
}

/// Things that kubectl does that are not about one object.
#[tokio::test]
async fn finalizers_hold_objects_and_namespaces() {
    let k = Kubectl::new().await;
    k.feed("create -f -", OBJECTS).await;
    let client = k.server.client().await;
    k.ok(r#"-n demo patch svc myweb --type=merge -p {"metadata":{"finalizers":["example.com/hold"]}}"#)
        .await;
    k.ok("-n demo delete svc myweb --wait=false").await;
    k.ok("delete ns demo --wait=false").await;
    let mut waiting = k
        .command("wait --for=delete ns/demo --timeout=20s")
        .spawn()
        .unwrap();
    let held = k.json("-n demo get svc myweb").await;
    assert!(held["metadata"]["deletionTimestamp"].is_string());
    assert_eq!(row(&k.ok("get ns").await, "demo")[1], "Terminating");
    let pod = json!({
        "apiVersion": "v1", "kind": "Pod", "metadata": {"name": "late"},
        "spec": {"containers": [{"name": "c", "image": "i"}]},
    });
    let (code, refused) = call(&client, "POST", "/api/v1/namespaces/demo/pods", &pod).await;
    assert_eq!(code, 403, "{refused}");
    assert!(
        refused["message"]
            .as_str()
            .unwrap()
            .contains("because it is being terminated"),
        "{refused}"
    );
    k.ok(r#"-n demo patch svc myweb --type=merge -p {"metadata":{"finalizers":null}}"#)
        .await;
    assert!(waiting.wait().await.unwrap().success());
    let (code, _) = call(
        &client,
        "GET",
        "/api/v1/namespaces/demo/services/myweb",
        &Value::Null,
    )
    .await;
    assert_eq!(code, 404);
}
