//! Starting other programs: what is run is shown, and a failure names it.

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};

use anyhow::{Context, Result, bail};

/// The workspace's root directory.
pub(crate) fn root() -> &'static Path {
    let here = Path::new(env!("CARGO_MANIFEST_DIR"));
    here.parent().unwrap_or(here)
}

/// A `cargo` command in the workspace, with the directory of cargo's own programs (bpf-linker, nextest) on `PATH`.
pub(crate) fn cargo() -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(root());
    if let Some(path) = path_with_cargo_bin() {
        command.env("PATH", path);
    }
    command
}

/// `$CARGO_HOME/bin`, where `cargo install` puts programs.
pub(crate) fn cargo_bin() -> Option<PathBuf> {
    let home = std::env::var_os("CARGO_HOME").map(PathBuf::from);
    let home = home.or_else(|| std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".cargo")))?;
    Some(home.join("bin"))
}

fn path_with_cargo_bin() -> Option<std::ffi::OsString> {
    let mut dirs: Vec<PathBuf> = std::env::split_paths(&std::env::var_os("PATH")?).collect();
    let bin = cargo_bin()?;
    if !dirs.contains(&bin) {
        dirs.push(bin);
    }
    std::env::join_paths(dirs).ok()
}

/// Where `program` is: on `PATH`, in cargo's directory of programs, or in the directories of system programs that
/// an ordinary user's `PATH` leaves out.
pub(crate) fn find(program: &str) -> Option<PathBuf> {
    let path = path_with_cargo_bin().or_else(|| std::env::var_os("PATH"))?;
    std::env::split_paths(&path)
        .chain(["/usr/sbin", "/sbin"].map(PathBuf::from))
        .map(|dir| dir.join(program))
        .find(|file| file.is_file())
}

/// Shows the command, runs it, and fails with its name when it fails.
pub(crate) fn checked(command: &mut Command) -> Result<()> {
    eprintln!("+ {}", show(command));
    let status = command
        .status()
        .with_context(|| format!("cannot start {}", show(command)))?;
    if !status.success() {
        bail!("{} failed ({status})", show(command));
    }
    Ok(())
}

/// Shows the command, runs it with stderr as ours, and returns what it printed.
pub(crate) fn piped(command: &mut Command) -> Result<String> {
    eprintln!("+ {}", show(command));
    output(command.stderr(Stdio::inherit()))
}

/// Runs the command silently and returns what it printed; what it wrote to stderr is in the error.
pub(crate) fn output(command: &mut Command) -> Result<String> {
    let output = command
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("cannot start {}", show(command)))?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        bail!("{} failed ({}): {}", show(command), output.status, said.trim());
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Runs a program that owns the terminal and its own cleaning up. Ctrl-C reaches it as well as us, since we share a
/// process group; we must outlive it or the shell prompt returns before it has cleaned up.
pub(crate) fn foreground(command: &mut Command) -> Result<ExitCode> {
    // SAFETY: ignoring a signal installs no handler code.
    unsafe {
        use nix::sys::signal::{SigHandler, Signal, signal};
        signal(Signal::SIGINT, SigHandler::SigIgn).context("cannot ignore SIGINT")?;
        // A child inherits "ignored"; the programs of beeline-tests install handlers of their own.
    }
    let status = command
        .status()
        .with_context(|| format!("cannot start {}", show(command)))?;
    Ok(match status.code() {
        Some(code) => ExitCode::from(u8::try_from(code).unwrap_or(1)),
        None => {
            eprintln!("error: {} ended by {status}", show(command));
            ExitCode::FAILURE
        }
    })
}

/// Fails unless we are root; `what` is the command that needs it.
pub(crate) fn need_root(what: &str) -> Result<()> {
    if !nix::unistd::geteuid().is_root() {
        bail!("{what} needs root: it makes network namespaces, cgroups and eBPF programs");
    }
    Ok(())
}

fn show(command: &Command) -> String {
    let mut words = vec![command.get_program().to_string_lossy().into_owned()];
    if let Some(name) = Path::new(&words[0]).file_name() {
        words[0] = name.to_string_lossy().into_owned();
    }
    // apt's private configuration is a dozen `-o name=value`, of no use to the reader.
    let mut args = command.get_args();
    while let Some(arg) = args.next() {
        if arg == "-o" {
            args.next();
        } else {
            words.push(arg.to_string_lossy().into_owned());
        }
    }
    words.join(" ")
}
