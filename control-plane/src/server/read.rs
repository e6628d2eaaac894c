//! get and list.

use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD as BASE64;
use bytes::{BufMut as _, BytesMut};
use http::Response;
use serde_json::{Value, json};

use super::request::{Accept, Params, View};
use super::response::{self, Body};
use super::route::Target;
use super::{Api, Parts, codec};
use crate::error::ApiError;
use crate::resource::ResourceInfo;
use crate::selector::{FieldSelector, LabelSelector};
use crate::store::{Page, Range, StoreError, Stored};
use crate::table;

/// How long a list waits for a revision that does not exist yet, unless the request says less. As kube-apiserver.
const WAIT_FOR_REVISION: Duration = Duration::from_secs(3);
/// How many objects are read at once while a selector decides which of them are wanted.
const FILTER_CHUNK: usize = 500;

/// `labelSelector` and `fieldSelector`.
#[derive(Debug, Clone)]
pub(super) struct Selector {
    labels: LabelSelector,
    fields: FieldSelector,
    everything: bool,
}

impl Selector {
    pub(super) fn parse(r: &ResourceInfo, params: &Params, name: Option<&str>) -> Result<Self, ApiError> {
        let mut fields = params.get("fieldSelector").to_owned();
        if let Some(name) = name {
            let separator = if fields.is_empty() { "" } else { "," };
            fields.push_str(&format!("{separator}metadata.name={name}"));
        }
        Ok(Self {
            labels: LabelSelector::parse(params.get("labelSelector"))?,
            fields: FieldSelector::parse(r, &fields)?,
            everything: params.get("labelSelector").is_empty() && fields.is_empty(),
        })
    }

    /// Whether no object needs to be looked at.
    pub(super) fn everything(&self) -> bool {
        self.everything
    }

    pub(super) fn matches(&self, object: &Value) -> bool {
        self.everything || self.labels.matches(object) && self.fields.matches(object)
    }

    fn matches_stored(&self, r: &ResourceInfo, item: &Stored) -> bool {
        self.everything
            || codec::decode(r, item.revision, &item.value).is_ok_and(|object| self.matches(&object))
    }
}

/// Where the next page begins.
#[derive(Debug, PartialEq, Eq)]
struct Continue {
    revision: u64,
    /// The last key of the page before, without the collection's prefix.
    after: String,
}

impl Continue {
    fn encode(&self) -> String {
        // The NUL makes "start" the first possible key after the last one, as etcd's range wants it.
        let token = json!({"v": "meta.k8s.io/v1", "rv": self.revision, "start": format!("{}\0", self.after)});
        BASE64.encode(token.to_string())
    }

    fn decode(token: &str) -> Result<Self, ApiError> {
        let invalid = || ApiError::bad_request("continue key is not valid");
        let token: Value = BASE64
            .decode(token)
            .ok()
            .and_then(|bytes| serde_json::from_slice(&bytes).ok())
            .filter(|token: &Value| token["v"] == "meta.k8s.io/v1")
            .ok_or_else(invalid)?;
        let after = token["start"]
            .as_str()
            .and_then(|start| start.strip_suffix('\0'))
            .ok_or_else(invalid)?;
        Ok(Self {
            revision: token["rv"].as_u64().ok_or_else(invalid)?,
            after: after.to_owned(),
        })
    }
}

impl Api {
    /// The object of that name, if it exists.
    pub(super) async fn find(&self, target: &Target, name: &str) -> Result<Option<Stored>, ApiError> {
        Ok(self.store.get(&target.key(name)).await?.0)
    }

    /// The stored object.
    pub(super) async fn stored(&self, target: &Target, name: &str) -> Result<Stored, ApiError> {
        let found = self.find(target, name).await?;
        found.ok_or_else(|| ApiError::not_found(target.resource, name))
    }

    /// All objects of the collection.
    pub(super) async fn items(&self, target: &Target) -> Result<Vec<Stored>, ApiError> {
        let range = Range {
            prefix: target.prefix(),
            ..Range::default()
        };
        Ok(self.store.list(range).await?.items)
    }

    pub(super) async fn get(
        &self,
        parts: &Parts<'_>,
        target: &Target,
        name: &str,
    ) -> Result<Response<Body>, ApiError> {
        let found = self.stored(target, name).await?;
        answer(200, parts, target.resource, &found)
    }

    pub(super) async fn list(&self, parts: &Parts<'_>, target: &Target) -> Result<Response<Body>, ApiError> {
        let r = target.resource;
        let selector = Selector::parse(r, &parts.params, None)?;
        let limit = usize::try_from(parts.params.number("limit")?.unwrap_or(0)).unwrap_or(usize::MAX);
        let (mut range, continued) = self.list_range(parts, target, limit).await?;
        let page = loop {
            match self.collect(r, &selector, range.clone()).await {
                Ok(page) => break page,
                Err(StoreError::Compacted { .. }) if continued => {
                    return Err(ApiError::expired(
                        "The provided continue parameter is too old to display a consistent list result. You can start \
                         a new list without the continue parameter.",
                    ));
                }
                // A revision that this server has not seen: asked for as "not older than", wait for it.
                Err(StoreError::Future { requested, .. }) => {
                    let wait = parts
                        .params
                        .request_timeout()
                        .unwrap_or(WAIT_FOR_REVISION)
                        .min(WAIT_FOR_REVISION);
                    let reached = tokio::time::timeout(wait, self.store.reached(requested)).await;
                    if !matches!(reached, Ok(Ok(()))) {
                        return Ok(list_timeout());
                    }
                    range.revision = None;
                }
                Err(error) => return Err(error.into()),
            }
        };
        let next = match page.items.last() {
            Some(last) if page.remaining > 0 => {
                let after = last
                    .key
                    .strip_prefix(&range.prefix)
                    .unwrap_or_default()
                    .to_owned();
                Some(
                    Continue {
                        revision: page.revision,
                        after,
                    }
                    .encode(),
                )
            }
            _ => None,
        };
        let (accept, params) = (parts.accept, parts.params.clone());
        let count = selector.everything();
        let written = tokio::task::spawn_blocking(move || write_list(r, accept, &params, &page, next, count));
        written
            .await
            .map_err(|error| ApiError::internal(&error.to_string()))?
    }

    /// What `resourceVersion`, `resourceVersionMatch`, `limit` and `continue` ask for; true when it is a further page.
    async fn list_range(
        &self,
        parts: &Parts<'_>,
        target: &Target,
        limit: usize,
    ) -> Result<(Range, bool), ApiError> {
        let params = &parts.params;
        let prefix = target.prefix();
        let revision = params.number("resourceVersion")?.unwrap_or(0);
        let how = params.get("resourceVersionMatch");
        if !how.is_empty() && params.get("resourceVersion").is_empty() {
            return Err(ApiError::bad_request(
                "resourceVersionMatch is forbidden unless resourceVersion is provided",
            ));
        }
        let token = params.get("continue");
        if !token.is_empty() {
            if revision > 0 {
                return Err(ApiError::bad_request(
                    "specifying resource version is not allowed when using continue",
                ));
            }
            let token = Continue::decode(token)?;
            let after = Some(format!("{prefix}{}", token.after));
            return Ok((
                Range {
                    prefix,
                    after,
                    limit,
                    revision: Some(token.revision),
                },
                true,
            ));
        }
        let exact = match how {
            "Exact" if revision == 0 => {
                return Err(ApiError::bad_request(
                    "resourceVersionMatch \"exact\" is forbidden for resourceVersion \"0\"",
                ));
            }
            "Exact" => true,
            "NotOlderThan" => false,
            "" => limit > 0 && revision > 0,
            other => {
                return Err(ApiError::bad_request(format!(
                    "resourceVersionMatch {other:?} is not supported"
                )));
            }
        };
        let mut range = Range {
            prefix,
            after: None,
            limit,
            revision: None,
        };
        if exact {
            range.revision = Some(revision);
        } else if revision > 0 {
            let (_, current) = self.store.get("").await?;
            // Only a revision from the future is a question to the store; anything older is answered with the newest.
            range.revision = (revision > current).then_some(revision);
        }
        Ok((range, false))
    }

    /// Reads until `range.limit` objects match.
    pub(super) async fn collect(
        &self,
        r: &'static ResourceInfo,
        selector: &Selector,
        mut range: Range,
    ) -> Result<Page, StoreError> {
        if selector.everything() {
            return self.store.list(range).await;
        }
        let limit = if range.limit == 0 { usize::MAX } else { range.limit };
        let mut items = Vec::new();
        range.limit = if range.limit == 0 { 0 } else { FILTER_CHUNK };
        loop {
            let page = self.store.list(range.clone()).await?;
            let last = page.items.last().map(|item| item.key.clone());
            let (revision, mut remaining) = (page.revision, page.remaining);
            let selector = selector.clone();
            let matching = tokio::task::spawn_blocking(move || {
                let mut items = page.items;
                items.retain(|item| selector.matches_stored(r, item));
                items
            });
            let matching = matching.await.map_err(|error| StoreError::Backend {
                operation: "filter objects",
                message: error.to_string(),
            })?;
            for item in matching {
                if items.len() == limit {
                    remaining += 1;
                } else {
                    items.push(item);
                }
            }
            if items.len() == limit || remaining == 0 {
                return Ok(Page {
                    items,
                    revision,
                    remaining,
                });
            }
            range.after = last;
            range.revision = Some(revision);
        }
    }
}

/// What kube-apiserver says when a revision does not come in time; not quite a Status, and not JSON by its header.
fn list_timeout() -> Response<Body> {
    let mut status = ApiError::timeout("request did not complete within the allotted timeout").status();
    if let Some(fields) = status.as_object_mut() {
        fields.remove("kind");
        fields.remove("apiVersion");
    }
    response::text(504, status.to_string())
}

/// One object as the client wants to see it.
pub(super) fn answer(
    code: u16,
    parts: &Parts<'_>,
    r: &ResourceInfo,
    found: &Stored,
) -> Result<Response<Body>, ApiError> {
    if parts.accept.view == View::Object && !parts.accept.yaml {
        let mut out = BytesMut::with_capacity(found.value.len() + 128);
        codec::write_object(&mut out, r, found.revision, &found.value);
        return Ok(response::json_bytes(code, out));
    }
    let object = codec::decode(r, found.revision, &found.value)?;
    answer_value(code, parts, r, object)
}

/// One object as the client wants to see it.
pub(super) fn answer_value(
    code: u16,
    parts: &Parts<'_>,
    r: &ResourceInfo,
    object: Value,
) -> Result<Response<Body>, ApiError> {
    let shown = match parts.accept.view {
        View::Object => object,
        View::Metadata => metadata_only(&object),
        View::Table => {
            let revision = object["metadata"]["resourceVersion"].clone();
            let mut table = table::table(r, &[object], parts.params.include_object()?, &now());
            table["metadata"]["resourceVersion"] = revision;
            table
        }
    };
    Ok(response::value(code, parts.accept, &shown))
}

/// The object's metadata as `PartialObjectMetadata`.
pub(super) fn metadata_only(object: &Value) -> Value {
    json!({"kind": "PartialObjectMetadata", "apiVersion": "meta.k8s.io/v1", "metadata": object["metadata"]})
}

/// The present time as the API writes it.
pub(super) fn now() -> String {
    timestamp(jiff::Timestamp::now())
}

/// A time as the API writes it.
pub(super) fn timestamp(time: jiff::Timestamp) -> String {
    time.strftime("%Y-%m-%dT%H:%M:%SZ").to_string()
}

fn write_list(
    r: &ResourceInfo,
    accept: Accept,
    params: &Params,
    page: &Page,
    next: Option<String>,
    count: bool,
) -> Result<Response<Body>, ApiError> {
    let mut metadata = json!({"resourceVersion": page.revision.to_string()});
    if let Some(next) = next {
        metadata["continue"] = next.into();
        if count {
            metadata["remainingItemCount"] = page.remaining.into();
        }
    }
    if accept.view == View::Object && !accept.yaml {
        let size: usize = page.items.iter().map(|item| item.value.len() + 64).sum();
        let mut out = BytesMut::with_capacity(size + 256);
        out.put_slice(
            format!(
                r#"{{"kind":"{}","apiVersion":"{}","metadata":{metadata},"items":["#,
                r.list_kind,
                r.api_version()
            )
            .as_bytes(),
        );
        for (index, item) in page.items.iter().enumerate() {
            if index > 0 {
                out.put_u8(b',');
            }
            codec::write_item(&mut out, item.revision, &item.value);
        }
        out.put_slice(b"]}");
        return Ok(response::json_bytes(200, out));
    }
    let mut items = Vec::with_capacity(page.items.len());
    for item in &page.items {
        items.push(codec::decode(r, item.revision, &item.value)?);
    }
    let shown = match accept.view {
        View::Table => {
            let mut table = table::table(r, &items, params.include_object()?, &now());
            table["metadata"] = metadata;
            table
        }
        View::Metadata => json!({
            "kind": "PartialObjectMetadataList",
            "apiVersion": "meta.k8s.io/v1",
            "metadata": metadata,
            "items": items.iter().map(metadata_only).collect::<Vec<_>>(),
        }),
        View::Object => json!({
            "kind": r.list_kind, "apiVersion": r.api_version(), "metadata": metadata, "items": items,
        }),
    };
    Ok(response::value(200, accept, &shown))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn continue_tokens_have_kubernetes_shape() {
        // Recorded: service-list-limit.
        let token = "eyJ2IjoibWV0YS5rOHMuaW8vdjEiLCJydiI6MzEzOTksInN0YXJ0IjoiL2RlZmF1bHQvZmlsbC0xXHUwMDAwIn0";
        let decoded = Continue::decode(token).unwrap();
        assert_eq!(
            decoded,
            Continue {
                revision: 31399,
                after: "/default/fill-1".into()
            }
        );
        assert_eq!(Continue::decode(&decoded.encode()).unwrap(), decoded);
        for bad in [
            "",
            "x",
            "e30",
            &BASE64.encode(r#"{"v":"meta.k8s.io/v1","rv":1,"start":"a"}"#),
        ] {
            assert_eq!(Continue::decode(bad).unwrap_err().code, 400, "{bad}");
        }
    }
}
