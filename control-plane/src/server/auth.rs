//! Who a client is, and whether it may do what it asks for.

use http::{HeaderMap, Method, header};
use jiff::Timestamp;
use serde_json::json;

use super::request::Params;
use super::route::{Route, Target};
use super::{Api, codec, tokens, verb, write};
use crate::error::ApiError;
use crate::pki::Identity;

const ANONYMOUS: &str = "system:anonymous";
const AUTHENTICATED: &str = "system:authenticated";
const UNAUTHENTICATED: &str = "system:unauthenticated";
/// Members may do everything.
const MASTERS: &str = "system:masters";

/// A client.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct User {
    pub(super) name: String,
    pub(super) groups: Vec<String>,
    /// Of a service account.
    pub(super) uid: String,
}

impl User {
    pub(super) fn is_master(&self) -> bool {
        self.in_group(MASTERS)
    }

    pub(super) fn in_group(&self, group: &str) -> bool {
        self.groups.iter().any(|own| own == group)
    }

    /// The name of the node whose agent this is.
    pub(super) fn node(&self) -> Option<&str> {
        self.name
            .strip_prefix("system:node:")
            .filter(|name| !name.is_empty() && self.in_group("system:nodes"))
    }

    fn authenticated(mut self) -> Self {
        if !self.in_group(AUTHENTICATED) {
            self.groups.push(AUTHENTICATED.to_owned());
        }
        self
    }

    fn anonymous() -> Self {
        Self {
            name: ANONYMOUS.to_owned(),
            groups: vec![UNAUTHENTICATED.to_owned()],
            uid: String::new(),
        }
    }
}

/// What a client asks for, in the words of roles.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Ask {
    /// Something about objects.
    Resource {
        verb: String,
        group: String,
        /// `plural` or `plural/subresource`.
        resource: String,
        namespace: String,
        name: String,
    },
    /// A path that is none of an object's.
    Path { verb: String, path: String },
}

impl Ask {
    /// What a request asks for.
    pub(super) fn of(method: &Method, params: &Params, route: &Route, path: &str) -> Self {
        let lower = || method.as_str().to_ascii_lowercase();
        let review = |group: &str, resource: &str| Self::Resource {
            verb: if *method == Method::POST {
                "create".to_owned()
            } else {
                lower()
            },
            group: group.to_owned(),
            resource: resource.to_owned(),
            namespace: String::new(),
            name: String::new(),
        };
        match route {
            Route::Objects(target) => match verb(method, params, target) {
                Some(verb) => Self::Resource {
                    verb: verb.to_owned(),
                    group: target.resource.group.to_owned(),
                    resource: target.qualified_resource(),
                    namespace: namespace(target),
                    name: target.name.clone().unwrap_or_else(|| selected_name(params)),
                },
                None => Self::Path {
                    verb: lower(),
                    path: path.to_owned(),
                },
            },
            Route::Review(kind) => review(kind.group(), kind.plural()),
            Route::Unknown => Self::of_unknown(method, params, path).unwrap_or_else(|| Self::Path {
                verb: lower(),
                path: path.to_owned(),
            }),
            _ => Self::Path {
                verb: lower(),
                path: path.to_owned(),
            },
        }
    }
}

impl Ask {
    /// What a path asks for that looks like an object's, of a kind that is not served (kube-apiserver `RequestInfoFactory`):
    /// who may see everything is told that there is no such thing, and who may not, that it may not.
    fn of_unknown(method: &Method, params: &Params, path: &str) -> Option<Self> {
        let segments: Vec<&str> = path.split('/').filter(|segment| !segment.is_empty()).collect();
        let (group, rest) = match segments.as_slice() {
            ["api", _, rest @ ..] => ("", rest),
            ["apis", group, _, rest @ ..] => (*group, rest),
            _ => return None,
        };
        let (namespace, rest) = match rest {
            ["namespaces", namespace, rest @ ..] if !rest.is_empty() => (*namespace, rest),
            rest => ("", rest),
        };
        let (plural, name, sub) = match rest {
            [] => return None,
            [plural] => (*plural, "", ""),
            [plural, name] => (*plural, *name, ""),
            [plural, name, sub, ..] => (*plural, *name, *sub),
        };
        let verb = match (method.as_str(), name.is_empty()) {
            ("GET" | "HEAD", _) if params.flag("watch") => "watch",
            ("GET" | "HEAD", true) => "list",
            ("GET" | "HEAD", false) => "get",
            ("POST", _) => "create",
            ("PUT", _) => "update",
            ("PATCH", _) => "patch",
            ("DELETE", true) => "deletecollection",
            ("DELETE", false) => "delete",
            _ => return None,
        };
        Some(Self::Resource {
            verb: verb.to_owned(),
            group: group.to_owned(),
            resource: if sub.is_empty() {
                plural.to_owned()
            } else {
                format!("{plural}/{sub}")
            },
            namespace: namespace.to_owned(),
            name: name.to_owned(),
        })
    }
}

/// The namespace as roles see it: that of a Namespace object is itself.
fn namespace(target: &Target) -> String {
    match (&target.name, target.resource.kind) {
        (Some(name), "Namespace") => name.clone(),
        _ => target.namespace.clone(),
    }
}

/// A list of one named object is about that object.
fn selected_name(params: &Params) -> String {
    params
        .get("fieldSelector")
        .strip_prefix("metadata.name=")
        .filter(|name| !name.contains([',', '=']))
        .unwrap_or_default()
        .to_owned()
}

impl Api {
    /// The client, by its certificate, else by its token, else nobody in particular.
    ///
    /// # Errors
    /// 401 for a token that is not known or not valid any more.
    pub(super) async fn authenticate(
        &self,
        certificate: Option<&Identity>,
        headers: &HeaderMap,
    ) -> Result<User, ApiError> {
        if let Some(identity) = certificate {
            let user = User {
                name: identity.user.clone(),
                groups: identity.groups.clone(),
                uid: String::new(),
            };
            return Ok(user.authenticated());
        }
        let Some(value) = headers.get(header::AUTHORIZATION) else {
            return Ok(User::anonymous());
        };
        let token = value
            .to_str()
            .ok()
            .and_then(|value| value.split_once(' '))
            .filter(|(scheme, _)| scheme.eq_ignore_ascii_case("bearer"))
            .map(|(_, token)| token.trim())
            .filter(|token| !token.is_empty())
            .ok_or_else(ApiError::unauthorized)?;
        self.of_token(token, &[tokens::ISSUER.to_owned()])
            .await?
            .map(User::authenticated)
            .ok_or_else(ApiError::unauthorized)
    }

    /// The user that a token stands for.
    pub(super) async fn of_token(&self, token: &str, audiences: &[String]) -> Result<Option<User>, ApiError> {
        if let Some((id, secret)) = bootstrap_token(token) {
            return self.bootstrap_user(id, secret).await;
        }
        self.service_account(token, audiences).await
    }

    /// The user of a bootstrap token: Secret `bootstrap-token-{id}` in `kube-system`.
    async fn bootstrap_user(&self, id: &str, secret: &str) -> Result<Option<User>, ApiError> {
        let secrets = write::collection("", "secrets", "kube-system")?;
        let Some(stored) = self.find(&secrets, &format!("bootstrap-token-{id}")).await? else {
            return Ok(None);
        };
        let object = codec::decode(secrets.resource, stored.revision, &stored.value)?;
        let field = |name: &str| crate::bootstrap_token::field(&object, name);
        let usable = object["type"] == crate::bootstrap_token::TYPE
            && object["metadata"]["deletionTimestamp"].is_null()
            && field("token-id").as_deref() == Some(id)
            && same(
                field("token-secret").unwrap_or_default().as_bytes(),
                secret.as_bytes(),
            )
            && field("usage-bootstrap-authentication").as_deref() == Some("true")
            && !crate::bootstrap_token::expired(&object, Timestamp::now());
        if !usable {
            return Ok(None);
        }
        let mut groups = vec!["system:bootstrappers".to_owned()];
        let more = field("auth-extra-groups").unwrap_or_default();
        let more = more
            .split(',')
            .filter(|group| group.starts_with("system:bootstrappers:"));
        groups.extend(more.map(str::to_owned));
        Ok(Some(User {
            name: format!("system:bootstrap:{id}"),
            groups,
            uid: String::new(),
        }))
    }

    /// The user to act as: another one, if the client asks for that and may.
    ///
    /// # Errors
    /// 403 if it may not.
    pub(super) async fn impersonate(&self, user: User, headers: &HeaderMap) -> Result<User, ApiError> {
        let text = |value: &header::HeaderValue| value.to_str().unwrap_or_default().to_owned();
        let groups: Vec<String> = headers.get_all("Impersonate-Group").iter().map(text).collect();
        let Some(name) = headers
            .get("Impersonate-User")
            .map(text)
            .filter(|name| !name.is_empty())
        else {
            if groups.is_empty() {
                return Ok(user);
            }
            return Err(ApiError::bad_request(
                "requested groups without impersonating a user",
            ));
        };
        let mut asks = Vec::new();
        let account = name
            .strip_prefix("system:serviceaccount:")
            .and_then(|rest| rest.split_once(':'));
        let ask = |resource: &str, namespace: &str, name: &str| Ask::Resource {
            verb: "impersonate".to_owned(),
            group: String::new(),
            resource: resource.to_owned(),
            namespace: namespace.to_owned(),
            name: name.to_owned(),
        };
        match account {
            Some((namespace, account)) => asks.push(ask("serviceaccounts", namespace, account)),
            None => asks.push(ask("users", "", &name)),
        }
        asks.extend(groups.iter().map(|group| ask("groups", "", group)));
        for ask in asks {
            if !self.allowed(&user, &ask).await? {
                return Err(forbidden(&user, &ask));
            }
        }
        let mut groups = groups;
        if let Some((namespace, _)) = account
            && groups.is_empty()
        {
            groups = tokens::groups(namespace);
        }
        let other = User {
            name,
            groups,
            uid: String::new(),
        };
        Ok(if other.name == ANONYMOUS {
            User::anonymous()
        } else {
            other.authenticated()
        })
    }

    /// Whether the user may do that.
    pub(super) async fn allowed(&self, user: &User, ask: &Ask) -> Result<bool, ApiError> {
        if user.is_master() {
            return Ok(true);
        }
        if let Some(node) = user.node()
            && self.node_may(node, ask).await?
        {
            return Ok(true);
        }
        self.role_allows(user, ask).await
    }
}

/// Compares without telling by the time that it takes where the difference is.
fn same(a: &[u8], b: &[u8]) -> bool {
    a.len() == b.len() && a.iter().zip(b).fold(0, |difference, (a, b)| difference | (a ^ b)) == 0
}

/// Id and secret of a token of the form `abcdef.0123456789abcdef`.
fn bootstrap_token(token: &str) -> Option<(&str, &str)> {
    let (id, secret) = token.split_once('.')?;
    let shaped = |text: &str, length: usize| {
        text.len() == length && text.bytes().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit())
    };
    (shaped(id, 6) && shaped(secret, 16)).then_some((id, secret))
}

/// The answer to a client that may not do what it asks for.
pub(super) fn forbidden(user: &User, ask: &Ask) -> ApiError {
    let user = &user.name;
    match ask {
        Ask::Path { verb, path } => ApiError {
            code: 403,
            reason: "Forbidden",
            message: format!("forbidden: User {user:?} cannot {verb} path {path:?}"),
            details: Some(json!({})),
        },
        Ask::Resource {
            verb,
            group,
            resource,
            namespace,
            name,
        } => {
            let plural = resource.split('/').next().unwrap_or_default();
            let scope = if namespace.is_empty() || plural == "namespaces" {
                "at the cluster scope".to_owned()
            } else {
                format!("in the namespace {namespace:?}")
            };
            let qualified = if group.is_empty() {
                plural.to_owned()
            } else {
                format!("{plural}.{group}")
            };
            let object = if name.is_empty() {
                qualified
            } else {
                format!("{qualified} {name:?}")
            };
            let mut details = json!({"kind": plural});
            if !name.is_empty() {
                details["name"] = name.as_str().into();
            }
            if !group.is_empty() {
                details["group"] = group.as_str().into();
            }
            ApiError {
                code: 403,
                reason: "Forbidden",
                message: format!(
                    "{object} is forbidden: User {user:?} cannot {verb} resource {resource:?} in API group {group:?} {scope}"
                ),
                details: Some(details),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_by_their_form() {
        assert_eq!(
            bootstrap_token("abcdef.0123456789abcdef"),
            Some(("abcdef", "0123456789abcdef"))
        );
        for other in [
            "abcdef.0123",
            "ABCDEF.0123456789abcdef",
            "a.b.c",
            "",
            "abcdef.0123456789abcdef.x",
        ] {
            assert_eq!(bootstrap_token(other), None);
        }
        assert!(same(b"ab", b"ab") && !same(b"ab", b"ac") && !same(b"ab", b"abc"));
    }
}
