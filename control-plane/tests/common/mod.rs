//! A control plane in the test's own process, on a port and a directory of its own.
#![allow(clippy::unwrap_used, reason = "a test stops where it fails")]
#![allow(dead_code, reason = "each test binary uses a part of this")]
#![allow(unreachable_pub, reason = "shared by several test binaries")]

use std::path::Path;

use beeline_control_plane::config::Config;
use beeline_control_plane::run::ControlPlane;
use bytes::Bytes;
use http::{Request, Response};
use http_body_util::BodyExt as _;
use kube::client::Body;
use kube::config::{KubeConfigOptions, Kubeconfig};
use serde_json::Value;

/// A running control plane; its directory is removed on drop.
pub struct Server {
    pub plane: ControlPlane,
    pub dir: tempfile::TempDir,
}

impl Server {
    /// Without a scheduler: what is written stays as it is.
    pub async fn start() -> Self {
        Self::start_with(|config| config.no_scheduler = true).await
    }

    pub async fn start_with(change: impl FnOnce(&mut Config)) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut config = Config::new(dir.path().join("data"));
        config.bind.set_port(0);
        change(&mut config);
        let plane = ControlPlane::start(config).await.unwrap();
        Self { plane, dir }
    }

    pub fn port(&self) -> u16 {
        self.plane.url().rsplit(':').next().unwrap().parse().unwrap()
    }

    pub fn config(&self) -> Kubeconfig {
        Kubeconfig::read_from(self.plane.kubeconfig()).unwrap()
    }

    pub async fn client(&self) -> kube::Client {
        client(self.config()).await
    }

    pub async fn stop(self) -> tempfile::TempDir {
        self.plane.stop().await;
        self.dir
    }
}

pub async fn start_in(dir: &Path, port: u16) -> ControlPlane {
    let mut config = Config::new(dir.join("data"));
    config.bind.set_port(port);
    config.no_scheduler = true;
    ControlPlane::start(config).await.unwrap()
}

pub async fn client(config: Kubeconfig) -> kube::Client {
    let options = KubeConfigOptions::default();
    let mut config = kube::Config::from_custom_kubeconfig(config, &options)
        .await
        .unwrap();
    config.proxy_url = None;
    // Answers are compared, not worked around.
    config.default_retry = false;
    kube::Client::try_from(config).unwrap()
}

/// Sends a request as it is and returns the answer as it is.
pub async fn send(client: &kube::Client, request: Request<Vec<u8>>) -> Response<Bytes> {
    let (head, body) = client.send(request.map(Body::from)).await.unwrap().into_parts();
    Response::from_parts(head, body.collect().await.unwrap().to_bytes())
}

/// A request with a JSON body (none if null) and the answer's status and body.
pub async fn call(client: &kube::Client, method: &str, path: &str, body: &Value) -> (u16, Value) {
    let bytes = if body.is_null() {
        Vec::new()
    } else {
        serde_json::to_vec(body).unwrap()
    };
    let request = Request::builder()
        .method(method)
        .uri(path)
        .header("content-type", "application/json");
    let answer = send(client, request.body(bytes).unwrap()).await;
    let value = serde_json::from_slice(answer.body())
        .unwrap_or_else(|_| String::from_utf8_lossy(answer.body()).into_owned().into());
    (answer.status().as_u16(), value)
}
