//! A node as flannel, its CNI plugin, `bridge` and `host-local` leave it (spec cni-overlay 1.3 to 1.7, 3): plain kernel
//! state and files, made here with `ip`, `bridge` and `iptables`.

use std::fs;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use beeline_tests::cluster::{ECHO_PORT, Node};
use beeline_tests::netns::NetNs;
use beeline_tests::process::{Place, Process};
use beeline_tests::{ControlPlane, program};
use serde_json::json;

const NETWORKS: [&str; 2] = ["10.244.0.0/16", "fd00:10:244::/48"];

/// What flannel knows of a node.
pub(crate) struct Flannel<'a> {
    pub(crate) node: &'a Node,
    /// 1 for `node-1`.
    index: u8,
}

impl<'a> Flannel<'a> {
    /// The node's device, bridge, masquerade rules and annotations.
    pub(crate) fn new(plane: &ControlPlane, node: &'a Node, index: u8) -> Self {
        let flannel = Self { node, index };
        let (v4, v6) = (node.v4(), node.v6());
        let [mac_v4, mac_v6] = flannel.macs();
        flannel.ip(&[
            format!("link add flannel.1 address {mac_v4} mtu 1450 type vxlan id 1 dev up0 local {v4} dstport 8472 nolearning"),
            format!("link add flannel-v6.1 address {mac_v6} mtu 1450 type vxlan id 1 dev up0 local {v6} dstport 8472 nolearning"),
            "link set flannel.1 up".into(),
            "link set flannel-v6.1 up".into(),
            format!("address add 10.244.{index}.0/32 dev flannel.1"),
            format!("address add fd00:10:244:{index}::/128 dev flannel-v6.1 nodad"),
            // as the plugin does: else each new port might change it
            format!("link add cni0 address 3e:00:00:00:00:{index:02x} mtu 1450 type bridge"),
            format!("address add 10.244.{index}.1/24 dev cni0"),
            format!("address add fd00:10:244:{index}::1/64 dev cni0 nodad"),
            "link set cni0 up".into(),
        ]);
        flannel.masquerade();
        fs::create_dir_all(flannel.host_local()).unwrap();
        let annotations = json!({
            "flannel.alpha.coreos.com/kube-subnet-manager": "true",
            "flannel.alpha.coreos.com/backend-type": "vxlan",
            "flannel.alpha.coreos.com/backend-data": format!(r#"{{"VNI":1,"VtepMAC":"{mac_v4}"}}"#),
            "flannel.alpha.coreos.com/backend-v6-data": format!(r#"{{"VNI":1,"VtepMAC":"{mac_v6}"}}"#),
            "flannel.alpha.coreos.com/public-ip": v4,
            "flannel.alpha.coreos.com/public-ipv6": v6,
        });
        let patch = json!({"metadata": {"annotations": annotations}}).to_string();
        let patch = ["patch", "node", node.name(), "--subresource=status", "-p", &patch];
        plane.kubectl(&patch).unwrap();
        flannel
    }

    pub(crate) fn macs(&self) -> [String; 2] {
        let index = self.index;
        [
            format!("3e:00:00:00:04:{index:02x}"),
            format!("3e:00:00:00:06:{index:02x}"),
        ]
    }

    /// What flannel does for each peer's lease, in its order; as at its start, whatever is there already.
    pub(crate) fn peers(&self, all: &[Flannel<'_>]) {
        for peer in all.iter().filter(|peer| peer.index != self.index) {
            let n = peer.index;
            let [mac_v4, mac_v6] = peer.macs();
            for (device, mac, net, public) in [
                (
                    "flannel.1",
                    mac_v4,
                    format!("10.244.{n}.0/24"),
                    peer.node.v4().to_string(),
                ),
                (
                    "flannel-v6.1",
                    mac_v6,
                    format!("fd00:10:244:{n}::/64"),
                    peer.node.v6().to_string(),
                ),
            ] {
                let subnet = net.split('/').next().unwrap();
                self.ip(&[format!(
                    "neighbour replace {subnet} lladdr {mac} dev {device} nud permanent"
                )]);
                let fdb = format!("fdb replace {mac} dev {device} dst {public} self permanent");
                let words: Vec<&str> = fdb.split(' ').collect();
                self.node.host().output("bridge", &words).unwrap();
                self.ip(&[format!("route replace {net} via {subnet} dev {device} onlink")]);
            }
        }
    }

    fn masquerade(&self) {
        let index = self.index;
        let own = [
            format!("10.244.{index}.0/24"),
            format!("fd00:10:244:{index}::/64"),
        ];
        let multicast = ["224.0.0.0/4", "ff00::/8"];
        for (i, program) in ["iptables", "ip6tables"].iter().enumerate() {
            let (network, own, multicast) = (NETWORKS[i], &own[i], multicast[i]);
            for rule in [
                "-t nat -N FLANNEL-POSTRTG".to_owned(),
                "-t nat -A POSTROUTING -m comment --comment flanneld-masq -j FLANNEL-POSTRTG".into(),
                "-t nat -A FLANNEL-POSTRTG -m mark --mark 0x4000/0x4000 -j RETURN".into(),
                format!("-t nat -A FLANNEL-POSTRTG -s {own} -d {network} -j RETURN"),
                format!("-t nat -A FLANNEL-POSTRTG -s {network} -d {own} -j RETURN"),
                format!("-t nat -A FLANNEL-POSTRTG ! -s {network} -d {own} -j RETURN"),
                format!(
                    "-t nat -A FLANNEL-POSTRTG -s {network} ! -d {multicast} -j MASQUERADE --random-fully"
                ),
                format!("-t nat -A FLANNEL-POSTRTG ! -s {network} -d {network} -j MASQUERADE --random-fully"),
                "-N FLANNEL-FWD".into(),
                "-A FORWARD -m comment --comment flanneld-forward -j FLANNEL-FWD".into(),
                format!("-A FLANNEL-FWD -s {network} -j ACCEPT"),
                format!("-A FLANNEL-FWD -d {network} -j ACCEPT"),
            ] {
                let words: Vec<&str> = rule.split(' ').collect();
                self.node.host().output(program, &words).unwrap();
            }
        }
    }

    /// `/var/lib/cni/networks/cbr0`.
    pub(crate) fn host_local(&self) -> PathBuf {
        self.node.state().join("host-local")
    }

    fn ip(&self, lines: &[String]) {
        self.node.host().netns().ip_batch(lines).unwrap();
    }

    /// A pod as `bridge` and `host-local` make it, with an echo server: the first address that host-local has not given out.
    pub(crate) fn pod(&self, name: &str) -> BridgePod {
        let index = self.index;
        let number = (2..255)
            .find(|n| !self.host_local().join(format!("10.244.{index}.{n}")).exists())
            .unwrap();
        let (v4, v6) = (Ipv4Addr::new(10, 244, index, number), v6(index, number));
        for address in [v4.to_string(), v6.to_string()] {
            fs::write(self.host_local().join(address), format!("{name}\r\neth0")).unwrap();
        }
        let host = self.node.host().netns();
        let netns = Arc::new(NetNs::create(&format!("{}-{name}", host.name())).unwrap());
        let link = format!("veth{number}");
        self.ip(&[
            format!(
                "link add {link} mtu 1450 type veth peer name eth0 mtu 1450 netns {}",
                netns.name()
            ),
            format!("link set {link} master cni0 up"),
            format!("link set {link} type bridge_slave hairpin on"),
        ]);
        let lines = [
            format!("address add {v4}/24 dev eth0"),
            format!("address add {v6}/64 dev eth0 nodad"),
            "link set eth0 up".into(),
            format!("route add default via 10.244.{index}.1"),
            format!("route add default via fd00:10:244:{index}::1"),
        ];
        netns.ip_batch(&lines).unwrap();
        let place = Place::new(netns, self.node.cgroup().join("host"), false);
        let mut command = place.command(program("beeline-echo").unwrap()).unwrap();
        command.args(["--name", name, "--port", &ECHO_PORT.to_string()]);
        let log = self.node.state().join(format!("{name}.log"));
        let echo = Process::spawn(&place, name, command, &log).unwrap();
        let listening = |line: &str| line.contains("listening");
        echo.wait_log("its listening", Duration::from_secs(5), listening)
            .unwrap();
        BridgePod {
            place,
            v4,
            v6,
            _echo: echo,
        }
    }
}

fn v6(index: u8, number: u8) -> Ipv6Addr {
    Ipv6Addr::new(0xfd00, 0x10, 0x244, index.into(), 0, 0, 0, number.into())
}

/// A pod on flannel's bridge.
pub(crate) struct BridgePod {
    pub(crate) place: Place,
    pub(crate) v4: Ipv4Addr,
    pub(crate) v6: Ipv6Addr,
    _echo: Process,
}
