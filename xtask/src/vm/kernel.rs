//! The kernel of a Debian release, as it is: image and modules.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use crate::apt::{Suite, WorkDir};
use crate::build;

/// Always the newest kernel of the release; small, as it knows only what virtual machines have.
const PACKAGE: &str = "linux-image-cloud-amd64";

pub(super) struct Kernel {
    /// To be booted.
    pub(super) image: PathBuf,
    /// What `uname -r` says.
    pub(super) release: String,
    /// `/lib/modules/<release>`.
    pub(super) modules: PathBuf,
}

/// The kernel of a Debian release, by its name; downloaded once.
pub(super) fn of_suite(suite: &str) -> Result<Kernel> {
    if std::env::consts::ARCH != "x86_64" {
        bail!(
            "`cargo xtask vm` runs on x86_64 only: it needs a kernel and an emulator for the machine's own programs"
        );
    }
    let tree = build::target_dir().join("vm").join(suite);
    if let Some(kernel) = find(&tree) {
        return Ok(kernel);
    }
    download(suite, &tree).with_context(|| format!("cannot get the kernel of Debian {suite}"))?;
    find(&tree).with_context(|| format!("no kernel and modules in {}", tree.display()))
}

fn download(suite: &str, tree: &Path) -> Result<()> {
    let work = WorkDir::new()?;
    let suite = Suite::open(&work, suite)?;
    let depends = suite.cache(&["depends", PACKAGE])?;
    let package = image_package(&depends).with_context(|| format!("{PACKAGE} names no image"))?;
    fs::create_dir_all(tree).with_context(|| format!("cannot make {}", tree.display()))?;
    suite.unpack(package, tree)
}

/// From what `apt-cache depends` says of the package that stands for the newest.
fn image_package(depends: &str) -> Option<&str> {
    depends
        .lines()
        .filter_map(|line| line.trim().strip_prefix("Depends: "))
        .find(|name| name.starts_with("linux-image-"))
}

fn find(tree: &Path) -> Option<Kernel> {
    // with /usr merged, newer packages have their modules there
    let parents = ["lib/modules", "usr/lib/modules"].map(|path| tree.join(path));
    parents.iter().find_map(|parent| {
        let release = fs::read_dir(parent).ok()?.next()?.ok()?.file_name();
        let release = release.to_str()?.to_owned();
        let image = tree.join("boot").join(format!("vmlinuz-{release}"));
        image.is_file().then(|| Kernel {
            image,
            modules: parent.join(&release),
            release,
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_image_is_named_by_what_stands_for_the_newest() {
        let text = "linux-image-cloud-amd64\n  Depends: linux-image-6.1.0-56-cloud-amd64\n  Breaks: x\n";
        assert_eq!(image_package(text), Some("linux-image-6.1.0-56-cloud-amd64"));
        assert_eq!(image_package("linux-image-cloud-amd64\n"), None);
    }
}
