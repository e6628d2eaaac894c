//! Hosts whose chain FORWARD drops by its policy what no rule accepts, as Docker sets it: packets of pods are let through
//! as flannel does, by rules at the head of that chain. Chains of others with such a policy are told and left alone.

use std::io;
use std::net::IpAddr;

use ipnet::IpNet;

use super::netlink::{Attrs, Batch, NFTABLES, NLM_F_CREATE, Socket, attr, attr_be32, attr_be64, attr_str};

// enum nf_tables_msg_types
const GETCHAIN: u8 = 4;
const NEWRULE: u8 = 6;
const GETRULE: u8 = 7;
const DELRULE: u8 = 8;

const CHAIN_TABLE: u16 = 1;
const CHAIN_NAME: u16 = 3;
const CHAIN_HOOK: u16 = 4;
const CHAIN_POLICY: u16 = 5;
const HOOK_NUMBER: u16 = 1;
const RULE_TABLE: u16 = 1;
const RULE_CHAIN: u16 = 2;
const RULE_HANDLE: u16 = 3;
const RULE_EXPRESSIONS: u16 = 4;
const RULE_USERDATA: u16 = 7;
const LIST_ELEMENT: u16 = 1;
const EXPRESSION_NAME: u16 = 1;
const EXPRESSION_DATA: u16 = 2;

const UNSPEC: u8 = 0;
const IPV4: u8 = 2;
const IPV6: u8 = 10;
/// `NF_INET_FORWARD`.
const FORWARD: u32 = 2;
/// `NF_DROP`, `NF_ACCEPT`.
const DROP: u32 = 0;
const ACCEPT: u32 = 1;
/// How our rules are known: a comment, as the nft program shows it.
const COMMENT: &str = "beeline pods";

/// What was found and done.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Report {
    /// Chains that let pods through from now on.
    pub opened: Vec<String>,
    /// Chains of others that drop what is forwarded.
    pub others: Vec<String>,
}

struct Chain {
    family: u8,
    table: String,
    name: String,
}

impl Chain {
    fn is_filter(&self) -> bool {
        matches!(self.family, IPV4 | IPV6) && self.table == "filter" && self.name == "FORWARD"
    }
}

impl std::fmt::Display for Chain {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let family = match self.family {
            IPV4 => "ip",
            IPV6 => "ip6",
            _ => "inet",
        };
        write!(f, "{family} {} {}", self.table, self.name)
    }
}

/// Lets packets from and to these networks through where FORWARD drops by its policy.
///
/// # Errors
///
/// When nf_tables cannot be read or changed; a kernel without it has nothing to change.
pub fn ensure(networks: &[IpNet]) -> io::Result<Report> {
    let mut socket = Socket::open()?;
    let mut report = Report::default();
    for chain in dropping(&mut socket)? {
        if !chain.is_filter() {
            report.others.push(chain.to_string());
            continue;
        }
        let ours = networks
            .iter()
            .filter(|net| net.addr().is_ipv4() == (chain.family == IPV4));
        let wanted: Vec<Attrs> = ours.flat_map(|net| [rule(net, true), rule(net, false)]).collect();
        let found = our_rules(&mut socket, &chain)?;
        if wanted.is_empty() || found.len() == wanted.len() {
            continue;
        }
        let mut batch = Batch::default();
        for handle in found {
            batch.add(DELRULE, 0, chain.family, place(&chain).be64(RULE_HANDLE, handle));
        }
        for expressions in &wanted {
            let attrs = place(&chain)
                .nested(RULE_EXPRESSIONS, expressions)
                .bytes(RULE_USERDATA, &comment());
            // without NLM_F_APPEND: at the head
            batch.add(NEWRULE, NLM_F_CREATE, chain.family, attrs);
        }
        socket.commit(&batch, None)?;
        report.opened.push(chain.to_string());
    }
    Ok(report)
}

/// Removes our rules. Gives the chains that had some.
///
/// # Errors
///
/// When nf_tables cannot be read or changed.
pub fn cleanup() -> io::Result<Vec<String>> {
    let mut socket = Socket::open()?;
    let mut removed = Vec::new();
    for (family, table, name) in [IPV4, IPV6].map(|family| (family, "filter", "FORWARD")) {
        let chain = Chain {
            family,
            table: table.into(),
            name: name.into(),
        };
        let found = our_rules(&mut socket, &chain).unwrap_or_default();
        if found.is_empty() {
            continue;
        }
        let mut batch = Batch::default();
        for handle in found {
            batch.add(DELRULE, 0, chain.family, place(&chain).be64(RULE_HANDLE, handle));
        }
        socket.commit(&batch, None)?;
        removed.push(format!("rules for pods in {chain}"));
    }
    Ok(removed)
}

fn place(chain: &Chain) -> Attrs {
    Attrs::new()
        .string(RULE_TABLE, &chain.table)
        .string(RULE_CHAIN, &chain.name)
}

/// Chains at the hook FORWARD with the policy DROP.
fn dropping(socket: &mut Socket) -> io::Result<Vec<Chain>> {
    let found = socket.dump(NFTABLES, GETCHAIN, UNSPEC, &Attrs::new(), |message| {
        let hook = attr_be32(attr(message.body, CHAIN_HOOK)?, HOOK_NUMBER)?;
        let drops = attr_be32(message.body, CHAIN_POLICY) == Some(DROP);
        (hook == FORWARD && drops && matches!(message.family, 1 | IPV4 | IPV6)).then_some(Chain {
            family: message.family,
            table: attr_str(message.body, CHAIN_TABLE)?.to_owned(),
            name: attr_str(message.body, CHAIN_NAME)?.to_owned(),
        })
    });
    match found {
        // the kernel has no nf_tables
        Err(error) if matches!(error.raw_os_error(), Some(libc::EINVAL | libc::EOPNOTSUPP)) => Ok(Vec::new()),
        other => other,
    }
}

/// Handles of the rules in a chain that have our comment.
fn our_rules(socket: &mut Socket, chain: &Chain) -> io::Result<Vec<u64>> {
    let comment = comment();
    let found = socket.dump(NFTABLES, GETRULE, chain.family, &place(chain), |message| {
        let same = attr_str(message.body, RULE_TABLE) == Some(&chain.table)
            && attr_str(message.body, RULE_CHAIN) == Some(&chain.name)
            && attr(message.body, RULE_USERDATA) == Some(&comment);
        same.then(|| attr_be64(message.body, RULE_HANDLE)).flatten()
    });
    match found {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        other => other,
    }
}

/// Of libnftnl's user data: type 0, length, text with its end.
fn comment() -> Vec<u8> {
    let length = u8::try_from(COMMENT.len() + 1).unwrap_or(u8::MAX);
    [&[0, length], COMMENT.as_bytes(), &[0]].concat()
}

fn expression(out: Attrs, name: &str, data: &Attrs) -> Attrs {
    out.nested(
        LIST_ELEMENT,
        &Attrs::new()
            .string(EXPRESSION_NAME, name)
            .nested(EXPRESSION_DATA, data),
    )
}

/// Accepts packets whose source, or destination, is in the network. As iptables-nft writes it, so that it can show it.
fn rule(net: &IpNet, source: bool) -> Attrs {
    let value = |bytes: &[u8]| Attrs::new().bytes(1, bytes);
    let (address, mask): (Vec<u8>, Vec<u8>) = match (net.network(), net.netmask()) {
        (IpAddr::V4(ip), IpAddr::V4(mask)) => (ip.octets().into(), mask.octets().into()),
        (IpAddr::V6(ip), IpAddr::V6(mask)) => (ip.octets().into(), mask.octets().into()),
        _ => return Attrs::new(),
    };
    let length = u32::try_from(address.len()).unwrap_or(0);
    let offset = match (length, source) {
        (4, true) => 12,
        (4, false) => 16,
        (_, true) => 8,
        (_, false) => 24,
    };
    // register 1, network header
    let payload = Attrs::new().be32(1, 1).be32(2, 1).be32(3, offset).be32(4, length);
    let bitwise = Attrs::new()
        .be32(1, 1)
        .be32(2, 1)
        .be32(3, length)
        .nested(4, &value(&mask))
        .nested(5, &value(&vec![0; address.len()]));
    let compare = Attrs::new().be32(1, 1).be32(2, 0).nested(3, &value(&address));
    let accept = Attrs::new().nested(2, &Attrs::new().be32(1, ACCEPT));
    let immediate = Attrs::new().be32(1, 0).nested(2, &accept);
    let mut out = expression(Attrs::new(), "payload", &payload);
    out = expression(out, "bitwise", &bitwise);
    out = expression(out, "cmp", &compare);
    out = expression(out, "counter", &Attrs::new());
    expression(out, "immediate", &immediate)
}
