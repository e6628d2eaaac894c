//! `beeline init`: the first node of a new cluster.

use std::net::IpAddr;

use anyhow::{Context as _, ensure};
use beeline_control_plane::config::cluster_dns;
use beeline_control_plane::pki;
use clap::Args;
use ipnet::IpNet;
use k8s_openapi::api::core::v1::Node;
use kube::Api;
use kube::api::{Patch, PatchParams};
use serde_json::{Value, json};

use super::objects::{self, NodeConfig};
use super::token::{self, Token, Ttl, ttl};
use super::{MANAGER, Places, client, daemon, join, need_root, node_name, until};

/// Flags of `beeline init`.
#[derive(Debug, Args)]
pub struct InitArgs {
    /// Address at which others reach the API [default: that from which this host reaches the world]
    #[arg(long)]
    apiserver_advertise_address: Option<IpAddr>,
    /// Port of the API
    #[arg(long, default_value_t = 6443)]
    apiserver_bind_port: u16,
    /// Ranges of pods, at most one per address family
    #[arg(long, value_delimiter = ',', default_value = "10.244.0.0/16")]
    pod_network_cidr: Vec<IpNet>,
    /// Ranges of Services, at most one per address family
    #[arg(long, value_delimiter = ',', default_value = "10.96.0.0/12")]
    service_cidr: Vec<IpNet>,
    /// Domain of Services
    #[arg(long, default_value = "cluster.local")]
    service_dns_domain: String,
    /// Port at which this machine serves the cluster's DNS; pods ask at port 53 of the Service kube-system/kube-dns
    #[arg(long, default_value_t = 10053)]
    dns_bind_port: u16,
    /// How pods of different nodes reach each other
    #[arg(long, default_value = "vxlan", value_parser = ["vxlan", "host-gw"])]
    backend: String,
    /// The token with which nodes join [default: a random one]
    #[arg(long)]
    token: Option<Token>,
    /// How long the token is good for, such as 2h; 0: for ever
    #[arg(long, default_value = "24h", value_parser = ttl)]
    token_ttl: Ttl,
    /// Name of this node [default: the host's name in lower case]
    #[arg(long)]
    node_name: Option<String>,
    #[command(flatten)]
    places: Places,
}

/// flannel's net-conf.json for these ranges.
fn net_conf(cidrs: &[IpNet], backend: &str) -> Value {
    let mut conf = json!({"Backend": {"Type": backend}});
    let v4 = cidrs.iter().find(|cidr| cidr.addr().is_ipv4());
    match v4 {
        Some(cidr) => conf["Network"] = cidr.to_string().into(),
        None => conf["EnableIPv4"] = false.into(),
    }
    if let Some(cidr) = cidrs.iter().find(|cidr| cidr.addr().is_ipv6()) {
        conf["EnableIPv6"] = true.into();
        conf["IPv6Network"] = cidr.to_string().into();
    }
    conf
}

/// Runs it; returns what to tell the user.
///
/// # Errors
/// When a part does not start; the message says which, with the end of its log.
pub async fn init(args: InitArgs) -> anyhow::Result<String> {
    need_root()?;
    let places = &args.places;
    let node = node_name(args.node_name.as_deref())?;
    for path in [places.admin_conf(), places.node_conf()] {
        ensure!(
            !path.exists(),
            "[preflight] {} already exists: `beeline reset` undoes an earlier init or join",
            path.display()
        );
    }
    let address = match args.apiserver_advertise_address {
        Some(address) => address,
        None => beeline_node::own_addresses()
            .first()
            .copied()
            .context("[preflight] this host has no address: give --apiserver-advertise-address")?,
    };
    let endpoint = std::net::SocketAddr::new(address, args.apiserver_bind_port).to_string();
    let list = |cidrs: &[IpNet]| {
        cidrs
            .iter()
            .map(ToString::to_string)
            .collect::<Vec<_>>()
            .join(",")
    };

    eprintln!("[control-plane] starting the API at https://{endpoint}");
    let any = if address.is_ipv4() { "0.0.0.0" } else { "[::]" };
    let dns_bind = std::net::SocketAddr::new(address, args.dns_bind_port);
    let command = [
        "control-plane",
        "--data-dir",
        &places.control_plane().display().to_string(),
        "--bind",
        &format!("{any}:{}", args.apiserver_bind_port),
        "--advertise",
        &address.to_string(),
        "--kubeconfig",
        &places.admin_conf().display().to_string(),
        "--service-cidr",
        &list(&args.service_cidr),
        "--cluster-cidr",
        &list(&args.pod_network_cidr),
        "--dns-bind",
        &dns_bind.to_string(),
        "--cluster-domain",
        &args.service_dns_domain,
    ]
    .map(str::to_owned);
    daemon::start(places, "control-plane", &command)?;
    let admin = until("the API did not answer", async || {
        daemon::check_running(places, "control-plane")?;
        let admin = client(&places.admin_conf()).await?;
        admin.apiserver_version().await?;
        Ok(admin)
    })
    .await?;

    eprintln!("[bootstrap-token] letting nodes join");
    let ca = places.control_plane().join("pki/ca.crt");
    let ca = std::fs::read_to_string(&ca).with_context(|| format!("read {}", ca.display()))?;
    let config = NodeConfig {
        network: net_conf(&args.pod_network_cidr, &args.backend).to_string(),
        domain: args.service_dns_domain.clone(),
        dns: cluster_dns(&args.service_cidr, address)
            .iter()
            .map(IpAddr::to_string)
            .collect(),
    };
    let server = format!("https://{endpoint}");
    for object in objects::all(&server, &ca, &config) {
        objects::apply(&admin, &object).await?;
    }
    let token = args.token.clone().unwrap_or_else(Token::random);
    let description = Some("The default bootstrap token generated by 'beeline init'.");
    token::create(&admin, &token, args.token_ttl, description).await?;
    join::become_node(places, &server, &ca, &token, &node).await?;
    let label = json!({"metadata": {"labels": {"node-role.kubernetes.io/control-plane": ""}}});
    Api::<Node>::all(admin)
        .patch(
            &node,
            &PatchParams {
                field_manager: Some(MANAGER.to_owned()),
                ..PatchParams::default()
            },
            &Patch::Merge(label),
        )
        .await
        .context("label the node")?;
    let hash = pki::key_hash(&ca)?;
    Ok(format!(
        "\nYour Kubernetes control-plane has initialized successfully!\n\n\
         To start using your cluster, you need to run the following as a regular user:\n\n  \
         mkdir -p $HOME/.kube\n  sudo cp -i {admin_conf} $HOME/.kube/config\n  \
         sudo chown $(id -u):$(id -g) $HOME/.kube/config\n\n\
         Alternatively, if you are the root user, you can run:\n\n  export KUBECONFIG={admin_conf}\n\n\
         The pod network is part of the cluster: there is nothing to deploy.\n\n\
         Then you can join any number of worker nodes by running the following on each as root:\n\n{join}\n",
        admin_conf = places.admin_conf().display(),
        join = token::join_command(&endpoint, &token, &hash),
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_network_has_the_families_of_its_ranges() {
        let of = |texts: &[&str]| {
            let cidrs: Vec<IpNet> = texts.iter().map(|text| text.parse().unwrap()).collect();
            net_conf(&cidrs, "vxlan")
        };
        assert_eq!(
            of(&["10.244.0.0/16"]),
            json!({"Network": "10.244.0.0/16", "Backend": {"Type": "vxlan"}})
        );
        let dual = of(&["10.244.0.0/16", "fd00::/48"]);
        assert_eq!(
            (&dual["EnableIPv6"], &dual["IPv6Network"]),
            (&json!(true), &json!("fd00::/48"))
        );
        assert_eq!(of(&["fd00::/48"])["EnableIPv4"], false);
    }
}
