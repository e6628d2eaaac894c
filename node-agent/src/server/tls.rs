//! Who the node is, and who may ask it.

use std::path::Path;
use std::sync::Arc;

use anyhow::{Context as _, Result};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use rustls::server::WebPkiClientVerifier;
use rustls::{RootCertStore, ServerConfig, ServerConnection};
use rustls_pki_types::pem::PemObject as _;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use serde_json::Value;

/// The common name of the API's certificate as a client of nodes, kubeadm's.
const API: &str = "kube-apiserver-kubelet-client";

/// TLS with the certificates of a kubeconfig that has them in it.
pub(super) fn config(kubeconfig: &Path) -> Result<ServerConfig> {
    let text =
        std::fs::read_to_string(kubeconfig).with_context(|| format!("read {}", kubeconfig.display()))?;
    let config: Value =
        serde_saphyr::from_str(&text).with_context(|| format!("understand {}", kubeconfig.display()))?;
    let decode = |part: &Value, name: &str| -> Result<Vec<u8>> {
        let text = part[name]
            .as_str()
            .with_context(|| format!("{} has no {name}", kubeconfig.display()))?;
        BASE64.decode(text).with_context(|| format!("decode {name}"))
    };
    let ca = decode(&config["clusters"][0]["cluster"], "certificate-authority-data")?;
    let user = &config["users"][0]["user"];
    let certificate = decode(user, "client-certificate-data")?;
    let key = decode(user, "client-key-data")?;

    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_slice(&ca).context("read the authority")?)?;
    let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&provider))
        .build()
        .context("check clients")?;
    let config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_client_cert_verifier(verifier)
        .with_single_cert(
            vec![CertificateDer::from_pem_slice(&certificate).context("read the node's certificate")?],
            PrivateKeyDer::from_pem_slice(&key).context("read the node's key")?,
        )
        .context("use the node's certificate")?;
    Ok(config)
}

/// Whether the client, whose certificate has been checked, is the API.
pub(super) fn is_api(connection: &ServerConnection) -> bool {
    let Some(certificate) = connection.peer_certificates().and_then(|chain| chain.first()) else {
        return false;
    };
    common_name(certificate).as_deref() == Some(API)
}

fn common_name(der: &[u8]) -> Option<String> {
    let (_, certificate) = x509_parser::parse_x509_certificate(der).ok()?;
    let name = certificate.subject().iter_common_name().next()?;
    name.as_str().ok().map(str::to_owned)
}
