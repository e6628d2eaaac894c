//! How many requests are worked on at a time (kube-apiserver `WithMaxInFlightLimit`).

use std::sync::Arc;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::auth::{Ask, User};
use crate::error::ApiError;

/// What is not counted: it lasts as long as the client likes.
const LONG: [&str; 6] = [
    "pods/attach",
    "pods/exec",
    "pods/log",
    "pods/portforward",
    "pods/proxy",
    "services/proxy",
];

/// Requests that read, and those that write, each have their own number of places.
#[derive(Debug)]
pub struct Limits {
    reads: Option<Arc<Semaphore>>,
    writes: Option<Arc<Semaphore>>,
}

impl Limits {
    /// So many requests of each kind; 0 means any number.
    pub fn new(reads: usize, writes: usize) -> Self {
        let places = |number: usize| {
            (number > 0).then(|| Arc::new(Semaphore::new(number.min(Semaphore::MAX_PERMITS))))
        };
        Self {
            reads: places(reads),
            writes: places(writes),
        }
    }

    /// A place for the request, if it needs one. Administrators do not, so that a cluster that is asked too much can be mended.
    ///
    /// # Errors
    /// 429 when all are taken.
    pub(super) fn place(&self, user: &User, ask: &Ask) -> Result<Option<OwnedSemaphorePermit>, ApiError> {
        let (verb, resource) = match ask {
            Ask::Resource { verb, resource, .. } => (verb.as_str(), resource.as_str()),
            Ask::Path { verb, .. } => (verb.as_str(), ""),
        };
        if verb == "watch" || LONG.contains(&resource) || user.is_master() {
            return Ok(None);
        }
        let places = if matches!(verb, "get" | "list") {
            &self.reads
        } else {
            &self.writes
        };
        let Some(places) = places else {
            return Ok(None);
        };
        match Arc::clone(places).try_acquire_owned() {
            Ok(place) => Ok(Some(place)),
            Err(_) => Err(ApiError::too_many_requests()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ask(verb: &str, resource: &str) -> Ask {
        Ask::Resource {
            verb: verb.into(),
            group: String::new(),
            resource: resource.into(),
            namespace: "d".into(),
            name: String::new(),
        }
    }

    #[test]
    fn reads_and_writes_have_places_of_their_own_and_watches_need_none() {
        let user = |groups: &[&str]| User {
            name: "bob".into(),
            groups: groups.iter().map(|group| (*group).to_owned()).collect(),
            uid: String::new(),
        };
        let (bob, master) = (user(&[]), user(&["system:masters"]));
        let limits = Limits::new(1, 1);
        let list = ask("list", "pods");
        let held = limits.place(&bob, &list).unwrap();
        assert!(held.is_some());
        assert_eq!(limits.place(&bob, &ask("get", "pods")).unwrap_err().code, 429);
        for free in [
            ask("watch", "pods"),
            ask("get", "pods/log"),
            ask("create", "pods/exec"),
        ] {
            assert!(limits.place(&bob, &free).unwrap().is_none(), "{free:?}");
        }
        assert!(limits.place(&bob, &ask("create", "pods")).unwrap().is_some());
        assert!(limits.place(&master, &list).unwrap().is_none());
        drop(held);
        assert!(limits.place(&bob, &list).unwrap().is_some());
        assert!(Limits::new(0, 0).place(&bob, &list).unwrap().is_none());
    }
}
