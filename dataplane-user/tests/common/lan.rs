//! Hosts and pods as network namespaces. Needs root and iproute2.
#![allow(dead_code, reason = "each test binary uses its own part")]
#![allow(clippy::unwrap_used, reason = "a test that cannot be set up fails")]

use std::fs::File;
use std::process::{Command, Output};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use nix::sched::{CloneFlags, setns};
use serde_json::Value;

static NEXT: AtomicU32 = AtomicU32::new(0);

/// A named network namespace; removed on drop.
pub(crate) struct Netns {
    pub(crate) name: String,
}

impl Netns {
    pub(crate) fn new(label: &str) -> Self {
        assert!(
            nix::unistd::geteuid().is_root(),
            "this test needs root: it makes network namespaces"
        );
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = format!("bl{}-{number}-{label}", std::process::id());
        run("ip", &["netns", "add", &name]);
        let netns = Self { name };
        netns.enter(|| {
            std::fs::write("/proc/sys/net/ipv6/conf/all/accept_dad", "0").unwrap();
            std::fs::write("/proc/sys/net/ipv6/conf/default/accept_dad", "0").unwrap();
        });
        netns.ip("link set lo up");
        netns
    }

    pub(crate) fn path(&self) -> String {
        format!("/run/netns/{}", self.name)
    }

    /// In a thread of its own inside the namespace.
    pub(crate) fn enter<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        let file = File::open(self.path()).unwrap();
        std::thread::scope(|scope| {
            let thread = scope.spawn(|| {
                setns(file, CloneFlags::CLONE_NEWNET).unwrap();
                work()
            });
            thread.join().unwrap()
        })
    }

    /// Runs `ip` with these words.
    pub(crate) fn ip(&self, words: &str) -> String {
        let mut all = vec!["-n", &self.name];
        all.extend(words.split(' '));
        run("ip", &all)
    }

    /// What `ip -j` or, for the forwarding table, `bridge -j` says.
    pub(crate) fn json(&self, program: &str, words: &str) -> Value {
        let mut all = vec!["-n", &self.name, "-j", "-d"];
        all.extend(words.split(' '));
        let output = Command::new(program).args(&all).output().unwrap();
        if output.stdout.is_empty() {
            Value::Array(vec![])
        } else {
            serde_json::from_slice(&output.stdout).unwrap()
        }
    }

    pub(crate) fn exec(&self, words: &str) -> Output {
        let mut all = vec!["netns", "exec", &self.name];
        all.extend(words.split(' '));
        Command::new("ip").args(&all).output().unwrap()
    }

    pub(crate) fn pings(&self, address: &str) -> bool {
        self.exec(&format!("ping -c 1 -W 1 -n {address}"))
            .status
            .success()
    }
}

impl Drop for Netns {
    fn drop(&mut self) {
        let _gone = Command::new("ip").args(["netns", "delete", &self.name]).status();
    }
}

pub(crate) fn run(program: &str, args: &[&str]) -> String {
    let output = Command::new(program).args(args).output().unwrap();
    assert!(
        output.status.success(),
        "{program} {}: {}",
        args.join(" "),
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout).unwrap()
}

/// Waits until it is so; fails if that takes longer than `limit`. Gives how long it took.
pub(crate) fn within(limit: Duration, what: &str, mut is_so: impl FnMut() -> bool) -> Duration {
    let begun = Instant::now();
    loop {
        if is_so() {
            return begun.elapsed();
        }
        assert!(begun.elapsed() < limit, "not within {limit:?}: {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// A switch with hosts on it: `192.168.77.n` and `fd77::n`, device `eth0`.
pub(crate) struct Lan {
    switch: Netns,
}

impl Lan {
    pub(crate) fn new() -> Self {
        let switch = Netns::new("lan");
        switch.ip("link add br0 type bridge");
        switch.ip("link set br0 up");
        Self { switch }
    }

    pub(crate) fn host(&self, n: u8) -> Netns {
        let host = Netns::new(&format!("h{n}"));
        host.ip(&format!(
            "link add eth0 type veth peer name p{n} netns {}",
            self.switch.name
        ));
        self.switch.ip(&format!("link set p{n} master br0 up"));
        host.ip("link set eth0 up");
        host.ip(&format!("address add 192.168.77.{n}/24 dev eth0"));
        host.ip(&format!("address add fd77::{n}/64 dev eth0 nodad"));
        host.ip("route add default via 192.168.77.254");
        host
    }
}

/// A pod as a plain routed namespace, without any plugin: addresses `10.244.n.2` and `fd00:244:n::2`.
pub(crate) fn plain_pod(host: &Netns, n: u8) -> Netns {
    let pod = Netns::new(&format!("p{n}"));
    host.ip(&format!(
        "link add pod{n} type veth peer name eth0 netns {}",
        pod.name
    ));
    host.ip(&format!("link set pod{n} up"));
    pod.ip("link set eth0 up");
    host.ip(&format!("address add 10.99.{n}.1/32 dev pod{n}"));
    host.ip(&format!("address add fd99:{n}::1/128 dev pod{n} nodad"));
    pod.ip(&format!("address add 10.244.{n}.2/32 dev eth0"));
    pod.ip(&format!("address add fd00:244:{n}::2/128 dev eth0 nodad"));
    pod.ip(&format!("route add 10.99.{n}.1/32 dev eth0"));
    pod.ip(&format!("route add default via 10.99.{n}.1"));
    pod.ip(&format!("route add fd99:{n}::1/128 dev eth0"));
    pod.ip(&format!("route add default via fd99:{n}::1"));
    host.ip(&format!("route add 10.244.{n}.2/32 dev pod{n}"));
    host.ip(&format!("route add fd00:244:{n}::2/128 dev pod{n}"));
    pod
}
