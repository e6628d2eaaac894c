//! Text for people. JSON is for programs.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::Write as _;

use serde::Serialize;

use crate::agent::view::{BackendView, FrontendView, ServiceView, Services, Status};
use crate::overlay::view::Nodes;

/// Writes to standard output; that the reader has gone away (`| head`) is no error.
pub(super) fn print(text: &str) -> anyhow::Result<()> {
    match std::io::stdout().write_all(text.as_bytes()) {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => Err(error.into()),
        _ => Ok(()),
    }
}

fn socket(address: &str, port: u16) -> String {
    if address.contains(':') {
        format!("[{address}]:{port}")
    } else {
        format!("{address}:{port}")
    }
}

/// Left-aligned columns, two spaces apart, as wide as their longest cell.
fn table(rows: &[Vec<String>]) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |i: usize| {
        rows.iter()
            .filter_map(|row| row.get(i))
            .map(|cell| cell.chars().count())
            .max()
            .unwrap_or(0)
    };
    let widths: Vec<usize> = (0..columns).map(width).collect();
    let mut out = String::new();
    for row in rows {
        let mut line = String::new();
        for (cell, width) in row.iter().zip(&widths) {
            // writing to a String does not fail
            let _: std::fmt::Result = write!(line, "{cell:width$}  ");
        }
        out.push_str(line.trim_end());
        out.push('\n');
    }
    out
}

fn name(service: &ServiceView) -> String {
    if service.name.is_empty() {
        return "(left from an earlier agent)".into();
    }
    let port = if service.port.is_empty() {
        String::new()
    } else {
        format!(":{}", service.port)
    };
    format!("{}/{}{port}", service.namespace, service.name)
}

/// The algorithm, and as `ipvsadm` says it, how long a client keeps its backend.
fn algorithm(service: &ServiceView) -> String {
    match service.affinity_seconds {
        0 => service.algorithm.clone(),
        seconds => format!("{} persistent {seconds}", service.algorithm),
    }
}

/// The kind of a frontend, and what is special about it.
fn kind(service: &ServiceView, frontend: &FrontendView) -> String {
    let policy = if frontend.kind == "ClusterIP" {
        &service.internal_traffic_policy
    } else {
        &service.external_traffic_policy
    };
    let mut special = Vec::new();
    if policy == "Local" {
        special.push("Local".to_owned());
    }
    if frontend.restricted {
        special.push(format!("from {}", service.source_ranges.join(" ")));
    }
    if special.is_empty() {
        frontend.kind.clone()
    } else {
        format!("{} ({})", frontend.kind, special.join(", "))
    }
}

/// With how often it was asked whether it answers.
fn probed_state(backend: &BackendView) -> String {
    match &backend.probing {
        Some(probing) => {
            let last = probing.last.iter().map(|last| format!(", {last}"));
            format!(
                "{} (probe {}{})",
                backend.state,
                probing.probes,
                last.collect::<String>()
            )
        }
        None => backend.state.clone(),
    }
}

fn state(backend: &BackendView) -> String {
    if backend.left_out {
        format!("{} (left out)", backend.state)
    } else {
        backend.state.clone()
    }
}

const fn node(backend: &BackendView) -> &'static str {
    if backend.local { "this" } else { "other" }
}

/// One line for each family of a node.
pub(super) fn nodes(nodes: &Nodes) -> String {
    let header = ["NAME", "PODCIDR", "ADDRESS", "VIA", "PATH", "RTT", "PROBLEM"];
    let mut rows = vec![header.map(String::from).to_vec()];
    for node in &nodes.nodes {
        let or_dash = |text: &str| {
            if text.is_empty() {
                "-".to_owned()
            } else {
                text.to_owned()
            }
        };
        rows.push(vec![
            node.name.clone(),
            or_dash(&node.pod_cidr),
            or_dash(&node.address),
            or_dash(&node.via),
            or_dash(&node.path),
            node.rtt_us.map_or_else(
                || "-".into(),
                |rtt| format!("{}.{} ms", rtt / 1000, rtt / 100 % 10),
            ),
            node.problem.clone().unwrap_or_default(),
        ]);
    }
    let mut text = table(&rows);
    if let Some(failure) = &nodes.failure {
        text += &format!("the pod network of this node does not work: {failure}\n");
    }
    text
}

/// In the spirit of `ipvsadm -ln`.
pub(super) fn services(services: &Services, wide: bool) -> String {
    let header = [
        "PROT",
        "FRONTEND",
        "ALGORITHM",
        "SERVICE",
        "STATE",
        "WEIGHT",
        "ACTIVECONN",
        "TOTALCONN",
    ];
    let mut rows = vec![header.map(String::from).to_vec()];
    if wide {
        rows[0].extend(["DATAGRAMS", "SETS", "NODE"].map(String::from));
    }
    for service in &services.services {
        let head = |frontend: &FrontendView| {
            vec![
                service.protocol.clone(),
                socket(&frontend.address, frontend.port),
                algorithm(service),
                name(service),
                kind(service, frontend),
            ]
        };
        rows.extend(service.frontends.iter().map(head));
        let none = || vec![String::new(), "  (no usable backend)".into()];
        if service.backends.is_empty() {
            rows.push(none());
        }
        for backend in &service.backends {
            let mut row = vec![
                String::new(),
                format!("  -> {}", socket(&backend.address, backend.port)),
                String::new(),
                String::new(),
                state(backend),
                backend.weight.to_string(),
                backend.active_connections.to_string(),
                backend.total_connections.to_string(),
            ];
            if wide {
                row.extend([
                    backend.datagrams.to_string(),
                    backend.sets.join(","),
                    node(backend).into(),
                ]);
            }
            rows.push(row);
        }
    }
    table(&rows)
}

/// A backend with the services that use it.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct SharedBackend {
    protocol: String,
    #[serde(flatten)]
    backend: BackendView,
    services: Vec<String>,
    /// Of these, those that give it no new connections.
    left_out_of: Vec<String>,
}

/// Every backend once.
pub(super) fn backends(services: &Services) -> Vec<SharedBackend> {
    let mut out: BTreeMap<(String, String, u16), SharedBackend> = BTreeMap::new();
    for service in &services.services {
        for backend in &service.backends {
            let key = (service.protocol.clone(), backend.address.clone(), backend.port);
            let shared = out.entry(key).or_insert_with(|| SharedBackend {
                protocol: service.protocol.clone(),
                backend: backend.clone(),
                services: Vec::new(),
                left_out_of: Vec::new(),
            });
            shared.services.push(name(service));
            if backend.left_out {
                shared.backend.left_out = true;
                shared.left_out_of.push(name(service));
            }
            for set in &backend.sets {
                if !shared.backend.sets.contains(set) {
                    shared.backend.sets.push(set.clone());
                }
            }
        }
    }
    out.into_values().collect()
}

pub(super) fn backend_table(backends: &[SharedBackend]) -> String {
    let header = [
        "PROT",
        "BACKEND",
        "NODE",
        "STATE",
        "ACTIVECONN",
        "TOTALCONN",
        "DATAGRAMS",
        "FAILURES",
        "SERVICES",
    ];
    let mut rows = vec![header.map(String::from).to_vec()];
    rows.extend(backends.iter().map(|shared| {
        let backend = &shared.backend;
        vec![
            shared.protocol.clone(),
            socket(&backend.address, backend.port),
            node(backend).into(),
            probed_state(backend),
            backend.active_connections.to_string(),
            backend.total_connections.to_string(),
            backend.datagrams.to_string(),
            backend
                .connect_failures
                .saturating_add(backend.timeouts)
                .to_string(),
            shared.services.join(","),
        ]
    }));
    table(&rows)
}

pub(super) fn status(status: &Status) -> String {
    let mut rows: Vec<Vec<String>> = Vec::new();
    let mut add = |key: &str, value: String| rows.push(vec![format!("{key}:"), value]);
    add(
        "Node",
        status.zone.as_ref().map_or_else(
            || status.node.clone(),
            |zone| format!("{} (zone {zone})", status.node),
        ),
    );
    add(
        "Mode",
        format!(
            "{}, version {}, ABI {}, pid {}",
            status.mode, status.version, status.abi, status.pid
        ),
    );
    add("Kernel", status.kernel.clone());
    for feature in &status.features {
        add(
            "  feature",
            format!(
                "{}: {}",
                feature.name,
                if feature.available { "yes" } else { "no" }
            ),
        );
    }
    add("Cgroup", status.cgroup_root.clone());
    add("Pins", status.pin_dir.clone());
    let synced = if status.synced { "yes" } else { "not yet" };
    add(
        "Synced",
        format!(
            "{synced}, last {}",
            status.last_sync.as_deref().unwrap_or("never")
        ),
    );
    for part in &status.missing {
        add("  missing", part.clone());
    }
    add(
        "Objects",
        format!(
            "{} Services, {} EndpointSlices",
            status.services, status.endpoint_slices
        ),
    );
    for source in &status.sources {
        add(
            "  source",
            format!("{}: {}", source.kind, source.error.as_deref().unwrap_or("ok")),
        );
    }
    for map in &status.maps {
        add("Map", format!("{} {} of {}", map.name, map.used, map.max));
    }
    for program in &status.programs {
        let how = if program.replaced { "replaced" } else { "attached" };
        let instructions = program.verified_instructions;
        add(
            "Program",
            format!(
                "{} id {} {how}, {instructions} verified instructions",
                program.name, program.id
            ),
        );
    }
    for (counter, value) in status.counters.iter().filter(|(_, value)| **value > 0) {
        add("Counter", format!("{counter} {value}"));
    }
    for (key, list) in [
        ("Failing", &status.failing),
        ("Problem", &status.problems),
        ("Warning", &status.warnings),
    ] {
        for text in list {
            add(key, text.clone());
        }
    }
    table(&rows)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::agent::view::ProbingView;

    fn sample() -> Services {
        let backend = |address: &str, active, total| BackendView {
            address: address.into(),
            port: 8080,
            state: "active".into(),
            probing: None,
            left_out: false,
            local: false,
            sets: vec!["cluster".into()],
            weight: 1,
            active_connections: active,
            total_connections: total,
            datagrams: 0,
            connect_failures: 0,
            timeouts: 0,
        };
        let service = |name: &str, backends| ServiceView {
            namespace: "default".into(),
            name: name.into(),
            port: "http".into(),
            protocol: "TCP".into(),
            family: "IPv4".into(),
            algorithm: "random".into(),
            affinity_seconds: 0,
            internal_traffic_policy: "Cluster".into(),
            external_traffic_policy: "Cluster".into(),
            source_ranges: vec![],
            maglev_entries: [0, 0],
            connections: 0,
            without_backend: 0,
            denied: 0,
            frontends: vec![FrontendView {
                address: "10.96.0.9".into(),
                port: 80,
                kind: "ClusterIP".into(),
                restricted: false,
            }],
            backends,
        };
        Services {
            services: vec![
                service("web", vec![backend("10.1.0.2", 1, 12), backend("fd00::2", 0, 3)]),
                service("none", vec![]),
            ],
        }
    }

    #[test]
    fn what_is_special_about_a_service_is_shown() {
        let mut all = sample();
        let web = &mut all.services[0];
        web.affinity_seconds = 10_800;
        web.external_traffic_policy = "Local".into();
        web.source_ranges = vec!["10.0.0.0/8".into(), "192.0.2.0/24".into()];
        for (address, port, kind, restricted) in [
            ("203.0.113.7", 80, "LoadBalancer", true),
            ("0.0.0.0", 30080, "NodePort", false),
        ] {
            web.frontends.push(FrontendView {
                address: address.into(),
                port,
                kind: kind.into(),
                restricted,
            });
        }
        web.backends[1].state = "suspect".into();
        web.backends[1].left_out = true;
        web.backends[1].probing = Some(ProbingView {
            probes: 12,
            last: Some("silent".into()),
        });
        web.backends[0].state = "probing".into();
        web.backends[0].probing = Some(ProbingView {
            probes: 1,
            last: None,
        });
        web.backends[1].connect_failures = 2;
        web.backends[1].timeouts = 1;
        web.backends[0].local = true;
        all.services.truncate(1);
        let expected = "\
PROT  FRONTEND             ALGORITHM                SERVICE           STATE                                               WEIGHT  ACTIVECONN  TOTALCONN  DATAGRAMS  SETS     NODE
TCP   10.96.0.9:80         random persistent 10800  default/web:http  ClusterIP
TCP   203.0.113.7:80       random persistent 10800  default/web:http  LoadBalancer (Local, from 10.0.0.0/8 192.0.2.0/24)
TCP   0.0.0.0:30080        random persistent 10800  default/web:http  NodePort (Local)
        -> 10.1.0.2:8080                                              probing                                             1       1           12         0          cluster  this
        -> [fd00::2]:8080                                             suspect (left out)                                  1       0           3          0          cluster  other
";
        assert_eq!(services(&all, true), expected);
        let expected = "\
PROT  BACKEND         NODE   STATE                       ACTIVECONN  TOTALCONN  DATAGRAMS  FAILURES  SERVICES
TCP   10.1.0.2:8080   this   probing (probe 1)           1           12         0          0         default/web:http
TCP   [fd00::2]:8080  other  suspect (probe 12, silent)  0           3          0          3         default/web:http
";
        let list = backends(&all);
        assert_eq!(backend_table(&list), expected);
        assert_eq!(list[1].left_out_of, ["default/web:http"]);
        let json = serde_json::to_value(&list[1]).unwrap();
        for field in ["protocol", "leftOut", "leftOutOf", "connectFailures", "services"] {
            assert!(json.get(field).is_some(), "{field} is not in {json}");
        }
    }

    #[test]
    fn services_are_listed_with_their_backends() {
        let expected = "\
PROT  FRONTEND               ALGORITHM  SERVICE            STATE      WEIGHT  ACTIVECONN  TOTALCONN
TCP   10.96.0.9:80           random     default/web:http   ClusterIP
        -> 10.1.0.2:8080                                   active     1       1           12
        -> [fd00::2]:8080                                  active     1       0           3
TCP   10.96.0.9:80           random     default/none:http  ClusterIP
        (no usable backend)
";
        assert_eq!(services(&sample(), false), expected);
    }

    #[test]
    fn a_backend_is_listed_once_with_all_its_services() {
        let mut all = sample();
        let again = all.services[0].backends[0].clone();
        all.services[1].backends.push(again);
        let list = backends(&all);
        assert_eq!(list.len(), 2);
        assert_eq!(list[0].services, ["default/web:http", "default/none:http"]);
        assert!(backend_table(&list).contains("default/web:http,default/none:http"));
    }
}
