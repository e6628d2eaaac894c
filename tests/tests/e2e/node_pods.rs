//! What the pods of `beeline node` have: volumes and variables, probes and hooks, and what an operator does with them.

use std::io::Write as _;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result};
use beeline_tests::cluster::Node;
use beeline_tests::process::Process;
use beeline_tests::{Cluster, process, wait_for};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::{Value, json};

use crate::init::Machine;
use crate::node::condition;

/// A cluster of one machine.
pub(crate) struct Scene<'a> {
    machine: Machine<'a>,
    /// Where the runtime of the pods listens.
    cri: Option<String>,
}

impl<'a> Scene<'a> {
    fn new(node: &'a Node) -> Self {
        Self::with(node, None)
    }

    /// With a container runtime for the pods.
    pub(crate) fn with(node: &'a Node, cri: Option<&str>) -> Self {
        let machine = Machine::new(node);
        let address = node.v4().to_string();
        let scene = Self {
            machine,
            cri: cri.map(str::to_owned),
        };
        let init = [
            "init",
            "--node-name",
            "node-1",
            "--apiserver-advertise-address",
            &address,
        ];
        scene
            .machine
            .beeline(&[&init[..], &scene.cri_flag()].concat())
            .with_context(|| scene.machine.logs())
            .unwrap();
        scene.wait("the node to be ready", || {
            Ok((condition(&scene.get(&["node", "node-1"]), "Ready") == "True").then_some(()))
        });
        scene
    }

    fn cri_flag(&self) -> Vec<&str> {
        self.cri
            .iter()
            .flat_map(|socket| ["--cri-socket", socket])
            .collect()
    }

    /// Kills the node's process, which has no time to do anything, and starts it again; the new one ends when dropped.
    pub(crate) fn kill_node(&self, meanwhile: impl FnOnce()) -> Process {
        let record = std::fs::read(self.machine.root.join("run/beeline/node.json")).unwrap();
        let record: Value = serde_json::from_slice(&record).unwrap();
        let pid = i32::try_from(record["pid"].as_i64().unwrap()).unwrap();
        let line = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap();
        let line = String::from_utf8(line).unwrap();
        kill(Pid::from_raw(pid), Signal::SIGKILL).unwrap();
        self.wait("the node's end", || {
            let runs =
                std::fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| !stat.contains(") Z "));
            Ok((!runs).then_some(()))
        });
        meanwhile();
        let node = self.machine.node;
        let mut words = line.trim_end_matches('\0').split('\0');
        let mut command = node.host().command(words.next().unwrap()).unwrap();
        command.args(words);
        Process::spawn(
            node.host(),
            "beeline node",
            command,
            &node.state().join("again.log"),
        )
        .unwrap()
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = self.machine.node.host().command("kubectl").unwrap();
        command.args(["--kubeconfig", &self.machine.admin_conf(), "--cache-dir"]);
        command
            .arg(self.machine.node.state().join("kubectl-cache"))
            .args(args);
        command
    }

    pub(crate) fn kubectl(&self, args: &[&str]) -> Result<String> {
        process::output(self.command(args))
    }

    pub(crate) fn kubectl_stdin(&self, args: &[&str], input: &str) -> Result<std::process::Output> {
        let mut command = self.command(args);
        command
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut child = command.spawn()?;
        let mut stdin = child.stdin.take().context("no stdin")?;
        stdin.write_all(input.as_bytes())?;
        drop(stdin);
        Ok(child.wait_with_output()?)
    }

    /// An object of the API.
    pub(crate) fn get(&self, args: &[&str]) -> Value {
        let text = self.kubectl(&[&["get", "-o", "json", "--ignore-not-found"], args].concat());
        serde_json::from_str(&text.unwrap_or_default()).unwrap_or(Value::Null)
    }

    pub(crate) fn create(&self, object: &Value) {
        let done = self
            .kubectl_stdin(&["apply", "--server-side", "-f", "-"], &object.to_string())
            .unwrap();
        assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    }

    /// Creates a pod with one container.
    pub(crate) fn pod(&self, name: &str, more: &Value, container: &Value) {
        let mut main = json!({"name": "main", "image": "host"});
        merge(&mut main, container);
        let mut pod = json!({
            "apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "labels": {"app": name}},
            "spec": {"nodeName": "node-1", "terminationGracePeriodSeconds": 1, "containers": [main]},
        });
        merge(&mut pod["spec"], more);
        self.create(&pod);
    }

    /// Waits for what a look finds.
    pub(crate) fn wait<T>(&self, what: &str, look: impl FnMut() -> Result<Option<T>>) -> T {
        wait_for(what, Duration::from_secs(40), look)
            .inspect_err(|_| {
                let pods = self.kubectl(&["describe", "pods"]).unwrap_or_default();
                eprintln!("{pods}\n{}", self.machine.logs());
            })
            .unwrap()
    }

    /// Waits until `wanted` holds for the pod.
    pub(crate) fn wait_pod(&self, name: &str, what: &str, wanted: impl Fn(&Value) -> bool) -> Value {
        self.wait(&format!("pod {name}: {what}"), || {
            let pod = self.get(&["pod", name]);
            Ok(wanted(&pod).then_some(pod))
        })
    }

    /// Waits until the pod's log has a text.
    fn wait_log(&self, pod: &str, wanted: &str) -> String {
        let mut last = String::new();
        self.wait(&format!("{wanted:?} of {pod}"), || {
            last = self.kubectl(&["logs", pod]).unwrap_or_default();
            Ok(last.contains(wanted).then(|| last.clone()))
        })
    }
}

impl Drop for Scene<'_> {
    fn drop(&mut self) {
        // What is left is found by the cluster's own look.
        let _ended = self
            .machine
            .beeline(&[&["reset", "--force"][..], &self.cri_flag()].concat());
    }
}

fn merge(to: &mut Value, from: &Value) {
    for (key, value) in from.as_object().into_iter().flatten() {
        to[key] = value.clone();
    }
}

fn shell(script: &str) -> Value {
    json!(["sh", "-c", script])
}

#[test]
fn volumes_are_there_and_follow_what_they_come_from() {
    let cluster = Cluster::new().unwrap();
    let node = cluster.add_node().unwrap();
    let scene = Scene::new(&node);
    scene.create(
        &json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "settings"},
        "data": {"colour": "red", "nested": "deep"}}),
    );
    scene.create(
        &json!({"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "password"},
        "stringData": {"word": "sesame"}}),
    );
    // Places that the host does not have, one that it has, and a file in another volume.
    let script = r"cat /settings/colour; echo; cat /settings/sub/deep; echo; cat /var/run/password/word; echo
        cat /tmp/one; echo; cat /pod/labels; echo; cat /pod/name; echo; echo $COLOUR $WORD $CPUS $ALL_word
        echo written > /scratch/file; cat /scratch/file; touch /settings/x 2>&1 | grep -o 'Read-only.*'
        cut -d. -f1 /account/token | base64 -d 2> /dev/null; echo; cat /account/namespace; echo
        grep -c BEGIN /account/ca.crt; pwd; ls -d /usr/bin
        while [ $(cat /settings/colour) = red ]; do sleep 0.2; done; cat /settings/colour; sleep 1000";
    scene.pod(
        "p",
        &json!({"volumes": [
            {"name": "settings", "configMap": {"name": "settings", "items": [
                {"key": "colour", "path": "colour"}, {"key": "nested", "path": "sub/deep"}]}},
            {"name": "password", "secret": {"secretName": "password", "defaultMode": 0o400}},
            {"name": "scratch", "emptyDir": {"medium": "Memory", "sizeLimit": "1Mi"}},
            {"name": "pod", "downwardAPI": {"items": [
                {"path": "labels", "fieldRef": {"fieldPath": "metadata.labels"}},
                {"path": "name", "fieldRef": {"fieldPath": "metadata.name"}}]}},
            {"name": "account", "projected": {"sources": [
                {"serviceAccountToken": {"path": "token", "expirationSeconds": 600}},
                {"configMap": {"name": "kube-root-ca.crt"}},
                {"downwardAPI": {"items": [{"path": "namespace", "fieldRef": {"fieldPath": "metadata.namespace"}}]}}]}},
            {"name": "bin", "hostPath": {"path": "/usr/bin", "type": "Directory"}},
        ]}),
        &json!({
            "command": shell(script), "workingDir": "/scratch",
            "env": [
                {"name": "COLOUR", "valueFrom": {"configMapKeyRef": {"name": "settings", "key": "colour"}}},
                {"name": "WORD", "valueFrom": {"secretKeyRef": {"name": "password", "key": "word"}}},
                {"name": "CPUS", "valueFrom": {"resourceFieldRef": {"resource": "limits.cpu", "divisor": "1m"}}},
            ],
            "envFrom": [{"secretRef": {"name": "password"}, "prefix": "ALL_"}],
            "resources": {"limits": {"cpu": "1500m"}},
            "volumeMounts": [
                {"name": "settings", "mountPath": "/settings"},
                {"name": "settings", "mountPath": "/tmp/one", "subPath": "colour"},
                {"name": "password", "mountPath": "/var/run/password"},
                {"name": "scratch", "mountPath": "/scratch"},
                {"name": "pod", "mountPath": "/pod"},
                {"name": "account", "mountPath": "/account"},
                {"name": "bin", "mountPath": "/programs", "readOnly": true},
            ],
        }),
    );
    let log = scene.wait_log("p", "/usr/bin\n");
    let lines: Vec<&str> = log.lines().collect();
    assert_eq!(
        lines[..9],
        [
            "red",
            "deep",
            "sesame",
            "red",
            "app=\"p\"",
            "p",
            "red sesame 1500 sesame",
            "written",
            "Read-only file system"
        ],
        "{log}"
    );
    assert!(lines[9].contains("\"alg\""), "{log}");
    assert_eq!(lines[10..], ["default", "1", "/scratch", "/usr/bin"], "{log}");
    // what is secret is on no disk
    let mounts = std::fs::read_to_string("/proc/mounts").unwrap();
    for volume in ["password", "account"] {
        assert!(mounts.contains(&format!("/volumes/{volume} tmpfs ")), "{mounts}");
    }
    // nothing of it is the host's
    assert!(!std::path::Path::new("/settings").exists());

    let change = r#"{"data": {"colour": "blue"}}"#;
    scene
        .kubectl(&["patch", "configmap", "settings", "-p", change])
        .unwrap();
    scene.wait_log("p", "/usr/bin\nblue");

    // what is missing keeps a pod waiting, with a word about it; it starts when it is there
    scene.pod(
        "q",
        &json!({"volumes": [{"name": "v", "configMap": {"name": "later"}}]}),
        &json!({"command": shell("cat /v/k; sleep 1000"), "volumeMounts": [{"name": "v", "mountPath": "/v"}]}),
    );
    scene.wait("an event", || {
        let events = scene.kubectl(&["describe", "pod", "q"])?;
        Ok(
            (events.contains("FailedMount") && events.contains("configmap \"later\" not found"))
                .then_some(()),
        )
    });
    let waits = scene.get(&["pod", "q"]);
    assert_eq!(
        waits["status"]["containerStatuses"][0]["state"]["waiting"]["reason"], "ContainerCreating",
        "{waits:#}"
    );
    scene.create(&json!({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "later"}, "data": {"k": "here"}}));
    scene.wait_log("q", "here");
    scene.wait_pod("q", "to be ready", |pod| condition(pod, "Ready") == "True");
    scene
        .kubectl(&["delete", "pod", "p", "q", "--timeout=30s"])
        .unwrap();
}

#[test]
fn probes_say_when_a_container_is_ready_and_when_it_must_start_again() {
    let cluster = Cluster::new().unwrap();
    let node = cluster.add_node().unwrap();
    let scene = Scene::new(&node);
    let shared = node.state().join("shared");
    std::fs::create_dir(&shared).unwrap();
    let file = |name: &str| shared.join(name);
    scene.pod(
        "p",
        &json!({
            "volumes": [{"name": "shared", "hostPath": {"path": shared}}],
            "initContainers": [
                // Something that speaks TLS, with a certificate that is not its address's: the API.
                {"name": "secure", "image": "host", "restartPolicy": "Always", "command": shell("exec sleep 1000"),
                    "startupProbe": {"httpGet": {"scheme": "HTTPS", "host": node.v4(), "port": 6443, "path": "/readyz"},
                        "periodSeconds": 1, "failureThreshold": 100}},
                {"name": "first", "image": "host", "command": shell("echo first >> /shared/order"),
                    "volumeMounts": [{"name": "shared", "mountPath": "/shared"}]},
                {"name": "side", "image": "host", "restartPolicy": "Always",
                    "command": shell("echo side >> /shared/order; trap 'echo side ends >> /shared/order; exit' TERM; while :; do sleep 0.1; done"),
                    "startupProbe": {"exec": {"command": ["test", "-e", "/shared/side"]}, "periodSeconds": 1, "failureThreshold": 100},
                    "volumeMounts": [{"name": "shared", "mountPath": "/shared"}]},
            ],
        }),
        &json!({
            "command": shell("echo main >> /shared/order; rm -f /shared/sick
                while [ ! -e /shared/serve ]; do sleep 0.1; done; exec busybox httpd -f -p 8080 -h /shared"),
            "ports": [{"name": "http", "containerPort": 8080}],
            "volumeMounts": [{"name": "shared", "mountPath": "/shared"}],
            "startupProbe": {"tcpSocket": {"port": "http"}, "periodSeconds": 1, "failureThreshold": 100},
            "readinessProbe": {"httpGet": {"path": "/ready", "port": 8080}, "periodSeconds": 1, "failureThreshold": 1},
            "livenessProbe": {"exec": {"command": ["sh", "-c", "if [ -e /shared/sick ]; then echo it is sick; exit 1; fi"]},
                "periodSeconds": 1, "failureThreshold": 2},
            "lifecycle": {
                "postStart": {"exec": {"command": ["sh", "-c", "echo posted >> /shared/order"]}},
                "preStop": {"exec": {"command": ["sh", "-c", "echo stopped >> /shared/order"]}},
            },
        }),
    );
    let status = |pod: &Value| pod["status"]["containerStatuses"][0].clone();
    let side = |pod: &Value| pod["status"]["initContainerStatuses"][2].clone();
    let pod = scene.wait_pod("p", "its sidecar to run", |pod| {
        !side(pod)["state"]["running"].is_null()
    });
    assert_eq!(
        (&side(&pod)["started"], condition(&pod, "Initialized")),
        (&json!(false), &json!("False"))
    );
    assert_eq!(
        status(&pod)["state"]["waiting"]["reason"],
        "PodInitializing",
        "{pod:#}"
    );
    std::fs::write(file("side"), "").unwrap();
    let pod = scene.wait_pod("p", "to run", |pod| !status(pod)["state"]["running"].is_null());
    assert_eq!(
        (&status(&pod)["started"], &status(&pod)["ready"]),
        (&json!(false), &json!(false))
    );
    std::fs::write(file("serve"), "").unwrap();
    let pod = scene.wait_pod("p", "to have started", |pod| status(pod)["started"] == true);
    assert_eq!(condition(&pod, "Ready"), "False");
    assert_eq!(side(&pod)["ready"], true);
    std::fs::write(file("ready"), "").unwrap();
    scene.wait_pod("p", "to be ready", |pod| condition(pod, "Ready") == "True");
    std::fs::remove_file(file("ready")).unwrap();
    let pod = scene.wait_pod("p", "not to be ready", |pod| condition(pod, "Ready") == "False");
    assert_eq!(status(&pod)["restartCount"], 0);
    std::fs::write(file("ready"), "").unwrap();
    std::fs::write(file("sick"), "").unwrap();
    let pod = scene.wait_pod("p", "to be ready again", |pod| {
        condition(pod, "Ready") == "True" && status(pod)["restartCount"] == 1
    });
    assert!(!status(&pod)["lastState"]["terminated"].is_null(), "{pod:#}");
    let events = scene.kubectl(&["describe", "pod", "p"]).unwrap();
    for wanted in [
        "Readiness probe failed: HTTP probe failed with statuscode: 404",
        "Liveness probe failed: it is sick",
        "Container main failed liveness probe, will be restarted",
    ] {
        assert!(events.contains(wanted), "{events}");
    }
    scene.kubectl(&["delete", "pod", "p", "--timeout=30s"]).unwrap();
    let order = std::fs::read_to_string(file("order")).unwrap();
    let words: Vec<&str> = order.lines().collect();
    // Twice, as it was started twice; the sidecar begins before the others and ends after them.
    let main = ["main", "posted", "stopped"];
    let counts = main.map(|word| words.iter().filter(|line| **line == word).count());
    assert_eq!(counts, [2, 2, 2], "{order}");
    assert_eq!(
        (words[..2].join(" "), words.last()),
        ("first side".to_owned(), Some(&"side ends")),
        "{order}"
    );
}

#[test]
fn commands_run_in_containers_as_kubectl_asks() {
    let cluster = Cluster::new().unwrap();
    let node = cluster.add_node().unwrap();
    let scene = Scene::new(&node);
    scene.pod(
        "p",
        &json!({"volumes": [{"name": "own", "emptyDir": {}}]}),
        &json!({
            "command": shell("echo begins; while [ ! -e /own/go ]; do sleep 0.1; done; while :; do echo says; sleep 0.2; done"),
            "workingDir": "/own", "env": [{"name": "COLOUR", "value": "red"}],
            "volumeMounts": [{"name": "own", "mountPath": "/own"}],
        }),
    );
    scene.wait_pod("p", "to be ready", |pod| condition(pod, "Ready") == "True");
    // where the container is: its root, directory, variables, host name and network
    let said = scene
        .kubectl(&[
            "exec",
            "p",
            "--",
            "sh",
            "-c",
            "pwd; ls -d /own; echo $COLOUR; hostname; ip -br addr show eth0",
        ])
        .unwrap();
    let ip = scene.get(&["pod", "p"])["status"]["podIP"]
        .as_str()
        .unwrap()
        .to_owned();
    assert!(
        said.starts_with("/own\n/own\nred\np\n") && said.contains(&ip),
        "{said}"
    );
    // input, both outputs and the exit code
    let done = scene
        .kubectl_stdin(
            &["exec", "-i", "p", "--", "sh", "-c", "cat; echo no >&2; exit 7"],
            "hello\n",
        )
        .unwrap();
    assert_eq!(done.stdout, b"hello\n");
    let errors = String::from_utf8_lossy(&done.stderr).into_owned();
    assert!(errors.starts_with("no\n"), "{errors}");
    assert_eq!(done.status.code(), Some(7));
    // much of it, which must not be mixed up or lost
    let much = "0123456789\n".repeat(50_000);
    let done = scene
        .kubectl_stdin(&["exec", "-i", "p", "--", "cat"], &much)
        .unwrap();
    assert!(
        done.status.success() && done.stdout == much.as_bytes(),
        "{} bytes",
        done.stdout.len()
    );
    let error = format!(
        "{:#}",
        scene
            .kubectl(&["exec", "p", "--", "no-such-program"])
            .unwrap_err()
    );
    assert!(error.contains("no-such-program"), "{error}");
    let error = format!(
        "{:#}",
        scene
            .kubectl(&["exec", "p", "-c", "other", "--", "true"])
            .unwrap_err()
    );
    assert!(
        error.contains("container not found") || error.contains("other is not valid"),
        "{error}"
    );

    // with a terminal, whose size arrives at some time after the start: `script` gives kubectl one
    let kubectl = format!(
        "stty rows 33 cols 77; kubectl --kubeconfig {} exec -it p -- sh -c 'test -t 0 && test -t 1; for i in $(seq 100); do stty size | grep 33 && break; sleep 0.1; done'",
        scene.machine.admin_conf()
    );
    let mut command = node.host().command("script").unwrap();
    command.args(["-qec", &kubectl, "/dev/null"]);
    command.stdin(Stdio::null());
    let said = process::output(command).unwrap();
    assert!(said.contains("33 77"), "{said:?}");

    // files, and what the container says from now on
    std::fs::write(node.state().join("file"), "content").unwrap();
    let from = node.state().join("file").display().to_string();
    scene.kubectl(&["cp", &from, "p:/own/go"]).unwrap();
    let mut attached = scene.command(&["attach", "p"]);
    attached.stdout(Stdio::piped()).stderr(Stdio::null());
    let mut attached = attached.spawn().unwrap();
    let mut line = String::new();
    let mut output = std::io::BufReader::new(attached.stdout.take().unwrap());
    std::io::BufRead::read_line(&mut output, &mut line).unwrap();
    attached.kill().unwrap();
    attached.wait().unwrap();
    assert_eq!(line, "says\n");
}

#[test]
fn files_ask_for_pods_that_the_api_shows() {
    let cluster = Cluster::new().unwrap();
    let node = cluster.add_node().unwrap();
    let scene = Scene::new(&node);
    let dir = node.state().join("root/etc/beeline/manifests");
    let write = |text: &str| {
        let manifest = json!({
            "apiVersion": "v1", "kind": "Pod", "metadata": {"name": "web", "labels": {"app": "web"}},
            "spec": {"terminationGracePeriodSeconds": 1,
                "containers": [{"name": "main", "image": "host", "command": shell(&format!("echo {text}; exec sleep 1000"))}]},
        });
        std::fs::write(dir.join("web.yaml.new"), manifest.to_string()).unwrap();
        std::fs::rename(dir.join("web.yaml.new"), dir.join("web.yaml")).unwrap();
    };
    write("one");
    let ready = |pod: &Value| condition(pod, "Ready") == "True";
    let first = scene.wait_pod("web-node-1", "to be ready", ready);
    assert_eq!(
        first["metadata"]["annotations"]["kubernetes.io/config.source"],
        "file"
    );
    scene.wait_log("web-node-1", "one");
    // What shows it can be deleted; it goes on, and is shown again.
    let id = |pod: &Value| pod["status"]["containerStatuses"][0]["containerID"].clone();
    scene
        .kubectl(&["delete", "pod", "web-node-1", "--wait=false"])
        .unwrap();
    let again = scene.wait_pod("web-node-1", "to be shown again", |pod| {
        ready(pod) && pod["metadata"]["uid"] != first["metadata"]["uid"]
    });
    assert_eq!(id(&again), id(&first));
    // Another text is another pod.
    write("two");
    scene.wait_log("web-node-1", "two");
    let changed = scene.wait_pod("web-node-1", "to be ready", ready);
    assert_ne!(id(&changed), id(&first));
    let _again = scene.kill_node(|| {});
    std::fs::remove_file(dir.join("web.yaml")).unwrap();
    scene.wait("its end", || {
        Ok(scene.get(&["pod", "web-node-1"]).is_null().then_some(()))
    });
    let pods = node.state().join("root/var/lib/beeline/pods");
    scene.wait("nothing to be left", || {
        Ok(std::fs::read_dir(&pods)?.next().is_none().then_some(()))
    });
}
