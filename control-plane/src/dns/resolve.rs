//! From a query to its answer.

use std::net::IpAddr;

use hickory_proto::op::{Edns, Message, MessageType, Metadata, OpCode, Query, ResponseCode};
use hickory_proto::rr::rdata::CNAME;
use hickory_proto::rr::{DNSClass, Name, RData, Record, RecordType};
use rand::seq::SliceRandom as _;

use super::Dns;
use super::zone::{Answer, TTL};

/// What a datagram may hold without EDNS (RFC 1035), and what it may hold at most (<https://www.dnsflagday.net/2020>).
const DATAGRAM: (u16, u16) = (512, 1232);
/// Names that an alias may lead over.
const ALIASES: usize = 8;

/// How an answer becomes bytes.
struct Reply {
    message: Message,
    /// Bytes that the client takes.
    limit: usize,
}

impl Reply {
    /// The bytes; what does not fit is left out, and the client told if it is answers.
    fn encode(mut self) -> Option<Vec<u8>> {
        let whole = self.message.to_vec().ok()?;
        if whole.len() <= self.limit {
            return Some(whole);
        }
        let additionals = std::mem::take(&mut self.message.additionals);
        if !additionals.is_empty() {
            return self.encode();
        }
        self.message.metadata.truncation = true;
        let answers = std::mem::take(&mut self.message.answers);
        // As many answers as fit: some clients are content with those.
        let (mut most, mut fitting) = (answers.len(), 0);
        while fitting < most {
            let half = fitting + (most - fitting).div_ceil(2);
            self.message.answers = answers.get(..half)?.to_vec();
            if self.message.to_vec().ok()?.len() <= self.limit {
                fitting = half;
            } else {
                most = half - 1;
            }
        }
        self.message.answers = answers.get(..fitting)?.to_vec();
        self.message.to_vec().ok()
    }
}

impl Dns {
    /// The answer to what a client sent; `None` if it deserves none.
    pub(super) async fn answer(&self, bytes: &[u8], client: IpAddr, tcp: bool) -> Option<Vec<u8>> {
        // Too short for a header, or an answer itself: to answer could go on for ever.
        let (id, flags) = (bytes.get(..2)?, *bytes.get(2)?);
        if bytes.len() < 12 || flags & 0x80 != 0 {
            return None;
        }
        let id = u16::from_be_bytes(id.try_into().ok()?);
        let Ok(query) = Message::from_vec(bytes) else {
            return Message::error_msg(id, OpCode::Query, ResponseCode::FormErr)
                .to_vec()
                .ok();
        };
        let (least, most) = DATAGRAM;
        let limit = match &query.edns {
            _ if tcp => u16::MAX,
            Some(edns) => edns.max_payload().clamp(least, most),
            None => least,
        };
        let mut message = Message::new(id, MessageType::Response, OpCode::Query);
        message.metadata = Metadata::response_from_request(&query.metadata);
        message.metadata.recursion_available = true;
        message.queries.clone_from(&query.queries);
        if query.edns.is_some() {
            let mut edns = Edns::new();
            edns.set_max_payload(most);
            message.set_edns(edns);
        }
        let refused = match query.queries.as_slice() {
            _ if !self.serves(client) => Some(ResponseCode::Refused),
            _ if query.metadata.op_code != OpCode::Query => Some(ResponseCode::NotImp),
            _ if query.edns.as_ref().is_some_and(|edns| edns.version() > 0) => Some(ResponseCode::BADVERS),
            [question] if question.query_class() != DNSClass::IN => Some(ResponseCode::Refused),
            // Zones are not handed out.
            [question] if matches!(question.query_type(), RecordType::AXFR | RecordType::IXFR) => {
                Some(ResponseCode::Refused)
            }
            [_] => None,
            _ => Some(ResponseCode::FormErr),
        };
        match (refused, query.queries.as_slice()) {
            (None, [question]) => {
                if !self.fill(&mut message, question).await {
                    match self.forwarder.relay(bytes, tcp).await {
                        Some(answer) => return Some(answer),
                        None => message.metadata.response_code = ResponseCode::ServFail,
                    }
                }
            }
            (code, _) => message.metadata.response_code = code.unwrap_or(ResponseCode::FormErr),
        }
        Reply {
            message,
            limit: limit.into(),
        }
        .encode()
    }

    /// Puts what the zone has of the question into the message; false if others are to be asked.
    async fn fill(&self, message: &mut Message, question: &Query) -> bool {
        let (mut name, kind) = (question.name().clone(), question.query_type());
        for alias in 0..ALIASES {
            match self.zone(|zone| zone.lookup(&name)) {
                Answer::Records(mut records) => {
                    records.retain(|data| kind == RecordType::ANY || data.record_type() == kind);
                    // Clients take the first one.
                    records.shuffle(&mut rand::rng());
                    message.metadata.authoritative = true;
                    if records.is_empty() {
                        self.negative(message);
                    }
                    self.targets(message, &records);
                    let record = |data| Record::from_rdata(name.clone(), TTL, data);
                    message.answers.extend(records.into_iter().map(record));
                    return true;
                }
                Answer::Alias(target) => {
                    message.metadata.authoritative = true;
                    let data = RData::CNAME(CNAME(target.clone()));
                    message.answers.push(Record::from_rdata(name, TTL, data));
                    if matches!(kind, RecordType::CNAME | RecordType::ANY) {
                        return true;
                    }
                    name = target;
                }
                Answer::Nothing => {
                    message.metadata.authoritative = true;
                    message.metadata.response_code = ResponseCode::NXDomain;
                    self.negative(message);
                    return true;
                }
                Answer::Foreign if alias == 0 => return false,
                Answer::Foreign => {
                    // Resolvers in C libraries do not follow aliases themselves.
                    self.follow(message, &name, kind).await;
                    return true;
                }
                Answer::NotYet => break,
            }
        }
        message.metadata.response_code = ResponseCode::ServFail;
        true
    }

    async fn follow(&self, message: &mut Message, name: &Name, kind: RecordType) {
        match self.forwarder.ask(name, kind).await {
            Some(found) => {
                message.metadata.response_code = found.metadata.response_code;
                message.answers.extend(found.answers);
                message.authorities.extend(found.authorities);
            }
            None => message.metadata.response_code = ResponseCode::ServFail,
        }
    }

    /// Says for how long it may be remembered that there is nothing (RFC 2308).
    fn negative(&self, message: &mut Message) {
        let (name, soa) = self.zone(super::zone::Zone::authority);
        message
            .authorities
            .push(Record::from_rdata(name, TTL, RData::SOA(soa)));
    }

    /// Addresses of what SRV records name.
    fn targets(&self, message: &mut Message, records: &[RData]) {
        for data in records {
            let RData::SRV(srv) = data else {
                continue;
            };
            if let Answer::Records(found) = self.zone(|zone| zone.lookup(&srv.target)) {
                let record = |data| Record::from_rdata(srv.target.clone(), TTL, data);
                message.additionals.extend(found.into_iter().map(record));
            }
        }
    }
}
