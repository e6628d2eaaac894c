//! Whether packets get to the other nodes, and why not. Peers may run flannel: only their kernels are asked.
//!
//! Each way is looked at now and then with four packets: an echo, one of the largest size, and a datagram that a peer whose
//! checksums are well refuses. Only a way that fails costs more.

mod packet;
mod probe;

use std::collections::BTreeMap;
use std::fmt;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use beeline_cni::mac::Mac;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio::time::Instant;
use tracing::{debug, info, warn};

use super::View;

/// Looks at a time.
const PARALLEL: usize = 16;
/// Pause between the starts of two looks: a large cluster takes longer, not more.
const PACE: Duration = Duration::from_millis(20);
/// A node that is new to us may not know us yet.
const FIRST: Duration = Duration::from_secs(1);
/// Pause before a failure is looked at again. It counts when it was seen twice.
const AGAIN: (Duration, Duration) = (Duration::from_millis(500), Duration::from_secs(5));

/// A VXLAN tunnel.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Tunnel {
    /// VXLAN network identifier.
    pub vni: u32,
    /// UDP destination port.
    pub port: u16,
    /// Ethernet address of our device.
    pub own: Mac,
    /// What the peer announces as that of its device.
    pub peer: Mac,
}

/// One family of a node as it is reached from here.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Way {
    /// The node.
    pub node: String,
    /// Its podCIDR.
    pub subnet: ipnet::IpNet,
    /// Address that is asked: through a tunnel the first of its podCIDR, else its own.
    pub target: IpAddr,
    /// Our address for that.
    pub source: IpAddr,
    /// Where its packets are sent to.
    pub public: IpAddr,
    /// Our address for that.
    pub public_source: IpAddr,
    /// None: by a plain route.
    pub tunnel: Option<Tunnel>,
    /// Bytes of the largest packet.
    pub mtu: u32,
    /// Device that packets leave by.
    pub device: String,
}

/// Why packets do not get to a node.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Cause {
    /// It does not answer at all.
    Dead,
    /// It refuses packets of the tunnel.
    PortClosed,
    /// It answers, and the tunnel does not.
    PortBlocked,
    /// It drops packets because they are for another Ethernet address.
    WrongMac,
    /// Large packets are lost.
    Mtu {
        /// Bytes of a packet that arrives.
        largest: u32,
    },
    /// Packets are lost whose checksum is left to the device.
    Checksum,
}

impl Cause {
    /// Stable, for metrics and programs.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Dead => "dead",
            Self::PortClosed => "port_closed",
            Self::PortBlocked => "port_blocked",
            Self::WrongMac => "wrong_mac",
            Self::Mtu { .. } => "mtu",
            Self::Checksum => "checksum",
        }
    }
}

/// A cause in words.
struct Said<'a>(&'a Way, Cause);

impl fmt::Display for Said<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (way, public) = (self.0, self.0.public);
        let port = way.tunnel.as_ref().map_or(0, |tunnel| tunnel.port);
        match self.1 {
            Cause::Dead => write!(f, "{public} does not answer: the node is down or cut off"),
            Cause::PortClosed => write!(
                f,
                "nothing listens at UDP port {port} of {public}: is its VXLAN device there?"
            ),
            Cause::PortBlocked => {
                write!(
                    f,
                    "UDP port {port} is blocked: {public} answers, but not through the tunnel"
                )
            }
            Cause::WrongMac => {
                f.write_str("packets arrive and are dropped: its VXLAN device has another Ethernet address than the node says")?;
                match &way.tunnel {
                    Some(tunnel) => write!(f, " ({})", tunnel.peer),
                    None => Ok(()),
                }
            }
            Cause::Mtu { largest } => write!(
                f,
                "packets of {} bytes are lost, of {largest} they arrive: the MTU is too large for the network between the \
                 nodes (Backend.MTU)",
                way.mtu
            ),
            Cause::Checksum => write!(
                f,
                "packets are lost whose checksum the network card should finish: `ethtool -K {} tx-checksum-ip-generic off`",
                way.device
            ),
        }
    }
}

/// What is known of a way.
#[derive(Clone, Debug)]
pub struct Path {
    /// The way.
    pub way: Way,
    /// Round trip time, or why there is none; nothing before the first look has ended.
    pub state: Option<Result<Duration, Cause>>,
    /// Whether the state before this one was a failure.
    pub failed_before: bool,
    /// A failure that was seen once.
    suspected: bool,
    due: Instant,
    busy: bool,
}

impl Path {
    fn new(way: Way, now: Instant) -> Self {
        Self {
            way,
            state: None,
            failed_before: false,
            suspected: false,
            due: now + FIRST,
            busy: false,
        }
    }

    /// What is wrong, in words.
    #[must_use]
    pub fn problem(&self) -> Option<String> {
        let cause = self.state?.err()?;
        Some(Said(&self.way, cause).to_string())
    }
}

type Key = (String, bool);

fn key(way: &Way) -> Key {
    (way.node.clone(), way.target.is_ipv6())
}

/// All ways.
#[derive(Debug, Default)]
pub struct Paths(Mutex<BTreeMap<Key, Path>>);

impl Paths {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<Key, Path>> {
        // changed in single steps
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// In order of nodes, IPv4 first.
    #[must_use]
    pub fn all(&self) -> Vec<Path> {
        self.lock().values().cloned().collect()
    }

    /// Ways that changed are looked at anew. Whether any were forgotten.
    fn follow(&self, ways: &[Way], now: Instant) -> bool {
        let mut all = self.lock();
        let wanted: BTreeMap<Key, &Way> = ways.iter().map(|way| (key(way), way)).collect();
        let before = all.len();
        all.retain(|key, path| wanted.get(key).is_some_and(|way| **way == path.way));
        let forgotten = all.len() < before;
        for (key, way) in wanted {
            all.entry(key).or_insert_with(|| Path::new(way.clone(), now));
        }
        forgotten
    }

    /// The one that waits longest, or when the next one is due.
    fn next(&self, now: Instant) -> Result<Way, Option<Instant>> {
        let mut all = self.lock();
        let waiting = all.values_mut().filter(|path| !path.busy);
        match waiting.min_by_key(|path| path.due) {
            Some(path) if path.due <= now => {
                path.busy = true;
                Ok(path.way.clone())
            }
            path => Err(path.map(|path| path.due)),
        }
    }

    /// Takes what a look found; gives the path if its state has changed.
    fn take(
        &self,
        way: &Way,
        found: Result<Duration, Cause>,
        period: Duration,
        now: Instant,
    ) -> Option<Path> {
        let mut all = self.lock();
        let path = all.get_mut(&key(way)).filter(|path| path.way == *way)?;
        path.busy = false;
        let first = found.is_err() && !path.suspected;
        path.suspected = found.is_err();
        let pause = match found {
            Ok(_) => period.mul_f64(rand::random_range(0.9..1.1)),
            Err(_) if first => AGAIN.0,
            Err(_) => AGAIN.1.min(period),
        };
        path.due = now + pause;
        if first {
            return None;
        }
        let cause = |state: &Option<Result<Duration, Cause>>| state.map(Result::err);
        let before = path.state.replace(found);
        path.failed_before = matches!(before, Some(Err(_)));
        (cause(&before) != cause(&path.state)).then(|| path.clone())
    }

    /// A look that could not be made.
    fn put_off(&self, way: &Way, period: Duration) {
        if let Some(path) = self.lock().get_mut(&key(way)) {
            path.busy = false;
            path.due = Instant::now() + period;
        }
    }
}

/// Is told of changes.
pub trait Observer: Send + 'static {
    /// A look has ended.
    fn looked(&self, found: Result<Duration, Cause>);
    /// Ways are no longer there.
    fn forgotten(&self);
    /// A way fails, in another way than before, or works again.
    fn changed(&self, path: &Path);
}

/// Looks at all ways, each about once in `period`, until the network is gone.
pub async fn keep(
    paths: Arc<Paths>,
    mut view: watch::Receiver<View>,
    period: Duration,
    observer: impl Observer,
) {
    let mut looks = JoinSet::new();
    let mut told = false;
    loop {
        let ready = {
            let view = view.borrow_and_update();
            if paths.follow(&view.ways, Instant::now()) {
                observer.forgotten();
            }
            view.ready
        };
        let mut due = None;
        if ready && looks.len() < PARALLEL {
            match paths.next(Instant::now()) {
                Ok(way) => {
                    looks.spawn(async move {
                        let found = probe::check(&way).await;
                        (way, found)
                    });
                    due = Some(Instant::now() + PACE);
                }
                Err(next) => due = next,
            }
        }
        tokio::select! {
            () = tokio::time::sleep_until(due.unwrap_or_else(Instant::now)), if due.is_some() => {}
            Some(ended) = looks.join_next() => match ended {
                Ok((way, Ok(found))) => {
                    observer.looked(found);
                    if let Some(path) = paths.take(&way, found, period, Instant::now()) {
                        tell(&path);
                        observer.changed(&path);
                    }
                }
                Ok((way, Err(error))) => {
                    paths.put_off(&way, period);
                    if !std::mem::replace(&mut told, true) {
                        warn!(node = way.node, %error, "ways to other nodes cannot be looked at");
                    }
                }
                Err(error) => debug!(%error, "a look ended"),
            },
            changed = view.changed() => if changed.is_err() { return },
        }
    }
}

fn tell(path: &Path) {
    let (node, subnet) = (&path.way.node, path.way.subnet);
    match path.problem() {
        Some(problem) => warn!(node, %subnet, problem, "packets to this node are lost"),
        None => info!(node, %subnet, "packets get to this node"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn way(node: &str, mtu: u32) -> Way {
        Way {
            node: node.into(),
            subnet: "10.244.2.0/24".parse().unwrap(),
            target: "10.244.2.0".parse().unwrap(),
            source: "10.244.1.0".parse().unwrap(),
            public: "192.168.0.2".parse().unwrap(),
            public_source: "192.168.0.1".parse().unwrap(),
            tunnel: Some(Tunnel {
                vni: 1,
                port: 8472,
                own: Mac([2; 6]),
                peer: Mac([4; 6]),
            }),
            mtu,
            device: "flannel.1".into(),
        }
    }

    #[test]
    fn a_failure_counts_when_it_was_seen_twice_and_is_looked_at_sooner() {
        let period = Duration::from_secs(30);
        let begin = Instant::now();
        let paths = Paths::default();
        paths.follow(&[way("a", 1450)], begin);
        assert_eq!(paths.next(begin), Err(Some(begin + FIRST)), "too early");
        let now = begin + FIRST;
        let way = paths.next(now).unwrap();
        assert_eq!(paths.next(now), Err(None), "one look at a time");
        let take = |found, now| paths.take(&way, found, period, now);
        assert_eq!(take(Ok(Duration::ZERO), now).unwrap().problem(), None);
        assert!(take(Ok(PACE), now).is_none(), "no news");
        assert!(take(Err(Cause::Dead), now).is_none(), "seen once");
        assert_eq!(paths.all()[0].problem(), None);
        let now = now + AGAIN.0;
        assert!(paths.next(now).is_ok(), "looked at again soon");
        let problem = take(Err(Cause::Dead), now).unwrap().problem().unwrap();
        assert!(problem.contains("192.168.0.2 does not answer"), "{problem}");
        assert_eq!(paths.next(now), Err(Some(now + AGAIN.1)));
        let changed = take(Err(Cause::Mtu { largest: 1400 }), now).unwrap();
        let problem = changed.problem().unwrap();
        assert!(problem.contains("1450 bytes are lost, of 1400"), "{problem}");
        assert_eq!(take(Ok(PACE), now).unwrap().problem(), None, "again well");
    }

    #[test]
    fn ways_that_change_are_looked_at_anew_and_those_that_go_are_forgotten() {
        let now = Instant::now();
        let paths = Paths::default();
        paths.follow(&[way("a", 1450), way("b", 1450)], now);
        let old = way("a", 1450);
        paths.take(&old, Ok(PACE), PACE, now);
        assert!(paths.follow(&[way("a", 1400)], now));
        assert!(!paths.follow(&[way("a", 1400)], now), "no news");
        let all = paths.all();
        assert_eq!((all.len(), all[0].state), (1, None));
        assert!(
            paths.take(&old, Ok(PACE), PACE, now).is_none(),
            "a look at the old way"
        );
        assert_eq!(paths.all()[0].state, None);
    }
}
