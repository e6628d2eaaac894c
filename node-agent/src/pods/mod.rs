//! The pods of this node: one worker for each.

mod anyone;
mod backoff;
mod dns;
mod env;
mod events;
mod probes;
mod sources;
mod statics;
mod status;
mod volumes;
mod wishes;
mod worker;

use std::collections::{HashMap, HashSet};
use std::net::IpAddr;
use std::path::PathBuf;
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
/// How often the directory of static pods is looked at.
const LOOK: Duration = Duration::from_secs(2);

/// What all workers share.
pub(crate) struct Context {
    pub(crate) client: Client,
    pub(crate) runtime: Arc<dyn Runtime>,
    pub(crate) events: Events,
    pub(crate) host_ips: Vec<IpAddr>,
    pub(crate) cluster_dns: Vec<IpAddr>,
    pub(crate) cluster_domain: String,
    pub(crate) node: String,
    /// Where files ask for pods.
    pub(crate) manifests: Option<PathBuf>,
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
    /// Those that files ask for: no list of the API has them.
    statics: HashSet<String>,
}

/// Runs the pods that `pods` shows, for ever.
pub(crate) async fn run(
    context: Context,
    pods: impl Stream<Item = Result<Event<Pod>, watcher::Error>>,
    mut changed: mpsc::UnboundedReceiver<String>,
) {
    let mut files = statics::Files::new(context.manifests.as_deref(), &context.node);
    let mut manager = Manager {
        context: Arc::new(context),
        handles: HashMap::new(),
        workers: JoinSet::new(),
        listed: Vec::new(),
        statics: HashSet::new(),
    };
    let mut looks = tokio::time::interval(LOOK);
    // Before the API's list is there, which knows nothing of them.
    manager.follow(files.look());
    let mut pods = std::pin::pin!(pods);
    loop {
        tokio::select! {
            event = pods.next() => match event {
                Some(Ok(event)) => manager.observe(event),
                Some(Err(error)) => debug!(%error, "watch pods"),
                None => return,
            },
            _ = looks.tick() => manager.follow(files.look()),
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
    /// Runs and ends what files ask for.
    fn follow(&mut self, changes: statics::Changes) {
        for uid in changes.gone {
            self.statics.remove(&uid);
            self.gone(&uid);
        }
        for pod in changes.new {
            self.statics.extend(pod.uid());
            self.put(pod);
        }
    }

    fn observe(&mut self, event: Event<Pod>) {
        match event {
            // What it shows is run because of its file; if it has gone, it is made again.
            Event::Delete(pod) if statics::is_mirror(&pod) => drop(self.wake_shown(&pod)),
            Event::Apply(pod) | Event::InitApply(pod) if statics::is_mirror(&pod) => {
                if !self.wake_shown(&pod) {
                    // Its file went while nobody looked.
                    self.hide(pod);
                }
            }
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
                    .filter(|uid| !listed.contains(uid) && !self.statics.contains(*uid))
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

    /// Tells the worker whose pod is shown so, if there is one.
    fn wake_shown(&self, mirror: &Pod) -> bool {
        let uid = mirror.annotations().get(statics::MIRROR);
        let handle = uid.and_then(|uid| self.handles.get(uid));
        if let Some(handle) = handle {
            handle.wake.notify_one();
        }
        handle.is_some()
    }

    /// Removes what shows a pod that no file asks for any more.
    fn hide(&mut self, mirror: Pod) {
        let context = Arc::clone(&self.context);
        self.workers.spawn(async move {
            if let Err(error) = statics::hide(&context, &mirror).await {
                warn!(pod = mirror.name_any(), %error, "a pod whose file has gone is still in the API");
            }
            mirror.uid().unwrap_or_default()
        });
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
