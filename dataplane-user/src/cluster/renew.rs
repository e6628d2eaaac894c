//! A node asks for a new certificate before its own ends.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context as _;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use beeline_control_plane::pki;
use jiff::Timestamp;
use serde_json::{Value, json};

use super::join::{sign, with_kubeconfig};

/// How often a running node looks at its certificate, which has years; also how soon it tries again.
const LOOK: Duration = Duration::from_secs(3600);

/// The credentials of a node that joined.
#[derive(Clone, Debug)]
pub struct Renewal {
    /// What `beeline join` wrote.
    pub kubeconfig: PathBuf,
    /// Name of the node.
    pub node: String,
}

impl Renewal {
    /// Renews the certificate if it ends soon; true if it did. A kubeconfig without a certificate in it belongs to somebody
    /// else, who renews it.
    ///
    /// # Errors
    /// When the kubeconfig cannot be read or written, or the API gives no certificate. The old one is in place then.
    pub async fn renew(&self, now: Timestamp) -> anyhow::Result<bool> {
        let path = &self.kubeconfig;
        let text = std::fs::read_to_string(path).with_context(|| format!("read {}", path.display()))?;
        // `join` writes JSON; others may have YAML, and renew it themselves.
        let Ok(mut config) = serde_json::from_str::<Value>(&text) else {
            return Ok(false);
        };
        let user = &config["users"][0]["user"];
        let Some(certificate) = user["client-certificate-data"].as_str() else {
            return Ok(false);
        };
        let certificate = BASE64.decode(certificate).context("decode the certificate")?;
        let certificate = String::from_utf8(certificate).context("decode the certificate")?;
        if !pki::ends_soon(&certificate, now.as_second())? {
            return Ok(false);
        }
        let (key, request) = pki::node_request(&self.node)?;
        let certificate = sign(&with_kubeconfig(&config).await?, &request).await?;
        config["users"][0]["user"] = json!({
            "client-certificate-data": BASE64.encode(&certificate), "client-key-data": BASE64.encode(&key),
        });
        pki::write_private(path, &config.to_string())?;
        tracing::info!(node = self.node, "the certificate of this node was renewed");
        Ok(true)
    }

    /// Renews the certificate if it ends soon, and only says so if that does not work: there is time left.
    pub async fn try_renew(&self) -> bool {
        let renewed = self.renew(Timestamp::now()).await;
        renewed.unwrap_or_else(|error| {
            tracing::warn!(
                error = format!("{error:#}"),
                "the certificate of this node was not renewed"
            );
            false
        })
    }

    /// Waits until the certificate was renewed.
    pub async fn wait(&self) {
        loop {
            tokio::time::sleep(LOOK).await;
            if self.try_renew().await {
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use beeline_control_plane::config::Config;
    use beeline_control_plane::run::ControlPlane;
    use jiff::ToSpan as _;

    use super::*;

    #[tokio::test(flavor = "multi_thread")]
    async fn a_node_has_a_new_certificate_before_the_old_one_ends_and_only_for_itself() {
        let dir = tempfile::tempdir().unwrap();
        let mut config = Config::new(dir.path().join("data"));
        config.bind.set_port(0);
        let plane = ControlPlane::start(config).await.unwrap();
        let (key, request) = pki::node_request("n1").unwrap();
        let certificate = plane.pki().sign_node(&request).unwrap().certificate;
        let user = json!({
            "client-certificate-data": BASE64.encode(certificate), "client-key-data": BASE64.encode(key),
        });
        let text = super::super::join::kubeconfig(plane.url(), &plane.pki().ca, &user).to_string();
        let renewal = Renewal {
            kubeconfig: dir.path().join("node.conf"),
            node: "n1".to_owned(),
        };
        std::fs::write(&renewal.kubeconfig, &text).unwrap();
        let read = || std::fs::read_to_string(&renewal.kubeconfig).unwrap();
        let now = Timestamp::now();
        assert!(!renewal.renew(now).await.unwrap());
        assert_eq!(read(), text);
        let later = now + (24 * 365 * 2 + 24 * 30).hours();
        let other = Renewal {
            node: "n2".to_owned(),
            ..renewal.clone()
        };
        other.renew(later).await.unwrap_err();
        assert_eq!(read(), text, "what did not work changes nothing");
        assert!(renewal.renew(later).await.unwrap());
        assert_ne!(read(), text);
        // The new one is good for the API.
        let client = with_kubeconfig(&serde_json::from_str(&read()).unwrap())
            .await
            .unwrap();
        let request = http::Request::get("/api").body(Vec::new()).unwrap();
        client.request_text(request).await.unwrap();
        plane.stop().await;
    }

    #[tokio::test]
    async fn what_somebody_else_renews_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("node.conf");
        for text in [
            "apiVersion: v1\nkind: Config\n".to_owned(),
            json!({"users": [{"user": {"client-certificate": "/var/lib/kubelet/pki/current.pem"}}]})
                .to_string(),
        ] {
            std::fs::write(&path, &text).unwrap();
            let renewal = Renewal {
                kubeconfig: path.clone(),
                node: "n1".to_owned(),
            };
            assert!(!renewal.renew(Timestamp::now()).await.unwrap());
            assert_eq!(std::fs::read_to_string(&path).unwrap(), text);
        }
    }
}
