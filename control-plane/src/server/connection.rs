//! Connections: TLS, HTTP/1.1 or HTTP/2, and their end.

use std::convert::Infallible;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use http::Request;
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto::Builder;
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::audit::Peer;
use super::{Api, response};
use crate::error::ApiError;
use crate::pki::Identity;

/// A client that has not finished its TLS handshake by then is cut off.
const HANDSHAKE: Duration = Duration::from_secs(10);
/// An HTTP/1 connection that is silent, or has not sent the head of a request, for so long is closed.
const HEADERS: Duration = Duration::from_secs(120);
/// HTTP/2 connections whose client does not answer a ping in this time are closed.
const PING: Duration = Duration::from_secs(30);
/// How long requests may go on after shutdown began.
const DRAIN: Duration = Duration::from_secs(5);
/// Pause after a failed accept, which mostly means that file descriptors have run out.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Serves connections until `shutdown` is cancelled, then lets requests finish for a few seconds.
pub async fn serve(
    api: Arc<Api>,
    listener: TcpListener,
    tls: rustls::ServerConfig,
    shutdown: CancellationToken,
) {
    let acceptor = TlsAcceptor::from(Arc::new(tls));
    let tracker = TaskTracker::new();
    // Cuts off what is still there when draining has taken too long.
    let cut = CancellationToken::new();
    while let Some(accepted) = shutdown.run_until_cancelled(listener.accept()).await {
        let (stream, peer) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::warn!(%error, "accept a connection");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        let (api, acceptor, shutdown, cut) =
            (Arc::clone(&api), acceptor.clone(), shutdown.clone(), cut.clone());
        let requests = tracker.clone();
        tracker.spawn(async move {
            let connection = connection(api, stream, peer.ip(), &acceptor, shutdown, requests);
            if let Some(Err(error)) = cut.run_until_cancelled(connection).await {
                tracing::debug!(%peer, error, "connection ended");
            }
        });
    }
    drop(listener);
    tracker.close();
    if tokio::time::timeout(DRAIN, tracker.wait()).await.is_err() {
        tracing::warn!(
            connections = tracker.len(),
            "closing connections that are still busy"
        );
        cut.cancel();
        tracker.wait().await;
    }
}

async fn connection(
    api: Arc<Api>,
    stream: TcpStream,
    peer: IpAddr,
    acceptor: &TlsAcceptor,
    shutdown: CancellationToken,
    tracker: TaskTracker,
) -> Result<(), String> {
    // Watch events are small and must not wait for the next one.
    stream.set_nodelay(true).map_err(|error| error.to_string())?;
    let stream = tokio::time::timeout(HANDSHAKE, acceptor.accept(stream))
        .await
        .map_err(|_| "no TLS handshake in time".to_owned())?
        .map_err(|error| format!("TLS handshake: {error}"))?;
    let identity = stream
        .get_ref()
        .1
        .peer_certificates()
        .and_then(|chain| chain.first())
        .and_then(|certificate| Identity::from_der(certificate));
    let identity = Arc::new(identity);
    let service = service_fn(move |mut request: Request<Incoming>| {
        request.extensions_mut().insert(Peer(peer));
        let (api, identity) = (Arc::clone(&api), Arc::clone(&identity));
        // A task of its own: a write goes through to its end, and gives back what it allocated if it fails, even if the
        // client has gone away meanwhile; and a bug that panics costs one request, not the connection.
        let handled = async move { api.handle(identity.as_ref().as_ref(), request).await };
        let task = tokio::spawn(tracker.track_future(handled));
        async move {
            let answer = task.await.unwrap_or_else(|error| {
                tracing::error!(%error, "a request was not handled to its end");
                response::error(&ApiError::internal("the request was not handled to its end"))
            });
            Ok::<_, Infallible>(answer)
        }
    });
    let mut builder = Builder::new(TokioExecutor::new());
    builder
        .http1()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADERS);
    builder
        .http2()
        .timer(TokioTimer::new())
        .keep_alive_interval(PING)
        .keep_alive_timeout(PING);
    let connection = builder.serve_connection_with_upgrades(TokioIo::new(stream), service);
    tokio::pin!(connection);
    tokio::select! {
        done = connection.as_mut() => return done.map_err(|error| error.to_string()),
        () = shutdown.cancelled() => connection.as_mut().graceful_shutdown(),
    }
    connection.await.map_err(|error| error.to_string())
}
