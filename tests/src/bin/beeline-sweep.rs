//! Removes what killed tests and demos left behind.

use std::process::ExitCode;

use anyhow::Result;
use beeline_tests::residue;
use clap::Parser;

#[derive(Parser)]
#[command(
    name = "cargo xtask sweep",
    about = "Remove what killed tests and demos (also `demo --keep`) left behind"
)]
struct Args {
    /// Only print everything that tests could leave behind, one thing per line, ours or not
    #[arg(long)]
    list: bool,
}

fn main() -> Result<ExitCode> {
    let args = Args::parse();
    if args.list {
        for line in residue::listing()? {
            println!("{line}");
        }
        return Ok(ExitCode::SUCCESS);
    }
    let (mut count, mut code) = (0, ExitCode::SUCCESS);
    for (name, pid) in residue::clusters()? {
        if residue::in_use(&name, pid) {
            println!("{name} is in use by process {pid}: left alone");
            continue;
        }
        let (removed, failed) = residue::remove(&name);
        count += removed.len();
        for line in removed {
            println!("removed {line}");
        }
        for line in failed {
            eprintln!("cannot remove {line}");
            code = ExitCode::FAILURE;
        }
    }
    if count == 0 {
        println!("sweep: nothing to remove");
    }
    Ok(code)
}
