//! Nodes that know each other by flannel's leases in etcd (spec cni-overlay 1.4), without any Kubernetes API.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use beeline_etcd::server::Server;
use beeline_tests::agent::beeline_json;
use beeline_tests::pod_network::own_places;
use beeline_tests::{Agent, AgentOptions, Cluster, Node, ObjectDir, process, wait_for};
use serde_json::{Value, json};

use crate::pod_network::CniPod;

const LEASES: &str = "/coreos.com/network/subnets/";
/// The lease of a node that runs flanneld, as that writes it.
const FLANNELD: &str = r#"{"PublicIP":"172.31.0.77","PublicIPv6":null,"BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"52:12:34:56:78:9a"}}"#;
const PATIENCE: Duration = Duration::from_secs(20);

struct Etcd {
    server: Server,
    cluster: Cluster,
}

impl Etcd {
    fn start() -> Self {
        let cluster = Cluster::new().unwrap();
        let ip = IpAddr::V4(cluster.switch_address());
        let place = cluster.switch().clone();
        let command = move || place.command("etcd").unwrap();
        let server = Server::at(SocketAddr::new(ip, 2379), SocketAddr::new(ip, 2380), command).unwrap();
        let etcd = Self { server, cluster };
        etcd.wait();
        etcd
    }

    fn wait(&self) {
        wait_for("etcd", PATIENCE, || {
            self.try_ctl(&["endpoint", "health"]).map(Some)
        })
        .unwrap();
    }

    fn try_ctl(&self, args: &[&str]) -> anyhow::Result<String> {
        let mut command = self.cluster.switch().command("etcdctl")?;
        command
            .env("ETCDCTL_API", "3")
            .args(["--endpoints", &self.server.url()]);
        command.args(args);
        process::output(command)
    }

    fn ctl(&self, args: &[&str]) -> String {
        self.try_ctl(args).unwrap()
    }

    /// The leases by the names of their keys.
    fn leases(&self) -> Vec<(String, Value)> {
        let text = self.ctl(&["get", "--prefix", LEASES]);
        let lines: Vec<&str> = text.lines().collect();
        let lease = |pair: &[&str]| {
            let name = pair[0].strip_prefix(LEASES).unwrap().to_owned();
            (name, serde_json::from_str(pair[1]).unwrap())
        };
        lines.chunks(2).map(lease).collect()
    }

    fn lease_of(&self, node: &Node) -> Option<(String, Value)> {
        let ip = node.v4().to_string();
        self.leases()
            .into_iter()
            .find(|(_, lease)| lease["PublicIP"] == ip)
    }

    fn options(&self, node: &Node) -> AgentOptions {
        let objects = ObjectDir::new(self.cluster.state().join("objects")).unwrap();
        own_places(AgentOptions::dir(objects.path()), node)
            .flag("--etcd-endpoints", self.server.url())
            .flag("--path-probe-interval", 1)
    }
}

/// Waits until the network of this node works, and it knows so many others.
fn wait_peers(node: &Node, others: usize) {
    wait_for(
        &format!("{} to know {others} others", node.name()),
        PATIENCE,
        || {
            let list = beeline_json(node, &["node", "list"])?;
            let known = list["nodes"].as_array().map_or(0, |nodes| {
                nodes.iter().filter(|node| node["via"] == "flannel.1").count()
            });
            let env = node.state().join("subnet.env").exists();
            Ok((env && list["failure"].is_null() && known == others).then_some(()))
        },
    )
    .unwrap();
}

fn routes(node: &Node) -> String {
    node.host()
        .output("ip", &["route", "show", "dev", "flannel.1"])
        .unwrap()
}

fn wait_route(node: &Node, subnet: &str, present: bool) {
    wait_for(&format!("the route to {subnet}: {present}"), PATIENCE, || {
        Ok((routes(node).contains(subnet) == present).then_some(()))
    })
    .unwrap();
}

#[test]
fn a_network_in_etcd_is_enough_for_nodes_to_connect_their_pods() {
    let mut etcd = Etcd::start();
    let nodes = [etcd.cluster.add_node().unwrap(), etcd.cluster.add_node().unwrap()];
    let mut agents: Vec<Agent> = nodes
        .iter()
        // Services work already while there is no configuration of the network
        .map(|node| Agent::start_synced(node, &etcd.options(node)).unwrap())
        .collect();
    etcd.ctl(&[
        "put",
        "/coreos.com/network/config",
        r#"{"Network":"172.16.0.0/16"}"#,
    ]);
    for node in &nodes {
        wait_peers(node, 1);
    }
    let mut web = CniPod::new(&nodes[0], "web");
    web.echo();
    let client = CniPod::new(&nodes[1], "client");
    let reaches = || client.get(&format!("http://{}:8080/source", web.v4));
    let seen = wait_for("pods of two nodes", PATIENCE, || Ok(reaches())).unwrap();
    assert!(
        seen.contains(&client.v4) && client.v4.starts_with("172.16."),
        "{seen}"
    );

    // what others read
    let (name, lease) = etcd.lease_of(&nodes[0]).unwrap();
    let link: Value = serde_json::from_str(
        &nodes[0]
            .host()
            .output("ip", &["-j", "link", "show", "flannel.1"])
            .unwrap(),
    )
    .unwrap();
    let expected = json!({"PublicIP": nodes[0].v4(), "PublicIPv6": null, "BackendType": "vxlan",
        "BackendData": {"VNI": 1, "VtepMAC": link[0]["address"]}});
    assert_eq!(lease, expected);
    assert_eq!(etcd.leases().len(), 2);
    let env = std::fs::read_to_string(nodes[0].state().join("subnet.env")).unwrap();
    let first = name.replace(".0-24", ".1/24");
    assert!(
        env.contains(&format!(
            "FLANNEL_NETWORK=172.16.0.0/16\nFLANNEL_SUBNET={first}\n"
        )),
        "{env}"
    );

    // a node that runs flanneld comes, and its lease ends
    let granted = etcd.ctl(&["lease", "grant", "600"]);
    let id = granted.split(' ').nth(1).unwrap();
    etcd.ctl(&[
        "put",
        &format!("{LEASES}172.16.250.0-24"),
        FLANNELD,
        "--lease",
        id,
    ]);
    wait_route(&nodes[0], "172.16.250.0/24 via 172.16.250.0", true);
    let shown = |words: &[&str]| nodes[0].host().output(words[0], &words[1..]).unwrap();
    let neighbours = shown(&["ip", "neigh", "show", "dev", "flannel.1"]);
    assert!(
        neighbours.contains("172.16.250.0 lladdr 52:12:34:56:78:9a PERMANENT"),
        "{neighbours}"
    );
    let fdb = shown(&["bridge", "fdb", "show", "dev", "flannel.1"]);
    assert!(fdb.contains("52:12:34:56:78:9a dst 172.31.0.77"), "{fdb}");
    etcd.ctl(&["lease", "revoke", id]);
    wait_route(&nodes[0], "172.16.250.0/24", false);

    // etcd is away: nothing changes, not even for an agent that starts then
    etcd.server.kill().unwrap();
    drop(agents.remove(0));
    let again = Agent::start_synced(&nodes[0], &etcd.options(&nodes[0])).unwrap();
    assert!(reaches().is_some());
    etcd.server.resume().unwrap();
    etcd.wait();
    etcd.ctl(&["put", &format!("{LEASES}172.16.251.0-24"), FLANNELD]);
    for node in &nodes {
        wait_route(node, "172.16.251.0/24", true);
    }
    assert_eq!(
        etcd.lease_of(&nodes[0]).unwrap().0,
        name,
        "the node has what it had"
    );
    etcd.ctl(&["del", &format!("{LEASES}172.16.251.0-24")]);
    wait_route(&nodes[1], "172.16.251.0/24", false);

    // a lease that is taken away is taken again
    etcd.ctl(&["del", &format!("{LEASES}{name}")]);
    wait_for("the lease to be there again", PATIENCE, || {
        Ok(etcd.lease_of(&nodes[0]).filter(|(now, _)| *now == name))
    })
    .unwrap();
    wait_route(&nodes[1], &name.replace("-24", "/24"), true);
    wait_for("pods of two nodes", PATIENCE, || Ok(reaches())).unwrap();
    // without etcd's knowledge the node has what subnet.env says
    drop(again);
    etcd.ctl(&["del", &format!("{LEASES}{name}")]);
    let _again = Agent::start_synced(&nodes[0], &etcd.options(&nodes[0])).unwrap();
    wait_for("the subnet of subnet.env", PATIENCE, || {
        Ok(etcd.lease_of(&nodes[0]).filter(|(now, _)| *now == name))
    })
    .unwrap();
}
