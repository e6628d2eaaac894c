//! What the programs log reaches a `tracing` subscriber, when they are told to log.
#![allow(clippy::unwrap_used, reason = "a test that cannot be set up fails")]

mod common;

use std::io::{self, Write};
use std::time::Duration;

use common::python::Python;
use common::{Place, frontend, key, service};
use dataplane_model::program::Programmer;
use dataplane_model::{Family, Protocol};
use dataplane_user::kernel::Kernel;
use tokio::sync::mpsc;
use tracing_subscriber::filter::LevelFilter;

/// Hands every line to the test.
struct Lines(mpsc::UnboundedSender<String>);

impl Write for Lines {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let line = String::from_utf8_lossy(bytes).into_owned();
        self.0.send(line).map_err(io::Error::other)?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// One test, because the subscriber is the process's.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn programs_log_when_told_to_and_only_then() {
    let (sender, mut lines) = mpsc::unbounded_channel();
    tracing_subscriber::fmt()
        .with_max_level(LevelFilter::DEBUG)
        .with_ansi(false)
        .with_writer(move || Lines(sender.clone()))
        .init();

    // 4: debug; then again, silent, below the same links
    let mut place = Place::new();
    place.config.ebpf_log_level = 4;
    let mut kernel = Kernel::open(&place.config).unwrap();
    kernel.forward_logs();
    let mut programmer = Programmer::new(kernel.maps().unwrap()).unwrap();
    let empty = service(frontend("10.96.0.1", 80, Protocol::Tcp), &[]);
    let change = [(key("a", Protocol::Tcp, Family::V4), Some(empty))];
    assert!(programmer.reconcile(change, 0).failed.is_empty());
    let mut client = Python::in_cgroup(&place.config.cgroup_root);
    let refused = "tcp().connect(('10.96.0.1', 80))";
    assert_eq!(client.ask(refused), "ECONNREFUSED");
    let wanted = async {
        while let Some(line) = lines.recv().await {
            if line.contains("refused, counter 2") {
                return line;
            }
        }
        String::new()
    };
    let line = tokio::time::timeout(Duration::from_secs(20), wanted)
        .await
        .unwrap();
    assert!(line.contains("DEBUG") && line.contains("sock"), "{line}");

    let loud = kernel.info().programs.clone();
    place.config.ebpf_log_level = 0;
    let silent = Kernel::open(&place.config).unwrap().info().programs.clone();
    for (loud, silent) in loud.iter().zip(&silent) {
        assert_eq!(loud.name, silent.name);
        assert!(
            silent.verified_instructions <= loud.verified_instructions,
            "logging costs something although it is off: {loud:?} {silent:?}"
        );
    }
    let total = |programs: &[dataplane_user::kernel::ProgramInfo]| {
        programs
            .iter()
            .map(|p| u64::from(p.verified_instructions))
            .sum::<u64>()
    };
    assert!(total(&silent) < total(&loud), "{loud:?} {silent:?}");
    assert_eq!(client.ask(refused), "ECONNREFUSED");
}
