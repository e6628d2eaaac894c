//! The packet programs: loaded once, attached to any number of devices.

use std::collections::BTreeSet;
use std::fs;
use std::io::ErrorKind;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use aya::programs::tc::{self, NlOptions, SchedClassifierLink, TcAttachOptions, TcError, TcHandle};
use aya::programs::{Program, ProgramError, SchedClassifier, TcAttachType, TestRun, TestRunOptions};
use aya::{Ebpf, EbpfLoader};
use dataplane_common::abi::{Device, device_flag};

use super::{
    Config, KernelError, MapPlace, ProgramInfo, Step, attach, devices, object, pins, place, qdisc, syscall,
};

/// Which way a packet goes through a device.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Direction {
    /// Into the host.
    Ingress,
    /// Out of the host.
    Egress,
}

impl Direction {
    /// Both, the way back first: no flow is translated before its answers can be.
    pub(super) const ALL: [Self; 2] = [Self::Egress, Self::Ingress];

    /// Name of the link's pin, before the index of the device.
    const fn link(self) -> &'static str {
        Role::Uplink.program(self)
    }

    const fn tcx(self) -> u32 {
        match self {
            Self::Ingress => BPF_TCX_INGRESS,
            Self::Egress => BPF_TCX_EGRESS,
        }
    }

    const fn tc(self) -> TcAttachType {
        match self {
            Self::Ingress => TcAttachType::Ingress,
            Self::Egress => TcAttachType::Egress,
        }
    }
}

/// What is behind a device; it says which programs the device has.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Role {
    /// Other hosts.
    Uplink,
    /// A pod of this node.
    Pod,
}

impl Role {
    const ALL: [Self; 2] = [Self::Uplink, Self::Pod];

    /// As the device's row has it. A device without one leads to other hosts, until the follower says otherwise.
    fn of(device: Option<&Device>) -> Self {
        if device.is_some_and(|device| device.flags & device_flag::POD != 0) {
            Self::Pod
        } else {
            Self::Uplink
        }
    }

    const fn program(self, direction: Direction) -> &'static str {
        match (self, direction) {
            (Self::Uplink, Direction::Ingress) => "nic_ingress",
            (Self::Uplink, Direction::Egress) => "nic_egress",
            (Self::Pod, Direction::Ingress) => "pod_ingress",
            (Self::Pod, Direction::Egress) => "pod_egress",
        }
    }
}

/// What a program made of a packet.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PacketRun {
    /// Its verdict: -1 goes on, 2 drops, 7 sends back.
    pub verdict: i32,
    /// The packet afterwards.
    pub packet: Vec<u8>,
    /// Its mark afterwards.
    pub mark: u32,
    /// Mean time of one run.
    pub duration: std::time::Duration,
}

/// `enum bpf_attach_type` (include/uapi/linux/bpf.h).
const BPF_TCX_INGRESS: u32 = 46;
const BPF_TCX_EGRESS: u32 = 47;
/// `enum bpf_link_type`.
const LINK_TYPE_TCX: u32 = 11;

/// Where our filters are below a `clsact` qdisc: what is there is ours.
const PRIORITY: u16 = 0xbee;
const HANDLE: TcHandle = TcHandle::new(0, 1);

/// How a program gets to a device.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Hook {
    /// By a pinned link (6.6). A new program takes the place of an old one without a packet in between.
    Tcx,
    /// As a filter below the `clsact` qdisc.
    Clsact,
}

/// The loaded packet programs.
#[derive(Clone)]
pub struct NicPrograms {
    objects: Arc<Mutex<Objects>>,
    pin_dir: PathBuf,
}

impl std::fmt::Debug for NicPrograms {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("NicPrograms")
            .field("pin_dir", &self.pin_dir)
            .finish_non_exhaustive()
    }
}

/// The objects that hold the programs.
pub(super) struct Objects {
    nic: Ebpf,
    pod: Ebpf,
}

/// Puts the packet objects onto the maps at these places.
pub(super) fn load(config: &Config, places: &[MapPlace]) -> Result<Objects, KernelError> {
    let object = |bytes| -> Result<Ebpf, KernelError> {
        let mut loader = EbpfLoader::new();
        loader.override_global(aya_log::LEVEL, &config.ebpf_log_level, false);
        place(&mut loader, places);
        Ok(loader.load(bytes)?)
    };
    Ok(Objects {
        nic: object(object::nic_bytes())?,
        pod: object(object::pod_bytes())?,
    })
}

impl Objects {
    const fn of(&mut self, role: Role) -> &mut Ebpf {
        match role {
            Role::Uplink => &mut self.nic,
            Role::Pod => &mut self.pod,
        }
    }

    /// Loads the programs.
    pub(super) fn load_programs(&mut self) -> Result<(), KernelError> {
        for role in Role::ALL {
            for direction in Direction::ALL {
                attach::load_program(self.of(role), role.program(direction))?;
            }
        }
        Ok(())
    }

    fn program(&mut self, role: Role, direction: Direction) -> Result<&mut SchedClassifier, KernelError> {
        let name = role.program(direction);
        match self.of(role).program_mut(name) {
            Some(Program::SchedClassifier(program)) => Ok(program),
            _ => Err(KernelError::Missing(format!("program {name}"))),
        }
    }
}

fn io(operation: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> KernelError {
    let path = path.to_path_buf();
    move |source| KernelError::Io {
        operation,
        path,
        source,
    }
}

fn failed(direction: Direction) -> impl Fn(ProgramError) -> KernelError {
    move |source| KernelError::Program {
        program: direction.link().into(),
        source,
    }
}

/// The pins of our links at devices: direction and index of the device, as their names say.
fn links(pin_dir: &Path) -> Result<Vec<(Direction, u32)>, KernelError> {
    let dir = pins::links_path(pin_dir);
    let mut found = Vec::new();
    for entry in fs::read_dir(&dir).map_err(io("list", &dir))? {
        let name = entry.map_err(io("list", &dir))?.file_name();
        let name = name.to_string_lossy();
        for direction in Direction::ALL {
            let index = name
                .strip_prefix(direction.link())
                .and_then(|rest| rest.strip_prefix('_')?.parse().ok());
            found.extend(index.map(|index| (direction, index)));
        }
    }
    // the way back first
    found.sort_by_key(|(direction, index)| (*direction == Direction::Ingress, *index));
    Ok(found)
}

fn link_path(pin_dir: &Path, direction: Direction, ifindex: u32) -> PathBuf {
    pins::link_path(pin_dir, &format!("{}_{ifindex}", direction.link()))
}

/// Puts a program below the link that is pinned for the device. False, and the pin is gone, if that link holds on to
/// another device or to none.
fn update(
    pin_dir: &Path,
    program: BorrowedFd<'_>,
    direction: Direction,
    ifindex: u32,
) -> Result<bool, KernelError> {
    let path = link_path(pin_dir, direction, ifindex);
    let link = match syscall::obj_get(&path) {
        Ok(link) => link,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(false),
        Err(error) => return Err(io("open pinned link", &path)(error)),
    };
    let info = syscall::device_link_info(link.as_fd()).map_err(io("inspect pinned link", &path))?;
    if info.kind == LINK_TYPE_TCX && info.ifindex == ifindex && info.attach_type == direction.tcx() {
        syscall::link_update(link.as_fd(), program)
            .map_err(io("replace the program below pinned link", &path))?;
        return Ok(true);
    }
    fs::remove_file(&path).map_err(io("remove pinned link", &path))?;
    Ok(false)
}

/// Puts the new programs in the place of the old ones at every device.
pub(super) fn replace(
    objects: &mut Objects,
    pin_dir: &Path,
    observe: &mut dyn FnMut(Step) -> Result<(), KernelError>,
) -> Result<(), KernelError> {
    let devices = devices::DeviceTable::open(pin_dir)?.rows()?;
    let mut linked = BTreeSet::new();
    for (direction, ifindex) in links(pin_dir)? {
        let program = objects.program(Role::of(devices.get(&ifindex)), direction)?;
        let fd = program.fd().map_err(failed(direction))?.as_fd();
        if update(pin_dir, fd, direction, ifindex)? {
            linked.insert(ifindex);
            observe(Step::Attached)?;
        }
    }
    for (ifindex, device) in devices.iter().filter(|(index, _)| !linked.contains(*index)) {
        for direction in Direction::ALL {
            // not there any more, or served by a link that is made anew later: both are the follower's business
            if let Some(name) = name_of(*ifindex)
                && filter(
                    objects.program(Role::of(Some(device)), direction)?,
                    direction,
                    &name,
                    false,
                )
                .is_ok()
            {
                observe(Step::Attached)?;
            }
        }
    }
    Ok(())
}

/// Name of a device of this network namespace.
fn name_of(ifindex: u32) -> Option<String> {
    let name = nix::net::if_::if_indextoname(ifindex).ok()?;
    name.into_string().ok()
}

/// Makes a filter of the program, or replaces the one that is there.
fn filter(
    program: &mut SchedClassifier,
    direction: Direction,
    device: &str,
    make: bool,
) -> Result<(), ProgramError> {
    let kind = direction.tc();
    let id = if make {
        let options = TcAttachOptions::Netlink(NlOptions {
            priority: PRIORITY,
            handle: HANDLE,
            ..NlOptions::default()
        });
        program.attach_with_options(device, kind, options)?
    } else {
        let link =
            SchedClassifierLink::attached(device, kind, PRIORITY, HANDLE, None).map_err(TcError::IoError)?;
        program.attach_to_link(link)?
    };
    // the filter stays when this process goes
    std::mem::forget(program.take_link(id)?);
    Ok(())
}

/// Removes our filter, whichever program it is of. False if there was none.
fn remove_filter(direction: Direction, device: &str) -> Result<bool, ProgramError> {
    for role in Role::ALL {
        match tc::qdisc_detach_program(device, direction.tc(), role.program(direction)) {
            Ok(()) => return Ok(true),
            Err(TcError::IoError(error)) if error.kind() == ErrorKind::NotFound => {}
            // no such qdisc
            Err(TcError::NetlinkError(_)) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(false)
}

impl NicPrograms {
    pub(super) fn new(objects: Objects, pin_dir: &Path) -> Self {
        Self {
            objects: Arc::new(Mutex::new(objects)),
            pin_dir: pin_dir.into(),
        }
    }

    fn objects(&self) -> MutexGuard<'_, Objects> {
        self.objects.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn role(&self, ifindex: u32) -> Result<Role, KernelError> {
        let row = devices::DeviceTable::open(&self.pin_dir)?.row(ifindex)?;
        Ok(Role::of(row.as_ref()))
    }

    /// Attaches the two programs that the device's row in `DEVICES` asks for to a device of this network namespace, or puts
    /// them in the place of older ones.
    /// `hook` is the one to use; `None` takes the best that the kernel has, and gives it.
    ///
    /// # Errors
    ///
    /// If the device is gone, or the kernel refuses.
    pub fn attach(&self, ifindex: u32, hook: Option<Hook>) -> Result<Hook, KernelError> {
        let role = self.role(ifindex)?;
        let mut objects = self.objects();
        let mut used = hook.unwrap_or(Hook::Tcx);
        for direction in Direction::ALL {
            let program = objects.program(role, direction)?;
            if used == Hook::Tcx {
                match self.attach_link(program, direction, ifindex) {
                    // EINVAL is how a kernel before 6.6 says that it knows no such thing
                    Err(KernelError::Io { source, .. })
                        if hook.is_none() && source.raw_os_error() == Some(libc::EINVAL) =>
                    {
                        used = Hook::Clsact;
                    }
                    other => other?,
                }
            }
            if used == Hook::Clsact {
                let gone = || std::io::Error::from_raw_os_error(libc::ENODEV);
                let name =
                    name_of(ifindex).ok_or_else(|| failed(direction)(TcError::IoError(gone()).into()))?;
                // fails if there is one
                let _there = tc::qdisc_add_clsact(&name);
                if filter(program, direction, &name, false).is_err() {
                    filter(program, direction, &name, true).map_err(failed(direction))?;
                }
            }
        }
        Ok(used)
    }

    fn attach_link(
        &self,
        program: &SchedClassifier,
        direction: Direction,
        ifindex: u32,
    ) -> Result<(), KernelError> {
        let path = link_path(&self.pin_dir, direction, ifindex);
        let fd = program.fd().map_err(failed(direction))?.as_fd();
        if update(&self.pin_dir, fd, direction, ifindex)? {
            return Ok(());
        }
        let link = syscall::device_link_create(fd, ifindex, direction.tcx())
            .map_err(io("attach to the device for", &path))?;
        // an unpinned link goes when it is dropped, so a failure leaves nothing
        syscall::obj_pin(link.as_fd(), &path).map_err(io("pin link", &path))
    }

    /// Takes both programs off a device; it need not exist any more.
    ///
    /// # Errors
    ///
    /// If the kernel refuses.
    pub fn detach(&self, ifindex: u32) -> Result<(), KernelError> {
        // nothing is translated any more before answers are not
        for direction in Direction::ALL.into_iter().rev() {
            let path = link_path(&self.pin_dir, direction, ifindex);
            match fs::remove_file(&path) {
                Err(error) if error.kind() != ErrorKind::NotFound => {
                    return Err(io("remove pinned link", &path)(error));
                }
                Err(_) => {
                    if let Some(name) = name_of(ifindex) {
                        remove_filter(direction, &name).map_err(failed(direction))?;
                        // without the other direction's filter it may be empty now
                        qdisc::remove_if_empty(ifindex)
                            .map_err(io("remove the qdisc of the device of", &path))?;
                    }
                }
                Ok(()) => {}
            }
        }
        Ok(())
    }

    /// Indexes of the devices that have a link or are in `DEVICES`.
    ///
    /// # Errors
    ///
    /// If the pins cannot be read.
    pub fn attached(&self) -> Result<BTreeSet<u32>, KernelError> {
        let mut indexes = devices::DeviceTable::open(&self.pin_dir)?.indexes()?;
        indexes.extend(links(&self.pin_dir)?.into_iter().map(|(_, index)| index));
        Ok(indexes)
    }

    pub(super) fn info(&self) -> Result<Vec<ProgramInfo>, KernelError> {
        let mut objects = self.objects();
        let mut out = Vec::new();
        for role in Role::ALL {
            for direction in Direction::ALL {
                let program = objects.program(role, direction)?;
                let info = program.info().map_err(failed(direction))?;
                out.push(ProgramInfo {
                    name: role.program(direction).into(),
                    id: info.id(),
                    verified_instructions: info.verified_instruction_count().unwrap_or(0),
                    replaced: false,
                });
            }
        }
        Ok(out)
    }

    pub(super) fn run(
        &self,
        direction: Direction,
        packet: &[u8],
        mark: u32,
        repeat: u32,
    ) -> Result<PacketRun, KernelError> {
        let role = self.role(LOOPBACK)?;
        run(
            self.objects().program(role, direction)?,
            direction,
            packet,
            mark,
            repeat,
        )
    }
}

/// Takes the filters of any agent off all devices of this network namespace.
pub(super) fn cleanup() -> Vec<String> {
    let mut removed = Vec::new();
    for device in nix::net::if_::if_nameindex()
        .iter()
        .flat_map(nix::net::if_::Interfaces::iter)
    {
        let name = device.name().to_string_lossy();
        let before = removed.len();
        for direction in Direction::ALL.into_iter().rev() {
            if matches!(remove_filter(direction, &name), Ok(true)) {
                removed.push(format!("{direction:?} filter at {name}"));
            }
        }
        if removed.len() > before && qdisc::remove_if_empty(device.index()).is_ok_and(|gone| gone) {
            removed.push(format!("qdisc clsact at {name}"));
        }
    }
    removed
}

/// Index of the loopback device of every network namespace.
const LOOPBACK: u32 = 1;
/// Offsets in `struct __sk_buff` (include/uapi/linux/bpf.h).
const MARK: usize = 8;
const CONTEXT: usize = 192;

/// Runs a program `repeat` times on a packet (each time on what the last run left), on the loopback device of the
/// caller's network namespace.
fn run(
    program: &SchedClassifier,
    direction: Direction,
    packet: &[u8],
    mark: u32,
    repeat: u32,
) -> Result<PacketRun, KernelError> {
    let mut context = [0; CONTEXT];
    context[MARK..MARK + 4].copy_from_slice(&mark.to_ne_bytes());
    let mut context_out = [0; CONTEXT];
    let mut out = vec![0; packet.len() + 256];
    let options = TestRunOptions {
        data_in: Some(packet),
        data_out: Some(&mut out),
        ctx_in: Some(&context),
        ctx_out: Some(&mut context_out),
        repeat,
        ..TestRunOptions::new()
    };
    let result = program.test_run(options).map_err(failed(direction))?;
    out.truncate(usize::try_from(result.data_size_out).unwrap_or(usize::MAX));
    let mut mark = [0; 4];
    mark.copy_from_slice(&context_out[MARK..MARK + 4]);
    Ok(PacketRun {
        verdict: result.return_value.cast_signed(),
        packet: out,
        mark: u32::from_ne_bytes(mark),
        duration: result.duration,
    })
}
