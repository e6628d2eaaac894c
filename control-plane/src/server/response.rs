//! Answers.

use std::convert::Infallible;

use bytes::Bytes;
use futures::Stream;
use http::{HeaderValue, Response, StatusCode, header};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt as _, Full, StreamBody};
use hyper::body::Frame;
use serde_json::Value;

use super::request::Accept;
use crate::error::ApiError;

/// Any body.
pub(super) type Body = UnsyncBoxBody<Bytes, Infallible>;

const JSON: &str = "application/json";

/// A body that is all there.
pub(super) fn bytes(code: u16, content_type: &'static str, body: impl Into<Bytes>) -> Response<Body> {
    let mut response = Response::new(Full::new(body.into()).boxed_unsync());
    *response.status_mut() = StatusCode::from_u16(code).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(content_type));
    headers.insert(
        header::CACHE_CONTROL,
        HeaderValue::from_static("no-cache, private"),
    );
    response
}

/// Plain text.
pub(super) fn text(code: u16, body: impl Into<Bytes>) -> Response<Body> {
    bytes(code, "text/plain; charset=utf-8", body)
}

/// A value, as JSON or as the client wants it.
pub(super) fn value(code: u16, accept: Accept, value: &Value) -> Response<Body> {
    if accept.yaml {
        return match serde_saphyr::to_string(value) {
            Ok(yaml) => bytes(code, "application/yaml", yaml),
            Err(failure) => error(&ApiError::internal(&failure.to_string())),
        };
    }
    json(code, value)
}

/// A value as JSON.
pub(super) fn json(code: u16, value: &Value) -> Response<Body> {
    json_bytes(code, value.to_string())
}

/// JSON that is written already.
pub(super) fn json_bytes(code: u16, body: impl Into<Bytes>) -> Response<Body> {
    bytes(code, JSON, body)
}

/// The answer that says what went wrong.
pub(super) fn error(error: &ApiError) -> Response<Body> {
    let mut response = json(error.code, &error.status());
    if error.code == 429 {
        let soon = HeaderValue::from_static("1");
        response.headers_mut().insert(header::RETRY_AFTER, soon);
    }
    response
}

/// JSON documents as they come.
pub(super) fn stream(documents: impl Stream<Item = Bytes> + Send + 'static) -> Response<Body> {
    use futures::StreamExt as _;
    let frames = documents.map(|document| Ok(Frame::data(document)));
    let mut response = Response::new(StreamBody::new(frames).boxed_unsync());
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static(JSON));
    headers.insert(
        header::CACHE_CONTROL,
        HeaderValue::from_static("no-cache, private"),
    );
    response
}

/// Adds a `Warning` header per text (RFC 7234 section 5.5, code 299).
pub(super) fn warn(mut response: Response<Body>, warnings: &[String]) -> Response<Body> {
    for warning in warnings {
        // Control characters could end the header; kube-apiserver drops them as well.
        let clean: String = warning.chars().filter(|c| !c.is_control()).collect();
        let quoted = clean.replace('\\', "\\\\").replace('"', "\\\"");
        if let Ok(value) = HeaderValue::from_bytes(format!("299 - \"{quoted}\"").as_bytes()) {
            response.headers_mut().append(header::WARNING, value);
        }
    }
    response
}
