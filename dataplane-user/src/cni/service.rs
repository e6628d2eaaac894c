//! What the agent does for each request of the plugin.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io;
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use beeline_cni::protocol::{
    Add, Added, Address, Check, DEFAULT_STATE_DIR, Del, Failure, Gc, Key, List, RELEASES, Request, Response,
    code,
};
use ipnet::IpNet;
use tokio::sync::watch;
use tracing::{info, warn};

use super::device::{self, Wish};
use super::netns;
use super::serving::Serving;
use super::store::{self, Attachment, Store};
use crate::ipam::{self, Ipam, IpamError, Use};
use crate::overlay::{View, sysctl};
use crate::persist::Faults;

/// Settings.
#[derive(Clone, Debug)]
pub struct Config {
    /// Where attachments, addresses and what the plugin left are kept.
    pub state_dir: PathBuf,
    /// How long an address waits before it is given out again.
    pub quarantine: Duration,
    /// Directory of host-local whose addresses other pods have.
    pub host_local: Option<PathBuf>,
    /// For tests.
    pub faults: Faults,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            state_dir: DEFAULT_STATE_DIR.into(),
            quarantine: Duration::from_secs(60),
            host_local: Some("/var/lib/cni/networks/cbr0".into()),
            faults: Faults::default(),
        }
    }
}

/// Serves requests from any number of threads, which must be in the node's network namespace.
#[derive(Debug)]
pub struct Service {
    config: Config,
    network: watch::Receiver<View>,
    /// The packet programs, if there are any.
    serving: Option<Serving>,
    state: Mutex<State>,
    idle: Condvar,
    changed: watch::Sender<u64>,
}

#[derive(Debug)]
struct State {
    store: Store,
    ipam: Ipam,
    /// Attachments that a thread works on.
    busy: BTreeSet<Key>,
}

/// An attachment that no other thread may touch meanwhile.
struct Turn<'a> {
    service: &'a Service,
    key: Key,
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        self.service.lock().busy.remove(&self.key);
        self.service.idle.notify_all();
    }
}

fn ipam_failure(error: &IpamError) -> Failure {
    let code = match error {
        IpamError::Full { .. } | IpamError::NoRange => code::TRY_AGAIN,
        IpamError::Requested { .. } => code::BAD_CONFIG,
        IpamError::Io { .. } => code::IO,
        _ => code::FAILED,
    };
    Failure::because(code, "no address for the pod", error)
}

impl Service {
    /// Reads what is known and removes what an ADD that was cut off left, and what went with a reboot. The calling thread
    /// must be in the node's network namespace.
    ///
    /// # Errors
    ///
    /// When the state cannot be read or the kernel not be asked.
    pub fn open(
        config: Config,
        network: watch::Receiver<View>,
        serving: Option<Serving>,
    ) -> io::Result<Self> {
        let mut store = Store::open(config.state_dir.join("attachments"), config.faults.clone())?;
        let devices = device::all()?;
        let boot = store::boot_id();
        for (key, attachment) in store.all().clone() {
            let gone = match &attachment.device {
                Some(device) => !devices.contains_key(&device.name),
                None => attachment.boot != boot,
            };
            if gone {
                info!(%key, "its device is gone: it is released");
                store.remove(&key)?;
            }
        }
        let known: BTreeSet<&str> = store
            .all()
            .values()
            .filter_map(|a| a.device.as_ref())
            .map(|d| d.name.as_str())
            .collect();
        for name in devices
            .keys()
            .filter(|name| store::is_device(name) && !known.contains(name.as_str()))
        {
            info!(device = name, "no attachment knows it: it is removed");
            device::remove(name)?;
        }
        let ipam_config = ipam::Config {
            file: config.state_dir.join("addresses.json"),
            cidrs: network.borrow().subnets.clone(),
            quarantine: config.quarantine,
            host_local: config.host_local.clone(),
            faults: config.faults.clone(),
        };
        let ipam = match Ipam::open(ipam_config.clone()) {
            Err(error @ IpamError::Corrupt { .. }) => {
                warn!(%error, "it is put aside and made anew from the attachments");
                Ipam::rebuild(ipam_config)
            }
            other => other,
        };
        let mut ipam = ipam.map_err(io::Error::other)?;
        ipam.retain(|key| store.get(key).is_some())
            .map_err(io::Error::other)?;
        for attachment in store
            .all()
            .values()
            .filter(|attachment| attachment.device.is_some())
        {
            if let Err(error) = ipam.adopt(&attachment.key, &attachment.ips) {
                warn!(key = %attachment.key, %error, "two attachments have one address");
            }
        }
        if let Some(serving) = &serving
            && let Err(error) = serve_again(serving, &store, &devices)
        {
            warn!(%error, "the packet programs do not know all pods: some are not limited, and take the long way");
        }
        let state = State {
            store,
            ipam,
            busy: BTreeSet::new(),
        };
        let service = Self {
            config,
            network,
            serving,
            state: Mutex::new(state),
            idle: Condvar::new(),
            changed: watch::Sender::new(0),
        };
        service.take_releases();
        Ok(service)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // State is changed in single steps: a thread that panicked left none half done.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn turn(&self, key: &Key) -> Turn<'_> {
        let mut state = self.lock();
        while !state.busy.insert(key.clone()) {
            state = self.idle.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        Turn {
            service: self,
            key: key.clone(),
        }
    }

    /// All attachments, as they are now.
    #[must_use]
    pub fn attachments(&self) -> Vec<Attachment> {
        self.lock().store.all().values().cloned().collect()
    }

    /// Changes with each change of [`Service::attachments`].
    #[must_use]
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.changed.subscribe()
    }

    fn note_change(&self) {
        self.changed.send_modify(|count| *count = count.wrapping_add(1));
    }

    /// Answers a request; `netns` came with it.
    pub fn answer(&self, request: Request, netns: Option<&File>) -> Response {
        let answer = match request {
            Request::Add(add) => self.add(&add, netns).map(Response::Added),
            Request::Del(del) => self.del(&del.key).map(|()| Response::Done),
            Request::Check(check) => self.check(&check, netns).map(|()| Response::Done),
            Request::Gc(gc) => self.gc(&gc).map(|()| Response::Done),
            Request::Status => self.status().map(|()| Response::Done),
            Request::List => self.list().map(Response::List),
        };
        answer.unwrap_or_else(Response::Failed)
    }

    fn add(&self, add: &Add, netns: Option<&File>) -> Result<Added, Failure> {
        let netns = pod_netns(netns)?;
        let turn = self.turn(&add.key);
        if self.lock().store.get(&add.key).is_some() {
            return Err(Failure::new(
                code::FAILED,
                format!("{} is attached already", add.key),
            ));
        }
        let result = match &add.chained {
            Some(chained) => self.note_chained(add, chained.ips.clone()),
            None => self.attach(add, netns),
        };
        drop(turn);
        match &result {
            Ok(added) => {
                info!(key = %add.key, pod = ?add.pod, ips = ?added.ips, "pod is attached");
                self.note_change();
            }
            Err(failure) => warn!(key = %add.key, %failure, "pod cannot be attached"),
        }
        result
    }

    fn note_chained(&self, add: &Add, ips: Vec<IpAddr>) -> Result<Added, Failure> {
        let attachment = Attachment { ips, ..record(add) };
        self.lock()
            .store
            .put(attachment)
            .map_err(|error| Failure::because(code::IO, "cannot write the attachment down", error))?;
        Ok(Added::default())
    }

    fn attach(&self, add: &Add, netns: &File) -> Result<Added, Failure> {
        let network = self.network.borrow().clone();
        let ips = {
            let mut state = self.lock();
            if state.ipam.cidrs() != network.subnets {
                state
                    .ipam
                    .set_cidrs(&network.subnets)
                    .map_err(|error| ipam_failure(&error))?;
            }
            state
                .ipam
                .allocate(&add.key, &add.ips)
                .map_err(|error| ipam_failure(&error))?
        };
        let name = store::device_name(&add.key);
        let result = self.make(add, netns, &network, &name, &ips);
        if result.is_err() {
            // in reverse; what fails here is found by the next start
            if let Err(error) = self.serve_no_more(&ips) {
                warn!(device = name, %error, "the packet programs still know the pod of a failed ADD");
            }
            if let Err(error) = device::remove(&name) {
                warn!(device = name, %error, "what is left of a failed ADD cannot be removed");
            }
            if let Err(error) = self.lock().ipam.release(&add.key) {
                warn!(key = %add.key, %error, "addresses of a failed ADD cannot be given back for good");
            }
        }
        result
    }

    fn make(
        &self,
        add: &Add,
        netns: &File,
        network: &View,
        name: &str,
        ips: &[IpAddr],
    ) -> Result<Added, Failure> {
        let failed =
            |error: io::Error| Failure::because(code::FAILED, "cannot set up the pod's device", error);
        let (v4, v6) = (ips.iter().any(IpAddr::is_ipv4), ips.iter().any(IpAddr::is_ipv6));
        sysctl::forward(&network.uplink, v4, v6).map_err(failed)?;
        let mtu = add.mtu.unwrap_or(network.mtu);
        let wish = Wish {
            name: name.to_owned(),
            ifname: add.key.ifname.clone(),
            mac: add.mac,
            mtu,
            route_mtu: network.overlay_mtu.min(mtu),
            ips: ips.to_vec(),
            subnets: network.subnets.clone(),
        };
        let serve = |device: &store::Device, index| match &self.serving {
            Some(serving) => serving
                .begin(device, index, ips, add.bandwidth.as_ref())
                .map(|()| serving.attach(device)),
            None => Ok(()),
        };
        let device = device::create(&wish, netns, &self.config.faults, serve).map_err(failed)?;
        let added = Added {
            host: Some((device.name.clone(), device.host_mac)),
            mac: Some(device.mac),
            mtu,
            ips: ips.iter().map(|ip| (*ip, device::gateway(*ip))).collect(),
        };
        let attachment = Attachment {
            device: Some(device),
            ips: ips.to_vec(),
            ..record(add)
        };
        self.lock()
            .store
            .put(attachment)
            .map_err(|error| Failure::because(code::IO, "cannot write the attachment down", error))?;
        Ok(added)
    }

    fn serve_no_more(&self, ips: &[IpAddr]) -> io::Result<()> {
        self.serving.as_ref().map_or(Ok(()), |serving| serving.end(ips))
    }

    /// Routes and device first, addresses last: nobody gets an address that packets still go to.
    fn del(&self, key: &Key) -> Result<(), Failure> {
        let _turn = self.turn(key);
        let failed = |what: &'static str| move |error: io::Error| Failure::because(code::FAILED, what, error);
        let known = self.lock().store.get(key).cloned();
        let device = known.as_ref().and_then(|attachment| attachment.device.as_ref());
        let name = device.map_or_else(|| store::device_name(key), |device| device.name.clone());
        let fault = |step| self.config.faults.check(step);
        fault("remove link")
            .and_then(|()| device::remove(&name))
            .map_err(failed("cannot remove the pod's device"))?;
        if let Some(attachment) = &known {
            self.serve_no_more(&attachment.ips)
                .map_err(failed("cannot tell the packet programs"))?;
        }
        let known = known.is_some();
        let mut state = self.lock();
        if known {
            state
                .store
                .remove(key)
                .map_err(failed("cannot forget the attachment"))?;
        }
        state.ipam.release(key).map_err(|error| ipam_failure(&error))?;
        drop(state);
        if known {
            info!(%key, "pod is detached");
            self.note_change();
        }
        Ok(())
    }

    fn check(&self, check: &Check, netns: Option<&File>) -> Result<(), Failure> {
        let wrong = |text: String| Failure::new(code::CHECK_FAILED, text);
        let _turn = self.turn(&check.key);
        let Some(attachment) = self.lock().store.get(&check.key).cloned() else {
            return Err(Failure::new(
                code::UNKNOWN_CONTAINER,
                format!("{} is not attached", check.key),
            ));
        };
        if let Some(missing) = attachment.ips.iter().find(|ip| !check.ips.contains(ip)) {
            return Err(wrong(format!("prevResult does not have address {missing}")));
        }
        match &attachment.device {
            Some(device) => device::check(device, &check.key.ifname, &attachment.ips, pod_netns(netns)?)
                .map_err(|error| wrong(error.to_string())),
            None => Ok(()),
        }
    }

    fn gc(&self, gc: &Gc) -> Result<(), Failure> {
        self.take_releases();
        let valid: BTreeSet<(&str, &str)> = gc
            .valid
            .iter()
            .map(|(id, ifname)| (id.as_str(), ifname.as_str()))
            .collect();
        let is_stale = |key: &Key| {
            key.network == gc.network && !valid.contains(&(key.container_id.as_str(), key.ifname.as_str()))
        };
        let stale: BTreeSet<Key> = {
            let state = self.lock();
            let attached = state.store.all().keys().cloned();
            let addresses = state.ipam.list().map_err(|error| ipam_failure(&error))?;
            let owners = addresses.into_values().filter_map(|used| match used {
                Use::Used(key) => Some(key),
                Use::Quarantine | Use::HostLocal(_) => None,
            });
            attached
                .chain(owners)
                .filter(|key| is_stale(key) && !state.busy.contains(key))
                .collect()
        };
        let errors: Vec<String> = stale
            .iter()
            .filter_map(|key| Some(format!("{key}: {}", self.del(key).err()?)))
            .collect();
        if errors.is_empty() {
            Ok(())
        } else {
            Err(Failure::because(
                code::FAILED,
                "not everything could be removed",
                errors.join("; "),
            ))
        }
    }

    fn status(&self) -> Result<(), Failure> {
        let network = self.network.borrow();
        if !network.subnets.is_empty() {
            return Ok(());
        }
        let cause = network
            .failure
            .clone()
            .unwrap_or_else(|| "the agent has just started".into());
        Err(Failure::because(
            code::NOT_AVAILABLE,
            "pods cannot be attached yet",
            cause,
        ))
    }

    fn list(&self) -> Result<List, Failure> {
        let subnets: Vec<IpNet> = self.network.borrow().subnets.clone();
        let state = self.lock();
        let attached: BTreeMap<IpAddr, &Attachment> = state
            .store
            .all()
            .values()
            .flat_map(|attachment| attachment.ips.iter().map(move |ip| (*ip, attachment)))
            .collect();
        let addresses = state.ipam.list().map_err(|error| ipam_failure(&error))?;
        let line = |(address, used): (IpAddr, Use)| {
            let (state, key) = match used {
                Use::Used(key) => ("used", Some(key)),
                Use::Quarantine => ("quarantine", None),
                Use::HostLocal(container_id) => {
                    let (network, ifname) = (String::new(), String::new());
                    (
                        "host-local",
                        Some(Key {
                            network,
                            container_id,
                            ifname,
                        }),
                    )
                }
            };
            let attachment = attached.get(&address).filter(|_| state == "used");
            Address {
                address,
                state: state.into(),
                key,
                pod: attachment.and_then(|a| a.pod.clone()),
                device: attachment.and_then(|a| Some(a.device.as_ref()?.name.clone())),
            }
        };
        Ok(List {
            ranges: subnets.iter().map(ToString::to_string).collect(),
            addresses: addresses.into_iter().map(line).collect(),
        })
    }

    /// Does the DELs that the plugin could not tell.
    pub fn take_releases(&self) {
        let dir = self.config.state_dir.join(RELEASES);
        let Ok(entries) = std::fs::read_dir(&dir) else {
            return;
        };
        for entry in entries.flatten() {
            let path = entry.path();
            if entry.file_name().to_string_lossy().starts_with('.') {
                continue;
            }
            let del = std::fs::read(&path).and_then(|text| Ok(serde_json::from_slice::<Del>(&text)?));
            let done = match del {
                Ok(del) => self.del(&del.key).map_err(io::Error::other),
                // no DEL, and it will not become one
                Err(error)
                    if matches!(
                        error.kind(),
                        io::ErrorKind::InvalidData | io::ErrorKind::UnexpectedEof
                    ) =>
                {
                    warn!(file = %path.display(), %error, "it is no DEL and is removed");
                    Ok(())
                }
                Err(error) => Err(error),
            };
            match done.and_then(|()| std::fs::remove_file(&path)) {
                Ok(()) => {}
                Err(error) => warn!(file = %path.display(), %error, "a DEL that was left cannot be done yet"),
            }
        }
    }
}

/// Tells the packet programs of exactly the pods that are attached.
fn serve_again(serving: &Serving, store: &Store, devices: &BTreeMap<String, u32>) -> io::Result<()> {
    let mut known = BTreeSet::new();
    for attachment in store.all().values() {
        if let Some(device) = &attachment.device
            && let Some(index) = devices.get(&device.name)
        {
            serving.begin(device, *index, &attachment.ips, attachment.bandwidth.as_ref())?;
            known.insert(*index);
        }
    }
    serving.retain(&known)
}

fn record(add: &Add) -> Attachment {
    Attachment {
        pod: add.pod.clone(),
        netns: add.netns.clone(),
        port_mappings: add.port_mappings.clone(),
        bandwidth: add.bandwidth.clone(),
        ..Attachment::new(add.key.clone())
    }
}

fn pod_netns(netns: Option<&File>) -> Result<&File, Failure> {
    let Some(netns) = netns else {
        return Err(Failure::new(
            code::BAD_ENVIRONMENT,
            "the pod's network namespace did not come with the request",
        ));
    };
    match netns::is_own(netns) {
        Ok(false) => Ok(netns),
        Ok(true) => Err(Failure::new(
            code::SAME_NAMESPACE,
            "the pod's network namespace is the node's own",
        )),
        Err(error) => Err(Failure::because(
            code::IO,
            "cannot look at the pod's network namespace",
            error,
        )),
    }
}
