//! Sets of field paths, in the form of `FieldsV1`: a tree whose edges are `f:name`, `k:{"key":"value"}` or `v:value`.

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};

/// A set of paths. The text of an edge is canonical (keys sorted, no blanks), so that equal edges are equal texts.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Set(pub(super) BTreeMap<String, Node>);

/// What is known about one path.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Node {
    /// Whether the path itself is in the set.
    pub(super) member: bool,
    /// Longer paths.
    pub(super) below: Set,
}

impl Set {
    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(super) fn insert(&mut self, path: &[String]) {
        let Some((first, rest)) = path.split_first() else {
            return;
        };
        let node = self.0.entry(first.clone()).or_default();
        if rest.is_empty() {
            node.member = true;
        } else {
            node.below.insert(rest);
        }
    }

    fn combine(&self, other: &Self, member: fn(bool, bool) -> bool) -> Self {
        let mut result = BTreeMap::new();
        let nothing = Node::default();
        for edge in self.0.keys().chain(other.0.keys()) {
            if result.contains_key(edge) {
                continue;
            }
            let a = self.0.get(edge).unwrap_or(&nothing);
            let b = other.0.get(edge).unwrap_or(&nothing);
            let node = Node {
                member: member(a.member, b.member),
                below: a.below.combine(&b.below, member),
            };
            if node.member || !node.below.is_empty() {
                result.insert(edge.clone(), node);
            }
        }
        Self(result)
    }

    pub(super) fn union(&self, other: &Self) -> Self {
        self.combine(other, |a, b| a || b)
    }

    pub(super) fn intersection(&self, other: &Self) -> Self {
        self.combine(other, |a, b| a && b)
    }

    pub(super) fn difference(&self, other: &Self) -> Self {
        self.combine(other, |a, b| a && !b)
    }

    /// Forgets a path and everything below it.
    pub(super) fn cut(&mut self, path: &[&str]) {
        let Some((first, rest)) = path.split_first() else {
            return;
        };
        if rest.is_empty() {
            self.0.remove(*first);
        } else if let Some(node) = self.0.get_mut(*first) {
            node.below.cut(rest);
            if !node.member && node.below.is_empty() {
                self.0.remove(*first);
            }
        }
    }

    /// Every path of the set as people read it, such as `.spec.ports[port=80,protocol="TCP"].name`.
    pub(super) fn paths(&self) -> Vec<String> {
        let mut found = Vec::new();
        self.collect("", &mut found);
        found
    }

    fn collect(&self, prefix: &str, found: &mut Vec<String>) {
        for (edge, node) in &self.0 {
            let path = format!("{prefix}{}", readable(edge));
            if node.member {
                found.push(path.clone());
            }
            node.below.collect(&path, found);
        }
    }

    /// The `fieldsV1` of this set.
    pub(super) fn encode(&self) -> Value {
        let edges: Map<String, Value> = self
            .0
            .iter()
            .map(|(edge, node)| {
                let mut below = node.below.encode();
                if node.member && !node.below.is_empty() {
                    below["."] = json!({});
                }
                (edge.clone(), below)
            })
            .collect();
        edges.into()
    }

    /// Reads a `fieldsV1`; nothing if it is none.
    pub(super) fn decode(fields: &Value) -> Option<Self> {
        let mut set = BTreeMap::new();
        for (edge, below) in fields.as_object()? {
            if edge == "." {
                continue;
            }
            let inner = below.as_object()?;
            let node = Node {
                member: inner.is_empty() || inner.contains_key("."),
                below: Self::decode(below)?,
            };
            set.insert(canonical(edge)?, node);
        }
        Some(Self(set))
    }
}

/// The edge of a named field or map key.
pub(super) fn field(name: &str) -> String {
    format!("f:{name}")
}

fn canonical(edge: &str) -> Option<String> {
    match edge.split_at_checked(2)? {
        ("f:", _) => Some(edge.to_owned()),
        // serde_json keeps the keys of an object sorted.
        (kind @ ("k:" | "v:"), text) => {
            let value: Value = serde_json::from_str(text).ok()?;
            (kind == "v:" || value.is_object()).then(|| format!("{kind}{value}"))
        }
        ("i:", text) => text.parse::<u32>().ok().map(|_| edge.to_owned()),
        _ => None,
    }
}

/// The edge as people read it.
pub(super) fn readable(edge: &str) -> String {
    match edge.split_at_checked(2) {
        Some(("f:", name)) => format!(".{name}"),
        Some(("k:", keys)) => {
            let keys: Map<String, Value> = serde_json::from_str(keys).unwrap_or_default();
            let list: Vec<String> = keys.iter().map(|(key, value)| format!("{key}={value}")).collect();
            format!("[{}]", list.join(","))
        }
        Some(("v:", value)) => format!("[={value}]"),
        Some((_, index)) => format!("[{index}]"),
        None => edge.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(value: &Value) -> Set {
        Set::decode(value).unwrap()
    }

    #[test]
    fn sets_are_read_and_written() {
        let fields = json!({
            "f:spec": {"f:ports": {".": {}, "k:{\"port\":80,\"protocol\":\"TCP\"}": {".": {}, "f:port": {}}}, "f:a": {}},
            "f:finalizers": {"v:\"x\"": {}},
        });
        assert_eq!(set(&fields).encode(), fields);
        assert_eq!(
            set(&fields).paths(),
            [
                ".finalizers[=\"x\"]",
                ".spec.a",
                ".spec.ports",
                ".spec.ports[port=80,protocol=\"TCP\"]",
                ".spec.ports[port=80,protocol=\"TCP\"].port",
            ]
        );
        // Another client's way to write the same key.
        let other = json!({"k:{\"protocol\": \"TCP\", \"port\": 80}": {}});
        assert_eq!(
            set(&other).encode(),
            json!({"k:{\"port\":80,\"protocol\":\"TCP\"}": {}})
        );
        for bad in [
            json!([]),
            json!({"x": {}}),
            json!({"f:a": 1}),
            json!({"k:1": {}}),
            json!({"": {}}),
        ] {
            assert_eq!(Set::decode(&bad), None, "{bad}");
        }
    }

    #[test]
    fn sets_are_combined_path_by_path() {
        let a = set(&json!({"f:a": {".": {}, "f:b": {}}, "f:c": {}}));
        let b = set(&json!({"f:a": {}, "f:d": {}}));
        assert_eq!(
            a.union(&b).encode(),
            json!({"f:a": {".": {}, "f:b": {}}, "f:c": {}, "f:d": {}})
        );
        assert_eq!(a.intersection(&b).encode(), json!({"f:a": {}}));
        assert_eq!(a.difference(&b).encode(), json!({"f:a": {"f:b": {}}, "f:c": {}}));
        let mut cut = a;
        cut.cut(&["f:a", "f:b"]);
        assert_eq!(cut.encode(), json!({"f:a": {}, "f:c": {}}));
    }
}
