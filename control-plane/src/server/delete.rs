//! delete and deletecollection.

use bytes::Bytes;
use http::Response;
use serde_json::{Value, json};

use super::read::{self, Selector};
use super::request::{self, View};
use super::response::{self, Body};
use super::route::Target;
use super::{Api, Parts, codec, errors};
use crate::error::ApiError;
use crate::resource::ResourceInfo;
use crate::store::{Expect, Range, StoreError, Write};

const RETRIES: usize = 16;
/// Namespaces that the cluster cannot be without.
const IMMORTAL: [&str; 3] = ["default", "kube-public", "kube-system"];

/// `DeleteOptions`, from the body and the query.
#[derive(Debug, Default)]
pub(super) struct Options {
    dry_run: bool,
    uid: Option<String>,
    resource_version: Option<String>,
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
        let mut dry_run = parts.params.dry_run()?;
        for word in options["dryRun"].as_array().into_iter().flatten() {
            dry_run |= request::dry_run(word.as_str().unwrap_or_default())?;
        }
        let precondition = |field: &str| options["preconditions"][field].as_str().map(str::to_owned);
        Ok(Self {
            dry_run,
            uid: precondition("uid"),
            resource_version: precondition("resourceVersion"),
        })
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
            Removed::Gone(object) | Removed::Marked(object) => read::answer_value(200, parts, r, object),
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
        let page = self
            .collect(r, &selector, range)
            .await
            .map_err(|error| errors::from_store(&error))?;
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
            let held = namespace
                || object["metadata"]["finalizers"]
                    .as_array()
                    .is_some_and(|held| !held.is_empty());
            if held && object["metadata"]["deletionTimestamp"].is_string() {
                return Ok(Removed::Marked(object));
            }
            if held {
                mark(&mut object, namespace, r.has_generation);
            }
            let value = if held { Some(codec::encode(&object)?) } else { None };
            if options.dry_run {
                return Ok(if held {
                    Removed::Marked(object)
                } else {
                    Removed::Gone(object)
                });
            }
            let expect = Expect::Revision(stored.revision);
            match self
                .store
                .write(Write {
                    key: stored.key,
                    expect,
                    value,
                    guards: Vec::new(),
                })
                .await
            {
                Ok(revision) => {
                    codec::set_revision(&mut object, revision);
                    if namespace {
                        self.recheck_namespace(name);
                    }
                    if held {
                        return Ok(Removed::Marked(object));
                    }
                    self.give_back(r, &object).await;
                    return Ok(Removed::Gone(object));
                }
                Err(StoreError::Conflict { .. }) => {}
                Err(error) => return Err(errors::from_store(&error)),
            }
        }
        Err(ApiError::conflict(r, name))
    }
}

fn mark(object: &mut Value, namespace: bool, has_generation: bool) {
    object["metadata"]["deletionTimestamp"] = read::now().into();
    if namespace {
        object["status"]["phase"] = "Terminating".into();
        return;
    }
    object["metadata"]["deletionGracePeriodSeconds"] = 0.into();
    if has_generation && let Some(generation) = object["metadata"]["generation"].as_i64() {
        object["metadata"]["generation"] = generation.saturating_add(1).into();
    }
}

/// Whether deleting an object of this kind answers with the object; the others answer with a Status
/// (`ReturnDeletedObject` in kubernetes/pkg/registry).
fn answers_with_object(r: &ResourceInfo) -> bool {
    r.group.is_empty() && matches!(r.kind, "Pod" | "Service" | "ServiceAccount")
}
