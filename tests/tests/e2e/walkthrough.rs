//! docs/walkthrough.md, line by line.

use std::process::Stdio;

use beeline_tests::process::output;
use beeline_tests::{Cluster, program};

use crate::init::{Machine, join_line};

const TEXT: &str = include_str!("../../../docs/walkthrough.md");
/// How a block begins that is for both machines.
const EACH: &str = "# on each machine\n";

/// The blocks that a reader types.
fn blocks() -> Vec<&'static str> {
    let (mut rest, mut found) = (TEXT, Vec::new());
    while let Some((_, after)) = rest.split_once("```sh\n") {
        let (block, after) = after.split_once("```").unwrap();
        found.push(block);
        rest = after;
    }
    found
}

/// Runs a block as a shell does in which a reader has typed what came before.
fn run(machine: &Machine<'_>, before: &str, block: &str) {
    let dir = machine.node.state().join("home");
    std::fs::create_dir_all(&dir).unwrap();
    let root = machine.root.display().to_string();
    let script =
        format!("set -e\n{before}\nset -x\n{block}").replace("/etc/beeline", &format!("{root}/etc/beeline"));
    let mut command = machine.node.host().command("sh").unwrap();
    command.current_dir(&dir).args(["-c", &script]).env("HOME", &dir);
    let programs = program("beeline").unwrap();
    let path = std::env::var("PATH").unwrap();
    command.env("PATH", format!("{}:{path}", programs.parent().unwrap().display()));
    command
        .env("KUBECONFIG", machine.admin_conf())
        .stdin(Stdio::null());
    let said = output(command)
        .inspect_err(|_| eprintln!("{}", machine.logs()))
        .unwrap();
    eprintln!("{said}");
}

#[test]
fn the_walk_through_works_as_it_is_written() {
    let cluster = Cluster::new().unwrap();
    let nodes = [cluster.add_node().unwrap(), cluster.add_node().unwrap()];
    let machines = [Machine::new(&nodes[0]), Machine::new(&nodes[1])];
    let address = nodes[0].v4().to_string();
    let said = machines[0]
        .beeline(&[
            "init",
            "--node-name",
            "node-1",
            "--apiserver-advertise-address",
            &address,
        ])
        .unwrap();
    let mut join = vec!["join".to_owned()];
    join.extend(join_line(&said));
    join.extend(["--node-name".to_owned(), "node-2".to_owned()]);
    let join: Vec<&str> = join.iter().map(String::as_str).collect();
    machines[1].beeline(&join).unwrap();
    let blocks = blocks();
    assert!(blocks.len() > 5);
    // What later blocks use of earlier ones.
    let mut variables = String::new();
    for block in blocks {
        if let Some(block) = block.strip_prefix(EACH) {
            for machine in &machines {
                run(machine, "", block);
            }
        } else {
            run(&machines[0], &variables, block);
        }
        let assigned = block.lines().filter(|line| line.starts_with("pod=$("));
        variables.extend(assigned.flat_map(|line| [line, "\n"]));
    }
    for machine in machines.iter().rev() {
        machine.beeline(&["reset", "--force"]).unwrap();
    }
}
