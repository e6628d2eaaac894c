//! Loading the programs and putting them below their links.

use std::fs::{self, File};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use aya::Ebpf;
use aya::programs::{Program, ProgramError};

use super::{KernelError, ProgramInfo, Step, pins, syscall};

/// Name in the object, and `enum bpf_attach_type` (include/uapi/linux/bpf.h).
const PROGRAMS: [(&str, u32); 10] = [
    // The way back first: a connection is never translated before its peer's name can be.
    ("sock_release", 34),
    ("sock_getpeername4", 29),
    ("sock_getpeername6", 30),
    ("sock_recvmsg4", 19),
    ("sock_recvmsg6", 20),
    ("sock_sendmsg4", 14),
    ("sock_sendmsg6", 15),
    ("sock_connect4", 10),
    ("sock_connect6", 11),
    ("sock_ops", 3),
];

const LINK_TYPE_CGROUP: u32 = 3;

/// Loads every program.
pub(super) fn load(ebpf: &mut Ebpf) -> Result<(), KernelError> {
    PROGRAMS.iter().try_for_each(|(name, _)| load_program(ebpf, name))
}

/// Attaches or replaces one program after the other; all are loaded.
pub(super) fn attach(
    ebpf: &Ebpf,
    pin_dir: &Path,
    cgroup_root: &Path,
    observe: &mut dyn FnMut(Step) -> Result<(), KernelError>,
) -> Result<Vec<ProgramInfo>, KernelError> {
    let io = |operation| {
        move |source| KernelError::Io {
            operation,
            path: cgroup_root.to_path_buf(),
            source,
        }
    };
    let cgroup = File::open(cgroup_root).map_err(io("open cgroup"))?;
    let cgroup_id = cgroup.metadata().map_err(io("stat cgroup"))?.ino();

    let mut out = Vec::new();
    for (name, attach_type) in PROGRAMS {
        let program = ebpf
            .program(name)
            .ok_or_else(|| KernelError::Missing(format!("program {name}")))?;
        let fail = |source| KernelError::Program {
            program: name.into(),
            source,
        };
        let fd = program.fd().map_err(fail)?.as_fd();
        let link = pins::link_path(pin_dir, name);
        let replaced = replace(&link, fd, cgroup_id, attach_type)?;
        if !replaced {
            create(&link, fd, cgroup.as_fd(), attach_type)?;
        }
        let info = program.info().map_err(fail)?;
        out.push(ProgramInfo {
            name: name.into(),
            id: info.id(),
            verified_instructions: info.verified_instruction_count().unwrap_or(0),
            replaced,
        });
        observe(Step::Attached)?;
    }
    Ok(out)
}

pub(super) fn load_program(ebpf: &mut Ebpf, name: &str) -> Result<(), KernelError> {
    let program = ebpf
        .program_mut(name)
        .ok_or_else(|| KernelError::Missing(format!("program {name}")))?;
    let loaded = match program {
        Program::CgroupSockAddr(program) => program.load(),
        Program::CgroupSock(program) => program.load(),
        Program::SockOps(program) => program.load(),
        Program::SchedClassifier(program) => program.load(),
        _ => return Err(KernelError::Missing(format!("program {name} of the right kind"))),
    };
    loaded.map_err(|error| refused(name, error))
}

/// The verifier's log can be megabytes: its end says why, the rest goes to a file.
fn refused(name: &str, error: ProgramError) -> KernelError {
    let ProgramError::LoadError {
        io_error,
        verifier_log,
    } = error
    else {
        return KernelError::Program {
            program: name.into(),
            source: error,
        };
    };
    let text = verifier_log.to_string();
    let lines: Vec<&str> = text.lines().collect();
    let path = std::env::temp_dir().join(format!("beeline-verifier-{name}-{}.log", std::process::id()));
    let log = match fs::write(&path, &text) {
        Ok(()) => path.display().to_string(),
        Err(error) => format!("could not be written to {}: {error}", path.display()),
    };
    let tail = lines[lines.len().saturating_sub(20)..].join("\n");
    KernelError::Refused {
        program: name.into(),
        source: io_error,
        tail,
        log,
    }
}

/// Swaps the program below a pinned link. False if there is none, or none that still holds on to this cgroup.
fn replace(
    path: &Path,
    program: BorrowedFd<'_>,
    cgroup_id: u64,
    attach_type: u32,
) -> Result<bool, KernelError> {
    let io = |operation| {
        move |source| KernelError::Io {
            operation,
            path: path.to_path_buf(),
            source,
        }
    };
    let link = match syscall::obj_get(path) {
        Ok(link) => link,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(false),
        Err(error) => return Err(io("open pinned link")(error)),
    };
    let info = syscall::link_info(link.as_fd()).map_err(io("inspect pinned link"))?;
    if info.kind == LINK_TYPE_CGROUP && info.cgroup_id == cgroup_id && info.attach_type == attach_type {
        syscall::link_update(link.as_fd(), program).map_err(io("replace the program below pinned link"))?;
        return Ok(true);
    }
    // The cgroup is gone, or it is another one now: what the link holds serves nobody whom we should serve.
    fs::remove_file(path).map_err(io("remove pinned link"))?;
    Ok(false)
}

fn create(
    path: &Path,
    program: BorrowedFd<'_>,
    cgroup: BorrowedFd<'_>,
    attach_type: u32,
) -> Result<(), KernelError> {
    let io = |operation| {
        move |source| KernelError::Io {
            operation,
            path: path.to_path_buf(),
            source,
        }
    };
    let link = syscall::link_create(program, cgroup, attach_type).map_err(io("attach to the cgroup for"))?;
    // an unpinned link goes when it is dropped, so a failure leaves nothing
    syscall::obj_pin(link.as_fd(), path).map_err(io("pin link"))
}
