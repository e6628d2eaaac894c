//! The devices that the packet programs serve: which these are, followed while the agent runs, and the ports that
//! masqueraded packets get there.

mod host;
mod ports;
mod select;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use dataplane_common::abi::{Device, device_flag};
use ipnet::IpNet;
use tokio::sync::mpsc;
use tokio::sync::watch::Receiver;
use tokio::time::Instant;
use tracing::{debug, error, info, warn};

use crate::agent::node::{NAT_PORTS, Ranges};
use crate::kernel::{DeviceTable, KernelError, NicPrograms};
use host::Host;
pub use ports::release as release_ports;
pub use select::{DetectLocal, Wanted};
use select::{Seen, select};

/// Pause before what failed is tried again.
const RETRY: Duration = Duration::from_secs(5);

/// Settings.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Which devices that lead to other hosts.
    pub wanted: Wanted,
    /// Which are pods'.
    pub local: DetectLocal,
    /// Where what has to be undone is remembered.
    pub state_dir: PathBuf,
}

/// Somebody waits until what is there now is served.
type Request = std::sync::mpsc::SyncSender<()>;

/// Asks for new devices to be served before they are noticed.
#[derive(Clone, Debug)]
pub struct Handle(mpsc::UnboundedSender<Request>);

impl Handle {
    /// Waits until the devices that there are now have their programs, for `limit` at most. False if that took longer; they
    /// get them later then. For threads of no runtime.
    #[must_use]
    pub fn serve(&self, limit: Duration) -> bool {
        let (sender, done) = std::sync::mpsc::sync_channel(1);
        self.0.send(sender).is_ok() && done.recv_timeout(limit).is_ok()
    }
}

/// The devices that are served. What is attached stays attached when this is dropped.
#[derive(Debug)]
pub struct Devices {
    settings: Settings,
    programs: NicPrograms,
    table: DeviceTable,
    /// Index, and name and flags when it was attached.
    attached: BTreeMap<u32, (String, u16)>,
    requests: (mpsc::UnboundedSender<Request>, mpsc::UnboundedReceiver<Request>),
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
            requests: mpsc::unbounded_channel(),
        }
    }

    /// For those who make devices.
    #[must_use]
    pub fn handle(&self) -> Handle {
        Handle(self.requests.0.clone())
    }

    /// Serves the devices of this network namespace and follows their coming and going, and the Node's addresses and ranges,
    /// until the sender of one of those is gone. Never gives up: what fails is logged and tried again. `served` is told
    /// after each round whether all of them are served.
    pub async fn follow(
        mut self,
        mut node: Receiver<Option<Vec<IpAddr>>>,
        mut ranges: Receiver<Ranges>,
        served: impl Fn(bool),
    ) {
        if let Err(error) = ports::reserve(&self.settings.state_dir, NAT_PORTS) {
            // nobody gets these ports by default
            warn!(%error, "the ports {} to {} cannot be reserved for masquerading", NAT_PORTS.0, NAT_PORTS.1);
        }
        warn_without_forwarding();
        let mut host: Option<Host> = None;
        let mut waiting: Vec<Request> = Vec::new();
        loop {
            while let Ok(request) = self.requests.1.try_recv() {
                waiting.push(request);
            }
            let result = self.round(&mut host, &mut node, &mut ranges).await;
            served(result.is_ok());
            for request in waiting.drain(..).filter(|_| result.is_ok()) {
                // who has waited too long does not listen any more
                let _unheard = request.try_send(());
            }
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
                changed = async { tokio::select! { node = node.changed() => node, ranges = ranges.changed() => ranges } } => {
                    match changed {
                        Ok(()) => true,
                        Err(_) => return,
                    }
                }
                request = self.requests.1.recv() => {
                    waiting.extend(request);
                    true
                }
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
        ranges: &mut Receiver<Ranges>,
    ) -> Result<(), Failure> {
        let host = match host {
            Some(host) => host,
            None => host.insert(Host::open()?),
        };
        let seen = host.seen().await?;
        let node = node.borrow_and_update().clone();
        let ranges = ranges.borrow_and_update().pods.clone();
        self.apply(&seen, node.as_deref(), &ranges.unwrap_or_default())
    }

    /// Serves exactly the devices that should be; while the Node is not known, what is served already stays, too.
    fn apply(&mut self, seen: &Seen, node: Option<&[IpAddr]>, ranges: &[IpNet]) -> Result<(), Failure> {
        let Settings { wanted, local, .. } = &self.settings;
        let chosen = select(seen, wanted, local, node.unwrap_or_default(), ranges);
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
            let (name, _) = self.attached.remove(&index).unwrap_or_default();
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
        let with = self.attached.get(&index);
        if with.is_none_or(|(known, flags)| known != name || *flags != device.flags) {
            let hook = self.programs.attach(index, None)?;
            let pod = device.flags & device_flag::POD != 0;
            info!(device = name, index, ?hook, pod, v4 = %device.v4, v6 = %device.v6, "device is served");
            self.attached.insert(index, (name.into(), device.flags));
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
