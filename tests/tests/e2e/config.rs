//! The agent with a configuration file of kube-proxy's.

use std::net::SocketAddr;

use beeline_tests::client::{Mode, Question};
use beeline_tests::{Source, agent, http};
use serde_json::{Value, json};

use crate::pair::{
    BOTH, NODE_PORT, Pair, REFUSED, UNREACHABLE, ask, assert_fails, assert_replies, impatient,
};

/// Every field that Linux has, and most of them other than by default.
const FILE: &str = r#"apiVersion: kubeproxy.config.k8s.io/v1alpha1
kind: KubeProxyConfiguration
featureGates: {AllowServiceExternalIPs: false}
clientConnection:
  kubeconfig: ""
  acceptContentTypes: ""
  contentType: application/json
  qps: 50
  burst: 100
logging: {format: text, flushFrequency: 5s, verbosity: 4}
hostnameOverride: ""
bindAddress: "0.0.0.0"
healthzBindAddress: 127.0.0.1:11256
metricsBindAddress: 127.0.0.1:10249
bindAddressHardFail: true
enableProfiling: true
showHiddenMetricsForVersion: ""
mode: nftables
iptables: {masqueradeBit: 15, masqueradeAll: true, localhostNodePorts: false, syncPeriod: 20s, minSyncPeriod: 2s}
ipvs:
  syncPeriod: 30s
  minSyncPeriod: 0s
  scheduler: rr
  excludeCIDRs: [10.1.0.0/16]
  strictARP: true
  tcpTimeout: 1s
  tcpFinTimeout: 1s
  udpTimeout: 1s
nftables: {masqueradeBit: 15, masqueradeAll: true, syncPeriod: 20s, minSyncPeriod: 2s}
detectLocalMode: ClusterCIDR
detectLocal: {bridgeInterface: "", interfaceNamePrefix: ""}
clusterCIDR: 10.244.0.0/16,fd00:10:244::/48
nodePortAddresses: [172.31.0.0/24, "fd00:ffff::/32"]
oomScoreAdj: -998
conntrack:
  maxPerCore: 0
  min: 0
  tcpEstablishedTimeout: 12h0m0s
  tcpCloseWaitTimeout: 30m0s
  tcpBeLiberal: false
  udpTimeout: 40s
  udpStreamTimeout: 100s
configSyncPeriod: 15m0s
portRange: ""
"#;

#[test]
fn a_configuration_file_of_kube_proxy_is_enough() {
    let external: SocketAddr = "203.0.113.250:80".parse().unwrap();
    let pair = Pair::with(json!({"spec": {"externalIPs": [external.ip()]}}), |options| {
        let Source::Dir(objects) = &options.source else {
            unreachable!()
        };
        let file = objects.with_file_name("kube-proxy.conf");
        std::fs::write(&file, FILE).unwrap();
        options.flag("--config", file.display())
    });
    let node = pair.nodes[0].host();
    let outside = pair.outside.place();
    // what is in force is what the file says
    let (_, text) = http::get(node.netns(), agent::METRICS, "/configz").unwrap();
    let shown: Value = serde_json::from_str(&text).unwrap();
    let shown = &shown["kubeproxy.config.k8s.io"];
    for (pointer, wanted) in [
        // whatever is asked for, there is one
        ("/mode", json!("ebpf")),
        ("/nftables/syncPeriod", json!("20s")),
        ("/ipvs/strictARP", json!(true)),
        ("/conntrack/udpTimeout", json!("40s")),
        ("/oomScoreAdj", json!(-998)),
        ("/nodePortAddresses", json!(["172.31.0.0/24", "fd00:ffff::/32"])),
    ] {
        assert_eq!(shown.pointer(pointer), Some(&wanted), "{pointer} in {shown}");
    }
    // servers are where they should be
    let health: SocketAddr = "127.0.0.1:11256".parse().unwrap();
    assert_eq!(http::get(node.netns(), health, "/healthz").unwrap().0, 200);
    assert!(http::get(node.netns(), agent::HEALTH, "/healthz").is_err());
    // node ports at what was chosen, and not at localhost
    let [v4, v6] = pair.node_ports(0, NODE_PORT);
    assert_replies("chosen", &ask(outside, v4, Mode::Http, 48), &BOTH);
    assert_fails("not chosen", &ask(outside, v6, Mode::Http, 2), &REFUSED);
    let localhost = SocketAddr::new([127, 0, 0, 1].into(), NODE_PORT);
    assert_fails("localhost", &ask(node, localhost, Mode::Http, 2), &REFUSED);
    // the feature gate
    let question: Question = impatient(Mode::Http);
    let report = ask(pair.clients[0].place(), external, question, 1);
    assert_fails("external address", &report, &UNREACHABLE);
    // the kernel's own connection tracking
    let timeout = node
        .netns()
        .run(|| std::fs::read_to_string("/proc/sys/net/netfilter/nf_conntrack_udp_timeout"))
        .unwrap();
    assert_eq!(timeout.unwrap().trim(), "40");
    // what has no effect is named
    let log = pair.agents[0].process.log();
    for field in ["ipvs.strictARP", "ipvs.excludeCIDRs", "clientConnection.qps"] {
        assert!(
            log.lines()
                .any(|line| line.contains("WARN") && line.contains(field)),
            "no warning about {field} in {log}"
        );
    }
}
