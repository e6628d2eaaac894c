//! Events that `kubectl describe` shows, as kube-proxy's (spec kube-proxy 6). Telling them never holds up anything else,
//! and an API that does not take them costs only the event.

use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Event as CoreEvent, EventSource, ObjectReference};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, ObjectMeta, Time};
use kube::Api;
use kube::api::PostParams;
use kube::runtime::events::{Event, EventType, Recorder, Reporter};
use tokio::sync::{mpsc, oneshot};
use tracing::{debug, warn};

/// Who reports: alerts and scripts on kube-proxy's events know it by this name.
const CONTROLLER: &str = "kube-proxy";
/// Events that wait; more are dropped.
const QUEUE: usize = 64;
/// How often an event is sent, and the first pause, which doubles.
const ATTEMPTS: u32 = 10;
const PAUSE: Duration = Duration::from_millis(if cfg!(test) { 10 } else { 1000 });

/// Says events to the API, if there is one.
#[derive(Clone, Debug)]
pub struct Events {
    queue: Option<mpsc::Sender<Item>>,
    node: ObjectReference,
}

enum Item {
    Event(Box<(Event, ObjectReference)>),
    /// Everything before it has been sent or given up.
    Flush(oneshot::Sender<()>),
}

impl Events {
    /// On this node.
    #[must_use]
    pub fn new(client: Option<kube::Client>, node_name: &str) -> Self {
        let queue = client.map(|client| {
            let reporter = Reporter {
                controller: CONTROLLER.into(),
                instance: Some(format!("{CONTROLLER}-{node_name}")),
            };
            let (sender, receiver) = mpsc::channel(QUEUE);
            tokio::spawn(send_all(client, reporter, receiver));
            sender
        });
        Self {
            queue,
            node: ObjectReference {
                kind: Some("Node".into()),
                name: Some(node_name.into()),
                // as kube-proxy and the kubelet do: `kubectl describe node` looks for it
                uid: Some(node_name.into()),
                ..ObjectReference::default()
            },
        }
    }

    /// The agent has started.
    pub fn starting(&self) {
        self.say(
            EventType::Normal,
            "Starting",
            "StartKubeProxy",
            "",
            self.node.clone(),
        );
    }

    /// A server cannot listen, and that is fatal.
    pub fn server_failed(&self, reason: &str, note: &str) {
        self.say(
            EventType::Warning,
            reason,
            "StartKubeProxy",
            note,
            self.node.clone(),
        );
    }

    /// There are nearly more flows than a map holds.
    pub fn flows_crowded(&self, note: &str) {
        self.say(
            EventType::Warning,
            "ConntrackPressure",
            "CollectFlows",
            note,
            self.node.clone(),
        );
    }

    /// Packets do not get to another node.
    pub fn path_failed(&self, note: &str) {
        let node = self.node.clone();
        self.say(EventType::Warning, "PathFailed", "ProbePath", note, node);
    }

    /// They do again.
    pub fn path_works(&self, note: &str) {
        let node = self.node.clone();
        self.say(EventType::Normal, "PathWorks", "ProbePath", note, node);
    }

    /// The health check port of a Service cannot be listened on.
    pub fn health_check_failed(&self, namespace: &str, name: &str, note: &str) {
        let service = ObjectReference {
            kind: Some("Service".into()),
            namespace: Some(namespace.into()),
            name: Some(name.into()),
            // the uid that kube-proxy gives it
            uid: Some(format!("{namespace}/{name}")),
            ..ObjectReference::default()
        };
        let reason = "FailedToStartServiceHealthcheck";
        self.say(EventType::Warning, reason, "Listen", note, service);
    }

    fn say(&self, type_: EventType, reason: &str, action: &str, note: &str, regarding: ObjectReference) {
        let event = Event {
            type_,
            reason: reason.into(),
            action: action.into(),
            note: Some(note.to_owned()).filter(|note| !note.is_empty()),
            secondary: None,
        };
        if let Some(queue) = &self.queue
            && queue.try_send(Item::Event(Box::new((event, regarding)))).is_err()
        {
            debug!(reason, "too many events wait, this one is dropped");
        }
    }

    /// Waits until what was said has been told, but not for long.
    pub async fn flush(&self, at_most: Duration) {
        if let Some(queue) = &self.queue {
            let (sender, done) = oneshot::channel();
            let told = async {
                if queue.send(Item::Flush(sender)).await.is_ok() {
                    let _gone = done.await;
                }
            };
            let _late = tokio::time::timeout(at_most, told).await;
        }
    }
}

async fn send_all(client: kube::Client, reporter: Reporter, mut queue: mpsc::Receiver<Item>) {
    let recorder = Recorder::new(client.clone(), reporter);
    while let Some(item) = queue.recv().await {
        match item {
            Item::Event(event) => send(&client, &recorder, &event.0, &event.1).await,
            Item::Flush(done) => {
                let _gone = done.send(());
            }
        }
    }
}

async fn send(client: &kube::Client, recorder: &Recorder, event: &Event, regarding: &ObjectReference) {
    let mut pause = PAUSE;
    for attempt in 1..=ATTEMPTS {
        match recorder.publish(event, regarding).await {
            Ok(()) => return,
            // an API without events.k8s.io, such as a small one of our own
            Err(kube::Error::Api(status)) if status.code == 404 => {
                if let Err(error) = send_core(client, event, regarding).await {
                    debug!(reason = event.reason, %error, "the API has no place for an event");
                }
                return;
            }
            // it will not like it better the next time
            Err(kube::Error::Api(status)) if (400..500).contains(&status.code) && status.code != 429 => {
                warn!(reason = event.reason, error = %status, "the API does not take an event");
                return;
            }
            Err(error) => {
                debug!(reason = event.reason, attempt, %error, "an event cannot be told");
                if attempt < ATTEMPTS {
                    tokio::time::sleep(pause).await;
                    pause = pause.saturating_mul(2);
                }
            }
        }
    }
    warn!(
        reason = event.reason,
        "an event could not be told in {ATTEMPTS} attempts"
    );
}

/// The same as an event of the core group.
async fn send_core(
    client: &kube::Client,
    event: &Event,
    regarding: &ObjectReference,
) -> Result<(), kube::Error> {
    let now = Timestamp::now();
    let name = regarding.name.as_deref().unwrap_or(CONTROLLER);
    let namespace = regarding.namespace.as_deref().unwrap_or("default");
    let object = CoreEvent {
        metadata: ObjectMeta {
            name: Some(format!("{name}.{:x}", now.as_nanosecond())),
            namespace: Some(namespace.into()),
            ..ObjectMeta::default()
        },
        action: Some(event.action.clone()),
        count: Some(1),
        event_time: Some(MicroTime(now)),
        first_timestamp: Some(Time(now)),
        involved_object: regarding.clone(),
        last_timestamp: Some(Time(now)),
        message: event.note.clone(),
        reason: Some(event.reason.clone()),
        reporting_component: Some(CONTROLLER.into()),
        reporting_instance: Some(CONTROLLER.into()),
        source: Some(EventSource {
            component: Some(CONTROLLER.into()),
            host: None,
        }),
        type_: Some(
            match event.type_ {
                EventType::Normal => "Normal",
                EventType::Warning => "Warning",
            }
            .into(),
        ),
        ..CoreEvent::default()
    };
    let events: Api<CoreEvent> = Api::namespaced(client.clone(), namespace);
    events.create(&PostParams::default(), &object).await.map(drop)
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use axum::Router;
    use axum::extract::Request;
    use axum::http::StatusCode;
    use axum::response::IntoResponse;
    use http_body_util::BodyExt as _;
    use serde_json::Value;

    use super::*;

    type Posts = Arc<Mutex<Vec<(String, Value)>>>;

    /// An API that answers the first requests with these codes and takes the rest.
    async fn api(codes: &[u16]) -> (kube::Client, Posts) {
        let posts = Posts::default();
        let codes = Arc::new(Mutex::new(codes.to_vec()));
        let seen = Arc::clone(&posts);
        let router = Router::new().fallback(move |request: Request| {
            let (seen, codes) = (Arc::clone(&seen), Arc::clone(&codes));
            async move {
                let path = request.uri().path().to_owned();
                let body = request.into_body().collect().await.unwrap().to_bytes();
                let value: Value = serde_json::from_slice(&body).unwrap();
                let refused = {
                    let mut codes = codes.lock().unwrap();
                    (!codes.is_empty()).then(|| codes.remove(0))
                };
                match refused {
                    Some(code) => StatusCode::from_u16(code).unwrap().into_response(),
                    None => {
                        seen.lock().unwrap().push((path, value.clone()));
                        (StatusCode::CREATED, axum::Json(value)).into_response()
                    }
                }
            }
        });
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let config = kube::Config::new(
            format!("http://{}", listener.local_addr().unwrap())
                .parse()
                .unwrap(),
        );
        tokio::spawn(async move { axum::serve(listener, router).await });
        (kube::Client::try_from(config).unwrap(), posts)
    }

    #[tokio::test]
    async fn events_have_kube_proxys_names_and_places() {
        let (client, posts) = api(&[]).await;
        let events = Events::new(Some(client), "node-1");
        events.starting();
        events.health_check_failed("shop", "web", "port 31000 is in use");
        events.flush(Duration::from_secs(20)).await;
        let posts = posts.lock().unwrap();
        let [(node_path, node), (service_path, service)] = &posts[..] else {
            panic!("{posts:?}")
        };
        assert_eq!(node_path, "/apis/events.k8s.io/v1/namespaces/default/events");
        assert_eq!(node["reason"], "Starting");
        assert_eq!(node["action"], "StartKubeProxy");
        assert_eq!(node["type"], "Normal");
        assert_eq!(node["reportingController"], "kube-proxy");
        assert_eq!(node["reportingInstance"], "kube-proxy-node-1");
        assert_eq!(
            node["regarding"],
            serde_json::json!({"kind": "Node", "name": "node-1", "uid": "node-1"})
        );
        assert_eq!(service_path, "/apis/events.k8s.io/v1/namespaces/shop/events");
        assert_eq!(service["reason"], "FailedToStartServiceHealthcheck");
        assert_eq!(service["action"], "Listen");
        assert_eq!(service["type"], "Warning");
        assert_eq!(service["note"], "port 31000 is in use");
        assert_eq!(service["regarding"]["namespace"], "shop");
    }

    #[tokio::test]
    async fn what_the_api_refuses_is_dropped_and_what_fails_is_sent_again() {
        // 403: not again; 500, 429: again
        let (client, posts) = api(&[403, 500, 429]).await;
        let events = Events::new(Some(client), "n");
        events.server_failed("FailedToStartMetricServer", "in use");
        events.starting();
        events.flush(Duration::from_secs(20)).await;
        let posts = posts.lock().unwrap();
        assert_eq!(posts.len(), 1, "{posts:?}");
        assert_eq!(posts[0].1["reason"], "Starting");
    }

    #[tokio::test]
    async fn an_api_without_the_group_gets_events_of_the_core_group() {
        let (client, posts) = api(&[404]).await;
        let events = Events::new(Some(client), "n");
        events.health_check_failed("shop", "web", "in use");
        events.flush(Duration::from_secs(20)).await;
        let posts = posts.lock().unwrap();
        let [(path, event)] = &posts[..] else {
            panic!("{posts:?}")
        };
        assert_eq!(path, "/api/v1/namespaces/shop/events");
        assert_eq!(event["involvedObject"]["name"], "web");
        assert_eq!(event["reason"], "FailedToStartServiceHealthcheck");
        assert_eq!(
            (&event["message"], &event["type"]),
            (&"in use".into(), &"Warning".into())
        );
        assert_eq!(event["source"]["component"], "kube-proxy");
    }

    #[tokio::test]
    async fn without_an_api_nothing_is_said() {
        let events = Events::new(None, "n");
        events.starting();
        events.flush(Duration::ZERO).await;
    }
}
