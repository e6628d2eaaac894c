//! Asking the agent over its local socket.

use std::path::Path;

use anyhow::{Context as _, bail};
use http_body_util::{BodyExt, Empty};
use hyper::body::Bytes;
use hyper_util::rt::TokioIo;
use serde::de::DeserializeOwned;
use tokio::net::UnixStream;

use crate::agent::SOCKET;

/// Asks for a path and reads the answer.
pub(super) async fn get<T: DeserializeOwned>(state_dir: &Path, path: &str) -> anyhow::Result<T> {
    let socket = state_dir.join(SOCKET);
    let stream = UnixStream::connect(&socket).await.with_context(|| {
        format!(
            "no agent answers on {} (is it running, with this --state-dir?)",
            socket.display()
        )
    })?;
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    tokio::spawn(connection);
    let request = http::Request::get(path)
        .header(http::header::HOST, "agent")
        .body(Empty::<Bytes>::new())?;
    let response = sender
        .send_request(request)
        .await
        .with_context(|| format!("ask {}", socket.display()))?;
    let status = response.status();
    let body = response.into_body().collect().await?.to_bytes();
    if !status.is_success() {
        bail!("the agent answered {status}: {}", String::from_utf8_lossy(&body));
    }
    serde_json::from_slice(&body).with_context(|| format!("understand the agent's answer to {path}"))
}
