//! `cargo xtask setup`: what building and testing need beyond a Rust toolchain.
//!
//! Each piece is checked without running anything slow, so that every other command can afford the check.

mod bpf_linker;
mod packages;
mod rust_src;

use anyhow::Result;

/// One thing that the workspace needs on this machine.
struct Piece {
    /// What it is, for the user.
    name: &'static str,
    /// What is missing, if anything is.
    missing: fn() -> Result<Option<String>>,
    /// Installs it.
    install: fn() -> Result<()>,
}

const PIECES: [Piece; 3] = [
    Piece {
        name: "rust-src",
        missing: rust_src::missing,
        install: rust_src::install,
    },
    Piece {
        name: "bpf-linker",
        missing: bpf_linker::missing,
        install: bpf_linker::install,
    },
    Piece {
        name: "programs for the build, the tests and the demo",
        missing: packages::missing,
        install: packages::install,
    },
];

/// Installs what is missing and says so; one line when nothing is.
pub(crate) fn setup() -> Result<()> {
    if install_missing()? == 0 {
        println!("setup: nothing to do, everything is installed");
    } else {
        println!("setup: done");
    }
    Ok(())
}

/// As [`setup`], but silent when there is nothing to do: every other command runs it first.
pub(crate) fn ensure() -> Result<()> {
    install_missing().map(|_| ())
}

/// What `cargo xtask vm` needs beyond that.
pub(crate) fn for_vm() -> Result<()> {
    packages::install_for_vm()
}

fn install_missing() -> Result<usize> {
    let mut installed = 0;
    for piece in &PIECES {
        let Some(what) = (piece.missing)()? else { continue };
        println!("setup: {}: {what}", piece.name);
        (piece.install)()?;
        if let Some(still) = (piece.missing)()? {
            anyhow::bail!(
                "setup: {} was installed without an error, but still: {still}",
                piece.name
            );
        }
        installed += 1;
    }
    Ok(installed)
}
