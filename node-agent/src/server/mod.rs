//! What the API asks of a node, over HTTPS at kubelet's port: the logs of its containers, and commands in them.
//!
//! Both sides show certificates of the cluster's authority. The node shows the one that it is known by at the API, so no
//! other has to be made for it; it serves the API and nobody else.

mod lines;
mod logs;
mod stream;
mod tls;

use std::convert::Infallible;
use std::net::{Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;
use bytes::Bytes;
use http::{Method, Request, Response, StatusCode};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt as _, Full};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsAcceptor;
use tracing::{debug, warn};

use crate::runtime::{Failure, PodRef, Runtime};
use logs::LogOptions;

/// A client that has not finished its handshake, or not sent its request, by then is cut off.
const PATIENCE: Duration = Duration::from_secs(10);
/// Pause after a failed accept, which mostly means that file descriptors have run out.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

type Body = UnsyncBoxBody<Bytes, Infallible>;

/// Listens; serves until the task ends. Gives the port.
///
/// # Errors
/// When the port is taken, or the kubeconfig has no certificate of a node.
pub(crate) async fn start(
    port: u16,
    kubeconfig: &std::path::Path,
    runtime: Arc<dyn Runtime>,
) -> anyhow::Result<u16> {
    let acceptor = TlsAcceptor::from(Arc::new(tls::config(kubeconfig)?));
    let any = SocketAddr::from((Ipv6Addr::UNSPECIFIED, port));
    let listener = match TcpListener::bind(any).await {
        Ok(listener) => listener,
        // Where IPv6 is switched off.
        Err(_) => TcpListener::bind(("0.0.0.0", port))
            .await
            .with_context(|| format!("listen on port {port}"))?,
    };
    let port = listener.local_addr()?.port();
    tokio::spawn(async move {
        loop {
            match listener.accept().await {
                Ok((stream, peer)) => {
                    let (acceptor, runtime) = (acceptor.clone(), Arc::clone(&runtime));
                    tokio::spawn(async move {
                        if let Err(error) = connection(stream, &acceptor, runtime).await {
                            debug!(%peer, %error, "a connection ended");
                        }
                    });
                }
                Err(error) => {
                    warn!(%error, "accept a connection");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    });
    Ok(port)
}

async fn connection(
    stream: TcpStream,
    acceptor: &TlsAcceptor,
    runtime: Arc<dyn Runtime>,
) -> anyhow::Result<()> {
    let stream = tokio::time::timeout(PATIENCE, acceptor.accept(stream))
        .await
        .context("no TLS handshake in time")??;
    let allowed = tls::is_api(stream.get_ref().1);
    let service = service_fn(move |mut request: Request<Incoming>| {
        let runtime = Arc::clone(&runtime);
        async move {
            let answer = if allowed {
                answer(&mut request, &runtime).await
            } else {
                text(StatusCode::FORBIDDEN, "only the API may ask")
            };
            Ok::<_, Infallible>(answer)
        }
    });
    http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(PATIENCE)
        .serve_connection(TokioIo::new(stream), service)
        .with_upgrades()
        .await?;
    Ok(())
}

fn text(status: StatusCode, text: impl Into<Bytes>) -> Response<Body> {
    let mut response = Response::new(Full::new(text.into()).boxed_unsync());
    *response.status_mut() = status;
    response
}

async fn answer(request: &mut Request<Incoming>, runtime: &Arc<dyn Runtime>) -> Response<Body> {
    let uri = request.uri().clone();
    let path: Vec<&str> = uri.path().split('/').skip(1).collect();
    let query = uri.query().unwrap_or_default();
    match (request.method(), path.as_slice()) {
        (&Method::GET, ["containerLogs", namespace, pod, container]) => {
            let options = match LogOptions::parse(query) {
                Ok(options) => options,
                Err(error) => return text(StatusCode::BAD_REQUEST, error),
            };
            match logs::open(runtime, namespace, pod, container, options).await {
                Ok(body) => Response::new(body),
                Err(error) => text(StatusCode::NOT_FOUND, error),
            }
        }
        (&Method::GET, [what @ ("exec" | "attach"), namespace, pod, container]) => {
            let wish = stream::wish(query);
            let pod = match find(&**runtime, namespace, pod) {
                Ok(pod) => pod,
                Err(why) => return text(StatusCode::NOT_FOUND, why),
            };
            let begin = async {
                if *what == "exec" {
                    return runtime.exec(&pod.uid, container, &wish).await;
                }
                match runtime.attach(&pod.uid, container, &wish).await? {
                    Some(session) => Ok(session),
                    None => logs::follow(runtime, &pod.namespace, &pod.name, container)
                        .await
                        .map_err(|why| Failure::new("AttachError", why)),
                }
            };
            stream::serve(request, &wish, begin).await
        }
        (&Method::GET, ["healthz"]) => text(StatusCode::OK, "ok"),
        _ => text(StatusCode::NOT_FOUND, "404 page not found\n"),
    }
}

/// A pod of this node.
fn find(runtime: &dyn Runtime, namespace: &str, name: &str) -> Result<PodRef, String> {
    let mut pods = runtime.pods().into_iter();
    let found = pods.find(|pod| pod.namespace == namespace && pod.name == name);
    found.ok_or_else(|| format!("pod {name:?} in namespace {namespace:?} is not on this node"))
}
