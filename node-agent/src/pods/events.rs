//! Events about pods, as `kubectl describe` shows them.

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Event, EventSource, ObjectReference, Pod};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{ObjectMeta, Time};
use kube::api::PostParams;
use kube::{Api, Client, ResourceExt as _};
use tokio::sync::mpsc;
use tracing::debug;

/// Events that wait; more are dropped, they are only for people.
const QUEUE: usize = 256;

/// Tells events, one after the other, without making anybody wait.
#[derive(Clone)]
pub(crate) struct Events {
    node: String,
    queue: mpsc::Sender<Event>,
}

impl Events {
    /// For the node of this name.
    pub(crate) fn new(client: Client, node: &str) -> Self {
        let (queue, mut waiting) = mpsc::channel::<Event>(QUEUE);
        tokio::spawn(async move {
            while let Some(event) = waiting.recv().await {
                let namespace = event.metadata.namespace.clone().unwrap_or_default();
                let api: Api<Event> = Api::namespaced(client.clone(), &namespace);
                if let Err(error) = api.create(&PostParams::default(), &event).await {
                    debug!(%error, reason = event.reason, "an event was not told");
                }
            }
        });
        Self {
            node: node.to_owned(),
            queue,
        }
    }

    /// Something normal.
    pub(super) fn normal(&self, pod: &Pod, container: Option<&str>, reason: &str, message: String) {
        self.tell(pod, container, "Normal", reason, message);
    }

    /// Something that is not as it should be.
    pub(super) fn warning(&self, pod: &Pod, container: Option<&str>, reason: &str, message: String) {
        self.tell(pod, container, "Warning", reason, message);
    }

    fn tell(&self, pod: &Pod, container: Option<&str>, kind: &str, reason: &str, message: String) {
        let now = Timestamp::now();
        let seconds = Timestamp::from_second(now.as_second()).unwrap_or(now);
        let (namespace, name) = (pod.namespace().unwrap_or_default(), pod.name_any());
        let event = Event {
            metadata: ObjectMeta {
                name: Some(format!("{name}.{:x}", now.as_nanosecond())),
                namespace: Some(namespace.clone()),
                ..ObjectMeta::default()
            },
            involved_object: ObjectReference {
                api_version: Some("v1".to_owned()),
                kind: Some("Pod".to_owned()),
                name: Some(name),
                namespace: Some(namespace),
                uid: pod.uid(),
                field_path: container.map(|name| format!("spec.containers{{{name}}}")),
                resource_version: pod.resource_version(),
            },
            type_: Some(kind.to_owned()),
            reason: Some(reason.to_owned()),
            message: Some(message),
            count: Some(1),
            first_timestamp: Some(Time(seconds)),
            last_timestamp: Some(Time(seconds)),
            source: Some(EventSource {
                component: Some("kubelet".to_owned()),
                host: Some(self.node.clone()),
            }),
            reporting_component: Some("kubelet".to_owned()),
            reporting_instance: Some(self.node.clone()),
            ..Event::default()
        };
        if let Err(error) = self.queue.try_send(event) {
            debug!(%error, "an event was dropped");
        }
    }
}
