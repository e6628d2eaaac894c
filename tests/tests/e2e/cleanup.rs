//! `beeline cleanup` removes every trace.

use std::collections::BTreeSet;
use std::process::Command;

use beeline_tests::client::Mode;
use beeline_tests::{agent, process, wait_for};

use crate::restart::programs_in;
use crate::scene::{PROPAGATION, Scene, V4};

/// Ids of all programs, maps or links of this kernel.
fn ids(what: &str) -> BTreeSet<u64> {
    let mut command = Command::new("bpftool");
    command.args(["-j", what, "show"]);
    let list: serde_json::Value = serde_json::from_str(&process::output(command).unwrap()).unwrap();
    list.as_array()
        .unwrap()
        .iter()
        .map(|item| item["id"].as_u64().unwrap())
        .collect()
}

#[test]
fn cleanup_removes_every_trace() {
    let before = ["prog", "map", "link"].map(ids);
    let mut scene = Scene::new();
    let during = ["prog", "map", "link"].map(ids);
    for (what, (before, during)) in ["prog", "map", "link"].iter().zip(before.iter().zip(&during)) {
        assert!(during.len() > before.len(), "the agent should have made a {what}");
    }
    scene.agent.process.terminate().unwrap();
    agent::cleanup(&scene.node).unwrap();
    assert!(programs_in(scene.node.cgroup()).is_empty());
    let left: Vec<_> = std::fs::read_dir(scene.node.bpffs())
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    assert!(left.is_empty(), "left in bpffs: {left:?}");
    // The kernel frees programs and maps after a grace period of its own.
    for (what, (before, during)) in ["prog", "map", "link"].iter().zip(before.iter().zip(&during)) {
        let ours: BTreeSet<u64> = during.difference(before).copied().collect();
        wait_for(&format!("every {what} of the agent to go"), PROPAGATION, || {
            Ok(ids(what).is_disjoint(&ours).then_some(()))
        })
        .unwrap();
    }
    assert_eq!(scene.ask(&format!("{V4}:80"), Mode::Http, 1).ok, 0);
    // A second time there is nothing to do, and that is no error.
    agent::cleanup(&scene.node).unwrap();
}
