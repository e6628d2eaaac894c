//! The agent finds out why packets do not get to a node: `beeline node list`, metric and event. The node runs flannel, and
//! nothing of ours.

use std::time::Duration;

use anyhow::Context as _;
use beeline_tests::cluster::Node;
use beeline_tests::{Cluster, ControlPlane, Place, agent, http, wait_for};
use serde_json::Value;

use crate::flannel::Flannel;
use crate::pod_network::{NET_CONF, options, start_agent};

/// Longest time until the agent sees something: a look each second, a failed one takes a few, and has to be seen twice.
const SEEN: Duration = Duration::from_secs(40);

/// Puts rules into the network or a host, for as long as this lives.
struct Firewall<'a>(&'a Place);

impl<'a> Firewall<'a> {
    fn new(place: &'a Place, hook: &str, rule: &str) -> Self {
        let table = format!(
            "add table inet blocked; add chain inet blocked c {{ type filter hook {hook} priority 0; }}; add rule inet \
             blocked c {rule} drop"
        );
        place.output("nft", &[&table]).unwrap();
        Self(place)
    }
}

impl Drop for Firewall<'_> {
    fn drop(&mut self) {
        let _ = self.0.output("nft", &["delete table inet blocked"]);
    }
}

fn rows(node: &Node, of: &str) -> Vec<Value> {
    let list = agent::beeline_json(node, &["node", "list"]).unwrap();
    let nodes = list["nodes"].as_array().unwrap().clone();
    nodes.into_iter().filter(|row| row["name"] == of).collect()
}

/// Waits until the IPv4 way to the other node is so; gives the row.
fn wait_path(node: &Node, other: &Node, cause: Option<&str>) -> Value {
    let what = format!("the way to be {}", cause.unwrap_or("ok"));
    wait_for(&what, SEEN, || {
        let row = rows(node, other.name()).into_iter().next();
        Ok(row.filter(|row| match cause {
            Some(cause) => row["cause"] == cause,
            None => row["path"] == "ok",
        }))
    })
    .with_context(|| format!("{:?}", rows(node, other.name())))
    .unwrap()
}

fn failed_metric(node: &Node) -> Vec<String> {
    let (_, text) = http::get(node.host().netns(), agent::METRICS, "/metrics").unwrap();
    let lines = text
        .lines()
        .filter(|line| line.starts_with("beeline_overlay_path_failed{"));
    lines.map(ToOwned::to_owned).collect()
}

#[test]
fn each_cause_of_a_broken_way_is_named() {
    let cluster = Cluster::new().unwrap();
    let plane = ControlPlane::start(&cluster).unwrap();
    let nodes = [cluster.add_node().unwrap(), cluster.add_node().unwrap()];
    let [here, other] = &nodes;
    for node in &nodes {
        plane.register_node(node).unwrap();
    }
    let flannels = [Flannel::new(&plane, here, 1), Flannel::new(&plane, other, 2)];
    flannels[1].peers(&flannels);
    let options = options(&plane, here, NET_CONF).flag("--path-probe-interval", 1);
    let _agent = start_agent(&plane, here, &options);

    wait_path(here, other, None);
    let list = rows(here, other.name());
    assert_eq!(list.len(), 2, "both families: {list:?}");
    let row = &list[0];
    assert_eq!(
        (&row["podCidr"], &row["via"]),
        (&"10.244.2.0/24".into(), &"flannel.1".into())
    );
    assert!(row["rttUs"].as_u64().unwrap() > 0, "{row}");
    let own = rows(here, here.name());
    assert_eq!(own[0]["address"], here.v4().to_string());
    wait_for("the IPv6 way", SEEN, || {
        Ok((rows(here, other.name())[1]["path"] == "ok").then_some(()))
    })
    .unwrap();
    assert_eq!(failed_metric(here), Vec::<String>::new());

    let network = cluster.switch();
    {
        let _blocked = Firewall::new(network, "forward", "udp dport 8472");
        let row = wait_path(here, other, Some("port_blocked"));
        let problem = row["problem"].as_str().unwrap();
        assert!(problem.contains("UDP port 8472 is blocked"), "{problem}");
        let metric = failed_metric(here);
        let expected = r#"node="node-2",ip_family="IPv4",cause="port_blocked""#;
        assert!(metric.iter().any(|line| line.contains(expected)), "{metric:?}");
    }
    wait_path(here, other, None);
    {
        // 1350 bytes and 50 around them arrive
        let _small = Firewall::new(network, "forward", "udp dport 8472 ip length > 1400");
        let row = wait_path(here, other, Some("mtu"));
        let problem = row["problem"].as_str().unwrap();
        assert!(problem.contains("1450 bytes are lost, of 1350"), "{problem}");
    }
    wait_path(here, other, None);

    let set_mac = |mac: &str| {
        let words = ["link", "set", "flannel.1", "address", mac];
        other.host().output("ip", &words).unwrap();
        // its entries for others went with the address
        flannels[1].peers(&flannels);
    };
    set_mac("3e:00:00:00:04:99");
    let row = wait_path(here, other, Some("wrong_mac"));
    let [announced, _] = flannels[1].macs();
    assert!(row["problem"].as_str().unwrap().contains(&announced), "{row}");
    set_mac(&announced);
    wait_path(here, other, None);

    {
        // Devices that do not finish checksums are not to be had here: what such a device would spoil is lost, and what
        // leaves the agent complete is not.
        let _offload = Firewall::new(other.host(), "input", "udp dport 33434 @th,64,8 0");
        let row = wait_path(here, other, Some("checksum"));
        assert!(
            row["problem"].as_str().unwrap().contains("ethtool -K flannel.1"),
            "{row}"
        );
    }
    wait_path(here, other, None);

    cluster.unplug(other).unwrap();
    let row = wait_path(here, other, Some("dead"));
    assert!(
        row["problem"].as_str().unwrap().contains(&other.v4().to_string()),
        "{row}"
    );
    cluster.plug_in(other).unwrap();
    wait_path(here, other, None);

    other
        .host()
        .output("ip", &["link", "delete", "flannel.1"])
        .unwrap();
    wait_path(here, other, Some("port_closed"));

    let events = plane.kubectl(&["get", "events", "-A", "-o", "json"]).unwrap();
    let events: Value = serde_json::from_str(&events).unwrap();
    let events = events["items"].as_array().unwrap();
    for (reason, text) in [
        (
            "PathFailed",
            "pods of node node-2 (10.244.2.0/24): UDP port 8472 is blocked",
        ),
        (
            "PathWorks",
            "pods of node node-2 (10.244.2.0/24) can be reached again",
        ),
    ] {
        let said = |event: &&Value| {
            let note = event["message"]
                .as_str()
                .or(event["note"].as_str())
                .unwrap_or_default();
            event["reason"] == reason && note.contains(text)
        };
        assert!(events.iter().any(|event| said(&event)), "{reason}: {events:?}");
    }
    // a node that goes is no failure
    plane.kubectl(&["delete", "node", other.name()]).unwrap();
    wait_for("the node to go", SEEN, || {
        Ok((rows(here, other.name()).is_empty() && failed_metric(here).is_empty()).then_some(()))
    })
    .unwrap();
}
