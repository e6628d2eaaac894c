//! HTTP servers that anybody may reach: what a client can hold is bounded.

use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use http::{Request, Response};
use hyper::body::{Body, Incoming};
use hyper::service::Service;
use hyper_util::rt::{TokioIo, TokioTimer};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::task::JoinSet;
use tracing::debug;

/// Connections of one server at a time; more wait.
const MOST_CONNECTIONS: usize = if cfg!(test) { 4 } else { 512 };
/// Connections that wait to be accepted.
const BACKLOG: u32 = 128;
/// Longest silence before a request.
const IDLE: Duration = Duration::from_millis(if cfg!(test) { 200 } else { 60_000 });
/// Pause after the system has no file descriptors or memory left.
const EXHAUSTED: Duration = Duration::from_millis(100);

/// Listens at an address. `only_v6` says whether an IPv6 socket takes IPv4 clients, too; `None`: as the host is set up.
pub(crate) fn listen(addr: SocketAddr, only_v6: Option<bool>) -> io::Result<TcpListener> {
    let socket = if addr.is_ipv4() {
        TcpSocket::new_v4()
    } else {
        TcpSocket::new_v6()
    }?;
    socket.set_reuseaddr(true)?;
    if let Some(only_v6) = only_v6.filter(|_| addr.is_ipv6()) {
        nix::sys::socket::setsockopt(&socket, nix::sys::socket::sockopt::Ipv6V6Only, &only_v6)?;
    }
    socket.bind(addr)?;
    socket.listen(BACKLOG)
}

/// Serves for ever. When the future is dropped, the connections end with it.
pub(crate) async fn http1<S, B>(listener: TcpListener, service: S)
where
    S: Service<Request<Incoming>, Response = Response<B>, Error = Infallible> + Clone + Send + 'static,
    S::Future: Send,
    B: Body + Send + 'static,
    B::Data: Send,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            accepted = listener.accept(), if connections.len() < MOST_CONNECTIONS => match accepted {
                Ok((stream, _)) => {
                    connections.spawn(connection(stream, service.clone()));
                }
                Err(error) => {
                    debug!(%error, "a connection is not accepted");
                    tokio::time::sleep(EXHAUSTED).await;
                }
            },
            Some(_) = connections.join_next() => {}
        }
    }
}

async fn connection<S, B>(stream: TcpStream, service: S)
where
    S: Service<Request<Incoming>, Response = Response<B>, Error = Infallible>,
    B: Body + 'static,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    let ended = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(IDLE)
        .serve_connection(TokioIo::new(stream), service)
        .await;
    if let Err(error) = ended {
        debug!(%error, "a connection ends");
    }
}

/// Lets this process have as many files open as it may: 1,024 is what services often start with, and clients of the servers
/// must not keep the agent from the API. Gives how many.
pub(crate) fn raise_file_limit() -> nix::Result<u64> {
    let (soft, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    if soft < hard {
        setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?;
    }
    Ok(hard)
}

#[cfg(test)]
mod tests {
    use http_body_util::Full;
    use hyper::body::Bytes;
    use hyper::service::service_fn;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

    use super::*;

    async fn start() -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap();
        let service = service_fn(|_| async {
            Ok::<_, Infallible>(Response::new(Full::new(Bytes::from_static(b"hello"))))
        });
        tokio::spawn(http1(listener, service));
        addr
    }

    async fn ask(stream: &mut TcpStream) -> io::Result<String> {
        stream
            .write_all(b"GET / HTTP/1.1\r\nHost: n\r\nConnection: close\r\n\r\n")
            .await?;
        let mut text = String::new();
        stream.read_to_string(&mut text).await?;
        Ok(text)
    }

    #[tokio::test]
    async fn silent_clients_cannot_keep_others_out_for_long() {
        let addr = start().await;
        let mut silent = Vec::new();
        for _ in 0..MOST_CONNECTIONS {
            silent.push(TcpStream::connect(addr).await.unwrap());
        }
        // half of a request is silence, too
        for stream in &mut silent {
            stream.write_all(b"GET / HT").await.unwrap();
        }
        let mut other = TcpStream::connect(addr).await.unwrap();
        let answer = tokio::time::timeout(Duration::from_secs(20), ask(&mut other)).await;
        let answer = answer.unwrap().unwrap();
        assert!(
            answer.starts_with("HTTP/1.1 200 OK") && answer.ends_with("hello"),
            "{answer}"
        );
    }

    #[test]
    fn the_limit_of_files_is_the_hard_one() {
        let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
        setrlimit(Resource::RLIMIT_NOFILE, hard.min(256), hard).unwrap();
        raise_file_limit().unwrap();
        assert_eq!(getrlimit(Resource::RLIMIT_NOFILE).unwrap(), (hard, hard));
    }
}
