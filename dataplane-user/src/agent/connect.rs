//! Reaching what the agent watches.

use anyhow::Context as _;
use kube::client::ClientBuilder;
use tokio::task::JoinHandle;

use super::rest::RestClient;
use crate::config::{AgentConfig, SourceConfig, Unusable};
use crate::source;

/// The task of a source. It ends only by a failure.
pub(super) type SourceTask = JoinHandle<anyhow::Result<()>>;

/// A client of the API that is configured; `None` if there is none. Nothing is asked of the API yet.
pub(super) async fn client(config: &AgentConfig, rest: &RestClient) -> anyhow::Result<Option<kube::Client>> {
    let mut client = match &config.source {
        SourceConfig::Dir(_) => return Ok(None),
        SourceConfig::Kubeconfig(path) => {
            let text = kube::config::Kubeconfig::read_from(path)
                .with_context(|| Unusable(format!("--kubeconfig {}: cannot be read", path.display())))?;
            kube::Config::from_custom_kubeconfig(text, &kube::config::KubeConfigOptions::default())
                .await
                .with_context(|| Unusable(format!("--kubeconfig {}: cannot be used", path.display())))?
        }
        SourceConfig::InCluster => match &config.master {
            Some(master) => kube::Config::new(master.clone()),
            None => kube::Config::incluster().context(Unusable(
                "neither --kubeconfig nor --dir is given, and this is not a pod of a cluster".into(),
            ))?,
        },
    };
    if let Some(master) = &config.master {
        client.cluster_url = master.clone();
    }
    counted(client, rest).context("set up the API client").map(Some)
}

/// A client whose requests are counted.
pub(super) fn counted(config: kube::Config, rest: &RestClient) -> Result<kube::Client, kube::Error> {
    let host = config
        .cluster_url
        .authority()
        .map_or("", |host| host.as_str())
        .to_owned();
    let builder = ClientBuilder::try_from(config)?;
    Ok(builder.with_layer(&rest.layer(&host)).build())
}

/// Begins to watch.
pub(super) fn start_source(
    config: &AgentConfig,
    client: Option<kube::Client>,
    updates: source::Sender,
) -> SourceTask {
    match (&config.source, client) {
        (SourceConfig::Dir(dir), _) => {
            let dir = dir.clone();
            tokio::spawn(async move {
                let context = format!("watch directory {}", dir.display());
                source::dir::run(dir, updates).await.context(context)
            })
        }
        (_, Some(client)) => {
            let node_name = config.node_name.clone();
            tokio::spawn(async move {
                source::kube::run(client, node_name, updates).await;
                Ok(())
            })
        }
        (_, None) => tokio::spawn(async { anyhow::bail!("there is no client of the API") }),
    }
}
