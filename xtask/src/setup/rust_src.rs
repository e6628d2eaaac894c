//! The standard library's sources: the BPF target has no prebuilt `core`, so the eBPF programs are built with their own.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, anyhow, bail};

use crate::apt::{Suite, WorkDir};
use crate::run;

/// Debian suites that may carry the sources of the pinned rustc, best first.
const SUITES: [&str; 3] = ["trixie-backports", "forky", "sid"];

pub(super) fn missing() -> Result<Option<String>> {
    let library = library_dir()?;
    if library.join("core/src/lib.rs").is_file() {
        return Ok(None);
    }
    Ok(Some(format!("no {}", library.display())))
}

pub(super) fn install() -> Result<()> {
    let Err(by_rustup) = with_rustup() else {
        return Ok(());
    };
    eprintln!("setup: {by_rustup:#}");
    println!("setup: taking the sources from Debian's rust-src package instead");
    with_debian().map_err(|by_debian| {
        anyhow!(
            "cannot get rust-src.\n  by rustup: {by_rustup:#}\n  from Debian: {by_debian:#}\n  \
             offline? Put the `library` directory of Rust {} at {}",
            rustc_version().unwrap_or_else(|_| "of this toolchain".to_owned()),
            library_dir().map_or_else(|_| "lib/rustlib/src/rust".into(), |dir| dir.display().to_string()),
        )
    })
}

fn with_rustup() -> Result<()> {
    if run::find("rustup").is_none() {
        bail!("rustup is not installed");
    }
    let mut rustup = Command::new("rustup");
    // One try: where the server is out of reach there is another way.
    rustup
        .current_dir(run::root())
        .env("RUSTUP_MAX_RETRIES", "1")
        .env("RUST_BACKTRACE", "0");
    run::checked(rustup.args(["component", "add", "rust-src"]))?;
    if let Some(still) = missing()? {
        bail!("rustup added rust-src, but still {still}");
    }
    Ok(())
}

/// Takes the package of a Debian suite; nothing is installed, only unpacked.
fn with_debian() -> Result<()> {
    let version = rustc_version()?;
    let work = WorkDir::new()?;
    let mut seen = Vec::new();
    for name in SUITES {
        let suite = match Suite::open(&work, name) {
            Ok(suite) => suite,
            Err(error) => {
                seen.push(format!("{name}: {error:#}"));
                continue;
            }
        };
        let offered = suite.cache(&["madison", "rust-src"]).unwrap_or_default();
        let Some(package) = matching_version(&offered, &version) else {
            seen.push(format!("{name} has no rust-src {version}"));
            continue;
        };
        let tree = work.0.join("tree");
        suite.unpack(&format!("rust-src={package}"), &tree)?;
        return copy_sources(&tree, &version);
    }
    bail!("{}", seen.join("; "))
}

/// The newest offered Debian version of exactly this upstream version, from `apt-cache madison`'s table.
fn matching_version(madison: &str, upstream: &str) -> Option<String> {
    madison
        .lines()
        .filter_map(|line| line.split('|').nth(1))
        .map(str::trim)
        .find(|version| {
            version
                .strip_prefix(upstream)
                .is_some_and(|rest| rest.starts_with(['+', '-']))
        })
        .map(str::to_owned)
}

fn copy_sources(tree: &Path, version: &str) -> Result<()> {
    let from = tree.join(format!("usr/src/rustc-{version}/library"));
    let from = if from.is_dir() {
        from
    } else {
        tree.join("usr/lib/rustlib/src/rust/library")
    };
    if !from.join("core/src/lib.rs").exists() {
        bail!("the package rust-src {version} does not hold the library's sources where they are expected");
    }
    let to = library_dir()?;
    let parent = to.parent().context("the sources' directory has no parent")?;
    fs::create_dir_all(parent).with_context(|| format!("cannot make {}", parent.display()))?;
    println!("setup: copying the sources to {}", to.display());
    run::checked(
        Command::new("cp")
            .arg("-rT")
            .arg("--dereference")
            .arg(&from)
            .arg(&to),
    )
}

/// Where cargo's `-Z build-std` looks for the sources of the toolchain that builds this workspace.
fn library_dir() -> Result<PathBuf> {
    let sysroot = run::output(
        Command::new("rustc")
            .current_dir(run::root())
            .args(["--print", "sysroot"]),
    )?;
    Ok(Path::new(sysroot.trim()).join("lib/rustlib/src/rust/library"))
}

/// Such as `1.95.0`.
fn rustc_version() -> Result<String> {
    let said = run::output(Command::new("rustc").current_dir(run::root()).arg("--version"))?;
    said.split(' ')
        .nth(1)
        .map(str::to_owned)
        .with_context(|| format!("cannot read rustc's version from `{}`", said.trim()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_same_upstream_version_matches() {
        let madison = " rust-src | 1.95.0+dfsg1-2~bpo13+1 | mirror trixie-backports/main amd64 Packages\n";
        assert_eq!(
            matching_version(madison, "1.95.0").as_deref(),
            Some("1.95.0+dfsg1-2~bpo13+1")
        );
        assert_eq!(matching_version(madison, "1.95.1"), None);
        assert_eq!(matching_version(" rust-src | 1.95.01-1 | x\n", "1.95.0"), None);
    }
}
