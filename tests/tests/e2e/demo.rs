//! The demo, as a user runs it, and interrupted.

use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};

use beeline_tests::{program, residue};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

#[test]
fn the_demo_succeeds_and_cleans_up() {
    let child = Command::new(program("beeline-demo").unwrap())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let pid = child.id();
    let output = child.wait_with_output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{text}");
    for wanted in [
        "service/myweb created",
        "ebpf",
        "flannel.1",
        "myweb-4",
        "all as it should be",
    ] {
        assert!(text.contains(wanted), "no {wanted:?} in:\n{text}");
    }
    assert_eq!(residue::made_by(pid).unwrap(), Vec::<String>::new());
}

#[test]
fn ctrl_c_cleans_up() {
    let mut child = Command::new(program("beeline-demo").unwrap())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let pid = child.id();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    // In the middle of things: the control plane, nodes and agents run.
    assert!(
        lines
            .by_ref()
            .map_while(Result::ok)
            .any(|line| line.contains("starting three pods"))
    );
    assert!(!residue::made_by(pid).unwrap().is_empty());
    kill(Pid::from_raw(i32::try_from(pid).unwrap()), Signal::SIGINT).unwrap();
    let status = child.wait().unwrap();
    assert_eq!(status.code(), Some(130), "{status}");
    assert_eq!(residue::made_by(pid).unwrap(), Vec::<String>::new());
}
