//! The built-in runtime: a container is a process of the host in the network, mount and host name namespaces and the cgroup of
//! its pod. It isolates nothing else, and needs no container runtime and no images.

mod cgroup;
mod exec;
mod handle;
mod image;
mod mounts;
mod netns;
mod spawn;
mod store;

use std::collections::HashMap;
use std::fs;
use std::io;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use beeline_cni::client::{Agent as _, Socket};
use beeline_cni::protocol::{Add, Del, Key, Pod, Request, Response};
use jiff::Timestamp;
use tokio::sync::{mpsc, watch};
use tracing::{debug, warn};

use super::hosts;
use super::{
    Container, ContainerSpec, Dirs, Failure, MIN_GRACE, PodRef, Sandbox, SandboxSpec, Session, State, Wish,
};
use crate::process::Process;
pub(crate) use handle::Processes;
use store::Record;

/// Name of the CNI network in requests to the agent.
const NETWORK: &str = "beeline";
const IFNAME: &str = "eth0";
/// How often a process that is not our child is looked at.
const ADOPTED: Duration = Duration::from_millis(500);
/// How long the processes of a cgroup take to be gone after SIGKILL, at most.
const KILL: Duration = Duration::from_secs(10);

/// Where things are.
#[derive(Clone, Debug, Default)]
pub(crate) struct Settings {
    pub(crate) dirs: Dirs,
    pub(crate) image_dir: PathBuf,
    /// The cgroup that those of the pods are in.
    pub(crate) cgroup: PathBuf,
    pub(crate) netns_prefix: String,
    pub(crate) cni_socket: PathBuf,
}

/// Runs pods. Uids of pods in which something has changed go into a queue.
#[derive(Debug)]
pub(crate) struct ProcessRuntime {
    settings: Settings,
    pods: Mutex<HashMap<String, Record>>,
    changed: mpsc::UnboundedSender<String>,
    /// Counts the ends of processes, for those who wait for one.
    ends: watch::Sender<u64>,
}

impl ProcessRuntime {
    /// Takes over what an earlier process left running.
    ///
    /// # Errors
    /// When its directory or cgroup cannot be made or read.
    pub(crate) fn open(settings: Settings, changed: mpsc::UnboundedSender<String>) -> io::Result<Arc<Self>> {
        fs::create_dir_all(&settings.dirs.root)?;
        cgroup::create_parent(&settings.cgroup)?;
        let mut pods = HashMap::new();
        for record in store::load(&settings.dirs.root)? {
            pods.insert(record.pod.uid.clone(), record);
        }
        let runtime = Arc::new(Self {
            settings,
            pods: Mutex::new(pods),
            changed,
            ends: watch::Sender::new(0),
        });
        let running: Vec<(String, String, Process)> = runtime
            .lock()
            .values()
            .flat_map(|record| {
                let uid = &record.pod.uid;
                record
                    .running()
                    .map(move |(name, process)| (uid.clone(), name.to_owned(), process))
            })
            .collect();
        for (uid, name, process) in running {
            debug!(uid, name, pid = process.pid, "a container of an earlier process");
            tokio::spawn(Arc::clone(&runtime).adopt(uid, name, process));
        }
        Ok(runtime)
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, Record>> {
        self.pods.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// All pods of which anything is left.
    pub(crate) fn pods(&self) -> Vec<PodRef> {
        self.lock().values().map(|record| record.pod.clone()).collect()
    }

    /// The containers of a pod, the last attempt of each.
    pub(crate) fn containers(&self, uid: &str) -> Vec<Container> {
        self.lock().get(uid).map(Record::containers).unwrap_or_default()
    }

    /// The pod's place, if it has one.
    pub(crate) fn sandbox(&self, uid: &str) -> Option<Sandbox> {
        let pods = self.lock();
        let record = pods.get(uid)?;
        let alive = record.netns.as_deref().is_none_or(netns::is_one);
        alive.then(|| Sandbox {
            ips: record.ips.clone(),
        })
    }

    /// Where what is kept of pods is.
    fn dirs(&self) -> &Dirs {
        &self.settings.dirs
    }

    fn pod_dir(&self, uid: &str) -> PathBuf {
        self.dirs().pod(uid)
    }

    fn pod_cgroup(&self, uid: &str) -> PathBuf {
        self.settings.cgroup.join(format!("pod{uid}"))
    }

    fn save(&self, record: &Record) -> Result<(), Failure> {
        store::save(&self.pod_dir(&record.pod.uid), record).map_err(|error| {
            Failure::because("CreateContainerError", "write what is known of the pod", error)
        })
    }

    /// Makes the pod's place unless it has one.
    pub(crate) async fn ensure_sandbox(self: &Arc<Self>, spec: SandboxSpec) -> Result<Sandbox, Failure> {
        if let Some(sandbox) = self.sandbox(&spec.pod.uid) {
            return Ok(sandbox);
        }
        let runtime = Arc::clone(self);
        // Namespaces, mounts and the agent's answer take their time.
        let made = tokio::task::spawn_blocking(move || runtime.make_sandbox(&spec)).await;
        made.unwrap_or_else(|error| {
            Err(Failure::because(
                "FailedCreatePodSandBox",
                "make the sandbox",
                error,
            ))
        })
    }

    fn make_sandbox(&self, spec: &SandboxSpec) -> Result<Sandbox, Failure> {
        let failed = |what: &'static str| {
            move |error: io::Error| Failure::because("FailedCreatePodSandBox", what, error)
        };
        let uid = &spec.pod.uid;
        // What a reboot left of it.
        let mut record = self
            .lock()
            .get(uid)
            .cloned()
            .unwrap_or_else(|| Record::new(spec.pod.clone()));
        let dir = self.pod_dir(uid);
        fs::create_dir_all(&dir).map_err(failed("make its directory"))?;
        cgroup::create(&self.pod_cgroup(uid)).map_err(failed("make its cgroup"))?;
        if !spec.host_network {
            let path = netns::path(&self.settings.netns_prefix, uid);
            netns::create(&path).map_err(failed("make its network namespace"))?;
            record.netns = Some(path.clone());
            // Before the network, so that what is there is found and removed whatever happens next.
            self.save(&record)?;
            self.lock().insert(uid.clone(), record.clone());
            record.ips = self.attach(spec, &path)?;
        }
        if let Some(text) = &spec.resolv_conf {
            fs::write(dir.join(spawn::RESOLV_CONF), text).map_err(failed("write its resolv.conf"))?;
        }
        if !spec.host_network {
            let text = hosts::text(&spec.hostname, &record.ips, &spec.host_aliases);
            fs::write(dir.join(spawn::HOSTS), text).map_err(failed("write its hosts file"))?;
        }
        record.hostname.clone_from(&spec.hostname);
        self.save(&record)?;
        let ips = record.ips.clone();
        self.lock().insert(uid.clone(), record);
        Ok(Sandbox { ips })
    }

    fn attach(&self, spec: &SandboxSpec, path: &Path) -> Result<Vec<IpAddr>, Failure> {
        let failed = |cause: &dyn std::fmt::Display| {
            Failure::because("FailedCreatePodSandBox", "set up its network", cause)
        };
        let netns = fs::File::open(path).map_err(|error| failed(&error))?;
        let request = Request::Add(Box::new(Add {
            key: key(&spec.pod.uid),
            netns: path.display().to_string(),
            pod: Some(Pod {
                namespace: spec.pod.namespace.clone(),
                name: spec.pod.name.clone(),
                uid: spec.pod.uid.clone(),
            }),
            mtu: None,
            mac: None,
            ips: Vec::new(),
            port_mappings: spec.port_mappings.clone(),
            bandwidth: None,
            chained: None,
        }));
        match Socket.ask(&self.settings.cni_socket, &request, Some(&netns)) {
            Ok(Response::Added(added)) => Ok(added.ips.into_iter().map(|(ip, _)| ip).collect()),
            Ok(Response::Failed(failure)) => Err(failed(&failure)),
            Ok(other) => Err(failed(&format!("the agent answered {other:?}"))),
            Err(error) => Err(failed(&error)),
        }
    }

    /// Starts a container; the pod has a sandbox.
    pub(crate) fn start(self: &Arc<Self>, pod: &PodRef, spec: &ContainerSpec) -> Result<(), Failure> {
        let uid = &pod.uid;
        let failed = |what: &'static str| {
            move |error: io::Error| Failure::because("CreateContainerError", what, error)
        };
        let program = image::program(&self.settings.image_dir, spec)?;
        let log = self.dirs().log(pod, &spec.name, spec.attempt);
        if let Some(parent) = log.parent() {
            fs::create_dir_all(parent).map_err(failed("make the directory of its log"))?;
        }
        let group = self.pod_cgroup(uid).join(&spec.name);
        cgroup::create(&group).map_err(failed("make its cgroup"))?;
        cgroup::limit(&group, spec.memory_limit, spec.cpu_limit);
        let (netns, hostname) = {
            let pods = self.lock();
            let record = pods
                .get(uid)
                .ok_or_else(|| Failure::new("CreateContainerError", "its pod has no sandbox"))?;
            (record.netns.clone(), record.hostname.clone())
        };
        let place = spawn::Place {
            netns: netns.as_deref(),
            cgroup: &group,
            dir: &self.pod_dir(uid),
            hostname: &hostname,
        };
        let log = fs::File::options().create(true).append(true).open(&log);
        let log = log.map_err(failed("open its log"))?;
        let launch = spawn::Launch::new(spec).map_err(failed("understand its working directory"))?;
        let mut child = spawn::command(&program, spec, &launch, &place)
            .and_then(|mut command| {
                command.stdout(log.try_clone()?).stderr(log);
                command.spawn()
            })
            .map_err(|error| {
                Failure::because(
                    "RunContainerError",
                    &format!("start {:?}", program.argv0()),
                    error,
                )
            })?;
        let started = Timestamp::now();
        let process = child.id().and_then(|pid| {
            Process::of(pid).or(Some(Process {
                pid,
                start: String::new(),
            }))
        });
        let container = Container {
            id: format!("process://{uid}-{}-{}", spec.name, spec.attempt),
            name: spec.name.clone(),
            attempt: spec.attempt,
            image: spec.image.clone(),
            state: State::Running { started },
        };
        let record = self.lock().get_mut(uid).map(|record| {
            record.put(container, process, launch);
            record.clone()
        });
        let runtime = Arc::clone(self);
        let (uid, name) = (uid.clone(), spec.name.clone());
        tokio::spawn(async move {
            let code = match child.wait().await {
                Ok(status) => spawn::exit_code(status),
                Err(error) => {
                    warn!(uid, name, %error, "the end of a container cannot be seen");
                    255
                }
            };
            runtime.ended(&uid, &name, Some(code)).await;
        });
        record.map_or(Ok(()), |record| self.save(&record))
    }

    async fn adopt(self: Arc<Self>, uid: String, name: String, process: Process) {
        while process.runs() {
            tokio::time::sleep(ADOPTED).await;
        }
        self.ended(&uid, &name, None).await;
    }

    /// Notes the end of a container, and ends what it left behind. `code`: `None` if nobody saw it.
    async fn ended(&self, uid: &str, name: &str, code: Option<i32>) {
        let group = self.pod_cgroup(uid).join(name);
        let killed_for_memory = cgroup::out_of_memory(&group);
        cgroup::kill(&group, KILL).await;
        let record = {
            let mut pods = self.lock();
            let record = pods.get_mut(uid);
            record.and_then(|record| {
                let container = record.container_mut(name)?;
                let State::Running { started } = container.state else {
                    return None;
                };
                let (code, reason, message) = match code {
                    _ if killed_for_memory => (137, "OOMKilled", ""),
                    Some(0) => (0, "Completed", ""),
                    Some(code) => (code, "Error", ""),
                    // as kubelet, when the container could not be located when it ended
                    None => (
                        137,
                        "ContainerStatusUnknown",
                        "the container ended while nobody could see its exit code",
                    ),
                };
                container.state = State::Exited {
                    started,
                    finished: Timestamp::now(),
                    code,
                    reason: reason.into(),
                    message: message.into(),
                };
                Some(record.clone())
            })
        };
        if let Some(record) = record
            && let Err(error) = self.save(&record)
        {
            warn!(uid, name, %error, "the end of a container cannot be noted");
        }
        self.ends.send_modify(|count| *count += 1);
        let _shutting_down = self.changed.send(uid.to_owned());
    }

    /// Ends a container: SIGTERM, and SIGKILL after the grace. Returns when it has ended.
    pub(crate) async fn stop(&self, uid: &str, name: &str, grace: Duration) {
        let mut ends = self.ends.subscribe();
        let Some(process) = self.process(uid, name) else {
            return;
        };
        process.signal(nix::sys::signal::Signal::SIGTERM);
        let ended = async {
            while self.process(uid, name).is_some() {
                if ends.changed().await.is_err() {
                    return;
                }
            }
        };
        if tokio::time::timeout(grace.max(MIN_GRACE), ended).await.is_ok() {
            return;
        }
        cgroup::kill(&self.pod_cgroup(uid).join(name), KILL).await;
        let mut ends = self.ends.subscribe();
        let ended = async {
            while self.process(uid, name).is_some() {
                if ends.changed().await.is_err() {
                    return;
                }
            }
        };
        if tokio::time::timeout(KILL, ended).await.is_err() {
            warn!(
                uid,
                name,
                pid = process.pid,
                "a container does not end after SIGKILL"
            );
        }
    }

    /// Runs a command in a container that runs.
    ///
    /// # Errors
    /// When the container does not run, or the command cannot be started.
    pub(crate) fn exec(&self, uid: &str, name: &str, wish: &Wish) -> Result<Session, Failure> {
        let launch = self.lock().get(uid).and_then(|record| record.launch(name));
        let (Some(process), Some(launch)) = (self.process(uid, name), launch) else {
            return Err(Failure::new(
                "ContainerNotRunning",
                format!("container {name:?} does not run"),
            ));
        };
        exec::start(&process, &self.pod_cgroup(uid).join(name), &launch, wish)
    }

    fn process(&self, uid: &str, name: &str) -> Option<Process> {
        self.lock()
            .get(uid)?
            .running()
            .find_map(|(running, process)| (running == name).then_some(process))
    }

    /// Removes all that is left of a pod whose containers have ended; what still runs is killed.
    ///
    /// # Errors
    /// When something cannot be removed; then it is tried again later.
    pub(crate) async fn remove(&self, uid: &str) -> Result<(), Failure> {
        let group = self.pod_cgroup(uid);
        let record = self.lock().get(uid).cloned();
        cgroup::kill(&group, KILL).await;
        let failed =
            |what: &'static str| move |error: io::Error| Failure::because("FailedKillPod", what, error);
        if let Some(path) = record.as_ref().and_then(|record| record.netns.as_ref()) {
            self.detach(uid);
            netns::remove(path).map_err(failed("remove its network namespace"))?;
        }
        cgroup::remove(&group).map_err(failed("remove its cgroup"))?;
        let known = record.as_ref().map(|record| &record.pod);
        self.dirs()
            .remove(uid, known)
            .map_err(failed("remove its directories"))?;
        self.lock().remove(uid);
        Ok(())
    }

    /// Removes what all pods share.
    pub(crate) fn close(&self) -> io::Result<()> {
        cgroup::remove(&self.settings.cgroup)
    }

    /// Gives the pod's addresses back. What cannot be told to the agent it finds itself: the device is gone.
    fn detach(&self, uid: &str) {
        let request = Request::Del(Del { key: key(uid) });
        match Socket.ask(&self.settings.cni_socket, &request, None) {
            Ok(Response::Failed(failure)) => warn!(uid, %failure, "the pod's network"),
            Ok(_) => {}
            Err(error) => {
                debug!(uid, %error, "the agent was not told that a pod is gone; it sees it at its next start");
            }
        }
    }
}

fn key(uid: &str) -> Key {
    Key {
        network: NETWORK.into(),
        container_id: uid.to_owned(),
        ifname: IFNAME.into(),
    }
}
