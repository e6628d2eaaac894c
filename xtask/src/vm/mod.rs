//! `cargo xtask vm`: end-to-end tests on a kernel of another age, under QEMU's software emulation, so that any machine
//! can run it.

mod image;
mod kernel;

use std::io::{BufRead as _, BufReader};
use std::path::Path;
use std::process::{Command, ExitCode, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::{apt, build, run, setup};
use image::Image;

#[derive(clap::Args)]
pub(crate) struct Args {
    /// The Debian release whose kernel is run: bullseye (5.10), bookworm (6.1), trixie (6.12)
    #[arg(long, default_value = "bookworm")]
    suite: String,
    /// Minutes after which the machine is switched off
    #[arg(long, default_value_t = 40)]
    limit: u64,
    /// Show what the tests print also when they succeed
    #[arg(long)]
    verbose: bool,
    /// Run this shell command instead of tests, and show what it prints
    #[arg(long, conflicts_with = "filter")]
    command: Option<String>,
    /// Run only tests whose name contains this; instead of the usual ones, any end-to-end test
    filter: Option<String>,
}

/// End-to-end tests that show each part that depends on the kernel's age: sockets, packets, programs that replace each
/// other, what `cleanup` leaves. And those for which the kernels of many machines have no module.
const TESTS: [&str; 8] = [
    "cleanup::",
    "hooks::",
    "node_port::datagrams_larger_than_a_packet_are_translated",
    "node_port::every_client_reaches_every_pod_through_every_node",
    "sctp::",
    "stacked::",
    "takeover::from_ipvs_and_back_fails_no_connection",
    "traffic::every_protocol_and_family_from_pods_and_nodes",
];

/// What the tests start beside programs of this workspace.
const PROGRAMS: [&str; 13] = [
    "busybox",
    "ip",
    "tc",
    "bpftool",
    "nft",
    "ipset",
    "ipvsadm",
    "iptables-nft-restore",
    "ip6tables-nft-restore",
    "iptables-nft-save",
    "ip6tables-nft-save",
    "iptables-legacy-save",
    "ip6tables-legacy-save",
];

/// Seconds for one test: everything takes about ten times as long as outside.
const TEST_LIMIT: u32 = 600;

pub(crate) fn run(args: &Args) -> Result<ExitCode> {
    setup::for_vm()?;
    let bin_dir = build::programs(build::Profile::Debug)?;
    let binary = build::test_binary("beeline-tests", "e2e")?;
    let tests = match &args.command {
        Some(_) => Vec::new(),
        None => chosen(&binary, args.filter.as_deref())?,
    };
    let kernel = kernel::of_suite(&args.suite)?;

    let work = apt::WorkDir::new()?;
    let mut image = Image::new(work.0.join("root"))?;
    for program in PROGRAMS {
        image.program(program)?;
    }
    image.plugins(Path::new("/usr/lib/x86_64-linux-gnu/xtables"))?;
    for program in ["beeline", "beeline-echo", "beeline-load", "beeline-sweep"] {
        image.own_program(&bin_dir.join(program))?;
    }
    let binary = image.own_program(&binary)?;
    let mut lines: Vec<String> = tests
        .iter()
        .map(|name| format!("{TEST_LIMIT} {name} {binary} --exact --include-ignored --nocapture {name}\n"))
        .collect();
    if let Some(command) = &args.command {
        image.write("/command", command, 0o644)?;
        lines.push(format!("{TEST_LIMIT} command sh /command\n"));
    }
    image.write("/tests", &lines.concat(), 0o644)?;
    image.write("/init", include_str!("init.sh"), 0o755)?;
    image.modules(&kernel)?;
    let packed = work.0.join("initramfs");
    image.pack(&packed)?;
    println!("{} tests on Linux {}", tests.len(), kernel.release);
    boot(&kernel.image, &packed, args)
}

/// Names of tests of the end-to-end binary.
fn chosen(binary: &Path, filter: Option<&str>) -> Result<Vec<String>> {
    let mut list = Command::new(binary);
    let listed = run::output(list.args(["--list", "--format", "terse"]))?;
    let names = listed.lines().filter_map(|line| line.strip_suffix(": test"));
    let wanted = |name: &&str| match filter {
        Some(part) => name.contains(part),
        None => TESTS.iter().any(|part| name.contains(part)),
    };
    let names: Vec<String> = names.filter(wanted).map(str::to_owned).collect();
    if names.is_empty() {
        bail!("no end-to-end test is called {}", filter.unwrap_or_default());
    }
    Ok(names)
}

/// Runs the machine until it switches itself off, and passes on what it says.
fn boot(kernel: &Path, initramfs: &Path, args: &Args) -> Result<ExitCode> {
    let verbose = if args.verbose || args.command.is_some() {
        " VERBOSE=1"
    } else {
        ""
    };
    let mut qemu = Command::new("qemu-system-x86_64")
        .args(["-machine", "q35", "-accel", "tcg,thread=multi", "-cpu", "max"])
        .args(["-smp", "4", "-m", "3G", "-nodefaults", "-display", "none"])
        .args(["-serial", "stdio", "-no-reboot"])
        .arg("-kernel")
        .arg(kernel)
        .arg("-initrd")
        .arg(initramfs)
        .arg("-append")
        .arg(format!("console=ttyS0 quiet panic=-1 mitigations=off{verbose}"))
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .context("cannot start qemu-system-x86_64")?;
    let output = qemu.stdout.take().context("qemu without output")?;
    let (lines, received) = mpsc::channel();
    std::thread::spawn(move || {
        for line in BufReader::new(output).split(b'\n').map_while(Result::ok) {
            if lines
                .send(String::from_utf8_lossy(&line).trim_end().to_owned())
                .is_err()
            {
                break;
            }
        }
    });
    let end = Instant::now() + Duration::from_secs(args.limit * 60);
    let mut verdict = None;
    while let Ok(line) = received.recv_timeout(end.saturating_duration_since(Instant::now())) {
        match line.strip_prefix("beeline-vm: ") {
            Some(said) => {
                println!("{said}");
                verdict = verdict.or(failures(said));
            }
            None => println!("    {line}"),
        }
    }
    let late = Instant::now() >= end;
    // it has ended, or must
    let _ = qemu.kill();
    qemu.wait().context("cannot wait for qemu")?;
    match verdict {
        Some(0) => Ok(ExitCode::SUCCESS),
        Some(_) => Ok(ExitCode::FAILURE),
        None if late => bail!(
            "the machine was switched off after {} minutes (--limit)",
            args.limit
        ),
        None => bail!("the machine ended before all tests had run"),
    }
}

/// From the last line of the machine: `3 tests, 0 failed`.
fn failures(said: &str) -> Option<u32> {
    let (total, failed) = said.strip_suffix(" failed")?.split_once(" tests, ")?;
    total.parse::<u32>().ok()?;
    failed.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_verdict_is_the_last_line() {
        assert_eq!(failures("3 tests, 1 failed"), Some(1));
        assert_eq!(failures("ok traffic::tcp (3 s)"), None);
        assert_eq!(failures("FAILED a, b failed"), None);
    }
}
