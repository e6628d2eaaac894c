//! Brings an object into the shape of its schema, as decoding it into kube-apiserver's Go types would: a value of a
//! wrong type is an error, an unknown field is dropped and reported, null and empty optional values disappear.

use serde_json::{Map, Value};

use super::schema;

/// Prunes `object` in place and returns the paths of unknown fields, such as `spec.ports[0].foo`.
///
/// # Errors
/// The text of the first type error, worded as Go's JSON decoder does.
pub(super) fn shape(name: &str, object: &mut Value) -> Result<Vec<String>, String> {
    let mut walker = Walker {
        path: Vec::new(),
        unknown: Vec::new(),
    };
    walker.named(name, object)?;
    Ok(walker.unknown)
}

enum Step {
    Field(String),
    Index(usize),
}

struct Walker {
    path: Vec<Step>,
    unknown: Vec<String>,
}

impl Walker {
    /// `spec.ports[0].port`
    fn path(&self) -> String {
        let mut text = String::new();
        for step in &self.path {
            match step {
                Step::Field(name) => {
                    if !text.is_empty() {
                        text.push('.');
                    }
                    text.push_str(name);
                }
                Step::Index(i) => text.push_str(&format!("[{i}]")),
            }
        }
        text
    }

    /// `spec.ports.port`
    fn path_without_indexes(&self) -> String {
        let names: Vec<&str> = self
            .path
            .iter()
            .filter_map(|s| match s {
                Step::Field(name) => Some(name.as_str()),
                Step::Index(_) => None,
            })
            .collect();
        names.join(".")
    }

    fn mismatch(&self, owner: &str, value: &Value, expected: &str) -> String {
        let actual = match value {
            Value::Null => "null".to_owned(),
            Value::Bool(_) => "bool".to_owned(),
            Value::Number(n) if expected.starts_with("int") => format!("number {n}"),
            Value::Number(_) => "number".to_owned(),
            Value::String(_) => "string".to_owned(),
            Value::Array(_) => "array".to_owned(),
            Value::Object(_) => "object".to_owned(),
        };
        if self.path.is_empty() {
            return format!("json: cannot unmarshal {actual} into Go value of type {expected}");
        }
        format!(
            "json: cannot unmarshal {actual} into Go struct field {owner}.{} of type {expected}",
            self.path_without_indexes()
        )
    }

    fn named(&mut self, name: &str, value: &mut Value) -> Result<(), String> {
        match schema::named(name) {
            Some(schema) => self.value(short(name), name, schema, value),
            None => Ok(()),
        }
    }

    /// `owner` is the Go type that the value is a field of; `type_name` the schema's own name, or empty.
    fn value(
        &mut self,
        owner: &str,
        type_name: &str,
        schema: &Value,
        value: &mut Value,
    ) -> Result<(), String> {
        if let Some(name) = schema::reference(schema) {
            return match schema::named(name) {
                Some(target) => self.value(owner, name, target, value),
                None => Ok(()),
            };
        }
        if schema.get("x-kubernetes-int-or-string").is_some() {
            if !(value.is_string() || value.is_number()) {
                return Err(self.mismatch(owner, value, "intstr.IntOrString"));
            }
            return Ok(());
        }
        match schema.get("type").and_then(Value::as_str) {
            Some("string") => {
                if !value.is_string() {
                    return Err(self.mismatch(owner, value, "string"));
                }
                let text = value.as_str().unwrap_or_default();
                let format = schema.get("format").and_then(Value::as_str);
                if format == Some("byte") {
                    base64(text)?;
                }
                if format == Some("date-time") && text.parse::<jiff::Timestamp>().is_err() {
                    return Err(format!(
                        "parsing time {text:?} as \"2006-01-02T15:04:05Z07:00\": cannot parse {text:?}"
                    ));
                }
                Ok(())
            }
            Some("boolean") => {
                if value.is_boolean() {
                    Ok(())
                } else {
                    Err(self.mismatch(owner, value, "bool"))
                }
            }
            Some("integer") => {
                let wide = schema.get("format").and_then(Value::as_str) == Some("int64");
                // A whole number written as 80.0 is a whole number.
                if let Some(n) = value
                    .as_f64()
                    .filter(|n| value.is_f64() && n.fract() == 0.0 && n.abs() < 9e15)
                    && let Ok(whole) = format!("{n:.0}").parse::<i64>()
                {
                    *value = whole.into();
                }
                match value.as_i64() {
                    Some(n) if wide || i32::try_from(n).is_ok() => Ok(()),
                    _ => Err(self.mismatch(owner, value, if wide { "int64" } else { "int32" })),
                }
            }
            Some("number") => {
                if value.is_number() {
                    Ok(())
                } else {
                    Err(self.mismatch(owner, value, "float64"))
                }
            }
            Some("array") => {
                let Some(items) = schema.get("items") else {
                    return Ok(());
                };
                if !value.is_array() {
                    let expected = format!("[]{}", go_type(items));
                    return Err(self.mismatch(owner, value, &expected));
                }
                for (i, item) in value.as_array_mut().into_iter().flatten().enumerate() {
                    self.path.push(Step::Index(i));
                    if item.is_null() {
                        *item = zero(items);
                    }
                    self.value(owner, "", items, item)?;
                    self.path.pop();
                }
                Ok(())
            }
            Some("object") => self.object(owner, type_name, schema, value),
            _ => Ok(()),
        }
    }

    fn object(
        &mut self,
        owner: &str,
        type_name: &str,
        schema: &Value,
        value: &mut Value,
    ) -> Result<(), String> {
        if !value.is_object() {
            let expected = if type_name.is_empty() {
                go_type(schema)
            } else {
                format!("v1.{}", short(type_name))
            };
            return Err(self.mismatch(owner, value, &expected));
        }
        let Some(map) = value.as_object_mut() else {
            return Ok(());
        };
        if let Some(properties) = schema.get("properties").and_then(Value::as_object) {
            return self.fields(type_name, schema, properties, map);
        }
        if let Some(values) = schema.get("additionalProperties").filter(|v| v.is_object()) {
            for (key, item) in map.iter_mut() {
                self.path.push(Step::Field(key.clone()));
                if item.is_null() {
                    *item = zero(values);
                }
                self.value(owner, "", values, item)?;
                self.path.pop();
            }
        }
        Ok(())
    }

    fn fields(
        &mut self,
        type_name: &str,
        schema: &Value,
        properties: &Map<String, Value>,
        map: &mut Map<String, Value>,
    ) -> Result<(), String> {
        let keys: Vec<String> = map.keys().cloned().collect();
        for key in keys {
            self.path.push(Step::Field(key.clone()));
            match properties.get(&key) {
                None => {
                    self.unknown.push(self.path());
                    map.remove(&key);
                }
                Some(field) => {
                    if let Some(value) = map.get_mut(&key) {
                        if !value.is_null() {
                            self.value(short(type_name), "", field, value)?;
                        }
                        let required = schema
                            .get("required")
                            .and_then(Value::as_array)
                            .is_some_and(|r| r.iter().any(|n| n.as_str() == Some(key.as_str())));
                        if value.is_null() || (!required && vanishes(type_name, field, value)) {
                            map.remove(&key);
                        }
                    }
                }
            }
            self.path.pop();
        }
        Ok(())
    }
}

/// Refuses what is no base64, with the place of the first wrong byte as Go's decoder gives it.
fn base64(text: &str) -> Result<(), String> {
    use base64::Engine as _;
    match base64::engine::general_purpose::STANDARD.decode(text) {
        Ok(_) => Ok(()),
        Err(base64::DecodeError::InvalidByte(at, _) | base64::DecodeError::InvalidLastSymbol(at, _)) => {
            Err(format!("illegal base64 data at input byte {at}"))
        }
        Err(_) => Err(format!("illegal base64 data at input byte {}", text.len())),
    }
}

/// Whether an optional value is left out when it is written, because it is empty. Go pointers are not: an empty object
/// such as `emptyDir: {}` means something, and so does the empty name of an endpoint port.
fn vanishes(type_name: &str, field: &Value, value: &Value) -> bool {
    match value {
        Value::String(s) => s.is_empty() && !type_name.ends_with(".EndpointPort"),
        Value::Array(list) => list.is_empty(),
        Value::Object(map) => map.is_empty() && field.get("additionalProperties").is_some(),
        _ => false,
    }
}

/// `io.k8s.api.core.v1.ServicePort` -> `ServicePort`
fn short(name: &str) -> &str {
    name.rsplit('.').next().unwrap_or(name)
}

/// Go's zero value for null in a list or map.
fn zero(schema: &Value) -> Value {
    let target = schema::reference(schema)
        .and_then(schema::named)
        .unwrap_or(schema);
    match target.get("type").and_then(Value::as_str) {
        Some("string") => Value::String(String::new()),
        Some("integer" | "number") => 0.into(),
        Some("boolean") => false.into(),
        Some("array") => Value::Array(Vec::new()),
        _ => Value::Object(Map::new()),
    }
}

fn go_type(schema: &Value) -> String {
    if let Some(name) = schema::reference(schema) {
        return format!("v1.{}", short(name));
    }
    match schema.get("type").and_then(Value::as_str) {
        Some("integer") => schema
            .get("format")
            .and_then(Value::as_str)
            .unwrap_or("int64")
            .to_owned(),
        Some("boolean") => "bool".to_owned(),
        Some("number") => "float64".to_owned(),
        Some("array") => format!("[]{}", schema.get("items").map(go_type).unwrap_or_default()),
        Some("object") => match schema.get("additionalProperties") {
            Some(values) => format!("map[string]{}", go_type(values)),
            None => "map[string]interface {}".to_owned(),
        },
        _ => "string".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    const SERVICE: &str = "io.k8s.api.core.v1.Service";

    #[test]
    fn unknown_null_and_empty_fields_go() {
        let mut v = json!({
            "metadata": {"name": "a", "labels": {}, "creationTimestamp": null, "what": {"deep": []}},
            "spec": {"ports": [{"port": 80.0, "x": 1}], "clusterIP": "", "selector": {"k": null}},
            "top": 1,
        });
        let unknown = shape(SERVICE, &mut v).unwrap();
        assert_eq!(unknown, ["metadata.what", "spec.ports[0].x", "top"]);
        assert_eq!(
            v,
            json!({"metadata": {"name": "a"}, "spec": {"ports": [{"port": 80}], "selector": {"k": ""}}})
        );
    }

    #[test]
    fn wrong_types_are_named() {
        for (object, text) in [
            (
                json!({"spec": {"ports": [{"port": "x"}]}}),
                "json: cannot unmarshal string into Go struct field ServicePort.spec.ports.port of type int32",
            ),
            (
                json!({"spec": {"ports": [{"port": 1.5}]}}),
                "json: cannot unmarshal number 1.5 into Go struct field ServicePort.spec.ports.port of type int32",
            ),
            (
                json!({"spec": {"ports": [{"port": 99_999_999_999_u64}]}}),
                "json: cannot unmarshal number 99999999999 into Go struct field ServicePort.spec.ports.port of type int32",
            ),
            (
                json!({"spec": {"ports": {}}}),
                "json: cannot unmarshal object into Go struct field ServiceSpec.spec.ports of type []v1.ServicePort",
            ),
            (
                json!({"spec": "x"}),
                "json: cannot unmarshal string into Go struct field Service.spec of type v1.ServiceSpec",
            ),
            (
                json!({"spec": {"selector": {"a": 1}}}),
                "json: cannot unmarshal number into Go struct field ServiceSpec.spec.selector.a of type string",
            ),
            (
                json!(7),
                "json: cannot unmarshal number into Go value of type v1.Service",
            ),
        ] {
            let mut object = object;
            assert_eq!(shape(SERVICE, &mut object), Err(text.to_owned()));
        }
    }

    #[test]
    fn bytes_are_base64() {
        let mut secret = json!({"data": {"a": "AA=="}});
        assert_eq!(shape("io.k8s.api.core.v1.Secret", &mut secret), Ok(Vec::new()));
        let mut secret = json!({"data": {"a": "A-=="}});
        let error = shape("io.k8s.api.core.v1.Secret", &mut secret).unwrap_err();
        assert_eq!(error, "illegal base64 data at input byte 1");
    }

    #[test]
    fn empty_objects_that_mean_something_stay() {
        let mut v =
            json!({"spec": {"containers": [{"name": "c"}], "volumes": [{"name": "v", "emptyDir": {}}]}});
        shape("io.k8s.api.core.v1.Pod", &mut v).unwrap();
        assert_eq!(v["spec"]["volumes"][0]["emptyDir"], json!({}));
        let mut v = json!({"addressType": "IPv4", "endpoints": [], "ports": [{"name": "", "port": 1}]});
        shape("io.k8s.api.discovery.v1.EndpointSlice", &mut v).unwrap();
        assert_eq!(v["ports"][0]["name"], "");
    }
}
