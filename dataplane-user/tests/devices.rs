//! Devices that come, go and change while the agent follows them.
#![allow(clippy::unwrap_used, reason = "a test that cannot be set up fails")]

mod common;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::net::IpAddr;
use std::time::{Duration, Instant};

use common::Place;
use common::net::Netns;
use dataplane_common::abi::{BePort, Device, device_flag};
use dataplane_user::agent::node::Ranges;
use dataplane_user::devices::{DetectLocal, Devices, Settings, Wanted, release_ports};
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
            local: DetectLocal::Ranges(Vec::new()),
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
        header,
        ..Device::default()
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
    let no_ranges = watch::Sender::new(Ranges::default());
    let following = tokio::spawn(devices.follow(addresses, no_ranges.subscribe(), drop));

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
    let beside_tunnel = |row| Device {
        tunnel: BePort::from_host(4789),
        ..row
    };
    let wan_row = (wan, beside_tunnel(uplink));
    served(
        &kernel,
        "a tunnel without an address",
        &[wan_row, (vx, beside_tunnel(uplink))].into(),
    )
    .await;
    node.ip("addr add 10.244.1.0/32 dev vx");
    let own = device("10.244.1.0", "2001:db8::1", 14);
    served(
        &kernel,
        "an address of a tunnel",
        &[wan_row, (vx, beside_tunnel(own))].into(),
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
    let following = tokio::spawn(devices.follow(sender.subscribe(), no_ranges.subscribe(), drop));
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

/// Names of the programs below the links of a device.
fn programs(kernel: &Kernel, device: u32) -> BTreeSet<String> {
    let links = kernel.info().pin_dir.join("links");
    let mut names = BTreeSet::new();
    for link in ["nic_ingress", "nic_egress"].map(|name| links.join(format!("{name}_{device}"))) {
        let output = std::process::Command::new("bpftool")
            .args(["-j", "link", "show", "pinned"])
            .arg(&link)
            .output()
            .unwrap();
        let link: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        let known = kernel.info().packet_programs.iter();
        let program = known.clone().find(|program| link["prog_id"] == program.id);
        names.insert(program.map_or_else(|| link.to_string(), |program| program.name.clone()));
    }
    names
}

#[tokio::test]
async fn pods_devices_have_programs_of_their_own() {
    let scene = Scene::new();
    let (node, place) = (&scene.node, &scene.place);
    let uplink = ["nic_egress", "nic_ingress"].map(String::from).into();
    let pods: BTreeSet<String> = ["pod_egress", "pod_ingress"].map(String::from).into();
    let kernel = Kernel::open(&place.config).unwrap();
    let devices = Devices::new(scene.settings(&[]), kernel.nic(), kernel.device_table().unwrap());
    let handle = devices.handle();
    let addresses = watch::Sender::new(Some(vec!["192.0.2.1".parse().unwrap()]));
    let ranges = watch::Sender::new(Ranges {
        services: None,
        pods: Some(vec!["10.244.0.0/24".parse().unwrap()]),
    });
    node.ip("addr add 192.0.2.1/24 dev wan");
    let following = tokio::spawn(devices.follow(addresses.subscribe(), ranges.subscribe(), drop));
    let wan = (scene.index("wan"), device("192.0.2.1", "", 14));
    served(&kernel, "the uplink", &[wan].into()).await;
    assert_eq!(programs(&kernel, wan.0), uplink);

    // who makes a device need not wait for it to be noticed
    let pod = Netns::new("p");
    node.join("cali1", &pod, "eth0", &[]);
    node.ip("route add 10.244.0.7/32 dev cali1");
    let asked = tokio::task::spawn_blocking(move || handle.serve(Duration::from_secs(10)));
    assert!(asked.await.unwrap());
    let cali = (
        scene.index("cali1"),
        Device {
            flags: device_flag::POD | device_flag::BY_SOURCE,
            ..wan.1
        },
    );
    served(&kernel, "a pod's device", &[wan, cali].into()).await;
    assert_eq!(programs(&kernel, cali.0), pods);

    // a port of a bridge that has an address of the node's range
    node.ip("link add cni0 type bridge");
    node.ip("addr add 10.244.0.1/24 dev cni0");
    let other = Netns::new("q");
    node.join("veth1", &other, "eth0", &[]);
    node.ip("link set veth1 master cni0");
    let port = (scene.index("veth1"), cali.1);
    served(&kernel, "a port of a bridge", &[wan, cali, port].into()).await;
    node.ip("link set veth1 nomaster");
    served(&kernel, "no port any more", &[wan, cali].into()).await;

    // a restart finds each device's programs again; other settings change them in place
    following.abort();
    let _aborted = following.await;
    drop(kernel);
    let kernel = Kernel::open(&place.config).unwrap();
    assert_eq!(
        (programs(&kernel, wan.0), programs(&kernel, cali.0)),
        (uplink.clone(), pods.clone())
    );
    let settings = Settings {
        local: DetectLocal::Prefix("veth".into()),
        ..scene.settings(&["wan", "cali1"])
    };
    let devices = Devices::new(settings, kernel.nic(), kernel.device_table().unwrap());
    let following = tokio::spawn(devices.follow(addresses.subscribe(), ranges.subscribe(), drop));
    let by_name = Device {
        flags: device_flag::POD,
        ..wan.1
    };
    let cali = (cali.0, wan.1);
    served(&kernel, "by name", &[wan, cali, (port.0, by_name)].into()).await;
    assert_eq!(
        (programs(&kernel, cali.0), programs(&kernel, port.0)),
        (uplink, pods)
    );

    node.ip("link del veth1");
    served(&kernel, "the pod is gone", &[wan, cali].into()).await;
    following.abort();
    let _aborted = following.await;
    let removed = cleanup(&place.config.bpffs_root).unwrap();
    let link = format!("nic_ingress_{}", cali.0);
    assert!(removed.iter().any(|path| path.ends_with(&link)), "{removed:?}");
}
