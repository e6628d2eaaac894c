//! Objects from a Kubernetes API, by list and watch.

use std::collections::HashSet;
use std::time::Duration;

use dataplane_model::object::{LABEL_HEADLESS, LABEL_PROXY_NAME};
use dataplane_model::{Event, ObjectName, Problem};
use futures::StreamExt;
use k8s_openapi::api::core::v1::{Node, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use k8s_openapi::api::networking::v1::ServiceCIDR;
use kube::api::ListParams;
use kube::core::DeserializeGuard;
use kube::runtime::watcher;
use kube::{Api, Client, Resource};
use serde::de::DeserializeOwned;
use tracing::debug;

use super::{Kind, Sender, Update};

/// Objects in one page of a list.
const PAGE_SIZE: u32 = 500;
/// First and longest pause after a failure.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(5));

/// Pause before it is asked again for a kind that the cluster does not have.
const ABSENT: Duration = Duration::from_secs(60);

/// Pause between questions whether an outage is over, and how long an answer may take.
const PROBE: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(5));

/// What the source needs to know of a kind.
trait Watched: Resource<DynamicType = ()> + DeserializeOwned + Clone + std::fmt::Debug + Send + 'static {
    const KIND: Kind;
    /// Clusters without it are served, too: that it is not there, or not shown to the agent, is no failure.
    const OPTIONAL: bool = false;
    fn applied(self) -> Event;
    fn deleted(namespace: String, name: String) -> Event;
    /// All that is left after a complete list.
    fn listed(names: HashSet<ObjectName>) -> Option<Event>;
}

impl Watched for Service {
    const KIND: Kind = Kind::Service;
    fn applied(self) -> Event {
        Event::ServiceApplied(Box::new(self))
    }
    fn deleted(namespace: String, name: String) -> Event {
        Event::ServiceDeleted { namespace, name }
    }
    fn listed(names: HashSet<ObjectName>) -> Option<Event> {
        Some(Event::ServicesListed(names))
    }
}

impl Watched for EndpointSlice {
    const KIND: Kind = Kind::EndpointSlice;
    fn applied(self) -> Event {
        Event::SliceApplied(Box::new(self))
    }
    fn deleted(namespace: String, name: String) -> Event {
        Event::SliceDeleted { namespace, name }
    }
    fn listed(names: HashSet<ObjectName>) -> Option<Event> {
        Some(Event::SlicesListed(names))
    }
}

impl Watched for Node {
    const KIND: Kind = Kind::Node;
    fn applied(self) -> Event {
        Event::NodeApplied(Box::new(self))
    }
    fn deleted(_: String, name: String) -> Event {
        Event::NodeDeleted { name }
    }
    fn listed(names: HashSet<ObjectName>) -> Option<Event> {
        names.is_empty().then(|| Event::NodesReplaced(Vec::new()))
    }
}

impl Watched for ServiceCIDR {
    const KIND: Kind = Kind::ServiceCidr;
    const OPTIONAL: bool = true;
    fn applied(self) -> Event {
        Event::ServiceCidrApplied(Box::new(self))
    }
    fn deleted(_: String, name: String) -> Event {
        Event::ServiceCidrDeleted { name }
    }
    fn listed(names: HashSet<ObjectName>) -> Option<Event> {
        let names = names.into_iter().map(|object| object.name.to_string());
        Some(Event::ServiceCidrsListed(names.collect()))
    }
}

/// Watches Services, endpoint slices, ranges of service addresses and this node, with the filters of kube-proxy done by the server (spec kube-proxy
/// 1.1), until the receiver is gone.
pub async fn run(client: Client, node_name: String, sender: Sender) {
    let not = |label: &str| format!("!{label}");
    let config = || watcher::Config::default().page_size(PAGE_SIZE);
    let services = config()
        .labels(&not(LABEL_PROXY_NAME))
        .fields("spec.clusterIP!=None");
    let slices = config().labels(&not(LABEL_HEADLESS));
    let node = config().fields(&format!("metadata.name={node_name}"));
    tokio::join!(
        watch::<Service>(client.clone(), services, sender.clone()),
        watch::<EndpointSlice>(client.clone(), slices, sender.clone()),
        watch::<ServiceCIDR>(client.clone(), config(), sender.clone()),
        watch::<Node>(client, node, sender),
    );
}

async fn watch<K: Watched>(client: Client, config: watcher::Config, sender: Sender) {
    let api: Api<DeserializeGuard<K>> = Api::all(client);
    let mut stream = std::pin::pin!(watcher(api.clone(), config));
    let mut listing = HashSet::new();
    let mut pause = BACKOFF.0;
    let mut failing = false;
    loop {
        let mut updates = Vec::new();
        // A watch that is taken up again says nothing until something changes, so the end of an outage is asked for.
        let item = tokio::select! {
            item = stream.next() => match item {
                Some(item) => item,
                None => return,
            },
            () = answers(&api), if failing => {
                failing = false;
                if sender.send(Update::State { kind: K::KIND, error: None }).await.is_err() {
                    return;
                }
                continue;
            }
        };
        match item {
            Ok(event) => {
                pause = BACKOFF.0;
                // Init only says that a list is about to be asked for
                if failing && !matches!(event, watcher::Event::Init) {
                    failing = false;
                    updates.push(Update::State {
                        kind: K::KIND,
                        error: None,
                    });
                }
                translate::<K>(event, &mut listing, &mut updates);
            }
            // The API has forgotten where the watch was: a list follows at once.
            Err(error) if is_expired(&error) => {
                debug!(kind = K::KIND.name(), "the watch is too old, listing again");
            }
            Err(error) if K::OPTIONAL && is_absent(&error) => {
                debug!(kind = K::KIND.name(), %error, "the cluster does not offer it");
                tokio::select! {
                    () = tokio::time::sleep(ABSENT) => {}
                    () = sender.closed() => return,
                }
            }
            Err(error) => {
                if !failing {
                    failing = true;
                    updates.push(Update::State {
                        kind: K::KIND,
                        error: Some(cause(&error)),
                    });
                }
                tokio::select! {
                    () = tokio::time::sleep(pause) => {}
                    () = sender.closed() => return,
                }
                pause = (pause * 2).min(BACKOFF.1);
            }
        }
        for update in updates {
            if sender.send(update).await.is_err() {
                return;
            }
        }
    }
}

/// True if the API does not have the kind, or does not show it to the agent.
fn is_absent(error: &watcher::Error) -> bool {
    match error {
        watcher::Error::InitialListFailed(kube::Error::Api(status))
        | watcher::Error::WatchStartFailed(kube::Error::Api(status)) => matches!(status.code, 403 | 404),
        _ => false,
    }
}

fn is_expired(error: &watcher::Error) -> bool {
    matches!(error, watcher::Error::WatchError(status) if status.code == 410)
}

/// Waits until the API answers.
async fn answers<K: Watched>(api: &Api<DeserializeGuard<K>>) {
    let one = ListParams::default().limit(1);
    loop {
        tokio::time::sleep(PROBE.0).await;
        if matches!(tokio::time::timeout(PROBE.1, api.list(&one)).await, Ok(Ok(_))) {
            return;
        }
    }
}

/// An error with its causes, outermost first.
fn cause(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        let inner = error.to_string();
        if !text.contains(&inner) {
            text = format!("{text}: {inner}");
        }
        source = error.source();
    }
    text
}

fn translate<K: Watched>(
    event: watcher::Event<DeserializeGuard<K>>,
    listing: &mut HashSet<ObjectName>,
    updates: &mut Vec<Update>,
) {
    match event {
        watcher::Event::Init => listing.clear(),
        watcher::Event::InitApply(object) => {
            let meta = object.meta();
            listing.insert(ObjectName::new(
                meta.namespace.as_deref().unwrap_or_default(),
                meta.name.as_deref().unwrap_or_default(),
            ));
            apply(object, updates);
        }
        watcher::Event::InitDone => {
            let names = std::mem::take(listing);
            updates.extend(K::listed(names).map(Update::Event));
            updates.push(Update::Listed(K::KIND));
        }
        watcher::Event::Apply(object) => apply(object, updates),
        watcher::Event::Delete(object) => {
            let meta = object.meta();
            let (namespace, name) = (meta.namespace.clone(), meta.name.clone());
            updates.push(Update::Event(K::deleted(
                namespace.unwrap_or_default(),
                name.unwrap_or_default(),
            )));
        }
    }
}

/// An object that cannot be read keeps what is known of it: a wrong field must not take a Service away.
fn apply<K: Watched>(object: DeserializeGuard<K>, updates: &mut Vec<Update>) {
    match object.0 {
        Ok(object) => updates.push(Update::Event(object.applied())),
        Err(invalid) => {
            let meta = &invalid.metadata;
            let namespace = meta.namespace.as_deref().unwrap_or_default();
            let name = meta.name.as_deref().unwrap_or_default();
            let object = format!("{} {namespace}/{name}", K::KIND.name());
            updates.push(Update::Problem(Problem {
                object,
                message: format!("cannot be read: {invalid}"),
            }));
        }
    }
}

#[cfg(test)]
#[path = "kube/tests.rs"]
mod tests;
