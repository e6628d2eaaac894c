//! What the packet programs cost per packet, in the kernel, without the stack around them.

use std::net::{Ipv4Addr, SocketAddrV4};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use beeline_tests::Cluster;
use dataplane_common::abi::{
    Backend, BePort, Device, FrontendKey, FrontendValue, Service, SetWord, Slot, backend_state,
    frontend_class, frontend_kind, protocol, service_flag,
};
use dataplane_common::packet::checksum::{fold, sum};
use dataplane_model::program::{Maps, Write};
use dataplane_user::kernel::{Config, Direction, Kernel, RealMaps, Sizes};

use crate::figures::{Figures, Target};

const RUNS: u32 = 1_000_000;
const NEW_FLOWS: u16 = 20_000;
const MARK: u32 = 0x4000;
const PASS: i32 = -1;

const CLIENT: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 7);
const NODE: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 1);
/// A service whose backend is its own frontend: a packet is translated again and again, and stays the same.
const SAME: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::new(192, 0, 2, 2), 80);
const FRONTEND: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::new(203, 0, 113, 1), 80);
const BACKEND: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::new(10, 244, 1, 2), 8080);
const NOBODY: SocketAddrV4 = SocketAddrV4::new(Ipv4Addr::new(198, 51, 100, 1), 443);

/// A TCP packet with 64 bytes of data.
fn packet(src: SocketAddrV4, dst: SocketAddrV4, flags: u8) -> Vec<u8> {
    let mut tcp = Vec::new();
    tcp.extend(src.port().to_be_bytes());
    tcp.extend(dst.port().to_be_bytes());
    tcp.extend([0, 0, 0, 1, 0, 0, 0, 1, 5 << 4, flags, 0x20, 0, 0, 0, 0, 0]);
    tcp.extend([7; 64]);
    let mut pseudo = Vec::new();
    pseudo.extend(src.ip().octets());
    pseudo.extend(dst.ip().octets());
    pseudo.extend([0, protocol::TCP, 0, 84]);
    let checksum = !fold(sum(sum(0, &pseudo), &tcp));
    tcp.splice(16..18, checksum.to_ne_bytes());

    let mut ip = vec![0x45, 0, 0, 104, 0, 1, 0x40, 0, 64, protocol::TCP, 0, 0];
    ip.extend(src.ip().octets());
    ip.extend(dst.ip().octets());
    let checksum = !fold(sum(0, &ip));
    ip.splice(10..12, checksum.to_ne_bytes());

    let mut out = vec![2, 0, 0, 0, 0, 2, 2, 0, 0, 0, 0, 1, 8, 0];
    out.extend(ip);
    out.extend(tcp);
    out
}

const SYN: u8 = 2;
const ACK: u8 = 16;

fn serve(
    maps: &mut RealMaps,
    id: u32,
    frontend: SocketAddrV4,
    backend: SocketAddrV4,
    node: u32,
) -> Result<()> {
    let row = Backend {
        addr: (*backend.ip()).into(),
        port: BePort::from_host(backend.port()),
        protocol: protocol::TCP,
        state: backend_state::ACTIVE,
        node,
        generation: 1,
        ..Backend::default()
    };
    maps.write(&Write::Backend { id, row })?;
    let slots = [Slot::new(id, id)];
    maps.write(&Write::Slots {
        base: id,
        slots: &slots,
    })?;
    let row = Service {
        cluster: SetWord::new(id, 1),
        flags: service_flag::HAS_ENDPOINTS,
        ..Service::default()
    };
    maps.write(&Write::Service { id, row })?;
    let key = FrontendKey {
        addr: (*frontend.ip()).into(),
        port: BePort::from_host(frontend.port()),
        protocol: protocol::TCP,
        class: frontend_class::ADDRESS,
    };
    let value = FrontendValue {
        service: id,
        kind: frontend_kind::EXTERNAL_IP,
        ..FrontendValue::default()
    };
    maps.write(&Write::PutFrontend { key, value })?;
    Ok(())
}

pub(crate) fn run(figures: &mut Figures) -> Result<()> {
    figures.progress("packet: programs on packets");
    let cluster = Cluster::new()?;
    let node = cluster.add_node()?;
    let kernel = Kernel::open(&Config {
        bpffs_root: node.bpffs().to_owned(),
        cgroup_root: node.cgroup().to_owned(),
        sizes: Sizes::default(),
        ebpf_log_level: 0,
    })
    .context("cannot set up the kernel side")?;
    let tables = kernel.node_tables()?;
    let mut config = tables.config();
    config.mark = MARK;
    (config.nat_first, config.nat_last) = (61_000, u16::MAX);
    tables.set_config(&config);
    // packets run by the loopback device
    let device = Device {
        v4: NODE.into(),
        header: 14,
        ..Device::default()
    };
    kernel.device_table()?.put(1, &device)?;
    let mut maps = kernel.maps()?;
    serve(&mut maps, 1, SAME, SAME, 1)?;
    serve(&mut maps, 2, FRONTEND, BACKEND, 2)?;

    let client = |port| SocketAddrV4::new(CLIENT, port);
    let repeated = |direction, packet: &[u8]| -> Result<Duration> {
        let run = kernel.run_packet(direction, packet, 0, RUNS)?;
        ensure!(
            run.verdict == PASS && run.packet == packet,
            "the packet is not what it was: {run:?}"
        );
        Ok(run.duration)
    };
    let mut add = |what: &str, time: Duration| {
        #[expect(clippy::cast_precision_loss, reason = "far below 2^52")]
        let nanoseconds = time.as_nanos() as f64;
        figures.add(format!("packet/{what}"), nanoseconds, "ns", Target::None);
    };
    add(
        "in, none of ours",
        repeated(Direction::Ingress, &packet(client(1), NOBODY, ACK))?,
    );
    add(
        "out, none of ours",
        repeated(Direction::Egress, &packet(NOBODY, client(1), ACK))?,
    );
    kernel.run_packet(Direction::Ingress, &packet(client(2), SAME, SYN), 0, 1)?;
    add(
        "in, known flow",
        repeated(Direction::Ingress, &packet(client(2), SAME, ACK))?,
    );
    add(
        "out, answer of a known flow",
        repeated(Direction::Egress, &packet(SAME, client(2), ACK))?,
    );

    let (mut miss, mut masquerade) = (Duration::ZERO, Duration::ZERO);
    for port in 1..=NEW_FLOWS {
        let run = kernel.run_packet(Direction::Ingress, &packet(client(port), FRONTEND, SYN), 0, 1)?;
        ensure!(run.mark == MARK, "not translated: {run:?}");
        miss += run.duration;
        if port <= 2000 {
            let run = kernel.run_packet(Direction::Egress, &run.packet, run.mark, 1)?;
            ensure!(run.verdict == PASS && run.mark == 0, "not masqueraded: {run:?}");
            masquerade += run.duration;
        }
    }
    add("in, new flow", miss / u32::from(NEW_FLOWS));
    add("out, new masqueraded flow", masquerade / 2000);
    Ok(())
}
