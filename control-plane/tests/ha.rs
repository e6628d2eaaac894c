//! Two control planes on one etcd.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test stops where it fails"
)]

mod common;
#[path = "common/etcd.rs"]
mod etcd;

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use beeline_control_plane::config::Config;
use beeline_control_plane::run::ControlPlane;
use beeline_control_plane::store::EtcdOptions;
use common::call;
use etcd::Etcd;
use futures::{StreamExt as _, stream};
use k8s_openapi::api::coordination::v1::Lease;
use k8s_openapi::api::core::v1::{ConfigMap, ServiceAccount};
use kube::api::{Api, WatchEvent, WatchParams};
use kube::config::Kubeconfig;
use kube::{Client, ResourceExt as _};
use serde_json::{Value, json};

const CHILD: &str = "BEELINE_TEST_PLANE";
const MAPS: &str = "/api/v1/namespaces/default/configmaps";
const SERVICES: &str = "/api/v1/namespaces/default/services";

fn config(dir: &Path, etcd: &str, port: u16) -> Config {
    let mut config = Config::new(dir);
    config.bind.set_port(port);
    config.no_scheduler = true;
    config.leader_lease_seconds = 2;
    config.service_cidrs = vec!["10.96.0.0/24".parse().unwrap()];
    config.etcd = EtcdOptions {
        etcd_servers: vec![etcd.to_owned()],
        ..EtcdOptions::default()
    };
    config
}

/// One that pods could reach, if `member` is not 0: at an address that ends with it.
fn config_of(dir: &Path, etcd: &str, port: u16, member: u8) -> Config {
    let mut config = config(dir, etcd, port);
    if member > 0 {
        config.bind.set_ip([127, 0, 0, member].into());
        config.advertise = vec![format!("192.0.2.{member}")];
    }
    config
}

/// Not a test of its own: a control plane in a process that can be killed.
#[tokio::test(flavor = "multi_thread")]
async fn plane_child() {
    let Ok(settings) = std::env::var(CHILD) else {
        return;
    };
    let [dir, etcd, port, member] = settings.split('|').collect::<Vec<_>>()[..] else {
        panic!("{settings}")
    };
    let config = config_of(
        Path::new(dir),
        etcd,
        port.parse().unwrap(),
        member.parse().unwrap(),
    );
    beeline_control_plane::run::run(config, std::future::pending())
        .await
        .unwrap();
}

/// A control plane in a process of its own, killed on drop.
struct Plane {
    child: Child,
    dir: PathBuf,
    /// Where it is for this machine, if its kubeconfig says something else.
    server: Option<String>,
}

impl Drop for Plane {
    fn drop(&mut self) {
        self.kill();
    }
}

impl Plane {
    fn start(dir: PathBuf, etcd: &str) -> Self {
        Self::start_as(dir, etcd, etcd::free_port(), 0)
    }

    fn start_as(dir: PathBuf, etcd: &str, port: u16, member: u8) -> Self {
        let child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "plane_child", "--nocapture", "--test-threads=1"])
            .env(CHILD, format!("{}|{etcd}|{port}|{member}", dir.display()))
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        let server = (member > 0).then(|| format!("https://127.0.0.{member}:{port}"));
        Self { child, dir, server }
    }

    /// A client, as soon as it serves.
    async fn client(&self) -> Client {
        let path = self.dir.join("admin.kubeconfig");
        let ready = async {
            loop {
                if let Ok(mut config) = Kubeconfig::read_from(&path) {
                    if let Some(server) = &self.server {
                        config.clusters[0].cluster.as_mut().unwrap().server = Some(server.clone());
                    }
                    let client = common::client(config).await;
                    let request = http::Request::get("/readyz").body(Vec::new()).unwrap();
                    if client.request_text(request).await.is_ok() {
                        return client;
                    }
                }
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(60), ready)
            .await
            .unwrap()
    }

    fn kill(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

/// Two planes with the same keys, the first of which leads.
async fn planes(dir: &Path, etcd: &Etcd) -> (Plane, Plane, Client, Client) {
    drop(etcd.connect().await);
    let url = etcd.options().etcd_servers.remove(0);
    let a = Plane::start(dir.join("a"), &url);
    let first = a.client().await;
    copy_keys(dir);
    let b = Plane::start(dir.join("b"), &url);
    let second = b.client().await;
    (a, b, first, second)
}

/// The second plane has the keys of the first.
fn copy_keys(dir: &Path) {
    let (from, to) = (dir.join("a/pki"), dir.join("b/pki"));
    std::fs::create_dir_all(&to).unwrap();
    for file in std::fs::read_dir(from).unwrap() {
        let file = file.unwrap();
        std::fs::copy(file.path(), to.join(file.file_name())).unwrap();
    }
}

/// The names of all labelled ConfigMaps that are created after a revision, in order, up to one that is called `end`. When
/// the first plane goes, it is asked of the second where it was.
async fn follow(clients: [Client; 2], mut revision: String) -> Vec<String> {
    let mut seen = Vec::new();
    for client in clients.iter().cycle() {
        let api: Api<ConfigMap> = Api::default_namespaced(client.clone());
        let params = WatchParams::default().labels("app=load");
        let Ok(changes) = api.watch(&params, &revision).await else {
            continue;
        };
        let mut changes = changes.boxed();
        while let Some(Ok(event)) = changes.next().await {
            match event {
                WatchEvent::Added(map) => {
                    revision = map.resource_version().unwrap();
                    seen.push(map.name_any());
                    if map.name_any() == "end" {
                        return seen;
                    }
                }
                WatchEvent::Bookmark(bookmark) => revision = bookmark.metadata.resource_version,
                other => panic!("{other:?}"),
            }
        }
    }
    unreachable!("the cycle does not end")
}

#[tokio::test(flavor = "multi_thread")]
async fn killing_one_under_load_loses_nothing_that_was_acknowledged() {
    const WRITERS: usize = 8;
    const WRITES: usize = 600;
    let dir = tempfile::tempdir().unwrap();
    let etcd = Etcd::start();
    let (mut a, _b, first, second) = planes(dir.path(), &etcd).await;
    let map = |name: &str| json!({"metadata": {"name": name, "labels": {"app": "load"}}});
    let (code, created) = call(
        &first,
        "POST",
        MAPS,
        &json!({"metadata": {"name": "sum"}, "data": {"n": "0"}}),
    )
    .await;
    assert_eq!(code, 201, "{created}");
    let revision = created["metadata"]["resourceVersion"]
        .as_str()
        .unwrap()
        .to_owned();
    let followers: Vec<_> = [[&first, &second], [&second, &first]]
        .map(|clients| tokio::spawn(follow(clients.map(Clone::clone), revision.clone())))
        .into();

    let written = Arc::new(AtomicUsize::new(0));
    let mut writers = Vec::new();
    for writer in 0..WRITERS {
        let (clients, written) = ([first.clone(), second.clone()], Arc::clone(&written));
        writers.push(tokio::spawn(async move {
            let (mut created, mut added, mut unknown) = (BTreeMap::new(), 0_u64, 0_u64);
            for step in 0.. {
                if written.fetch_add(1, Ordering::Relaxed) >= WRITES {
                    break;
                }
                let client = &clients[(writer + step) % 2];
                let name = format!("w{writer}-{step}");
                let send =
                    async |client: &Client, method: &str, path: &str, body: &Value| -> Option<(u16, Value)> {
                        let request = http::Request::builder()
                            .method(method)
                            .uri(path)
                            .header("content-type", "application/json")
                            .body(body.to_string().into_bytes())
                            .unwrap();
                        let answer = client.send(request.map(kube::client::Body::from)).await.ok()?;
                        let code = answer.status().as_u16();
                        let bytes = http_body_util::BodyExt::collect(answer.into_body())
                            .await
                            .ok()?
                            .to_bytes();
                        Some((code, serde_json::from_slice(&bytes).ok()?))
                    };
                if let Some((201, map)) = send(client, "POST", MAPS, &map(&name)).await {
                    created.insert(name, map["metadata"]["resourceVersion"].clone());
                }
                // Reads, adds one and writes what it read: an update that was lost would be missing from the sum.
                let path = format!("{MAPS}/sum");
                let Some((200, mut sum)) = send(client, "GET", &path, &Value::Null).await else {
                    continue;
                };
                let n: u64 = sum["data"]["n"].as_str().unwrap().parse().unwrap();
                sum["data"]["n"] = (n + 1).to_string().into();
                match send(client, "PUT", &path, &sum).await {
                    Some((200, _)) => added += 1,
                    Some((409, _)) => {}
                    // Whether it was done before the plane went is not known.
                    _ => unknown += 1,
                }
            }
            (created, added, unknown)
        }));
    }
    while written.load(Ordering::Relaxed) < WRITES / 3 {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    a.kill();
    let (mut created, mut added, mut unknown) = (BTreeMap::new(), 0, 0);
    for writer in writers {
        let (names, sum, lost) = writer.await.unwrap();
        created.extend(names);
        added += sum;
        unknown += lost;
    }
    assert!(
        created.len() > WRITES / 3 && added > 0,
        "{} created, {added} added",
        created.len()
    );

    let (_, list) = call(
        &second,
        "GET",
        &format!("{MAPS}?labelSelector=app%3Dload"),
        &Value::Null,
    )
    .await;
    let stored: BTreeMap<String, Value> = list["items"]
        .as_array()
        .unwrap()
        .iter()
        .map(|map| {
            (
                map["metadata"]["name"].as_str().unwrap().to_owned(),
                map["metadata"]["resourceVersion"].clone(),
            )
        })
        .collect();
    for (name, revision) in &created {
        assert_eq!(stored.get(name), Some(revision), "{name} was acknowledged");
    }
    let (_, sum) = call(&second, "GET", &format!("{MAPS}/sum"), &Value::Null).await;
    let sum: u64 = sum["data"]["n"].as_str().unwrap().parse().unwrap();
    assert!(
        (added..=added + unknown).contains(&sum),
        "{sum} of {added} and perhaps {unknown}"
    );

    let (code, end) = call(&second, "POST", MAPS, &map("end")).await;
    assert_eq!(code, 201, "{end}");
    for follower in followers {
        let mut seen = tokio::time::timeout(Duration::from_secs(20), follower)
            .await
            .unwrap()
            .unwrap();
        assert_eq!(seen.pop().unwrap(), "end");
        let once: BTreeSet<&String> = seen.iter().collect();
        assert_eq!(once.len(), seen.len(), "something came twice");
        assert!(stored.keys().eq(once), "a watcher missed something");
    }
    // The other one leads now: what controllers do is done.
    let (code, _) = call(
        &second,
        "POST",
        "/api/v1/namespaces",
        &json!({"metadata": {"name": "later"}}),
    )
    .await;
    assert_eq!(code, 201);
    let accounts: Api<ServiceAccount> = Api::namespaced(second.clone(), "later");
    let has = |account: Option<&ServiceAccount>| account.is_some();
    let waiting = kube::runtime::wait::await_condition(accounts, "default", has);
    tokio::time::timeout(Duration::from_secs(20), waiting)
        .await
        .unwrap()
        .unwrap();
    let leases: Api<Lease> = Api::namespaced(second, "kube-system");
    let lease = leases.get("beeline-controllers").await.unwrap().spec.unwrap();
    assert_eq!(lease.lease_transitions, Some(1));
}

#[tokio::test(flavor = "multi_thread")]
async fn pods_find_all_planes_that_live_and_no_other() {
    let dir = tempfile::tempdir().unwrap();
    let etcd = Etcd::start();
    drop(etcd.connect().await);
    let url = etcd.options().etcd_servers.remove(0);
    let port = etcd::free_port();
    let a = Plane::start_as(dir.path().join("a"), &url, port, 1);
    let first = a.client().await;
    let until = async |client: &Client, wanted: &[&str]| {
        let path = "/apis/discovery.k8s.io/v1/namespaces/default/endpointslices/kubernetes";
        let older = "/api/v1/namespaces/default/endpoints/kubernetes";
        let mut last = Vec::new();
        let look = async {
            loop {
                let (_, slice) = call(client, "GET", path, &Value::Null).await;
                let (_, endpoints) = call(client, "GET", older, &Value::Null).await;
                last = slice["endpoints"]
                    .as_array()
                    .into_iter()
                    .flatten()
                    .map(|endpoint| endpoint["addresses"][0].as_str().unwrap().to_owned())
                    .collect();
                let addresses = endpoints["subsets"][0]["addresses"]
                    .as_array()
                    .map_or(0, Vec::len);
                if last == wanted && addresses == wanted.len() {
                    return;
                }
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        };
        let looked = tokio::time::timeout(Duration::from_secs(30), look).await;
        assert!(looked.is_ok(), "{last:?}, not {wanted:?}");
    };
    until(&first, &["192.0.2.1"]).await;
    copy_keys(dir.path());
    let mut b = Plane::start_as(dir.path().join("b"), &url, port, 2);
    let second = b.client().await;
    // Who comes says so at once, and nobody takes that back.
    until(&second, &["192.0.2.1", "192.0.2.2"]).await;
    until(&first, &["192.0.2.1", "192.0.2.2"]).await;
    b.kill();
    until(&first, &["192.0.2.1"]).await;
    let leases = async || {
        let path =
            "/apis/coordination.k8s.io/v1/namespaces/kube-system/leases?labelSelector=beeline.dev/component";
        let (_, leases) = call(&first, "GET", path, &Value::Null).await;
        leases["items"].as_array().unwrap().len()
    };
    assert_eq!(leases().await, 1);
    // One that ends as it should is not waited for.
    let config = config_of(&dir.path().join("b"), &url, port, 2);
    let plane = ControlPlane::start(config).await.unwrap();
    until(&first, &["192.0.2.1", "192.0.2.2"]).await;
    plane.stop().await;
    assert_eq!(leases().await, 1);
    until(&first, &["192.0.2.1"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn no_address_or_port_is_given_out_twice() {
    let dir = tempfile::tempdir().unwrap();
    let etcd = Etcd::start();
    let (_a, _b, first, second) = planes(dir.path(), &etcd).await;
    let create = async |i: usize| {
        let client = if i.is_multiple_of(2) { &first } else { &second };
        let service = json!({
            "metadata": {"name": format!("s{i}")},
            "spec": {"type": "NodePort", "ports": [{"port": 80}]},
        });
        let (code, service) = call(client, "POST", SERVICES, &service).await;
        assert_eq!(code, 201, "{service}");
        (
            service["spec"]["clusterIP"].clone(),
            service["spec"]["ports"][0]["nodePort"].clone(),
        )
    };
    // Most of the range, so that both choose the same ones again and again.
    let given: Vec<(Value, Value)> = stream::iter(0..200)
        .map(create)
        .buffer_unordered(16)
        .collect()
        .await;
    let distinct = |values: Vec<String>| values.into_iter().collect::<BTreeSet<_>>().len();
    assert_eq!(
        distinct(given.iter().map(|(ip, _)| ip.to_string()).collect()),
        200
    );
    assert_eq!(
        distinct(given.iter().map(|(_, port)| port.to_string()).collect()),
        200
    );

    // What one gave out, the other refuses, and has again after it was given back.
    let (_, s0) = call(&first, "GET", &format!("{SERVICES}/s0"), &Value::Null).await;
    let wanted = json!({
        "metadata": {"name": "fixed"},
        "spec": {"clusterIP": s0["spec"]["clusterIP"], "ports": [{"port": 80}]},
    });
    let (code, answer) = call(&second, "POST", SERVICES, &wanted).await;
    assert!(matches!(code, 409 | 422), "{answer}");
    assert_eq!(
        call(&first, "DELETE", &format!("{SERVICES}/s0"), &Value::Null)
            .await
            .0,
        200
    );
    let again = async {
        while call(&second, "POST", SERVICES, &wanted).await.0 != 201 {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(10), again)
        .await
        .unwrap();
}
