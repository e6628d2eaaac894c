//! The CNI plugin against the agent's side of it, in network namespaces. Needs root.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on must fail")]

#[path = "common/lan.rs"]
mod lan;

use std::collections::BTreeSet;
use std::io::Write as _;
use std::panic::AssertUnwindSafe;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use beeline_cni::client::{Agent as _, Socket};
use beeline_cni::plugin;
use beeline_cni::protocol::{Request, Response};
use dataplane_user::cni::{Config, Server, Service};
use dataplane_user::overlay::View;
use dataplane_user::persist::Faults;
use lan::{Lan, Netns, within};
use serde_json::{Value, json};
use tokio::sync::watch;

const STEPS: [&str; 10] = [
    "create link",
    "configure link",
    "serve pod",
    "configure pod",
    "route to pod",
    "create file",
    "write file",
    "flush file",
    "rename file",
    "flush directory",
];

fn view(n: u8) -> View {
    View {
        subnets: vec![
            format!("10.244.{n}.0/24").parse().unwrap(),
            format!("fd00:244:{n}::/64").parse().unwrap(),
        ],
        mtu: 1500,
        overlay_mtu: 1430,
        uplink: "eth0".into(),
        ready: true,
        ..View::default()
    }
}

type Step = Arc<Mutex<Option<(&'static str, bool)>>>;

/// A node with the agent's side of the plugin.
struct Node {
    /// The step that fails next, and whether the whole agent does.
    step: Step,
    network: watch::Sender<View>,
    server: Option<Server>,
    service: Option<Arc<Service>>,
    host: Netns,
    dir: tempfile::TempDir,
}

impl Node {
    fn new(lan: &Lan, n: u8) -> Self {
        let mut node = Self {
            host: lan.host(n),
            dir: tempfile::tempdir().unwrap(),
            step: Step::default(),
            network: watch::Sender::new(view(n)),
            service: None,
            server: None,
        };
        node.restart();
        node
    }

    fn config(&self) -> Config {
        let step = Arc::clone(&self.step);
        let faults = Faults::new(move |now| {
            let wanted = *step.lock().unwrap();
            match wanted {
                Some((wanted, crash)) if wanted == now => {
                    assert!(!crash, "the agent dies at {now}");
                    Err(std::io::ErrorKind::StorageFull.into())
                }
                _ => Ok(()),
            }
        });
        Config {
            state_dir: self.dir.path().join("state"),
            quarantine: Duration::from_secs(60),
            host_local: Some(self.dir.path().join("host-local")),
            faults,
        }
    }

    fn restart(&mut self) {
        self.server = None;
        self.service = None;
        let (config, network, socket) = (self.config(), self.network.subscribe(), self.socket());
        let (service, server) = self.host.enter(|| {
            let service = Arc::new(Service::open(config, network, None).unwrap());
            let server = Server::start(&socket, Arc::clone(&service)).unwrap();
            (service, server)
        });
        self.service = Some(service);
        self.server = Some(server);
    }

    fn stop(&mut self) {
        self.server = None;
        self.service = None;
    }

    fn socket(&self) -> PathBuf {
        self.dir.path().join("cni.sock")
    }

    fn conf(&self) -> Value {
        json!({
            "cniVersion": "1.1.0", "name": "bl", "type": "beeline-cni",
            "socket": self.socket(), "stateDir": self.dir.path().join("state"),
        })
    }

    /// What the plugin's process would do.
    fn plugin(&self, command: &str, id: &str, netns: &str, conf: &Value) -> Result<Value, Value> {
        let get = |name: &str| {
            let value = match name {
                "CNI_COMMAND" => command,
                "CNI_CONTAINERID" => id,
                "CNI_NETNS" => netns,
                "CNI_IFNAME" => "eth0",
                "CNI_PATH" => "/opt/cni/bin",
                "CNI_ARGS" => "IgnoreUnknown=1;K8S_POD_NAMESPACE=default;K8S_POD_NAME=web",
                _ => return None,
            };
            Some(value.to_owned())
        };
        let outcome = plugin::run(&get, conf.to_string().as_bytes(), &Socket);
        let said = serde_json::from_str(&outcome.stdout).unwrap_or(Value::Null);
        if outcome.failed { Err(said) } else { Ok(said) }
    }

    fn add(&self, id: &str, pod: &Netns) -> Result<Value, Value> {
        self.plugin("ADD", id, &pod.path(), &self.conf())
    }

    fn del(&self, id: &str) {
        self.plugin("DEL", id, "", &self.conf()).unwrap();
    }

    fn devices(&self) -> BTreeSet<String> {
        let links = self.host.json("ip", "link show");
        let names = links
            .as_array()
            .unwrap()
            .iter()
            .map(|link| link["ifname"].as_str().unwrap().to_owned());
        names.filter(|name| name.starts_with("bee")).collect()
    }

    fn pod_routes(&self) -> usize {
        let routes = self.host.ip("route show table all");
        routes.lines().filter(|line| line.contains("dev bee")).count()
    }

    fn files(&self) -> Vec<String> {
        files(&self.dir.path().join("state/attachments"))
    }

    fn used(&self) -> usize {
        let Response::List(list) = Socket.ask(&self.socket(), &Request::List, None).unwrap() else {
            unreachable!("a list is answered with a list");
        };
        list.addresses.iter().filter(|line| line.state == "used").count()
    }

    fn assert_empty(&self, when: &str) {
        assert_eq!(self.devices(), BTreeSet::new(), "{when}");
        assert_eq!(self.pod_routes(), 0, "{when}");
        assert_eq!(self.files(), [""; 0], "{when}");
        assert_eq!(self.used(), 0, "{when}");
    }
}

fn files(dir: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(dir).unwrap();
    entries
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect()
}

fn ips(result: &Value) -> Vec<String> {
    let ips = result["ips"].as_array().unwrap().iter();
    ips.map(|ip| {
        ip["address"]
            .as_str()
            .unwrap()
            .split('/')
            .next()
            .unwrap()
            .to_owned()
    })
    .collect()
}

#[test]
fn pods_of_a_node_reach_each_other_and_the_node() {
    let lan = Lan::new();
    let node = Node::new(&lan, 1);
    // the gateway must not depend on the node's routes
    node.host.ip("route delete default");
    let pods = [Netns::new("pa"), Netns::new("pb")];
    let results: Vec<Value> = pods
        .iter()
        .enumerate()
        .map(|(i, pod)| node.add(&format!("sandbox{i}"), pod).unwrap())
        .collect();
    assert_eq!(results[0]["interfaces"][1]["name"], "eth0");
    assert_eq!(results[0]["interfaces"][1]["mtu"], 1500);
    for (from, to) in [(0, 1), (1, 0)] {
        for ip in ips(&results[to]) {
            assert!(pods[from].pings(&ip), "pod {from} to {ip}");
            assert!(node.host.pings(&ip), "node to {ip}");
        }
    }
    for ip in ["192.168.77.1", "fd77::1"] {
        assert!(pods[0].pings(ip), "pod to its node at {ip}");
    }
    // the whole MTU between pods of a node, the overlay's to others
    let to = ips(&results[1])[0].clone();
    assert!(
        pods[0]
            .exec(&format!("ping -c 1 -W 1 -M do -s 1472 {to}"))
            .status
            .success()
    );
    let route = &pods[0].json("ip", "route get 10.244.9.9")[0];
    assert_eq!(
        (&route["gateway"], &route["metrics"][0]["mtu"]),
        (&json!("169.254.1.1"), &json!(1430))
    );
    // a pod that lies about its address is not heard
    pods[0].ip("address add 10.244.1.200/32 dev eth0");
    let lie = pods[0].exec(&format!("ping -c 1 -W 1 -I 10.244.1.200 {to}"));
    assert!(!lie.status.success());

    let mut conf = node.conf();
    conf["prevResult"] = results[0].clone();
    let check = |conf: &Value| node.plugin("CHECK", "sandbox0", &pods[0].path(), conf);
    check(&conf).unwrap();
    pods[0].ip("route delete default");
    assert!(
        check(&conf).unwrap_err()["msg"]
            .as_str()
            .unwrap()
            .contains("default route")
    );
    node.plugin("STATUS", "", "", &node.conf()).unwrap();

    let again = node.add("sandbox0", &pods[0]).unwrap_err();
    assert!(
        again["msg"].as_str().unwrap().contains("attached already"),
        "{again}"
    );
    // an interface of this name is there already: nothing of the second ADD stays
    node.add("other", &pods[0]).unwrap_err();
    assert_eq!(node.devices().len(), 2);
    for id in ["sandbox0", "sandbox1", "sandbox1", "never"] {
        node.del(id);
    }
    node.assert_empty("after DEL");
}

#[test]
fn an_add_that_fails_at_any_step_leaves_nothing_and_the_next_one_works() {
    let lan = Lan::new();
    let node = Node::new(&lan, 1);
    let pod = Netns::new("p");
    for step in STEPS {
        let id = step.replace(' ', "-");
        *node.step.lock().unwrap() = Some((step, false));
        let error = node.add(&id, &pod).unwrap_err();
        assert!(!error["msg"].as_str().unwrap().is_empty());
        *node.step.lock().unwrap() = None;
        // addresses that could not be given back for good are only found by a GC; the pod's device and record never stay
        assert_eq!(
            (node.devices(), node.pod_routes()),
            (BTreeSet::new(), 0),
            "{step}"
        );
        assert_eq!(node.files(), [""; 0], "{step}");
        let mut gc = node.conf();
        gc["cni.dev/valid-attachments"] = json!([]);
        node.plugin("GC", "", "", &gc).unwrap();
        node.assert_empty(step);
        node.add(&id, &pod).unwrap();
        node.del(&id);
    }
    node.assert_empty("at the end");
}

#[test]
fn an_agent_that_dies_at_any_step_finds_it_at_its_next_start() {
    let lan = Lan::new();
    let mut node = Node::new(&lan, 1);
    let survivor = Netns::new("s");
    let kept = node.add("kept", &survivor).unwrap();
    for step in STEPS.into_iter().chain(["remove link", "remove file"]) {
        let pod = Netns::new("p");
        let id = step.replace(' ', "-");
        let is_del = step.starts_with("remove");
        if is_del {
            node.add(&id, &pod).unwrap();
        }
        *node.step.lock().unwrap() = Some((step, true));
        let (service, path) = (Arc::clone(node.service.as_ref().unwrap()), pod.path());
        let key = |id: &str| json!({"network": "bl", "container_id": id, "ifname": "eth0"});
        let died = node.host.enter(|| {
            let request = if is_del {
                json!({"op": "del", "key": key(&id)})
            } else {
                json!({"op": "add", "key": key(&id), "netns": path, "ips": [], "port_mappings": []})
            };
            let request = serde_json::from_value::<Request>(request).unwrap();
            let netns = std::fs::File::open(&path).unwrap();
            std::panic::catch_unwind(AssertUnwindSafe(|| service.answer(request, Some(&netns)))).is_err()
        });
        drop(service);
        *node.step.lock().unwrap() = None;
        // within the pod's namespace it is an error of the thread there, and undone at once
        assert!(died || step == "configure pod", "{step}");
        node.restart();
        if is_del {
            node.del(&id);
        }
        // an ADD whose record is complete is one that the runtime will take back
        node.del(&id);
        assert_eq!(node.devices().len(), 1, "{step}");
        assert_eq!((node.files().len(), node.used()), (1, 2), "{step}");
        for ip in ips(&kept) {
            assert!(node.host.pings(&ip), "{ip} after {step}");
        }
    }
    node.del("kept");
    node.assert_empty("at the end");
}

#[test]
fn a_late_del_of_an_old_sandbox_does_not_hurt_the_new_one() {
    let lan = Lan::new();
    let node = Node::new(&lan, 1);
    let (old, new) = (Netns::new("old"), Netns::new("new"));
    let first = node.add("old", &old).unwrap();
    let second = node.add("new", &new).unwrap();
    drop(old);
    node.del("old");
    for ip in ips(&second) {
        assert!(node.host.pings(&ip), "{ip}");
    }
    // what the old one had is not given out at once
    let third = node.add("third", &Netns::new("third")).unwrap();
    assert!(
        ips(&first)
            .iter()
            .all(|ip| !ips(&second).contains(ip) && !ips(&third).contains(ip))
    );
}

#[test]
fn what_runtimes_forget_is_found() {
    let lan = Lan::new();
    let mut node = Node::new(&lan, 1);
    let pods: Vec<Netns> = (0..4).map(|i| Netns::new(&format!("p{i}"))).collect();
    for (i, pod) in pods.iter().enumerate() {
        node.add(&format!("s{i}"), pod).unwrap();
    }
    // GC
    let mut conf = node.conf();
    conf["cni.dev/valid-attachments"] = json!([{"containerID": "s1", "ifname": "eth0"}, {"containerID": "s2", "ifname": "eth0"},
               {"containerID": "s3", "ifname": "eth0"}]);
    node.plugin("GC", "", "", &conf).unwrap();
    assert_eq!((node.devices().len(), node.files().len(), node.used()), (3, 3, 6));
    // a DEL without the agent succeeds, and the agent does it when it comes
    node.stop();
    node.del("s1");
    assert_eq!(node.devices().len(), 3);
    node.restart();
    assert_eq!((node.devices().len(), node.files().len(), node.used()), (2, 2, 4));
    assert_eq!(files(&node.dir.path().join("state/releases")), [""; 0]);
    // a reboot: namespaces and devices are gone, files are there
    node.stop();
    drop(pods);
    within(
        Duration::from_secs(5),
        "the kernel removes the namespaces",
        || node.devices().is_empty(),
    );
    node.restart();
    node.assert_empty("after a reboot");
    for i in 0..4 {
        node.del(&format!("s{i}"));
    }
}

/// A file system of 64 pages, unmounted on drop.
struct SmallDisk(PathBuf);

impl SmallDisk {
    fn mount(dir: PathBuf) -> Self {
        std::fs::create_dir_all(&dir).unwrap();
        let flags = nix::mount::MsFlags::empty();
        nix::mount::mount(Some("tmpfs"), &dir, Some("tmpfs"), flags, Some("nr_blocks=64")).unwrap();
        Self(dir)
    }

    /// Leaves no room.
    fn fill(&self) {
        let mut file = std::fs::File::create(self.0.join("ballast")).unwrap();
        let full = std::iter::repeat_with(|| file.write_all(&[7; 4096])).find_map(Result::err);
        assert_eq!(full.unwrap().kind(), std::io::ErrorKind::StorageFull);
    }

    fn empty(&self) {
        std::fs::remove_file(self.0.join("ballast")).unwrap();
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        let _gone = nix::mount::umount2(&self.0, nix::mount::MntFlags::MNT_DETACH);
    }
}

#[test]
fn a_full_disk_is_named_and_nothing_is_lost() {
    let lan = Lan::new();
    let mut node = Node::new(&lan, 1);
    node.stop();
    let disk = SmallDisk::mount(node.dir.path().join("state"));
    node.restart();
    let pods = ["kept", "more", "gone"].map(Netns::new);
    let kept = node.add("kept", &pods[0]).unwrap();
    let gone = node.add("gone", &pods[2]).unwrap();
    disk.fill();
    let error = node.add("more", &pods[1]).unwrap_err().to_string();
    assert!(error.to_lowercase().contains("no space left"), "{error}");
    assert_eq!((node.devices().len(), node.files().len()), (2, 2));
    // a runtime takes back what has failed, and others must be able to go
    for id in ["more", "gone"] {
        node.del(id);
    }
    assert_eq!((node.devices().len(), node.files().len()), (1, 1));
    node.restart();
    for ip in ips(&kept) {
        assert!(node.host.pings(&ip), "{ip}");
    }
    disk.empty();
    let more = node.add("more", &pods[1]).unwrap();
    assert!(
        ips(&more)
            .iter()
            .all(|ip| !ips(&kept).contains(ip) && !ips(&gone).contains(ip))
    );
    for id in ["more", "kept"] {
        node.del(id);
    }
    node.assert_empty("at the end");
    node.stop();
}

#[test]
fn what_cannot_be_done_is_named() {
    let lan = Lan::new();
    let node = Node::new(&lan, 1);
    let pod = Netns::new("p");
    let msg = |error: Value| format!("{} {}", error["msg"].as_str().unwrap(), error["details"]);
    let wrong = node
        .plugin("ADD", "a", "/run/netns/bl-is-not-there", &node.conf())
        .unwrap_err();
    assert!(msg(wrong).contains("bl-is-not-there"));
    let file = node.dir.path().join("file");
    std::fs::write(&file, "").unwrap();
    assert!(
        msg(node
            .plugin("ADD", "a", file.to_str().unwrap(), &node.conf())
            .unwrap_err())
        .contains("no namespace")
    );
    let own = node.host.path();
    let error = node.plugin("ADD", "a", &own, &node.conf()).unwrap_err();
    assert_eq!(error["code"], 8, "{error}");
    node.network.send_modify(|view| view.subnets.clear());
    let error = node.add("a", &pod).unwrap_err();
    assert_eq!(error["code"], 11, "{error}");
    assert_eq!(
        node.plugin("STATUS", "", "", &node.conf()).unwrap_err()["code"],
        50
    );
    node.network
        .send_modify(|view| view.subnets = vec!["10.244.1.0/30".parse().unwrap()]);
    node.add("a", &pod).unwrap();
    let error = node.add("b", &Netns::new("q")).unwrap_err();
    assert!(
        msg(error.clone()).contains("10.244.1.0/30") && error["code"] == 11,
        "{error}"
    );
    node.del("a");
    node.assert_empty("at the end");
}

#[test]
fn many_at_once_and_many_in_a_row_leave_nothing() {
    let lan = Lan::new();
    let node = Node::new(&lan, 1);
    let pods: Vec<Netns> = (0..50).map(|i| Netns::new(&format!("m{i}"))).collect();
    let begun = Instant::now();
    let failed = AtomicBool::new(false);
    let all: Mutex<BTreeSet<String>> = Mutex::default();
    std::thread::scope(|scope| {
        for (i, pod) in pods.iter().enumerate() {
            let (node, failed, all) = (&node, &failed, &all);
            scope.spawn(move || match node.add(&format!("m{i}"), pod) {
                Ok(result) => all.lock().unwrap().extend(ips(&result)),
                Err(error) => {
                    eprintln!("{error}");
                    failed.store(true, Ordering::Relaxed);
                }
            });
        }
    });
    assert!(!failed.load(Ordering::Relaxed));
    let all = all.into_inner().unwrap();
    assert_eq!(all.len(), 100, "every address is one pod's");
    eprintln!("50 ADDs at once: {:?}", begun.elapsed());
    for ip in all.iter().take(6) {
        assert!(node.host.pings(ip), "{ip}");
    }
    std::thread::scope(|scope| {
        for i in 0..50 {
            let node = &node;
            scope.spawn(move || node.del(&format!("m{i}")));
        }
    });
    node.assert_empty("after 50 at once");
    let begun = Instant::now();
    let cycles: u32 = std::env::var("BEELINE_CNI_CYCLES").map_or(100, |text| text.parse().unwrap());
    for i in 0..cycles {
        node.add(&format!("c{i}"), &pods[0]).unwrap();
        node.del(&format!("c{i}"));
    }
    eprintln!("{cycles} cycles: {:?} each", begun.elapsed() / cycles);
    node.assert_empty("after many cycles");
}

#[test]
fn a_node_takes_250_pods() {
    const PODS: usize = 250;
    const AT_ONCE: usize = 25;
    let lan = Lan::new();
    let mut node = Node::new(&lan, 1);
    let pods: Vec<Netns> = (0..PODS).map(|i| Netns::new(&format!("n{i}"))).collect();
    let all: Mutex<BTreeSet<String>> = Mutex::default();
    std::thread::scope(|scope| {
        for part in 0..AT_ONCE {
            let (node, pods, all) = (&node, &pods, &all);
            scope.spawn(move || {
                for i in (part..PODS).step_by(AT_ONCE) {
                    let added = node.add(&format!("n{i}"), &pods[i]).unwrap();
                    all.lock().unwrap().extend(ips(&added));
                }
            });
        }
    });
    let all = all.into_inner().unwrap();
    assert_eq!(all.len(), 2 * PODS, "every address is one pod's");
    assert_eq!(
        (node.devices().len(), node.files().len(), node.used()),
        (PODS, PODS, 2 * PODS)
    );
    // a new agent knows them all
    node.restart();
    assert_eq!(node.used(), 2 * PODS);
    for ip in [all.first().unwrap(), all.last().unwrap()] {
        assert!(node.host.pings(ip), "{ip}");
    }
    for i in 0..PODS {
        node.del(&format!("n{i}"));
    }
    node.assert_empty("after 250 pods");
}
