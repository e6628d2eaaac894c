//! Network namespaces of a test's own, with Python interpreters in them.

use std::fs::File;
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};

use nix::sched::{CloneFlags, setns};

use super::python::Python;

static NEXT: AtomicU32 = AtomicU32::new(0);

/// Runs a command that must succeed.
pub(crate) fn run(command: &str) {
    let output = Command::new("sh").args(["-c", command]).output().unwrap();
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command}: {text}");
}

/// A network namespace; removed on drop.
pub(crate) struct Netns {
    pub(crate) name: String,
}

impl Netns {
    pub(crate) fn new(what: &str) -> Self {
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        // as `cargo xtask sweep` knows it
        let name = format!("bl{}-{number}-{what}", std::process::id());
        run(&format!("ip netns add {name} && ip -n {name} link set lo up"));
        Self { name }
    }

    /// Runs `ip` with these arguments in it.
    pub(crate) fn ip(&self, arguments: &str) {
        run(&format!("ip -n {} {arguments}", self.name));
    }

    pub(crate) fn sysctl(&self, setting: &str) {
        run(&format!("ip netns exec {} sysctl -qw {setting}", self.name));
    }

    /// Puts the calling thread into it.
    pub(crate) fn enter(&self) {
        let file = File::open(format!("/run/netns/{}", self.name)).unwrap();
        setns(file, CloneFlags::CLONE_NEWNET).unwrap();
    }

    /// A veth pair between this namespace and another, up; the addresses (with lengths) are on the ends, and usable at once.
    pub(crate) fn join(&self, device: &str, other: &Self, peer: &str, addresses: &[(&str, &str)]) {
        self.ip(&format!(
            "link add {device} type veth peer name {peer} netns {}",
            other.name
        ));
        for (here, there) in addresses {
            let flag = if here.contains(':') { "nodad" } else { "" };
            self.ip(&format!("addr add {here} dev {device} {flag}"));
            other.ip(&format!("addr add {there} dev {peer} {flag}"));
        }
        self.ip(&format!("link set {device} up"));
        other.ip(&format!("link set {peer} up"));
    }

    /// Index of a device.
    pub(crate) fn index(&self, device: &str) -> u32 {
        let output = Command::new("ip")
            .args(["-n", &self.name, "-o", "link", "show", "dev", device])
            .output()
            .unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        text.split(':').next().unwrap().trim().parse().unwrap()
    }

    pub(crate) fn python(&self) -> Python {
        Python::in_namespace(&self.name)
    }
}

impl Drop for Netns {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["netns", "del", &self.name]).status();
    }
}
