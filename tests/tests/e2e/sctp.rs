//! SCTP, which no socket program sees: associations through services are translated packet by packet.

use std::collections::BTreeSet;
use std::io::{self, Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsRawFd as _, OwnedFd};

use beeline_tests::cluster::ECHO_PORT;
use beeline_tests::{Place, slowness};
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockProtocol, SockType, SockaddrStorage, bind, connect, listen,
    setsockopt, socket, sockopt,
};
use nix::sys::time::{TimeVal, TimeValLike as _};
use serde_json::json;

use crate::pair::{BOTH, NODE_PORT, Pair, slices};
use crate::ports::cluster_ips;

/// One-to-one: with it the calls of a stream do what they do with TCP.
fn stream_socket(place: &Place, ip: IpAddr) -> OwnedFd {
    let family = if ip.is_ipv4() {
        AddressFamily::Inet
    } else {
        AddressFamily::Inet6
    };
    let open = || {
        socket(
            family,
            SockType::Stream,
            SockFlag::SOCK_CLOEXEC,
            SockProtocol::Sctp,
        )
    };
    place.netns().run(open).unwrap().unwrap()
}

/// Answers the first bytes of every association with its name.
fn serve(place: &Place, ip: IpAddr, name: &'static str) {
    let fd = stream_socket(place, ip);
    bind(
        fd.as_raw_fd(),
        &SockaddrStorage::from(SocketAddr::new(ip, ECHO_PORT)),
    )
    .unwrap();
    listen(&fd, Backlog::new(64).unwrap()).unwrap();
    let listener = TcpListener::from(fd);
    std::thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            let mut question = [0; 16];
            // a client that goes away is its own business
            let _ = stream
                .read(&mut question)
                .and_then(|_| stream.write_all(name.as_bytes()));
        }
    });
}

fn ask(place: &Place, target: SocketAddr) -> io::Result<String> {
    let fd = stream_socket(place, target.ip());
    let limit = TimeVal::seconds((5 * slowness()).into());
    setsockopt(&fd, sockopt::SendTimeout, &limit)?;
    setsockopt(&fd, sockopt::ReceiveTimeout, &limit)?;
    connect(fd.as_raw_fd(), &SockaddrStorage::from(target))?;
    let mut stream = TcpStream::from(fd);
    stream.write_all(b"name")?;
    let mut name = [0; 16];
    let length = stream.read(&mut name)?;
    Ok(String::from_utf8_lossy(&name[..length]).into_owned())
}

#[test]
#[ignore = "needs a kernel with SCTP: cargo xtask vm"]
fn associations_reach_every_pod_through_every_kind_of_frontend() {
    let pair = Pair::new();
    pair.nodes[0].host().output("modprobe", &["sctp"]).unwrap();
    let sctp = json!({"name": "sctp", "protocol": "SCTP", "port": 80, "nodePort": NODE_PORT});
    let mut objects = vec![Pair::service(json!({"spec": {"ports": [sctp]}}))];
    let port = json!({"name": "sctp", "protocol": "SCTP", "port": ECHO_PORT});
    let pods: Vec<_> = pair.servers.iter().collect();
    objects.extend(slices("web", "a", &json!([port]), &pods));
    pair.put_objects("web", &objects);
    for (pod, name) in pair.servers.iter().zip(BOTH) {
        for ip in pod.addresses() {
            serve(pod.place(), ip, name);
        }
    }

    let node_ports = [0, 1].map(|node| pair.node_ports(node, NODE_PORT)).concat();
    let mut cases: Vec<(&str, &Place, SocketAddr)> = Vec::new();
    for target in node_ports {
        cases.push(("outside", pair.outside.place(), target));
    }
    for client in &pair.clients {
        for target in cluster_ips(80).into_iter().chain(pair.node_ports(1, NODE_PORT)) {
            cases.push(("pod", client.place(), target));
        }
    }
    for (who, place, target) in cases {
        let mut names = BTreeSet::new();
        for _ in 0..40 {
            match ask(place, target) {
                Ok(name) => names.insert(name),
                Err(error) => panic!("{who} to {target}: {error}"),
            };
            if names.len() == BOTH.len() {
                break;
            }
        }
        assert_eq!(names, BOTH.map(String::from).into(), "{who} to {target}");
    }
}
