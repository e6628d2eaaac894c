//! Reads the few protobuf bodies that kubectl sends (`kubectl create namespace`, `create configmap`, drain's deletions, …).
//!
//! Field numbers are those of `generated.proto` in k8s.io/api and k8s.io/apimachinery, and never change. Answers are always
//! JSON, which every client accepts. A field that is not listed here refuses the body: nothing is dropped silently.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde_json::{Map, Value};

/// What such a body begins with (k8s.io/apimachinery/pkg/runtime/serializer/protobuf).
const MAGIC: &[u8] = b"k8s\0";

/// How a field is encoded. Go writes fields that are not pointers even if they are empty; those say nothing.
#[derive(Clone, Copy)]
enum Kind {
    /// Set by the server, or of no interest.
    Skip,
    Text,
    /// Base64 in JSON.
    Binary,
    Number,
    /// A pointer in Go: zero is a value.
    NumberSet,
    Flag,
    /// A pointer in Go: false is a value.
    FlagSet,
    Texts,
    TextMap,
    BinaryMap,
    Message(&'static [Field]),
    Messages(&'static [Field]),
    IntOrString,
}

type Field = (u64, &'static str, Kind);

const OWNER: &[Field] = &[
    (1, "kind", Kind::Text),
    (3, "name", Kind::Text),
    (4, "uid", Kind::Text),
    (5, "apiVersion", Kind::Text),
    (6, "controller", Kind::FlagSet),
    (7, "blockOwnerDeletion", Kind::FlagSet),
];
const META: &[Field] = &[
    (1, "name", Kind::Text),
    (2, "generateName", Kind::Text),
    (3, "namespace", Kind::Text),
    (4, "selfLink", Kind::Skip),
    (5, "uid", Kind::Text),
    (6, "resourceVersion", Kind::Text),
    (7, "generation", Kind::Skip),
    (8, "creationTimestamp", Kind::Skip),
    (9, "deletionTimestamp", Kind::Skip),
    (10, "deletionGracePeriodSeconds", Kind::Skip),
    (11, "labels", Kind::TextMap),
    (12, "annotations", Kind::TextMap),
    (13, "ownerReferences", Kind::Messages(OWNER)),
    (14, "finalizers", Kind::Texts),
    (17, "managedFields", Kind::Skip),
];
const NAMESPACE: &[Field] = &[
    (1, "metadata", Kind::Message(META)),
    (2, "spec", Kind::Message(&[(1, "finalizers", Kind::Texts)])),
    (3, "status", Kind::Skip),
];
const CONFIG_MAP: &[Field] = &[
    (1, "metadata", Kind::Message(META)),
    (2, "data", Kind::TextMap),
    (3, "binaryData", Kind::BinaryMap),
    (4, "immutable", Kind::FlagSet),
];
const SECRET: &[Field] = &[
    (1, "metadata", Kind::Message(META)),
    (2, "data", Kind::BinaryMap),
    (3, "type", Kind::Text),
    (4, "stringData", Kind::TextMap),
    (5, "immutable", Kind::FlagSet),
];
const SERVICE_ACCOUNT: &[Field] = &[
    (1, "metadata", Kind::Message(META)),
    (4, "automountServiceAccountToken", Kind::FlagSet),
];
const SERVICE_PORT: &[Field] = &[
    (1, "name", Kind::Text),
    (2, "protocol", Kind::Text),
    (3, "port", Kind::Number),
    (4, "targetPort", Kind::IntOrString),
    (5, "nodePort", Kind::Number),
    (6, "appProtocol", Kind::Text),
];
const SERVICE_SPEC: &[Field] = &[
    (1, "ports", Kind::Messages(SERVICE_PORT)),
    (2, "selector", Kind::TextMap),
    (3, "clusterIP", Kind::Text),
    (4, "type", Kind::Text),
    (5, "externalIPs", Kind::Texts),
    (7, "sessionAffinity", Kind::Text),
    (8, "loadBalancerIP", Kind::Text),
    (9, "loadBalancerSourceRanges", Kind::Texts),
    (10, "externalName", Kind::Text),
    (11, "externalTrafficPolicy", Kind::Text),
    (12, "healthCheckNodePort", Kind::Number),
    (13, "publishNotReadyAddresses", Kind::Flag),
    (
        14,
        "sessionAffinityConfig",
        Kind::Message(&[(
            1,
            "clientIP",
            Kind::Message(&[(1, "timeoutSeconds", Kind::Number)]),
        )]),
    ),
    (17, "ipFamilyPolicy", Kind::Text),
    (18, "clusterIPs", Kind::Texts),
    (19, "ipFamilies", Kind::Texts),
    (20, "allocateLoadBalancerNodePorts", Kind::FlagSet),
    (21, "loadBalancerClass", Kind::Text),
    (22, "internalTrafficPolicy", Kind::Text),
    (23, "trafficDistribution", Kind::Text),
];
const SERVICE: &[Field] = &[
    (1, "metadata", Kind::Message(META)),
    (2, "spec", Kind::Message(SERVICE_SPEC)),
    (3, "status", Kind::Skip),
];
const LABEL_SELECTOR: &[Field] = &[
    (1, "matchLabels", Kind::TextMap),
    (
        2,
        "matchExpressions",
        Kind::Messages(&[
            (1, "key", Kind::Text),
            (2, "operator", Kind::Text),
            (3, "values", Kind::Texts),
        ]),
    ),
];
/// What the generators of kubectl set.
const CONTAINER: &[Field] = &[
    (1, "name", Kind::Text),
    (2, "image", Kind::Text),
    (3, "command", Kind::Texts),
    (4, "args", Kind::Texts),
    (5, "workingDir", Kind::Text),
    (
        6,
        "ports",
        Kind::Messages(&[
            (1, "name", Kind::Text),
            (2, "hostPort", Kind::Number),
            (3, "containerPort", Kind::Number),
            (4, "protocol", Kind::Text),
            (5, "hostIP", Kind::Text),
        ]),
    ),
    (
        7,
        "env",
        Kind::Messages(&[(1, "name", Kind::Text), (2, "value", Kind::Text)]),
    ),
    (8, "resources", Kind::Message(&[])),
    (13, "terminationMessagePath", Kind::Text),
    (14, "imagePullPolicy", Kind::Text),
    (16, "stdin", Kind::Flag),
    (17, "stdinOnce", Kind::Flag),
    (18, "tty", Kind::Flag),
    (20, "terminationMessagePolicy", Kind::Text),
];
const POD_SPEC: &[Field] = &[
    (2, "containers", Kind::Messages(CONTAINER)),
    (3, "restartPolicy", Kind::Text),
    (4, "terminationGracePeriodSeconds", Kind::NumberSet),
    (6, "dnsPolicy", Kind::Text),
    (7, "nodeSelector", Kind::TextMap),
    (8, "serviceAccountName", Kind::Text),
    (9, "serviceAccount", Kind::Text),
    (10, "nodeName", Kind::Text),
    (11, "hostNetwork", Kind::Flag),
    (12, "hostPID", Kind::Flag),
    (13, "hostIPC", Kind::Flag),
    (16, "hostname", Kind::Text),
    (17, "subdomain", Kind::Text),
    (19, "schedulerName", Kind::Text),
    (24, "priorityClassName", Kind::Text),
];
const TEMPLATE: &[Field] = &[
    (1, "metadata", Kind::Message(META)),
    (2, "spec", Kind::Message(POD_SPEC)),
];
const DEPLOYMENT_SPEC: &[Field] = &[
    (1, "replicas", Kind::NumberSet),
    (2, "selector", Kind::Message(LABEL_SELECTOR)),
    (3, "template", Kind::Message(TEMPLATE)),
    (4, "strategy", Kind::Message(&[(1, "type", Kind::Text)])),
    (5, "minReadySeconds", Kind::Number),
    (6, "revisionHistoryLimit", Kind::NumberSet),
    (7, "paused", Kind::Flag),
    (9, "progressDeadlineSeconds", Kind::NumberSet),
];
const DEPLOYMENT: &[Field] = &[
    (1, "metadata", Kind::Message(META)),
    (2, "spec", Kind::Message(DEPLOYMENT_SPEC)),
    (3, "status", Kind::Skip),
];
const ROLE: &[Field] = &[
    (1, "metadata", Kind::Message(META)),
    (
        2,
        "rules",
        Kind::Messages(&[
            (1, "verbs", Kind::Texts),
            (2, "apiGroups", Kind::Texts),
            (3, "resources", Kind::Texts),
            (4, "resourceNames", Kind::Texts),
            (5, "nonResourceURLs", Kind::Texts),
        ]),
    ),
    (
        3,
        "aggregationRule",
        Kind::Message(&[(1, "clusterRoleSelectors", Kind::Messages(LABEL_SELECTOR))]),
    ),
];
const ROLE_BINDING: &[Field] = &[
    (1, "metadata", Kind::Message(META)),
    (
        2,
        "subjects",
        Kind::Messages(&[
            (1, "kind", Kind::Text),
            (2, "apiGroup", Kind::Text),
            (3, "name", Kind::Text),
            (4, "namespace", Kind::Text),
        ]),
    ),
    (
        3,
        "roleRef",
        Kind::Message(&[
            (1, "apiGroup", Kind::Text),
            (2, "kind", Kind::Text),
            (3, "name", Kind::Text),
        ]),
    ),
];
const EVICTION: &[Field] = &[
    (1, "metadata", Kind::Message(META)),
    (2, "deleteOptions", Kind::Message(DELETE_OPTIONS)),
];
const ACCESS_REVIEW: &[Field] = &[
    (1, "metadata", Kind::Message(META)),
    (
        2,
        "spec",
        Kind::Message(&[
            (
                1,
                "resourceAttributes",
                Kind::Message(&[
                    (1, "namespace", Kind::Text),
                    (2, "verb", Kind::Text),
                    (3, "group", Kind::Text),
                    (4, "version", Kind::Text),
                    (5, "resource", Kind::Text),
                    (6, "subresource", Kind::Text),
                    (7, "name", Kind::Text),
                ]),
            ),
            (
                2,
                "nonResourceAttributes",
                Kind::Message(&[(1, "path", Kind::Text), (2, "verb", Kind::Text)]),
            ),
        ]),
    ),
    (3, "status", Kind::Skip),
];
const RULES_REVIEW: &[Field] = &[
    (1, "metadata", Kind::Message(META)),
    (2, "spec", Kind::Message(&[(1, "namespace", Kind::Text)])),
    (3, "status", Kind::Skip),
];
const TOKEN_REQUEST: &[Field] = &[
    (1, "metadata", Kind::Message(META)),
    (
        2,
        "spec",
        Kind::Message(&[
            (1, "audiences", Kind::Texts),
            (
                3,
                "boundObjectRef",
                Kind::Message(&[
                    (1, "kind", Kind::Text),
                    (2, "apiVersion", Kind::Text),
                    (3, "name", Kind::Text),
                    (4, "uid", Kind::Text),
                ]),
            ),
            (4, "expirationSeconds", Kind::NumberSet),
        ]),
    ),
    (3, "status", Kind::Skip),
];
const DELETE_OPTIONS: &[Field] = &[
    (1, "gracePeriodSeconds", Kind::NumberSet),
    (
        2,
        "preconditions",
        Kind::Message(&[(1, "uid", Kind::Text), (2, "resourceVersion", Kind::Text)]),
    ),
    (3, "orphanDependents", Kind::FlagSet),
    (4, "propagationPolicy", Kind::Text),
    (5, "dryRun", Kind::Texts),
    (6, "ignoreStoreReadErrorWithClusterBreakingPotential", Kind::Skip),
];

/// The object in a protobuf body.
///
/// # Errors
/// What is wrong with the body, or that its kind is only read as JSON.
pub(super) fn decode(body: &[u8]) -> Result<Value, String> {
    let envelope = body
        .strip_prefix(MAGIC)
        .ok_or("protobuf parse error: the body does not begin with k8s")?;
    let (mut api_version, mut kind, mut raw) = (String::new(), String::new(), &[][..]);
    for (number, value) in fields(envelope)? {
        match (number, value) {
            (1, Wire::Bytes(bytes)) => {
                for (number, value) in fields(bytes)? {
                    match (number, value) {
                        (1, Wire::Bytes(text)) => api_version = utf8(text)?,
                        (2, Wire::Bytes(text)) => kind = utf8(text)?,
                        _ => return Err(unknown("type", number)),
                    }
                }
            }
            (2, Wire::Bytes(bytes)) => raw = bytes,
            // Content encoding and type: empty for protobuf.
            (3 | 4, Wire::Bytes([])) => {}
            _ => return Err(unknown("envelope", number)),
        }
    }
    let table = match (api_version.as_str(), kind.as_str()) {
        ("v1", "Namespace") => NAMESPACE,
        ("v1", "ConfigMap") => CONFIG_MAP,
        ("v1", "Secret") => SECRET,
        ("v1", "ServiceAccount") => SERVICE_ACCOUNT,
        ("v1", "Service") => SERVICE,
        ("apps/v1", "Deployment") => DEPLOYMENT,
        ("rbac.authorization.k8s.io/v1", "Role" | "ClusterRole") => ROLE,
        ("rbac.authorization.k8s.io/v1", "RoleBinding" | "ClusterRoleBinding") => ROLE_BINDING,
        ("policy/v1", "Eviction") => EVICTION,
        ("authorization.k8s.io/v1", "SelfSubjectAccessReview") => ACCESS_REVIEW,
        ("authorization.k8s.io/v1", "SelfSubjectRulesReview") => RULES_REVIEW,
        ("authentication.k8s.io/v1", "TokenRequest") => TOKEN_REQUEST,
        (_, "DeleteOptions") => DELETE_OPTIONS,
        _ => {
            return Err(format!(
                "protobuf parse error: {kind} of {api_version} is only understood as JSON or YAML"
            ));
        }
    };
    let mut object = message(&kind, table, raw)?;
    object.insert("apiVersion".into(), api_version.into());
    object.insert("kind".into(), kind.into());
    Ok(object.into())
}

/// One value as protobuf has it on the wire.
#[derive(Clone, Copy)]
enum Wire<'a> {
    Varint(u64),
    Bytes(&'a [u8]),
}

fn unknown(of: &str, number: u64) -> String {
    format!("protobuf parse error: field {number} of {of} is not understood; send JSON")
}

fn varint(bytes: &mut &[u8]) -> Result<u64, String> {
    let mut value = 0_u64;
    for shift in (0..64).step_by(7) {
        let (byte, rest) = bytes
            .split_first()
            .ok_or("protobuf parse error: unexpected end")?;
        *bytes = rest;
        value |= u64::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return Ok(value);
        }
    }
    Err("protobuf parse error: a number is too long".to_owned())
}

fn fields(mut bytes: &[u8]) -> Result<Vec<(u64, Wire<'_>)>, String> {
    let mut found = Vec::new();
    while !bytes.is_empty() {
        let tag = varint(&mut bytes)?;
        let value = match tag & 7 {
            0 => Wire::Varint(varint(&mut bytes)?),
            2 => {
                let length = usize::try_from(varint(&mut bytes)?).unwrap_or(usize::MAX);
                let value = bytes
                    .get(..length)
                    .ok_or("protobuf parse error: unexpected end")?;
                bytes = &bytes[length..];
                Wire::Bytes(value)
            }
            other => {
                return Err(format!(
                    "protobuf parse error: wire type {other} is not understood"
                ));
            }
        };
        found.push((tag >> 3, value));
    }
    Ok(found)
}

fn utf8(bytes: &[u8]) -> Result<String, String> {
    String::from_utf8(bytes.to_vec()).map_err(|error| format!("protobuf parse error: {error}"))
}

/// Go encodes negative numbers as 64-bit two's complement.
fn number(value: u64) -> Value {
    value.cast_signed().into()
}

fn message(of: &str, table: &[Field], bytes: &[u8]) -> Result<Map<String, Value>, String> {
    let mut object = Map::new();
    for (at, wire) in fields(bytes)? {
        let Some((_, name, kind)) = table.iter().find(|(number, _, _)| *number == at) else {
            return Err(unknown(of, at));
        };
        let value = match (*kind, wire) {
            (Kind::Skip, _)
            | (Kind::Text, Wire::Bytes([]))
            | (Kind::Number | Kind::Flag, Wire::Varint(0)) => continue,
            (Kind::Text, Wire::Bytes(bytes)) => utf8(bytes)?.into(),
            (Kind::Binary, Wire::Bytes(bytes)) => BASE64.encode(bytes).into(),
            (Kind::Number | Kind::NumberSet, Wire::Varint(value)) => number(value),
            (Kind::Flag | Kind::FlagSet, Wire::Varint(value)) => (value != 0).into(),
            (Kind::Message(table), Wire::Bytes(bytes)) => message(name, table, bytes)?.into(),
            (Kind::IntOrString, Wire::Bytes(bytes)) => match int_or_string(bytes)? {
                Some(value) => value,
                None => continue,
            },
            (Kind::Texts, Wire::Bytes(bytes)) => {
                push(&mut object, name, utf8(bytes)?.into());
                continue;
            }
            (Kind::Messages(table), Wire::Bytes(bytes)) => {
                let item = message(name, table, bytes)?;
                push(&mut object, name, item.into());
                continue;
            }
            (Kind::TextMap | Kind::BinaryMap, Wire::Bytes(bytes)) => {
                let value = if matches!(kind, Kind::TextMap) {
                    Kind::Text
                } else {
                    Kind::Binary
                };
                let entry = message(name, &[(1, "key", Kind::Text), (2, "value", value)], bytes)?;
                let key = entry.get("key").and_then(Value::as_str).unwrap_or_default();
                let value = entry.get("value").cloned().unwrap_or_else(|| "".into());
                if let Some(map) = object
                    .entry(*name)
                    .or_insert_with(|| Map::new().into())
                    .as_object_mut()
                {
                    map.insert(key.to_owned(), value);
                }
                continue;
            }
            _ => return Err(unknown(of, at)),
        };
        object.insert((*name).to_owned(), value);
    }
    Ok(object)
}

fn push(object: &mut Map<String, Value>, name: &str, item: Value) {
    if let Some(list) = object
        .entry(name)
        .or_insert_with(|| Value::Array(Vec::new()))
        .as_array_mut()
    {
        list.push(item);
    }
}

/// `IntOrString`; none if it is the number 0, which Go writes for "not set".
fn int_or_string(bytes: &[u8]) -> Result<Option<Value>, String> {
    let (mut is_text, mut integer, mut text) = (false, 0, String::new());
    for (at, wire) in fields(bytes)? {
        match (at, wire) {
            (1, Wire::Varint(kind)) => is_text = kind == 1,
            (2, Wire::Varint(value)) => integer = value,
            (3, Wire::Bytes(bytes)) => text = utf8(bytes)?,
            _ => return Err(unknown("IntOrString", at)),
        }
    }
    Ok(if is_text {
        Some(text.into())
    } else {
        (integer != 0).then(|| number(integer))
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn field(number: u8, value: &[u8]) -> Vec<u8> {
        [&[number << 3 | 2, u8::try_from(value.len()).unwrap()], value].concat()
    }

    fn body(kind: &str, raw: &[u8]) -> Vec<u8> {
        let types = [field(1, b"v1"), field(2, kind.as_bytes())].concat();
        [
            MAGIC.to_vec(),
            field(1, &types),
            field(2, raw),
            field(3, b""),
            field(4, b""),
        ]
        .concat()
    }

    #[test]
    fn objects_are_read() {
        let meta = [
            field(1, b"s"),
            field(2, b""),
            field(11, &[field(1, b"a"), field(2, b"b")].concat()),
        ]
        .concat();
        let port = [
            field(2, b"TCP"),
            vec![3 << 3, 80],
            field(4, &[1 << 3, 1, 2 << 3, 0, 3 << 3 | 2, 1, b'w']),
        ]
        .concat();
        let spec = [
            field(1, &port),
            field(4, b"ClusterIP"),
            vec![12 << 3, 0, 20 << 3 & 0x7f | 0x80, 1, 0],
        ]
        .concat();
        let read = decode(&body(
            "Service",
            &[field(1, &meta), field(2, &spec), field(3, b"")].concat(),
        ))
        .unwrap();
        let expected = json!({
            "apiVersion": "v1", "kind": "Service", "metadata": {"name": "s", "labels": {"a": "b"}},
            "spec": {
                "ports": [{"protocol": "TCP", "port": 80, "targetPort": "w"}], "type": "ClusterIP",
                "allocateLoadBalancerNodePorts": false,
            },
        });
        assert_eq!(read, expected);
        let secret = field(2, &[field(1, b"k"), field(2, &[0, 255])].concat());
        assert_eq!(
            decode(&body("Secret", &secret)).unwrap()["data"],
            json!({"k": "AP8="})
        );
    }

    #[test]
    fn nothing_is_dropped_or_believed() {
        let error = decode(&body("ConfigMap", &field(9, b"x"))).unwrap_err();
        assert!(error.contains("field 9 of ConfigMap"), "{error}");
        let error = decode(&body("Pod", b"")).unwrap_err();
        assert!(error.contains("Pod of v1"), "{error}");
        let good = body("ConfigMap", &field(1, &field(1, b"name")));
        assert!(decode(&good).is_ok());
        // A cut between fields cannot be seen here; what is missing then is found by the rules of the kind.
        for length in 0..good.len() {
            let whole = decode(&good[..length]).is_ok_and(|read| read["metadata"]["name"] == "name");
            assert!(!whole || length >= good.len() - 4, "{length}");
        }
        assert!(decode(&[MAGIC, &[0xff; 12]].concat()).is_err());
    }
}
