//! The formats that flannel writes and reads, to the letter.

use super::super::netconf::Vxlan;
use super::*;

fn vxlan() -> Backend {
    Backend::Vxlan(Vxlan::default())
}

fn node(annotations: &[(&str, &str)], cidrs: &[&str]) -> Node {
    let annotations: BTreeMap<String, String> = annotations
        .iter()
        .map(|(key, value)| (format!("{DEFAULT_PREFIX}/{key}"), (*value).to_owned()))
        .collect();
    serde_json::from_value(json!({
        "metadata": {"name": "n", "annotations": annotations},
        "spec": {"podCIDR": cidrs.first(), "podCIDRs": cidrs},
    }))
    .unwrap()
}

const DUAL: [(&str, &str); 6] = [
    ("kube-subnet-manager", "true"),
    ("backend-type", "vxlan"),
    ("backend-data", r#"{"VNI":1,"VtepMAC":"aa:bb:cc:dd:ee:ff"}"#),
    ("public-ip", "192.168.0.2"),
    ("backend-v6-data", r#"{"VNI":1,"VtepMAC":"a2:bb:cc:dd:ee:00"}"#),
    ("public-ipv6", "fd01::2"),
];

#[test]
fn what_we_announce_is_what_flannel_writes_and_is_read_back() {
    let announcement = Announcement {
        v4: Some((
            "192.168.0.2".parse().unwrap(),
            Some("aa:bb:cc:dd:ee:ff".parse().unwrap()),
        )),
        v6: Some((
            "fd01::2".parse().unwrap(),
            Some("a2:bb:cc:dd:ee:00".parse().unwrap()),
        )),
        backend: vxlan(),
    };
    let expected: BTreeMap<String, String> = DUAL
        .iter()
        .map(|(key, value)| (format!("{DEFAULT_PREFIX}/{key}"), (*value).to_owned()))
        .collect();
    assert_eq!(annotations(&announcement, &Prefix::default()), expected);

    let node = node(&DUAL, &["10.244.3.0/24", "fd00:3::/64"]);
    assert!(is_announced(&node, &expected));
    let (peer, problems) = peer(&node, &Prefix::default(), &vxlan());
    assert_eq!(problems, [] as [&str; 0]);
    let peer = peer.unwrap();
    let v4 = peer.v4.unwrap();
    assert_eq!(v4.subnet.to_string(), "10.244.3.0/24");
    assert_eq!(v4.public.to_string(), "192.168.0.2");
    assert_eq!(v4.vtep.unwrap().to_string(), "aa:bb:cc:dd:ee:ff");
    assert_eq!(peer.v6.unwrap().vtep.unwrap().to_string(), "a2:bb:cc:dd:ee:00");
    let (own, _) = local(&node, &Prefix::default());
    assert_eq!(own.vtep_v4, v4.vtep);
}

#[test]
fn host_gw_has_null_for_data() {
    let announcement = Announcement {
        v4: Some(("192.168.0.2".parse().unwrap(), None)),
        v6: None,
        backend: Backend::HostGw,
    };
    let all = annotations(&announcement, &Prefix::default());
    assert_eq!(all[&format!("{DEFAULT_PREFIX}/backend-data")], "null");
    assert!(!all.contains_key(&format!("{DEFAULT_PREFIX}/public-ipv6")));
}

#[test]
fn nodes_without_flannel_or_with_another_backend_are_no_peers() {
    let cidrs = ["10.244.3.0/24"];
    for wrong in [("kube-subnet-manager", "True"), ("backend-type", "host-gw")] {
        let mut annotations = DUAL;
        for entry in &mut annotations {
            if entry.0 == wrong.0 {
                *entry = wrong;
            }
        }
        assert_eq!(
            peer(&node(&annotations, &cidrs), &Prefix::default(), &vxlan()),
            (None, vec![])
        );
    }
    assert_eq!(
        peer(&node(&[], &cidrs), &Prefix::default(), &vxlan()),
        (None, vec![])
    );
}

#[test]
fn what_is_wrong_in_one_family_does_not_take_the_other() {
    for (key, wrong, expected) in [
        ("backend-v6-data", "null", "annotation backend-v6-data: "),
        ("backend-v6-data", r#"{"VNI":1,"VtepMAC":"zz"}"#, "no MAC address"),
        (
            "backend-v6-data",
            r#"{"VNI":1,"VtepMAC":"ff:ff:ff:ff:ff:ff"}"#,
            "no unicast address",
        ),
        (
            "public-ipv6",
            "192.168.0.2",
            "annotation public-ipv6: \"192.168.0.2\" cannot be used",
        ),
    ] {
        let mut annotations = DUAL;
        for entry in &mut annotations {
            if entry.0 == key {
                entry.1 = wrong;
            }
        }
        let (peer, problems) = peer(
            &node(&annotations, &["10.244.3.0/24", "fd00:3::/64"]),
            &Prefix::default(),
            &vxlan(),
        );
        let peer = peer.unwrap();
        assert!(peer.v4.is_some() && peer.v6.is_none());
        assert!(
            problems.len() == 1 && problems[0].contains(expected),
            "{problems:?}"
        );
    }
}

#[test]
fn prefixes_are_completed_as_flannel_does() {
    for (text, expected) in [
        ("flannel.alpha.coreos.com", "flannel.alpha.coreos.com/"),
        ("flannel.alpha.coreos.com/", "flannel.alpha.coreos.com/"),
        ("example.com/a", "example.com/a-"),
        ("example.com/a-", "example.com/a-"),
    ] {
        assert_eq!(Prefix::new(text).unwrap().0, expected);
    }
    for wrong in ["", "/x", "a/b/c", "Example.com", "a.b/X"] {
        assert!(Prefix::new(wrong).is_err(), "{wrong}");
    }
}

#[test]
fn the_patch_sets_annotations_and_condition_at_once() {
    let all = BTreeMap::from([("a/b".to_owned(), "c".to_owned())]);
    let patch = status_patch(&all, Some(Ok(())), "2026-01-01T00:00:00Z");
    assert_eq!(patch["metadata"]["annotations"]["a/b"], "c");
    assert_eq!(patch["status"]["conditions"][0]["type"], "NetworkUnavailable");
    assert_eq!(patch["status"]["conditions"][0]["status"], "False");
    assert!(status_patch(&all, None, "").get("status").is_none());
    let failed = status_patch(&all, Some(Err("no uplink")), "2026-01-01T00:00:00Z");
    assert_eq!(failed["status"]["conditions"][0]["message"], "no uplink");
}

#[test]
fn subnet_env_is_as_flannels() {
    let v4 = ("10.244.0.0/16".parse().unwrap(), "10.244.1.0/24".parse().unwrap());
    assert_eq!(
        subnet_env(Some(v4), None, 1450, true),
        "FLANNEL_NETWORK=10.244.0.0/16\nFLANNEL_SUBNET=10.244.1.1/24\nFLANNEL_MTU=1450\nFLANNEL_IPMASQ=true\n"
    );
    let v6 = ("fd00::/48".parse().unwrap(), "fd00:0:0:1::/64".parse().unwrap());
    assert_eq!(
        subnet_env(Some(v4), Some(v6), 1450, false),
        "FLANNEL_NETWORK=10.244.0.0/16\nFLANNEL_SUBNET=10.244.1.1/24\nFLANNEL_IPV6_NETWORK=fd00::/48\n\
         FLANNEL_IPV6_SUBNET=fd00:0:0:1::1/64\nFLANNEL_MTU=1450\nFLANNEL_IPMASQ=false\n"
    );
}
