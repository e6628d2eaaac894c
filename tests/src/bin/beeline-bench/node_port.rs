//! Connections and bytes from another host through a node port: against the same pod by its own address, and against the
//! node ports of a node that kube-proxy's rules serve.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::{Context, Result};
use beeline_tests::objects::{endpoint, service, slice_of};
use beeline_tests::{Agent, AgentOptions, Cluster, Node, ObjectDir, OutsideHost, Pod, Process, wait_for};
use clap::Args;
use serde_json::{Value, json};

use crate::figures::{Figures, Target};
use crate::population::{PORT, Population};
use crate::rules::{self, Mode};
use crate::wire::{self, Block};

const NODE_PORT: u16 = 30080;

#[derive(Args, Clone)]
pub(crate) struct Options {
    /// Numbers of services
    #[arg(long, value_delimiter = ',', default_values_t = [1, 1000, 10_000])]
    services: Vec<u32>,
    /// Pairs of blocks to compare
    #[arg(long, default_value_t = 100)]
    pairs: usize,
    /// Connections per block
    #[arg(long, default_value_t = 200)]
    connections: u32,
    /// Megabytes per block
    #[arg(long, default_value_t = 200)]
    megabytes: u32,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            services: vec![1, 1000, 10_000],
            pairs: 100,
            connections: 200,
            megabytes: 200,
        }
    }
}

/// Two nodes with our agent and one with rules, a pod on the last two, and a client.
struct Scene {
    _agents: Vec<Agent>,
    _servers: Vec<Process>,
    pods: [Pod; 2],
    nodes: [Node; 3],
    outside: OutsideHost,
    _cluster: Cluster,
}

impl Scene {
    /// The first node has no pod, the second one has one; the third is nobody's yet, and has one.
    fn new(services: u32) -> Result<Self> {
        let cluster = Cluster::new()?;
        let nodes = [cluster.add_node()?, cluster.add_node()?, cluster.add_node()?];
        let outside = cluster.add_outside_host()?;
        let pods = [nodes[1].add_pod("ours")?, nodes[2].add_pod("theirs")?];
        let servers = pods
            .iter()
            .map(|pod| wire::start_server(pod, cluster.state()))
            .collect::<Result<_>>()?;

        let objects = ObjectDir::new(cluster.state().join("objects"))?;
        objects.put("nodes", &[node_object(&nodes[0]), node_object(&nodes[1])])?;
        objects.put("web", &node_port_service(&nodes[1], &pods[0]))?;
        let population = Population {
            services,
            endpoints: 1,
        };
        let others: Vec<Value> = population.objects().skip(1).flat_map(|(a, b)| [a, b]).collect();
        objects.put("others", &others)?;
        let options = population.room(AgentOptions::dir(objects.path()));
        let agents = nodes[..2]
            .iter()
            .map(|node| Agent::start_synced(node, &options))
            .collect::<Result<_>>()?;
        Ok(Self {
            _agents: agents,
            _servers: servers,
            pods,
            nodes,
            outside,
            _cluster: cluster,
        })
    }

    fn node_port(&self, node: usize) -> SocketAddr {
        SocketAddr::new(self.nodes[node].v4().into(), NODE_PORT)
    }

    /// Waits until it answers: an agent learns of devices after its first sync.
    fn wait_served(&self, target: SocketAddr) -> Result<()> {
        let what = format!("{target} to answer");
        wait_for(&what, Duration::from_secs(20), || {
            wire::measure(self.outside.place(), target, target, 1, Block::Connections(1)).map(Some)
        })
        .map(drop)
    }
}

fn node_object(node: &Node) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Node",
        "metadata": {"name": node.name()},
        "spec": {"podCIDRs": node.pod_cidrs()},
        "status": {"addresses": [{"type": "InternalIP", "address": node.v4().to_string()}]},
    })
}

fn node_port_service(node: &Node, pod: &Pod) -> [Value; 2] {
    let mut object = service("web", &["10.96.0.10"]);
    object["spec"]["type"] = "NodePort".into();
    object["spec"]["ports"][0]["nodePort"] = NODE_PORT.into();
    let mut end = endpoint(&pod.v4().to_string());
    end["nodeName"] = node.name().into();
    [object, slice_of("web", "v4", "IPv4", &[end])]
}

pub(crate) fn run(options: &Options, figures: &mut Figures) -> Result<()> {
    for &services in &options.services {
        figures.progress(&format!("node port: {services} services"));
        let scene = Scene::new(services)?;
        let client = scene.outside.place();
        let direct = |pod: &Pod| SocketAddr::new(pod.v4().into(), PORT);
        let connections = Block::Connections(options.connections);
        for (node, what) in [(1, "pod of this node"), (0, "pod of another node")] {
            let target = scene.node_port(node);
            scene.wait_served(target)?;
            let name = format!("node port/{services} services/{what}");
            let pairs = wire::measure(client, direct(&scene.pods[0]), target, options.pairs, connections)?;
            pairs.report(figures, &name, ["direct", "node port"], connections, Target::None);
            let bytes = Block::Megabytes(options.megabytes);
            let pairs = wire::measure(
                client,
                direct(&scene.pods[0]),
                target,
                options.pairs / 10 + 1,
                bytes,
            )?;
            pairs.report(figures, &name, ["direct", "node port"], bytes, Target::None);
        }
        for mode in [Mode::Nftables, Mode::Iptables] {
            figures.progress(&format!(
                "node port: {services} services, {} beside it",
                mode.name()
            ));
            rules::write(mode, &scene.nodes[2], services, NODE_PORT, direct(&scene.pods[1]))
                .with_context(|| format!("cannot write the rules of {services} services"))?;
            let theirs = scene.node_port(2);
            scene.wait_served(theirs)?;
            let pairs = wire::measure(client, theirs, scene.node_port(1), options.pairs, connections)?;
            let name = format!("node port/{services} services/pod of this node");
            pairs.report(figures, &name, [mode.name(), "ours"], connections, Target::None);
            // for the next mode
            scene.nodes[2].host().output("nft", &["flush", "ruleset"])?;
        }
    }
    Ok(())
}
