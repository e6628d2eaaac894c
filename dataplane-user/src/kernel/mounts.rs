//! Where cgroup v2 and bpffs are mounted, and what kernel this is.

use std::fs;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};

use nix::mount::{MsFlags, mount};
use nix::sys::statfs::{FsType, statfs};

use super::KernelError;

/// Where a bpffs goes when none is mounted.
const BPFFS: &str = "/sys/fs/bpf";

// include/uapi/linux/magic.h
const BPF_FS_MAGIC: FsType = FsType(0xcafe_4a11);
const CGROUP2_SUPER_MAGIC: FsType = FsType(0x6367_7270);

/// A line of mountinfo (proc(5)): where it is mounted, and the type.
fn mounts_of(mountinfo: &str, fs_type: &str) -> Option<PathBuf> {
    mountinfo.lines().find_map(|line| {
        // the fields behind the separator have no fixed position before it
        let (left, right) = line.split_once(" - ")?;
        let point = left.split(' ').nth(4)?;
        (right.split(' ').next() == Some(fs_type)).then(|| PathBuf::from(unescape(point)))
    })
}

/// Mount points have space, tab, newline and backslash as three octal digits.
fn unescape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some((before, after)) = rest.split_once('\\') {
        out.push_str(before);
        let digits = after.get(..3);
        match digits.and_then(|d| u8::from_str_radix(d, 8).ok()) {
            Some(byte) => {
                out.push(char::from(byte));
                rest = after.get(3..).unwrap_or_default();
            }
            None => {
                out.push('\\');
                rest = after;
            }
        }
    }
    out.push_str(rest);
    out
}

fn mountinfo() -> Result<String, KernelError> {
    let path = "/proc/self/mountinfo";
    fs::read_to_string(path).map_err(|source| KernelError::Io {
        operation: "read",
        path: path.into(),
        source,
    })
}

/// Where cgroup v2 is mounted: `/sys/fs/cgroup`, or `/sys/fs/cgroup/unified` beside v1.
///
/// # Errors
///
/// If it is not mounted, or mountinfo cannot be read.
pub fn discover_cgroup2() -> Result<PathBuf, KernelError> {
    mounts_of(&mountinfo()?, "cgroup2").ok_or(KernelError::NoMount("cgroup v2 hierarchy"))
}

/// Where a bpffs is mounted; mounts one at `/sys/fs/bpf` if there is none.
///
/// # Errors
///
/// If mountinfo cannot be read or mounting fails.
pub fn discover_or_mount_bpffs() -> Result<PathBuf, KernelError> {
    if let Some(path) = mounts_of(&mountinfo()?, "bpf") {
        return Ok(path);
    }
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    mount(Some("bpf"), BPFFS, Some("bpf"), flags, Some("mode=0700")).map_err(|errno| KernelError::Io {
        operation: "mount a bpffs at",
        path: BPFFS.into(),
        source: errno.into(),
    })?;
    Ok(BPFFS.into())
}

fn fs_type(path: &Path) -> Result<FsType, KernelError> {
    let io = |errno: nix::Error| KernelError::Io {
        operation: "statfs",
        path: path.into(),
        source: errno.into(),
    };
    Ok(statfs(path).map_err(io)?.filesystem_type())
}

/// # Errors
///
/// If the path is not on a bpffs.
pub(super) fn check_bpffs(path: &Path) -> Result<(), KernelError> {
    if fs_type(path)? == BPF_FS_MAGIC {
        Ok(())
    } else {
        Err(KernelError::NotBpffs(path.into()))
    }
}

/// # Errors
///
/// If the path is not in a cgroup v2 hierarchy.
pub(super) fn check_cgroup2(path: &Path) -> Result<(), KernelError> {
    if fs_type(path)? == CGROUP2_SUPER_MAGIC {
        Ok(())
    } else {
        Err(KernelError::NotCgroup2(path.into()))
    }
}

/// `SO_NETNS_COOKIE` (5.14) of the network namespace that this thread is in.
pub(crate) fn netns_cookie() -> Result<u64, KernelError> {
    const SO_NETNS_COOKIE: libc::c_int = 71;
    let io = |source| KernelError::Io {
        operation: "ask a socket for its network namespace, as in",
        path: "/proc/self/ns/net".into(),
        source,
    };
    let socket = std::net::UdpSocket::bind("0.0.0.0:0").map_err(io)?;
    let mut cookie = 0u64;
    let mut length: libc::socklen_t = 8; // of the cookie
    // SAFETY: the descriptor is open, and the two pointers are of the size that the length says.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            SO_NETNS_COOKIE,
            (&raw mut cookie).cast(),
            &raw mut length,
        )
    };
    match result {
        0 => Ok(cookie),
        // without it localhost node ports are not offered: no namespace has cookie 0
        _ if std::io::Error::last_os_error().raw_os_error() == Some(libc::ENOPROTOOPT) => Ok(0),
        _ => Err(io(std::io::Error::last_os_error())),
    }
}

/// `uname -r`.
pub(super) fn kernel_release() -> Result<String, KernelError> {
    let path = "/proc/sys/kernel/osrelease";
    let text = fs::read_to_string(path).map_err(|source| KernelError::Io {
        operation: "read",
        path: path.into(),
        source,
    })?;
    Ok(text.trim().into())
}

/// Whether a release is of this version or newer. Of what cannot be parsed nothing is assumed.
pub(super) fn release_at_least(release: &str, wanted: (u32, u32)) -> bool {
    let mut parts = release
        .split(|c: char| !c.is_ascii_digit())
        .map(|part| part.parse::<u32>().ok());
    matches!((parts.next(), parts.next()), (Some(Some(major)), Some(Some(minor))) if (major, minor) >= wanted)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mount_points_are_found_by_type() {
        let text = "22 1 0:20 / /sys rw - sysfs sysfs rw\n\
                    30 22 0:26 / /sys/fs/cgroup rw shared:4 - tmpfs tmpfs rw\n\
                    31 30 0:27 / /sys/fs/cgroup/my\\040unified rw shared:5 master:1 - cgroup2 cgroup2 rw,nsdelegate\n";
        assert_eq!(
            mounts_of(text, "cgroup2"),
            Some("/sys/fs/cgroup/my unified".into())
        );
        assert_eq!(mounts_of(text, "bpf"), None);
        assert_eq!(mounts_of("garbage\n- \n", "bpf"), None);
    }

    #[test]
    fn releases_are_compared_by_number() {
        assert!(release_at_least("5.18.0", (5, 18)));
        assert!(release_at_least("6.1-rc3", (5, 18)));
        assert!(!release_at_least("5.9.16-arch1", (5, 18)));
        assert!(!release_at_least("weird", (5, 18)));
    }
}
