//! Ports of the node that pods asked for, as frontends of the Service dataplane.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use beeline_cni::protocol::PortMapping;
use dataplane_model::{Event, HostPort, Protocol};

use super::service::Service;
use super::store::Attachment;
use crate::source::{Sender, Update};

/// Tells the model all host ports now, and again with each change, until the service or the receiver is gone.
pub async fn follow(service: Arc<Service>, sender: Sender) {
    let mut changes = service.changes();
    loop {
        changes.borrow_and_update();
        let ports = service.attachments().iter().flat_map(host_ports).collect();
        if sender.send(Update::Event(Event::HostPorts(ports))).await.is_err()
            || changes.changed().await.is_err()
        {
            return;
        }
    }
}

fn host_ports(attachment: &Attachment) -> Vec<HostPort> {
    let pairs = attachment
        .port_mappings
        .iter()
        .flat_map(|mapping| attachment.ips.iter().map(move |ip| (mapping, *ip)));
    pairs
        .filter_map(|(mapping, ip)| host_port(attachment, mapping, ip))
        .collect()
}

fn host_port(attachment: &Attachment, mapping: &PortMapping, ip: IpAddr) -> Option<HostPort> {
    // an address of one family says nothing of the other (spec cni-overlay 3, portmap)
    let host_ip = mapping.host_ip.filter(|host| !host.is_unspecified());
    let of_family = mapping.host_ip.is_none_or(|host| host.is_ipv4() == ip.is_ipv4());
    let protocol = match mapping.protocol.as_str() {
        "tcp" => Protocol::Tcp,
        "udp" => Protocol::Udp,
        "sctp" => Protocol::Sctp,
        _ => return None,
    };
    let pod = attachment.pod.as_ref();
    (of_family && mapping.host_port > 0 && mapping.container_port > 0).then(|| HostPort {
        namespace: pod.map(|pod| pod.namespace.clone()).unwrap_or_default(),
        // a runtime that does not say is asked for the container
        pod: pod.map_or_else(|| attachment.key.container_id.clone(), |pod| pod.name.clone()),
        host_ip,
        port: mapping.host_port,
        protocol,
        backend: SocketAddr::new(ip, mapping.container_port),
    })
}

#[cfg(test)]
mod tests {
    use beeline_cni::protocol::Key;

    use super::*;

    #[test]
    fn a_mapping_is_an_entry_of_each_family_that_it_means() {
        let key = Key {
            network: "n".into(),
            container_id: "abc".into(),
            ifname: "eth0".into(),
        };
        let mut attachment = Attachment::new(key);
        attachment.ips = vec!["10.244.1.2".parse().unwrap(), "fd00::2".parse().unwrap()];
        let mapping = |host_ip: Option<&str>, protocol: &str| PortMapping {
            host_port: 8080,
            container_port: 80,
            protocol: protocol.into(),
            host_ip: host_ip.map(|ip| ip.parse().unwrap()),
        };
        attachment.port_mappings = vec![
            mapping(None, "tcp"),
            mapping(Some("0.0.0.0"), "udp"),
            mapping(Some("127.0.0.1"), "sctp"),
            mapping(None, "icmp"),
            PortMapping {
                host_port: 0,
                ..mapping(None, "tcp")
            },
        ];
        let found = host_ports(&attachment);
        let shown: Vec<String> = found
            .iter()
            .map(|p| format!("{:?} {} {:?} {}", p.host_ip, p.port, p.protocol, p.backend))
            .collect();
        assert_eq!(
            shown,
            [
                "None 8080 Tcp 10.244.1.2:80",
                "None 8080 Tcp [fd00::2]:80",
                "None 8080 Udp 10.244.1.2:80",
                "Some(127.0.0.1) 8080 Sctp 10.244.1.2:80",
            ]
        );
        assert_eq!(found[0].pod, "abc");
    }
}
