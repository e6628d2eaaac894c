//! Objects in etcd, which several control planes can share.
//!
//! One watch of everything feeds the hub, so that etcd has one watcher per control plane, whatever its clients do; a watcher
//! that falls behind the hub's rings reads etcd's own history.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use beeline_etcd::{Access, Change, Client, EtcdError, encode, end_of, number};
use bytes::Bytes;
use futures::FutureExt as _;
use futures::future::BoxFuture;
use serde_json::{Value, json};

use super::hub::Hub;
use super::log_watch::{History, LogWatch, Past};
use super::{Event, Expect, Page, Range, Store, StoreError, Stored, Watch, Write};

/// All that is kept is under this.
const ROOT: &str = "/registry/";
/// Written by each control plane that starts: the revision of that is one that the watch of everything has shown.
const MARK: &str = "/registry/started";
/// Pause before the watch begins again when etcd is away.
const RETRY: Duration = Duration::from_millis(200);

/// Where etcd is and how it knows us, under kube-apiserver's names.
#[derive(Debug, Clone, Default, clap::Args)]
pub struct EtcdOptions {
    /// Addresses of etcd servers, http or https, to keep objects there instead of in the data directory
    #[arg(long, value_delimiter = ',')]
    pub etcd_servers: Vec<String>,

    /// Certificate of the authority that signed etcd's certificates
    #[arg(long)]
    pub etcd_cafile: Option<PathBuf>,

    /// Certificate that etcd knows us by
    #[arg(long, requires = "etcd_keyfile")]
    pub etcd_certfile: Option<PathBuf>,

    /// Key of that certificate
    #[arg(long, requires = "etcd_certfile")]
    pub etcd_keyfile: Option<PathBuf>,
}

impl EtcdOptions {
    fn access(&self) -> Access {
        Access {
            servers: self.etcd_servers.clone(),
            ca_file: self.etcd_cafile.clone(),
            identity: self.etcd_certfile.clone().zip(self.etcd_keyfile.clone()),
            user: None,
        }
    }
}

/// A [`Store`] in etcd.
pub struct EtcdStore {
    inner: Arc<Inner>,
    feed: tokio::task::JoinHandle<()>,
}

struct Inner {
    client: Client,
    hub: Hub,
    /// The highest revision that is known to have been compacted.
    compacted: AtomicU64,
}

impl std::fmt::Debug for EtcdStore {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("EtcdStore")
            .field("revision", &self.inner.hub.published())
            .finish_non_exhaustive()
    }
}

impl Drop for EtcdStore {
    fn drop(&mut self) {
        self.feed.abort();
    }
}

impl EtcdStore {
    /// Connects to etcd.
    ///
    /// # Errors
    /// When the options are unusable or no server answers.
    pub async fn connect(options: &EtcdOptions) -> Result<Self, StoreError> {
        let unusable = backend("connect to etcd");
        let client = Client::new(&options.access()).map_err(&unusable)?;
        let revision = mark(&client).await.map_err(&unusable)?;
        let inner = Arc::new(Inner {
            client,
            hub: Hub::new(revision),
            compacted: AtomicU64::new(0),
        });
        let feed = tokio::spawn(feed(Arc::clone(&inner)));
        Ok(Self { inner, feed })
    }
}

/// Writes the mark and returns its revision.
async fn mark(client: &Client) -> Result<u64, EtcdError> {
    let put = json!({"key": encode(MARK), "value": encode("")});
    let answer = client.call("kv/put", &put).await?;
    Ok(number(&answer["header"]["revision"]))
}

/// Publishes every change, in order, as long as the store exists.
async fn feed(inner: Arc<Inner>) {
    loop {
        let after = inner.hub.published();
        let Err(error) = follow(&inner, after).await;
        if matches!(error, EtcdError::Compacted) {
            // Away for longer than the history goes back: whoever watches has to list again.
            tracing::warn!(after, "etcd's history does not reach back to what was seen last");
            if let Ok(revision) = mark(&inner.client).await {
                inner.compacted.fetch_max(revision - 1, Ordering::Relaxed);
                inner.hub.restart(revision);
                continue;
            }
        } else {
            tracing::warn!(%error, "the watch of etcd was interrupted, trying again");
        }
        tokio::time::sleep(RETRY).await;
    }
}

async fn follow(inner: &Inner, after: u64) -> Result<std::convert::Infallible, EtcdError> {
    let mut changes = inner.client.watch(ROOT, after).await?;
    loop {
        inner.hub.publish(events(changes.next().await?));
    }
}

fn events(changes: Vec<Change>) -> Vec<Arc<Event>> {
    let event = |change: Change| Event {
        revision: change.revision,
        key: change.key,
        value: change.value,
        previous: change.previous,
    };
    changes
        .into_iter()
        .map(|change| Arc::new(event(change)))
        .collect()
}

fn stored(kv: &Value) -> Result<Stored, EtcdError> {
    let found = beeline_etcd::stored(kv)?;
    Ok(Stored {
        key: found.key,
        revision: found.revision,
        value: found.value,
    })
}

fn compare(key: &str, expect: Expect) -> Value {
    let revision = match expect {
        Expect::Absent => 0,
        Expect::Revision(revision) => revision,
    };
    json!({"key": encode(key), "target": "MOD", "result": "EQUAL", "mod_revision": revision.to_string()})
}

fn first(range: &Value) -> Result<Option<Stored>, EtcdError> {
    range["kvs"].get(0).map(stored).transpose()
}

impl Inner {
    /// An error of etcd for something that was asked at a revision.
    async fn failed(&self, operation: &'static str, requested: u64, error: EtcdError) -> StoreError {
        match error {
            EtcdError::Compacted => StoreError::Compacted {
                requested,
                compacted: self.compacted.load(Ordering::Relaxed).max(requested + 1),
            },
            EtcdError::Future => match self.revision().await {
                Ok(current) => StoreError::Future { requested, current },
                Err(error) => backend(operation)(error),
            },
            error @ (EtcdError::Token | EtcdError::Other(_)) => backend(operation)(error),
        }
    }

    /// The newest revision.
    async fn revision(&self) -> Result<u64, EtcdError> {
        let answer = self
            .client
            .call("kv/range", &json!({"key": encode(MARK)}))
            .await?;
        Ok(number(&answer["header"]["revision"]))
    }

    async fn get(&self, key: &str) -> Result<(Option<Stored>, u64), EtcdError> {
        if key.is_empty() {
            return Ok((None, self.revision().await?));
        }
        let answer = self.client.call("kv/range", &json!({"key": encode(key)})).await?;
        Ok((first(&answer)?, number(&answer["header"]["revision"])))
    }

    async fn list(&self, range: &Range) -> Result<Page, EtcdError> {
        let from = match &range.after {
            Some(after) => encode(format!("{after}\0")),
            None => encode(&range.prefix),
        };
        let mut body = json!({"key": from, "range_end": encode(end_of(&range.prefix))});
        if range.limit > 0 {
            body["limit"] = range.limit.to_string().into();
        }
        if let Some(revision) = range.revision {
            body["revision"] = revision.to_string().into();
        }
        let answer = self.client.call("kv/range", &body).await?;
        let found = answer["kvs"].as_array().into_iter().flatten();
        let items = found.map(stored).collect::<Result<Vec<_>, _>>()?;
        let listed = u64::try_from(items.len()).unwrap_or(u64::MAX);
        Ok(Page {
            items,
            revision: range
                .revision
                .unwrap_or_else(|| number(&answer["header"]["revision"])),
            remaining: number(&answer["count"]).saturating_sub(listed),
        })
    }

    async fn write(&self, write: Write) -> Result<u64, StoreError> {
        let operation = "write to etcd";
        let keys = || write.guards.iter().map(|(key, expect)| (key, *expect));
        let all = || keys().chain([(&write.key, write.expect)]);
        let change = |key: &String, value: &Option<Bytes>| match value {
            Some(value) => json!({"request_put": {"key": encode(key), "value": encode(value)}}),
            None => json!({"request_delete_range": {"key": encode(key)}}),
        };
        let changes = write.also.iter().map(|(key, value)| change(key, value));
        let changes = changes.chain([change(&write.key, &write.value)]);
        let read = |key: &String| json!({"request_range": {"key": encode(key)}});
        let body = json!({
            "compare": all().map(|(key, expect)| compare(key, expect)).collect::<Vec<_>>(),
            "success": changes.collect::<Vec<_>>(),
            "failure": all().map(|(key, _)| read(key)).collect::<Vec<_>>(),
        });
        let answer = self
            .client
            .call("kv/txn", &body)
            .await
            .map_err(backend(operation))?;
        if answer["succeeded"] == true {
            return Ok(number(&answer["header"]["revision"]));
        }
        for ((key, expect), found) in all().zip(answer["responses"].as_array().into_iter().flatten()) {
            let current = first(&found["response_range"]).map_err(backend(operation))?;
            let holds = match expect {
                Expect::Absent => current.is_none(),
                Expect::Revision(revision) => {
                    current.as_ref().is_some_and(|found| found.revision == revision)
                }
            };
            if !holds && *key != write.key {
                return Err(StoreError::Guard { key: key.clone() });
            }
            if !holds {
                return Err(StoreError::Conflict {
                    key: write.key.clone(),
                    current,
                });
            }
        }
        Err(backend(operation)(EtcdError::Other("nothing was written".into())))
    }

    async fn history(&self, revision: u64, prefix: &str, limit: usize) -> Result<Past, EtcdError> {
        // There is an event at this revision, so the watch below comes there.
        let published = self.hub.published();
        let mut found = Vec::new();
        if revision >= published {
            return Ok((found, revision));
        }
        let mut changes = self.client.watch(ROOT, revision).await?;
        loop {
            let events = events(changes.next().await?);
            let Some(at) = events.last().map(|event| event.revision) else {
                continue;
            };
            found.extend(events.into_iter().filter(|event| event.key.starts_with(prefix)));
            // What others change in one transaction has one revision, so an answer is never cut.
            if at >= published || found.len() >= limit {
                return Ok((found, at));
            }
        }
    }
}

fn backend(operation: &'static str) -> impl Fn(EtcdError) -> StoreError {
    move |error| StoreError::Backend {
        operation,
        message: error.to_string(),
    }
}

impl History for Inner {
    fn hub(&self) -> &Hub {
        &self.hub
    }

    fn log_after(
        self: Arc<Self>,
        revision: u64,
        prefix: String,
        limit: usize,
    ) -> BoxFuture<'static, Result<Past, StoreError>> {
        async move {
            match self.history(revision, &prefix, limit).await {
                Ok(found) => Ok(found),
                Err(error) => Err(self.failed("read etcd's history", revision, error).await),
            }
        }
        .boxed()
    }
}

impl Store for EtcdStore {
    fn is_shared(&self) -> bool {
        true
    }

    fn get(&self, key: &str) -> BoxFuture<'_, Result<(Option<Stored>, u64), StoreError>> {
        let key = key.to_owned();
        async move { self.inner.get(&key).await.map_err(backend("read from etcd")) }.boxed()
    }

    fn list(&self, range: Range) -> BoxFuture<'_, Result<Page, StoreError>> {
        async move {
            match self.inner.list(&range).await {
                Ok(page) => Ok(page),
                Err(error) => {
                    let requested = range.revision.unwrap_or(0);
                    Err(self.inner.failed("read from etcd", requested, error).await)
                }
            }
        }
        .boxed()
    }

    fn write(&self, write: Write) -> BoxFuture<'_, Result<u64, StoreError>> {
        self.inner.write(write).boxed()
    }

    fn watch(&self, prefix: &str, revision: u64) -> BoxFuture<'_, Result<Box<dyn Watch>, StoreError>> {
        let prefix = prefix.to_owned();
        async move {
            let topic = self.inner.hub.topic(&prefix);
            let changed = topic.subscribe();
            // Whether the revision can be watched from is etcd's to say. Revision 0 would mean "now".
            let at = revision.max(1).to_string();
            let asked = self
                .inner
                .client
                .call(
                    "kv/range",
                    &json!({"key": encode(MARK), "revision": at, "count_only": true}),
                )
                .await;
            if let Err(error) = asked {
                return Err(self.inner.failed("watch etcd", revision, error).await);
            }
            let inner = Arc::clone(&self.inner);
            let watch = LogWatch::new(inner, topic, changed, &prefix, revision);
            Ok(Box::new(watch) as Box<dyn Watch>)
        }
        .boxed()
    }

    fn reached(&self, revision: u64) -> BoxFuture<'_, Result<(), StoreError>> {
        async move {
            let mut published = self.inner.hub.subscribe();
            // Others may write to etcd what is not published here.
            if self
                .inner
                .revision()
                .await
                .is_ok_and(|current| current >= revision)
            {
                return Ok(());
            }
            published
                .wait_for(|at| *at >= revision)
                .await
                .map_err(|_| StoreError::Closed)?;
            Ok(())
        }
        .boxed()
    }

    fn compact(&self, revision: u64) -> BoxFuture<'_, Result<(), StoreError>> {
        async move {
            let body = json!({"revision": revision.to_string()});
            match self.inner.client.call("kv/compaction", &body).await {
                // Another control plane was there before.
                Ok(_) | Err(EtcdError::Compacted) => {
                    self.inner.compacted.fetch_max(revision, Ordering::Relaxed);
                    Ok(())
                }
                Err(error) => Err(self.inner.failed("compact etcd", revision, error).await),
            }
        }
        .boxed()
    }
}
