//! One build of the agent takes the place of another, and back, while sockets and other hosts are served; also when it dies
//! on the way.

use std::time::Duration;

use beeline_tests::client::Mode;
use beeline_tests::{Agent, Load};

use crate::pair::{NODE_PORT, NODE_PORT_UDP, Pair, V4, V6};
use crate::restart::programs_in;

#[test]
fn upgrades_and_downgrades_that_die_on_the_way_fail_no_connection() {
    let mut pair = Pair::new();
    // Builds of one ABI version that differ in every program: in a constant, and in what is compiled for it.
    let builds = ["error", "off"].map(|level| pair.options.clone().flag("--ebpf-log-level", level));
    let mut loads = Vec::new();
    let mut start = |name: &str, place, target, mode, rate| {
        let load = Load::start(place, target, mode, rate, 4).unwrap();
        loads.push((format!("{name} {mode:?} {target}"), load));
    };
    let outside = pair.outside.place();
    for target in pair.node_ports(0, NODE_PORT) {
        start("outside", outside, target, Mode::Http, 100);
        start("outside", outside, target, Mode::Hold, 50);
    }
    for target in pair.node_ports(0, NODE_PORT_UDP) {
        start("outside", outside, target, Mode::Udp, 50);
    }
    for (name, place) in [("pod", pair.clients[0].place()), ("node", pair.nodes[0].host())] {
        for ip in [V4.to_owned(), format!("[{V6}]")] {
            let target = format!("{ip}:80").parse().unwrap();
            start(name, place, target, Mode::Http, 100);
            start(name, place, target, Mode::Hold, 50);
        }
    }
    let node = &pair.nodes[0];
    let mut programs = programs_in(node.cgroup());
    for round in 0..12_u64 {
        pair.agents[0].process.kill().unwrap();
        // dies a little later each time: before, while and after it has replaced the programs
        let mut dying = Agent::start(node, &builds[0]).unwrap();
        std::thread::sleep(Duration::from_millis(20 * round));
        dying.process.kill().unwrap();
        let build = &builds[usize::from(round % 3 != 0)];
        pair.agents[0] = Agent::start_synced(node, build).unwrap();
        let now = programs_in(node.cgroup());
        assert!(
            now.is_disjoint(&programs) && now.len() == programs.len(),
            "round {round}"
        );
        programs = now;
    }
    for (name, load) in loads {
        let report = load.stop().unwrap();
        assert_eq!(report.failed, 0, "{name}: {report:?}");
        assert!(report.ok > 50, "{name}: {report:?}");
    }
}
