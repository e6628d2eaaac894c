//! From kube-proxy to Beeline and back, while clients connect and connections run.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use beeline_tests::client::{Mode as Ask, Question};
use beeline_tests::{
    Agent, AgentOptions, Cluster, Load, LoadReport, Node, ObjectDir, Place, Pod, Process, agent, objects,
    slowness, wait_for,
};

use crate::kube_proxy::{self, Mode, NODE_PORT};
use crate::restart::programs_in;
use crate::scene::{PROPAGATION, V4, V6, address, assert_spread};

const BOTH: [&str; 2] = ["web-1", "web-2"];

/// A node whose Services kube-proxy's rules serve.
struct Scene {
    agent: Option<Agent>,
    servers: Vec<Pod>,
    client: Pod,
    node: Node,
    objects: ObjectDir,
    cluster: Cluster,
}

/// Clients that go on and on.
struct Clients(Vec<(String, Load)>);

impl Clients {
    fn start(&mut self, name: &str, place: &Place, target: &str, mode: Ask, rate: u32) {
        // an emulated machine is soon busy with clients only
        let (rate, workers) = match slowness() {
            1 => (rate, 4),
            times => (rate.div_ceil(4 * times), 1),
        };
        let mut question = Question::from(mode);
        question.timeout_ms *= u64::from(slowness());
        let load = Load::start(place, address(target), question, rate, workers).unwrap();
        self.0.push((format!("{name} {mode:?} {target}"), load));
    }

    /// None of them may have failed.
    #[track_caller]
    fn stop(self, least: u64) -> Vec<LoadReport> {
        let reports: Vec<(String, LoadReport)> = self
            .0
            .into_iter()
            .map(|(name, load)| (name, load.stop().unwrap()))
            .collect();
        for (name, report) in &reports {
            assert_eq!(report.failed, 0, "{name}: {reports:#?}");
            assert!(report.ok >= least, "{name}: {reports:#?}");
        }
        reports.into_iter().map(|(_, report)| report).collect()
    }
}

impl Scene {
    fn new() -> Self {
        let cluster = Cluster::new().unwrap();
        let node = cluster.add_node().unwrap();
        let servers: Vec<Pod> = BOTH.iter().map(|name| node.add_echo_pod(name).unwrap()).collect();
        let client = node.add_pod("client").unwrap();
        let objects = ObjectDir::new(cluster.state().join("objects")).unwrap();
        put_service(&objects, &servers);
        if !Path::new("/proc/sys/net/netfilter/nf_conntrack_max").exists() {
            node.host().output("modprobe", &["nf_conntrack"]).unwrap();
        }
        // closed connections and UDP flows would be remembered for minutes
        node.host()
            .netns()
            .run(|| {
                for name in [
                    "tcp_timeout_time_wait",
                    "tcp_timeout_close",
                    "tcp_timeout_last_ack",
                    "udp_timeout",
                    "udp_timeout_stream",
                ] {
                    fs::write(format!("/proc/sys/net/netfilter/nf_conntrack_{name}"), "1").unwrap();
                }
            })
            .unwrap();
        Self {
            agent: None,
            servers,
            client,
            node,
            objects,
            cluster,
        }
    }

    /// Connections that stay open: from a pod, from the node, and from outside through the node port.
    fn held(&self) -> Clients {
        let mut clients = self.held_inside();
        clients.0.extend(self.held_outside().0);
        clients
    }

    fn held_inside(&self) -> Clients {
        let mut clients = Clients(Vec::new());
        for ip in [V4.to_owned(), format!("[{V6}]")] {
            clients.start("pod", self.client.place(), &format!("{ip}:80"), Ask::Hold, 100);
            clients.start("node", self.node.host(), &format!("{ip}:80"), Ask::Hold, 100);
        }
        clients
    }

    fn held_outside(&self) -> Clients {
        let mut clients = Clients(Vec::new());
        for target in self.node_ports() {
            clients.start("outside", self.cluster.switch(), &target, Ask::Hold, 100);
        }
        clients
    }

    fn node_ports(&self) -> [String; 2] {
        let (v4, v6) = (self.node.v4(), self.node.v6());
        [format!("{v4}:{NODE_PORT}"), format!("[{v6}]:{NODE_PORT}")]
    }

    /// A new connection, or a datagram from a new socket, for each request.
    fn new_ones(&self) -> Clients {
        let mut clients = Clients(Vec::new());
        for ip in [V4.to_owned(), format!("[{V6}]")] {
            for (name, place) in [("pod", self.client.place()), ("node", self.node.host())] {
                clients.start(name, place, &format!("{ip}:80"), Ask::Http, 200);
                clients.start(name, place, &format!("{ip}:53"), Ask::Udp, 100);
                clients.start(name, place, &format!("{ip}:53"), Ask::UdpConnected, 50);
            }
        }
        clients.0.extend(self.new_ones_outside().0);
        clients
    }

    fn new_ones_outside(&self) -> Clients {
        let mut clients = Clients(Vec::new());
        for target in self.node_ports() {
            clients.start("outside", self.cluster.switch(), &target, Ask::Http, 200);
        }
        clients
    }

    fn start_agent(&mut self, take_over: bool) {
        let options = AgentOptions::dir(self.objects.path());
        self.start_agent_with(options, take_over);
    }

    fn start_agent_with(&mut self, mut options: AgentOptions, take_over: bool) {
        if take_over {
            options.flags.push("--take-over".into());
        }
        self.agent = Some(Agent::start_synced(&self.node, &options).unwrap());
    }

    #[track_caller]
    fn wait_log(&self, text: &str) -> String {
        let agent = self.agent.as_ref().unwrap();
        agent
            .process
            .wait_log(text, PROPAGATION * 3, |line| line.contains(text))
            .unwrap()
    }

    fn logged(&self, text: &str) -> bool {
        self.agent.as_ref().unwrap().process.log().contains(text)
    }

    /// Something that is called kube-proxy and does nothing.
    fn stand_in(&self) -> Process {
        let path = self.node.state().join("kube-proxy");
        fs::write(&path, "#!/bin/sh\nsleep 1000\n").unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
        let command = self.node.host().command(&path).unwrap();
        let log = self.node.state().join("kube-proxy.log");
        Process::spawn(self.node.host(), "stand-in of kube-proxy", command, &log).unwrap()
    }
}

/// With a node port for its TCP port.
fn put_service(objects: &ObjectDir, pods: &[Pod]) {
    let mut service = objects::service("web", &[V4, V6]);
    service["spec"]["type"] = "NodePort".into();
    service["spec"]["ports"][0]["nodePort"] = NODE_PORT.into();
    let addresses = |index: usize| pods.iter().map(|pod| pod.addresses()[index]).collect::<Vec<_>>();
    let slices =
        [("v4", 0), ("v6", 1)].map(|(suffix, index)| objects::slice("web", suffix, &addresses(index)));
    let [v4, v6] = slices;
    objects.put("web", &[service, v4, v6]).unwrap();
}

/// What is left that kube-proxy, or the take-over, made.
fn left(rules: &str) -> Vec<&str> {
    let ours = |line: &&str| {
        let chain = line.trim_start_matches(':').split(' ').next().unwrap_or_default();
        let kubelets = ["KUBE-FIREWALL", "KUBE-KUBELET-CANARY"];
        line.starts_with(":KUBE-") && !kubelets.contains(&chain)
            || line.contains("kube-proxy")
            || line.contains("beeline")
            || line.starts_with("-A") && line.contains("-j KUBE-") && !line.contains("-j KUBE-FIREWALL")
    };
    rules.lines().filter(ours).collect()
}

fn there_and_back(mode: Mode) {
    let mut scene = Scene::new();
    kube_proxy::write(mode, &scene.node, &scene.servers);
    let held = scene.held();
    let new_ones = scene.new_ones();

    // As long as kube-proxy runs nothing of its is touched.
    let before = kube_proxy::rules(&scene.node);
    let mut stand_in = scene.stand_in();
    scene.start_agent(true);
    let said = scene.wait_log("kube-proxy still runs");
    assert!(said.contains(&format!("(pid {})", stand_in.pid())), "{said}");
    let unchanged = left(&before);
    assert!(unchanged.len() >= 2, "{before}");
    assert_eq!(left(&kube_proxy::rules(&scene.node)), unchanged);

    stand_in.kill().unwrap();
    scene.wait_log("took over from kube-proxy");
    scene.wait_log("connections that kube-proxy translated run on");
    let rules = kube_proxy::rules(&scene.node);
    let some = left(&rules);
    assert!(some.contains(&"table inet beeline-takeover"), "{rules}");
    let only = |line: &&&str| line.contains("KUBE-FORWARD") || line.contains("beeline");
    assert_eq!(some.iter().filter(only).count(), some.len(), "{some:#?}");

    // Everything goes on: what is new, and what was there before.
    let more = scene.new_ones();
    assert_spread(
        &Load::ask(scene.client.place(), address(&format!("{V4}:80")), Ask::Http, 64).unwrap(),
        &BOTH,
    );
    more.stop(1);
    new_ones.stop(20);
    assert!(
        !scene.logged("no connection is left"),
        "the old connections still run"
    );
    for report in held.stop(100) {
        // one reply per connection's backend: none was opened anew
        assert!(report.replies.len() <= 2, "{report:?}");
    }
    scene.wait_log("no connection is left that kube-proxy translated");
    let rules = kube_proxy::rules(&scene.node);
    assert_eq!(left(&rules), Vec::<&str>::new(), "{rules}");
    if mode != Mode::Nftables {
        for stays in [
            ":KUBE-FIREWALL",
            ":KUBE-KUBELET-CANARY",
            "-j KUBE-FIREWALL",
            "flannel forward",
        ] {
            assert!(rules.contains(stays), "{stays} in {rules}");
        }
    }

    and_back(&mut scene, mode);
}

fn and_back(scene: &mut Scene, mode: Mode) {
    let held = scene.held_inside();
    let new_ones = scene.new_ones();
    let mut agent = scene.agent.take().unwrap();
    agent.process.terminate().unwrap();
    let programs = programs_in(scene.node.cgroup());
    let error = hand_back(scene, "0").unwrap_err();
    assert!(
        format!("{error:#}").contains("no rules for ip and ip6"),
        "{error:#}"
    );
    assert_eq!(programs_in(scene.node.cgroup()), programs, "left as it was");
    let outside = scene.held_outside();
    let limit = (10 * slowness()).to_string();
    let printed = std::thread::scope(|threads| {
        let waiting = threads.spawn(|| hand_back(scene, &limit));
        kube_proxy::write(mode, &scene.node, &scene.servers);
        wait_for("kube-proxy to get what is new", PROPAGATION, || {
            Ok((programs_in(scene.node.cgroup()).len() < programs.len()).then_some(()))
        })
        .unwrap();
        scene.new_ones().stop(1);
        assert!(!waiting.is_finished(), "flows from outside still run");
        outside.stop(20);
        waiting.join().unwrap().unwrap()
    });
    assert!(printed.contains("removed "), "{printed}");
    assert!(programs_in(scene.node.cgroup()).is_empty());
    let more = scene.new_ones();
    assert_spread(
        &Load::ask(scene.client.place(), address(&format!("{V4}:80")), Ask::Http, 64).unwrap(),
        &BOTH,
    );
    more.stop(1);
    new_ones.stop(20);
    held.stop(20);
}

fn hand_back(scene: &Scene, timeout: &str) -> anyhow::Result<String> {
    let node = &scene.node;
    let mut command = agent::beeline(node, &["cleanup", "--hand-back", "--timeout", timeout])?;
    command
        .arg("--bpffs-root")
        .arg(node.bpffs())
        .arg("--cgroup-root")
        .arg(node.cgroup());
    beeline_tests::process::output(command)
}

#[test]
fn from_iptables_and_back_fails_no_connection() {
    there_and_back(Mode::IptablesNft);
}

#[test]
fn from_legacy_iptables_and_back_fails_no_connection() {
    there_and_back(Mode::IptablesLegacy);
}

#[test]
fn from_nftables_and_back_fails_no_connection() {
    there_and_back(Mode::Nftables);
}

#[test]
fn rules_that_come_back_are_told_of_and_removed_again() {
    let mut scene = Scene::new();
    kube_proxy::write(Mode::Nftables, &scene.node, &scene.servers);
    // kube-proxy has ended before: its rules go as soon as everything is programmed, and not before
    let new_ones = scene.new_ones();
    scene.start_agent(true);
    scene.wait_log("took over from kube-proxy");
    scene.new_ones().stop(1);
    new_ones.stop(5);
    kube_proxy::write(Mode::Nftables, &scene.node, &scene.servers);
    scene.wait_log("kube-proxy's rules came back");
    wait_for("the rules to go again", PROPAGATION, || {
        Ok(left(&kube_proxy::rules(&scene.node)).is_empty().then_some(()))
    })
    .unwrap();
}

#[test]
fn what_a_killed_agent_began_is_finished_by_the_next() {
    let mut scene = Scene::new();
    kube_proxy::write(Mode::IptablesNft, &scene.node, &scene.servers);
    let held = scene.held();
    scene.start_agent(true);
    scene.wait_log("connections that kube-proxy translated run on");
    scene.agent.as_mut().unwrap().process.kill().unwrap();
    fs::write(scene.node.state().join("agent.log"), "").unwrap();
    // without the flag: nothing new is taken over, but what was begun is finished
    scene.start_agent(false);
    scene.wait_log("connections that kube-proxy translated run on");
    held.stop(10);
    scene.wait_log("no connection is left that kube-proxy translated");
    assert_eq!(left(&kube_proxy::rules(&scene.node)), Vec::<&str>::new());
}

#[test]
fn without_kube_proxy_nothing_is_touched() {
    let mut scene = Scene::new();
    let before = kube_proxy::rules(&scene.node);
    scene.start_agent(true);
    scene.wait_log("there are no rules of kube-proxy to take over from");
    assert_eq!(kube_proxy::rules(&scene.node), before);
    let report = Load::ask(scene.client.place(), address(&format!("{V4}:80")), Ask::Http, 64).unwrap();
    assert_spread(&report, &BOTH);
}

#[test]
#[ignore = "needs a kernel with ipvs: cargo xtask vm"]
fn from_ipvs_and_back_fails_no_connection() {
    let mut scene = Scene::new();
    kube_proxy::write(Mode::Ipvs, &scene.node, &scene.servers);
    // what is not kube-proxy's: keepalived's, kube-router's
    let others = ["-A -t 192.0.2.80:8080 -s rr", "KUBE-SRC-ABCDEF"];
    let host = scene.node.host();
    host.output("ipvsadm", &["-A", "-t", "192.0.2.80:8080", "-s", "rr"])
        .unwrap();
    host.output("ipset", &["create", others[1], "hash:ip"]).unwrap();
    let held = scene.held();
    // not from pods and the node: those ports that ipvs remembers would be used again in a while
    let new_ones = scene.new_ones_outside();
    let mut stand_in = scene.stand_in();
    scene.start_agent(true);
    scene.wait_log("kube-proxy still runs");
    stand_in.kill().unwrap();

    // What connections run through stays, and no new one comes to it.
    scene.wait_log("its virtual servers and rules are removed when they have ended");
    wait_for("idle virtual servers to go", PROPAGATION, || {
        let state = kube_proxy::ipvs_state(&scene.node);
        Ok((!state.iter().any(|line| line.starts_with("-A -u"))).then_some(()))
    })
    .unwrap();
    let state = kube_proxy::ipvs_state(&scene.node);
    let servers = state.iter().filter(|line| line.starts_with("-A -t")).count();
    assert_eq!(
        servers, 5,
        "cluster address and node port of each family, keepalived's: {state:#?}"
    );
    for stays in ["kube-ipvs0", "KUBE-CLUSTER-IP", "KUBE-6-NODE-PORT-TCP"] {
        assert!(
            state.iter().any(|line| line.contains(stays)),
            "{stays}: {state:#?}"
        );
    }
    let known = kube_proxy::ipvs_connections(&scene.node);
    assert!(known.len() >= 3, "{known:?}");
    let more = scene.new_ones();
    assert_spread(
        &Load::ask(scene.client.place(), address(&format!("{V4}:80")), Ask::Http, 64).unwrap(),
        &BOTH,
    );
    more.stop(1);
    let now = kube_proxy::ipvs_connections(&scene.node);
    assert_eq!(now.difference(&known).collect::<Vec<_>>(), Vec::<&String>::new());
    assert!(!scene.logged("took over from"), "the old connections still run");
    held.stop(20);
    new_ones.stop(20);
    scene.wait_log("took over from kube-proxy");
    scene.wait_log("no connection is left that kube-proxy translated");
    assert_eq!(kube_proxy::ipvs_state(&scene.node), others);
    let rules = kube_proxy::rules(&scene.node);
    assert_eq!(left(&rules), Vec::<&str>::new(), "{rules}");
    and_back(&mut scene, Mode::Ipvs);
}

#[test]
fn what_ipvs_left_is_no_address_of_the_node_and_is_removed() {
    let mut scene = Scene::new();
    let batch = [
        "link add kube-ipvs0 type veth peer name other",
        "addr add 198.51.100.77/32 dev kube-ipvs0",
    ]
    .map(str::to_owned);
    scene.node.host().netns().ip_batch(&batch).unwrap();
    let options = AgentOptions::dir(scene.objects.path()).flag("--nodeport-addresses", "0.0.0.0/0");
    scene.start_agent_with(options, true);
    let addresses = scene.wait_log("addresses of this node");
    assert!(!addresses.contains("198.51.100.77"), "{addresses}");
    scene.wait_log("took over from kube-proxy");
    let links = scene.node.host().output("ip", &["-o", "link"]).unwrap();
    assert!(!links.contains("kube-ipvs0"), "{links}");
}
