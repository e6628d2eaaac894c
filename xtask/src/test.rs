//! `cargo xtask test`: crate by crate, then end to end in network namespaces, then a look at what is left behind.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
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
    if !args.unit {
        run::need_root("the second half of `cargo xtask test`")?;
    }
    let machine = Machine::prepare()?;
    // What is left behind is looked at even when a test failed: then it matters most.
    let result = run_tests(args);
    let left = machine.left_behind();
    result?;
    let left = left?;
    if !left.is_empty() {
        bail!(
            "the tests left behind (`cargo xtask sweep` removes it):\n  {}",
            left.join("\n  ")
        );
    }
    Ok(ExitCode::SUCCESS)
}

fn run_tests(args: &Args) -> Result<()> {
    let nextest = run::find("cargo-nextest").is_some();
    let mut result = Ok(());
    if !args.e2e {
        let mut cargo = test_command(nextest);
        cargo.args(["--workspace"]).args(APART);
        filtered(&mut cargo, args);
        result = run::checked(&mut cargo);
    }
    if args.unit || result.is_err() {
        return result;
    }
    let mut cargo = test_command(nextest);
    cargo.args(["--package", "beeline-tests"]);
    filtered(&mut cargo, args);
    if nextest {
        cargo.args(["--test-threads", "1"]);
    } else {
        cargo.args(["--", "--test-threads=1"]);
    }
    run::checked(&mut cargo)
}

/// What tests could leave behind on this machine, as it was before them.
struct Machine {
    /// None without root: nothing could be made.
    sweep: Option<PathBuf>,
    before: BTreeSet<String>,
}

impl Machine {
    /// Removes what killed runs left, and takes down what is there. Builds the programs that the tests start: cargo
    /// alone would not know that they must be fresh.
    fn prepare() -> Result<Self> {
        if !nix::unistd::geteuid().is_root() {
            return Ok(Self {
                sweep: None,
                before: BTreeSet::new(),
            });
        }
        let sweep = build::programs(build::Profile::Debug)?.join("beeline-sweep");
        run::checked(&mut Command::new(&sweep))?;
        Ok(Self {
            before: listing(&sweep)?,
            sweep: Some(sweep),
        })
    }

    fn left_behind(&self) -> Result<Vec<String>> {
        let Some(sweep) = &self.sweep else {
            return Ok(Vec::new());
        };
        let left: Vec<String> = listing(sweep)?.difference(&self.before).cloned().collect();
        if left.is_empty() {
            println!(
                "nothing left behind: network namespaces, links, bpffs, cgroups and files are as before"
            );
        }
        Ok(left)
    }
}

fn listing(sweep: &Path) -> Result<BTreeSet<String>> {
    let text = run::output(Command::new(sweep).arg("--list"))?;
    Ok(text.lines().map(str::to_owned).collect())
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
