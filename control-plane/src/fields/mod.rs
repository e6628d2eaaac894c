//! Who owns which field: `metadata.managedFields`, and server-side apply.
//!
//! The rules are those of sigs.k8s.io/structured-merge-diff as kube-apiserver 1.36 uses it. An update gives its manager
//! every field that it sets or changes, and takes those away from others. An apply gives its manager exactly the fields of
//! the applied configuration: changing another manager's field is a conflict, and a field that is left out goes unless
//! someone else owns it too.

mod set;
#[cfg(test)]
mod tests;
mod types;
mod walk;

use serde_json::{Value, json};

use crate::error::ApiError;
use crate::resource::ResourceInfo;
use set::Set;
use types::Type;

/// Managers with updates that are listed one by one; older ones are put together.
const MAX_UPDATERS: usize = 10;
const ANCIENT: &str = "ancient-changes";
/// Who owned the fields of an object that nobody was recorded for.
const BEFORE_FIRST_APPLY: &str = "before-first-apply";
/// Where client-side apply keeps the configuration.
const LAST_APPLIED: &str = "kubectl.kubernetes.io/last-applied-configuration";

/// Who makes a request, through what.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Manager {
    /// Name of the manager: query parameter `fieldManager`, or the program in `User-Agent`.
    pub name: String,
    /// `status`, `scale`, or nothing.
    pub subresource: String,
    /// Time of the request, RFC 3339 with seconds, UTC.
    pub now: String,
}

/// One entry of `managedFields`.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Entry {
    manager: String,
    apply: bool,
    api_version: String,
    time: String,
    subresource: String,
    set: Set,
}

impl Entry {
    fn new(r: &ResourceInfo, manager: &Manager, apply: bool, set: Set) -> Self {
        Self {
            manager: manager.name.clone(),
            apply,
            api_version: r.api_version(),
            time: manager.now.clone(),
            subresource: manager.subresource.clone(),
            set,
        }
    }

    fn is_of(&self, r: &ResourceInfo, manager: &Manager, apply: bool) -> bool {
        self.manager == manager.name
            && self.apply == apply
            && self.subresource == manager.subresource
            && (apply || self.api_version == r.api_version())
    }

    fn decode(entry: &Value) -> Option<Self> {
        let text = |field: &str| entry[field].as_str().unwrap_or_default().to_owned();
        let apply = match entry["operation"].as_str()? {
            "Apply" => true,
            "Update" => false,
            _ => return None,
        };
        Some(Self {
            manager: text("manager"),
            apply,
            api_version: entry["apiVersion"].as_str()?.to_owned(),
            time: text("time"),
            subresource: text("subresource"),
            set: Set::decode(entry.get("fieldsV1").unwrap_or(&json!({})))?,
        })
    }

    fn encode(&self) -> Value {
        let mut entry = json!({
            "manager": self.manager,
            "operation": if self.apply { "Apply" } else { "Update" },
            "apiVersion": self.api_version,
            "fieldsType": "FieldsV1",
            "fieldsV1": self.set.encode(),
        });
        if !self.time.is_empty() {
            entry["time"] = self.time.clone().into();
        }
        if !self.subresource.is_empty() {
            entry["subresource"] = self.subresource.clone().into();
        }
        entry
    }

    /// The manager as conflicts name it.
    fn describe(&self) -> String {
        let mut text = format!("{:?}", self.manager);
        if !self.subresource.is_empty() {
            text.push_str(&format!(" with subresource {:?}", self.subresource));
        }
        if !self.apply {
            text.push_str(&format!(" using {}", self.api_version));
        }
        text
    }
}

/// Reads a list of entries; nothing if one of them cannot be read.
fn decode(managed: &Value) -> Option<Vec<Entry>> {
    match managed {
        Value::Null => Some(Vec::new()),
        list => list.as_array()?.iter().map(Entry::decode).collect(),
    }
}

fn encode(mut entries: Vec<Entry>) -> Value {
    entries.retain(|entry| !entry.set.is_empty());
    cap(&mut entries);
    entries.sort_by(|a, b| {
        let key = |e: &Entry| {
            (
                !e.apply,
                e.time.clone(),
                e.manager.clone(),
                e.api_version.clone(),
                e.subresource.clone(),
            )
        };
        key(a).cmp(&key(b))
    });
    entries.iter().map(Entry::encode).collect()
}

/// Puts the oldest updates together when there are too many.
fn cap(entries: &mut Vec<Entry>) {
    let mut updates: Vec<Entry> = Vec::new();
    entries.retain(|entry| {
        if !entry.apply {
            updates.push(entry.clone());
        }
        entry.apply
    });
    updates.sort_by(|a, b| (&a.time, &a.manager).cmp(&(&b.time, &b.manager)));
    while updates.len() > MAX_UPDATERS {
        let oldest = updates
            .iter()
            .position(|entry| entry.manager != ANCIENT)
            .unwrap_or(0);
        let old = updates.remove(oldest);
        match updates.iter_mut().find(|e| {
            e.manager == ANCIENT && e.api_version == old.api_version && e.subresource == old.subresource
        }) {
            Some(ancient) => {
                ancient.set = ancient.set.union(&old.set);
                ancient.time = old.time;
            }
            None => {
                updates.push(Entry {
                    manager: ANCIENT.to_owned(),
                    ..old
                });
                if updates.len() > MAX_UPDATERS && updates.iter().all(|entry| entry.manager == ANCIENT) {
                    break;
                }
            }
        }
    }
    entries.append(&mut updates);
}

/// The `managedFields` of a new object as its defaults have completed it.
pub fn created(r: &ResourceInfo, object: &Value, manager: &Manager) -> Value {
    let mut entries = Vec::new();
    record_update(r, &types::zero(r), object, &mut entries, manager);
    encode(entries)
}

/// The `managedFields` of `new`, which replaces `old`; `given` are those that the client sent. Nothing when nobody's are
/// recorded.
pub fn updated(
    r: &ResourceInfo,
    old: &Value,
    new: &Value,
    given: &Value,
    manager: &Manager,
) -> Option<Value> {
    let stored = &old["metadata"]["managedFields"];
    // A client that does not know the field must not lose it; `[{}]` is how one clears it.
    let reset = given
        .as_array()
        .is_some_and(|list| list.len() == 1 && list.contains(&json!({})));
    let usable = manager.subresource.is_empty() && given.as_array().is_some_and(|list| !list.is_empty());
    let given = usable.then(|| decode(given)).flatten();
    let mut entries = match given {
        _ if reset && manager.subresource.is_empty() => Vec::new(),
        Some(given) => given,
        None => decode(stored).unwrap_or_default(),
    };
    if entries.is_empty() {
        return None;
    }
    record_update(r, old, new, &mut entries, manager);
    Some(encode(entries))
}

fn record_update(r: &ResourceInfo, old: &Value, new: &Value, entries: &mut Vec<Entry>, manager: &Manager) {
    let difference = compare(r, old, new, manager);
    let taken = difference.added.union(&difference.changed);
    for entry in entries.iter_mut() {
        entry.set = entry.set.difference(&taken).difference(&difference.removed);
    }
    if taken.is_empty() {
        return;
    }
    match entries.iter_mut().find(|entry| entry.is_of(r, manager, false)) {
        Some(entry) => {
            entry.set = entry.set.union(&taken);
            entry.time.clone_from(&manager.now);
        }
        None => entries.push(Entry::new(r, manager, false, taken)),
    }
}

fn compare(r: &ResourceInfo, old: &Value, new: &Value, manager: &Manager) -> walk::Difference {
    let difference = walk::compare(types::object(r), old, new);
    let owned = |set| types::owned(r, &manager.subresource, set);
    walk::Difference {
        added: owned(difference.added),
        changed: owned(difference.changed),
        removed: owned(difference.removed),
    }
}

/// The object that results from applying `config` to `live` (nothing if it does not exist yet), with its `managedFields`;
/// defaults and validation are still to come.
///
/// # Errors
/// A conflict when a field of another manager would change and `force` is not set; bad request for lists with duplicates.
pub fn apply(
    r: &ResourceInfo,
    live: Option<&Value>,
    config: &Value,
    manager: &Manager,
    force: bool,
) -> Result<Value, ApiError> {
    let ty = types::object(r);
    if let Some(problem) = walk::duplicate(ty, config, "") {
        return Err(ApiError::bad_request(format!(
            "failed to create typed patch object ({}; {}, Kind={}): {problem}",
            config["metadata"]["name"].as_str().unwrap_or_default(),
            r.api_version(),
            r.kind
        )));
    }
    let zero = types::zero(r);
    let base = live.unwrap_or(&zero);
    let mut entries = decode(&base["metadata"]["managedFields"]).unwrap_or_default();
    if entries.is_empty() && live.is_some() {
        let unrecorded = Manager {
            name: BEFORE_FIRST_APPLY.to_owned(),
            ..manager.clone()
        };
        record_update(r, &zero, base, &mut entries, &unrecorded);
    }
    let set = types::owned(r, &manager.subresource, walk::field_set(ty, config));
    let place = entries.iter().position(|entry| entry.is_of(r, manager, true));
    let last = place.map(|at| entries.remove(at));
    let merged = walk::merge(ty, live, config);
    let owned = entries
        .iter()
        .fold(set.clone(), |all, entry| all.union(&entry.set));
    let result = match &last {
        Some(last) => prune(ty, &merged, &last.set, &owned),
        None => merged,
    };
    let mut result = result;
    if let Some(metadata) = result.get_mut("metadata").and_then(Value::as_object_mut) {
        metadata.remove("managedFields");
    }
    let difference = compare(r, base, &result, manager);
    let touched = difference.added.union(&difference.changed);
    let conflicts: Vec<(Entry, Set)> = entries
        .iter()
        .map(|entry| (entry.clone(), entry.set.intersection(&touched)))
        .filter(|(_, set)| !set.is_empty())
        .collect();
    if !conflicts.is_empty() && !force && !taken_over_from_client_side(ty, base, &conflicts, manager) {
        return Err(conflict(&conflicts));
    }
    for entry in &mut entries {
        entry.set = entry.set.difference(&touched).difference(&difference.removed);
    }
    entries.push(Entry::new(r, manager, true, set));
    if manager.name == "kubectl" && base["metadata"]["annotations"].get(LAST_APPLIED).is_some() {
        result["metadata"]["annotations"][LAST_APPLIED] = format!("{config}\n").into();
    }
    result["metadata"]["managedFields"] = encode(entries);
    Ok(result)
}

/// Takes out what the manager applied before and does not apply any more, unless someone owns it.
fn prune(ty: Type<'_>, merged: &Value, last: &Set, owned: &Set) -> Value {
    let named = |set: &Set| walk::with_parents(ty, set);
    let last = named(last);
    let pruned = walk::remove(ty, merged, &last);
    let all = named(&walk::field_set(ty, merged));
    let keep = named(&walk::field_set(ty, &pruned)).union(&named(owned));
    let pruned = walk::remove(ty, merged, &all.difference(&keep));
    let left = named(&walk::field_set(ty, &pruned));
    walk::remove(ty, merged, &all.difference(&left).intersection(&last))
}

/// Whether all that is in conflict was set by client-side apply of the same program: then it is only a change of the way.
fn taken_over_from_client_side(
    ty: Type<'_>,
    live: &Value,
    conflicts: &[(Entry, Set)],
    manager: &Manager,
) -> bool {
    if manager.name != "kubectl" {
        return false;
    }
    let annotation = live["metadata"]["annotations"][LAST_APPLIED].as_str();
    let Some(config) = annotation.and_then(|text| serde_json::from_str::<Value>(text).ok()) else {
        return false;
    };
    let mut allowed = walk::field_set(ty, &config);
    allowed.insert(&[
        set::field("metadata"),
        set::field("annotations"),
        set::field(LAST_APPLIED),
    ]);
    conflicts
        .iter()
        .all(|(_, set)| set.difference(&allowed).is_empty())
}

fn conflict(conflicts: &[(Entry, Set)]) -> ApiError {
    let mut causes = Vec::new();
    let mut lines = Vec::new();
    for (entry, set) in conflicts {
        let who = entry.describe();
        lines.push(format!("conflicts with {who}:"));
        for path in set.paths() {
            lines.push(format!("- {path}"));
            causes.push(json!({
                "reason": "FieldManagerConflict", "message": format!("conflict with {who}"), "field": path,
            }));
        }
    }
    let message = match causes.as_slice() {
        [one] => format!(
            "Apply failed with 1 conflict: {}: {}",
            one["message"].as_str().unwrap_or_default(),
            one["field"].as_str().unwrap_or_default()
        ),
        many => format!("Apply failed with {} conflicts: {}", many.len(), lines.join("\n")),
    };
    ApiError {
        code: 409,
        reason: "Conflict",
        message,
        details: Some(json!({"causes": causes})),
    }
}

/// Whether two lists of entries differ in nothing but times.
pub fn same_but_for_times(a: &Value, b: &Value) -> bool {
    let timeless = |list: &Value| -> Option<Vec<Entry>> {
        let mut entries = decode(list)?;
        for entry in &mut entries {
            entry.time.clear();
        }
        entries.sort_by(|a, b| {
            (a.apply, &a.manager, &a.api_version, &a.subresource).cmp(&(
                b.apply,
                &b.manager,
                &b.api_version,
                &b.subresource,
            ))
        });
        Some(entries)
    };
    match (timeless(a), timeless(b)) {
        (Some(a), Some(b)) => a == b,
        _ => a == b,
    }
}
