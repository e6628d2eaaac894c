//! What users install: static programs, which run in any image and on any node.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::process::Command;

use anyhow::{Context, Result};

use crate::{build, run};

const PROGRAMS: [&str; 2] = ["beeline", "beeline-cni"];

pub(crate) fn dist() -> Result<()> {
    let target = format!("{}-unknown-linux-gnu", std::env::consts::ARCH);
    let mut cargo = run::cargo();
    cargo.args(["build", "--release", "--bins", "--target", &target]);
    cargo.args(["--package", "dataplane-user", "--package", "beeline-cni"]);
    // for the target only: build scripts and macros of this machine are as ever
    let flags = format!(
        "CARGO_TARGET_{}_RUSTFLAGS",
        target.replace('-', "_").to_uppercase()
    );
    cargo.env(flags, "-C target-feature=+crt-static");
    run::checked(&mut cargo)?;
    let dir = run::root().join("dist");
    fs::create_dir_all(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
    for program in PROGRAMS {
        let from = build::target_dir().join(&target).join("release").join(program);
        let to = dir.join(program);
        // what debuggers read is four fifths of it; names of functions stay, for backtraces
        let mut strip = Command::new("strip");
        run::checked(strip.args(["--strip-debug", "-o"]).arg(&to).arg(&from))?;
        fs::set_permissions(&to, fs::Permissions::from_mode(0o755))?;
        println!("{}", to.display());
    }
    Ok(())
}
