//! Which backends are suspected to have failed: decisions only, no clock and no network of its own.
//!
//! A connection that was not answered gives the first hint. A probe decides: only a backend that does not answer the node
//! either becomes suspect, so that a client that a network policy keeps out, or a single lost packet, harms nobody. A suspect
//! is probed with single connections and returns when it answers, or when a client's connection to it gets an answer.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::time::{Duration, Instant};

/// How a probe ended.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Verdict {
    /// The handshake was completed.
    Answered,
    /// The address answers, but nobody listens there.
    Refused,
    /// No answer, or nobody knows a way to it.
    Silent,
}

impl Verdict {
    /// For metrics.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Answered => "answered",
            Self::Refused => "refused",
            Self::Silent => "silent",
        }
    }
}

/// What is known of a backend that is asked, or was.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Probing {
    /// It is suspect. Otherwise a connection to it has failed, and the first probe is on its way.
    pub suspect: bool,
    /// Probes since that connection failed.
    pub probes: u32,
    /// How the last one ended.
    pub last: Option<Verdict>,
}

/// A row of `BACKENDS` as long as it is the same backend's.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Target {
    /// Row in `BACKENDS`.
    pub id: u32,
    /// Generation of the row.
    pub generation: u32,
    /// Where it listens (TCP).
    pub addr: SocketAddr,
}

/// Connections to a backend that answers may fail for reasons of the client's own: it is not probed again within this time.
const PAUSE: Duration = Duration::from_secs(1);
/// Pauses between probes of a suspect, by how long it has been one.
const INTERVALS: [(Duration, Duration); 2] = [
    (Duration::from_secs(20), Duration::from_millis(500)),
    (Duration::from_secs(120), Duration::from_secs(1)),
];
/// The pause after that.
const LONGEST: Duration = Duration::from_secs(5);
/// A backend that becomes suspect again within this time has to answer twice as often as before until it returns.
const FLAPPING: Duration = Duration::from_secs(60);
/// Answers in a row that are asked for at most.
const MOST_ANSWERS: u32 = 8;
/// A suspect that has never answered a probe may be out of reach for this node's probes only. So it gets connections on trial
/// after this time, then after twice as long each.
const TRIAL: Duration = Duration::from_secs(60);
/// The longest time between two trials.
const LONGEST_TRIAL: Duration = Duration::from_secs(960);

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Phase {
    /// A connection has failed, and the probe is on its way.
    Checking,
    /// It answers, and is left alone until then.
    Good { until: Instant },
    Suspect {
        since: Instant,
        verdict: Verdict,
        /// Answers in a row that are still missing.
        missing: u32,
        /// `None` while a probe is on its way.
        probe: Option<Instant>,
    },
}

#[derive(Clone, Copy, Debug)]
struct Watch {
    target: Target,
    phase: Phase,
    /// Since it was last good.
    probes: u32,
    /// How the last of these ended.
    last: Option<Verdict>,
    /// When it last returned from being suspect.
    returned: Option<Instant>,
    /// Answers that it had to give then.
    answers: u32,
    /// It has answered a probe at some time.
    reachable: bool,
    /// How long it stays suspect without an answer until it is tried.
    trial: Duration,
}

/// What is known of backends that connections failed to.
#[derive(Debug, Default)]
pub struct Detector {
    watched: HashMap<u32, Watch>,
}

impl Detector {
    /// A connection to the backend failed, or timed out. True if it is to be probed now.
    pub fn failed(&mut self, target: Target, now: Instant) -> bool {
        let watch = self
            .watched
            .entry(target.id)
            .or_insert_with(|| Watch::new(target, now));
        if watch.target != target {
            *watch = Watch::new(target, now);
        }
        match watch.phase {
            Phase::Good { until } if until <= now => {
                watch.phase = Phase::Checking;
                (watch.probes, watch.last) = (1, None);
                true
            }
            _ => false,
        }
    }

    /// A client's connection to the backend got an answer after all. True if the suspects are others now.
    pub fn alive(&mut self, id: u32, generation: u32, now: Instant) -> bool {
        match self.watched.get_mut(&id) {
            Some(watch) if watch.target.generation == generation => watch.good(now),
            _ => false,
        }
    }

    /// A probe has ended. True if the suspects are others now.
    pub fn probed(&mut self, target: Target, verdict: Verdict, now: Instant) -> bool {
        let Some(watch) = self.watched.get_mut(&target.id).filter(|w| w.target == target) else {
            return false;
        };
        watch.reachable |= verdict == Verdict::Answered;
        watch.last = Some(verdict);
        match (watch.phase, verdict) {
            (Phase::Good { .. }, _) => false,
            (Phase::Checking, Verdict::Answered) => watch.good(now),
            (Phase::Checking, _) => {
                let again = watch.returned.is_some_and(|at| now.duration_since(at) < FLAPPING);
                watch.answers = if again {
                    (watch.answers * 2).min(MOST_ANSWERS)
                } else {
                    1
                };
                watch.phase = Phase::Suspect {
                    since: now,
                    verdict,
                    missing: watch.answers,
                    probe: Some(now + interval(Duration::ZERO)),
                };
                true
            }
            (Phase::Suspect { missing: 0 | 1, .. }, Verdict::Answered) => watch.good(now),
            (
                Phase::Suspect {
                    since,
                    verdict: before,
                    missing,
                    ..
                },
                _,
            ) => {
                let age = now.duration_since(since);
                if verdict != Verdict::Answered && !watch.reachable && age >= watch.trial {
                    watch.trial = (watch.trial * 2).min(LONGEST_TRIAL);
                    let changed = watch.good(now);
                    // it has done nothing for this
                    watch.returned = None;
                    return changed;
                }
                let (verdict, missing) = match verdict {
                    Verdict::Answered => (before, missing - 1),
                    other => (other, watch.answers),
                };
                watch.phase = Phase::Suspect {
                    since,
                    verdict,
                    missing,
                    probe: Some(now + interval(age)),
                };
                verdict != before
            }
        }
    }

    /// The suspects to probe now.
    pub fn due(&mut self, now: Instant) -> Vec<Target> {
        let mut out = Vec::new();
        for watch in self.watched.values_mut() {
            if let Phase::Suspect { probe, .. } = &mut watch.phase
                && probe.is_some_and(|at| at <= now)
            {
                *probe = None;
                watch.probes = watch.probes.saturating_add(1);
                out.push(watch.target);
            }
        }
        out
    }

    /// When something is due; `None` if nothing is going to be.
    #[must_use]
    pub fn next_due(&self) -> Option<Instant> {
        let probes = self.watched.values().filter_map(|watch| match watch.phase {
            Phase::Suspect { probe, .. } => probe,
            _ => None,
        });
        probes.min()
    }

    /// Forgets backends whose rows are not theirs any more, and those that have long been good. True if the suspects are
    /// others now.
    pub fn forget(&mut self, now: Instant, is_current: impl Fn(&Target) -> bool) -> bool {
        let mut changed = false;
        self.watched.retain(|_, watch| {
            let suspect = matches!(watch.phase, Phase::Suspect { .. });
            let old = matches!(watch.phase, Phase::Good { until } if until + LONGEST_TRIAL * 2 < now);
            let keep = is_current(&watch.target) && !old;
            changed |= suspect && !keep;
            keep
        });
        changed
    }

    /// Rows of backends that are asked, now or in a while.
    #[must_use]
    pub fn probing(&self) -> HashMap<u32, Probing> {
        let asked = self.watched.iter().filter_map(|(id, watch)| {
            let suspect = match watch.phase {
                Phase::Good { .. } => return None,
                Phase::Checking => false,
                Phase::Suspect { .. } => true,
            };
            let (probes, last) = (watch.probes, watch.last);
            Some((
                *id,
                Probing {
                    suspect,
                    probes,
                    last,
                },
            ))
        });
        asked.collect()
    }

    /// The suspects, those first that have been it for longest, each with what the last probe that failed said.
    #[must_use]
    pub fn suspects(&self) -> Vec<(Target, Verdict)> {
        let mut out: Vec<_> = self
            .watched
            .values()
            .filter_map(|watch| match watch.phase {
                Phase::Suspect { since, verdict, .. } => Some((since, watch.target, verdict)),
                _ => None,
            })
            .collect();
        out.sort_unstable_by_key(|(since, target, _)| (*since, target.id));
        out.into_iter()
            .map(|(_, target, verdict)| (target, verdict))
            .collect()
    }
}

impl Watch {
    fn new(target: Target, now: Instant) -> Self {
        Self {
            target,
            phase: Phase::Good { until: now },
            probes: 0,
            last: None,
            returned: None,
            answers: 1,
            reachable: false,
            trial: TRIAL,
        }
    }

    /// True if it was suspect.
    fn good(&mut self, now: Instant) -> bool {
        let was = matches!(self.phase, Phase::Suspect { .. });
        if was {
            self.returned = Some(now);
        }
        // what fails right behind its return is looked at at once
        let pause = if was { Duration::ZERO } else { PAUSE };
        self.phase = Phase::Good { until: now + pause };
        was
    }
}

/// The pause before the next probe of a suspect that has been it for so long.
fn interval(age: Duration) -> Duration {
    let found = INTERVALS.iter().find(|(up_to, _)| age < *up_to);
    found.map_or(LONGEST, |(_, interval)| *interval)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn target(id: u32) -> Target {
        Target {
            id,
            generation: 1,
            addr: SocketAddr::from(([10, 0, 0, 1], 80)),
        }
    }

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    fn ids(detector: &Detector) -> Vec<u32> {
        detector.suspects().iter().map(|(t, _)| t.id).collect()
    }

    #[test]
    fn a_backend_that_answers_the_probe_is_no_suspect() {
        let (mut detector, start) = (Detector::default(), Instant::now());
        assert!(detector.failed(target(1), start));
        assert!(!detector.failed(target(1), start), "one probe at a time");
        assert!(!detector.probed(target(1), Verdict::Answered, start + ms(1)));
        assert_eq!(ids(&detector), [0_u32; 0]);
        assert!(!detector.failed(target(1), start + ms(500)), "not at once again");
        assert!(detector.failed(target(1), start + ms(1001)));
    }

    #[test]
    fn a_silent_backend_is_suspect_until_it_answers() {
        for verdict in [Verdict::Silent, Verdict::Refused] {
            let (mut detector, start) = (Detector::default(), Instant::now());
            detector.failed(target(1), start);
            assert_eq!(detector.next_due(), None);
            assert!(detector.probed(target(1), verdict, start));
            assert_eq!(detector.suspects(), [(target(1), verdict)]);
            assert!(!detector.failed(target(1), start), "it is known");
            assert_eq!(detector.next_due(), Some(start + ms(500)));
            assert_eq!(detector.due(start + ms(499)), []);
            assert_eq!(detector.due(start + ms(500)), [target(1)]);
            assert_eq!(detector.due(start + ms(5000)), [], "one probe at a time");
            assert!(!detector.probed(target(1), verdict, start + ms(900)));
            assert_eq!(detector.next_due(), Some(start + ms(1400)));
            assert_eq!(detector.due(start + ms(1400)), [target(1)]);
            assert!(detector.probed(target(1), Verdict::Answered, start + ms(1401)));
            assert_eq!(ids(&detector), [0_u32; 0]);
            assert_eq!(detector.next_due(), None);
            assert!(detector.failed(target(1), start + ms(1402)), "watched closely");
        }
    }

    #[test]
    fn a_clients_success_ends_the_suspicion() {
        let (mut detector, start) = (Detector::default(), Instant::now());
        detector.failed(target(1), start);
        detector.probed(target(1), Verdict::Silent, start);
        assert!(!detector.alive(1, 2, start), "another backend's");
        assert!(detector.alive(1, 1, start));
        assert!(!detector.alive(1, 1, start));
        assert_eq!(ids(&detector), [0_u32; 0]);
        // a probe that is still on its way changes nothing
        assert!(!detector.probed(target(1), Verdict::Silent, start));
        assert_eq!(ids(&detector), [0_u32; 0]);
    }

    #[test]
    fn suspects_come_in_order_of_time() {
        let (mut detector, start) = (Detector::default(), Instant::now());
        for (id, at) in [(3, 0), (1, 5), (2, 5)] {
            detector.failed(target(id), start + ms(at));
            detector.probed(target(id), Verdict::Silent, start + ms(at));
        }
        assert_eq!(ids(&detector), [3, 1, 2]);
    }

    #[test]
    fn who_comes_and_goes_has_to_answer_more_often() {
        let (mut detector, mut now) = (Detector::default(), Instant::now());
        for answers in [1, 2, 4, 8, 8] {
            assert!(detector.failed(target(1), now));
            assert!(detector.probed(target(1), Verdict::Silent, now));
            for given in 1..=answers {
                now = detector.next_due().unwrap();
                assert_eq!(detector.due(now), [target(1)]);
                assert_eq!(
                    detector.probed(target(1), Verdict::Answered, now),
                    given == answers
                );
            }
        }
        // an answer that is followed by silence does not count
        detector.failed(target(1), now);
        detector.probed(target(1), Verdict::Silent, now);
        detector.probed(target(1), Verdict::Answered, now);
        detector.probed(target(1), Verdict::Silent, now);
        for _ in 0..7 {
            assert!(!detector.probed(target(1), Verdict::Answered, now));
        }
        assert!(detector.probed(target(1), Verdict::Answered, now));
        // a minute of good behaviour is enough
        now += FLAPPING;
        detector.failed(target(1), now);
        detector.probed(target(1), Verdict::Silent, now);
        assert!(detector.probed(target(1), Verdict::Answered, now));
    }

    #[test]
    fn who_is_asked_is_told_until_it_has_answered() {
        let mut detector = Detector::default();
        let start = Instant::now();
        let told = |detector: &Detector| detector.probing().get(&1).copied();
        detector.failed(target(1), start);
        let probing = |suspect, probes, last| Probing {
            suspect,
            probes,
            last,
        };
        assert_eq!(told(&detector), Some(probing(false, 1, None)));
        detector.probed(target(1), Verdict::Silent, start);
        assert_eq!(told(&detector), Some(probing(true, 1, Some(Verdict::Silent))));
        detector.due(start + ms(500));
        detector.probed(target(1), Verdict::Refused, start + ms(500));
        assert_eq!(told(&detector), Some(probing(true, 2, Some(Verdict::Refused))));
        detector.due(start + ms(1000));
        detector.probed(target(1), Verdict::Answered, start + ms(1000));
        assert_eq!(told(&detector), None);
        // and begins anew
        detector.failed(target(1), start + ms(1100));
        assert_eq!(told(&detector), Some(probing(false, 1, None)));
    }

    #[test]
    fn probes_become_rarer() {
        let (mut detector, start) = (Detector::default(), Instant::now());
        detector.failed(target(1), start);
        detector.probed(target(1), Verdict::Answered, start);
        detector.failed(target(1), start + ms(2000));
        let start = start + ms(2000);
        detector.probed(target(1), Verdict::Silent, start);
        let mut probes = Vec::new();
        while let Some(at) = detector
            .next_due()
            .filter(|at| *at < start + Duration::from_secs(600))
        {
            detector.due(at);
            assert!(
                !detector.probed(target(1), Verdict::Silent, at),
                "it has answered before: no trial"
            );
            probes.push(at);
        }
        let within = |from: u64, to: u64| {
            let range = start + Duration::from_secs(from)..start + Duration::from_secs(to);
            probes.iter().copied().filter(|at| range.contains(at)).count()
        };
        assert_eq!((within(0, 20), within(30, 40), within(300, 600)), (39, 10, 60));
    }

    #[test]
    fn who_has_never_answered_a_probe_is_tried() {
        let (mut detector, start) = (Detector::default(), Instant::now());
        let mut returns = Vec::new();
        detector.failed(target(1), start);
        detector.probed(target(1), Verdict::Silent, start);
        while let Some(at) = detector
            .next_due()
            .filter(|at| *at < start + Duration::from_secs(2000))
        {
            detector.due(at);
            if detector.probed(target(1), Verdict::Silent, at) {
                returns.push(at.duration_since(start).as_secs());
                detector.failed(target(1), at);
                detector.probed(target(1), Verdict::Silent, at);
            }
        }
        assert_eq!(returns, [60, 180, 420, 900, 1860]);
    }

    #[test]
    fn rows_of_others_are_forgotten() {
        let (mut detector, start) = (Detector::default(), Instant::now());
        for id in [1, 2] {
            detector.failed(target(id), start);
            detector.probed(target(id), Verdict::Silent, start);
        }
        assert!(!detector.forget(start, |_| true));
        assert!(detector.forget(start, |target| target.id == 1));
        assert_eq!(ids(&detector), [1]);
        // the row is another backend's now: what the old one did does not count
        let other = Target {
            generation: 2,
            ..target(1)
        };
        assert!(detector.failed(other, start));
        assert_eq!(ids(&detector), [0_u32; 0]);
        assert!(!detector.probed(target(1), Verdict::Silent, start));
        assert!(detector.probed(other, Verdict::Silent, start));
        // what has long been good is forgotten too
        detector.alive(1, 2, start);
        assert!(!detector.forget(start + LONGEST_TRIAL * 3, |_| true));
        assert!(detector.watched.is_empty());
    }
}
