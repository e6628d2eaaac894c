//! `beeline join`: this machine becomes a node of a cluster.

use std::path::Path;

use anyhow::{Context as _, bail, ensure};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use beeline_control_plane::pki;
use clap::Args;
use k8s_openapi::api::core::v1::{ConfigMap, Node};
use kube::{Api, Client, Config};
use serde_json::{Value, json};

use super::objects::{NODE_CONFIG, NodeConfig};
use super::token::{Token, cluster_info};
use super::{Places, client, daemon, need_root, node_name, until};

/// Flags of `beeline join`.
#[derive(Debug, Args)]
pub struct JoinArgs {
    /// Host and port of the API
    address: String,
    /// A token of the cluster (`beeline token create`)
    #[arg(long)]
    token: Token,
    /// Hash of the public key of the cluster's authority, as sha256:HEX; several are fine
    #[arg(
        long,
        value_delimiter = ',',
        required_unless_present = "discovery_token_unsafe_skip_ca_verification"
    )]
    discovery_token_ca_cert_hash: Vec<String>,
    /// Believe whatever answers at the address
    #[arg(long, conflicts_with = "discovery_token_ca_cert_hash")]
    discovery_token_unsafe_skip_ca_verification: bool,
    /// Name of this node [default: the host's name in lower case]
    #[arg(long)]
    node_name: Option<String>,
    #[command(flatten)]
    places: Places,
}

/// Runs it; returns what to tell the user.
///
/// # Errors
/// When this machine cannot join; the message says what is wrong.
pub async fn join(args: JoinArgs) -> anyhow::Result<String> {
    need_root()?;
    let node = node_name(args.node_name.as_deref())?;
    daemon::check_absent(&args.places, "node")?;
    ensure!(
        !args.places.node_conf().exists(),
        "[preflight] {} already exists: this machine is a node; `beeline reset` undoes that",
        args.places.node_conf().display()
    );
    let hashes =
        (!args.discovery_token_unsafe_skip_ca_verification).then_some(args.discovery_token_ca_cert_hash);
    eprintln!(
        "[discovery] asking {} for its certificate authority",
        args.address
    );
    let ca = discover(&args.address, hashes.as_deref()).await?;
    let server = format!("https://{}", args.address);
    eprintln!("[kubelet-start] asking for a certificate of node {node:?}");
    become_node(&args.places, &server, &ca, &args.token, &node).await?;
    Ok("\nThis node has joined the cluster:\n\
         * Certificate signing request was sent to apiserver and a response was received.\n\
         * The node was informed of the new secure connection details.\n\n\
         Run 'kubectl get nodes' on the control-plane to see this node join the cluster.\n"
        .to_owned())
}

/// The authority of the cluster at the address. Nothing is believed that the hashes do not vouch for.
async fn discover(address: &str, hashes: Option<&[String]>) -> anyhow::Result<String> {
    let mut config = Config::new(uri(address)?);
    config.accept_invalid_certs = true;
    let client = Client::try_from(config).context("set up the API client")?;
    let (_, ca) = cluster_info(&client)
        .await
        .with_context(|| format!("[discovery] {address}"))?;
    let hash = pki::key_hash(&ca)?;
    match hashes {
        Some(hashes) if !hashes.iter().any(|wanted| wanted.eq_ignore_ascii_case(&hash)) => bail!(
            "[discovery] the authority of {address} has public key {hash}, which is none of those given with \
             --discovery-token-ca-cert-hash"
        ),
        _ => Ok(ca),
    }
}

fn uri(address: &str) -> anyhow::Result<http::Uri> {
    let uri = format!("https://{address}")
        .parse::<http::Uri>()
        .with_context(|| format!("{address:?} is no HOST:PORT"))?;
    ensure!(uri.port().is_some(), "{address:?} is no HOST:PORT");
    Ok(uri)
}

/// Gets this machine's credentials and settings, starts the node and waits until the cluster knows it.
pub(super) async fn become_node(
    places: &Places,
    server: &str,
    ca: &str,
    token: &Token,
    node: &str,
) -> anyhow::Result<()> {
    let (key, request) = pki::node_request(node)?;
    let bootstrap = with_kubeconfig(&kubeconfig(server, ca, &json!({"token": token.to_string()}))).await?;
    let certificate = sign(&bootstrap, &request).await?;
    let maps: Api<ConfigMap> = Api::namespaced(bootstrap, "kube-system");
    let map = maps
        .get(NODE_CONFIG)
        .await
        .context("read the settings of nodes")?;
    let config = NodeConfig::read(&map.data.unwrap_or_default())?;

    let user = json!({
        "client-certificate-data": BASE64.encode(&certificate), "client-key-data": BASE64.encode(&key),
    });
    let conf = places.node_conf();
    for dir in conf.parent().into_iter().chain([places.manifests().as_path()]) {
        std::fs::create_dir_all(dir).with_context(|| format!("make {}", dir.display()))?;
    }
    write(&places.net_conf(), &config.network)?;
    write(&conf, &kubeconfig(server, ca, &user).to_string())?;
    eprintln!("[kubelet-start] starting the node");
    daemon::start(
        places,
        "node",
        &places.node_command(node, &config.domain, &config.dns),
    )?;
    let nodes: Api<Node> = Api::all(client(&conf).await?);
    until(&format!("node {node:?} was not registered"), async || {
        daemon::check_running(places, "node")?;
        Ok(nodes.get(node).await.map(drop)?)
    })
    .await
}

fn write(path: &Path, text: &str) -> anyhow::Result<()> {
    Ok(pki::write_private(path, text)?)
}

/// A kubeconfig, as JSON, which is YAML.
pub(super) fn kubeconfig(server: &str, ca: &str, user: &Value) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Config", "current-context": "default",
        "clusters": [{"name": "default", "cluster": {"server": server, "certificate-authority-data": BASE64.encode(ca)}}],
        "users": [{"name": "default", "user": user}],
        "contexts": [{"name": "default", "context": {"cluster": "default", "user": "default"}}],
    })
}

pub(super) async fn with_kubeconfig(kubeconfig: &Value) -> anyhow::Result<Client> {
    let config = serde_json::from_value(kubeconfig.clone()).context("make a kubeconfig")?;
    let config = Config::from_custom_kubeconfig(config, &kube::config::KubeConfigOptions::default()).await?;
    Client::try_from(config).context("set up the API client")
}

/// The certificate for a request, PEM.
pub(super) async fn sign(client: &Client, request: &str) -> anyhow::Result<String> {
    let object = json!({
        "apiVersion": "certificates.k8s.io/v1", "kind": "CertificateSigningRequest",
        "metadata": {"generateName": "node-csr-"},
        "spec": {
            "request": BASE64.encode(request), "signerName": "kubernetes.io/kube-apiserver-client-kubelet",
            "usages": ["digital signature", "client auth"],
        },
    });
    let post = http::Request::post("/apis/certificates.k8s.io/v1/certificatesigningrequests")
        .header(http::header::CONTENT_TYPE, "application/json")
        .body(serde_json::to_vec(&object)?)?;
    let answer: Value = client
        .request(post)
        .await
        .context("[kubelet-start] no certificate")?;
    let certificate = answer["status"]["certificate"].as_str().unwrap_or_default();
    let certificate = BASE64.decode(certificate).context("decode the certificate")?;
    ensure!(
        !certificate.is_empty(),
        "the request for a certificate was not signed"
    );
    String::from_utf8(certificate).context("decode the certificate")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_have_a_port() {
        assert!(uri("192.0.2.1:6443").is_ok() && uri("[2001:db8::1]:6443").is_ok());
        for bad in ["", "192.0.2.1", "x y:1"] {
            assert!(uri(bad).is_err(), "{bad}");
        }
    }
}
