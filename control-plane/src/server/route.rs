//! From a path to what it names.

use percent_encoding::percent_decode_str;

use super::reviews::Review;
use crate::resource::{self, ResourceInfo};

/// What a path names.
#[derive(Debug, Clone)]
pub(super) enum Route {
    /// `/healthz`, `/livez`, `/readyz`, with the check's name below it, if any.
    Health(&'static str, Option<String>),
    /// `/version`
    Version,
    /// `/api`
    Api,
    /// `/apis`
    Apis,
    /// `/apis/{group}`
    Group(String),
    /// `/api/v1` or `/apis/{group}/{version}`
    Resources(String, String),
    /// `/openapi/v2`
    OpenApiV2,
    /// `/openapi/v3`
    OpenApiIndex,
    /// `/openapi/v3/…`
    OpenApi(String),
    /// `/apis/authorization.k8s.io/v1/selfsubjectaccessreviews` and others of that kind.
    Review(Review),
    /// Objects.
    Objects(Target),
    /// Everything that is stored, for a backup.
    Backup,
    /// Anything else.
    Unknown,
}

/// A collection, an object in it, or a subresource of that.
#[derive(Debug, Clone)]
pub(super) struct Target {
    pub(super) resource: &'static ResourceInfo,
    /// Empty for cluster-scoped kinds and for "all namespaces".
    pub(super) namespace: String,
    pub(super) name: Option<String>,
    pub(super) subresource: Option<String>,
}

impl Target {
    /// The collection that an object of `resource` in `namespace` is in.
    pub(super) fn collection(resource: &'static ResourceInfo, namespace: &str) -> Self {
        Self {
            resource,
            namespace: namespace.to_owned(),
            name: None,
            subresource: None,
        }
    }

    /// What all keys of the collection start with.
    pub(super) fn prefix(&self) -> String {
        prefix(self.resource, &self.namespace)
    }

    /// The key of the object of that name.
    pub(super) fn key(&self, name: &str) -> String {
        format!("{}{name}", self.prefix())
    }

    /// `plural` or `plural/subresource`, as access checks name it.
    pub(super) fn qualified_resource(&self) -> String {
        match &self.subresource {
            Some(subresource) => format!("{}/{subresource}", self.resource.plural),
            None => self.resource.plural.to_owned(),
        }
    }
}

/// What all keys of `resource` in `namespace` (all of them if empty) start with.
pub(super) fn prefix(resource: &ResourceInfo, namespace: &str) -> String {
    let group = if resource.group.is_empty() {
        "core"
    } else {
        resource.group
    };
    if namespace.is_empty() {
        format!("/registry/{group}/{}/", resource.plural)
    } else {
        format!("/registry/{group}/{}/{namespace}/", resource.plural)
    }
}

pub(super) fn parse(path: &str) -> Route {
    let mut segments = Vec::new();
    for segment in path.trim_end_matches('/').split('/').skip(1) {
        match percent_decode_str(segment).decode_utf8() {
            // A decoded slash could name another object's key.
            Ok(segment) if !segment.is_empty() && !segment.contains('/') => {
                segments.push(segment.into_owned());
            }
            _ => return Route::Unknown,
        }
    }
    let segments: Vec<&str> = segments.iter().map(String::as_str).collect();
    match segments.as_slice() {
        ["healthz", rest @ ..] => health("healthz", rest),
        ["livez", rest @ ..] => health("livez", rest),
        ["readyz", rest @ ..] => health("readyz", rest),
        ["version"] => Route::Version,
        ["beeline", "backup"] => Route::Backup,
        ["openapi", "v2"] => Route::OpenApiV2,
        ["openapi", "v3"] => Route::OpenApiIndex,
        ["openapi", "v3", rest @ ..] => Route::OpenApi(rest.join("/")),
        ["api"] => Route::Api,
        ["apis"] => Route::Apis,
        ["apis", group] => Route::Group((*group).to_owned()),
        ["api", version] => Route::Resources(String::new(), (*version).to_owned()),
        ["apis", group, version] => Route::Resources((*group).to_owned(), (*version).to_owned()),
        ["api", version, rest @ ..] => objects("", version, rest),
        ["apis", group, version, rest @ ..] => match rest {
            [plural] if *version == "v1" && review(group, plural).is_some() => {
                review(group, plural).map_or(Route::Unknown, Route::Review)
            }
            _ => objects(group, version, rest),
        },
        _ => Route::Unknown,
    }
}

fn review(group: &str, plural: &str) -> Option<Review> {
    Review::ALL
        .into_iter()
        .find(|review| review.group() == group && review.plural() == plural)
}

fn health(which: &'static str, rest: &[&str]) -> Route {
    match rest {
        [] => Route::Health(which, None),
        [check] => Route::Health(which, Some((*check).to_owned())),
        _ => Route::Unknown,
    }
}

fn objects(group: &str, version: &str, rest: &[&str]) -> Route {
    // `namespaces/{name}/status` and `/finalize` are subresources of the namespace; other words name a resource in it.
    let in_namespace = match rest {
        ["namespaces", _, "status" | "finalize"] => false,
        ["namespaces", _, _, ..] => true,
        _ => false,
    };
    let (namespace, rest) = if in_namespace {
        (rest[1], &rest[2..])
    } else {
        ("", rest)
    };
    let (plural, name, subresource) = match rest {
        [plural] => (plural, None, None),
        [plural, name] => (plural, Some(name), None),
        [plural, name, subresource] => (plural, Some(name), Some(subresource)),
        _ => return Route::Unknown,
    };
    let Some(resource) = resource::find(group, version, plural) else {
        return Route::Unknown;
    };
    if in_namespace && !resource.namespaced || resource.namespaced && !in_namespace && name.is_some() {
        return Route::Unknown;
    }
    if subresource.is_some_and(|subresource| resource.subresource(subresource).is_none()) {
        return Route::Unknown;
    }
    let owned = |text: &&str| (*text).to_owned();
    Route::Objects(Target {
        resource,
        namespace: namespace.to_owned(),
        name: name.map(owned),
        subresource: subresource.map(owned),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn target(path: &str) -> (String, Option<String>, Option<String>) {
        match parse(path) {
            Route::Objects(target) => (target.prefix(), target.name, target.subresource),
            other => panic!("{path}: {other:?}"),
        }
    }

    #[test]
    fn paths_of_objects() {
        let name = |name: &str| Some(name.to_owned());
        assert_eq!(
            target("/api/v1/services"),
            ("/registry/core/services/".into(), None, None)
        );
        assert_eq!(
            target("/api/v1/namespaces/demo/services/web/status"),
            (
                "/registry/core/services/demo/".into(),
                name("web"),
                name("status")
            )
        );
        assert_eq!(
            target("/api/v1/namespaces/demo"),
            ("/registry/core/namespaces/".into(), name("demo"), None)
        );
        assert_eq!(
            target("/api/v1/namespaces/demo/finalize"),
            (
                "/registry/core/namespaces/".into(),
                name("demo"),
                name("finalize")
            )
        );
        assert_eq!(
            target("/apis/discovery.k8s.io/v1/namespaces/demo/endpointslices/a"),
            (
                "/registry/discovery.k8s.io/endpointslices/demo/".into(),
                name("a"),
                None
            )
        );
    }

    #[test]
    fn paths_of_nothing() {
        for path in [
            "/api/v1/foos",
            "/api/v2/services",
            "/apis/discovery.k8s.io/v1/services",
            "/api/v1/services/web",
            "/api/v1/namespaces/demo/nodes",
            "/api/v1/namespaces/demo/services/web/scale",
            "/api/v1/namespaces/demo/services/a%2Fb",
            "/api/v1/namespaces//services",
            "/api/v1/namespaces/demo/services/web/status/x",
            "/",
            "",
        ] {
            assert!(matches!(parse(path), Route::Unknown), "{path}");
        }
    }
}
