//! What the test machine has in memory instead of a disk: our programs, those that they start, libraries, modules.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use super::kernel::Kernel;
use crate::run;

/// Parts of the modules that a node needs: all of networking, and what that builds on.
const MODULES: [&str; 8] = [
    "kernel/net",
    "kernel/lib",
    "kernel/crypto",
    "kernel/arch/x86/crypto",
    "kernel/drivers/net/veth.ko",
    "kernel/drivers/net/bonding",
    "kernel/drivers/net/dummy.ko",
    "kernel/drivers/net/vxlan",
];

/// A tree of files that becomes the machine's root.
pub(super) struct Image {
    root: PathBuf,
    libraries: BTreeSet<PathBuf>,
}

impl Image {
    pub(super) fn new(root: PathBuf) -> Result<Self> {
        for dir in ["usr/bin", "usr/sbin", "usr/lib", "usr/lib64", "beeline", "etc"] {
            let dir = root.join(dir);
            fs::create_dir_all(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
        }
        for name in ["bin", "sbin", "lib", "lib64"] {
            symlink(format!("usr/{name}"), root.join(name)).with_context(|| format!("cannot link {name}"))?;
        }
        Ok(Self {
            root,
            libraries: BTreeSet::new(),
        })
    }

    fn inside(&self, path: &Path) -> PathBuf {
        self.root.join(path.strip_prefix("/").unwrap_or(path))
    }

    pub(super) fn write(&self, path: &str, content: &str, mode: u32) -> Result<()> {
        let file = self.inside(Path::new(path));
        fs::write(&file, content).with_context(|| format!("cannot write {}", file.display()))?;
        fs::set_permissions(&file, fs::Permissions::from_mode(mode))?;
        Ok(())
    }

    /// A program of the workspace, in `/beeline`, without what only debuggers read.
    pub(super) fn own_program(&mut self, file: &Path) -> Result<String> {
        let name = file
            .file_name()
            .and_then(|name| name.to_str())
            .context("a program without a name")?;
        let inside = format!("/beeline/{name}");
        let to = self.inside(Path::new(&inside));
        run::output(Command::new("strip").arg("-o").arg(&to).arg(file))?;
        self.libraries_of(file)?;
        Ok(inside)
    }

    /// A program of this machine, at its own path, with its libraries.
    pub(super) fn program(&mut self, name: &str) -> Result<()> {
        let path =
            run::find(name).with_context(|| format!("{name} is not installed: `cargo xtask setup`"))?;
        let real = path
            .canonicalize()
            .with_context(|| format!("cannot follow {}", path.display()))?;
        self.copy(&real)?;
        let link = self.inside(&path);
        if path != real && fs::symlink_metadata(&link).is_err() {
            // of several in a row the last is enough
            symlink(&real, &link).with_context(|| format!("cannot link {}", link.display()))?;
        }
        self.libraries_of(&real)
    }

    /// All files of a directory of libraries that programs load by name.
    pub(super) fn plugins(&mut self, dir: &Path) -> Result<()> {
        let entries = fs::read_dir(dir).with_context(|| format!("cannot list {}", dir.display()))?;
        for entry in entries {
            self.copy(&entry?.path())?;
        }
        Ok(())
    }

    fn copy(&self, path: &Path) -> Result<()> {
        let to = self.inside(path);
        if let Some(dir) = to.parent() {
            fs::create_dir_all(dir).with_context(|| format!("cannot make {}", dir.display()))?;
        }
        fs::copy(path, &to).with_context(|| format!("cannot copy {}", path.display()))?;
        Ok(())
    }

    fn libraries_of(&mut self, program: &Path) -> Result<()> {
        // fails for a static program
        let Ok(text) = run::output(Command::new("ldd").arg(program)) else {
            return Ok(());
        };
        for library in libraries(&text) {
            if self.libraries.insert(library.clone()) {
                self.copy(&library)?;
            }
        }
        Ok(())
    }

    pub(super) fn modules(&self, kernel: &Kernel) -> Result<()> {
        let to = self.root.join("usr/lib/modules").join(&kernel.release);
        for part in MODULES.into_iter().chain(["modules.builtin", "modules.order"]) {
            // packed ones have another ending; other releases have other parts
            let names = [part.to_owned(), format!("{part}.xz")].into_iter();
            for name in names.filter(|name| kernel.modules.join(name).exists()) {
                let to = to.join(&name);
                let parent = to.parent().context("a part without a directory")?;
                fs::create_dir_all(parent).with_context(|| format!("cannot make {}", parent.display()))?;
                run::output(
                    Command::new("cp")
                        .arg("-r")
                        .arg(kernel.modules.join(&name))
                        .arg(&to),
                )?;
            }
        }
        let mut depmod = Command::new("busybox");
        run::output(
            depmod
                .arg("depmod")
                .arg("-b")
                .arg(&self.root)
                .arg(&kernel.release),
        )
        .map(drop)
    }

    /// Packs it as the kernel unpacks it.
    pub(super) fn pack(&self, to: &Path) -> Result<()> {
        let script = "busybox find . | busybox cpio -o -H newc > \"$0\"";
        let mut sh = Command::new("sh");
        run::output(sh.current_dir(&self.root).args(["-c", script]).arg(to)).map(drop)
    }
}

/// The paths in what ldd prints.
fn libraries(ldd: &str) -> Vec<PathBuf> {
    let paths = ldd.split_whitespace().filter(|word| word.starts_with('/'));
    paths.map(PathBuf::from).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn libraries_are_read_from_what_ldd_prints() {
        let text = "\tlinux-vdso.so.1 (0x00007fff)\n\tlibm.so.6 => /lib/x86_64-linux-gnu/libm.so.6 (0x00007f1e)\n\
                    \t/lib64/ld-linux-x86-64.so.2 (0x00007f1f)\n";
        let found = libraries(text);
        assert_eq!(
            found,
            ["/lib/x86_64-linux-gnu/libm.so.6", "/lib64/ld-linux-x86-64.so.2"].map(PathBuf::from)
        );
    }
}
