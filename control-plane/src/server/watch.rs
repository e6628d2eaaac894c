//! Watches: a stream of JSON documents, one per change.

use std::collections::VecDeque;
use std::time::Duration;

use bytes::{BufMut as _, Bytes, BytesMut};
use futures::stream;
use http::Response;
use rand::Rng as _;
use serde_json::{Value, json};
use tokio::time::{Instant, Interval, MissedTickBehavior};
use tokio_util::sync::CancellationToken;

use super::read::{Selector, metadata_only, now};
use super::request::View;
use super::response::{self, Body};
use super::route::Target;
use super::{Api, Parts, codec, errors};
use crate::error::ApiError;
use crate::resource::ResourceInfo;
use crate::store::{Event, Range, StoreError, Watch};
use crate::table::{IncludeObject, table};

/// Time between bookmarks, as kube-apiserver.
const BOOKMARK: Duration = Duration::from_secs(60);
/// A watch without `timeoutSeconds` ends after this time, at most twice of it, as kube-apiserver.
const MIN_TIMEOUT: Duration = Duration::from_secs(1800);

/// What a watch begins with.
enum Start {
    /// The changes after a revision.
    After(u64),
    /// All objects as ADDED events, then the changes.
    Objects,
    /// The changes from now on.
    Now,
}

impl Api {
    pub(super) async fn watch(&self, parts: &Parts<'_>, target: &Target) -> Result<Response<Body>, ApiError> {
        let r = target.resource;
        let params = &parts.params;
        let selector = Selector::parse(r, params, target.name.as_deref())?;
        let bookmarks = params.flag("allowWatchBookmarks");
        let revision = params.number("resourceVersion")?.unwrap_or(0);
        let start = start(parts, revision)?;
        // Without a revision, "the present state has been sent" is told the same way as for streaming lists (recorded:
        // service-watch-stream).
        let mark_initial =
            bookmarks && matches!(start, Start::Objects) && params.get("resourceVersion") != "0"
                || params.flag("sendInitialEvents");
        let timeout = params
            .timeout()?
            .unwrap_or_else(|| MIN_TIMEOUT.mul_f64(rand::rng().random_range(1.0..2.0)));
        let prefix = target.prefix();
        let mut queue = VecDeque::new();
        let mut encoder = Encoder {
            r,
            selector,
            view: parts.accept.view,
            include: params.include_object()?,
            columns_sent: false,
        };
        let from = match start {
            Start::After(revision) => revision,
            Start::Now => self.store.get("").await?.1,
            Start::Objects => {
                let range = Range {
                    prefix: prefix.clone(),
                    ..Range::default()
                };
                let page = self.collect(r, &encoder.selector, range).await?;
                if revision > page.revision {
                    return Err(errors::too_large(revision, page.revision));
                }
                for item in page.items {
                    queue.push_back(encoder.stored("ADDED", item.revision, &item.value)?);
                }
                if mark_initial {
                    queue.push_back(encoder.bookmark(page.revision, true));
                }
                page.revision
            }
        };
        let watch = match self.store.watch(&prefix, from).await {
            Ok(watch) => watch,
            // Recorded: watch-expired-rv. The request itself succeeds.
            Err(error @ StoreError::Compacted { .. }) => {
                let document = error_event(&error.into());
                return Ok(response::stream(stream::iter([document])));
            }
            Err(error) => return Err(error.into()),
        };
        let mut ticks = tokio::time::interval_at(Instant::now() + BOOKMARK, BOOKMARK);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let streamer = Streamer {
            watch,
            encoder,
            queue,
            bookmarks: bookmarks.then_some(ticks),
            bookmarked: 0,
            deadline: Instant::now() + timeout,
            shutdown: self.shutdown.clone(),
            done: false,
        };
        Ok(response::stream(stream::unfold(
            streamer,
            |mut streamer| async move { streamer.next().await.map(|document| (document, streamer)) },
        )))
    }
}

/// What the parameters say about the beginning.
fn start(parts: &Parts<'_>, revision: u64) -> Result<Start, ApiError> {
    let params = &parts.params;
    let how = params.get("resourceVersionMatch");
    let streaming = params.get("sendInitialEvents");
    if streaming.is_empty() {
        if !how.is_empty() {
            return Err(list_options(
                "resourceVersionMatch",
                "resourceVersionMatch is forbidden for watch unless sendInitialEvents is provided",
            ));
        }
        // Without a revision, and with "any", a watch begins with the present state.
        return Ok(if revision == 0 {
            Start::Objects
        } else {
            Start::After(revision)
        });
    }
    if how != "NotOlderThan" {
        return Err(list_options(
            "resourceVersionMatch",
            "sendInitialEvents requires setting resourceVersionMatch to NotOlderThan",
        ));
    }
    match (params.flag("sendInitialEvents"), revision) {
        (true, _) => Ok(Start::Objects),
        (false, 0) => Ok(Start::Now),
        (false, revision) => Ok(Start::After(revision)),
    }
}

fn list_options(field: &str, why: &str) -> ApiError {
    let message = format!("Forbidden: {why}");
    ApiError {
        code: 422,
        reason: "Invalid",
        message: format!("ListOptions.meta.k8s.io \"\" is invalid: {field}: {message}"),
        details: Some(json!({
            "group": "meta.k8s.io",
            "kind": "ListOptions",
            "causes": [{"reason": "FieldValueForbidden", "message": message, "field": field}],
        })),
    }
}

fn error_event(error: &ApiError) -> Bytes {
    document(&json!({"type": "ERROR", "object": error.status()}))
}

fn document(value: &Value) -> Bytes {
    let mut text = value.to_string();
    text.push('\n');
    text.into()
}

/// Turns changes into what this client wants to see of them.
struct Encoder {
    r: &'static ResourceInfo,
    selector: Selector,
    view: View,
    include: IncludeObject,
    columns_sent: bool,
}

impl Encoder {
    /// The event for a change, if it concerns the selected objects. An object that begins or ceases to match looks
    /// added or deleted.
    fn event(&mut self, event: &Event) -> Result<Option<Bytes>, ApiError> {
        let before = self.wanted(
            event
                .previous
                .as_ref()
                .map(|(revision, value)| (*revision, value)),
        )?;
        let after = self.wanted(event.value.as_ref().map(|value| (event.revision, value)))?;
        let (kind, value) = match (before, after) {
            (None, None) => return Ok(None),
            (None, Some(value)) => ("ADDED", value),
            (Some(_), Some(value)) => ("MODIFIED", value),
            // The last state, at the revision of its end.
            (Some(value), None) => ("DELETED", value),
        };
        // An object that ceased to match is shown as it is now, as kube-apiserver does.
        let shown = event.value.as_ref().unwrap_or(value);
        self.stored(kind, event.revision, shown).map(Some)
    }

    fn wanted<'a>(&self, state: Option<(u64, &'a Bytes)>) -> Result<Option<&'a Bytes>, ApiError> {
        let Some((revision, value)) = state else {
            return Ok(None);
        };
        if self.selector.everything() {
            return Ok(Some(value));
        }
        let object = codec::decode(self.r, revision, value)?;
        Ok(self.selector.matches(&object).then_some(value))
    }

    fn stored(&mut self, kind: &str, revision: u64, value: &Bytes) -> Result<Bytes, ApiError> {
        if self.view == View::Object {
            let mut out = BytesMut::with_capacity(value.len() + 160);
            out.put_slice(format!(r#"{{"type":"{kind}","object":"#).as_bytes());
            codec::write_object(&mut out, self.r, revision, value);
            out.put_slice(b"}\n");
            return Ok(out.freeze());
        }
        let object = codec::decode(self.r, revision, value)?;
        let shown = match self.view {
            View::Table => {
                let metadata = json!({"resourceVersion": revision.to_string()});
                self.table(&[object], metadata)
            }
            _ => metadata_only(&object),
        };
        Ok(document(&json!({"type": kind, "object": shown})))
    }

    /// Column definitions are only in the first table of a watch, as kube-apiserver sends them.
    fn table(&mut self, objects: &[Value], metadata: Value) -> Value {
        let mut table = table(self.r, objects, self.include, &now());
        table["metadata"] = metadata;
        if self.columns_sent {
            table["columnDefinitions"] = json!([]);
        }
        self.columns_sent = true;
        table
    }

    fn bookmark(&mut self, revision: u64, initial: bool) -> Bytes {
        let mut metadata = json!({"resourceVersion": revision.to_string()});
        if initial {
            metadata["annotations"] = json!({"k8s.io/initial-events-end": "true"});
        }
        let object = match self.view {
            View::Object => {
                json!({"kind": self.r.kind, "apiVersion": self.r.api_version(), "metadata": metadata})
            }
            View::Metadata => metadata_only(&json!({"metadata": metadata})),
            View::Table => self.table(&[], metadata),
        };
        document(&json!({"type": "BOOKMARK", "object": object}))
    }
}

/// The state of one watch.
struct Streamer {
    watch: Box<dyn Watch>,
    encoder: Encoder,
    queue: VecDeque<Bytes>,
    bookmarks: Option<Interval>,
    /// The revision of the last bookmark.
    bookmarked: u64,
    deadline: Instant,
    shutdown: CancellationToken,
    done: bool,
}

impl Streamer {
    async fn next(&mut self) -> Option<Bytes> {
        loop {
            if let Some(document) = self.queue.pop_front() {
                return Some(document);
            }
            if self.done {
                return None;
            }
            let tick = async {
                match &mut self.bookmarks {
                    Some(ticks) => drop(ticks.tick().await),
                    None => std::future::pending().await,
                }
            };
            // Changes last: a busy watch must still end in time.
            tokio::select! {
                biased;
                () = self.shutdown.cancelled() => return None,
                () = tokio::time::sleep_until(self.deadline) => {
                    // So that the client can go on from here however quiet its objects were.
                    self.done = true;
                    self.bookmark();
                }
                () = tick => self.bookmark(),
                event = self.watch.next() => match event {
                    Ok(event) => match self.encoder.event(&event) {
                        Ok(document) => self.queue.extend(document),
                        Err(error) => self.fail(&error),
                    },
                    Err(StoreError::Closed) => return None,
                    Err(error) => self.fail(&error.into()),
                },
            }
        }
    }

    fn bookmark(&mut self) {
        if self.bookmarks.is_none() {
            return;
        }
        if let Some(revision) = self
            .watch
            .progress()
            .filter(|revision| *revision > self.bookmarked)
        {
            self.bookmarked = revision;
            self.queue.push_back(self.encoder.bookmark(revision, false));
        }
    }

    fn fail(&mut self, error: &ApiError) {
        self.done = true;
        self.queue.push_back(error_event(error));
    }
}
