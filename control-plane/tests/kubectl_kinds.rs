//! Every kind through the installed kubectl: made by its generators and from files, printed in every form, scaled,
//! explained, changed and deleted.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test stops where it fails"
)]

mod common;
#[path = "common/kubectl.rs"]
mod kubectl;

use kubectl::{Kubectl, described, row};
use serde_json::json;

const OBJECTS: &str = r#"
apiVersion: apps/v1
kind: Deployment
metadata: {name: tomcat, labels: {app: tomcat}}
spec:
  replicas: 0
  selector: {matchLabels: {app: tomcat}}
  template: {metadata: {labels: {app: tomcat}}, spec: {containers: [{name: c, image: "tomcat:9"}]}}
---
apiVersion: apps/v1
kind: ReplicaSet
metadata: {name: rs}
spec:
  replicas: 0
  selector: {matchLabels: {app: rs}}
  template: {metadata: {labels: {app: rs}}, spec: {containers: [{name: c, image: "img:1"}]}}
---
apiVersion: apps/v1
kind: DaemonSet
metadata: {name: agent}
spec:
  selector: {matchLabels: {app: agent}}
  template: {metadata: {labels: {app: agent}}, spec: {nodeSelector: {disk: ssd}, containers: [{name: c, image: "img:1"}]}}
---
apiVersion: v1
kind: ReplicationController
metadata: {name: myweb}
spec:
  replicas: 0
  selector: {app: myweb}
  template: {metadata: {labels: {app: myweb}}, spec: {containers: [{name: c, image: "img:1"}]}}
---
apiVersion: v1
kind: Endpoints
metadata: {name: outside}
subsets: [{addresses: [{ip: 192.0.2.7}], ports: [{port: 80, protocol: TCP}]}]
---
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata: {name: deny}
spec: {podSelector: {matchLabels: {app: a}}}
---
apiVersion: networking.k8s.io/v1
kind: IPAddress
metadata: {name: 10.96.0.77}
spec: {parentRef: {resource: services, namespace: default, name: a}}
---
apiVersion: networking.k8s.io/v1
kind: ServiceCIDR
metadata: {name: more}
spec: {cidrs: [10.200.0.0/16]}
---
apiVersion: coordination.k8s.io/v1
kind: Lease
metadata: {name: lock}
spec: {holderIdentity: me, leaseDurationSeconds: 15}
---
apiVersion: v1
kind: ConfigMap
metadata: {name: cm}
data: {a: b}
---
apiVersion: v1
kind: Secret
metadata: {name: sec}
data: {a: Yg==}
---
apiVersion: v1
kind: ServiceAccount
metadata: {name: robot}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: Role
metadata: {name: reader}
rules: [{apiGroups: [""], resources: [pods], verbs: [get]}]
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata: {name: all-reader}
rules: [{apiGroups: ["*"], resources: ["*"], verbs: [get]}, {nonResourceURLs: ["/metrics"], verbs: [get]}]
---
apiVersion: rbac.authorization.k8s.io/v1
kind: RoleBinding
metadata: {name: readers}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: Role, name: reader}
subjects: [{kind: User, name: ann, apiGroup: rbac.authorization.k8s.io}, {kind: ServiceAccount, name: robot, namespace: default}]
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata: {name: all-readers}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: all-reader}
subjects: [{kind: Group, name: staff, apiGroup: rbac.authorization.k8s.io}]
"#;

/// What `get -o wide` prints for each object: the header, and the line but for its age.
const PRINTED: &[(&str, &str, &str)] = &[
    (
        "deploy/tomcat",
        "NAME READY UP-TO-DATE AVAILABLE AGE CONTAINERS IMAGES SELECTOR",
        "tomcat 0/0 0 0 c tomcat:9 app=tomcat",
    ),
    (
        "rs/rs",
        "NAME DESIRED CURRENT READY AGE CONTAINERS IMAGES SELECTOR",
        "rs 0 0 0 c img:1 app=rs",
    ),
    (
        "ds/agent",
        "NAME DESIRED CURRENT READY UP-TO-DATE AVAILABLE NODE SELECTOR AGE CONTAINERS IMAGES SELECTOR",
        "agent 0 0 0 0 0 disk=ssd c img:1 app=agent",
    ),
    (
        "rc/myweb",
        "NAME DESIRED CURRENT READY AGE CONTAINERS IMAGES SELECTOR",
        "myweb 0 0 0 c img:1 app=myweb",
    ),
    ("ep/outside", "NAME ENDPOINTS AGE", "outside 192.0.2.7:80"),
    ("netpol/deny", "NAME POD-SELECTOR AGE", "deny app=a"),
    (
        "ip/10.96.0.77",
        "NAME PARENTREF AGE",
        "10.96.0.77 services/default/a",
    ),
    ("servicecidr/more", "NAME CIDRS AGE", "more 10.200.0.0/16"),
    ("lease/lock", "NAME HOLDER AGE", "lock me"),
    ("cm/cm", "NAME DATA AGE", "cm 1"),
    ("secret/sec", "NAME TYPE DATA AGE", "sec Opaque 1"),
    ("sa/robot", "NAME SECRETS AGE", "robot 0"),
    ("role/reader", "NAME CREATED AT", "reader"),
    ("clusterrole/all-reader", "NAME CREATED AT", "all-reader"),
    (
        "rolebinding/readers",
        "NAME ROLE AGE USERS GROUPS SERVICEACCOUNTS",
        "readers Role/reader ann default/robot",
    ),
    (
        "clusterrolebinding/all-readers",
        "NAME ROLE AGE USERS GROUPS SERVICEACCOUNTS",
        "all-readers ClusterRole/all-reader staff",
    ),
];

#[tokio::test]
async fn every_kind_is_created_printed_changed_and_deleted() {
    let k = Kubectl::new().await;
    let out = k.feed("create -f -", OBJECTS).await;
    assert_eq!(out.lines().count(), PRINTED.len(), "{out}");
    assert!(out.lines().all(|line| line.ends_with(" created")), "{out}");
    // The client computes what changed from what the server made of it.
    let out = k.run("apply -f -", OBJECTS).await;
    assert!(out.0, "{out:?}");
    let out = k.feed("apply -f -", OBJECTS).await;
    assert!(out.lines().all(|line| line.ends_with(" unchanged")), "{out}");
    let is_age = |word: &str| {
        word.ends_with(['s', 'm']) && word.starts_with(|c: char| c.is_ascii_digit()) || word.ends_with('Z')
    };
    let all = PRINTED.iter().map(async |(object, header, line)| {
        let (_, name) = object.split_once('/').unwrap();
        let out = k.ok(&format!("get {object} -o wide")).await;
        let columns: Vec<&str> = out.lines().next().unwrap().split_whitespace().collect();
        assert_eq!(columns.join(" "), *header);
        let cells: Vec<String> = row(&out, name).into_iter().filter(|word| !is_age(word)).collect();
        assert_eq!(cells.join(" "), *line, "{out}");
        let json = k.json(&format!("get {object}")).await;
        assert_eq!(json["metadata"]["name"], *name);
        let uid = json["metadata"]["uid"].as_str().unwrap();
        let yaml = k.ok(&format!("get {object} -o yaml")).await;
        assert!(yaml.contains(&format!("uid: {uid}")), "{yaml}");
        assert_eq!(
            k.ok(&format!("get {object} -o jsonpath={{.metadata.uid}}")).await,
            uid
        );
        assert_eq!(
            k.ok(&format!("get {object} -o go-template={{{{.metadata.uid}}}}"))
                .await,
            uid
        );
        let columns = k
            .ok(&format!("get {object} -o custom-columns=U:.metadata.uid"))
            .await;
        assert_eq!(columns, format!("U\n{uid}\n"));
        assert!(
            k.ok(&format!("get {object} -o name"))
                .await
                .ends_with(&format!("/{name}\n"))
        );
        // kubectl 1.32 describes these two in their beta versions only, which 1.36 does not serve.
        if !matches!(*header, "NAME PARENTREF AGE" | "NAME CIDRS AGE") {
            assert!(k.ok(&format!("describe {object}")).await.contains(name));
        }
        assert!(
            k.ok(&format!("label {object} tier=web"))
                .await
                .ends_with(" labeled\n")
        );
        assert!(
            k.ok(&format!("annotate {object} note=x"))
                .await
                .ends_with(" annotated\n")
        );
        let patch = r#"{"metadata":{"labels":{"tier":"db"}}}"#;
        for kind in ["strategic", "merge"] {
            k.ok(&format!("patch {object} --type={kind} -p {patch}")).await;
        }
        let json = k.json(&format!("get {object}")).await;
        assert_eq!(
            (
                &json["metadata"]["labels"]["tier"],
                &json["metadata"]["annotations"]["note"]
            ),
            (&json!("db"), &json!("x"))
        );
        let kind = object.split('/').next().unwrap();
        let explained = k.ok(&format!("explain {kind}")).await;
        assert!(
            explained.contains("FIELDS:") && explained.contains("metadata\t<ObjectMeta>"),
            "{explained}"
        );
        assert!(
            k.ok(&format!("delete {object} --dry-run=server"))
                .await
                .contains("(server dry run)")
        );
        k.ok(&format!("get {object}")).await;
        k.ok(&format!("delete {object}")).await;
        let err = k.fails(&format!("get {object}"), "").await;
        assert!(err.contains("(NotFound)"), "{err}");
    });
    futures::future::join_all(all).await;
}

#[tokio::test]
async fn generators_make_what_kubectl_says() {
    let k = Kubectl::new().await;
    assert_eq!(k.ok("create namespace demo").await, "namespace/demo created\n");
    for (arguments, out) in [
        (
            "create deployment web --image=img:1 --replicas=3 --port=80",
            "deployment.apps/web created\n",
        ),
        ("create configmap cm --from-literal=a=b", "configmap/cm created\n"),
        (
            "create secret generic sec --from-literal=a=b",
            "secret/sec created\n",
        ),
        (
            "create secret docker-registry reg --docker-server=r.example --docker-username=u --docker-password=p",
            "secret/reg created\n",
        ),
        ("create serviceaccount robot", "serviceaccount/robot created\n"),
        (
            "create role reader --verb=get,list --resource=pods,services",
            "role.rbac.authorization.k8s.io/reader created\n",
        ),
        (
            "create clusterrole nodes --verb=get --resource=nodes",
            "clusterrole.rbac.authorization.k8s.io/nodes created\n",
        ),
        (
            "create rolebinding readers --role=reader --user=ann --serviceaccount=demo:robot",
            "rolebinding.rbac.authorization.k8s.io/readers created\n",
        ),
        (
            "create clusterrolebinding nodes --clusterrole=nodes --group=staff",
            "clusterrolebinding.rbac.authorization.k8s.io/nodes created\n",
        ),
        ("expose deployment web --port=80", "service/web exposed\n"),
    ] {
        assert_eq!(k.ok(&format!("-n demo {arguments}")).await, out, "{arguments}");
    }
    let web = k.json("-n demo get deploy web").await;
    assert_eq!(web["spec"]["replicas"], 3);
    assert_eq!(
        web["spec"]["template"]["spec"]["containers"][0]["ports"],
        json!([{"containerPort": 80, "protocol": "TCP"}])
    );
    assert_eq!(
        k.json("-n demo get svc web").await["spec"]["selector"],
        json!({"app": "web"})
    );
    assert_eq!(
        k.json("-n demo get role reader").await["rules"],
        json!([{"apiGroups": [""], "resources": ["pods", "services"], "verbs": ["get", "list"]}])
    );
    let out = k.ok("-n demo describe deploy web").await;
    assert_eq!(described(&out, "StrategyType"), "RollingUpdate");
}

#[tokio::test]
async fn replicas_are_scaled() {
    let k = Kubectl::new().await;
    k.feed("create -f -", OBJECTS).await;
    for (object, printed) in [
        ("deploy/tomcat", "deployment.apps/tomcat"),
        ("rs/rs", "replicaset.apps/rs"),
        ("rc/myweb", "replicationcontroller/myweb"),
    ] {
        assert_eq!(
            k.ok(&format!("scale {object} --replicas=5")).await,
            format!("{printed} scaled\n")
        );
        assert_eq!(k.json(&format!("get {object}")).await["spec"]["replicas"], 5);
        let out = k
            .ok(&format!("scale {object} --current-replicas=5 --replicas=0"))
            .await;
        assert_eq!(out, format!("{printed} scaled\n"));
        let err = k
            .fails(&format!("scale {object} --current-replicas=5 --replicas=1"), "")
            .await;
        assert!(err.contains("Expected replicas to be 5, was 0"), "{err}");
        let scale = k.json(&format!("get {object} --subresource=scale")).await;
        assert_eq!((&scale["kind"], &scale["spec"]), (&json!("Scale"), &json!({})));
        let err = k
            .fails(
                &format!(
                    r#"patch {object} --subresource=scale --type=merge -p {{"spec":{{"replicas":-1}}}}"#
                ),
                "",
            )
            .await;
        assert!(err.contains("must be greater than or equal to 0"), "{err}");
    }
}
