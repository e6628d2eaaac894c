//! Backends that have stopped answering get no new connections until they answer again.
//!
//! The programs in the kernel tell of connections without an answer ([`crate::kernel::Events`]); [`detector`] decides whom to
//! suspect; what comes out is the list of suspects, which the programmer leaves out of sets as far as it may: never more than
//! half of one.

pub mod detector;
pub(crate) mod probe;

use std::collections::{HashMap, HashSet};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use dataplane_common::abi::{Backend, Event, event_kind, protocol};
use nix::time::{ClockId, clock_gettime};
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;
use tokio::time::sleep_until;
use tracing::{debug, error, info};

use crate::kernel::{BackendReader, Events, socket_addr};
use detector::{Detector, Probing, Target, Verdict};

/// Probes at a time: a node with many backends may fail at once.
const PROBES: usize = 128;
/// Failures of this long before the start still count: an earlier agent may have just seen them.
const BEFORE_START: Duration = Duration::from_secs(30);
/// Pause between two looks for rows that have changed hands.
const TIDY: Duration = Duration::from_secs(5);

/// What is told of the work, for metrics.
pub trait Observer: Send + 'static {
    /// A probe has ended.
    fn probed(&self, verdict: Verdict);
    /// A connection's failure has been told.
    fn failed(&self);
    /// So many backends are suspect.
    fn suspects(&self, count: usize);
}

/// Where the results go.
pub struct Findings {
    /// Rows of `BACKENDS`, those first that have been suspect for longest.
    pub suspects: watch::Sender<Vec<u32>>,
    /// Rows that are asked whether they answer; for people.
    pub probing: watch::Sender<HashMap<u32, Probing>>,
}

/// Runs until the events end or nobody wants to know any more.
pub async fn run(mut events: Events, backends: BackendReader, findings: Findings, observer: impl Observer) {
    let mut work = Work {
        detector: Detector::default(),
        backends,
        probes: JoinSet::new(),
        at_once: Arc::new(Semaphore::new(PROBES)),
        findings,
        observer,
    };
    let now = Instant::now();
    for id in work
        .backends
        .failed_since(boot_nanos().saturating_sub(nanos(BEFORE_START)))
    {
        work.failed(id, None, now);
    }
    let mut tidy_at = now + TIDY;
    loop {
        let due = work.detector.next_due().unwrap_or(tidy_at).min(tidy_at);
        let changed = tokio::select! {
            event = events.next() => match event {
                Ok(event) => work.take(&event, Instant::now()),
                Err(error) => {
                    error!(%error, "events of the kernel cannot be read: failures of backends are not seen any more");
                    return;
                }
            },
            Some(Ok((target, verdict))) = work.probes.join_next() => work.probed(target, verdict, Instant::now()),
            () = sleep_until(due.into()) => {
                let now = Instant::now();
                let mut changed = false;
                if now >= tidy_at {
                    tidy_at = now + TIDY;
                    changed = work.forget(now);
                }
                for target in work.detector.due(now) {
                    work.probe(target);
                }
                changed
            }
            () = work.findings.suspects.closed() => return,
        };
        if changed {
            work.publish();
        }
        work.tell();
    }
}

fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

/// The clock of the programs.
fn boot_nanos() -> u64 {
    clock_gettime(ClockId::CLOCK_MONOTONIC).map_or(0, |time| nanos(time.into()))
}

struct Work<O> {
    detector: Detector,
    backends: BackendReader,
    probes: JoinSet<(Target, Verdict)>,
    at_once: Arc<Semaphore>,
    findings: Findings,
    observer: O,
}

impl<O: Observer> Work<O> {
    /// True if the suspects are others now, as with all of these.
    fn take(&mut self, event: &Event, now: Instant) -> bool {
        match event.kind {
            event_kind::CONNECT_TIMEOUT | event_kind::CONNECT_FAILED | event_kind::RETRANSMIT => {
                self.observer.failed();
                self.failed(event.backend, Some(event.generation), now);
                false
            }
            event_kind::ALIVE => self.detector.alive(event.backend, event.generation, now),
            _ => false,
        }
    }

    fn failed(&mut self, id: u32, generation: Option<u32>, now: Instant) {
        let Some(target) = self
            .target(id)
            .filter(|t| generation.is_none_or(|g| g == t.generation))
        else {
            return;
        };
        if self.detector.failed(target, now) {
            debug!(backend = %target.addr, "a connection failed: probing");
            self.probe(target);
        }
    }

    fn target(&self, id: u32) -> Option<Target> {
        let row = self
            .backends
            .row(id)
            .filter(|row| row.protocol == protocol::TCP)?;
        Some(Target {
            id,
            generation: row.generation,
            addr: socket_addr(&row),
        })
    }

    fn probe(&mut self, target: Target) {
        let at_once = Arc::clone(&self.at_once);
        self.probes.spawn(async move {
            // the semaphore is never closed
            let _turn = at_once.acquire().await;
            (target, probe::probe(target.addr).await)
        });
    }

    fn probed(&mut self, target: Target, verdict: Verdict, now: Instant) -> bool {
        self.observer.probed(verdict);
        let changed = self.detector.probed(target, verdict, now);
        if !changed {
            return false;
        }
        let suspect = self.detector.suspects().iter().any(|(t, _)| *t == target);
        if suspect {
            info!(backend = %target.addr, verdict = verdict.name(), "backend does not answer: no new connections to it");
            if verdict == Verdict::Silent {
                // what else is at a silent address has probably gone with it
                for id in self.at(target.addr.ip(), |row| row.protocol == protocol::TCP) {
                    self.failed(id, None, now);
                }
            }
        } else {
            info!(backend = %target.addr, "backend gets new connections again");
        }
        true
    }

    fn forget(&mut self, now: Instant) -> bool {
        let backends = &self.backends;
        self.detector.forget(now, |target| {
            backends
                .row(target.id)
                .is_some_and(|row| row.generation == target.generation && socket_addr(&row) == target.addr)
        })
    }

    /// Rows of backends at an address.
    fn at(&self, ip: IpAddr, wanted: impl Fn(&Backend) -> bool) -> Vec<u32> {
        let there = |row: &Backend| row.addr.to_ip() == ip && wanted(row);
        let ids = 1..self.backends.len();
        ids.filter(|id| self.backends.row(*id).is_some_and(|row| there(&row)))
            .collect()
    }

    fn publish(&self) {
        let suspects = self.detector.suspects();
        let mut ids: Vec<u32> = suspects.iter().map(|(target, _)| target.id).collect();
        // Nobody can see whether UDP is answered; it shares the fate of its address.
        let silent = suspects.iter().filter(|(_, verdict)| *verdict == Verdict::Silent);
        let silent: HashSet<SocketAddr> = silent.map(|(target, _)| target.addr).collect();
        for addr in silent {
            ids.extend(self.at(addr.ip(), |row| {
                row.protocol == protocol::UDP && row.port.to_host() == addr.port()
            }));
        }
        self.observer.suspects(ids.len());
        self.findings.suspects.send_replace(ids);
    }

    /// Says who is asked, if that has changed.
    fn tell(&self) {
        let now = self.detector.probing();
        self.findings.probing.send_if_modified(|known| {
            let changed = *known != now;
            *known = now;
            changed
        });
    }
}
