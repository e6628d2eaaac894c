//! Brings the control plane up and down.

use std::fs;
use std::future::Future;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context as _, Result};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::backup;
use crate::config::Config;
use crate::controllers::leader::Candidate;
use crate::controllers::{accounts, endpoints, endpointslice, gc, nodes, scheduler, workloads};
use crate::dns;
use crate::pki::{self, Pki};
use crate::resource::Allocator;
use crate::server::{self, Api, Audit, Bootstrap, Doors, Limits, Members, Tokens};
use crate::store::{self, EtcdStore, RedbStore, Store};

/// Serves the API and runs the controllers until `shutdown` completes.
///
/// # Errors
/// When the data directory is unusable or in use by another process, or the address is taken.
pub async fn run(config: Config, shutdown: impl Future<Output = ()>) -> Result<()> {
    let running = ControlPlane::start(config).await?;
    shutdown.await;
    tracing::info!("shutting down");
    running.stop().await;
    Ok(())
}

/// A control plane that serves.
#[derive(Debug)]
pub struct ControlPlane {
    api: Arc<Api>,
    pki: Pki,
    url: String,
    kubeconfig: PathBuf,
    stop: CancellationToken,
    tasks: TaskTracker,
}

impl ControlPlane {
    /// Opens the data directory and serves from it; when this returns the API answers.
    ///
    /// # Errors
    /// When the data directory is unusable or in use by another process, or the address is taken.
    pub async fn start(config: Config) -> Result<Self> {
        let dir = &config.data_dir;
        pki::create_private_dir(dir)?;
        let store: Arc<dyn Store> = if config.etcd.etcd_servers.is_empty() {
            let path = dir.join(backup::STORE);
            let open = tokio::task::spawn_blocking(move || RedbStore::open(&path, store::Options::default()));
            Arc::new(open.await?.context("open the control plane's data")?)
        } else {
            let store = EtcdStore::connect(&config.etcd).await;
            Arc::new(store.context("open the control plane's data")?)
        };
        let shared = store.is_shared();
        let pki = Pki::ensure(&dir.join("pki"), &config.certificate_names())?;
        let tls = pki.server_config()?;
        let listener = TcpListener::bind(config.bind)
            .await
            .with_context(|| format!("listen on {}", config.bind))?;
        let bound = listener.local_addr()?;
        let address = format!("{}:{}", config.host(bound), bound.port());

        let stop = CancellationToken::new();
        let allocator = Allocator::new(config.service_cidrs.clone(), config.node_port_range.clone());
        let (api, remover) = Api::new(
            store,
            allocator,
            (Tokens::new(&pki.tokens)?, pki.clone()),
            address.clone(),
            doors(&config)?,
            stop.clone(),
        )
        .await
        .context("read stored objects")?;
        let dns = match config.dns_bind {
            Some(address) => Some(dns::Sockets::bind(address).await?),
            None => None,
        };
        let dns_at = dns.as_ref().map(dns::Sockets::address).transpose()?;
        let bootstrap = Bootstrap {
            cluster_ip: config.kubernetes_ips().first().copied(),
            advertised: config.advertised_ip(),
            port: bound.port(),
            dns: config.dns_ip().zip(dns_at),
        };
        let silence = Duration::from_secs(config.leader_lease_seconds);
        let mut members = Members::new(bootstrap, silence);
        api.bootstrap(&mut members)
            .await
            .context("create the cluster's own objects")?;

        let url = format!("https://{address}");
        let kubeconfig = config.kubeconfig_path();
        if let Some(parent) = kubeconfig
            .parent()
            .filter(|parent| !parent.as_os_str().is_empty())
        {
            fs::create_dir_all(parent).with_context(|| format!("create directory {}", parent.display()))?;
        }
        // The controllers connect to where we listen, whatever the advertised name means on this machine.
        let own = Config {
            advertise: Vec::new(),
            ..config.clone()
        }
        .host(bound);
        let client = client(&pki.kubeconfig(&format!("https://{own}:{}", bound.port()))).await?;
        pki::write_private(&kubeconfig, &pki.kubeconfig(&url))?;

        let tasks = TaskTracker::new();
        tasks.spawn(server::serve(Arc::clone(&api), listener, tls, stop.clone()));
        tasks.spawn(remover.run(Arc::clone(&api)));
        {
            let (api, interval) = (Arc::clone(&api), Duration::from_secs(config.history_seconds));
            tasks.spawn(async move { api.compact_periodically(interval).await });
        }
        {
            let api = Arc::clone(&api);
            tasks.spawn(async move { api.follow_allocations().await });
        }
        {
            let api = Arc::clone(&api);
            tasks.spawn(async move { api.keep_members(members).await });
        }
        if let Some(sockets) = dns {
            let settings = dns::Settings {
                domain: config.cluster_domain.clone(),
                addresses: config.dns_ip().into_iter().collect(),
                clients: config.cluster_cidrs.clone(),
                upstream: config.dns_upstream.clone(),
            };
            dns::start(sockets, settings, client.clone(), &tasks, &stop)?;
        }
        let controllers = Controllers {
            client: client.clone(),
            ca: pki.ca.clone(),
            cluster_cidrs: config.cluster_cidrs.clone(),
            scheduler: !config.no_scheduler,
        };
        if shared {
            let identity = format!("{address}_{}", uuid::Uuid::new_v4());
            let candidate = Candidate::new(client, identity, silence);
            tasks.spawn(candidate.run(stop.clone(), move |term| {
                let tasks = TaskTracker::new();
                controllers.start(&tasks, &term);
                tasks
            }));
        } else {
            controllers.start(&tasks, &stop);
        }
        tracing::info!(%url, kubeconfig = %kubeconfig.display(), "serving the Kubernetes API");
        Ok(Self {
            api,
            pki,
            url,
            kubeconfig,
            stop,
            tasks,
        })
    }

    /// Where the API is.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// The authority that clients trust and that signs their certificates.
    pub fn pki(&self) -> &Pki {
        &self.pki
    }

    /// The administrator's kubeconfig.
    pub fn kubeconfig(&self) -> &std::path::Path {
        &self.kubeconfig
    }

    /// Forgets all history now: watches and pages that need it end as expired.
    ///
    /// # Errors
    /// When the store fails.
    pub async fn forget_history(&self) -> Result<()> {
        Ok(self.api.forget_history().await?)
    }

    /// Lets requests finish for a few seconds, ends watches, and closes the store.
    pub async fn stop(self) {
        self.stop.cancel();
        self.tasks.close();
        self.tasks.wait().await;
        // Waits for the last writes; the file is free afterwards.
        let api = self.api;
        if tokio::task::spawn_blocking(move || drop(api)).await.is_err() {
            tracing::error!("the store was not closed cleanly");
        }
    }
}

/// What a control plane does besides answering requests, where several share a store only one of them.
struct Controllers {
    client: kube::Client,
    ca: String,
    cluster_cidrs: Vec<ipnet::IpNet>,
    scheduler: bool,
}

impl Controllers {
    /// Starts all of them, until `stop` is cancelled.
    fn start(&self, tasks: &TaskTracker, stop: &CancellationToken) {
        let client = || self.client.clone();
        tasks.spawn(endpointslice::run(client(), stop.clone()));
        tasks.spawn(endpoints::run(client(), stop.clone()));
        tasks.spawn(gc::run(client(), stop.clone()));
        tasks.spawn(workloads::run(client(), stop.clone()));
        tasks.spawn(accounts::run(client(), self.ca.clone(), stop.clone()));
        tasks.spawn(nodes::run(client(), self.cluster_cidrs.clone(), stop.clone()));
        if self.scheduler {
            tasks.spawn(scheduler::run(client(), stop.clone()));
        }
    }
}

fn doors(config: &Config) -> Result<Doors> {
    let open = |path: &PathBuf| Audit::open(path).with_context(|| format!("open {}", path.display()));
    Ok(Doors {
        limits: Limits::new(
            config.max_requests_inflight,
            config.max_mutating_requests_inflight,
            config.max_user_requests_per_second,
        ),
        audit: config.audit_log_path.as_ref().map(open).transpose()?,
    })
}

/// A client of the API for the controllers, which use it as any other client would.
async fn client(kubeconfig: &str) -> Result<kube::Client> {
    let config = kube::config::Kubeconfig::from_yaml(kubeconfig).context("read own kubeconfig")?;
    let options = kube::config::KubeConfigOptions::default();
    let mut config = kube::Config::from_custom_kubeconfig(config, &options)
        .await
        .context("read own kubeconfig")?;
    // Proxies from the environment are not meant for the way to ourselves.
    config.proxy_url = None;
    kube::Client::try_from(config).context("connect to the own API")
}
