//! One node's maps with a service of each kind, and a device (loopback) that everything comes in and leaves by.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};

use dataplane_common::abi::{
    Addr, BePort, Device, FrontendValue, Service, SourceRangeKey, config_flag, frontend_flag, frontend_kind,
    node_addr_flag, service_flag,
};
use dataplane_model::Protocol;
use dataplane_model::program::Write;
use dataplane_user::kernel::{Direction, PacketRun, range};

use crate::build::{Packet, SCTP, Seen, TCP, UDP, check, packet};
use crate::common::plane::Plane;
use crate::common::{Place, frontend};

pub(crate) const PASS: i32 = -1;
pub(crate) const DROP: i32 = 2;
pub(crate) const BACK: i32 = 7;
pub(crate) const MARK: u32 = 0x4000;

pub(crate) const PROTOCOLS: [Protocol; 3] = [Protocol::Tcp, Protocol::Udp, Protocol::Sctp];

/// Addresses of one family.
#[derive(Clone, Copy)]
pub(crate) struct Family {
    pub(crate) v6: bool,
    pub(crate) client: &'static str,
    pub(crate) pod: &'static str,
    /// The node's; node ports are at the first.
    pub(crate) node: &'static str,
    pub(crate) other: &'static str,
    pub(crate) local: &'static str,
    pub(crate) remote: &'static str,
    pub(crate) any: &'static str,
    /// Begin of ClusterIPs and of external addresses.
    pub(crate) cluster: &'static str,
    pub(crate) external: &'static str,
}

pub(crate) const V4: Family = Family {
    v6: false,
    client: "192.0.2.7",
    pod: "10.244.9.9",
    node: "192.0.2.1",
    other: "192.0.2.2",
    local: "10.244.0.2",
    remote: "10.244.1.2",
    any: "0.0.0.0",
    cluster: "10.96.0.",
    external: "203.0.113.",
};

pub(crate) const V6: Family = Family {
    v6: true,
    client: "2001:db8::7",
    pod: "fd02::9:9",
    node: "2001:db8::1",
    other: "2001:db8::2",
    local: "fd02::2",
    remote: "fd02:1::2",
    any: "::",
    cluster: "fd96::",
    external: "2001:db8:ff::",
};

pub(crate) const FAMILIES: [Family; 2] = [V4, V6];

pub(crate) fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

/// `address:port`.
pub(crate) fn at(address: &str, port: u16) -> String {
    SocketAddr::new(ip(address), port).to_string()
}

/// Which service: the last number of its ClusterIP and external addresses; its node port is 30000 more.
pub(crate) mod which {
    /// One backend, on this node.
    pub(crate) const LOCAL: u32 = 1;
    /// One backend, elsewhere.
    pub(crate) const REMOTE: u32 = 2;
    /// As [`REMOTE`], with both policies `Local`.
    pub(crate) const ELSEWHERE: u32 = 3;
    /// No backend, but both policies `Local`.
    pub(crate) const EMPTY_LOCAL: u32 = 4;
    /// No backend.
    pub(crate) const EMPTY: u32 = 5;
    /// Both backends, and both policies `Local`.
    pub(crate) const BOTH_LOCAL: u32 = 6;
    /// Client 192.0.2.0/24 (2001:db8::/64) only, at its load-balancer address.
    pub(crate) const RANGES: u32 = 7;
    /// Both backends, with affinity of 100 seconds.
    pub(crate) const AFFINE: u32 = 8;
    /// Eight backends; the Maglev table names only the last.
    pub(crate) const TABLE: u32 = 9;
    /// Eight backends, by the client's address.
    pub(crate) const SOURCE: u32 = 10;
    /// As [`LOCAL`]: another frontend of the same backend.
    pub(crate) const AGAIN: u32 = 11;
    /// Slots of another service.
    pub(crate) const FOREIGN: u32 = 12;
    /// A backend that is free.
    pub(crate) const FREED: u32 = 13;
}

pub(crate) struct Scene {
    pub(crate) plane: Plane,
    _place: Place,
}

/// What became of a packet.
pub(crate) struct Out {
    pub(crate) verdict: i32,
    pub(crate) bytes: Vec<u8>,
    pub(crate) mark: u32,
    /// Counters that changed.
    pub(crate) counted: Vec<(&'static str, u64)>,
}

impl Out {
    pub(crate) fn seen(&self) -> Seen {
        check(&self.bytes)
    }

    pub(crate) fn tuple(&self) -> String {
        self.seen().tuple()
    }
}

pub(crate) fn number(protocol: Protocol) -> u8 {
    match protocol {
        Protocol::Tcp => TCP,
        Protocol::Udp => UDP,
        Protocol::Sctp => SCTP,
    }
}

impl Scene {
    pub(crate) fn new() -> Self {
        let mut place = Place::new();
        place.config.sizes.services = 256;
        place.config.sizes.backends = 256;
        place.config.sizes.slots = 4096;
        place.config.sizes.frontends = 1024;
        Self::at(place)
    }

    pub(crate) fn at(place: Place) -> Self {
        let mut plane = Plane::new(&place);
        plane.configure(|config| {
            config.mark = MARK;
            (config.nat_first, config.nat_last) = (61_000, u16::MAX);
            config.service_ranges[0] = range(ip("10.96.0.0"), 16);
            config.service_ranges[1] = range(ip("fd96::"), 64);
            config.pod_ranges[0] = range(ip("10.244.0.0"), 16);
            config.pod_ranges[1] = range(ip("fd02::"), 16);
        });
        let mut addresses: BTreeMap<Addr, u32> = BTreeMap::new();
        for family in FAMILIES {
            addresses.insert(ip(family.node).into(), node_addr_flag::NODE_PORTS);
            addresses.insert(ip(family.other).into(), 0);
        }
        plane.node.set_addrs(&addresses).unwrap();
        let mut scene = Self { plane, _place: place };
        scene.serve_as(0);
        for family in FAMILIES {
            for protocol in PROTOCOLS {
                scene.fill(family, protocol);
            }
        }
        scene
    }

    /// Gives the device these flags: with them it is a pod's.
    pub(crate) fn serve_as(&self, flags: u16) {
        self.serve_device(flags, 0);
    }

    /// Gives the device these flags, and the port of the node's tunnel.
    pub(crate) fn serve_device(&self, flags: u16, tunnel: u16) {
        let device = Device {
            v4: ip(V4.node).into(),
            v6: ip(V6.node).into(),
            flags,
            tunnel: BePort::from_host(tunnel),
            header: 14,
        };
        let mut devices = self.plane.kernel.device_table().unwrap();
        devices.put(1, &device).unwrap();
    }

    /// Services of a family and protocol have ids and backends of their own.
    fn base(family: Family, protocol: Protocol) -> u32 {
        let protocol = PROTOCOLS.iter().position(|p| *p == protocol).unwrap() as u32;
        (u32::from(family.v6) * 3 + protocol) * 20
    }

    pub(crate) fn service(family: Family, protocol: Protocol, which: u32) -> u32 {
        Self::base(family, protocol) + which
    }

    fn fill(&mut self, family: Family, protocol: Protocol) {
        let base = Self::base(family, protocol);
        let (local, remote) = (base + 1, base + 2);
        let backends = [(local, family.local, 8080, 1), (remote, family.remote, 8080, 2)];
        let more = (3..11).map(|i| (base + i, family.local, 9000 + i as u16, 1));
        for (id, address, port, node) in backends.into_iter().chain(more) {
            let addr = SocketAddr::new(ip(address), port);
            self.plane.backend_on(id, addr, protocol, node);
        }
        let eight: Vec<u32> = (3..11).map(|i| base + i).collect();
        let both = service_flag::INTERNAL_LOCAL | service_flag::EXTERNAL_LOCAL;
        let has = service_flag::HAS_ENDPOINTS;
        for (number, cluster, near, flags) in [
            (which::LOCAL, &[local][..], &[local][..], has),
            (which::REMOTE, &[remote], &[], has),
            (which::ELSEWHERE, &[remote], &[], has | both),
            (which::EMPTY_LOCAL, &[], &[], both),
            (which::EMPTY, &[], &[], 0),
            (which::BOTH_LOCAL, &[remote, local], &[local], has | both),
            (which::RANGES, &[local], &[local], has),
            (which::AFFINE, &[local, remote], &[], has),
            (which::TABLE, &eight, &[], has),
            (which::SOURCE, &eight, &[], has),
            (which::AGAIN, &[local], &[local], has),
            (which::FOREIGN, &[local], &[], has),
            (which::FREED, &[base + 19], &[], has),
        ] {
            let id = base + number;
            let mut row = Service {
                flags,
                ..Service::default()
            };
            row.local = self.plane.slots(id, near);
            row.cluster = self.plane.slots(id, cluster);
            match number {
                which::AFFINE => row.affinity_seconds = 100,
                which::TABLE => row.maglev = self.plane.slots(id, &[base + 10; 7]),
                which::SOURCE => row.algorithm = dataplane_common::abi::algorithm::SOURCE_HASH,
                which::RANGES => row.source_ranges = 1 + u32::from(family.v6),
                which::FOREIGN => row.cluster = self.plane.slots(id + 1, &[local]),
                _ => {}
            }
            self.plane.service(id, row);
            self.front(family, protocol, number, id);
        }
        if protocol == Protocol::Tcp {
            let (addr, len) = if family.v6 {
                ("2001:db8::", 64)
            } else {
                ("192.0.2.0", 96 + 24)
            };
            let key = SourceRangeKey {
                prefix_len: 32 + len,
                ranges: 1 + u32::from(family.v6),
                addr: ip(addr).into(),
            };
            self.plane.write(&Write::PutSourceRange { key });
        }
    }

    fn front(&mut self, family: Family, protocol: Protocol, number: u32, id: u32) {
        self.plane
            .cluster_ip(&format!("{}{number}", family.cluster), 80, protocol, id);
        self.plane.active_address(&format!("{}{number}", family.cluster));
        self.plane
            .node_port(family.any, 30_000 + number as u16, protocol, id);
        let external = frontend(&format!("{}{number}", family.external), 80, protocol);
        self.plane.front(external, id, frontend_kind::EXTERNAL_IP);
        let key = frontend(&format!("{}{number}", family.external), 443, protocol);
        let value = FrontendValue {
            service: id,
            kind: frontend_kind::LOAD_BALANCER,
            flags: if number == which::RANGES {
                frontend_flag::SOURCE_RANGES
            } else {
                0
            },
            pad: 0,
        };
        self.plane.write(&Write::PutFrontend { key, value });
    }

    pub(crate) fn masquerade_all(&mut self, on: bool) {
        self.plane.configure(|config| {
            config.flags = if on { config_flag::MASQUERADE_ALL } else { 0 };
        });
    }

    fn counters(&self) -> BTreeMap<&'static str, u64> {
        self.plane.kernel.counters().unwrap().into_iter().collect()
    }

    fn run(&mut self, direction: Direction, bytes: &[u8], mark: u32) -> Out {
        let before = self.counters();
        let PacketRun {
            verdict,
            packet,
            mark,
            ..
        } = self.plane.kernel.run_packet(direction, bytes, mark, 1).unwrap();
        let after = self.counters();
        let counted = after
            .into_iter()
            .map(|(name, value)| (name, value - before[name]))
            .filter(|(_, more)| *more > 0)
            .collect();
        Out {
            verdict,
            bytes: packet,
            mark,
            counted,
        }
    }

    pub(crate) fn ingress(&mut self, bytes: &[u8]) -> Out {
        self.run(Direction::Ingress, bytes, 0)
    }

    pub(crate) fn egress(&mut self, bytes: &[u8], mark: u32) -> Out {
        self.run(Direction::Egress, bytes, mark)
    }
}

/// The answer to a packet as the other end gives it: its tuple the other way round.
pub(crate) fn answer_to(packet: &Packet, seen: &Seen) -> Packet {
    Packet {
        src: seen.dst,
        dst: seen.src,
        payload: b"the answer, which is longer".to_vec(),
        ..packet.clone()
    }
}

pub(crate) fn of(protocol: Protocol, src: &str, dst: &str) -> Packet {
    packet(number(protocol), src, dst)
}
