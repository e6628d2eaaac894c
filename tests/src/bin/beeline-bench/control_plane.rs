//! The control plane: how soon it serves, lists, writes, tells watchers and gives pods a node, and what it holds of memory.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use futures::{StreamExt as _, TryStreamExt as _, stream};
use k8s_openapi::api::core::v1::{ConfigMap, Node, Pod};
use kube::api::{Api, ListParams, PostParams, WatchEvent, WatchParams};
use kube::{Client, ResourceExt as _};
use serde_json::{Value, json};

use crate::figures::{Figures, Target, quantile};
use crate::memory::resident;

const OBJECTS: usize = 10_000;
/// Requests on their way at the same time.
const PARALLEL: usize = 64;
const WATCHERS: usize = 1000;
const CHANGES: usize = 500;
const NODES: usize = 100;
const PODS: usize = 1000;

/// `beeline control-plane` with a directory of its own. Killed on drop.
struct Plane {
    child: Child,
    dir: tempfile::TempDir,
}

impl Drop for Plane {
    fn drop(&mut self) {
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

fn spawn(dir: &Path) -> Result<Child> {
    let listener = std::net::TcpListener::bind("127.0.0.1:0")?;
    let bind = listener.local_addr()?;
    drop(listener);
    Command::new(beeline_tests::program("beeline")?)
        .args(["control-plane", "--bind", &bind.to_string(), "--data-dir"])
        .arg(dir)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .context("start the control plane")
}

impl Plane {
    fn new() -> Result<Self> {
        let dir = tempfile::tempdir()?;
        Ok(Self {
            child: spawn(dir.path())?,
            dir,
        })
    }

    /// Ends it and starts it again with the same data.
    fn restart(&mut self) -> Result<()> {
        self.child.kill()?;
        self.child.wait()?;
        std::fs::remove_file(self.dir.path().join("admin.kubeconfig"))?;
        self.child = spawn(self.dir.path())?;
        Ok(())
    }

    /// A client, as soon as the API is ready.
    async fn client(&self) -> Result<Client> {
        let path = self.dir.path().join("admin.kubeconfig");
        let deadline = Instant::now() + Duration::from_secs(30);
        loop {
            if let Ok(config) = kube::config::Kubeconfig::read_from(&path) {
                let config = kube::Config::from_custom_kubeconfig(config, &Default::default()).await?;
                let client = Client::try_from(config)?;
                let request = http::Request::get("/readyz").body(Vec::new())?;
                if client.request_text(request).await.is_ok() {
                    return Ok(client);
                }
            }
            ensure!(Instant::now() < deadline, "the control plane does not serve");
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }
}

pub(crate) fn run(figures: &mut Figures) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(measure(figures))
}

async fn measure(figures: &mut Figures) -> Result<()> {
    figures.progress("control plane: start");
    let mut plane = Plane::new()?;
    let client = plane.client().await?;
    let [idle, _] = resident(plane.child.id())?;
    figures.add("control-plane/idle/resident", idle, "MiB", Target::None);

    figures.progress("control plane: 10,000 objects");
    let maps: Api<ConfigMap> = Api::default_namespaced(client.clone());
    let began = Instant::now();
    stream::iter(0..OBJECTS)
        .map(|i| {
            let maps = maps.clone();
            async move {
                maps.create(&PostParams::default(), &map(&format!("m{i}"))?)
                    .await
                    .context("create")
            }
        })
        .buffer_unordered(PARALLEL)
        .try_for_each(async |_| Ok(()))
        .await?;
    let rate = count(OBJECTS) / began.elapsed().as_secs_f64();
    figures.add("control-plane/writes", rate, "1/s", Target::AtLeast(2000.0));
    let mut lists = Vec::new();
    for _ in 0..5 {
        let began = Instant::now();
        let request = http::Request::get("/api/v1/namespaces/default/configmaps").body(Vec::new())?;
        let text = client.request_text(request).await?;
        lists.push(began.elapsed().as_secs_f64() * 1000.0);
        ensure!(text.len() > OBJECTS * 100, "not all objects were listed");
    }
    figures.add(
        "control-plane/list-10k/p50",
        quantile(&mut lists, 0.5),
        "ms",
        Target::AtMost(300.0),
    );

    figures.progress("control plane: start with 10,000 objects");
    let began = Instant::now();
    plane.restart()?;
    let client = plane.client().await?;
    figures.add(
        "control-plane/start",
        began.elapsed().as_secs_f64(),
        "s",
        Target::AtMost(1.0),
    );

    figures.progress("control plane: 1,000 watchers");
    let mut delays = watchers(&client).await?;
    figures.add(
        "control-plane/watch/p50",
        quantile(&mut delays, 0.5),
        "ms",
        Target::None,
    );
    figures.add(
        "control-plane/watch/p99",
        quantile(&mut delays, 0.99),
        "ms",
        Target::AtMost(100.0),
    );

    figures.progress("control plane: 1,000 pods on 100 nodes");
    figures.add(
        "control-plane/schedule-1000",
        schedule(&client).await?,
        "s",
        Target::AtMost(10.0),
    );
    let [busy, _] = resident(plane.child.id())?;
    figures.add("control-plane/busy/resident", busy, "MiB", Target::None);
    Ok(())
}

fn count(number: usize) -> f64 {
    u32::try_from(number).map_or(f64::INFINITY, f64::from)
}

fn object<T: serde::de::DeserializeOwned>(value: Value) -> Result<T> {
    Ok(serde_json::from_value(value)?)
}

fn map(name: &str) -> Result<ConfigMap> {
    object(json!({"metadata": {"name": name}, "data": {"key": "x".repeat(200)}}))
}

/// Milliseconds from each change, of 100 a second, to each of the watchers.
async fn watchers(client: &Client) -> Result<Vec<f64>> {
    let maps: Api<ConfigMap> = Api::namespaced(client.clone(), "kube-public");
    let revision = maps
        .list(&ListParams::default().limit(1))
        .await?
        .metadata
        .resource_version;
    let revision = revision.context("a list without a revision")?;
    let start = Instant::now();
    let (ready, mut waiting) = tokio::sync::mpsc::channel::<()>(WATCHERS);
    let mut tasks = Vec::new();
    for _ in 0..WATCHERS {
        let (maps, revision, ready) = (maps.clone(), revision.clone(), ready.clone());
        tasks.push(tokio::spawn(async move {
            let params = WatchParams::default();
            let mut changes = maps.watch(&params, &revision).await?.boxed();
            ready.send(()).await?;
            let mut arrived = Vec::with_capacity(CHANGES);
            while arrived.len() < CHANGES {
                let event = changes.try_next().await?.context("a watch ended")?;
                if let WatchEvent::Added(map) = event {
                    arrived.push((map.name_any(), start.elapsed()));
                }
            }
            Ok::<_, anyhow::Error>(arrived)
        }));
    }
    for _ in 0..WATCHERS {
        waiting.recv().await.context("a watcher ended")?;
    }
    let mut written: BTreeMap<String, Duration> = BTreeMap::new();
    let mut tick = tokio::time::interval(Duration::from_millis(10));
    for i in 0..CHANGES {
        tick.tick().await;
        let name = format!("c{i}");
        written.insert(name.clone(), start.elapsed());
        maps.create(&PostParams::default(), &map(&name)?).await?;
    }
    let mut delays = Vec::with_capacity(WATCHERS * CHANGES);
    for task in tasks {
        for (name, at) in task.await?? {
            let sent = written.get(&name).context("a change that nobody made")?;
            delays.push(at.saturating_sub(*sent).as_secs_f64() * 1000.0);
        }
    }
    Ok(delays)
}

/// Seconds from the first pod's creation to the last one's node.
async fn schedule(client: &Client) -> Result<f64> {
    let nodes: Api<Node> = Api::all(client.clone());
    for i in 0..NODES {
        let node = object(json!({
            "metadata": {"name": format!("n{i}")},
            "status": {
                "allocatable": {"cpu": "8", "memory": "16Gi", "pods": "110"},
                "conditions": [{"type": "Ready", "status": "True"}],
            },
        }))?;
        nodes.create(&PostParams::default(), &node).await?;
    }
    let pods: Api<Pod> = Api::default_namespaced(client.clone());
    let revision = pods.list(&ListParams::default()).await?.metadata.resource_version;
    let revision = revision.context("a list without a revision")?;
    let began = Instant::now();
    let creating = {
        let pods = pods.clone();
        async move {
            stream::iter(0..PODS)
                .map(|i| {
                    let pods = pods.clone();
                    async move {
                        let pod = object(json!({
                            "metadata": {"name": format!("p{i}")},
                            "spec": {"containers": [{"name": "c", "image": "i", "resources": {"requests": {"cpu": "100m"}}}]},
                        }))?;
                        pods.create(&PostParams::default(), &pod).await.context("create a pod")
                    }
                })
                .buffer_unordered(PARALLEL)
                .try_for_each(async |_| Ok(()))
                .await
        }
    };
    let watching = async {
        let mut changes = pods.watch(&WatchParams::default(), &revision).await?.boxed();
        let mut placed = std::collections::HashSet::new();
        while placed.len() < PODS {
            let event = changes.try_next().await?.context("the watch ended")?;
            if let WatchEvent::Modified(pod) = event
                && pod.spec.as_ref().is_some_and(|spec| spec.node_name.is_some())
            {
                placed.insert(pod.name_any());
            }
        }
        Ok::<_, anyhow::Error>(())
    };
    tokio::try_join!(creating, watching)?;
    Ok(began.elapsed().as_secs_f64())
}
