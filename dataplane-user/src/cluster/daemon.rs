//! The parts of a cluster as processes in the background.

use std::fs::{self, File};
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, bail};
use beeline_node::process::Process;
use nix::sys::signal::Signal;

use super::{POLL, Places};

/// How long one that was asked to end may take.
const END: Duration = Duration::from_secs(15);
/// Lines of its log that are shown when one does not start.
const LINES: usize = 15;

fn record(places: &Places, name: &str) -> std::path::PathBuf {
    places.run().join(format!("{name}.json"))
}

fn log(places: &Places, name: &str) -> std::path::PathBuf {
    places.path("var/log/beeline").join(format!("{name}.log"))
}

fn running(places: &Places, name: &str) -> anyhow::Result<Option<Process>> {
    let path = record(places, name);
    let text = match fs::read(&path) {
        Ok(text) => text,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error).with_context(|| format!("read {}", path.display())),
    };
    let process: Process =
        serde_json::from_slice(&text).with_context(|| format!("understand {}", path.display()))?;
    Ok(Some(process).filter(Process::runs))
}

/// Fails if one of this name runs already.
pub(super) fn check_absent(places: &Places, name: &str) -> anyhow::Result<()> {
    match running(places, name)? {
        Some(process) => bail!(
            "[preflight] {name} runs already (pid {}): `beeline reset` ends it",
            process.pid
        ),
        None => Ok(()),
    }
}

/// Starts `beeline` with these arguments; it goes on when this process and its terminal are gone.
pub(super) fn start(places: &Places, name: &str, args: &[String]) -> anyhow::Result<()> {
    check_absent(places, name)?;
    let log = log(places, name);
    for dir in [log.parent(), Some(places.run().as_path())].into_iter().flatten() {
        fs::create_dir_all(dir).with_context(|| format!("make {}", dir.display()))?;
    }
    let output = File::options()
        .create(true)
        .append(true)
        .open(&log)
        .with_context(|| format!("open {}", log.display()))?;
    let program = std::env::current_exe().context("find this program")?;
    let child = Command::new(program)
        .args(args)
        .stdin(Stdio::null())
        .stdout(output.try_clone()?)
        .stderr(output)
        .current_dir("/")
        .process_group(0)
        .spawn()
        .with_context(|| format!("start {name}"))?;
    let Some(process) = Process::of(child.id()) else {
        bail!("{name} ended at once; {}", last_lines(&log));
    };
    let path = record(places, name);
    fs::write(&path, serde_json::to_vec(&process)?).with_context(|| format!("write {}", path.display()))
}

/// Fails, with the end of its log, if it has ended.
pub(super) fn check_running(places: &Places, name: &str) -> anyhow::Result<()> {
    if running(places, name)?.is_none() {
        bail!("{name} has ended; {}", last_lines(&log(places, name)));
    }
    Ok(())
}

fn last_lines(log: &Path) -> String {
    let text = fs::read_to_string(log).unwrap_or_default();
    let lines: Vec<&str> = text.lines().collect();
    let from = lines.len().saturating_sub(LINES);
    format!("{} says:\n{}", log.display(), lines[from..].join("\n"))
}

/// Ends it, if it runs: SIGTERM, then SIGKILL.
pub(super) async fn stop(places: &Places, name: &str) -> anyhow::Result<bool> {
    let Some(process) = running(places, name)? else {
        return Ok(false);
    };
    for (signal, patience) in [(Signal::SIGTERM, END), (Signal::SIGKILL, END)] {
        process.signal(signal);
        let ended = async {
            while process.runs() {
                tokio::time::sleep(POLL).await;
            }
        };
        if tokio::time::timeout(patience, ended).await.is_ok() {
            return Ok(true);
        }
    }
    bail!("{name} (pid {}) does not end", process.pid)
}
