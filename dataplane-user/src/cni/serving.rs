//! What the packet programs know of pods: their addresses, their devices and their bandwidth.

use std::collections::BTreeSet;
use std::io;
use std::net::IpAddr;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use beeline_cni::protocol::Bandwidth;
use dataplane_common::abi::{Addr, Limit, Pod, PodDevice, pod_flag};
use tracing::warn;

use super::store::Device;
use crate::devices::Handle;
use crate::kernel::{KernelError, PodTable};

/// Tells the packet programs of pods.
#[derive(Debug)]
pub struct Serving {
    table: Mutex<PodTable>,
    short: bool,
    devices: Handle,
}

/// How long a pod waits for its device to get its programs: without them it lacks what they do for a moment more.
const PATIENCE: Duration = Duration::from_secs(2);

/// As the programs want it: the first address of each family.
fn rows(
    device: &Device,
    index: u32,
    ips: &[IpAddr],
    bandwidth: Option<&Bandwidth>,
    flags: u32,
) -> (Pod, PodDevice) {
    let first = |v4: bool| ips.iter().find(|ip| ip.is_ipv4() == v4);
    let addr = |v4| first(v4).map_or_else(Addr::default, |ip| (*ip).into());
    let pod = Pod {
        ifindex: index,
        flags,
        mtu: device.mtu,
        mac: device.mac.0,
        host_mac: device.host_mac.0,
    };
    let device = PodDevice {
        v4: addr(true),
        v6: addr(false),
        flags,
        pad: 0,
        // the plugins' words are the pod's: what enters it, what leaves it
        out: bandwidth.map_or_else(Limit::default, |b| {
            Limit::from_bits(b.egress_rate, b.egress_burst)
        }),
        into: bandwidth.map_or_else(Limit::default, |b| {
            Limit::from_bits(b.ingress_rate, b.ingress_burst)
        }),
    };
    (pod, device)
}

fn failed(error: KernelError) -> io::Error {
    io::Error::other(error)
}

impl Serving {
    /// `short`: packets between pods go past the node's routing and netfilter.
    #[must_use]
    pub const fn new(table: PodTable, short: bool, devices: Handle) -> Self {
        Self {
            table: Mutex::new(table),
            short,
            devices,
        }
    }

    fn table(&self) -> MutexGuard<'_, PodTable> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Begins to serve a pod.
    pub(super) fn begin(
        &self,
        device: &Device,
        index: u32,
        ips: &[IpAddr],
        bandwidth: Option<&Bandwidth>,
    ) -> io::Result<()> {
        let flags = if self.short { pod_flag::SHORT } else { 0 };
        let (pod, row) = rows(device, index, ips, bandwidth, flags);
        self.table().put(&pod, &row).map_err(failed)
    }

    /// Has a device that was just made served before its pod can send.
    pub(super) fn attach(&self, device: &Device) {
        if !self.devices.serve(PATIENCE) {
            warn!(device = device.name, "its programs come later than its pod");
        }
    }

    /// Ends it.
    pub(super) fn end(&self, ips: &[IpAddr]) -> io::Result<()> {
        let addrs: Vec<Addr> = ips.iter().map(|ip| (*ip).into()).collect();
        self.table().remove(&addrs).map_err(failed)
    }

    /// Ends it for all but the pods of these devices.
    pub(super) fn retain(&self, known: &BTreeSet<u32>) -> io::Result<()> {
        self.table().retain(known).map_err(failed)
    }
}
