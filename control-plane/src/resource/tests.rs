//! The recorded answers of a kube-apiserver as oracle.

use proptest::prelude::*;
use rstest::rstest;
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
            ownership: &Ownership::Keep,
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

    fn service(&mut self, spec: impl Into<Value>) -> Result<Value, ApiError> {
        let spec = spec.into();
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

/// The causes of an error as `field: message`.
fn causes(error: &ApiError) -> Vec<String> {
    let list = error
        .details
        .as_ref()
        .map(|d| d["causes"].clone())
        .unwrap_or_default();
    list.as_array()
        .into_iter()
        .flatten()
        .map(|c| {
            format!(
                "{}: {}",
                c["field"].as_str().unwrap(),
                c["message"].as_str().unwrap()
            )
        })
        .collect()
}

#[rstest]
#[case::port_zero(json!({"ports": [{"port": 0}]}), &["spec.ports[0].port: Invalid value: 0: must be between 1 and 65535, inclusive", "spec.ports[0].targetPort: Invalid value: 0: must be between 1 and 65535, inclusive"])]
#[case::port_too_big(json!({"ports": [{"port": 65536, "targetPort": 1}]}), &["spec.ports[0].port: Invalid value: 65536: must be between 1 and 65535, inclusive"])]
#[case::bad_protocol(json!({"ports": [{"port": 1, "protocol": "ICMP"}]}), &[r#"spec.ports[0].protocol: Unsupported value: "ICMP": supported values: "SCTP", "TCP", "UDP""#])]
#[case::no_names(json!({"ports": [{"port": 1}, {"port": 2}]}), &["spec.ports[0].name: Required value", "spec.ports[1].name: Required value"])]
#[case::same_names(json!({"ports": [{"name": "a", "port": 1}, {"name": "a", "port": 2}]}), &[r#"spec.ports[1].name: Duplicate value: "a""#])]
#[case::same_ports(json!({"ports": [{"name": "a", "port": 1}, {"name": "b", "port": 1}]}), &[r#"spec.ports[1]: Duplicate value: {"port":1,"protocol":"TCP","targetPort":0}"#])]
#[case::bad_name(json!({"ports": [{"name": "A", "port": 1}]}), &["spec.ports[0].name: Invalid value: \"A\": a lowercase RFC 1123 label must consist"])]
#[case::bad_target(json!({"ports": [{"port": 1, "targetPort": "_"}]}), &["spec.ports[0].targetPort: Invalid value: \"_\": must contain only alpha-numeric", "spec.ports[0].targetPort: Invalid value: \"_\": must contain at least one letter"])]
#[case::out_of_range(json!({"clusterIP": "1.2.3.4", "ports": [{"port": 1}]}), &[r#"spec.clusterIPs: Invalid value: ["1.2.3.4"]: failed to allocate IP 1.2.3.4: the provided IP (1.2.3.4) is not in the valid range. The range of valid IPs is 10.96.0.0/12"#])]
#[case::network_address(json!({"clusterIP": "10.96.0.0", "ports": [{"port": 1}]}), &["spec.clusterIPs: Invalid value: [\"10.96.0.0\"]: failed to allocate"])]
#[case::taken(json!({"clusterIP": "10.96.0.10", "ports": [{"port": 1}]}), &[r#"spec.clusterIPs: Invalid value: ["10.96.0.10"]: failed to allocate IP 10.96.0.10: provided IP is already allocated"#])]
#[case::no_address(json!({"clusterIP": "nonsense", "ports": [{"port": 1}]}), &["spec.clusterIPs[0]: Invalid value: \"nonsense\": must be a valid IP address"])]
#[case::ips_without_ip(json!({"clusterIPs": ["10.96.0.9"], "ports": [{"port": 1}]}), &["spec.clusterIPs: Invalid value: [\"10.96.0.9\"]: must be empty when `clusterIP` is not specified"])]
#[case::ips_differ(json!({"clusterIP": "10.96.0.8", "clusterIPs": ["10.96.0.9"], "ports": [{"port": 1}]}), &["spec.clusterIPs: Invalid value: [\"10.96.0.9\"]: first value must match `clusterIP`"])]
#[case::node_port_of_cluster_ip(json!({"ports": [{"port": 1, "nodePort": 30005}]}), &["spec.ports[0].nodePort: Forbidden: may not be used when `type` is 'ClusterIP'"])]
#[case::negative_node_port(json!({"type": "NodePort", "ports": [{"port": 1, "nodePort": -1}]}), &["spec.ports[0].nodePort: Invalid value: -1: provided port is not in the valid range. The range of valid ports is 30000-32767"])]
#[case::headless_node_port(json!({"type": "NodePort", "clusterIP": "None", "ports": [{"port": 1}]}), &["spec.clusterIPs[0]: Invalid value: \"None\": may not be set to 'None' for NodePort services"])]
#[case::affinity(json!({"sessionAffinity": "Cookie", "ports": [{"port": 1}]}), &[r#"spec.sessionAffinity: Unsupported value: "Cookie": supported values: "ClientIP", "None""#])]
#[case::affinity_zero(json!({"sessionAffinity": "ClientIP", "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": 0}}, "ports": [{"port": 1}]}), &["spec.sessionAffinityConfig.clientIP.timeoutSeconds: Invalid value: 0: must be greater than 0 and less than 86400"])]
#[case::affinity_long(json!({"sessionAffinity": "ClientIP", "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": 86401}}, "ports": [{"port": 1}]}), &["spec.sessionAffinityConfig.clientIP.timeoutSeconds: Invalid value: 86401"])]
#[case::no_external_name(json!({"type": "ExternalName"}), &["spec.externalName: Required value"])]
#[case::bad_external_name(json!({"type": "ExternalName", "externalName": "a b"}), &["spec.externalName: Invalid value: \"a b\": a lowercase RFC 1123 subdomain"])]
#[case::external_name_with_ip(json!({"type": "ExternalName", "externalName": "a.b", "clusterIP": "10.96.0.7"}), &["spec.clusterIPs: Forbidden: may not be set for ExternalName services"])]
#[case::external_name_with_policy(json!({"type": "ExternalName", "externalName": "a.b", "ipFamilyPolicy": "SingleStack", "ipFamilies": ["IPv4"]}), &["spec.ipFamilies: Forbidden", "spec.ipFamilyPolicy: Forbidden"])]
#[case::type_unknown(json!({"type": "Magic", "ports": [{"port": 1}]}), &[r#"spec.type: Unsupported value: "Magic""#])]
#[case::loopback_external_ip(json!({"externalIPs": ["127.0.0.1", "x"], "ports": [{"port": 1}]}), &["spec.externalIPs[0]: Invalid value: \"127.0.0.1\": may not be in the loopback range", "spec.externalIPs[1]: Invalid value: \"x\": must be a valid IP"])]
#[case::policy_without_access(json!({"externalTrafficPolicy": "Local", "ports": [{"port": 1}]}), &["spec.externalTrafficPolicy: Invalid value: \"Local\": may only be set for externally-accessible services"])]
#[case::internal_policy(json!({"internalTrafficPolicy": "No", "ports": [{"port": 1}]}), &["spec.internalTrafficPolicy: Unsupported value: \"No\""])]
#[case::health_port(json!({"healthCheckNodePort": 30009, "ports": [{"port": 1}]}), &["spec.healthCheckNodePort: Invalid value: 30009: may only be set when"])]
#[case::source_ranges(json!({"loadBalancerSourceRanges": ["1.2.3.4/8", "z"], "ports": [{"port": 1}]}), &["spec.LoadBalancerSourceRanges: Forbidden", "spec.LoadBalancerSourceRanges[1]: Invalid value: \"z\": must be a valid CIDR"])]
#[case::class(json!({"loadBalancerClass": "a", "ports": [{"port": 1}]}), &["spec.loadBalancerClass: Forbidden"])]
#[case::distribution(json!({"trafficDistribution": "Far", "ports": [{"port": 1}]}), &["spec.trafficDistribution: Unsupported value: \"Far\""])]
#[case::selector(json!({"selector": {"a b": "é"}, "ports": [{"port": 1}]}), &["spec.selector: Invalid value: \"a b\": name part must", "spec.selector: Invalid value: \"é\": a valid label must"])]
fn invalid_services(#[case] spec: Value, #[case] expected: &[&str]) {
    let mut server = Server::new();
    server
        .service(json!({"clusterIP": "10.96.0.10", "ports": [{"port": 1}]}))
        .unwrap();
    let taken = format!("{:?}", server.alloc);
    let error = server.service(spec).unwrap_err();
    assert_eq!(error.code, 422);
    let found = causes(&error);
    assert_eq!(found.len(), expected.len(), "{found:#?}");
    for (found, expected) in found.iter().zip(expected) {
        assert!(found.starts_with(expected), "{found}\n{expected}");
    }
    assert_eq!(
        format!("{:?}", server.alloc),
        taken,
        "what was taken is given back"
    );
}

const V4: &[&str] = &["10.96.0.0/16"];
const V6: &[&str] = &["fd00:96::/112"];
const DUAL: &[&str] = &["10.96.0.0/16", "fd00:96::/112"];
const DUAL6: &[&str] = &["fd00:96::/112", "10.96.0.0/16"];

/// Families and policy that a Service ends up with, or the first word on why it is refused.
#[rstest]
#[case(V4, json!({}), "SingleStack IPv4")]
#[case(V6, json!({}), "SingleStack IPv6")]
#[case(DUAL, json!({}), "SingleStack IPv4")]
#[case(DUAL6, json!({}), "SingleStack IPv6")]
#[case(V4, json!({"ipFamilyPolicy": "PreferDualStack"}), "PreferDualStack IPv4")]
#[case(DUAL, json!({"ipFamilyPolicy": "PreferDualStack"}), "PreferDualStack IPv4,IPv6")]
#[case(DUAL, json!({"ipFamilyPolicy": "PreferDualStack", "ipFamilies": ["IPv6"]}), "PreferDualStack IPv6,IPv4")]
#[case(DUAL6, json!({"ipFamilyPolicy": "RequireDualStack"}), "RequireDualStack IPv6,IPv4")]
#[case(V4, json!({"ipFamilyPolicy": "RequireDualStack"}), "spec.ipFamilyPolicy: Invalid value: \"RequireDualStack\": this cluster is not configured for dual-stack services")]
#[case(V4, json!({"ipFamilies": ["IPv6"]}), "spec.ipFamilies[0]: Invalid value: \"IPv6\": not configured on this cluster")]
#[case(DUAL, json!({"ipFamilies": ["IPv6"]}), "SingleStack IPv6")]
#[case(DUAL, json!({"ipFamilies": ["IPv4", "IPv6"]}), "spec.ipFamilyPolicy: Invalid value: \"SingleStack\": must be 'RequireDualStack' or 'PreferDualStack' when multiple IP families are specified")]
#[case(DUAL, json!({"ipFamilies": ["IPv4", "IPv4"], "ipFamilyPolicy": "PreferDualStack"}), "spec.ipFamilies[1]: Duplicate value: \"IPv4\"")]
#[case(DUAL, json!({"ipFamilies": ["IPX"]}), "spec.ipFamilies[0]: Unsupported value: \"IPX\": supported values: \"IPv4\", \"IPv6\"")]
#[case(DUAL, json!({"ipFamilyPolicy": "Maybe"}), "spec.ipFamilyPolicy: Unsupported value: \"Maybe\"")]
#[case(DUAL, json!({"clusterIP": "fd00:96::99"}), "SingleStack IPv6")]
#[case(V4, json!({"clusterIP": "fd00:96::99"}), "spec.clusterIPs[0]: Invalid value: [\"fd00:96::99\"]: IPv6 is not configured on this cluster")]
#[case(DUAL, json!({"clusterIP": "fd00:96::99", "ipFamilies": ["IPv4"]}), "spec.clusterIPs[0]: Invalid value: \"fd00:96::99\": expected an IPv4 value as indicated by `ipFamilies[0]`")]
#[case(DUAL, json!({"clusterIP": "10.96.0.9", "ipFamilyPolicy": "RequireDualStack"}), "RequireDualStack IPv4,IPv6")]
#[case(DUAL, json!({"clusterIP": "10.96.0.9", "clusterIPs": ["10.96.0.9", "10.96.0.8"], "ipFamilyPolicy": "RequireDualStack"}), "spec.clusterIPs: Invalid value: [\"10.96.0.9\",\"10.96.0.8\"]: may specify no more than one IP for each IP family")]
#[case(DUAL, json!({"clusterIP": "10.96.0.9", "clusterIPs": ["10.96.0.9", "fd00:96::9"]}), "spec.ipFamilyPolicy: Invalid value: \"SingleStack\": must be 'RequireDualStack' or 'PreferDualStack' when multiple cluster IPs are specified")]
#[case(DUAL, json!({"clusterIP": "None", "clusterIPs": ["None", "fd00:96::9"]}), "spec.clusterIPs: Invalid value: [\"None\",\"fd00:96::9\"]: 'None' must be the first and only value")]
#[case(V4, json!({"clusterIP": "None", "selector": {"a": "b"}}), "SingleStack IPv4")]
#[case(V4, json!({"clusterIP": "None"}), "RequireDualStack IPv4,IPv6")]
#[case(V6, json!({"clusterIP": "None"}), "RequireDualStack IPv6,IPv4")]
#[case(V4, json!({"clusterIP": "None", "ipFamilyPolicy": "SingleStack"}), "SingleStack IPv4")]
#[case(V4, json!({"clusterIP": "None", "ipFamilies": ["IPv6"]}), "RequireDualStack IPv6,IPv4")]
#[case(V4, json!({"clusterIP": "None", "selector": {"a": "b"}, "ipFamilyPolicy": "RequireDualStack"}), "spec.ipFamilyPolicy: Invalid value: \"RequireDualStack\": this cluster is not configured for dual-stack services")]
#[case(DUAL, json!({"clusterIP": "None", "selector": {"a": "b"}, "ipFamilyPolicy": "PreferDualStack"}), "PreferDualStack IPv4,IPv6")]
fn families_of_a_new_service(#[case] cidrs: &[&str], #[case] spec: Value, #[case] expected: &str) {
    let mut server = Server::with_cidrs(cidrs);
    let mut spec = spec;
    spec["ports"] = json!([{"port": 80}]);
    match server.service(spec) {
        Err(error) => assert!(
            causes(&error).first().is_some_and(|c| c.starts_with(expected)),
            "{error}"
        ),
        Ok(service) => {
            let spec = &service["spec"];
            let families: Vec<&str> = spec["ipFamilies"]
                .as_array()
                .unwrap()
                .iter()
                .map(|f| f.as_str().unwrap())
                .collect();
            let policy = spec["ipFamilyPolicy"].as_str().unwrap();
            assert_eq!(format!("{policy} {}", families.join(",")), expected);
            let ips = spec["clusterIPs"].as_array().unwrap();
            assert_eq!(ips[0], spec["clusterIP"]);
            if ips[0] != "None" {
                assert_eq!(ips.len(), families.len());
                for (ip, family) in ips.iter().zip(families) {
                    assert_eq!(ip.as_str().unwrap().contains(':'), family == "IPv6");
                }
            }
        }
    }
}

#[test]
fn a_service_changes_its_type_and_families() {
    let mut server = Server::with_cidrs(DUAL);
    let single = server
        .service(json!({"type": "NodePort", "ports": [{"port": 80}], "selector": {"a": "b"}}))
        .unwrap();
    let node_port = single["spec"]["ports"][0]["nodePort"].as_u64().unwrap();
    let change = |server: &mut Server, old: &Value, f: &dyn Fn(&mut Value)| {
        let mut new = old.clone();
        f(&mut new);
        server.update("Service", old, &new, None)
    };
    // A second family comes and goes; its address is given back.
    let dual = change(&mut server, &single, &|s| {
        s["spec"]["ipFamilyPolicy"] = "PreferDualStack".into();
    })
    .unwrap();
    assert_eq!(dual["spec"]["ipFamilies"], json!(["IPv4", "IPv6"]));
    let second = dual["spec"]["clusterIPs"][1].clone();
    let wrong = change(&mut server, &dual, &|s| {
        s["spec"]["clusterIPs"] = json!([s["spec"]["clusterIP"]]);
    })
    .unwrap_err();
    assert_eq!(
        causes(&wrong),
        [
            r#"spec.ipFamilyPolicy: Invalid value: "PreferDualStack": must be 'SingleStack' to release the secondary cluster IP"#
        ]
    );
    let again = change(&mut server, &dual, &|s| {
        s["spec"]["ipFamilyPolicy"] = "SingleStack".into();
    })
    .unwrap();
    assert_eq!(again["spec"]["clusterIPs"], single["spec"]["clusterIPs"]);
    server
        .alloc
        .take_address(second.as_str().unwrap().parse().unwrap())
        .unwrap();
    // Leaving out what the server chose keeps it.
    let bare = change(&mut server, &single, &|s| {
        s["spec"] = json!({"type": "NodePort", "ports": [{"port": 80}], "selector": {"a": "c"}});
    })
    .unwrap();
    assert_eq!(bare["spec"]["clusterIP"], single["spec"]["clusterIP"]);
    assert_eq!(bare["spec"]["ports"], single["spec"]["ports"]);
    // As ClusterIP it has no node port.
    let plain = change(&mut server, &single, &|s| s["spec"]["type"] = "ClusterIP".into()).unwrap();
    assert_eq!(
        plain["spec"]["ports"],
        json!([{"port": 80, "protocol": "TCP", "targetPort": 80}])
    );
    assert_eq!(plain["spec"].get("externalTrafficPolicy"), None);
    server.alloc.take_port(u16::try_from(node_port).unwrap()).unwrap();
    // As ExternalName it has no address either, and gets a new one on the way back.
    let name = change(&mut server, &plain, &|s| {
        s["spec"]["type"] = "ExternalName".into();
        s["spec"]["externalName"] = "example.org".into();
    })
    .unwrap();
    for field in ["clusterIP", "clusterIPs", "ipFamilies", "ipFamilyPolicy"] {
        assert_eq!(name["spec"].get(field), None, "{field}");
    }
    server
        .alloc
        .take_address(single["spec"]["clusterIP"].as_str().unwrap().parse().unwrap())
        .unwrap();
    let back = change(&mut server, &name, &|s| s["spec"]["type"] = "ClusterIP".into()).unwrap();
    assert!(back["spec"]["clusterIP"].is_string());
    assert_ne!(back["spec"]["clusterIP"], single["spec"]["clusterIP"]);
    // Deleting gives everything back.
    server
        .transaction(|ctx| {
            after_delete(resource("Service"), ctx, &back);
            Ok(())
        })
        .unwrap();
    server
        .alloc
        .take_address(back["spec"]["clusterIP"].as_str().unwrap().parse().unwrap())
        .unwrap();
}

#[test]
fn node_ports_are_shared_by_protocols_and_change_on_request() {
    let mut server = Server::new();
    let both =
        json!([{"name": "t", "port": 53, "protocol": "TCP"}, {"name": "u", "port": 53, "protocol": "UDP"}]);
    let dns = server
        .service(json!({"type": "NodePort", "ports": both}))
        .unwrap();
    assert_eq!(
        dns["spec"]["ports"][0]["nodePort"],
        dns["spec"]["ports"][1]["nodePort"]
    );
    let mut new = dns.clone();
    new["spec"]["ports"] = json!([{"name": "t", "port": 53, "nodePort": 31999}]);
    let changed = server.update("Service", &dns, &new, None).unwrap();
    assert_eq!(changed["spec"]["ports"][0]["nodePort"], 31999);
    let free = u16::try_from(dns["spec"]["ports"][0]["nodePort"].as_u64().unwrap()).unwrap();
    server.alloc.take_port(free).unwrap();
    let lb = json!({"type": "LoadBalancer", "allocateLoadBalancerNodePorts": false, "ports": [{"port": 1}]});
    assert_eq!(
        server.service(lb).unwrap()["spec"]["ports"][0].get("nodePort"),
        None
    );
}

#[test]
fn a_refused_update_releases_and_takes_nothing() {
    let mut server = Server::with_cidrs(DUAL);
    let spec = json!({"type": "NodePort", "ipFamilyPolicy": "RequireDualStack", "ports": [{"port": 80}]});
    let old = server.service(spec).unwrap();
    let before = format!("{:?}", server.alloc);
    let mut new = old.clone();
    // Everything would be given back, but the name is no name.
    new["spec"] = json!({"type": "ExternalName", "externalName": "a b"});
    server.update("Service", &old, &new, None).unwrap_err();
    assert_eq!(format!("{:?}", server.alloc), before);
    let mut new = old.clone();
    new["spec"]["ports"] = json!([{"name": "a", "port": 1, "nodePort": 30100}, {"name": "a", "port": 2}]);
    server.update("Service", &old, &new, None).unwrap_err();
    assert_eq!(format!("{:?}", server.alloc), before);
}

#[test]
fn ranges_run_full() {
    let mut server = Server::with_cidrs(&["10.0.0.0/29"]);
    for _ in 0..6 {
        server.service(json!({"ports": [{"port": 1}]})).unwrap();
    }
    let error = server.service(json!({"ports": [{"port": 1}]})).unwrap_err();
    assert_eq!(error.code, 500);
    assert!(
        error
            .message
            .contains("failed to allocate a serviceIP: range is full"),
        "{error}"
    );
}

#[test]
fn metadata_is_checked() {
    let mut server = Server::new();
    let meta = |meta: Value| json!({"metadata": meta, "spec": {"ports": [{"port": 1}]}});
    for (object, code, text) in [
        (
            meta(json!({})),
            422,
            "metadata.name: Required value: name or generateName is required",
        ),
        (
            meta(json!({"name": "Bad_Name"})),
            422,
            "metadata.name: Invalid value: \"Bad_Name\": a DNS-1035 label must",
        ),
        (
            meta(json!({"name": "a", "labels": {"": "x"}})),
            422,
            "metadata.labels: Invalid value: \"\": name part must be non-empty",
        ),
        (
            meta(json!({"name": "a", "labels": {"a": "\u{1f980}"}})),
            422,
            "metadata.labels: Invalid value: \"\u{1f980}\": a valid label must",
        ),
        (
            meta(json!({"name": "a", "annotations": {"a": "x".repeat(300_000)}})),
            422,
            "metadata.annotations: Too long: may not be more than 262144 bytes",
        ),
        (
            meta(
                json!({"name": "a", "ownerReferences": [{"kind": "", "name": "x", "uid": "y", "apiVersion": "v1"}]}),
            ),
            422,
            "metadata.ownerReferences[0].kind",
        ),
        (
            meta(json!({"name": "a", "resourceVersion": "1"})),
            400,
            "resourceVersion should not be set on objects to be created",
        ),
        (
            meta(json!({"name": "a", "namespace": "other"})),
            400,
            "the namespace of the provided object does not match",
        ),
        (
            json!({"kind": "Pod", "metadata": {"name": "a"}}),
            400,
            "Pod in version \"v1\" cannot be handled as a Service",
        ),
        (
            json!({"apiVersion": "v2", "metadata": {"name": "a"}}),
            400,
            "the API version in the data (v2) does not match",
        ),
        (
            json!({"metadata": 3}),
            400,
            "Service in version \"v1\" cannot be handled as a Service: json: cannot unmarshal number",
        ),
        (
            json!([]),
            400,
            "Service in version \"v1\" cannot be handled as a Service: json: cannot unmarshal array into Go value",
        ),
        (
            json!(null),
            400,
            "Service in version \"v1\" cannot be handled as a Service: json: cannot unmarshal null",
        ),
        (
            json!({"metadata": {"name": "a", "creationTimestamp": "yesterday"}}),
            400,
            "parsing time \"yesterday\"",
        ),
    ] {
        let error = server.create("Service", &object).unwrap_err();
        assert_eq!(error.code, code, "{error}");
        assert!(error.message.contains(text), "{error}\n{text}");
    }
    let generated = server
        .create("Service", &meta(json!({"generateName": "web-"})))
        .unwrap();
    let name = generated["metadata"]["name"].as_str().unwrap();
    assert!(name.starts_with("web-") && name.len() == 9, "{name}");
    server.namespace["status"]["phase"] = "Terminating".into();
    let error = server.create("Service", &meta(json!({"name": "a"}))).unwrap_err();
    assert_eq!((error.code, error.reason), (403, "Forbidden"));
    assert_eq!(
        error.details.unwrap()["causes"][0]["reason"],
        "NamespaceTerminating"
    );
}

#[test]
fn generation_counts_changes_of_the_specification() {
    let mut server = Server::new();
    let pod = fixture("pod-create")["request"]["body"].clone();
    let pod = server.create("Pod", &pod).unwrap();
    let mut labelled = pod.clone();
    labelled["metadata"]["labels"]["x"] = "y".into();
    let labelled = server.update("Pod", &pod, &labelled, None).unwrap();
    assert_eq!(labelled["metadata"]["generation"], 1);
    let mut image = labelled.clone();
    image["spec"]["containers"][0]["image"] = "img:2".into();
    let image = server.update("Pod", &labelled, &image, None).unwrap();
    assert_eq!(image["metadata"]["generation"], 2);
    let mut moved = image.clone();
    moved["spec"]["nodeName"] = "n".into();
    let error = server.update("Pod", &image, &moved, None).unwrap_err();
    assert!(
        causes(&error)[0].starts_with("spec: Forbidden: pod updates may not change fields other than"),
        "{error}"
    );
    let mut status = image.clone();
    status["status"]["phase"] = "Running".into();
    status["spec"]["nodeName"] = "n".into();
    let status = server.update("Pod", &image, &status, Some("status")).unwrap();
    assert_eq!(status["status"]["phase"], "Running");
    assert_eq!(status["status"]["qosClass"], "BestEffort");
    assert_eq!(
        status["spec"], image["spec"],
        "a status update changes nothing else"
    );
}

#[rstest]
#[case(json!({"addressType": "IPv4", "endpoints": [{"addresses": ["x"]}]}), "endpoints[0].addresses[0]: Invalid value: \"x\": must be a valid IP address")]
#[case(json!({"addressType": "IPv4", "endpoints": [{"addresses": ["fd00::1"]}]}), "endpoints[0].addresses[0]: Invalid value: \"fd00::1\": must be an IPv4 address")]
#[case(json!({"addressType": "IPv6", "endpoints": [{"addresses": ["1.1.1.1"]}]}), "endpoints[0].addresses[0]: Invalid value: \"1.1.1.1\": must be an IPv6 address")]
#[case(json!({"addressType": "IPv4", "endpoints": [{"addresses": ["127.0.0.1"]}]}), "endpoints[0].addresses[0]: Invalid value: \"127.0.0.1\": may not be in the loopback range")]
#[case(json!({"addressType": "IPv4", "endpoints": [{"addresses": []}]}), "endpoints[0].addresses: Required value")]
#[case(json!({"addressType": "IPv4", "endpoints": vec![json!({"addresses": ["1.1.1.1"]}); 1001]}), "endpoints: Too many: 1001: must have at most 1000 items")]
#[case(json!({"addressType": "IPv4", "ports": vec![json!({"port": 1}); 101]}), "ports: Too many: 101: must have at most 100 items")]
#[case(json!({"addressType": "IPv4", "ports": [{"port": 1}, {"port": 2}]}), "ports[1].name: Duplicate value: \"\"")]
#[case(json!({"addressType": "IPv4", "ports": [{"name": "a", "protocol": "X"}]}), "ports[0].protocol: Unsupported value: \"X\"")]
#[case(json!({"addressType": "IPX"}), "addressType: Unsupported value: \"IPX\": supported values: \"FQDN\", \"IPv4\", \"IPv6\"")]
#[case(json!({}), "addressType: Required value")]
fn invalid_slices(#[case] slice: Value, #[case] expected: &str) {
    let mut slice = slice;
    slice["metadata"] = json!({"name": "s"});
    let error = Server::new().create("EndpointSlice", &slice).unwrap_err();
    assert!(
        causes(&error).first().is_some_and(|c| c.starts_with(expected)),
        "{error}"
    );
    assert!(
        error
            .message
            .starts_with("EndpointSlice.discovery.k8s.io \"s\" is invalid: ")
    );
}

#[test]
fn other_kinds_are_checked_too() {
    let mut server = Server::new();
    let slice = server
        .create(
            "EndpointSlice",
            &json!({"metadata": {"name": "s"}, "addressType": "IPv4"}),
        )
        .unwrap();
    assert!(slice["endpoints"].is_null() && slice.get("ports").is_some());
    let mut other = slice.clone();
    other["addressType"] = "IPv6".into();
    let error = server.update("EndpointSlice", &slice, &other, None).unwrap_err();
    assert_eq!(
        causes(&error),
        [r#"addressType: Invalid value: "IPv6": field is immutable"#]
    );
    for (kind, object, text) in [
        (
            "Node",
            json!({"spec": {"podCIDRs": ["x"]}}),
            "spec.podCIDRs[0]: Invalid value: \"x\"",
        ),
        (
            "Node",
            json!({"spec": {"podCIDRs": ["10.0.0.0/8", "11.0.0.0/8"]}}),
            "spec.podCIDRs: Invalid value",
        ),
        (
            "Node",
            json!({"spec": {"taints": [{"key": "a"}]}}),
            "metadata.taints[0].effect: Required value",
        ),
        ("Pod", json!({"spec": {}}), "spec.containers: Required value"),
        (
            "Pod",
            json!({"spec": {"containers": [{"name": "a"}, {"name": "a", "image": "b"}]}}),
            "spec.containers[0].image: Required value",
        ),
        (
            "Event",
            json!({"involvedObject": {"namespace": "x"}}),
            "involvedObject.namespace: Invalid value: \"x\"",
        ),
        (
            "ReplicationController",
            json!({"spec": {"selector": {"a": "b"}, "template": {"spec": {"containers": [{"name": "c", "image": "i"}]}}}}),
            "spec.template.metadata.labels: Invalid value",
        ),
        (
            "Namespace",
            json!({"metadata": {"name": "a.b"}}),
            "metadata.name: Invalid value: \"a.b\": must not contain dots",
        ),
    ] {
        let mut object = object;
        if object.get("metadata").is_none() {
            object["metadata"] = json!({"name": "x"});
        }
        let error = server.create(kind, &object).unwrap_err();
        assert!(
            causes(&error).first().is_some_and(|c| c.starts_with(text)),
            "{error}\n{text}"
        );
    }
    let secret = json!({"metadata": {"name": "s"}, "stringData": {"k": "v"}, "immutable": true});
    let secret = server.create("Secret", &secret).unwrap();
    assert_eq!(
        (&secret["data"]["k"], secret.get("stringData")),
        (&json!("dg=="), None)
    );
    let mut changed = secret.clone();
    changed["data"]["k"] = "eA==".into();
    assert_eq!(
        server.update("Secret", &secret, &changed, None).unwrap_err().code,
        422
    );
}

fn any_json() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        ".{0,4}".prop_map(Value::from),
    ];
    let keys = prop::sample::select(vec![
        "metadata",
        "spec",
        "status",
        "name",
        "labels",
        "ports",
        "port",
        "clusterIP",
        "clusterIPs",
        "type",
        "endpoints",
        "addresses",
        "containers",
        "ipFamilies",
        "nodePort",
        "template",
        "conditions",
        "podIPs",
        "kind",
        "loadBalancer",
        "ingress",
        "ip",
        "annotations",
        "finalizers",
        "taints",
        "volumes",
    ]);
    leaf.prop_recursive(6, 48, 4, move |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            prop::collection::btree_map(keys.clone().prop_map(str::to_owned), inner, 0..6)
                .prop_map(|m| Value::Object(m.into_iter().collect())),
        ]
    })
}

proptest! {
    /// Whatever a client sends is answered, and a refusal takes nothing.
    #[test]
    fn no_object_panics(object in any_json(), old in any_json(), status in any::<bool>()) {
        let mut server = Server::with_cidrs(DUAL);
        let before = format!("{:?}", server.alloc);
        for r in RESOURCES {
            let created = server.create(r.kind, &object);
            let _ = server.update(r.kind, &old, &object, status.then_some("status"));
            if let Ok(created) = created {
                let _ = server.update(r.kind, &created, &object, None);
            }
        }
        let mut fresh = Server::with_cidrs(DUAL);
        if fresh.create("Service", &object).is_err() {
            prop_assert_eq!(format!("{:?}", fresh.alloc), before);
        }
    }
}
