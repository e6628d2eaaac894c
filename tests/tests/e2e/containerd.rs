//! A real containerd runs a real container; the plugin gives it its network.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context;
use beeline_tests::cluster::Node;
use beeline_tests::process::Process;
use beeline_tests::{program, wait_for};
use serde_json::{Value, json};

use crate::cri::{self, Message};
use crate::pod_network::{
    CniPod, NET_CONF, Network, SERVICE, ipam, options, plugin_config, service, start_agent,
};

/// A busybox and a page.
pub(crate) const IMAGE: &str = "beeline.local/busybox:1";

/// The reference plugin of this name, which a node has from its distribution.
const LOOPBACK: &str = r#"#!/bin/sh
[ "$CNI_COMMAND" = ADD ] || exit 0
nsenter --net="$CNI_NETNS" ip link set lo up
echo '{"cniVersion": "0.3.1", "interfaces": [{"name": "lo", "mac": "00:00:00:00:00:00", "sandbox": "'"$CNI_NETNS"'"}],
       "ips": [{"version": "4", "interface": 0, "address": "127.0.0.1/8"}]}'
"#;

/// containerd as the container runtime of a node, with everything of it in the node's directory.
pub(crate) struct Containerd {
    process: Process,
    pub(crate) socket: PathBuf,
    sandboxes: Vec<String>,
}

impl Containerd {
    /// Starts it with this plugin for the pods' network.
    pub(crate) fn start(node: &Node, plugin: &Value) -> Self {
        let dir = node.state().join("containerd");
        let (conf, socket) = (dir.join("net.d"), dir.join("containerd.sock"));
        fs::create_dir_all(&conf).unwrap();
        let list = json!({
            "cniVersion": "1.0.0", "name": "beeline",
            "plugins": [plugin],
        });
        fs::write(conf.join("10-beeline.conflist"), list.to_string()).unwrap();
        let bin = dir.join("bin");
        fs::create_dir_all(&bin).unwrap();
        symlink(program("beeline-cni").unwrap(), bin.join("beeline-cni")).unwrap();
        // containerd asks for it beside every network
        fs::write(bin.join("loopback"), LOOPBACK).unwrap();
        fs::set_permissions(bin.join("loopback"), fs::Permissions::from_mode(0o755)).unwrap();
        let config = format!(
            r#"version = 2
root = "{dir}/root"
state = "{dir}/run"
disabled_plugins = ["io.containerd.internal.v1.opt"]
[grpc]
  address = "{socket}"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{IMAGE}"
  disable_apparmor = true
  netns_mounts_under_state_dir = true
  restrict_oom_score_adj = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "{bin}"
    conf_dir = "{conf}"
  [plugins."io.containerd.grpc.v1.cri".containerd]
    snapshotter = "native"
"#,
            dir = dir.display(),
            socket = socket.display(),
            bin = bin.display(),
            conf = conf.display(),
        );
        fs::write(dir.join("config.toml"), config).unwrap();
        let mut command = node.host().command("containerd").unwrap();
        command.arg("-c").arg(dir.join("config.toml"));
        let process = Process::spawn(node.host(), "containerd", command, &dir.join("log")).unwrap();
        let image = image(&dir);
        let mut containerd = Self {
            process,
            socket,
            sandboxes: Vec::new(),
        };
        let address = containerd.socket.display().to_string();
        wait_for("containerd", Duration::from_secs(20), || {
            containerd.process.check_running()?;
            let ready = cri::call(&containerd.socket, "Status", &Message::default());
            Ok(ready.ok().map(|_| ()))
        })
        .unwrap();
        let args = [
            "-a",
            &address,
            "-n",
            "k8s.io",
            "images",
            "import",
            "--snapshotter",
            "native",
        ];
        node.host()
            .output("ctr", &[&args[..], &[image.to_str().unwrap()]].concat())
            .unwrap();
        containerd
    }

    fn call(&self, method: &str, message: &Message) -> Vec<u8> {
        cri::call(&self.socket, method, message)
            .with_context(|| self.process.log_end())
            .unwrap()
    }

    /// Runs a pod as kubelet does; gives its sandbox's id and addresses.
    fn run_pod(&mut self, name: &str) -> (String, Vec<String>) {
        let metadata = Message::default()
            .text(1, name)
            .text(2, &format!("uid-{name}"))
            .text(3, "default");
        let config = Message::default().message(1, &metadata);
        let answer = self.call("RunPodSandbox", &Message::default().message(1, &config));
        let id = cri::text(&answer, 1);
        self.sandboxes.push(id.clone());
        let image = Message::default().text(1, IMAGE);
        let command = ["/bin/busybox", "httpd", "-f", "-p", "8080", "-h", "/www"];
        let container = Message::default()
            .message(1, &Message::default().text(1, "web"))
            .message(2, &image);
        let container = command
            .iter()
            .fold(container, |container, word| container.text(3, word));
        let create = Message::default()
            .text(1, &id)
            .message(2, &container)
            .message(3, &config);
        let answer = self.call("CreateContainer", &create);
        self.call(
            "StartContainer",
            &Message::default().text(1, &cri::text(&answer, 1)),
        );
        let answer = self.call("PodSandboxStatus", &Message::default().text(1, &id).number(2, 0));
        let status = cri::fields(&answer, 1).remove(0);
        let network = cri::fields(&status, 5).remove(0);
        let mut ips = vec![cri::text(&network, 1)];
        ips.extend(cri::fields(&network, 2).iter().map(|ip| cri::text(ip, 1)));
        (id, ips)
    }

    fn remove_pod(&mut self, id: &str) {
        self.sandboxes.retain(|sandbox| sandbox != id);
        for method in ["StopPodSandbox", "RemovePodSandbox"] {
            self.call(method, &Message::default().text(1, id));
        }
    }
}

impl Drop for Containerd {
    fn drop(&mut self) {
        for id in &self.sandboxes {
            for method in ["StopPodSandbox", "RemovePodSandbox"] {
                let _gone = cri::call(&self.socket, method, &Message::default().text(1, id));
            }
        }
        // what a sandbox that could not be removed has mounted would keep the directory
        let dir = self.socket.parent().unwrap().display().to_string();
        for line in fs::read_to_string("/proc/mounts").unwrap_or_default().lines() {
            if let Some(place) = line.split(' ').nth(1).filter(|place| place.starts_with(&dir)) {
                let _gone = nix::mount::umount2(place, nix::mount::MntFlags::MNT_DETACH);
            }
        }
    }
}

/// An image of a static busybox and a page.
fn image(dir: &Path) -> PathBuf {
    let root = dir.join("rootfs");
    fs::create_dir_all(root.join("bin")).unwrap();
    fs::create_dir_all(root.join("www")).unwrap();
    fs::copy("/usr/bin/busybox", root.join("bin/busybox")).unwrap();
    fs::write(root.join("www/index.html"), "from a container\n").unwrap();
    let tar = |from: &Path, to: &Path, names: &[&str]| {
        let mut command = std::process::Command::new("tar");
        command.arg("-C").arg(from).arg("-cf").arg(to).args(names);
        assert!(command.status().unwrap().success());
    };
    let layer = dir.join("layer.tar");
    tar(&root, &layer, &["bin", "www"]);
    let sum = std::process::Command::new("sha256sum")
        .arg(&layer)
        .output()
        .unwrap();
    let digest = String::from_utf8(sum.stdout)
        .unwrap()
        .split(' ')
        .next()
        .unwrap()
        .to_owned();
    let config = json!({
        "architecture": if cfg!(target_arch = "x86_64") { "amd64" } else { "arm64" }, "os": "linux",
        "config": {"Entrypoint": ["/bin/busybox", "sleep", "3600"]},
        "rootfs": {"type": "layers", "diff_ids": [format!("sha256:{digest}")]},
    });
    fs::write(dir.join("config.json"), config.to_string()).unwrap();
    let manifest = json!([{"Config": "config.json", "RepoTags": [IMAGE], "Layers": ["layer.tar"]}]);
    fs::write(dir.join("manifest.json"), manifest.to_string()).unwrap();
    tar(
        dir,
        &dir.join("image.tar"),
        &["config.json", "manifest.json", "layer.tar"],
    );
    dir.join("image.tar")
}

#[test]
fn containerd_runs_a_pod_that_others_reach() {
    let Network {
        cluster: _cluster,
        plane,
        nodes,
        mut agents,
    } = Network::new(2, |options| options);
    let mut containerd = Containerd::start(&nodes[0], &plugin_config(&nodes[0]));
    let (id, ips) = containerd.run_pod("web");
    assert_eq!(ips.len(), 2, "{ips:?}");
    let list = ipam(&nodes[0]);
    assert_eq!(list["addresses"][0]["key"]["container_id"], id.as_str(), "{list}");

    let client = CniPod::new(&nodes[1], "client");
    for ip in [ips[0].clone(), format!("[{}]", ips[1])] {
        let url = format!("http://{ip}:8080/index.html");
        let page = wait_for("the page", Duration::from_secs(10), || Ok(client.get(&url))).unwrap();
        assert_eq!(page, "from a container\n");
    }
    plane
        .kubectl_stdin(&["apply"], &service(&ips[0], &nodes[0]))
        .unwrap();
    let url = format!("http://{SERVICE}/index.html");
    let page = wait_for("the ClusterIP", Duration::from_secs(10), || Ok(client.get(&url))).unwrap();
    assert_eq!(page, "from a container\n");

    // a pod that is made again gets another sandbox, and the old one's end does not hurt it
    let (second, other) = containerd.run_pod("web2");
    assert_ne!(ips, other);
    containerd.remove_pod(&id);
    let url = format!("http://{}:8080/index.html", other[0]);
    wait_for("the second pod's page", Duration::from_secs(10), || {
        Ok(client.get(&url))
    })
    .unwrap();
    // without the agent a pod can still be removed
    drop(agents.remove(0));
    containerd.remove_pod(&second);
    let _agent = start_agent(&plane, &nodes[0], &options(&plane, &nodes[0], NET_CONF));
    let list = ipam(&nodes[0]);
    let used = list["addresses"]
        .as_array()
        .unwrap()
        .iter()
        .filter(|address| address["state"] == "used")
        .count();
    assert_eq!(used, 0, "{list}");
}
