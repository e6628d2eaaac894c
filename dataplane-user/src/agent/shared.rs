//! What the servers share with the loop.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::watch;

use super::health::Health;
use super::metrics::Metrics;
use super::rest::RestClient;

/// What the servers share with the loop.
#[derive(Debug)]
pub struct Shared {
    health: Mutex<Health>,
    /// Metrics.
    pub metrics: Metrics,
    /// True once all that is known is programmed, nothing left out.
    pub complete: watch::Sender<bool>,
}

impl Shared {
    /// With this health.
    #[must_use]
    pub fn new(health: Health) -> Arc<Self> {
        Self::with_api(health, &RestClient::default())
    }

    /// With this health, and what is counted of an API.
    #[must_use]
    pub fn with_api(health: Health, rest: &RestClient) -> Arc<Self> {
        Arc::new(Self {
            health: Mutex::new(health),
            metrics: Metrics::new(rest),
            complete: watch::Sender::new(false),
        })
    }

    /// The health; a panic elsewhere while it was held leaves it as usable as before.
    pub fn health(&self) -> MutexGuard<'_, Health> {
        self.health.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
