//! Pods whose network the agent makes: through the CNI plugin, over the overlay, with nodes from the API.

use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::process::Command;
use std::time::Duration;

use beeline_tests::cluster::{ECHO_PORT, Node};
use beeline_tests::netns::NetNs;
pub(crate) use beeline_tests::pod_network::{NET_CONF, plugin_config};
use beeline_tests::process::{self, Process};
use beeline_tests::{Agent, AgentOptions, Cluster, ControlPlane, pod_network, program, wait_for};
use serde_json::{Value, json};

pub(crate) const SERVICE: &str = "10.96.7.7";

/// Flags of an agent that has everything of the pod network in its node's directory.
pub(crate) fn options(plane: &ControlPlane, node: &Node, net_conf: &str) -> AgentOptions {
    pod_network::options(plane, node, net_conf).unwrap()
}

/// A pod that only the plugin made.
pub(crate) struct CniPod<'a> {
    node: &'a Node,
    id: String,
    pub(crate) netns: NetNs,
    pub(crate) v4: String,
    pub(crate) v6: String,
    echo: Option<Process>,
}

impl<'a> CniPod<'a> {
    pub(crate) fn new(node: &'a Node, name: &str) -> Self {
        Self::with(node, name, &json!({}))
    }

    /// With what a runtime says of the pod (`runtimeConfig`).
    pub(crate) fn with(node: &'a Node, name: &str, runtime: &Value) -> Self {
        let netns = NetNs::create(&format!("{}-{name}", node.host().netns().name())).unwrap();
        let more = json!({"runtimeConfig": runtime});
        let result = plugin(node, "ADD", name, netns.name(), &more);
        let [v4, v6] = pod_network::addresses(&result);
        Self {
            node,
            id: name.to_owned(),
            v4,
            v6,
            netns,
            echo: None,
        }
    }

    /// A command in the pod, in the cgroup of its node.
    pub(crate) fn command(&self, program: &str) -> Command {
        let mut command = self.node.host().command("ip").unwrap();
        command.args(["netns", "exec", self.netns.name(), program]);
        command
    }

    pub(crate) fn echo(&mut self) {
        let command = self.command(program("beeline-echo").unwrap().to_str().unwrap());
        let log = self.node.state().join(format!("{}.log", self.id));
        let process = process::listening(self.node.host(), command, &self.id, ECHO_PORT, &log).unwrap();
        self.echo = Some(process);
    }

    /// What a web server answers, if it does.
    pub(crate) fn get(&self, url: &str) -> Option<String> {
        let mut command = self.command("curl");
        command.args(["-s", "-f", "-m", "2", url]);
        process::output(command)
            .inspect_err(|error| eprintln!("{error:#}"))
            .ok()
    }

    pub(crate) fn pings(&self, address: &str) -> bool {
        self.pings_with(address, 56)
    }

    /// With so many bytes in the echo.
    pub(crate) fn pings_with(&self, address: &str, bytes: u32) -> bool {
        let mut command = self.command("ping");
        command.args(["-c", "1", "-W", "1", "-s", &bytes.to_string(), address]);
        process::output(command).is_ok()
    }
}

impl Drop for CniPod<'_> {
    fn drop(&mut self) {
        self.echo = None;
        plugin(self.node, "DEL", &self.id, self.netns.name(), &json!({}));
    }
}

/// Runs the plugin's binary as a runtime does, with this added to its configuration.
pub(crate) fn plugin(node: &Node, command: &str, id: &str, netns: &str, more: &Value) -> Value {
    pod_network::plugin(node, command, id, netns, more).unwrap()
}

pub(crate) fn node_object(plane: &ControlPlane, node: &Node) -> Value {
    serde_json::from_str(
        &plane
            .kubectl(&["get", "node", node.name(), "-o", "json"])
            .unwrap(),
    )
    .unwrap()
}

/// An agent that makes the pod network of its node, which is ready then.
pub(crate) fn start_agent(plane: &ControlPlane, node: &Node, options: &AgentOptions) -> Agent {
    let mut agent = Agent::start_synced(node, options).unwrap();
    pod_network::wait_ready(plane, node, &mut agent).unwrap();
    agent
}

/// Nodes whose agents make the pod network.
pub(crate) struct Network {
    // Order of dropping: processes before the cluster.
    pub(crate) agents: Vec<Agent>,
    pub(crate) nodes: Vec<Node>,
    pub(crate) plane: ControlPlane,
    pub(crate) cluster: Cluster,
}

impl Network {
    /// As many nodes, with these further flags.
    pub(crate) fn new(nodes: usize, change: impl Fn(AgentOptions) -> AgentOptions) -> Self {
        let cluster = Cluster::new().unwrap();
        let plane = ControlPlane::start(&cluster).unwrap();
        let nodes: Vec<Node> = (0..nodes).map(|_| cluster.add_node().unwrap()).collect();
        let start = |node| {
            plane.register_node(node).unwrap();
            start_agent(&plane, node, &change(options(&plane, node, NET_CONF)))
        };
        Self {
            agents: nodes.iter().map(start).collect(),
            nodes,
            plane,
            cluster,
        }
    }
}

#[test]
fn pods_of_the_plugin_reach_each_other_across_nodes_and_through_services() {
    let Network {
        cluster: _cluster,
        plane,
        nodes,
        mut agents,
    } = Network::new(2, |options| options);
    let annotations = node_object(&plane, &nodes[0])["metadata"]["annotations"].clone();
    assert_eq!(
        annotations["flannel.alpha.coreos.com/public-ip"],
        nodes[0].v4().to_string()
    );
    assert_eq!(annotations["flannel.alpha.coreos.com/backend-type"], "vxlan");
    let data = annotations["flannel.alpha.coreos.com/backend-data"]
        .as_str()
        .unwrap();
    assert!(data.starts_with(r#"{"VNI":1,"VtepMAC":""#), "{data}");

    let mut web = CniPod::new(&nodes[0], "web");
    web.echo();
    let client = CniPod::new(&nodes[1], "client");
    wait_for("pods of two nodes", Duration::from_secs(5), || {
        Ok((client.pings(&web.v4) && client.pings(&web.v6)).then_some(()))
    })
    .unwrap();
    assert!(web.pings(&client.v4) && web.pings(&client.v6));
    let direct = client.get(&format!("http://{}:8080/source", web.v4)).unwrap();
    assert!(direct.contains(&client.v4), "the source is kept: {direct}");

    plane
        .kubectl_stdin(&["apply"], &service(&web.v4, &nodes[0]))
        .unwrap();
    wait_for("the ClusterIP", Duration::from_secs(10), || {
        Ok(client.get(&format!("http://{SERVICE}/")))
    })
    .unwrap();

    // the agent may be gone: pods go on, and a new agent knows them
    drop(agents.remove(0));
    assert!(client.get(&format!("http://{SERVICE}/")).is_some());
    let _agent = start_agent(&plane, &nodes[0], &options(&plane, &nodes[0], NET_CONF));
    let list = ipam(&nodes[0]);
    let pods: Vec<&Value> = list["addresses"].as_array().unwrap().iter().collect();
    assert_eq!(pods.len(), 2, "{list}");
    assert_eq!(
        (&pods[0]["pod"]["name"], &pods[0]["address"]),
        (&json!("web"), &json!(web.v4))
    );

    // a node that goes is forgotten
    plane.kubectl(&["delete", "node", nodes[1].name()]).unwrap();
    wait_for("the node's route to go", Duration::from_secs(5), || {
        let routes = nodes[0]
            .host()
            .output("ip", &["route", "show", "dev", "flannel.1"])?;
        Ok(routes.is_empty().then_some(()))
    })
    .unwrap();
}

pub(crate) fn ipam(node: &Node) -> Value {
    let socket = node.state().join("cni.sock");
    let text = node
        .host()
        .output(
            program("beeline").unwrap(),
            &[
                "ipam",
                "list",
                "-o",
                "json",
                "--cni-socket",
                socket.to_str().unwrap(),
            ],
        )
        .unwrap();
    serde_json::from_str(&text).unwrap()
}

pub(crate) fn service(backend: &str, node: &Node) -> String {
    let service = json!({
        "apiVersion": "v1", "kind": "Service", "metadata": {"name": "web"},
        "spec": {"clusterIP": SERVICE, "ports": [{"port": 80, "targetPort": 8080}]},
    });
    let slice = json!({
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
        "metadata": {"name": "web-1", "labels": {"kubernetes.io/service-name": "web"}},
        "endpoints": [{"addresses": [backend], "nodeName": node.name(), "conditions": {"ready": true}}],
        "ports": [{"port": 8080, "protocol": "TCP"}],
    });
    format!("---\n{service}\n---\n{slice}\n")
}

/// A socket in a network namespace, that waits for its answers.
fn datagram_socket(netns: &NetNs) -> UdpSocket {
    let bind = || UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0));
    let socket = netns.run(bind).unwrap().unwrap();
    socket.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
    socket
}

/// Sends a datagram, and gives the answer and where it comes from.
fn datagram(socket: &UdpSocket, text: &str, ip: &str, port: u16) -> (String, SocketAddr) {
    socket.send_to(text.as_bytes(), (ip, port)).unwrap();
    let mut answer = [0; 64];
    let (length, from) = socket.recv_from(&mut answer).unwrap();
    (String::from_utf8_lossy(&answer[..length]).into_owned(), from)
}

#[test]
fn pods_reach_the_world_with_the_address_of_their_node() {
    let network = Network::new(2, |options| {
        options.flag("--non-masquerade-cidrs", "192.0.2.2/32")
    });
    let (cluster, nodes) = (&network.cluster, &network.nodes);
    let world = cluster.add_outside_host().unwrap();
    let friend = cluster.add_outside_host().unwrap();
    let mut servers = Vec::new();
    for (name, place) in [
        ("world", world.place()),
        ("friend", friend.place()),
        ("node", nodes[1].host()),
    ] {
        let log = cluster.state().join(format!("{name}.log"));
        servers.push(process::echo(place, name, ECHO_PORT, &log).unwrap());
    }
    let mut pod = CniPod::new(&nodes[0], "pod");
    pod.echo();
    let peer = CniPod::new(&nodes[1], "peer");
    let (node_v4, node_v6) = (nodes[0].v4().to_string(), nodes[0].v6().to_string());
    let (world_v4, world_v6) = (world.v4().to_string(), world.v6().to_string());
    wait_for("the masquerade", Duration::from_secs(10), || {
        let seen = pod.get(&format!("http://{world_v4}:8080/source"));
        Ok(seen.filter(|seen| seen.contains(&node_v4)))
    })
    .unwrap();
    let seen = pod.get(&format!("http://[{world_v6}]:8080/source")).unwrap();
    assert!(seen.contains(&node_v6), "{seen}");
    // the switch knows the way to pods: it is not to be of use
    let world_routes = |verb: &str| {
        let lines = ["10.244.0.0/16", "fd00:10:244::/48"].map(|net| format!("route {verb} blackhole {net}"));
        world.place().netns().ip_batch(&lines).unwrap();
    };
    world_routes("add");
    for bytes in [56, 4000] {
        let both = pod.pings_with(&world_v4, bytes) && pod.pings_with(&world_v6, bytes);
        assert!(both, "an echo of {bytes} bytes");
    }
    world_routes("delete");
    // other nodes are the world, this one is not
    let seen = pod.get(&format!("http://{}:8080/source", nodes[1].v4())).unwrap();
    assert!(seen.contains(&node_v4), "{seen}");
    let seen = pod.get(&format!("http://{}:8080/source", friend.v4())).unwrap();
    assert!(seen.contains(&pod.v4), "{seen}");
    // nobody's address changes between pods, or for who comes from the world
    let seen = peer.get(&format!("http://{}:8080/source", pod.v4)).unwrap();
    assert!(seen.contains(&peer.v4), "{seen}");
    let ask = |url: &str| {
        let mut command = world.place().command("curl").unwrap();
        command.args(["-s", "-f", "-m", "2", url]);
        process::output(command).unwrap()
    };
    for url in [
        format!("http://{}:8080/source", pod.v4),
        format!("http://[{}]:8080/source", pod.v6),
    ] {
        let seen = ask(&url);
        assert!(seen.contains(&world_v4) || seen.contains(&world_v6), "{seen}");
    }
    // a datagram from the world: its answer comes from where it was sent to
    let socket = datagram_socket(world.place().netns());
    for round in 0..3 {
        let (_, from) = datagram(&socket, "hello", &pod.v4, ECHO_PORT);
        assert_eq!(from.ip().to_string(), pod.v4, "round {round}");
    }
    // and one to the world
    let (seen, _) = datagram(&datagram_socket(&pod.netns), "source", &world_v4, ECHO_PORT);
    assert!(seen.contains(&node_v4), "{seen}");
}

#[test]
fn host_ports_lead_to_their_pods() {
    let network = Network::new(1, |options| options);
    let (cluster, node) = (&network.cluster, &network.nodes[0]);
    let world = cluster.add_outside_host().unwrap();
    let get = |command: Command, url: &str| {
        let mut command = command;
        command.args(["-s", "-f", "-m", "2", url]);
        process::output(command).ok()
    };
    let from_world = |url: &str| get(world.place().command("curl").unwrap(), url);
    let from_node = |url: &str| get(node.host().command("curl").unwrap(), url);
    // as conformance has it: one port, told apart by address and protocol
    let port = |host_ip: &str, protocol: &str| json!([{"hostPort": 54323, "containerPort": 8080, "protocol": protocol, "hostIP": host_ip}]);
    let node_v4 = node.v4().to_string();
    let mut pods = Vec::new();
    for (name, ports) in [
        ("loopback", port("127.0.0.1", "tcp")),
        ("public", port(&node_v4, "tcp")),
        ("datagrams", port(&node_v4, "udp")),
    ] {
        let mut pod = CniPod::with(node, name, &json!({"portMappings": ports}));
        pod.echo();
        pods.push(pod);
    }
    let public = format!("http://{node_v4}:54323/");
    let answers = |name: &'static str, get: &dyn Fn(&str) -> Option<String>, url: &str| {
        wait_for(name, Duration::from_secs(10), || {
            Ok(get(url).filter(|answer| answer.contains(name)))
        })
        .unwrap();
    };
    answers("public", &from_world, &public);
    answers("public", &from_node, &public);
    answers("loopback", &from_node, "http://127.0.0.1:54323/");
    let (answer, from) = datagram(&datagram_socket(world.place().netns()), "hello", &node_v4, 54323);
    assert!(answer.contains("datagrams"), "{answer}");
    assert_eq!(from.to_string(), format!("{node_v4}:54323"));
    // a pod that goes takes its port with it
    pods.remove(1);
    wait_for("the port to go", Duration::from_secs(10), || {
        Ok(from_world(&public).is_none().then_some(()))
    })
    .unwrap();
    // any address of the node
    let mut pod = CniPod::with(
        node,
        "any",
        &json!({"portMappings": [{"hostPort": 54324, "containerPort": 8080, "protocol": "tcp"}]}),
    );
    pod.echo();
    answers("any", &from_world, &format!("http://{node_v4}:54324/"));
    answers("any", &from_world, &format!("http://[{}]:54324/", node.v6()));
}
