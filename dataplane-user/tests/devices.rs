//! Devices that come, go and change while the agent follows them.
#![allow(clippy::unwrap_used, reason = "a test that cannot be set up fails")]

mod common;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::net::IpAddr;
use std::time::{Duration, Instant};

use common::Place;
use common::net::Netns;
use dataplane_common::abi::Device;
use dataplane_user::devices::{Devices, Settings, Wanted, release_ports};
use dataplane_user::kernel::{Kernel, cleanup};
use tokio::sync::watch;

struct Scene {
    node: Netns,
    outside: Netns,
    place: Place,
    state: tempfile::TempDir,
}

impl Scene {
    /// An uplink `wan` without an address; this thread is in the node's namespace.
    fn new() -> Self {
        let (node, outside) = (Netns::new("n"), Netns::new("o"));
        node.enter();
        node.join("wan", &outside, "eth0", &[]);
        Self {
            node,
            outside,
            place: Place::new(),
            state: tempfile::tempdir().unwrap(),
        }
    }

    fn settings(&self, names: &[&str]) -> Settings {
        let names: Vec<String> = names.iter().map(|name| (*name).into()).collect();
        Settings {
            wanted: Wanted::parse(&names),
            state_dir: self.state.path().into(),
        }
    }

    fn index(&self, name: &str) -> u32 {
        self.node.index(name)
    }

    fn reserved() -> String {
        // of the calling thread's namespace
        let output = std::process::Command::new("sysctl")
            .args(["-n", "net.ipv4.ip_local_reserved_ports"])
            .output()
            .unwrap();
        String::from_utf8(output.stdout).unwrap().trim().into()
    }
}

/// Waits until the devices that are served, with their links, are these.
async fn served(kernel: &Kernel, what: &str, expected: &BTreeMap<u32, Device>) {
    let begun = Instant::now();
    loop {
        let rows = kernel.device_table().unwrap().rows().unwrap();
        let links: BTreeSet<String> = fs::read_dir(kernel.info().pin_dir.join("links"))
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .filter(|name| name.starts_with("nic_"))
            .collect();
        let wanted: BTreeSet<String> = expected
            .keys()
            .flat_map(|index| [format!("nic_egress_{index}"), format!("nic_ingress_{index}")])
            .collect();
        if &rows == expected && links == wanted {
            return;
        }
        assert!(
            begun.elapsed() < Duration::from_secs(20),
            "{what}: {rows:?} {links:?}, expected {expected:?}"
        );
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

fn device(v4: &str, v6: &str, header: u32) -> Device {
    let addr = |text: &str| {
        let ip: Option<IpAddr> = text.parse().ok();
        ip.map(Into::into).unwrap_or_default()
    };
    Device {
        v4: addr(v4),
        v6: addr(v6),
        flags: 0,
        header,
    }
}

#[tokio::test]
async fn devices_are_followed() {
    let scene = Scene::new();
    let (node, place) = (&scene.node, &scene.place);
    node.sysctl("net.ipv4.ip_local_reserved_ports=8080,15005");
    let kernel = Kernel::open(&place.config).unwrap();
    let devices = Devices::new(scene.settings(&[]), kernel.nic(), kernel.device_table().unwrap());
    let (sender, addresses) = watch::channel(None);
    let following = tokio::spawn(devices.follow(addresses, drop));

    let wan = scene.index("wan");
    served(&kernel, "nothing leads anywhere", &[].into()).await;
    node.ip("addr add 192.0.2.1/24 dev wan");
    node.ip("addr add 2001:db8::1/64 dev wan nodad");
    let uplink = device("192.0.2.1", "2001:db8::1", 14);
    served(&kernel, "an address", &[(wan, uplink)].into()).await;
    assert_eq!(Scene::reserved(), "8080,15000-29999");

    node.ip("link add vx type vxlan id 7 dstport 4789 dev wan");
    node.ip("tuntap add l3 mode tun");
    node.ip("link set l3 up");
    served(&kernel, "a tunnel that is down", &[(wan, uplink)].into()).await;
    node.ip("link set vx up");
    let vx = scene.index("vx");
    served(
        &kernel,
        "a tunnel without an address",
        &[(wan, uplink), (vx, uplink)].into(),
    )
    .await;
    node.ip("addr add 10.244.1.0/32 dev vx");
    let own = device("10.244.1.0", "2001:db8::1", 14);
    served(
        &kernel,
        "an address of a tunnel",
        &[(wan, uplink), (vx, own)].into(),
    )
    .await;
    node.ip("link del vx");
    served(&kernel, "no tunnel", &[(wan, uplink)].into()).await;

    // a second device matters when it has the Node's address
    node.join(
        "other",
        &scene.outside,
        "eth1",
        &[("198.51.100.1/24", "198.51.100.2/24")],
    );
    let other = scene.index("other");
    sender.send(Some(vec!["198.51.100.1".parse().unwrap()])).unwrap();
    let second = device("198.51.100.1", "2001:db8::1", 14);
    served(&kernel, "the Node's address", &[(other, second)].into()).await;
    node.ip("route add default via 192.0.2.9");
    served(
        &kernel,
        "a default route",
        &[(wan, uplink), (other, second)].into(),
    )
    .await;

    // the next agent takes over what is there, and follows other names
    following.abort();
    let _aborted = following.await;
    drop(kernel);
    let kernel = Kernel::open(&place.config).unwrap();
    served(
        &kernel,
        "between two agents",
        &[(wan, uplink), (other, second)].into(),
    )
    .await;
    let devices = Devices::new(
        scene.settings(&["oth*"]),
        kernel.nic(),
        kernel.device_table().unwrap(),
    );
    let following = tokio::spawn(devices.follow(sender.subscribe(), drop));
    served(&kernel, "named ones", &[(other, second)].into()).await;
    following.abort();
    let _aborted = following.await;
    drop(kernel);

    assert!(release_ports(scene.state.path()).unwrap());
    assert_eq!(Scene::reserved(), "8080,15005");
    assert!(!release_ports(scene.state.path()).unwrap());
    let removed = cleanup(&place.config.bpffs_root).unwrap();
    assert!(
        removed
            .iter()
            .any(|path| path.ends_with(&format!("nic_ingress_{other}"))),
        "{removed:?}"
    );
}
