//! The node daemon: sources in, the kernel's maps out, servers for those who ask.

mod accounts;
mod connect;
mod conntrack;
mod drive;
pub mod events;
pub mod health;
pub mod http;
pub mod listing;
pub mod metrics;
pub mod node;
mod problems;
mod process;
pub mod rest;
mod shared;
pub mod slis;
pub mod state;
mod statedir;
pub mod view;
pub mod zpages;

use std::collections::HashMap;
use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use dataplane_common::abi::{ABI_VERSION, map_name};
use dataplane_model::program::Programmer;
use jiff::Timestamp;
use tokio::sync::{mpsc, watch};
use tracing::{debug, info, warn};

use crate::cni;
use crate::config::{AgentConfig, SourceConfig};
use crate::devices::{self, Devices};
use crate::failure;
use crate::flow::{self, gc};
use crate::healthcheck;
use crate::kernel::{self, Kernel};
use crate::nodeaddr;
use crate::overlay;
use crate::proxyconfig;
use crate::serve;
use crate::takeover;
use drive::{Inputs, QUEUE, drive};
use events::Events;
use health::Health;
use http::Request;
use rest::RestClient;
use state::{Shared, State};
pub use statedir::{SOCKET, check_stopped, remove_state};

/// How long events are told before an end.
const LAST_EVENTS: Duration = Duration::from_secs(3);

/// Runs the agent until it is told to stop. What it programmed stays.
///
/// # Errors
///
/// If it cannot start, or its source ends for good.
pub async fn run(config: AgentConfig) -> anyhow::Result<()> {
    fs::create_dir_all(&config.state_dir)
        .with_context(|| format!("create state directory {}", config.state_dir.display()))?;
    let _lock = statedir::lock(&config.state_dir)?;
    if let Err(error) = serve::raise_file_limit() {
        debug!(%error, "the limit of open files stays as it is");
    }
    let rest = RestClient::default();
    let client = connect::client(&config, &rest).await?;
    let events = Events::new(client.clone(), &config.node_name);
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
    let tracking = set_connection_tracking(&config);
    let programmer = Programmer::new(kernel.maps()?).context("read back what the maps hold")?;
    let stats = kernel.stats()?;
    let from_api = !matches!(config.source, SourceConfig::Dir(_));
    let mut health = Health::new(!from_api, config.proxy.sync_period());
    health.started(&nodeaddr::usable_families(), Timestamp::now());
    let shared = Shared::with_api(health, &rest);
    let mut state = State::new(
        &config.node_name,
        config.settings,
        programmer,
        Arc::clone(&shared),
    );

    let take_over = takeover::Settings {
        wanted: config.take_over,
        mark: config.proxy.masquerade_mark(),
    };
    let tables = kernel.node_tables().context("open the node's tables")?;
    if let Some(task) = takeover::prepare(take_over, tables) {
        tokio::spawn(takeover::run(task, shared.programmed.subscribe()));
    }

    let (updates, update_queue) = mpsc::channel(QUEUE);
    let (requests, request_queue) = mpsc::channel(16);
    let reader = kernel.counter_reader();
    let context = http::Context {
        shared: Arc::clone(&shared),
        counters: Arc::new(move || reader.read().unwrap_or_default()),
        config: Arc::new(config.configz()),
        verbosity: config.proxy.enable_profiling.then(|| config.log_control.clone()),
        pages: Arc::new(zpages::ZPages::new(config.flags.clone())),
        slis: Arc::default(),
        requests,
        nodes: Arc::default(),
    };
    let nodes = Arc::clone(&context.nodes);
    let socket = config.state_dir.join(SOCKET);
    let listener = http::bind_socket(&socket).with_context(|| format!("listen on {}", socket.display()))?;
    let admin = http::admin_router(context.clone());
    tokio::spawn(async move { axum::serve(listener, admin).await });
    let health_checks_at = watch::Sender::default();
    tokio::spawn(healthcheck::serve(
        state.health_checks(),
        health_checks_at.subscribe(),
        {
            let shared = Arc::clone(&shared);
            Arc::new(move || shared.health().healthy(std::time::Instant::now()))
        },
        {
            let events = events.clone();
            Box::new(move |namespace, name, why| events.health_check_failed(namespace, name, why))
        },
    ));
    tokio::spawn(node::keep(
        config.proxy.clone(),
        node::address_settings(&config),
        state.node_addresses(),
        state.ranges(),
        health_checks_at,
        shared.programmed.clone(),
        kernel.node_tables().context("open the node's tables")?,
    ));
    let device_settings = devices::Settings {
        wanted: config.devices.clone(),
        local: devices::DetectLocal::new(&config.proxy),
        state_dir: config.state_dir.clone(),
    };
    let devices = Devices::new(device_settings, kernel.nic(), kernel.device_table()?);
    let new_devices = devices.handle();
    let programmed = shared.programmed.clone();
    let served = move |served| {
        programmed
            .send_if_modified(|programmed| std::mem::replace(&mut programmed.devices, served) != served);
    };
    tokio::spawn(devices.follow(state.node_addresses(), state.ranges(), served));
    tokio::spawn(collect_flows(&config, &kernel, &shared, events.clone())?);

    let tables = kernel.node_tables()?;
    tokio::spawn(async move {
        if let Err(error) = flow::sources::keep(Path::new("/"), tables).await {
            warn!(%error, "source ranges do not hold for sockets");
        }
    });
    tokio::spawn(flow::sweep::keep("/".into(), kernel.translations()?));
    let counted = Arc::clone(&shared);
    tokio::spawn(flow::stale::keep(
        flow::stale::Settings {
            root: "/".into(),
            tcp: config.close_tcp,
        },
        state.gone(),
        kernel.translations()?,
        kernel.flows()?,
        move |done| counted.metrics.stale(done),
    ));
    let (suspects, suspected) = watch::channel(Vec::new());
    let (probing, probed) = watch::channel(HashMap::new());
    tokio::spawn(failure::run(
        kernel.events().context("open the events of the programs")?,
        kernel.backends()?,
        failure::Findings { suspects, probing },
        metrics::Failures(Arc::clone(&shared)),
    ));

    let (fatal, fatal_errors) = mpsc::channel(4);
    let servers = [
        (
            "health",
            "FailedToStartProxierHealthcheck",
            config.healthz_bind_address,
            http::health_router(context.clone()),
        ),
        (
            "metrics",
            "FailedToStartMetricServer",
            config.metrics_bind_address,
            http::metrics_router(context),
        ),
    ];
    for (name, reason, addr, router) in servers {
        let Some(addr) = addr else { continue };
        let (fatal, hard_fail) = (fatal.clone(), config.proxy.bind_address_hard_fail);
        let events = events.clone();
        tokio::spawn(async move {
            if let Err(error) = http::serve(name, addr, router, hard_fail).await {
                let error = anyhow::Error::new(error).context(format!("{name} server at {addr}"));
                events.server_failed(reason, &format!("{error:#}"));
                events.flush(LAST_EVENTS).await;
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

    if let Some(network) = config.network.clone() {
        let tables = (kernel.masquerade_table()?, kernel.pod_table()?);
        let reports = overlay::run::Reports {
            events: events.clone(),
            shared: Arc::clone(&shared),
        };
        let (client, updates, fatal) = (client.clone(), updates.clone(), fatal.clone());
        tokio::spawn(async move {
            let started =
                overlay::run::start(network, client, tables, new_devices, reports, fatal.clone()).await;
            match started {
                Ok(started) => {
                    let _once = nodes.set(started.nodes.clone());
                    cni::hostports::follow(Arc::clone(&started.service), updates).await;
                }
                Err(error) => {
                    let _stopping = fatal.send(error.context("start the pod network")).await;
                }
            }
        });
    }

    events.starting();
    let source = connect::start_source(&config, client, updates);
    let mut base = base_status(&config, &kernel);
    base.warnings.extend(tracking.warnings);
    let counters = kernel.counter_reader();
    let known = listing::Known {
        stats,
        probing: probed,
    };
    let answer = move |state: &State<kernel::RealMaps>, request: Request| match request {
        Request::Services(sender) => {
            let services = state.services(&known);
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
        suspects: suspected,
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

/// Does only what needs the most rights, as kube-proxy's `--init-only`.
pub fn init_only(config: &AgentConfig) {
    set_connection_tracking(config);
}

/// Collects the flows of the packet programs, with kube-proxy's timeouts where they are set.
fn collect_flows(
    config: &AgentConfig,
    kernel: &Kernel,
    shared: &Arc<Shared>,
    events: Events,
) -> Result<impl Future<Output = ()> + use<>, kernel::KernelError> {
    let maps = vec![
        (map_name::CONNTRACK, kernel.flows()?),
        (map_name::NAT, kernel.masqueraded_flows()?),
    ];
    let shared = Arc::clone(shared);
    let timeouts = gc::Timeouts::new(&config.proxy.conntrack);
    Ok(gc::keep(maps, timeouts, move |map, round, begun| {
        shared.metrics.flows(map, round);
        if begun {
            let note = format!(
                "map {map} holds {} of {} entries: flows are removed before their time (--max-conntrack, --max-nat)",
                round.entries, round.capacity
            );
            warn!("{note}");
            events.flows_crowded(&note);
        }
    }))
}

fn set_connection_tracking(config: &AgentConfig) -> conntrack::Report {
    let report = conntrack::apply(Path::new("/"), &config.proxy.conntrack, conntrack::processors());
    for conntrack::Change { name, before, now } in &report.changes {
        info!(before, now, "connection tracking: {name} set");
    }
    for warning in &report.warnings {
        warn!("{warning}");
    }
    if report.absent {
        debug!("the kernel tracks no connections: there is nothing to set");
    }
    report
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
