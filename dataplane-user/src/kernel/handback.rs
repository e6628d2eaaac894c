//! Giving new connections to someone else, while those that run go on.

use std::collections::BTreeSet;
use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::time::Duration;

use aya::maps::{HashMap, Map, MapData};
use dataplane_common::abi::{
    ABI_VERSION, Flow, FlowKey, FrontendKey, FrontendValue, flow_flag, flow_role, frontend_class, map_name,
    protocol,
};

use super::{FlowTable, KernelError, NodeTables, open_map, pins};

/// Programs that decide where a new connection or a datagram goes.
const DECIDE: [&str; 4] = ["sock_connect4", "sock_connect6", "sock_sendmsg4", "sock_sendmsg6"];

fn pin_dir(bpffs_root: &Path) -> PathBuf {
    bpffs_root.join(format!("v{ABI_VERSION}"))
}

/// The families of the services that are served, by their own addresses: true for IPv6.
///
/// # Errors
///
/// If a map is there and cannot be read.
pub fn served_families(bpffs_root: &Path) -> Result<BTreeSet<bool>, KernelError> {
    let pin_dir = pin_dir(bpffs_root);
    if !pins::map_path(&pin_dir, map_name::FRONTENDS).exists() {
        return Ok(BTreeSet::new());
    }
    let fail = |source| KernelError::Map {
        map: map_name::FRONTENDS.into(),
        source,
    };
    let frontends = Map::HashMap(open_map(&pin_dir, map_name::FRONTENDS)?);
    let frontends: HashMap<MapData, FrontendKey, FrontendValue> = frontends.try_into().map_err(fail)?;
    let mut families = BTreeSet::new();
    for key in frontends.keys() {
        let key = key.map_err(fail)?;
        if key.class == frontend_class::ADDRESS {
            families.insert(key.addr.to_ip().is_ipv6());
        }
    }
    Ok(families)
}

/// Detaches the programs that decide on new connections of sockets; those that show an earlier decision to its socket
/// stay. The packet programs go on with the flows that they know. Gives what was removed.
///
/// # Errors
///
/// If a link cannot be removed.
pub fn stop_new_connections(bpffs_root: &Path) -> Result<Vec<String>, KernelError> {
    let mut removed = Vec::new();
    if pins::map_path(&pin_dir(bpffs_root), map_name::CONFIG).exists() {
        NodeTables::open(&pin_dir(bpffs_root))?.stop_new_flows();
    }
    for name in DECIDE {
        let path = pins::link_path(&pin_dir(bpffs_root), name);
        match fs::remove_file(&path) {
            Ok(()) => removed.push(path.display().to_string()),
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            Err(source) => {
                return Err(KernelError::Io {
                    operation: "remove",
                    path,
                    source,
                });
            }
        }
    }
    Ok(removed)
}

/// So long a flow that is not TCP may be silent and still be one: kube-proxy's own (nf_conntrack_udp_timeout_stream), and
/// for SCTP, which keeps its associations alive, more.
const SILENT: [(u8, Duration); 2] = [
    (protocol::UDP, Duration::from_secs(120)),
    (protocol::SCTP, Duration::from_secs(300)),
];

/// How many flows the packet programs still translate.
///
/// # Errors
///
/// If the map is there and cannot be read.
pub fn running_flows(bpffs_root: &Path) -> Result<usize, KernelError> {
    let pin_dir = pin_dir(bpffs_root);
    if !pins::map_path(&pin_dir, map_name::CONNTRACK).exists() {
        return Ok(0);
    }
    let mut flows = Vec::new();
    let mut closed = BTreeSet::new();
    FlowTable::open(&pin_dir, map_name::CONNTRACK)?.visit(|key, flow| match key.role {
        flow_role::FORWARD => flows.push((*key, *flow)),
        _ if flow.flags & (flow_flag::FIN | flow_flag::RST) != 0 => {
            closed.insert(*key);
        }
        _ => {}
    })?;
    let now = nix::time::clock_gettime(nix::time::ClockId::CLOCK_MONOTONIC)
        .map(Duration::from)
        .unwrap_or_default();
    let runs = |(key, flow): &&(FlowKey, Flow)| {
        let silent = now.saturating_sub(Duration::from_nanos(flow.seen));
        match SILENT.iter().find(|(protocol, _)| *protocol == key.protocol) {
            Some((_, limit)) => silent < *limit,
            None if flow.flags & flow_flag::RST != 0 => false,
            None => flow.flags & flow_flag::FIN == 0 || !closed.contains(&reverse(key, flow)),
        }
    };
    Ok(flows.iter().filter(runs).count())
}

/// The key of the answers.
fn reverse(key: &FlowKey, flow: &Flow) -> FlowKey {
    FlowKey {
        src: flow.addr,
        dst: key.src,
        src_port: flow.port,
        dst_port: if flow.client_port.to_host() == 0 {
            key.src_port
        } else {
            flow.client_port
        },
        role: flow_role::REVERSE,
        ..*key
    }
}
