//! The routes to a large cluster's nodes: from Node objects to the kernel, and the memory that takes.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use beeline_tests::Cluster;
use dataplane_user::overlay::engine::NodeUpdate;
use dataplane_user::overlay::{Engine, NetConf, Settings};
use k8s_openapi::api::core::v1::Node;
use serde_json::json;
use tokio::sync::mpsc;

use crate::figures::{Figures, Target};
use crate::memory;

const NODES: u32 = 5000;
/// Longest wait for them.
const LIMIT: Duration = Duration::from_secs(60);

pub(crate) fn run(figures: &mut Figures) -> Result<()> {
    figures.progress(&format!("nodes: {NODES} of them"));
    let cluster = Cluster::new()?;
    let host = cluster.add_node()?;
    let nodes: Vec<Node> = (0..NODES).map(peer).collect::<Result<_>>()?;
    let [_, before] = memory::resident(std::process::id())?;
    let took = host.host().netns().run(|| program(nodes))??;
    let [_, after] = memory::resident(std::process::id())?;
    let target = Target::AtMost(5.0);
    figures.add(format!("nodes/{NODES}/program"), took.as_secs_f64(), "s", target);
    let target = Target::AtMost(100.0);
    figures.add(format!("nodes/{NODES}/memory"), after - before, "MiB", target);
    Ok(())
}

/// In the network namespace of the calling thread: the time until the kernel has them all.
fn program(nodes: Vec<Node>) -> Result<Duration> {
    let settings = Settings::new(NetConf::parse(r#"{"Network": "10.0.0.0/8"}"#)?, "here");
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(async {
        let (sender, queue) = mpsc::channel(256);
        let (engine, mut view) = Engine::new(settings, queue)?;
        let begun = Instant::now();
        let tell = async {
            let own: Node = serde_json::from_value(json!({
                "metadata": {"name": "here"}, "spec": {"podCIDR": "10.255.0.0/24"},
            }))?;
            sender.send(NodeUpdate::Applied(Box::new(own))).await?;
            let mut names = BTreeSet::from(["here".to_owned()]);
            for node in nodes {
                names.extend(node.metadata.name.clone());
                sender.send(NodeUpdate::Applied(Box::new(node))).await?;
            }
            sender.send(NodeUpdate::Listed(names)).await?;
            tokio::time::timeout(LIMIT, view.wait_for(|view| view.ready))
                .await
                .context("the nodes are not programmed in a minute")??;
            Ok(begun.elapsed())
        };
        tokio::select! {
            took = tell => took,
            ended = engine.run() => bail!("the engine ended: {ended:?}"),
        }
    })
}

fn peer(n: u32) -> Result<Node> {
    let (high, low) = (n / 256, n % 256);
    let annotations: BTreeMap<String, String> = [
        ("kube-subnet-manager", "true".to_owned()),
        ("backend-type", "vxlan".to_owned()),
        (
            "backend-data",
            format!(r#"{{"VNI":1,"VtepMAC":"02:00:00:00:{high:02x}:{low:02x}"}}"#),
        ),
        ("public-ip", format!("172.16.{high}.{low}")),
    ]
    .map(|(key, value)| (format!("flannel.alpha.coreos.com/{key}"), value))
    .into();
    let node = json!({
        "metadata": {"name": format!("peer{n}"), "annotations": annotations},
        "spec": {"podCIDR": format!("10.{high}.{low}.0/24")},
    });
    serde_json::from_value(node).context("a Node object")
}
