//! Taking over from kube-proxy, and handing back to it, while connections run.
//!
//! A connection that kube-proxy's rules translated is kept in step by the kernel's connection tracker: the rules are
//! asked about its first packet only. So the rules can go as soon as the agent has programmed everything. What such a
//! connection still needs, and gets until it ends:
//!
//! - A chain of type nat and a rule that needs connection tracking, somewhere in the network namespace. The kernel tracks
//!   and translates in hooks that it takes out together with the last of these, and kube-proxy may have had the only
//!   ones: [`nft::OWN_TABLE`] has both.
//! - `KUBE-FORWARD`, which lets packets of established connections through where the policy of FORWARD is DROP. No table
//!   of our own can stand in for it: an accept of one table is not heard by the others.
//! - For a moment, masquerading of packets that were marked before the rules went and come to that point after it. Our
//!   table has the rule.
//!
//! In its ipvs mode kube-proxy has virtual servers beside its rules: [`ipvs`] is asked about every packet. There the rules
//! and all else go only when the connections have ended.
//!
//! Sysctls stay as they are: `nf_conntrack_tcp_be_liberal` is asked of every packet, and replies to `127.0.0.1` need
//! `route_localnet`; so does `KUBE-FIREWALL`, which is kubelet's as well and guards the latter.

mod conntrack;
pub mod forward;
mod handback;
mod ipset;
mod ipvs;
mod legacy;
mod names;
mod netlink;
mod nft;
mod plan;
mod process;

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::fmt;
use std::hash::Hash;
use std::io;
use std::time::{Duration, Instant};

use tokio::sync::watch;
use tracing::{debug, error, info, warn};

use conntrack::Connection;
use netlink::Socket;
use plan::{Found, Removal, Stage, removal};
use process::Writer;

use crate::kernel::NodeTables;

pub(crate) use names::IPVS_DEVICE;

pub use handback::{HandBack, HandBackError, hand_back};

/// While something is awaited.
const SOON: Duration = Duration::from_secs(1);
/// Between two looks while connections run that kube-proxy translated, or its rules may come back.
const LOOK: Duration = Duration::from_secs(5);
/// When there is nothing of kube-proxy's.
const IDLE: Duration = Duration::from_secs(60);
/// So long after the rules were removed it is looked often whether they come back: kube-proxy looks itself every 30 s, and
/// may be started again.
const ALERT: Duration = Duration::from_secs(600);
/// First and longest pause before rules that came back are removed again.
const AGAIN: (Duration, Duration) = (Duration::from_secs(30), Duration::from_secs(1800));
/// Before what has been said is said again.
const REPEAT: Duration = Duration::from_secs(300);

/// An address family, as nftables names it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
enum Family {
    V4,
    V6,
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::V4 => "ip",
            Self::V6 => "ip6",
        })
    }
}

/// What there is of kube-proxy, and of an earlier take-over.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
struct Survey {
    /// Rules that decide on new connections, a line for each table.
    rules: Vec<String>,
    /// What is left of them for connections that run.
    rest: Vec<String>,
    /// Our own table.
    own: bool,
    /// Families in which Services are served by rules.
    complete: BTreeSet<Family>,
    /// Some of `rules` are of its ipvs mode: connections need all of them.
    ipvs: bool,
}

impl Survey {
    fn is_clean(&self) -> bool {
        self.rules.is_empty() && self.rest.is_empty() && !self.own
    }

    fn look_at<R: Clone>(&mut self, backend: &str, family: Family, found: &Found<R>) {
        let line = |what: &Removal<R>| {
            let count = what.chains.len().max(what.rules.len());
            format!("{backend} {family} {} ({count} chains)", found.table)
        };
        let now = removal(found, Stage::Rules);
        let later = removal(found, Stage::Rest);
        if !now.is_empty() {
            self.rules.push(line(&now));
        } else if !later.is_empty() {
            self.rest.push(line(&later));
        }
    }
}

/// What was removed.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
struct Counts {
    tables: usize,
    chains: usize,
    /// In chains that are not kube-proxy's.
    rules: usize,
    /// Of ipvs.
    servers: usize,
    /// Of ipset.
    sets: usize,
}

impl Counts {
    fn add<R>(&mut self, removal: &Removal<R>) {
        self.chains += removal.chains.len();
        self.rules += removal.rules.len();
    }
}

/// What the take-over does to this machine. A trait, so that its order can be tested without one.
trait Host {
    fn survey(&mut self) -> io::Result<Survey>;
    /// A kube-proxy that writes rules.
    fn kube_proxy(&self) -> Option<Writer>;
    /// What may have kube-proxy inside.
    fn suspect(&self) -> Option<Writer>;
    fn remove(&mut self, stage: Stage) -> io::Result<Counts>;
    fn remove_own(&mut self) -> io::Result<()>;
    /// Chains that stay, and what uses them.
    fn kept(&mut self) -> io::Result<BTreeMap<String, String>>;
    /// Connections that are translated.
    fn connections(&mut self) -> io::Result<HashSet<Connection>>;
    /// Connections through virtual servers.
    fn ipvs_connections(&mut self) -> io::Result<HashSet<ipvs::Connection>>;
    /// Removes virtual servers without any of these.
    fn remove_idle(&mut self, running: &HashSet<ipvs::Connection>) -> io::Result<()>;
    /// Says to the packet programs whether there are any.
    fn set_foreign(&mut self, on: bool);
}

/// This machine: the network namespace of the thread that opened it.
struct Machine {
    socket: Socket,
    /// The packet mark by which kube-proxy masquerades.
    mark: u32,
    tables: NodeTables,
}

fn survey(socket: &mut Socket) -> io::Result<Survey> {
    let mut survey = nft::survey(socket)?;
    legacy::survey(&mut survey)?;
    ipvs::survey(socket, &mut survey)?;
    Ok(survey)
}

impl Host for Machine {
    fn survey(&mut self) -> io::Result<Survey> {
        survey(&mut self.socket)
    }

    fn kube_proxy(&self) -> Option<Writer> {
        process::kube_proxy()
    }

    fn suspect(&self) -> Option<Writer> {
        process::suspect()
    }

    fn remove(&mut self, stage: Stage) -> io::Result<Counts> {
        let mut counts = Counts::default();
        // virtual servers are known by the device and the sets, and rules ask the sets
        ipvs::remove(&mut self.socket, &mut counts)?;
        nft::remove(&mut self.socket, stage, self.mark, &mut counts)?;
        legacy::remove(stage, &mut counts)?;
        ipvs::remove_sets(&mut self.socket, &mut counts)?;
        Ok(counts)
    }

    fn remove_own(&mut self) -> io::Result<()> {
        nft::remove_own(&mut self.socket).map(drop)
    }

    fn kept(&mut self) -> io::Result<BTreeMap<String, String>> {
        nft::kept(&mut self.socket)
    }

    fn connections(&mut self) -> io::Result<HashSet<Connection>> {
        conntrack::translated(&mut self.socket)
    }

    fn ipvs_connections(&mut self) -> io::Result<HashSet<ipvs::Connection>> {
        ipvs::connections()
    }

    fn remove_idle(&mut self, running: &HashSet<ipvs::Connection>) -> io::Result<()> {
        ipvs::remove_idle(&mut self.socket, running)
    }

    fn set_foreign(&mut self, on: bool) {
        self.tables.set_foreign_flows(on);
    }
}

/// Waits for the end of the connections that there were at the first look.
#[derive(Debug)]
struct Drain<C> {
    left: Option<HashSet<C>>,
    pause: Duration,
}

impl<C> Default for Drain<C> {
    fn default() -> Self {
        Self {
            left: None,
            pause: SOON,
        }
    }
}

impl<C: Eq + Hash + Clone> Drain<C> {
    /// When to look again, while one of them runs still.
    fn look(&mut self, current: &HashSet<C>, what: &str) -> Option<Duration> {
        let first = self.left.is_none();
        let left = self.left.get_or_insert_with(|| current.clone());
        left.retain(|connection| current.contains(connection));
        if left.is_empty() {
            return None;
        }
        if first {
            info!(
                connections = left.len(),
                "connections that kube-proxy translated run on; {what} when they have ended"
            );
        }
        self.pause = (self.pause * 2).min(LOOK);
        Some(self.pause)
    }
}

/// How a take-over goes on.
struct TakeOver<H> {
    host: H,
    /// False: only what an earlier agent began is finished.
    wanted: bool,
    /// Connections that run since before the rules went.
    draining: Drain<Connection>,
    /// Those of ipvs, before the rules go.
    ipvs_draining: Drain<ipvs::Connection>,
    removed_at: Option<Instant>,
    /// Rules that are back are not removed before.
    not_before: Option<Instant>,
    pause: Duration,
    /// What was said, and when.
    said: BTreeMap<String, Instant>,
    /// Nothing of kube-proxy was ever seen.
    quiet: bool,
    /// The packet programs know that connections run which kube-proxy translated.
    foreign: bool,
}

impl<H: Host> TakeOver<H> {
    fn new(host: H, wanted: bool) -> Self {
        Self {
            host,
            wanted,
            draining: Drain::default(),
            ipvs_draining: Drain::default(),
            removed_at: None,
            not_before: None,
            pause: AGAIN.0,
            said: BTreeMap::new(),
            quiet: true,
            foreign: false,
        }
    }

    fn set_foreign(&mut self, on: bool) {
        self.host.set_foreign(on);
        self.foreign = on;
    }

    /// True if this has not been said in the last minutes.
    fn say(&mut self, text: &str, now: Instant) -> bool {
        self.said.retain(|_, at| now.duration_since(*at) < REPEAT);
        self.said.insert(text.into(), now).is_none()
    }

    /// Does what can be done now. Gives when to look again; `None` if there will be nothing to do.
    fn tick(&mut self, now: Instant) -> io::Result<Option<Duration>> {
        let found = self.host.survey()?;
        if !found.is_clean() {
            self.set_foreign(true);
        }
        if !self.wanted {
            return self.tick_unwanted(&found);
        }
        if !found.rules.is_empty() {
            self.quiet = false;
            return self.on_rules(&found, now).map(Some);
        }
        if found.own || !found.rest.is_empty() || self.foreign {
            self.quiet = false;
            return self.drain().map(Some);
        }
        if self.quiet {
            self.quiet = false;
            info!("there are no rules of kube-proxy to take over from");
        }
        let alert = |removed| now.duration_since(removed) < ALERT;
        Ok(Some(if self.removed_at.is_some_and(alert) {
            LOOK
        } else {
            IDLE
        }))
    }

    /// Finishes what an earlier agent began, and watches how long kube-proxy is at work beside us.
    fn tick_unwanted(&mut self, found: &Survey) -> io::Result<Option<Duration>> {
        if !found.rules.is_empty() {
            if found.own {
                // kube-proxy is in charge; its rules keep translation going
                self.host.remove_own()?;
            }
            return Ok(Some(IDLE));
        }
        if found.own || self.foreign {
            return self.drain().map(Some);
        }
        self.set_foreign(false);
        Ok(None)
    }

    fn on_rules(&mut self, found: &Survey, now: Instant) -> io::Result<Duration> {
        if let Some(writer) = self.host.kube_proxy() {
            if self.say(&writer.to_string(), now) {
                warn!(
                    process = %writer,
                    rules = found.rules.join(", "),
                    "kube-proxy still runs and would write its rules again: they are removed as soon as it has ended"
                );
            }
            self.ipvs_draining = Drain::default();
            return Ok(SOON);
        }
        if found.ipvs {
            let current = self.host.ipvs_connections()?;
            let what = "its virtual servers and rules are removed";
            if let Some(pause) = self.ipvs_draining.look(&current, what) {
                self.host.remove_idle(&current)?;
                return Ok(pause);
            }
            self.ipvs_draining = Drain::default();
        }
        if let Some(at) = self.not_before.filter(|at| *at > now) {
            return Ok(at.duration_since(now));
        }
        if let Some(removed) = self.removed_at {
            let suspect = self.host.suspect();
            let suspect = suspect.map_or_else(
                || "no process that can be seen from here".into(),
                |s| s.to_string(),
            );
            warn!(
                process = suspect,
                rules = found.rules.join(", "),
                after = ?now.duration_since(removed),
                "kube-proxy's rules came back: something still writes them. Stop it (k3s: --disable-kube-proxy); they are \
                 removed once more"
            );
            self.not_before = Some(now + self.pause);
            self.pause = (self.pause * 2).min(AGAIN.1);
        }
        let counts = self.host.remove(Stage::Rules)?;
        self.removed_at = Some(now);
        // looked at in the next round: a packet may be on its way past the rules still
        self.draining = Drain::default();
        info!(
            tables = counts.tables,
            chains = counts.chains,
            rules = counts.rules,
            virtual_servers = counts.servers,
            ipsets = counts.sets,
            "took over from kube-proxy: its rules are removed, connections that it translated go on"
        );
        for (chain, by) in self.host.kept()? {
            warn!(
                chain,
                by, "a chain of kube-proxy's stays, because another program uses it"
            );
        }
        Ok(SOON)
    }

    fn drain(&mut self) -> io::Result<Duration> {
        let current = self.host.connections()?;
        if let Some(pause) = self.draining.look(&current, "what they need is removed") {
            return Ok(pause);
        }
        self.host.remove(Stage::Rest)?;
        self.set_foreign(false);
        self.draining = Drain::default();
        info!("no connection is left that kube-proxy translated: the last of its rules are removed");
        Ok(LOOK)
    }
}

/// Settings of a take-over.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Settings {
    /// kube-proxy's rules are removed. Without it, only what an earlier agent began is finished.
    pub wanted: bool,
    /// The packet mark by which kube-proxy masquerades.
    pub mark: u32,
}

/// Looks for kube-proxy before anything is programmed, so that packets of the connections that it translates are left to it.
/// `None` where there is no netfilter, and so no kube-proxy.
#[must_use]
pub fn prepare(settings: Settings, tables: NodeTables) -> Option<Task> {
    let socket = match Socket::open() {
        Ok(socket) => socket,
        Err(error) => {
            if settings.wanted {
                error!(%error, "cannot take over from kube-proxy: no way to netfilter");
            }
            return None;
        }
    };
    let host = Machine {
        socket,
        mark: settings.mark,
        tables,
    };
    let mut take_over = TakeOver::new(host, settings.wanted);
    match take_over.host.survey() {
        Ok(found) => take_over.set_foreign(!found.is_clean()),
        // the first look behind the first sync says it again
        Err(error) => {
            debug!(%error, "kube-proxy's rules cannot be read");
            take_over.set_foreign(true);
        }
    }
    Some(Task(take_over))
}

/// A take-over that is prepared.
pub struct Task(TakeOver<Machine>);

impl fmt::Debug for Task {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Task").field(&self.0.wanted).finish()
    }
}

/// What has to be there before kube-proxy's rules can go.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Programmed {
    /// All services that are known, nothing left out.
    pub services: bool,
    /// The addresses of this node.
    pub addresses: bool,
    /// The devices through which other hosts come.
    pub devices: bool,
}

impl Programmed {
    const fn all(self) -> bool {
        self.services && self.addresses && self.devices
    }

    /// Names what is not there.
    #[must_use]
    pub fn missing(self) -> Vec<&'static str> {
        let parts = [
            ("Services", self.services),
            ("the addresses of this node", self.addresses),
            ("its devices", self.devices),
        ];
        let missing = parts.into_iter().filter(|(_, there)| !there);
        missing.map(|(name, _)| name).collect()
    }
}

/// Takes over from kube-proxy once `complete` says that everything is programmed, and watches that it stays so. Ends when
/// there is nothing to do any more, or the sender of `complete` is gone.
pub async fn run(task: Task, mut complete: watch::Receiver<Programmed>) {
    let mut take_over = task.0;
    while !complete.borrow().all() {
        let all = complete.wait_for(|programmed| programmed.all());
        match tokio::time::timeout(IDLE, all).await.map(|done| done.is_ok()) {
            Ok(true) => {}
            Ok(false) => return,
            Err(_elapsed) if take_over.wanted => {
                let missing = complete.borrow().missing().join(", ");
                warn!(missing, "kube-proxy's rules stay until all is programmed");
            }
            Err(_elapsed) => {}
        }
    }
    let mut last = String::new();
    loop {
        // reading many rules, and the programs of iptables, take time
        let done = tokio::task::spawn_blocking(move || {
            let pause = take_over.tick(Instant::now());
            (take_over, pause)
        })
        .await;
        let Ok((back, pause)) = done else { return };
        take_over = back;
        let pause = match pause {
            Ok(Some(pause)) => {
                last.clear();
                pause
            }
            Ok(None) => return,
            // packets from the middle of unknown connections are left alone from now on: they may be kube-proxy's
            Err(error) if !take_over.wanted => {
                warn!(%error, "whether kube-proxy translates connections on this node cannot be known");
                return;
            }
            Err(error) => {
                let text = error.to_string();
                if text != last {
                    error!(%error, "taking over from kube-proxy failed; it is tried again");
                }
                last = text;
                LOOK
            }
        };
        tokio::time::sleep(pause).await;
    }
}

/// Removes what a take-over left for connections that run. For `beeline cleanup`; gives what was removed.
///
/// # Errors
///
/// If it is there and cannot be removed.
pub fn cleanup() -> io::Result<Vec<String>> {
    let mut socket = match Socket::open() {
        Ok(socket) => socket,
        // a kernel without netfilter
        Err(error) if error.raw_os_error() == Some(libc::EPROTONOSUPPORT) => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    let removed = nft::remove_own(&mut socket)?;
    Ok(removed
        .then(|| format!("nftables table inet {}", nft::OWN_TABLE))
        .into_iter()
        .collect())
}

#[cfg(test)]
mod tests;
