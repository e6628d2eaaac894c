//! Builds the eBPF programs and puts the object file where `kernel::object` embeds it from.

use std::env;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use aya_build::{Package, Toolchain};

/// Set for the copy of this program that does the build.
const INNER: &str = "BEELINE_BUILD_INNER";

fn main() -> ExitCode {
    let result = if env::var_os(INNER).is_some() {
        build().map(|()| true)
    } else {
        quietly()
    };
    match result {
        Ok(true) => ExitCode::SUCCESS,
        // the copy has said why
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            // one line: cargo prints what goes to standard error here as the reason of the failure
            eprintln!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Runs the build in a copy of this program and leaves out of its output that things compile: aya-build makes a warning
/// of each line that cargo says, and cargo would repeat them all whenever this crate is built.
fn quietly() -> anyhow::Result<bool> {
    let output = Command::new(env::current_exe()?)
        .env(INNER, "1")
        .stderr(std::process::Stdio::inherit())
        .output()?;
    let text = String::from_utf8_lossy(&output.stdout);
    let said: Vec<&str> = text.lines().collect();
    for line in said
        .iter()
        .filter(|line| !output.status.success() || !is_progress(line))
    {
        println!("{line}");
    }
    Ok(output.status.success())
}

/// What cargo says while all is well, as aya-build passes it on.
fn is_progress(line: &str) -> bool {
    line.strip_prefix("cargo:warning=").is_some_and(|said| {
        let said = said.trim_start();
        [
            "Compiling ",
            "Finished ",
            "Downloaded ",
            "Downloading ",
            "Locking ",
            "Updating ",
            "Blocking ",
            "Fresh ",
        ]
        .iter()
        .any(|word| said.starts_with(word))
    })
}

fn build() -> anyhow::Result<()> {
    let root = PathBuf::from(env::var("CARGO_MANIFEST_DIR")?).join("..");
    let ebpf = root.join("dataplane-ebpf");
    println!(
        "cargo:rerun-if-changed={}",
        root.join("dataplane-common/src").display()
    );
    println!("cargo:rerun-if-env-changed=PATH");
    check_tools()?;
    // SAFETY: the build script has one thread. aya-build passes this on to cargo and rustc, which ask it for leave to
    // build core for the BPF target on a stable toolchain.
    unsafe { env::set_var("RUSTC_BOOTSTRAP", "1") };
    let toolchain = env::var("RUSTUP_TOOLCHAIN").unwrap_or_else(|_| "stable".into());
    let root_dir = ebpf
        .to_str()
        .ok_or_else(|| anyhow::anyhow!("{} is not UTF-8", ebpf.display()))?;
    let package = Package {
        name: "dataplane-ebpf",
        root_dir,
        ..Package::default()
    };
    aya_build::build_ebpf([package], Toolchain::Custom(&toolchain))
}

/// What `cargo xtask setup` installs.
fn check_tools() -> anyhow::Result<()> {
    let missing = |what: &str| anyhow::anyhow!("{what} is missing: run `cargo xtask setup` first");
    which::which("bpf-linker").map_err(|_| missing("bpf-linker"))?;
    let rustc = env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    let sysroot = Command::new(rustc).args(["--print", "sysroot"]).output()?;
    let sysroot = String::from_utf8(sysroot.stdout)?;
    let library = Path::new(sysroot.trim()).join("lib/rustlib/src/rust/library/Cargo.lock");
    if !library.exists() {
        return Err(missing("rust-src"));
    }
    Ok(())
}
