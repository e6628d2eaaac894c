//! flannel's etcd subnet manager (spec cni-overlay 1.4): nodes take their subnets themselves, and tell each other by leases
//! in etcd.
//!
//! What etcd said last stays in force while it is away.

pub mod lease;

use std::collections::{BTreeMap, BTreeSet};
use std::net::{Ipv4Addr, Ipv6Addr};
use std::sync::Arc;
use std::time::Duration;

use beeline_cni::mac::Mac;
use beeline_etcd::{Access, Change, Client, EtcdError, encode, end_of, number, stored};
use serde_json::{Value, json};
use tokio::sync::{mpsc, watch};
use tokio::time::Instant;
use tracing::{info, warn};

use super::engine::{self, NodeUpdate, View, random_mac};
use super::flannel::{Announcement, Local};
use super::netconf::{Backend, NetConf};
use super::netlink::Netlink;
use super::plan;
use super::uplink::{self, Wish};
use lease::{Attributes, Taken};

/// How long a lease lasts unless it is renewed, as flannel's.
const TTL: Duration = Duration::from_hours(24);
/// Pause before the configuration is looked for again, as flannel's.
const CONFIG_RETRY: Duration = Duration::from_secs(1);
/// Pause before a renewal that failed is tried again, as flannel's.
const RENEW_RETRY: Duration = Duration::from_mins(1);
/// First and longest pause after a failure, as flannel's.
const BACKOFF: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(5));

/// Where flannel's configuration and leases are.
#[derive(Clone, Debug)]
pub struct Settings {
    /// How etcd is reached.
    pub access: Access,
    /// What all keys begin with, without a slash at the end.
    pub prefix: String,
    /// How long a lease lasts unless it is renewed; whole seconds.
    pub ttl: Duration,
    /// How long before its end a lease is renewed.
    pub margin: Duration,
}

impl Settings {
    /// Leases as flannel has them.
    #[must_use]
    pub fn new(access: Access, prefix: &str, margin: Duration) -> Self {
        Self {
            access,
            prefix: prefix.trim_end_matches('/').to_owned(),
            ttl: TTL,
            margin,
        }
    }
}

/// A lease in etcd.
#[derive(Clone, PartialEq, Debug)]
struct Found {
    subnets: Taken,
    attributes: Attributes,
    /// The key was last written at this revision.
    revision: u64,
    /// etcd's lease that the key goes with; 0: a reservation, which stays.
    lease: u64,
}

/// This node's lease.
struct Held {
    found: Found,
    renew_at: Option<Instant>,
}

/// Keeps this node's lease, and tells of those of others.
#[derive(Debug)]
pub struct Manager {
    settings: Settings,
    client: Client,
}

/// Why it does not go on.
enum End {
    /// Nobody wants to know any more.
    Closed,
    /// Leases are to be read again: etcd was away, or ours was taken away.
    Again(Option<String>),
}

impl From<EtcdError> for End {
    fn from(error: EtcdError) -> Self {
        Self::Again(Some(error.to_string()))
    }
}

impl Manager {
    /// Nothing is asked of etcd yet.
    ///
    /// # Errors
    ///
    /// When an address or a file of the settings cannot be used.
    pub fn new(settings: Settings) -> Result<Self, EtcdError> {
        let client = Client::new(&settings.access)?;
        Ok(Self { settings, client })
    }

    /// The cluster's configuration; waits until there is one that can be used.
    pub async fn config(&self) -> NetConf {
        let key = format!("{}/config", self.settings.prefix);
        let mut told = None;
        loop {
            let problem = match self.read_config(&key).await {
                Ok(conf) => return conf,
                Err(problem) => problem,
            };
            if told.as_ref() != Some(&problem) {
                warn!(
                    key,
                    "the configuration of the pod network is waited for: {problem}"
                );
                told = Some(problem);
            }
            tokio::time::sleep(CONFIG_RETRY).await;
        }
    }

    async fn read_config(&self, key: &str) -> Result<NetConf, String> {
        let answer = self
            .client
            .call("kv/range", &json!({"key": encode(key)}))
            .await
            .map_err(|error| error.to_string())?;
        let found = answer["kvs"].get(0).ok_or("etcd has no such key")?;
        let value = stored(found).map_err(|error| error.to_string())?.value;
        NetConf::parse(&String::from_utf8_lossy(&value)).map_err(|error| error.to_string())
    }

    /// Keeps this node's lease as `view` says, and tells of all leases, until the receiver is gone. In the network namespace
    /// of the calling thread.
    pub async fn keep(
        self: Arc<Self>,
        network: engine::Settings,
        sender: mpsc::Sender<NodeUpdate>,
        view: watch::Receiver<View>,
    ) {
        let mut keeper = Keeper {
            manager: self,
            network,
            sender,
            view,
            held: None,
            macs: None,
            failure: None,
        };
        let mut pause = BACKOFF.0;
        loop {
            let Err(end) = keeper.round().await;
            let problem = match end {
                End::Closed => return,
                End::Again(problem) => problem,
            };
            if keeper.failure.is_none() {
                pause = BACKOFF.0;
            }
            if problem.is_some() && keeper.failure != problem {
                warn!(
                    problem,
                    "leases of subnets cannot be followed; what is known of them stays in force"
                );
                keeper.failure = problem;
            }
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                () = keeper.sender.closed() => return,
            }
            pause = (pause * 2).min(BACKOFF.1);
        }
    }
}

struct Keeper {
    manager: Arc<Manager>,
    network: engine::Settings,
    sender: mpsc::Sender<NodeUpdate>,
    view: watch::Receiver<View>,
    held: Option<Held>,
    /// Addresses of the overlay devices.
    macs: Option<(Mac, Mac)>,
    /// Why leases cannot be followed, if so.
    failure: Option<String>,
}

impl Keeper {
    /// Reads all leases, sees to this node's, and follows them as long as that goes well.
    async fn round(&mut self) -> Result<std::convert::Infallible, End> {
        let (leases, revision) = self.list().await?;
        self.settle(&leases).await?;
        let own = self.own_name();
        let mut names = BTreeSet::new();
        for (name, value) in &leases {
            if own.as_ref() != Some(name) {
                names.insert(name.clone());
                self.tell(self.update(name, &value.value)).await?;
            }
        }
        self.tell(Some(NodeUpdate::Listed(names))).await?;
        let prefix = self.leases_prefix();
        let mut changes = self.manager.client.watch(&prefix, revision).await?;
        if self.failure.take().is_some() {
            info!("leases of subnets can be followed again");
        }
        loop {
            self.publish().await?;
            let renew_at = self.held.as_ref().and_then(|held| held.renew_at);
            tokio::select! {
                found = changes.next() => for change in found? {
                    self.changed(&prefix, change).await?;
                },
                changed = self.view.changed() => changed.map_err(|_| End::Closed)?,
                () = tokio::time::sleep_until(renew_at.unwrap_or_else(Instant::now)), if renew_at.is_some() => {
                    self.renew().await?;
                }
                () = self.sender.closed() => return Err(End::Closed),
            }
        }
    }

    fn leases_prefix(&self) -> String {
        format!("{}/subnets/", self.manager.settings.prefix)
    }

    fn own_name(&self) -> Option<String> {
        self.held.as_ref().map(|held| held.found.subnets.to_string())
    }

    async fn tell(&self, update: Option<NodeUpdate>) -> Result<(), End> {
        match update {
            Some(update) => self.sender.send(update).await.map_err(|_| End::Closed),
            None => Ok(()),
        }
    }

    /// All keys below the prefix, without it, and the revision that they are of.
    async fn list(&self) -> Result<(BTreeMap<String, beeline_etcd::Stored>, u64), EtcdError> {
        let prefix = self.leases_prefix();
        let range = json!({"key": encode(&prefix), "range_end": encode(end_of(&prefix))});
        let answer = self.manager.client.call("kv/range", &range).await?;
        let mut leases = BTreeMap::new();
        for kv in answer["kvs"].as_array().into_iter().flatten() {
            let found = stored(kv)?;
            if let Some(name) = found.key.strip_prefix(&prefix) {
                leases.insert(name.to_owned(), found);
            }
        }
        Ok((leases, number(&answer["header"]["revision"])))
    }

    /// What is told of another node's lease; `None` for what is no lease.
    fn update(&self, name: &str, value: &[u8]) -> Option<NodeUpdate> {
        let subnets = match name.parse() {
            Ok(subnets) => subnets,
            Err(error) => {
                warn!(%error, "a key among the leases of subnets is left out");
                return None;
            }
        };
        let (peer, problems) = match serde_json::from_slice::<Attributes>(value) {
            Ok(attributes) => attributes.peer(subnets, &self.network.conf.backend),
            Err(error) => (None, vec![format!("its lease cannot be read: {error}")]),
        };
        Some(NodeUpdate::Peer(name.to_owned(), peer, problems))
    }

    async fn changed(&mut self, prefix: &str, change: Change) -> Result<(), End> {
        let Some(name) = change.key.strip_prefix(prefix) else {
            return Ok(());
        };
        let held = self
            .held
            .as_ref()
            .filter(|held| held.found.subnets.to_string() == name);
        match (held, &change.value) {
            (None, Some(value)) => self.tell(self.update(name, value)).await,
            (None, None) => self.tell(Some(NodeUpdate::Deleted(name.to_owned()))).await,
            // what we wrote ourselves
            (Some(held), _) if change.revision <= held.found.revision => Ok(()),
            (Some(_), _) => {
                warn!(lease = name, "somebody else has changed this node's lease");
                Err(End::Again(None))
            }
        }
    }

    /// Sees to it that this node has a lease, and tells what it is.
    async fn settle(&mut self, leases: &BTreeMap<String, beeline_etcd::Stored>) -> Result<(), End> {
        let known: Vec<Found> = leases
            .iter()
            .filter_map(|(name, value)| read(name, value))
            .collect();
        // keys that cannot be read are somebody's, too
        let taken: Vec<Taken> = leases.keys().filter_map(|name| name.parse().ok()).collect();
        let announcement = self
            .announcement(&known)
            .await
            .map_err(|problem| End::Again(Some(problem)))?;
        let public = (
            announcement.v4.map(|(ip, _)| ip),
            announcement.v6.map(|(ip, _)| ip),
        );
        let attributes = Attributes::of(&announcement);
        let conf = &self.network.conf;
        let mut ours = None;
        for found in known.iter().filter(|found| found.attributes.is_of(public)) {
            if found.subnets.fits(conf) && ours.is_none() {
                ours = Some(found.clone());
            } else {
                info!(lease = %found.subnets, "an old lease of this node is given back");
                self.delete(found).await?;
            }
        }
        if let (Some(found), Some(held)) = (&ours, &self.held)
            && held.found.revision == found.revision
        {
            return Ok(());
        }
        let (subnets, before, mut lease) = match &ours {
            Some(found) => (found.subnets, found.revision, found.lease),
            None => (
                self.new_subnets(&taken)
                    .map_err(|problem| End::Again(Some(problem)))?,
                0,
                0,
            ),
        };
        let mut renew_at = None;
        if ours.is_none() || lease != 0 {
            lease = self.grant().await?;
            renew_at = Some(self.renewal());
        }
        // lost to another node that was faster: all is read again
        let Some(revision) = self.write(subnets, &attributes, lease, before).await? else {
            return Err(End::Again(None));
        };
        info!(lease = %subnets, reused = ours.is_some(), "this node has its subnets");
        self.held = Some(Held {
            found: Found {
                subnets,
                attributes,
                revision,
                lease,
            },
            renew_at,
        });
        let local = Local {
            subnet_v4: subnets.v4,
            subnet_v6: subnets.v6,
            vtep_v4: announcement.v4.and_then(|(_, vtep)| vtep),
            vtep_v6: announcement.v6.and_then(|(_, vtep)| vtep),
            ..Local::default()
        };
        self.tell(Some(NodeUpdate::Own(Box::new(local)))).await
    }

    /// What this node had, if nobody else has it now; otherwise any that are free.
    fn new_subnets(&self, taken: &[Taken]) -> Result<Taken, String> {
        let conf = &self.network.conf;
        let file = self.network.subnet_file.as_ref();
        let text = file.and_then(|path| std::fs::read_to_string(path).ok());
        let written = text.map(|text| Taken::from_subnet_env(&text));
        let held = self.held.as_ref().map(|held| held.found.subnets);
        let previous = held
            .or(written)
            .filter(|previous| previous.fits(conf) && taken.iter().all(|lease| !lease.overlaps(previous)));
        match previous {
            Some(previous) => Ok(previous),
            None => lease::choose(conf, taken, &mut rand::rng()),
        }
    }

    /// What this node says of itself: as the engine has it, or, before that can know it, as it will.
    async fn announcement(&mut self, leases: &[Found]) -> Result<Announcement, String> {
        if let Some(announcement) = &self.view.borrow().announcement {
            return Ok(announcement.clone());
        }
        let conf = &self.network.conf;
        let netlink = Netlink::open().map_err(|error| error.to_string())?;
        let kernel = netlink.snapshot().await.map_err(|error| error.to_string())?;
        let wish = Wish {
            iface: self.network.iface.clone(),
            v4: conf.network_v4.is_some(),
            v6: conf.network_v6.is_some(),
            ..Wish::default()
        };
        let uplink = uplink::choose(&kernel, &wish)?;
        let public: (Option<Ipv4Addr>, Option<Ipv6Addr>) = (
            uplink.v4.map(|ip| self.network.public_v4.unwrap_or(ip)),
            uplink.v6.map(|ip| self.network.public_v6.unwrap_or(ip)),
        );
        let vxlan = match &conf.backend {
            Backend::Vxlan(vxlan) => Some(vxlan),
            Backend::HostGw => None,
        };
        let macs = *self.macs.get_or_insert_with(|| {
            // peers know the addresses of the devices: they should stay
            let ours = leases.iter().find(|found| found.attributes.is_of(public));
            let known = ours.map(|found| found.attributes.vteps()).unwrap_or_default();
            let names = vxlan.map(|vxlan| plan::names(vxlan.vni)).unwrap_or_default();
            let held = |name: &str| kernel.link(name)?.mac.filter(|mac| mac.is_unicast());
            let v4 = known.0.or_else(|| held(&names.0)).unwrap_or_else(random_mac);
            let v6 = known.1.or_else(|| held(&names.1)).unwrap_or_else(random_mac);
            (v4, v6)
        });
        Ok(Announcement {
            v4: public.0.map(|public| (public, vxlan.map(|_| macs.0))),
            v6: public.1.map(|public| (public, vxlan.map(|_| macs.1))),
            backend: conf.backend.clone(),
        })
    }

    fn renewal(&self) -> Instant {
        let Settings { ttl, margin, .. } = &self.manager.settings;
        Instant::now() + ttl.saturating_sub(*margin)
    }

    async fn grant(&self) -> Result<u64, EtcdError> {
        let ttl = self.manager.settings.ttl.as_secs().to_string();
        let answer = self
            .manager
            .client
            .call("lease/grant", &json!({"TTL": ttl}))
            .await?;
        Ok(number(&answer["ID"]))
    }

    /// Writes this node's lease if its key was last written at that revision (0: does not exist). Gives the new revision.
    async fn write(
        &self,
        subnets: Taken,
        attributes: &Attributes,
        lease: u64,
        before: u64,
    ) -> Result<Option<u64>, EtcdError> {
        let key = encode(format!("{}{subnets}", self.leases_prefix()));
        let value = serde_json::to_vec(attributes).map_err(|error| EtcdError::Other(error.to_string()))?;
        let put = json!({"key": key, "value": encode(value), "lease": lease.to_string()});
        self.write_if(&key, before, json!({"request_put": put})).await
    }

    async fn delete(&self, found: &Found) -> Result<(), EtcdError> {
        let key = encode(format!("{}{}", self.leases_prefix(), found.subnets));
        let delete = json!({"request_delete_range": {"key": key}});
        self.write_if(&key, found.revision, delete).await.map(|_| ())
    }

    /// Does it if the key was last written at this revision. Gives the new revision if it was done.
    async fn write_if(&self, key: &str, revision: u64, operation: Value) -> Result<Option<u64>, EtcdError> {
        let compare =
            json!({"key": key, "target": "MOD", "result": "EQUAL", "mod_revision": revision.to_string()});
        let transaction = json!({"compare": [compare], "success": [operation]});
        let answer = self.manager.client.call("kv/txn", &transaction).await?;
        let revision = number(&answer["header"]["revision"]);
        Ok((answer["succeeded"] == true).then_some(revision))
    }

    /// Writes what has changed of this node.
    async fn publish(&mut self) -> Result<(), End> {
        let wanted = self
            .view
            .borrow_and_update()
            .announcement
            .as_ref()
            .map(Attributes::of);
        let (Some(wanted), Some(held)) = (wanted, &self.held) else {
            return Ok(());
        };
        let Found {
            subnets,
            attributes,
            revision,
            lease,
        } = held.found.clone();
        if wanted == attributes {
            return Ok(());
        }
        let revision = self.write(subnets, &wanted, lease, revision).await?;
        let revision = revision.ok_or(End::Again(None))?;
        info!(lease = %subnets, "this node's lease says what has changed");
        if let Some(held) = &mut self.held {
            held.found.attributes = wanted;
            held.found.revision = revision;
        }
        Ok(())
    }

    async fn renew(&mut self) -> Result<(), End> {
        let next = self.renewal();
        let Some(held) = &mut self.held else { return Ok(()) };
        // a lease that has ended took its key with it, which the watch tells
        let alive = json!({"ID": held.found.lease.to_string()});
        held.renew_at = Some(match self.manager.client.call("lease/keepalive", &alive).await {
            Ok(_) => next,
            Err(error) => {
                warn!(%error, lease = %held.found.subnets, "this node's lease cannot be renewed");
                Instant::now() + RENEW_RETRY
            }
        });
        Ok(())
    }
}

/// A lease with what it says; `None` if that cannot be read.
fn read(name: &str, value: &beeline_etcd::Stored) -> Option<Found> {
    Some(Found {
        subnets: name.parse().ok()?,
        attributes: serde_json::from_slice(&value.value).ok()?,
        revision: value.revision,
        lease: value.lease,
    })
}
