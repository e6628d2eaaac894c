//! delete and deletecollection.

use bytes::Bytes;
use http::Response;
use jiff::{SignedDuration, Timestamp};
use serde_json::{Value, json};

use super::read::{self, Selector};
use super::request::{self, View};
use super::response::{self, Body};
use super::route::Target;
use super::{Api, Parts, codec, write};
use crate::error::{ApiError, Cause};
use crate::resource::ResourceInfo;
use crate::store::{Expect, Range, StoreError, Write};

const RETRIES: usize = 16;
/// Namespaces that the cluster cannot be without.
const IMMORTAL: [&str; 3] = ["default", "kube-public", "kube-system"];

/// Finalizer of an object whose dependents go before it.
pub(super) const FOREGROUND: &str = "foregroundDeletion";
/// Finalizer of an object whose dependents are to stay without it.
pub(super) const ORPHAN: &str = "orphan";

/// What happens to the objects that an object owns.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Propagation {
    /// They go after it.
    Background,
    /// They go before it.
    Foreground,
    /// They stay.
    Orphan,
}

/// `DeleteOptions`, from the body and the query.
#[derive(Debug, Default)]
pub(super) struct Options {
    dry_run: bool,
    uid: Option<String>,
    resource_version: Option<String>,
    grace: Option<i64>,
    propagation: Option<Propagation>,
    /// `orphanDependents: false` was given, the old way to ask for background deletion.
    cascade: bool,
}

impl Options {
    pub(super) async fn read<B>(parts: &Parts<'_>, body: B) -> Result<Self, ApiError>
    where
        B: hyper::body::Body<Data = Bytes>,
        B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        let body = request::read_body(body).await?;
        let options = if body.is_empty() {
            Value::Null
        } else {
            request::decode(&request::content_type(parts.headers), &body)?.map_err(ApiError::bad_request)?
        };
        Self::from_value(parts, &options)
    }

    fn from_value(parts: &Parts<'_>, options: &Value) -> Result<Self, ApiError> {
        let mut dry_run = parts.params.dry_run()?;
        for word in options["dryRun"].as_array().into_iter().flatten() {
            dry_run |= request::dry_run(word.as_str().unwrap_or_default())?;
        }
        let precondition = |field: &str| options["preconditions"][field].as_str().map(str::to_owned);
        let word = |field: &str| options[field].as_str().unwrap_or_else(|| parts.params.get(field));
        let orphan = match (&options["orphanDependents"], parts.params.get("orphanDependents")) {
            (Value::Bool(orphan), _) => Some(*orphan),
            (_, "") => None,
            (_, text) => Some(text == "true" || text == "1"),
        };
        let grace = match &options["gracePeriodSeconds"] {
            Value::Null => match parts.params.get("gracePeriodSeconds") {
                "" => None,
                text => Some(text.parse().map_err(|_| {
                    ApiError::bad_request(format!(
                        "invalid value for query parameter gracePeriodSeconds: {text:?} is not a number"
                    ))
                })?),
            },
            seconds => Some(seconds.as_i64().ok_or_else(|| {
                ApiError::bad_request(format!(
                    "gracePeriodSeconds is {seconds}, which is no whole number"
                ))
            })?),
        };
        Ok(Self {
            dry_run,
            uid: precondition("uid"),
            resource_version: precondition("resourceVersion"),
            grace,
            propagation: propagation(word("propagationPolicy"), orphan)?,
            cascade: orphan == Some(false),
        })
    }

    /// Deletes what the object owns as well, once it is gone.
    pub(super) fn background() -> Self {
        Self {
            propagation: Some(Propagation::Background),
            ..Self::default()
        }
    }

    /// Deletes without waiting for anybody but finalizers.
    pub(super) fn now() -> Self {
        Self {
            grace: Some(0),
            ..Self::default()
        }
    }

    fn check(&self, r: &ResourceInfo, name: &str, object: &Value) -> Result<(), ApiError> {
        let metadata = &object["metadata"];
        for (what, wanted, have) in [
            ("UID", &self.uid, &metadata["uid"]),
            (
                "ResourceVersion",
                &self.resource_version,
                &metadata["resourceVersion"],
            ),
        ] {
            let have = have.as_str().unwrap_or_default();
            if let Some(wanted) = wanted
                && wanted != have
            {
                let why = format!(
                    "Precondition failed: {what} in precondition: {wanted}, {what} in object meta: {have}"
                );
                return Err(ApiError::conflict_because(r, name, &why));
            }
        }
        Ok(())
    }
}

fn propagation(policy: &str, orphan: Option<bool>) -> Result<Option<Propagation>, ApiError> {
    let invalid = |cause: &Cause| Err(ApiError::invalid_options("DeleteOptions", cause));
    match (policy, orphan) {
        ("", None) => Ok(None),
        ("", Some(true)) => Ok(Some(Propagation::Orphan)),
        ("", Some(false)) | ("Background", None) => Ok(Some(Propagation::Background)),
        ("Foreground", None) => Ok(Some(Propagation::Foreground)),
        ("Orphan", None) => Ok(Some(Propagation::Orphan)),
        (policy, None) => invalid(&Cause::not_supported(
            "propagationPolicy",
            &policy.into(),
            &["Background", "Foreground", "Orphan"],
        )),
        (policy, Some(_)) => invalid(&Cause::invalid(
            "propagationPolicy",
            &policy.into(),
            "orphanDependents and deletionPropagation cannot be both set",
        )),
    }
}

/// What became of an object that was to be deleted.
#[derive(Debug)]
pub(super) enum Removed {
    /// It is gone; this is its last state.
    Gone(Value),
    /// It is marked, and goes once its finalizers (or its content) are gone.
    Marked(Value),
}

impl Api {
    pub(super) async fn delete(
        &self,
        parts: &Parts<'_>,
        target: &Target,
        name: &str,
        options: &Options,
    ) -> Result<Response<Body>, ApiError> {
        let r = target.resource;
        match self.remove(target, name, options).await? {
            Removed::Gone(object) if !answers_with_object(r) => {
                let mut details = json!({"name": name, "kind": r.plural, "uid": object["metadata"]["uid"]});
                if !r.group.is_empty() {
                    details["group"] = r.group.into();
                }
                let status = json!({
                    "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success", "details": details,
                });
                Ok(response::value(200, parts.accept, &status))
            }
            Removed::Gone(object) => read::answer_value(200, parts, r, object),
            Removed::Marked(object) => {
                let code = if options.cascade { 202 } else { 200 };
                read::answer_value(code, parts, r, object)
            }
        }
    }

    pub(super) async fn delete_collection(
        &self,
        parts: &Parts<'_>,
        target: &Target,
        options: &Options,
    ) -> Result<Response<Body>, ApiError> {
        let r = target.resource;
        let selector = Selector::parse(r, &parts.params, None)?;
        let range = Range {
            prefix: target.prefix(),
            ..Range::default()
        };
        let page = self.collect(r, &selector, range).await?;
        let mut items = Vec::with_capacity(page.items.len());
        for item in page.items {
            let mut object = codec::decode(r, item.revision, &item.value)?;
            let name = object["metadata"]["name"].as_str().unwrap_or_default();
            match self.remove(target, name, options).await {
                Ok(_) => {}
                // Someone else deleted it meanwhile.
                Err(error) if error.code == 404 => {}
                Err(error) => return Err(error),
            }
            if let Some(fields) = object.as_object_mut() {
                fields.remove("apiVersion");
                fields.remove("kind");
            }
            items.push(object);
        }
        let mut list = json!({
            "kind": r.list_kind,
            "apiVersion": r.api_version(),
            "metadata": {"resourceVersion": page.revision.to_string()},
            "items": items,
        });
        if parts.accept.view == View::Metadata {
            list["kind"] = "PartialObjectMetadataList".into();
            list["apiVersion"] = "meta.k8s.io/v1".into();
        }
        Ok(response::value(200, parts.accept, &list))
    }

    /// How many seconds the object has to end by itself: pods that run do, nothing else does.
    async fn grace(&self, r: &ResourceInfo, object: &Value, options: &Options) -> Result<i64, ApiError> {
        if !r.is("", "Pod") || matches!(object["status"]["phase"].as_str(), Some("Failed" | "Succeeded")) {
            return Ok(0);
        }
        let node = object["spec"]["nodeName"].as_str().unwrap_or_default();
        if node.is_empty() || !self.runs_pods(node).await? {
            return Ok(0);
        }
        let own = object["spec"]["terminationGracePeriodSeconds"]
            .as_i64()
            .unwrap_or(0);
        let period = options.grace.unwrap_or(own);
        Ok(if period < 0 { 1 } else { period })
    }

    /// Whether a node has an agent that ends pods and says so: one that has told its version. Pods of a node that was only
    /// registered by hand would be held for ever.
    async fn runs_pods(&self, node: &str) -> Result<bool, ApiError> {
        let nodes = write::collection("", "nodes", "")?;
        let Some(stored) = self.find(&nodes, node).await? else {
            return Ok(false);
        };
        let node = codec::decode(nodes.resource, stored.revision, &stored.value)?;
        let version = node["status"]["nodeInfo"]["kubeletVersion"].as_str();
        Ok(version.is_some_and(|version| !version.is_empty()))
    }

    /// `pods/{name}/eviction`: deletes a pod as draining a node does.
    pub(super) async fn evict(
        &self,
        parts: &Parts<'_>,
        target: &Target,
        name: &str,
        eviction: &Value,
    ) -> Result<Response<Body>, ApiError> {
        let given = eviction["metadata"]["name"].as_str().unwrap_or_default();
        if !given.is_empty() && given != name {
            return Err(ApiError::bad_request(format!(
                "name in URL does not match name in Eviction object: {name} and {given}"
            )));
        }
        let options = Options::from_value(parts, &eviction["deleteOptions"])?;
        self.remove(target, name, &options).await?;
        let status =
            json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success", "code": 201});
        Ok(response::value(201, parts.accept, &status))
    }

    /// Deletes one object, or marks it when something holds it.
    pub(super) async fn remove(
        &self,
        target: &Target,
        name: &str,
        options: &Options,
    ) -> Result<Removed, ApiError> {
        let r = target.resource;
        let namespace = r.group.is_empty() && r.kind == "Namespace";
        if namespace && IMMORTAL.contains(&name) {
            return Err(ApiError::forbidden(r, name, "this namespace may not be deleted"));
        }
        for _ in 0..RETRIES {
            let stored = self.stored(target, name).await?;
            let mut object = codec::decode(r, stored.revision, &stored.value)?;
            options.check(r, name, &object)?;
            let held = if namespace {
                if object["metadata"]["deletionTimestamp"].is_string() {
                    return Ok(Removed::Marked(object));
                }
                object["metadata"]["deletionTimestamp"] = read::now().into();
                object["status"]["phase"] = "Terminating".into();
                true
            } else {
                let before = object.clone();
                let grace = self.grace(r, &object, options).await?;
                let held = mark(r, &mut object, options, grace);
                if held && object == before {
                    return Ok(Removed::Marked(object));
                }
                held
            };
            let value = if held { Some(codec::encode(&object)?) } else { None };
            if options.dry_run {
                return Ok(if held {
                    Removed::Marked(object)
                } else {
                    Removed::Gone(object)
                });
            }
            let expect = Expect::Revision(stored.revision);
            let mut write = Write {
                key: stored.key,
                expect,
                value,
                guards: Vec::new(),
                also: Vec::new(),
            };
            self.claim(r, Some(&object), held.then_some(&object), &mut write);
            match self.store.write(write).await {
                Ok(revision) => {
                    codec::set_revision(&mut object, revision);
                    if namespace {
                        self.recheck_namespace(name);
                    }
                    if held {
                        return Ok(Removed::Marked(object));
                    }
                    self.give_back(r, &object).await;
                    if object["metadata"]["deletionTimestamp"].is_string() && r.namespaced {
                        self.recheck_namespace(&target.namespace);
                    }
                    return Ok(Removed::Gone(object));
                }
                Err(StoreError::Conflict { .. }) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Err(ApiError::conflict(r, name))
    }
}

/// Marks an object for deletion; false if nothing holds it and it can go at once (kube-apiserver `rest.BeforeDelete`,
/// `deletionFinalizersForGarbageCollection`).
fn mark(r: &ResourceInfo, object: &mut Value, options: &Options, grace: i64) -> bool {
    finalizers(r, object, options);
    let has_finalizers = object["metadata"]["finalizers"]
        .as_array()
        .is_some_and(|held| !held.is_empty());
    let marked: Option<Timestamp> = object["metadata"]["deletionTimestamp"]
        .as_str()
        .and_then(|time| time.parse().ok());
    if let Some(marked) = marked {
        // The time can only be cut.
        let pending = object["metadata"]["deletionGracePeriodSeconds"]
            .as_i64()
            .unwrap_or(0);
        let wanted = options.grace.map_or(pending, |_| grace.min(pending));
        if wanted < pending {
            let cut = marked - SignedDuration::from_secs(pending.saturating_sub(wanted));
            object["metadata"]["deletionTimestamp"] = read::timestamp(cut).into();
            object["metadata"]["deletionGracePeriodSeconds"] = wanted.into();
        }
        return has_finalizers || wanted > 0;
    }
    if !has_finalizers && grace == 0 {
        return false;
    }
    let end = Timestamp::now()
        .checked_add(SignedDuration::from_secs(grace))
        .unwrap_or(Timestamp::MAX);
    object["metadata"]["deletionTimestamp"] = read::timestamp(end).into();
    object["metadata"]["deletionGracePeriodSeconds"] = grace.into();
    if r.has_generation
        && let Some(generation) = object["metadata"]["generation"].as_i64()
    {
        object["metadata"]["generation"] = generation.saturating_add(1).into();
    }
    true
}

/// Sets or clears the finalizers that tell the garbage collector what to do with dependents.
fn finalizers(r: &ResourceInfo, object: &mut Value, options: &Options) {
    let before: Vec<Value> = object["metadata"]["finalizers"]
        .as_array()
        .cloned()
        .unwrap_or_default();
    let has = |name: &str| before.iter().any(|finalizer| finalizer == name);
    let policy = match options.propagation {
        Some(policy) => policy,
        None if has(ORPHAN) => Propagation::Orphan,
        None if has(FOREGROUND) => Propagation::Foreground,
        // Before there was a choice, this kind's pods stayed.
        None if r.is("", "ReplicationController") => Propagation::Orphan,
        None => Propagation::Background,
    };
    let wanted = match policy {
        Propagation::Background => None,
        Propagation::Foreground => Some(FOREGROUND),
        Propagation::Orphan => Some(ORPHAN),
    };
    let mut after: Vec<Value> = before
        .into_iter()
        .filter(|finalizer| *finalizer != ORPHAN && *finalizer != FOREGROUND)
        .collect();
    after.extend(wanted.map(Value::from));
    if let Some(metadata) = object["metadata"].as_object_mut() {
        if after.is_empty() {
            metadata.remove("finalizers");
        } else {
            metadata.insert("finalizers".into(), after.into());
        }
    }
}

/// Whether deleting an object of this kind answers with the object; the others answer with a Status
/// (`ReturnDeletedObject` in kubernetes/pkg/registry).
fn answers_with_object(r: &ResourceInfo) -> bool {
    r.group.is_empty() && matches!(r.kind, "Pod" | "Service" | "ServiceAccount")
}
