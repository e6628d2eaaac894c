//! An echo server that answers with its own name: HTTP and lines over TCP, datagrams over UDP, IPv4 and IPv6.
//!
//! Asked for `source` (the path of a request, the beginning of a datagram), it answers with the address that it sees its
//! client at. The answer to a long datagram is as long, filled up with dots.

use std::io::{BufRead, BufReader, Write};
use std::net::{Ipv6Addr, Shutdown, TcpListener, TcpStream, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use clap::Parser;
use nix::sys::signal::{SigSet, Signal};

#[derive(Parser)]
#[command(about = "An echo server that answers with its own name")]
struct Args {
    /// What it answers
    #[arg(long)]
    name: String,
    /// TCP and UDP port
    #[arg(long)]
    port: u16,
}

fn main() -> Result<()> {
    let args = Args::parse();
    // Blocked before any thread starts, so that only the wait below sees it.
    let mut stop = SigSet::empty();
    stop.add(Signal::SIGTERM);
    stop.thread_block().context("cannot block SIGTERM")?;

    // Dual stack: IPv4 peers appear as v4-mapped addresses.
    let tcp = TcpListener::bind((Ipv6Addr::UNSPECIFIED, args.port)).context("cannot listen, TCP")?;
    let udp = UdpSocket::bind((Ipv6Addr::UNSPECIFIED, args.port)).context("cannot listen, UDP")?;
    println!("{} listening at port {}", args.name, args.port);

    let name = Arc::new(args.name);
    let open = Arc::new(AtomicUsize::new(0));
    let stopping = Arc::new(AtomicBool::new(false));
    {
        let name = Arc::clone(&name);
        std::thread::spawn(move || answer_datagrams(&udp, &name));
    }
    {
        let (name, open, stopping) = (Arc::clone(&name), Arc::clone(&open), Arc::clone(&stopping));
        std::thread::spawn(move || {
            for stream in tcp.incoming().flatten() {
                open.fetch_add(1, Ordering::SeqCst);
                let (name, open, stopping) = (Arc::clone(&name), Arc::clone(&open), Arc::clone(&stopping));
                std::thread::spawn(move || {
                    // A client that goes away is its own business.
                    let _ = serve(&stream, &name, &stopping);
                    let _ = stream.shutdown(Shutdown::Both);
                    open.fetch_sub(1, Ordering::SeqCst);
                });
            }
        });
    }
    stop.wait().context("cannot wait for SIGTERM")?;
    stopping.store(true, Ordering::SeqCst);
    let start = Instant::now();
    while open.load(Ordering::SeqCst) > 0 && start.elapsed() < Duration::from_secs(2) {
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

/// `PING` lines are answered one by one on a connection that stays open; anything else is taken for HTTP.
fn serve(stream: &TcpStream, name: &str, stopping: &AtomicBool) -> Result<()> {
    stream.set_nodelay(true)?;
    let mut lines = BufReader::new(stream);
    let mut writer = stream;
    let mut line = String::new();
    while lines.read_line(&mut line)? > 0 {
        if line.trim_end() == "PING" {
            writer.write_all(format!("{name}\n").as_bytes())?;
            line.clear();
            if stopping.load(Ordering::SeqCst) {
                return Ok(());
            }
            continue;
        }
        let source = line.contains(" /source ");
        while line.trim_end() != "" {
            line.clear();
            lines.read_line(&mut line)?;
        }
        let body = if source {
            format!("{}\n", stream.peer_addr()?.ip().to_canonical())
        } else {
            format!("{name}\n")
        };
        let head = "HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nConnection: close";
        writer.write_all(format!("{head}\r\nContent-Length: {}\r\n\r\n{body}", body.len()).as_bytes())?;
        return Ok(());
    }
    Ok(())
}

fn answer_datagrams(socket: &UdpSocket, name: &str) {
    let mut buffer = [0_u8; 65_536];
    loop {
        // An ICMP error of an earlier answer is no reason to stop.
        if let Ok((length, peer)) = socket.recv_from(&mut buffer) {
            let mut answer = if buffer[..length].starts_with(b"source") {
                peer.ip().to_canonical().to_string()
            } else {
                name.to_owned()
            };
            while answer.len() < length {
                answer.push('.');
            }
            let _ = socket.send_to(answer.as_bytes(), peer);
        }
    }
}
