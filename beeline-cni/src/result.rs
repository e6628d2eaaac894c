//! The result of ADD in the format of each version.

use std::net::IpAddr;

use serde_json::{Value, json};

use crate::config::Dns;
use crate::protocol::Added;
use crate::version::Version;

/// The result as JSON.
#[must_use]
pub fn render(version: Version, ifname: &str, sandbox: &str, added: &Added, dns: &Dns) -> Value {
    let mut result = if version < Version::V0_3_0 {
        old(added)
    } else {
        new(version, ifname, sandbox, added)
    };
    if let Some(fields) = result.as_object_mut() {
        fields.insert("cniVersion".into(), version.name().into());
        fields.insert("dns".into(), json!(dns));
    }
    result
}

fn default_route(gateway: &IpAddr) -> &'static str {
    if gateway.is_ipv4() { "0.0.0.0/0" } else { "::/0" }
}

fn cidr(address: &IpAddr) -> String {
    format!("{address}/{}", if address.is_ipv4() { 32 } else { 128 })
}

/// 0.1.0 and 0.2.0: one address of each family.
fn old(added: &Added) -> Value {
    let mut result = json!({});
    for (address, gateway) in &added.ips {
        let family = if address.is_ipv4() { "ip4" } else { "ip6" };
        if result.get(family).is_none() {
            result[family] = json!({
                "ip": cidr(address),
                "gateway": gateway,
                "routes": [{"dst": default_route(gateway), "gw": gateway}],
            });
        }
    }
    result
}

/// From 0.3.0 on: interfaces, and which of them an address is on.
fn new(version: Version, ifname: &str, sandbox: &str, added: &Added) -> Value {
    let mut interfaces = Vec::new();
    let mut interface = |name: &str, mac: String, sandbox: Option<&str>| {
        let mut interface = json!({"name": name, "mac": mac});
        if let Some(sandbox) = sandbox {
            interface["sandbox"] = sandbox.into();
        }
        if version >= Version::V1_1 {
            interface["mtu"] = added.mtu.into();
        }
        interfaces.push(interface);
    };
    if let Some((name, mac)) = &added.host {
        interface(name, mac.to_string(), None);
    }
    interface(
        ifname,
        added.mac.map(|mac| mac.to_string()).unwrap_or_default(),
        Some(sandbox),
    );
    let index = interfaces.len() - 1;
    let ip = |(address, gateway): &(IpAddr, IpAddr)| {
        let mut ip = json!({"address": cidr(address), "gateway": gateway, "interface": index});
        if version < Version::V1_0 {
            ip["version"] = if address.is_ipv4() { "4" } else { "6" }.into();
        }
        ip
    };
    let ips: Vec<Value> = added.ips.iter().map(ip).collect();
    let route = |(_, gateway): &(IpAddr, IpAddr)| json!({"dst": default_route(gateway), "gw": gateway});
    let routes: Vec<Value> = added.ips.iter().map(route).collect();
    json!({"interfaces": interfaces, "ips": ips, "routes": routes})
}

#[cfg(test)]
mod tests {
    use super::*;

    fn added() -> Added {
        Added {
            host: Some(("bee0123456789".into(), "0a:00:00:00:00:01".parse().unwrap())),
            mac: Some("0a:00:00:00:00:02".parse().unwrap()),
            mtu: 1500,
            ips: vec![
                ("10.244.1.2".parse().unwrap(), "169.254.1.1".parse().unwrap()),
                ("fd00::2".parse().unwrap(), "fe80::1".parse().unwrap()),
            ],
        }
    }

    #[test]
    fn each_version_has_its_format() {
        let of = |version| render(version, "eth0", "/run/netns/x", &added(), &Dns::default());
        let oldest = of(Version::V0_1);
        assert_eq!(
            oldest,
            json!({
                "cniVersion": "0.1.0",
                "ip4": {"ip": "10.244.1.2/32", "gateway": "169.254.1.1",
                        "routes": [{"dst": "0.0.0.0/0", "gw": "169.254.1.1"}]},
                "ip6": {"ip": "fd00::2/128", "gateway": "fe80::1", "routes": [{"dst": "::/0", "gw": "fe80::1"}]},
                "dns": {},
            })
        );
        let flannels = of(Version::V0_3_1);
        assert_eq!(
            flannels,
            json!({
                "cniVersion": "0.3.1",
                "interfaces": [
                    {"name": "bee0123456789", "mac": "0a:00:00:00:00:01"},
                    {"name": "eth0", "mac": "0a:00:00:00:00:02", "sandbox": "/run/netns/x"},
                ],
                "ips": [
                    {"version": "4", "address": "10.244.1.2/32", "gateway": "169.254.1.1", "interface": 1},
                    {"version": "6", "address": "fd00::2/128", "gateway": "fe80::1", "interface": 1},
                ],
                "routes": [{"dst": "0.0.0.0/0", "gw": "169.254.1.1"}, {"dst": "::/0", "gw": "fe80::1"}],
                "dns": {},
            })
        );
        let one = of(Version::V1_0);
        assert!(one["ips"][0].get("version").is_none() && one["interfaces"][1].get("mtu").is_none());
        assert_eq!(of(Version::V1_1)["interfaces"][1]["mtu"], 1500);
    }
}
