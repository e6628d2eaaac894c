//! Rules as kube-proxy writes them, in its iptables and its nftables mode: for one service with a ClusterIP, two ports and a
//! node port, and what kubelet and a CNI plugin have beside them.

use std::io::Write;
use std::net::IpAddr;
use std::process::Stdio;

use beeline_tests::cluster::ECHO_PORT;
use beeline_tests::{Node, Pod};

use crate::scene::{V4, V6};

/// The node port of the service's TCP port.
pub(crate) const NODE_PORT: u16 = 30001;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Mode {
    IptablesNft,
    IptablesLegacy,
    Nftables,
}

/// One family's part of the service.
struct Part {
    v6: bool,
    cluster_ip: &'static str,
    pod_cidr: &'static str,
    /// Whole addresses, as a CIDR.
    host: u8,
    pods: Vec<IpAddr>,
}

fn parts(pods: &[Pod]) -> [Part; 2] {
    let addresses = |v6: bool| {
        let all = pods.iter().flat_map(Pod::addresses);
        all.filter(|ip| ip.is_ipv6() == v6).collect()
    };
    [
        Part {
            v6: false,
            cluster_ip: V4,
            pod_cidr: "10.244.0.0/16",
            host: 32,
            pods: addresses(false),
        },
        Part {
            v6: true,
            cluster_ip: V6,
            pod_cidr: "fd00:10:244::/48",
            host: 128,
            pods: addresses(true),
        },
    ]
}

/// Ports of the service: protocol, port, and the name that stands for kube-proxy's hash.
const PORTS: [(&str, u16, &str); 2] = [("tcp", 80, "WEBAAAAAAAAAAAAA"), ("udp", 53, "DNSBBBBBBBBBBBBB")];

fn end(ip: IpAddr) -> String {
    match ip {
        IpAddr::V4(ip) => format!("{ip}:{ECHO_PORT}"),
        IpAddr::V6(ip) => format!("[{ip}]:{ECHO_PORT}"),
    }
}

/// What `iptables-restore --noflush` is given.
fn iptables(part: &Part) -> String {
    let Part {
        cluster_ip,
        pod_cidr,
        host,
        ..
    } = part;
    let mut chains = String::new();
    let mut rules = String::new();
    for (protocol, port, hash) in PORTS {
        chains += &format!(":KUBE-SVC-{hash} - [0:0]\n");
        let of = format!("-m comment --comment \"default/web:{hash} cluster IP\"");
        rules += &format!(
            "-A KUBE-SERVICES {of} -d {cluster_ip}/{host} -p {protocol} -m {protocol} --dport {port} -j KUBE-SVC-{hash}\n\
             -A KUBE-SVC-{hash} {of} ! -s {pod_cidr} -d {cluster_ip}/{host} -p {protocol} -m {protocol} --dport {port} \
             -j KUBE-MARK-MASQ\n"
        );
        for (index, pod) in part.pods.iter().enumerate() {
            let left = part.pods.len() - index;
            let sep = format!("KUBE-SEP-{}{index}", &hash[..15]);
            let chance = if left > 1 {
                format!(
                    "-m statistic --mode random --probability {:.10}",
                    1.0 / f64::from(u32::try_from(left).unwrap())
                )
            } else {
                String::new()
            };
            chains += &format!(":{sep} - [0:0]\n");
            rules += &format!(
                "-A KUBE-SVC-{hash} -m comment --comment \"default/web -> {0}\" {chance} -j {sep}\n\
                 -A {sep} -s {pod}/{host} -j KUBE-MARK-MASQ\n\
                 -A {sep} -p {protocol} -m {protocol} -j DNAT --to-destination {0}\n",
                end(*pod)
            );
        }
    }
    let web = PORTS[0].2;
    format!(
        r#"*mangle
:KUBE-PROXY-CANARY - [0:0]
:KUBE-KUBELET-CANARY - [0:0]
COMMIT
*filter
:KUBE-FIREWALL - [0:0]
:KUBE-SERVICES - [0:0]
:KUBE-EXTERNAL-SERVICES - [0:0]
:KUBE-NODEPORTS - [0:0]
:KUBE-FORWARD - [0:0]
:KUBE-PROXY-FIREWALL - [0:0]
:KUBE-PROXY-CANARY - [0:0]
:FORWARD DROP [0:0]
-A INPUT -j KUBE-FIREWALL
-A INPUT -m conntrack --ctstate NEW -m comment --comment "kubernetes load balancer firewall" -j KUBE-PROXY-FIREWALL
-A INPUT -m comment --comment "kubernetes health check service ports" -j KUBE-NODEPORTS
-A INPUT -m conntrack --ctstate NEW -m comment --comment "kubernetes externally-visible service portals" -j KUBE-EXTERNAL-SERVICES
-A FORWARD -m conntrack --ctstate NEW -m comment --comment "kubernetes load balancer firewall" -j KUBE-PROXY-FIREWALL
-A FORWARD -m comment --comment "kubernetes forwarding rules" -j KUBE-FORWARD
-A FORWARD -m conntrack --ctstate NEW -m comment --comment "kubernetes service portals" -j KUBE-SERVICES
-A FORWARD -s {pod_cidr} -m comment --comment "flannel forward" -j ACCEPT
-A FORWARD -d {pod_cidr} -m comment --comment "flannel forward" -j ACCEPT
-A OUTPUT -m conntrack --ctstate NEW -m comment --comment "kubernetes service portals" -j KUBE-SERVICES
-A KUBE-FORWARD -m conntrack --ctstate INVALID -j DROP
-A KUBE-FORWARD -m comment --comment "kubernetes forwarding rules" -m mark --mark 0x4000/0x4000 -j ACCEPT
-A KUBE-FORWARD -m comment --comment "kubernetes forwarding conntrack rule" -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
COMMIT
*nat
:KUBE-SERVICES - [0:0]
:KUBE-NODEPORTS - [0:0]
:KUBE-POSTROUTING - [0:0]
:KUBE-MARK-MASQ - [0:0]
:KUBE-PROXY-CANARY - [0:0]
:KUBE-EXT-{web} - [0:0]
{chains}-A PREROUTING -m comment --comment "kubernetes service portals" -j KUBE-SERVICES
-A OUTPUT -m comment --comment "kubernetes service portals" -j KUBE-SERVICES
-A POSTROUTING -m comment --comment "kubernetes postrouting rules" -j KUBE-POSTROUTING
-A KUBE-MARK-MASQ -j MARK --or-mark 0x4000
-A KUBE-POSTROUTING -m mark ! --mark 0x4000/0x4000 -j RETURN
-A KUBE-POSTROUTING -j MARK --xor-mark 0x4000
-A KUBE-POSTROUTING -m comment --comment "kubernetes service traffic requiring SNAT" -j MASQUERADE --random-fully
-A KUBE-NODEPORTS -m comment --comment "default/web:web" -p tcp -m tcp --dport {NODE_PORT} -j KUBE-EXT-{web}
-A KUBE-EXT-{web} -m comment --comment "masquerade traffic for default/web:web external destinations" -j KUBE-MARK-MASQ
-A KUBE-EXT-{web} -j KUBE-SVC-{web}
{rules}-A KUBE-SERVICES -m comment --comment "kubernetes service nodeports; NOTE: this must be the last rule in this chain" -m addrtype --dst-type LOCAL -j KUBE-NODEPORTS
COMMIT
"#
    )
}

/// What `nft -f` is given.
fn nftables(part: &Part) -> String {
    let Part {
        cluster_ip, pod_cidr, ..
    } = part;
    let (family, kind) = if part.v6 {
        ("ip6", "ipv6_addr")
    } else {
        ("ip", "ipv4_addr")
    };
    let mut chains = String::new();
    let mut elements = Vec::new();
    for (protocol, port, hash) in PORTS {
        let mut choices = Vec::new();
        for (index, pod) in part.pods.iter().enumerate() {
            let name = format!("endpoint-{hash}-{index}");
            choices.push(format!("{index} : goto {name}"));
            chains += &format!(
                "chain {name} {{\n{family} saddr {pod} jump mark-for-masquerade\nmeta l4proto {protocol} dnat to {}\n}}\n",
                end(*pod)
            );
        }
        chains += &format!(
            "chain service-{hash} {{\n{family} daddr {cluster_ip} {protocol} dport {port} {family} saddr != {pod_cidr} jump \
             mark-for-masquerade\nnumgen random mod {} vmap {{ {} }}\n}}\n",
            choices.len(),
            choices.join(", ")
        );
        elements.push(format!(
            "{cluster_ip} . {protocol} . {port} : goto service-{hash}"
        ));
    }
    let web = PORTS[0].2;
    format!(
        r#"table {family} kube-proxy {{
comment "rules for kube-proxy"
chain mark-for-masquerade {{
mark set mark or 0x4000
}}
chain masquerading {{
mark and 0x4000 == 0 return
mark set mark xor 0x4000
masquerade fully-random
}}
{chains}chain external-{web} {{
jump mark-for-masquerade
goto service-{web}
}}
chain reject-chain {{
reject
}}
map no-endpoint-services {{
type {kind} . inet_proto . inet_service : verdict
}}
map service-ips {{
type {kind} . inet_proto . inet_service : verdict
elements = {{ {elements} }}
}}
map service-nodeports {{
type inet_proto . inet_service : verdict
elements = {{ tcp . {NODE_PORT} : goto external-{web} }}
}}
set cluster-ips {{
type {kind}
elements = {{ {cluster_ip} }}
}}
chain services {{
{family} daddr . meta l4proto . th dport vmap @service-ips
fib daddr type local meta l4proto . th dport vmap @service-nodeports
}}
chain cluster-ips-check {{
{family} daddr @cluster-ips reject
}}
chain service-endpoints-check {{
{family} daddr . meta l4proto . th dport vmap @no-endpoint-services
}}
chain nat-prerouting {{
type nat hook prerouting priority dstnat;
jump services
}}
chain nat-output {{
type nat hook output priority -100;
jump services
}}
chain nat-postrouting {{
type nat hook postrouting priority srcnat;
jump masquerading
}}
chain filter-forward {{
type filter hook forward priority -110;
ct state new jump service-endpoints-check
ct state new jump cluster-ips-check
}}
chain filter-output {{
type filter hook output priority -90;
ct state new jump service-endpoints-check
ct state new jump cluster-ips-check
}}
}}
"#,
        elements = elements.join(", ")
    )
}

/// Writes the rules in the node's network namespace, as kube-proxy does at the end of its first sync.
pub(crate) fn write(mode: Mode, node: &Node, pods: &[Pod]) {
    for part in parts(pods) {
        let (program, args, text): (_, &[&str], _) = match mode {
            Mode::Nftables => ("nft".to_owned(), &["-f", "-"], nftables(&part)),
            Mode::IptablesNft | Mode::IptablesLegacy => {
                let variant = if mode == Mode::IptablesNft {
                    "nft"
                } else {
                    "legacy"
                };
                let base = if part.v6 { "ip6tables" } else { "iptables" };
                let program = format!("{base}-{variant}-restore");
                (program, &["--noflush", "-w", "5"], iptables(&part))
            }
        };
        let mut command = node.host().command(&program).unwrap();
        let mut child = command.args(args).stdin(Stdio::piped()).spawn().unwrap();
        child.stdin.take().unwrap().write_all(text.as_bytes()).unwrap();
        let status = child.wait().unwrap();
        assert!(status.success(), "{program} {status} refused:\n{text}");
    }
}

/// All rules of the node's network namespace, as the tools show them.
pub(crate) fn rules(node: &Node) -> String {
    let programs: [(&str, &[&str]); 4] = [
        ("iptables-legacy-save", &[]),
        ("ip6tables-legacy-save", &[]),
        ("iptables-nft-save", &[]),
        ("ip6tables-nft-save", &[]),
    ];
    let mut text: Vec<String> = programs
        .iter()
        .map(|(program, args)| node.host().output(program, args).unwrap())
        .collect();
    text.push(node.host().output("nft", &["list", "tables"]).unwrap());
    text.concat()
}
