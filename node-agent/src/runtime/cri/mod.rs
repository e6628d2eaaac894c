//! Pods in a container runtime with the container runtime interface, such as containerd, which gives them their network
//! through its CNI plugins.
//!
//! What runs is asked of the runtime every second, and after each change of our own; nothing else is remembered, so that the
//! program can be killed at any time.

mod api;
mod cgroups;
mod config;
mod observe;
mod session;
mod spdy;

use std::collections::HashMap;
use std::fs;
use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures::FutureExt as _;
use futures::future::{BoxFuture, join_all};
use tokio::sync::mpsc;
use tonic::Status;
use tracing::{info, warn};

use super::{
    Container, ContainerSpec, Dirs, Failure, PodRef, Pull, Runtime, Sandbox, SandboxSpec, Session, State,
    Wish, hosts,
};
use api::Client;
use observe::Known;

/// How often the runtime is asked what runs, as by kubelet.
const LOOK: Duration = Duration::from_secs(1);
const HOSTS: &str = "hosts";

/// Why a runtime cannot be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CriError {
    /// The address of its socket is none.
    #[error("{0:?}: the address of a container runtime is unix:///PATH")]
    Address(String),
    /// It does not do what it is asked.
    #[error("{0}")]
    Call(#[from] Status),
    /// The directories of the node cannot be made.
    #[error("make {0}: {1}")]
    Directory(String, io::Error),
}

/// A container runtime.
#[derive(Debug)]
pub(crate) struct CriRuntime {
    client: Client,
    /// Name and version.
    version: String,
    dirs: Dirs,
    /// Of all pods, in the runtime's words.
    cgroup: String,
    pods: Mutex<HashMap<String, Known>>,
    /// What sandboxes were made from, for the containers in them.
    configs: Mutex<HashMap<String, (SandboxSpec, api::SandboxConfig)>>,
    network: Mutex<Result<(), String>>,
    /// One look at a time, so that an older one does not undo a newer one.
    looking: tokio::sync::Mutex<()>,
    changed: mpsc::UnboundedSender<String>,
}

fn lock<T>(of: &Mutex<T>) -> MutexGuard<'_, T> {
    of.lock().unwrap_or_else(PoisonError::into_inner)
}

impl CriRuntime {
    /// Finds out what runs already.
    ///
    /// # Errors
    /// When the runtime does not answer.
    pub(crate) async fn open(
        endpoint: &str,
        dirs: Dirs,
        cgroup: &Path,
        changed: mpsc::UnboundedSender<String>,
    ) -> Result<Arc<Self>, CriError> {
        let socket = endpoint.strip_prefix("unix://").unwrap_or(endpoint);
        if !socket.starts_with('/') {
            return Err(CriError::Address(endpoint.to_owned()));
        }
        for dir in [&dirs.root, &dirs.logs] {
            fs::create_dir_all(dir).map_err(|error| CriError::Directory(dir.display().to_string(), error))?;
        }
        let client = Client::new(Path::new(socket));
        let version: api::Version = client.runtime("Version", api::Empty {}).await?;
        let runtime = Arc::new(Self {
            client,
            version: format!("{}://{}", version.runtime_name, version.runtime_version),
            dirs,
            cgroup: cgroups::name(cgroup),
            pods: Mutex::default(),
            configs: Mutex::default(),
            network: Mutex::new(Ok(())),
            looking: tokio::sync::Mutex::default(),
            changed,
        });
        runtime.look().await?;
        info!(
            runtime = runtime.version,
            pods = lock(&runtime.pods).len(),
            "container runtime"
        );
        let looker = Arc::clone(&runtime);
        tokio::spawn(async move {
            loop {
                tokio::time::sleep(LOOK).await;
                if let Err(status) = looker.look().await {
                    let why = format!("container runtime is down: {}", status.message());
                    warn!(error = %status, "the container runtime does not answer");
                    *lock(&looker.network) = Err(why);
                }
            }
        });
        Ok(runtime)
    }

    /// Asks what runs, and tells whose pods have changed.
    async fn look(&self) -> Result<(), Status> {
        let _turn = self.looking.lock().await;
        let before = lock(&self.pods).clone();
        let name = self.version.split(':').next().unwrap_or_default();
        let now = observe::pods(&self.client, name, &before).await?;
        let network = observe::network(&self.client).await?;
        *lock(&self.network) = network;
        let uids = before
            .keys()
            .chain(now.keys().filter(|uid| !before.contains_key(*uid)));
        let changed: Vec<String> = uids
            .filter(|uid| before.get(*uid) != now.get(*uid))
            .cloned()
            .collect();
        *lock(&self.pods) = now;
        for uid in changed {
            let _shutting_down = self.changed.send(uid);
        }
        Ok(())
    }

    fn known(&self, uid: &str) -> Option<Known> {
        lock(&self.pods).get(uid).cloned()
    }

    async fn make_sandbox(&self, spec: SandboxSpec) -> Result<Sandbox, Failure> {
        let failed = |status: Status| Failure::new("FailedCreatePodSandBox", status.message());
        let uid = spec.pod.uid.clone();
        let known = self.known(&uid).unwrap_or_default();
        let config = config::sandbox(&spec, &self.dirs, &self.cgroup, known.next_attempt());
        if known.sandbox().is_none() {
            let logs = self.dirs.pod_logs(&spec.pod);
            for dir in [&logs, &self.dirs.pod(&uid)] {
                fs::create_dir_all(dir).map_err(|error| {
                    Failure::because(
                        "FailedCreatePodSandBox",
                        &format!("make {}", dir.display()),
                        error,
                    )
                })?;
            }
            // What a reboot, or an attempt that was cut off, left of it.
            for old in &known.sandboxes {
                self.remove_sandbox(&old.id).await.map_err(failed)?;
            }
            let request = api::RunSandboxRequest {
                config: Some(config.clone()),
            };
            let _made: api::Named = self
                .client
                .runtime("RunPodSandbox", request)
                .await
                .map_err(failed)?;
            self.look().await.map_err(failed)?;
        }
        let sandbox = self.known(&uid).and_then(|known| known.sandbox());
        let sandbox =
            sandbox.ok_or_else(|| Failure::new("FailedCreatePodSandBox", "the sandbox ended at once"))?;
        if !spec.host_network {
            let text = hosts::text(&spec.hostname, &sandbox.ips, &spec.host_aliases);
            fs::write(self.dirs.pod(&uid).join(HOSTS), text)
                .map_err(|error| Failure::because("FailedCreatePodSandBox", "write its hosts file", error))?;
        }
        lock(&self.configs).insert(uid, (spec, config));
        Ok(sandbox)
    }

    async fn remove_sandbox(&self, id: &str) -> Result<(), Status> {
        for method in ["StopPodSandbox", "RemovePodSandbox"] {
            let _done: api::Empty = self
                .client
                .runtime(method, api::Named { id: id.to_owned() })
                .await?;
        }
        Ok(())
    }

    /// The image's id, fetched if it must be.
    async fn image(&self, spec: &ContainerSpec) -> Result<String, Failure> {
        let failed = |reason: &'static str| {
            let image = spec.image.clone();
            move |status: Status| Failure::new(reason, format!("image {image:?}: {}", status.message()))
        };
        let ask = || api::ImageRequest {
            image: Some(api::ImageSpec {
                image: spec.image.clone(),
            }),
        };
        let find = || async {
            let answer: api::ImageStatusResponse = self
                .client
                .images("ImageStatus", ask())
                .await
                .map_err(failed("ImageInspectError"))?;
            Ok::<_, Failure>(answer.image.map(|image| image.id))
        };
        let found = find().await?;
        match (spec.pull, found) {
            (Pull::IfMissing | Pull::Never, Some(id)) => return Ok(id),
            (Pull::Never, None) => {
                let message = format!(
                    "Container image {:?} is not present with pull policy of Never",
                    spec.image
                );
                return Err(Failure::new("ErrImageNeverPull", message));
            }
            _ => {}
        }
        let pulled: Result<api::Named, Failure> = self
            .client
            .images("PullImage", ask())
            .await
            .map_err(failed("ErrImagePull"));
        pulled?;
        find().await?.ok_or_else(|| {
            Failure::new(
                "ErrImagePull",
                format!("image {:?} is not there after it was fetched", spec.image),
            )
        })
    }

    async fn start_container(&self, pod: &PodRef, spec: &ContainerSpec) -> Result<(), Failure> {
        let failed = |status: Status| Failure::new("CreateContainerError", status.message());
        let known = self.known(&pod.uid).unwrap_or_default();
        let made_from = lock(&self.configs).get(&pod.uid).cloned();
        let (Some(sandbox), Some((sandbox_spec, sandbox_config))) = (known.newest(), made_from) else {
            return Err(Failure::new("CreateContainerError", "its pod has no sandbox"));
        };
        let image = self.image(spec).await?;
        let logs = self.dirs.pod_logs(pod).join(&spec.name);
        fs::create_dir_all(&logs).map_err(|error| {
            Failure::because("CreateContainerError", "make the directory of its log", error)
        })?;
        let hosts = (!sandbox_spec.host_network).then(|| self.dirs.pod(&pod.uid).join(HOSTS));
        let request = api::CreateContainerRequest {
            sandbox: sandbox.id.clone(),
            config: Some(config::container(pod, spec, &sandbox_spec, image, hosts)),
            sandbox_config: Some(sandbox_config),
        };
        // The attempts before: their logs stay.
        for old in known.ids(&spec.name) {
            let _gone: Result<api::Empty, _> = self
                .client
                .runtime("RemoveContainer", api::Named { id: old })
                .await;
        }
        let made: api::Named = self
            .client
            .runtime("CreateContainer", request)
            .await
            .map_err(failed)?;
        let started: Result<api::Empty, Status> = self
            .client
            .runtime("StartContainer", api::Named { id: made.id.clone() })
            .await;
        let looked = self.look().await;
        if let Err(status) = started {
            let _gone: Result<api::Empty, _> = self
                .client
                .runtime("RemoveContainer", api::Named { id: made.id })
                .await;
            return Err(Failure::new("RunContainerError", status.message()));
        }
        looked.map_err(failed)
    }

    async fn stop_container(&self, uid: &str, name: &str, grace: Duration) {
        let known = self.known(uid).unwrap_or_default();
        let Some((
            id,
            Container {
                state: State::Running { .. },
                ..
            },
        )) = known.container(name)
        else {
            return;
        };
        let request = api::StopContainerRequest {
            id: id.clone(),
            timeout: i64::try_from(grace.as_secs()).unwrap_or(i64::MAX),
        };
        let stopped: Result<api::Empty, Status> = self.client.wait("StopContainer", request, grace).await;
        let done = match stopped {
            Ok(_) => self.look().await,
            Err(status) => Err(status),
        };
        if let Err(error) = done {
            warn!(uid, name, %error, "a container does not end");
        }
    }

    async fn remove_pod(&self, uid: &str) -> Result<(), Failure> {
        let known = self.known(uid);
        let sandboxes = known.iter().flat_map(|known| &known.sandboxes);
        let removed = join_all(sandboxes.map(|sandbox| self.remove_sandbox(&sandbox.id))).await;
        let removed: Result<(), Status> = removed.into_iter().collect();
        removed.map_err(|status| Failure::new("FailedKillPod", status.message()))?;
        let pod = known.as_ref().map(|known| &known.pod);
        self.dirs
            .remove(uid, pod)
            .map_err(|error| Failure::because("FailedKillPod", "remove its directories", error))?;
        cgroups::remove(&format!("{}/pod{uid}", self.cgroup))
            .map_err(|error| Failure::because("FailedKillPod", "remove its cgroup", error))?;
        lock(&self.configs).remove(uid);
        self.look()
            .await
            .map_err(|status| Failure::new("FailedKillPod", status.message()))
    }

    /// The id of a container that runs.
    fn running(&self, uid: &str, name: &str) -> Result<String, Failure> {
        let known = self.known(uid).unwrap_or_default();
        match known.container(name) {
            Some((
                id,
                Container {
                    state: State::Running { .. },
                    ..
                },
            )) => Ok(id.clone()),
            _ => Err(Failure::new(
                "ContainerNotRunning",
                format!("container {name:?} does not run"),
            )),
        }
    }
}

impl Runtime for CriRuntime {
    fn version(&self) -> String {
        self.version.clone()
    }

    fn dirs(&self) -> &Dirs {
        &self.dirs
    }

    fn has_times_in_logs(&self) -> bool {
        true
    }

    fn network_ready(&self) -> Result<(), String> {
        lock(&self.network).clone()
    }

    fn close(&self) -> io::Result<()> {
        cgroups::remove_all(&self.cgroup)
    }

    fn pods(&self) -> Vec<PodRef> {
        lock(&self.pods).values().map(|known| known.pod.clone()).collect()
    }

    fn containers(&self, uid: &str) -> Vec<Container> {
        self.known(uid)
            .map(|known| known.containers())
            .unwrap_or_default()
    }

    fn sandbox(&self, uid: &str) -> Option<Sandbox> {
        self.known(uid)?.sandbox()
    }

    fn ensure_sandbox(&self, spec: SandboxSpec) -> BoxFuture<'_, Result<Sandbox, Failure>> {
        self.make_sandbox(spec).boxed()
    }

    fn start<'a>(&'a self, pod: &'a PodRef, spec: &'a ContainerSpec) -> BoxFuture<'a, Result<(), Failure>> {
        self.start_container(pod, spec).boxed()
    }

    fn stop<'a>(&'a self, uid: &'a str, name: &'a str, grace: Duration) -> BoxFuture<'a, ()> {
        self.stop_container(uid, name, grace).boxed()
    }

    fn remove<'a>(&'a self, uid: &'a str) -> BoxFuture<'a, Result<(), Failure>> {
        self.remove_pod(uid).boxed()
    }

    fn exec<'a>(
        &'a self,
        uid: &'a str,
        name: &'a str,
        wish: &'a Wish,
    ) -> BoxFuture<'a, Result<Session, Failure>> {
        async move {
            let request = api::ExecRequest {
                id: self.running(uid, name)?,
                command: wish.command.clone(),
                tty: wish.tty,
                stdin: wish.stdin,
                stdout: wish.stdout,
                stderr: wish.stderr && !wish.tty,
            };
            session::open(&self.client, "Exec", request, wish).await
        }
        .boxed()
    }

    fn run<'a>(
        &'a self,
        uid: &'a str,
        name: &'a str,
        command: &'a [String],
        limit: Duration,
    ) -> BoxFuture<'a, Result<(i32, String), Failure>> {
        async move {
            let request = api::ExecSyncRequest {
                id: self.running(uid, name)?,
                command: command.to_vec(),
                timeout: i64::try_from(limit.as_secs()).unwrap_or(i64::MAX),
            };
            let answer: Result<api::ExecSyncResponse, Status> =
                self.client.wait("ExecSync", request, limit).await;
            let answer = answer.map_err(|status| Failure::new("ExecError", status.message()))?;
            let output = [answer.stdout, answer.stderr].concat();
            Ok((answer.exit_code, String::from_utf8_lossy(&output).into_owned()))
        }
        .boxed()
    }

    fn attach<'a>(
        &'a self,
        uid: &'a str,
        name: &'a str,
        wish: &'a Wish,
    ) -> BoxFuture<'a, Result<Option<Session>, Failure>> {
        async move {
            let request = api::AttachRequest {
                id: self.running(uid, name)?,
                stdin: wish.stdin,
                tty: wish.tty,
                stdout: wish.stdout,
                stderr: wish.stderr && !wish.tty,
            };
            session::open(&self.client, "Attach", request, wish)
                .await
                .map(Some)
        }
        .boxed()
    }
}
