//! What the kernel holds, for `beeline service list` and `beeline backend list`.

use std::collections::{BTreeMap, HashMap};

use dataplane_common::abi::{BackendHealth, BackendStats, ServiceStats, frontend_kind, service_flag};
use dataplane_model::program::AppliedService;
use dataplane_model::settings::algorithm_name;
use dataplane_model::{BackendState, Family, Protocol, SetBackend};
use tokio::sync::watch;

use super::view::{BackendView, FrontendView, ProbingView, ServiceView};
use crate::failure::detector::Probing;
use crate::kernel::StatsReader;

/// What the programs counted, by id. Nothing counted is all zeroes.
pub trait Counts {
    /// Of a backend.
    fn backend(&self, id: u32) -> BackendStats;
    /// What connections saw of a backend.
    fn health(&self, id: u32) -> BackendHealth;
    /// Of a service.
    fn service(&self, id: u32) -> ServiceStats;
    /// Whether a backend is asked if it answers.
    fn probing(&self, id: u32) -> Option<Probing>;
}

/// What the kernel counts, and who is asked whether it answers.
pub(super) struct Known {
    pub(super) stats: StatsReader,
    pub(super) probing: watch::Receiver<HashMap<u32, Probing>>,
}

impl Counts for Known {
    fn backend(&self, id: u32) -> BackendStats {
        self.stats.get(id).unwrap_or_default()
    }
    fn health(&self, id: u32) -> BackendHealth {
        self.stats.health(id).unwrap_or_default()
    }
    fn service(&self, id: u32) -> ServiceStats {
        self.stats.service(id).unwrap_or_default()
    }
    fn probing(&self, id: u32) -> Option<Probing> {
        self.probing.borrow().get(&id).copied()
    }
}

/// A service; `suspects` are rows of `BACKENDS`.
pub(super) fn view(service: &AppliedService, suspects: &[u32], counts: &impl Counts) -> ServiceView {
    let key = service.key.as_ref();
    let first = service.frontends.keys().next();
    let protocol = first.and_then(|f| Protocol::from_number(f.protocol));
    let mut backends: BTreeMap<u32, (SetBackend, Vec<&'static str>)> = BTreeMap::new();
    for (set, members) in [("cluster", &service.cluster), ("local", &service.local)] {
        for (id, member) in members {
            backends.entry(*id).or_insert((*member, Vec::new())).1.push(set);
        }
    }
    let mut backends: Vec<(u32, SetBackend, Vec<&'static str>)> = backends
        .into_iter()
        .map(|(id, (member, sets))| (id, member, sets))
        .collect();
    backends.sort_by_key(|(_, member, _)| member.backend);
    let policy = |flag: u32| {
        if service.config.flags & flag == 0 {
            "Cluster"
        } else {
            "Local"
        }
        .to_owned()
    };
    let stats = counts.service(service.id);
    ServiceView {
        namespace: key.map(|k| k.service.namespace.to_string()).unwrap_or_default(),
        name: key.map(|k| k.service.name.to_string()).unwrap_or_default(),
        port: key.map(|k| k.port_name.to_string()).unwrap_or_default(),
        protocol: key
            .map(|k| k.protocol)
            .or(protocol)
            .map(|p| p.to_string())
            .unwrap_or_default(),
        family: key
            .map(|k| k.family)
            .or(first.map(|f| Family::of(f.addr)))
            .map(|f| f.to_string())
            .unwrap_or_default(),
        algorithm: algorithm_name(service.config.algorithm).into(),
        affinity_seconds: service.config.affinity_seconds,
        internal_traffic_policy: policy(service_flag::INTERNAL_LOCAL),
        external_traffic_policy: policy(service_flag::EXTERNAL_LOCAL),
        source_ranges: service.source_ranges.iter().map(ToString::to_string).collect(),
        maglev_entries: service.maglev,
        connections: stats.connections,
        without_backend: stats.no_backend,
        denied: stats.denied,
        frontends: service
            .frontends
            .iter()
            .map(|(frontend, kind)| FrontendView {
                address: frontend.addr.to_string(),
                port: frontend.port.to_host(),
                kind: kind_name(*kind).into(),
                restricted: *kind == frontend_kind::LOAD_BALANCER && !service.source_ranges.is_empty(),
            })
            .collect(),
        backends: backends
            .into_iter()
            .map(|(id, member, sets)| backend(service, suspects, counts, id, member, &sets))
            .collect(),
    }
}

fn backend(
    service: &AppliedService,
    suspects: &[u32],
    counts: &impl Counts,
    id: u32,
    member: SetBackend,
    sets: &[&str],
) -> BackendView {
    let stats = counts.backend(id);
    let health = counts.health(id);
    let probing = counts.probing(id);
    let state = match member.state {
        _ if suspects.contains(&id) => "suspect",
        // the programmer may learn of a suspect in the next moment only
        _ if probing.is_some() => "probing",
        BackendState::Active => "active",
        BackendState::Terminating => "terminating",
    };
    BackendView {
        address: member.backend.addr.to_string(),
        port: member.backend.port.to_host(),
        state: state.into(),
        probing: probing.map(|probing| ProbingView {
            probes: probing.probes,
            last: probing.last.map(|verdict| verdict.name().into()),
        }),
        left_out: service.left_out.contains(&id),
        local: member.local,
        sets: sets.iter().map(|set| (*set).to_owned()).collect(),
        weight: 1,
        active_connections: stats.connections.saturating_sub(stats.closed),
        total_connections: stats.connections,
        datagrams: stats.datagrams,
        connect_failures: health.connect_failures,
        timeouts: health.timeouts,
    }
}

const fn kind_name(number: u8) -> &'static str {
    match number {
        frontend_kind::CLUSTER_IP => "ClusterIP",
        frontend_kind::NODE_PORT => "NodePort",
        frontend_kind::EXTERNAL_IP => "ExternalIP",
        frontend_kind::LOAD_BALANCER => "LoadBalancer",
        frontend_kind::HOST_PORT => "HostPort",
        _ => "unknown",
    }
}

#[cfg(test)]
mod tests {
    use dataplane_model::program::{FakeMaps, Programmer};
    use dataplane_model::{Event, Model};
    use serde_json::json;

    use super::super::state::tests::capacity;
    use super::*;
    use crate::failure::detector::Verdict;

    /// The same counts for everybody, and one row is asked whether it answers.
    struct Same(u32);

    impl Counts for Same {
        fn probing(&self, id: u32) -> Option<Probing> {
            (id == self.0).then_some(Probing {
                suspect: true,
                probes: 4,
                last: Some(Verdict::Silent),
            })
        }
        fn backend(&self, _: u32) -> BackendStats {
            BackendStats {
                connections: 5,
                closed: 3,
                datagrams: 7,
                ..BackendStats::default()
            }
        }
        fn health(&self, _: u32) -> BackendHealth {
            BackendHealth {
                connect_failures: 2,
                timeouts: 1,
                ..BackendHealth::default()
            }
        }
        fn service(&self, _: u32) -> ServiceStats {
            ServiceStats {
                connections: 11,
                no_backend: 12,
                denied: 13,
                ..ServiceStats::default()
            }
        }
    }

    #[test]
    fn everything_that_the_kernel_holds_of_a_service_is_told() {
        let service = json!({
            "metadata": {"name": "web", "namespace": "shop", "annotations": {"beeline.dev/algorithm": "round-robin"}},
            "spec": {"type": "LoadBalancer", "clusterIP": "10.96.0.9", "clusterIPs": ["10.96.0.9"], "ipFamilies": ["IPv4"],
                "externalIPs": ["198.51.100.9"], "externalTrafficPolicy": "Local", "sessionAffinity": "ClientIP",
                "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": 100}},
                "loadBalancerSourceRanges": ["10.0.0.0/8"],
                "ports": [{"name": "http", "port": 80, "nodePort": 30080, "protocol": "TCP"}]},
            "status": {"loadBalancer": {"ingress": [{"ip": "203.0.113.7"}]}},
        });
        let slice = json!({
            "metadata": {"name": "web-1", "namespace": "shop", "labels": {"kubernetes.io/service-name": "web"}},
            "addressType": "IPv4", "ports": [{"name": "http", "port": 8080, "protocol": "TCP"}],
            "endpoints": [{"addresses": ["10.1.0.2"], "nodeName": "n"}, {"addresses": ["10.1.0.3"], "nodeName": "m"}],
        });
        let mut model = Model::new("n");
        let problems = [
            model.apply(Event::ServiceApplied(serde_json::from_value(service).unwrap())),
            model.apply(Event::SliceApplied(serde_json::from_value(slice).unwrap())),
        ];
        assert!(problems.iter().all(Vec::is_empty), "{problems:?}");
        let mut programmer = Programmer::new(FakeMaps::new(capacity(4096))).unwrap();
        let dirty = model.take_dirty();
        let changes = dirty.into_iter().map(|key| {
            let desired = model.desired(&key);
            (key, desired)
        });
        let outcome = programmer.reconcile(changes, 0);
        assert!(outcome.failed.is_empty(), "{:?}", outcome.failed);
        let second = {
            let services = programmer.services();
            let members = &services[0].cluster;
            let of = |addr: &str| members.iter().find(|(_, m)| m.backend.addr.to_string() == addr);
            of("10.1.0.3").unwrap().0
        };
        // it is not left out yet
        let services = programmer.services();
        let asked = view(&services[0], &[], &Same(second));
        assert_eq!(asked.backends[1].state, "probing");
        programmer.set_suspects(&[second], 0);
        let services = programmer.services();
        let found = view(&services[0], programmer.suspects(), &Same(second));
        let probing = found.backends[1].probing.as_ref().unwrap();
        assert_eq!((probing.probes, probing.last.as_deref()), (4, Some("silent")));

        assert_eq!(
            (&*found.namespace, &*found.name, &*found.port),
            ("shop", "web", "http")
        );
        assert_eq!((&*found.protocol, &*found.family), ("TCP", "IPv4"));
        assert_eq!((&*found.algorithm, found.affinity_seconds), ("round-robin", 100));
        assert_eq!(
            (&*found.internal_traffic_policy, &*found.external_traffic_policy),
            ("Cluster", "Local")
        );
        assert_eq!(found.source_ranges, ["10.0.0.0/8"]);
        assert_eq!(
            (found.connections, found.without_backend, found.denied),
            (11, 12, 13)
        );
        let mut frontends: Vec<_> = found
            .frontends
            .iter()
            .map(|f| (&*f.kind, &*f.address, f.port, f.restricted))
            .collect();
        frontends.sort_unstable();
        assert_eq!(
            frontends,
            [
                ("ClusterIP", "10.96.0.9", 80, false),
                ("ExternalIP", "198.51.100.9", 80, false),
                ("LoadBalancer", "203.0.113.7", 80, true),
                ("NodePort", "0.0.0.0", 30080, false),
            ]
        );
        let backends: Vec<_> = found
            .backends
            .iter()
            .map(|b| {
                (
                    &*b.address,
                    b.port,
                    &*b.state,
                    b.left_out,
                    b.local,
                    b.sets.join(","),
                )
            })
            .collect();
        assert_eq!(
            backends,
            [
                (
                    "10.1.0.2",
                    8080,
                    "active",
                    false,
                    true,
                    "cluster,local".to_owned()
                ),
                ("10.1.0.3", 8080, "suspect", true, false, "cluster".to_owned()),
            ]
        );
        let first = &found.backends[0];
        assert_eq!((first.active_connections, first.total_connections), (2, 5));
        assert_eq!(
            (first.datagrams, first.connect_failures, first.timeouts),
            (7, 2, 1)
        );
    }
}
