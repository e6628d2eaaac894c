//! What every namespace has: the service account `default`, and the ConfigMap `kube-root-ca.crt` by which its pods know the
//! API. And what has an end: bootstrap tokens.

use std::collections::HashMap;
use std::time::Duration;

use futures::StreamExt as _;
use futures::stream;
use jiff::Timestamp;
use k8s_openapi::api::core::v1::{ConfigMap, Namespace, Secret, ServiceAccount};
use kube::api::{Api, DeleteParams, Patch, PatchParams, PostParams};
use kube::runtime::watcher;
use kube::{Client, ResourceExt as _};
use serde_json::json;
use tokio_util::sync::CancellationToken;

use super::work::{Changes, Controller, Next, drive, watch};
use crate::bootstrap_token;

const ACCOUNT: &str = "default";
const ROOT_CA: &str = "kube-root-ca.crt";
const SYSTEM: &str = "kube-system";
/// Longest sleep before a token's end is looked at again, in case the clock is set.
const LOOK_AGAIN: Duration = Duration::from_secs(600);

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

fn changes(client: &Client) -> Changes<Change> {
    let named = |name: &str| watcher::Config::default().fields(&format!("metadata.name={name}"));
    let tokens = watcher::Config::default().fields(&format!("type={}", bootstrap_token::TYPE));
    let any = watcher::Config::default();
    let secrets = Api::namespaced(client.clone(), SYSTEM);
    stream::select_all([
        watch(Api::all(client.clone()), any, |_| {}, Change::Namespace),
        watch(Api::all(client.clone()), named(ACCOUNT), |_| {}, Change::Account),
        watch(
            Api::all(client.clone()),
            named(ROOT_CA),
            |_| {},
            Change::ConfigMap,
        ),
        watch(secrets, tokens, |_| {}, Change::Secret),
    ])
    .boxed()
}

/// Runs until `shutdown` is cancelled. The API may come and go meanwhile. `ca` is the authority's certificate, PEM.
pub async fn run(client: Client, ca: String, shutdown: CancellationToken) {
    let changes = changes(&client);
    let accounts = Accounts {
        client,
        ca,
        ends: HashMap::new(),
    };
    drive(accounts, changes, shutdown).await;
}

struct Accounts {
    client: Client,
    ca: String,
    /// When bootstrap tokens end.
    ends: HashMap<String, Timestamp>,
}

impl Controller for Accounts {
    type Key = Key;
    type Change = Change;
    type Done = ();
    const NAME: &'static str = "account controllers";
    const PARALLEL: usize = 8;
    const BATCH: Duration = Duration::ZERO;

    /// Each object stands for itself.
    fn is_complete(&self) -> bool {
        true
    }

    fn observe(&mut self, change: Change) -> Vec<Key> {
        observe(change, &mut self.ends).into_iter().collect()
    }

    fn decide(&mut self, key: &Key) -> Next<()> {
        if let Key::Token(name) = key {
            let Some(end) = self.ends.get(name) else {
                return Next::nothing();
            };
            let left = end.duration_since(Timestamp::now());
            if left.is_positive() {
                let left = Duration::try_from(left).unwrap_or(LOOK_AGAIN).min(LOOK_AGAIN);
                return Next::later(Some(left));
            }
        }
        let (client, ca, key) = (self.client.clone(), self.ca.clone(), key.clone());
        let requests = async move {
            let result = match &key {
                Key::Namespace(name) => furnish(&client, name, &ca).await,
                Key::Token(name) => expire(&client, name).await,
            };
            ((), result.map_err(|error| error.to_string()))
        };
        Next::requests(requests, None)
    }

    fn done(&mut self, _: &Key, (): ()) -> bool {
        false
    }
}

/// What is to be looked at.
fn observe(change: Change, ends: &mut HashMap<String, Timestamp>) -> Option<Key> {
    use watcher::Event::{Apply, Delete, InitApply};
    match change {
        Change::Namespace(Apply(object) | InitApply(object))
            if object.metadata.deletion_timestamp.is_none() =>
        {
            Some(Key::Namespace(object.name_any()))
        }
        // What is missing, or not as it should be, is made good.
        Change::Account(Delete(object)) => Some(Key::Namespace(object.namespace()?)),
        Change::ConfigMap(Delete(object) | Apply(object)) => Some(Key::Namespace(object.namespace()?)),
        Change::Secret(Apply(object) | InitApply(object)) => {
            let name = object.name_any();
            let end = serde_json::to_value(&object)
                .ok()
                .and_then(|secret| bootstrap_token::expiration(&secret));
            match end {
                Some(end) => {
                    ends.insert(name.clone(), end);
                    Some(Key::Token(name))
                }
                None => {
                    ends.remove(&name);
                    None
                }
            }
        }
        Change::Secret(Delete(object)) => {
            ends.remove(&object.name_any());
            None
        }
        _ => None,
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
