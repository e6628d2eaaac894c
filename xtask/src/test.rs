//! `cargo xtask test`: crate by crate, then end to end in network namespaces, then a look at what is left behind.

use std::process::{Command, ExitCode};

use anyhow::{Result, bail};

use crate::{build, run};

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Leave out the end-to-end tests, which need root
    #[arg(long)]
    unit: bool,
    /// Leave out the tests of the crates
    #[arg(long, conflicts_with = "unit")]
    e2e: bool,
    /// Run only tests whose name contains this
    filter: Option<String>,
}

/// Packages that are not tested crate by crate: the one needs the BPF target, the other needs root and runs last.
const APART: [&str; 4] = ["--exclude", "dataplane-ebpf", "--exclude", "beeline-tests"];

pub(crate) fn run(args: &Args) -> Result<ExitCode> {
    let nextest = run::find("cargo-nextest").is_some();
    if !args.e2e {
        let mut cargo = test_command(nextest);
        cargo.args(["--workspace"]).args(APART);
        filtered(&mut cargo, args);
        run::checked(&mut cargo)?;
    }
    if !args.unit {
        run::need_root("the second half of `cargo xtask test`")?;
        // The tests start these programs; cargo alone would not know that they must be fresh.
        let bin_dir = build::programs(build::Profile::Debug)?;
        let left = || run::output(Command::new(bin_dir.join("beeline-sweep")).arg("--list"));
        let before = left()?;
        let mut cargo = test_command(nextest);
        cargo.args(["--package", "beeline-tests"]);
        filtered(&mut cargo, args);
        if nextest {
            cargo.args(["--test-threads", "1"]);
        } else {
            cargo.args(["--", "--test-threads=1"]);
        }
        // What is left behind is looked at even when a test failed: then it matters most.
        let result = run::checked(&mut cargo);
        let after = left()?;
        result?;
        let new: Vec<&str> = after
            .lines()
            .filter(|line| !before.lines().any(|old| old == *line))
            .collect();
        if !new.is_empty() {
            bail!(
                "the tests left behind (`cargo xtask sweep` removes it):\n  {}",
                new.join("\n  ")
            );
        }
        println!(
            "nothing left behind: network namespaces, links, bpffs, cgroups, processes and files are as before"
        );
    }
    Ok(ExitCode::SUCCESS)
}

fn test_command(nextest: bool) -> Command {
    let mut cargo = run::cargo();
    if nextest {
        cargo.args(["nextest", "run", "--no-tests=pass", "--no-fail-fast"]);
    } else {
        cargo.args(["test", "--no-fail-fast"]);
    }
    cargo
}

fn filtered(cargo: &mut Command, args: &Args) {
    if let Some(filter) = &args.filter {
        cargo.arg(filter);
    }
}
