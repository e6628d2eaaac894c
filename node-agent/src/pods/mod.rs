//! The pods of this node: one worker for each.

mod backoff;
mod dns;
mod env;
mod events;
mod probes;
mod sources;
mod status;
mod volumes;
mod worker;

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use futures::{Stream, StreamExt as _};
use k8s_openapi::api::core::v1::Pod;
use kube::runtime::watcher::{self, Event};
use kube::{Client, ResourceExt as _};
use tokio::sync::{Notify, mpsc, watch};
use tokio::task::JoinSet;
use tracing::{debug, info, warn};

use crate::runtime::Runtime;
pub(crate) use events::Events;
use worker::Worker;

/// Pause before something of a pod that is gone is removed again.
const RETRY: Duration = Duration::from_secs(5);

/// What all workers share.
pub(crate) struct Context {
    pub(crate) client: Client,
    pub(crate) runtime: Arc<dyn Runtime>,
    pub(crate) events: Events,
    pub(crate) host_ips: Vec<IpAddr>,
    pub(crate) cluster_dns: Vec<IpAddr>,
    pub(crate) cluster_domain: String,
}

/// The way to a worker.
struct Handle {
    /// `None`: the pod is not in the API any more.
    pod: watch::Sender<Option<Arc<Pod>>>,
    wake: Arc<Notify>,
}

/// Workers by uid of their pod.
struct Manager {
    context: Arc<Context>,
    handles: HashMap<String, Handle>,
    workers: JoinSet<String>,
    /// Uids that a list that is not complete yet has shown.
    listed: Vec<String>,
}

/// Runs the pods that `pods` shows, for ever.
pub(crate) async fn run(
    context: Context,
    pods: impl Stream<Item = Result<Event<Pod>, watcher::Error>>,
    mut changed: mpsc::UnboundedReceiver<String>,
) {
    let mut manager = Manager {
        context: Arc::new(context),
        handles: HashMap::new(),
        workers: JoinSet::new(),
        listed: Vec::new(),
    };
    let mut pods = std::pin::pin!(pods);
    loop {
        tokio::select! {
            event = pods.next() => match event {
                Some(Ok(event)) => manager.observe(event),
                Some(Err(error)) => debug!(%error, "watch pods"),
                None => return,
            },
            Some(uid) = changed.recv() => {
                if let Some(handle) = manager.handles.get(&uid) {
                    handle.wake.notify_one();
                }
            }
            Some(ended) = manager.workers.join_next() => match ended {
                Ok(uid) => manager.ended(&uid),
                Err(error) => warn!(%error, "a pod's worker ended badly"),
            },
        }
    }
}

impl Manager {
    fn observe(&mut self, event: Event<Pod>) {
        match event {
            Event::Apply(pod) => self.put(pod),
            Event::Delete(pod) => self.gone(&pod.uid().unwrap_or_default()),
            Event::Init => self.listed.clear(),
            Event::InitApply(pod) => {
                self.listed.extend(pod.uid());
                self.put(pod);
            }
            Event::InitDone => {
                let listed = std::mem::take(&mut self.listed);
                let lost: Vec<String> = self
                    .handles
                    .keys()
                    .filter(|uid| !listed.contains(uid))
                    .cloned()
                    .collect();
                for uid in lost {
                    self.gone(&uid);
                }
                for pod in self.context.runtime.pods() {
                    if !listed.contains(&pod.uid) && !self.handles.contains_key(&pod.uid) {
                        info!(
                            namespace = pod.namespace,
                            pod = pod.name,
                            uid = pod.uid,
                            "removing what is left of a pod"
                        );
                        self.remove(pod.uid);
                    }
                }
            }
        }
    }

    fn put(&mut self, pod: Pod) {
        let uid = pod.uid().unwrap_or_default();
        let pod = Some(Arc::new(pod));
        if let Some(handle) = self.handles.get(&uid) {
            handle.pod.send_replace(pod);
            return;
        }
        let (sender, receiver) = watch::channel(pod.clone());
        let wake = Arc::new(Notify::new());
        if let Some(pod) = pod {
            let worker = Worker::new(Arc::clone(&self.context), &pod, receiver, Arc::clone(&wake));
            let name = uid.clone();
            self.workers.spawn(async move {
                worker.run().await;
                name
            });
            self.handles.insert(uid, Handle { pod: sender, wake });
        }
    }

    fn gone(&mut self, uid: &str) {
        if let Some(handle) = self.handles.get(uid) {
            handle.pod.send_replace(None);
        }
    }

    /// A worker ends when its pod is gone.
    fn ended(&mut self, uid: &str) {
        self.handles.remove(uid);
    }

    /// Removes what is left of a pod that nobody asks for.
    fn remove(&mut self, uid: String) {
        let context = Arc::clone(&self.context);
        self.workers.spawn(async move {
            while let Err(failure) = context.runtime.remove(&uid).await {
                warn!(uid, %failure, "a pod cannot be removed yet");
                tokio::time::sleep(RETRY).await;
            }
            uid
        });
    }
}
