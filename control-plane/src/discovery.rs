//! Discovery documents: which groups, versions and resources are served.

use serde_json::{Map, Value, json};

use crate::resource::{RESOURCES, ResourceInfo};

/// Body of `/api`. `server_address` is the host and port under which clients reach the API.
pub fn api_versions(server_address: &str) -> Value {
    json!({
        "kind": "APIVersions",
        "versions": ["v1"],
        "serverAddressByClientCIDRs": [{"clientCIDR": "0.0.0.0/0", "serverAddress": server_address}],
    })
}

/// Named groups and their version, in the order of the resource table. Every group has one version.
fn groups() -> Vec<(&'static str, &'static str)> {
    let mut found: Vec<(&str, &str)> = RESOURCES
        .iter()
        .filter(|r| !r.group.is_empty())
        .map(|r| (r.group, r.version))
        .collect();
    found.dedup();
    found
}

fn group_entry(group: &str, version: &str) -> Map<String, Value> {
    let entry = json!({"groupVersion": format!("{group}/{version}"), "version": version});
    let mut map = Map::new();
    map.insert("name".into(), group.into());
    map.insert("versions".into(), json!([entry]));
    map.insert("preferredVersion".into(), entry);
    map
}

/// Body of `/apis`.
pub fn api_groups() -> Value {
    let groups: Vec<Value> = groups()
        .into_iter()
        .map(|(g, v)| group_entry(g, v).into())
        .collect();
    json!({"kind": "APIGroupList", "apiVersion": "v1", "groups": groups})
}

/// Body of `/apis/{group}`.
pub fn api_group(group: &str) -> Option<Value> {
    let (group, version) = groups().into_iter().find(|(g, _)| *g == group)?;
    let mut map = group_entry(group, version);
    map.insert("kind".into(), "APIGroup".into());
    map.insert("apiVersion".into(), "v1".into());
    Some(map.into())
}

fn of_group(group: &str, version: &str) -> Vec<&'static ResourceInfo> {
    RESOURCES
        .iter()
        .filter(|r| r.group == group && r.version == version)
        .collect()
}

/// Body of `/api/v1` (empty group) or `/apis/{group}/{version}`.
pub fn resource_list(group: &str, version: &str) -> Option<Value> {
    let mut resources = Vec::new();
    for r in of_group(group, version) {
        let mut entry = json!({
            "name": r.plural,
            "singularName": r.singular,
            "namespaced": r.namespaced,
            "kind": r.kind,
            "verbs": r.verbs,
        });
        if !r.storage_version_hash.is_empty() {
            entry["storageVersionHash"] = r.storage_version_hash.into();
        }
        add_names(&mut entry, r);
        resources.push(entry);
        for sub in r.subresources {
            let mut entry = json!({
                "name": format!("{}/{}", r.plural, sub.name),
                "singularName": "",
                "namespaced": r.namespaced,
                "kind": sub.kind,
                "verbs": sub.verbs,
            });
            if !sub.version.is_empty() {
                entry["group"] = sub.group.into();
                entry["version"] = sub.version.into();
            }
            resources.push(entry);
        }
    }
    if resources.is_empty() {
        return None;
    }
    let mut list = json!({"kind": "APIResourceList", "resources": resources});
    if group.is_empty() {
        list["groupVersion"] = version.into();
    } else {
        // kube-apiserver leaves it out for the core group.
        list["apiVersion"] = "v1".into();
        list["groupVersion"] = format!("{group}/{version}").into();
    }
    Some(list)
}

fn add_names(entry: &mut Value, r: &ResourceInfo) {
    if !r.short_names.is_empty() {
        entry["shortNames"] = json!(r.short_names);
    }
    if !r.categories.is_empty() {
        entry["categories"] = json!(r.categories);
    }
}

/// Content type of the aggregated documents.
pub const AGGREGATED_V2: &str = "application/json;g=apidiscovery.k8s.io;v=v2;as=APIGroupDiscoveryList";

/// Aggregated form of `/api`.
pub fn aggregated_api() -> Value {
    aggregated(&[aggregated_group("", "v1")])
}

/// Aggregated form of `/apis`.
pub fn aggregated_apis() -> Value {
    let items: Vec<Value> = groups()
        .into_iter()
        .map(|(g, v)| aggregated_group(g, v))
        .collect();
    aggregated(&items)
}

fn aggregated(items: &[Value]) -> Value {
    json!({
        "kind": "APIGroupDiscoveryList",
        "apiVersion": "apidiscovery.k8s.io/v2",
        "metadata": {},
        "items": items,
    })
}

fn aggregated_group(group: &str, version: &str) -> Value {
    let resources: Vec<Value> = of_group(group, version)
        .into_iter()
        .map(|r| {
            let mut entry = json!({
                "resource": r.plural,
                "responseKind": {"group": "", "version": "", "kind": r.kind},
                "scope": if r.namespaced { "Namespaced" } else { "Cluster" },
                "singularResource": r.singular,
                "verbs": r.verbs,
            });
            add_names(&mut entry, r);
            let subresources: Vec<Value> = r
                .subresources
                .iter()
                .map(|s| {
                    json!({
                        "subresource": s.name,
                        "responseKind": {"group": s.group, "version": s.version, "kind": s.kind},
                        "verbs": s.verbs,
                    })
                })
                .collect();
            if !subresources.is_empty() {
                entry["subresources"] = subresources.into();
            }
            entry
        })
        .collect();
    let metadata = if group.is_empty() {
        json!({})
    } else {
        json!({"name": group})
    };
    json!({
        "metadata": metadata,
        "versions": [{"version": version, "resources": resources, "freshness": "Current"}],
    })
}

/// Body of `/version`: the Kubernetes version whose API this is, with Beeline's own as build metadata.
pub fn version() -> Value {
    let platform = match std::env::consts::ARCH {
        "x86_64" => "linux/amd64",
        "aarch64" => "linux/arm64",
        other => other,
    };
    json!({
        "major": "1",
        "minor": "36",
        "emulationMajor": "1",
        "emulationMinor": "36",
        "minCompatibilityMajor": "1",
        "minCompatibilityMinor": "35",
        "gitVersion": concat!("v1.36.2+beeline.", env!("CARGO_PKG_VERSION")),
        "gitCommit": "",
        "gitTreeState": "clean",
        "buildDate": "",
        "goVersion": "",
        "compiler": "rustc",
        "platform": platform,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fixture(name: &str) -> Value {
        let path = format!(
            "{}/tests/fixtures/apiserver-1.36/{name}.json",
            env!("CARGO_MANIFEST_DIR")
        );
        let file: Value = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
        file["response"]["body"].clone()
    }

    /// Every entry that we have equals the recorded one of that name; we have fewer.
    fn assert_subset(ours: &Value, recorded: &Value, key: &str) {
        let ours = ours.as_array().unwrap();
        assert!(!ours.is_empty());
        for entry in ours {
            let expected = recorded
                .as_array()
                .unwrap()
                .iter()
                .find(|r| r[key] == entry[key])
                .unwrap();
            assert_eq!(entry, expected);
        }
    }

    #[test]
    fn documents_are_as_recorded() {
        assert_eq!(api_versions("10.99.0.1:6443"), fixture("api"));
        assert_eq!(
            api_group("discovery.k8s.io").unwrap(),
            fixture("apis-discovery-group")
        );
        assert_eq!(
            resource_list("discovery.k8s.io", "v1").unwrap(),
            fixture("apis-discovery-v1")
        );
        assert_subset(&api_groups()["groups"], &fixture("apis")["groups"], "name");
        let ours = resource_list("", "v1").unwrap();
        let recorded = fixture("api-v1");
        assert_subset(&ours["resources"], &recorded["resources"], "name");
        assert_eq!(ours["groupVersion"], recorded["groupVersion"]);
        assert_eq!(ours.get("apiVersion"), recorded.get("apiVersion"));
        let keys = |v: &Value| v.as_object().unwrap().keys().cloned().collect::<Vec<_>>();
        assert_eq!(keys(&version()), keys(&fixture("version")));
        assert!(api_group("nope").is_none() && resource_list("", "v2").is_none());
    }

    #[test]
    fn aggregated_documents_are_as_recorded() {
        let mut recorded = fixture("api-aggregated");
        let mut ours = aggregated_api();
        let theirs = recorded["items"][0]["versions"][0]["resources"].take();
        let mine = ours["items"][0]["versions"][0]["resources"].take();
        assert_eq!(ours, recorded);
        for entry in mine.as_array().unwrap() {
            let expected = theirs
                .as_array()
                .unwrap()
                .iter()
                .find(|r| r["resource"] == entry["resource"])
                .unwrap();
            let (mut entry, mut expected) = (entry.clone(), expected.clone());
            if let Some(subs) = entry.as_object_mut().unwrap().remove("subresources") {
                assert_subset(&subs, &expected["subresources"], "subresource");
            }
            expected.as_object_mut().unwrap().remove("subresources");
            assert_eq!(entry, expected);
        }
        assert_eq!(
            aggregated_apis()["items"].as_array().unwrap().len(),
            groups().len()
        );
    }
}
