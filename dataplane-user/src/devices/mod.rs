//! The devices that the packet programs serve: which these are, followed while the agent runs, and the ports that
//! masqueraded packets get there.

mod host;
mod ports;
mod select;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use dataplane_common::abi::Device;
use tokio::sync::watch::Receiver;
use tokio::time::Instant;
use tracing::{debug, error, info, warn};

use crate::agent::node::NAT_PORTS;
use crate::kernel::{DeviceTable, KernelError, NicPrograms};
use host::Host;
pub use ports::release as release_ports;
pub use select::Wanted;
use select::{Seen, select};

/// Pause before what failed is tried again.
const RETRY: Duration = Duration::from_secs(5);

/// Settings.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Which devices.
    pub wanted: Wanted,
    /// Where what has to be undone is remembered.
    pub state_dir: PathBuf,
}

/// The devices that are served. What is attached stays attached when this is dropped.
#[derive(Debug)]
pub struct Devices {
    settings: Settings,
    programs: NicPrograms,
    table: DeviceTable,
    /// Index, and name when it was attached.
    attached: BTreeMap<u32, String>,
}

impl Devices {
    /// Takes over what an earlier agent left.
    #[must_use]
    pub fn new(settings: Settings, programs: NicPrograms, table: DeviceTable) -> Self {
        Self {
            settings,
            programs,
            table,
            attached: BTreeMap::new(),
        }
    }

    /// Serves the devices of this network namespace and follows their coming and going, and the Node's addresses, until
    /// the sender of those is gone. Never gives up: what fails is logged and tried again. `served` is told after each round
    /// whether all of them are served.
    pub async fn follow(mut self, mut node: Receiver<Option<Vec<IpAddr>>>, served: impl Fn(bool)) {
        if let Err(error) = ports::reserve(&self.settings.state_dir, NAT_PORTS) {
            // nobody gets these ports by default
            warn!(%error, "the ports {} to {} cannot be reserved for masquerading", NAT_PORTS.0, NAT_PORTS.1);
        }
        warn_without_forwarding();
        let mut host: Option<Host> = None;
        loop {
            let result = self.round(&mut host, &mut node).await;
            served(result.is_ok());
            let retry_at = result.err().map(|error| {
                error!(%error, "the devices cannot all be served as they should be");
                Instant::now() + RETRY
            });
            let changed = async {
                match &mut host {
                    Some(host) => host.changed().await,
                    None => std::future::pending().await,
                }
            };
            let alive = tokio::select! {
                alive = changed => alive,
                () = tokio::time::sleep_until(retry_at.unwrap_or_else(Instant::now)), if retry_at.is_some() => true,
                node = node.changed() => match node {
                    Ok(()) => true,
                    Err(_) => return,
                },
            };
            if !alive {
                host = None;
                tokio::time::sleep(RETRY).await;
            }
        }
    }

    async fn round(
        &mut self,
        host: &mut Option<Host>,
        node: &mut Receiver<Option<Vec<IpAddr>>>,
    ) -> Result<(), Failure> {
        let host = match host {
            Some(host) => host,
            None => host.insert(Host::open()?),
        };
        let seen = host.seen().await?;
        let node = node.borrow_and_update().clone();
        self.apply(&seen, node.as_deref())
    }

    /// Serves exactly the devices that should be; while the Node is not known, what is served already stays, too.
    fn apply(&mut self, seen: &Seen, node: Option<&[IpAddr]>) -> Result<(), Failure> {
        let chosen = select(seen, &self.settings.wanted, node.unwrap_or_default());
        let rows = self.table.rows()?;
        let mut result = Ok(());
        for (index, device) in &chosen {
            let name = seen.name(*index);
            if let Err(error) = self.serve(*index, name, device, rows.get(index)) {
                result = Err(Failure::Device(name.into(), error.into()));
            }
        }
        let known: BTreeSet<u32> = rows.keys().copied().chain(self.programs.attached()?).collect();
        for index in known.into_iter().filter(|index| !chosen.contains_key(index)) {
            if node.is_none() && seen.has(index) {
                continue;
            }
            let name = self.attached.remove(&index).unwrap_or_default();
            if let Err(error) = self
                .programs
                .detach(index)
                .and_then(|()| self.table.remove(index))
            {
                result = Err(Failure::Device(name, error.into()));
                continue;
            }
            info!(device = name, index, "device is served no more");
        }
        result
    }

    fn serve(
        &mut self,
        index: u32,
        name: &str,
        device: &Device,
        row: Option<&Device>,
    ) -> Result<(), KernelError> {
        if row != Some(device) {
            self.table.put(index, device)?;
            debug!(device = name, index, ?device, "addresses of the device");
        }
        if self.attached.get(&index).map(String::as_str) != Some(name) {
            let hook = self.programs.attach(index, None)?;
            info!(device = name, index, ?hook, v4 = %device.v4, v6 = %device.v6, "device is served");
            self.attached.insert(index, name.into());
        }
        Ok(())
    }
}

/// Packets for backends elsewhere, and for pods, are the kernel's to forward. kube-proxy leaves the setting alone, too.
fn warn_without_forwarding() {
    for (family, setting) in [
        ("IPv4", "net/ipv4/ip_forward"),
        ("IPv6", "net/ipv6/conf/all/forwarding"),
    ] {
        let value = std::fs::read_to_string(format!("/proc/sys/{setting}"));
        if value.is_ok_and(|value| value.trim() == "0") {
            warn!(
                "{} is 0: other hosts reach no pods of {family} through this node",
                setting.replace('/', ".")
            );
        }
    }
}

/// Why devices are not served as they should be.
#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error("open a netlink socket: {0}")]
    Open(#[from] std::io::Error),
    #[error("read the devices of this host: {0}")]
    Read(#[from] rtnetlink::Error),
    #[error("device {0}: {1}")]
    Device(String, Box<KernelError>),
    #[error(transparent)]
    Kernel(#[from] KernelError),
}
