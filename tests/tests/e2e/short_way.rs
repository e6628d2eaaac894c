//! The programs at pods' devices under real traffic: the short way between pods, whose addresses they use, and how much they
//! send and get.

use std::time::{Duration, Instant};

use beeline_tests::agent::beeline_json;
use beeline_tests::{Node, process, wait_for};
use serde_json::json;

use crate::pod_network::{self, CniPod, Network};

fn counter(node: &Node, name: &str) -> u64 {
    let status = beeline_json(node, &["status"]).unwrap();
    status["counters"][name].as_u64().unwrap()
}

/// Packets that the node has forwarded itself.
fn forwarded(node: &Node, key: &str) -> u64 {
    let file = if key.starts_with("Ip6") { "snmp6" } else { "snmp" };
    let text = node
        .host()
        .output("cat", &[&format!("/proc/net/{file}")])
        .unwrap();
    let number = match key.strip_prefix("Ip6") {
        Some(_) => text
            .lines()
            .find_map(|line| line.strip_prefix(key)?.trim().parse().ok()),
        // names in one line, values in the next
        None => {
            let mut lines = text.lines().filter(|line| line.starts_with("Ip:"));
            let names: Vec<&str> = lines.next().unwrap().split_whitespace().collect();
            let at = names.iter().position(|name| *name == key).unwrap();
            lines
                .next()
                .unwrap()
                .split_whitespace()
                .nth(at)
                .unwrap()
                .parse()
                .ok()
        }
    };
    number.unwrap()
}

/// What a command in a pod says, whether it succeeds or not.
fn says(pod: &CniPod<'_>, program: &str, args: &[&str]) -> String {
    let output = pod.command(program).args(args).output().unwrap();
    String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr)
}

#[test]
fn packets_between_pods_go_past_the_nodes_forwarding() {
    let Network {
        cluster: _cluster,
        plane: _plane,
        nodes,
        agents: _agents,
    } = Network::new(2, |options| options);
    let mut near = CniPod::new(&nodes[0], "near");
    near.echo();
    let mut far = CniPod::new(&nodes[1], "far");
    far.echo();
    let client = CniPod::new(&nodes[0], "client");
    let keys = ["ForwDatagrams", "Ip6OutForwDatagrams"];
    for to in [&far, &near] {
        for url in [
            format!("http://{}:8080/source", to.v4),
            format!("http://[{}]:8080/source", to.v6),
        ] {
            // neighbours and routes of the pods are found first
            assert!(client.get(&url).is_some());
            let before = keys.map(|key| nodes.iter().map(|node| forwarded(node, key)).sum::<u64>());
            let short = counter(&nodes[0], "short_way");
            for _ in 0..5 {
                let source = client.get(&url).unwrap();
                assert!(
                    source.contains(&client.v4) || source.contains(&client.v6),
                    "{source}"
                );
            }
            let after = keys.map(|key| nodes.iter().map(|node| forwarded(node, key)).sum::<u64>());
            // others of this node send a packet now and then
            assert!(
                after[0] - before[0] + after[1] - before[1] < 10,
                "{url}: {before:?} {after:?}"
            );
            assert!(counter(&nodes[0], "short_way") - short >= 25, "{url}");
        }
    }
    // what the short way is not for, the node answers; the pod has forgotten that the way to other nodes is narrower
    for words in [
        "route replace default via 169.254.1.1 dev eth0",
        "-6 route replace default via fe80::1 dev eth0",
    ] {
        let args: Vec<&str> = words.split(' ').collect();
        assert_eq!(says(&client, "ip", &args), "");
    }
    for (to, family, size, hint) in [(&far.v4, "-4", "1472", "1450"), (&far.v6, "-6", "1452", "14")] {
        let text = says(&client, "ping", &[family, "-c1", "-W2", "-Mdo", "-s", size, to]);
        assert!(text.contains("mtu") && text.contains(hint), "{text}");
        let text = says(&client, "ping", &[family, "-c1", "-W2", "-t1", to]);
        assert!(text.contains("exceeded"), "{text}");
    }
    // the route decides, whoever changes it
    assert!(client.pings(&far.v4));
    let [cidr, _] = nodes[1].pod_cidrs();
    nodes[0]
        .host()
        .output("ip", &["route", "add", "prohibit", &format!("{}/32", far.v4)])
        .unwrap();
    assert!(!client.pings(&far.v4), "{cidr}");
    nodes[0]
        .host()
        .output("ip", &["route", "del", "prohibit", &format!("{}/32", far.v4)])
        .unwrap();
    assert!(client.pings(&far.v4));

    // addresses of others are not for this pod
    for (family, other, to) in [
        ("-4", "10.244.1.250", &near.v4),
        ("-6", "fd00:10:244:1::250", &near.v6),
    ] {
        process::output({
            let mut command = client.command("ip");
            command.args(["address", "add", other, "dev", "eth0"]);
            command
        })
        .unwrap();
        let before = counter(&nodes[0], "source_foreign");
        let mut command = client.command("ping");
        command.args([family, "-c1", "-W1", "-I", other, to]);
        assert!(process::output(command).is_err(), "{other}");
        assert!(counter(&nodes[0], "source_foreign") > before, "{other}");
    }
}

#[test]
fn what_a_pod_elsewhere_asks_of_a_node_port_is_answered_from_there() {
    let network = Network::new(2, |options| {
        options.flag("--non-masquerade-cidrs", "172.31.0.0/24")
    });
    let [near, far] = [&network.nodes[0], &network.nodes[1]];
    let mut web = CniPod::new(near, "web");
    web.echo();
    let client = CniPod::new(far, "client");
    let objects = pod_network::service(&web.v4, near);
    network.plane.kubectl_stdin(&["apply"], &objects).unwrap();
    // so that the client's own address comes through
    let spec = json!({"spec": {"type": "NodePort", "externalTrafficPolicy": "Local",
        "ports": [{"port": 80, "targetPort": 8080, "nodePort": 30080}]}});
    network
        .plane
        .kubectl(&["patch", "service", "web", "-p", &spec.to_string()])
        .unwrap();
    let url = format!("http://{}:30080/source", near.v4());
    let source = wait_for("the node port", Duration::from_secs(10), || Ok(client.get(&url))).unwrap();
    assert!(source.contains(&client.v4), "{source}");
    // its answers take the short way like other packets of the pod
    let (short, reverse) = (counter(near, "short_way"), counter(near, "packet_reverse"));
    assert!(client.get(&url).is_some());
    assert!(counter(near, "short_way") > short);
    assert!(counter(near, "packet_reverse") > reverse);
}

#[test]
fn where_it_is_switched_off_the_node_forwards() {
    let network = Network::new(1, |mut options| {
        options.flags.push("--pod-shortcut=false".into());
        options
    });
    let node = &network.nodes[0];
    let mut server = CniPod::new(node, "server");
    server.echo();
    let client = CniPod::new(node, "client");
    let before = forwarded(node, "ForwDatagrams");
    assert!(client.get(&format!("http://{}:8080/", server.v4)).is_some());
    assert!(forwarded(node, "ForwDatagrams") - before >= 5);
    assert_eq!(counter(node, "short_way"), 0);
}

/// Bytes that the pod's device has received.
fn received(pod: &CniPod<'_>) -> u64 {
    let text = says(pod, "cat", &["/sys/class/net/eth0/statistics/rx_bytes"]);
    text.trim().parse().unwrap()
}

#[test]
fn bandwidth_holds_both_ways() {
    /// Bytes per second, and bytes.
    const RATE: u64 = 500_000;
    const BURST: u64 = 200_000;
    let network = Network::new(2, |options| options);
    let nodes = &network.nodes;
    let limit = |way: &str| {
        json!({"bandwidth": {
            (format!("{way}Rate")): RATE * 8, (format!("{way}Burst")): BURST * 8,
        }})
    };
    let mut free = CniPod::new(&nodes[0], "free");
    free.echo();
    let mut far = CniPod::new(&nodes[1], "far");
    far.echo();
    // each with a bucket that is full
    let [near_gets, far_gets] = ["near-gets", "far-gets"].map(|name| {
        let mut pod = CniPod::with(&nodes[0], name, &limit("ingress"));
        pod.echo();
        pod
    });
    let sends = CniPod::with(&nodes[0], "sends", &limit("egress"));
    // by the short way from this node and from another one; and what a pod may send
    for (from, to) in [(&free, &near_gets), (&far, &far_gets), (&sends, &free)] {
        let (begun, before) = (Instant::now(), received(to));
        let over = counter(&nodes[0], "over_limit");
        let flood = format!(
            "exec dd if=/dev/zero bs=1400 count=4000 status=none >/dev/udp/{}/8080",
            to.v4
        );
        let text = says(from, "bash", &["-c", &flood]);
        assert_eq!(text, "");
        let got = received(to) - before;
        // what the bucket held, what flowed in meanwhile, and a packet that overdrew it
        let most = BURST + u64::try_from(begun.elapsed().as_millis()).unwrap() * RATE / 1000 + 65_536;
        assert!((BURST / 2..=most).contains(&got), "{got} of at most {most}");
        assert!(counter(&nodes[0], "over_limit") > over);
    }
    let shown = nodes[0].host().output("tc", &["qdisc", "show"]).unwrap();
    assert!(!shown.contains("tbf") && !shown.contains("ingress"), "{shown}");
}
