//! One question to a backend: does it answer?

use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use tokio::net::TcpStream;
use tokio::time::{sleep, timeout};

use super::detector::Verdict;

/// When the second connection begins: a single lost packet must not decide, and the kernel would send it again after a
/// second only.
const SECOND: Duration = Duration::from_millis(150);
/// When a backend that has not answered is silent. Together with the second after which a client's connect times out
/// for the first time, and the time to change the sets, this stays well below two seconds.
const LIMIT: Duration = Duration::from_millis(450);

/// Connects and closes again; takes at most [`LIMIT`].
pub(crate) async fn probe(addr: SocketAddr) -> Verdict {
    let second = async {
        sleep(SECOND).await;
        attempt(addr).await
    };
    let both = async {
        tokio::select! {
            verdict = attempt(addr) => verdict,
            verdict = second => verdict,
        }
    };
    timeout(LIMIT, both).await.unwrap_or(Verdict::Silent)
}

/// Never comes back with silence: the kernel's "no route to host" may be about a neighbour that is just being asked for.
async fn attempt(addr: SocketAddr) -> Verdict {
    loop {
        match TcpStream::connect(addr).await {
            Ok(_) => return Verdict::Answered,
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => return Verdict::Refused,
            Err(_) => sleep(SECOND / 3).await,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    #[tokio::test]
    async fn a_listener_answers_and_a_closed_port_refuses() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let addr = listener.local_addr().unwrap();
        assert_eq!(probe(addr).await, Verdict::Answered);
        drop(listener);
        assert_eq!(probe(addr).await, Verdict::Refused);
    }

    #[tokio::test]
    async fn who_does_not_answer_is_silent_soon() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let addr = listener.local_addr().unwrap();
        // SAFETY: a plain system call on a descriptor that is open.
        unsafe { libc::listen(std::os::fd::AsRawFd::as_raw_fd(&listener), 0) };
        // a full queue drops handshakes
        let _full: Vec<_> = (0..2)
            .map(|_| std::net::TcpStream::connect_timeout(&addr, Duration::from_millis(100)))
            .collect();
        let start = std::time::Instant::now();
        assert_eq!(probe(addr).await, Verdict::Silent);
        assert!(start.elapsed() >= LIMIT && start.elapsed() < LIMIT * 3);
        // a slow answer is one
        let accepting = tokio::task::spawn_blocking(move || {
            std::thread::sleep(SECOND / 2);
            listener.accept().map(|_| listener)
        });
        assert_eq!(probe(addr).await, Verdict::Answered);
        accepting.await.unwrap().unwrap();
    }
}
