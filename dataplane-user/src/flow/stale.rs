//! Looks after the sockets that are connected to who serves their service no more, and the datagram flows from other hosts.

use std::collections::HashSet;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use dataplane_common::abi::{BePort, protocol};
use dataplane_model::{BackendKey, Family};
use tokio::sync::mpsc::UnboundedReceiver;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until};
use tracing::{info, warn};

use super::destroy::{Report, Stale, destroy, in_use};
use super::gc::{Left, sweep};
use crate::failure::detector::Verdict;
use crate::failure::probe::probe;
use crate::kernel::{FlowTable, Translations};

/// How long what is due waits for more: a look may go through every process of the node, so many changes share one.
const GATHER: Duration = Duration::from_millis(200);
/// What comes within this time is looked after together: a roll-out changes many slices.
const TOGETHER: Duration = Duration::from_millis(50);
/// A socket may have chosen its backend just before the set changed, and be connected only now: all is done again after this
/// time.
const AGAIN: Duration = Duration::from_millis(500);
/// When a TCP backend that has gone from its service is asked whether it still lives.
const PROBE_AGAIN: Duration = Duration::from_secs(5);

/// Who serves a service no more.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Gone {
    /// Row in `SERVICES`.
    pub service: u32,
    /// The backend.
    pub backend: BackendKey,
    /// Its pod is there, but does not serve: TCP connections to it go on.
    pub listed: bool,
}

/// How sockets are destroyed.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Where the host's `proc` and `run` are.
    pub root: PathBuf,
    /// TCP connections to a backend that has gone and does not answer are closed, too.
    pub tcp: bool,
}

/// What one look for stale sockets and flows of a family has done.
#[derive(Clone, Debug)]
pub struct Done {
    /// Of the backends that serve no more.
    pub family: Family,
    /// How long it took.
    pub took: Duration,
    /// Datagram flows from other hosts that were removed.
    pub flows: usize,
    /// Sockets.
    pub sockets: Report,
}

/// Runs until the sender is gone. UDP sockets lose a backend that serves no more at once; TCP connections only if it has gone
/// from its service and does not answer the node either: one whose pod merely has other labels now keeps them (spec kube-proxy
/// 2.1).
pub async fn keep(
    settings: Settings,
    mut gone: UnboundedReceiver<Vec<Gone>>,
    translations: Translations,
    flows: FlowTable,
    done: impl Fn(&Done) + Send + 'static,
) {
    let translations = Arc::new(translations);
    let flows = Arc::new(flows);
    let mut work: Vec<(Instant, Task)> = Vec::new();
    let mut probes: JoinSet<(Stale, Verdict)> = JoinSet::new();
    loop {
        let next = work.iter().map(|(at, _)| *at + GATHER).min();
        tokio::select! {
            Some(list) = gone.recv() => {
                for gone in list {
                    take(&settings, gone, &mut work);
                }
            }
            Some(probed) = probes.join_next() => match probed {
                Ok((stale, Verdict::Silent)) => {
                    info!(backend = %stale.addr, "backend has gone: its connections are closed");
                    work.push((Instant::now(), Task::Destroy { stale, again: true }));
                }
                Ok(_) => {}
                Err(error) => warn!(%error, "a probe failed"),
            },
            () = sleep_until(next.unwrap_or_else(Instant::now)), if next.is_some() => {
                let now = Instant::now();
                let due: Vec<Task> = work.extract_if(.., |(at, _)| *at <= now).map(|(_, task)| task).collect();
                let (mut stale, mut doubtful) = (HashSet::new(), Vec::new());
                for task in due {
                    match task {
                        Task::Probe(stale) => doubtful.push(stale),
                        Task::Destroy { stale: one, again } => {
                            if again {
                                work.push((now + AGAIN, Task::Destroy { stale: one.clone(), again: false }));
                            }
                            stale.insert(one);
                        }
                    }
                }
                for stale in with_sockets(doubtful, &translations).await {
                    probes.spawn(async move {
                        let verdict = probe(stale.addr).await;
                        (stale, verdict)
                    });
                }
                let (v4, v6): (Vec<Stale>, Vec<Stale>) = stale.into_iter().partition(|stale| stale.addr.is_ipv4());
                for (family, stale) in [(Family::V4, v4), (Family::V6, v6)] {
                    if !stale.is_empty() {
                        look(family, stale, &settings, &translations, &flows, &done).await;
                    }
                }
            }
            else => return,
        }
    }
}

/// Those that sockets are connected to: nobody has to know whether the others live.
async fn with_sockets(stale: Vec<Stale>, translations: &Arc<Translations>) -> Vec<Stale> {
    if stale.is_empty() {
        return stale;
    }
    let translations = Arc::clone(translations);
    match tokio::task::spawn_blocking(move || in_use(&stale, &translations)).await {
        Ok(Ok(used)) => used,
        Ok(Err(error)) => {
            warn!(%error, "connections to backends that have gone cannot be looked for");
            Vec::new()
        }
        Err(error) => {
            warn!(%error, "the search for connections to backends that have gone failed");
            Vec::new()
        }
    }
}

async fn look(
    family: Family,
    stale: Vec<Stale>,
    settings: &Settings,
    translations: &Arc<Translations>,
    flows: &Arc<FlowTable>,
    done: &(impl Fn(&Done) + Send),
) {
    let begun = Instant::now();
    let (root, translations, flows) = (settings.root.clone(), Arc::clone(translations), Arc::clone(flows));
    let work = move || {
        (
            sweep(&flows, &left(&stale)),
            destroy(&root, &stale, &translations),
        )
    };
    match tokio::task::spawn_blocking(work).await {
        Ok((swept, destroyed)) => {
            let flows = swept.unwrap_or_else(|error| {
                warn!(%error, "flows from other hosts keep backends that have gone");
                0
            });
            match destroyed {
                Ok(sockets) => done(&Done {
                    family,
                    took: begun.elapsed(),
                    flows,
                    sockets,
                }),
                Err(error) => warn!(%error, "stale sockets cannot be looked for"),
            }
        }
        Err(error) => warn!(%error, "the search for stale sockets failed"),
    }
}

/// As the packet programs know those whose datagram flows have to go.
fn left(stale: &[Stale]) -> HashSet<Left> {
    let udp = stale.iter().filter(|stale| stale.protocol == protocol::UDP);
    udp.filter_map(|stale| {
        let port = BePort::from_host(stale.addr.port());
        Some((stale.service?, stale.addr.ip().into(), port))
    })
    .collect()
}

#[derive(Clone, Debug)]
enum Task {
    Destroy { stale: Stale, again: bool },
    Probe(Stale),
}

fn take(settings: &Settings, gone: Gone, work: &mut Vec<(Instant, Task)>) {
    let now = Instant::now();
    let stale = Stale {
        addr: std::net::SocketAddr::new(gone.backend.addr.to_ip(), gone.backend.port.to_host()),
        protocol: gone.backend.protocol.number(),
        service: Some(gone.service),
    };
    match stale.protocol {
        protocol::UDP => work.push((now + TOGETHER, Task::Destroy { stale, again: true })),
        protocol::TCP if settings.tcp && !gone.listed => {
            // once at once, for those that are gone already, and once later, for those that are just going
            for after in [TOGETHER, PROBE_AGAIN] {
                work.push((now + after, Task::Probe(stale.clone())));
            }
        }
        _ => {}
    }
}
