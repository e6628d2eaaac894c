//! The recorded answers of a kube-apiserver as oracle.

use serde_json::{Value, json};

use super::*;

fn fixture(name: &str) -> Value {
    let path = format!(
        "{}/tests/fixtures/apiserver-1.36/{name}.json",
        env!("CARGO_MANIFEST_DIR")
    );
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

/// Without what differs from run to run or is not tracked.
fn comparable(mut object: Value) -> Value {
    let meta = object["metadata"].as_object_mut().unwrap();
    for field in ["managedFields", "uid", "resourceVersion", "creationTimestamp"] {
        meta.remove(field);
    }
    object
}

fn resource(kind: &str) -> &'static ResourceInfo {
    RESOURCES.iter().find(|r| r.kind == kind).unwrap()
}

struct Server {
    alloc: Allocator,
    namespace: Value,
    validation: FieldValidation,
    warnings: Vec<String>,
}

impl Server {
    fn new() -> Self {
        Self::with_cidrs(&["10.96.0.0/12"])
    }

    fn with_cidrs(cidrs: &[&str]) -> Self {
        Self {
            alloc: Allocator::new(cidrs.iter().map(|c| c.parse().unwrap()).collect(), 30000..=32767),
            namespace: json!({"metadata": {"name": "demo"}, "status": {"phase": "Active"}}),
            validation: FieldValidation::Warn,
            warnings: Vec::new(),
        }
    }

    fn transaction<T>(&mut self, f: impl FnOnce(&mut Ctx<'_>) -> Result<T, ApiError>) -> Result<T, ApiError> {
        self.alloc.begin();
        let mut ctx = Ctx {
            now: "2026-11-21T01:25:30Z".into(),
            uid: "6584a94b-7b63-4f41-9944-1a68c919fcc2".into(),
            namespace_state: Some(&self.namespace),
            alloc: &mut self.alloc,
            field_validation: self.validation,
            warnings: &mut self.warnings,
        };
        let result = f(&mut ctx);
        if result.is_ok() {
            self.alloc.commit();
        } else {
            self.alloc.rollback();
        }
        result
    }

    fn create(&mut self, kind: &str, object: &Value) -> Result<Value, ApiError> {
        let mut object = object.clone();
        self.transaction(|ctx| prepare_create(resource(kind), ctx, &mut object).map(|()| object))
    }

    fn update(&mut self, kind: &str, old: &Value, new: &Value, sub: Option<&str>) -> Result<Value, ApiError> {
        let mut new = new.clone();
        self.transaction(|ctx| prepare_update(resource(kind), ctx, old, &mut new, sub).map(|()| new))
    }

    fn service(&mut self, spec: Value) -> Result<Value, ApiError> {
        self.create("Service", &json!({"metadata": {"name": "s"}, "spec": spec}))
    }
}

/// Recorded creations. Values that the server draws are given to ours in the request.
#[test]
fn creations_answer_as_recorded() {
    for (name, kind) in [
        ("namespace-create", "Namespace"),
        ("node-create", "Node"),
        ("pod-create", "Pod"),
        ("rc-create", "ReplicationController"),
        ("endpointslice-create", "EndpointSlice"),
        ("service-create-nodeport", "Service"),
        ("service-create-headless", "Service"),
        ("service-create-affinity-lb", "Service"),
        ("service-create-unknown-field-warn", "Service"),
        ("service-apply-ssa", "Service"),
    ] {
        let f = fixture(name);
        let expected = &f["response"]["body"];
        let mut server = Server::new();
        let created = server.create(kind, &f["request"]["body"]).unwrap();
        let mut created = comparable(created);
        let expected = comparable(expected.clone());
        if kind == "Service" {
            let given = &f["request"]["body"]["spec"];
            if given["clusterIP"] != "None" {
                let ip: std::net::Ipv4Addr = created["spec"]["clusterIP"].as_str().unwrap().parse().unwrap();
                assert!("10.96.0.0/12".parse::<ipnet::Ipv4Net>().unwrap().contains(&ip));
                assert_eq!(created["spec"]["clusterIPs"], json!([ip.to_string()]));
                for field in ["clusterIP", "clusterIPs"] {
                    created["spec"][field] = expected["spec"][field].clone();
                }
            }
            for field in ["healthCheckNodePort"] {
                if let Some(port) = created["spec"].get(field).cloned() {
                    assert!((30000..32768).contains(&port.as_i64().unwrap()));
                    created["spec"][field] = expected["spec"][field].clone();
                }
            }
            if name == "service-create-affinity-lb" {
                let port = created["spec"]["ports"][0]["nodePort"].as_i64().unwrap();
                assert!((30000..32768).contains(&port));
                created["spec"]["ports"] = expected["spec"]["ports"].clone();
            }
        }
        if name == "service-create-unknown-field-warn" {
            assert_eq!(server.warnings, [r#"unknown field "spec.portz""#]);
        }
        assert_eq!(created, expected, "{name}");
    }
}

#[test]
fn refused_creations_answer_as_recorded() {
    let mut server = Server::new();
    let first = fixture("service-create-nodeport");
    server.create("Service", &first["request"]["body"]).unwrap();
    for name in [
        "service-create-bad-name",
        "service-create-conflict",
        "service-create-nodeport-taken",
        "service-create-nodeport-out-of-range",
        "service-create-invalid-empty-ports",
        "service-create-unknown-field-strict",
    ] {
        let f = fixture(name);
        server.validation = if name.ends_with("strict") {
            FieldValidation::Strict
        } else {
            FieldValidation::Warn
        };
        let error = server.create("Service", &f["request"]["body"]).unwrap_err();
        assert_eq!(error.status(), f["response"]["body"], "{name}");
        assert_eq!(u64::from(error.code), f["response"]["status"].as_u64().unwrap());
    }
}

#[test]
fn updates_answer_as_recorded() {
    let mut server = Server::new();
    let old = fixture("service-get-2")["response"]["body"].clone();
    server.alloc.adopt(&old);
    for (name,) in [
        ("service-put-conflict-stale-rv",),
        ("service-put-immutable-clusterip",),
    ] {
        let f = fixture(name);
        let error = server
            .update("Service", &old, &f["request"]["body"], None)
            .unwrap_err();
        assert_eq!(error.status(), f["response"]["body"], "{name}");
    }
    let f = fixture("service-status-patch");
    let after = f["response"]["body"].clone();
    let mut before = after.clone();
    before["status"] = json!({"loadBalancer": {}});
    let mut patched = before.clone();
    patched["status"] = f["request"]["body"]["status"].clone();
    patched["spec"]["type"] = "NodePort".into();
    let updated = server
        .update("Service", &before, &patched, Some("status"))
        .unwrap();
    assert_eq!(comparable(updated), comparable(after));
}

#[test]
fn pod_and_node_status_answer_as_recorded() {
    let mut server = Server::new();
    for (name, kind, create) in [
        ("pod-status-patch", "Pod", "pod-create"),
        ("node-status-patch-strategic", "Node", "node-create"),
    ] {
        let f = fixture(name);
        let mut before = fixture(create)["response"]["body"].clone();
        before["metadata"] = f["response"]["body"]["metadata"].clone();
        // The recorded cluster has a scheduler.
        before["spec"] = f["response"]["body"]["spec"].clone();
        let mut patched = before.clone();
        for (key, value) in f["request"]["body"]["status"].as_object().unwrap() {
            patched["status"][key] = value.clone();
        }
        let updated = server.update(kind, &before, &patched, Some("status")).unwrap();
        let mut expected = comparable(f["response"]["body"].clone());
        if kind == "Pod" {
            // Conditions that the recorded cluster's scheduler and ours did not write.
            let ready: Vec<Value> = expected["status"]["conditions"]
                .as_array()
                .unwrap()
                .iter()
                .filter(|c| c["type"] == "Ready")
                .cloned()
                .collect();
            expected["status"]["conditions"] = ready.into();
        }
        assert_eq!(comparable(updated), expected, "{name}");
    }
}

#[test]
fn binding_answers_as_recorded() {
    let f = fixture("pod-binding");
    let mut pod = fixture("pod-create")["response"]["body"].clone();
    let body = &f["request"]["body"];
    let bound = bind(resource("Pod"), &pod, body, "2026-11-21T01:25:31Z").unwrap();
    assert_eq!(bound["spec"]["nodeName"], "rec1");
    assert_eq!(bound["status"]["conditions"][0]["type"], "PodScheduled");
    pod["spec"]["nodeName"] = "node-1".into();
    let error = bind(resource("Pod"), &pod, body, "").unwrap_err();
    assert_eq!(error.status(), f["response"]["body"]);
}
