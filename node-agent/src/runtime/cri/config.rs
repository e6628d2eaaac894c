//! From what a node wants to what the runtime is told. No I/O.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use super::super::dirs::log_name;
use super::super::{ContainerSpec, Dirs, PodRef, SandboxSpec};
use super::api;

/// Labels by which sandboxes and containers are known as a node's, kubelet's.
pub(super) const POD_NAME: &str = "io.kubernetes.pod.name";
/// See [`POD_NAME`].
pub(super) const POD_NAMESPACE: &str = "io.kubernetes.pod.namespace";
/// See [`POD_NAME`].
pub(super) const POD_UID: &str = "io.kubernetes.pod.uid";
const CONTAINER: &str = "io.kubernetes.container.name";
/// Period of a CPU limit, microseconds.
const PERIOD: i64 = 100_000;
/// What a container sees nothing of, and what it cannot write to, unless it is privileged (kubelet `defaultMaskedPaths`).
const MASKED: [&str; 10] = [
    "/proc/asound",
    "/proc/acpi",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/sys/firmware",
];
const READ_ONLY: [&str; 5] = [
    "/proc/bus",
    "/proc/fs",
    "/proc/irq",
    "/proc/sys",
    "/proc/sysrq-trigger",
];

fn labels(pod: &PodRef) -> HashMap<String, String> {
    [
        (POD_NAME, &pod.name),
        (POD_NAMESPACE, &pod.namespace),
        (POD_UID, &pod.uid),
    ]
    .into_iter()
    .map(|(label, value)| (label.to_owned(), value.clone()))
    .collect()
}

fn namespaces(host_network: bool, host_pid: bool, host_ipc: bool) -> api::Namespaces {
    let or = |of_node: bool, otherwise: i32| if of_node { api::NODE } else { otherwise };
    api::Namespaces {
        network: or(host_network, api::POD),
        pid: or(host_pid, api::OWN),
        ipc: or(host_ipc, api::POD),
    }
}

/// A sandbox, the `attempt`th of its pod.
pub(super) fn sandbox(spec: &SandboxSpec, dirs: &Dirs, cgroup: &str, attempt: u32) -> api::SandboxConfig {
    let pod = &spec.pod;
    let mappings = spec.port_mappings.iter().map(|mapping| api::PortMapping {
        protocol: match mapping.protocol.as_str() {
            "udp" => 1,
            "sctp" => 2,
            _ => 0,
        },
        container_port: mapping.container_port.into(),
        host_port: mapping.host_port.into(),
        host_ip: mapping.host_ip.map(|ip| ip.to_string()).unwrap_or_default(),
    });
    api::SandboxConfig {
        metadata: Some(api::SandboxMetadata {
            name: pod.name.clone(),
            uid: pod.uid.clone(),
            namespace: pod.namespace.clone(),
            attempt,
        }),
        // The node's own host name is not a pod's to change.
        hostname: if spec.host_network {
            String::new()
        } else {
            spec.hostname.clone()
        },
        log_directory: dirs.pod_logs(pod).display().to_string(),
        dns: spec.resolv_conf.as_deref().map(dns),
        port_mappings: mappings.collect(),
        labels: labels(pod),
        linux: Some(api::LinuxSandbox {
            cgroup_parent: format!("{cgroup}/pod{}", pod.uid),
            security: Some(api::SandboxSecurity {
                namespaces: Some(namespaces(spec.host_network, spec.host_pid, spec.host_ipc)),
                privileged: spec.privileged,
            }),
        }),
    }
}

/// What a `resolv.conf` says.
fn dns(text: &str) -> api::Dns {
    let mut dns = api::Dns::default();
    for line in text.lines() {
        let mut words = line.split_whitespace().map(str::to_owned);
        match words.next().as_deref() {
            Some("nameserver") => dns.servers.extend(words),
            Some("search") => dns.searches = words.collect(),
            Some("options") => dns.options.extend(words),
            _ => {}
        }
    }
    dns
}

/// A container. `image`: the runtime's id of it; `hosts`: the file for `/etc/hosts`, if the pod has one of its own.
pub(super) fn container(
    pod: &PodRef,
    spec: &ContainerSpec,
    sandbox: &SandboxSpec,
    image: String,
    hosts: Option<PathBuf>,
) -> api::ContainerConfig {
    let text = |path: &Path| path.display().to_string();
    let mut mounts: Vec<api::Mount> = spec
        .mounts
        .iter()
        .map(|mount| api::Mount {
            container_path: text(&mount.target),
            host_path: text(&mount.source),
            read_only: mount.read_only,
        })
        .collect();
    let at = "/etc/hosts";
    if let Some(hosts) = hosts.filter(|_| !mounts.iter().any(|mount| mount.container_path == at)) {
        mounts.push(api::Mount {
            container_path: at.to_owned(),
            host_path: text(&hosts),
            read_only: false,
        });
    }
    let mut labels = labels(pod);
    labels.insert(CONTAINER.to_owned(), spec.name.clone());
    let security = &spec.security;
    let paths = |list: &[&str]| -> Vec<String> {
        let list = list.iter().filter(|_| !security.privileged);
        list.map(|path| (*path).to_owned()).collect()
    };
    api::ContainerConfig {
        metadata: Some(api::ContainerMetadata {
            name: spec.name.clone(),
            attempt: spec.attempt,
        }),
        image: Some(api::ImageSpec { image }),
        command: spec.command.clone(),
        args: spec.args.clone(),
        working_dir: spec.working_dir.as_deref().map(text).unwrap_or_default(),
        variables: spec
            .env
            .iter()
            .map(|(key, value)| api::Variable {
                key: key.clone(),
                value: value.clone(),
            })
            .collect(),
        mounts,
        labels,
        log_path: text(&log_name(&spec.name, spec.attempt)),
        stdin: spec.stdin,
        tty: spec.tty,
        linux: Some(api::LinuxContainer {
            resources: Some(resources(spec)),
            security: Some(api::ContainerSecurity {
                capabilities: Some(api::Capabilities {
                    add: security.add.clone(),
                    remove: security.drop.clone(),
                }),
                privileged: security.privileged,
                namespaces: Some(namespaces(
                    sandbox.host_network,
                    sandbox.host_pid,
                    sandbox.host_ipc,
                )),
                user: spec.user.map(|(user, _)| api::Number { value: user.into() }),
                group: spec.user.map(|(_, group)| api::Number { value: group.into() }),
                read_only_root: security.read_only_root,
                no_new_privileges: security.no_new_privileges,
                masked_paths: paths(&MASKED),
                read_only_paths: paths(&READ_ONLY),
            }),
        }),
    }
}

fn resources(spec: &ContainerSpec) -> api::Resources {
    let number = |value: u64| i64::try_from(value).unwrap_or(i64::MAX);
    let milli = spec.cpu_limit.map(number);
    // As kubelet: what asks for nothing gets the least.
    let shares = spec
        .cpu_request
        .or(spec.cpu_limit)
        .map_or(2, |milli| (milli * 1024 / 1000).clamp(2, 262_144));
    api::Resources {
        cpu_period: milli.map_or(0, |_| PERIOD),
        cpu_quota: milli.map_or(0, |milli| (milli.saturating_mul(PERIOD) / 1000).max(1000)),
        cpu_shares: number(shares),
        memory_limit: spec.memory_limit.map_or(0, number),
        // The first to go when the node's memory ends, after those of nobody.
        oom_score_adj: 1000,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sandbox_spec() -> SandboxSpec {
        SandboxSpec {
            pod: PodRef {
                namespace: "d".into(),
                name: "p".into(),
                uid: "u".into(),
            },
            hostname: "p".into(),
            resolv_conf: Some("nameserver 10.96.0.10\nsearch a b\noptions ndots:5\n".into()),
            ..SandboxSpec::default()
        }
    }

    #[test]
    fn a_sandbox_is_in_the_pods_cgroup_and_has_its_names() {
        let config = sandbox(&sandbox_spec(), &Dirs::default(), "/beeline-pods", 3);
        assert_eq!(config.metadata.unwrap().attempt, 3);
        assert_eq!(config.linux.unwrap().cgroup_parent, "/beeline-pods/podu");
        assert_eq!(config.labels[POD_UID], "u");
        let dns = config.dns.unwrap();
        assert_eq!(
            (dns.servers, dns.searches),
            (
                vec!["10.96.0.10".to_owned()],
                vec!["a".to_owned(), "b".to_owned()]
            )
        );
        let of_node = SandboxSpec {
            host_network: true,
            ..sandbox_spec()
        };
        let config = sandbox(&of_node, &Dirs::default(), "/x", 0);
        let security = config.linux.unwrap().security.unwrap();
        assert_eq!(
            (config.hostname.as_str(), security.namespaces.unwrap().network),
            ("", api::NODE)
        );
    }

    #[test]
    fn a_container_has_limits_and_its_own_hosts_file() {
        let spec = ContainerSpec {
            name: "c".into(),
            attempt: 1,
            cpu_limit: Some(1500),
            cpu_request: Some(500),
            memory_limit: Some(64 << 20),
            ..ContainerSpec::default()
        };
        let pod = sandbox_spec().pod;
        let made = container(
            &pod,
            &spec,
            &sandbox_spec(),
            "sha256:1".into(),
            Some("/x/hosts".into()),
        );
        assert_eq!(
            (made.log_path.as_str(), made.mounts[0].host_path.as_str()),
            ("c/1.log", "/x/hosts")
        );
        let linux = made.linux.unwrap();
        let resources = linux.resources.unwrap();
        assert_eq!(
            (resources.cpu_quota, resources.cpu_shares, resources.memory_limit),
            (150_000, 512, 64 << 20)
        );
        assert!(!linux.security.unwrap().masked_paths.is_empty());
    }
}
