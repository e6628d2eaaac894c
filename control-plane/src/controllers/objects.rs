//! One watch's view of its objects.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;

use kube::ResourceExt as _;
use kube::runtime::watcher::Event;

/// What became of an object: before and after.
pub(crate) type Transition<K> = (Option<Arc<K>>, Option<Arc<K>>);

/// Objects by namespace (empty for kinds without) and name.
#[derive(Debug)]
pub(crate) struct Objects<K> {
    objects: HashMap<String, BTreeMap<String, Arc<K>>>,
    /// What a list that is not complete yet has shown.
    listing: HashSet<(String, String)>,
    complete: bool,
    /// The newest revision that the watch has shown.
    seen: u64,
}

impl<K> Default for Objects<K> {
    fn default() -> Self {
        Self {
            objects: HashMap::new(),
            listing: HashSet::new(),
            complete: false,
            seen: 0,
        }
    }
}

fn revision<K: kube::Resource<DynamicType = ()>>(object: &K) -> u64 {
    object
        .resource_version()
        .and_then(|revision| revision.parse().ok())
        .unwrap_or_default()
}

impl<K: kube::Resource<DynamicType = ()>> Objects<K> {
    /// Whether everything has been listed once.
    pub(crate) fn is_complete(&self) -> bool {
        self.complete
    }

    pub(crate) fn get(&self, namespace: &str, name: &str) -> Option<&Arc<K>> {
        self.objects.get(namespace)?.get(name)
    }

    pub(crate) fn in_namespace(&self, namespace: &str) -> impl Iterator<Item = &Arc<K>> {
        self.objects.get(namespace).into_iter().flat_map(BTreeMap::values)
    }

    pub(crate) fn all(&self) -> impl Iterator<Item = &Arc<K>> {
        self.objects.values().flat_map(BTreeMap::values)
    }

    fn put(&mut self, object: K) -> Transition<K> {
        let object = Arc::new(object);
        let before = self
            .objects
            .entry(object.namespace().unwrap_or_default())
            .or_default()
            .insert(object.name_any(), Arc::clone(&object));
        (before, Some(object))
    }

    fn take(&mut self, namespace: &str, name: &str) -> Transition<K> {
        let before = self
            .objects
            .get_mut(namespace)
            .and_then(|objects| objects.remove(name));
        if self.objects.get(namespace).is_some_and(BTreeMap::is_empty) {
            self.objects.remove(namespace);
        }
        (before, None)
    }

    /// Takes in a watch event.
    pub(crate) fn observe(&mut self, event: Event<K>) -> Vec<Transition<K>> {
        match event {
            Event::Apply(object) => {
                self.seen = self.seen.max(revision(&object));
                if self.is_outdated(&object) {
                    return Vec::new();
                }
                vec![self.put(object)]
            }
            Event::Delete(object) => {
                self.seen = self.seen.max(revision(&object));
                if self.is_outdated(&object) {
                    return Vec::new();
                }
                vec![self.take(&object.namespace().unwrap_or_default(), &object.name_any())]
            }
            Event::Init => {
                self.listing.clear();
                Vec::new()
            }
            Event::InitApply(object) => {
                self.seen = self.seen.max(revision(&object));
                self.listing
                    .insert((object.namespace().unwrap_or_default(), object.name_any()));
                vec![self.put(object)]
            }
            Event::InitDone => {
                self.complete = true;
                let listed = std::mem::take(&mut self.listing);
                let gone: Vec<(String, String)> = self
                    .all()
                    .map(|object| (object.namespace().unwrap_or_default(), object.name_any()))
                    .filter(|place| !listed.contains(place))
                    .collect();
                gone.iter()
                    .map(|(namespace, name)| self.take(namespace, name))
                    .collect()
            }
        }
    }

    /// Whether an own write is newer than this, which was on its way meanwhile: what it shows is over.
    fn is_outdated(&self, object: &K) -> bool {
        self.get(&object.namespace().unwrap_or_default(), &object.name_any())
            .is_some_and(|known| revision(&**known) > revision(object))
    }

    /// Takes in the answer to an own write, unless the watch has been there already: what was written is known before
    /// the next decision, so that nothing is done twice.
    pub(crate) fn wrote(&mut self, object: K) {
        if revision(&object) > self.seen {
            self.put(object);
        }
    }
}

#[cfg(test)]
mod tests {
    use k8s_openapi::api::core::v1::Pod;
    use serde_json::json;

    use super::*;

    fn pod(name: &str, revision: u64) -> Pod {
        let meta = json!({"name": name, "namespace": "d", "resourceVersion": revision.to_string()});
        serde_json::from_value(json!({"metadata": meta})).unwrap()
    }

    fn names(objects: &Objects<Pod>) -> Vec<String> {
        let mut names: Vec<String> = objects.all().map(|pod| pod.name_any()).collect();
        names.sort();
        names
    }

    #[test]
    fn own_writes_are_known_before_the_watch_tells_and_forgotten_when_it_does() {
        let mut objects = Objects::default();
        objects.observe(Event::Init);
        objects.observe(Event::InitApply(pod("a", 5)));
        objects.observe(Event::InitDone);
        assert!(objects.is_complete());
        objects.wrote(pod("b", 7));
        assert_eq!(names(&objects), ["a", "b"]);
        objects.observe(Event::Apply(pod("b", 7)));
        objects.observe(Event::Delete(pod("b", 8)));
        // The answer comes late: the object is gone already.
        objects.wrote(pod("b", 7));
        assert_eq!(names(&objects), ["a"]);
    }

    #[test]
    fn what_was_on_its_way_before_an_own_write_changes_nothing() {
        let mut objects = Objects::default();
        let shown = |objects: &Objects<Pod>| revision(&**objects.get("d", "a").unwrap());
        objects.observe(Event::Apply(pod("a", 3)));
        objects.wrote(pod("a", 7));
        assert!(objects.observe(Event::Apply(pod("a", 5))).is_empty());
        assert_eq!(shown(&objects), 7);
        // one of the same name from before
        assert!(objects.observe(Event::Delete(pod("a", 6))).is_empty());
        assert_eq!(shown(&objects), 7);
        assert_eq!(objects.observe(Event::Apply(pod("a", 7))).len(), 1);
        assert_eq!(objects.observe(Event::Delete(pod("a", 7))).len(), 1);
        assert!(names(&objects).is_empty());
    }

    #[test]
    fn a_new_list_replaces_the_old_one() {
        let mut objects = Objects::default();
        for name in ["a", "b"] {
            objects.observe(Event::Apply(pod(name, 3)));
        }
        objects.observe(Event::Init);
        objects.observe(Event::InitApply(pod("b", 4)));
        let gone = objects.observe(Event::InitDone);
        assert_eq!(names(&objects), ["b"]);
        assert!(matches!(&gone[..], [(Some(gone), None)] if gone.name_any() == "a"));
    }
}
