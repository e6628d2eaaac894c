//! Who owns whom, as far as the watches have told, and what follows from it. No I/O.

use std::collections::{BTreeSet, HashMap};

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, OwnerReference};

use super::{FOREGROUND, ORPHAN};
use crate::resource::RESOURCES;

/// Where an object is: place of its kind in [`RESOURCES`], namespace (empty without one), name.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(super) struct Place {
    pub(super) kind: usize,
    pub(super) namespace: String,
    pub(super) name: String,
}

#[derive(Debug, Clone)]
struct Object {
    place: Place,
    owners: Vec<OwnerReference>,
    deleting: bool,
    foreground: bool,
    orphan: bool,
}

/// How the dependents of an object that is to be deleted are treated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Policy {
    Background,
    Foreground,
    Orphan,
}

/// What to do about one object.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Action {
    /// Delete it unless one of these owners, which no watch has shown, exists after all.
    Delete {
        place: Place,
        uid: String,
        policy: Policy,
        unseen: Vec<(Place, String)>,
    },
    /// Take these owners away from it; the unseen ones only if they do not exist.
    Disown {
        place: Place,
        uid: String,
        owners: Vec<String>,
        unseen: Vec<(Place, String)>,
    },
    /// Let it go.
    Release {
        place: Place,
        uid: String,
        finalizer: &'static str,
    },
}

/// All objects by uid.
#[derive(Debug, Default)]
pub(super) struct Graph {
    objects: HashMap<String, Object>,
    places: HashMap<Place, String>,
    dependents: HashMap<String, BTreeSet<String>>,
}

impl Graph {
    /// Takes in an object; returns the uids to look at.
    pub(super) fn put(&mut self, kind: usize, meta: &ObjectMeta) -> Vec<String> {
        let (Some(uid), Some(name)) = (meta.uid.clone(), meta.name.clone()) else {
            return Vec::new();
        };
        let place = Place {
            kind,
            namespace: meta.namespace.clone().unwrap_or_default(),
            name,
        };
        let mut dirty = match self.places.get(&place) {
            Some(before) if *before != uid => self.remove(&place),
            _ => Vec::new(),
        };
        let owners = meta.owner_references.clone().unwrap_or_default();
        let has = |name: &str| {
            meta.finalizers
                .iter()
                .flatten()
                .any(|finalizer| finalizer == name)
        };
        let object = Object {
            place: place.clone(),
            owners,
            deleting: meta.deletion_timestamp.is_some(),
            foreground: has(FOREGROUND),
            orphan: has(ORPHAN),
        };
        if let Some(before) = self.objects.get(&uid) {
            // An owner that waits for its dependents may have waited for this one.
            dirty.extend(before.owners.iter().map(|owner| owner.uid.clone()));
            for owner in before.owners.clone() {
                self.forget_dependent(&owner.uid, &uid);
            }
        }
        for owner in &object.owners {
            self.dependents
                .entry(owner.uid.clone())
                .or_default()
                .insert(uid.clone());
        }
        if object.deleting && object.foreground {
            dirty.extend(self.dependents_of(&uid));
        }
        dirty.push(uid.clone());
        self.places.insert(place, uid.clone());
        self.objects.insert(uid, object);
        dirty
    }

    /// Forgets an object; returns the uids to look at.
    pub(super) fn remove(&mut self, place: &Place) -> Vec<String> {
        let Some(uid) = self.places.remove(place) else {
            return Vec::new();
        };
        let mut dirty = self.dependents_of(&uid);
        if let Some(object) = self.objects.remove(&uid) {
            for owner in object.owners {
                self.forget_dependent(&owner.uid, &uid);
                dirty.push(owner.uid);
            }
        }
        dirty
    }

    /// The places of all objects of a kind.
    pub(super) fn of_kind(&self, kind: usize) -> Vec<Place> {
        self.places
            .keys()
            .filter(|place| place.kind == kind)
            .cloned()
            .collect()
    }

    fn forget_dependent(&mut self, owner: &str, dependent: &str) {
        if let Some(set) = self.dependents.get_mut(owner) {
            set.remove(dependent);
            if set.is_empty() {
                self.dependents.remove(owner);
            }
        }
    }

    fn dependents_of(&self, uid: &str) -> Vec<String> {
        self.dependents.get(uid).into_iter().flatten().cloned().collect()
    }

    /// What to do about the object of that uid.
    pub(super) fn decide(&self, uid: &str) -> Vec<Action> {
        let Some(object) = self.objects.get(uid) else {
            return Vec::new();
        };
        if object.deleting {
            return self.let_go(uid, object);
        }
        if object.owners.is_empty() {
            return Vec::new();
        }
        let (mut solid, mut gone, mut unseen) = (0, Vec::new(), Vec::new());
        let mut waiting = false;
        for owner in &object.owners {
            match self.objects.get(&owner.uid) {
                Some(found) if found.deleting && found.foreground => {
                    waiting = true;
                    gone.push(owner.uid.clone());
                }
                Some(_) => solid += 1,
                None => match place_of(owner, &object.place) {
                    Some(place) => {
                        gone.push(owner.uid.clone());
                        unseen.push((place, owner.uid.clone()));
                    }
                    // An owner of a kind that is not served cannot be looked for: it may exist.
                    None => solid += 1,
                },
            }
        }
        let (place, uid) = (object.place.clone(), uid.to_owned());
        if gone.is_empty() {
            return Vec::new();
        }
        if solid > 0 {
            return vec![Action::Disown {
                place,
                uid,
                owners: gone,
                unseen,
            }];
        }
        let policy = if object.orphan {
            Policy::Orphan
        } else if object.foreground || waiting && self.dependents.contains_key(&uid) {
            Policy::Foreground
        } else {
            Policy::Background
        };
        vec![Action::Delete {
            place,
            uid,
            policy,
            unseen,
        }]
    }

    /// What an object that is being deleted waits for.
    fn let_go(&self, uid: &str, object: &Object) -> Vec<Action> {
        let release = |finalizer| Action::Release {
            place: object.place.clone(),
            uid: uid.to_owned(),
            finalizer,
        };
        let dependents: Vec<(&String, &Object)> = self
            .dependents
            .get(uid)
            .into_iter()
            .flatten()
            .filter_map(|dependent| self.objects.get_key_value(dependent))
            .collect();
        if object.orphan {
            let mut actions: Vec<Action> = dependents
                .iter()
                .map(|(dependent, object)| Action::Disown {
                    place: object.place.clone(),
                    uid: (*dependent).clone(),
                    owners: vec![uid.to_owned()],
                    unseen: Vec::new(),
                })
                .collect();
            actions.push(release(ORPHAN));
            return actions;
        }
        let blocked = dependents.iter().any(|(_, dependent)| {
            dependent
                .owners
                .iter()
                .any(|owner| owner.uid == uid && owner.block_owner_deletion == Some(true))
        });
        if object.foreground && !blocked {
            return vec![release(FOREGROUND)];
        }
        Vec::new()
    }
}

/// Where an owner would be; nothing for kinds that are not served.
fn place_of(owner: &OwnerReference, dependent: &Place) -> Option<Place> {
    let kind = RESOURCES
        .iter()
        .position(|r| r.kind == owner.kind && r.api_version() == owner.api_version)?;
    let namespaced = RESOURCES.get(kind)?.namespaced;
    Some(Place {
        kind,
        namespace: if namespaced {
            dependent.namespace.clone()
        } else {
            String::new()
        },
        name: owner.name.clone(),
    })
}
