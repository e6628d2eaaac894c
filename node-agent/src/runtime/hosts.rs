//! A pod's `/etc/hosts`.

use std::net::IpAddr;

/// The text, kubelet's.
pub(crate) fn text(hostname: &str, ips: &[IpAddr], aliases: &[(IpAddr, Vec<String>)]) -> String {
    let mut text = String::from(
        "# Kubernetes-managed hosts file.\n127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n\
         fe00::0\tip6-localnet\nfe00::0\tip6-mcastprefix\nfe00::1\tip6-allnodes\nfe00::2\tip6-allrouters\n",
    );
    for ip in ips {
        text.push_str(&format!("{ip}\t{hostname}\n"));
    }
    if !aliases.is_empty() {
        text.push_str("\n# Entries added by HostAliases.\n");
    }
    for (ip, names) in aliases {
        text.push_str(&format!("{ip}\t{}\n", names.join("\t")));
    }
    text
}
