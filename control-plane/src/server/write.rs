//! create, update, patch.

use http::Response;
use rand::Rng as _;
use serde_json::{Value, json};

use super::auth::User;
use super::claims::allocates;
use super::response::{self, Body};
use super::route::Target;
use super::{Api, Parts, codec, nodes, read, request};
use crate::error::ApiError;
use crate::fields::{self, Manager};
use crate::patch;
use crate::resource::{self, Allocator, Ctx, FieldValidation, Ownership, ResourceInfo};
use crate::store::{Expect, StoreError, Write};

/// How often a write is tried again when others write the same object at the same time.
pub(super) const RETRIES: usize = 16;
/// How often another name is tried for `generateName`, as kube-apiserver.
const NAMES: usize = 8;
/// What generated names are made of: no vowels, no characters that look alike (k8s.io/apimachinery/pkg/util/rand).
const NAME_LETTERS: &[u8] = b"bcdfghjklmnpqrstvwxz2456789";
/// Characters of `generateName` that are used; five more are added.
const NAME_BASE: usize = 58;

/// How a write is to be done.
#[derive(Debug, Clone, Default)]
pub(super) struct How {
    pub(super) dry_run: bool,
    pub(super) validation: FieldValidation,
    pub(super) ownership: Ownership,
    /// Whose rights are to be checked against what is written; nobody's for those who may do everything.
    pub(super) actor: Option<User>,
}

impl How {
    pub(super) fn of(parts: &Parts<'_>, subresource: Option<&str>) -> Result<Self, ApiError> {
        Ok(Self {
            dry_run: parts.params.dry_run()?,
            validation: parts.params.field_validation()?,
            ownership: Ownership::Of(manager(parts, subresource)?),
            actor: (!parts.user.is_master()).then(|| parts.user.clone()),
        })
    }
}

/// Who makes the request: as it says, or the program's name in `User-Agent`.
pub(super) fn manager(parts: &Parts<'_>, subresource: Option<&str>) -> Result<Manager, ApiError> {
    const MAX: usize = 128;
    let given = parts.params.get("fieldManager");
    if given.len() > MAX || given.chars().any(char::is_control) {
        return Err(ApiError::bad_request(format!(
            "fieldManager: Invalid value: {given:?}: must be printable and no longer than {MAX} bytes"
        )));
    }
    let agent = parts
        .headers
        .get(http::header::USER_AGENT)
        .and_then(|value| value.to_str().ok())
        .unwrap_or_default();
    let program = agent.split('/').next().unwrap_or_default();
    let name = match (given, program) {
        ("", "") => "unknown",
        ("", program) => program,
        (given, _) => given,
    };
    Ok(Manager {
        name: name.chars().take(MAX).collect(),
        subresource: subresource.unwrap_or_default().to_owned(),
        now: read::now(),
    })
}

/// The context for the rules of a kind.
pub(super) fn ctx<'a>(
    alloc: &'a mut Allocator,
    namespace_state: Option<&'a Value>,
    how: &'a How,
    warnings: &'a mut Vec<String>,
) -> Ctx<'a> {
    let uid = uuid::Uuid::new_v4().to_string();
    Ctx {
        now: read::now(),
        uid,
        namespace_state,
        alloc,
        field_validation: how.validation,
        warnings,
        ownership: &how.ownership,
    }
}

fn text<'a>(object: &'a Value, field: &str) -> &'a str {
    object["metadata"][field].as_str().unwrap_or_default()
}

/// Whether the object is marked for deletion and nothing holds it any more.
fn released(object: &Value) -> bool {
    let metadata = &object["metadata"];
    metadata["deletionTimestamp"].is_string()
        && metadata["finalizers"].as_array().is_none_or(Vec::is_empty)
        && metadata["deletionGracePeriodSeconds"].as_i64().unwrap_or(0) == 0
}

impl Api {
    pub(super) async fn create(
        &self,
        parts: &Parts<'_>,
        target: &Target,
        object: Value,
    ) -> Result<Response<Body>, ApiError> {
        let mut warnings = Vec::new();
        let created = self
            .insert(target, object, &How::of(parts, None)?, &mut warnings)
            .await?;
        answer(201, parts, target.resource, created, &warnings)
    }

    /// Creates an object and returns it as stored.
    pub(super) async fn insert(
        &self,
        target: &Target,
        mut object: Value,
        how: &How,
        warnings: &mut Vec<String>,
    ) -> Result<Value, ApiError> {
        let r = target.resource;
        place(target, &mut object)?;
        if let Some(user) = &how.actor {
            nodes::check_create(user, r, &object)?;
            self.check_escalation(user, r, &target.namespace, &object).await?;
        }
        let base = match (text(&object, "name"), text(&object, "generateName")) {
            ("", base) if !base.is_empty() => Some(base.to_owned()),
            _ => None,
        };
        let mut names = 0;
        for _ in 0..RETRIES {
            let mut candidate = object.clone();
            if let Some(base) = &base {
                candidate["metadata"]["name"] = generate_name(base).into();
            }
            warnings.clear();
            match self.try_insert(target, candidate, how, warnings).await? {
                Inserted::Done(object) => return Ok(object),
                Inserted::Exists(_) if base.is_some() && names < NAMES => names += 1,
                Inserted::Exists(name) => return Err(ApiError::already_exists(r, &name)),
                Inserted::NamespaceChanged => {}
            }
        }
        Err(ApiError::conflict(r, text(&object, "name")))
    }

    async fn try_insert(
        &self,
        target: &Target,
        mut object: Value,
        how: &How,
        warnings: &mut Vec<String>,
    ) -> Result<Inserted, ApiError> {
        let r = target.resource;
        let namespace = self.namespace_for_new(target, text(&object, "name")).await?;
        let mut alloc = self.allocator.lock().await;
        alloc.begin();
        let state = namespace.as_ref().map(|(state, _)| state);
        let prepared = resource::prepare_create(r, &mut ctx(&mut alloc, state, how, warnings), &mut object);
        if how.dry_run || prepared.is_err() {
            alloc.rollback();
        } else {
            // Kept before the write is durable, so that other creates need not wait for it; given back if it fails.
            alloc.commit();
        }
        drop(alloc);
        prepared?;
        let name = text(&object, "name").to_owned();
        let key = target.key(&name);
        if how.dry_run {
            let (found, _) = self.store.get(&key).await?;
            return Ok(if found.is_some() {
                Inserted::Exists(name)
            } else {
                Inserted::Done(object)
            });
        }
        let guards = namespace.into_iter().map(|(_, guard)| guard).collect();
        let written = match codec::encode(&object) {
            Ok(value) => {
                let mut write = Write {
                    key,
                    expect: Expect::Absent,
                    value: Some(value),
                    guards,
                    also: Vec::new(),
                };
                self.claim(r, None, Some(&object), &mut write);
                self.store.write(write).await
            }
            Err(error) => {
                self.give_back(r, &object).await;
                return Err(error);
            }
        };
        match written {
            Ok(revision) => {
                codec::set_revision(&mut object, revision);
                Ok(Inserted::Done(object))
            }
            Err(error) => {
                self.give_back(r, &object).await;
                match error {
                    StoreError::Conflict { .. } => Ok(Inserted::Exists(name)),
                    StoreError::Guard { .. } => Ok(Inserted::NamespaceChanged),
                    other => Err(other.into()),
                }
            }
        }
    }

    /// Returns what an object that is gone, or never came to be, had been given.
    pub(super) async fn give_back(&self, r: &ResourceInfo, object: &Value) {
        let mut alloc = self.allocator.lock().await;
        alloc.begin();
        resource::after_delete(
            r,
            &mut ctx(&mut alloc, None, &How::default(), &mut Vec::new()),
            object,
        );
        alloc.commit();
    }

    /// The namespace that an object is to be created in, and the condition that it stays as it is.
    async fn namespace_for_new(
        &self,
        target: &Target,
        name: &str,
    ) -> Result<Option<(Value, (String, Expect))>, ApiError> {
        let r = target.resource;
        let Some(namespaces) = resource::find("", "v1", "namespaces").filter(|_| r.namespaced) else {
            return Ok(None);
        };
        let namespace = self
            .stored(&Target::collection(namespaces, ""), &target.namespace)
            .await?;
        let state = codec::decode(namespaces, namespace.revision, &namespace.value)?;
        if state["metadata"]["deletionTimestamp"].is_string() {
            let why = format!(
                "unable to create new content in namespace {} because it is being terminated",
                target.namespace
            );
            let mut error = ApiError::forbidden(r, name, &why);
            error.details = Some(json!({
                "name": name,
                "kind": r.plural,
                "causes": [{
                    "reason": "NamespaceTerminating",
                    "message": format!("namespace {} is being terminated", target.namespace),
                    "field": "metadata.namespace",
                }],
            }));
            return Err(error);
        }
        Ok(Some((
            state,
            (namespace.key, Expect::Revision(namespace.revision)),
        )))
    }

    pub(super) async fn update(
        &self,
        parts: &Parts<'_>,
        target: &Target,
        name: &str,
        subresource: Option<&str>,
        mut object: Value,
    ) -> Result<Response<Body>, ApiError> {
        place_as(target, name, &mut object)?;
        let mut warnings = Vec::new();
        let how = How::of(parts, subresource)?;
        let changed = self
            .change(target, name, subresource, &how, &mut warnings, |_| {
                Ok(object.clone())
            })
            .await?;
        answer(200, parts, target.resource, changed, &warnings)
    }

    pub(super) async fn patch(
        &self,
        parts: &Parts<'_>,
        target: &Target,
        name: &str,
        subresource: Option<&str>,
        body: &[u8],
    ) -> Result<Response<Body>, ApiError> {
        let r = target.resource;
        let content_type = request::content_type(parts.headers);
        let how = How::of(parts, subresource)?;
        let mut warnings = Vec::new();
        let apply = |old: &Value| patch::apply(r, &content_type, old, body);
        let changed = self
            .change(target, name, subresource, &how, &mut warnings, apply)
            .await?;
        answer(200, parts, r, changed, &warnings)
    }

    /// Replaces an object by what `make` makes of it and returns it as stored. Tried again when someone else was faster;
    /// an object whose `resourceVersion` says what it is based on then ends as a conflict.
    pub(super) async fn change(
        &self,
        target: &Target,
        name: &str,
        subresource: Option<&str>,
        how: &How,
        warnings: &mut Vec<String>,
        make: impl Fn(&Value) -> Result<Value, ApiError>,
    ) -> Result<Value, ApiError> {
        let r = target.resource;
        for _ in 0..RETRIES {
            let stored = self.stored(target, name).await?;
            let old = codec::decode(r, stored.revision, &stored.value)?;
            let mut new = make(&old)?;
            check_same(r, name, &old, &new)?;
            if let Some(user) = &how.actor {
                if let Some(node) = user.node() {
                    nodes::check_change(node, r, &old, &new)?;
                }
                self.check_escalation(user, r, &target.namespace, &new).await?;
            }
            warnings.clear();
            let mut alloc = self.allocator.lock().await;
            alloc.begin();
            let mut context = ctx(&mut alloc, None, how, warnings);
            let prepared =
                resource::prepare_update(r, &mut context, &old, &mut new, subresource).and_then(|()| {
                    keep_times(&old, &mut new);
                    codec::encode(&new)
                });
            let value = match prepared {
                Ok(value) if !how.dry_run => value,
                other => {
                    alloc.rollback();
                    other?;
                    codec::set_revision(&mut new, stored.revision);
                    return Ok(new);
                }
            };
            // Writing what is there already would wake up every watcher for nothing, and some write on each event.
            if value == stored.value {
                alloc.rollback();
                return codec::decode(r, stored.revision, &stored.value);
            }
            let gone = released(&new);
            let mut write = Write {
                key: stored.key,
                expect: Expect::Revision(stored.revision),
                value: (!gone).then_some(value),
                guards: Vec::new(),
                also: Vec::new(),
            };
            self.claim(r, Some(&old), (!gone).then_some(&new), &mut write);
            let written = if allocates(r) {
                let written = self.store.write(write).await;
                match &written {
                    Ok(_) => alloc.commit(),
                    Err(_) => alloc.rollback(),
                }
                drop(alloc);
                written
            } else {
                alloc.commit();
                drop(alloc);
                self.store.write(write).await
            };
            match written {
                Ok(revision) => {
                    codec::set_revision(&mut new, revision);
                    self.changed(target, name, &new, gone).await;
                    return Ok(new);
                }
                // Someone else was faster, or took what was to be claimed.
                Err(StoreError::Conflict { .. } | StoreError::Guard { .. }) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Err(ApiError::conflict(r, name))
    }

    /// What follows from a change of an object that is being deleted.
    async fn changed(&self, target: &Target, name: &str, new: &Value, gone: bool) {
        if gone {
            self.give_back(target.resource, new).await;
        }
        if new["metadata"]["deletionTimestamp"].is_string() {
            if target.resource.namespaced {
                self.recheck_namespace(&target.namespace);
            } else if target.resource.kind == "Namespace" {
                self.recheck_namespace(name);
            }
        }
    }
}

enum Inserted {
    Done(Value),
    Exists(String),
    NamespaceChanged,
}

/// A write that changes nothing but the times in `managedFields` changes nothing.
fn keep_times(old: &Value, new: &mut Value) {
    let (before, after) = (
        &old["metadata"]["managedFields"],
        &new["metadata"]["managedFields"],
    );
    if before == after || !fields::same_but_for_times(before, after) {
        return;
    }
    let before = before.clone();
    let after = std::mem::replace(&mut new["metadata"]["managedFields"], before);
    if new != old {
        new["metadata"]["managedFields"] = after;
    }
}

/// Makes the object's namespace the one of the request.
fn place(target: &Target, object: &mut Value) -> Result<(), ApiError> {
    let Some(fields) = object.as_object_mut() else {
        return Err(ApiError::bad_request("the request's body is not an object"));
    };
    let metadata = fields.entry("metadata").or_insert_with(|| json!({}));
    let Some(metadata) = metadata.as_object_mut() else {
        return Err(ApiError::bad_request("the object's metadata is not an object"));
    };
    if !target.resource.namespaced {
        metadata.remove("namespace");
        return Ok(());
    }
    match metadata.get("namespace").and_then(Value::as_str) {
        Some(namespace) if !namespace.is_empty() && namespace != target.namespace => {
            Err(ApiError::bad_request(format!(
                "the namespace of the provided object does not match the namespace sent on the request ({namespace} \
                 instead of {})",
                target.namespace
            )))
        }
        _ => {
            metadata.insert("namespace".into(), target.namespace.clone().into());
            Ok(())
        }
    }
}

/// Makes the object the one that the request is for, by namespace and name.
pub(super) fn place_as(target: &Target, name: &str, object: &mut Value) -> Result<(), ApiError> {
    place(target, object)?;
    check_name(name, text(object, "name"))?;
    object["metadata"]["name"] = name.into();
    Ok(())
}

fn check_name(name: &str, given: &str) -> Result<(), ApiError> {
    if given.is_empty() || given == name {
        return Ok(());
    }
    Err(ApiError::bad_request(format!(
        "the name of the object ({given}) does not match the name on the URL ({name})"
    )))
}

/// What was written, as the client wants to see it.
pub(super) fn answer(
    code: u16,
    parts: &Parts<'_>,
    r: &ResourceInfo,
    object: Value,
    warnings: &[String],
) -> Result<Response<Body>, ApiError> {
    Ok(response::warn(
        read::answer_value(code, parts, r, object)?,
        warnings,
    ))
}

/// Refuses a replacement for another object than the stored one, or for another state of it.
fn check_same(r: &ResourceInfo, name: &str, old: &Value, new: &Value) -> Result<(), ApiError> {
    if !new["metadata"].is_object() {
        return Err(ApiError::bad_request("the object has no metadata"));
    }
    if text(new, "name") != name {
        return Err(ApiError::bad_request(format!(
            "the name of the object ({}) does not match the name on the URL ({name})",
            text(new, "name")
        )));
    }
    let (wanted, have) = (text(new, "uid"), text(old, "uid"));
    if !wanted.is_empty() && wanted != have {
        let why = format!("Precondition failed: UID in precondition: {wanted}, UID in object meta: {have}");
        return Err(ApiError::conflict_because(r, name, &why));
    }
    let based_on = text(new, "resourceVersion");
    if !based_on.is_empty() && based_on != "0" && based_on != text(old, "resourceVersion") {
        return Err(ApiError::conflict(r, name));
    }
    Ok(())
}

fn generate_name(base: &str) -> String {
    let mut rng = rand::rng();
    let mut name: String = base.chars().take(NAME_BASE).collect();
    for _ in 0..5 {
        let letter = NAME_LETTERS
            .get(rng.random_range(0..NAME_LETTERS.len()))
            .copied()
            .unwrap_or(b'x');
        name.push(char::from(letter));
    }
    name
}

/// The collection of `plural` (core group) in `namespace`.
pub(super) fn collection(group: &str, plural: &str, namespace: &str) -> Result<Target, ApiError> {
    let r = resource::find(group, "v1", plural)
        .ok_or_else(|| ApiError::internal(&format!("{plural} are not served")))?;
    Ok(Target::collection(r, namespace))
}
