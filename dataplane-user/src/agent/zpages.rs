//! `/statusz` and `/flagz`, as every Kubernetes component serves them (Kubernetes documentation, "z-pages"): text for
//! people, and JSON or YAML for those who ask for the versioned form.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::time::Instant;

use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use jiff::Timestamp;
use serde_json::{Value, json};

use super::metrics::BUILD;

/// Whom the pages are about: what asks for them knows kube-proxy.
const COMPONENT: &str = "kube-proxy";
/// API group of the versioned forms.
const GROUP: &str = "config.k8s.io";
const VERSIONS: [&str; 2] = ["v1alpha1", "v1beta1"];
const WARNING: &str = "Warning: This endpoint is not meant to be machine parseable, has no formatting compatibility guarantees and is for debugging purposes only.";

/// What the pages show.
#[derive(Debug)]
pub struct ZPages {
    started: Timestamp,
    since: Instant,
    flags: BTreeMap<String, String>,
}

/// The form of an answer.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Form {
    Text,
    Json(&'static str),
    Yaml(&'static str),
}

/// The form that is asked for first, of those there are. `kind`: name of the versioned form. Without any wish it is text.
fn negotiate(accept: &str, kind: &str) -> Option<Form> {
    let mut ranges: Vec<(f32, Vec<&str>)> = accept
        .split(',')
        .map(|range| {
            let parts: Vec<&str> = range.split(';').map(str::trim).collect();
            let quality = parts.iter().find_map(|part| part.strip_prefix("q="));
            (quality.and_then(|q| q.parse().ok()).unwrap_or(1.0), parts)
        })
        .filter(|(quality, parts)| *quality > 0.0 && parts.first().is_some_and(|kind| !kind.is_empty()))
        .collect();
    if accept.trim().is_empty() {
        return Some(Form::Text);
    }
    ranges.sort_by(|a, b| b.0.total_cmp(&a.0));
    ranges.into_iter().find_map(|(_, parts)| {
        let parameter = |name: &str| {
            parts
                .iter()
                .find_map(|part| part.strip_prefix(name)?.strip_prefix('='))
        };
        // all three, or it is not clear what is wanted
        let version = || {
            let named = parameter("g") == Some(GROUP) && parameter("as") == Some(kind);
            let asked = parameter("v").filter(|_| named)?;
            VERSIONS.into_iter().find(|version| *version == asked)
        };
        match *parts.first()? {
            "*/*" | "text/*" | "text/plain" => Some(Form::Text),
            "application/json" => version().map(Form::Json),
            "application/yaml" => version().map(Form::Yaml),
            _ => None,
        }
    })
}

impl ZPages {
    /// Of an agent that starts now with these flags.
    #[must_use]
    pub fn new(flags: BTreeMap<String, String>) -> Self {
        Self {
            started: Timestamp::now(),
            since: Instant::now(),
            flags,
        }
    }

    fn answer(
        request: &HeaderMap,
        kind: &str,
        text: impl FnOnce() -> String,
        fields: impl FnOnce() -> Value,
    ) -> Response {
        let accept: Vec<&str> = request
            .get_all(header::ACCEPT)
            .iter()
            .filter_map(|value| value.to_str().ok())
            .collect();
        let object = |version: &str| {
            let mut object = fields();
            object["kind"] = kind.into();
            object["apiVersion"] = format!("{GROUP}/{version}").into();
            object["metadata"] = json!({"name": COMPONENT});
            object
        };
        let (media, body) = match negotiate(&accept.join(","), kind) {
            Some(Form::Text) => ("text/plain; charset=utf-8", text()),
            Some(Form::Json(version)) => ("application/json", object(version).to_string()),
            Some(Form::Yaml(version)) => match serde_saphyr::to_string(&object(version)) {
                Ok(body) => ("application/yaml", body),
                Err(error) => return (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()).into_response(),
            },
            None => {
                let known =
                    VERSIONS.map(|version| format!("application/json;v={version};g={GROUP};as={kind}"));
                let body = format!(
                    "only text/plain, {}, and the same as application/yaml\n",
                    known.join(", ")
                );
                return (StatusCode::NOT_ACCEPTABLE, body).into_response();
            }
        };
        let headers = [
            (header::CONTENT_TYPE, media),
            (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
            (header::VARY, "Accept"),
        ];
        (headers, body).into_response()
    }

    /// `/statusz`; `paths` are what the server serves.
    pub(super) fn statusz(&self, request: &HeaderMap, paths: &[&str]) -> Response {
        let up = self.since.elapsed().as_secs();
        let rustc = concat!("rustc ", env!("CARGO_PKG_RUST_VERSION"));
        let binary = BUILD.git_version.trim_start_matches('v');
        let emulated = format!("{}.{}", BUILD.major, BUILD.minor);
        let text = || {
            let started = self
                .started
                .to_zoned(jiff::tz::TimeZone::UTC)
                .strftime("%a %b %e %H:%M:%S UTC %Y");
            let (hours, minutes, seconds) = (up / 3600, up / 60 % 60, up % 60);
            format!(
                "{COMPONENT} statusz\n{WARNING}\n\nStarted: {started}\nUp: {hours} hr {minutes:02} min {seconds:02} sec\n\
                 Go version: none, {rustc}\nBinary version: {binary}\nEmulation version: {emulated}\nPaths: {}\n",
                paths.join(" ")
            )
        };
        let fields = || {
            json!({
                // whole seconds, as times in Kubernetes' objects are
                "startTime": self.started.strftime("%Y-%m-%dT%H:%M:%SZ").to_string(),
                "uptimeSeconds": up,
                "goVersion": format!("none, {rustc}"),
                "binaryVersion": binary,
                "emulationVersion": emulated,
                "paths": paths,
            })
        };
        Self::answer(request, "Statusz", text, fields)
    }

    /// `/flagz`: the flags that have a value.
    pub(super) fn flagz(&self, request: &HeaderMap) -> Response {
        let text = || {
            let mut text = format!("{COMPONENT} flagz\n{WARNING}\n\n");
            for (name, value) in &self.flags {
                // writing to a String does not fail
                let _: std::fmt::Result = writeln!(text, "{name}={value}");
            }
            text
        };
        Self::answer(request, "Flagz", text, || json!({"flags": self.flags}))
    }
}

#[cfg(test)]
mod tests {
    use http_body_util::BodyExt as _;

    use super::*;

    #[test]
    fn the_form_is_negotiated() {
        let json = "application/json;v=v1alpha1;g=config.k8s.io;as=Statusz";
        for (accept, expected) in [
            ("", Some(Form::Text)),
            ("*/*", Some(Form::Text)),
            ("text/html, */*;q=0.8", Some(Form::Text)),
            ("text/plain;version=0.0.4", Some(Form::Text)),
            (json, Some(Form::Json("v1alpha1"))),
            (
                "application/json; v=v1beta1; g=config.k8s.io; as=Statusz",
                Some(Form::Json("v1beta1")),
            ),
            (
                "application/yaml;v=v1beta1;g=config.k8s.io;as=Statusz",
                Some(Form::Yaml("v1beta1")),
            ),
            (&format!("text/plain;q=0.5,{json}"), Some(Form::Json("v1alpha1"))),
            (&format!("{json};q=0.1,text/plain"), Some(Form::Text)),
            (
                "application/json;v=v1;g=config.k8s.io;as=Statusz, text/plain",
                Some(Form::Text),
            ),
            // which of the forms it is must be said in full
            ("application/json", None),
            ("application/json;v=v1alpha1;g=config.k8s.io;as=Flagz", None),
            ("application/json;v=v2;g=config.k8s.io;as=Statusz", None),
            ("application/json;v=v1alpha1;g=apps;as=Statusz", None),
            ("text/html", None),
            ("text/plain;q=0", None),
        ] {
            assert_eq!(negotiate(accept, "Statusz"), expected, "{accept}");
        }
    }

    fn pages() -> ZPages {
        ZPages {
            started: "2026-01-02T03:04:05.6Z".parse().unwrap(),
            since: Instant::now(),
            flags: [("v", "2"), ("conntrack-min", "7")]
                .map(|(name, value)| (name.into(), value.into()))
                .into(),
        }
    }

    async fn read(response: Response) -> (u16, String, String) {
        let kind = response.headers()[header::CONTENT_TYPE]
            .to_str()
            .unwrap()
            .to_owned();
        let status = response.status().as_u16();
        let body = response.into_body().collect().await.unwrap().to_bytes();
        (status, kind, String::from_utf8(body.to_vec()).unwrap())
    }

    fn accept(value: &'static str) -> HeaderMap {
        HeaderMap::from_iter([(header::ACCEPT, header::HeaderValue::from_static(value))])
    }

    #[tokio::test]
    async fn pages_are_for_people_unless_asked_otherwise() {
        let (status, kind, body) = read(pages().statusz(&HeaderMap::new(), &["/a", "/b"])).await;
        assert_eq!((status, kind.as_str()), (200, "text/plain; charset=utf-8"));
        assert!(body.starts_with("kube-proxy statusz\nWarning: "), "{body}");
        for line in [
            "Started: Fri Jan  2 03:04:05 UTC 2026",
            "Up: 0 hr 00 min 00 sec",
            "Emulation version: 1.36",
            "Paths: /a /b",
        ] {
            assert!(body.lines().any(|l| l == line), "{line} is not in {body}");
        }
        let (_, _, body) = read(pages().flagz(&HeaderMap::new())).await;
        assert!(body.ends_with("\n\nconntrack-min=7\nv=2\n"), "{body}");
    }

    #[tokio::test]
    async fn the_versioned_forms_are_objects() {
        let asked = accept("application/json;v=v1beta1;g=config.k8s.io;as=Statusz");
        let (_, kind, body) = read(pages().statusz(&asked, &["/a"])).await;
        assert_eq!(kind, "application/json");
        let found: Value = serde_json::from_str(&body).unwrap();
        assert_eq!(
            found,
            json!({"kind": "Statusz", "apiVersion": "config.k8s.io/v1beta1", "metadata": {"name": "kube-proxy"},
                "startTime": "2026-01-02T03:04:05Z", "uptimeSeconds": 0, "goVersion": found["goVersion"],
                "binaryVersion": concat!("1.36.0+beeline-", env!("CARGO_PKG_VERSION")), "emulationVersion": "1.36", "paths": ["/a"]})
        );
        let asked = accept("application/yaml;v=v1alpha1;g=config.k8s.io;as=Flagz");
        let (_, kind, body) = read(pages().flagz(&asked)).await;
        assert_eq!(kind, "application/yaml");
        let found: Value = serde_saphyr::from_str(&body).unwrap();
        assert_eq!(
            found,
            json!({"kind": "Flagz", "apiVersion": "config.k8s.io/v1alpha1", "metadata": {"name": "kube-proxy"},
                "flags": {"conntrack-min": "7", "v": "2"}})
        );
        let (status, _, body) = read(pages().flagz(&accept("application/json"))).await;
        assert_eq!(status, 406);
        assert!(
            body.contains("application/json;v=v1beta1;g=config.k8s.io;as=Flagz"),
            "{body}"
        );
    }
}
