//! Table output (`Accept: application/json;as=Table;v=v1;g=meta.k8s.io`), which kubectl prints.

mod age;
mod columns;
mod rows;

use jiff::Timestamp;
use serde_json::{Value, json};

use crate::resource::ResourceInfo;

/// What each row's `object` holds (query parameter `includeObject`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum IncludeObject {
    /// Nothing.
    None,
    /// The object's metadata as `PartialObjectMetadata`. The API's default.
    #[default]
    Metadata,
    /// The whole object.
    Object,
}

/// A `Table` of the objects; the caller adds `metadata` of the list (resourceVersion, continue). `now` is RFC 3339.
pub fn table(r: &ResourceInfo, items: &[Value], include: IncludeObject, now: &str) -> Value {
    let now = now.parse::<Timestamp>().ok();
    let rows: Value = items
        .iter()
        .map(|item| {
            let mut row = json!({
                "cells": rows::cells(r, item, now),
                "object": row_object(item, include),
            });
            if let Some(conditions) = rows::conditions(r, item) {
                row["conditions"] = conditions;
            }
            row
        })
        .collect();
    json!({
        "kind": "Table",
        "apiVersion": "meta.k8s.io/v1",
        "metadata": {},
        "columnDefinitions": columns::definitions(r),
        "rows": rows,
    })
}

fn row_object(item: &Value, include: IncludeObject) -> Value {
    match include {
        IncludeObject::None => Value::Null,
        IncludeObject::Object => item.clone(),
        IncludeObject::Metadata => json!({
            "kind": "PartialObjectMetadata",
            "apiVersion": "meta.k8s.io/v1",
            "metadata": item["metadata"],
        }),
    }
}

#[cfg(test)]
mod tests {
    use rstest::rstest;

    use super::*;
    use crate::resource::{RESOURCES, find};

    fn fixture(name: &str) -> Value {
        let path = format!(
            "{}/tests/fixtures/apiserver-1.36/{name}.json",
            env!("CARGO_MANIFEST_DIR")
        );
        let file: Value = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
        file["response"]["body"].clone()
    }

    /// Columns, cells and row objects equal the recorded ones for the objects of which there is a recording.
    #[rstest]
    #[case("service-list-table", "services", "", "service-list", 3)]
    #[case(
        "endpointslice-list-table",
        "endpointslices",
        "discovery.k8s.io",
        "endpointslice-list",
        5
    )]
    #[case("node-list-table", "nodes", "", "node-get", 1)]
    #[case("pod-list-table", "pods", "", "pod-status-patch", 1)]
    fn tables_are_as_recorded(
        #[case] name: &str,
        #[case] plural: &str,
        #[case] group: &str,
        #[case] objects: &str,
        #[case] count: usize,
    ) {
        let r = find(group, "v1", plural).unwrap();
        let expected = fixture(name);
        let source = fixture(objects);
        let items = source["items"]
            .as_array()
            .cloned()
            .unwrap_or_else(|| vec![source]);
        let mut compared = 0;
        for item in items {
            let name = item["metadata"]["name"].clone();
            let Some(row) = expected["rows"]
                .as_array()
                .unwrap()
                .iter()
                .find(|r| r["object"]["metadata"]["name"] == name)
            else {
                continue;
            };
            let created: Timestamp = item["metadata"]["creationTimestamp"]
                .as_str()
                .unwrap()
                .parse()
                .unwrap();
            let age = row["cells"]
                .as_array()
                .unwrap()
                .iter()
                .find_map(|c| c.as_str()?.strip_suffix('s')?.parse().ok());
            let now = created + jiff::SignedDuration::from_secs(age.unwrap());
            let mut item = item;
            if plural == "pods" {
                // Its scheduler and kubelet spoke between the two recordings.
                item["metadata"] = row["object"]["metadata"].clone();
                item["spec"]["nodeName"] = "node-1".into();
            }
            let table = table(r, &[item], IncludeObject::Metadata, &now.to_string());
            assert_eq!(table["columnDefinitions"], expected["columnDefinitions"]);
            assert_eq!(&table["rows"][0], row);
            compared += 1;
        }
        assert_eq!(compared, count);
    }

    #[test]
    fn every_row_has_as_many_cells_as_there_are_columns() {
        for r in RESOURCES {
            for item in [
                json!({}),
                json!({"metadata": 1, "spec": [], "status": "x", "endpoints": {}, "ports": 3}),
            ] {
                let table = table(r, &[item], IncludeObject::None, "");
                let columns = table["columnDefinitions"].as_array().unwrap();
                assert_eq!(
                    table["rows"][0]["cells"].as_array().unwrap().len(),
                    columns.len(),
                    "{}",
                    r.kind
                );
                assert!(
                    columns.iter().all(|c| c["description"] != ""),
                    "{}: {columns:?}",
                    r.kind
                );
                assert_eq!(table["rows"][0]["object"], Value::Null);
            }
        }
    }

    #[rstest]
    #[case(json!({"status": {"phase": "Pending"}}), "0/1", "Pending", "0")]
    #[case(json!({"metadata": {"deletionTimestamp": "x"}, "status": {"phase": "Running"}}), "0/1", "Terminating", "0")]
    #[case(json!({"status": {"phase": "Running", "containerStatuses": [
        {"ready": true, "restartCount": 2, "state": {"running": {}}, "lastState": {"terminated": {"finishedAt": "2026-01-01T00:00:00Z"}}}
    ]}}), "1/1", "Running", "2 (60s ago)")]
    #[case(json!({"status": {"phase": "Running", "containerStatuses": [
        {"restartCount": 0, "state": {"waiting": {"reason": "CrashLoopBackOff"}}}
    ]}}), "0/1", "CrashLoopBackOff", "0")]
    #[case(json!({"status": {"phase": "Failed", "containerStatuses": [
        {"state": {"terminated": {"exitCode": 3}}}
    ]}}), "0/1", "ExitCode:3", "0")]
    #[case(json!({"status": {"phase": "Pending", "initContainerStatuses": [
        {"name": "i", "state": {"waiting": {"reason": "PodInitializing"}}}
    ]}}), "0/1", "Init:0/1", "0")]
    #[case(json!({"status": {"phase": "Pending", "initContainerStatuses": [
        {"name": "i", "restartCount": 1, "state": {"terminated": {"exitCode": 1, "signal": 9}}}
    ]}}), "0/1", "Init:Signal:9", "1")]
    fn pod_states(#[case] pod: Value, #[case] ready: &str, #[case] state: &str, #[case] restarts: &str) {
        let mut pod = pod;
        pod["spec"] = json!({"containers": [{"name": "c"}], "initContainers": [{"name": "i"}]});
        let r = find("", "v1", "pods").unwrap();
        let table = table(r, &[pod], IncludeObject::None, "2026-01-01T00:01:00Z");
        let cells = &table["rows"][0]["cells"];
        assert_eq!([&cells[1], &cells[2], &cells[3]], [ready, state, restarts]);
    }

    #[test]
    fn events_and_many_endpoints() {
        let r = find("", "v1", "events").unwrap();
        let event = json!({
            "metadata": {"name": "e"}, "type": "Warning", "reason": "Bad", "message": " text\n",
            "involvedObject": {"kind": "Pod", "name": "p"}, "firstTimestamp": "2026-01-01T00:00:00Z",
            "lastTimestamp": "2026-01-01T00:00:50Z", "count": 4, "source": {"component": "c", "host": "h"},
        });
        let table1 = table(r, &[event], IncludeObject::None, "2026-01-01T00:01:00Z");
        assert_eq!(
            table1["rows"][0]["cells"],
            json!([
                "10s", "Warning", "Bad", "pod/p", "", "c, h", "text", "60s", 4, "e"
            ])
        );
        let r = find("discovery.k8s.io", "v1", "endpointslices").unwrap();
        let slice = json!({"addressType": "IPv4", "ports": [{"name": "a"}, {}, {"port": 1}, {"port": 2}, {"port": 3}],
            "endpoints": [{"addresses": ["1.1.1.1", "1.1.1.2"]}, {"addresses": ["1.1.1.3", "1.1.1.4"]}]});
        let table2 = table(r, &[slice], IncludeObject::None, "");
        assert_eq!(table2["rows"][0]["cells"][2], "a,*,1 + 2 more...");
        assert_eq!(
            table2["rows"][0]["cells"][3],
            "1.1.1.1,1.1.1.2,1.1.1.3 + 1 more..."
        );
    }
}
