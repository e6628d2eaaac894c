//! Certificates of nodes: who joins or renews asks with a CertificateSigningRequest and has the answer at once.
//!
//! kube-apiserver stores the request and lets controllers approve and sign it; what they would decide is decided here, so
//! nothing is stored.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde_json::{Value, json};

use super::Api;
use super::auth::User;
use crate::error::ApiError;

/// The only signer: client certificates of nodes.
const SIGNER: &str = "kubernetes.io/kube-apiserver-client-kubelet";
const BOOTSTRAPPERS: &str = "system:bootstrappers";

impl Api {
    /// The status of a signed request; roles allow the user to make one.
    pub(super) fn sign(&self, user: &User, spec: &Value) -> Result<Value, ApiError> {
        let signer = spec["signerName"].as_str().unwrap_or_default();
        if signer != SIGNER {
            return Err(ApiError::bad_request(format!(
                "spec.signerName: {signer:?} signs nothing here; {SIGNER:?} does"
            )));
        }
        let request = BASE64
            .decode(spec["request"].as_str().unwrap_or_default())
            .ok()
            .and_then(|bytes| String::from_utf8(bytes).ok())
            .ok_or_else(|| ApiError::bad_request("spec.request: is no base64 of a PEM text"))?;
        let signed = self
            .pki
            .sign_node(&request)
            .map_err(|error| ApiError::bad_request(format!("spec.request: {error}")))?;
        let allowed = match user.node() {
            Some(node) => node == signed.node,
            None => user.in_group(BOOTSTRAPPERS) || user.is_master(),
        };
        if !allowed {
            return Err(ApiError::unauthorized_request(&user.name, &signed.node));
        }
        tracing::info!(
            node = signed.node,
            user = user.name,
            "a node's certificate is signed"
        );
        let now = jiff::Timestamp::now().strftime("%Y-%m-%dT%H:%M:%SZ").to_string();
        Ok(json!({
            "certificate": BASE64.encode(&signed.certificate),
            "conditions": [{
                "type": "Approved", "status": "True", "reason": "AutoApproved",
                "message": "Auto approving kubelet client certificate after SubjectAccessReview.",
                "lastUpdateTime": now, "lastTransitionTime": now,
            }],
        }))
    }
}
