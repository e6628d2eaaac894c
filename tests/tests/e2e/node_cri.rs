//! `beeline node --runtime cri`: a real containerd runs the pods.

use std::path::Path;
use std::time::Duration;

use beeline_tests::{Cluster, process, wait_for};
use serde_json::{Value, json};

use crate::containerd::{Containerd, IMAGE};
use crate::node::condition;
use crate::node_pods::Scene;

/// Whether a file in a cgroup of the pod says so, in whichever hierarchy it is.
fn cgroup_says(dir: &Path, uid: &str, names: &[&str], wanted: &str) -> bool {
    std::fs::read_dir(dir)
        .into_iter()
        .flatten()
        .flatten()
        .any(|entry| {
            let path = entry.path();
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                return cgroup_says(&path, uid, names, wanted);
            }
            let named = names.iter().any(|name| path.ends_with(name));
            named
                && path.display().to_string().contains(&format!("pod{uid}"))
                && std::fs::read_to_string(&path).is_ok_and(|text| text.trim() == wanted)
        })
}

#[test]
fn containerd_runs_the_pods_of_a_node() {
    let cluster = Cluster::new().unwrap();
    let node = cluster.add_node().unwrap();
    let run = node.state().join("root/run/beeline");
    let plugin = json!({
        "type": "beeline-cni", "socket": run.join("cni.sock"), "stateDir": node.state().join("root/var/lib/beeline/cni"),
        "capabilities": {"portMappings": true},
    });
    let containerd = Containerd::start(&node, &plugin);
    let endpoint = format!("unix://{}", containerd.socket.display());
    let scene = Scene::with(&node, Some(&endpoint));
    let version = scene.get(&["node", "node-1"])["status"]["nodeInfo"]["containerRuntimeVersion"].clone();
    assert!(
        version.as_str().unwrap().starts_with("containerd://"),
        "{version}"
    );

    scene.create(&json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "page"}, "data": {"index.html": "from a map"}}));
    let shell = |script: &str| json!(["/bin/busybox", "sh", "-c", script]);
    scene.pod(
        "web",
        &json!({"volumes": [{"name": "page", "configMap": {"name": "page"}}]}),
        &json!({
            "image": IMAGE, "command": shell("echo begins; echo $COLOUR; exec /bin/busybox httpd -f -p 8080 -h /www"),
            "env": [{"name": "COLOUR", "value": "red"}], "ports": [{"containerPort": 8080}],
            "resources": {"limits": {"memory": "64Mi", "cpu": "500m"}},
            "volumeMounts": [{"name": "page", "mountPath": "/www/map"}],
            "readinessProbe": {"httpGet": {"path": "/map/index.html", "port": 8080}, "periodSeconds": 1},
            "livenessProbe": {"exec": {"command": ["/bin/busybox", "true"]}, "periodSeconds": 1},
        }),
    );
    scene.pod(
        "bad",
        &json!({"restartPolicy": "OnFailure"}),
        &json!({"image": IMAGE, "command": shell("echo attempt; exit 3")}),
    );
    scene.pod(
        "missing",
        &json!({}),
        &json!({"image": "beeline.local/no-such-image:1", "imagePullPolicy": "Never"}),
    );
    let web = scene.wait_pod("web", "to be ready", |pod| condition(pod, "Ready") == "True");
    let status = |pod: &Value| pod["status"]["containerStatuses"][0].clone();
    let id = status(&web)["containerID"].as_str().unwrap().to_owned();
    assert!(id.starts_with("containerd://"), "{id}");
    let uid = web["metadata"]["uid"].as_str().unwrap();
    let limits = ["memory.limit_in_bytes", "memory.max"];
    assert!(cgroup_says(Path::new("/sys/fs/cgroup"), uid, &limits, "67108864"));

    // through a Service, from the node
    scene
        .kubectl(&["expose", "pod", "web", "--port=80", "--target-port=8080"])
        .unwrap();
    let ip = scene.get(&["service", "web"])["spec"]["clusterIP"]
        .as_str()
        .unwrap()
        .to_owned();
    let page = scene.wait("the page", || {
        let mut command = node.host().command("curl")?;
        command.args(["-s", "-f", "-m", "2", &format!("http://{ip}/map/index.html")]);
        Ok(process::output(command).ok())
    });
    assert_eq!(page, "from a map");

    // what it says
    assert_eq!(scene.kubectl(&["logs", "web"]).unwrap(), "begins\nred\n");
    assert_eq!(scene.kubectl(&["logs", "web", "--tail=1"]).unwrap(), "red\n");
    let timed = scene
        .kubectl(&["logs", "web", "--timestamps", "--since=1h"])
        .unwrap();
    assert!(
        timed.starts_with("20") && timed.lines().next().unwrap().ends_with("Z begins"),
        "{timed}"
    );
    let late = scene
        .kubectl(&["logs", "web", "--since-time=2100-01-01T00:00:00Z"])
        .unwrap();
    assert_eq!(late, "");

    // commands in it
    let said = scene
        .kubectl(&[
            "exec",
            "web",
            "--",
            "/bin/busybox",
            "sh",
            "-c",
            "hostname; cat /etc/hosts",
        ])
        .unwrap();
    let pod_ip = web["status"]["podIP"].as_str().unwrap();
    assert!(
        said.starts_with("web\n") && said.contains(&format!("{pod_ip}\tweb")),
        "{said}"
    );
    let done = scene
        .kubectl_stdin(
            &[
                "exec",
                "-i",
                "web",
                "--",
                "/bin/busybox",
                "sh",
                "-c",
                "head -n 1; exit 5",
            ],
            "hello\n",
        )
        .unwrap();
    assert_eq!(
        (done.stdout.as_slice(), done.status.code()),
        (&b"hello\n"[..], Some(5))
    );

    let much = "0123456789\n".repeat(50_000);
    let done = scene
        .kubectl_stdin(&["exec", "-i", "web", "--", "/bin/busybox", "cat"], &much)
        .unwrap();
    assert!(
        done.status.success() && done.stdout == much.as_bytes(),
        "{} bytes",
        done.stdout.len()
    );

    // ends, and a beginning that cannot be
    let bad = scene.wait_pod("bad", "to wait", |pod| {
        status(pod)["state"]["waiting"]["reason"] == "CrashLoopBackOff"
    });
    assert_eq!(
        (
            &status(&bad)["lastState"]["terminated"]["exitCode"],
            &status(&bad)["restartCount"]
        ),
        (&json!(3), &json!(1))
    );
    assert_eq!(
        scene.kubectl(&["logs", "bad", "--previous"]).unwrap(),
        "attempt\n"
    );
    scene.wait_pod("missing", "to say why", |pod| {
        status(pod)["state"]["waiting"]["reason"] == "ErrImageNeverPull"
    });

    // containers outlive the program that started them
    let _again = scene.kill_node(|| {
        let mut command = node.host().command("curl").unwrap();
        command.args(["-s", "-f", "-m", "2", &format!("http://{ip}/map/index.html")]);
        assert_eq!(process::output(command).unwrap(), "from a map");
    });
    wait_for("the node's word", Duration::from_secs(30), || {
        scene
            .kubectl(&["exec", "web", "--", "/bin/busybox", "true"])
            .map(Some)
            .or(Ok(None))
    })
    .unwrap();
    let again = scene.get(&["pod", "web"]);
    assert_eq!(
        (status(&again)["containerID"].as_str(), condition(&again, "Ready")),
        (Some(id.as_str()), &json!("True"))
    );
    assert_eq!(status(&again)["restartCount"], 0);

    scene
        .kubectl(&["delete", "pod", "web", "bad", "missing", "--timeout=60s"])
        .unwrap();
    let left = node.host().output("ip", &["-br", "link"]).unwrap();
    assert!(!left.contains("veth"), "{left}");
    assert!(
        std::fs::read_dir(node.state().join("root/var/lib/beeline/pods"))
            .unwrap()
            .next()
            .is_none()
    );
}
