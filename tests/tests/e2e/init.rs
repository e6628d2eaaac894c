//! `beeline init`, `join`, `token`, `reset`: a cluster of two machines, as a user of kubeadm makes it.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, Result};
use beeline_tests::cluster::Node;
use beeline_tests::process;
use beeline_tests::{Cluster, program, residue, wait_for};
use serde_json::{Value, json};

use crate::node::install_image_in;

/// A machine that Beeline can be set up on.
pub(crate) struct Machine<'a> {
    pub(crate) node: &'a Node,
    pub(crate) root: PathBuf,
}

impl<'a> Machine<'a> {
    pub(crate) fn new(node: &'a Node) -> Self {
        let root = node.state().join("root");
        install_image_in(&root.join("etc/beeline/images"), "tomcat-app");
        Self { node, root }
    }

    /// Runs `beeline` with what tells this machine from others.
    pub(crate) fn beeline(&self, args: &[&str]) -> Result<String> {
        let mut command = self.node.host().command(program("beeline")?)?;
        command
            .args(args)
            .arg("--root")
            .arg(&self.root)
            .arg("--cgroup-root")
            .arg(self.node.cgroup())
            .arg("--bpffs-root")
            .arg(self.node.bpffs())
            .args(["--netns-prefix", &format!("{}-", self.node.host().netns().name())]);
        process::output(command)
    }

    pub(crate) fn admin_conf(&self) -> String {
        self.root.join("etc/beeline/admin.conf").display().to_string()
    }

    fn kubectl_with(&self, kubeconfig: &str, args: &[&str]) -> Result<String> {
        let mut command = self.node.host().command("kubectl")?;
        command.args(["--kubeconfig", kubeconfig, "--cache-dir"]);
        command.arg(self.node.state().join("kubectl-cache")).args(args);
        process::output(command)
    }

    fn kubectl(&self, args: &[&str]) -> Result<String> {
        self.kubectl_with(&self.admin_conf(), args)
    }

    fn create(&self, object: &Value) {
        let file = self.node.state().join("object.json");
        std::fs::write(&file, object.to_string()).unwrap();
        self.kubectl(&["create", "-f", file.to_str().unwrap()]).unwrap();
    }

    fn token(&self, args: &[&str]) -> Result<String> {
        let mut command = self.node.host().command(program("beeline")?)?;
        command
            .arg("token")
            .args(args)
            .args(["--kubeconfig", &self.admin_conf()]);
        process::output(command)
    }

    pub(crate) fn logs(&self) -> String {
        let log = |name: &str| {
            let text =
                std::fs::read_to_string(self.root.join("var/log/beeline").join(name)).unwrap_or_default();
            let lines: Vec<&str> = text.lines().collect();
            lines[lines.len().saturating_sub(20)..].join("\n")
        };
        format!("{}\n{}", log("control-plane.log"), log("node.log"))
    }
}

/// The words of the join line that `init` printed.
pub(crate) fn join_line(text: &str) -> Vec<String> {
    let from = text.find("beeline join ").unwrap();
    let line = text[from..].replace("\\\n", " ");
    line.split_whitespace().skip(2).map(str::to_owned).collect()
}

#[test]
fn a_cluster_of_two_machines_begins_grows_and_ends() {
    let cluster = Cluster::new().unwrap();
    let nodes = [cluster.add_node().unwrap(), cluster.add_node().unwrap()];
    let [first, second] = [Machine::new(&nodes[0]), Machine::new(&nodes[1])];
    let address = nodes[0].v4().to_string();
    let said = first
        .beeline(&[
            "init",
            "--node-name",
            "node-1",
            "--apiserver-advertise-address",
            &address,
        ])
        .with_context(|| first.logs())
        .unwrap();
    assert!(
        said.contains("Your Kubernetes control-plane has initialized successfully!"),
        "{said}"
    );
    assert!(said.contains("sudo cp -i"), "{said}");
    let join = join_line(&said);
    assert_eq!(join[0], format!("{address}:6443"));
    assert!(join[4].starts_with("sha256:") && join[4].len() == 71, "{join:?}");

    // doors that stay closed
    let wrong_hash = format!("sha256:{}", "0".repeat(64));
    let refused = |token: &str, hash: &str| {
        let args = [
            "join",
            &join[0],
            "--token",
            token,
            "--discovery-token-ca-cert-hash",
            hash,
            "--node-name",
            "node-2",
        ];
        let error = format!("{:#}", second.beeline(&args).unwrap_err());
        assert!(!second.root.join("etc/beeline/node.conf").exists(), "{error}");
        error
    };
    let error = refused(&join[2], &wrong_hash);
    assert!(error.contains(&join[4]), "{error}");
    let error = refused("abcdef.0123456789abcdef", &join[4]);
    assert!(error.contains("Unauthorized"), "{error}");
    let short = first
        .token(&["create", "--ttl", "1s", "--description", "short"])
        .unwrap();
    std::thread::sleep(Duration::from_millis(2100));
    let error = refused(short.trim(), &join[4]);
    assert!(error.contains("Unauthorized"), "{error}");

    // a token of one's own
    let line = first.token(&["create", "--print-join-command"]).unwrap();
    let mut join = join_line(&line);
    let list = first.token(&["list"]).unwrap();
    assert!(list.contains(&join[2]) && list.contains("23h"), "{list}");
    join.extend(["--node-name".into(), "node-2".into()]);
    let mut args = vec!["join"];
    args.extend(join.iter().map(String::as_str));
    let said = second.beeline(&args).with_context(|| second.logs()).unwrap();
    assert!(said.contains("This node has joined the cluster"), "{said}");
    first.token(&["delete", &join[2]]).unwrap();
    assert!(!first.token(&["list"]).unwrap().contains(&join[2]));

    wait_for("both nodes to be ready", Duration::from_secs(40), || {
        let text = first.kubectl(&["get", "nodes", "--no-headers"])?;
        Ok((text.matches(" Ready ").count() == 2).then_some(()))
    })
    .with_context(|| format!("{}\n{}", first.logs(), second.logs()))
    .unwrap();
    let text = first.kubectl(&["get", "nodes"]).unwrap();
    assert!(text.contains("control-plane"), "{text}");

    // a node is master of itself only
    let node_conf = second.root.join("etc/beeline/node.conf").display().to_string();
    let as_node = |args: &[&str]| second.kubectl_with(&node_conf, args);
    as_node(&["get", "node", "node-2"]).unwrap();
    as_node(&["label", "node", "node-2", "disk=fast"]).unwrap();
    for args in [
        &["label", "node", "node-1", "disk=fast"][..],
        &["get", "secrets", "-n", "kube-system"],
        &["delete", "node", "node-1"],
    ] {
        let error = format!("{:#}", as_node(args).unwrap_err());
        assert!(error.contains("orbidden"), "{args:?}: {error}");
    }

    // the tutorial
    first.create(&json!({
        "apiVersion": "v1", "kind": "ReplicationController", "metadata": {"name": "myweb"},
        "spec": {"replicas": 3, "selector": {"app": "myweb"}, "template": {
            "metadata": {"labels": {"app": "myweb"}},
            "spec": {"terminationGracePeriodSeconds": 1, "containers": [{
                "name": "myweb", "image": "kubeguide/tomcat-app:v1", "ports": [{"containerPort": 8080}],
                "env": [{"name": "MYSQL_SERVICE_HOST", "value": "mysql"}, {"name": "MYSQL_SERVICE_PORT", "value": "3306"}],
            }]},
        }},
    }));
    first.create(&json!({
        "apiVersion": "v1", "kind": "Service", "metadata": {"name": "myweb"},
        "spec": {"type": "NodePort", "ports": [{"port": 8080, "nodePort": 30001}], "selector": {"app": "myweb"}},
    }));
    let world = cluster.add_outside_host().unwrap();
    for node in &nodes {
        let url = format!("http://{}:30001/", node.v4());
        let mut seen = BTreeSet::new();
        wait_for("three pods behind the node port", Duration::from_secs(40), || {
            let mut command = world.place().command("curl")?;
            command.args(["-s", "-f", "-m", "2", &url]);
            seen.extend(process::output(command).ok());
            Ok((seen.len() == 3).then_some(()))
        })
        .with_context(|| first.kubectl(&["describe", "pods"]).unwrap_or_default())
        .unwrap();
        assert!(seen.iter().all(|text| text.contains("mysql:3306")), "{seen:?}");
    }
    let where_they_are = first.kubectl(&["get", "pods", "-o", "wide"]).unwrap();
    assert!(
        where_they_are.contains("node-1") && where_they_are.contains("node-2"),
        "{where_they_are}"
    );

    // what a pod says, from whichever node it is on
    first.create(&json!({
        "apiVersion": "v1", "kind": "Pod", "metadata": {"name": "talker"},
        "spec": {"nodeName": "node-2", "terminationGracePeriodSeconds": 1, "containers": [{
            "name": "main", "image": "host",
            "command": ["sh", "-c", "echo one; echo two; sleep 2; echo three; sleep 1"],
        }], "restartPolicy": "Never"},
    }));
    let text = wait_for("the log of a pod", Duration::from_secs(20), || {
        Ok(first.kubectl(&["logs", "talker", "-f"]).ok())
    })
    .unwrap();
    assert_eq!(text, "one\ntwo\nthree\n");
    assert_eq!(first.kubectl(&["logs", "talker", "--tail=1"]).unwrap(), "three\n");
    let error = format!(
        "{:#}",
        first.kubectl(&["logs", "talker", "--previous"]).unwrap_err()
    );
    assert!(error.contains("previous terminated container"), "{error}");
    // nodes serve the API and nobody else
    let mut command = nodes[0].host().command("curl").unwrap();
    command.args([
        "-s",
        "-k",
        "-m",
        "2",
        &format!("https://{}:10250/healthz", nodes[1].v4()),
    ]);
    assert!(process::output(command).is_err());

    // and the end
    for machine in [&second, &first] {
        let said = machine
            .beeline(&["reset", "--force"])
            .with_context(|| machine.logs())
            .unwrap();
        assert!(said.contains("node.conf"), "{said}");
        let devices = machine.node.host().output("ip", &["-br", "link"]).unwrap();
        assert!(
            !devices.contains("veth") && !devices.contains("flannel"),
            "{devices}"
        );
        assert!(!machine.root.join("var/lib/beeline/control-plane").exists());
        assert!(!machine.node.cgroup().join("beeline-pods").exists());
        let prefix = format!("network namespace {}-", machine.node.host().netns().name());
        let left: Vec<String> = residue::listing()
            .unwrap()
            .into_iter()
            .filter(|line| line.starts_with(&prefix))
            .collect();
        assert!(left.is_empty(), "{left:?}");
    }
    let said = second.beeline(&["reset", "--force"]).unwrap();
    assert!(
        !said.contains("node.conf"),
        "a second reset finds nothing: {said}"
    );
}
