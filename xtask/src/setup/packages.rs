//! Programs that the build, the tests and the demo start, and the Debian packages that hold them.

use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::run;

/// (program, Debian package). kubectl is apart: Debian's own is too old in some releases.
const PROGRAMS: [(&str, &str); 16] = [
    // jemalloc is built by its own makefile
    ("make", "make"),
    ("ip", "iproute2"),
    ("curl", "curl"),
    ("bpftool", "bpftool"),
    // the tests write rules as kube-proxy does
    ("iptables-nft-restore", "iptables"),
    ("iptables-legacy-restore", "iptables"),
    ("nft", "nftables"),
    // a real runtime calls the CNI plugin for a real container
    ("containerd", "containerd"),
    ("runc", "runc"),
    ("busybox", "busybox-static"),
    ("ping", "iputils-ping"),
    ("python3", "python3"),
    ("sysctl", "procps"),
    // where several control planes keep their objects
    ("etcd", "etcd-server"),
    ("etcdctl", "etcd-client"),
    // asks the DNS
    ("dig", "bind9-dnsutils"),
];
/// Older kubectl cannot read this API's OpenAPI v3 document, which `kubectl apply` checks.
const OLDEST_KUBECTL: (u32, u32) = (1, 27);

/// What only `cargo xtask vm` needs.
const FOR_VM: [(&str, &str); 4] = [
    ("qemu-system-x86_64", "qemu-system-x86"),
    ("strip", "binutils"),
    // they make what kube-proxy's ipvs mode makes
    ("ipset", "ipset"),
    ("ipvsadm", "ipvsadm"),
];

fn absent(programs: &'static [(&str, &str)]) -> impl Iterator<Item = &'static (&'static str, &'static str)> {
    programs
        .iter()
        .filter(|(program, _)| run::find(program).is_none())
}

pub(super) fn missing() -> Result<Option<String>> {
    let mut names: Vec<&str> = absent(&PROGRAMS).map(|(program, _)| *program).collect();
    if run::find("kubectl").is_none() {
        names.push("kubectl");
    }
    Ok((!names.is_empty()).then(|| format!("missing: {}", names.join(", "))))
}

pub(super) fn install() -> Result<()> {
    let wanted = absent(&PROGRAMS).map(|(_, package)| *package).collect();
    install_packages(wanted, run::find("kubectl").is_none())
}

pub(super) fn install_for_vm() -> Result<()> {
    let wanted: Vec<&str> = absent(&FOR_VM).map(|(_, package)| *package).collect();
    if wanted.is_empty() {
        return Ok(());
    }
    install_packages(wanted, false)
}

fn install_packages(mut wanted: Vec<&str>, kubectl: bool) -> Result<()> {
    if run::find("apt-get").is_none() {
        let kubectl = if kubectl { ", kubectl" } else { "" };
        bail!(
            "this is no Debian or Ubuntu (no apt-get): install these with your package manager: {}{kubectl}",
            wanted.join(", ")
        );
    }
    if !nix::unistd::geteuid().is_root() {
        let kubectl = if kubectl { " kubernetes-client" } else { "" };
        bail!(
            "installing packages needs root: run `cargo xtask setup` as root, or `apt-get install {}{kubectl}`",
            wanted.join(" ")
        );
    }
    let apt = || {
        let mut command = Command::new("apt-get");
        command.env("DEBIAN_FRONTEND", "noninteractive");
        command
    };
    // A package that the known lists do not offer may be in newer ones; a working list is not refreshed for nothing.
    if let Err(error) = run::checked(apt().args(["-q", "update"])) {
        eprintln!("setup: {error:#}; going on with the package lists that are here");
    }
    if kubectl {
        wanted.push(kubectl_package()?);
    }
    run::checked(
        apt()
            .args(["install", "-y", "-q", "--no-install-recommends"])
            .args(&wanted),
    )
    .context("cannot install Debian packages; offline?")
}

/// The package that holds a kubectl which is new enough, if the machine's package sources have one.
fn kubectl_package() -> Result<&'static str> {
    for package in ["kubectl", "kubernetes-client"] {
        let policy = run::output(Command::new("apt-cache").args(["policy", package])).unwrap_or_default();
        let candidate = policy
            .lines()
            .find_map(|line| line.trim().strip_prefix("Candidate: "))
            .unwrap_or("(none)");
        if kubernetes_version(candidate).is_some_and(|version| version >= OLDEST_KUBECTL) {
            return Ok(package);
        }
    }
    let (major, minor) = OLDEST_KUBECTL;
    bail!(
        "kubectl is not installed, and no package source of this machine has one of version {major}.{minor} or newer: \
         install it (https://kubernetes.io/docs/tasks/tools/) and run `cargo xtask setup` again"
    )
}

/// (major, minor) of a Debian version such as `1.32.3+ds-2` or `1:1.32.3-1.1`.
fn kubernetes_version(debian: &str) -> Option<(u32, u32)> {
    let upstream = debian.rsplit_once(':').map_or(debian, |(_, rest)| rest);
    // Debian 12 says `1.20.5+really1.20.2`; either number is too old.
    let mut numbers = upstream.split(['.', '+', '-']);
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kubernetes_versions_are_read_from_debian_ones() {
        assert_eq!(
            kubernetes_version("1.20.5+really1.20.2-1.1+deb12u1"),
            Some((1, 20))
        );
        assert_eq!(kubernetes_version("1:1.32.4-1.1"), Some((1, 32)));
        assert_eq!(kubernetes_version("(none)"), None);
    }
}
