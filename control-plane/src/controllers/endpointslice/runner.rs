//! Watches, and writes what [`super::desired_slices`] decides.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::future::Future;
use std::time::Duration;

use futures::StreamExt as _;
use futures::stream::{self, BoxStream};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::api::{Api, DeleteParams, PostParams, Preconditions};
use kube::runtime::{WatchStreamExt as _, watcher};
use kube::{Client, ResourceExt as _};
use tokio::task::{JoinError, JoinSet};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::cache::{Cache, Change, Key};
use super::{CONTROLLER, MANAGED_BY, SliceChange};

/// How long changes are collected before a Service is looked at: a rollout changes many Pods at once.
const BATCH: Duration = Duration::from_millis(10);
/// Services that are written at the same time.
const PARALLEL: usize = 16;
/// Time for one request.
const TIMEOUT: Duration = Duration::from_secs(15);
const FIRST_RETRY: Duration = Duration::from_millis(50);
const LAST_RETRY: Duration = Duration::from_secs(30);

/// Runs until `shutdown` is cancelled. The API may come and go meanwhile.
pub async fn run(client: Client, shutdown: CancellationToken) {
    let mut runner = Runner::new(client.clone());
    let mut changes = changes(&client);
    loop {
        let due = runner.next_due();
        tokio::select! {
            () = shutdown.cancelled() => return,
            Some(change) = changes.next() => runner.observe(change),
            Some(done) = runner.tasks.join_next_with_id() => runner.finished(done),
            () = sleep_until(due) => runner.start(),
        }
    }
}

/// Never, without a time.
async fn sleep_until(due: Option<Instant>) {
    match due {
        Some(due) => tokio::time::sleep_until(due).await,
        None => std::future::pending().await,
    }
}

type Observed = Result<Change, watcher::Error>;

fn changes(client: &Client) -> BoxStream<'static, Observed> {
    let any = watcher::Config::default();
    let ours = watcher::Config::default().labels(&format!("{MANAGED_BY}={CONTROLLER}"));
    let services = watcher(Api::all(client.clone()), any.clone())
        .modify(|service: &mut k8s_openapi::api::core::v1::Service| service.metadata.managed_fields = None)
        .default_backoff()
        .map(|e| e.map(Change::Service));
    let pods = watcher(Api::all(client.clone()), any.clone())
        .modify(|pod: &mut k8s_openapi::api::core::v1::Pod| {
            pod.metadata.managed_fields = None;
            pod.metadata.annotations = None;
        })
        .default_backoff()
        .map(|e| e.map(Change::Pod));
    let nodes = watcher(Api::all(client.clone()), any)
        .modify(|node: &mut k8s_openapi::api::core::v1::Node| {
            node.metadata.managed_fields = None;
            node.status = None;
        })
        .default_backoff()
        .map(|e| e.map(Change::Node));
    let slices = watcher(Api::<EndpointSlice>::all(client.clone()), ours)
        .modify(|slice: &mut EndpointSlice| slice.metadata.managed_fields = None)
        .default_backoff()
        .map(|e| e.map(Change::Slice));
    stream::select_all([services.boxed(), pods.boxed(), nodes.boxed(), slices.boxed()]).boxed()
}

/// What came of the writes for one Service.
struct Outcome {
    wrote: Vec<EndpointSlice>,
    /// Name and uid.
    deleted: Vec<(String, String)>,
    error: Option<String>,
}

struct Runner {
    client: Client,
    cache: Cache,
    /// When to look at a Service.
    due: HashMap<Key, Instant>,
    queue: BTreeSet<(Instant, Key)>,
    tasks: JoinSet<Outcome>,
    running: HashMap<tokio::task::Id, Key>,
    busy: HashSet<Key>,
    /// Failed attempts in a row.
    failures: HashMap<Key, u32>,
}

impl Runner {
    fn new(client: Client) -> Self {
        Self {
            client,
            cache: Cache::default(),
            due: HashMap::new(),
            queue: BTreeSet::new(),
            tasks: JoinSet::new(),
            running: HashMap::new(),
            busy: HashSet::new(),
            failures: HashMap::new(),
        }
    }

    fn observe(&mut self, change: Observed) {
        let change = match change {
            Ok(change) => change,
            Err(error) => {
                tracing::warn!(%error, "endpoint slice controller: watch interrupted, trying again");
                return;
            }
        };
        let mut dirty = BTreeSet::new();
        self.cache.observe(change, &mut dirty);
        let at = Instant::now() + BATCH;
        for key in dirty {
            self.schedule(key, at);
        }
    }

    /// Looks at the Service at that time, or earlier if that was planned.
    fn schedule(&mut self, key: Key, at: Instant) {
        match self.due.get(&key) {
            Some(planned) if *planned <= at => return,
            Some(planned) => {
                self.queue.remove(&(*planned, key.clone()));
            }
            None => {}
        }
        self.due.insert(key.clone(), at);
        self.queue.insert((at, key));
    }

    fn next_due(&self) -> Option<Instant> {
        if !self.cache.is_complete() || self.tasks.len() >= PARALLEL {
            return None;
        }
        // What is being written is looked at again when that is done.
        self.queue
            .iter()
            .find(|(_, key)| !self.busy.contains(key))
            .map(|(at, _)| *at)
    }

    /// Starts the writes of the Services that are due.
    fn start(&mut self) {
        let now = Instant::now();
        let ready: Vec<(Instant, Key)> = self
            .queue
            .iter()
            .take_while(|(at, _)| *at <= now)
            .filter(|(_, key)| !self.busy.contains(key))
            .take(PARALLEL.saturating_sub(self.tasks.len()))
            .cloned()
            .collect();
        for entry in ready {
            self.queue.remove(&entry);
            let (_, key) = entry;
            self.due.remove(&key);
            let changes = self.cache.changes(&key);
            if changes.is_empty() {
                self.failures.remove(&key);
                continue;
            }
            let task = self
                .tasks
                .spawn(write(self.client.clone(), key.0.clone(), changes));
            self.running.insert(task.id(), key.clone());
            self.busy.insert(key);
        }
    }

    fn finished(&mut self, done: Result<(tokio::task::Id, Outcome), JoinError>) {
        let (id, outcome) = match done {
            Ok(done) => done,
            Err(error) => (
                error.id(),
                Outcome {
                    wrote: Vec::new(),
                    deleted: Vec::new(),
                    error: Some(error.to_string()),
                },
            ),
        };
        let Some(key) = self.running.remove(&id) else {
            return;
        };
        self.busy.remove(&key);
        for slice in outcome.wrote {
            self.cache.wrote(slice);
        }
        for (name, uid) in outcome.deleted {
            self.cache.deleted(&key.0, &name, &uid);
        }
        match outcome.error {
            None => {
                self.failures.remove(&key);
            }
            Some(error) => {
                let failures = self.failures.entry(key.clone()).or_insert(0);
                let wait = retry_after(*failures);
                *failures = failures.saturating_add(1);
                let (namespace, name) = &key;
                tracing::warn!(%namespace, service = %name, %error, retry_in = ?wait, "cannot write endpoint slices");
                self.schedule(key, Instant::now() + wait);
            }
        }
    }
}

fn retry_after(failures: u32) -> Duration {
    FIRST_RETRY
        .saturating_mul(2_u32.saturating_pow(failures.min(16)))
        .min(LAST_RETRY)
}

/// Writes the changes of one Service, all of them even if one fails.
async fn write(client: Client, namespace: String, changes: Vec<SliceChange>) -> Outcome {
    let api: Api<EndpointSlice> = Api::namespaced(client, &namespace);
    let mut outcome = Outcome {
        wrote: Vec::new(),
        deleted: Vec::new(),
        error: None,
    };
    for change in changes {
        let result = match change {
            SliceChange::Create(slice) => match limited(api.create(&PostParams::default(), &slice)).await {
                Ok(written) => {
                    outcome.wrote.push(written);
                    Ok(())
                }
                Err(error) if error.namespace_is_going() => Ok(()),
                Err(error) => Err(format!("create a slice: {error}")),
            },
            SliceChange::Update(slice) => {
                let name = slice.name_any();
                limited(api.replace(&name, &PostParams::default(), &slice))
                    .await
                    .map(|written| outcome.wrote.push(written))
                    .map_err(|error| format!("update slice {name}: {error}"))
            }
            SliceChange::Delete { name, uid } => {
                let params = DeleteParams {
                    preconditions: (!uid.is_empty()).then(|| Preconditions {
                        uid: Some(uid.clone()),
                        ..Preconditions::default()
                    }),
                    ..DeleteParams::default()
                };
                match limited(api.delete(&name, &params)).await {
                    Ok(_) => {
                        outcome.deleted.push((name, uid));
                        Ok(())
                    }
                    Err(error) if error.is_not_found() => {
                        outcome.deleted.push((name, uid));
                        Ok(())
                    }
                    Err(error) => Err(format!("delete slice {name}: {error}")),
                }
            }
        };
        if let Err(error) = result {
            outcome.error.get_or_insert(error);
        }
    }
    outcome
}

/// Why a request failed.
#[derive(Debug, thiserror::Error)]
enum RequestError {
    #[error(transparent)]
    Client(#[from] kube::Error),
    #[error("no answer within {} s", TIMEOUT.as_secs())]
    Timeout,
}

impl RequestError {
    fn code_and_message(&self) -> (u16, &str) {
        match self {
            Self::Client(kube::Error::Api(status)) => (status.code, status.message.as_str()),
            _ => (0, ""),
        }
    }

    fn is_not_found(&self) -> bool {
        self.code_and_message().0 == 404
    }

    /// Nothing can be created in a namespace that is being deleted or gone; its Services go next.
    fn namespace_is_going(&self) -> bool {
        match self.code_and_message() {
            (404, message) => message.starts_with("namespaces "),
            (403, message) => message.contains("being terminated"),
            _ => false,
        }
    }
}

async fn limited<T>(request: impl Future<Output = kube::Result<T>>) -> Result<T, RequestError> {
    match tokio::time::timeout(TIMEOUT, request).await {
        Ok(result) => Ok(result?),
        Err(_) => Err(RequestError::Timeout),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn retries_slow_down() {
        assert_eq!(retry_after(0), FIRST_RETRY);
        assert_eq!(retry_after(1), FIRST_RETRY * 2);
        assert_eq!(retry_after(60), LAST_RETRY);
    }
}
