//! nf_tables (include/uapi/linux/netfilter/nf_tables.h): the tables of kube-proxy's nftables mode, what iptables-nft made
//! of its iptables mode, and a table of our own.

use std::collections::{BTreeMap, BTreeSet};
use std::io;

use super::conntrack::DST_NAT;
use super::names;
use super::netlink::{
    Attrs, Batch, NFTABLES, NLM_F_APPEND, NLM_F_CREATE, Socket, attr, attr_be32, attr_be64, attr_str, attrs,
};
use super::plan::{Found, Jump, Stage, removal};
use super::{Counts, Family, Survey};

// enum nf_tables_msg_types
const NEWTABLE: u8 = 0;
const GETTABLE: u8 = 1;
const DELTABLE: u8 = 2;
const NEWCHAIN: u8 = 3;
const GETCHAIN: u8 = 4;
const DELCHAIN: u8 = 5;
const NEWRULE: u8 = 6;
const GETRULE: u8 = 7;
const DELRULE: u8 = 8;
const GETSETELEM: u8 = 13;
const GETGEN: u8 = 16;

const TABLE_NAME: u16 = 1;
const GEN_ID: u16 = 1;
const CHAIN_TABLE: u16 = 1;
const CHAIN_NAME: u16 = 3;
const CHAIN_HOOK: u16 = 4;
const CHAIN_TYPE: u16 = 7;
const HOOK_NUMBER: u16 = 1;
const HOOK_PRIORITY: u16 = 2;
const RULE_TABLE: u16 = 1;
const RULE_CHAIN: u16 = 2;
const RULE_HANDLE: u16 = 3;
const RULE_EXPRESSIONS: u16 = 4;
const LIST_ELEMENT: u16 = 1;
const EXPRESSION_NAME: u16 = 1;
const EXPRESSION_DATA: u16 = 2;
const IMMEDIATE_DATA: u16 = 2;
const DATA_VALUE: u16 = 1;
const DATA_VERDICT: u16 = 2;
const VERDICT_CHAIN: u16 = 2;
const SET_ELEMENTS_TABLE: u16 = 1;
const SET_ELEMENTS_SET: u16 = 2;
const SET_ELEMENTS: u16 = 3;

const UNSPEC: u8 = 0;
const INET: u8 = 1;
const POST_ROUTING: u32 = 4;
/// `srcnat`, NF_IP_PRI_NAT_SRC.
const SRCNAT: u32 = 100;

/// Our table. While there is a chain of type nat in a network namespace, and a rule that needs connection tracking, the
/// kernel goes on to translate the connections that it has begun to translate. With the last one this ends: what they send
/// goes out as it is (nf_nat_register_fn, nf_ct_netns_get).
pub(super) const OWN_TABLE: &str = "beeline-takeover";

/// kube-proxy's map of Services in its nftables mode. In one transaction with all else that it writes.
const SERVICES_MAP: &str = "service-ips";

/// A rule's handle.
type Handle = u64;

/// What is there.
#[derive(Debug, Default)]
struct Read {
    /// Tables of the nftables mode.
    kube_proxy: Vec<Family>,
    /// Tables of the iptables mode.
    iptables: Vec<(Family, Found<Handle>)>,
    own: bool,
    /// Service rules are complete.
    complete: BTreeSet<Family>,
}

impl Family {
    /// `NFPROTO_IPV4`, `NFPROTO_IPV6`.
    const fn number(self) -> u8 {
        match self {
            Self::V4 => 2,
            Self::V6 => 10,
        }
    }

    fn of(number: u8) -> Option<Self> {
        [Self::V4, Self::V6].into_iter().find(|f| f.number() == number)
    }
}

/// False where the kernel has no nf_tables.
fn available(socket: &mut Socket) -> io::Result<bool> {
    match generation(socket) {
        Ok(_) => Ok(true),
        Err(error) if matches!(error.raw_os_error(), Some(libc::EINVAL | libc::EOPNOTSUPP)) => Ok(false),
        Err(error) => Err(error),
    }
}

/// Counts the changes of all tables.
fn generation(socket: &mut Socket) -> io::Result<u32> {
    let answer = socket.get(NFTABLES, GETGEN, UNSPEC, &Attrs::new())?;
    attr_be32(&answer, GEN_ID).ok_or_else(|| io::Error::other("nf_tables tells no generation"))
}

fn read(socket: &mut Socket) -> io::Result<Read> {
    let mut out = Read::default();
    let tables = socket.dump(NFTABLES, GETTABLE, UNSPEC, &Attrs::new(), |message| {
        Some((message.family, attr_str(message.body, TABLE_NAME)?.to_owned()))
    })?;
    out.own = tables
        .iter()
        .any(|(family, name)| *family == INET && name == OWN_TABLE);
    let of_iptables: Vec<(Family, &str)> = tables
        .iter()
        .filter_map(|(family, name)| Some((Family::of(*family)?, name.as_str())))
        .filter(|(_, name)| names::TABLES.contains(name))
        .collect();
    out.kube_proxy = tables
        .iter()
        .filter(|(_, name)| name == names::NFT_TABLE)
        .filter_map(|(family, _)| Family::of(*family))
        .collect();
    for family in out.kube_proxy.clone() {
        if has_elements(socket, family)? {
            out.complete.insert(family);
        }
    }
    if of_iptables.is_empty() {
        return Ok(out);
    }

    let chains = socket.dump(NFTABLES, GETCHAIN, UNSPEC, &Attrs::new(), |message| {
        let family = Family::of(message.family)?;
        let table = attr_str(message.body, CHAIN_TABLE)?.to_owned();
        let name = attr_str(message.body, CHAIN_NAME)?.to_owned();
        Some((family, table, name, attr(message.body, CHAIN_HOOK).is_some()))
    })?;
    for (family, table) in of_iptables {
        let mut found = Found::new(table);
        let here = chains
            .iter()
            .filter(|chain| chain.0 == family && chain.1 == table);
        let (kube_proxys, others): (Vec<_>, Vec<_>) = here.partition(|chain| names::is_chain(&chain.2));
        found.chains = kube_proxys.iter().map(|chain| chain.2.clone()).collect();
        if found.chains.is_empty() {
            continue;
        }
        for (_, _, chain, from_base) in others {
            for (rule, to) in jumps_of(socket, family, table, chain)? {
                found.jumps.push(Jump {
                    from: chain.clone(),
                    from_base: *from_base,
                    to,
                    rule,
                });
            }
        }
        if table == "nat" && found.chains.contains(names::SERVICES) {
            // its last rule leads to node ports: without any, kube-proxy has only made the chain so far
            let entered = found.jumps.iter().any(|jump| jump.to == names::SERVICES);
            if entered && !rules(socket, family, table, names::SERVICES, |_| Some(()))?.is_empty() {
                out.complete.insert(family);
            }
        }
        out.iptables.push((family, found));
    }
    Ok(out)
}

fn has_elements(socket: &mut Socket, family: Family) -> io::Result<bool> {
    let map = Attrs::new()
        .string(SET_ELEMENTS_TABLE, names::NFT_TABLE)
        .string(SET_ELEMENTS_SET, SERVICES_MAP);
    let found = socket.dump(NFTABLES, GETSETELEM, family.number(), &map, |message| {
        attr(message.body, SET_ELEMENTS)
            .filter(|list| !list.is_empty())
            .map(drop)
    });
    match found {
        Ok(found) => Ok(!found.is_empty()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

/// Rules of a chain.
fn rules<T>(
    socket: &mut Socket,
    family: Family,
    table: &str,
    chain: &str,
    mut each: impl FnMut(&[u8]) -> Option<T>,
) -> io::Result<Vec<T>> {
    let filter = Attrs::new().string(RULE_TABLE, table).string(RULE_CHAIN, chain);
    socket.dump(NFTABLES, GETRULE, family.number(), &filter, |message| {
        // older kernels do not filter by chain
        let same = attr_str(message.body, RULE_TABLE) == Some(table)
            && attr_str(message.body, RULE_CHAIN) == Some(chain);
        if same { each(message.body) } else { None }
    })
}

/// Rules of a chain that jump to kube-proxy's chains: handle, and where to.
fn jumps_of(
    socket: &mut Socket,
    family: Family,
    table: &str,
    chain: &str,
) -> io::Result<Vec<(Handle, String)>> {
    rules(socket, family, table, chain, |body| {
        let to = jump_target(attr(body, RULE_EXPRESSIONS)?)?;
        names::is_chain(to).then_some((attr_be64(body, RULE_HANDLE)?, to.to_owned()))
    })
}

/// The chain that the verdict of a rule names.
fn jump_target(expressions: &[u8]) -> Option<&str> {
    attrs(expressions)
        .filter(|(kind, _)| *kind == LIST_ELEMENT)
        .find_map(|(_, expression)| {
            if attr_str(expression, EXPRESSION_NAME) != Some("immediate") {
                return None;
            }
            let data = attr(attr(expression, EXPRESSION_DATA)?, IMMEDIATE_DATA)?;
            attr_str(attr(data, DATA_VERDICT)?, VERDICT_CHAIN)
        })
}

/// Says what of kube-proxy is in nf_tables.
pub(super) fn survey(socket: &mut Socket) -> io::Result<Survey> {
    let mut survey = Survey::default();
    if !available(socket)? {
        return Ok(survey);
    }
    let found = read(socket)?;
    survey.own = found.own;
    for family in &found.kube_proxy {
        survey
            .rules
            .push(format!("nftables table {family} {}", names::NFT_TABLE));
    }
    for (family, found) in &found.iptables {
        survey.look_at("iptables-nft", *family, found);
    }
    survey.complete = found.complete;
    Ok(survey)
}

/// Removes kube-proxy's rules, in one transaction. In the first stage our own table comes in the same one; in the last it
/// goes.
pub(super) fn remove(socket: &mut Socket, stage: Stage, mark: u32, counts: &mut Counts) -> io::Result<()> {
    if !available(socket)? {
        return Ok(());
    }
    // kube-proxy or another program may write at the same time
    let mut error = io::Error::other("other programs change the rules all the time");
    for _ in 0..20 {
        let generation = generation(socket)?;
        let found = read(socket)?;
        let mut after = *counts;
        let batch = changes(&found, stage, mark, &mut after);
        match socket.commit(&batch, Some(generation)) {
            Ok(()) => {
                *counts = after;
                return Ok(());
            }
            Err(again) if again.raw_os_error() == Some(libc::ERESTART) => error = again,
            Err(other) => return Err(other),
        }
    }
    Err(error)
}

fn changes(found: &Read, stage: Stage, mark: u32, counts: &mut Counts) -> Batch {
    let mut batch = Batch::default();
    match stage {
        Stage::Rules if !found.own => make_own_table(&mut batch, mark),
        Stage::Rest if found.own => delete_own_table(&mut batch),
        _ => {}
    }
    for family in &found.kube_proxy {
        let table = Attrs::new().string(TABLE_NAME, names::NFT_TABLE);
        batch.add(DELTABLE, 0, family.number(), table);
        counts.tables += 1;
    }
    for (family, found) in &found.iptables {
        let removal = removal(found, stage);
        let rule = |chain: &str| {
            Attrs::new()
                .string(RULE_TABLE, &removal.table)
                .string(RULE_CHAIN, chain)
        };
        for (chain, handle) in &removal.rules {
            batch.add(
                DELRULE,
                0,
                family.number(),
                rule(chain).be64(RULE_HANDLE, *handle),
            );
        }
        for chain in &removal.chains {
            // all rules first: chains refer to each other
            batch.add(DELRULE, 0, family.number(), rule(chain));
        }
        for chain in &removal.chains {
            let chain = Attrs::new()
                .string(CHAIN_TABLE, &removal.table)
                .string(CHAIN_NAME, chain);
            batch.add(DELCHAIN, 0, family.number(), chain);
        }
        counts.add(&removal);
    }
    batch
}

/// Removes our table if it is there.
pub(super) fn remove_own(socket: &mut Socket) -> io::Result<bool> {
    if !available(socket)? || !read(socket)?.own {
        return Ok(false);
    }
    let mut batch = Batch::default();
    delete_own_table(&mut batch);
    socket.commit(&batch, None)?;
    Ok(true)
}

fn delete_own_table(batch: &mut Batch) {
    batch.add(DELTABLE, 0, INET, Attrs::new().string(TABLE_NAME, OWN_TABLE));
}

/// One chain of type nat keeps translation going, for IPv4 and IPv6 and at every hook. Its only rule masquerades packets
/// that kube-proxy's rules had translated and marked when these rules went away under them; our own programs mark packets,
/// too, but these are not translated by the kernel. The rule needs connection tracking.
fn make_own_table(batch: &mut Batch, mark: u32) {
    const CHAIN: &str = "postrouting";
    batch.add(
        NEWTABLE,
        NLM_F_CREATE,
        INET,
        Attrs::new().string(TABLE_NAME, OWN_TABLE),
    );
    let hook = Attrs::new()
        .be32(HOOK_NUMBER, POST_ROUTING)
        .be32(HOOK_PRIORITY, SRCNAT);
    let chain = Attrs::new()
        .string(CHAIN_TABLE, OWN_TABLE)
        .string(CHAIN_NAME, CHAIN)
        .nested(CHAIN_HOOK, &hook)
        .string(CHAIN_TYPE, "nat");
    batch.add(NEWCHAIN, NLM_F_CREATE, INET, chain);
    let expressions = [
        // reg 1 = ct status
        ("ct", Attrs::new().be32(1, 1).be32(2, 2)),
        (
            "bitwise",
            Attrs::new()
                .be32(1, 1)
                .be32(2, 1)
                .be32(3, 4)
                .nested(4, &Attrs::new().bytes(DATA_VALUE, &DST_NAT.to_ne_bytes()))
                .nested(5, &Attrs::new().bytes(DATA_VALUE, &[0; 4])),
        ),
        // reg 1 != 0
        (
            "cmp",
            Attrs::new()
                .be32(1, 1)
                .be32(2, 1)
                .nested(3, &Attrs::new().bytes(DATA_VALUE, &[0; 4])),
        ),
        // reg 1 = mark
        ("meta", Attrs::new().be32(1, 1).be32(2, 3)),
        // reg 1 &= bit
        (
            "bitwise",
            Attrs::new()
                .be32(1, 1)
                .be32(2, 1)
                .be32(3, 4)
                .nested(4, &Attrs::new().bytes(DATA_VALUE, &mark.to_ne_bytes()))
                .nested(5, &Attrs::new().bytes(DATA_VALUE, &[0; 4])),
        ),
        // reg 1 == bit
        (
            "cmp",
            Attrs::new()
                .be32(1, 1)
                .be32(2, 0)
                .nested(3, &Attrs::new().bytes(DATA_VALUE, &mark.to_ne_bytes())),
        ),
        // NF_NAT_RANGE_PROTO_RANDOM_FULLY
        ("masq", Attrs::new().be32(1, 1 << 4)),
    ];
    let list = expressions.iter().fold(Attrs::new(), |list, (name, data)| {
        let expression = Attrs::new()
            .string(EXPRESSION_NAME, name)
            .nested(EXPRESSION_DATA, data);
        list.nested(LIST_ELEMENT, &expression)
    });
    let rule = Attrs::new()
        .string(RULE_TABLE, OWN_TABLE)
        .string(RULE_CHAIN, CHAIN)
        .nested(RULE_EXPRESSIONS, &list);
    batch.add(NEWRULE, NLM_F_CREATE | NLM_F_APPEND, INET, rule);
}

/// For log lines: which chains stay, and because of which.
pub(super) fn kept(socket: &mut Socket) -> io::Result<BTreeMap<String, String>> {
    if !available(socket)? {
        return Ok(BTreeMap::new());
    }
    let found = read(socket)?;
    let removals = found
        .iptables
        .iter()
        .map(|(_, found)| removal(found, Stage::Rest));
    Ok(removals.flat_map(|removal| removal.kept).collect())
}
