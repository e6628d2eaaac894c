//! Backends go away: a node loses its power, and nobody tells the others; endpoints go while sockets are connected to them.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use beeline_tests::client::{Mode, Question};
use beeline_tests::{Agent, AgentOptions, Cluster, Load, LoadReport, Node, ObjectDir, Pod, agent, wait_for};

use crate::scene::{PROPAGATION, V4, V6, address};

/// A service with a backend on each of two nodes, and a client and an agent on the first.
struct TwoNodes {
    // Order of dropping: processes before the cluster.
    agent: Agent,
    client: Pod,
    servers: [Pod; 2],
    far: Node,
    near: Node,
    objects: ObjectDir,
    cluster: Cluster,
}

impl TwoNodes {
    fn new() -> Self {
        let cluster = Cluster::new().unwrap();
        let (near, far) = (cluster.add_node().unwrap(), cluster.add_node().unwrap());
        let servers = [
            near.add_echo_pod("web-near").unwrap(),
            far.add_echo_pod("web-far").unwrap(),
        ];
        let client = near.add_pod("client").unwrap();
        let objects = ObjectDir::new(cluster.state().join("objects")).unwrap();
        objects
            .put_service("web", &[V4, V6], &servers.each_ref())
            .unwrap();
        let agent = Agent::start_synced(&near, &AgentOptions::dir(objects.path())).unwrap();
        Self {
            agent,
            client,
            servers,
            far,
            near,
            objects,
            cluster,
        }
    }

    /// New connections, which wait for longer than a backend that is silent for a while would need.
    fn load(&self, target: SocketAddr, rate: u32) -> Load {
        let question = Question {
            timeout_ms: 20_000,
            ..Mode::Http.into()
        };
        Load::start(self.client.place(), target, question, rate, 64).unwrap()
    }

    fn ask(&self, target: SocketAddr, count: u64) -> LoadReport {
        Load::ask(self.client.place(), target, Mode::Http, count).unwrap()
    }

    /// Sockets that have been connected through services.
    fn connections(&self) -> u64 {
        let services = agent::beeline_json(&self.near, &["service", "list"]).unwrap();
        let found = serde_json::to_string(&services).unwrap();
        let count = |part: &str| part.split([',', '}']).next()?.trim().parse::<u64>().ok();
        found
            .split("\"totalConnections\":")
            .skip(1)
            .filter_map(count)
            .sum()
    }

    /// How `beeline backend list` shows the far pod: its state, and how often it was asked whether it answers.
    fn far_backend(&self) -> (String, u64) {
        let all = agent::beeline_json(&self.near, &["backend", "list"]).unwrap();
        let far = self.servers[1].addresses().map(|ip| ip.to_string());
        let mut both: Vec<_> = all.as_array().unwrap().iter().collect();
        both.retain(|it| it["protocol"] == "TCP" && far.iter().any(|ip| it["address"] == **ip));
        assert_eq!(both.len(), 2, "{all:#}");
        // only one family is asked for
        let busy = both.iter().find(|it| it["state"] != "active");
        let shown = busy.unwrap_or(&both[0]);
        let probes = shown["probing"]["probes"].as_u64();
        (shown["state"].as_str().unwrap().into(), probes.unwrap_or(0))
    }

    fn suspects(&self) -> f64 {
        let found = agent::metric(&self.near, "beeline_backends_suspect").unwrap();
        found.unwrap()
    }

    /// Waits until as many sockets more than before have been connected.
    fn wait_connections(&self, before: u64) {
        wait_for("all of them to be connected", PROPAGATION, || {
            Ok((self.connections() >= before + 16).then_some(()))
        })
        .unwrap();
    }

    /// Waits until new connections go to both backends.
    fn wait_both(&self, target: SocketAddr) {
        wait_for("both backends", PROPAGATION, || {
            Ok((self.ask(target, 32).replies.len() == 2).then_some(()))
        })
        .unwrap();
    }

    fn wait_destroyed(&self) {
        wait_for("sockets to be destroyed", PROPAGATION, || {
            let found = agent::metric(&self.near, "beeline_sockets_destroyed_total")?;
            Ok(found.filter(|count| *count > 0.0))
        })
        .unwrap();
    }

    /// The service has only the near pod from now on; that is programmed after this.
    fn leave_near(&self) {
        let near = &self.servers[0];
        self.objects.put_service("web", &[V4, V6], &[near]).unwrap();
        self.objects.settle([&self.near]).unwrap();
    }
}

#[test]
fn a_node_without_power_gets_no_new_connections_after_two_seconds() {
    for ip in [V4.to_owned(), format!("[{V6}]")] {
        let scene = TwoNodes::new();
        let target = address(&format!("{ip}:80"));
        let before = scene.ask(target, 100);
        assert_eq!((before.failed, before.replies.len()), (0, 2), "{before:?}");
        // what clients do anyhow is what tells of the failure
        let load = scene.load(target, 50);
        scene.cluster.unplug(&scene.far).unwrap();
        let unplugged = Instant::now();
        std::thread::sleep(Duration::from_secs(2).saturating_sub(unplugged.elapsed()));

        let report = scene.ask(target, 1000);
        assert!(
            report.ok >= 999 && report.slowest_ms < 500.0,
            "{report:?}\n{}",
            scene.agent.process.log_end()
        );
        assert_eq!(report.replies.keys().collect::<Vec<_>>(), ["web-near"]);
        // its UDP port as well, which nobody can ask
        assert_eq!(scene.suspects(), 2.0);
        let (state, probes) = scene.far_backend();
        assert_eq!(state, "suspect");
        wait_for("it to be asked again", PROPAGATION, || {
            Ok((scene.far_backend().1 > probes).then_some(()))
        })
        .unwrap();

        // it returns when it answers, and those who waited for it are served
        scene.cluster.plug_in(&scene.far).unwrap();
        scene.wait_both(target);
        assert_eq!(scene.suspects(), 0.0);
        assert_eq!(scene.far_backend(), ("active".to_owned(), 0));
        let load = load.stop().unwrap();
        assert_eq!(load.failed, 0, "{load:?}");
    }
}

#[test]
fn the_last_backend_keeps_its_connections() {
    let scene = TwoNodes::new();
    // another service has the far pod alone
    let far = &scene.servers[1];
    scene.objects.put_service("far", &["10.96.0.30"], &[far]).unwrap();
    let (both, alone) = (address(&format!("{V4}:80")), address("10.96.0.30:80"));
    wait_for("the service to be there", PROPAGATION, || {
        Ok((scene.ask(alone, 1).ok == 1).then_some(()))
    })
    .unwrap();
    let load = scene.load(both, 50);
    scene.cluster.unplug(&scene.far).unwrap();
    wait_for("the suspicion", PROPAGATION, || {
        Ok((scene.suspects() > 0.0).then_some(()))
    })
    .unwrap();
    // it is still sent there, and its connection waits
    let question = Question {
        timeout_ms: 20_000,
        ..Mode::Http.into()
    };
    let late = std::thread::scope(|scope| {
        let late = scope.spawn(|| Load::ask(scene.client.place(), alone, question, 1).unwrap());
        std::thread::sleep(Duration::from_millis(600));
        scene.cluster.plug_in(&scene.far).unwrap();
        late.join().unwrap()
    });
    assert_eq!((late.ok, late.failed), (1, 0), "{late:?}");
    assert!(late.slowest_ms > 500.0, "{late:?}");
    assert_eq!(load.stop().unwrap().failed, 0);
}

/// How long a connected socket may go on to who serves no more.
const MOVED: Duration = Duration::from_secs(1);

#[test]
fn connected_udp_sockets_move_when_their_backend_serves_no_more() {
    let scene = TwoNodes::new();
    let target = address(&format!("{V4}:53"));
    // 16 sockets, each of which stays with its backend
    let load = Load::start(scene.client.place(), target, Mode::UdpHold, 200, 16).unwrap();
    scene.wait_connections(0);
    scene.leave_near();
    let gone = Instant::now();
    scene.wait_destroyed();
    // twice as long, because others keep this machine busy
    assert!(gone.elapsed() < MOVED * 2, "{:?}", gone.elapsed());
    std::thread::sleep(MOVED);
    let moved = load.stop().unwrap();
    // each socket of the far pod failed once, and was connected again: it never waited for an answer in vain
    assert!((1..=16).contains(&moved.failed), "{moved:?}");
    assert!(moved.slowest_ms < 1000.0, "{moved:?}");
    let report = Load::ask(scene.client.place(), target, Mode::UdpHold, 16).unwrap();
    assert_eq!(report.replies.keys().collect::<Vec<_>>(), ["web-near"]);
}

#[test]
fn tcp_connections_end_with_their_pod_but_not_with_its_labels() {
    let scene = TwoNodes::new();
    let target = address(&format!("{V4}:80"));
    let load = || Load::start(scene.client.place(), target, Mode::Hold, 100, 16).unwrap();
    let held = load();
    scene.wait_connections(0);
    // the far pod leaves the service, and lives on: its connections, too
    scene.leave_near();
    std::thread::sleep(Duration::from_secs(7));
    let report = held.stop().unwrap();
    assert_eq!(report.failed, 0, "{report:?}");
    assert_eq!(report.replies.len(), 2, "{report:?}");

    // it comes back, and goes with its node
    scene
        .objects
        .put_service("web", &[V4, V6], &scene.servers.each_ref())
        .unwrap();
    scene.wait_both(target);
    let before = scene.connections();
    let held = load();
    scene.wait_connections(before);
    scene.cluster.unplug(&scene.far).unwrap();
    scene.leave_near();
    scene.wait_destroyed();
    assert_eq!(
        scene.ask(target, 32).replies.keys().collect::<Vec<_>>(),
        ["web-near"]
    );
    drop(held);
}
