//! Removes what is in a deleted namespace, then the namespace.

use std::sync::Arc;
use std::time::Duration;

use serde_json::Value;

use super::delete::{Options, Removed};
use super::route::Target;
use super::{Api, NamespaceRemover, codec, write};
use crate::error::ApiError;
use crate::resource::RESOURCES;
use crate::store::{Expect, StoreError, Write};

/// Pause before a namespace whose removal failed is tried again.
const RETRY: Duration = Duration::from_secs(1);
/// How often all namespaces are looked at where other control planes delete some, too.
const RECHECK: Duration = Duration::from_secs(30);

impl NamespaceRemover {
    /// Runs until the API shuts down. Also takes up deletions that a former process left unfinished.
    pub async fn run(mut self, api: Arc<Api>) {
        if let Err(error) = api.recheck_all_namespaces().await {
            tracing::error!(%error, "namespaces that were being deleted are not taken up");
        }
        loop {
            let next = async {
                if api.store.is_shared() {
                    tokio::time::timeout(RECHECK, self.0.recv()).await
                } else {
                    Ok(self.0.recv().await)
                }
            };
            let namespace = match api.shutdown.run_until_cancelled(next).await {
                None | Some(Ok(None)) => return,
                Some(Ok(Some(namespace))) => namespace,
                // What another control plane began may have been left by it.
                Some(Err(_)) => {
                    if let Err(error) = api.recheck_all_namespaces().await {
                        tracing::warn!(%error, "namespaces that are being deleted are not looked at");
                    }
                    continue;
                }
            };
            let done = api
                .shutdown
                .run_until_cancelled(api.empty_namespace(&namespace))
                .await;
            if let Some(Err(error)) = done {
                tracing::warn!(namespace, %error, "remove the content of the namespace; trying again");
                let api = Arc::clone(&api);
                tokio::spawn(async move {
                    let api = &api;
                    let retry = async {
                        tokio::time::sleep(RETRY).await;
                        api.recheck_namespace(&namespace);
                    };
                    api.shutdown.run_until_cancelled(retry).await
                });
            }
        }
    }
}

impl Api {
    async fn recheck_all_namespaces(&self) -> Result<(), ApiError> {
        let namespaces = write::collection("", "namespaces", "")?;
        for item in self.items(&namespaces).await? {
            if let Some(name) = item.key.strip_prefix(&namespaces.prefix()) {
                self.recheck_namespace(name);
            }
        }
        Ok(())
    }

    /// Deletes the content of a namespace that is marked for deletion, and the namespace when nothing is left.
    async fn empty_namespace(&self, name: &str) -> Result<(), ApiError> {
        let namespaces = write::collection("", "namespaces", "")?;
        loop {
            let Some(stored) = self.find(&namespaces, name).await? else {
                return Ok(());
            };
            let namespace = codec::decode(namespaces.resource, stored.revision, &stored.value)?;
            if !namespace["metadata"]["deletionTimestamp"].is_string() {
                return Ok(());
            }
            let mut left = 0;
            for r in RESOURCES.iter().filter(|r| r.namespaced) {
                left += self.empty_collection(&Target::collection(r, name)).await?;
            }
            let foreign = |finalizer: &Value| finalizer != "kubernetes";
            let held = namespace["metadata"]["finalizers"]
                .as_array()
                .is_some_and(|held| !held.is_empty())
                || namespace["spec"]["finalizers"]
                    .as_array()
                    .is_some_and(|held| held.iter().any(foreign));
            if left > 0 || held {
                // Whoever removes the last finalizer has this looked at again.
                return Ok(());
            }
            let write = Write {
                key: stored.key,
                expect: Expect::Revision(stored.revision),
                value: None,
                guards: Vec::new(),
                also: Vec::new(),
            };
            match self.store.write(write).await {
                Ok(_) => return Ok(()),
                Err(StoreError::Conflict { .. }) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Deletes all objects of one kind; returns how many have to wait for a finalizer.
    async fn empty_collection(&self, target: &Target) -> Result<usize, ApiError> {
        let mut left = 0;
        for item in self.items(target).await? {
            let name = item.key.strip_prefix(&target.prefix()).unwrap_or_default();
            match self.remove(target, name, &Options::background()).await {
                Ok(Removed::Gone(_)) => {}
                Ok(Removed::Marked(_)) => left += 1,
                Err(error) if error.code == 404 => {}
                Err(error) => return Err(error),
            }
        }
        Ok(left)
    }
}
