//! Which of several control planes runs the controllers: whoever holds the Lease (client-go `leaderelection`).

use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use kube::Client;
use kube::api::{Api, PostParams};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

const NAMESPACE: &str = "kube-system";
const NAME: &str = "beeline-controllers";

/// Takes part in the election under a name of its own, until it is told to stop.
pub struct Candidate {
    client: Client,
    identity: String,
    /// A holder that has not renewed for so long is gone.
    duration: Duration,
    /// What was seen last, and since when it is so: only the own clock counts.
    seen: Option<(Option<LeaseSpec>, Instant)>,
}

impl Candidate {
    /// A candidate of that name; `duration` is how long a holder is waited for, at least a second.
    pub fn new(client: Client, identity: String, duration: Duration) -> Self {
        Self {
            client,
            identity,
            duration: duration.max(Duration::from_secs(1)),
            seen: None,
        }
    }

    fn leases(&self) -> Api<Lease> {
        Api::namespaced(self.client.clone(), NAMESPACE)
    }

    /// Runs what `start` starts while this one leads. What was started must end when its token is cancelled; nobody else
    /// starts it before that, unless ending takes longer than a third of the duration.
    pub async fn run(
        mut self,
        shutdown: CancellationToken,
        start: impl Fn(CancellationToken) -> TaskTracker,
    ) {
        while shutdown.run_until_cancelled(self.acquire()).await.is_some() {
            tracing::info!(identity = self.identity, "leading: the controllers run here");
            let term = shutdown.child_token();
            let work = start(term.clone());
            let lost = shutdown.run_until_cancelled(self.keep()).await.is_some();
            term.cancel();
            work.close();
            work.wait().await;
            if lost {
                tracing::warn!(
                    identity = self.identity,
                    "another one may lead: the controllers have stopped"
                );
            } else {
                self.resign().await;
            }
        }
    }

    fn retry(&self) -> Duration {
        self.duration / 8
    }

    async fn acquire(&mut self) {
        loop {
            match self.try_once().await {
                Ok(true) => return,
                Ok(false) => {}
                Err(error) => tracing::debug!(%error, "the lease of the controllers cannot be had"),
            }
            tokio::time::sleep(self.retry()).await;
        }
    }

    /// Renews for as long as that goes well.
    async fn keep(&mut self) {
        let mut renewed = Instant::now();
        loop {
            tokio::time::sleep(self.retry()).await;
            // Whoever waits began to count at the same renewal, or later.
            let deadline = self.duration * 2 / 3;
            let left = deadline.saturating_sub(renewed.elapsed());
            let began = Instant::now();
            match tokio::time::timeout(left, self.try_once()).await {
                Ok(Ok(true)) => renewed = began,
                Ok(Ok(false)) => return,
                Ok(Err(error)) => {
                    tracing::warn!(%error, "the lease of the controllers was not renewed");
                    if renewed.elapsed() >= deadline {
                        return;
                    }
                }
                Err(_) => return,
            }
        }
    }

    /// Whether the Lease is this one's now.
    async fn try_once(&mut self) -> Result<bool, kube::Error> {
        let leases = self.leases();
        let now = MicroTime(Timestamp::now());
        let Some(mut lease) = leases.get_opt(NAME).await? else {
            let mut lease = Lease::default();
            lease.metadata.name = Some(NAME.to_owned());
            lease.spec = Some(self.spec(None, now));
            return match leases.create(&PostParams::default(), &lease).await {
                Ok(_) => Ok(true),
                Err(error) if is_conflict(&error) => Ok(false),
                Err(error) => Err(error),
            };
        };
        if self.seen.as_ref().is_none_or(|(seen, _)| *seen != lease.spec) {
            self.seen = Some((lease.spec.clone(), Instant::now()));
        }
        let since = self.seen.as_ref().map_or_else(Instant::now, |(_, since)| *since);
        let holder = lease
            .spec
            .as_ref()
            .and_then(|spec| spec.holder_identity.as_deref());
        let free = match holder.unwrap_or_default() {
            "" => true,
            holder => holder == self.identity || since.elapsed() >= self.duration,
        };
        if !free {
            return Ok(false);
        }
        lease.spec = Some(self.spec(lease.spec.as_ref(), now));
        // Of several that try, one has the present version.
        match leases.replace(NAME, &PostParams::default(), &lease).await {
            Ok(_) => Ok(true),
            Err(error) if is_conflict(&error) => Ok(false),
            Err(error) => Err(error),
        }
    }

    fn spec(&self, before: Option<&LeaseSpec>, now: MicroTime) -> LeaseSpec {
        let mine = before.filter(|spec| spec.holder_identity.as_deref() == Some(&self.identity));
        let transitions = before.and_then(|spec| spec.lease_transitions).unwrap_or(0);
        LeaseSpec {
            holder_identity: Some(self.identity.clone()),
            lease_duration_seconds: i32::try_from(self.duration.as_secs()).ok(),
            acquire_time: mine
                .and_then(|spec| spec.acquire_time.clone())
                .or(Some(now.clone())),
            lease_transitions: Some(
                transitions.saturating_add(i32::from(before.is_some() && mine.is_none())),
            ),
            renew_time: Some(now),
            ..LeaseSpec::default()
        }
    }

    /// Lets the next one begin at once.
    async fn resign(&self) {
        let leases = self.leases();
        let resign = async {
            let mut lease = leases.get(NAME).await?;
            let Some(spec) = lease.spec.as_mut() else {
                return Ok(());
            };
            if spec.holder_identity.as_deref() == Some(&self.identity) {
                spec.holder_identity = Some(String::new());
                leases.replace(NAME, &PostParams::default(), &lease).await?;
            }
            Ok::<(), kube::Error>(())
        };
        if let Ok(Err(error)) = tokio::time::timeout(self.retry(), resign).await {
            tracing::debug!(%error, "the lease of the controllers was not given back");
        }
    }
}

fn is_conflict(error: &kube::Error) -> bool {
    matches!(error, kube::Error::Api(status) if status.code == 409)
}
