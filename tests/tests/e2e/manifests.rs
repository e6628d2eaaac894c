//! What users apply to their cluster: read as the API would, its init steps run, and an agent with just its rights.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::Context as _;
use beeline_tests::pod_network::wait_ready;
use beeline_tests::{Agent, Cluster, ControlPlane, Source, process, program, wait_for};
use serde_json::{Value, json};

use crate::pod_network::{CniPod, NET_CONF, SERVICE, options, service};

const ALL: [&str; 3] = ["services", "full", "flannel-migration"];

fn manifests() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../manifests")
}

/// The objects of a kustomization, rendered.
fn render(name: &str) -> Vec<Value> {
    let mut command = Command::new("kubectl");
    command.arg("kustomize").arg(manifests().join(name));
    let text = process::output(command).unwrap();
    let documents = text.split("\n---\n");
    documents
        .map(|text| serde_saphyr::from_str(text).unwrap())
        .collect()
}

fn of_kind<'a>(objects: &'a [Value], kind: &str) -> &'a Value {
    let found: Vec<&Value> = objects.iter().filter(|object| object["kind"] == kind).collect();
    assert_eq!(found.len(), 1, "of {kind}");
    found[0]
}

fn items<'a>(value: &'a Value, field: &str) -> Vec<&'a Value> {
    value[field]
        .as_array()
        .map(|all| all.iter().collect())
        .unwrap_or_default()
}

#[test]
fn every_kustomization_is_whole() {
    for name in ALL {
        let objects = render(name);
        let set = of_kind(&objects, "DaemonSet");
        let pod = &set["spec"]["template"]["spec"];
        assert_eq!(
            set["spec"]["selector"]["matchLabels"]["app"],
            set["spec"]["template"]["metadata"]["labels"]["app"]
        );
        // every volume is there and used
        let names = |list: Vec<&Value>| -> BTreeSet<String> {
            list.iter()
                .map(|v| v["name"].as_str().unwrap().to_owned())
                .collect()
        };
        let containers: Vec<&Value> = items(pod, "initContainers")
            .into_iter()
            .chain(items(pod, "containers"))
            .collect();
        let mounts = containers
            .iter()
            .flat_map(|container| items(container, "volumeMounts"))
            .collect();
        assert_eq!(names(mounts), names(items(pod, "volumes")), "{name}");
        // who may do what is bound to who the pods are
        let account = of_kind(&objects, "ServiceAccount");
        let subject = &of_kind(&objects, "ClusterRoleBinding")["subjects"][0];
        assert_eq!(subject["namespace"], account["metadata"]["namespace"]);
        assert_eq!(pod["serviceAccountName"], account["metadata"]["name"]);
        assert_eq!(set["metadata"]["namespace"], account["metadata"]["namespace"]);
        // the agent takes its arguments
        let agent = items(pod, "containers")[0];
        let mut command = Command::new(program("beeline").unwrap());
        let files = tempfile::tempdir().unwrap();
        let net_conf = files.path().join("net-conf.json");
        fs::write(&net_conf, NET_CONF).unwrap();
        command.arg("agent").arg("--init-only");
        for arg in items(agent, "args") {
            let arg = arg.as_str().unwrap();
            command.arg(arg.replace("/etc/beeline/net-conf.json", net_conf.to_str().unwrap()));
        }
        command.args([
            "--conntrack-min=0",
            "--conntrack-max-per-core=0",
            "--write-config-to",
        ]);
        command.arg(files.path().join("config"));
        process::output(command).with_context(|| name).unwrap();
    }
    // what is generated is what is mounted
    let objects = render("full");
    let map = of_kind(&objects, "ConfigMap");
    let volumes = &of_kind(&objects, "DaemonSet")["spec"]["template"]["spec"]["volumes"];
    let network = volumes
        .as_array()
        .unwrap()
        .iter()
        .find(|v| v["name"] == "network")
        .unwrap();
    assert_eq!(network["configMap"]["name"], map["metadata"]["name"]);
    let conf: Value = serde_json::from_str(map["data"]["net-conf.json"].as_str().unwrap()).unwrap();
    assert_eq!(conf["Backend"]["Type"], "vxlan");
}

#[test]
fn the_plugin_is_installed_before_anything_names_it() {
    let objects = render("full");
    let pod = &of_kind(&objects, "DaemonSet")["spec"]["template"]["spec"];
    let host = tempfile::tempdir().unwrap();
    let at = host.path().to_str().unwrap();
    fs::create_dir_all(host.path().join("opt/cni/bin")).unwrap();
    let install = items(pod, "initContainers")
        .into_iter()
        .find(|container| container["name"] == "install-cni")
        .unwrap();
    let plugin = program("beeline-cni").unwrap();
    // an older one may be running
    fs::write(host.path().join("opt/cni/bin/beeline-cni"), "old").unwrap();
    for _ in 0..2 {
        let words = items(install, "command")
            .into_iter()
            .chain(items(install, "args"));
        let words: Vec<String> = words
            .map(|word| {
                let word = word.as_str().unwrap();
                word.replace("/host", at)
                    .replace("/usr/local/bin/beeline-cni", plugin.to_str().unwrap())
            })
            .collect();
        let mut command = Command::new(&words[0]);
        command.args(&words[1..]);
        process::output(command).unwrap();
    }
    let installed = host.path().join("opt/cni/bin");
    let names: Vec<_> = fs::read_dir(&installed)
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    assert_eq!(names, ["beeline-cni"]);
    let mut command = Command::new(installed.join("beeline-cni"));
    command.env("CNI_COMMAND", "VERSION");
    assert!(process::output(command).unwrap().contains("supportedVersions"));
}

#[test]
fn an_agent_needs_no_more_rights_than_its_role_gives() {
    let cluster = Cluster::new().unwrap();
    let plane = ControlPlane::start(&cluster).unwrap();
    let node = cluster.add_node().unwrap();
    plane.register_node(&node).unwrap();
    let objects = render("full");
    for object in &objects {
        if ["ServiceAccount", "ClusterRole", "ClusterRoleBinding"].contains(&object["kind"].as_str().unwrap())
        {
            plane.kubectl_stdin(&["apply"], &object.to_string()).unwrap();
        }
    }
    // the administrator's kubeconfig with the service account's token in the place of its certificate
    let token = plane
        .kubectl(&["create", "token", "beeline", "-n", "kube-system"])
        .unwrap();
    let text = plane
        .kubectl(&["config", "view", "--raw", "--flatten", "-o", "json"])
        .unwrap();
    let mut config: Value = serde_json::from_str(&text).unwrap();
    config["users"][0]["user"] = json!({"token": token.trim()});
    let kubeconfig = node.state().join("kubeconfig");
    fs::write(&kubeconfig, config.to_string()).unwrap();
    let conflist = node.state().join("10-beeline.conflist");
    let mut options = options(&plane, &node, NET_CONF).flag("--cni-conf-file", conflist.display());
    options.source = Source::Kubeconfig(kubeconfig);
    let mut agent = Agent::start_synced(&node, &options).unwrap();
    wait_ready(&plane, &node, &mut agent).unwrap();
    wait_for("the runtime's configuration", Duration::from_secs(5), || {
        Ok(conflist.exists().then_some(()))
    })
    .unwrap();
    let _pod = CniPod::new(&node, "pod");
    // lists, watches and the annotations: nothing is refused. Events are the only thing that is posted, to a group that this
    // API does not have.
    let text = node
        .host()
        .output("curl", &["-sf", "http://127.0.0.1:10249/metrics"])
        .unwrap();
    let requests: Vec<&str> = text
        .lines()
        .filter(|line| line.starts_with("rest_client_requests_total"))
        .collect();
    for method in ["GET", "PATCH"] {
        let of_method = |line: &&&str| line.contains(&format!("method=\"{method}\""));
        assert!(
            requests
                .iter()
                .filter(of_method)
                .all(|line| line.contains("code=\"2")),
            "{requests:?}"
        );
        assert!(requests.iter().any(|line| of_method(&line)), "{requests:?}");
    }
    let rules = items(of_kind(&objects, "ClusterRole"), "rules");
    let events = rules
        .iter()
        .find(|rule| rule["resources"] == json!(["events"]))
        .unwrap();
    assert_eq!(events["apiGroups"], json!(["", "events.k8s.io"]));
    assert_eq!(events["verbs"], json!(["create", "patch"]));
}

/// The container's capabilities as `setpriv` has them: root has these and no others.
fn only(capabilities: &Value) -> Vec<String> {
    assert_eq!(capabilities["drop"], json!(["ALL"]));
    let added = items(capabilities, "add");
    let added = added
        .iter()
        .map(|name| format!(",+{}", name.as_str().unwrap().to_lowercase()));
    let set = format!("-all{}", added.collect::<String>());
    [
        "setpriv",
        "--bounding-set",
        &set,
        "--inh-caps",
        "-all",
        "--ambient-caps",
        "-all",
        "--",
    ]
    .map(str::to_owned)
    .into()
}

#[test]
fn an_agent_works_with_the_capabilities_of_its_container() {
    let cluster = Cluster::new().unwrap();
    let plane = ControlPlane::start(&cluster).unwrap();
    let nodes = [cluster.add_node().unwrap(), cluster.add_node().unwrap()];
    let objects = render("services");
    let set = of_kind(&objects, "DaemonSet");
    let container = &set["spec"]["template"]["spec"]["containers"][0];
    let mut agents = Vec::new();
    for node in &nodes {
        plane.register_node(node).unwrap();
        let mut options = options(&plane, node, NET_CONF);
        options.starter = only(&container["securityContext"]["capabilities"]);
        let mut agent = Agent::start_synced(node, &options).unwrap();
        wait_ready(&plane, node, &mut agent).unwrap();
        let status = fs::read_to_string(format!("/proc/{}/status", agent.process.pid())).unwrap();
        let effective = status
            .lines()
            .find_map(|line| line.strip_prefix("CapEff:"))
            .unwrap();
        let effective = u64::from_str_radix(effective.trim(), 16).unwrap();
        let added = items(&container["securityContext"]["capabilities"], "add").len();
        // this machine may itself have fewer
        assert!(effective.count_ones() as usize <= added, "{effective:x}");
        agents.push(agent);
    }
    let mut web = CniPod::new(&nodes[0], "web");
    web.echo();
    let client = CniPod::new(&nodes[1], "client");
    plane
        .kubectl_stdin(&["apply"], &service(&web.v4, &nodes[0]))
        .unwrap();
    wait_for("the ClusterIP over the overlay", Duration::from_secs(20), || {
        Ok(client.get(&format!("http://{SERVICE}/")))
    })
    .unwrap();
}
