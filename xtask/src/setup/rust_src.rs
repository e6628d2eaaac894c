//! The standard library's sources: the BPF target has no prebuilt `core`, so the eBPF programs are built with their own.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, anyhow, bail};

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

/// Fetches the package with apt, in directories of its own: the system's package lists and database stay as they are,
/// and nothing is installed, only unpacked. Works without root.
fn with_debian() -> Result<()> {
    for program in ["apt-get", "apt-cache", "dpkg-deb"] {
        if run::find(program).is_none() {
            bail!("{program} is not here, so this is no Debian or Ubuntu");
        }
    }
    let version = rustc_version()?;
    let mirror = debian_mirror(&apt_sources()?)
        .context("the machine's apt sources (/etc/apt/sources.list, sources.list.d) name no Debian mirror")?;
    let work = WorkDir::new()?;
    let mut seen = Vec::new();
    for suite in SUITES {
        let apt = PrivateApt::new(&work.0, &mirror, suite)?;
        if let Err(error) = run::checked(apt.command("apt-get").args(["-q", "update"])) {
            seen.push(format!("{suite}: {error:#}"));
            continue;
        }
        let offered = run::output(apt.command("apt-cache").args(["madison", "rust-src"])).unwrap_or_default();
        let Some(package) = matching_version(&offered, &version) else {
            seen.push(format!("{suite} has no rust-src {version}"));
            continue;
        };
        let name = format!("rust-src={package}");
        run::checked(
            apt.command("apt-get")
                .current_dir(&work.0)
                .args(["-q", "download", &name]),
        )?;
        return unpack(&work.0, &version);
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

fn unpack(work: &Path, version: &str) -> Result<()> {
    let package = fs::read_dir(work)?
        .filter_map(|entry| entry.ok().map(|entry| entry.path()))
        .find(|path| path.extension().is_some_and(|extension| extension == "deb"))
        .context("apt downloaded no package")?;
    let tree = work.join("tree");
    run::checked(Command::new("dpkg-deb").arg("-x").arg(&package).arg(&tree))?;
    let from = tree.join(format!("usr/src/rustc-{version}/library"));
    let from = if from.is_dir() {
        from
    } else {
        tree.join("usr/lib/rustlib/src/rust/library")
    };
    if !from.join("core/src/lib.rs").exists() {
        bail!(
            "{} does not hold the library's sources where they are expected",
            package.display()
        );
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

/// The text of all of the machine's apt sources.
fn apt_sources() -> Result<Vec<String>> {
    let mut files = vec![PathBuf::from("/etc/apt/sources.list")];
    if let Ok(dir) = fs::read_dir("/etc/apt/sources.list.d") {
        files.extend(dir.filter_map(|entry| entry.ok().map(|entry| entry.path())));
    }
    files.sort();
    Ok(files
        .iter()
        .filter_map(|file| fs::read_to_string(file).ok())
        .collect())
}

/// The address of a Debian mirror, from one-line (`deb [options] URI suite components`) and deb822 (`URIs:`) sources.
fn debian_mirror(sources: &[String]) -> Option<String> {
    let lines = sources
        .iter()
        .flat_map(|text| text.lines())
        .map(str::trim)
        .filter(|line| !line.starts_with('#'));
    let mut uris = lines.flat_map(|line| {
        let words: Vec<&str> = line.split_whitespace().collect();
        match words.first().copied() {
            Some("URIs:") => words[1..].iter().map(|uri| (*uri).to_owned()).collect(),
            Some("deb") => words
                .iter()
                .find(|word| word.contains(":/"))
                .map(|uri| (*uri).to_owned())
                .into_iter()
                .collect(),
            _ => Vec::new(),
        }
    });
    // Others are debian-security, vendors' repositories and so on.
    uris.find(|uri| {
        let path = uri.trim_end_matches('/');
        path.ends_with("/debian") || path.ends_with("/mirrors/debian.list")
    })
}

/// apt with a sources list, lists and cache of its own; proxies and credentials are still the machine's.
struct PrivateApt {
    dir: PathBuf,
}

impl PrivateApt {
    fn new(work: &Path, mirror: &str, suite: &str) -> Result<Self> {
        let dir = work.join(suite);
        for sub in ["lists/partial", "cache/archives/partial", "state"] {
            fs::create_dir_all(dir.join(sub))?;
        }
        let key = Path::new("/usr/share/keyrings/debian-archive-keyring.gpg");
        if !key.is_file() {
            bail!("{} (package debian-archive-keyring) is missing", key.display());
        }
        let line = format!("deb [signed-by={}] {mirror} {suite} main\n", key.display());
        fs::write(dir.join("sources.list"), line)?;
        // apt refuses to start without a status file; an empty one means that nothing is installed.
        fs::write(dir.join("state/status"), "")?;
        Ok(Self { dir })
    }

    fn command(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        let dir = self.dir.display();
        for option in [
            format!("Dir::Etc::sourcelist={dir}/sources.list"),
            "Dir::Etc::sourceparts=/dev/null".to_owned(),
            format!("Dir::State={dir}/state"),
            format!("Dir::State::status={dir}/state/status"),
            format!("Dir::State::Lists={dir}/lists"),
            format!("Dir::Cache={dir}/cache"),
            // Our directory is not readable by apt's own user.
            "APT::Sandbox::User=root".to_owned(),
            "Acquire::Languages=none".to_owned(),
            "Acquire::Retries=1".to_owned(),
            // Without this an unreachable mirror is a warning.
            "APT::Update::Error-Mode=any".to_owned(),
            // Hooks of the machine would touch its own caches.
            "APT::Update::Post-Invoke-Success=".to_owned(),
        ] {
            command.arg("-o").arg(option);
        }
        command
    }
}

/// A directory that goes away again.
struct WorkDir(PathBuf);

impl WorkDir {
    fn new() -> Result<Self> {
        let dir = std::env::temp_dir().join(format!("beeline-setup-{}", std::process::id()));
        fs::create_dir_all(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
        Ok(Self(dir))
    }
}

impl Drop for WorkDir {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mirror_is_found_in_both_formats() {
        let deb822 =
            "Types: deb\n# URIs: http://old.example/debian\nURIs: http://mirror.example/debian\nSuites: x\n";
        assert_eq!(
            debian_mirror(&[deb822.to_owned()]).as_deref(),
            Some("http://mirror.example/debian")
        );
        let one_line = "deb http://s.example/debian-security x main\ndeb [arch=amd64] https://m.example/debian/ x main\n";
        assert_eq!(
            debian_mirror(&[one_line.to_owned()]).as_deref(),
            Some("https://m.example/debian/")
        );
        assert_eq!(
            debian_mirror(&["deb https://vendor.example/apt stable main".to_owned()]),
            None
        );
    }

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
