//! Development tasks of Beeline: `cargo xtask setup | build | dist | test | demo | bench | vm | sweep`.
//!
//! This crate stays light on purpose: `cargo xtask setup` is the first thing that a newcomer compiles. Whatever needs
//! the dataplane, the API or a namespace lives in the package `beeline-tests`, which these commands build and start.

mod apt;
mod build;
mod dist;
mod run;
mod setup;
mod test;
mod vm;

use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(
    name = "cargo xtask",
    about = "Development tasks of Beeline",
    disable_help_subcommand = true
)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Install what building and testing need: rust-src, bpf-linker, Debian packages. Safe to repeat
    Setup,
    /// Build the programs of the workspace in release mode
    Build {
        /// Build without optimisation, as the tests do
        #[arg(long)]
        debug: bool,
    },
    /// Build static programs into `dist/`, for the image that `Dockerfile` makes
    Dist,
    /// Run all tests: crate by crate, then end to end in network namespaces (needs root)
    Test(test::Args),
    /// Bring up a two-node cluster on this machine and show a service being balanced (needs root)
    #[command(disable_help_flag = true)]
    Demo {
        /// --keep leaves the cluster running; --help shows the rest
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<String>,
    },
    /// Measure: connect, node-port, program, memory, packet, churn, restart or all; exit code 1 when a target is missed (needs root)
    #[command(disable_help_flag = true)]
    Bench {
        /// connect | node-port | program | memory | packet | churn | restart | all, and --json
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<String>,
    },
    /// Run end-to-end tests on an older kernel, in a virtual machine without hardware support (some minutes)
    Vm(vm::Args),
    /// Remove what killed tests and demos (also `demo --keep`) left on this machine (needs root)
    #[command(disable_help_flag = true)]
    Sweep {
        /// --list only shows what is there
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        args: Vec<String>,
    },
}

fn main() -> ExitCode {
    match dispatch(Cli::parse().command) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn dispatch(command: Command) -> Result<ExitCode> {
    match command {
        Command::Setup => setup::setup().map(|()| ExitCode::SUCCESS),
        Command::Build { debug } => {
            setup::ensure()?;
            build::programs(build::Profile::from_debug(debug)).map(|_| ExitCode::SUCCESS)
        }
        Command::Dist => {
            setup::ensure()?;
            dist::dist().map(|()| ExitCode::SUCCESS)
        }
        Command::Test(args) => {
            setup::ensure()?;
            test::run(&args)
        }
        Command::Demo { args } => program("beeline-demo", &args),
        Command::Bench { args } => program("beeline-bench", &args),
        Command::Vm(args) => {
            setup::ensure()?;
            vm::run(&args)
        }
        Command::Sweep { args } => program("beeline-sweep", &args),
    }
}

/// Builds everything in release mode and runs one program of `beeline-tests` in the foreground.
fn program(name: &str, args: &[String]) -> Result<ExitCode> {
    setup::ensure()?;
    run::need_root(&format!("cargo xtask {}", name.trim_start_matches("beeline-")))?;
    let bin_dir = build::programs(build::Profile::Release)?;
    run::foreground(std::process::Command::new(bin_dir.join(name)).args(args))
}
