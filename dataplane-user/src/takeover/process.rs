//! Who writes kube-proxy's rules.

use std::fmt;
use std::fs;
use std::path::Path;

/// A process that writes them, or may do so.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Writer {
    pub(super) pid: u32,
    pub(super) name: String,
}

impl fmt::Display for Writer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} (pid {})", self.name, self.pid)
    }
}

/// Programs that may have kube-proxy inside.
const AROUND: [&str; 6] = ["k3s", "k3s-server", "k3s-agent", "k0s", "hyperkube", "microk8s"];

/// A kube-proxy that works in our network namespace and that we can see.
pub(super) fn kube_proxy() -> Option<Writer> {
    find(Path::new("/proc"), &["kube-proxy"])
}

/// A program that may run kube-proxy as a part of itself.
pub(super) fn suspect() -> Option<Writer> {
    find(Path::new("/proc"), &AROUND)
}

fn find(proc: &Path, names: &[&str]) -> Option<Writer> {
    let ours = fs::read_link(proc.join("thread-self/ns/net")).ok()?;
    let pids = fs::read_dir(proc).ok()?.filter_map(|entry| {
        let name = entry.ok()?.file_name();
        name.to_str()?.parse::<u32>().ok()
    });
    pids.filter_map(|pid| {
        let dir = proc.join(pid.to_string());
        let comm = fs::read_to_string(dir.join("comm")).ok()?;
        let name = comm.trim_end();
        let same = || fs::read_link(dir.join("ns/net")).is_ok_and(|netns| netns == ours);
        (names.contains(&name) && same()).then(|| Writer {
            pid,
            name: name.into(),
        })
    })
    .min_by_key(|writer| writer.pid)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn only_a_process_of_our_network_namespace_counts() {
        let dir = tempfile::tempdir().unwrap();
        let put = |pid: &str, comm: &str, netns: &str| {
            let process = dir.path().join(pid);
            fs::create_dir_all(process.join("ns")).unwrap();
            fs::write(process.join("comm"), format!("{comm}\n")).unwrap();
            symlink(netns, process.join("ns/net")).unwrap();
        };
        put("thread-self", "beeline", "net:[1]");
        put("20", "kube-proxy", "net:[2]");
        put("30", "kube-proxy-x", "net:[1]");
        assert_eq!(find(dir.path(), &["kube-proxy"]), None);
        put("40", "kube-proxy", "net:[1]");
        put("9", "kube-proxy", "net:[1]");
        let found = find(dir.path(), &["kube-proxy"]).unwrap();
        assert_eq!(found.to_string(), "kube-proxy (pid 9)");
    }
}
