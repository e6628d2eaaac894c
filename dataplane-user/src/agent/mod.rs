//! The node daemon: sources in, the kernel's maps out, servers for those who ask.

mod accounts;
pub mod health;
pub mod http;
pub mod metrics;
mod process;
pub mod state;
pub mod view;

use std::fs::{self, File};
use std::io::{Read, Seek, Write};
use std::net::IpAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use dataplane_common::abi::ABI_VERSION;
use dataplane_model::program::{Maps, Programmer};
use jiff::Timestamp;
use nix::fcntl::{Flock, FlockArg};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;
use tracing::{debug, error, info, warn};

use crate::config::{AgentConfig, SourceConfig, Unusable};
use crate::devices::{self, Devices};
use crate::kernel::{self, Kernel};
use crate::nodeaddr;
use crate::proxyconfig;
use crate::source::{self, Update};
use health::Health;
use http::Request;
use state::{Shared, State};

/// Name of the local socket in the state directory.
pub const SOCKET: &str = "agent.sock";
/// Name of the lock in the state directory.
const LOCK: &str = "agent.lock";

/// How long the addresses of the Node object are waited for, kube-proxy's.
const NODE_ADDRESS_WAIT: Duration = Duration::from_secs(30);
/// Pause before maps that could not be repaired are looked at again.
const REPAIR: Duration = Duration::from_secs(60);
/// Updates that a source may be ahead of the loop.
const QUEUE: usize = 1024;
/// First and longest pause before what failed is tried again.
const RETRY: (Duration, Duration) = (Duration::from_millis(500), Duration::from_secs(30));

/// Runs the agent until it is told to stop. What it programmed stays.
///
/// # Errors
///
/// If it cannot start, or its source ends for good.
pub async fn run(config: AgentConfig) -> anyhow::Result<()> {
    fs::create_dir_all(&config.state_dir)
        .with_context(|| format!("create state directory {}", config.state_dir.display()))?;
    let _lock = lock(&config.state_dir)?;
    let bpffs_root = match &config.bpffs_root {
        Some(path) => path.clone(),
        None => kernel::mounts::discover_or_mount_bpffs()?.join("beeline"),
    };
    let cgroup_root = match &config.cgroup_root {
        Some(path) => path.clone(),
        None => kernel::mounts::discover_cgroup2()?,
    };
    let kernel_config = kernel::Config {
        bpffs_root,
        cgroup_root,
        sizes: config.sizes,
        ebpf_log_level: config.ebpf_log_level,
    };
    let mut kernel = Kernel::open(&kernel_config).context("set up the kernel side")?;
    kernel.forward_logs();
    for warning in &kernel.info().warnings {
        warn!("{warning}");
    }
    let replaced = kernel
        .info()
        .programs
        .iter()
        .filter(|program| program.replaced)
        .count();
    info!(
        version = env!("CARGO_PKG_VERSION"),
        node = config.node_name,
        kernel = kernel.info().kernel_release,
        programs = kernel.info().programs.len(),
        replaced,
        pins = %kernel.info().pin_dir.display(),
        "agent starts"
    );

    if let Some(score) = config.proxy.oom_score_adj
        && let Err(error) = fs::write("/proc/self/oom_score_adj", score.to_string())
    {
        // as kube-proxy: a pod may lack the right
        debug!(score, %error, "oom_score_adj cannot be set");
    }
    devices::configure(&kernel.node_tables()?, &config.proxy);
    let programmer = Programmer::new(kernel.maps()?).context("read back what the maps hold")?;
    let stats = kernel.stats()?;
    let from_api = !matches!(config.source, SourceConfig::Dir(_));
    let mut health = Health::new(!from_api, config.proxy.sync_period());
    health.started(&nodeaddr::usable_families(), Timestamp::now());
    let shared = Shared::new(health);
    let state = State::new(&config.node_name, programmer, Arc::clone(&shared));

    let (updates, update_queue) = mpsc::channel(QUEUE);
    let (requests, request_queue) = mpsc::channel(16);
    let reader = kernel.counter_reader();
    let context = http::Context {
        shared,
        counters: Arc::new(move || reader.read().unwrap_or_default()),
        config: Arc::new(config.configz()),
        requests,
    };
    let socket = config.state_dir.join(SOCKET);
    let listener = http::bind_socket(&socket).with_context(|| format!("listen on {}", socket.display()))?;
    let admin = http::admin_router(context.clone());
    tokio::spawn(async move { axum::serve(listener, admin).await });
    tokio::spawn(keep_node_addresses(
        address_settings(&config),
        state.node_addresses(),
        kernel.node_tables().context("open the node's tables")?,
    ));
    let device_settings = devices::Settings {
        wanted: config.devices.clone(),
        state_dir: config.state_dir.clone(),
    };
    let devices = Devices::new(device_settings, kernel.nic(), kernel.device_table()?);
    tokio::spawn(devices.follow(state.node_addresses()));

    let (fatal, fatal_errors) = mpsc::channel(4);
    let servers = [
        (
            "health",
            config.healthz_bind_address,
            http::health_router(context.clone()),
        ),
        (
            "metrics",
            config.metrics_bind_address,
            http::metrics_router(context),
        ),
    ];
    for (name, addr, router) in servers {
        let Some(addr) = addr else { continue };
        let (fatal, hard_fail) = (fatal.clone(), config.proxy.bind_address_hard_fail);
        tokio::spawn(async move {
            if let Err(error) = http::serve(name, addr, router, hard_fail).await {
                let error = anyhow::Error::new(error).context(format!("{name} server at {addr}"));
                let _stopping = fatal.send(error).await;
            }
        });
    }
    if let Some((path, text)) = config.config_file.clone() {
        let fatal = fatal.clone();
        tokio::spawn(async move {
            let error = match proxyconfig::changed(path.clone(), text).await {
                Ok(()) => anyhow::anyhow!(
                    "{} has changed: the agent ends, so that it is started again with what it says now",
                    path.display()
                ),
                Err(error) => anyhow::Error::new(error).context(format!("watch {}", path.display())),
            };
            let _stopping = fatal.send(error).await;
        });
    }

    let source = start_source(&config, updates).await?;
    let base = base_status(&config, &kernel);
    let counters = kernel.counter_reader();
    let answer = move |state: &State<kernel::RealMaps>, request: Request| match request {
        Request::Services(sender) => {
            let services = state.services(|id| stats.get(id));
            let _unheard = sender.send(view::Services { services });
        }
        Request::Status(sender) => {
            let mut status = base.clone();
            state.fill_status(&mut status);
            let read = counters.read().unwrap_or_default();
            status.counters = read
                .into_iter()
                .map(|(name, value)| (name.into(), value))
                .collect();
            let _unheard = sender.send(status);
        }
    };
    let inputs = Inputs {
        updates: update_queue,
        requests: request_queue,
        source,
        fatal: fatal_errors,
        audit_period: config.audit_period,
    };
    let result = drive(state, inputs, answer).await;
    drop(fatal);
    let _gone = fs::remove_file(&socket);
    info!("agent stops; what it programmed stays in force");
    result
}

/// One agent per state directory.
fn lock(state_dir: &Path) -> anyhow::Result<Flock<File>> {
    let path = state_dir.join(LOCK);
    let mut file = File::options()
        .create(true)
        .truncate(false)
        .read(true)
        .write(true)
        .open(&path)
        .with_context(|| format!("open {}", path.display()))?;
    let mut pid = String::new();
    file.read_to_string(&mut pid)
        .with_context(|| format!("read {}", path.display()))?;
    let mut file = Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|(_, errno)| {
        anyhow::anyhow!(
            "state directory {} is in use by the agent with pid {} ({errno})",
            state_dir.display(),
            pid.trim()
        )
    })?;
    file.set_len(0)?;
    file.rewind()?;
    writeln!(file, "{}", std::process::id())?;
    Ok(file)
}

/// For `beeline cleanup`.
///
/// # Errors
///
/// If an agent runs with this state directory: it would go on with maps that nobody reads.
pub fn check_stopped(state_dir: &Path) -> anyhow::Result<()> {
    if state_dir.join(LOCK).exists() {
        lock(state_dir).map(drop).context("stop it first")
    } else {
        Ok(())
    }
}

/// Removes the agent's files, and the directory if nothing else is in it. Gives what was removed.
///
/// # Errors
///
/// If a file cannot be removed.
pub fn remove_state(state_dir: &Path) -> anyhow::Result<Vec<String>> {
    let mut removed = Vec::new();
    if devices::release_ports(state_dir).context("undo the reservation of ports")? {
        removed.push("reservation of ports for masquerading".into());
    }
    for name in [SOCKET, LOCK] {
        let path = state_dir.join(name);
        match fs::remove_file(&path) {
            Ok(()) => removed.push(path.display().to_string()),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => return Err(error).with_context(|| format!("remove {}", path.display())),
        }
    }
    if fs::remove_dir(state_dir).is_ok() {
        removed.push(state_dir.display().to_string());
    }
    Ok(removed)
}

type SourceTask = tokio::task::JoinHandle<anyhow::Result<()>>;

async fn start_source(config: &AgentConfig, updates: source::Sender) -> anyhow::Result<SourceTask> {
    let mut client = match &config.source {
        SourceConfig::Dir(dir) => {
            let dir = dir.clone();
            return Ok(tokio::spawn(async move {
                let context = format!("watch directory {}", dir.display());
                source::dir::run(dir, updates).await.context(context)
            }));
        }
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
    let client = kube::Client::try_from(client).context("set up the API client")?;
    let node_name = config.node_name.clone();
    Ok(tokio::spawn(async move {
        source::kube::run(client, node_name, updates).await;
        Ok(())
    }))
}

fn base_status(config: &AgentConfig, kernel: &Kernel) -> view::Status {
    let info = kernel.info();
    view::Status {
        node: config.node_name.clone(),
        mode: "ebpf".into(),
        version: env!("CARGO_PKG_VERSION").into(),
        abi: ABI_VERSION,
        pid: std::process::id(),
        kernel: info.kernel_release.clone(),
        features: info
            .features
            .iter()
            .map(|&(name, available)| view::FeatureView {
                name: name.into(),
                available,
            })
            .collect(),
        programs: info
            .programs
            .iter()
            .chain(&info.packet_programs)
            .map(|program| view::ProgramView {
                name: program.name.clone(),
                id: program.id,
                verified_instructions: program.verified_instructions,
                replaced: program.replaced,
            })
            .collect(),
        cgroup_root: info.cgroup_root.display().to_string(),
        pin_dir: info.pin_dir.display().to_string(),
        warnings: info.warnings.clone(),
        ..view::Status::default()
    }
}

/// A period, up to a tenth more or less, so that the nodes of a cluster do not work at the same time.
fn jittered(period: Duration) -> Duration {
    period.mul_f64(rand::random_range(0.9..1.1))
}

fn address_settings(config: &AgentConfig) -> nodeaddr::Settings {
    let bind_address: Option<IpAddr> = config.proxy.bind_address.parse().ok();
    nodeaddr::Settings {
        bind_address: bind_address.filter(|ip| !ip.is_unspecified()),
        node_port_addresses: nodeaddr::NodePortAddresses::parse(&config.proxy.node_port_addresses),
        wait: match config.source {
            // files may never tell of a Node
            SourceConfig::Dir(_) => Duration::from_secs(1),
            _ => NODE_ADDRESS_WAIT,
        },
    }
}

/// Keeps the kernel's table of this node's addresses in step with the host and with the Node object. Until the Node is
/// known, or the wait for it is over, the table stays as an earlier agent left it.
async fn keep_node_addresses(
    settings: nodeaddr::Settings,
    node: watch::Receiver<Option<Vec<IpAddr>>>,
    mut tables: kernel::NodeTables,
) {
    let mut addresses = match nodeaddr::watch(settings, node).await {
        Ok(addresses) => addresses,
        Err(error) => {
            error!(%error, "the addresses of this host cannot be read: NodePorts are served where they were before");
            return;
        }
    };
    loop {
        let flags = addresses.borrow_and_update().flags();
        if let Err(error) = tables.set_addrs(&flags) {
            error!(%error, "the addresses of this node cannot be written");
        }
        if addresses.changed().await.is_err() {
            return;
        }
    }
}

/// What the loop listens to.
struct Inputs {
    updates: mpsc::Receiver<Update>,
    requests: mpsc::Receiver<Request>,
    source: SourceTask,
    /// Why the agent must end.
    fatal: mpsc::Receiver<anyhow::Error>,
    /// Zero: never.
    audit_period: Duration,
}

/// The loop. Updates are taken in as many as there are, then programmed together.
async fn drive<M: Maps>(
    mut state: State<M>,
    inputs: Inputs,
    mut answer: impl FnMut(&State<M>, Request),
) -> anyhow::Result<()> {
    let Inputs {
        mut updates,
        mut requests,
        mut source,
        mut fatal,
        audit_period,
    } = inputs;
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut batch = Vec::new();
    let mut pause = RETRY.0;
    // A point in time: a pause would begin again with every update, and on a busy node never end.
    let mut retry_at = None;
    let mut audit_at = Instant::now() + jittered(audit_period);
    loop {
        if state.wants_retry() {
            retry_at.get_or_insert_with(|| Instant::now() + pause);
        } else {
            retry_at = None;
            pause = RETRY.0;
        }
        let release = state
            .next_release()
            .map(|at| Duration::from_millis(at.saturating_sub(state.now_ms())));
        let ready = state.ready_in();
        tokio::select! {
            biased;
            _ = terminate.recv() => return Ok(()),
            _ = interrupt.recv() => return Ok(()),
            Some(error) = fatal.recv() => return Err(error),
            ended = &mut source => return ended.context("the source failed")?,
            // before the updates, which may always be ready
            () = tokio::time::sleep_until(retry_at.unwrap_or_else(Instant::now)), if retry_at.is_some() => {
                retry_at = None;
                pause = (pause * 2).min(RETRY.1);
                state.retry();
            }
            () = tokio::time::sleep_until(audit_at), if !audit_period.is_zero() => {
                let period = if state.audit() { audit_period } else { audit_period.min(REPAIR) };
                audit_at = Instant::now() + jittered(period);
            }
            () = tokio::time::sleep(release.unwrap_or_default()), if release.is_some() => state.release(),
            Some(request) = requests.recv() => answer(&state, request),
            n = updates.recv_many(&mut batch, QUEUE), if !updates.is_closed() || !updates.is_empty() => {
                if n > 0 {
                    let listed = batch.iter().any(|update| matches!(update, Update::Listed(_)));
                    for update in batch.drain(..) {
                        state.take(update);
                    }
                    state.sync();
                    if listed {
                        give_memory_back();
                    }
                }
            }
            () = tokio::time::sleep(ready.unwrap_or_default()), if ready.is_some() => state.sync(),
        }
    }
}

/// A list passes through many times the memory that is kept of it; the allocator would hold on to that.
fn give_memory_back() {
    #[cfg(target_env = "gnu")]
    // SAFETY: the call only releases pages that the allocator does not use; it has no preconditions.
    unsafe {
        libc::malloc_trim(0);
    }
}

#[cfg(test)]
mod tests {
    use dataplane_model::program::{FakeMaps, FaultyMaps};
    use tokio::sync::oneshot;

    use super::*;
    use crate::source::Kind;

    fn inputs(
        updates: mpsc::Receiver<Update>,
        requests: mpsc::Receiver<Request>,
        audit_period: Duration,
    ) -> (Inputs, mpsc::Sender<anyhow::Error>) {
        let (sender, fatal) = mpsc::channel(1);
        let inputs = Inputs {
            updates,
            requests,
            source: tokio::spawn(std::future::pending()),
            fatal,
            audit_period,
        };
        (inputs, sender)
    }

    #[tokio::test]
    async fn a_fatal_error_ends_the_agent() {
        let capacity = state::tests::capacity(8);
        let programmer = Programmer::new(FakeMaps::new(capacity)).unwrap();
        let state = State::new("n", programmer, Shared::new(Health::for_tests()));
        let (_updates, update_queue) = mpsc::channel(QUEUE);
        let (_requests, request_queue) = mpsc::channel(16);
        let (inputs, fatal) = inputs(update_queue, request_queue, Duration::ZERO);
        fatal.send(anyhow::anyhow!("the file has changed")).await.unwrap();
        let error = drive(state, inputs, |_, _| {}).await.unwrap_err();
        assert_eq!(error.to_string(), "the file has changed");
    }

    #[tokio::test]
    async fn what_failed_is_tried_again_while_the_agent_is_busy() {
        let capacity = state::tests::capacity(8);
        let programmer = Programmer::new(FaultyMaps::new(FakeMaps::new(capacity), u32::MAX, 1)).unwrap();
        let shared = Shared::new(Health::for_tests());
        let state = State::new("n", programmer, Arc::clone(&shared));
        let (updates, update_queue) = mpsc::channel(QUEUE);
        let (requests, request_queue) = mpsc::channel(16);
        let (inputs, _fatal) = inputs(update_queue, request_queue, Duration::ZERO);
        let answer = |state: &State<_>, request: Request| {
            if let Request::Status(sender) = request {
                let mut status = view::Status::default();
                state.fill_status(&mut status);
                sender.send(status).unwrap();
            }
        };
        let client = async {
            for event in state::tests::web() {
                updates.send(Update::Event(event)).await.unwrap();
            }
            for kind in [Kind::Service, Kind::EndpointSlice, Kind::Node] {
                updates.send(Update::Listed(kind)).await.unwrap();
            }
            let errors = || {
                let text = shared.metrics.text(&[]);
                let lines = text
                    .lines()
                    .filter(|l| l.starts_with("beeline_program_errors_total"));
                lines
                    .filter_map(|line| line.rsplit(' ').next()?.parse::<u32>().ok())
                    .sum::<u32>()
            };
            let begun = Instant::now();
            // every question comes well before the pause is over
            while errors() < 3 {
                assert!(begun.elapsed() < RETRY.0 * 10, "{} errors only", errors());
                let (sender, receiver) = oneshot::channel();
                requests.send(Request::Status(sender)).await.unwrap();
                receiver.await.unwrap();
                tokio::time::sleep(RETRY.0 / 10).await;
            }
        };
        tokio::select! {
            result = drive(state, inputs, answer) => panic!("{result:?}"),
            () = client => {}
        }
    }

    #[tokio::test]
    async fn the_maps_are_compared_again_and_again() {
        let capacity = state::tests::capacity(8);
        let programmer = Programmer::new(FakeMaps::new(capacity)).unwrap();
        let shared = Shared::new(Health::for_tests());
        let state = State::new("n", programmer, Arc::clone(&shared));
        let (updates, update_queue) = mpsc::channel(QUEUE);
        let (_requests, request_queue) = mpsc::channel(16);
        let (inputs, _fatal) = inputs(update_queue, request_queue, Duration::from_millis(20));
        for kind in [Kind::Service, Kind::EndpointSlice, Kind::Node] {
            updates.send(Update::Listed(kind)).await.unwrap();
        }
        let drive = drive(state, inputs, |_, _| {});
        let wait = async {
            // the first sync is a full one, too
            let series = "kubeproxy_sync_full_proxy_rules_duration_seconds_count{ip_family=\"IPv4\"} ";
            let syncs = || {
                let text = shared.metrics.text(&[]);
                let value = text
                    .lines()
                    .find_map(|line| line.strip_prefix(series)?.parse::<u32>().ok());
                value.unwrap_or(0)
            };
            while syncs() < 3 {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::select! {
            result = drive => panic!("{result:?}"),
            result = tokio::time::timeout(Duration::from_secs(10), wait) => result.unwrap(),
        }
    }

    #[test]
    fn one_agent_per_state_directory() {
        let dir = tempfile::tempdir().unwrap();
        let held = lock(dir.path()).unwrap();
        let error = lock(dir.path()).unwrap_err().to_string();
        assert!(error.contains(&format!("pid {}", std::process::id())), "{error}");
        drop(held);
        lock(dir.path()).unwrap();
    }
}
