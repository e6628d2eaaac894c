//! The kernel's connection tracking, set as kube-proxy sets it (spec kube-proxy 2.7). Beeline tracks its connections
//! itself; the kernel's tracking is what other programs of the node use, and it should not change under them when Beeline
//! takes the place of kube-proxy.

use std::fs;
use std::io;
use std::path::Path;

use nix::unistd::{SysconfVar, sysconf};

use crate::proxyconfig::{Conntrack, GoDuration};

/// Directory of the sysctls, below the root.
const NETFILTER: &str = "proc/sys/net/netfilter";
/// Size of the hash table, below the root. It can be written only in the first network namespace.
const HASH_SIZE: &str = "sys/module/nf_conntrack/parameters/hashsize";
/// Most connections that kube-proxy asks for, whatever the settings say.
const LARGEST_MAX: i64 = 1_048_576;

/// A number in a file that is not as wished.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Change {
    /// Name of the sysctl or parameter.
    pub(super) name: &'static str,
    /// What was there.
    pub(super) before: i64,
    /// What is there now.
    pub(super) now: i64,
}

/// What was done.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(super) struct Report {
    pub(super) changes: Vec<Change>,
    /// What could not be done, and why.
    pub(super) warnings: Vec<String>,
    /// The kernel does not track connections (the module is not loaded): nothing was to be done.
    pub(super) absent: bool,
}

/// Online processors, as kube-proxy counts them: a limit on the process's own does not count.
pub(super) fn processors() -> i64 {
    sysconf(SysconfVar::_NPROCESSORS_ONLN).ok().flatten().unwrap_or(1)
}

/// The limit of connections that is asked for; `None`: leave it.
fn wanted_max(config: &Conntrack, processors: i64) -> Option<i64> {
    let per_core = config.max_per_core.map(i64::from).filter(|n| *n > 0)?;
    let scaled = per_core.saturating_mul(processors);
    let floor = config.min.map_or(0, i64::from);
    Some(scaled.max(floor).min(LARGEST_MAX)).filter(|max| *max > 0)
}

/// Sysctls with their values. Zero or less means: leave it.
fn wanted(config: &Conntrack, processors: i64) -> Vec<(&'static str, i64)> {
    let seconds = |duration: Option<GoDuration>| duration.map(GoDuration::whole_seconds);
    let all = [
        ("nf_conntrack_max", wanted_max(config, processors)),
        (
            "nf_conntrack_tcp_timeout_established",
            seconds(config.tcp_established_timeout),
        ),
        (
            "nf_conntrack_tcp_timeout_close_wait",
            seconds(config.tcp_close_wait_timeout),
        ),
        // never switched off: someone else may need it
        ("nf_conntrack_tcp_be_liberal", config.tcp_be_liberal.then_some(1)),
        ("nf_conntrack_udp_timeout", seconds(Some(config.udp_timeout))),
        (
            "nf_conntrack_udp_timeout_stream",
            seconds(Some(config.udp_stream_timeout)),
        ),
    ];
    all.into_iter()
        .filter_map(|(name, value)| Some((name, value.filter(|value| *value > 0)?)))
        .collect()
}

fn read(path: &Path) -> io::Result<i64> {
    let text = fs::read_to_string(path)?;
    text.trim().parse().map_err(|_| {
        io::Error::new(
            io::ErrorKind::InvalidData,
            format!("{:?} is no number", text.trim()),
        )
    })
}

/// Makes the file hold the number, or a larger one if that will do. Writes only what differs.
fn set(path: &Path, value: i64, larger_will_do: bool) -> io::Result<Option<i64>> {
    let before = read(path)?;
    if before == value || larger_will_do && before > value {
        return Ok(None);
    }
    fs::write(path, value.to_string())?;
    Ok(Some(before))
}

/// Sets what is configured, in the network namespace of the calling thread. A setting that this kernel lacks or does not
/// let be written does not keep the others from being set. `root` is `/` but for tests.
pub(super) fn apply(root: &Path, config: &Conntrack, processors: i64) -> Report {
    let mut report = Report::default();
    let wanted = wanted(config, processors);
    let netfilter = root.join(NETFILTER);
    if !netfilter.join("nf_conntrack_max").exists() {
        report.absent = true;
        return report;
    }
    let mut one = |name: &'static str, path: &Path, value: i64, larger_will_do: bool| match set(
        path,
        value,
        larger_will_do,
    ) {
        Ok(None) => {}
        Ok(Some(before)) => report.changes.push(Change {
            name,
            before,
            now: value,
        }),
        Err(error) => report
            .warnings
            .push(format!("connection tracking: set {name} to {value}: {error}")),
    };
    for &(name, value) in &wanted {
        one(name, &netfilter.join(name), value, false);
    }
    if let Some(max) = wanted_max(config, processors) {
        // four connections in a bucket are kube-proxy's limit
        one("hashsize", &root.join(HASH_SIZE), max / 4, true);
    }
    report
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proxyconfig::KubeProxyConfiguration;

    fn defaults() -> Conntrack {
        KubeProxyConfiguration::defaults().conntrack
    }

    #[test]
    fn the_limit_grows_with_the_processors_between_its_bounds() {
        for (per_core, min, processors, expected) in [
            (Some(32_768), Some(131_072), 2, Some(131_072)),
            (Some(32_768), Some(131_072), 8, Some(262_144)),
            (Some(32_768), Some(131_072), 64, Some(1_048_576)),
            // the cap wins even over the minimum
            (Some(1), Some(2_000_000), 1, Some(1_048_576)),
            (Some(10), None, 3, Some(30)),
            (Some(0), Some(131_072), 8, None),
            (None, Some(131_072), 8, None),
        ] {
            let config = Conntrack {
                max_per_core: per_core,
                min,
                ..Conntrack::default()
            };
            let found = wanted_max(&config, processors);
            assert_eq!(found, expected, "{per_core:?} {min:?} {processors}");
        }
    }

    /// A root with these files; what they hold, afterwards, is to be read from it.
    fn root(files: &[(&str, &str)]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        for (name, text) in files {
            let path = dir.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        dir
    }

    const MAX: &str = "proc/sys/net/netfilter/nf_conntrack_max";
    const ESTABLISHED: &str = "proc/sys/net/netfilter/nf_conntrack_tcp_timeout_established";
    const CLOSE_WAIT: &str = "proc/sys/net/netfilter/nf_conntrack_tcp_timeout_close_wait";
    const LIBERAL: &str = "proc/sys/net/netfilter/nf_conntrack_tcp_be_liberal";
    const UDP: &str = "proc/sys/net/netfilter/nf_conntrack_udp_timeout";
    const STREAM: &str = "proc/sys/net/netfilter/nf_conntrack_udp_timeout_stream";

    fn kernel() -> tempfile::TempDir {
        root(&[
            (MAX, "65536\n"),
            (ESTABLISHED, "432000\n"),
            (CLOSE_WAIT, "60\n"),
            (LIBERAL, "0\n"),
            (UDP, "30\n"),
            (STREAM, "120\n"),
            (HASH_SIZE, "16384\n"),
        ])
    }

    fn content(root: &Path, files: &[&str]) -> Vec<i64> {
        files.iter().map(|file| read(&root.join(file)).unwrap()).collect()
    }

    #[test]
    fn defaults_are_kube_proxys_and_what_is_right_is_left() {
        let dir = kernel();
        let report = apply(dir.path(), &defaults(), 4);
        assert_eq!(report.warnings, [""; 0]);
        assert_eq!(
            content(
                dir.path(),
                &[MAX, ESTABLISHED, CLOSE_WAIT, LIBERAL, UDP, STREAM, HASH_SIZE]
            ),
            [131_072, 86_400, 3600, 0, 30, 120, 32_768]
        );
        let changed: Vec<_> = report
            .changes
            .iter()
            .map(|change| (change.name, change.before, change.now))
            .collect();
        assert_eq!(
            changed,
            [
                ("nf_conntrack_max", 65_536, 131_072),
                ("nf_conntrack_tcp_timeout_established", 432_000, 86_400),
                ("nf_conntrack_tcp_timeout_close_wait", 60, 3600),
                ("hashsize", 16_384, 32_768),
            ]
        );
        assert_eq!(apply(dir.path(), &defaults(), 4), Report::default());
    }

    #[test]
    fn zero_leaves_a_setting_and_every_setting_can_be_made() {
        let dir = kernel();
        let nothing = || Conntrack {
            max_per_core: Some(0),
            min: Some(131_072),
            tcp_established_timeout: Some(GoDuration::default()),
            tcp_close_wait_timeout: Some(GoDuration::default()),
            ..Conntrack::default()
        };
        assert_eq!(apply(dir.path(), &nothing(), 4), Report::default());
        let all = Conntrack {
            max_per_core: Some(10_000),
            min: Some(0),
            tcp_be_liberal: true,
            udp_timeout: GoDuration::from_secs(7),
            udp_stream_timeout: GoDuration::from_secs(8),
            ..nothing()
        };
        assert_eq!(apply(dir.path(), &all, 1).warnings, [""; 0]);
        assert_eq!(
            content(dir.path(), &[MAX, ESTABLISHED, LIBERAL, UDP, STREAM, HASH_SIZE]),
            // a table that is larger than it needs to be stays
            [10_000, 432_000, 1, 7, 8, 16_384]
        );
        // it is never switched off again
        assert_eq!(apply(dir.path(), &nothing(), 4), Report::default());
        assert_eq!(content(dir.path(), &[LIBERAL]), [1]);
    }

    #[test]
    fn what_is_missing_is_named_and_the_rest_is_set() {
        let dir = root(&[(MAX, "65536\n"), (CLOSE_WAIT, "soon\n"), (HASH_SIZE, "99999\n")]);
        let report = apply(dir.path(), &defaults(), 4);
        assert_eq!(content(dir.path(), &[MAX]), [131_072]);
        let all = report.warnings.join("\n");
        assert_eq!(report.warnings.len(), 2, "{all}");
        assert!(
            all.contains("set nf_conntrack_tcp_timeout_established to 86400: "),
            "{all}"
        );
        assert!(
            all.contains("set nf_conntrack_tcp_timeout_close_wait to 3600: \"soon\" is no number"),
            "{all}"
        );
    }

    #[test]
    fn a_kernel_that_tracks_no_connections_is_left_alone() {
        let dir = root(&[(HASH_SIZE, "1\n")]);
        let report = apply(dir.path(), &defaults(), 4);
        assert!(report.absent && report.warnings.is_empty() && report.changes.is_empty());
        assert_eq!(content(dir.path(), &[HASH_SIZE]), [1]);
    }

    /// The kernel's own, in a network namespace that ends with the thread. Needs root.
    #[test]
    fn a_network_namespace_has_timeouts_of_its_own() {
        let outside = content(Path::new("/"), &[ESTABLISHED, CLOSE_WAIT, MAX]);
        let thread = std::thread::spawn(|| {
            assert!(nix::unistd::geteuid().is_root(), "needs root");
            nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
            let config = Conntrack {
                max_per_core: Some(1),
                min: Some(1),
                tcp_established_timeout: Some(GoDuration::from_secs(12_345)),
                tcp_close_wait_timeout: Some(GoDuration::from_secs(54)),
                tcp_be_liberal: true,
                ..Conntrack::default()
            };
            let report = apply(Path::new("/"), &config, 1);
            (
                report,
                content(Path::new("/"), &[ESTABLISHED, CLOSE_WAIT, LIBERAL]),
            )
        });
        let (report, inside) = thread.join().unwrap();
        assert_eq!(inside, [12_345, 54, 1]);
        // the limit is the machine's, and not to be changed from here
        let [warning] = &report.warnings[..] else {
            panic!("{report:?}")
        };
        assert!(warning.contains("set nf_conntrack_max to 1: "), "{warning}");
        assert_eq!(content(Path::new("/"), &[ESTABLISHED, CLOSE_WAIT, MAX]), outside);
    }
}
