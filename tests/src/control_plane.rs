//! The control plane in the switch's namespace, and kubectl.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::json;

use crate::cluster::{Cluster, Node, Pod};
use crate::process::{Place, Process, output};
use crate::{program, wait_for};

/// The port of the API.
const PORT: u16 = 6443;
/// Where ClusterIPs come from.
pub const SERVICE_CIDRS: &str = "10.96.0.0/16,fd00:10:96::/112";

/// `beeline control-plane` in the switch's namespace. Killed on drop.
#[derive(Debug)]
pub struct ControlPlane {
    /// The process.
    pub process: Process,
    place: Place,
    kubeconfig: PathBuf,
}

impl ControlPlane {
    /// Starts it and waits until kubectl gets an answer. With the same cluster, a later call continues with its data.
    ///
    /// # Errors
    /// When it ends, or does not answer within 20 s.
    pub fn start(cluster: &Cluster) -> Result<Self> {
        let place = cluster.switch().clone();
        let kubeconfig = cluster.state().join("kubeconfig");
        let address = cluster.switch_address().to_string();
        let mut command = place.command(program("beeline")?)?;
        command
            .args(["control-plane", "--data-dir"])
            .arg(cluster.state().join("control-plane"))
            .args(["--bind", &format!("0.0.0.0:{PORT}"), "--advertise", &address])
            .arg("--kubeconfig")
            .arg(&kubeconfig)
            .args(["--service-cidr", SERVICE_CIDRS]);
        let log = cluster.state().join("control-plane.log");
        let process = Process::spawn(&place, "control plane", command, &log)?;
        let mut plane = Self {
            process,
            place,
            kubeconfig,
        };
        wait_for("the API to answer", Duration::from_secs(20), || {
            plane.process.check_running()?;
            if !plane.kubeconfig.exists() {
                return Ok(None);
            }
            let ready = plane.kubectl(&["get", "--raw", "/readyz"])?;
            Ok((ready.trim() == "ok").then_some(()))
        })
        .with_context(|| plane.process.log_end())?;
        Ok(plane)
    }

    /// The administrator's kubeconfig; its server is only reachable inside the cluster's namespaces.
    #[must_use]
    pub fn kubeconfig(&self) -> &Path {
        &self.kubeconfig
    }

    /// A kubectl command with the administrator's rights, in the switch's namespace.
    ///
    /// # Errors
    /// When the cgroup is gone.
    pub fn kubectl_command(&self) -> Result<Command> {
        let mut command = self.place.command("kubectl")?;
        // A cache of our own: discovery of one cluster must not serve another at the same address.
        let cache = self.kubeconfig.with_file_name("kubectl-cache");
        command
            .arg("--kubeconfig")
            .arg(&self.kubeconfig)
            .arg("--cache-dir")
            .arg(cache);
        command.env_remove("KUBECONFIG");
        Ok(command)
    }

    /// Runs kubectl and returns what it printed.
    ///
    /// # Errors
    /// When it fails, with its message.
    pub fn kubectl(&self, args: &[&str]) -> Result<String> {
        let mut command = self.kubectl_command()?;
        command.args(args).stdin(Stdio::null());
        output(command)
    }

    /// `kubectl <args> -f -` with `document` as input.
    ///
    /// # Errors
    /// When it fails, with its message.
    pub fn kubectl_stdin(&self, args: &[&str], document: &str) -> Result<String> {
        let mut command = self.kubectl_command()?;
        command.args(args).args(["-f", "-"]);
        let mut child = command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .context("cannot start kubectl: is it installed?")?;
        if let Some(mut stdin) = child.stdin.take() {
            // Should kubectl stop early, its own message is the one to show.
            let _ = stdin.write_all(document.as_bytes());
        }
        let output = child.wait_with_output().context("cannot wait for kubectl")?;
        if !output.status.success() {
            let said = String::from_utf8_lossy(&output.stderr);
            bail!(
                "kubectl {} failed ({}): {}",
                args.join(" "),
                output.status,
                said.trim()
            );
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// Registers a node as kubelet would.
    ///
    /// # Errors
    /// When the API refuses it.
    pub fn register_node(&self, node: &Node) -> Result<()> {
        let [v4, v6] = node.pod_cidrs();
        let object = json!({
            "apiVersion": "v1", "kind": "Node",
            "metadata": {"name": node.name(), "labels": {"kubernetes.io/hostname": node.name()}},
            "spec": {"podCIDR": v4, "podCIDRs": [v4, v6]},
        });
        self.kubectl_stdin(&["create"], &object.to_string())?;
        self.patch_status(
            "node",
            node.name(),
            &json!({"status": {
                "addresses": [
                    {"type": "InternalIP", "address": node.v4()},
                    {"type": "InternalIP", "address": node.v6()},
                    {"type": "Hostname", "address": node.name()},
                ],
                "conditions": [{"type": "Ready", "status": "True", "reason": "Harness"}],
            "nodeInfo": node_info()?,
            }}),
        )
    }

    /// Creates the pod object of a pod that runs, and reports it ready, as kubelet would.
    ///
    /// # Errors
    /// When the API refuses it.
    pub fn register_pod(&self, node: &Node, pod: &Pod, app: &str, port: u16) -> Result<()> {
        let object = json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": {"name": pod.name(), "labels": {"app": app}},
            "spec": {
                "nodeName": node.name(),
                "containers": [{"name": "web", "image": "beeline-echo", "ports": [{"containerPort": port}]}],
            },
        });
        self.kubectl_stdin(&["apply"], &object.to_string())?;
        self.report_pod(pod, true)
    }

    /// Reports a pod's readiness, as kubelet would.
    ///
    /// # Errors
    /// When the API refuses it.
    pub fn report_pod(&self, pod: &Pod, ready: bool) -> Result<()> {
        let condition = if ready { "True" } else { "False" };
        let ips: Vec<_> = pod.addresses().iter().map(|ip| json!({"ip": ip})).collect();
        let now = jiff::Timestamp::now()
            .round(jiff::Unit::Second)
            .context("the clock is out of range")?;
        self.patch_status("pod", pod.name(), &json!({"status": {
            "phase": "Running", "podIP": pod.v4(), "podIPs": ips, "startTime": now,
            "conditions": [{"type": "Ready", "status": condition}, {"type": "ContainersReady", "status": condition}],
            "containerStatuses": [{
                "name": "web", "image": "beeline-echo", "imageID": "", "ready": ready, "restartCount": 0,
                "started": true, "state": {"running": {"startedAt": now}},
            }],
        }}))
    }

    /// A merge patch: in a strategic one node addresses of the same type would take each other's place.
    fn patch_status(&self, kind: &str, name: &str, patch: &serde_json::Value) -> Result<()> {
        self.kubectl(&[
            "patch",
            kind,
            name,
            "--subresource=status",
            "--type=merge",
            "-p",
            &patch.to_string(),
        ])
        .map(|_| ())
    }
}

/// What kubelet would say of this machine; all fields are required.
fn node_info() -> Result<serde_json::Value> {
    let system = nix::sys::utsname::uname().context("uname failed")?;
    let kernel = system.release().to_string_lossy();
    let release = std::fs::read_to_string("/etc/os-release").unwrap_or_default();
    let image = release
        .lines()
        .find_map(|line| line.strip_prefix("PRETTY_NAME="))
        .unwrap_or("Linux");
    Ok(json!({
        "kernelVersion": kernel, "osImage": image.trim_matches('"'), "operatingSystem": "linux",
        "architecture": if std::env::consts::ARCH == "x86_64" { "amd64" } else { "arm64" },
        "kubeletVersion": concat!("beeline-", env!("CARGO_PKG_VERSION")), "kubeProxyVersion": "",
        "containerRuntimeVersion": "netns://1", "machineID": "", "systemUUID": "", "bootID": "",
    }))
}
