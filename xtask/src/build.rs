//! Building the programs that the tests, the demo and the benches start.

use std::path::PathBuf;

use anyhow::Result;

use crate::run;

#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Profile {
    /// What the tests use: builds quickly.
    Debug,
    /// What users get.
    Release,
}

impl Profile {
    pub(crate) fn from_debug(debug: bool) -> Self {
        if debug { Self::Debug } else { Self::Release }
    }

    fn dir(self) -> &'static str {
        match self {
            Self::Debug => "debug",
            Self::Release => "release",
        }
    }
}

/// Builds `beeline`, the CNI plugin and the programs of `beeline-tests`; returns the directory that they are in.
pub(crate) fn programs(profile: Profile) -> Result<PathBuf> {
    let mut cargo = run::cargo();
    cargo.args([
        "build",
        "--bins",
        "--package",
        "dataplane-user",
        "--package",
        "beeline-cni",
        "--package",
        "beeline-tests",
    ]);
    if profile == Profile::Release {
        cargo.arg("--release");
    }
    run::checked(&mut cargo)?;
    Ok(target_dir().join(profile.dir()))
}

/// cargo's target directory: ours is the one that we were built in.
fn target_dir() -> PathBuf {
    let by_exe = std::env::current_exe()
        .ok()
        .and_then(|exe| exe.parent()?.parent().map(PathBuf::from));
    by_exe.unwrap_or_else(|| run::root().join("target"))
}
