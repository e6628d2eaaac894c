//! The loop that all goes through: updates in, what changed programmed.

use std::time::Duration;

use anyhow::Context as _;
use dataplane_model::program::Maps;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;

use super::connect::SourceTask;
use super::http::Request;
use super::state::State;
use crate::memory;
use crate::source::Update;

/// Pause before maps that could not be repaired are looked at again.
const REPAIR: Duration = Duration::from_secs(60);
/// Updates that are taken in at once, and that a source may be ahead of the loop.
pub(super) const QUEUE: usize = 1024;
/// First and longest pause before what failed is tried again.
const RETRY: (Duration, Duration) = (Duration::from_millis(500), Duration::from_secs(30));

/// A period, up to a tenth more or less, so that the nodes of a cluster do not work at the same time.
fn jittered(period: Duration) -> Duration {
    period.mul_f64(rand::random_range(0.9..1.1))
}

/// What the loop listens to.
pub(super) struct Inputs {
    pub(super) updates: mpsc::Receiver<Update>,
    pub(super) requests: mpsc::Receiver<Request>,
    /// Rows of backends that seem to have failed.
    pub(super) suspects: watch::Receiver<Vec<u32>>,
    pub(super) source: SourceTask,
    /// Why the agent must end.
    pub(super) fatal: mpsc::Receiver<anyhow::Error>,
    /// Zero: never.
    pub(super) audit_period: Duration,
}

/// The loop. Updates are taken in as many as there are, then programmed together.
pub(super) async fn drive<M: Maps>(
    mut state: State<M>,
    inputs: Inputs,
    mut answer: impl FnMut(&State<M>, Request),
) -> anyhow::Result<()> {
    let Inputs {
        mut updates,
        mut requests,
        mut suspects,
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
    let mut starting = true;
    loop {
        if starting && state.synced() {
            starting = false;
            memory::let_go_of_code();
        }
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
            // new connections run into what has failed until this is done
            Ok(()) = suspects.changed() => {
                let ids = suspects.borrow_and_update().clone();
                state.set_suspects(&ids);
            }
            Some(request) = requests.recv() => answer(&state, request),
            n = updates.recv_many(&mut batch, QUEUE), if !updates.is_closed() || !updates.is_empty() => {
                if n > 0 {
                    let listed = batch.iter().any(|update| matches!(update, Update::Listed(_)));
                    for update in batch.drain(..) {
                        state.take(update);
                    }
                    state.sync();
                    if listed {
                        memory::give_back();
                    }
                }
            }
            () = tokio::time::sleep(ready.unwrap_or_default()), if ready.is_some() => state.sync(),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use dataplane_model::Settings;
    use dataplane_model::program::{FakeMaps, FaultyMaps, Programmer};
    use tokio::sync::oneshot;

    use super::*;
    use crate::agent::health::Health;
    use crate::agent::state::{self, Shared};
    use crate::agent::view;
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
            suspects: watch::channel(Vec::new()).1,
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
        let state = State::new(
            "n",
            Settings::default(),
            programmer,
            Shared::new(Health::for_tests()),
        );
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
        let state = State::new("n", Settings::default(), programmer, Arc::clone(&shared));
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
        let state = State::new("n", Settings::default(), programmer, Arc::clone(&shared));
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
}
