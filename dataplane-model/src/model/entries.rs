//! Services with their slices, by name and by number.

use std::hash::BuildHasher;
use std::sync::Arc;

use hashbrown::{DefaultHashBuilder, HashTable};

use super::FAMILIES;
use crate::key::{Family, ObjectName, ServiceKey};
use crate::object::{ServiceObject, ServicePort, SliceObject};

/// A name, with what is known under it. Slices may come before their Service and stay after it.
#[derive(Debug)]
pub(super) struct Entry {
    pub(super) name: ObjectName,
    pub(super) service: Option<Box<ServiceObject>>,
    /// By slice name, because duplicates are resolved in that order. Nearly always one.
    pub(super) slices: Vec<(Arc<str>, SliceObject)>,
    dirty: bool,
}

impl Entry {
    /// The key of a port in a family.
    pub(super) fn key(&self, port: &ServicePort, family: Family) -> ServiceKey {
        ServiceKey {
            service: self.name.clone(),
            port_name: Arc::clone(&port.name),
            protocol: port.protocol,
            family,
        }
    }

    /// Every service of it: its ports in each family that they are offered in.
    pub(super) fn keys(&self) -> impl Iterator<Item = ServiceKey> + '_ {
        let service = self.service.as_deref();
        service.into_iter().flat_map(move |service| {
            FAMILIES.into_iter().flat_map(move |family| {
                let ports = service.ports.iter().enumerate();
                ports
                    .filter(move |(i, _)| service.offers(*i, family))
                    .map(move |(_, port)| self.key(port, family))
            })
        })
    }
}

/// All entries. Numbers are given again when nothing is known under a name any more and nobody waits to hear of it.
#[derive(Debug, Default)]
pub(super) struct Entries {
    list: Vec<Option<Entry>>,
    /// With their hashes: else every growth would look at every name.
    by_name: HashTable<(u64, u32)>,
    hasher: DefaultHashBuilder,
    free: Vec<u32>,
    dirty: Vec<u32>,
    services: usize,
}

impl Entries {
    pub(super) fn get(&self, id: u32) -> Option<&Entry> {
        self.list.get(id as usize)?.as_ref()
    }

    fn get_mut(&mut self, id: u32) -> Option<&mut Entry> {
        self.list.get_mut(id as usize)?.as_mut()
    }

    /// The number of a name.
    pub(super) fn find(&self, name: &ObjectName) -> Option<u32> {
        self.find_hashed(self.hasher.hash_one(name), &name.namespace, &name.name)
    }

    fn find_hashed(&self, hash: u64, namespace: &str, name: &str) -> Option<u32> {
        let same = |(other, id): &(u64, u32)| {
            let is_this = |entry: &Entry| *entry.name.name == *name && *entry.name.namespace == *namespace;
            *other == hash && self.get(*id).is_some_and(is_this)
        };
        self.by_name.find(hash, same).map(|(_, id)| *id)
    }

    /// The number of a name; a name that is not known gets one.
    pub(super) fn id(&mut self, namespace: &Arc<str>, name: &str) -> Option<u32> {
        // as an ObjectName is hashed
        let hash = self.hasher.hash_one((namespace, name));
        let known = self.find_hashed(hash, namespace, name);
        if known.is_some() {
            return known;
        }
        let entry = Some(Entry {
            name: ObjectName {
                namespace: Arc::clone(namespace),
                name: name.into(),
            },
            service: None,
            slices: Vec::new(),
            dirty: false,
        });
        let id = match self.free.pop() {
            Some(id) => {
                self.list[id as usize] = entry;
                id
            }
            None => {
                let id = u32::try_from(self.list.len()).ok()?;
                self.list.push(entry);
                id
            }
        };
        self.by_name.insert_unique(hash, (hash, id), |(hash, _)| *hash);
        Some(id)
    }

    /// Makes room for more.
    pub(super) fn reserve(&mut self, more: usize) {
        self.list.reserve(more);
        self.by_name.reserve(more, |(hash, _)| *hash);
    }

    /// How many have a Service.
    pub(super) const fn services(&self) -> usize {
        self.services
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (u32, &Entry)> {
        (0..)
            .zip(&self.list)
            .filter_map(|(id, entry)| Some((id, entry.as_ref()?)))
    }

    pub(super) fn service_names(&self) -> impl Iterator<Item = &ObjectName> {
        self.iter()
            .filter(|(_, entry)| entry.service.is_some())
            .map(|(_, entry)| &entry.name)
    }

    pub(super) fn set_service(&mut self, id: u32, service: Option<ServiceObject>) {
        if let Some(entry) = self.get_mut(id) {
            let before = usize::from(entry.service.is_some());
            entry.service = service.map(Box::new);
            let after = usize::from(entry.service.is_some());
            self.services = self.services + after - before;
        }
    }

    /// What the slice was, if it was another.
    pub(super) fn replace_slice(&mut self, id: u32, name: &str, slice: &SliceObject) -> Option<SliceObject> {
        let list = &mut self.get_mut(id)?.slices;
        let (_, known) = list.iter_mut().find(|(other, _)| **other == *name)?;
        (known != slice).then(|| std::mem::replace(known, slice.clone()))
    }

    pub(super) fn add_slice(&mut self, id: u32, name: Arc<str>, slice: SliceObject) {
        if let Some(entry) = self.get_mut(id) {
            let at = entry.slices.partition_point(|(other, _)| *other < name);
            // most services have one slice: room for no more than there are
            entry.slices.reserve_exact(1);
            entry.slices.insert(at, (name, slice));
        }
    }

    pub(super) fn remove_slice(&mut self, id: u32, name: &str) -> Option<SliceObject> {
        let slices = &mut self.get_mut(id)?.slices;
        let at = slices.iter().position(|(other, _)| **other == *name)?;
        Some(slices.remove(at).1)
    }

    /// What the entry's services should be may have changed.
    pub(super) fn mark(&mut self, id: u32) {
        if let Some(entry) = self.get_mut(id).filter(|entry| !entry.dirty) {
            entry.dirty = true;
            self.dirty.push(id);
        }
    }

    pub(super) fn take_dirty(&mut self) -> Vec<u32> {
        let dirty = std::mem::take(&mut self.dirty);
        for id in &dirty {
            if let Some(entry) = self.get_mut(*id) {
                entry.dirty = false;
            }
        }
        dirty
    }

    pub(super) fn free_if_empty(&mut self, id: u32) {
        let empty = |e: &&Entry| e.service.is_none() && e.slices.is_empty() && !e.dirty;
        let Some(entry) = self.get(id).filter(empty) else {
            return;
        };
        let hash = self.hasher.hash_one(&entry.name);
        if let Ok(found) = self.by_name.find_entry(hash, |(_, other)| *other == id) {
            found.remove();
        }
        self.list[id as usize] = None;
        self.free.push(id);
    }
}
