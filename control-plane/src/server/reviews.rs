//! Questions that are answered at once and not stored: who is this user, may they do that, sign this.

use bytes::Bytes;
use http::{Method, Response};
use serde_json::{Value, json};

use super::auth::{Ask, User};
use super::response::{self, Body};
use super::{Api, Parts, request, tokens};
use crate::error::ApiError;

/// One kind of question.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Review {
    SelfAccess,
    SelfRules,
    Access,
    Token,
    SelfUser,
    Signing,
}

impl Review {
    pub(super) const ALL: [Self; 6] = [
        Self::SelfAccess,
        Self::SelfRules,
        Self::Access,
        Self::Token,
        Self::SelfUser,
        Self::Signing,
    ];

    pub(super) fn group(self) -> &'static str {
        match self {
            Self::SelfAccess | Self::SelfRules | Self::Access => "authorization.k8s.io",
            Self::Token | Self::SelfUser => "authentication.k8s.io",
            Self::Signing => "certificates.k8s.io",
        }
    }

    fn kind(self) -> &'static str {
        match self {
            Self::SelfAccess => "SelfSubjectAccessReview",
            Self::SelfRules => "SelfSubjectRulesReview",
            Self::Access => "SubjectAccessReview",
            Self::Token => "TokenReview",
            Self::SelfUser => "SelfSubjectReview",
            Self::Signing => "CertificateSigningRequest",
        }
    }

    pub(super) fn plural(self) -> &'static str {
        match self {
            Self::SelfAccess => "selfsubjectaccessreviews",
            Self::SelfRules => "selfsubjectrulesreviews",
            Self::Access => "subjectaccessreviews",
            Self::Token => "tokenreviews",
            Self::SelfUser => "selfsubjectreviews",
            Self::Signing => "certificatesigningrequests",
        }
    }
}

/// What a review's specification asks about.
fn ask(spec: &Value) -> Result<Ask, ApiError> {
    let text = |value: &Value, field: &str| value[field].as_str().unwrap_or_default().to_owned();
    let resource = &spec["resourceAttributes"];
    let path = &spec["nonResourceAttributes"];
    match (resource.is_object(), path.is_object()) {
        (true, false) => {
            let sub = text(resource, "subresource");
            let plural = text(resource, "resource");
            Ok(Ask::Resource {
                verb: text(resource, "verb"),
                group: text(resource, "group"),
                resource: if sub.is_empty() {
                    plural
                } else {
                    format!("{plural}/{sub}")
                },
                namespace: text(resource, "namespace"),
                name: text(resource, "name"),
            })
        }
        (false, true) => Ok(Ask::Path {
            verb: text(path, "verb"),
            path: text(path, "path"),
        }),
        _ => Err(ApiError::bad_request(
            "exactly one of nonResourceAttributes or resourceAttributes must be specified",
        )),
    }
}

fn user_info(user: &User) -> Value {
    let mut info = json!({"username": user.name, "groups": user.groups});
    if !user.uid.is_empty() {
        info["uid"] = user.uid.as_str().into();
    }
    info
}

impl Api {
    /// Answers a question.
    pub(super) async fn review<B>(
        &self,
        parts: &Parts<'_>,
        user: &User,
        review: Review,
        body: B,
    ) -> Result<Response<Body>, ApiError>
    where
        B: hyper::body::Body<Data = Bytes>,
        B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    {
        if *parts.method != Method::POST {
            return Err(ApiError::method_not_allowed());
        }
        let body = request::read_body(body).await?;
        let asked = request::decode(&request::content_type(parts.headers), &body)?;
        let asked = match (review, asked) {
            // There is nothing in it.
            (Review::SelfUser, _) => json!({}),
            (_, asked) => asked.map_err(ApiError::bad_request)?,
        };
        let spec = asked["spec"].clone();
        let status = match review {
            Review::SelfAccess => self.access(user, &spec).await?,
            Review::Access => {
                let groups = spec["groups"].as_array().into_iter().flatten();
                let user = User {
                    name: spec["user"].as_str().unwrap_or_default().to_owned(),
                    groups: groups.filter_map(Value::as_str).map(str::to_owned).collect(),
                    uid: String::new(),
                };
                if user.name.is_empty() && user.groups.is_empty() {
                    return Err(ApiError::bad_request(
                        "at least one of user or group must be specified",
                    ));
                }
                self.access(&user, &spec).await?
            }
            Review::SelfRules => {
                let namespace = spec["namespace"].as_str().unwrap_or_default();
                let rules = self.rules_for(user, namespace).await?;
                let (paths, resources): (Vec<_>, Vec<_>) = rules
                    .into_iter()
                    .partition(|rule| rule["nonResourceURLs"].is_array());
                json!({"resourceRules": resources, "nonResourceRules": paths, "incomplete": false})
            }
            Review::Token => self.token_review(&spec).await?,
            Review::SelfUser => json!({"userInfo": user_info(user)}),
            Review::Signing => self.sign(user, &spec)?,
        };
        let mut answer = json!({
            "kind": review.kind(), "apiVersion": format!("{}/v1", review.group()), "metadata": {}, "status": status,
        });
        if review != Review::SelfUser {
            answer["spec"] = if spec.is_object() { spec } else { json!({}) };
        }
        Ok(response::value(201, parts.accept, &answer))
    }

    async fn access(&self, user: &User, spec: &Value) -> Result<Value, ApiError> {
        let allowed = self.allowed(user, &ask(spec)?).await?;
        Ok(json!({"allowed": allowed}))
    }

    async fn token_review(&self, spec: &Value) -> Result<Value, ApiError> {
        let token = spec["token"].as_str().unwrap_or_default();
        let given = spec["audiences"].as_array().into_iter().flatten();
        let mut audiences: Vec<String> = given.filter_map(Value::as_str).map(str::to_owned).collect();
        if audiences.is_empty() {
            audiences.push(tokens::ISSUER.to_owned());
        }
        Ok(match self.of_token(token, &audiences).await? {
            Some(mut user) => {
                user.groups.push("system:authenticated".to_owned());
                json!({"authenticated": true, "user": user_info(&user), "audiences": audiences})
            }
            None => json!({"authenticated": false, "error": "invalid bearer token"}),
        })
    }
}
