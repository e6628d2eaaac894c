//! `beeline node`: pods of the API run as processes of the host, in the network that the agent makes.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use beeline_tests::cluster::Node;
use beeline_tests::process::{self, Process};
use beeline_tests::{Cluster, ControlPlane, program, wait_for};
use serde_json::{Value, json};

const NET_CONF: &str = r#"{"Network": "10.244.0.0/16", "Backend": {"Type": "vxlan"}}"#;

/// Flags with which a `beeline node` keeps all that it has in its node's directories.
fn flags(node: &Node) -> Vec<String> {
    let path = |name: &str| node.state().join(name).display().to_string();
    let netns = format!("{}-", node.host().netns().name());
    [
        ("--cgroup-root", node.cgroup().display().to_string()),
        ("--bpffs-root", node.bpffs().display().to_string()),
        ("--state-dir", node.state().display().to_string()),
        ("--subnet-file", path("subnet.env")),
        ("--cni-socket", path("cni.sock")),
        ("--cni-state-dir", path("cni")),
        ("--host-local-dir", path("host-local")),
        ("--pod-dir", path("pods")),
        ("--pod-log-dir", path("pod-logs")),
        ("--image-dir", path("images")),
        ("--netns-prefix", netns),
    ]
    .into_iter()
    .flat_map(|(name, value)| [name.to_owned(), value])
    .collect()
}

/// Puts an executable where a node looks for what stands for an image: it answers with its pod's name and the image.
fn install_image(node: &Node, name: &str) {
    install_image_in(&node.state().join("images"), name);
}

/// Puts such an executable into a directory.
pub(crate) fn install_image_in(dir: &Path, name: &str) {
    fs::create_dir_all(dir).unwrap();
    let echo = program("beeline-echo").unwrap();
    let script = format!(
        "#!/bin/sh\nexec {} --name \"$HOSTNAME $BEELINE_IMAGE $MYSQL_SERVICE_HOST:$MYSQL_SERVICE_PORT\" --port 8080\n",
        echo.display()
    );
    fs::write(dir.join(name), script).unwrap();
    fs::set_permissions(dir.join(name), fs::Permissions::from_mode(0o755)).unwrap();
}

fn start(plane: &ControlPlane, node: &Node) -> Process {
    let conf = node.state().join("net-conf.json");
    fs::write(&conf, NET_CONF).unwrap();
    let mut command = node.host().command(program("beeline").unwrap()).unwrap();
    command.args(["node", "--node-name", node.name(), "--kubeconfig"]);
    command.arg(plane.kubeconfig()).arg("--net-config-path").arg(conf);
    command.args(flags(node));
    let log = node.state().join("node.log");
    Process::spawn(
        node.host(),
        &format!("beeline node of {}", node.name()),
        command,
        &log,
    )
    .unwrap()
}

/// An object of the API.
fn get(plane: &ControlPlane, args: &[&str]) -> Value {
    let text = plane
        .kubectl(&[&["get", "-o", "json", "--ignore-not-found"], args].concat())
        .unwrap();
    serde_json::from_str(&text).unwrap_or(Value::Null)
}

pub(crate) fn condition<'a>(object: &'a Value, kind: &str) -> &'a Value {
    let list = object["status"]["conditions"].as_array();
    list.into_iter()
        .flatten()
        .find(|condition| condition["type"] == kind)
        .map_or(&Value::Null, |condition| &condition["status"])
}

fn wait_node_ready(plane: &ControlPlane, node: &Node, process: &mut Process) {
    wait_for(
        &format!("{} to be ready", node.name()),
        Duration::from_secs(30),
        || {
            process.check_running()?;
            let ready = condition(&get(plane, &["node", node.name()]), "Ready") == "True";
            Ok(ready.then_some(()))
        },
    )
    .inspect_err(|_| eprintln!("{}", process.log_end()))
    .unwrap();
}

/// Waits until `wanted` holds for the pod.
fn wait_pod(plane: &ControlPlane, name: &str, what: &str, wanted: impl Fn(&Value) -> bool) -> Value {
    let mut last = Value::Null;
    wait_for(&format!("pod {name}: {what}"), Duration::from_secs(30), || {
        last = get(plane, &["pod", name]);
        Ok(wanted(&last).then_some(last.clone()))
    })
    .inspect_err(|_| eprintln!("{last:#}"))
    .unwrap()
}

/// The pods of an app that are ready and stay.
fn ready_pods(plane: &ControlPlane, app: &str) -> Vec<Value> {
    let list = get(plane, &["pods", "-l", &format!("app={app}")]);
    let pods = list["items"].as_array().cloned().unwrap_or_default();
    pods.into_iter()
        .filter(|pod| pod["metadata"]["deletionTimestamp"].is_null() && condition(pod, "Ready") == "True")
        .collect()
}

fn curl(mut command: Command, url: &str) -> Option<String> {
    command.args(["-s", "-f", "-m", "2", url]);
    process::output(command).ok()
}

fn pod(name: &str, node: &Node, policy: &str, command: &[&str]) -> String {
    json!({
        "apiVersion": "v1", "kind": "Pod", "metadata": {"name": name},
        "spec": {
            "nodeName": node.name(), "restartPolicy": policy, "terminationGracePeriodSeconds": 1,
            "containers": [{"name": "main", "image": "host", "command": command}],
        },
    })
    .to_string()
}

#[test]
fn the_tutorials_pods_run_and_answer_at_the_node_port_of_every_node() {
    let cluster = Cluster::new().unwrap();
    let plane = ControlPlane::start(&cluster).unwrap();
    let nodes = [cluster.add_node().unwrap(), cluster.add_node().unwrap()];
    let mut processes: Vec<Process> = nodes
        .iter()
        .map(|node| {
            install_image(node, "tomcat-app");
            start(&plane, node)
        })
        .collect();
    for (node, process) in nodes.iter().zip(&mut processes) {
        wait_node_ready(&plane, node, process);
    }
    let object = get(&plane, &["node", nodes[0].name()]);
    assert_eq!(
        object["status"]["addresses"][0]["address"],
        nodes[0].v4().to_string()
    );
    assert!(!object["status"]["capacity"]["cpu"].is_null(), "{object}");
    assert!(!get(&plane, &["lease", "-n", "kube-node-lease", nodes[0].name()]).is_null());

    for (i, node) in nodes.iter().enumerate() {
        let controller = json!({
            "apiVersion": "v1", "kind": "ReplicationController", "metadata": {"name": format!("myweb-{i}")},
            "spec": {
                "replicas": 2, "selector": {"app": "myweb", "on": node.name()},
                "template": {
                    "metadata": {"labels": {"app": "myweb", "on": node.name()}},
                    "spec": {"nodeName": node.name(), "terminationGracePeriodSeconds": 1, "containers": [{
                        "name": "myweb", "image": "kubeguide/tomcat-app:v1", "ports": [{"containerPort": 8080}],
                        "env": [{"name": "MYSQL_SERVICE_HOST", "value": "mysql"},
                            {"name": "MYSQL_SERVICE_PORT", "value": "3306"}],
                    }]},
                },
            },
        });
        plane.kubectl_stdin(&["create"], &controller.to_string()).unwrap();
    }
    let service = json!({
        "apiVersion": "v1", "kind": "Service", "metadata": {"name": "myweb"},
        "spec": {"type": "NodePort", "ports": [{"port": 8080, "nodePort": 30001}], "selector": {"app": "myweb"}},
    });
    plane.kubectl_stdin(&["create"], &service.to_string()).unwrap();
    wait_for("four ready pods", Duration::from_secs(30), || {
        Ok((ready_pods(&plane, "myweb").len() == 4).then_some(()))
    })
    .inspect_err(|_| eprintln!("{}", plane.kubectl(&["describe", "pods"]).unwrap_or_default()))
    .unwrap();

    let world = cluster.add_outside_host().unwrap();
    for node in &nodes {
        let url = format!("http://{}:30001/", node.v4());
        let mut seen = std::collections::BTreeSet::new();
        wait_for("all pods behind the node port", Duration::from_secs(20), || {
            seen.extend(curl(world.place().command("curl")?, &url));
            Ok((seen.len() == 4).then_some(()))
        })
        .unwrap();
        let all = |text: &String| text.contains("kubeguide/tomcat-app:v1 mysql:3306");
        assert!(seen.iter().all(all), "{seen:?}");
        assert!(curl(node.host().command("curl").unwrap(), &url).is_some());
    }

    // a pod that is deleted is replaced, and nothing of it stays
    let victim = ready_pods(&plane, "myweb").remove(0);
    let name = victim["metadata"]["name"].as_str().unwrap();
    plane.kubectl(&["delete", "pod", name]).unwrap();
    assert!(get(&plane, &["pod", name]).is_null());
    let uid = victim["metadata"]["uid"].as_str().unwrap();
    for node in &nodes {
        assert!(!node.state().join("pods").join(uid).exists());
    }
    wait_for("its replacement", Duration::from_secs(20), || {
        Ok((ready_pods(&plane, "myweb").len() == 4).then_some(()))
    })
    .unwrap();

    // pods outlive the program that started them
    let before = ready_pods(&plane, "myweb");
    for (node, process) in nodes.iter().zip(&mut processes) {
        process.kill().unwrap();
        assert!(
            curl(
                node.host().command("curl").unwrap(),
                &format!("http://{}:30001/", node.v4())
            )
            .is_some()
        );
        *process = start(&plane, node);
    }
    let mut after = Vec::new();
    for (node, process) in nodes.iter().zip(&mut processes) {
        process
            .wait_log("its report", Duration::from_secs(30), |line| {
                line.contains("node") && line.contains("ready=true")
            })
            .unwrap();
        wait_node_ready(&plane, node, process);
        after = ready_pods(&plane, "myweb");
    }
    let ids = |pods: &[Value]| -> Vec<Value> {
        let id = |pod: &Value| pod["status"]["containerStatuses"][0]["containerID"].clone();
        pods.iter().map(id).collect()
    };
    assert_eq!(ids(&before), ids(&after));
}

#[test]
fn containers_end_and_start_again_as_their_policy_says() {
    let cluster = Cluster::new().unwrap();
    let plane = ControlPlane::start(&cluster).unwrap();
    let node = cluster.add_node().unwrap();
    let mut process = start(&plane, &node);
    wait_node_ready(&plane, &node, &mut process);
    for (name, policy, command) in [
        ("good", "Never", &["sh", "-c", "echo hello; hostname"][..]),
        ("bad", "OnFailure", &["sh", "-c", "exit 3"]),
        (
            "stubborn",
            "Always",
            &["sh", "-c", "trap '' TERM; sleep 1000 & wait; wait; sleep 1000"],
        ),
        ("missing", "Always", &[]),
    ] {
        plane
            .kubectl_stdin(&["create"], &pod(name, &node, policy, command))
            .unwrap();
    }
    let state = |pod: &Value| pod["status"]["containerStatuses"][0].clone();
    let good = wait_pod(&plane, "good", "to end", |pod| {
        pod["status"]["phase"] == "Succeeded"
    });
    assert_eq!(state(&good)["state"]["terminated"]["exitCode"], 0);
    let uid = good["metadata"]["uid"].as_str().unwrap();
    let log = node
        .state()
        .join(format!("pod-logs/default_good_{uid}/main/0.log"));
    assert_eq!(fs::read_to_string(log).unwrap(), "hello\ngood\n");

    let bad = wait_pod(&plane, "bad", "to wait", |pod| {
        state(pod)["state"]["waiting"]["reason"] == "CrashLoopBackOff"
    });
    assert_eq!(state(&bad)["lastState"]["terminated"]["exitCode"], 3);
    assert_eq!(state(&bad)["restartCount"], 1);
    wait_pod(&plane, "missing", "to wait for its image", |pod| {
        state(pod)["state"]["waiting"]["reason"]
            .as_str()
            .is_some_and(|reason| reason.starts_with("ErrImage") || reason.starts_with("ImagePull"))
    });

    wait_pod(&plane, "stubborn", "to run", |pod| {
        condition(pod, "Ready") == "True"
    });
    plane
        .kubectl(&[
            "delete",
            "pod",
            "stubborn",
            "bad",
            "good",
            "missing",
            "--timeout=20s",
        ])
        .unwrap();
    let left = fs::read_dir(node.state().join("pods")).unwrap().count();
    assert_eq!(left, 0);
    let left = node.host().output("ip", &["-br", "link"]).unwrap();
    assert!(!left.contains("veth"), "{left}");
}
