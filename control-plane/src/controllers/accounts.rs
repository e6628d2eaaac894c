//! What every namespace has: the service account `default`, and the ConfigMap `kube-root-ca.crt` by which its pods know the
//! API. And what has an end: bootstrap tokens.

use std::collections::HashMap;
use std::time::Duration;

use futures::StreamExt as _;
use futures::stream::{self, BoxStream};
use jiff::Timestamp;
use k8s_openapi::api::core::v1::{ConfigMap, Namespace, Secret, ServiceAccount};
use kube::api::{Api, DeleteParams, Patch, PatchParams, PostParams};
use kube::runtime::{WatchStreamExt as _, watcher};
use kube::{Client, ResourceExt as _};
use serde_json::json;
use tokio::task::JoinSet;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::queue::{Queue, sleep_until};
use crate::bootstrap_token;

const ACCOUNT: &str = "default";
const ROOT_CA: &str = "kube-root-ca.crt";
const SYSTEM: &str = "kube-system";
/// Longest sleep before a token's end is looked at again, in case the clock is set.
const LOOK_AGAIN: Duration = Duration::from_secs(600);
const PARALLEL: usize = 8;

/// What is looked at.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
enum Key {
    Namespace(String),
    Token(String),
}

enum Change {
    Namespace(watcher::Event<Namespace>),
    Account(watcher::Event<ServiceAccount>),
    ConfigMap(watcher::Event<ConfigMap>),
    Secret(watcher::Event<Secret>),
}

fn changes(client: &Client) -> BoxStream<'static, watcher::Result<Change>> {
    let named = |name: &str| watcher::Config::default().fields(&format!("metadata.name={name}"));
    let tokens = watcher::Config::default().fields(&format!("type={}", bootstrap_token::TYPE));
    let namespaces = watcher(Api::<Namespace>::all(client.clone()), watcher::Config::default())
        .default_backoff()
        .map(|event| event.map(Change::Namespace));
    let accounts = watcher(Api::<ServiceAccount>::all(client.clone()), named(ACCOUNT))
        .default_backoff()
        .map(|event| event.map(Change::Account));
    let maps = watcher(Api::<ConfigMap>::all(client.clone()), named(ROOT_CA))
        .default_backoff()
        .map(|event| event.map(Change::ConfigMap));
    let secrets = watcher(Api::<Secret>::namespaced(client.clone(), SYSTEM), tokens)
        .default_backoff()
        .map(|event| event.map(Change::Secret));
    stream::select_all([
        namespaces.boxed(),
        accounts.boxed(),
        maps.boxed(),
        secrets.boxed(),
    ])
    .boxed()
}

/// Runs until `shutdown` is cancelled. The API may come and go meanwhile. `ca` is the authority's certificate, PEM.
pub async fn run(client: Client, ca: String, shutdown: CancellationToken) {
    let mut changes = changes(&client);
    let mut queue: Queue<Key> = Queue::new();
    let mut ends: HashMap<String, Timestamp> = HashMap::new();
    let mut tasks: JoinSet<(Key, Result<(), kube::Error>)> = JoinSet::new();
    loop {
        let due = if tasks.len() < PARALLEL {
            queue.next_due()
        } else {
            None
        };
        tokio::select! {
            () = shutdown.cancelled() => return,
            Some(change) = changes.next() => match change {
                Ok(change) => observe(change, &mut queue, &mut ends),
                Err(error) => tracing::warn!(%error, "account controllers: watch interrupted, trying again"),
            },
            Some(done) = tasks.join_next() => match done {
                Ok((key, Ok(()))) => queue.done(&key),
                Ok((key, Err(error))) => {
                    let wait = queue.failed(&key);
                    tracing::warn!(?key, %error, retry_in = ?wait, "account controllers: not done");
                }
                Err(error) => tracing::error!(%error, "account controllers: a task ended early"),
            },
            () = sleep_until(due) => while let Some(key) = queue.take() {
                if let Key::Token(name) = &key {
                    let left = ends.get(name).map(|end| end.duration_since(Timestamp::now()));
                    match left {
                        None => {
                            queue.done(&key);
                            continue;
                        }
                        Some(left) if left.is_positive() => {
                            queue.done(&key);
                            let left = Duration::try_from(left).unwrap_or(LOOK_AGAIN).min(LOOK_AGAIN);
                            queue.add_at(key, Instant::now() + left);
                            continue;
                        }
                        Some(_) => {}
                    }
                }
                let (client, ca) = (client.clone(), ca.clone());
                tasks.spawn(async move {
                    let done = match &key {
                        Key::Namespace(name) => furnish(&client, name, &ca).await,
                        Key::Token(name) => expire(&client, name).await,
                    };
                    (key, done)
                });
                if tasks.len() >= PARALLEL {
                    break;
                }
            },
        }
    }
}

fn observe(change: Change, queue: &mut Queue<Key>, ends: &mut HashMap<String, Timestamp>) {
    use watcher::Event::{Apply, Delete, InitApply};
    match change {
        Change::Namespace(Apply(object) | InitApply(object))
            if object.metadata.deletion_timestamp.is_none() =>
        {
            queue.add(Key::Namespace(object.name_any()));
        }
        // What is missing, or not as it should be, is made good.
        Change::Account(Delete(object)) => queue.add(Key::Namespace(object.namespace().unwrap_or_default())),
        Change::ConfigMap(Delete(object) | Apply(object)) => {
            queue.add(Key::Namespace(object.namespace().unwrap_or_default()));
        }
        Change::Secret(Apply(object) | InitApply(object)) => {
            let name = object.name_any();
            let end = serde_json::to_value(&object)
                .ok()
                .and_then(|secret| bootstrap_token::expiration(&secret));
            match end {
                Some(end) => {
                    ends.insert(name.clone(), end);
                    queue.add(Key::Token(name));
                }
                None => drop(ends.remove(&name)),
            }
        }
        Change::Secret(Delete(object)) => drop(ends.remove(&object.name_any())),
        _ => {}
    }
}

/// A namespace that is going, or gone, needs nothing.
fn tolerate<T>(result: Result<T, kube::Error>) -> Result<(), kube::Error> {
    match result {
        Err(kube::Error::Api(status)) if matches!(status.code, 403 | 404 | 409) => Ok(()),
        other => other.map(drop),
    }
}

async fn furnish(client: &Client, namespace: &str, ca: &str) -> Result<(), kube::Error> {
    let accounts: Api<ServiceAccount> = Api::namespaced(client.clone(), namespace);
    if accounts.get_opt(ACCOUNT).await?.is_none() {
        let mut account = ServiceAccount::default();
        account.metadata.name = Some(ACCOUNT.to_owned());
        tolerate(accounts.create(&PostParams::default(), &account).await)?;
    }
    let maps: Api<ConfigMap> = Api::namespaced(client.clone(), namespace);
    let data = json!({"ca.crt": ca});
    match maps.get_opt(ROOT_CA).await? {
        None => {
            let mut map = ConfigMap::default();
            map.metadata.name = Some(ROOT_CA.to_owned());
            map.metadata.annotations = Some(
                [(
                    "kubernetes.io/description".to_owned(),
                    "Contains a CA bundle that can be used to verify the kube-apiserver when using internal endpoints \
                     such as the internal service IP or kubernetes.default.svc. No other usage is guaranteed across \
                     distributions of Kubernetes clusters."
                        .to_owned(),
                )]
                .into(),
            );
            map.data = Some([("ca.crt".to_owned(), ca.to_owned())].into());
            tolerate(maps.create(&PostParams::default(), &map).await)
        }
        Some(map) if json!(map.data) == data => Ok(()),
        Some(_) => {
            let patch = Patch::Merge(json!({"data": data}));
            tolerate(maps.patch(ROOT_CA, &PatchParams::default(), &patch).await)
        }
    }
}

async fn expire(client: &Client, name: &str) -> Result<(), kube::Error> {
    let secrets: Api<Secret> = Api::namespaced(client.clone(), SYSTEM);
    tracing::info!(secret = name, "deleting a bootstrap token that has ended");
    tolerate(secrets.delete(name, &DeleteParams::default()).await)
}
