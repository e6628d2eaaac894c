//! The sockets.

use std::sync::Arc;
use std::time::Duration;

use tokio::net::{TcpListener, TcpStream, UdpSocket};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;

use super::Dns;
use super::forward::{read_message, write_message};

/// Datagrams that are worked on at a time: those that wait for other servers fill it.
const DATAGRAMS: usize = 2048;
/// Connections at a time.
const CONNECTIONS: usize = 256;
/// How long a connection may be silent (RFC 7766 asks for seconds).
const SILENCE: Duration = Duration::from_secs(10);
/// Largest datagram that is read; queries are far smaller.
const DATAGRAM: usize = 4096;

/// Answers datagrams until `stop` is cancelled.
pub(super) async fn udp(dns: Arc<Dns>, socket: UdpSocket, stop: CancellationToken) {
    let (socket, places) = (Arc::new(socket), Arc::new(Semaphore::new(DATAGRAMS)));
    let mut buffer = [0; DATAGRAM];
    while let Some(received) = stop.run_until_cancelled(socket.recv_from(&mut buffer)).await {
        let Ok((length, client)) = received else {
            // An error of an earlier send, told here; or no memory for a moment.
            tokio::time::sleep(Duration::from_millis(10)).await;
            continue;
        };
        let Ok(place) = Arc::clone(&places).try_acquire_owned() else {
            // Clients ask again; those of the cluster's own names do so in vain only while thousands wait.
            continue;
        };
        let query = buffer.get(..length).unwrap_or_default().to_vec();
        let (dns, socket) = (Arc::clone(&dns), Arc::clone(&socket));
        tokio::spawn(async move {
            if let Some(answer) = dns.answer(&query, client.ip(), false).await
                && let Err(error) = socket.send_to(&answer, client).await
            {
                tracing::debug!(%client, %error, "DNS: answer not sent");
            }
            drop(place);
        });
    }
}

/// Answers on connections until `stop` is cancelled.
pub(super) async fn tcp(dns: Arc<Dns>, listener: TcpListener, stop: CancellationToken) {
    let places = Arc::new(Semaphore::new(CONNECTIONS));
    loop {
        let next = async {
            let place = Arc::clone(&places).acquire_owned().await;
            (place, listener.accept().await)
        };
        let Some((place, accepted)) = stop.run_until_cancelled(next).await else {
            return;
        };
        let (stream, client) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                // No descriptors are left, for example: some connection will end.
                tracing::warn!(%error, "DNS: connection not taken");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let (dns, stop) = (Arc::clone(&dns), stop.clone());
        tokio::spawn(async move {
            let served = stop.run_until_cancelled(connection(&dns, stream)).await;
            if let Some(Err(error)) = served {
                tracing::debug!(%client, %error, "DNS: connection ended");
            }
            drop(place);
        });
    }
}

async fn connection(dns: &Dns, mut stream: TcpStream) -> std::io::Result<()> {
    let client = stream.peer_addr()?.ip();
    loop {
        let query = tokio::time::timeout(SILENCE, read_message(&mut stream)).await??;
        let Some(answer) = dns.answer(&query, client, true).await else {
            return Ok(());
        };
        tokio::time::timeout(SILENCE, write_message(&mut stream, &answer)).await??;
    }
}
