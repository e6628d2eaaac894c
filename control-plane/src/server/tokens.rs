//! Service account tokens: signed here, read here.

use jiff::Timestamp;
use jsonwebtoken::{Algorithm, DecodingKey, EncodingKey, Header, Validation};
use serde_json::{Value, json};

use super::auth::User;
use super::{Api, codec, write};
use crate::error::{ApiError, Cause};
use crate::pki::{Pair, PkiError};

/// Who signs the tokens, and for whom they are unless a request says so.
pub(super) const ISSUER: &str = "https://kubernetes.default.svc.cluster.local";
const HOUR: i64 = 3600;
/// Bounds of a token's life, as kube-apiserver has them.
const SHORTEST: i64 = 600;
const LONGEST: i64 = 1 << 32;

/// Signs and reads service account tokens.
pub struct Tokens {
    sign: EncodingKey,
    verify: DecodingKey,
}

impl std::fmt::Debug for Tokens {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tokens").finish_non_exhaustive()
    }
}

impl Tokens {
    /// Signs with the pair's private key; its `certificate` is the public key, PEM.
    ///
    /// # Errors
    /// When the keys cannot be read.
    pub fn new(pair: &Pair) -> Result<Self, PkiError> {
        let bad = |error: jsonwebtoken::errors::Error| PkiError::Certificate {
            what: "key for service account tokens".into(),
            why: error.to_string(),
        };
        Ok(Self {
            sign: EncodingKey::from_ec_pem(pair.key.as_bytes()).map_err(bad)?,
            verify: DecodingKey::from_ec_pem(pair.certificate.as_bytes()).map_err(bad)?,
        })
    }

    fn issue(&self, claims: &Value) -> Result<String, ApiError> {
        jsonwebtoken::encode(&Header::new(Algorithm::ES256), claims, &self.sign)
            .map_err(|error| ApiError::internal(&format!("sign a token: {error}")))
    }

    /// The claims of a token of ours that is valid now, for one of the audiences.
    fn read(&self, token: &str, audiences: &[String]) -> Option<Value> {
        let mut validation = Validation::new(Algorithm::ES256);
        validation.set_issuer(&[ISSUER]);
        validation.set_audience(audiences);
        validation.validate_nbf = true;
        validation.leeway = 0;
        validation.set_required_spec_claims(&["exp", "nbf", "iss", "aud", "sub"]);
        let claims = jsonwebtoken::decode::<Value>(token, &self.verify, &validation);
        claims.ok().map(|data| data.claims)
    }
}

/// The groups of a service account.
pub(super) fn groups(namespace: &str) -> Vec<String> {
    vec![
        "system:serviceaccounts".to_owned(),
        format!("system:serviceaccounts:{namespace}"),
    ]
}

impl Api {
    /// `serviceaccounts/{name}/token`: a token for the account, bound to a pod if the request says so.
    pub(super) async fn request_token(
        &self,
        namespace: &str,
        name: &str,
        dry_run: bool,
        request: Value,
    ) -> Result<Value, ApiError> {
        let accounts = write::collection("", "serviceaccounts", namespace)?;
        let stored = self.stored(&accounts, name).await?;
        let account = codec::decode(accounts.resource, stored.revision, &stored.value)?;
        let mut request = request;
        if !request["spec"].is_object() {
            request["spec"] = json!({});
        }
        let spec = &mut request["spec"];
        if spec["audiences"].as_array().is_none_or(Vec::is_empty) {
            spec["audiences"] = json!([ISSUER]);
        }
        let seconds = spec["expirationSeconds"].as_i64().unwrap_or(HOUR);
        if !(SHORTEST..=LONGEST).contains(&seconds) {
            let why = "may not specify a duration less than 10 minutes or more than 2^32 seconds";
            return Err(invalid(
                name,
                &Cause::invalid("spec.expirationSeconds", &seconds.into(), why),
            ));
        }
        spec["expirationSeconds"] = seconds.into();
        let now = Timestamp::now().as_second();
        let mut claims = json!({
            "iss": ISSUER, "sub": format!("system:serviceaccount:{namespace}:{name}"), "aud": spec["audiences"],
            "iat": now, "nbf": now, "exp": now.saturating_add(seconds), "jti": uuid::Uuid::new_v4().to_string(),
            "kubernetes.io": {
                "namespace": namespace, "serviceaccount": {"name": name, "uid": account["metadata"]["uid"]},
            },
        });
        let bound = spec["boundObjectRef"].clone();
        if bound.is_object() {
            let (kind, plural) = match bound["kind"].as_str().unwrap_or_default() {
                "Pod" => ("pod", "pods"),
                "Secret" => ("secret", "secrets"),
                other => {
                    let cause =
                        Cause::not_supported("spec.boundObjectRef.kind", &other.into(), &["Pod", "Secret"]);
                    return Err(invalid(name, &cause));
                }
            };
            let target = write::collection("", plural, namespace)?;
            let object = bound["name"].as_str().unwrap_or_default();
            let stored = self.stored(&target, object).await?;
            let found = codec::decode(target.resource, stored.revision, &stored.value)?;
            let (uid, wanted) = (&found["metadata"]["uid"], &bound["uid"]);
            if wanted.is_string() && wanted != uid {
                let why = format!(
                    "the UID in the bound object reference ({wanted}) does not match the UID in record"
                );
                return Err(ApiError::conflict_because(target.resource, object, &why));
            }
            if kind == "pod" && found["spec"]["serviceAccountName"] != name {
                let why = "cannot bind token to a pod running as another service account";
                return Err(invalid(
                    name,
                    &Cause::invalid("spec.boundObjectRef.name", &object.into(), why),
                ));
            }
            claims["kubernetes.io"][kind] = json!({"name": object, "uid": uid});
        }
        let token = if dry_run {
            String::new()
        } else {
            self.tokens.issue(&claims)?
        };
        request["kind"] = "TokenRequest".into();
        request["apiVersion"] = "authentication.k8s.io/v1".into();
        request["metadata"] =
            json!({"name": name, "namespace": namespace, "creationTimestamp": super::read::now()});
        let end = Timestamp::from_second(now.saturating_add(seconds)).unwrap_or(Timestamp::MAX);
        request["status"] = json!({"token": token, "expirationTimestamp": super::read::timestamp(end)});
        Ok(request)
    }

    /// The user of a service account token; nothing if it is not valid, or its account or pod is gone.
    pub(super) async fn service_account(
        &self,
        token: &str,
        audiences: &[String],
    ) -> Result<Option<User>, ApiError> {
        let Some(claims) = self.tokens.read(token, audiences) else {
            return Ok(None);
        };
        let own = &claims["kubernetes.io"];
        let namespace = own["namespace"].as_str().unwrap_or_default();
        for (kind, plural) in [
            ("serviceaccount", "serviceaccounts"),
            ("pod", "pods"),
            ("secret", "secrets"),
        ] {
            let bound = &own[kind];
            if bound.is_null() && kind != "serviceaccount" {
                continue;
            }
            let target = write::collection("", plural, namespace)?;
            let Some(stored) = self
                .find(&target, bound["name"].as_str().unwrap_or_default())
                .await?
            else {
                return Ok(None);
            };
            let object = codec::decode(target.resource, stored.revision, &stored.value)?;
            if object["metadata"]["uid"] != bound["uid"] {
                return Ok(None);
            }
        }
        let name = own["serviceaccount"]["name"].as_str().unwrap_or_default();
        Ok(Some(User {
            name: format!("system:serviceaccount:{namespace}:{name}"),
            groups: groups(namespace),
            uid: own["serviceaccount"]["uid"]
                .as_str()
                .unwrap_or_default()
                .to_owned(),
        }))
    }
}

fn invalid(name: &str, cause: &Cause) -> ApiError {
    ApiError {
        code: 422,
        reason: "Invalid",
        message: format!(
            "TokenRequest.authentication.k8s.io \"\" is invalid: {}: {}",
            cause.field, cause.message
        ),
        details: Some(json!({
            "name": name, "group": "authentication.k8s.io", "kind": "TokenRequest",
            "causes": [{"reason": cause.reason, "message": cause.message, "field": cause.field}],
        })),
    }
}
