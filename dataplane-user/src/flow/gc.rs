//! Collecting flows that have ended or are silent, so that the maps never fill up with them and the kernel never has to
//! forget a live one.
//!
//! A flow is two entries, one per direction, and each knows when it was used last. When the maps are nearly full, flows go
//! before their time: those that are closing, then those that never got an answer, then datagram flows, the most silent
//! first. Established connections are left alone; if they alone fill the map, the kernel forgets the least recently used
//! and the programs find their backends again by the same hash.

use std::collections::HashSet;
use std::time::Duration;

use dataplane_common::abi::{Addr, BePort, Flow, FlowKey, flow_flag, flow_role, protocol};

use tracing::{error, warn};

use crate::kernel::{FlowTable, KernelError};
use crate::proxyconfig::{Conntrack, GoDuration};

/// Pause between two rounds, and while there is pressure.
pub const PERIOD: Duration = Duration::from_secs(5);
/// See [`PERIOD`].
pub const PERIOD_UNDER_PRESSURE: Duration = Duration::from_secs(1);
/// Pressure begins above so many hundredths of a map, and is relieved down to so many.
const PRESSURE: (usize, usize) = (80, 70);
/// Under pressure, flows that were used so recently stay all the same.
const RECENT: u64 = SECOND;
const SECOND: u64 = 1_000_000_000;

/// How long silent flows are kept.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Timeouts {
    /// TCP connections.
    pub established: Duration,
    /// TCP connections of which one side has closed its half.
    pub close_wait: Duration,
    /// TCP connections that were never answered.
    pub half_open: Duration,
    /// TCP connections that both sides have closed, or one has reset.
    pub closing: Duration,
    /// UDP flows that were never answered.
    pub udp: Duration,
    /// UDP flows.
    pub udp_stream: Duration,
    /// SCTP associations, which keep themselves alive.
    pub sctp: Duration,
}

impl Default for Timeouts {
    fn default() -> Self {
        Self {
            established: Duration::from_secs(6 * 3600),
            close_wait: Duration::from_secs(3600),
            half_open: Duration::from_secs(60),
            closing: Duration::from_secs(60),
            udp: Duration::from_secs(30),
            udp_stream: Duration::from_secs(120),
            sctp: Duration::from_secs(300),
        }
    }
}

impl Timeouts {
    /// kube-proxy's settings where they are set, and the defaults.
    #[must_use]
    pub fn new(settings: &Conntrack) -> Self {
        let default = Self::default();
        let set = |value: GoDuration, default| {
            let value = value.to_std();
            if value.is_zero() { default } else { value }
        };
        let or_default = |value: Option<GoDuration>, default| set(value.unwrap_or_default(), default);
        Self {
            established: or_default(settings.tcp_established_timeout, default.established),
            close_wait: or_default(settings.tcp_close_wait_timeout, default.close_wait),
            udp: set(settings.udp_timeout, default.udp),
            udp_stream: set(settings.udp_stream_timeout, default.udp_stream),
            ..default
        }
    }
}

/// What a flow is, in the order in which flows go under pressure.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
enum Class {
    Closing,
    HalfOpen,
    Datagram,
    /// Never goes before its time.
    Live,
}

/// Class and longest silence of a flow; `back` is the direction of the answers. Without it, which a full map has forgotten,
/// they may have come.
fn classify(key: &FlowKey, there: &Flow, back: Option<&Flow>, timeouts: &Timeouts) -> (Class, Duration) {
    let replied = there.flags & flow_flag::REPLIED != 0 || back.is_none_or(|back| back.packets > 0);
    let back_flags = back.map_or(0, |back| back.flags);
    match key.protocol {
        protocol::TCP => {
            let either = there.flags | back_flags;
            let both = there.flags & back_flags;
            if either & flow_flag::RST != 0 || both & flow_flag::FIN != 0 {
                (Class::Closing, timeouts.closing)
            } else if !replied {
                (Class::HalfOpen, timeouts.half_open)
            } else if either & flow_flag::FIN != 0 {
                (Class::Live, timeouts.close_wait)
            } else {
                (Class::Live, timeouts.established)
            }
        }
        protocol::SCTP if replied => (Class::Live, timeouts.sctp),
        protocol::SCTP => (Class::HalfOpen, timeouts.half_open),
        _ if replied => (Class::Datagram, timeouts.udp_stream),
        _ => (Class::Datagram, timeouts.udp),
    }
}

/// Key of a flow's answers.
fn answers(key: &FlowKey, flow: &Flow) -> FlowKey {
    if key.role == flow_role::FORWARD {
        FlowKey {
            src: flow.addr,
            dst: key.src,
            src_port: flow.port,
            dst_port: or(flow.client_port, key.src_port),
            role: flow_role::REVERSE,
            ..*key
        }
    } else {
        FlowKey {
            src: key.dst,
            dst: flow.addr,
            src_port: key.dst_port,
            dst_port: flow.port,
            role: flow_role::NAT_REVERSE,
            ..*key
        }
    }
}

/// Key of the flow that these are the answers of.
fn answered(key: &FlowKey, flow: &Flow) -> FlowKey {
    if key.role == flow_role::REVERSE {
        FlowKey {
            src: key.dst,
            dst: flow.addr,
            src_port: or(flow.client_port, key.dst_port),
            dst_port: flow.port,
            role: flow_role::FORWARD,
            ..*key
        }
    } else {
        FlowKey {
            src: flow.addr,
            dst: key.src,
            src_port: flow.port,
            dst_port: key.src_port,
            role: flow_role::NAT_FORWARD,
            ..*key
        }
    }
}

fn or(port: BePort, other: BePort) -> BePort {
    if port.to_be() == 0 { other } else { port }
}

/// True for the entry that says that a pod's datagrams keep their source, which has no other direction.
fn is_alone(key: &FlowKey, flow: &Flow) -> bool {
    key.role == flow_role::NAT_FORWARD && flow.addr == key.src && flow.port == key.src_port
}

fn is_answer(key: &FlowKey) -> bool {
    matches!(key.role, flow_role::REVERSE | flow_role::NAT_REVERSE)
}

/// What a round did with one map. Counts are of flows, except where they say entries.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Round {
    /// Entries that are left.
    pub entries: usize,
    /// Entries that fit.
    pub capacity: u32,
    /// Removed because they had been silent for too long.
    pub expired: usize,
    /// Removed before their time: closing ones.
    pub closing: usize,
    /// Removed before their time: never answered.
    pub half_open: usize,
    /// Removed before their time: datagram flows.
    pub datagram: usize,
    /// Still above the mark where pressure begins: nothing but live connections is left.
    pub full: bool,
}

impl Round {
    /// True if the map was, or is, nearly full.
    #[must_use]
    pub const fn pressure(&self) -> bool {
        self.full || self.closing + self.half_open + self.datagram > 0
    }
}

/// Collects one map.
#[derive(Debug)]
pub struct Collector {
    table: FlowTable,
    timeouts: Timeouts,
}

/// A flow that may go.
struct Candidate {
    class: Class,
    seen: u64,
    key: FlowKey,
    flow: Flow,
}

impl Collector {
    /// Of this map.
    #[must_use]
    pub const fn new(table: FlowTable, timeouts: Timeouts) -> Self {
        Self { table, timeouts }
    }

    /// One round at a point in time, in nanoseconds since boot as `CLOCK_MONOTONIC` counts.
    ///
    /// # Errors
    ///
    /// If the map cannot be read or changed.
    pub fn round(&self, now: u64) -> Result<Round, KernelError> {
        let capacity = self.table.capacity() as usize;
        let least = self.shortest();
        // no flow that was used a moment ago is looked at again
        let mut silent = Vec::new();
        let entries = self.table.visit(|key, flow| {
            if Duration::from_nanos(now.saturating_sub(flow.seen)) >= least {
                silent.push((*key, *flow));
            }
        })?;
        let mut round = Round {
            entries,
            capacity: self.table.capacity(),
            ..Round::default()
        };
        for (key, flow) in &silent {
            self.expire(key, flow, now, &mut round)?;
        }
        drop(silent);
        if round.entries > capacity / 100 * PRESSURE.0 {
            self.relieve(now, capacity / 100 * PRESSURE.1, &mut round)?;
        }
        round.full = round.entries > capacity / 100 * PRESSURE.0;
        Ok(round)
    }

    fn shortest(&self) -> Duration {
        let t = &self.timeouts;
        let all = [
            t.established,
            t.close_wait,
            t.half_open,
            t.closing,
            t.udp,
            t.udp_stream,
            t.sctp,
        ];
        all.into_iter().min().unwrap_or_default()
    }

    /// Removes the flow of an entry if it has been silent for too long in both directions.
    fn expire(&self, key: &FlowKey, flow: &Flow, now: u64, round: &mut Round) -> Result<(), KernelError> {
        if is_answer(key) {
            // the other direction decides, if it is there
            let there = answered(key, flow);
            if self.table.get(&there)?.is_some() {
                return Ok(());
            }
            let (_, limit) = classify(key, flow, Some(flow), &self.timeouts);
            let age = Duration::from_nanos(now.saturating_sub(flow.seen));
            if age >= limit && self.table.remove(key)? {
                round.entries = round.entries.saturating_sub(1);
                round.expired += 1;
            }
            return Ok(());
        }
        if is_alone(key, flow) {
            let age = Duration::from_nanos(now.saturating_sub(flow.seen));
            if age >= self.timeouts.udp_stream && self.remove(key, flow, round)? {
                round.expired += 1;
            }
            return Ok(());
        }
        // Without the entry of the answers, it is made again by the next packet: this one knows the backend, which the
        // service may not have any more.
        let back = self.table.get(&answers(key, flow))?;
        let seen = back.map_or(flow.seen, |back| back.seen.max(flow.seen));
        let (_, limit) = classify(key, flow, back.as_ref(), &self.timeouts);
        if Duration::from_nanos(now.saturating_sub(seen)) >= limit && self.remove(key, flow, round)? {
            round.expired += 1;
        }
        Ok(())
    }

    /// Removes both entries, unless the flow was used since it was looked at.
    fn remove(&self, key: &FlowKey, flow: &Flow, round: &mut Round) -> Result<bool, KernelError> {
        if self.table.get(key)?.is_none_or(|now| now.seen != flow.seen) {
            return Ok(false);
        }
        for key in [*key, answers(key, flow)] {
            if self.table.remove(&key)? {
                round.entries = round.entries.saturating_sub(1);
            }
        }
        Ok(true)
    }

    /// Removes flows before their time until only so many entries are left.
    fn relieve(&self, now: u64, target: usize, round: &mut Round) -> Result<(), KernelError> {
        let mut flows = Vec::new();
        self.table.visit(|key, flow| {
            if !is_answer(key) {
                flows.push((*key, *flow));
            }
        })?;
        let mut candidates = Vec::new();
        for (key, flow) in flows {
            let back = self.table.get(&answers(&key, &flow))?;
            let seen = back.as_ref().map_or(flow.seen, |back| back.seen.max(flow.seen));
            let (class, _) = classify(&key, &flow, back.as_ref(), &self.timeouts);
            if class != Class::Live && now.saturating_sub(seen) >= RECENT {
                candidates.push(Candidate {
                    class,
                    seen,
                    key,
                    flow,
                });
            }
        }
        candidates.sort_unstable_by_key(|candidate| (candidate.class, candidate.seen));
        for candidate in candidates {
            if round.entries <= target {
                break;
            }
            if !self.remove(&candidate.key, &candidate.flow, round)? {
                continue;
            }
            match candidate.class {
                Class::Closing => round.closing += 1,
                Class::HalfOpen => round.half_open += 1,
                Class::Datagram | Class::Live => round.datagram += 1,
            }
        }
        Ok(())
    }
}

/// A backend that serves a service no more, as flows know it: row in `SERVICES`, address and port.
pub type Left = (u32, Addr, BePort);

/// Removes the UDP flows to backends that have left their service, so that the next datagram of each goes to a live one
/// (spec kube-proxy 2.7); connections are left alone. Gives how many flows were removed. What is masqueraded for them needs
/// no sweep: towards another backend it is made anew.
///
/// # Errors
///
/// If the map (of [`crate::kernel::Kernel::flows`]) cannot be read or changed.
pub fn sweep(flows: &FlowTable, left: &HashSet<Left>) -> Result<usize, KernelError> {
    if left.is_empty() {
        return Ok(0);
    }
    let mut stale = Vec::new();
    flows.visit(|key, flow| {
        let there = key.role == flow_role::FORWARD && key.protocol == protocol::UDP;
        if there && left.contains(&(flow.service, flow.addr, flow.port)) {
            stale.push((*key, *flow));
        }
    })?;
    let mut count = 0;
    for (key, flow) in stale {
        // between reading and now the flow may have got another backend, whose answers must be kept
        let same = |now: Flow| (now.addr, now.port, now.service) == (flow.addr, flow.port, flow.service);
        if flows.get(&key)?.is_some_and(same) && flows.remove(&key)? {
            flows.remove(&answers(&key, &flow))?;
            count += 1;
        }
    }
    Ok(count)
}

/// Collects the maps (with their names) for as long as the agent runs. `told` hears of every round, and whether pressure
/// has begun in it.
pub async fn keep(
    maps: Vec<(&'static str, FlowTable)>,
    timeouts: Timeouts,
    told: impl Fn(&'static str, &Round, bool),
) {
    let mut collectors: Vec<(&'static str, Collector, bool)> = maps
        .into_iter()
        .map(|(name, table)| (name, Collector::new(table, timeouts), false))
        .collect();
    loop {
        let mut period = PERIOD;
        let mut done = Vec::new();
        for (name, collector, pressed) in collectors {
            // tens of milliseconds for a full map
            let work = tokio::task::spawn_blocking(move || (collector.round(now()), collector));
            let (result, collector) = match work.await {
                Ok(done) => done,
                Err(error) => {
                    error!(map = name, %error, "flows are collected no more");
                    continue;
                }
            };
            let pressure = match result {
                Ok(round) => {
                    told(name, &round, round.pressure() && !pressed);
                    round.pressure()
                }
                Err(error) => {
                    warn!(map = name, %error, "flows cannot be collected");
                    pressed
                }
            };
            if pressure {
                period = PERIOD_UNDER_PRESSURE;
            }
            done.push((name, collector, pressure));
        }
        collectors = done;
        tokio::time::sleep(period).await;
    }
}

/// Nanoseconds since boot, as the programs count them.
#[must_use]
pub fn now() -> u64 {
    let time = nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC);
    time.map_or(0, |time| {
        u64::try_from(Duration::from(time).as_nanos()).unwrap_or(u64::MAX)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn flow(flags: u32, packets: u64) -> Flow {
        Flow {
            flags,
            packets,
            ..Flow::default()
        }
    }

    #[test]
    fn flows_are_what_both_directions_say() {
        let timeouts = Timeouts::default();
        let (syn, fin, rst) = (flow_flag::SYN, flow_flag::FIN, flow_flag::RST);
        for (number, there, back, class, limit) in [
            (
                protocol::TCP,
                flow(syn, 1),
                flow(0, 0),
                Class::HalfOpen,
                timeouts.half_open,
            ),
            (
                protocol::TCP,
                flow(syn, 2),
                flow(syn, 1),
                Class::Live,
                timeouts.established,
            ),
            (
                protocol::TCP,
                flow(syn | fin, 3),
                flow(syn, 2),
                Class::Live,
                timeouts.close_wait,
            ),
            (
                protocol::TCP,
                flow(syn | fin, 3),
                flow(syn | fin, 2),
                Class::Closing,
                timeouts.closing,
            ),
            (
                protocol::TCP,
                flow(syn | rst, 3),
                flow(syn, 2),
                Class::Closing,
                timeouts.closing,
            ),
            (
                protocol::TCP,
                flow(syn, 3),
                flow(syn | rst, 2),
                Class::Closing,
                timeouts.closing,
            ),
            (
                protocol::UDP,
                flow(0, 3),
                flow(0, 0),
                Class::Datagram,
                timeouts.udp,
            ),
            (
                protocol::UDP,
                flow(0, 3),
                flow(0, 1),
                Class::Datagram,
                timeouts.udp_stream,
            ),
            (protocol::SCTP, flow(0, 3), flow(0, 1), Class::Live, timeouts.sctp),
            (
                protocol::SCTP,
                flow(0, 3),
                flow(0, 0),
                Class::HalfOpen,
                timeouts.half_open,
            ),
        ] {
            let key = FlowKey {
                protocol: number,
                role: flow_role::FORWARD,
                ..FlowKey::default()
            };
            assert_eq!(
                classify(&key, &there, Some(&back), &timeouts),
                (class, limit),
                "{there:?} {back:?}"
            );
        }
    }

    #[test]
    fn each_direction_names_the_other() {
        let ip = |last: u8| std::net::IpAddr::from([10, 0, 0, last]).into();
        let port = BePort::from_host;
        for role in [flow_role::FORWARD, flow_role::NAT_FORWARD] {
            for client_port in [0, 61_000] {
                let client_port = if role == flow_role::FORWARD {
                    client_port
                } else {
                    0
                };
                let key = FlowKey {
                    src: ip(1),
                    dst: ip(2),
                    src_port: port(1000),
                    dst_port: port(2000),
                    protocol: protocol::TCP,
                    role,
                    pad: 0,
                };
                let there = Flow {
                    addr: ip(3),
                    port: port(3000),
                    client_port: port(client_port),
                    ..Flow::default()
                };
                let back_key = answers(&key, &there);
                // as the programs write it
                let back = if role == flow_role::FORWARD {
                    Flow {
                        addr: key.dst,
                        port: key.dst_port,
                        client_port: if client_port == 0 { port(0) } else { key.src_port },
                        ..Flow::default()
                    }
                } else {
                    Flow {
                        addr: key.src,
                        port: key.src_port,
                        ..Flow::default()
                    }
                };
                assert!(is_answer(&back_key) && !is_answer(&key));
                assert_eq!(answered(&back_key, &back), key, "{role} {client_port}");
            }
        }
    }
}
