//! What only one Service of the cluster may have, where several control planes give it out: each address and port has a key in
//! the store that is written together with the Service.

use bytes::Bytes;
use serde_json::Value;

use super::Api;
use super::route::Target;
use crate::resource::{self, ResourceInfo};
use crate::store::{Expect, StoreError, Watch, Write};

/// Pause before the watch of Services begins again.
const RETRY: std::time::Duration = std::time::Duration::from_secs(1);
const CLAIMS: &str = "/registry/claims/services/";

/// Whether writes of the kind take or give back addresses and ports.
pub(super) fn allocates(r: &ResourceInfo) -> bool {
    r.is("", "Service")
}

impl Api {
    /// Adds to a write what its object takes and gives back.
    pub(super) fn claim(
        &self,
        r: &ResourceInfo,
        before: Option<&Value>,
        after: Option<&Value>,
        write: &mut Write,
    ) {
        if !self.store.is_shared() || !allocates(r) {
            return;
        }
        let held = |object: Option<&Value>| object.map(resource::allocated).unwrap_or_default();
        let (before, after) = (held(before), held(after));
        for taken in after.iter().filter(|item| !before.contains(item)) {
            let key = format!("{CLAIMS}{taken}");
            write.guards.push((key.clone(), Expect::Absent));
            write.also.push((key, Some(Bytes::from(write.key.clone()))));
        }
        for given in before.iter().filter(|item| !after.contains(item)) {
            write.also.push((format!("{CLAIMS}{given}"), None));
        }
    }

    /// Learns what other control planes give to Services and take back, until the API shuts down.
    pub async fn follow_allocations(&self) {
        while self.store.is_shared() {
            let followed = self.shutdown.run_until_cancelled(self.follow_services()).await;
            match followed {
                None | Some(Err(StoreError::Closed)) => return,
                Some(Ok(())) => {}
                Some(Err(error)) => {
                    tracing::warn!(%error, "the watch of Services begins again");
                    self.shutdown.run_until_cancelled(tokio::time::sleep(RETRY)).await;
                }
            }
        }
    }

    async fn follow_services(&self) -> Result<(), StoreError> {
        let Some(services) = resource::find("", "v1", "services") else {
            return Ok(());
        };
        let target = Target::collection(services, "");
        let revision = self.adopt_services(&target).await?;
        let mut watch: Box<dyn Watch> = self.store.watch(&target.prefix(), revision).await?;
        loop {
            let event = watch.next().await?;
            let read = |revision: u64, value: &Bytes| super::codec::decode(services, revision, value).ok();
            let before = event
                .previous
                .as_ref()
                .and_then(|(revision, value)| read(*revision, value));
            let after = event.value.as_ref().and_then(|value| read(event.revision, value));
            let mut alloc = self.allocator.lock().await;
            alloc.begin();
            if let Some(before) = &before {
                alloc.release(before);
            }
            if let Some(after) = &after {
                alloc.adopt(after);
            }
            alloc.commit();
        }
    }

    /// Marks what the stored Services hold as taken, and returns the revision of that.
    pub(super) async fn adopt_services(&self, services: &Target) -> Result<u64, StoreError> {
        let range = crate::store::Range {
            prefix: services.prefix(),
            ..crate::store::Range::default()
        };
        let page = self.store.list(range).await?;
        let mut alloc = self.allocator.lock().await;
        for item in page.items {
            match super::codec::decode(services.resource, item.revision, &item.value) {
                Ok(service) => alloc.adopt(&service),
                Err(error) => tracing::error!(key = item.key, %error, "a stored service cannot be read"),
            }
        }
        Ok(page.revision)
    }
}
