//! Nodes on a switch, their pods reach each other; one node is plain kernel state as flannel leaves it. Needs root.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on must fail")]

#[path = "common/lan.rs"]
mod lan;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::time::Duration;

use dataplane_user::overlay::engine::NodeUpdate;
use dataplane_user::overlay::flannel::{self, Prefix};
use dataplane_user::overlay::{Engine, NetConf, Settings, View};
use k8s_openapi::api::core::v1::Node;
use lan::{Lan, Netns, plain_pod, within};
use nix::sched::{CloneFlags, setns};
use serde_json::{Value, json};
use tokio::sync::{mpsc, watch};

/// What the issue allows for a repair.
const REPAIR: Duration = Duration::from_secs(2);
const DUAL: &str = r#"{"Network": "10.244.0.0/16", "EnableIPv6": true, "IPv6Network": "fd00:244::/32",
    "IPv6SubnetLen": 48, "Backend": BACKEND}"#;
const FLANNEL_MAC: (&str, &str) = ("52:54:00:00:00:33", "52:54:00:00:00:36");

fn node(n: u8, annotations: &BTreeMap<String, String>) -> Node {
    serde_json::from_value(json!({
        "metadata": {"name": format!("n{n}"), "annotations": annotations},
        "spec": {"podCIDR": format!("10.244.{n}.0/24"),
                 "podCIDRs": [format!("10.244.{n}.0/24"), format!("fd00:244:{n}::/48")]},
        "status": {"addresses": [{"type": "InternalIP", "address": format!("192.168.77.{n}")}]},
    }))
    .unwrap()
}

/// The agent's part on one host.
struct Agent {
    nodes: mpsc::Sender<NodeUpdate>,
    view: watch::Receiver<View>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Agent {
    fn start(host: &Netns, n: u8, backend: &str, subnet_file: Option<std::path::PathBuf>) -> Self {
        Self::start_with(host, n, &DUAL.replace("BACKEND", backend), subnet_file)
    }

    fn start_with(host: &Netns, n: u8, conf: &str, subnet_file: Option<std::path::PathBuf>) -> Self {
        let (nodes, queue) = mpsc::channel(64);
        let (sender, receiver) = std::sync::mpsc::channel();
        let file = File::open(host.path()).unwrap();
        let settings = Settings {
            subnet_file,
            ..Settings::new(NetConf::parse(conf).unwrap(), format!("n{n}"))
        };
        let thread = std::thread::spawn(move || {
            setns(file, CloneFlags::CLONE_NEWNET).unwrap();
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .unwrap();
            runtime.block_on(async {
                let (engine, view) = Engine::new(settings, queue).unwrap();
                sender.send(view).unwrap();
                engine.run().await.unwrap();
            });
        });
        Self {
            nodes,
            view: receiver.recv().unwrap(),
            thread: Some(thread),
        }
    }

    fn tell(&self, update: NodeUpdate) {
        self.nodes.blocking_send(update).unwrap();
    }

    fn applied(&self, node: &Node) {
        self.tell(NodeUpdate::Applied(Box::new(node.clone())));
    }

    /// What it announces, once it does.
    fn annotations(&mut self) -> BTreeMap<String, String> {
        within(Duration::from_secs(5), "an announcement", || {
            self.view.borrow().announcement.is_some()
        });
        let view = self.view.borrow();
        flannel::annotations(view.announcement.as_ref().unwrap(), &Prefix::default())
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        let (closed, _) = mpsc::channel(1);
        self.nodes = closed;
        let ended = self.thread.take().unwrap().join();
        if !std::thread::panicking() {
            ended.unwrap();
        }
    }
}

type Damage<'a> = Box<dyn Fn() + 'a>;

struct Cluster {
    agents: Vec<Agent>,
    hosts: Vec<Netns>,
    pods: Vec<Netns>,
    nodes: Vec<Node>,
    _lan: Lan,
}

impl Cluster {
    /// Nodes 1 and 2 run the agent, node 3 is flannel's kernel state.
    fn new(backend: &str) -> Self {
        let lan = Lan::new();
        let hosts: Vec<Netns> = (1..=3).map(|n| lan.host(n)).collect();
        let pods = (1..=3)
            .map(|n| plain_pod(&hosts[usize::from(n) - 1], n))
            .collect();
        let mut agents: Vec<Agent> = (1..=2)
            .map(|n| Agent::start(&hosts[usize::from(n) - 1], n, backend, None))
            .collect();
        let mut nodes = Vec::new();
        for (n, agent) in (1..).zip(&mut agents) {
            agent.applied(&node(n, &BTreeMap::new()));
            nodes.push(node(n, &agent.annotations()));
        }
        let vxlan = backend.contains("vxlan");
        nodes.push(node(3, &flannel_annotations(vxlan)));
        let mut cluster = Self {
            agents,
            hosts,
            pods,
            nodes,
            _lan: lan,
        };
        cluster.flannel_node(vxlan);
        cluster.tell_all();
        cluster
    }

    fn tell_all(&mut self) {
        for agent in &self.agents {
            for node in &self.nodes {
                agent.applied(node);
            }
            let names = (1..=3).map(|n| format!("n{n}")).collect();
            agent.tell(NodeUpdate::Listed(names));
        }
        for agent in &mut self.agents {
            within(Duration::from_secs(5), "ready", || agent.view.borrow().ready);
        }
    }

    /// Node 3, as flannel would have made it with the others known.
    fn flannel_node(&self, vxlan: bool) {
        let host = &self.hosts[2];
        host.enter(|| {
            std::fs::write("/proc/sys/net/ipv4/ip_forward", "1").unwrap();
            std::fs::write("/proc/sys/net/ipv6/conf/all/forwarding", "1").unwrap();
        });
        if vxlan {
            for (name, mac, local, mtu) in [
                ("flannel.1", FLANNEL_MAC.0, "192.168.77.3", 1450),
                ("flannel-v6.1", FLANNEL_MAC.1, "fd77::3", 1450),
            ] {
                host.ip(&format!(
                    "link add {name} address {mac} mtu {mtu} type vxlan id 1 dev eth0 local {local} dstport 8472 nolearning"
                ));
                host.ip(&format!("link set {name} up"));
            }
            host.ip("address add 10.244.3.0/32 dev flannel.1");
            host.ip("address add fd00:244:3::/128 dev flannel-v6.1 nodad");
        }
        self.flannel_peers(vxlan);
    }

    /// Its entries for the others; again when its device has lost them with its address.
    fn flannel_peers(&self, vxlan: bool) {
        let host = &self.hosts[2];
        for n in 1..=2u8 {
            if !vxlan {
                host.ip(&format!(
                    "route replace 10.244.{n}.0/24 via 192.168.77.{n} dev eth0"
                ));
                host.ip(&format!("route replace fd00:244:{n}::/48 via fd77::{n} dev eth0"));
                continue;
            }
            let annotations = self.nodes[usize::from(n) - 1]
                .metadata
                .annotations
                .as_ref()
                .unwrap();
            let mac = |key: &str| {
                let text = &annotations[&format!("flannel.alpha.coreos.com/{key}")];
                serde_json::from_str::<Value>(text).unwrap()["VtepMAC"]
                    .as_str()
                    .unwrap()
                    .to_owned()
            };
            for (device, mac, subnet, net, public) in [
                (
                    "flannel.1",
                    mac("backend-data"),
                    format!("10.244.{n}.0"),
                    24,
                    format!("192.168.77.{n}"),
                ),
                (
                    "flannel-v6.1",
                    mac("backend-v6-data"),
                    format!("fd00:244:{n}::"),
                    48,
                    format!("fd77::{n}"),
                ),
            ] {
                host.ip(&format!(
                    "neighbour replace {subnet} lladdr {mac} dev {device} nud permanent"
                ));
                bridge(
                    host,
                    &format!("fdb replace {mac} dev {device} dst {public} self permanent"),
                );
                host.ip(&format!(
                    "route replace {subnet}/{net} via {subnet} dev {device} onlink"
                ));
            }
        }
    }

    fn reaches(&self, from: usize, to: usize) -> bool {
        self.pods[from - 1].pings(&format!("10.244.{to}.2"))
            && self.pods[from - 1].pings(&format!("fd00:244:{to}::2"))
    }

    fn all_reach_all(&self) {
        for from in 1..=3 {
            for to in 1..=3 {
                if from != to {
                    within(REPAIR, &format!("pod {from} reaches pod {to}"), || {
                        self.reaches(from, to)
                    });
                }
            }
        }
    }
}

fn flannel_annotations(vxlan: bool) -> BTreeMap<String, String> {
    let data = |mac: &str| {
        if vxlan {
            format!(r#"{{"VNI":1,"VtepMAC":"{mac}"}}"#)
        } else {
            "null".into()
        }
    };
    [
        ("kube-subnet-manager", "true".to_owned()),
        ("backend-type", if vxlan { "vxlan" } else { "host-gw" }.to_owned()),
        ("backend-data", data(FLANNEL_MAC.0)),
        ("backend-v6-data", data(FLANNEL_MAC.1)),
        ("public-ip", "192.168.77.3".to_owned()),
        ("public-ipv6", "fd77::3".to_owned()),
    ]
    .into_iter()
    .map(|(key, value)| (format!("flannel.alpha.coreos.com/{key}"), value))
    .collect()
}

/// Runs `bridge` on a host with these words.
fn bridge(host: &Netns, words: &str) {
    let mut all = vec!["-n", host.name.as_str()];
    all.extend(words.split(' '));
    lan::run("bridge", &all);
}

/// Sends a megabyte through TCP from one pod to another and sees whose address arrives.
fn transfer(from: &Netns, to: &Netns, address: &str) {
    let listener = to.enter(|| TcpListener::bind(address).unwrap());
    let stream = from.enter(|| TcpStream::connect(address).unwrap());
    let source = stream.local_addr().unwrap();
    let (mut served, seen) = listener.accept().unwrap();
    assert_eq!(seen, source, "the source is kept");
    let sender = std::thread::spawn(move || (&stream).write_all(&vec![7; 1 << 20]).unwrap());
    let mut got = Vec::new();
    served.read_to_end(&mut got).unwrap();
    sender.join().unwrap();
    assert_eq!(got.len(), 1 << 20);
}

/// Entries of a table, each as the text of a few of its fields.
fn table(netns: &Netns, program: &str, words: &str, fields: &[&str]) -> BTreeSet<String> {
    let all = netns.json(program, words);
    let show = |entry: &Value| {
        let fields = fields.iter().map(|field| match &entry[*field] {
            Value::String(text) => text.clone(),
            other => other.to_string(),
        });
        fields.collect::<Vec<_>>().join(" ")
    };
    all.as_array().unwrap().iter().map(show).collect()
}

#[test]
fn vxlan_nodes_and_a_flannel_node_reach_each_other() {
    let cluster = Cluster::new(r#"{"Type": "vxlan"}"#);
    cluster.all_reach_all();
    for (from, to) in [(1, 2), (2, 3), (3, 1)] {
        for address in [format!("10.244.{to}.2:8000"), format!("[fd00:244:{to}::2]:8000")] {
            transfer(&cluster.pods[from - 1], &cluster.pods[to - 1], &address);
        }
    }
    // this host to a pod of another, from the device's own address
    assert!(cluster.hosts[0].pings("10.244.3.2"));

    // The oracle: what `ip` and `bridge` show is what flannel makes.
    let host = &cluster.hosts[0];
    let link = &host.json("ip", "link show dev flannel.1")[0];
    let data = &link["linkinfo"]["info_data"];
    assert_eq!(link["mtu"], 1450);
    assert_eq!(
        (&data["id"], &data["port"], &data["local"], &data["link"]),
        (&json!(1), &json!(8472), &json!("192.168.77.1"), &json!("eth0"))
    );
    assert_eq!(data["learning"], false);
    assert_eq!(host.json("ip", "link show dev flannel-v6.1")[0]["mtu"], 1430);
    let address = &host.json("ip", "-4 address show dev flannel.1")[0]["addr_info"][0];
    assert_eq!(
        (&address["local"], &address["prefixlen"]),
        (&json!("10.244.1.0"), &json!(32))
    );
    assert_eq!(address["scope"], "global");
    let routes = table(
        host,
        "ip",
        "-4 route show dev flannel.1",
        &["dst", "gateway", "flags", "protocol", "scope"],
    );
    let route = |n: u8| format!("10.244.{n}.0/24 10.244.{n}.0 [\"onlink\"] boot global");
    assert_eq!(routes, BTreeSet::from([route(2), route(3)]));
    let neighbours = table(
        host,
        "ip",
        "-4 neighbour show dev flannel.1",
        &["dst", "lladdr", "state"],
    );
    assert!(
        neighbours.contains(&format!("10.244.3.0 {} [\"PERMANENT\"]", FLANNEL_MAC.0)),
        "{neighbours:?}"
    );
    let fdb = table(
        host,
        "bridge",
        "fdb show dev flannel.1",
        &["mac", "dst", "flags", "state"],
    );
    assert!(
        fdb.contains(&format!("{} 192.168.77.3 [\"self\"] permanent", FLANNEL_MAC.0)),
        "{fdb:?}"
    );
    assert_eq!((neighbours.len(), fdb.len()), (2, 2));
}

#[test]
fn host_gw_nodes_and_a_flannel_node_reach_each_other() {
    let cluster = Cluster::new(r#"{"Type": "host-gw"}"#);
    cluster.all_reach_all();
    let host = &cluster.hosts[0];
    let routes = table(
        host,
        "ip",
        "-4 route show 10.244.3.0/24",
        &["dst", "gateway", "dev", "protocol"],
    );
    assert_eq!(
        routes,
        BTreeSet::from(["10.244.3.0/24 192.168.77.3 eth0 boot".to_owned()])
    );
    assert!(!host.ip("link show").contains("flannel"));
    host.ip("route delete 10.244.3.0/24");
    host.ip("-6 route delete fd00:244:2::/48");
    cluster.all_reach_all();
}

#[test]
fn what_others_break_is_repaired_within_two_seconds() {
    let cluster = Cluster::new(r#"{"Type": "vxlan"}"#);
    cluster.all_reach_all();
    let host = &cluster.hosts[0];
    let peer = |n: u8| {
        let annotations = cluster.nodes[usize::from(n) - 1]
            .metadata
            .annotations
            .as_ref()
            .unwrap();
        let text = &annotations["flannel.alpha.coreos.com/backend-data"];
        serde_json::from_str::<Value>(text).unwrap()["VtepMAC"]
            .as_str()
            .unwrap()
            .to_owned()
    };
    let bridge = |words: &str| bridge(host, words);
    let state = || {
        [
            table(
                host,
                "ip",
                "-4 route show dev flannel.1",
                &["dst", "gateway", "flags"],
            ),
            table(
                host,
                "ip",
                "-6 route show dev flannel-v6.1 proto boot",
                &["dst", "gateway", "flags"],
            ),
            table(
                host,
                "ip",
                "neighbour show dev flannel.1 nud permanent",
                &["dst", "lladdr"],
            ),
            table(host, "bridge", "fdb show dev flannel.1", &["mac", "dst"]),
            table(host, "bridge", "fdb show dev flannel-v6.1", &["mac", "dst"]),
            table(
                host,
                "ip",
                "link show dev flannel.1",
                &["address", "mtu", "operstate"],
            ),
            table(
                host,
                "ip",
                "link show dev flannel-v6.1",
                &["address", "mtu", "operstate"],
            ),
            table(host, "ip", "-4 address show dev flannel.1", &["ifname"]),
        ]
    };
    let good = state();
    assert!(good.iter().all(|table| !table.is_empty()), "{good:?}");
    let mac = peer(2);
    let ip = |words: &'static str| -> Damage<'_> { Box::new(move || drop(host.ip(words))) };
    let damages: Vec<(&str, Damage<'_>)> = vec![
        ("link deleted", ip("link delete flannel.1")),
        ("v6 link deleted", ip("link delete flannel-v6.1")),
        ("link down", ip("link set flannel.1 down")),
        ("route removed", ip("route delete 10.244.3.0/24")),
        ("v6 route removed", ip("-6 route delete fd00:244:3::/48")),
        (
            "route changed",
            ip("route replace 10.244.3.0/24 via 192.168.77.2"),
        ),
        (
            "device's MAC changed",
            ip("link set flannel.1 address 02:11:22:33:44:55"),
        ),
        ("MTU changed", ip("link set flannel.1 mtu 1300")),
        (
            "address removed",
            ip("address delete 10.244.1.0/32 dev flannel.1"),
        ),
        (
            "neighbour changed",
            ip("neighbour replace 10.244.3.0 lladdr 02:11:22:33:44:66 dev flannel.1 nud permanent"),
        ),
        (
            "neighbour removed",
            ip("neighbour delete 10.244.2.0 dev flannel.1"),
        ),
        (
            "entry's node changed",
            Box::new(|| bridge(&format!("fdb replace {mac} dev flannel.1 dst 192.168.77.99 self"))),
        ),
        (
            "second node for an entry",
            Box::new(|| bridge(&format!("fdb append {mac} dev flannel.1 dst 192.168.77.98 self"))),
        ),
        (
            "entry removed",
            Box::new(|| bridge(&format!("fdb delete {mac} dev flannel.1 dst 192.168.77.2 self"))),
        ),
        (
            "foreign entry",
            Box::new(|| bridge("fdb add 02:11:22:33:44:77 dev flannel.1 dst 192.168.77.2 self")),
        ),
        (
            "stale route",
            ip("route add 10.244.200.0/24 via 10.244.200.0 dev flannel.1 onlink"),
        ),
        (
            "another kind of device",
            Box::new(|| {
                host.ip("link delete flannel.1");
                // the agent may be faster than we are
                let _raced = host.exec("ip link add flannel.1 type vxlan id 1 dev eth0 dstport 4789");
            }),
        ),
    ];
    for (name, damage) in &damages {
        damage();
        let took = within(REPAIR, name, || state() == good);
        eprintln!("{name}: {took:?}");
    }
    cluster.all_reach_all();
}

#[test]
fn nodes_that_change_or_go_are_followed() {
    let cluster = Cluster::new(r#"{"Type": "vxlan"}"#);
    cluster.all_reach_all();
    let routes = |cluster: &Cluster| table(&cluster.hosts[0], "ip", "-4 route show dev flannel.1", &["dst"]);

    // node 3 gets another address
    let (lan3, hosts) = (&cluster.hosts[2], &cluster.hosts);
    lan3.ip("address add 192.168.77.33/24 dev eth0");
    let mut moved = cluster.nodes[2].clone();
    let annotations = moved.metadata.annotations.as_mut().unwrap();
    annotations.insert(
        "flannel.alpha.coreos.com/public-ip".into(),
        "192.168.77.33".into(),
    );
    // and another device address
    annotations.insert(
        "flannel.alpha.coreos.com/backend-data".into(),
        r#"{"VNI":1,"VtepMAC":"52:54:00:00:00:44"}"#.into(),
    );
    lan3.ip("link set flannel.1 address 52:54:00:00:00:44");
    cluster.flannel_peers(true);
    cluster.agents[0].applied(&moved);
    cluster.agents[1].applied(&moved);
    within(REPAIR, "node 3 at its new address", || {
        let fdb = table(&hosts[0], "bridge", "fdb show dev flannel.1", &["mac", "dst"]);
        fdb.contains("52:54:00:00:00:44 192.168.77.33") && fdb.len() == 2
    });
    cluster.all_reach_all();

    // node 3 gets another podCIDR
    let mut other = moved.clone();
    other.spec.as_mut().unwrap().pod_cidr = Some("10.244.77.0/24".into());
    other.spec.as_mut().unwrap().pod_cidrs = Some(vec!["10.244.77.0/24".into(), "fd00:244:3::/48".into()]);
    cluster.agents[0].applied(&other);
    within(REPAIR, "node 3 with its new podCIDR", || {
        routes(&cluster) == BTreeSet::from(["10.244.2.0/24".to_owned(), "10.244.77.0/24".to_owned()])
    });

    // node 3 goes
    cluster.agents[0].tell(NodeUpdate::Deleted("n3".into()));
    within(REPAIR, "node 3 gone", || {
        routes(&cluster) == BTreeSet::from(["10.244.2.0/24".to_owned()])
    });
    let fdb = table(&cluster.hosts[0], "bridge", "fdb show dev flannel.1", &["mac"]);
    assert_eq!(fdb.len(), 1);

    // this node gets another podCIDR
    let mut own = cluster.nodes[0].clone();
    own.spec.as_mut().unwrap().pod_cidr = Some("10.244.55.0/24".into());
    own.spec.as_mut().unwrap().pod_cidrs = Some(vec!["10.244.55.0/24".into(), "fd00:244:1::/48".into()]);
    cluster.agents[0].applied(&own);
    within(REPAIR, "this node's new podCIDR", || {
        cluster.hosts[0]
            .ip("-4 address show dev flannel.1")
            .contains("10.244.55.0/32")
    });
    assert!(
        !cluster.hosts[0]
            .ip("-4 address show dev flannel.1")
            .contains("10.244.1.0/32")
    );

    // this node's own address changes: device and announcement follow
    cluster.hosts[0].ip("address delete 192.168.77.1/24 dev eth0");
    cluster.hosts[0].ip("address add 192.168.77.101/24 dev eth0");
    cluster.hosts[0].ip("route add default via 192.168.77.254");
    within(REPAIR, "this node's new address", || {
        let link = &cluster.hosts[0].json("ip", "link show dev flannel.1")[0];
        link["linkinfo"]["info_data"]["local"] == "192.168.77.101"
    });
    let view = &cluster.agents[0].view;
    within(REPAIR, "its announcement", || {
        let announcement = view.borrow().announcement.clone();
        announcement.unwrap().v4.unwrap().0.to_string() == "192.168.77.101"
    });
}

#[test]
fn a_start_reuses_what_is_there_and_sweeps_what_is_stale() {
    let lan = Lan::new();
    let host = lan.host(1);
    // as flannel leaves it behind: one node that is still there, one that went meanwhile
    host.ip("link add flannel.1 address 52:54:00:00:00:11 mtu 1450 type vxlan id 1 dev eth0 local 192.168.77.1 dstport 8472 nolearning");
    host.ip("link set flannel.1 up");
    host.ip("address add 10.244.1.0/32 dev flannel.1");
    let index = host.json("ip", "link show dev flannel.1")[0]["ifindex"].clone();
    for (n, mac) in [(3, FLANNEL_MAC.0), (9, "52:54:00:00:00:99")] {
        host.ip(&format!(
            "neighbour add 10.244.{n}.0 lladdr {mac} dev flannel.1 nud permanent"
        ));
        bridge(
            &host,
            &format!("fdb add {mac} dev flannel.1 dst 192.168.77.{n} self permanent"),
        );
        host.ip(&format!(
            "route add 10.244.{n}.0/24 via 10.244.{n}.0 dev flannel.1 onlink"
        ));
    }
    let dir = tempfile::tempdir().unwrap();
    let subnet_file = dir.path().join("run/subnet.env");
    let mut agent = Agent::start(&host, 1, r#"{"Type": "vxlan"}"#, Some(subnet_file.clone()));
    agent.applied(&node(1, &BTreeMap::new()));
    let annotations = agent.annotations();
    // peers need not learn anything
    assert_eq!(
        annotations["flannel.alpha.coreos.com/backend-data"],
        r#"{"VNI":1,"VtepMAC":"52:54:00:00:00:11"}"#
    );
    let routes = || table(&host, "ip", "-4 route show dev flannel.1", &["dst"]);
    // not all nodes are known: nothing may go
    assert_eq!(routes().len(), 2);
    agent.applied(&node(3, &flannel_annotations(true)));
    agent.tell(NodeUpdate::Listed(BTreeSet::from(["n1".into(), "n3".into()])));
    within(REPAIR, "the stale node is swept", || {
        routes() == BTreeSet::from(["10.244.3.0/24".to_owned()])
    });
    assert_eq!(
        table(&host, "bridge", "fdb show dev flannel.1", &["mac"]).len(),
        1
    );
    assert_eq!(
        table(&host, "ip", "-4 neighbour show dev flannel.1", &["dst"]).len(),
        1
    );
    assert_eq!(
        host.json("ip", "link show dev flannel.1")[0]["ifindex"],
        index,
        "the device is the same"
    );
    within(REPAIR, "subnet.env", || subnet_file.exists());
    assert_eq!(
        std::fs::read_to_string(&subnet_file).unwrap(),
        "FLANNEL_NETWORK=10.244.0.0/16\nFLANNEL_SUBNET=10.244.1.1/24\nFLANNEL_IPV6_NETWORK=fd00:244::/32\n\
         FLANNEL_IPV6_SUBNET=fd00:244:1::1/48\nFLANNEL_MTU=1430\nFLANNEL_IPMASQ=true\n"
    );
}

#[test]
fn five_thousand_nodes_are_programmed() {
    const COUNT: u32 = 5000;
    let lan = Lan::new();
    let host = lan.host(1);
    let mut agent = Agent::start_with(&host, 1, r#"{"Network": "10.0.0.0/8"}"#, None);
    let own: Node = serde_json::from_value(json!({
        "metadata": {"name": "n1"}, "spec": {"podCIDR": "10.255.0.0/24"},
    }))
    .unwrap();
    agent.applied(&own);
    agent.annotations();
    let mut names = BTreeSet::from(["n1".to_owned()]);
    for n in 0..COUNT {
        let (high, low) = (n / 256, n % 256);
        let name = format!("peer{n}");
        let node = serde_json::from_value(json!({
            "metadata": {"name": name, "annotations": {
                "flannel.alpha.coreos.com/kube-subnet-manager": "true",
                "flannel.alpha.coreos.com/backend-type": "vxlan",
                "flannel.alpha.coreos.com/backend-data":
                    format!(r#"{{"VNI":1,"VtepMAC":"02:00:00:00:{high:02x}:{low:02x}"}}"#),
                "flannel.alpha.coreos.com/public-ip": format!("172.16.{high}.{low}"),
            }},
            "spec": {"podCIDR": format!("10.{high}.{low}.0/24")},
        }))
        .unwrap();
        agent.applied(&node);
        names.insert(name);
    }
    agent.tell(NodeUpdate::Listed(names));
    within(Duration::from_secs(60), "all nodes", || agent.view.borrow().ready);
    let state = |program: &str, words: &str, field: &str| table(&host, program, words, &[field]).len();
    let count = COUNT as usize;
    assert_eq!(state("ip", "-4 route show dev flannel.1", "dst"), count);
    assert_eq!(
        state("ip", "neighbour show dev flannel.1 nud permanent", "dst"),
        count
    );
    assert_eq!(state("bridge", "fdb show dev flannel.1", "mac"), count);
    // a second look finds nothing to do
    let changes = agent.view.borrow().changes;
    agent.applied(&own);
    agent.tell(NodeUpdate::Deleted("peer7".into()));
    within(REPAIR, "one node gone", || {
        state("ip", "-4 route show dev flannel.1", "dst") == count - 1
    });
    within(REPAIR, "three changes for it", || {
        agent.view.borrow().changes == changes + 3
    });
}
