//! What the servers share with the loop.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::watch;

use super::health::Health;
use super::metrics::Metrics;
use super::rest::RestClient;
use crate::takeover::Programmed;

/// What the servers share with the loop.
#[derive(Debug)]
pub struct Shared {
    health: Mutex<Health>,
    /// Metrics.
    pub metrics: Metrics,
    /// What is programmed completely.
    pub programmed: watch::Sender<Programmed>,
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
            programmed: watch::Sender::default(),
        })
    }

    /// The health; a panic elsewhere while it was held leaves it as usable as before.
    pub fn health(&self) -> MutexGuard<'_, Health> {
        self.health.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
