//! The order of a take-over, on a machine that is made up.

use super::*;

#[derive(Default)]
struct Fake {
    survey: Survey,
    kube_proxy: Option<Writer>,
    /// Ids of connections that are translated.
    connections: HashSet<Connection>,
    /// Of ipvs.
    through: HashSet<ipvs::Connection>,
    log: Vec<&'static str>,
    foreign: bool,
}

impl Fake {
    fn with_rules() -> Self {
        let mut fake = Self::default();
        fake.write_rules();
        fake
    }

    fn write_rules(&mut self) {
        self.survey.rules = vec!["nat".into()];
        self.survey.rest = vec!["filter".into()];
    }
}

impl Host for Fake {
    fn survey(&mut self) -> io::Result<Survey> {
        Ok(self.survey.clone())
    }

    fn kube_proxy(&self) -> Option<Writer> {
        self.kube_proxy.clone()
    }

    fn suspect(&self) -> Option<Writer> {
        None
    }

    fn remove(&mut self, stage: Stage) -> io::Result<Counts> {
        self.survey.rules.clear();
        self.survey.ipvs = false;
        match stage {
            Stage::Rules => {
                self.log.push("rules");
                self.survey.own = true;
            }
            Stage::Rest => {
                self.log.push("rest");
                self.survey = Survey::default();
            }
        }
        Ok(Counts::default())
    }

    fn remove_own(&mut self) -> io::Result<()> {
        self.log.push("own");
        self.survey.own = false;
        Ok(())
    }

    fn kept(&mut self) -> io::Result<BTreeMap<String, String>> {
        Ok(BTreeMap::new())
    }

    fn connections(&mut self) -> io::Result<HashSet<Connection>> {
        Ok(self.connections.clone())
    }

    fn ipvs_connections(&mut self) -> io::Result<HashSet<ipvs::Connection>> {
        Ok(self.through.clone())
    }

    fn remove_idle(&mut self, running: &HashSet<ipvs::Connection>) -> io::Result<()> {
        assert!(!running.is_empty());
        self.log.push("idle");
        Ok(())
    }

    fn set_foreign(&mut self, on: bool) {
        self.foreign = on;
    }
}

fn connection(id: u32) -> Connection {
    Connection::for_tests(id)
}

#[test]
fn what_running_connections_need_stays_until_they_end() {
    let mut fake = Fake::with_rules();
    fake.connections = [connection(1), connection(2)].into();
    let mut one = TakeOver::new(fake, true);
    let now = Instant::now();
    assert_eq!(one.tick(now).unwrap(), Some(SOON));
    assert_eq!(one.host.log, ["rules"]);
    for _ in 0..3 {
        one.tick(now).unwrap();
    }
    // a new one is not kube-proxy's: it does not matter how long it runs
    one.host.connections = [connection(2), connection(3)].into();
    one.tick(now).unwrap();
    assert_eq!(one.host.log, ["rules"]);
    one.host.connections.remove(&connection(2));
    assert_eq!(one.tick(now).unwrap(), Some(LOOK));
    assert_eq!(one.host.log, ["rules", "rest"]);
    assert_eq!(one.tick(now).unwrap(), Some(LOOK));
    assert_eq!(one.tick(now + ALERT).unwrap(), Some(IDLE));
    assert_eq!(one.host.log, ["rules", "rest"]);
}

#[test]
fn all_of_ipvs_stays_until_the_connections_through_it_end() {
    let through = ipvs::Connection::for_tests;
    let mut fake = Fake::with_rules();
    fake.survey.ipvs = true;
    fake.through = [through("a"), through("b")].into();
    let mut one = TakeOver::new(fake, true);
    let now = Instant::now();
    for _ in 0..3 {
        one.tick(now).unwrap();
    }
    // another one cannot be kube-proxy's any more
    one.host.through = [through("b"), through("keepalived's")].into();
    one.tick(now).unwrap();
    assert_eq!(one.host.log, ["idle"; 4]);
    assert!(one.host.foreign);
    // unless that runs again
    one.host.kube_proxy = Some(Writer {
        pid: 7,
        name: "kube-proxy".into(),
    });
    one.tick(now).unwrap();
    one.host.kube_proxy = None;
    one.host.through = [through("c")].into();
    one.tick(now).unwrap();
    assert_eq!(one.host.log, ["idle"; 5]);
    one.host.log.clear();
    one.host.through.clear();
    one.tick(now).unwrap();
    assert_eq!(one.host.log, ["rules"]);
    one.tick(now).unwrap();
    assert_eq!(one.host.log, ["rules", "rest"]);
}

#[test]
fn a_running_kube_proxy_keeps_its_rules() {
    let mut fake = Fake::with_rules();
    fake.kube_proxy = Some(Writer {
        pid: 7,
        name: "kube-proxy".into(),
    });
    let mut one = TakeOver::new(fake, true);
    let now = Instant::now();
    assert_eq!(one.tick(now).unwrap(), Some(SOON));
    assert_eq!(one.tick(now).unwrap(), Some(SOON));
    assert!(one.host.log.is_empty());
    one.host.kube_proxy = None;
    one.tick(now).unwrap();
    assert_eq!(one.host.log, ["rules"]);
}

#[test]
fn rules_that_come_back_are_not_fought_over() {
    let mut one = TakeOver::new(Fake::with_rules(), true);
    let mut now = Instant::now();
    one.tick(now).unwrap();
    for (after, removed) in [(1, 2), (2, 2), (40, 3), (41, 3), (80, 3), (120, 4)] {
        one.host.write_rules();
        now += Duration::from_secs(after);
        let pause = one.tick(now).unwrap().unwrap();
        assert!(!pause.is_zero());
        let count = one.host.log.iter().filter(|entry| **entry == "rules").count();
        assert_eq!(count, removed, "{after}");
        now -= Duration::from_secs(after);
    }
}

#[test]
fn without_kube_proxy_nothing_is_done() {
    let mut one = TakeOver::new(Fake::default(), true);
    assert_eq!(one.tick(Instant::now()).unwrap(), Some(IDLE));
    assert!(one.host.log.is_empty());
}

#[test]
fn what_an_earlier_agent_began_is_finished_unasked() {
    let mut fake = Fake::default();
    assert_eq!(TakeOver::new(fake, false).tick(Instant::now()).unwrap(), None);
    fake = Fake::default();
    fake.survey.own = true;
    fake.connections = [connection(1)].into();
    let mut one = TakeOver::new(fake, false);
    assert!(one.tick(Instant::now()).unwrap().is_some());
    one.host.connections.clear();
    one.tick(Instant::now()).unwrap();
    assert_eq!(one.host.log, ["rest"]);
    assert_eq!(one.tick(Instant::now()).unwrap(), None);
    // but kube-proxy's rules are its own when nobody asked for a take-over
    let mut fake = Fake::with_rules();
    fake.survey.own = true;
    let mut one = TakeOver::new(fake, false);
    assert_eq!(one.tick(Instant::now()).unwrap(), Some(IDLE));
    assert_eq!(one.host.log, ["own"]);
}

#[test]
fn packets_are_left_to_kube_proxy_until_its_connections_have_ended() {
    for wanted in [true, false] {
        let mut fake = Fake::with_rules();
        fake.connections = [connection(1)].into();
        let mut one = TakeOver::new(fake, wanted);
        let now = Instant::now();
        one.tick(now).unwrap();
        assert!(one.host.foreign);
        // whoever removed them
        one.host.survey = Survey::default();
        one.tick(now).unwrap();
        assert!(one.host.foreign);
        one.host.connections.clear();
        one.tick(now).unwrap();
        assert!(!one.host.foreign);
        assert_eq!(one.tick(now).unwrap(), wanted.then_some(LOOK));
    }
}
