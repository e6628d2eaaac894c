//! Query parameters, `Accept`, and bodies.

use std::collections::HashMap;
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, header};
use http_body_util::{BodyExt as _, LengthLimitError, Limited};
use serde_json::Value;

use crate::error::ApiError;
use crate::resource::{FieldValidation, ResourceInfo};
use crate::table::IncludeObject;

/// The largest request body, as kube-apiserver has it.
const MAX_BODY: usize = 3 * 1024 * 1024;
/// How much of a body that is not wanted is read, and how long.
const DRAINED: usize = 2 * MAX_BODY;
const DRAIN_TIME: Duration = Duration::from_secs(2);
/// A client that has not sent its body by then is not waited for any longer, as kube-apiserver ends requests.
const BODY_TIME: Duration = Duration::from_secs(60);

/// The query of a request.
#[derive(Debug, Default, Clone)]
pub(super) struct Params(HashMap<String, String>);

impl Params {
    pub(super) fn parse(query: Option<&str>) -> Self {
        Self(
            form_urlencoded::parse(query.unwrap_or_default().as_bytes())
                .into_owned()
                .collect(),
        )
    }

    /// The parameter, empty if it is missing.
    pub(super) fn get(&self, name: &str) -> &str {
        self.0.get(name).map_or("", String::as_str)
    }

    pub(super) fn has(&self, name: &str) -> bool {
        self.0.contains_key(name)
    }

    /// A flag: `?watch`, `?watch=1` and `?watch=true` all set it.
    pub(super) fn flag(&self, name: &str) -> bool {
        self.0
            .get(name)
            .is_some_and(|value| !matches!(value.as_str(), "0" | "false"))
    }

    pub(super) fn number(&self, name: &str) -> Result<Option<u64>, ApiError> {
        let text = self.get(name);
        if text.is_empty() {
            return Ok(None);
        }
        text.parse().map(Some).map_err(|_| {
            ApiError::bad_request(format!(
                "invalid value for query parameter {name}: {text:?} is not a number"
            ))
        })
    }

    /// Whether nothing is to be written.
    pub(super) fn dry_run(&self) -> Result<bool, ApiError> {
        dry_run(self.get("dryRun"))
    }

    pub(super) fn field_validation(&self) -> Result<FieldValidation, ApiError> {
        FieldValidation::parse(self.get("fieldValidation"))
    }

    pub(super) fn include_object(&self) -> Result<IncludeObject, ApiError> {
        match self.get("includeObject") {
            "" | "Metadata" => Ok(IncludeObject::Metadata),
            "None" => Ok(IncludeObject::None),
            "Object" => Ok(IncludeObject::Object),
            other => Err(ApiError::bad_request(format!(
                "invalid value for query parameter includeObject: {other:?}"
            ))),
        }
    }

    /// `timeoutSeconds`, if it is given and not zero.
    pub(super) fn timeout(&self) -> Result<Option<Duration>, ApiError> {
        Ok(self
            .number("timeoutSeconds")?
            .filter(|seconds| *seconds > 0)
            .map(Duration::from_secs))
    }

    /// `timeout`, such as `1s`, `500ms` or `2m`.
    pub(super) fn request_timeout(&self) -> Option<Duration> {
        let text = self.get("timeout");
        let split = text.find(|c: char| !c.is_ascii_digit())?;
        let number: u64 = text[..split].parse().ok()?;
        match &text[split..] {
            "ms" => Some(Duration::from_millis(number)),
            "s" => Some(Duration::from_secs(number)),
            "m" => Some(Duration::from_secs(number.saturating_mul(60))),
            _ => None,
        }
    }
}

/// `dryRun` of a query or of delete options.
pub(super) fn dry_run(value: &str) -> Result<bool, ApiError> {
    match value {
        "" => Ok(false),
        "All" => Ok(true),
        other => Err(ApiError::bad_request(format!(
            "dryRun: Unsupported value: {other:?}: supported values: \"All\""
        ))),
    }
}

/// How objects are to be shown.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum View {
    /// As they are.
    Object,
    /// As rows of a table.
    Table,
    /// Their metadata only.
    Metadata,
}

/// What the client wants back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Accept {
    pub(super) view: View,
    pub(super) yaml: bool,
    /// Aggregated discovery.
    pub(super) aggregated: bool,
}

impl Accept {
    /// The first of the client's media types that is served.
    ///
    /// # Errors
    /// 406 when there is none.
    pub(super) fn parse(headers: &HeaderMap) -> Result<Self, ApiError> {
        const PLAIN: Accept = Accept {
            view: View::Object,
            yaml: false,
            aggregated: false,
        };
        let mut seen = false;
        for value in headers.get_all(header::ACCEPT) {
            for range in value.to_str().unwrap_or_default().split(',') {
                let mut parts = range.split(';').map(str::trim);
                let media = parts.next().unwrap_or_default();
                if media.is_empty() {
                    continue;
                }
                seen = true;
                let parameters: HashMap<&str, &str> = parts.filter_map(|part| part.split_once('=')).collect();
                let yaml = match media {
                    "application/json" | "application/*" | "*/*" => false,
                    "application/yaml" => true,
                    _ => continue,
                };
                let meta = parameters.get("g") == Some(&"meta.k8s.io") && parameters.get("v") == Some(&"v1");
                match parameters.get("as").copied() {
                    None | Some("") => return Ok(Self { yaml, ..PLAIN }),
                    Some("Table") if meta => {
                        return Ok(Self {
                            view: View::Table,
                            yaml,
                            ..PLAIN
                        });
                    }
                    Some("PartialObjectMetadata" | "PartialObjectMetadataList") if meta => {
                        return Ok(Self {
                            view: View::Metadata,
                            yaml,
                            ..PLAIN
                        });
                    }
                    Some("APIGroupDiscoveryList")
                        if parameters.get("g") == Some(&"apidiscovery.k8s.io")
                            && parameters.get("v") == Some(&"v2") =>
                    {
                        return Ok(Self {
                            aggregated: true,
                            ..PLAIN
                        });
                    }
                    Some(_) => {}
                }
            }
        }
        if seen {
            Err(ApiError::not_acceptable(&[
                "application/json",
                "application/yaml",
            ]))
        } else {
            Ok(PLAIN)
        }
    }
}

/// Reads a whole body.
///
/// # Errors
/// 413 when it is too large, 400 when the client breaks off, 504 when it takes too long.
pub(super) async fn read_body<B>(body: B) -> Result<Bytes, ApiError>
where
    B: hyper::body::Body<Data = Bytes>,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    read_body_within(body, BODY_TIME).await
}

async fn read_body_within<B>(body: B, time: Duration) -> Result<Bytes, ApiError>
where
    B: hyper::body::Body<Data = Bytes>,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    let Ok(read) = tokio::time::timeout(time, Limited::new(body, MAX_BODY).collect()).await else {
        return Err(ApiError::timeout("the request's body did not come in time"));
    };
    match read {
        Ok(body) => Ok(body.to_bytes()),
        Err(error) if error.is::<LengthLimitError>() => Err(ApiError::too_large(MAX_BODY)),
        Err(error) => Err(ApiError::bad_request(format!("read the request's body: {error}"))),
    }
}

/// Reads what is left of a refused request's body, within bounds: a client that is still sending would find the connection
/// closed before it has read why.
pub(super) async fn drain<B>(body: &mut B)
where
    B: hyper::body::Body<Data = Bytes> + Unpin,
{
    let rest = async {
        let mut left = DRAINED;
        while let Some(Ok(frame)) = body.frame().await {
            left = left.saturating_sub(frame.data_ref().map_or(0, Bytes::len));
            if left == 0 {
                return;
            }
        }
    };
    // Whoever takes longer sees the connection closed.
    let _in_time = tokio::time::timeout(DRAIN_TIME, rest).await;
}

/// The media type of the body without parameters; JSON if the client does not say.
pub(super) fn content_type(headers: &HeaderMap) -> String {
    let value = headers
        .get(header::CONTENT_TYPE)
        .and_then(|value| value.to_str().ok())
        .unwrap_or_default();
    let media = value
        .split(';')
        .next()
        .unwrap_or_default()
        .trim()
        .to_ascii_lowercase();
    if media.is_empty() {
        "application/json".to_owned()
    } else {
        media
    }
}

/// Reads an object of the kind from a JSON or YAML body.
///
/// # Errors
/// 415 for another content type, 400 for a body that is no object.
pub(super) fn decode_object(r: &ResourceInfo, content_type: &str, body: &[u8]) -> Result<Value, ApiError> {
    let unrecognized = |why: String| {
        ApiError::bad_request(format!(
            "the object provided is unrecognized (must be of type {}): couldn't get version/kind; {why} ({})",
            r.kind,
            summary(body)
        ))
    };
    let value = decode(content_type, body)?.map_err(&unrecognized)?;
    if value.is_object() {
        Ok(value)
    } else {
        Err(unrecognized("json parse error: not an object".to_owned()))
    }
}

/// Reads any JSON or YAML body; the inner error says what is wrong with the text.
pub(super) fn decode(content_type: &str, body: &[u8]) -> Result<Result<Value, String>, ApiError> {
    match content_type {
        "application/json" => Ok(serde_json::from_slice(body).map_err(|error| {
            let why = if error.is_eof() {
                "unexpected end of JSON input".to_owned()
            } else {
                error.to_string()
            };
            format!("json parse error: {why}")
        })),
        "application/yaml" => {
            Ok(serde_saphyr::from_slice(body).map_err(|error| format!("yaml parse error: {error}")))
        }
        "application/vnd.kubernetes.protobuf" => Ok(super::protobuf::decode(body)),
        _ => Err(ApiError::unsupported_media_type(&[
            "application/json",
            "application/yaml",
        ])),
    }
}

/// The start of a body, for an error message.
fn summary(body: &[u8]) -> String {
    const MAX: usize = 30;
    let (start, more) = if body.len() > MAX {
        (&body[..MAX], " ...")
    } else {
        (body, "")
    };
    match body.first() {
        None => "<empty>".to_owned(),
        Some(b'{') => format!("{}{more}", String::from_utf8_lossy(start)),
        Some(_) => {
            let hex: String = start.iter().map(|byte| format!("{byte:02x}")).collect();
            format!("{hex}{more}")
        }
    }
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;

    use super::*;

    fn accept(text: &'static str) -> Result<Accept, ApiError> {
        let mut headers = HeaderMap::new();
        headers.insert(header::ACCEPT, HeaderValue::from_static(text));
        Accept::parse(&headers)
    }

    #[test]
    fn first_served_media_type_wins() {
        let table = "application/json;as=Table;v=v1;g=meta.k8s.io,application/json;as=Table;v=v1beta1;g=meta.k8s.io,application/json";
        assert_eq!(accept(table).unwrap().view, View::Table);
        let old = "application/json;as=Table;v=v1beta1;g=meta.k8s.io,application/json";
        assert_eq!(accept(old).unwrap().view, View::Object);
        assert!(
            accept("application/vnd.kubernetes.protobuf,application/yaml")
                .unwrap()
                .yaml
        );
        assert!(accept("*/*").is_ok());
        assert_eq!(
            accept("application/vnd.kubernetes.protobuf").unwrap_err().code,
            406
        );
        assert!(Accept::parse(&HeaderMap::new()).is_ok());
    }

    #[tokio::test]
    async fn bodies_that_are_too_large_or_too_slow_are_refused() {
        use futures::stream;
        use hyper::body::Frame;
        type Part = Result<Frame<Bytes>, std::io::Error>;
        let never = http_body_util::StreamBody::new(stream::pending::<Part>());
        let error = read_body_within(never, Duration::from_millis(20))
            .await
            .unwrap_err();
        assert_eq!(error.code, 504);
        let part = Bytes::from(vec![b' '; 1 << 20]);
        let parts = stream::iter((0..4).map(move |_| Part::Ok(Frame::data(part.clone()))));
        let error = read_body(http_body_util::StreamBody::new(parts))
            .await
            .unwrap_err();
        assert_eq!(error.code, 413);
        let broken = stream::iter([Part::Err(std::io::Error::other("gone"))]);
        let error = read_body(http_body_util::StreamBody::new(broken))
            .await
            .unwrap_err();
        assert_eq!(error.code, 400);
    }

    #[test]
    fn parameters() {
        let params = Params::parse(Some(
            "watch&labelSelector=a%20in%20(b)&timeout=500ms&limit=x&allowWatchBookmarks=0",
        ));
        assert!(params.flag("watch"));
        assert!(!params.flag("allowWatchBookmarks"));
        assert_eq!(params.get("labelSelector"), "a in (b)");
        assert_eq!(params.request_timeout(), Some(Duration::from_millis(500)));
        assert_eq!(params.number("limit").unwrap_err().code, 400);
        assert_eq!(params.dry_run(), Ok(false));
        assert!(dry_run("Some").is_err());
    }
}
