//! One pod's worker: looks at what runs and what should, does the difference, tells the API; again at each change.

use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use futures::future::join_all;
use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Container as Wanted, Pod, PodStatus};
use kube::api::{DeleteParams, Patch, PatchParams, Preconditions};
use kube::{Api, ResourceExt as _};
use serde_json::json;
use tokio::sync::{Notify, watch};
use tokio::time::Instant;
use tracing::{debug, warn};

use super::Context;
use super::backoff::Backoff;
use super::env::{self, Facts};
use super::probes::{self, Probes, Target, Verdict};
use super::sources::Sources;
use super::statics;
use super::status::{self, View};
use super::volumes::Volumes;
use super::wishes;
use crate::runtime::{ContainerSpec, Failure, PodRef, Sandbox, State};

/// Pause before the API is told again what it did not take.
const RETRY: Duration = Duration::from_secs(1);
/// Grace of a pod that is gone from the API already.
const GONE: Duration = Duration::from_secs(2);
/// Grace of a container whose hook has used up its own.
const AFTER_HOOK: Duration = Duration::from_secs(2);
/// Name of the sandbox among the waits; no container can be called so.
const SANDBOX: &str = "/sandbox";
/// The same for the volumes.
const VOLUMES: &str = "/volumes";

pub(super) struct Worker {
    context: Arc<Context>,
    id: PodRef,
    pod: watch::Receiver<Option<Arc<Pod>>>,
    wake: Arc<Notify>,
    view: View,
    /// What the API was told last, or is to be told.
    status: PodStatus,
    told: PodStatus,
    backoff: Backoff,
    volumes: Volumes,
    probes: Probes,
}

/// When to look again if nothing happens.
struct Next(Option<Instant>);

impl Next {
    fn at(&mut self, at: Instant) {
        self.0 = Some(self.0.map_or(at, |earlier| earlier.min(at)));
    }
}

impl Worker {
    pub(super) fn new(
        context: Arc<Context>,
        pod: &Pod,
        receiver: watch::Receiver<Option<Arc<Pod>>>,
        wake: Arc<Notify>,
    ) -> Self {
        let told = pod.status.clone().unwrap_or_default();
        Self {
            id: PodRef {
                namespace: pod.namespace().unwrap_or_default(),
                name: pod.name_any(),
                uid: pod.uid().unwrap_or_default(),
            },
            view: View {
                host_ips: context.host_ips.clone(),
                ..View::default()
            },
            context,
            pod: receiver,
            wake,
            status: told.clone(),
            told,
            backoff: Backoff::default(),
            volumes: Volumes::default(),
            probes: Probes::default(),
        }
    }

    /// Until nothing of the pod is left.
    pub(super) async fn run(mut self) {
        let mut last: Option<Arc<Pod>> = None;
        loop {
            let Some(pod) = self.pod.borrow_and_update().clone() else {
                let file = last.filter(|pod| statics::is_static(pod));
                let grace = file.as_deref().map_or(GONE, grace);
                self.end(file.as_ref(), grace).await;
                self.remove().await;
                if let Some(pod) = file {
                    self.hide(&pod).await;
                }
                return;
            };
            last = Some(Arc::clone(&pod));
            let mut next = Next(None);
            if pod.metadata.deletion_timestamp.is_some() {
                if self.finish(&pod).await {
                    return;
                }
                next.at(Instant::now() + RETRY);
            } else {
                self.step(&pod, &mut next).await;
                if !self.tell(&pod).await {
                    next.at(Instant::now() + RETRY);
                }
            }
            let later = next.0;
            tokio::select! {
                changed = self.pod.changed() => {
                    if changed.is_err() {
                        // The program ends: the pods stay.
                        return;
                    }
                }
                () = self.wake.notified() => {}
                () = tokio::time::sleep_until(later.unwrap_or_else(Instant::now)), if later.is_some() => {}
            }
        }
    }

    /// One look at everything.
    async fn step(&mut self, pod: &Arc<Pod>, next: &mut Next) {
        self.look(pod);
        self.end_unhealthy(pod).await;
        self.settle(pod);
        let phase = self.status.phase.clone().unwrap_or_default();
        let over = self.told.phase.as_deref().is_some_and(status::is_final);
        if over || status::is_final(&phase) {
            // Nothing of it runs again; what goes on beside the others is ended.
            self.end(Some(pod), grace(pod)).await;
            if !over {
                self.look(pod);
                self.settle(pod);
            }
            return;
        }
        let Some(sandbox) = self.sandbox(pod, next).await else {
            return;
        };
        self.view.pod_ips = Some(sandbox.ips);
        if !self.volumes(pod, next).await {
            self.settle(pod);
            return;
        }
        if !self.init(pod, next).await {
            self.settle(pod);
            return;
        }
        for wanted in status::specs(pod, false) {
            self.container(pod, wanted, true, next).await;
        }
        self.settle(pod);
    }

    /// Asks the runtime, and the probes of what runs.
    fn look(&mut self, pod: &Arc<Pod>) {
        let runtime = &self.context.runtime;
        self.view.containers = runtime.containers(&self.id.uid);
        self.view.pod_ips = runtime.sandbox(&self.id.uid).map(|sandbox| sandbox.ips);
        self.view.verdicts.clear();
        for spec in lasting(pod).filter(|spec| probes::has_any(spec)) {
            let running = self.view.container(&spec.name);
            let running = running.filter(|container| matches!(container.state, State::Running { .. }));
            let Some(container) = running else {
                self.probes.forget(&spec.name);
                continue;
            };
            let told = status::of(&self.told, &spec.name);
            let before = match told.filter(|told| told.container_id.as_ref() == Some(&container.id)) {
                Some(told) => Verdict {
                    started: told.started == Some(true),
                    ready: told.ready,
                    failed: None,
                },
                None => Verdict {
                    started: spec.startup_probe.is_none(),
                    ready: spec.startup_probe.is_none() && spec.readiness_probe.is_none(),
                    failed: None,
                },
            };
            let (target, attempt) = (self.target(spec), container.attempt);
            let events = &self.context.events;
            let verdict = self.probes.ask(pod, target, attempt, before, events, &self.wake);
            self.view.verdicts.insert(spec.name.clone(), verdict);
        }
    }

    /// Where probes and hooks of a container go.
    fn target(&self, spec: &Wanted) -> Target {
        let own = self.view.pod_ips.as_deref().and_then(<[IpAddr]>::first);
        Target {
            runtime: Arc::clone(&self.context.runtime),
            pod: self.id.clone(),
            container: spec.clone(),
            ip: own.or(self.context.host_ips.first()).copied(),
        }
    }

    /// Ends containers whose probes say that they do not work; they are started again as those that end themselves.
    async fn end_unhealthy(&mut self, pod: &Arc<Pod>) {
        let failed = |(name, verdict): (&String, &Verdict)| Some((name.clone(), verdict.failed?));
        let failed: Vec<_> = self.view.verdicts.iter().filter_map(failed).collect();
        for (name, probe) in &failed {
            let message = format!("Container {name} failed {probe} probe, will be restarted");
            self.context.events.normal(pod, Some(name), "Killing", message);
            let Some(spec) = lasting(pod).find(|spec| spec.name == *name) else {
                continue;
            };
            self.probes.forget(name);
            let own = match *probe {
                "startup" => &spec.startup_probe,
                _ => &spec.liveness_probe,
            };
            let own = own
                .as_ref()
                .and_then(|probe| probe.termination_grace_period_seconds);
            let own = own.and_then(|seconds| u64::try_from(seconds).ok());
            let grace = own.map_or_else(|| grace(pod), Duration::from_secs);
            self.stop(Some(pod), name, grace).await;
        }
        if !failed.is_empty() {
            self.look(pod);
        }
    }

    /// Works out the status. A pod that ended before this process began, and left nothing, stays as it is.
    fn settle(&mut self, pod: &Pod) {
        let over = self.told.phase.as_deref().is_some_and(status::is_final);
        if !over {
            self.status = status::status(pod, &self.status, &self.view, Timestamp::now());
        }
    }

    async fn sandbox(&mut self, pod: &Pod, next: &mut Next) -> Option<Sandbox> {
        if let Some(wait) = self.backoff.waits(SANDBOX).filter(|wait| *wait > Instant::now()) {
            next.at(wait);
            return None;
        }
        let of_pod = pod.spec.clone().unwrap_or_default();
        let resolv_conf = super::dns::resolv_conf(&self.context, &self.id.namespace, &of_pod);
        let spec = wishes::sandbox(pod, &self.id, resolv_conf);
        match self.context.runtime.ensure_sandbox(spec).await {
            Ok(sandbox) => {
                self.backoff.forget(SANDBOX);
                Some(sandbox)
            }
            Err(failure) => {
                warn!(pod = self.id.name, %failure, "a pod has no place yet");
                self.context.events.warning(
                    pod,
                    None,
                    failure.reason,
                    format!("Failed to create pod sandbox: {}", failure.message),
                );
                next.at(self.backoff.failed(SANDBOX, Instant::now()));
                None
            }
        }
    }

    /// Makes the volumes, and keeps them up to date; whether containers may start.
    async fn volumes(&mut self, pod: &Pod, next: &mut Next) -> bool {
        if let Some(wait) = self.backoff.waits(VOLUMES).filter(|wait| *wait > Instant::now()) {
            next.at(wait);
            return false;
        }
        let sources = Sources {
            client: &self.context.client,
            namespace: &self.id.namespace,
        };
        let dir = self.context.runtime.dirs().volumes(&self.id.uid);
        match self.volumes.prepare(&sources, pod, &dir).await {
            Ok(()) => {
                self.backoff.forget(VOLUMES);
                if let Some(at) = self.volumes.next() {
                    next.at(at);
                }
                true
            }
            Err(failure) => {
                warn!(pod = self.id.name, %failure, "a pod has no volumes yet");
                self.context
                    .events
                    .warning(pod, None, failure.reason, failure.message);
                next.at(self.backoff.failed(VOLUMES, Instant::now()));
                false
            }
        }
    }

    /// Init containers, one after the other; whether the others may start.
    async fn init(&mut self, pod: &Arc<Pod>, next: &mut Next) -> bool {
        for wanted in status::specs(pod, true) {
            let sidecar = status::is_sidecar(wanted);
            let ended_well = self
                .view
                .container(&wanted.name)
                .is_some_and(|container| matches!(container.state, State::Exited { code: 0, .. }));
            if ended_well && !sidecar {
                continue;
            }
            self.container(pod, wanted, sidecar, next).await;
            if !(sidecar && self.view.has_started(&wanted.name)) {
                return false;
            }
        }
        true
    }

    /// Starts a container that should run and does not. `again`: also one that has ended well.
    async fn container(&mut self, pod: &Arc<Pod>, wanted: &Wanted, again: bool, next: &mut Next) {
        let name = wanted.name.as_str();
        let now = Instant::now();
        let attempt = match self.view.container(name) {
            Some(container) => match &container.state {
                State::Running { .. } => {
                    self.view.waiting.remove(name);
                    return;
                }
                State::Exited {
                    started,
                    finished,
                    code,
                    ..
                } => {
                    let restarts = status::is_sidecar(wanted)
                        || match status::restart_policy(pod) {
                            "Always" => again || *code != 0,
                            "OnFailure" => *code != 0,
                            _ => false,
                        };
                    if !restarts {
                        return;
                    }
                    let ran = Duration::try_from(finished.duration_since(*started)).unwrap_or_default();
                    let attempt = container.attempt;
                    let (until, delay) = self.backoff.after(name, attempt, ran, now);
                    if until > now {
                        next.at(until);
                        self.back_off(pod, name, delay);
                        return;
                    }
                    attempt.saturating_add(1)
                }
            },
            None => self.attempts_before(name),
        };
        // What failed to start waits, too.
        let failing = format!("/start/{name}");
        if let Some(wait) = self.backoff.waits(&failing).filter(|wait| *wait > now) {
            next.at(wait);
            return;
        }
        match self.start(pod, wanted, attempt).await {
            Ok(()) => {
                self.backoff.forget(&failing);
                self.view.waiting.remove(name);
                let events = &self.context.events;
                events.normal(pod, Some(name), "Created", format!("Container created: {name}"));
                events.normal(pod, Some(name), "Started", format!("Container started: {name}"));
                self.after_start(pod, wanted).await;
            }
            Err(failure) => {
                let reason = match failure.reason {
                    "ErrImagePull" if self.backoff.waits(&failing).is_some() => "ImagePullBackOff",
                    reason => reason,
                };
                let told = self
                    .view
                    .waiting
                    .get(name)
                    .is_some_and(|(_, message)| *message == failure.message);
                if !told {
                    self.context
                        .events
                        .warning(pod, Some(name), "Failed", format!("Error: {failure}"));
                }
                self.view
                    .waiting
                    .insert(name.to_owned(), (reason.to_owned(), failure.message));
                next.at(self.backoff.failed(&failing, now));
            }
        }
        self.look(pod);
    }

    /// Runs the hook of a container that has been started; one whose hook fails is ended.
    async fn after_start(&self, pod: &Arc<Pod>, wanted: &Wanted) {
        let hook = wanted
            .lifecycle
            .as_ref()
            .and_then(|hooks| hooks.post_start.as_ref());
        let Some(hook) = hook else { return };
        if let Err(why) = self.target(wanted).hook(hook, None).await {
            let (name, events) = (Some(wanted.name.as_str()), &self.context.events);
            events.warning(
                pod,
                name,
                "FailedPostStartHook",
                format!("PostStartHook failed: {why}"),
            );
            events.normal(pod, name, "Killing", "FailedPostStartHook".to_owned());
            self.stop(Some(pod), &wanted.name, grace(pod)).await;
        }
    }

    fn back_off(&mut self, pod: &Pod, name: &str, delay: Duration) {
        let message = format!(
            "back-off {}s restarting failed container={name} pod={}_{}({})",
            delay.as_secs(),
            self.id.name,
            self.id.namespace,
            self.id.uid
        );
        let waiting = ("CrashLoopBackOff".to_owned(), message);
        if self.view.waiting.insert(name.to_owned(), waiting).is_none() {
            let message = format!("Back-off restarting failed container {name}");
            self.context.events.warning(pod, Some(name), "BackOff", message);
        }
    }

    /// How often a container that the runtime knows nothing of was started before.
    fn attempts_before(&self, name: &str) -> u32 {
        let statuses = self.status.container_statuses.iter().flatten();
        let known = statuses.chain(self.status.init_container_statuses.iter().flatten());
        known
            .filter(|status| status.name == name && status.container_id.is_some())
            .find_map(|status| u32::try_from(status.restart_count).ok())
            .map_or(0, |count| count.saturating_add(1))
    }

    async fn start(&self, pod: &Pod, wanted: &Wanted, attempt: u32) -> Result<(), Failure> {
        let facts = Facts {
            pod_ips: match self.view.pod_ips.as_deref() {
                Some([]) | None => self.context.host_ips.clone(),
                Some(ips) => ips.to_vec(),
            },
            host_ips: self.context.host_ips.clone(),
        };
        let env = env::environment(&self.context.client, pod, wanted, &facts).await?;
        let known = env.iter().cloned().collect();
        let volumes = pod.spec.as_ref().and_then(|spec| spec.volumes.as_deref());
        let mounts = self.volumes.mounts(wanted, &known, volumes.unwrap_or_default())?;
        let spec = ContainerSpec {
            attempt,
            env,
            mounts,
            ..wishes::container(pod, wanted, &known)
        };
        self.context.runtime.start(&self.id, &spec).await
    }

    /// Ends all containers: sidecars after the others, the last one first.
    async fn end(&mut self, pod: Option<&Arc<Pod>>, grace: Duration) {
        let until = Instant::now() + grace;
        let init = pod.map_or(&[][..], |pod| status::specs(pod, true));
        let sidecars: Vec<&str> = init
            .iter()
            .filter(|spec| status::is_sidecar(spec))
            .map(|spec| spec.name.as_str())
            .collect();
        let containers = self.context.runtime.containers(&self.id.uid);
        for container in &containers {
            self.probes.forget(&container.name);
        }
        let running = |name: &str| {
            let mut containers = containers.iter();
            containers
                .any(|container| container.name == name && matches!(container.state, State::Running { .. }))
        };
        let main = containers.iter().map(|container| container.name.as_str());
        let main = main.filter(|name| running(name) && !sidecars.contains(name));
        join_all(main.map(|name| self.stop(pod, name, grace))).await;
        for name in sidecars.iter().rev().filter(|name| running(name)) {
            self.stop(pod, name, until.saturating_duration_since(Instant::now()))
                .await;
        }
    }

    /// Ends one container: its hook first, if there is time.
    async fn stop(&self, pod: Option<&Arc<Pod>>, name: &str, grace: Duration) {
        let begin = Instant::now();
        let mut specs = pod.into_iter().flat_map(|pod| lasting(pod));
        let spec = specs.find(|spec| spec.name == name);
        let hook = spec.and_then(|spec| Some((spec, spec.lifecycle.as_ref()?.pre_stop.as_ref()?)));
        let mut left = grace;
        if let (Some((spec, hook)), Some(pod), false) = (hook, pod, grace.is_zero()) {
            if let Err(why) = self.target(spec).hook(hook, Some(grace)).await {
                let message = format!("PreStopHook failed: {why}");
                self.context
                    .events
                    .warning(pod, Some(name), "FailedPreStopHook", message);
            }
            left = grace.saturating_sub(begin.elapsed()).max(AFTER_HOOK);
        }
        self.context.runtime.stop(&self.id.uid, name, left).await;
    }

    /// Ends a pod that is to be deleted; whether nothing of it is left.
    async fn finish(&mut self, pod: &Arc<Pod>) -> bool {
        self.look(pod);
        let running = |view: &View| {
            let running =
                |container: &crate::runtime::Container| matches!(container.state, State::Running { .. });
            view.containers.iter().any(running)
        };
        if running(&self.view) {
            for container in status::specs(pod, false) {
                let message = format!("Stopping container {}", container.name);
                self.context
                    .events
                    .normal(pod, Some(&container.name), "Killing", message);
            }
        }
        self.end(Some(pod), grace(pod)).await;
        self.look(pod);
        self.view.ending = true;
        self.view.waiting.clear();
        self.settle(pod);
        // Who watches learns how it ended; the API may have forgotten it already.
        self.tell(pod).await;
        self.remove().await;
        let api: Api<Pod> = Api::namespaced(self.context.client.clone(), &self.id.namespace);
        let preconditions = Preconditions {
            uid: Some(self.id.uid.clone()),
            resource_version: None,
        };
        let now = DeleteParams::default()
            .grace_period(0)
            .preconditions(preconditions);
        match api.delete(&self.id.name, &now).await {
            Ok(_) => true,
            // 409: a pod of the same name, and another uid.
            Err(kube::Error::Api(status)) if matches!(status.code, 404 | 409) => true,
            Err(error) => {
                warn!(pod = self.id.name, %error, "a pod that has ended is still in the API");
                false
            }
        }
    }

    async fn remove(&self) {
        while let Err(failure) = self.context.runtime.remove(&self.id.uid).await {
            warn!(pod = self.id.name, %failure, "a pod cannot be removed yet");
            tokio::time::sleep(super::RETRY).await;
        }
    }

    /// Ends the mirror of a pod whose file has gone.
    async fn hide(&self, pod: &Pod) {
        while let Err(error) = statics::hide(&self.context, pod).await {
            warn!(pod = self.id.name, %error, "a pod whose file has gone is still in the API");
            tokio::time::sleep(super::RETRY).await;
        }
    }

    /// Tells the API the status, if it has changed; whether it knows it now.
    async fn tell(&mut self, pod: &Pod) -> bool {
        let mut uid = Some(&self.id.uid);
        if statics::is_static(pod) {
            uid = None;
            match statics::show(&self.context, pod).await {
                Ok(made) => {
                    if made {
                        self.told = PodStatus::default();
                    }
                }
                Err(error) => {
                    warn!(pod = self.id.name, %error, "a static pod is not shown in the API");
                    return false;
                }
            }
        }
        if self.status == self.told {
            return true;
        }
        let api: Api<Pod> = Api::namespaced(self.context.client.clone(), &self.id.namespace);
        // Conditions of others are kept as they are now.
        let patch = match uid {
            Some(uid) => json!({"metadata": {"uid": uid}, "status": self.status}),
            // That of a mirror is its own.
            None => json!({"status": self.status}),
        };
        match api
            .patch_status(&self.id.name, &PatchParams::default(), &Patch::Merge(&patch))
            .await
        {
            Ok(_) => {
                self.told = self.status.clone();
                true
            }
            // It is gone, or its name is another's: the watch will tell.
            Err(kube::Error::Api(status)) if matches!(status.code, 404 | 409) => {
                debug!(pod = pod.name_any(), %status, "the status of a pod that is gone");
                true
            }
            Err(error) => {
                warn!(pod = self.id.name, %error, "a pod's status was not told");
                false
            }
        }
    }
}

/// The containers that go on, with probes and hooks; init containers have none.
fn lasting(pod: &Pod) -> impl Iterator<Item = &Wanted> {
    let sidecars = status::specs(pod, true).iter();
    let sidecars = sidecars.filter(|spec| status::is_sidecar(spec));
    status::specs(pod, false).iter().chain(sidecars)
}

/// The time that the pod's containers have to end.
fn grace(pod: &Pod) -> Duration {
    let seconds = pod
        .metadata
        .deletion_grace_period_seconds
        .or_else(|| pod.spec.as_ref()?.termination_grace_period_seconds)
        .unwrap_or(30);
    Duration::from_secs(u64::try_from(seconds).unwrap_or_default())
}
