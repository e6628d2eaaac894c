//! Endpoints, the older form of endpoint slices, for those who still read or write them.
//!
//! A Service with a selector gets Endpoints that say what its slices say. Endpoints that somebody wrote for a Service
//! without one are mirrored into slices, which is what proxies read (kube-controller-manager `endpoint`,
//! `endpointslicemirroring`).

mod mirror;
#[cfg(test)]
mod tests;

use futures::StreamExt as _;
use futures::stream;
use k8s_openapi::api::core::v1::{Endpoints, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use kube::api::{Api, DeleteParams, PostParams};
use kube::runtime::watcher;
use kube::{Client, ResourceExt as _};
use tokio::time::Duration;
use tokio_util::sync::CancellationToken;

use super::objects::Objects;
use super::work::{Changes, Controller, Next, drive, watch};
use mirror::Action;

const SERVICE_NAME: &str = super::endpointslice::SERVICE_NAME;

/// Namespace and name of a Service.
type Key = (String, String);

#[expect(clippy::large_enum_variant, reason = "one at a time, and moved once")]
enum Change {
    Service(watcher::Event<Service>),
    Endpoints(watcher::Event<Endpoints>),
    Slice(watcher::Event<EndpointSlice>),
}

enum Written {
    Endpoints(Box<Endpoints>),
    Slice(Box<EndpointSlice>),
}

#[derive(Default)]
struct View {
    services: Objects<Service>,
    endpoints: Objects<Endpoints>,
    slices: Objects<EndpointSlice>,
}

impl View {
    fn observe(&mut self, change: Change) -> Vec<Key> {
        fn key<K: kube::Resource>(object: &K) -> Key {
            (object.namespace().unwrap_or_default(), object.name_any())
        }
        let mut dirty = Vec::new();
        match change {
            Change::Service(event) => {
                for (before, after) in self.services.observe(event) {
                    dirty.extend(before.iter().chain(&after).map(|object| key(&**object)));
                }
            }
            Change::Endpoints(event) => {
                for (before, after) in self.endpoints.observe(event) {
                    dirty.extend(before.iter().chain(&after).map(|object| key(&**object)));
                }
            }
            Change::Slice(event) => {
                for (before, after) in self.slices.observe(event) {
                    for slice in before.iter().chain(&after) {
                        let service = slice
                            .metadata
                            .labels
                            .as_ref()
                            .and_then(|labels| labels.get(SERVICE_NAME));
                        dirty.extend(
                            service.map(|name| (slice.namespace().unwrap_or_default(), name.clone())),
                        );
                    }
                }
            }
        }
        dirty
    }

    fn is_complete(&self) -> bool {
        self.services.is_complete() && self.endpoints.is_complete() && self.slices.is_complete()
    }

    fn plan(&self, (namespace, name): &Key) -> Vec<Action> {
        let slices: Vec<&EndpointSlice> = self
            .slices
            .in_namespace(namespace)
            .filter(|slice| {
                slice
                    .metadata
                    .labels
                    .as_ref()
                    .and_then(|labels| labels.get(SERVICE_NAME))
                    == Some(name)
            })
            .map(|slice| &**slice)
            .collect();
        mirror::plan(
            self.services.get(namespace, name).map(|service| &**service),
            self.endpoints.get(namespace, name).map(|endpoints| &**endpoints),
            &slices,
        )
    }
}

fn changes(client: &Client) -> Changes<Change> {
    let any = watcher::Config::default();
    stream::select_all([
        watch(Api::all(client.clone()), any.clone(), |_| {}, Change::Service),
        watch(Api::all(client.clone()), any.clone(), |_| {}, Change::Endpoints),
        watch(Api::all(client.clone()), any, |_| {}, Change::Slice),
    ])
    .boxed()
}

/// Runs until `shutdown` is cancelled. The API may come and go meanwhile.
pub async fn run(client: Client, shutdown: CancellationToken) {
    let changes = changes(&client);
    let mirror = Mirror {
        client,
        view: View::default(),
    };
    drive(mirror, changes, shutdown).await;
}

struct Mirror {
    client: Client,
    view: View,
}

impl Controller for Mirror {
    type Key = Key;
    type Change = Change;
    type Done = Vec<Written>;
    const NAME: &'static str = "endpoints controller";
    const PARALLEL: usize = 8;
    /// A rollout changes many slices.
    const BATCH: Duration = Duration::from_millis(50);

    fn is_complete(&self) -> bool {
        self.view.is_complete()
    }

    fn observe(&mut self, change: Change) -> Vec<Key> {
        self.view.observe(change)
    }

    fn decide(&mut self, key: &Key) -> Next<Vec<Written>> {
        let actions = self.view.plan(key);
        if actions.is_empty() {
            return Next::nothing();
        }
        Next::requests(carry_out(self.client.clone(), key.clone(), actions), None)
    }

    fn done(&mut self, _: &Key, written: Vec<Written>) -> bool {
        for written in written {
            match written {
                Written::Endpoints(endpoints) => self.view.endpoints.wrote(*endpoints),
                Written::Slice(slice) => self.view.slices.wrote(*slice),
            }
        }
        false
    }
}

async fn carry_out(client: Client, key: Key, actions: Vec<Action>) -> (Vec<Written>, Result<(), String>) {
    let endpoints: Api<Endpoints> = Api::namespaced(client.clone(), &key.0);
    let slices: Api<EndpointSlice> = Api::namespaced(client, &key.0);
    let params = PostParams::default();
    let mut written = Vec::new();
    for action in actions {
        let result = match action {
            Action::CreateEndpoints(object) => endpoints
                .create(&params, &object)
                .await
                .map(|object| Some(Written::Endpoints(Box::new(object)))),
            Action::ReplaceEndpoints(object) => endpoints
                .replace(&object.name_any(), &params, &object)
                .await
                .map(|object| Some(Written::Endpoints(Box::new(object)))),
            Action::DeleteEndpoints(name) => endpoints
                .delete(&name, &DeleteParams::default())
                .await
                .map(|_| None),
            Action::CreateSlice(slice) => slices
                .create(&params, &slice)
                .await
                .map(|slice| Some(Written::Slice(Box::new(slice)))),
            Action::ReplaceSlice(slice) => slices
                .replace(&slice.name_any(), &params, &slice)
                .await
                .map(|slice| Some(Written::Slice(Box::new(slice)))),
            Action::DeleteSlice(name) => slices.delete(&name, &DeleteParams::default()).await.map(|_| None),
        };
        match result {
            Ok(object) => written.extend(object),
            // Gone, being there already, or in a namespace that is going: the watch tells what is next.
            Err(kube::Error::Api(status))
                if status.code == 404 || status.code == 403 || status.reason == "AlreadyExists" => {}
            Err(error) => return (written, Err(error.to_string())),
        }
    }
    (written, Ok(()))
}
