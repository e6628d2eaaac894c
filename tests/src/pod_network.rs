//! Pods whose network an agent makes, through the CNI plugin.

use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use crate::agent::{Agent, AgentOptions};
use crate::cluster::{Node, Pod};
use crate::control_plane::ControlPlane;
use crate::netns::NetNs;
use crate::{program, wait_for};

/// flannel's net-conf.json for the podCIDRs of [`Node::pod_cidrs`].
pub const NET_CONF: &str = r#"{"Network": "10.244.0.0/16", "EnableIPv6": true,
    "IPv6Network": "fd00:10:244::/48", "Backend": {"Type": "vxlan"}}"#;

/// An agent that makes its node's pod network, with everything of it in the node's directory.
///
/// # Errors
/// When net-conf.json cannot be written.
pub fn options(plane: &ControlPlane, node: &Node, net_conf: &str) -> Result<AgentOptions> {
    let conf = node.state().join("net-conf.json");
    std::fs::write(&conf, net_conf).with_context(|| format!("cannot write {}", conf.display()))?;
    let options = AgentOptions::kubeconfig(plane.kubeconfig());
    Ok(own_places(options, node).flag("--net-config-path", conf.display()))
}

/// With all files of the pod network in the node's directory.
#[must_use]
pub fn own_places(options: AgentOptions, node: &Node) -> AgentOptions {
    let path = |name: &str| node.state().join(name).display().to_string();
    options
        .flag("--subnet-file", path("subnet.env"))
        .flag("--cni-socket", path("cni.sock"))
        .flag("--cni-state-dir", path("cni"))
        .flag("--host-local-dir", path("host-local"))
}

/// Waits until the node's agent says that pods can have a network.
///
/// # Errors
/// When it ends, or does not say so within 20 s.
pub fn wait_ready(plane: &ControlPlane, node: &Node, agent: &mut Agent) -> Result<()> {
    let what = format!("the pod network of {}", node.name());
    wait_for(&what, Duration::from_secs(20), || {
        agent.process.check_running()?;
        let object = plane.kubectl(&["get", "node", node.name(), "-o", "json"])?;
        let object: Value = serde_json::from_str(&object)?;
        let conditions = object["status"]["conditions"].as_array();
        let works = |c: &Value| c["type"] == "NetworkUnavailable" && c["status"] == "False";
        Ok(conditions.into_iter().flatten().any(works).then_some(()))
    })
    .with_context(|| agent.process.log_end())
}

/// The plugin's configuration for a node.
#[must_use]
pub fn plugin_config(node: &Node) -> Value {
    json!({
        "type": "beeline-cni",
        "socket": node.state().join("cni.sock"),
        "stateDir": node.state().join("cni"),
        "capabilities": {"portMappings": true},
    })
}

/// Runs the plugin's binary as a runtime does, with this added to its configuration; gives what it says.
///
/// # Errors
/// When it refuses, with what it says.
pub fn plugin(node: &Node, command: &str, id: &str, netns: &str, more: &Value) -> Result<Value> {
    let mut child = node
        .host()
        .command(program("beeline-cni")?)?
        .env("CNI_COMMAND", command)
        .env("CNI_CONTAINERID", id)
        .env("CNI_NETNS", format!("/run/netns/{netns}"))
        .env("CNI_IFNAME", "eth0")
        .env("CNI_PATH", "/")
        .env("CNI_ARGS", format!("K8S_POD_NAMESPACE=default;K8S_POD_NAME={id}"))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .context("cannot start the CNI plugin")?;
    let mut conf = plugin_config(node);
    conf["cniVersion"] = "1.0.0".into();
    conf["name"] = "bl".into();
    for (key, value) in more.as_object().into_iter().flatten() {
        conf[key] = value.clone();
    }
    serde_json::to_writer(child.stdin.take().context("no way to the plugin")?, &conf)?;
    let output = child.wait_with_output()?;
    let said = String::from_utf8_lossy(&output.stdout);
    if !output.status.success() {
        bail!("{command} {id}: {said}");
    }
    Ok(serde_json::from_str(&said).unwrap_or(Value::Null))
}

/// The addresses in what the plugin says of a pod, IPv4 first; empty of a family that the network does not have.
#[must_use]
pub fn addresses(result: &Value) -> [String; 2] {
    [0, 1].map(|i: usize| {
        let cidr = result["ips"][i]["address"].as_str().unwrap_or_default();
        cidr.split('/').next().unwrap_or_default().to_owned()
    })
}

/// A pod as [`Node::add_pod`] makes one, but with a network from the plugin.
///
/// # Errors
/// When the plugin refuses, or a part of it cannot be made.
pub fn add_pod(node: &Node, name: &str) -> Result<Pod> {
    let netns = NetNs::create(&format!("{}-{name}", node.host().netns().name()))?;
    let result = plugin(node, "ADD", name, netns.name(), &json!({}))?;
    let [v4, v6] = addresses(&result);
    let address = |text: &str| format!("the plugin gave {name} the address {text:?}");
    node.pod(
        name,
        Arc::new(netns),
        v4.parse().with_context(|| address(&v4))?,
        v6.parse().with_context(|| address(&v6))?,
    )
}
