//! Watches, and writes what [`super::desired_slices`] decides.

use std::collections::BTreeSet;
use std::future::Future;
use std::time::Duration;

use futures::StreamExt as _;
use futures::stream;
use k8s_openapi::api::core::v1::{Node, Pod};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::api::{Api, DeleteParams, PostParams, Preconditions};
use kube::runtime::watcher;
use kube::{Client, ResourceExt as _};
use tokio_util::sync::CancellationToken;

use super::cache::{Cache, Change, Key};
use super::{CONTROLLER, MANAGED_BY, SliceChange};
use crate::controllers::work::{Changes, Controller, Next, drive, watch};

/// Time for one request.
const TIMEOUT: Duration = Duration::from_secs(15);

/// Runs until `shutdown` is cancelled. The API may come and go meanwhile.
pub async fn run(client: Client, shutdown: CancellationToken) {
    let changes = changes(&client);
    let slices = Slices {
        client,
        cache: Cache::default(),
    };
    drive(slices, changes, shutdown).await;
}

fn changes(client: &Client) -> Changes<Change> {
    let any = watcher::Config::default();
    let ours = watcher::Config::default().labels(&format!("{MANAGED_BY}={CONTROLLER}"));
    stream::select_all([
        watch(Api::all(client.clone()), any.clone(), |_| {}, Change::Service),
        watch(
            Api::all(client.clone()),
            any.clone(),
            |pod: &mut Pod| pod.metadata.annotations = None,
            Change::Pod,
        ),
        watch(
            Api::all(client.clone()),
            any,
            |node: &mut Node| node.status = None,
            Change::Node,
        ),
        watch(Api::all(client.clone()), ours, |_| {}, Change::Slice),
    ])
    .boxed()
}

/// What came of the writes for one Service.
#[derive(Default)]
struct Outcome {
    wrote: Vec<EndpointSlice>,
    /// Name and uid.
    deleted: Vec<(String, String)>,
}

struct Slices {
    client: Client,
    cache: Cache,
}

impl Controller for Slices {
    type Key = Key;
    type Change = Change;
    type Done = Outcome;
    const NAME: &'static str = "endpoint slice controller";
    const PARALLEL: usize = 16;
    /// A rollout changes many Pods at once.
    const BATCH: Duration = Duration::from_millis(10);

    fn is_complete(&self) -> bool {
        self.cache.is_complete()
    }

    fn observe(&mut self, change: Change) -> Vec<Key> {
        let mut dirty = BTreeSet::new();
        self.cache.observe(change, &mut dirty);
        dirty.into_iter().collect()
    }

    fn decide(&mut self, key: &Key) -> Next<Outcome> {
        let changes = self.cache.changes(key);
        if changes.is_empty() {
            return Next::nothing();
        }
        Next::requests(write(self.client.clone(), key.0.clone(), changes), None)
    }

    fn done(&mut self, key: &Key, outcome: Outcome) -> bool {
        for slice in outcome.wrote {
            self.cache.wrote(slice);
        }
        for (name, uid) in outcome.deleted {
            self.cache.deleted(&key.0, &name, &uid);
        }
        false
    }
}

/// Writes the changes of one Service, all of them even if one fails.
async fn write(
    client: Client,
    namespace: String,
    changes: Vec<SliceChange>,
) -> (Outcome, Result<(), String>) {
    let api: Api<EndpointSlice> = Api::namespaced(client, &namespace);
    let mut outcome = Outcome::default();
    let mut first_error = None;
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
            first_error.get_or_insert(error);
        }
    }
    (outcome, first_error.map_or(Ok(()), Err))
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
