//! Both ends of the connections that `bench connect` and `bench node-port` count.
//!
//! A connection is: connect, one small request, one small answer, close by the server, close by the client. The server
//! closes first so that it is not the client who runs out of ports.

use std::io::{Read, Write};
use std::net::{Ipv6Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use beeline_tests::{Place, Pod, Process};
use serde::{Deserialize, Serialize};

use crate::figures::{Figures, Target, quantile};
use crate::population::PORT;

/// How a client begins that sends much.
const UPLOAD: &[u8] = b"PUT ";
const CHUNK: usize = 128 << 10;

/// What the client measured: seconds for each block, pairwise, in the order of measuring.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(crate) struct Pairs {
    pub(crate) direct: Vec<f64>,
    pub(crate) service: Vec<f64>,
}

impl Pairs {
    /// The ratio of the rates (the second against the first), and both rates. `names` are the two, the base first.
    pub(crate) fn report(
        mut self,
        figures: &mut Figures,
        name: &str,
        names: [&str; 2],
        block: Block,
        target: Target,
    ) {
        let [base, ours] = names;
        let (amount, unit, what) = match block {
            Block::Connections(count) => (f64::from(count), "1/s", "connections"),
            Block::Megabytes(count) => (f64::from(count), "MB/s", "bytes"),
        };
        let mut ratios: Vec<f64> = self
            .direct
            .iter()
            .zip(&self.service)
            .map(|(direct, service)| direct / service)
            .collect();
        figures.add(
            format!("{name}/{what}, {ours} against {base}"),
            quantile(&mut ratios, 0.5),
            "ratio",
            target,
        );
        for (who, times) in [(base, &mut self.direct), (ours, &mut self.service)] {
            let rate = amount / quantile(times, 0.5);
            figures.add(format!("{name}/{what}, {who}"), rate, unit, Target::None);
        }
    }
}

/// What is timed at once.
#[derive(Clone, Copy)]
pub(crate) enum Block {
    /// So many connections, one after the other.
    Connections(u32),
    /// One connection that carries this to the server.
    Megabytes(u32),
}

/// Starts [`serve`] in a pod, and waits until it listens.
pub(crate) fn start_server(pod: &Pod, logs: &Path) -> Result<Process> {
    let bench = std::env::current_exe().context("cannot find the running program's path")?;
    let mut command = pod.place().command(&bench)?;
    command.args(["server", "--port", &PORT.to_string()]);
    let log = logs.join(format!("server-{}.log", pod.name()));
    let process = Process::spawn(pod.place(), "bench server", command, &log)?;
    process.wait_log("its listening", Duration::from_secs(5), |line| {
        line == "listening"
    })?;
    Ok(process)
}

/// Runs [`compare`] in a place.
pub(crate) fn measure(
    place: &Place,
    direct: SocketAddr,
    service: SocketAddr,
    pairs: usize,
    block: Block,
) -> Result<Pairs> {
    let bench = std::env::current_exe().context("cannot find the running program's path")?;
    let block = match block {
        Block::Connections(count) => format!("--connections={count}"),
        Block::Megabytes(count) => format!("--megabytes={count}"),
    };
    let printed = place.output(
        &bench,
        &[
            "client",
            &format!("--direct={direct}"),
            &format!("--service={service}"),
            &format!("--pairs={pairs}"),
            &block,
        ],
    )?;
    serde_json::from_str(printed.trim()).context("the client printed no result")
}

/// Answers until it is killed.
pub(crate) fn serve(port: u16) -> Result<()> {
    let listener = TcpListener::bind((Ipv6Addr::UNSPECIFIED, port)).context("cannot listen")?;
    println!("listening");
    let mut buffer = vec![0_u8; CHUNK];
    for stream in listener.incoming() {
        let mut stream = stream.context("cannot accept")?;
        // A client that goes away is its own business.
        let Ok(length @ 1..) = stream.read(&mut buffer) else {
            continue;
        };
        if buffer[..length].starts_with(UPLOAD) {
            while stream.read(&mut buffer).is_ok_and(|length| length > 0) {}
        }
        let _ = stream.write_all(b"HTTP/1.0 200 OK\r\n\r\nok\n");
    }
    Ok(())
}

/// Blocks in the order direct, service, service, direct, …, so that a drift of the machine's speed falls on both alike.
pub(crate) fn compare(direct: SocketAddr, service: SocketAddr, pairs: usize, block: Block) -> Result<()> {
    // Warm up caches, and the neighbour entries.
    for _ in 0..4 {
        time(direct, block)?;
        time(service, block)?;
    }
    let mut result = Pairs::default();
    for number in 0..pairs {
        if number % 2 == 0 {
            result.direct.push(time(direct, block)?);
            result.service.push(time(service, block)?);
        } else {
            result.service.push(time(service, block)?);
            result.direct.push(time(direct, block)?);
        }
    }
    println!(
        "{}",
        serde_json::to_string(&result).context("cannot write the result")?
    );
    Ok(())
}

/// Seconds that a block takes.
fn time(target: SocketAddr, block: Block) -> Result<f64> {
    let start = Instant::now();
    let failed = || format!("a connection to {target} failed");
    match block {
        Block::Connections(count) => {
            for _ in 0..count {
                connection(target).with_context(failed)?;
            }
        }
        Block::Megabytes(count) => upload(target, count).with_context(failed)?,
    }
    Ok(start.elapsed().as_secs_f64())
}

fn upload(target: SocketAddr, megabytes: u32) -> Result<()> {
    let mut stream = TcpStream::connect(target)?;
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    stream.write_all(UPLOAD)?;
    let chunk = vec![7; CHUNK];
    let mut left = u64::from(megabytes) * 1_000_000;
    while left > 0 {
        let part = left.min(CHUNK as u64);
        stream.write_all(&chunk[..usize::try_from(part)?])?;
        left -= part;
    }
    stream.shutdown(Shutdown::Write)?;
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer)?;
    ensure!(answer.len() == 22, "an answer of {} bytes", answer.len());
    Ok(())
}

fn connection(target: SocketAddr) -> Result<()> {
    let mut stream = TcpStream::connect(target)?;
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    stream.write_all(b"GET / HTTP/1.0\r\n\r\n")?;
    let mut buffer = [0_u8; 64];
    let mut length = 0;
    loop {
        match stream.read(&mut buffer)? {
            0 => break,
            more => length += more,
        }
    }
    ensure!(length == 22, "an answer of {length} bytes");
    Ok(())
}
