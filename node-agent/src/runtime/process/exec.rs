//! A command in the namespaces of a container that runs.

use std::fs::File;
use std::io::{self, Write as _};
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::path::Path;
use std::process::Stdio;

use futures::FutureExt as _;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::pty::openpty;
use nix::sched::{CloneFlags, setns};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::{Pid, chdir, chroot, fchdir, setsid};
use tokio::net::unix::pipe;
use tokio::process::{Child, Command};
use tokio::sync::mpsc;

use super::super::Failure;
use super::super::session::{Input, Output, Session, Wish};
use super::spawn::{self, Launch};
use crate::process::Process;

/// Starts it. It has the variables that the container was started with.
pub(super) fn start(
    process: &Process,
    cgroup: &Path,
    launch: &Launch,
    wish: &Wish,
) -> Result<Session, Failure> {
    let failed = |error: io::Error| {
        let command = wish.command.first().map_or("", String::as_str);
        Failure::because("ExecError", &format!("run {command:?} in the container"), error)
    };
    let mut command = command(process, cgroup, launch, wish).map_err(failed)?;
    if wish.tty {
        with_terminal(command).map_err(failed)
    } else {
        let pipe = |wanted: bool| if wanted { Stdio::piped() } else { Stdio::null() };
        command
            .stdin(pipe(wish.stdin))
            .stdout(pipe(wish.stdout))
            .stderr(pipe(wish.stderr));
        let mut child = command.spawn().map_err(failed)?;
        Ok(Session {
            stdin: child.stdin.take().map(|pipe| Box::new(pipe) as Input),
            stdout: child.stdout.take().map(|pipe| Box::new(pipe) as Output),
            stderr: child.stderr.take().map(|pipe| Box::new(pipe) as Output),
            resize: None,
            exit: exit(child).boxed(),
        })
    }
}

fn command(process: &Process, cgroup: &Path, launch: &Launch, wish: &Wish) -> io::Result<Command> {
    let of = |what: &str| File::open(format!("/proc/{}/{what}", process.pid));
    let mut words = wish.command.iter();
    let program = words.next().ok_or_else(|| io::Error::other("no command"))?;
    let root = of("root")?;
    let namespaces = [
        (of("ns/net")?, CloneFlags::CLONE_NEWNET),
        (of("ns/uts")?, CloneFlags::CLONE_NEWUTS),
        (of("ns/mnt")?, CloneFlags::CLONE_NEWNS),
    ];
    let procs = File::options().write(true).open(cgroup.join("cgroup.procs"))?;
    let environ = std::fs::read(format!("/proc/{}/environ", process.pid))?;
    let text = String::from_utf8_lossy(&environ);
    let variables = text.split('\0').filter_map(|pair| pair.split_once('='));
    let launch = launch.clone();
    let tty = wish.tty;
    let mut command = Command::new(program);
    command.args(words).env_clear().envs(variables);
    if tty {
        command.env("TERM", "xterm");
    }
    let enter = move || -> io::Result<()> {
        (&procs).write_all(b"0")?;
        setsid()?;
        if tty {
            // SAFETY: makes the terminal that is standard input the session's; no memory is involved.
            nix::errno::Errno::result(unsafe { libc::ioctl(0, libc::TIOCSCTTY, 0) })?;
        }
        for (namespace, kind) in &namespaces {
            setns(namespace, *kind)?;
        }
        fchdir(&root)?;
        chroot(c".")?;
        chdir(launch.directory.as_c_str())?;
        spawn::become_user(launch.user)
    };
    // SAFETY: between fork and exec only system calls are made, on what was prepared before; nothing allocates or locks.
    unsafe { command.pre_exec(enter) };
    Ok(command)
}

fn with_terminal(mut command: Command) -> io::Result<Session> {
    let pair = openpty(None, None)?;
    let slave = || -> io::Result<Stdio> { Ok(pair.slave.try_clone()?.into()) };
    command.stdin(slave()?).stdout(slave()?).stderr(slave()?);
    let child = command.spawn()?;
    // The command's ends are closed with it, so that the other one sees the end.
    drop(command);
    drop(pair.slave);
    fcntl(&pair.master, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))?;
    let reader = File::from(pair.master.try_clone()?);
    let writer = File::from(pair.master.try_clone()?);
    let (resize, mut sizes) = mpsc::unbounded_channel();
    let master = pair.master;
    tokio::spawn(async move {
        while let Some((columns, lines)) = sizes.recv().await {
            if let Err(error) = set_size(&master, columns, lines) {
                tracing::debug!(%error, "the size of a terminal");
            }
        }
    });
    Ok(Session {
        stdin: Some(Box::new(pipe::Sender::from_file_unchecked(writer)?)),
        stdout: Some(Box::new(pipe::Receiver::from_file_unchecked(reader)?)),
        stderr: None,
        resize: Some(resize),
        exit: exit(child).boxed(),
    })
}

fn set_size(terminal: &OwnedFd, columns: u16, lines: u16) -> io::Result<()> {
    let size = nix::pty::Winsize {
        ws_row: lines,
        ws_col: columns,
        ws_xpixel: 0,
        ws_ypixel: 0,
    };
    // SAFETY: the kernel reads a `winsize`, which lives until the call returns, from an open descriptor.
    let done = unsafe { libc::ioctl(terminal.as_raw_fd(), libc::TIOCSWINSZ, &raw const size) };
    nix::errno::Errno::result(done)?;
    Ok(())
}

/// Ends the command, and what it has started, when nobody waits for it any more.
struct Group(Option<Pid>);

impl Group {
    /// What the command has left in the background goes on; the number may soon be another's.
    fn release(&mut self) {
        self.0 = None;
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        if let Some(group) = self.0 {
            // It may have ended meanwhile.
            let _gone = killpg(group, Signal::SIGKILL);
        }
    }
}

fn exit(mut child: Child) -> impl Future<Output = Result<i32, Failure>> {
    let mut group = Group(
        child
            .id()
            .and_then(|id| i32::try_from(id).ok())
            .map(Pid::from_raw),
    );
    async move {
        let status = child.wait().await;
        group.release();
        let status = status.map_err(|error| Failure::because("ExecError", "wait for the command", error))?;
        Ok(spawn::exit_code(status))
    }
}
