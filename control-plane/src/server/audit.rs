//! Who asked for what, and what came of it: a line of `audit.k8s.io/v1` JSON for each request, at the level Metadata.

use std::fs::OpenOptions;
use std::io::{BufWriter, Write as _};
use std::net::IpAddr;
use std::path::Path;

use bytes::Bytes;
use http::request;
use jiff::Timestamp;
use serde_json::{Value, json};
use tokio::sync::mpsc;

use super::auth::{Ask, User};

/// Lines that wait to be written; then requests wait, too: none is left out.
const WAITING: usize = 1024;

/// Where a request comes from.
#[derive(Debug, Clone, Copy)]
pub(super) struct Peer(pub(super) IpAddr);

/// An audit log.
#[derive(Debug)]
pub struct Audit(mpsc::Sender<Bytes>);

impl Audit {
    /// Appends to the file, which is created if needed. What is moved away by a log rotation goes on being written to:
    /// rotate with `copytruncate`.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn open(path: &Path) -> std::io::Result<Self> {
        let file = OpenOptions::new().create(true).append(true).open(path)?;
        let (sender, mut receiver) = mpsc::channel::<Bytes>(WAITING);
        let name = path.display().to_string();
        std::thread::Builder::new()
            .name("audit-log".into())
            .spawn(move || {
                let mut file = BufWriter::new(file);
                while let Some(line) = receiver.blocking_recv() {
                    let written = file.write_all(&line);
                    let written = if receiver.is_empty() {
                        written.and_then(|()| file.flush())
                    } else {
                        written
                    };
                    if let Err(error) = written {
                        tracing::error!(%error, file = name, "a request is not in the audit log");
                    }
                }
            })?;
        Ok(Self(sender))
    }

    pub(super) async fn record(&self, record: &Record, user: Option<&User>, code: u16) {
        let mut line = record.event(user, code).to_string();
        line.push('\n');
        if self.0.send(line.into()).await.is_err() {
            tracing::error!("the audit log has ended");
        }
    }
}

/// What is known of a request before it is answered.
pub(super) struct Record {
    uri: String,
    agent: String,
    peer: Option<IpAddr>,
    ask: Ask,
    received: Timestamp,
}

fn stamp(time: Timestamp) -> String {
    time.strftime("%Y-%m-%dT%H:%M:%S.%6fZ").to_string()
}

impl Record {
    pub(super) fn new(head: &request::Parts, ask: &Ask) -> Self {
        let agent = head.headers.get(http::header::USER_AGENT);
        Self {
            uri: head.uri.to_string(),
            agent: agent
                .and_then(|agent| agent.to_str().ok())
                .unwrap_or_default()
                .to_owned(),
            peer: head.extensions.get::<Peer>().map(|peer| peer.0),
            ask: ask.clone(),
            received: Timestamp::now(),
        }
    }

    fn event(&self, user: Option<&User>, code: u16) -> Value {
        let (verb, object) = match &self.ask {
            Ask::Path { verb, .. } => (verb, Value::Null),
            Ask::Resource {
                verb,
                group,
                resource,
                namespace,
                name,
            } => {
                let (resource, sub) = resource.split_once('/').unwrap_or((resource, ""));
                let fields = [
                    ("resource", resource),
                    ("namespace", namespace),
                    ("name", name),
                    ("apiGroup", group),
                    ("apiVersion", "v1"),
                    ("subresource", sub),
                ];
                let given = fields.into_iter().filter(|(_, value)| !value.is_empty());
                let object = given.map(|(field, value)| (field.to_owned(), value.into()));
                (verb, Value::Object(object.collect()))
            }
        };
        let stage = if verb == "watch" {
            "ResponseStarted"
        } else {
            "ResponseComplete"
        };
        let mut event = json!({
            "kind": "Event", "apiVersion": "audit.k8s.io/v1", "level": "Metadata",
            "auditID": uuid::Uuid::new_v4().to_string(), "stage": stage,
            "requestURI": self.uri, "verb": verb,
            "user": {
                "username": user.map(|user| user.name.as_str()).unwrap_or_default(),
                "groups": user.map(|user| user.groups.as_slice()).unwrap_or_default(),
            },
            "sourceIPs": self.peer.iter().map(ToString::to_string).collect::<Vec<_>>(),
            "userAgent": self.agent, "responseStatus": {"metadata": {}, "code": code},
            "requestReceivedTimestamp": stamp(self.received), "stageTimestamp": stamp(Timestamp::now()),
        });
        if object.is_object() {
            event["objectRef"] = object;
        }
        event
    }
}
