//! Rules of ConfigMap, Secret, ServiceAccount and Lease.

use base64::Engine as _;
use serde_json::{Value, json};

use super::rules::{default, immutable};
use crate::error::Cause;

/// All values of a ConfigMap or Secret together, in bytes.
const MAX_DATA: usize = 1024 * 1024;

const KEY: &str = "a valid config key must consist of alphanumeric characters, '-', '_' or '.' (e.g. 'key.name',  or \
                   'KEY_NAME',  or 'key-name', regex used for validation is '[-._a-zA-Z0-9]+')";

fn key_errors(key: &str) -> Vec<&'static str> {
    let shaped = |c: u8| c.is_ascii_alphanumeric() || matches!(c, b'-' | b'_' | b'.');
    let mut errors = Vec::new();
    if key.len() > 253 {
        errors.push("must be no more than 253 characters");
    }
    if key.is_empty() || !key.bytes().all(shaped) {
        errors.push(KEY);
    }
    match key {
        "." => errors.push("must not be '.'"),
        ".." => errors.push("must not be '..'"),
        _ if key.starts_with("..") => errors.push("must not start with '..'"),
        _ => {}
    }
    errors
}

/// Checks the keys of a map of values and returns the size of the values.
fn data(object: &Value, field: &str, causes: &mut Vec<Cause>) -> usize {
    let mut size = 0;
    for (key, value) in object[field].as_object().into_iter().flatten() {
        for why in key_errors(key) {
            causes.push(Cause::invalid(
                format!("{field}[{key}]"),
                &key.as_str().into(),
                why,
            ));
        }
        size += value.as_str().map_or(0, str::len);
    }
    size
}

/// What is wrong with a ConfigMap.
pub(super) fn validate_config_map(object: &Value) -> Vec<Cause> {
    let mut causes = Vec::new();
    let mut size = data(object, "data", &mut causes);
    // Base64 makes four bytes of three.
    size += data(object, "binaryData", &mut causes) / 4 * 3;
    for (key, _) in object["binaryData"].as_object().into_iter().flatten() {
        if object["data"].get(key).is_some() {
            let why = format!("duplicate of key present in data (field \"data\", key {key:?})");
            causes.push(Cause::invalid(
                format!("binaryData[{key}]"),
                &key.as_str().into(),
                &why,
            ));
        }
    }
    if size > MAX_DATA {
        causes.push(Cause::too_long("", MAX_DATA));
    }
    causes
}

/// Text values are stored encoded, next to the others.
pub(super) fn secret_defaults(secret: &mut Value) {
    default(secret, "type", "Opaque");
    let Some(map) = secret.as_object_mut() else { return };
    let Some(Value::Object(texts)) = map.remove("stringData") else {
        return;
    };
    if let Some(data) = map.entry("data").or_insert_with(|| json!({})).as_object_mut() {
        for (key, text) in texts {
            let encoded = base64::engine::general_purpose::STANDARD.encode(text.as_str().unwrap_or_default());
            data.insert(key, encoded.into());
        }
    }
}

/// What is wrong with a Secret.
pub(super) fn validate_secret(object: &Value) -> Vec<Cause> {
    let mut causes = Vec::new();
    if data(object, "data", &mut causes) / 4 * 3 > MAX_DATA {
        causes.push(Cause::too_long("data", MAX_DATA));
    }
    let needed: &[&str] = match object["type"].as_str().unwrap_or_default() {
        "kubernetes.io/tls" => &["tls.crt", "tls.key"],
        "kubernetes.io/dockerconfigjson" => &[".dockerconfigjson"],
        "kubernetes.io/dockercfg" => &[".dockercfg"],
        "kubernetes.io/ssh-auth" => &["ssh-privatekey"],
        _ => &[],
    };
    for key in needed {
        if object["data"].get(key).is_none() {
            causes.push(Cause::required(format!("data[{key}]"), ""));
        }
    }
    let account = "kubernetes.io/service-account.name";
    if object["type"] == "kubernetes.io/service-account-token"
        && object["metadata"]["annotations"][account]
            .as_str()
            .unwrap_or_default()
            .is_empty()
    {
        causes.push(Cause::required(format!("metadata.annotations[{account}]"), ""));
    }
    causes
}

/// What is wrong with a change of a Secret.
pub(super) fn validate_secret_update(old: &Value, new: &Value) -> Vec<Cause> {
    let mut causes = Vec::new();
    immutable(&old["type"], &new["type"], "type", &mut causes);
    causes.extend(frozen(old, new));
    causes
}

/// ConfigMaps and Secrets can be frozen.
pub(super) fn frozen(old: &Value, new: &Value) -> Vec<Cause> {
    if old["immutable"] != true {
        return Vec::new();
    }
    ["immutable", "data", "binaryData"]
        .iter()
        .filter(|field| old[**field] != new[**field])
        .map(|field| Cause::forbidden(*field, "field is immutable when `immutable` is set"))
        .collect()
}

/// What is wrong with a Lease.
pub(super) fn validate_lease(object: &Value) -> Vec<Cause> {
    let mut causes = Vec::new();
    let spec = &object["spec"];
    if spec["leaseDurationSeconds"].as_i64().is_some_and(|n| n <= 0) {
        causes.push(Cause::invalid(
            "spec.leaseDurationSeconds",
            &spec["leaseDurationSeconds"],
            "must be greater than 0",
        ));
    }
    if spec["leaseTransitions"].as_i64().is_some_and(|n| n < 0) {
        causes.push(Cause::invalid(
            "spec.leaseTransitions",
            &spec["leaseTransitions"],
            "must be greater than or equal to 0",
        ));
    }
    if spec["holderIdentity"].as_str().is_some_and(str::is_empty) {
        causes.push(Cause::invalid(
            "spec.holderIdentity",
            &"".into(),
            "must not be empty",
        ));
    }
    causes
}
