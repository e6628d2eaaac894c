//! A client that asks an echo server again and again, and counts answers and failures.
//!
//! Prints `started` after the first answer and one line of JSON (a `LoadReport`) at the end: after `--count` requests,
//! or when its standard input is closed.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream, UdpSocket};
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
    /// Ask for the address that the server sees, not for its name
    #[arg(long)]
    source: bool,
    /// Length of a datagram, which is that of its answer, too
    #[arg(long, default_value_t = 0)]
    size: usize,
    /// Source port of datagrams
    #[arg(long, default_value_t = 0)]
    source_port: u16,
}

impl Args {
    /// What a datagram says.
    fn datagram(&self) -> Vec<u8> {
        let mut text = if self.source {
            b"source".to_vec()
        } else {
            b"who".to_vec()
        };
        if text.len() < self.size {
            text.resize(self.size, b'.');
        }
        text
    }

    /// What an answer says.
    fn name(&self, answer: &[u8]) -> Result<String> {
        let text = String::from_utf8_lossy(answer);
        if answer.len() < self.size {
            bail!("recv: an answer of {} bytes to {}", answer.len(), self.size);
        }
        Ok(text.trim_end_matches('.').to_owned())
    }
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
    let mut held = Held::default();
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
                // An unconnected socket is as good as before; losing it would hide that its flow goes nowhere.
                held.stream = None;
                if shared.args.mode != Mode::UdpStay {
                    held.socket = None;
                }
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

/// What a worker keeps open.
#[derive(Default)]
struct Held {
    stream: Option<BufReader<TcpStream>>,
    socket: Option<UdpSocket>,
}

fn ask(args: &Args, held: &mut Held) -> Result<String> {
    let limit = Duration::from_millis(args.timeout_ms);
    match args.mode {
        Mode::Http => http(args, limit),
        Mode::Hold => {
            let reader = match &mut held.stream {
                Some(reader) => reader,
                None => held.stream.insert(BufReader::new(connect(args.target, limit)?)),
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
        Mode::Udp => unconnected(args, &udp_socket(args, limit)?),
        Mode::UdpStay => {
            let socket = match &held.socket {
                Some(socket) => socket,
                None => held.socket.insert(udp_socket(args, limit)?),
            };
            unconnected(args, socket)
        }
        Mode::UdpConnected => connected(args, &connected_socket(args, limit)?),
        Mode::UdpHold => {
            let socket = match &held.socket {
                Some(socket) => socket,
                None => held.socket.insert(connected_socket(args, limit)?),
            };
            connected(args, socket)
        }
    }
}

fn unconnected(args: &Args, socket: &UdpSocket) -> Result<String> {
    socket
        .send_to(&args.datagram(), args.target)
        .map_err(|error| named("sendto", &error))?;
    let mut buffer = [0_u8; 65_536];
    let (length, from) = socket
        .recv_from(&mut buffer)
        .map_err(|error| named("recvfrom", &error))?;
    if from != args.target {
        bail!("recvfrom: the answer comes from {from}");
    }
    args.name(&buffer[..length])
}

fn connected_socket(args: &Args, limit: Duration) -> Result<UdpSocket> {
    let socket = udp_socket(args, limit)?;
    socket
        .connect(args.target)
        .map_err(|error| named("connect", &error))?;
    check_peer(socket.peer_addr(), args.target)?;
    Ok(socket)
}

fn connected(args: &Args, socket: &UdpSocket) -> Result<String> {
    socket
        .send(&args.datagram())
        .map_err(|error| named("send", &error))?;
    let mut buffer = [0_u8; 65_536];
    let length = socket.recv(&mut buffer).map_err(|error| named("recv", &error))?;
    args.name(&buffer[..length])
}

fn http(args: &Args, limit: Duration) -> Result<String> {
    let mut stream = connect(args.target, limit)?;
    let path = if args.source { "/source" } else { "/" };
    stream
        .write_all(format!("GET {path} HTTP/1.0\r\n\r\n").as_bytes())
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

fn udp_socket(args: &Args, limit: Duration) -> Result<UdpSocket> {
    let any: IpAddr = if args.target.is_ipv4() {
        Ipv4Addr::UNSPECIFIED.into()
    } else {
        Ipv6Addr::UNSPECIFIED.into()
    };
    let socket = UdpSocket::bind((any, args.source_port)).map_err(|error| named("bind", &error))?;
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
