//! The part of etcd's v3 API that the control plane's store and flannel's leases need, over its JSON gateway.
//!
//! The gateway is part of every etcd since 3.4 and speaks HTTP/1.1 and JSON, for which everything is linked already; the gRPC
//! client for it would need protoc to build.

#[cfg(feature = "server")]
pub mod server;

use std::fs;
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use bytes::{Bytes, BytesMut};
use http::{Method, Request, Uri};
use http_body_util::{BodyExt as _, Full};
use hyper::body::Incoming;
use hyper_rustls::HttpsConnector;
use hyper_util::client::legacy::Client as HttpClient;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use rustls_pki_types::pem::PemObject as _;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use serde_json::{Value, json};

/// Time for one request; etcd itself gives up after five seconds without a leader.
const TIMEOUT: Duration = Duration::from_secs(7);
/// After so long a silence the kernel asks whether the other side is still there.
const KEEPALIVE: Duration = Duration::from_secs(10);

/// Where etcd is and how it knows us.
#[derive(Clone, Default)]
pub struct Access {
    /// Addresses of servers of one cluster, http or https: the first that answers is asked.
    pub servers: Vec<String>,
    /// Certificate of the authority that signed etcd's certificates (PEM).
    pub ca_file: Option<PathBuf>,
    /// Certificate that etcd knows us by, and its key (PEM).
    pub identity: Option<(PathBuf, PathBuf)>,
    /// Name and password of a user of etcd.
    pub user: Option<(String, String)>,
}

impl std::fmt::Debug for Access {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Access")
            .field("servers", &self.servers)
            .field("user", &self.user.as_ref().map(|(name, _)| name))
            .finish_non_exhaustive()
    }
}

/// A key and its value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stored {
    /// The key.
    pub key: String,
    /// The revision of the last write of this key.
    pub revision: u64,
    /// The lease that the key goes with; 0: none.
    pub lease: u64,
    /// The value.
    pub value: Bytes,
}

/// One change of one key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Change {
    /// The revision of the change.
    pub revision: u64,
    /// The key that changed.
    pub key: String,
    /// The new value; `None` when the key was deleted.
    pub value: Option<Bytes>,
    /// What the key held before, with its revision; `None` when it was created.
    pub previous: Option<(u64, Bytes)>,
}

/// What etcd said instead of doing what it was asked to.
#[derive(Debug, thiserror::Error)]
pub enum EtcdError {
    /// The revision is not kept any more.
    #[error("the revision has been compacted")]
    Compacted,
    /// The revision does not exist yet.
    #[error("the revision does not exist yet")]
    Future,
    /// What shows who we are holds no longer.
    #[error("the token is not valid")]
    Token,
    /// Anything else: in etcd's words, or why it was not reached.
    #[error("{0}")]
    Other(String),
}

impl EtcdError {
    fn other(error: impl std::fmt::Display) -> Self {
        Self::Other(error.to_string())
    }

    fn of(message: &str) -> Self {
        if message.contains("has been compacted") {
            Self::Compacted
        } else if message.contains("future revision") {
            Self::Future
        } else if message.contains("invalid auth token") {
            Self::Token
        } else {
            Self::Other(message.to_owned())
        }
    }
}

/// A client of a cluster: whichever server answers.
pub struct Client {
    http: HttpClient<HttpsConnector<HttpConnector>, Full<Bytes>>,
    servers: Vec<String>,
    /// The server that was reached last.
    current: AtomicUsize,
    user: Option<(String, String)>,
    /// Shows that we are that user; forgotten when etcd refuses it.
    token: Mutex<Option<String>>,
}

impl std::fmt::Debug for Client {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Client")
            .field("servers", &self.servers)
            .finish_non_exhaustive()
    }
}

impl Client {
    /// A client; nothing is asked yet.
    ///
    /// # Errors
    ///
    /// When an address or a file cannot be used.
    pub fn new(access: &Access) -> Result<Self, EtcdError> {
        let mut servers = Vec::new();
        for server in &access.servers {
            let uri: Uri = server
                .parse()
                .map_err(|error| EtcdError::Other(format!("{server}: {error}")))?;
            if !matches!(uri.scheme_str(), Some("http" | "https")) || uri.host().is_none() {
                return Err(EtcdError::Other(format!(
                    "{server} is not an address such as https://host:2379"
                )));
            }
            servers.push(server.trim_end_matches('/').to_owned());
        }
        let mut http = HttpConnector::new();
        http.enforce_http(false);
        http.set_nodelay(true);
        http.set_keepalive(Some(KEEPALIVE));
        http.set_connect_timeout(Some(Duration::from_secs(2)));
        let https = hyper_rustls::HttpsConnectorBuilder::new()
            .with_tls_config(tls(access)?)
            .https_or_http()
            .enable_http1()
            .wrap_connector(http);
        Ok(Self {
            http: HttpClient::builder(TokioExecutor::new()).build(https),
            servers,
            current: AtomicUsize::new(0),
            user: access.user.clone(),
            token: Mutex::default(),
        })
    }

    /// Sends a request to a server that takes connections. A request that was sent is not sent again: it may have been
    /// carried out.
    async fn send(
        &self,
        path: &str,
        body: &Value,
        token: Option<&str>,
    ) -> Result<http::Response<Incoming>, EtcdError> {
        let bytes = Bytes::from(body.to_string());
        let first = self.current.load(Ordering::Relaxed);
        let mut last = EtcdError::Other("no servers are given".into());
        for index in (first..).take(self.servers.len()) {
            let index = index % self.servers.len();
            let Some(server) = self.servers.get(index) else {
                break;
            };
            let mut request = Request::builder()
                .method(Method::POST)
                .uri(format!("{server}/v3/{path}"))
                .header(http::header::CONTENT_TYPE, "application/json");
            if let Some(token) = token {
                request = request.header(http::header::AUTHORIZATION, token);
            }
            let request = request.body(Full::new(bytes.clone())).map_err(EtcdError::other)?;
            match self.http.request(request).await {
                Ok(answer) => {
                    self.current.store(index, Ordering::Relaxed);
                    return Ok(answer);
                }
                Err(error) => {
                    let reason = std::error::Error::source(&error).map(ToString::to_string);
                    last = EtcdError::Other(format!("{server}: {error}: {}", reason.unwrap_or_default()));
                    self.current.store(index + 1, Ordering::Relaxed);
                    if !error.is_connect() {
                        return Err(last);
                    }
                }
            }
        }
        Err(last)
    }

    /// A request with one answer, both as etcd's gateway has them: `path` is what follows `/v3/`.
    ///
    /// # Errors
    ///
    /// What etcd says, or that it does not answer.
    pub async fn call(&self, path: &str, body: &Value) -> Result<Value, EtcdError> {
        let token = self.token().await?;
        match self.ask(path, body, token.as_deref()).await {
            Err(EtcdError::Token) => {
                // it was too old, or etcd has forgotten it
                *self.known() = None;
                let token = self.token().await?;
                self.ask(path, body, token.as_deref()).await
            }
            answer => answer,
        }
    }

    async fn ask(&self, path: &str, body: &Value, token: Option<&str>) -> Result<Value, EtcdError> {
        let answer = async {
            let answer = self.send(path, body, token).await?;
            let ok = answer.status().is_success();
            let bytes = answer.into_body().collect().await.map_err(EtcdError::other)?;
            let value: Value = serde_json::from_slice(&bytes.to_bytes()).map_err(EtcdError::other)?;
            if ok {
                Ok(value)
            } else {
                let message = value["message"].as_str().or(value["error"].as_str());
                Err(EtcdError::of(message.unwrap_or("the answer cannot be read")))
            }
        };
        tokio::time::timeout(TIMEOUT, answer)
            .await
            .map_err(|_| EtcdError::Other(format!("no answer within {} s", TIMEOUT.as_secs())))?
    }

    fn known(&self) -> MutexGuard<'_, Option<String>> {
        self.token.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What shows that we are our user; `None` if there is none.
    async fn token(&self) -> Result<Option<String>, EtcdError> {
        let Some((name, password)) = &self.user else {
            return Ok(None);
        };
        let known = self.known().clone();
        if known.is_some() {
            return Ok(known);
        }
        let login = json!({"name": name, "password": password});
        let answer = self.ask("auth/authenticate", &login, None).await?;
        let token = answer["token"].as_str().map(ToOwned::to_owned);
        self.known().clone_from(&token);
        Ok(token)
    }

    /// All changes under `prefix` after `revision`.
    ///
    /// # Errors
    ///
    /// As [`Client::call`].
    pub async fn watch(&self, prefix: &str, revision: u64) -> Result<Changes, EtcdError> {
        // From the revision itself: etcd lets a watch begin at the very revision that was compacted, whose event may be lost.
        let create = json!({"create_request": {
            "key": encode(prefix),
            "range_end": encode(end_of(prefix)),
            "start_revision": revision.to_string(),
            "prev_kv": true,
        }});
        let token = self.token().await?;
        let answer = tokio::time::timeout(TIMEOUT, self.send("watch", &create, token.as_deref()))
            .await
            .map_err(|_| EtcdError::Other("the watch does not begin".into()))??;
        Ok(Changes {
            body: answer.into_body(),
            buffer: BytesMut::new(),
            after: revision,
        })
    }
}

fn tls(access: &Access) -> Result<rustls::ClientConfig, EtcdError> {
    let mut roots = rustls::RootCertStore::empty();
    let certificates = |path: &PathBuf| -> Result<Vec<CertificateDer<'static>>, EtcdError> {
        let pem = fs::read(path).map_err(|error| EtcdError::Other(format!("{}: {error}", path.display())))?;
        CertificateDer::pem_slice_iter(&pem)
            .collect::<Result<_, _>>()
            .map_err(|error| EtcdError::Other(format!("{}: {error}", path.display())))
    };
    if let Some(path) = &access.ca_file {
        for certificate in certificates(path)? {
            roots.add(certificate).map_err(EtcdError::other)?;
        }
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(EtcdError::other)?
        .with_root_certificates(roots);
    match &access.identity {
        Some((certificate, key)) => {
            let private = PrivateKeyDer::from_pem_file(key)
                .map_err(|error| EtcdError::Other(format!("{}: {error}", key.display())))?;
            builder
                .with_client_auth_cert(certificates(certificate)?, private)
                .map_err(EtcdError::other)
        }
        None => Ok(builder.with_no_client_auth()),
    }
}

/// One watch, an event at a time.
#[derive(Debug)]
pub struct Changes {
    body: Incoming,
    buffer: BytesMut,
    /// Events up to this revision are not wanted.
    after: u64,
}

impl Changes {
    /// The next events; some answers have none.
    ///
    /// # Errors
    ///
    /// When the watch ends, and why.
    pub async fn next(&mut self) -> Result<Vec<Change>, EtcdError> {
        let line = loop {
            if let Some(end) = self.buffer.iter().position(|byte| *byte == b'\n') {
                break self.buffer.split_to(end + 1);
            }
            let frame = self.body.frame().await;
            let frame = frame.ok_or_else(|| EtcdError::Other("the watch ended".into()))?;
            if let Ok(data) = frame.map_err(EtcdError::other)?.into_data() {
                self.buffer.extend_from_slice(&data);
            }
        };
        let value: Value = serde_json::from_slice(&line).map_err(EtcdError::other)?;
        let error = &value["error"];
        if let Some(message) = error["message"].as_str().or(error.as_str()) {
            return Err(EtcdError::of(message));
        }
        let result = &value["result"];
        if result["canceled"] == true {
            return Err(if number(&result["compact_revision"]) > 0 {
                EtcdError::Compacted
            } else {
                EtcdError::Other(format!("the watch was cancelled: {}", result["cancel_reason"]))
            });
        }
        let mut events = Vec::new();
        for event in result["events"].as_array().into_iter().flatten() {
            if number(&event["kv"]["mod_revision"]) > self.after {
                events.push(change(event)?);
            }
        }
        Ok(events)
    }
}

fn change(event: &Value) -> Result<Change, EtcdError> {
    let now = stored(&event["kv"])?;
    let before = &event["prev_kv"];
    let previous = if before.is_object() {
        let before = stored(before)?;
        Some((before.revision, before.value))
    } else if event["type"] == "DELETE" || event["kv"]["create_revision"] != event["kv"]["mod_revision"] {
        // What it was before has been compacted since the watch began.
        return Err(EtcdError::Compacted);
    } else {
        None
    };
    Ok(Change {
        revision: now.revision,
        key: now.key,
        value: (event["type"] != "DELETE").then_some(now.value),
        previous,
    })
}

/// A number as the gateway writes it: a string; missing if it is zero.
#[must_use]
pub fn number(value: &Value) -> u64 {
    value
        .as_str()
        .and_then(|text| text.parse().ok())
        .or(value.as_u64())
        .unwrap_or(0)
}

/// Keys and values as the gateway takes them.
pub fn encode(bytes: impl AsRef<[u8]>) -> String {
    BASE64.encode(bytes)
}

fn decode(value: &Value) -> Result<Vec<u8>, EtcdError> {
    BASE64
        .decode(value.as_str().unwrap_or_default())
        .map_err(EtcdError::other)
}

/// A key and its value, from the gateway's.
///
/// # Errors
///
/// When they cannot be decoded.
pub fn stored(kv: &Value) -> Result<Stored, EtcdError> {
    Ok(Stored {
        key: String::from_utf8(decode(&kv["key"])?).map_err(EtcdError::other)?,
        revision: number(&kv["mod_revision"]),
        lease: number(&kv["lease"]),
        value: decode(&kv["value"])?.into(),
    })
}

/// The first key after all that begin with the prefix.
#[must_use]
pub fn end_of(prefix: &str) -> Vec<u8> {
    let mut end = prefix.as_bytes().to_vec();
    while let Some(last) = end.pop() {
        if let Some(next) = last.checked_add(1) {
            end.push(next);
            return end;
        }
    }
    vec![0]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_end_of_a_prefix_is_after_all_its_keys() {
        assert_eq!(end_of("/a/"), b"/a0");
        assert_eq!(end_of(""), [0]);
    }

    #[test]
    fn events_say_what_was_before_or_that_it_is_lost() {
        let kv = |revision: &str, created: &str, value: &str| json!({"key": encode("/k"), "mod_revision": revision, "create_revision": created, "value": encode(value)});
        let created = change(&json!({"kv": kv("5", "5", "a")})).unwrap();
        assert_eq!((created.revision, created.previous), (5, None));
        let changed = change(&json!({"kv": kv("7", "5", "b"), "prev_kv": kv("5", "5", "a")})).unwrap();
        assert_eq!(changed.previous, Some((5, Bytes::from_static(b"a"))));
        assert_eq!(changed.value, Some(Bytes::from_static(b"b")));
        let deleted = json!({"type": "DELETE", "kv": {"key": encode("/k"), "mod_revision": "9"}, "prev_kv": kv("7", "5", "b")});
        assert_eq!(change(&deleted).unwrap().value, None);
        for lost in [
            json!({"kv": kv("7", "5", "b")}),
            json!({"type": "DELETE", "kv": {"key": encode("/k"), "mod_revision": "9"}}),
        ] {
            assert!(matches!(change(&lost), Err(EtcdError::Compacted)), "{lost}");
        }
    }
}
