//! Nodes on a switch that know each other by flannel's leases in a real etcd, without a tunnel. Needs root.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on must fail")]

#[path = "common/lan.rs"]
mod lan;

use std::fs::File;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use beeline_etcd::server::Server;
use beeline_etcd::{Access, Client, encode, end_of, number};
use dataplane_user::overlay::etcd::{Manager, Settings};
use dataplane_user::overlay::{self, Engine};
use lan::{Lan, Netns, plain_pod, within};
use nix::sched::{CloneFlags, setns};
use serde_json::{Value, json};
use tokio::sync::{mpsc, oneshot};

const PREFIX: &str = "/bl/network";
const CONF: &str = r#"{"Network": "10.244.0.0/16", "EnableIPv6": true, "IPv6Network": "fd00:244::/32",
    "IPv6SubnetLen": 48, "Backend": {"Type": "host-gw"}}"#;
const PATIENCE: Duration = Duration::from_secs(40);
/// A lease is short, and renewed after a second; a busy machine may be late with that.
const TTL: Duration = Duration::from_secs(10);
const MARGIN: Duration = Duration::from_secs(9);

/// The agent's part on one host.
struct Agent {
    stop: Option<oneshot::Sender<()>>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Agent {
    fn start(host: &Netns, n: u8, access: &Access, subnet_file: std::path::PathBuf) -> Self {
        let (stop, stopped) = oneshot::channel::<()>();
        let file = File::open(host.path()).unwrap();
        let settings = Settings {
            ttl: TTL,
            ..Settings::new(access.clone(), PREFIX, MARGIN)
        };
        let thread = std::thread::spawn(move || {
            setns(file, CloneFlags::CLONE_NEWNET).unwrap();
            runtime().block_on(async {
                let manager = Arc::new(Manager::new(settings).unwrap());
                let network = overlay::Settings {
                    subnet_file: Some(subnet_file),
                    ..overlay::Settings::new(manager.config().await, format!("n{n}"))
                };
                let (sender, queue) = mpsc::channel(64);
                let (engine, view) = Engine::new(network.clone(), queue).unwrap();
                tokio::select! {
                    () = manager.keep(network, sender, view) => {}
                    result = engine.run() => result.unwrap(),
                    _ = stopped => {}
                }
            });
        });
        Self {
            stop: Some(stop),
            thread: Some(thread),
        }
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        drop(self.stop.take());
        let ended = self.thread.take().unwrap().join();
        if !std::thread::panicking() {
            ended.unwrap();
        }
    }
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap()
}

/// The leases below the prefix, as etcd shows them.
fn leases(client: &Client) -> Vec<Value> {
    let prefix = format!("{PREFIX}/subnets/");
    let range = json!({"key": encode(&prefix), "range_end": encode(end_of(&prefix))});
    let answer = runtime().block_on(client.call("kv/range", &range)).unwrap();
    answer["kvs"].as_array().cloned().unwrap_or_default()
}

#[test]
fn nodes_take_their_subnets_route_to_each_other_and_keep_their_leases() {
    let lan = Lan::new();
    let hosts = [lan.host(1), lan.host(2)];
    let pods = [plain_pod(&hosts[0], 1), plain_pod(&hosts[1], 2)];
    let etcd_host = lan.host(9);
    let name = etcd_host.name.clone();
    let etcd = Server::at(
        "192.168.77.9:2379".parse().unwrap(),
        "192.168.77.9:2380".parse().unwrap(),
        move || {
            let mut command = Command::new("ip");
            command.args(["netns", "exec", &name, "etcd"]);
            command
        },
    )
    .unwrap();
    let access = Access {
        servers: vec!["http://192.168.77.8:2379".into(), etcd.url()],
        ..Access::default()
    };
    // what nodes had before is what they get
    let files = tempfile::tempdir().unwrap();
    let mut agents = Vec::new();
    for (n, host) in (1..).zip(&hosts) {
        let file = files.path().join(format!("subnet-{n}.env"));
        std::fs::write(
            &file,
            format!("FLANNEL_SUBNET=10.244.{n}.1/24\nFLANNEL_IPV6_SUBNET=fd00:244:{n}::1/48\n"),
        )
        .unwrap();
        agents.push(Agent::start(host, n, &access, file));
    }
    etcd_host.enter(|| {
        let client = Client::new(&access).unwrap();
        let config = json!({"key": encode(format!("{PREFIX}/config")), "value": encode(CONF)});
        within(PATIENCE, "etcd", || {
            runtime().block_on(client.call("kv/put", &config)).is_ok()
        });
        within(PATIENCE, "pods of two nodes", || {
            pods[0].pings("10.244.2.2") && pods[0].pings("fd00:244:2::2")
        });
        assert!(
            hosts[0]
                .ip("route show 10.244.2.0/24")
                .contains("via 192.168.77.2 dev eth0")
        );
        let keys: Vec<String> = leases(&client)
            .iter()
            .map(|kv| beeline_etcd::stored(kv).unwrap().key)
            .collect();
        let expected = [1, 2].map(|n| format!("{PREFIX}/subnets/10.244.{n}.0-24&fd00:244:{n}::-48"));
        assert_eq!(keys, expected);

        // renewed: what is left of it grows
        let lease = leases(&client)[0]["lease"].clone();
        let left = || {
            let answer = runtime().block_on(client.call("lease/timetolive", &json!({"ID": lease})));
            number(&answer.unwrap()["TTL"])
        };
        let mut before = left();
        within(PATIENCE, "the lease to be renewed", || {
            let now = left();
            let grown = now > before;
            before = now;
            grown
        });
        // a node that is gone for longer than that is forgotten
        agents.remove(0);
        within(PATIENCE, "the lease to end", || leases(&client).len() == 1);
        within(PATIENCE, "the route to go", || {
            hosts[1].ip("route show 10.244.1.0/24").is_empty()
        });
        assert!(!pods[1].pings("10.244.1.2"));
    });
    drop(agents);
}

#[test]
fn a_user_of_etcd_logs_in_and_again_when_etcd_has_forgotten() {
    let mut etcd = Server::start().unwrap();
    let open = Client::new(&Access {
        servers: vec![etcd.url()],
        ..Access::default()
    })
    .unwrap();
    let runtime = runtime();
    let ask = |client: &Client, path: &str, body: Value| runtime.block_on(client.call(path, &body));
    within(PATIENCE, "etcd", || {
        ask(&open, "kv/range", json!({"key": encode("k")})).is_ok()
    });
    for (path, body) in [
        ("auth/user/add", json!({"name": "root", "password": "secret"})),
        ("auth/role/add", json!({"name": "root"})),
        ("auth/user/grant", json!({"user": "root", "role": "root"})),
        ("auth/enable", json!({})),
    ] {
        ask(&open, path, body).unwrap();
    }
    let put = json!({"key": encode("k"), "value": encode("v")});
    assert!(ask(&open, "kv/put", put.clone()).is_err());
    let user = |password: &str| {
        let user = Some(("root".to_owned(), password.to_owned()));
        Client::new(&Access {
            servers: vec![etcd.url()],
            user,
            ..Access::default()
        })
        .unwrap()
    };
    assert!(ask(&user("wrong"), "kv/put", put.clone()).is_err());
    let client = user("secret");
    ask(&client, "kv/put", put.clone()).unwrap();
    // its tokens are in its memory
    etcd.kill().unwrap();
    etcd.resume().unwrap();
    within(PATIENCE, "etcd", || ask(&client, "kv/put", put.clone()).is_ok());
}
