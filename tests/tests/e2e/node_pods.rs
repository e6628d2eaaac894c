//! What the pods of `beeline node` have: volumes and variables, probes and hooks, and what an operator does with them.

use std::io::Write as _;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result};
use beeline_tests::cluster::Node;
use beeline_tests::{Cluster, process, wait_for};
use serde_json::{Value, json};

use crate::init::Machine;
use crate::node::condition;

/// A cluster of one machine.
struct Scene<'a> {
    machine: Machine<'a>,
}

impl<'a> Scene<'a> {
    fn new(node: &'a Node) -> Self {
        let machine = Machine::new(node);
        let address = node.v4().to_string();
        let scene = Self { machine };
        scene
            .machine
            .beeline(&[
                "init",
                "--node-name",
                "node-1",
                "--apiserver-advertise-address",
                &address,
            ])
            .with_context(|| scene.machine.logs())
            .unwrap();
        scene.wait("the node to be ready", || {
            Ok((condition(&scene.get(&["node", "node-1"]), "Ready") == "True").then_some(()))
        });
        scene
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = self.machine.node.host().command("kubectl").unwrap();
        command.args(["--kubeconfig", &self.machine.admin_conf(), "--cache-dir"]);
        command
            .arg(self.machine.node.state().join("kubectl-cache"))
            .args(args);
        command
    }

    fn kubectl(&self, args: &[&str]) -> Result<String> {
        process::output(self.command(args))
    }

    fn kubectl_stdin(&self, args: &[&str], input: &str) -> Result<std::process::Output> {
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
    fn get(&self, args: &[&str]) -> Value {
        let text = self.kubectl(&[&["get", "-o", "json", "--ignore-not-found"], args].concat());
        serde_json::from_str(&text.unwrap_or_default()).unwrap_or(Value::Null)
    }

    fn create(&self, object: &Value) {
        let done = self
            .kubectl_stdin(&["apply", "--server-side", "-f", "-"], &object.to_string())
            .unwrap();
        assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    }

    /// Creates a pod with one container.
    fn pod(&self, name: &str, more: &Value, container: &Value) {
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
    fn wait<T>(&self, what: &str, look: impl FnMut() -> Result<Option<T>>) -> T {
        wait_for(what, Duration::from_secs(40), look)
            .inspect_err(|_| {
                let pods = self.kubectl(&["describe", "pods"]).unwrap_or_default();
                eprintln!("{pods}\n{}", self.machine.logs());
            })
            .unwrap()
    }

    /// Waits until `wanted` holds for the pod.
    fn wait_pod(&self, name: &str, what: &str, wanted: impl Fn(&Value) -> bool) -> Value {
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
        let _ended = self.machine.beeline(&["reset", "--force"]);
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
