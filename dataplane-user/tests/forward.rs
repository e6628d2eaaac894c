//! A host whose FORWARD chain drops by its policy. Needs root, iptables-nft and nft.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on must fail")]

#[path = "common/lan.rs"]
mod lan;

use dataplane_user::takeover::forward;
use ipnet::IpNet;
use lan::{Lan, Netns};

fn nft(host: &Netns, words: &str) -> String {
    let output = host.exec(words);
    assert!(
        output.status.success(),
        "{words}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn pods_are_let_through_chains_that_drop_and_other_firewalls_are_told() {
    let lan = Lan::new();
    let host = lan.host(1);
    let pods = [
        ("10.244.1.2", Netns::new("pa"), "pod1"),
        ("10.244.1.3", Netns::new("pb"), "pod2"),
    ];
    for (ip, pod, name) in &pods {
        host.ip(&format!(
            "link add {name} type veth peer name eth0 netns {}",
            pod.name
        ));
        host.ip(&format!("link set {name} up"));
        host.ip(&format!("address add 169.254.7.1/32 dev {name}"));
        host.ip(&format!("route add {ip}/32 dev {name}"));
        pod.ip("link set eth0 up");
        pod.ip(&format!("address add {ip}/32 dev eth0"));
        pod.ip("route add 169.254.7.1/32 dev eth0");
        pod.ip("route add default via 169.254.7.1");
    }
    host.enter(|| std::fs::write("/proc/sys/net/ipv4/ip_forward", "1").unwrap());
    let networks: Vec<IpNet> = ["10.244.0.0/16", "fd00:244::/48"]
        .map(|net| net.parse().unwrap())
        .into();
    let ensure = || host.enter(|| forward::ensure(&networks).unwrap());
    // nothing to do where nothing drops
    assert_eq!(ensure(), forward::Report::default());
    assert!(pods[0].1.pings(pods[1].0));

    for words in ["iptables-nft -P FORWARD DROP", "ip6tables-nft -P FORWARD DROP"] {
        nft(&host, words);
    }
    assert!(!pods[0].1.pings(pods[1].0), "the policy is in force");
    let report = ensure();
    assert_eq!(report.opened.len(), 2, "{report:?}");
    assert!(pods[0].1.pings(pods[1].0));
    // and no second time
    assert_eq!(ensure(), forward::Report::default());
    // iptables can show what we wrote
    let shown = nft(&host, "iptables-nft -S FORWARD");
    for end in ["-s", "-d"] {
        let line = format!("-A FORWARD {end} 10.244.0.0/16 -m comment --comment \"beeline pods\" -j ACCEPT");
        assert!(shown.contains(&line), "{shown}");
    }
    // somebody flushes the chain
    nft(&host, "iptables-nft -F FORWARD");
    assert_eq!(ensure().opened, ["ip filter FORWARD"]);
    assert!(pods[0].1.pings(pods[1].0));
    // one of them goes
    nft(&host, "iptables-nft -D FORWARD 1");
    assert_eq!(ensure().opened, ["ip filter FORWARD"]);
    assert_eq!(
        nft(&host, "iptables-nft -S FORWARD")
            .matches("-A FORWARD")
            .count(),
        2
    );

    // a firewall of the administrator's own is his
    nft(&host, "nft add table inet mine");
    nft(
        &host,
        "nft add chain inet mine fence { type filter hook forward priority 0 ; policy drop ; }",
    );
    assert_eq!(ensure().others, ["inet mine fence"]);
    nft(&host, "nft delete table inet mine");
    let removed = host.enter(|| forward::cleanup().unwrap());
    assert_eq!(removed.len(), 2, "{removed:?}");
    assert!(!nft(&host, "iptables-nft -S FORWARD").contains("ACCEPT"));
}
