//! How many requests are worked on at a time (kube-apiserver `WithMaxInFlightLimit`), and how many one user may make.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::Instant;

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

/// Users whose requests are counted; when there are more, those who have been silent are forgotten.
const USERS: usize = 1024;
/// How many seconds' worth of requests may come at once.
const BURST: f64 = 2.0;

/// How many requests a user may make in a second.
#[derive(Debug)]
struct Rate {
    per_second: f64,
    /// What each may still ask at once, and when that was so.
    left: Mutex<HashMap<String, (f64, Instant)>>,
}

impl Rate {
    fn take(&self, user: &str, now: Instant) -> bool {
        let most = self.per_second * BURST;
        let left_now = |&(left, at): &(f64, Instant)| {
            let since = now.saturating_duration_since(at).as_secs_f64();
            (left + since * self.per_second).min(most)
        };
        let mut users = self.left.lock().unwrap_or_else(PoisonError::into_inner);
        if users.len() >= USERS && !users.contains_key(user) {
            users.retain(|_, left| left_now(left) < most);
        }
        let left = users.get(user).map_or(most, left_now);
        let allowed = left >= 1.0;
        let rest = if allowed { left - 1.0 } else { left };
        users.insert(user.to_owned(), (rest, now));
        allowed
    }
}

/// Requests that read, and those that write, each have their own number of places.
#[derive(Debug)]
pub struct Limits {
    reads: Option<Arc<Semaphore>>,
    writes: Option<Arc<Semaphore>>,
    rate: Option<Rate>,
}

impl Limits {
    /// So many requests of each kind at a time, and so many of each user in a second; 0 means any number.
    pub fn new(reads: usize, writes: usize, per_second: u32) -> Self {
        let places = |number: usize| {
            (number > 0).then(|| Arc::new(Semaphore::new(number.min(Semaphore::MAX_PERMITS))))
        };
        Self {
            reads: places(reads),
            writes: places(writes),
            rate: (per_second > 0).then(|| Rate {
                per_second: per_second.into(),
                left: Mutex::default(),
            }),
        }
    }

    /// A place for the request, if it needs one. Administrators do not, so that a cluster that is asked too much can be mended.
    ///
    /// # Errors
    /// 429 when all are taken, or this user has asked too often.
    pub(super) fn place(&self, user: &User, ask: &Ask) -> Result<Option<OwnedSemaphorePermit>, ApiError> {
        let (verb, resource) = match ask {
            Ask::Resource { verb, resource, .. } => (verb.as_str(), resource.as_str()),
            Ask::Path { verb, .. } => (verb.as_str(), ""),
        };
        if user.is_master() {
            return Ok(None);
        }
        if let Some(rate) = &self.rate
            && !rate.take(&user.name, Instant::now())
        {
            return Err(ApiError::too_many_requests());
        }
        if verb == "watch" || LONG.contains(&resource) {
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
    fn who_asks_too_often_waits_and_nobody_else() {
        let rate = Rate {
            per_second: 2.0,
            left: Mutex::default(),
        };
        let start = Instant::now();
        let at = |millis| start + std::time::Duration::from_millis(millis);
        let taken = |user, millis| (0..10).filter(|_| rate.take(user, at(millis))).count();
        assert_eq!(taken("bob", 0), 4, "two seconds' worth at once");
        assert_eq!(taken("eve", 0), 4);
        assert_eq!(taken("bob", 400), 0);
        assert_eq!(taken("bob", 1000), 2);
        assert_eq!(taken("bob", 60_000), 4, "no more for having waited long");
        for user in 0..USERS {
            rate.take(&user.to_string(), at(60_000));
        }
        rate.take("one more", at(120_000));
        assert_eq!(
            rate.left.lock().unwrap().len(),
            1,
            "those who are silent are forgotten"
        );
    }

    #[test]
    fn reads_and_writes_have_places_of_their_own_and_watches_need_none() {
        let user = |groups: &[&str]| User {
            name: "bob".into(),
            groups: groups.iter().map(|group| (*group).to_owned()).collect(),
            uid: String::new(),
        };
        let (bob, master) = (user(&[]), user(&["system:masters"]));
        let limits = Limits::new(1, 1, 0);
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
        assert!(Limits::new(0, 0, 0).place(&bob, &list).unwrap().is_none());
    }
}
