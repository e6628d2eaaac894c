//! A client that asks an echo server again and again, and counts answers and failures.
//!
//! Prints `started` after the first answer and one line of JSON (a `LoadReport`) at the end: after `--count` requests,
//! or when its standard input is closed.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream, UdpSocket};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use beeline_tests::client::{LoadReport, Mode};
use clap::Parser;

#[derive(Parser)]
#[command(about = "Ask an echo server again and again, and count")]
struct Args {
    /// Address and port of the service or pod
    #[arg(long)]
    target: SocketAddr,
    /// What a request is
    #[arg(long, value_enum, default_value_t = Mode::Http)]
    mode: Mode,
    /// Requests in all; without it until standard input is closed
    #[arg(long)]
    count: Option<u64>,
    /// Requests per second, all workers together; without it as fast as answers come
    #[arg(long)]
    rate: Option<u32>,
    /// Requests at a time; in mode `hold` also the number of connections
    #[arg(long, default_value_t = 1)]
    workers: u32,
    /// How long to wait for an answer, in milliseconds
    #[arg(long, default_value_t = 2000)]
    timeout_ms: u64,
}

struct Shared {
    args: Args,
    start: Instant,
    taken: AtomicU64,
    stop: AtomicBool,
    started: AtomicBool,
    report: Mutex<LoadReport>,
}

fn main() -> Result<()> {
    let args = Args::parse();
    let until_eof = args.count.is_none();
    let workers = args.workers;
    let shared = Arc::new(Shared {
        args,
        start: Instant::now(),
        taken: AtomicU64::new(0),
        stop: AtomicBool::new(false),
        started: AtomicBool::new(false),
        report: Mutex::new(LoadReport::default()),
    });
    if until_eof {
        let shared = Arc::clone(&shared);
        std::thread::spawn(move || {
            let _ = std::io::stdin().read_to_end(&mut Vec::new());
            shared.stop.store(true, Ordering::SeqCst);
        });
    }
    let threads: Vec<_> = (0..workers)
        .map(|_| {
            let shared = Arc::clone(&shared);
            std::thread::spawn(move || work(&shared))
        })
        .collect();
    for thread in threads {
        thread.join().map_err(|_| anyhow!("a worker panicked"))?;
    }
    let report = shared.report.lock().unwrap_or_else(PoisonError::into_inner);
    println!(
        "{}",
        serde_json::to_string(&*report).context("cannot write the report")?
    );
    Ok(())
}

fn work(shared: &Shared) {
    let mut held = None;
    // Counted apart and merged at the end: workers do not wait for each other.
    let mut mine = LoadReport::default();
    while let Some(due) = next(shared) {
        std::thread::sleep(due.saturating_duration_since(Instant::now()));
        let asked = Instant::now();
        match ask(&shared.args, &mut held) {
            Ok(name) => {
                mine.ok += 1;
                *mine.replies.entry(name).or_default() += 1;
                if !shared.started.swap(true, Ordering::SeqCst) {
                    println!("started");
                }
            }
            Err(error) => {
                mine.failed += 1;
                *mine.errors.entry(format!("{error:#}")).or_default() += 1;
                held = None;
            }
        }
        mine.slowest_ms = mine.slowest_ms.max(asked.elapsed().as_secs_f64() * 1000.0);
    }
    let mut all = shared.report.lock().unwrap_or_else(PoisonError::into_inner);
    all.ok += mine.ok;
    all.failed += mine.failed;
    all.slowest_ms = all.slowest_ms.max(mine.slowest_ms);
    merge(&mut all.replies, mine.replies);
    merge(&mut all.errors, mine.errors);
}

fn merge(all: &mut BTreeMap<String, u64>, mine: BTreeMap<String, u64>) {
    for (key, count) in mine {
        *all.entry(key).or_default() += count;
    }
}

/// When the next request is due, or none when it is over.
fn next(shared: &Shared) -> Option<Instant> {
    let number = shared.taken.fetch_add(1, Ordering::SeqCst);
    if shared.stop.load(Ordering::SeqCst) || shared.args.count.is_some_and(|count| number >= count) {
        return None;
    }
    let offset = match shared.args.rate {
        #[expect(clippy::cast_precision_loss, reason = "a test does not run for 2^52 requests")]
        Some(rate) => Duration::from_secs_f64(number as f64 / f64::from(rate)),
        None => Duration::ZERO,
    };
    Some(shared.start + offset)
}

fn ask(args: &Args, held: &mut Option<BufReader<TcpStream>>) -> Result<String> {
    let limit = Duration::from_millis(args.timeout_ms);
    match args.mode {
        Mode::Http => http(args.target, limit),
        Mode::Hold => {
            let reader = match held {
                Some(reader) => reader,
                None => held.insert(BufReader::new(connect(args.target, limit)?)),
            };
            reader
                .get_mut()
                .write_all(b"PING\n")
                .map_err(|error| named("write", &error))?;
            let mut line = String::new();
            if reader
                .read_line(&mut line)
                .map_err(|error| named("read", &error))?
                == 0
            {
                bail!("read: closed by the peer");
            }
            Ok(line.trim_end().to_owned())
        }
        Mode::Udp => {
            let socket = udp_socket(args.target, limit)?;
            socket
                .send_to(b"who", args.target)
                .map_err(|error| named("sendto", &error))?;
            let mut buffer = [0_u8; 256];
            let (length, from) = socket
                .recv_from(&mut buffer)
                .map_err(|error| named("recvfrom", &error))?;
            if from != args.target {
                bail!("recvfrom: the answer comes from {from}");
            }
            Ok(String::from_utf8_lossy(&buffer[..length]).into_owned())
        }
        Mode::UdpConnected => {
            let socket = udp_socket(args.target, limit)?;
            socket
                .connect(args.target)
                .map_err(|error| named("connect", &error))?;
            check_peer(socket.peer_addr(), args.target)?;
            socket.send(b"who").map_err(|error| named("send", &error))?;
            let mut buffer = [0_u8; 256];
            let length = socket.recv(&mut buffer).map_err(|error| named("recv", &error))?;
            Ok(String::from_utf8_lossy(&buffer[..length]).into_owned())
        }
    }
}

fn http(target: SocketAddr, limit: Duration) -> Result<String> {
    let mut stream = connect(target, limit)?;
    stream
        .write_all(b"GET / HTTP/1.0\r\n\r\n")
        .map_err(|error| named("write", &error))?;
    let mut answer = String::new();
    stream
        .read_to_string(&mut answer)
        .map_err(|error| named("read", &error))?;
    let (head, body) = answer.split_once("\r\n\r\n").context("read: no whole answer")?;
    if !head.starts_with("HTTP/1.1 200 ") {
        bail!("read: {}", head.lines().next().unwrap_or_default());
    }
    Ok(body.trim_end().to_owned())
}

fn connect(target: SocketAddr, limit: Duration) -> Result<TcpStream> {
    let stream = TcpStream::connect_timeout(&target, limit).map_err(|error| named("connect", &error))?;
    stream.set_read_timeout(Some(limit))?;
    stream.set_nodelay(true)?;
    check_peer(stream.peer_addr(), target)?;
    Ok(stream)
}

/// Programs must see the service's address, not the backend's.
fn check_peer(peer: std::io::Result<SocketAddr>, target: SocketAddr) -> Result<()> {
    let peer = peer.map_err(|error| named("getpeername", &error))?;
    if peer != target {
        bail!("getpeername says {peer}");
    }
    Ok(())
}

fn udp_socket(target: SocketAddr, limit: Duration) -> Result<UdpSocket> {
    let any = if target.is_ipv4() { "0.0.0.0:0" } else { "[::]:0" };
    let socket = UdpSocket::bind(any).map_err(|error| named("bind", &error))?;
    socket.set_read_timeout(Some(limit))?;
    Ok(socket)
}

/// `connect: ECONNREFUSED`: the same text for the same error, to count by.
fn named(call: &str, error: &std::io::Error) -> anyhow::Error {
    match error.raw_os_error() {
        Some(number) => anyhow!("{call}: {:?}", nix::errno::Errno::from_raw(number)),
        None => anyhow!("{call}: {:?}", error.kind()),
    }
}
