//! Names of others: asked of the servers that this machine uses, and handed on as they answer.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use hickory_proto::op::{Message, OpCode, Query};
use hickory_proto::rr::{Name, RecordType};
use hickory_proto::serialize::binary::{BinDecodable as _, BinDecoder};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpStream, UdpSocket};
use tokio::time::Instant;

const RESOLV_CONF: &str = "/etc/resolv.conf";
/// How long what was read of it counts.
const READ_AGAIN: Duration = Duration::from_secs(5);
/// Servers that are asked, as glibc does.
const SERVERS: usize = 3;
/// How long one of them may take; clients ask again after five seconds.
const PATIENCE: Duration = Duration::from_millis(1500);
/// Length of a message's header.
const HEADER: usize = 12;

/// Knows whom to ask.
pub(super) struct Forwarder {
    given: Vec<SocketAddr>,
    /// Addresses of the cluster's DNS: to ask there is to ask in a circle.
    own: Vec<IpAddr>,
    read: Mutex<Option<(Instant, Vec<SocketAddr>)>>,
}

/// The servers that a resolv.conf names.
fn nameservers(text: &str) -> impl Iterator<Item = SocketAddr> {
    text.lines()
        .filter_map(|line| line.trim_start().strip_prefix("nameserver"))
        .filter(|rest| rest.starts_with([' ', '\t']))
        .filter_map(|rest| rest.split_whitespace().next()?.parse::<IpAddr>().ok())
        .map(|ip| SocketAddr::new(ip, 53))
}

impl Forwarder {
    /// Asks those that are `given`, else those of `/etc/resolv.conf` without `own` addresses.
    pub(super) fn new(given: Vec<SocketAddr>, own: Vec<IpAddr>) -> Self {
        Self {
            given,
            own,
            read: Mutex::new(None),
        }
    }

    fn servers(&self) -> Vec<SocketAddr> {
        if !self.given.is_empty() {
            return self.given.clone();
        }
        let mut read = self.read.lock().unwrap_or_else(PoisonError::into_inner);
        match &*read {
            Some((at, servers)) if at.elapsed() < READ_AGAIN => servers.clone(),
            _ => {
                let text = std::fs::read_to_string(RESOLV_CONF).unwrap_or_default();
                let servers: Vec<SocketAddr> = nameservers(&text)
                    .filter(|server| !self.own.contains(&server.ip()))
                    .take(SERVERS)
                    .collect();
                *read = Some((Instant::now(), servers.clone()));
                servers
            }
        }
    }

    /// The answer of the first server that gives one, over the protocol that the client uses, which then does what it
    /// would if it had asked itself. `None` if none answers.
    pub(super) async fn relay(&self, query: &[u8], tcp: bool) -> Option<Vec<u8>> {
        let id: [u8; 2] = query.get(..2)?.try_into().ok()?;
        // An identifier and a port that nobody can guess, whatever the client took.
        let fresh: [u8; 2] = rand::random();
        let mut query = query.to_vec();
        query.get_mut(..2)?.copy_from_slice(&fresh);
        for server in self.servers() {
            let attempt = async {
                if tcp {
                    ask_tcp(server, &query).await
                } else {
                    ask_udp(server, &query).await
                }
            };
            match tokio::time::timeout(PATIENCE, attempt).await {
                Ok(Ok(mut answer)) => {
                    answer.get_mut(..2)?.copy_from_slice(&id);
                    return Some(answer);
                }
                Ok(Err(error)) => tracing::debug!(%server, %error, "DNS: not answered"),
                Err(_) => tracing::debug!(%server, "DNS: no answer in time"),
            }
        }
        None
    }

    /// Asks about a name; over TCP where the answer is too long for a datagram.
    pub(super) async fn ask(&self, name: &Name, kind: RecordType) -> Option<Message> {
        let mut query = Message::query();
        query.metadata.op_code = OpCode::Query;
        query.metadata.recursion_desired = true;
        query.add_query(Query::query(name.clone(), kind));
        let query = query.to_vec().ok()?;
        let answer = Message::from_vec(&self.relay(&query, false).await?).ok()?;
        if !answer.metadata.truncation {
            return Some(answer);
        }
        Message::from_vec(&self.relay(&query, true).await?).ok()
    }
}

/// Whether this is the answer to that query: the same identifier and question.
fn answers(query: &[u8], answer: &[u8]) -> bool {
    let question = |message: &[u8]| -> Option<usize> {
        let mut decoder = BinDecoder::new(message.get(HEADER..)?);
        Query::read(&mut decoder).ok()?;
        Some(HEADER + decoder.index())
    };
    let Some(end) = question(query) else {
        return false;
    };
    let is_response = answer.get(2).is_some_and(|flags| flags & 0x80 != 0);
    let same = |from: usize, to: usize| match (query.get(from..to), answer.get(from..to)) {
        (Some(asked), Some(said)) => asked.eq_ignore_ascii_case(said),
        _ => false,
    };
    is_response && query.get(..2) == answer.get(..2) && same(HEADER, end)
}

async fn ask_udp(server: SocketAddr, query: &[u8]) -> std::io::Result<Vec<u8>> {
    let any: IpAddr = if server.is_ipv4() {
        Ipv4Addr::UNSPECIFIED.into()
    } else {
        Ipv6Addr::UNSPECIFIED.into()
    };
    let socket = UdpSocket::bind((any, 0)).await?;
    socket.connect(server).await?;
    socket.send(query).await?;
    let mut buffer = vec![0; usize::from(u16::MAX)];
    loop {
        let length = socket.recv(&mut buffer).await?;
        let answer = buffer.get(..length).unwrap_or_default();
        if answers(query, answer) {
            return Ok(answer.to_vec());
        }
    }
}

async fn ask_tcp(server: SocketAddr, query: &[u8]) -> std::io::Result<Vec<u8>> {
    let mut stream = TcpStream::connect(server).await?;
    write_message(&mut stream, query).await?;
    let answer = read_message(&mut stream).await?;
    if answers(query, &answer) {
        Ok(answer)
    } else {
        Err(std::io::Error::other("the answer is to another question"))
    }
}

/// Writes a message as TCP carries it: its length before it (RFC 1035, 4.2.2).
pub(super) async fn write_message(stream: &mut TcpStream, message: &[u8]) -> std::io::Result<()> {
    let length = u16::try_from(message.len()).map_err(std::io::Error::other)?;
    // In one piece: some clients take the first segment for all.
    let framed = [&length.to_be_bytes(), message].concat();
    stream.write_all(&framed).await
}

/// Reads one such message.
pub(super) async fn read_message(stream: &mut TcpStream) -> std::io::Result<Vec<u8>> {
    let length = stream.read_u16().await?;
    let mut message = vec![0; usize::from(length)];
    stream.read_exact(&mut message).await?;
    Ok(message)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn servers_of_a_resolv_conf() {
        let text = "# nameserver 192.0.2.1\nnameserver 192.0.2.2 # mine\n nameserver\tfd00::1\nnameserver fe80::1%eth0\n\
                    nameservers 192.0.2.3\nsearch example.org\n";
        let found: Vec<String> = nameservers(text).map(|server| server.to_string()).collect();
        assert_eq!(found, ["192.0.2.2:53", "[fd00::1]:53"]);
    }

    #[test]
    fn only_the_answer_to_the_question_counts() {
        let mut query = Message::query();
        query.add_query(Query::query(
            Name::from_ascii("a.example.").unwrap(),
            RecordType::A,
        ));
        let asked = query.to_vec().unwrap();
        assert!(!answers(&asked, &asked), "a query is no answer");
        let said = query.clone().into_response().to_vec().unwrap();
        assert!(answers(&asked, &said));
        let mut guessed = said.clone();
        guessed[0] ^= 1;
        assert!(!answers(&asked, &guessed));
        let mut other = query.into_response();
        other.queries = vec![Query::query(
            Name::from_ascii("b.example.").unwrap(),
            RecordType::A,
        )];
        assert!(!answers(&asked, &other.to_vec().unwrap()));
        assert!(!answers(&asked, &said[..HEADER]));
    }
}
