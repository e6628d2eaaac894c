//! A cgroup and a pin directory of a test's own.
#![allow(dead_code, reason = "each test binary uses its own part")]
#![allow(clippy::unwrap_used, reason = "a test that cannot be set up fails")]

pub(crate) mod net;
pub(crate) mod plane;
pub(crate) mod python;

use std::fs;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};

use dataplane_common::abi::{BePort, FrontendKey, frontend_kind, service_flag};
use dataplane_model::program::Programmer;
use dataplane_model::{
    BackendKey, BackendState, DesiredService, Family, ObjectName, Protocol, ServiceConfig, ServiceKey,
    SetBackend,
};
use dataplane_user::kernel::{Config, Kernel, ProgramInfo, RealMaps, Sizes, cleanup, mounts};

static NEXT: AtomicU32 = AtomicU32::new(0);

/// Where one kernel side of a test lives; removed on drop.
pub(crate) struct Place {
    pub(crate) config: Config,
}

impl Place {
    pub(crate) fn new() -> Self {
        assert!(
            nix::unistd::geteuid().is_root(),
            "this test needs root: it loads eBPF programs"
        );
        let name = format!(
            "bl{}-{}",
            std::process::id(),
            NEXT.fetch_add(1, Ordering::Relaxed)
        );
        let bpffs_root = mounts::discover_or_mount_bpffs().unwrap().join(&name);
        let cgroup_root = mounts::discover_cgroup2().unwrap().join(&name);
        fs::create_dir(&cgroup_root).unwrap();
        let sizes = Sizes {
            services: 64,
            backends: 64,
            slots: 256,
            frontends: 64,
            sock_origins: 64,
            conntrack: 4096,
            nat: 4096,
            sock_connections: 1024,
        };
        Self {
            config: Config {
                bpffs_root,
                cgroup_root,
                sizes,
                ebpf_log_level: 0,
            },
        }
    }

    pub(crate) fn pin_dir(&self) -> PathBuf {
        self.config
            .bpffs_root
            .join(format!("v{}", dataplane_common::abi::ABI_VERSION))
    }

    pub(crate) fn open(&self) -> (Kernel, Programmer<RealMaps>) {
        let kernel = Kernel::open(&self.config).unwrap();
        let programmer = Programmer::new(kernel.maps().unwrap()).unwrap();
        (kernel, programmer)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let removed = cleanup(&self.config.bpffs_root);
        // processes of the cgroup are children that have been waited for
        let gone = fs::remove_dir(&self.config.cgroup_root);
        if !std::thread::panicking() {
            removed.unwrap();
            gone.unwrap();
        }
    }
}

/// The links that hold these programs now.
pub(crate) fn link_ids(kernel: &Kernel) -> Vec<u32> {
    let links: Vec<_> = aya::programs::loaded_links().filter_map(Result::ok).collect();
    let id_of = |program: &ProgramInfo| {
        let link = links.iter().find(|link| link.program_id() == program.id);
        link.map(aya::programs::links::LinkInfo::id).unwrap()
    };
    kernel.info().programs.iter().map(id_of).collect()
}

pub(crate) fn key(name: &str, protocol: Protocol, family: Family) -> ServiceKey {
    ServiceKey {
        service: ObjectName::new("default", name),
        port_name: "".into(),
        protocol,
        family,
    }
}

pub(crate) fn frontend(addr: &str, port: u16, protocol: Protocol) -> FrontendKey {
    let addr: std::net::IpAddr = addr.parse().unwrap();
    FrontendKey {
        addr: addr.into(),
        port: BePort::from_host(port),
        protocol: protocol.number(),
        class: 0,
    }
}

/// A service at a frontend with these backends in its cluster set.
pub(crate) fn service(front: FrontendKey, backends: &[std::net::SocketAddr]) -> DesiredService {
    let protocol = Protocol::from_number(front.protocol).unwrap();
    let member = |addr: &std::net::SocketAddr| SetBackend {
        backend: BackendKey {
            addr: addr.ip().into(),
            port: BePort::from_host(addr.port()),
            protocol,
        },
        state: BackendState::Active,
        local: false,
    };
    let mut cluster: Vec<SetBackend> = backends.iter().map(member).collect();
    cluster.sort();
    DesiredService {
        frontends: [(front, frontend_kind::CLUSTER_IP)].into(),
        cluster,
        local: vec![],
        config: ServiceConfig {
            flags: service_flag::HAS_ENDPOINTS,
            ..ServiceConfig::default()
        },
        source_ranges: Box::default(),
    }
}
