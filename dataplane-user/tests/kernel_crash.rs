//! The agent is killed behind any step of its start, of one build or another, while programs connect and connections run.
#![allow(clippy::unwrap_used, reason = "a test that cannot be set up fails")]

mod common;

use std::net::TcpListener;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};

use common::python::Python;
use common::{Place, frontend, key, service};
use dataplane_model::program::Programmer;
use dataplane_model::{Family, Protocol};
use dataplane_user::kernel::{Kernel, KernelError, RealMaps, Step};

/// As if killed: nothing is tidied up. False if there is no such step, and the start was complete.
fn open_and_die(place: &Place, behind: usize, seen: &mut Vec<Step>) -> bool {
    let mut n = 0;
    let result = catch_unwind(AssertUnwindSafe(|| {
        let mut observe = |step: Step| -> Result<(), KernelError> {
            if n == behind {
                seen.push(step);
                std::panic::resume_unwind(Box::new("killed"));
            }
            n += 1;
            Ok(())
        };
        Kernel::open_observed(&place.config, &mut observe)
    }));
    match result {
        Ok(kernel) => {
            kernel.unwrap();
            false
        }
        Err(_) => true,
    }
}

/// What the agent does behind its start.
fn reconcile(programmer: &mut Programmer<RealMaps>, listener: &TcpListener) -> u64 {
    let desired = service(
        frontend("10.96.0.1", 80, Protocol::Tcp),
        &[listener.local_addr().unwrap()],
    );
    let outcome = programmer.reconcile([(key("a", Protocol::Tcp, Family::V4), Some(desired))], 0);
    assert!(outcome.failed.is_empty(), "{:?}", outcome.failed);
    outcome.writes
}

/// The first agent on a node: what it has not begun to serve is as it was, and the next one goes on.
#[test]
fn a_first_start_that_is_cut_short_anywhere_is_finished_by_the_next() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let mut seen = Vec::new();
    for behind in 0.. {
        let place = Place::new();
        let cut = open_and_die(&place, behind, &mut seen);
        let mut client = Python::in_cgroup(&place.config.cgroup_root);
        let direct = format!("tcp().connect(('127.0.0.1', {port}))");
        assert_eq!(client.ask(&direct), "None", "behind {:?}", seen.last());
        let (kernel, mut programmer) = place.open();
        assert!(reconcile(&mut programmer, &listener) > 0);
        client.ask("S.update(a=tcp())");
        assert_eq!(client.ask("S['a'].connect(('10.96.0.1', 80))"), "None");
        assert_eq!(client.ask("S['a'].getpeername()"), "('10.96.0.1', 80)");
        let attached = kernel.info().programs.iter().filter(|p| p.replaced).count();
        let steps = seen.iter().filter(|step| **step == Step::Attached).count();
        let expected = if cut { steps } else { kernel.info().programs.len() };
        assert_eq!(attached, expected, "behind {:?}", seen.last());
        client.kill();
        if !cut {
            break;
        }
    }
    assert!(
        seen.contains(&Step::Loaded) && seen.contains(&Step::Attached),
        "{seen:?}"
    );
}

const LOAD: &str = r"[(lambda s: (name(lambda: s.connect(('10.96.0.1', 80))), s.close())[0])(tcp()) for _ in range(50)].count(None)";

/// Two builds of one ABI version differ in a constant, and so in every program. Each start of one is cut short a step later
/// than the last, and the other one starts over what it finds: a mix of the programs of both.
#[test]
fn two_builds_that_replace_each_other_and_die_at_any_step_fail_no_connection() {
    let mut place = Place::new();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut client = Python::in_cgroup(&place.config.cgroup_root);
    {
        let (_kernel, mut programmer) = place.open();
        reconcile(&mut programmer, &listener);
    }
    client.ask("S.update(a=tcp())");
    assert_eq!(client.ask("S['a'].connect(('10.96.0.1', 80))"), "None");
    let stop = AtomicBool::new(false);
    let cgroup = place.config.cgroup_root.clone();
    let mut seen = Vec::new();
    let acceptor = listener.try_clone().unwrap();
    acceptor.set_nonblocking(true).unwrap();
    let total = std::thread::scope(|scope| {
        let accept = scope.spawn(|| {
            // the first one is kept open
            let mut kept = Vec::new();
            while !stop.load(Ordering::Relaxed) {
                match acceptor.accept() {
                    Ok((stream, _)) if kept.is_empty() => kept.push(stream),
                    Ok(_) => {}
                    Err(_) => std::thread::yield_now(),
                }
            }
            kept
        });
        let load = scope.spawn(|| {
            let mut client = Python::in_cgroup(&cgroup);
            let mut total = 0;
            while !stop.load(Ordering::Relaxed) {
                let good: u32 = client.ask(LOAD).parse().unwrap();
                if good < 50 {
                    return Err((total, good));
                }
                total += good;
            }
            Ok(total)
        });
        for behind in 0.. {
            // upgrade and downgrade by turns
            place.config.ebpf_log_level = if behind % 2 == 0 { 5 } else { 0 };
            let cut = open_and_die(&place, behind, &mut seen);
            let when = format!("behind step {behind}, {:?}", seen.last());
            let ask = |client: &mut Python, what: &str| client.ask(what);
            assert_eq!(
                ask(&mut client, "tcp().connect(('10.96.0.1', 80))"),
                "None",
                "{when}"
            );
            assert_eq!(
                ask(&mut client, "S['a'].getpeername()"),
                "('10.96.0.1', 80)",
                "{when}"
            );
            assert_eq!(ask(&mut client, "S['a'].send(b'x')"), "1", "{when}");
            if !cut {
                break;
            }
            // the same build once more, or the one of before
            if behind % 3 == 0 {
                place.config.ebpf_log_level = 5 - place.config.ebpf_log_level;
            }
            let (kernel, mut programmer) = place.open();
            assert!(kernel.info().programs.iter().all(|program| program.replaced));
            assert_eq!(
                reconcile(&mut programmer, &listener),
                0,
                "nothing was lost {when}"
            );
        }
        stop.store(true, Ordering::Relaxed);
        accept.join().unwrap();
        load.join().unwrap()
    });
    let total = total.unwrap();
    assert!(total > 500, "only {total} connections");
    assert!(
        seen.iter().filter(|step| **step == Step::Attached).count() > 8,
        "{seen:?}"
    );
}
