//! The pod network as a part of the agent.

use std::sync::Arc;

use anyhow::Context as _;
use tokio::sync::{mpsc, watch};

use super::engine::{Engine, View};
use super::flags::NetworkConfig;
use super::nodes;
use crate::cni;

/// Nodes that the watch may be ahead of the engine.
const QUEUE: usize = 256;

/// The pod network; the CNI plugin is served as long as it lives.
#[derive(Debug)]
pub struct Network {
    /// How things are.
    pub view: watch::Receiver<View>,
    /// What is attached.
    pub service: Arc<cni::Service>,
    _server: cni::Server,
}

/// Starts it. `fatal`: told when it ends for good.
///
/// # Errors
///
/// When the kernel, the state of the CNI plugin or its socket cannot be used.
pub fn start(
    config: NetworkConfig,
    client: kube::Client,
    fatal: mpsc::Sender<anyhow::Error>,
) -> anyhow::Result<Network> {
    let (sender, queue) = mpsc::channel(QUEUE);
    let own = watch::Sender::new(None);
    let (node_name, prefix) = (config.settings.node_name.clone(), config.settings.prefix.clone());
    let settings = config.settings;
    // A thread of its own: a large cluster's routes take long, and Services should not wait for them.
    let (ready, view) = std::sync::mpsc::channel();
    std::thread::Builder::new()
        .name("network".into())
        .spawn(move || {
            let result = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .and_then(|runtime| {
                    runtime.block_on(async {
                        let (engine, view) = Engine::new(settings, queue)?;
                        let _unheard = ready.send(view);
                        engine.run().await
                    })
                });
            if let Err(error) = result {
                let _stopping = fatal.blocking_send(anyhow::Error::new(error).context("the pod network"));
            }
        })?;
    let view = view.recv().context("open netlink for the pod network")?;
    tokio::spawn(nodes::publish(
        client.clone(),
        node_name.clone(),
        prefix,
        view.clone(),
        own.subscribe(),
    ));
    tokio::spawn(nodes::watch(client, node_name, sender, own));
    let dir = config.cni.state_dir.clone();
    // its work on devices waits for the kernel in a runtime of its own, which this thread cannot have
    let (cni, network) = (config.cni, view.clone());
    let opened = std::thread::spawn(move || cni::Service::open(cni, network)).join();
    let service = opened
        .map_err(|_| anyhow::anyhow!("the thread that reads them panicked"))
        .and_then(|opened| Ok(opened?))
        .with_context(|| format!("read attachments of pods below {}", dir.display()))?;
    let service = Arc::new(service);
    let server = cni::Server::start(&config.socket, Arc::clone(&service))
        .with_context(|| format!("listen on {}", config.socket.display()))?;
    Ok(Network {
        view,
        service,
        _server: server,
    })
}
