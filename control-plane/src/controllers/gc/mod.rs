//! The garbage collector: deletes objects whose owners are all gone, and carries out what a deletion asked for its
//! dependents (kube-controller-manager `garbagecollector`).
//!
//! [`graph`] decides, without I/O; [`run`] watches the metadata of everything that is served, and writes. Whether an owner is
//! gone is asked once more before anything is deleted, because watches of different kinds are not in step.

mod graph;
#[cfg(test)]
mod tests;

use std::collections::HashSet;
use std::time::Duration;

use futures::StreamExt as _;
use futures::stream;
use kube::api::{
    Api, ApiResource, DeleteParams, DynamicObject, Patch, PatchParams, Preconditions, PropagationPolicy,
};
use kube::core::PartialObjectMeta;
use kube::runtime::watcher;
use kube::{Client, ResourceExt as _};
use serde_json::json;
use tokio_util::sync::CancellationToken;

use super::work::{Changes, Controller, Next, drive, watch};
use crate::resource::{RESOURCES, ResourceInfo};
use graph::{Action, Graph, Place, Policy};

const FOREGROUND: &str = "foregroundDeletion";
const ORPHAN: &str = "orphan";

type Change = (usize, watcher::Event<PartialObjectMeta<DynamicObject>>);

/// Runs until `shutdown` is cancelled. The API may come and go meanwhile.
pub async fn run(client: Client, shutdown: CancellationToken) {
    let changes = changes(&client);
    drive(Collector::new(client), changes, shutdown).await;
}

/// Kinds whose objects own nothing and are owned by nothing that goes.
fn is_watched(r: &ResourceInfo) -> bool {
    !r.is("", "Event")
}

fn api_resource(r: &ResourceInfo) -> ApiResource {
    ApiResource {
        group: r.group.to_owned(),
        version: r.version.to_owned(),
        api_version: r.api_version(),
        kind: r.kind.to_owned(),
        plural: r.plural.to_owned(),
    }
}

fn changes(client: &Client) -> Changes<Change> {
    let streams = RESOURCES
        .iter()
        .enumerate()
        .filter(|(_, r)| is_watched(r))
        .map(|(kind, r)| {
            let api: Api<PartialObjectMeta<DynamicObject>> = Api::all_with(client.clone(), &api_resource(r));
            watch(
                api,
                watcher::Config::default(),
                |_| {},
                move |event| (kind, event),
            )
        });
    stream::select_all(streams).boxed()
}

struct Collector {
    client: Client,
    graph: Graph,
    /// Kinds whose first list is not complete.
    missing: HashSet<usize>,
    /// Per kind, what a list that is not complete has shown.
    listing: Vec<HashSet<Place>>,
}

impl Collector {
    fn new(client: Client) -> Self {
        let kinds = RESOURCES.iter().enumerate().filter(|(_, r)| is_watched(r));
        Self {
            client,
            graph: Graph::default(),
            missing: kinds.map(|(kind, _)| kind).collect(),
            listing: vec![HashSet::new(); RESOURCES.len()],
        }
    }
}

impl Controller for Collector {
    type Key = String;
    type Change = Change;
    type Done = ();
    const NAME: &'static str = "garbage collector";
    const PARALLEL: usize = 16;
    const BATCH: Duration = Duration::ZERO;

    fn is_complete(&self) -> bool {
        self.missing.is_empty()
    }

    fn observe(&mut self, (kind, event): Change) -> Vec<String> {
        let place = |object: &PartialObjectMeta<DynamicObject>| Place {
            kind,
            namespace: object.namespace().unwrap_or_default(),
            name: object.name_any(),
        };
        match event {
            watcher::Event::Init => {
                if let Some(listing) = self.listing.get_mut(kind) {
                    listing.clear();
                }
                Vec::new()
            }
            watcher::Event::InitApply(object) => {
                if let Some(listing) = self.listing.get_mut(kind) {
                    listing.insert(place(&object));
                }
                self.graph.put(kind, &object.metadata)
            }
            watcher::Event::InitDone => {
                self.missing.remove(&kind);
                let listed = self.listing.get_mut(kind).map(std::mem::take).unwrap_or_default();
                let mut dirty = Vec::new();
                for place in self.graph.of_kind(kind) {
                    if !listed.contains(&place) {
                        dirty.extend(self.graph.remove(&place));
                    }
                }
                dirty
            }
            watcher::Event::Apply(object) => self.graph.put(kind, &object.metadata),
            watcher::Event::Delete(object) => self.graph.remove(&place(&object)),
        }
    }

    fn decide(&mut self, uid: &String) -> Next<()> {
        let actions = self.graph.decide(uid);
        if actions.is_empty() {
            return Next::nothing();
        }
        let client = self.client.clone();
        let requests = async move {
            let result = carry_out(&client, actions).await;
            ((), result.map_err(|error| error.to_string()))
        };
        Next::requests(requests, None)
    }

    fn done(&mut self, _: &String, (): ()) -> bool {
        false
    }
}

fn api(client: &Client, place: &Place) -> Option<Api<DynamicObject>> {
    let r = RESOURCES.get(place.kind)?;
    let resource = api_resource(r);
    Some(if r.namespaced {
        Api::namespaced_with(client.clone(), &place.namespace, &resource)
    } else {
        Api::all_with(client.clone(), &resource)
    })
}

async fn carry_out(client: &Client, actions: Vec<Action>) -> Result<(), kube::Error> {
    for action in actions {
        match action {
            Action::Delete {
                place,
                uid,
                policy,
                unseen,
            } => {
                if any_exists(client, &unseen).await? {
                    continue;
                }
                let params = DeleteParams {
                    propagation_policy: Some(match policy {
                        Policy::Background => PropagationPolicy::Background,
                        Policy::Foreground => PropagationPolicy::Foreground,
                        Policy::Orphan => PropagationPolicy::Orphan,
                    }),
                    preconditions: Some(Preconditions {
                        uid: Some(uid),
                        ..Preconditions::default()
                    }),
                    ..DeleteParams::default()
                };
                if let Some(api) = api(client, &place) {
                    tolerate(api.delete(&place.name, &params).await.map(drop))?;
                }
            }
            Action::Disown {
                place,
                uid,
                owners,
                unseen,
            } => {
                let mut owners = owners;
                for owner in &unseen {
                    if any_exists(client, std::slice::from_ref(owner)).await? {
                        owners.retain(|uid| *uid != owner.1);
                    }
                }
                change(client, &place, &uid, |meta| {
                    let before = meta.owner_references.clone().unwrap_or_default();
                    let after: Vec<_> = before
                        .iter()
                        .filter(|owner| !owners.contains(&owner.uid))
                        .collect();
                    (after.len() != before.len()).then(|| json!({"ownerReferences": after}))
                })
                .await?;
            }
            Action::Release {
                place,
                uid,
                finalizer,
            } => {
                change(client, &place, &uid, |meta| {
                    let before = meta.finalizers.clone().unwrap_or_default();
                    let after: Vec<_> = before.iter().filter(|name| *name != finalizer).collect();
                    (after.len() != before.len()).then(|| json!({"finalizers": after}))
                })
                .await?;
            }
        }
    }
    Ok(())
}

/// An object that is gone, or another one of its name, is nothing to worry about.
fn tolerate(result: Result<(), kube::Error>) -> Result<(), kube::Error> {
    match result {
        Err(kube::Error::Api(status)) if matches!(status.code, 404 | 409) => Ok(()),
        other => other,
    }
}

/// Whether one of the owners exists.
async fn any_exists(client: &Client, owners: &[(Place, String)]) -> Result<bool, kube::Error> {
    for (place, uid) in owners {
        let Some(api) = api(client, place) else { continue };
        let found = api.get_metadata_opt(&place.name).await?;
        if found.is_some_and(|found| found.metadata.uid.as_ref() == Some(uid)) {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Patches the metadata of an object, if it is still that one.
async fn change(
    client: &Client,
    place: &Place,
    uid: &str,
    make: impl Fn(&k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta) -> Option<serde_json::Value>,
) -> Result<(), kube::Error> {
    let Some(api) = api(client, place) else {
        return Ok(());
    };
    let Some(found) = api.get_metadata_opt(&place.name).await? else {
        return Ok(());
    };
    if found.metadata.uid.as_deref() != Some(uid) {
        return Ok(());
    }
    let Some(mut metadata) = make(&found.metadata) else {
        return Ok(());
    };
    // Somebody else's change in between is a conflict, and this is tried again.
    metadata["resourceVersion"] = found.metadata.resource_version.clone().into();
    let patch = Patch::Merge(json!({"metadata": metadata}));
    match api
        .patch_metadata(&place.name, &PatchParams::default(), &patch)
        .await
    {
        Err(kube::Error::Api(status)) if status.code == 404 => Ok(()),
        other => other.map(drop),
    }
}
