//! Rules as kube-proxy writes them, in its iptables, its ipvs and its nftables mode: for one service with a ClusterIP, two ports and a
//! node port, and what kubelet and a CNI plugin have beside them.

use std::collections::BTreeSet;
use std::fs;
use std::io::Write;
use std::net::{IpAddr, SocketAddr};
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
    Ipvs,
    Nftables,
}

/// One family's part of the service.
struct Part {
    v6: bool,
    /// The node's own.
    node: IpAddr,
    cluster_ip: &'static str,
    pod_cidr: &'static str,
    /// Whole addresses, as a CIDR.
    host: u8,
    pods: Vec<IpAddr>,
}

fn parts(node: &Node, pods: &[Pod]) -> [Part; 2] {
    let addresses = |v6: bool| {
        let all = pods.iter().flat_map(Pod::addresses);
        all.filter(|ip| ip.is_ipv6() == v6).collect()
    };
    [
        Part {
            v6: false,
            node: node.v4().into(),
            cluster_ip: V4,
            pod_cidr: "10.244.0.0/16",
            host: 32,
            pods: addresses(false),
        },
        Part {
            v6: true,
            node: node.v6().into(),
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
    SocketAddr::new(ip, ECHO_PORT).to_string()
}

/// What `iptables-restore --noflush` is given.
fn iptables_rules(part: &Part) -> String {
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

/// Sets of the ipvs mode: name behind its prefix, type.
const SETS: [(&str, &str); 8] = [
    ("LOOP-BACK", "hash:ip,port,ip"),
    ("CLUSTER-IP", "hash:ip,port"),
    ("EXTERNAL-IP", "hash:ip,port"),
    ("LOAD-BALANCER", "hash:ip,port"),
    ("NODE-PORT-TCP", "bitmap:port"),
    ("NODE-PORT-UDP", "bitmap:port"),
    ("HEALTH-CHECK-NODE-PORT", "bitmap:port"),
    ("IPVS-IPS", "hash:ip"),
];

fn set_prefix(v6: bool) -> &'static str {
    if v6 { "KUBE-6-" } else { "KUBE-" }
}

/// What `ipset restore` is given.
fn ipsets(part: &Part) -> String {
    let prefix = set_prefix(part.v6);
    let family = if part.v6 { "inet6" } else { "inet" };
    let mut text = String::new();
    for (name, kind) in SETS {
        let more = if kind == "bitmap:port" {
            "range 0-65535".to_owned()
        } else {
            format!("family {family}")
        };
        text += &format!("create {prefix}{name} {kind} {more}\n");
    }
    let ip = part.cluster_ip;
    text += &format!("add {prefix}IPVS-IPS {ip}\nadd {prefix}NODE-PORT-TCP {NODE_PORT}\n");
    for (protocol, port, _) in PORTS {
        // by number: names need a file that a small system does not have
        let protocol = if protocol == "tcp" { 6 } else { 17 };
        text += &format!("add {prefix}CLUSTER-IP {ip},{protocol}:{port}\n");
        for pod in &part.pods {
            text += &format!("add {prefix}LOOP-BACK {pod},{protocol}:{ECHO_PORT},{pod}\n");
        }
    }
    text
}

/// What `ipvsadm --restore` is given.
fn virtual_servers(part: &Part) -> String {
    let mut text = String::new();
    let mut add = |protocol: &str, address: SocketAddr| {
        let flag = if protocol == "tcp" { "-t" } else { "-u" };
        text += &format!("-A {flag} {address} -s rr\n");
        for pod in &part.pods {
            text += &format!("-a {flag} {address} -r {} -m -w 1\n", end(*pod));
        }
    };
    for (protocol, port, _) in PORTS {
        add(protocol, SocketAddr::new(part.cluster_ip.parse().unwrap(), port));
    }
    add("tcp", SocketAddr::new(part.node, NODE_PORT));
    text
}

/// What `iptables-restore --noflush` is given in the ipvs mode.
fn ipvs_rules(part: &Part) -> String {
    let Part { pod_cidr, v6, .. } = part;
    let loopback = if *v6 { "::1/128" } else { "127.0.0.0/8" };
    format!(
        r#"*mangle
:KUBE-PROXY-CANARY - [0:0]
:KUBE-KUBELET-CANARY - [0:0]
COMMIT
*filter
:KUBE-FIREWALL - [0:0]
:KUBE-FORWARD - [0:0]
:KUBE-NODE-PORT - [0:0]
:KUBE-PROXY-FIREWALL - [0:0]
:KUBE-SOURCE-RANGES-FIREWALL - [0:0]
:KUBE-IPVS-FILTER - [0:0]
:KUBE-IPVS-OUT-FILTER - [0:0]
:FORWARD DROP [0:0]
-A INPUT -j KUBE-FIREWALL
-A INPUT -m comment --comment "kubernetes ipvs access filter" -j KUBE-IPVS-FILTER
-A INPUT -m comment --comment "kube-proxy firewall rules" -j KUBE-PROXY-FIREWALL
-A INPUT -m comment --comment "kubernetes health check rules" -j KUBE-NODE-PORT
-A FORWARD -m comment --comment "kube-proxy firewall rules" -j KUBE-PROXY-FIREWALL
-A FORWARD -m comment --comment "kubernetes forwarding rules" -j KUBE-FORWARD
-A FORWARD -s {pod_cidr} -m comment --comment "flannel forward" -j ACCEPT
-A FORWARD -d {pod_cidr} -m comment --comment "flannel forward" -j ACCEPT
-A OUTPUT -m comment --comment "kubernetes ipvs access filter" -j KUBE-IPVS-OUT-FILTER
-A KUBE-FORWARD -m comment --comment "kubernetes forwarding rules" -m mark --mark 0x4000/0x4000 -j ACCEPT
-A KUBE-FORWARD -m comment --comment "kubernetes forwarding conntrack rule" -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
-A KUBE-NODE-PORT -m comment --comment "Kubernetes health check node port" -m set --match-set {0}HEALTH-CHECK-NODE-PORT dst -j ACCEPT
-A KUBE-SOURCE-RANGES-FIREWALL -j DROP
-A KUBE-IPVS-FILTER -m set --match-set {0}LOAD-BALANCER dst,dst -j RETURN
-A KUBE-IPVS-FILTER -m set --match-set {0}CLUSTER-IP dst,dst -j RETURN
-A KUBE-IPVS-FILTER -m set --match-set {0}EXTERNAL-IP dst,dst -j RETURN
-A KUBE-IPVS-FILTER -m set --match-set {0}HEALTH-CHECK-NODE-PORT dst -j RETURN
-A KUBE-IPVS-FILTER -m conntrack --ctstate NEW -m set --match-set {0}IPVS-IPS dst -j REJECT
COMMIT
*nat
:KUBE-SERVICES - [0:0]
:KUBE-NODE-PORT - [0:0]
:KUBE-LOAD-BALANCER - [0:0]
:KUBE-POSTROUTING - [0:0]
:KUBE-MARK-MASQ - [0:0]
-A PREROUTING -m comment --comment "kubernetes service portals" -j KUBE-SERVICES
-A OUTPUT -m comment --comment "kubernetes service portals" -j KUBE-SERVICES
-A POSTROUTING -m comment --comment "kubernetes postrouting rules" -j KUBE-POSTROUTING
-A KUBE-LOAD-BALANCER -j KUBE-MARK-MASQ
-A KUBE-MARK-MASQ -j MARK --or-mark 0x4000
-A KUBE-NODE-PORT -p tcp -m comment --comment "Kubernetes nodeport TCP port for masquerade purpose" -m set --match-set {0}NODE-PORT-TCP dst -j KUBE-MARK-MASQ
-A KUBE-POSTROUTING -m comment --comment "Kubernetes endpoints dst ip:port, source ip for solving hairpin purpose" -m set --match-set {0}LOOP-BACK dst,dst,src -j MASQUERADE
-A KUBE-POSTROUTING -m mark ! --mark 0x4000/0x4000 -j RETURN
-A KUBE-POSTROUTING -j MARK --xor-mark 0x4000
-A KUBE-POSTROUTING -m comment --comment "kubernetes service traffic requiring SNAT" -j MASQUERADE --random-fully
-A KUBE-SERVICES -s {loopback} -j RETURN
-A KUBE-SERVICES -m comment --comment "Kubernetes service lb portal" -m set --match-set {0}LOAD-BALANCER dst,dst -j KUBE-LOAD-BALANCER
-A KUBE-SERVICES ! -s {pod_cidr} -m comment --comment "Kubernetes service cluster ip + port for masquerade purpose" -m set --match-set {0}CLUSTER-IP dst,dst -j KUBE-MARK-MASQ
-A KUBE-SERVICES -m addrtype --dst-type LOCAL -j KUBE-NODE-PORT
-A KUBE-SERVICES -m set --match-set {0}CLUSTER-IP dst,dst -j ACCEPT
-A KUBE-SERVICES -m set --match-set {0}LOAD-BALANCER dst,dst -j ACCEPT
COMMIT
"#,
        set_prefix(*v6)
    )
}

/// Device, sysctls, sets and virtual servers of the ipvs mode, before its rules.
fn ipvs(node: &Node, parts: &[Part]) {
    let host = node.host();
    // ipvs takes nothing but the tools' word for its modules
    for module in ["ip_vs", "ip_vs_rr"] {
        host.output("modprobe", &[module]).unwrap();
    }
    let mut batch = vec!["link add kube-ipvs0 type dummy".to_owned()];
    for part in parts {
        let Part { cluster_ip, host, .. } = part;
        batch.push(format!("addr add {cluster_ip}/{host} dev kube-ipvs0"));
        feed(node, "ipset", &["restore"], &ipsets(part));
        feed(node, "ipvsadm", &["--restore"], &virtual_servers(part));
    }
    host.netns().ip_batch(&batch).unwrap();
    let sysctls = ["conntrack", "expire_nodest_conn", "expire_quiescent_template"];
    host.netns()
        .run(|| {
            for name in sysctls {
                fs::write(format!("/proc/sys/net/ipv4/vs/{name}"), "1").unwrap();
            }
        })
        .unwrap();
    // a UDP client would be remembered for 5 minutes
    host.output("ipvsadm", &["--set", "0", "0", "1"]).unwrap();
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

/// Runs a program on the node with this text as its input.
fn feed(node: &Node, program: &str, args: &[&str], text: &str) {
    let mut command = node.host().command(program).unwrap();
    let mut child = command.args(args).stdin(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(text.as_bytes()).unwrap();
    let status = child.wait().unwrap();
    assert!(status.success(), "{program} {status} refused:\n{text}");
}

/// Writes the rules in the node's network namespace, as kube-proxy does at the end of its first sync.
pub(crate) fn write(mode: Mode, node: &Node, pods: &[Pod]) {
    let parts = parts(node, pods);
    if mode == Mode::Ipvs {
        ipvs(node, &parts);
    }
    for part in &parts {
        let variant = if mode == Mode::IptablesLegacy {
            "legacy"
        } else {
            "nft"
        };
        let base = if part.v6 { "ip6tables" } else { "iptables" };
        let restore = format!("{base}-{variant}-restore");
        let iptables = |text| feed(node, &restore, &["--noflush", "-w", "5"], text);
        match mode {
            Mode::Nftables => feed(node, "nft", &["-f", "-"], &nftables(part)),
            Mode::Ipvs => iptables(&ipvs_rules(part)),
            Mode::IptablesNft | Mode::IptablesLegacy => iptables(&iptables_rules(part)),
        }
    }
}

/// What there is of ipvs on the node: device, virtual servers with their backends, sets.
pub(crate) fn ipvs_state(node: &Node) -> Vec<String> {
    let lines = |program: &str, args: &[&str]| -> Vec<String> {
        let text = node.host().output(program, args).unwrap();
        text.lines().map(|line| line.trim().to_owned()).collect()
    };
    let mut all = lines("ipvsadm", &["--save", "--numeric"]);
    all.extend(lines("ipset", &["list", "-name"]));
    all.extend(
        lines("ip", &["-o", "link"])
            .into_iter()
            .filter(|line| line.contains("kube-ipvs0")),
    );
    all
}

/// Connections that ipvs knows, without what changes from packet to packet.
pub(crate) fn ipvs_connections(node: &Node) -> BTreeSet<String> {
    let text = node
        .host()
        .output("cat", &["/proc/thread-self/net/ip_vs_conn"])
        .unwrap();
    let connection = |line: &str| line.split_whitespace().take(7).collect::<Vec<_>>().join(" ");
    text.lines().skip(1).map(connection).collect()
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
