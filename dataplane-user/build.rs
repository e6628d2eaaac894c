//! Builds the eBPF programs and puts the object file where `kernel::object` embeds it from.

use std::env;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use aya_build::{Package, Toolchain};

fn main() -> ExitCode {
    match build() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // one line: cargo prints what goes to standard error here as the reason of the failure
            eprintln!("{error:#}");
            ExitCode::FAILURE
        }
    }
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
