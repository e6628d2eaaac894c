//! A pod's `/etc/resolv.conf` (kubelet `dns.Configurer`).

use k8s_openapi::api::core::v1::PodSpec;

use super::Context;

/// Names that a resolver takes at most.
const NAMESERVERS: usize = 3;

/// The text, from the pod's `dnsPolicy` and `dnsConfig`; `None`: the node's file as it is.
pub(super) fn resolv_conf(context: &Context, namespace: &str, spec: &PodSpec) -> Option<String> {
    let node = std::fs::read_to_string("/etc/resolv.conf").unwrap_or_default();
    let servers: Vec<String> = context.cluster_dns.iter().map(ToString::to_string).collect();
    render(&servers, &context.cluster_domain, namespace, spec, &node)
}

fn render(servers: &[String], domain: &str, namespace: &str, spec: &PodSpec, node: &str) -> Option<String> {
    let of_node = |keyword: &str| -> Vec<String> {
        let lines = node.lines().filter_map(|line| line.trim().strip_prefix(keyword));
        let words = lines.filter(|rest| rest.starts_with([' ', '\t']));
        words.flat_map(str::split_whitespace).map(str::to_owned).collect()
    };
    let host_network = spec.host_network == Some(true);
    let policy = match spec.dns_policy.as_deref().unwrap_or("ClusterFirst") {
        "ClusterFirst" if host_network || servers.is_empty() => "Default",
        "ClusterFirstWithHostNet" if servers.is_empty() => "Default",
        policy => policy,
    };
    let config = spec.dns_config.as_ref();
    if policy == "Default" && config.is_none() {
        return None;
    }
    let (mut nameservers, mut searches, mut options) = match policy {
        "None" => Default::default(),
        "Default" => (of_node("nameserver"), of_node("search"), of_node("options")),
        _ => {
            let mut searches = vec![
                format!("{namespace}.svc.{domain}"),
                format!("svc.{domain}"),
                domain.to_owned(),
            ];
            searches.extend(of_node("search"));
            (servers.to_vec(), searches, vec!["ndots:5".to_owned()])
        }
    };
    if let Some(config) = config {
        nameservers.extend(config.nameservers.clone().unwrap_or_default());
        searches.extend(config.searches.clone().unwrap_or_default());
        for option in config.options.iter().flatten() {
            let name = option.name.clone().unwrap_or_default();
            options.retain(|old| old.split(':').next() != Some(name.as_str()));
            options.push(match option.value.as_deref() {
                Some(value) => format!("{name}:{value}"),
                None => name,
            });
        }
    }
    let mut text = String::new();
    for server in nameservers.iter().take(NAMESERVERS) {
        text.push_str(&format!("nameserver {server}\n"));
    }
    if !searches.is_empty() {
        text.push_str(&format!("search {}\n", searches.join(" ")));
    }
    if !options.is_empty() {
        text.push_str(&format!("options {}\n", options.join(" ")));
    }
    Some(text)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn text(servers: &[&str], spec: serde_json::Value) -> Option<String> {
        let mut spec = spec;
        spec["containers"] = json!([]);
        let servers: Vec<String> = servers.iter().map(|server| (*server).to_owned()).collect();
        let node = "nameserver 192.0.2.53\nsearch example.org\noptions timeout:1\n";
        render(
            &servers,
            "cluster.local",
            "shop",
            &serde_json::from_value(spec).unwrap(),
            node,
        )
    }

    #[test]
    fn policies() {
        assert_eq!(
            text(&["10.96.0.10"], json!({})).unwrap(),
            "nameserver 10.96.0.10\nsearch shop.svc.cluster.local svc.cluster.local cluster.local example.org\n\
             options ndots:5\n"
        );
        for spec in [
            json!({"dnsPolicy": "Default"}),
            json!({"hostNetwork": true, "dnsPolicy": "ClusterFirst"}),
        ] {
            assert_eq!(text(&["10.96.0.10"], spec), None);
        }
        assert_eq!(text(&[], json!({})), None);
        let own = json!({"dnsPolicy": "None", "dnsConfig": {"nameservers": ["192.0.2.1"],
            "options": [{"name": "ndots", "value": "2"}, {"name": "edns0"}]}});
        assert_eq!(
            text(&["10.96.0.10"], own).unwrap(),
            "nameserver 192.0.2.1\noptions ndots:2 edns0\n"
        );
        let more = json!({"dnsConfig": {"options": [{"name": "ndots", "value": "2"}]}});
        assert!(
            text(&["10.96.0.10"], more)
                .unwrap()
                .ends_with("options ndots:2\n")
        );
    }
}
