//! Packages of other Debian releases, downloaded without touching the machine's own package lists.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::run;

/// The text of all of the machine's apt sources.
fn sources() -> Result<Vec<String>> {
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

/// A Debian suite: apt with a sources list, lists and cache of its own; proxies and credentials are still the machine's.
pub(crate) struct Suite {
    dir: PathBuf,
}

impl Suite {
    /// Reads the package lists of a suite into `work`. Works without root.
    pub(crate) fn open(work: &WorkDir, name: &str) -> Result<Self> {
        for program in ["apt-get", "apt-cache", "dpkg-deb"] {
            if run::find(program).is_none() {
                bail!("{program} is not here, so this is no Debian or Ubuntu");
            }
        }
        let mirror = debian_mirror(&sources()?).context(
            "the machine's apt sources (/etc/apt/sources.list, sources.list.d) name no Debian mirror",
        )?;
        let dir = work.0.join(name);
        for sub in ["lists/partial", "cache/archives/partial", "state"] {
            fs::create_dir_all(dir.join(sub))?;
        }
        let key = Path::new("/usr/share/keyrings/debian-archive-keyring.gpg");
        if !key.is_file() {
            bail!("{} (package debian-archive-keyring) is missing", key.display());
        }
        let line = format!("deb [signed-by={}] {mirror} {name} main\n", key.display());
        fs::write(dir.join("sources.list"), line)?;
        // apt refuses to start without a status file; an empty one means that nothing is installed.
        fs::write(dir.join("state/status"), "")?;
        let suite = Self { dir };
        run::checked(suite.command("apt-get").args(["-q", "update"]))?;
        Ok(suite)
    }

    /// What apt-cache says.
    pub(crate) fn cache(&self, args: &[&str]) -> Result<String> {
        run::output(self.command("apt-cache").args(args))
    }

    /// Downloads a package (`name` or `name=version`) and unpacks it into `tree`; nothing is installed.
    pub(crate) fn unpack(&self, package: &str, tree: &Path) -> Result<()> {
        let archives = self.dir.join("archives");
        fs::create_dir_all(&archives)?;
        let mut apt = self.command("apt-get");
        run::checked(apt.current_dir(&archives).args(["-q", "download", package]))?;
        let file = fs::read_dir(&archives)?
            .filter_map(|entry| entry.ok().map(|entry| entry.path()))
            .find(|path| path.extension().is_some_and(|extension| extension == "deb"))
            .context("apt downloaded no package")?;
        run::checked(Command::new("dpkg-deb").arg("-x").arg(&file).arg(tree))?;
        fs::remove_file(&file).with_context(|| format!("cannot remove {}", file.display()))
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
pub(crate) struct WorkDir(pub(crate) PathBuf);

impl WorkDir {
    pub(crate) fn new() -> Result<Self> {
        let dir = std::env::temp_dir().join(format!("beeline-apt-{}", std::process::id()));
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
}
