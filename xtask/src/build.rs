//! Building the programs that the tests, the demo and the benches start.

use std::path::PathBuf;

use anyhow::{Context, Result};

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

/// Builds the tests of a package, and gives the program of those of this name.
pub(crate) fn test_binary(package: &str, test: &str) -> Result<PathBuf> {
    let mut cargo = run::cargo();
    cargo.args(["test", "--no-run", "--package", package, "--test", test]);
    cargo.args(["--message-format", "json-render-diagnostics"]);
    let messages = run::piped(&mut cargo)?;
    executable(&messages).with_context(|| format!("cargo names no program of the tests {test} of {package}"))
}

/// The program of a test target in cargo's messages, one in JSON on each line.
fn executable(messages: &str) -> Option<PathBuf> {
    let of_test = |line: &&str| line.contains("\"kind\":[\"test\"]");
    messages.lines().filter(of_test).find_map(|line| {
        let (_, rest) = line.split_once("\"executable\":\"")?;
        let (path, _) = rest.split_once('"')?;
        Some(PathBuf::from(path))
    })
}

/// cargo's target directory: ours is the one that we were built in.
pub(crate) fn target_dir() -> PathBuf {
    let by_exe = std::env::current_exe()
        .ok()
        .and_then(|exe| exe.parent()?.parent().map(PathBuf::from));
    by_exe.unwrap_or_else(|| run::root().join("target"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_test_program_is_found_in_cargos_messages() {
        let messages = "{\"target\":{\"kind\":[\"bin\"]},\"executable\":\"/t/debug/beeline\"}\n\
                        {\"target\":{\"kind\":[\"test\"]},\"executable\":null}\n\
                        {\"target\":{\"kind\":[\"test\"]},\"executable\":\"/t/debug/deps/e2e-1\",\"fresh\":true}\n";
        assert_eq!(executable(messages), Some(PathBuf::from("/t/debug/deps/e2e-1")));
        assert_eq!(executable(messages.lines().next().unwrap()), None);
    }
}
