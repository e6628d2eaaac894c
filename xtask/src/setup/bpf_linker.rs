//! bpf-linker, the linker of the BPF target.

use std::process::Command;

use anyhow::{Context, Result};

use crate::run;

/// The newest release that can use the LLVM inside the pinned rustc; later ones need LLVM packages of the system.
const VERSION: &str = "0.10.4";
/// The LLVM of the pinned rustc.
const FEATURES: &str = "rust-llvm-22";

pub(super) fn missing() -> Result<Option<String>> {
    let Some(path) = run::find("bpf-linker") else {
        return Ok(Some("not installed".to_owned()));
    };
    // A linker that cannot even start (its LLVM is gone) is replaced like a wrong version.
    let said = run::output(Command::new(&path).arg("--version")).unwrap_or_else(|error| error.to_string());
    let wanted = format!("bpf-linker {VERSION}");
    if said.trim() == wanted {
        return Ok(None);
    }
    Ok(Some(format!(
        "{} is `{}`, needed is `{wanted}`",
        path.display(),
        said.trim()
    )))
}

pub(super) fn install() -> Result<()> {
    println!("setup: building bpf-linker {VERSION} from its registry (about a minute)");
    let mut cargo = run::cargo();
    cargo
        .args([
            "install",
            "bpf-linker",
            "--version",
            VERSION,
            "--force",
            "--locked",
        ])
        .args(["--no-default-features", "--features", FEATURES]);
    // `cargo run`, which started us, describes our own package in these; they would mislead the other build.
    for (name, _) in std::env::vars_os() {
        if name
            .to_str()
            .is_some_and(|name| name.starts_with("CARGO_PKG_") || name.starts_with("CARGO_MANIFEST_"))
        {
            cargo.env_remove(name);
        }
    }
    run::checked(&mut cargo).context(
        "cannot install bpf-linker; offline? It needs the crates registry once, or a `bpf-linker` of that version on PATH",
    )
}
