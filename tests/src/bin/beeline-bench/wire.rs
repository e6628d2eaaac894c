//! Both ends of the connections that `bench connect` counts.
//!
//! A connection is: connect, one small request, one small answer, close by the server, close by the client. The server
//! closes first so that it is not the client who runs out of ports.

use std::io::{Read, Write};
use std::net::{Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};

/// What the client measured: seconds for each block of connections, pairwise, in the order of measuring.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(crate) struct Pairs {
    pub(crate) direct: Vec<f64>,
    pub(crate) service: Vec<f64>,
}

/// Answers until it is killed.
pub(crate) fn serve(port: u16) -> Result<()> {
    let listener = TcpListener::bind((Ipv6Addr::UNSPECIFIED, port)).context("cannot listen")?;
    println!("listening");
    let mut buffer = [0_u8; 64];
    for stream in listener.incoming() {
        let mut stream = stream.context("cannot accept")?;
        // A client that goes away is its own business.
        if stream.read(&mut buffer).is_ok_and(|length| length > 0) {
            let _ = stream.write_all(b"HTTP/1.0 200 OK\r\n\r\nok\n");
        }
    }
    Ok(())
}

/// Blocks of connections in the order direct, service, service, direct, …, so that a drift of the machine's speed
/// falls on both alike.
pub(crate) fn compare(direct: SocketAddr, service: SocketAddr, pairs: usize, connections: u32) -> Result<()> {
    // Warm up caches, and the neighbour entries.
    for _ in 0..4 {
        block(direct, connections)?;
        block(service, connections)?;
    }
    let mut result = Pairs::default();
    for number in 0..pairs {
        if number % 2 == 0 {
            result.direct.push(block(direct, connections)?);
            result.service.push(block(service, connections)?);
        } else {
            result.service.push(block(service, connections)?);
            result.direct.push(block(direct, connections)?);
        }
    }
    println!(
        "{}",
        serde_json::to_string(&result).context("cannot write the result")?
    );
    Ok(())
}

fn block(target: SocketAddr, connections: u32) -> Result<f64> {
    let start = Instant::now();
    for _ in 0..connections {
        connection(target).with_context(|| format!("a connection to {target} failed"))?;
    }
    Ok(start.elapsed().as_secs_f64())
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
