//! From what a pod asks for to what a runtime is asked for. No I/O.

use std::collections::BTreeMap;
use std::net::IpAddr;

use beeline_cni::protocol::PortMapping;
use k8s_openapi::api::core::v1::{Container as Wanted, Pod, ResourceRequirements};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;

use super::env;
use super::status;
use crate::runtime::{ContainerSpec, PodRef, Pull, SandboxSpec, Security};

/// The pod's place. `resolv_conf`: its text, unless it is the node's.
pub(super) fn sandbox(pod: &Pod, id: &PodRef, resolv_conf: Option<String>) -> SandboxSpec {
    let spec = pod.spec.clone().unwrap_or_default();
    let host_network = spec.host_network == Some(true);
    let ports = spec
        .containers
        .iter()
        .flat_map(|container| container.ports.iter().flatten());
    let port = |number: Option<i32>| number.and_then(|number| u16::try_from(number).ok());
    let mappings = ports.filter_map(|of| {
        Some(PortMapping {
            host_port: port(of.host_port).filter(|port| *port > 0)?,
            container_port: port(Some(of.container_port))?,
            protocol: of.protocol.as_deref().unwrap_or("TCP").to_ascii_lowercase(),
            host_ip: of.host_ip.as_deref().and_then(|ip| ip.parse().ok()),
        })
    });
    let aliases = spec.host_aliases.iter().flatten().filter_map(|alias| {
        let ip: IpAddr = alias.ip.parse().ok()?;
        Some((ip, alias.hostnames.clone().unwrap_or_default()))
    });
    SandboxSpec {
        pod: id.clone(),
        host_network,
        host_pid: spec.host_pid == Some(true),
        host_ipc: spec.host_ipc == Some(true),
        privileged: [false, true]
            .into_iter()
            .flat_map(|init| status::specs(pod, init))
            .any(|container| security(container).privileged),
        hostname: spec.hostname.clone().unwrap_or_else(|| id.name.clone()),
        port_mappings: if host_network {
            Vec::new()
        } else {
            mappings.collect()
        },
        resolv_conf,
        host_aliases: aliases.collect(),
    }
}

/// A container without what needs more than the pod to know. `variables`: for `$(NAME)` in its command.
pub(super) fn container(pod: &Pod, wanted: &Wanted, variables: &BTreeMap<String, String>) -> ContainerSpec {
    let expand = |list: &Option<Vec<String>>| -> Vec<String> {
        list.iter()
            .flatten()
            .map(|text| env::expand(text, variables))
            .collect()
    };
    let amount = |list: fn(&ResourceRequirements) -> Option<&BTreeMap<String, Quantity>>, name: &str| {
        env::milli(&list(wanted.resources.as_ref()?)?.get(name)?.0)
    };
    let limit = |name: &str| amount(|resources| resources.limits.as_ref(), name);
    ContainerSpec {
        name: wanted.name.clone(),
        image: wanted.image.clone().unwrap_or_default(),
        command: expand(&wanted.command),
        args: expand(&wanted.args),
        working_dir: wanted.working_dir.as_ref().map(Into::into),
        user: user(pod, wanted),
        memory_limit: limit("memory").map(|milli| milli.div_ceil(1000)),
        cpu_limit: limit("cpu"),
        cpu_request: amount(|resources| resources.requests.as_ref(), "cpu"),
        pull: match wanted.image_pull_policy.as_deref() {
            Some("Always") => Pull::Always,
            Some("Never") => Pull::Never,
            _ => Pull::IfMissing,
        },
        stdin: wanted.stdin == Some(true),
        tty: wanted.tty == Some(true),
        security: security(wanted),
        ..ContainerSpec::default()
    }
}

/// What the container may, where containers are isolated.
fn security(container: &Wanted) -> Security {
    let of = container.security_context.as_ref();
    let capabilities = of.and_then(|of| of.capabilities.as_ref());
    let list = |names: Option<&Vec<String>>| -> Vec<String> {
        let names = names.into_iter().flatten();
        names
            .map(|name| name.trim_start_matches("CAP_").to_owned())
            .collect()
    };
    Security {
        privileged: of.and_then(|of| of.privileged) == Some(true),
        read_only_root: of.and_then(|of| of.read_only_root_filesystem) == Some(true),
        no_new_privileges: of.and_then(|of| of.allow_privilege_escalation) == Some(false),
        add: list(capabilities.and_then(|capabilities| capabilities.add.as_ref())),
        drop: list(capabilities.and_then(|capabilities| capabilities.drop.as_ref())),
    }
}

/// Whom the container runs as; `None`: as the node's agent.
fn user(pod: &Pod, container: &Wanted) -> Option<(u32, u32)> {
    let of_pod = pod.spec.as_ref().and_then(|spec| spec.security_context.as_ref());
    let of_one = container.security_context.as_ref();
    let user = of_one
        .and_then(|context| context.run_as_user)
        .or_else(|| of_pod?.run_as_user)?;
    let group = of_one
        .and_then(|context| context.run_as_group)
        .or_else(|| of_pod?.run_as_group)
        .unwrap_or_default();
    Some((u32::try_from(user).ok()?, u32::try_from(group).ok()?))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn what_a_pod_asks_for() {
        let pod: Pod = serde_json::from_value(json!({
            "metadata": {"name": "p"},
            "spec": {
                "hostPID": true, "securityContext": {"runAsUser": 7, "runAsGroup": 8},
                "hostAliases": [{"ip": "192.0.2.1", "hostnames": ["a", "b"]}],
                "containers": [{
                    "name": "c", "image": "x", "command": ["echo", "$(NAME)"], "imagePullPolicy": "Never",
                    "ports": [{"containerPort": 80, "hostPort": 8080}, {"containerPort": 81}],
                    "resources": {"limits": {"cpu": "1500m", "memory": "1Mi"}, "requests": {"cpu": "250m"}},
                    "securityContext": {"runAsUser": 9, "privileged": true, "capabilities": {"add": ["CAP_SYS_TIME"], "drop": ["ALL"]}},
                }],
            },
        }))
        .unwrap();
        let id = PodRef {
            name: "p".into(),
            ..PodRef::default()
        };
        let place = sandbox(&pod, &id, None);
        assert_eq!(
            (place.hostname.as_str(), place.host_pid, place.privileged),
            ("p", true, true)
        );
        assert_eq!(place.port_mappings.len(), 1);
        assert_eq!(
            place.host_aliases,
            [("192.0.2.1".parse().unwrap(), vec!["a".to_owned(), "b".to_owned()])]
        );
        let variables = BTreeMap::from([("NAME".to_owned(), "value".to_owned())]);
        let made = container(&pod, &status::specs(&pod, false)[0], &variables);
        assert_eq!(made.command, ["echo", "value"]);
        assert_eq!(
            (made.cpu_limit, made.cpu_request, made.memory_limit),
            (Some(1500), Some(250), Some(1 << 20))
        );
        assert_eq!((made.user, made.pull), (Some((9, 8)), Pull::Never));
        assert_eq!(
            (made.security.add, made.security.drop),
            (vec!["SYS_TIME".to_owned()], vec!["ALL".to_owned()])
        );
    }
}
