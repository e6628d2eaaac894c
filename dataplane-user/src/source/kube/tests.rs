//! Against an API in this process that says what each test wants.

use std::collections::{BTreeMap, HashMap};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

use axum::Router;
use axum::body::Body;
use axum::extract::{Query, Request, State};
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use futures::channel::mpsc::{UnboundedReceiver, UnboundedSender, unbounded};
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::service::TowerToHyperService;
use serde_json::{Value, json};
use tokio::net::{TcpListener, TcpSocket};
use tokio::sync::mpsc;
use tokio::task::{JoinHandle, JoinSet};

use super::*;

/// Longest wait for something that should happen.
const PATIENCE: Duration = Duration::from_secs(20);

/// A watch that a client has begun.
struct Watch {
    query: HashMap<String, String>,
    events: UnboundedSender<Result<String, std::io::Error>>,
}

impl Watch {
    fn send(&self, kind: &str, object: &Value) {
        let line = format!("{}\n", json!({"type": kind, "object": object}));
        self.events.unbounded_send(Ok(line)).unwrap();
    }
}

/// By the last part of the path: resource version and items.
type Lists = BTreeMap<String, (u32, Vec<Value>)>;

#[derive(Clone, Default)]
struct Content {
    lists: Arc<Mutex<Lists>>,
    watches: Arc<Mutex<HashMap<String, UnboundedSender<Watch>>>>,
}

async fn answer(
    State(content): State<Content>,
    Query(query): Query<HashMap<String, String>>,
    request: Request,
) -> Response {
    let resource = request.uri().path().rsplit('/').next().unwrap().to_owned();
    if resource == "servicecidrs" && !content.lists.lock().unwrap().contains_key(&resource) {
        return StatusCode::NOT_FOUND.into_response();
    }
    if query.get("watch").is_some_and(|value| value == "true") {
        let (events, lines) = unbounded();
        let watches = content.watches.lock().unwrap();
        let _unheard = watches[&resource].unbounded_send(Watch { query, events });
        return Body::from_stream(lines).into_response();
    }
    let lists = content.lists.lock().unwrap();
    let (version, items) = lists.get(&resource).cloned().unwrap_or((1, Vec::new()));
    let from: usize = query.get("continue").map_or(0, |text| text.parse().unwrap());
    let limit: usize = query
        .get("limit")
        .map_or(items.len(), |text| text.parse().unwrap());
    let to = (from + limit).min(items.len());
    let mut metadata = json!({"resourceVersion": version.to_string()});
    if to < items.len() {
        metadata["continue"] = json!(to.to_string());
    }
    axum::Json(json!({"kind": "List", "apiVersion": "v1", "metadata": metadata, "items": items[from..to]}))
        .into_response()
}

struct Api {
    content: Content,
    addr: SocketAddr,
    server: JoinHandle<()>,
    watches: HashMap<&'static str, UnboundedReceiver<Watch>>,
}

impl Api {
    fn start() -> Self {
        let content = Content::default();
        let watches = ["services", "endpointslices", "nodes", "servicecidrs"]
            .into_iter()
            .map(|resource| {
                let (sender, receiver) = unbounded();
                content.watches.lock().unwrap().insert(resource.into(), sender);
                (resource, receiver)
            })
            .collect();
        let (addr, server) = Self::serve(&content, SocketAddr::from(([127, 0, 0, 1], 0)));
        Self {
            content,
            addr,
            server,
            watches,
        }
    }

    fn serve(content: &Content, addr: SocketAddr) -> (SocketAddr, JoinHandle<()>) {
        let socket = TcpSocket::new_v4().unwrap();
        socket.set_reuseaddr(true).unwrap();
        socket.bind(addr).unwrap();
        let listener: TcpListener = socket.listen(16).unwrap();
        let addr = listener.local_addr().unwrap();
        let router = Router::new().fallback(answer).with_state(content.clone());
        let server = tokio::spawn(async move {
            // dropped with the task: connections end with the server
            let mut connections = JoinSet::new();
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                let service = TowerToHyperService::new(router.clone());
                connections.spawn(async move {
                    let builder = hyper_util::server::conn::auto::Builder::new(TokioExecutor::new());
                    let _ended = builder.serve_connection(TokioIo::new(stream), service).await;
                });
            }
        });
        (addr, server)
    }

    async fn stop(&mut self) {
        self.server.abort();
        let _aborted = (&mut self.server).await;
    }

    fn restart(&mut self) {
        (self.addr, self.server) = Self::serve(&self.content, self.addr);
    }

    fn list(&self, resource: &str, version: u32, items: &[Value]) {
        let mut lists = self.content.lists.lock().unwrap();
        lists.insert(resource.into(), (version, items.to_vec()));
    }

    async fn watch(&mut self, resource: &'static str) -> Watch {
        let next = self.watches.get_mut(resource).unwrap().next();
        tokio::time::timeout(PATIENCE, next).await.unwrap().unwrap()
    }

    fn source(&self) -> mpsc::Receiver<Update> {
        let config = kube::Config::new(format!("http://{}", self.addr).parse().unwrap());
        let (sender, receiver) = mpsc::channel(64);
        tokio::spawn(run(Client::try_from(config).unwrap(), "n1".into(), sender));
        receiver
    }
}

/// An update in a word or two.
fn show(update: &Update) -> String {
    let name = |meta: &k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta| {
        format!(
            "{}@{}",
            meta.name.as_deref().unwrap(),
            meta.resource_version.as_deref().unwrap_or("?")
        )
    };
    match update {
        Update::Event(Event::ServiceApplied(object)) => format!("+{}", name(&object.metadata)),
        Update::Event(Event::ServiceDeleted { namespace, name }) => format!("-{namespace}/{name}"),
        Update::Event(Event::ServicesListed(names)) => {
            let mut names: Vec<&str> = names.iter().map(|name| &*name.name).collect();
            names.sort_unstable();
            format!("all {}", names.join(","))
        }
        Update::Listed(kind) => format!("listed {}", kind.name()),
        Update::State { kind, error } => {
            format!(
                "{} {}",
                kind.name(),
                if error.is_some() { "fails" } else { "works" }
            )
        }
        Update::Problem(problem) => format!("problem {problem}"),
        other => format!("{other:?}"),
    }
}

/// Updates about Services, up to and including the one that is waited for.
async fn until(updates: &mut mpsc::Receiver<Update>, last: &str) -> Vec<String> {
    let mut seen = Vec::new();
    let wait = async {
        loop {
            let text = show(&updates.recv().await.unwrap());
            if text.contains("EndpointSlice")
                || text.contains("Node")
                || text.contains("Slices")
                || text.contains("ServiceC")
            {
                continue;
            }
            seen.push(text.clone());
            if text == last {
                return;
            }
        }
    };
    let waited = tokio::time::timeout(PATIENCE, wait).await;
    assert!(waited.is_ok(), "{last} does not come after {seen:?}");
    seen
}

fn service(name: &str, version: u32) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Service",
        "metadata": {"name": name, "namespace": "default", "resourceVersion": version.to_string()},
        "spec": {"clusterIP": "10.96.0.1", "ports": [{"port": 80}]},
    })
}

#[tokio::test]
async fn a_list_then_its_changes() {
    let mut api = Api::start();
    api.list("services", 10, &[service("a", 3), service("b", 4)]);
    let mut updates = api.source();
    assert_eq!(
        until(&mut updates, "listed Service").await,
        ["+a@3", "+b@4", "all a,b", "listed Service"]
    );
    let watch = api.watch("services").await;
    // kube-proxy's filters, done by the server
    assert_eq!(
        watch.query["labelSelector"],
        "!service.kubernetes.io/service-proxy-name"
    );
    assert_eq!(watch.query["fieldSelector"], "spec.clusterIP!=None");
    assert_eq!(watch.query["resourceVersion"], "10");
    let slices = api.watch("endpointslices").await;
    assert_eq!(slices.query["labelSelector"], "!service.kubernetes.io/headless");
    let nodes = api.watch("nodes").await;
    assert_eq!(nodes.query["fieldSelector"], "metadata.name=n1");
    watch.send("ADDED", &service("c", 11));
    watch.send("MODIFIED", &service("a", 12));
    watch.send("DELETED", &service("b", 13));
    assert_eq!(
        until(&mut updates, "-default/b").await,
        ["+c@11", "+a@12", "-default/b"]
    );
    // a bookmark moves on where the next watch begins, and is no change
    watch.send(
        "BOOKMARK",
        &json!({"kind": "Service", "apiVersion": "v1", "metadata": {"resourceVersion": "20"}}),
    );
    drop(watch);
    let watch = api.watch("services").await;
    assert_eq!(watch.query["resourceVersion"], "20");
    watch.send("ADDED", &service("d", 21));
    assert_eq!(until(&mut updates, "+d@21").await, ["+d@21"]);
}

#[tokio::test]
async fn a_watch_that_is_too_old_begins_with_a_list_and_loses_nothing() {
    let mut api = Api::start();
    api.list("services", 10, &[service("a", 3), service("b", 4)]);
    let mut updates = api.source();
    until(&mut updates, "listed Service").await;
    let watch = api.watch("services").await;
    api.list("services", 50, &[service("b", 4), service("c", 40)]);
    watch.send(
        "ERROR",
        &json!({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
            "message": "too old resource version: 10 (49)", "reason": "Expired", "code": 410}),
    );
    // no deletion, and no outage either: what is gone is what the list does not name
    assert_eq!(
        until(&mut updates, "listed Service").await,
        ["+b@4", "+c@40", "all b,c", "listed Service"]
    );
    assert_eq!(api.watch("services").await.query["resourceVersion"], "50");
}

#[tokio::test]
async fn an_outage_is_said_once_and_takes_nothing_away() {
    let mut api = Api::start();
    api.list("services", 10, &[service("a", 3)]);
    let mut updates = api.source();
    until(&mut updates, "listed Service").await;
    let watch = api.watch("services").await;
    api.stop().await;
    drop(watch);
    assert_eq!(until(&mut updates, "Service fails").await, ["Service fails"]);
    // several failures more
    tokio::time::sleep(BACKOFF.0 * 4).await;
    api.restart();
    assert_eq!(until(&mut updates, "Service works").await, ["Service works"]);
    let watch = api.watch("services").await;
    assert_eq!(watch.query["resourceVersion"], "10");
    watch.send("MODIFIED", &service("a", 11));
    assert_eq!(until(&mut updates, "+a@11").await, ["+a@11"]);
}

#[tokio::test]
async fn an_object_of_noise_is_named_and_the_others_are_kept() {
    let mut api = Api::start();
    let mut bad = service("bad", 4);
    bad["spec"]["ports"] = json!([{"port": "http"}]);
    // more than a page
    let many: Vec<Value> = (0..PAGE_SIZE + 3).map(|i| service(&format!("s{i}"), 1)).collect();
    let list: Vec<Value> = [service("a", 3), bad.clone()].into_iter().chain(many).collect();
    api.list("services", 10, &list);
    let mut updates = api.source();
    let seen = until(&mut updates, "listed Service").await;
    let problems: Vec<&String> = seen.iter().filter(|text| text.starts_with("problem")).collect();
    assert_eq!(problems.len(), 1, "{problems:?}");
    assert!(
        problems[0].contains("Service default/bad") && problems[0].contains("\"http\""),
        "{problems:?}"
    );
    let applied = seen.iter().filter(|text| text.starts_with('+')).count();
    assert_eq!(applied, list.len() - 1);
    // what was known of it before stays: it is among those that the list names
    let all = seen.iter().find(|text| text.starts_with("all ")).unwrap();
    assert!(all.contains(",bad,"), "{all}");
    // the same in a watch
    let watch = api.watch("services").await;
    watch.send("MODIFIED", &bad);
    watch.send("ADDED", &service("after", 12));
    let seen = until(&mut updates, "+after@12").await;
    assert_eq!(seen.len(), 2);
    assert!(seen[0].starts_with("problem Service default/bad"), "{seen:?}");
}

#[tokio::test]
async fn ranges_of_service_addresses_are_followed() {
    let mut api = Api::start();
    let range = |version: u32, cidr: &str| {
        json!({
            "apiVersion": "networking.k8s.io/v1", "kind": "ServiceCIDR",
            "metadata": {"name": "kubernetes", "resourceVersion": version.to_string()},
            "spec": {"cidrs": [cidr]},
        })
    };
    api.list("servicecidrs", 5, &[range(5, "10.96.0.0/16")]);
    let mut updates = api.source();
    let mut seen = Vec::new();
    let watch = api.watch("servicecidrs").await;
    watch.send("MODIFIED", &range(6, "10.97.0.0/16"));
    watch.send("DELETED", &range(7, "10.97.0.0/16"));
    loop {
        match updates.recv().await.unwrap() {
            Update::Event(Event::ServiceCidrApplied(range)) => {
                seen.extend(range.spec.unwrap().cidrs.unwrap_or_default());
            }
            Update::Event(Event::ServiceCidrsListed(names)) => seen.extend(names),
            Update::Listed(Kind::ServiceCidr) => seen.push("listed".into()),
            Update::Event(Event::ServiceCidrDeleted { name }) => {
                seen.push(format!("-{name}"));
                break;
            }
            _ => {}
        }
    }
    assert_eq!(
        seen,
        [
            "10.96.0.0/16",
            "kubernetes",
            "listed",
            "10.97.0.0/16",
            "-kubernetes"
        ]
    );
}
