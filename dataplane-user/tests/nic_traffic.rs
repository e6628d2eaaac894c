//! Real traffic from other hosts through the packet programs: an outside client, this node, a pod on it, and another host
//! with backends that only knows the node.
#![allow(clippy::unwrap_used, reason = "a test that cannot be set up fails")]

#[path = "../../dataplane-common/tests/build/mod.rs"]
mod build;
mod common;

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::os::fd::AsRawFd as _;

use common::Place;
use common::net::Netns;
use common::plane::Plane;
use common::python::Python;
use dataplane_common::abi::{
    Addr, Device, Service, device_flag, frontend_kind, node_addr_flag, service_flag,
};
use dataplane_model::Protocol;
use dataplane_user::kernel::{DeviceTable, Hook, range};

/// Addresses by family: client, node towards the client, node towards the remote host, remote host, pod.
struct Family {
    v6: bool,
    client: &'static str,
    node: &'static str,
    node_inside: &'static str,
    remote: &'static str,
    pod: &'static str,
    cluster_ip: &'static str,
    external: &'static str,
    balancer: &'static str,
    any: &'static str,
}

const FAMILIES: [Family; 2] = [
    Family {
        v6: false,
        client: "192.0.2.10",
        node: "192.0.2.1",
        node_inside: "10.0.1.1",
        remote: "10.0.1.2",
        pod: "10.244.0.2",
        cluster_ip: "10.96.0.1",
        external: "198.51.100.1",
        balancer: "203.0.113.1",
        any: "0.0.0.0",
    },
    Family {
        v6: true,
        client: "2001:db8:1::10",
        node: "2001:db8:1::1",
        node_inside: "fd01::1",
        remote: "fd01::2",
        pod: "fd02::2",
        cluster_ip: "fd96::1",
        external: "2001:db8:5::1",
        balancer: "2001:db8:6::1",
        any: "::",
    },
];

struct Scene {
    client: Python,
    remote: Python,
    pod: Python,
    plane: Plane,
    table: DeviceTable,
    node: Netns,
    _namespaces: [Netns; 3],
    _place: Place,
}

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

/// Serves a device, whose packets get these addresses.
fn serve(
    plane: &Plane,
    table: &mut DeviceTable,
    index: u32,
    (v4, v6): (&str, &str),
    flags: u16,
    hook: Option<Hook>,
) {
    let row = Device {
        v4: ip(v4).into(),
        v6: ip(v6).into(),
        flags,
        header: 14,
        ..Device::default()
    };
    table.put(index, &row).unwrap();
    let used = plane.kernel.nic().attach(index, hook).unwrap();
    assert_eq!(used, hook.unwrap_or(Hook::Tcx));
}

const SERVICE: u32 = 1;
const LOCAL: u32 = 1;
const REMOTE: u32 = 2;

impl Scene {
    /// Serves with `hook`. Backends listen at port 80 of the pod and of the remote host. Ends in the node's namespace.
    fn new(hook: Option<Hook>) -> Self {
        let [outside, node, remote, pod] = ["c", "n", "r", "p"].map(Netns::new);
        node.join(
            "wan",
            &outside,
            "eth0",
            &[
                ("192.0.2.1/24", "192.0.2.10/24"),
                ("2001:db8:1::1/64", "2001:db8:1::10/64"),
            ],
        );
        node.join(
            "inside",
            &remote,
            "eth0",
            &[("10.0.1.1/24", "10.0.1.2/24"), ("fd01::1/64", "fd01::2/64")],
        );
        node.join(
            "pod",
            &pod,
            "eth0",
            &[("10.244.0.1/24", "10.244.0.2/24"), ("fd02::1/64", "fd02::2/64")],
        );
        for (namespace, v4, v6) in [
            (&outside, "192.0.2.1", "2001:db8:1::1"),
            (&pod, "10.244.0.1", "fd02::1"),
        ] {
            namespace.ip(&format!("route add default via {v4}"));
            namespace.ip(&format!("-6 route add default via {v6}"));
        }
        node.sysctl("net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1");
        let (client, mut remote_python, mut pod_python) = (outside.python(), remote.python(), pod.python());
        for (python, name) in [(&mut remote_python, "remote"), (&mut pod_python, "local")] {
            for any in ["0.0.0.0", "::"] {
                // one socket for both families would need IPV6_V6ONLY off; two are as good
                let port = if any == "::" { 81 } else { 80 };
                assert_eq!(
                    python.ask(&format!("tcp_serve('{any}', {port}, '{name}')")),
                    "None"
                );
                assert_eq!(
                    python.ask(&format!("udp_serve('{any}', {port}, '{name}')")),
                    "None"
                );
            }
        }

        node.enter();
        let place = Place::new();
        let mut plane = Plane::new(&place);
        plane.configure(|config| {
            config.mark = 0x4000;
            (config.nat_first, config.nat_last) = (61_000, u16::MAX);
            config.service_ranges = [
                range(ip("10.96.0.0"), 16),
                range(ip("fd96::"), 64),
                Default::default(),
                Default::default(),
            ];
        });
        let flags: BTreeMap<Addr, u32> = FAMILIES
            .iter()
            .flat_map(|family| [family.node, family.node_inside])
            .map(|address| (ip(address).into(), node_addr_flag::NODE_PORTS))
            .collect();
        plane.node.set_addrs(&flags).unwrap();
        let mut table = plane.kernel.device_table().unwrap();
        for (device, v4, v6) in [
            ("wan", "192.0.2.1", "2001:db8:1::1"),
            ("inside", "10.0.1.1", "fd01::1"),
        ] {
            serve(&plane, &mut table, node.index(device), (v4, v6), 0, hook);
        }
        Self {
            client,
            remote: remote_python,
            pod: pod_python,
            plane,
            table,
            node,
            _namespaces: [outside, remote, pod],
            _place: place,
        }
    }

    /// One service of the family at all its frontends, port 8080 and node port 30080, with these backends.
    fn serve(&mut self, family: &Family, backends: &[u32], flags: u32) {
        let base = if family.v6 { 10 } else { 0 };
        let service = SERVICE + base;
        let port = if family.v6 { 81 } else { 80 };
        for protocol in [Protocol::Tcp, Protocol::Udp] {
            let udp = if protocol == Protocol::Udp { 20 } else { 0 };
            let (service, base) = (service + udp, base + udp);
            for (id, address, node) in [(LOCAL, family.pod, 1), (REMOTE, family.remote, 2)] {
                let addr = std::net::SocketAddr::new(ip(address), port);
                self.plane.backend_on(base + id, addr, protocol, node);
            }
            let ids: Vec<u32> = backends.iter().map(|id| base + id).collect();
            let local: Vec<u32> = ids.iter().copied().filter(|id| *id == base + LOCAL).collect();
            let local = self.plane.slots(service, &local);
            let flags = flags
                | if backends.is_empty() {
                    0
                } else {
                    service_flag::HAS_ENDPOINTS
                };
            let row = Service {
                local,
                flags,
                ..Service::default()
            };
            self.plane.serve(service, &ids, row);
            self.plane.cluster_ip(family.cluster_ip, 8080, protocol, service);
            self.plane.active_address(family.cluster_ip);
            self.plane.node_port(family.any, 30080, protocol, service);
            for (address, kind) in [
                (family.external, frontend_kind::EXTERNAL_IP),
                (family.balancer, frontend_kind::LOAD_BALANCER),
            ] {
                let key = common::frontend(address, 8080, protocol);
                self.plane.front(key, service, kind);
            }
        }
    }

    /// Forgets every flow.
    fn forget(&mut self) {
        for table in [
            self.plane.kernel.flows().unwrap(),
            self.plane.kernel.masqueraded_flows().unwrap(),
        ] {
            let mut keys = Vec::new();
            table.visit(|key, _| keys.push(*key)).unwrap();
            keys.iter().for_each(|key| assert!(table.remove(key).unwrap()));
        }
    }

    fn ask(&mut self, protocol: &str, address: &str, port: u16) -> String {
        self.client.ask(&format!("{protocol}('{address}', {port})"))
    }

    fn frontends(family: &Family) -> [(&'static str, u16); 5] {
        [
            (family.node, 30080),
            (family.node_inside, 30080),
            (family.external, 8080),
            (family.balancer, 8080),
            (family.cluster_ip, 8080),
        ]
    }
}

/// A datagram of a raw socket: the kernel knows of no connection. Gives what came back, and from whom.
const RAW_UDP: &str = "
import struct
def raw_udp(ip, port, source):
    f = family(ip)
    with socket.socket(f, socket.SOCK_DGRAM) as r, socket.socket(f, socket.SOCK_RAW, socket.IPPROTO_UDP) as s:
        r.bind(('', source)); r.settimeout(3)
        if ':' in ip: s.setsockopt(socket.IPPROTO_IPV6, 7, 6) # IPV6_CHECKSUM
        def ask():
            s.sendto(struct.pack('!HHHH', source, port, 13, 0) + b'hello', (ip, 0))
            data, peer = r.recvfrom(1000)
            return f'{data.decode()} {peer[0]} {peer[1]}'
        return told(ask)
";

/// The socket layer sees nothing here: its programs are at another cgroup.
fn a_pod_reaches_every_frontend(hook: Option<Hook>) {
    let mut scene = Scene::new(hook);
    let device = scene.node.index("pod");
    let addresses = ("192.0.2.1", "2001:db8:1::1");
    let plane = &scene.plane;
    serve(plane, &mut scene.table, device, addresses, device_flag::POD, hook);
    // the answers of a remote backend come back by the node
    scene._namespaces[1].ip("route add 10.244.0.0/24 via 10.0.1.1");
    scene._namespaces[1].ip("-6 route add fd02::/64 via fd01::1");
    let defined = scene.pod.ask(&format!("exec({RAW_UDP:?})"));
    assert_eq!(defined, "None");
    let mut source = 7000;
    for family in &FAMILIES {
        for (backend, name, seen, flags) in [
            // a remote backend sees the pod, and the pod, if it is its own backend, an address of the node
            (LOCAL, "local", family.node, 0),
            (REMOTE, "remote", family.pod, 0),
            (REMOTE, "remote", family.pod, service_flag::EXTERNAL_LOCAL),
        ] {
            scene.serve(family, &[backend], flags);
            for (address, port) in Scene::frontends(family) {
                source += 1;
                for protocol in ["tcp", "udp"] {
                    let answer = scene.pod.ask(&format!("{protocol}('{address}', {port})"));
                    assert_eq!(told(&answer), format!("{name} {seen}"), "{protocol} {address}");
                }
                let raw = scene.pod.ask(&format!("raw_udp('{address}', {port}, {source})"));
                let expected = format!("{name} {seen} hello {address} {port}");
                assert_eq!(raw, expected, "raw {address}");
            }
            let bulk = format!("bulk('{}', 8080, 3000000)", family.cluster_ip);
            assert_eq!(scene.pod.ask(&bulk), "True", "{name}");
        }
        // larger than a packet
        let (address, port) = (family.cluster_ip, 8080);
        let long = scene.pod.ask(&format!("udp('{address}', {port}, 'x' * 4000)"));
        assert!(long.parse::<u32>().is_ok_and(|len| len > 4000), "{long}");
        scene.serve(family, &[], 0);
        for (address, port) in Scene::frontends(family) {
            for protocol in ["tcp", "udp"] {
                let answer = scene.pod.ask(&format!("{protocol}('{address}', {port})"));
                assert_eq!(answer, "ECONNREFUSED", "{protocol} {address}");
            }
        }
        // what is no service's goes on as it is
        let direct = scene.pod.ask(&format!(
            "tcp('{}', {})",
            family.remote,
            if family.v6 { 81 } else { 80 }
        ));
        assert_eq!(direct, format!("remote {}", family.pod));
    }
    for counter in ["store_failed", "nat_exhausted", "flow_lost", "no_nat_address"] {
        assert_eq!(scene.plane.counter(counter), 0, "{counter}");
    }
}

#[test]
fn a_pod_reaches_every_frontend_through_links() {
    a_pod_reaches_every_frontend(Some(Hook::Tcx));
}

#[test]
fn a_pod_reaches_every_frontend_through_filters() {
    a_pod_reaches_every_frontend(Some(Hook::Clsact));
}

/// What two pods of one bridge send each other does not pass the node's routing: the answers have to be translated at the
/// bridge's port.
#[test]
fn pods_of_one_bridge_reach_each_other_through_services() {
    let mut scene = Scene::new(None);
    let other = Netns::new("q");
    scene.node.join("pod2", &other, "eth0", &[]);
    scene.node.ip("link add br0 type bridge");
    for address in ["10.244.0.1/24", "fd02::1/64"] {
        let flag = if address.contains(':') { "nodad" } else { "" };
        scene.node.ip(&format!("addr del {address} dev pod"));
        scene.node.ip(&format!("addr add {address} dev br0 {flag}"));
    }
    for address in ["10.244.0.3/24", "fd02::3/64"] {
        let flag = if address.contains(':') { "nodad" } else { "" };
        other.ip(&format!("addr add {address} dev eth0 {flag}"));
    }
    scene.node.ip("link set br0 up");
    other.ip("route add default via 10.244.0.1");
    other.ip("-6 route add default via fd02::1");
    for port in ["pod", "pod2"] {
        scene.node.ip(&format!("link set {port} master br0"));
        let index = scene.node.index(port);
        let addresses = ("192.0.2.1", "2001:db8:1::1");
        serve(
            &scene.plane,
            &mut scene.table,
            index,
            addresses,
            device_flag::POD,
            None,
        );
    }
    let mut client = other.python();
    for (family, own) in FAMILIES.iter().zip(["10.244.0.3", "fd02::3"]) {
        scene.serve(family, &[LOCAL], 0);
        for (address, port) in Scene::frontends(family) {
            for protocol in ["tcp", "udp"] {
                let answer = client.ask(&format!("{protocol}('{address}', {port})"));
                assert_eq!(told(&answer), format!("local {own}"), "{protocol} {address}");
            }
        }
        // and itself, by the same port of the bridge
        let answer = scene.pod.ask(&format!("tcp('{}', 8080)", family.cluster_ip));
        assert_eq!(answer, format!("local {}", family.node));
    }
}

/// What a server says, without what the client said.
fn told(answer: &str) -> String {
    answer.strip_suffix(" hello").unwrap_or(answer).to_string()
}

fn other_hosts_reach_every_frontend(hook: Option<Hook>) {
    let mut scene = Scene::new(hook);
    for family in &FAMILIES {
        for (backend, name, seen) in [
            // a local backend sees the client, a remote one the node
            (LOCAL, "local", family.client),
            (REMOTE, "remote", family.node_inside),
        ] {
            scene.serve(family, &[backend], 0);
            for (address, port) in Scene::frontends(family) {
                for protocol in ["tcp", "udp"] {
                    let answer = told(&scene.ask(protocol, address, port));
                    assert_eq!(answer, format!("{name} {seen}"), "{protocol} {address}");
                }
            }
            let bulk = format!("bulk('{}', 30080, 3000000)", family.node);
            assert_eq!(scene.client.ask(&bulk), "True", "{name} {}", family.node);
        }
    }
    for counter in ["store_failed", "nat_exhausted", "flow_lost", "no_nat_address"] {
        assert_eq!(scene.plane.counter(counter), 0, "{counter}");
    }
    assert!(scene.plane.counter("packet_masqueraded") > 0 && scene.plane.counter("packet_unmasqueraded") > 0);
}

#[test]
fn other_hosts_reach_every_frontend_through_links() {
    other_hosts_reach_every_frontend(Some(Hook::Tcx));
}

#[test]
fn other_hosts_reach_every_frontend_through_filters() {
    other_hosts_reach_every_frontend(Some(Hook::Clsact));
}

#[test]
fn policy_local_keeps_the_client_and_drops_without_a_local_backend() {
    let mut scene = Scene::new(None);
    for family in &FAMILIES {
        scene.serve(family, &[LOCAL, REMOTE], service_flag::EXTERNAL_LOCAL);
        for _ in 0..20 {
            for (address, port) in [
                (family.node, 30080),
                (family.external, 8080),
                (family.balancer, 8080),
            ] {
                let expected = format!("local {}", family.client);
                assert_eq!(scene.ask("tcp", address, port), expected, "{address}");
            }
        }
        scene.serve(family, &[REMOTE], service_flag::EXTERNAL_LOCAL);
        let before = scene.plane.counter("no_local_backend");
        let ask = format!("tcp('{}', 30080, timeout=0.3)", family.node);
        assert_eq!(scene.client.ask(&ask), "TIMEOUT");
        assert!(scene.plane.counter("no_local_backend") > before);
        // the policy is not for this kind
        let answer = scene.ask("tcp", family.cluster_ip, 8080);
        assert_eq!(answer, format!("remote {}", family.node_inside));
    }
}

/// Packets between namespaces carry no checksums; with `checksums`, the node's side computes them when the answers leave,
/// so that the client checks them.
fn services_without_endpoints_reject(checksums: bool) {
    let mut scene = Scene::new(None);
    if checksums {
        assert_eq!(scene.node.python().ask("checksum_in_software('wan')"), "None");
    }
    for family in &FAMILIES {
        scene.serve(family, &[], 0);
        let frontends = Scene::frontends(family);
        let unknown = (family.cluster_ip, 8081);
        for (address, port) in frontends.into_iter().chain([unknown]) {
            for protocol in ["tcp", "udp"] {
                let answer = scene.ask(protocol, address, port);
                assert_eq!(answer, "ECONNREFUSED", "{protocol} {address}:{port}");
            }
        }
        // no service has it
        let nobody = family.cluster_ip.replace(":1", ":99").replace(".1", ".99");
        let ask = format!("tcp('{nobody}', 8080, timeout=0.3)");
        assert_eq!(scene.client.ask(&ask), "TIMEOUT", "{nobody}");
    }
    // an error that comes while the client still connects is not heard, and it tries again
    let (no_backend, unknown) = (
        scene.plane.counter("no_backend"),
        scene.plane.counter("unknown_port"),
    );
    assert!(
        no_backend >= 2 * 5 * 2 && unknown >= 2 * 2,
        "{no_backend} {unknown}"
    );
    assert_eq!(scene.plane.counter("rejected"), no_backend + unknown);
    assert!(scene.plane.counter("unknown_address") >= 2);
    assert_eq!(scene.plane.counter("store_failed"), 0);
}

#[test]
fn services_without_endpoints_reject_between_namespaces() {
    services_without_endpoints_reject(false);
}

#[test]
fn services_without_endpoints_reject_with_checksums() {
    services_without_endpoints_reject(true);
}

#[test]
fn connections_outlive_their_frontend_and_programs_are_replaced_under_them() {
    let mut scene = Scene::new(None);
    for family in &FAMILIES {
        for (backend, key) in [(LOCAL, "local"), (REMOTE, "remote")] {
            scene.serve(family, &[backend], 0);
            let open = format!("tcp_keep('{key}{}', '{}', 30080)", family.v6, family.node);
            assert!(scene.client.ask(&open).starts_with(key));
        }
    }
    let mut key = common::frontend("0.0.0.0", 30080, Protocol::Tcp);
    key.class = dataplane_common::abi::frontend_class::NODE_PORT;
    scene
        .plane
        .write(&dataplane_model::program::Write::DeleteFrontend { key });
    // as the next agent does
    let next = dataplane_user::kernel::Kernel::open(&scene._place.config).unwrap();
    let wan = scene.node.index("wan");
    assert_eq!(next.nic().attached().unwrap().len(), 2);
    assert_eq!(next.nic().attach(wan, None).unwrap(), Hook::Tcx);
    for key in ["localFalse", "remoteFalse", "localTrue", "remoteTrue"] {
        let key = key.replace("True", "true").replace("False", "false");
        assert_eq!(
            scene.client.ask(&format!("echo('{key}', 'still here')")),
            "still here",
            "{key}"
        );
    }
    assert_eq!(
        scene.ask("tcp", "192.0.2.1", 30080),
        "ECONNREFUSED",
        "the host's own answer"
    );
    // nothing is left behind
    scene.table.remove(wan).unwrap();
    next.nic().detach(wan).unwrap();
    assert_eq!(next.nic().attached().unwrap().len(), 1);
    assert_eq!(scene.remote.ask("1"), "1");
    assert_eq!(scene.pod.ask("1"), "1");
}

/// Packets of a device without a link layer: this test is its other end.
struct Tun(std::fs::File);

impl Tun {
    fn open(name: &str) -> Self {
        let file = std::fs::File::options()
            .read(true)
            .write(true)
            .open("/dev/net/tun")
            .unwrap();
        // struct ifreq: a name and flags, IFF_TUN | IFF_NO_PI
        let mut request = [0_u8; 40];
        request[..name.len()].copy_from_slice(name.as_bytes());
        request[16..18].copy_from_slice(&0x1001_u16.to_ne_bytes());
        // SAFETY: TUNSETIFF reads and writes a struct ifreq, which has 40 bytes.
        let result = unsafe { libc::ioctl(file.as_raw_fd(), 0x4004_54ca, request.as_mut_ptr()) };
        assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
        Self(file)
    }

    /// Sends a packet and gives the next one to the client that comes back.
    fn ask(&mut self, packet: &build::Packet) -> build::Seen {
        use std::io::{Read as _, Write as _};
        self.0.write_all(&packet.build()).unwrap();
        loop {
            let mut bytes = vec![0; 2000];
            let mut ready = libc::pollfd {
                fd: self.0.as_raw_fd(),
                events: libc::POLLIN,
                revents: 0,
            };
            // SAFETY: one structure, which lives longer than the call.
            let count = unsafe { libc::poll(&raw mut ready, 1, 5000) };
            assert!(count > 0, "no answer to {packet:?}");
            let len = self.0.read(&mut bytes).unwrap();
            let seen = build::check_ip(&bytes[..len]);
            // not the kernel's own neighbour discovery
            if seen.dst.ip() == packet.src.ip() {
                return seen;
            }
        }
    }
}

#[test]
fn devices_without_a_link_layer() {
    let mut scene = Scene::new(None);
    let mut tun = Tun::open("l3");
    for address in ["198.18.0.1/24", "2001:db8:9::1/64"] {
        let flag = if address.contains(':') { "nodad" } else { "" };
        scene.node.ip(&format!("addr add {address} dev l3 {flag}"));
    }
    scene.node.ip("link set l3 up");
    let index = scene.node.index("l3");
    let row = Device {
        v4: ip("198.18.0.1").into(),
        v6: ip("2001:db8:9::1").into(),
        ..Device::default()
    };
    scene.table.put(index, &row).unwrap();
    scene.plane.kernel.nic().attach(index, None).unwrap();
    for family in &FAMILIES {
        let client = if family.v6 {
            "[2001:db8:9::7]:5000"
        } else {
            "198.18.0.7:5000"
        };
        let to = |address: &str, port| std::net::SocketAddr::new(ip(address), port).to_string();
        let packet = |dst: &str| build::Packet {
            ethernet: false,
            ..build::udp(client, dst)
        };
        for (backend, name) in [(LOCAL, "local"), (REMOTE, "remote")] {
            scene.serve(family, &[backend], 0);
            for (address, port) in Scene::frontends(family) {
                let sent = packet(&to(address, port));
                let seen = tun.ask(&sent);
                assert_eq!((seen.src, seen.dst), (sent.dst, sent.src), "{name}");
                assert!(seen.rest.starts_with(name.as_bytes()), "{seen:?}");
            }
            // the flows would outlive their backend
            scene.forget();
        }
        scene.serve(family, &[], 0);
        let sent = packet(&to(family.node, 30080));
        let seen = tun.ask(&sent);
        assert_eq!((seen.src.ip(), seen.dst.ip()), (sent.dst.ip(), sent.src.ip()));
        let inside = seen.inside();
        assert_eq!((inside.src, inside.dst), (sent.src, sent.dst));
    }
}
