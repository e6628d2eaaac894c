//! The few `bpf(2)` commands that aya does not offer: links that are swapped in place, for every kind of program,
//! and entries of maps as bytes.

use std::ffi::CString;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

// Numbers of enum bpf_cmd, include/uapi/linux/bpf.h.
const BPF_MAP_LOOKUP_ELEM: libc::c_int = 1;
const BPF_MAP_UPDATE_ELEM: libc::c_int = 2;
const BPF_MAP_DELETE_ELEM: libc::c_int = 3;
const BPF_MAP_GET_NEXT_KEY: libc::c_int = 4;
const BPF_OBJ_PIN: libc::c_int = 6;
const BPF_OBJ_GET: libc::c_int = 7;
const BPF_OBJ_GET_INFO_BY_FD: libc::c_int = 15;
const BPF_MAP_LOOKUP_BATCH: libc::c_int = 24;
const BPF_LINK_CREATE: libc::c_int = 28;
const BPF_LINK_UPDATE: libc::c_int = 29;

fn bpf<T>(command: libc::c_int, attr: &mut T) -> io::Result<libc::c_long> {
    // SAFETY: `attr` is a plain struct of the layout that the command reads and writes, valid for its whole size; what
    // it points to outlives the call (the callers hold it).
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_mut(attr), size_of::<T>()) };
    if result < 0 {
        Err(io::Error::last_os_error())
    } else {
        Ok(result)
    }
}

fn owned(fd: libc::c_long) -> io::Result<OwnedFd> {
    let fd = RawFd::try_from(fd).map_err(io::Error::other)?;
    // SAFETY: the kernel has just given this descriptor to us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

#[repr(C)]
#[derive(Default)]
struct ObjAttr {
    pathname: u64,
    bpf_fd: u32,
    file_flags: u32,
}

fn c_path(path: &Path) -> io::Result<CString> {
    CString::new(path.as_os_str().as_bytes()).map_err(io::Error::other)
}

/// Opens a pinned object.
pub(super) fn obj_get(path: &Path) -> io::Result<OwnedFd> {
    let path = c_path(path)?;
    let mut attr = ObjAttr {
        pathname: path.as_ptr() as u64,
        ..ObjAttr::default()
    };
    owned(bpf(BPF_OBJ_GET, &mut attr)?)
}

/// Pins an object.
pub(super) fn obj_pin(fd: BorrowedFd<'_>, path: &Path) -> io::Result<()> {
    let path = c_path(path)?;
    let bpf_fd = fd.as_raw_fd().cast_unsigned();
    bpf(
        BPF_OBJ_PIN,
        &mut ObjAttr {
            pathname: path.as_ptr() as u64,
            bpf_fd,
            file_flags: 0,
        },
    )
    .map(drop)
}

#[repr(C)]
struct LinkCreateAttr {
    prog_fd: u32,
    target_fd: u32,
    attach_type: u32,
    flags: u32,
}

/// Attaches a program to a cgroup through a link (5.7).
pub(super) fn link_create(
    program: BorrowedFd<'_>,
    cgroup: BorrowedFd<'_>,
    attach_type: u32,
) -> io::Result<OwnedFd> {
    link_create_at(program, cgroup.as_raw_fd().cast_unsigned(), attach_type)
}

/// Attaches a program to a device of this thread's network namespace, behind those that are there (6.6).
pub(super) fn device_link_create(
    program: BorrowedFd<'_>,
    ifindex: u32,
    attach_type: u32,
) -> io::Result<OwnedFd> {
    link_create_at(program, ifindex, attach_type)
}

fn link_create_at(program: BorrowedFd<'_>, target: u32, attach_type: u32) -> io::Result<OwnedFd> {
    let mut attr = LinkCreateAttr {
        prog_fd: program.as_raw_fd().cast_unsigned(),
        target_fd: target,
        attach_type,
        flags: 0,
    };
    owned(bpf(BPF_LINK_CREATE, &mut attr)?)
}

#[repr(C)]
struct LinkUpdateAttr {
    link_fd: u32,
    new_prog_fd: u32,
    flags: u32,
    old_prog_fd: u32,
}

/// Puts another program below a link, atomically: every call runs the old one or the new one (5.7).
pub(super) fn link_update(link: BorrowedFd<'_>, program: BorrowedFd<'_>) -> io::Result<()> {
    let mut attr = LinkUpdateAttr {
        link_fd: link.as_raw_fd().cast_unsigned(),
        new_prog_fd: program.as_raw_fd().cast_unsigned(),
        flags: 0,
        old_prog_fd: 0,
    };
    bpf(BPF_LINK_UPDATE, &mut attr).map(drop)
}

#[repr(C)]
struct InfoAttr {
    bpf_fd: u32,
    info_len: u32,
    info: u64,
}

/// The head of `struct bpf_link_info` for a cgroup link.
#[repr(C)]
#[derive(Clone, Copy, Default, Debug)]
pub(super) struct CgroupLinkInfo {
    /// `BPF_LINK_TYPE_CGROUP` is 3.
    pub(super) kind: u32,
    id: u32,
    /// The program below it.
    pub(super) program_id: u32,
    pad: u32,
    /// The cgroup's id, which is its directory's inode number; 0 once the cgroup is gone.
    pub(super) cgroup_id: u64,
    /// `enum bpf_attach_type`.
    pub(super) attach_type: u32,
    pad2: u32,
}

/// What a link is attached to.
pub(super) fn link_info(link: BorrowedFd<'_>) -> io::Result<CgroupLinkInfo> {
    let mut info = CgroupLinkInfo::default();
    object_info(link, &mut info)?;
    Ok(info)
}

/// The head of `struct bpf_link_info` for a link at a device.
#[repr(C)]
#[derive(Clone, Copy, Default, Debug)]
pub(super) struct DeviceLinkInfo {
    /// `BPF_LINK_TYPE_TCX` is 11.
    pub(super) kind: u32,
    id: u32,
    program_id: u32,
    pad: u32,
    /// The device; 0 once it is gone.
    pub(super) ifindex: u32,
    /// `enum bpf_attach_type`.
    pub(super) attach_type: u32,
}

/// As [`link_info`], for a link at a device.
pub(super) fn device_link_info(link: BorrowedFd<'_>) -> io::Result<DeviceLinkInfo> {
    let mut info = DeviceLinkInfo::default();
    object_info(link, &mut info)?;
    Ok(info)
}

/// `info` is the head of what the kernel says of the object; integers only.
fn object_info<T>(object: BorrowedFd<'_>, info: &mut T) -> io::Result<()> {
    let mut attr = InfoAttr {
        bpf_fd: object.as_raw_fd().cast_unsigned(),
        info_len: u32::try_from(size_of::<T>()).map_err(io::Error::other)?,
        info: std::ptr::from_mut(info) as u64,
    };
    bpf(BPF_OBJ_GET_INFO_BY_FD, &mut attr).map(drop)
}

/// Flags of [`map_update`], include/uapi/linux/bpf.h.
pub(super) const BPF_ANY: u64 = 0;
/// The key must not be there yet.
pub(super) const BPF_NOEXIST: u64 = 1;

#[repr(C)]
struct ElementAttr {
    map_fd: u32,
    pad: u32,
    key: u64,
    /// Or where the next key goes.
    value: u64,
    flags: u64,
}

impl ElementAttr {
    fn new(map: BorrowedFd<'_>, key: u64, value: u64, flags: u64) -> Self {
        Self {
            map_fd: map.as_raw_fd().cast_unsigned(),
            pad: 0,
            key,
            value,
            flags,
        }
    }
}

/// Reads a value; the buffers are of the map's sizes. False if the key is not there.
pub(super) fn map_lookup(map: BorrowedFd<'_>, key: &[u8], value: &mut [u8]) -> io::Result<bool> {
    let mut attr = ElementAttr::new(map, key.as_ptr() as u64, value.as_mut_ptr() as u64, 0);
    found(bpf(BPF_MAP_LOOKUP_ELEM, &mut attr))
}

/// Writes a value; the buffers are of the map's sizes.
pub(super) fn map_update(map: BorrowedFd<'_>, key: &[u8], value: &[u8], flags: u64) -> io::Result<()> {
    let mut attr = ElementAttr::new(map, key.as_ptr() as u64, value.as_ptr() as u64, flags);
    bpf(BPF_MAP_UPDATE_ELEM, &mut attr).map(drop)
}

/// Removes an entry. False if the key is not there.
pub(super) fn map_delete(map: BorrowedFd<'_>, key: &[u8]) -> io::Result<bool> {
    found(bpf(
        BPF_MAP_DELETE_ELEM,
        &mut ElementAttr::new(map, key.as_ptr() as u64, 0, 0),
    ))
}

/// Finds the key behind this one, or the first. False behind the last.
pub(super) fn map_next_key(map: BorrowedFd<'_>, key: Option<&[u8]>, next: &mut [u8]) -> io::Result<bool> {
    let key = key.map_or(0, |key| key.as_ptr() as u64);
    let mut attr = ElementAttr::new(map, key, next.as_mut_ptr() as u64, 0);
    found(bpf(BPF_MAP_GET_NEXT_KEY, &mut attr))
}

fn found(result: io::Result<libc::c_long>) -> io::Result<bool> {
    match result {
        Ok(_) => Ok(true),
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(false),
        Err(error) => Err(error),
    }
}

#[repr(C)]
struct BatchAttr {
    in_batch: u64,
    out_batch: u64,
    keys: u64,
    values: u64,
    count: u32,
    map_fd: u32,
    element_flags: u64,
    flags: u64,
}

/// Reads up to `count` entries from a position on (5.6), and gives how many these were; the buffers have room for them,
/// and `next` for a position. `ENOENT`: these were the last. `ENOSPC`: more are needed at once.
pub(super) fn map_lookup_batch(
    map: BorrowedFd<'_>,
    position: Option<&[u8]>,
    next: &mut [u8],
    keys: &mut [u8],
    values: &mut [u8],
    count: u32,
) -> (u32, io::Result<()>) {
    let mut attr = BatchAttr {
        in_batch: position.map_or(0, |position| position.as_ptr() as u64),
        out_batch: next.as_mut_ptr() as u64,
        keys: keys.as_mut_ptr() as u64,
        values: values.as_mut_ptr() as u64,
        count,
        map_fd: map.as_raw_fd().cast_unsigned(),
        element_flags: 0,
        flags: 0,
    };
    let result = bpf(BPF_MAP_LOOKUP_BATCH, &mut attr);
    (attr.count, result.map(drop))
}
