//! The Node object and its lease: what the cluster knows of this machine.

use std::fs;
use std::net::{IpAddr, UdpSocket};
use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::api::core::v1::Node;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta, OwnerReference};
use kube::api::{Patch, PatchParams, PostParams};
use kube::{Api, Client, ResourceExt as _};
use serde_json::{Value, json};
use tokio::time::Instant;
use tracing::{debug, info, warn};

/// How often the lease is renewed: a quarter of its duration, as kubelet.
const RENEW: Duration = Duration::from_secs(10);
/// `leaseDurationSeconds`.
const LEASE_SECONDS: i32 = 40;
/// How often the network is asked whether it is up.
const LOOK: Duration = Duration::from_secs(1);
/// How often the status is told although nothing has changed.
const REPORT: Duration = Duration::from_secs(300);
const LEASES: &str = "kube-node-lease";
/// First and longest pause before what the API did not take is tried again.
const RETRY: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(10));

/// What does not change while the program runs.
#[derive(Clone, Debug)]
pub(crate) struct Facts {
    pub(crate) name: String,
    pub(crate) labels: Vec<(String, String)>,
    pub(crate) ips: Vec<IpAddr>,
    pub(crate) max_pods: u32,
    /// What runs the pods, with its version.
    pub(crate) runtime: String,
    /// Where logs and commands are served; 0: nowhere.
    pub(crate) port: u16,
}

/// Addresses from which this host reaches the API, and the world in the other family.
pub(crate) fn addresses(api: &http::Uri) -> Vec<IpAddr> {
    let from = |to: &str| -> Option<IpAddr> {
        let to: std::net::SocketAddr = std::net::ToSocketAddrs::to_socket_addrs(to).ok()?.next()?;
        let any: IpAddr = if to.is_ipv4() {
            std::net::Ipv4Addr::UNSPECIFIED.into()
        } else {
            std::net::Ipv6Addr::UNSPECIFIED.into()
        };
        // No packet is sent: the kernel only chooses the source.
        let socket = UdpSocket::bind((any, 0)).ok()?;
        socket.connect(to).ok()?;
        Some(socket.local_addr().ok()?.ip()).filter(|ip| !ip.is_unspecified() && !ip.is_loopback())
    };
    let port = api.port_u16().unwrap_or(443);
    let api = api
        .host()
        .map(|host| format!("{host}:{port}"))
        .unwrap_or_default();
    let mut found = Vec::new();
    // Addresses for documentation: nobody has them, so the default route is taken.
    for to in [api.as_str(), "192.0.2.1:9", "[2001:db8::1]:9"] {
        if let Some(ip) = from(to)
            && !found.iter().any(|known: &IpAddr| known.is_ipv4() == ip.is_ipv4())
        {
            found.push(ip);
        }
    }
    found
}

/// Registers the node, then keeps its status and lease. `network`: whether pods can be attached, or why not.
pub(crate) async fn keep(client: Client, facts: Facts, network: impl Fn() -> Result<(), String>) {
    let nodes: Api<Node> = Api::all(client.clone());
    let node = register(&nodes, &facts).await;
    let leases = tokio::spawn(renew(client, facts.name.clone(), node));
    let mut told: Option<(Result<(), String>, Instant)> = None;
    loop {
        let ready = network();
        let due = told
            .as_ref()
            .is_none_or(|(state, at)| *state != ready || at.elapsed() >= REPORT);
        if due {
            match report(&nodes, &facts, &ready).await {
                Ok(()) => {
                    if told.as_ref().is_none_or(|(state, _)| *state != ready) {
                        info!(
                            node = facts.name,
                            ready = ready.is_ok(),
                            cause = ready.as_ref().err(),
                            "node"
                        );
                    }
                    told = Some((ready, Instant::now()));
                }
                // Somebody has deleted it.
                Err(kube::Error::Api(status)) if status.code == 404 => {
                    register(&nodes, &facts).await;
                }
                Err(error) => warn!(%error, "the node's status was not told"),
            }
        }
        if leases.is_finished() {
            return;
        }
        tokio::time::sleep(LOOK).await;
    }
}

/// Creates the Node until it is there.
async fn register(nodes: &Api<Node>, facts: &Facts) -> Node {
    let mut pause = RETRY.0;
    loop {
        let made = match nodes.get_opt(&facts.name).await {
            Ok(Some(node)) => Ok(node),
            Ok(None) => match serde_json::from_value::<Node>(object(facts)) {
                Ok(node) => nodes.create(&PostParams::default(), &node).await,
                Err(error) => Err(kube::Error::SerdeError(error)),
            },
            Err(error) => Err(error),
        };
        match made {
            Ok(node) => return node,
            Err(error) => warn!(node = facts.name, %error, "the node cannot be registered yet"),
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(RETRY.1);
    }
}

fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

fn object(facts: &Facts) -> Value {
    let mut labels = json!({
        "kubernetes.io/hostname": facts.name, "kubernetes.io/os": "linux", "kubernetes.io/arch": architecture(),
        "beta.kubernetes.io/os": "linux", "beta.kubernetes.io/arch": architecture(),
    });
    for (key, value) in &facts.labels {
        labels[key] = value.as_str().into();
    }
    json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": facts.name, "labels": labels}})
}

async fn report(nodes: &Api<Node>, facts: &Facts, network: &Result<(), String>) -> Result<(), kube::Error> {
    let node = nodes.get(&facts.name).await?;
    let patch = json!({"status": status(facts, &node, network, Timestamp::now())});
    nodes
        .patch_status(&facts.name, &PatchParams::default(), &Patch::Merge(&patch))
        .await?;
    Ok(())
}

fn read(path: &str) -> String {
    fs::read_to_string(path).unwrap_or_default().trim().to_owned()
}

/// A line `key value` or `key=value` of a file.
fn line<'a>(text: &'a str, key: &str) -> Option<&'a str> {
    text.lines().find_map(|line| line.strip_prefix(key))
}

/// Processors of this machine.
pub(crate) fn processors() -> u64 {
    let count = std::thread::available_parallelism().map_or(1, usize::from);
    u64::try_from(count).unwrap_or(1)
}

/// Bytes of memory of this machine; 0 if nobody knows.
pub(crate) fn memory() -> u64 {
    let text = read("/proc/meminfo");
    let kilobytes = line(&text, "MemTotal:").and_then(|rest| rest.split_whitespace().next()?.parse().ok());
    kilobytes.map_or(0, |kilobytes: u64| kilobytes.saturating_mul(1024))
}

/// Processors, bytes of memory and bytes of the disk that pods are on.
fn capacity(max_pods: u32) -> Value {
    let disk = nix::sys::statvfs::statvfs("/var")
        .map(|stat| stat.blocks().saturating_mul(stat.fragment_size()))
        .unwrap_or_default();
    json!({
        "cpu": processors().to_string(), "memory": format!("{}Ki", memory() / 1024), "pods": max_pods.to_string(),
        "ephemeral-storage": format!("{}Ki", disk / 1024),
    })
}

fn node_info(runtime: &str) -> Value {
    let release = read("/etc/os-release");
    let image = line(&release, "PRETTY_NAME=")
        .unwrap_or("Linux")
        .trim_matches('"');
    let version = format!("v{}-beeline", env!("CARGO_PKG_VERSION"));
    json!({
        "machineID": read("/etc/machine-id"), "systemUUID": read("/sys/class/dmi/id/product_uuid"),
        "bootID": read("/proc/sys/kernel/random/boot_id"), "kernelVersion": read("/proc/sys/kernel/osrelease"),
        "osImage": image, "containerRuntimeVersion": runtime, "kubeletVersion": version,
        "kubeProxyVersion": version, "operatingSystem": "linux", "architecture": architecture(),
    })
}

fn status(facts: &Facts, node: &Node, network: &Result<(), String>, now: Timestamp) -> Value {
    let stamp = now.strftime("%Y-%m-%dT%H:%M:%SZ").to_string();
    let old = node
        .status
        .as_ref()
        .and_then(|status| status.conditions.clone())
        .unwrap_or_default();
    let not_ready = network.as_ref().err().map(|cause| {
        format!("container runtime network not ready: NetworkReady=false reason:NetworkPluginNotReady message:{cause}")
    });
    let ready = match &not_ready {
        None => ("Ready", "True", "KubeletReady", "kubelet is posting ready status"),
        Some(message) => ("Ready", "False", "KubeletNotReady", message.as_str()),
    };
    let ours = [
        (
            "MemoryPressure",
            "False",
            "KubeletHasSufficientMemory",
            "kubelet has sufficient memory available",
        ),
        (
            "DiskPressure",
            "False",
            "KubeletHasNoDiskPressure",
            "kubelet has no disk pressure",
        ),
        (
            "PIDPressure",
            "False",
            "KubeletHasSufficientPID",
            "kubelet has sufficient PID available",
        ),
        ready,
    ];
    // Others' conditions stay: the overlay has one.
    let mut conditions: Vec<Value> = old
        .iter()
        .filter(|condition| !ours.iter().any(|(kind, ..)| *kind == condition.type_))
        .map(|condition| json!(condition))
        .collect();
    for (kind, status, reason, message) in ours {
        let since = old
            .iter()
            .find(|condition| condition.type_ == kind && condition.status == status)
            .and_then(|condition| condition.last_transition_time.as_ref())
            .map_or_else(|| json!(stamp), |time| json!(time));
        conditions.push(json!({
            "type": kind, "status": status, "reason": reason, "message": message,
            "lastHeartbeatTime": stamp, "lastTransitionTime": since,
        }));
    }
    let addresses = facts
        .ips
        .iter()
        .map(|ip| json!({"type": "InternalIP", "address": ip}));
    let hostname = json!({"type": "Hostname", "address": facts.name});
    let capacity = capacity(facts.max_pods);
    json!({
        "addresses": addresses.chain([hostname]).collect::<Vec<_>>(),
        "capacity": capacity, "allocatable": capacity, "conditions": conditions,
        "daemonEndpoints": {"kubeletEndpoint": {"Port": facts.port}}, "nodeInfo": node_info(&facts.runtime),
    })
}

/// Renews the node's lease for ever.
async fn renew(client: Client, name: String, node: Node) {
    let leases: Api<Lease> = Api::namespaced(client, LEASES);
    loop {
        let now = MicroTime(Timestamp::now());
        let patch = json!({"spec": {"renewTime": now}});
        let renewed = match leases
            .patch(&name, &PatchParams::default(), &Patch::Merge(&patch))
            .await
        {
            Err(kube::Error::Api(status)) if status.code == 404 => {
                let lease = lease(&name, &node, now);
                leases.create(&PostParams::default(), &lease).await.map(drop)
            }
            other => other.map(drop),
        };
        let pause = match renewed {
            Ok(()) => RENEW,
            Err(error) => {
                debug!(%error, "the node's lease was not renewed");
                LOOK
            }
        };
        tokio::time::sleep(pause).await;
    }
}

fn lease(name: &str, node: &Node, now: MicroTime) -> Lease {
    Lease {
        metadata: ObjectMeta {
            name: Some(name.to_owned()),
            namespace: Some(LEASES.to_owned()),
            owner_references: Some(vec![OwnerReference {
                api_version: "v1".to_owned(),
                kind: "Node".to_owned(),
                name: name.to_owned(),
                uid: node.uid().unwrap_or_default(),
                ..OwnerReference::default()
            }]),
            ..ObjectMeta::default()
        },
        spec: Some(LeaseSpec {
            holder_identity: Some(name.to_owned()),
            lease_duration_seconds: Some(LEASE_SECONDS),
            renew_time: Some(now),
            ..LeaseSpec::default()
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn facts() -> Facts {
        Facts {
            name: "n1".into(),
            labels: vec![("zone".into(), "a".into())],
            ips: vec!["192.0.2.1".parse().unwrap()],
            max_pods: 110,
            runtime: "process://1".into(),
            port: 10250,
        }
    }

    #[test]
    fn a_node_without_network_is_not_ready_and_others_conditions_stay() {
        let facts = facts();
        assert_eq!(object(&facts)["metadata"]["labels"]["zone"], "a");
        let node: Node =
            serde_json::from_value(json!({"metadata": {"name": "n1"}, "status": {"conditions": [
                {"type": "NetworkUnavailable", "status": "True"},
                {"type": "Ready", "status": "False", "lastTransitionTime": "2026-01-01T00:00:00Z"},
            ]}}))
            .unwrap();
        let now: Timestamp = "2026-02-01T00:00:00Z".parse().unwrap();
        let of = |network: Result<(), String>| {
            let status = status(&facts, &node, &network, now);
            let list = status["conditions"].as_array().unwrap().clone();
            let find = |kind: &str| {
                list.iter()
                    .find(|condition| condition["type"] == kind)
                    .unwrap()
                    .clone()
            };
            (find("Ready"), find("NetworkUnavailable"))
        };
        let (ready, network) = of(Err("no range".into()));
        assert_eq!(
            (&ready["status"], &network["status"]),
            (&json!("False"), &json!("True"))
        );
        assert!(ready["message"].as_str().unwrap().ends_with("no range"));
        assert_eq!(ready["lastTransitionTime"], "2026-01-01T00:00:00Z");
        let (ready, _) = of(Ok(()));
        assert_eq!(ready["status"], "True");
        assert_eq!(ready["lastTransitionTime"], "2026-02-01T00:00:00Z");
    }

    #[test]
    fn this_machine_has_something() {
        let capacity = capacity(5);
        assert_ne!(capacity["memory"], "0Ki");
        assert_eq!(capacity["pods"], "5");
        assert!(!node_info("x")["kernelVersion"].as_str().unwrap().is_empty());
    }
}
