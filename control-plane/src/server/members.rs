//! Which control planes share a store, so that the Services that lead to them name them all.
//!
//! Each renews a Lease in `kube-system`. One that was not renewed for a while is gone, by the clock of whoever looks (what
//! kube-apiserver's lease endpoint reconciler does with keys of etcd).

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use jiff::Timestamp;
use serde_json::{Value, json};
use tokio::time::Instant;

use super::bootstrap::Bootstrap;
use super::delete::Options;
use super::write::collection;
use super::{Api, codec};
use crate::error::ApiError;

/// How long taking leave may take: a store that does not answer must not hold up the end.
const LEAVE: Duration = Duration::from_secs(5);
const NAMESPACE: &str = "kube-system";
const COMPONENT: &str = "beeline.dev/component";
const CONTROL_PLANE: &str = "control-plane";
/// Where the member serves the cluster's DNS.
const DNS: &str = "beeline.dev/dns";

/// Where members serve what, where pods can reach it.
#[derive(Debug, Default)]
pub(super) struct Places {
    pub(super) api: Vec<SocketAddr>,
    pub(super) dns: Vec<SocketAddr>,
}

/// A port and the addresses at which it is served. A slice has one family and the same ports for all: the first address
/// decides, as every member sees it.
pub(super) fn agree(places: &[SocketAddr]) -> Option<(u16, Vec<IpAddr>)> {
    let first = places.iter().min()?;
    let same = |place: &&SocketAddr| place.is_ipv4() == first.is_ipv4() && place.port() == first.port();
    let mut addresses: Vec<IpAddr> = places.iter().filter(same).map(SocketAddr::ip).collect();
    addresses.sort();
    addresses.dedup();
    Some((first.port(), addresses))
}

/// What one control plane knows of all.
#[derive(Debug)]
pub struct Members {
    pub(super) bootstrap: Bootstrap,
    duration: Duration,
    /// When a member was last renewed, in its words, and since when that is known here.
    seen: HashMap<String, (Value, Instant)>,
}

impl Members {
    /// The control plane of `bootstrap`; others are gone when they have been silent for `duration`.
    pub fn new(bootstrap: Bootstrap, duration: Duration) -> Self {
        Self {
            bootstrap,
            duration,
            seen: HashMap::new(),
        }
    }

    fn own(&self) -> Places {
        let api = self
            .bootstrap
            .advertised
            .map(|ip| (ip, self.bootstrap.port).into());
        let dns = self.bootstrap.dns.map(|(_, at)| at);
        Places {
            api: api.into_iter().collect(),
            dns: dns.into_iter().filter(|at| !at.ip().is_loopback()).collect(),
        }
    }

    /// Name of the own Lease; none where pods cannot come.
    fn name(&self) -> Option<String> {
        let own = self.own();
        let address = own.api.first()?;
        let ip = address.ip().to_string().replace(['.', ':'], "-");
        Some(format!("beeline-control-plane-{ip}-{}", address.port()))
    }
}

impl Api {
    /// Says that this one is there, and tells who is.
    pub(super) async fn places(&self, members: &mut Members) -> Result<Places, ApiError> {
        if !self.store.is_shared() {
            return Ok(members.own());
        }
        if let Some(name) = members.name() {
            self.renew(members, &name).await?;
        }
        self.living(members, Instant::now()).await
    }

    async fn renew(&self, members: &Members, name: &str) -> Result<(), ApiError> {
        let own = members.own();
        let now = Timestamp::now().strftime("%Y-%m-%dT%H:%M:%S.%6fZ").to_string();
        let text = |places: &[SocketAddr]| places.first().map(SocketAddr::to_string);
        let spec = json!({
            "holderIdentity": text(&own.api),
            "leaseDurationSeconds": members.duration.as_secs().max(1),
            "renewTime": now,
        });
        let mut annotations = json!({});
        if let Some(dns) = text(&own.dns) {
            annotations[DNS] = dns.into();
        }
        let lease = json!({
            "apiVersion": "coordination.k8s.io/v1",
            "kind": "Lease",
            "metadata": {"name": name, "labels": {COMPONENT: CONTROL_PLANE}, "annotations": annotations},
            "spec": spec,
        });
        let leases = collection("coordination.k8s.io", "leases", NAMESPACE)?;
        self.ensure(
            &leases,
            lease,
            |_| true,
            |old| {
                old["metadata"]["annotations"] = annotations.clone();
                old["spec"] = spec.clone();
            },
        )
        .await
    }

    /// Those who were renewed lately; the Leases of others are removed.
    async fn living(&self, members: &mut Members, now: Instant) -> Result<Places, ApiError> {
        let leases = collection("coordination.k8s.io", "leases", NAMESPACE)?;
        let mut places = Places::default();
        for stored in self.items(&leases).await? {
            let lease = codec::decode(leases.resource, stored.revision, &stored.value)?;
            let meta = &lease["metadata"];
            if meta["labels"][COMPONENT] != CONTROL_PLANE {
                continue;
            }
            let name = meta["name"].as_str().unwrap_or_default();
            let renewed = &lease["spec"]["renewTime"];
            match members.seen.get(name) {
                Some((known, since)) if known == renewed => {
                    if now.saturating_duration_since(*since) >= members.duration {
                        // Whoever comes back makes a new one.
                        if let Err(error) = self.remove(&leases, name, &Options::now()).await {
                            tracing::debug!(name, %error, "the lease of a control plane that is gone was not removed");
                        }
                        continue;
                    }
                }
                _ => drop(members.seen.insert(name.to_owned(), (renewed.clone(), now))),
            }
            let place = |text: &Value| text.as_str().and_then(|text| text.parse().ok());
            places
                .api
                .extend::<Option<SocketAddr>>(place(&lease["spec"]["holderIdentity"]));
            places
                .dns
                .extend::<Option<SocketAddr>>(place(&meta["annotations"][DNS]));
        }
        Ok(places)
    }

    /// Keeps the Services that lead to the control planes as these come and go, until the API shuts down.
    pub async fn keep_members(&self, mut members: Members) {
        let Some(own) = members.name().filter(|_| self.store.is_shared()) else {
            return;
        };
        let interval = members.duration / 3;
        while self
            .shutdown
            .run_until_cancelled(tokio::time::sleep(interval))
            .await
            .is_some()
        {
            if let Err(error) = self.ensure_services(&mut members).await {
                tracing::warn!(%error, "the control planes of this cluster are not known; trying again");
            }
        }
        // The others need not wait until this one is missed.
        let leave = async {
            let leases = collection("coordination.k8s.io", "leases", NAMESPACE)?;
            self.remove(&leases, &own, &Options::now()).await?;
            let left = self.living(&mut members, Instant::now()).await?;
            if !left.api.is_empty() {
                self.ensure_places(&members.bootstrap, &left).await?;
            }
            Ok::<(), ApiError>(())
        };
        if let Ok(Err(error)) = tokio::time::timeout(LEAVE, leave).await {
            tracing::debug!(%error, "this control plane did not take leave");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn members_agree_on_one_family_and_port() {
        let places =
            |texts: &[&str]| -> Vec<SocketAddr> { texts.iter().map(|text| text.parse().unwrap()).collect() };
        let ips =
            |texts: &[&str]| -> Vec<IpAddr> { texts.iter().map(|text| text.parse().unwrap()).collect() };
        assert_eq!(agree(&[]), None);
        assert_eq!(
            agree(&places(&[
                "192.0.2.2:6443",
                "[2001:db8::1]:6443",
                "192.0.2.1:6443",
                "192.0.2.3:7443",
                "192.0.2.1:6443"
            ])),
            Some((6443, ips(&["192.0.2.1", "192.0.2.2"])))
        );
    }
}
