//! One listener: the same answer to every request.

use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use http::{Response, StatusCode, header};
use http_body_util::Full;
use hyper::body::Bytes;
use hyper::service::service_fn;
use serde_json::json;
use tokio::task::JoinHandle;

use super::Healthy;
use crate::serve;

/// Whom a listener answers for.
#[derive(Clone)]
pub(super) struct Subject {
    namespace: String,
    name: String,
    local_endpoints: Arc<AtomicU32>,
    healthy: Healthy,
}

impl Subject {
    pub(super) fn new(namespace: &str, name: &str, healthy: Healthy) -> Self {
        Self {
            namespace: namespace.into(),
            name: name.into(),
            local_endpoints: Arc::default(),
            healthy,
        }
    }

    fn answer(&self) -> Response<Full<Bytes>> {
        let count = self.local_endpoints.load(Ordering::Relaxed);
        let healthy = (self.healthy)();
        // kube-proxy's text to the letter: it is read by programs that are no JSON parsers
        let body = format!(
            "{{\n\t\"service\": {{\n\t\t\"namespace\": {},\n\t\t\"name\": {}\n\t}},\n\t\"localEndpoints\": {count},\n\t\"serviceProxyHealthy\": {healthy}\n}}",
            json!(self.namespace),
            json!(self.name),
        );
        let mut response = Response::new(Full::from(body));
        *response.status_mut() = if count > 0 && healthy {
            StatusCode::OK
        } else {
            StatusCode::SERVICE_UNAVAILABLE
        };
        let headers = response.headers_mut();
        let value = header::HeaderValue::from_static;
        headers.insert(header::CONTENT_TYPE, value("application/json"));
        headers.insert(header::X_CONTENT_TYPE_OPTIONS, value("nosniff"));
        headers.insert("x-load-balancing-endpoint-weight", count.into());
        response
    }
}

/// A port that is listened on, with its connections.
#[derive(Debug)]
pub(super) struct Listener {
    local_endpoints: Arc<AtomicU32>,
    task: JoinHandle<()>,
}

impl Listener {
    /// Listens. IPv6 addresses are for IPv6 only.
    pub(super) fn open(addr: SocketAddr, subject: Subject, local_endpoints: u32) -> io::Result<Self> {
        let listener = serve::listen(addr, Some(true))?;
        subject.local_endpoints.store(local_endpoints, Ordering::Relaxed);
        let local_endpoints = Arc::clone(&subject.local_endpoints);
        let service = service_fn(move |_request| {
            let answer = subject.answer();
            async move { Ok::<_, Infallible>(answer) }
        });
        let task = tokio::spawn(serve::http1(listener, service));
        Ok(Self {
            local_endpoints,
            task,
        })
    }

    /// How many endpoints are told from now on.
    pub(super) fn set(&self, local_endpoints: u32) {
        self.local_endpoints.store(local_endpoints, Ordering::Relaxed);
    }

    /// Closes the port and its connections, and waits until it is free.
    pub(super) async fn close(mut self) {
        self.task.abort();
        let _aborted = (&mut self.task).await;
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        self.task.abort();
    }
}
