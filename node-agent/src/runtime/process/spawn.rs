//! Starting a process inside a pod.

use std::ffi::CString;
use std::fs::{self, File};
use std::io::{self, Write as _};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::process::ExitStatusExt as _;
use std::path::Path;
use std::process::{ExitStatus, Stdio};

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, setns, unshare};
use nix::unistd::{Gid, Uid, chdir, setgid, setgroups, sethostname, setsid, setuid};
use serde::{Deserialize, Serialize};
use tokio::process::Command;

use super::super::{ContainerSpec, Mount};
use super::image::Program;
use super::mounts;

/// Files of a pod that its processes see in `/etc`.
pub(super) const RESOLV_CONF: &str = "resolv.conf";
/// See [`RESOLV_CONF`].
pub(super) const HOSTS: &str = "hosts";

const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// How a container's processes begin.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub(super) struct Launch {
    /// User and group.
    pub(super) user: Option<(u32, u32)>,
    /// In the container's own root.
    pub(super) directory: CString,
}

impl Launch {
    pub(super) fn new(spec: &ContainerSpec) -> io::Result<Self> {
        let directory = spec.working_dir.as_deref().unwrap_or(Path::new("/"));
        Ok(Self {
            user: spec.user,
            directory: CString::new(directory.as_os_str().as_bytes()).map_err(io::Error::other)?,
        })
    }
}

/// Where a process is to be.
#[derive(Debug)]
pub(super) struct Place<'a> {
    /// `None`: the node's.
    pub(super) netns: Option<&'a Path>,
    pub(super) cgroup: &'a Path,
    /// Directory with the files for `/etc`.
    pub(super) dir: &'a Path,
    pub(super) hostname: &'a str,
}

/// A command that will be in its place from its first instruction on. Its output is still to be set.
pub(super) fn command(
    program: &Program,
    spec: &ContainerSpec,
    launch: &Launch,
    place: &Place<'_>,
) -> io::Result<Command> {
    let procs = File::options()
        .write(true)
        .open(place.cgroup.join("cgroup.procs"))?;
    let netns = place.netns.map(File::open).transpose()?;
    // The node's own host name is not a pod's to change.
    let hostname = netns.is_some().then(|| place.hostname.to_owned());
    let mut wanted = pod_files(place.dir);
    wanted.retain(|file| !spec.mounts.iter().any(|mount| mount.target == file.target));
    wanted.extend(spec.mounts.iter().cloned());
    let mounts = mounts::plan(&place.dir.join("root"), &wanted)?;
    let launch = launch.clone();
    let mut command = Command::new(program.argv0());
    command
        .args(&program.args)
        .env_clear()
        .env("PATH", PATH)
        .env("HOSTNAME", place.hostname)
        .env("BEELINE_IMAGE", &spec.image)
        .envs(spec.env.iter().map(|(name, value)| (name, value)))
        .stdin(Stdio::null());
    let enter = move || -> io::Result<()> {
        // "0" is the writing process itself: cgroups(7).
        (&procs).write_all(b"0")?;
        setsid()?;
        if let Some(netns) = &netns {
            setns(netns, CloneFlags::CLONE_NEWNET)?;
        }
        unshare(CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWUTS)?;
        let slave = MsFlags::MS_SLAVE | MsFlags::MS_REC;
        mount(None::<&str>, c"/", None::<&str>, slave, None::<&str>)?;
        mounts::perform(&mounts)?;
        if let Some(hostname) = &hostname {
            sethostname(hostname)?;
        }
        chdir(launch.directory.as_c_str())?;
        become_user(launch.user)
    };
    // SAFETY: between fork and exec only system calls are made, on what was prepared before; nothing allocates or locks.
    unsafe { command.pre_exec(enter) };
    Ok(command)
}

/// Gives up the rights of the node's agent, between fork and exec.
pub(super) fn become_user(user: Option<(u32, u32)>) -> io::Result<()> {
    if let Some((user, group)) = user {
        setgroups(&[])?;
        setgid(Gid::from_raw(group))?;
        setuid(Uid::from_raw(user))?;
    }
    Ok(())
}

/// Files that the pod has and the host has, too.
fn pod_files(dir: &Path) -> Vec<Mount> {
    [(RESOLV_CONF, "/etc/resolv.conf"), (HOSTS, "/etc/hosts")]
        .into_iter()
        .map(|(name, at)| Mount {
            source: dir.join(name),
            target: at.into(),
            read_only: false,
        })
        // Where the host has none, programs look for none.
        .filter(|mount| mount.source.exists() && fs::exists(&mount.target).unwrap_or(false))
        .collect()
}

/// As a shell has it.
pub(super) fn exit_code(status: ExitStatus) -> i32 {
    match (status.code(), status.signal()) {
        (Some(code), _) => code,
        (None, Some(signal)) => 128 + signal,
        (None, None) => 255,
    }
}
