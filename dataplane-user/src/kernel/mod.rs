//! The kernel side: programs, maps, links. The only module that uses aya.
//!
//! Everything lives in pins below `<bpffs>/v<ABI version>/`, so that it outlives this process: [`Kernel::open`] finds what
//! an earlier agent left, checks its shape, puts the new programs below the old links and goes on with the old maps.

mod arrays;
mod attach;
mod cleanup;
mod devices;
mod events;
mod flows;
mod handback;
mod logs;
mod maps;
mod masquerade;
pub mod mounts;
mod nic;
mod node;
mod object;
mod pins;
mod podtable;
mod qdisc;
mod resize;
mod syscall;
mod transfer;
mod translations;

use std::path::{Path, PathBuf};

use aya::maps::{MapData, PerCpuArray};
use aya::{Ebpf, EbpfLoader};
use dataplane_common::abi::{COUNTERS, map_name};
use resize::{Change, Resize};
use serde::Serialize;

pub use arrays::StatsReader;
pub use cleanup::cleanup;
pub use devices::DeviceTable;
pub use events::{BackendReader, Events, socket_addr};
pub use flows::FlowTable;
pub use handback::{running_flows, served_families, stop_new_connections};
pub use maps::RealMaps;
pub use masquerade::MasqueradeTable;
pub use nic::{Direction, Hook, NicPrograms, PacketRun};
pub use node::{NodeTables, range};
pub use object::{MAPS, MapSpec};
pub use podtable::PodTable;
pub use resize::Step;
pub use translations::Translations;

/// Sizes of the maps, in entries.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize)]
pub struct Sizes {
    /// Services (one per port and family).
    pub services: u32,
    /// Backends.
    pub backends: u32,
    /// Slots: the sum of all sets, and room for a change.
    pub slots: u32,
    /// Frontends; each ClusterIP takes one more.
    pub frontends: u32,
    /// Recent destinations of unconnected UDP sockets.
    pub sock_origins: u32,
    /// Flow entries of the packet programs, two for each flow.
    pub conntrack: u32,
    /// Masquerade entries of the packet programs, two for each masqueraded flow.
    pub nat: u32,
    /// Open TCP connections through services.
    pub sock_connections: u32,
}

impl Default for Sizes {
    /// 65,536 services and backends, 131,072 frontends, 262,144 slots, 131,072 and 65,536 flow entries:
    /// about 45 MiB of kernel memory.
    fn default() -> Self {
        Self {
            services: 65_536,
            backends: 65_536,
            slots: 262_144,
            frontends: 131_072,
            sock_origins: 16_384,
            conntrack: 131_072,
            nat: 65_536,
            sock_connections: 131_072,
        }
    }
}

/// Where to load to.
#[derive(Clone, Debug)]
pub struct Config {
    /// A directory on a bpffs; made if it is missing.
    pub bpffs_root: PathBuf,
    /// The cgroup v2 directory whose sockets are served.
    pub cgroup_root: PathBuf,
    /// Sizes of the maps.
    pub sizes: Sizes,
    /// What the programs log: 0 nothing, 1 errors, up to 5 everything. Costs nothing at 0.
    pub ebpf_log_level: u8,
}

/// Why the kernel side could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    /// A file operation failed.
    #[error("{operation} {}: {source}", path.display())]
    Io {
        /// What was tried.
        operation: &'static str,
        /// On what.
        path: PathBuf,
        /// The kernel's answer.
        source: std::io::Error,
    },
    /// The path is not on a bpffs.
    #[error("{} is not on a bpffs: mount one there (mount -t bpf bpf DIR) or choose another with --bpffs-root", .0.display())]
    NotBpffs(PathBuf),
    /// The path is not in a cgroup v2 hierarchy.
    #[error("{} is not in a cgroup v2 hierarchy: choose another with --cgroup-root", .0.display())]
    NotCgroup2(PathBuf),
    /// Nothing of the kind is mounted.
    #[error("no {0} is mounted")]
    NoMount(&'static str),
    /// A pinned map is not what this build expects.
    #[error(
        "pinned map {}: {field} is {found}, this build expects {expected}; \
         run `beeline cleanup` to start afresh (this interrupts Services until the agent is back)",
        path.display()
    )]
    Shape {
        /// The pin.
        path: PathBuf,
        /// What differs.
        field: &'static str,
        /// As pinned.
        found: String,
        /// As in this build.
        expected: String,
    },
    /// The verifier refused a program.
    #[error(
        "kernel refused program {program}: {source}; last lines of the verifier's log:\n{tail}\n(whole log: {log})"
    )]
    Refused {
        /// Its name.
        program: String,
        /// The kernel's answer.
        source: std::io::Error,
        /// The end of the log.
        tail: String,
        /// Where the log is.
        log: String,
    },
    /// The object file lacks something: a broken build.
    #[error("the embedded object has no {0}")]
    Missing(String),
    /// aya failed to load the object.
    #[error("loading the eBPF object: {0}")]
    Load(#[from] aya::EbpfError),
    /// A program operation failed.
    #[error("program {program}: {source}")]
    Program {
        /// Its name.
        program: String,
        /// The cause.
        source: aya::programs::ProgramError,
    },
    /// A map operation failed.
    #[error("map {map}: {source}")]
    Map {
        /// Its name.
        map: String,
        /// The cause.
        source: aya::maps::MapError,
    },
}

/// An attached program.
#[derive(Clone, Debug, Serialize)]
pub struct ProgramInfo {
    /// Its name, and that of its link's pin.
    pub name: String,
    /// The kernel's id.
    pub id: u32,
    /// Instructions that the verifier walked through; 0 where the kernel does not tell (before 5.16).
    pub verified_instructions: u32,
    /// True if it took the place of an older one below the same link.
    pub replaced: bool,
}

/// What was found and done when the kernel side was opened.
#[derive(Clone, Debug, Serialize)]
pub struct Info {
    /// `uname -r`.
    pub kernel_release: String,
    /// Features that make a difference, and whether this kernel has them.
    pub features: Vec<(&'static str, bool)>,
    /// Attached programs.
    pub programs: Vec<ProgramInfo>,
    /// Programs for devices; which devices have them is known only later.
    pub packet_programs: Vec<ProgramInfo>,
    /// Where maps and links are pinned.
    pub pin_dir: PathBuf,
    /// The cgroup whose sockets are served.
    pub cgroup_root: PathBuf,
    /// What an operator should know, such as a map that kept another size than asked for.
    pub warnings: Vec<String>,
}

/// The kernel side, set up.
#[derive(Debug)]
pub struct Kernel {
    ebpf: Ebpf,
    nic: NicPrograms,
    info: Info,
    log_level: u8,
}

impl Kernel {
    /// Loads the programs, takes over or makes the maps, and attaches. Until the programs are swapped, which is atomic
    /// for each, an earlier agent's go on. Maps of another size than asked for get that size if what they hold fits.
    ///
    /// # Errors
    ///
    /// If a directory is not what it should be, a pinned map has another shape, or the kernel refuses something. What
    /// was running before goes on then.
    pub fn open(config: &Config) -> Result<Self, KernelError> {
        Self::open_observed(config, &mut |_| Ok(()))
    }

    /// As [`Kernel::open`], and says behind each [`Step`] that it is done. An error of the observer ends it there, with
    /// what is in the kernel as if this process had been killed, but for what nothing uses.
    ///
    /// # Errors
    ///
    /// As [`Kernel::open`], and what the observer gives.
    pub fn open_observed(
        config: &Config,
        observe: &mut dyn FnMut(Step) -> Result<(), KernelError>,
    ) -> Result<Self, KernelError> {
        let pin_dir = pins::prepare(&config.bpffs_root)?;
        mounts::check_cgroup2(&config.cgroup_root)?;
        if let Some(left_over) = Resize::left_over(&pin_dir)? {
            // in the sizes of then; what is asked for now comes next
            let changes = pins::check(&pin_dir, &object::specs(config.sizes))?;
            drop(Self::load(config, &pin_dir, &changes, Some(left_over), observe)?);
        }
        let changes = pins::check(&pin_dir, &object::specs(config.sizes))?;
        let (possible, warnings) = resize::decide(&pin_dir, changes.clone())?;
        let resize = match &possible[..] {
            [] => None,
            changes => Some(Resize::begin(&pin_dir, changes)?),
        };
        let loaded = Self::load(config, &pin_dir, &changes, resize, observe);
        if loaded.is_err() {
            resize::discard(&pin_dir)?;
        }
        let mut kernel = loaded?;
        kernel.info.warnings.extend(warnings);
        observe(Step::Done)?;
        Ok(kernel)
    }

    /// `changes` are the maps that have another size than asked for; those that `resize` does not know keep theirs.
    fn load(
        config: &Config,
        pin_dir: &Path,
        changes: &[Change],
        mut resize: Option<Resize>,
        observe: &mut dyn FnMut(Step) -> Result<(), KernelError>,
    ) -> Result<Self, KernelError> {
        let release = mounts::kernel_release()?;
        let have_set_retval = mounts::release_at_least(&release, (5, 18));
        let have_tcx = mounts::release_at_least(&release, (6, 6));

        let mut loader = EbpfLoader::new();
        let set_retval = u32::from(have_set_retval);
        loader.override_global("HAVE_SET_RETVAL", &set_retval, true);
        let host_netns = mounts::netns_cookie()?;
        loader.override_global("HOST_NETNS", &host_netns, true);
        loader.override_global(aya_log::LEVEL, &config.ebpf_log_level, false);
        let mut places = Vec::new();
        for spec in object::specs(config.sizes) {
            let new = resize.as_ref().and_then(|resize| resize.path(spec.name));
            let kept = changes.iter().find(|change| change.spec.name == spec.name);
            let kept = kept.filter(|_| new.is_none()).map(|change| change.from);
            places.push(MapPlace {
                name: spec.name,
                max_entries: kept.or(spec.max_entries),
                path: new.unwrap_or_else(|| pins::map_path(pin_dir, spec.name)),
            });
        }
        place(&mut loader, &places);
        let mut ebpf = loader.load(object::bytes())?;
        let mut nic = nic::load(config, &places)?;
        observe(Step::Created)?;
        attach::load(&mut ebpf)?;
        nic.load_programs()?;
        observe(Step::Loaded)?;
        if let Some(resize) = &mut resize {
            resize.copy()?;
            observe(Step::Copied)?;
            resize.ready()?;
            observe(Step::Ready)?;
        }
        let mut attach = || {
            nic::replace(&mut nic, pin_dir, observe)?;
            attach::attach(&ebpf, pin_dir, &config.cgroup_root, observe)
        };
        let programs = match &resize {
            Some(resize) => resize.mirrored(attach)?,
            None => attach()?,
        };
        if let Some(resize) = resize {
            resize.finish(observe)?;
        }
        let nic = NicPrograms::new(nic, pin_dir);
        let info = Info {
            kernel_release: release,
            features: vec![
                ("refusal as ECONNREFUSED (5.18)", have_set_retval),
                (
                    "packet programs by links, not filters below clsact (6.6)",
                    have_tcx,
                ),
            ],
            programs,
            packet_programs: nic.info()?,
            pin_dir: pin_dir.into(),
            cgroup_root: config.cgroup_root.clone(),
            warnings: Vec::new(),
        };
        Ok(Self {
            ebpf,
            nic,
            info,
            log_level: config.ebpf_log_level,
        })
    }

    /// What was found and done.
    #[must_use]
    pub const fn info(&self) -> &Info {
        &self.info
    }

    /// The maps, for the programmer.
    ///
    /// # Errors
    ///
    /// If a pin is gone or cannot be mapped.
    pub fn maps(&self) -> Result<RealMaps, KernelError> {
        RealMaps::open(&self.info.pin_dir)
    }

    /// What holds for the whole node.
    ///
    /// # Errors
    ///
    /// If a pin is gone or cannot be mapped.
    pub fn node_tables(&self) -> Result<NodeTables, KernelError> {
        NodeTables::open(&self.info.pin_dir)
    }

    /// Whose packets to the world get the node's address.
    ///
    /// # Errors
    ///
    /// If the pin is gone.
    pub fn masquerade_table(&self) -> Result<MasqueradeTable, KernelError> {
        MasqueradeTable::open(&self.info.pin_dir)
    }

    /// The pods of this node whose devices are ours.
    ///
    /// # Errors
    ///
    /// If a pin is gone.
    pub fn pod_table(&self) -> Result<PodTable, KernelError> {
        PodTable::open(&self.info.pin_dir)
    }

    /// The packet programs, for devices.
    #[must_use]
    pub fn nic(&self) -> NicPrograms {
        self.nic.clone()
    }

    /// Flows of services (`CONNTRACK`).
    ///
    /// # Errors
    ///
    /// If the pin is gone or cannot be read.
    pub fn flows(&self) -> Result<FlowTable, KernelError> {
        FlowTable::open(&self.info.pin_dir, map_name::CONNTRACK)
    }

    /// Masqueraded flows (`NAT`).
    ///
    /// # Errors
    ///
    /// If the pin is gone or cannot be read.
    pub fn masqueraded_flows(&self) -> Result<FlowTable, KernelError> {
        FlowTable::open(&self.info.pin_dir, map_name::NAT)
    }

    /// Which devices the packet programs serve.
    ///
    /// # Errors
    ///
    /// If the pin is gone or cannot be read.
    pub fn device_table(&self) -> Result<DeviceTable, KernelError> {
        DeviceTable::open(&self.info.pin_dir)
    }

    /// What the programs counted of each backend and service.
    ///
    /// # Errors
    ///
    /// If the pin is gone or cannot be mapped.
    pub fn stats(&self) -> Result<StatsReader, KernelError> {
        StatsReader::open(&self.info.pin_dir)
    }

    /// Rows of backends, and what connections saw of them.
    ///
    /// # Errors
    ///
    /// If a pin is gone or cannot be mapped.
    pub fn backends(&self) -> Result<BackendReader, KernelError> {
        BackendReader::open(&self.info.pin_dir)
    }

    /// Where connected sockets were sent to.
    ///
    /// # Errors
    ///
    /// If a pin is gone or cannot be opened.
    pub fn translations(&self) -> Result<Translations, KernelError> {
        Translations::open(&self.info.pin_dir)
    }

    /// What the programs tell. There may be one of these at a time. To be called inside a tokio runtime.
    ///
    /// # Errors
    ///
    /// If the pin is gone or cannot be opened.
    pub fn events(&self) -> Result<Events, KernelError> {
        Events::open(&self.info.pin_dir)
    }

    /// Every counter by name, summed over CPUs.
    ///
    /// # Errors
    ///
    /// If the pin is gone or cannot be read.
    pub fn counters(&self) -> Result<Vec<(&'static str, u64)>, KernelError> {
        self.counter_reader().read()
    }

    /// Reads the counters, from another thread too.
    #[must_use]
    pub fn counter_reader(&self) -> CounterReader {
        CounterReader {
            pin_dir: self.info.pin_dir.clone(),
        }
    }

    /// Runs a packet program on a packet that comes (or leaves) by the loopback device, `repeat` times in a row: for tests
    /// and measurements. The device's row in `DEVICES` says which program. The maps change as they would for a real packet.
    ///
    /// # Errors
    ///
    /// If the kernel refuses the packet.
    pub fn run_packet(
        &self,
        direction: Direction,
        packet: &[u8],
        mark: u32,
        repeat: u32,
    ) -> Result<PacketRun, KernelError> {
        self.nic.run(direction, packet, mark, repeat)
    }

    /// Passes what the programs log on to `tracing`, in a task of its own; does nothing when they log nothing. To be
    /// called inside a tokio runtime.
    pub fn forward_logs(&mut self) {
        if self.log_level > 0 {
            logs::forward(&mut self.ebpf);
        }
    }
}

/// Where a map is pinned while the objects are loaded, and its size.
struct MapPlace {
    name: &'static str,
    max_entries: Option<u32>,
    path: PathBuf,
}

/// Makes an object use the maps that are pinned at these places, or make them there: all objects share them.
fn place<'a>(loader: &mut EbpfLoader<'a>, places: &'a [MapPlace]) {
    for place in places {
        if let Some(max_entries) = place.max_entries {
            loader.map_max_entries(place.name, max_entries);
        }
        loader.map_pin_path(place.name, &place.path);
    }
}

fn open_map(pin_dir: &Path, name: &str) -> Result<MapData, KernelError> {
    MapData::from_pin(pins::map_path(pin_dir, name)).map_err(|source| KernelError::Map {
        map: name.into(),
        source,
    })
}

/// Reads what the programs count.
#[derive(Clone, Debug)]
pub struct CounterReader {
    pin_dir: PathBuf,
}

impl CounterReader {
    /// Every counter by name, summed over CPUs.
    ///
    /// # Errors
    ///
    /// If the pin is gone or cannot be read.
    pub fn read(&self) -> Result<Vec<(&'static str, u64)>, KernelError> {
        let fail = |source| KernelError::Map {
            map: map_name::COUNTERS.into(),
            source,
        };
        let map = aya::maps::Map::PerCpuArray(open_map(&self.pin_dir, map_name::COUNTERS)?);
        let map: PerCpuArray<MapData, u64> = map.try_into().map_err(fail)?;
        COUNTERS
            .iter()
            .map(|&(counter, name)| {
                let values = map.get(&(counter as u32), 0).map_err(fail)?;
                Ok((
                    name,
                    values.iter().fold(0, |sum: u64, value| sum.wrapping_add(*value)),
                ))
            })
            .collect()
    }
}
