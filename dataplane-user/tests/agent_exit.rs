//! How the agent ends (spec kube-proxy 5 and 6), as who starts it sees it. Needs root.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on must fail")]

mod common;

use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::path::Path;
use std::process::{Child, ChildStderr, Command, Stdio};

use common::Place;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// Runs `beeline` in a network namespace of its own, which has no device but a loopback that is down.
fn beeline(args: &[&str]) -> Command {
    let mut command = Command::new("unshare");
    command
        .args(["--net", "--", env!("CARGO_BIN_EXE_beeline")])
        .args(args)
        .stdout(Stdio::null())
        .stderr(Stdio::piped());
    command
}

/// An agent without objects.
struct Agent {
    child: Child,
    log: BufReader<ChildStderr>,
    // removed after the agent has ended
    _place: Place,
    dir: tempfile::TempDir,
}

impl Agent {
    fn start(flags: impl Fn(&Path) -> Vec<String>) -> Self {
        let place = Place::new();
        let dir = tempfile::tempdir().unwrap();
        let objects = dir.path().join("objects");
        fs::create_dir(&objects).unwrap();
        let mut command = beeline(&["agent", "--node-name=n", "--conntrack-max-per-core=0"]);
        command
            .arg("--dir")
            .arg(objects)
            .arg("--cgroup-root")
            .arg(&place.config.cgroup_root)
            .arg("--bpffs-root")
            .arg(&place.config.bpffs_root)
            .arg("--state-dir")
            .arg(dir.path().join("state"))
            .args(flags(dir.path()));
        let mut child = command.spawn().unwrap();
        let log = BufReader::new(child.stderr.take().unwrap());
        Self {
            child,
            log,
            _place: place,
            dir,
        }
    }

    /// Waits until each of these has been logged, in whatever order; the test's own time limit ends it.
    fn wait_for(&mut self, texts: &[&str]) {
        let mut seen = String::new();
        while !texts.iter().all(|text| seen.contains(text)) {
            let read = self.log.read_line(&mut seen).unwrap();
            assert!(read > 0, "the agent ended before {texts:?}: {seen}");
        }
    }

    /// Waits for the end: exit code, and the rest of the log.
    fn end(mut self) -> (Option<i32>, String) {
        let mut rest = String::new();
        self.log.read_to_string(&mut rest).unwrap();
        (self.child.wait().unwrap().code(), rest)
    }

    fn terminate(&self) {
        let pid = Pid::from_raw(i32::try_from(self.child.id()).unwrap());
        kill(pid, Signal::SIGTERM).unwrap();
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        let _ended = self.child.kill();
        let _reaped = self.child.wait();
    }
}

/// The health server has it already.
const TAKEN: &str = "--metrics-bind-address=0.0.0.0:10256";

#[test]
fn a_server_that_cannot_listen_is_fatal_only_if_so_configured() {
    let hard = |_: &Path| vec![TAKEN.to_owned(), "--bind-address-hard-fail".to_owned()];
    let (code, log) = Agent::start(hard).end();
    assert_eq!(code, Some(1), "{log}");
    assert!(log.contains("error: metrics server at 0.0.0.0:10256: "), "{log}");

    let mut patient = Agent::start(|_| vec![TAKEN.to_owned()]);
    patient.wait_for(&[
        "metrics server cannot listen, trying again every 5 s",
        "first sync done",
    ]);
    patient.terminate();
    let (code, log) = patient.end();
    assert_eq!(code, Some(0), "{log}");
}

#[test]
fn a_configuration_that_changes_ends_the_agent() {
    const TEXT: &str = "apiVersion: kubeproxy.config.k8s.io/v1alpha1\nkind: KubeProxyConfiguration\nconntrack: {maxPerCore: 0}\n";
    let mut agent = Agent::start(|dir| {
        fs::write(dir.join("config.conf"), TEXT).unwrap();
        vec![format!("--config={}", dir.join("config.conf").display())]
    });
    agent.wait_for(&["first sync done"]);
    let file = agent.dir.path().join("config.conf");
    fs::write(&file, format!("{TEXT}oomScoreAdj: -998\n")).unwrap();
    let (code, log) = agent.end();
    assert_eq!(code, Some(1), "{log}");
    assert!(log.contains("config.conf has changed: the agent ends"), "{log}");
    assert!(log.contains("what it programmed stays in force"), "{log}");
}

#[test]
fn a_setting_that_cannot_be_used_is_named_before_anything_is_changed() {
    let place = Place::new();
    let bpffs = place.config.bpffs_root.to_str().unwrap();
    let state = tempfile::tempdir().unwrap();
    let state_dir = state.path().join("state");
    for (flags, named) in [
        (&["--metrics-bind-address=host"][..], "metricsBindAddress: host"),
        (&["--nodeport-addresses=10.0.0.0/33"], "10.0.0.0/33"),
        (
            &["--kubeconfig=/nonexistent/kubeconfig"],
            "/nonexistent/kubeconfig",
        ),
        (&["--no-such-flag"], "--no-such-flag"),
    ] {
        let root = place.config.cgroup_root.to_str().unwrap();
        let mut command = beeline(&[
            "agent",
            "--node-name=n",
            "--bpffs-root",
            bpffs,
            "--cgroup-root",
            root,
        ]);
        command.arg("--state-dir").arg(&state_dir);
        let output = command.args(flags).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(64), "{flags:?}: {said}");
        assert!(said.contains(named), "{flags:?}: {said}");
        assert!(
            !place.config.bpffs_root.exists(),
            "{flags:?} left something in the kernel"
        );
    }
}

#[test]
fn what_is_written_can_be_read_again() {
    let dir = tempfile::tempdir().unwrap();
    let [first, second] = ["first", "second"].map(|name| dir.path().join(name));
    let flags = [
        "agent",
        "--cluster-cidr=10.244.0.0/16",
        "--conntrack-min=7",
        "--write-config-to",
    ];
    let output = beeline(&flags).arg(&first).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    let text = fs::read_to_string(&first).unwrap();
    assert!(text.contains("clusterCIDR: 10.244.0.0/16"), "{text}");
    let mut again = beeline(&["agent", "--write-config-to"]);
    let output = again.arg(&second).arg("--config").arg(&first).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success() && !said.contains("WARN"), "{said}");
    assert_eq!(fs::read_to_string(&second).unwrap(), text);
}
