//! `beeline cleanup` removes every trace.

use std::collections::BTreeSet;
use std::process::Command;

use beeline_tests::client::Mode;
use beeline_tests::{agent, process, wait_for};
use serde_json::Value;

use crate::restart::programs_in;
use crate::scene::{PROPAGATION, Scene, V4};

/// Everything of this kind in the kernel, as another tool sees it.
fn all(what: &str) -> Vec<Value> {
    let mut command = Command::new("bpftool");
    command.args(["-j", what, "show"]);
    let list: Value = serde_json::from_str(&process::output(command).unwrap()).unwrap();
    list.as_array().unwrap().clone()
}

fn id(item: &Value) -> u64 {
    item["id"].as_u64().unwrap()
}

#[test]
fn cleanup_removes_every_trace() {
    let mut scene = Scene::new();
    // Ours by way of what is attached to the node's cgroup: others may use eBPF on this machine, too.
    let programs = programs_in(scene.node.cgroup());
    let maps: BTreeSet<u64> = all("prog")
        .iter()
        .filter(|program| programs.contains(&id(program)))
        .flat_map(|program| program["map_ids"].as_array().cloned().unwrap_or_default())
        .filter_map(|id| id.as_u64())
        .collect();
    let links: BTreeSet<u64> = all("link")
        .iter()
        .filter(|link| link["prog_id"].as_u64().is_some_and(|id| programs.contains(&id)))
        .map(id)
        .collect();
    assert!(
        !programs.is_empty() && !maps.is_empty() && !links.is_empty(),
        "{programs:?} {maps:?} {links:?}"
    );

    scene.agent.process.terminate().unwrap();
    agent::cleanup(&scene.node).unwrap();
    assert!(programs_in(scene.node.cgroup()).is_empty());
    // The directory itself may be gone, too.
    let left: Vec<_> = std::fs::read_dir(scene.node.bpffs())
        .map(|entries| entries.map(|entry| entry.unwrap().path()).collect())
        .unwrap_or_default();
    assert!(left.is_empty(), "left in bpffs: {left:?}");
    // The kernel frees programs and maps after a grace period of its own.
    for (what, ours) in [("prog", programs), ("map", maps), ("link", links)] {
        wait_for(&format!("every {what} of the agent to go"), PROPAGATION, || {
            Ok(all(what)
                .iter()
                .all(|item| !ours.contains(&id(item)))
                .then_some(()))
        })
        .unwrap();
    }
    assert_eq!(scene.ask(&format!("{V4}:80"), Mode::Http, 1).ok, 0);
    // A second time there is nothing to do, and that is no error.
    agent::cleanup(&scene.node).unwrap();
}
