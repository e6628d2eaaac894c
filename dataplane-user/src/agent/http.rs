//! The servers: health, metrics, and the local socket of the command line.

use std::net::SocketAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use axum::Router;
use axum::extract::{RawQuery, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{any, get, put};
use hyper_util::service::TowerToHyperService;
use jiff::Timestamp;
use serde_json::Value;
use tokio::net::{TcpListener, UnixListener};
use tokio::sync::{mpsc, oneshot};
use tracing::{info, warn};

use super::metrics::{CodeLabel, older_text};
use super::slis::Slis;
use super::state::Shared;
use super::view::{Services, Status};
use super::zpages::ZPages;
use crate::config::LogControl;
use crate::overlay::view::Reader;
use crate::serve;

/// Pause before a bind is tried again, kube-proxy's.
const BIND_PAUSE: Duration = Duration::from_secs(5);

/// What the command line asks the loop.
#[derive(Debug)]
pub enum Request {
    /// `beeline service list`.
    Services(oneshot::Sender<Services>),
    /// `beeline status`.
    Status(oneshot::Sender<Status>),
}

/// Reads the programs' counters.
pub type Counters = Arc<dyn Fn() -> Vec<(&'static str, u64)> + Send + Sync>;

/// What the handlers need.
#[derive(Clone)]
pub struct Context {
    /// Shared with the loop.
    pub shared: Arc<Shared>,
    /// The programs' counters.
    pub counters: Counters,
    /// Effective configuration.
    pub config: Arc<Value>,
    /// Lets clients change the verbosity; `None` does not.
    pub verbosity: Option<LogControl>,
    /// `/statusz` and `/flagz`.
    pub pages: Arc<ZPages>,
    /// How the metrics server's health checks ended.
    pub slis: Arc<Slis>,
    /// To the loop.
    pub requests: mpsc::Sender<Request>,
    /// The pod network, once it runs.
    pub nodes: Arc<OnceLock<Reader>>,
}

fn health(context: &Context, with_node: bool) -> Response {
    let (ok, body) = context
        .shared
        .health()
        .answer(with_node, Instant::now(), Timestamp::now());
    let status = if ok {
        StatusCode::OK
    } else {
        StatusCode::SERVICE_UNAVAILABLE
    };
    let metrics = &context.shared.metrics;
    let answers = if with_node {
        &metrics.healthz
    } else {
        &metrics.livez
    };
    answers
        .get_or_create(&CodeLabel {
            code: status.as_u16().into(),
        })
        .inc();
    json(status, &serde_json::to_string(&body).unwrap_or_default())
}

fn json(status: StatusCode, body: &str) -> Response {
    let headers = [
        (header::CONTENT_TYPE, "application/json"),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
    ];
    (status, headers, body.to_owned()).into_response()
}

/// Port 10256: `/healthz` and `/livez`, any method.
pub fn health_router(context: Context) -> Router {
    Router::new()
        .route(
            "/healthz",
            any(|State(context): State<Context>| async move { health(&context, true) }),
        )
        .route(
            "/livez",
            any(|State(context): State<Context>| async move { health(&context, false) }),
        )
        .with_state(context)
}

fn plain(body: &'static str) -> Response {
    let headers = [
        (header::CONTENT_TYPE, "text/plain; charset=utf-8"),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
    ];
    (headers, body).into_response()
}

/// Metrics in the format that the client asks for; without a wish in the one that every client understands.
fn exposition(request: &HeaderMap, open_metrics: String) -> Response {
    let accepted = request.get_all(header::ACCEPT).iter();
    let asked = accepted
        .filter_map(|value| value.to_str().ok())
        .any(|value| value.contains("application/openmetrics-text"));
    let (kind, text) = if asked {
        (
            "application/openmetrics-text; version=1.0.0; charset=utf-8",
            open_metrics,
        )
    } else {
        (
            "text/plain; version=0.0.4; charset=utf-8",
            older_text(&open_metrics),
        )
    };
    ([(header::CONTENT_TYPE, kind)], text).into_response()
}

/// What the metrics server serves, as `/statusz` lists it.
const METRICS_PATHS: [&str; 8] = [
    "/configz",
    "/flagz",
    "/healthz",
    "/healthz/ping",
    "/metrics",
    "/metrics/slis",
    "/proxyMode",
    "/statusz",
];

/// The metrics server's own health, which says only that it answers.
fn ping(context: &Context, query: &str) -> Response {
    context.slis.checked("ping", "healthz", true);
    let verbose = query
        .split('&')
        .any(|part| part == "verbose" || part.starts_with("verbose="));
    plain(if verbose {
        "[+]ping ok\nhealthz check passed\n"
    } else {
        "ok"
    })
}

fn set_verbosity(control: &LogControl, body: &str) -> Response {
    let set = body
        .trim()
        .parse()
        .map_err(|_| format!("{:?} is no verbosity", body.trim()))
        .and_then(|verbosity| control.set_verbosity(verbosity).map(|()| verbosity));
    match set {
        Ok(verbosity) => {
            info!(verbosity, "what is logged has been changed");
            format!("successfully set klog.logging.verbosity to {verbosity}\n").into_response()
        }
        Err(error) => (StatusCode::BAD_REQUEST, format!("{error}\n")).into_response(),
    }
}

/// Port 10249: metrics and what describes the proxy.
pub fn metrics_router(context: Context) -> Router {
    let metrics = |State(context): State<Context>, headers: HeaderMap| async move {
        let text = context.shared.metrics.text(&(context.counters)());
        exposition(&headers, text)
    };
    let slis = |State(context): State<Context>, headers: HeaderMap| async move {
        exposition(&headers, context.slis.text())
    };
    let configz =
        |State(context): State<Context>| async move { json(StatusCode::OK, &context.config.to_string()) };
    let statusz = |State(context): State<Context>, headers: HeaderMap| async move {
        context.pages.statusz(&headers, &METRICS_PATHS)
    };
    let flagz =
        |State(context): State<Context>, headers: HeaderMap| async move { context.pages.flagz(&headers) };
    let healthz = |State(context): State<Context>, RawQuery(query): RawQuery| async move {
        ping(&context, &query.unwrap_or_default())
    };
    let debug = match context.verbosity.clone() {
        Some(control) => Router::new().route(
            "/debug/flags/v",
            put(move |body: String| async move { set_verbosity(&control, &body) }),
        ),
        None => Router::new(),
    };
    Router::new()
        .merge(debug)
        .route("/metrics", get(metrics))
        .route("/metrics/slis", get(slis))
        .route("/proxyMode", get(|| async { plain("ebpf") }))
        .route("/healthz", get(healthz))
        .route("/healthz/ping", get(|| async { plain("ok") }))
        .route("/configz", get(configz))
        .route("/statusz", get(statusz))
        .route("/flagz", get(flagz))
        .with_state(context)
}

async fn ask<T>(context: &Context, request: impl FnOnce(oneshot::Sender<T>) -> Request) -> Response
where
    T: serde::Serialize,
{
    let (sender, receiver) = oneshot::channel();
    let answer = match context.requests.send(request(sender)).await {
        Ok(()) => receiver.await.ok(),
        Err(_) => None,
    };
    match answer.map(|answer| serde_json::to_string(&answer)) {
        Some(Ok(body)) => json(StatusCode::OK, &body),
        _ => json(
            StatusCode::SERVICE_UNAVAILABLE,
            r#"{"error":"the agent is stopping"}"#,
        ),
    }
}

/// The local socket.
pub fn admin_router(context: Context) -> Router {
    let services = |State(context): State<Context>| async move { ask(&context, Request::Services).await };
    let status = |State(context): State<Context>| async move { ask(&context, Request::Status).await };
    let nodes = |State(context): State<Context>| async move {
        match context.nodes.get() {
            Some(reader) => axum::Json(reader.read()).into_response(),
            None => {
                let why = "the pod network is somebody else's business (--net-config-path)";
                (StatusCode::NOT_FOUND, why).into_response()
            }
        }
    };
    Router::new()
        .route("/nodes", get(nodes))
        .route("/services", get(services))
        .route("/status", get(status))
        .with_state(context)
}

/// Listens; `0.0.0.0` also means `[::]` where the host has IPv6.
fn bind(addr: SocketAddr) -> std::io::Result<TcpListener> {
    let any_v6 = SocketAddr::from((std::net::Ipv6Addr::UNSPECIFIED, addr.port()));
    let both = addr.is_ipv4() && addr.ip().is_unspecified();
    if both && let Ok(listener) = serve::listen(any_v6, Some(false)) {
        return Ok(listener);
    }
    serve::listen(addr, None)
}

/// Serves at an address for ever; what is in the way of binding may go away.
///
/// # Errors
///
/// If it cannot listen there and `hard_fail` says that this is fatal.
pub async fn serve(
    name: &'static str,
    addr: SocketAddr,
    router: Router,
    hard_fail: bool,
) -> std::io::Result<()> {
    let mut said = false;
    let listener = loop {
        match bind(addr) {
            Ok(listener) => break listener,
            Err(error) if hard_fail => return Err(error),
            Err(error) => {
                if !said {
                    warn!(%addr, %error, "{name} server cannot listen, trying again every {} s", BIND_PAUSE.as_secs());
                    said = true;
                }
                tokio::time::sleep(BIND_PAUSE).await;
            }
        }
    };
    info!(%addr, "{name} server listens");
    serve::http1(listener, TowerToHyperService::new(router)).await;
    Ok(())
}

/// Makes the local socket; only its owner may use it. The caller holds the state directory's lock, so what is there is left
/// from an earlier agent.
///
/// # Errors
///
/// If it cannot be made.
pub fn bind_socket(path: &Path) -> std::io::Result<UnixListener> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = UnixListener::bind(path)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
    Ok(listener)
}

#[cfg(test)]
mod tests {
    use axum::body::Body;
    use axum::http::Request as HttpRequest;
    use http_body_util::BodyExt as _;

    use super::super::health::Health;
    use super::*;

    fn context(health: Health) -> Context {
        let (requests, _) = mpsc::channel(1);
        Context {
            shared: Shared::new(health),
            counters: Arc::new(Vec::new),
            config: Arc::new(serde_json::json!({"kubeproxy.config.k8s.io": {"mode": "ebpf"}})),
            verbosity: None,
            pages: Arc::new(ZPages::new([("v".into(), "2".into())].into())),
            slis: Arc::default(),
            requests,
            nodes: Arc::default(),
        }
    }

    /// Status, body.
    async fn put_text(router: &Router, uri: &str, text: &'static str) -> (u16, String) {
        use hyper::service::Service as _;
        let request = HttpRequest::builder()
            .method("PUT")
            .uri(uri)
            .body(Body::from(text));
        let service = TowerToHyperService::new(router.clone());
        let (head, body) = service.call(request.unwrap()).await.unwrap().into_parts();
        let body = body.collect().await.unwrap().to_bytes();
        (head.status.as_u16(), String::from_utf8(body.to_vec()).unwrap())
    }

    /// Status, headers, body.
    async fn ask(router: &Router, method: &str, uri: &str) -> (u16, HeaderMap, String) {
        use hyper::service::Service as _;
        let request = HttpRequest::builder().method(method).uri(uri).body(Body::empty());
        let service = TowerToHyperService::new(router.clone());
        let (head, body) = service.call(request.unwrap()).await.unwrap().into_parts();
        let body = body.collect().await.unwrap().to_bytes();
        (
            head.status.as_u16(),
            head.headers,
            String::from_utf8(body.to_vec()).unwrap(),
        )
    }

    #[tokio::test]
    async fn the_health_server_answers_as_kube_proxys() {
        let context = context(Health::new(false, Duration::from_secs(30)));
        let router = health_router(context.clone());
        for (method, uri, status) in [
            ("GET", "/healthz", 503),
            ("POST", "/healthz", 503),
            ("GET", "/livez", 200),
            ("DELETE", "/livez?x=1", 200),
            ("GET", "/", 404),
            ("GET", "/healthz/", 404),
            ("GET", "/metrics", 404),
        ] {
            let (got, headers, body) = ask(&router, method, uri).await;
            assert_eq!(got, status, "{method} {uri}");
            if status == 404 {
                continue;
            }
            assert_eq!(headers["content-type"], "application/json", "{method} {uri}");
            assert_eq!(headers["x-content-type-options"], "nosniff", "{method} {uri}");
            assert!(
                body.starts_with(r#"{"lastUpdated":""#) && body.ends_with('}'),
                "{body}"
            );
            assert_eq!(body.contains("nodeEligible"), uri == "/healthz", "{body}");
        }
        let text = context.shared.metrics.text(&[]);
        assert!(
            text.contains("kubeproxy_proxy_healthz_total{code=\"503\"} 2"),
            "{text}"
        );
        assert!(
            text.contains("kubeproxy_proxy_livez_total{code=\"200\"} 2"),
            "{text}"
        );
    }

    #[tokio::test]
    async fn the_metrics_server_answers_at_every_path_that_it_lists() {
        let router = metrics_router(context(Health::for_tests()));
        for path in METRICS_PATHS {
            assert_eq!(ask(&router, "GET", path).await.0, 200, "{path}");
        }
        assert_eq!(ask(&router, "GET", "/debug/pprof/").await.0, 404);
        let (_, _, status) = ask(&router, "GET", "/statusz").await;
        assert!(status.contains("/metrics/slis"), "{status}");
        let (_, _, flags) = ask(&router, "GET", "/flagz").await;
        assert!(flags.ends_with("\nv=2\n"), "{flags}");
        let (_, _, verbose) = ask(&router, "GET", "/healthz?verbose").await;
        assert_eq!(verbose, "[+]ping ok\nhealthz check passed\n");
        let (_, headers, slis) = ask(&router, "GET", "/metrics/slis").await;
        assert!(
            headers["content-type"]
                .to_str()
                .unwrap()
                .starts_with("text/plain; version=0.0.4")
        );
        let series = "kubernetes_healthchecks_total{name=\"ping\",status=\"success\",type=\"healthz\"} 2";
        assert!(slis.lines().any(|line| line == series), "{slis}");
    }

    #[tokio::test]
    async fn the_verbosity_is_changed_if_that_is_allowed() {
        use std::sync::Mutex;
        let filters = Arc::new(Mutex::new(Vec::new()));
        let seen = Arc::clone(&filters);
        let control = LogControl::new(move |filter| {
            seen.lock().unwrap().push(filter.to_owned());
            Ok(())
        });
        let closed = metrics_router(context(Health::for_tests()));
        assert_eq!(put_text(&closed, "/debug/flags/v", "4").await.0, 404);
        let open = metrics_router(Context {
            verbosity: Some(control),
            ..context(Health::for_tests())
        });
        let (status, body) = put_text(&open, "/debug/flags/v", "4\n").await;
        assert_eq!(
            (status, &*body),
            (200, "successfully set klog.logging.verbosity to 4\n")
        );
        assert_eq!(put_text(&open, "/debug/flags/v", "9").await.0, 200);
        assert_eq!(put_text(&open, "/debug/flags/v", "loud").await.0, 400);
        assert_eq!(ask(&open, "GET", "/debug/flags/v").await.0, 405);
        assert_eq!(*filters.lock().unwrap(), ["debug", "trace"]);
    }

    #[tokio::test]
    async fn an_address_in_use_is_fatal_if_so_configured() {
        let taken = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = taken.local_addr().unwrap();
        let error = serve("test", addr, Router::new(), true).await.unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::AddrInUse);
        let patient = serve("test", addr, Router::new(), false);
        let waited = tokio::time::timeout(Duration::from_millis(50), patient).await;
        assert!(waited.is_err(), "{waited:?}");
    }

    #[tokio::test]
    async fn metrics_come_in_the_format_that_is_asked_for() {
        let router = metrics_router(context(Health::for_tests()));
        let (_, headers, body) = ask(&router, "GET", "/metrics").await;
        assert_eq!(
            headers["content-type"],
            "text/plain; version=0.0.4; charset=utf-8"
        );
        assert!(
            body.contains("# TYPE kubeproxy_proxy_healthz_total counter\n"),
            "{body}"
        );
        let mut request = HeaderMap::new();
        let accept = "application/openmetrics-text;version=1.0.0;q=0.5,text/plain;q=0.2";
        request.insert(header::ACCEPT, accept.parse().unwrap());
        let response = exposition(&request, "# EOF\n".into());
        assert!(
            response.headers()["content-type"]
                .to_str()
                .unwrap()
                .starts_with("application/openmetrics-text")
        );
    }
}
