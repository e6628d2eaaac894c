//! Health check node ports: load balancers ask there whether this node has endpoints of a Service with
//! `externalTrafficPolicy: Local` (spec kube-proxy 3.3).

mod server;

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use dataplane_model::HealthCheckNodePort;
use tokio::sync::watch;
use tokio::time::Instant;
use tracing::{info, warn};

use server::{Listener, Subject};

/// Pause before a port that could not be listened on is tried again.
const RETRY: Duration = Duration::from_millis(if cfg!(test) { 20 } else { 5000 });

/// Whether the node's dataplane is healthy, asked for every answer.
pub type Healthy = Arc<dyn Fn() -> bool + Send + Sync>;

/// Told when a port of a Service cannot be listened on: namespace, name, and why. Once, until that changes.
pub type Failed = Box<dyn Fn(&str, &str, &str) + Send>;

/// One listener: of whom, and where.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
struct Place {
    namespace: String,
    name: String,
    addr: SocketAddr,
}

/// Keeps a server for each Service at each address, as `checks` and `addresses` (see
/// [`NodeAddresses::health_checks_at`](crate::nodeaddr::NodeAddresses::health_checks_at)) say, until one of their senders
/// is gone; then everything is closed.
pub async fn serve(
    mut checks: watch::Receiver<Vec<HealthCheckNodePort>>,
    mut addresses: watch::Receiver<BTreeSet<IpAddr>>,
    healthy: Healthy,
    failed: Failed,
) {
    let mut servers = Servers {
        listeners: BTreeMap::new(),
        failures: BTreeMap::new(),
        healthy,
        failed,
    };
    loop {
        let wanted = {
            let checks = checks.borrow_and_update();
            wanted(&checks, &addresses.borrow_and_update())
        };
        servers.become_(wanted).await;
        let retry_at = Instant::now() + RETRY;
        tokio::select! {
            changed = checks.changed() => if changed.is_err() { return },
            changed = addresses.changed() => if changed.is_err() { return },
            () = tokio::time::sleep_until(retry_at), if !servers.failures.is_empty() => {}
        }
    }
}

/// Where to listen, and how many endpoints are to be told there.
fn wanted(checks: &[HealthCheckNodePort], addresses: &BTreeSet<IpAddr>) -> BTreeMap<Place, u32> {
    let mut wanted = BTreeMap::new();
    for check in checks {
        for &ip in addresses {
            let count = if ip.is_ipv4() {
                check.local_endpoints_v4
            } else {
                check.local_endpoints_v6
            };
            let Some(count) = count else { continue };
            let place = Place {
                namespace: check.namespace.clone(),
                name: check.name.clone(),
                addr: SocketAddr::new(ip, check.port),
            };
            wanted.insert(place, count);
        }
    }
    wanted
}

struct Servers {
    listeners: BTreeMap<Place, Listener>,
    /// Why a place cannot be listened on, as it was last said.
    failures: BTreeMap<Place, String>,
    healthy: Healthy,
    failed: Failed,
}

impl Servers {
    async fn become_(&mut self, wanted: BTreeMap<Place, u32>) {
        // first what is not wanted any more: another Service may have got its port
        let gone: Vec<Place> = self
            .listeners
            .keys()
            .filter(|place| !wanted.contains_key(*place))
            .cloned()
            .collect();
        for place in gone {
            if let Some(listener) = self.listeners.remove(&place) {
                listener.close().await;
                let Place {
                    namespace,
                    name,
                    addr,
                } = place;
                info!(service = %format_args!("{namespace}/{name}"), %addr, "health checks are no longer answered");
            }
        }
        self.failures.retain(|place, _| wanted.contains_key(place));
        for (place, count) in wanted {
            match self.listeners.get(&place) {
                Some(listener) => listener.set(count),
                None => self.open(place, count),
            }
        }
    }

    fn open(&mut self, place: Place, count: u32) {
        let service = format!("{}/{}", place.namespace, place.name);
        let subject = Subject::new(&place.namespace, &place.name, Arc::clone(&self.healthy));
        match Listener::open(place.addr, subject, count) {
            Ok(listener) => {
                info!(service, addr = %place.addr, "health checks are answered");
                self.failures.remove(&place);
                self.listeners.insert(place, listener);
            }
            Err(error) => {
                let text = format!("health check node port {}: {error}", place.addr);
                if self.failures.get(&place) != Some(&text) {
                    warn!(service, "{text}; load balancers take this node for unhealthy");
                    (self.failed)(&place.namespace, &place.name, &text);
                    self.failures.insert(place, text);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests;
