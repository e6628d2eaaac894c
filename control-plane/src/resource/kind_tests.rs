//! Defaults and validation of the kinds that have no recordings of their own.

use rstest::rstest;
use serde_json::{Value, json};

use super::*;

fn create(kind: &str, object: Value) -> Result<Value, ApiError> {
    let r = RESOURCES.iter().find(|r| r.kind == kind).unwrap();
    let namespace = json!({"metadata": {"name": "demo"}, "status": {"phase": "Active"}});
    let mut alloc = Allocator::new(Vec::new(), 30000..=32767);
    let mut warnings = Vec::new();
    let mut ctx = Ctx {
        now: "2026-11-21T01:25:30Z".into(),
        uid: "u".into(),
        namespace_state: r.namespaced.then_some(&namespace),
        alloc: &mut alloc,
        field_validation: FieldValidation::Strict,
        warnings: &mut warnings,
        ownership: &Ownership::Keep,
    };
    let mut object = object;
    if object["metadata"]["name"].is_null() {
        object["metadata"]["name"] = "x".into();
    }
    prepare_create(r, &mut ctx, &mut object)?;
    Ok(object)
}

fn update(kind: &str, old: &Value, mut new: Value) -> Result<Value, ApiError> {
    let r = RESOURCES.iter().find(|r| r.kind == kind).unwrap();
    let mut alloc = Allocator::new(Vec::new(), 30000..=32767);
    let mut warnings = Vec::new();
    let mut ctx = Ctx {
        now: String::new(),
        uid: String::new(),
        namespace_state: None,
        alloc: &mut alloc,
        field_validation: FieldValidation::Strict,
        warnings: &mut warnings,
        ownership: &Ownership::Keep,
    };
    prepare_update(r, &mut ctx, old, &mut new, None)?;
    Ok(new)
}

fn fields(error: &ApiError) -> Vec<String> {
    let causes = error.details.as_ref().and_then(|d| d["causes"].as_array());
    causes
        .into_iter()
        .flatten()
        .map(|c| c["field"].as_str().unwrap().to_owned())
        .collect()
}

fn template() -> Value {
    json!({"metadata": {"labels": {"app": "a"}}, "spec": {"containers": [{"name": "c", "image": "i:1"}]}})
}

fn workload(extra: &Value) -> Value {
    let mut spec = json!({"selector": {"matchLabels": {"app": "a"}}, "template": template()});
    json_patch::merge(&mut spec, extra);
    json!({"spec": spec})
}

#[rstest]
#[case("Deployment", workload(&json!({"selector": null})), &["spec.selector"])]
#[case("Deployment", workload(&json!({"selector": {"matchLabels": null}})), &["spec.selector"])]
#[case("Deployment", workload(&json!({"template": null})), &["spec.template"])]
#[case("Deployment", workload(&json!({"replicas": -1})), &["spec.replicas"])]
#[case("Deployment", workload(&json!({"selector": {"matchLabels": {"app": "b"}}})), &["spec.template.metadata.labels"])]
#[case("Deployment", workload(&json!({"strategy": {"type": "Slow"}})), &["spec.strategy"])]
#[case(
    "Deployment",
    workload(&json!({"strategy": {"type": "Recreate", "rollingUpdate": {"maxSurge": 1}}})),
    &["spec.strategy.rollingUpdate"]
)]
#[case(
    "Deployment",
    workload(&json!({"strategy": {"rollingUpdate": {"maxSurge": 0, "maxUnavailable": "0%"}}})),
    &["spec.strategy.rollingUpdate.maxUnavailable"]
)]
#[case(
    "Deployment",
    workload(&json!({"strategy": {"rollingUpdate": {"maxSurge": "x", "maxUnavailable": "101%"}}})),
    &["spec.strategy.rollingUpdate.maxUnavailable", "spec.strategy.rollingUpdate.maxSurge"]
)]
#[case(
    "Deployment",
    workload(&json!({"minReadySeconds": 5, "progressDeadlineSeconds": 5})),
    &["spec.progressDeadlineSeconds"]
)]
#[case(
    "ReplicaSet",
    workload(&json!({"template": {"spec": {"restartPolicy": "Never"}}})),
    &["spec.template.spec.restartPolicy"]
)]
#[case(
    "ReplicaSet",
    workload(&json!({"selector": {"matchExpressions": [
        {"key": "app", "operator": "In"}, {"key": "-", "operator": "Exists", "values": ["x"]}, {"key": "c", "operator": "Is"}
    ]}})),
    &[
        "spec.selector.matchExpressions[0].values",
        "spec.selector.matchExpressions[1].values",
        "spec.selector.matchExpressions[1].key",
        "spec.selector.matchExpressions[2].operator",
        "spec.template.metadata.labels"
    ]
)]
#[case("DaemonSet", workload(&json!({"updateStrategy": {"type": "Recreate"}})), &["spec.updateStrategy"])]
#[case("DaemonSet", workload(&json!({"template": {"spec": {"containers": []}}})), &["spec.template.spec.containers"])]
#[case("ReplicationController", json!({"spec": {"template": template(), "selector": {"app": "b"}}}), &["spec.template.metadata.labels"])]
#[case("ConfigMap", json!({"data": {"a b": "", "..": ""}}), &["data[..]", "data[a b]"])]
#[case("ConfigMap", json!({"data": {"k": "v"}, "binaryData": {"k": "AA=="}}), &["binaryData[k]"])]
#[case("ConfigMap", json!({"data": {"k": "x".repeat(1024 * 1024 + 1)}}), &[""])]
#[case("Secret", json!({"type": "kubernetes.io/tls", "data": {"tls.crt": "AA=="}}), &["data[tls.key]"])]
#[case("Secret", json!({"type": "kubernetes.io/service-account-token"}), &["metadata.annotations[kubernetes.io/service-account.name]"])]
#[case("Lease", json!({"spec": {"leaseDurationSeconds": 0, "leaseTransitions": -1}}), &["spec.leaseDurationSeconds", "spec.leaseTransitions"])]
#[case("NetworkPolicy", json!({"spec": {"policyTypes": ["Both"]}}), &["spec.policyTypes[0]"])]
#[case(
    "NetworkPolicy",
    json!({"spec": {"ingress": [{"from": [{}, {"podSelector": {}, "ipBlock": {"cidr": "10.0.0.0/8"}}], "ports": [
        {"port": 90, "endPort": 80}, {"endPort": 1}, {"port": "http", "endPort": 1}, {"protocol": "ICMP"}
    ]}]}}),
    &[
        "spec.ingress[0].ports[0].endPort",
        "spec.ingress[0].ports[1].port",
        "spec.ingress[0].ports[2].endPort",
        "spec.ingress[0].ports[3].protocol",
        "spec.ingress[0].from[0]",
        "spec.ingress[0].from[1]"
    ]
)]
#[case(
    "NetworkPolicy",
    json!({"spec": {"egress": [{"to": [
        {"ipBlock": {"cidr": "x"}}, {"ipBlock": {"cidr": "10.0.0.0/8", "except": ["11.0.0.0/16", "10.0.0.0/8", "10.1.0.0/16"]}}
    ]}]}}),
    &[
        "spec.egress[0].to[0].ipBlock.cidr",
        "spec.egress[0].to[1].ipBlock.except[0]",
        "spec.egress[0].to[1].ipBlock.except[1]"
    ]
)]
#[case("ServiceCIDR", json!({"spec": {"cidrs": ["10.0.0.0/8", "11.0.0.0/8"]}}), &["spec.cidrs"])]
#[case("ServiceCIDR", json!({"spec": {"cidrs": ["10.0.0.1/8"]}}), &["spec.cidrs[0]"])]
#[case("IPAddress", json!({"spec": {"parentRef": {"resource": "services", "name": "a"}}}), &["metadata.name"])]
#[case("IPAddress", json!({"metadata": {"name": "10.0.0.1"}, "spec": {"parentRef": {"resource": "services"}}}), &["spec.parentRef.name"])]
#[case(
    "Endpoints",
    json!({"subsets": [{"addresses": [{"ip": "127.0.0.1"}, {"ip": "x"}], "ports": [{"port": 0}, {"name": "a", "port": 1}]}, {}]}),
    &["subsets[0].addresses[0].ip", "subsets[0].addresses[1].ip", "subsets[0].ports[0].name", "subsets[0].ports[0].port", "subsets[1]"]
)]
#[case("Role", json!({"rules": [{"verbs": ["get"], "nonResourceURLs": ["/x"]}, {}]}), &[
    "rules[0].nonResourceURLs", "rules[1].verbs", "rules[1].apiGroups", "rules[1].resources"
])]
#[case("ClusterRole", json!({"metadata": {"name": "a/b"}}), &["metadata.name"])]
#[case("ClusterRoleBinding", json!({"roleRef": {"kind": "Role", "name": "r"}}), &["roleRef.kind"])]
#[case(
    "RoleBinding",
    json!({"roleRef": {"kind": "Role", "name": ""}, "subjects": [{"kind": "Robot", "name": "r"}, {"kind": "User", "name": "", "apiGroup": "x"}]}),
    &["roleRef.name", "subjects[0].kind", "subjects[1].name", "subjects[1].apiGroup"]
)]
fn what_is_wrong_is_named(#[case] kind: &str, #[case] object: Value, #[case] expected: &[&str]) {
    let error = create(kind, object).unwrap_err();
    assert_eq!(error.code, 422, "{error}");
    assert_eq!(fields(&error), expected, "{error}");
}

#[rstest]
#[case("DaemonSet", workload(&json!({})), "/spec/updateStrategy", json!({"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 0, "maxUnavailable": 1}}))]
#[case("DaemonSet", workload(&json!({})), "/status/desiredNumberScheduled", json!(0))]
#[case("ReplicaSet", workload(&json!({})), "/spec/replicas", json!(1))]
#[case("ReplicaSet", workload(&json!({})), "/status", json!({"replicas": 0}))]
#[case("Deployment", workload(&json!({"strategy": {"type": "Recreate"}})), "/spec/strategy", json!({"type": "Recreate"}))]
#[case("NetworkPolicy", json!({"spec": {"egress": [{"ports": [{"port": 1}]}]}}), "/spec/policyTypes", json!(["Ingress", "Egress"]))]
#[case("NetworkPolicy", json!({"spec": {"egress": [{"ports": [{"port": 1}]}]}}), "/spec/egress/0/ports/0/protocol", json!("TCP"))]
#[case("NetworkPolicy", json!({}), "/spec", json!({"podSelector": {}, "policyTypes": ["Ingress"]}))]
#[case("Secret", json!({"data": {"a": "AA=="}, "stringData": {"b": "x"}}), "/data", json!({"a": "AA==", "b": "eA=="}))]
#[case("ClusterRole", json!({"metadata": {"name": "system:node"}}), "/rules", Value::Null)]
#[case(
    "RoleBinding",
    json!({"roleRef": {"kind": "Role", "name": "r"}, "subjects": [{"kind": "User", "name": "u"}]}),
    "/subjects/0/apiGroup",
    json!("rbac.authorization.k8s.io")
)]
#[case("IPAddress", json!({"metadata": {"name": "2001:db8::1"}, "spec": {"parentRef": {"resource": "services", "name": "a"}}}), "/metadata/name", json!("2001:db8::1"))]
fn what_is_left_out_is_completed(
    #[case] kind: &str,
    #[case] object: Value,
    #[case] place: &str,
    #[case] expected: Value,
) {
    let created = create(kind, object).unwrap();
    assert_eq!(created.pointer(place), Some(&expected), "{created}");
    // What the server made of it is valid, and stays as it is.
    let again = update(kind, &created, created.clone()).unwrap();
    assert_eq!(again, created);
}

#[rstest]
#[case("Deployment", workload(&json!({})), "/spec/selector/matchLabels/x", json!("y"), &["spec.selector", "spec.template.metadata.labels"])]
#[case("Secret", json!({}), "/type", json!("other"), &["type"])]
#[case("Secret", json!({"immutable": true, "data": {"a": "AA=="}}), "/data/a", json!("AQ=="), &["data"])]
#[case("ConfigMap", json!({"immutable": true}), "/immutable", json!(false), &["immutable"])]
#[case("ServiceCIDR", json!({"spec": {"cidrs": ["10.0.0.0/8"]}}), "/spec/cidrs/0", json!("11.0.0.0/8"), &["spec.cidrs"])]
#[case("RoleBinding", json!({"roleRef": {"kind": "Role", "name": "r"}}), "/roleRef/name", json!("s"), &["roleRef"])]
#[case(
    "IPAddress",
    json!({"metadata": {"name": "10.0.0.1"}, "spec": {"parentRef": {"resource": "services", "name": "a"}}}),
    "/spec/parentRef/name",
    json!("b"),
    &["spec.parentRef"]
)]
fn what_may_not_change_is_named(
    #[case] kind: &str,
    #[case] object: Value,
    #[case] place: &str,
    #[case] value: Value,
    #[case] expected: &[&str],
) {
    let created = create(kind, object).unwrap();
    let mut changed = created.clone();
    let (parent, field) = place.rsplit_once('/').unwrap();
    match changed.pointer_mut(parent).unwrap() {
        Value::Array(list) => list[field.parse::<usize>().unwrap()] = value,
        other => other[field] = value,
    }
    let error = update(kind, &created, changed).unwrap_err();
    let mut found = fields(&error);
    found.sort();
    assert_eq!(found, expected, "{error}");
}

#[test]
fn a_change_of_the_specification_counts_as_a_generation() {
    let created = create("Deployment", workload(&json!({}))).unwrap();
    assert_eq!(created["metadata"]["generation"], 1);
    let mut changed = created.clone();
    changed["spec"]["replicas"] = 3.into();
    assert_eq!(
        update("Deployment", &created, changed).unwrap()["metadata"]["generation"],
        2
    );
    let mut labelled = created.clone();
    labelled["metadata"]["labels"] = json!({"a": "b"});
    assert_eq!(
        update("Deployment", &created, labelled).unwrap()["metadata"]["generation"],
        1
    );
}
