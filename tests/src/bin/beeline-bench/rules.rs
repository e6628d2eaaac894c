//! The rules of kube-proxy's nftables and iptables modes, in their shape, for many services with one endpoint each.

use std::fmt::Write as _;
use std::io::Write as _;
use std::net::SocketAddr;
use std::process::Stdio;

use anyhow::{Context, Result, ensure};
use beeline_tests::Node;

use crate::population::{PORT, cluster_ip};

#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mode {
    Nftables,
    Iptables,
}

impl Mode {
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Nftables => "nftables",
            Self::Iptables => "iptables",
        }
    }
}

/// Writes rules for `services` services; the first has the node port and this endpoint, as do all others.
pub(crate) fn write(
    mode: Mode,
    node: &Node,
    services: u32,
    node_port: u16,
    endpoint: SocketAddr,
) -> Result<()> {
    let (program, args, text): (_, &[&str], _) = match mode {
        Mode::Nftables => ("nft", &["-f", "-"], nftables(services, node_port, endpoint)?),
        Mode::Iptables => (
            "iptables-nft-restore",
            &["--noflush"],
            iptables(services, node_port, endpoint)?,
        ),
    };
    let mut command = node.host().command(program)?;
    let mut child = command
        .args(args)
        .stdin(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot start {program}"))?;
    let mut input = child.stdin.take().context("no way to the program's input")?;
    input.write_all(text.as_bytes())?;
    drop(input);
    let status = child.wait()?;
    ensure!(status.success(), "{program} did not take the rules ({status})");
    Ok(())
}

fn nftables(services: u32, node_port: u16, endpoint: SocketAddr) -> Result<String> {
    let (mut chains, mut elements) = (String::new(), String::new());
    for number in 0..services {
        let ip = cluster_ip(number);
        writeln!(
            chains,
            "chain endpoint-{number} {{\nip saddr {} jump mark-for-masquerade\nmeta l4proto tcp dnat to {endpoint}\n}}\n\
             chain service-{number} {{\nip daddr {ip} tcp dport {PORT} ip saddr != 10.244.0.0/16 jump mark-for-masquerade\n\
             numgen random mod 1 vmap {{ 0 : goto endpoint-{number} }}\n}}",
            endpoint.ip()
        )?;
        write!(elements, "{ip} . tcp . {PORT} : goto service-{number}, ")?;
    }
    Ok(format!(
        "table ip kube-proxy {{
chain mark-for-masquerade {{
mark set mark or 0x4000
}}
chain masquerading {{
mark and 0x4000 == 0 return
mark set mark xor 0x4000
masquerade fully-random
}}
{chains}chain external-0 {{
jump mark-for-masquerade
goto service-0
}}
map service-ips {{
type ipv4_addr . inet_proto . inet_service : verdict
elements = {{ {elements} }}
}}
map service-nodeports {{
type inet_proto . inet_service : verdict
elements = {{ tcp . {node_port} : goto external-0 }}
}}
chain services {{
ip daddr . meta l4proto . th dport vmap @service-ips
fib daddr type local meta l4proto . th dport vmap @service-nodeports
}}
chain nat-prerouting {{
type nat hook prerouting priority dstnat;
jump services
}}
chain nat-postrouting {{
type nat hook postrouting priority srcnat;
jump masquerading
}}
}}
"
    ))
}

fn iptables(services: u32, node_port: u16, endpoint: SocketAddr) -> Result<String> {
    let (mut chains, mut rules) = (String::new(), String::new());
    for number in 0..services {
        let (ip, pod) = (cluster_ip(number), endpoint.ip());
        writeln!(chains, ":KUBE-SVC-{number} - [0:0]\n:KUBE-SEP-{number} - [0:0]")?;
        writeln!(
            rules,
            "-A KUBE-SERVICES -d {ip}/32 -p tcp -m tcp --dport {PORT} -j KUBE-SVC-{number}\n\
             -A KUBE-SVC-{number} ! -s 10.244.0.0/16 -d {ip}/32 -p tcp -m tcp --dport {PORT} -j KUBE-MARK-MASQ\n\
             -A KUBE-SVC-{number} -j KUBE-SEP-{number}\n\
             -A KUBE-SEP-{number} -s {pod}/32 -j KUBE-MARK-MASQ\n\
             -A KUBE-SEP-{number} -p tcp -m tcp -j DNAT --to-destination {endpoint}"
        )?;
    }
    Ok(format!(
        "*nat
:KUBE-SERVICES - [0:0]
:KUBE-NODEPORTS - [0:0]
:KUBE-POSTROUTING - [0:0]
:KUBE-MARK-MASQ - [0:0]
:KUBE-EXT-0 - [0:0]
{chains}-A PREROUTING -j KUBE-SERVICES
-A OUTPUT -j KUBE-SERVICES
-A POSTROUTING -j KUBE-POSTROUTING
-A KUBE-MARK-MASQ -j MARK --or-mark 0x4000
-A KUBE-POSTROUTING -m mark ! --mark 0x4000/0x4000 -j RETURN
-A KUBE-POSTROUTING -j MARK --xor-mark 0x4000
-A KUBE-POSTROUTING -j MASQUERADE --random-fully
-A KUBE-NODEPORTS -p tcp -m tcp --dport {node_port} -j KUBE-EXT-0
-A KUBE-EXT-0 -j KUBE-MARK-MASQ
-A KUBE-EXT-0 -j KUBE-SVC-0
{rules}-A KUBE-SERVICES -m addrtype --dst-type LOCAL -j KUBE-NODEPORTS
COMMIT
"
    ))
}
