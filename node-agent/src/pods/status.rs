//! From what runs to what the API is told. No I/O.

use std::collections::HashMap;
use std::net::IpAddr;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{
    Container as ContainerSpec, ContainerState, ContainerStateRunning, ContainerStateTerminated,
    ContainerStateWaiting, ContainerStatus, HostIP, Pod, PodCondition, PodIP, PodStatus,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;

use super::probes::Verdict;
use crate::runtime::{Container, State};

/// What is known of a pod's containers.
#[derive(Debug, Default)]
pub(super) struct View {
    /// `None`: there is no sandbox.
    pub(super) pod_ips: Option<Vec<IpAddr>>,
    pub(super) host_ips: Vec<IpAddr>,
    pub(super) containers: Vec<Container>,
    /// Why a container does not run: reason and message.
    pub(super) waiting: HashMap<String, (String, String)>,
    /// What probes say of the containers that run.
    pub(super) verdicts: HashMap<String, Verdict>,
    /// Whether the pod is being ended.
    pub(super) ending: bool,
}

impl View {
    pub(super) fn container(&self, name: &str) -> Option<&Container> {
        self.containers.iter().find(|container| container.name == name)
    }

    /// Whether the container runs and its startup probe has passed.
    pub(super) fn has_started(&self, name: &str) -> bool {
        let runs = self
            .container(name)
            .is_some_and(|container| matches!(container.state, State::Running { .. }));
        runs && self.verdicts.get(name).is_none_or(|verdict| verdict.started)
    }
}

/// The pod's containers, `init` or not.
pub(super) fn specs(pod: &Pod, init: bool) -> &[ContainerSpec] {
    let Some(spec) = &pod.spec else { return &[] };
    if init {
        spec.init_containers.as_deref().unwrap_or_default()
    } else {
        &spec.containers
    }
}

/// What the API was told of a container.
pub(super) fn of<'a>(status: &'a PodStatus, name: &str) -> Option<&'a ContainerStatus> {
    let lists = [&status.container_statuses, &status.init_container_statuses];
    let mut statuses = lists.into_iter().flatten().flatten();
    statuses.find(|status| status.name == name)
}

/// `restartPolicy` of the pod.
pub(super) fn restart_policy(pod: &Pod) -> &str {
    let spec = pod.spec.as_ref();
    spec.and_then(|spec| spec.restart_policy.as_deref())
        .unwrap_or("Always")
}

/// Whether an init container goes on beside the others.
pub(super) fn is_sidecar(spec: &ContainerSpec) -> bool {
    spec.restart_policy.as_deref() == Some("Always")
}

/// Whether the containers of the pod may start: all init containers are done, sidecars run.
pub(super) fn initialized(pod: &Pod, view: &View) -> bool {
    specs(pod, true).iter().all(|spec| {
        let state = view.container(&spec.name).map(|container| &container.state);
        match state {
            Some(State::Exited { code, .. }) => is_sidecar(spec) || *code == 0,
            Some(State::Running { .. }) => is_sidecar(spec) && view.has_started(&spec.name),
            None => false,
        }
    })
}

/// Whether nothing of the pod will run again: its phase says so for good.
pub(super) fn is_final(phase: &str) -> bool {
    matches!(phase, "Succeeded" | "Failed")
}

/// `Pending`, `Running`, `Succeeded` or `Failed` (kubelet `getPhase`).
fn phase(pod: &Pod, view: &View) -> &'static str {
    let policy = restart_policy(pod);
    let failed_for_good = |spec: &ContainerSpec| {
        let state = view.container(&spec.name).map(|container| &container.state);
        matches!(state, Some(State::Exited { code, .. }) if *code != 0) && (policy == "Never" || view.ending)
    };
    if specs(pod, true)
        .iter()
        .any(|spec| !is_sidecar(spec) && failed_for_good(spec))
    {
        return "Failed";
    }
    if !initialized(pod, view) {
        return if view.ending { "Failed" } else { "Pending" };
    }
    let mut codes = Vec::new();
    for spec in specs(pod, false) {
        match view.container(&spec.name).map(|container| &container.state) {
            Some(State::Running { .. }) => return "Running",
            Some(State::Exited { code, .. }) => codes.push(*code),
            None if view.ending => codes.push(137),
            None => return "Pending",
        }
    }
    let clean = codes.iter().all(|code| *code == 0);
    match policy {
        _ if view.ending && clean => "Succeeded",
        _ if view.ending => "Failed",
        "Never" if clean => "Succeeded",
        "Never" => "Failed",
        "OnFailure" if clean => "Succeeded",
        _ => "Running",
    }
}

/// The status of the pod, after the last one that is known.
pub(super) fn status(pod: &Pod, old: &PodStatus, view: &View, now: Timestamp) -> PodStatus {
    let phase = phase(pod, view);
    let waiting = if view.pod_ips.is_none() || initialized(pod, view) {
        "ContainerCreating"
    } else {
        "PodInitializing"
    };
    let list = |init: bool, before: &Option<Vec<ContainerStatus>>| -> Vec<ContainerStatus> {
        let before = before.as_deref().unwrap_or_default();
        let of = |spec: &ContainerSpec| before.iter().find(|status| status.name == spec.name);
        specs(pod, init)
            .iter()
            .map(|spec| container_status(spec, of(spec), view, init, waiting))
            .collect()
    };
    let init = list(true, &old.init_container_statuses);
    let containers = list(false, &old.container_statuses);
    let ready = !is_final(phase) && containers.iter().all(|status| status.ready);
    let unready: Vec<&str> = containers
        .iter()
        .filter(|status| !status.ready)
        .map(|status| status.name.as_str())
        .collect();
    let why = match phase {
        "Succeeded" => Some(("PodCompleted", String::new())),
        "Failed" => Some(("PodFailed", String::new())),
        _ if ready => None,
        _ => Some((
            "ContainersNotReady",
            format!("containers with unready status: [{}]", unready.join(" ")),
        )),
    };
    let gates = open_gates(pod);
    let done = initialized(pod, view);
    let not_done = (!done).then(|| {
        let names: Vec<&str> = specs(pod, true).iter().map(|spec| spec.name.as_str()).collect();
        (
            "ContainersNotInitialized",
            format!("containers with incomplete status: [{}]", names.join(" ")),
        )
    });
    let conditions = Conditions {
        old: old.conditions.as_deref().unwrap_or_default(),
        told: told(pod),
        now,
    };
    let conditions = conditions.with(&[
        (
            "PodReadyToStartContainers",
            view.pod_ips.is_some() && !is_final(phase),
            None,
        ),
        ("Initialized", done, not_done),
        ("Ready", ready && gates.is_none(), why.clone().or(gates)),
        ("ContainersReady", ready, why),
        ("PodScheduled", true, None),
    ]);
    let host =
        |ips: &[IpAddr]| -> Vec<HostIP> { ips.iter().map(|ip| HostIP { ip: ip.to_string() }).collect() };
    let pod_ips = view
        .pod_ips
        .as_deref()
        .map(|ips| if ips.is_empty() { &view.host_ips } else { ips });
    let pod_ips = pod_ips.map(|ips| {
        ips.iter()
            .map(|ip| PodIP { ip: ip.to_string() })
            .collect::<Vec<_>>()
    });
    PodStatus {
        phase: Some(phase.to_owned()),
        conditions: Some(conditions),
        init_container_statuses: (!init.is_empty()).then_some(init),
        container_statuses: Some(containers),
        host_ip: view.host_ips.first().map(ToString::to_string),
        host_ips: Some(host(&view.host_ips)),
        pod_ip: pod_ips
            .as_ref()
            .and_then(|ips| ips.first().map(|ip| ip.ip.clone()))
            .or_else(|| old.pod_ip.clone()),
        pod_ips: pod_ips.or_else(|| old.pod_ips.clone()),
        start_time: old.start_time.clone().or(Some(Time(seconds(now)))),
        ..old.clone()
    }
}

/// The conditions that the API has.
fn told(pod: &Pod) -> &[PodCondition] {
    let conditions = pod
        .status
        .as_ref()
        .and_then(|status| status.conditions.as_deref());
    conditions.unwrap_or_default()
}

/// Which conditions of others, for which the pod waits, do not hold.
fn open_gates(pod: &Pod) -> Option<(&'static str, String)> {
    let holds = |kind: &str| {
        let mut conditions = told(pod).iter();
        conditions.any(|condition| condition.type_ == kind && condition.status == "True")
    };
    let gates = pod
        .spec
        .iter()
        .flat_map(|spec| spec.readiness_gates.iter().flatten());
    let closed: Vec<String> = gates
        .filter(|gate| !holds(&gate.condition_type))
        .map(|gate| {
            format!(
                "corresponding condition of pod readiness gate {:?} does not exist or is not \"True\"",
                gate.condition_type
            )
        })
        .collect();
    (!closed.is_empty()).then(|| ("ReadinessGatesNotReady", closed.join(", ")))
}

/// Times of the API are whole seconds.
fn seconds(time: Timestamp) -> Timestamp {
    Timestamp::from_second(time.as_second()).unwrap_or(time)
}

fn terminated(id: &str, state: &State) -> Option<ContainerStateTerminated> {
    let State::Exited {
        started,
        finished,
        code,
        reason,
        message,
    } = state
    else {
        return None;
    };
    Some(ContainerStateTerminated {
        container_id: Some(id.to_owned()),
        exit_code: *code,
        finished_at: Some(Time(seconds(*finished))),
        started_at: Some(Time(seconds(*started))),
        message: Some(message.clone()).filter(|message| !message.is_empty()),
        reason: Some(reason.clone()),
        signal: None,
    })
}

fn container_status(
    spec: &ContainerSpec,
    old: Option<&ContainerStatus>,
    view: &View,
    init: bool,
    default_reason: &str,
) -> ContainerStatus {
    let container = view.container(&spec.name);
    let waiting = view.waiting.get(&spec.name);
    let wait = |reason: &str, message: &str| ContainerState {
        waiting: Some(ContainerStateWaiting {
            reason: Some(reason.to_owned()),
            message: Some(message.to_owned()).filter(|message| !message.is_empty()),
        }),
        ..ContainerState::default()
    };
    let ended = |ended: ContainerStateTerminated| ContainerState {
        terminated: Some(ended),
        ..ContainerState::default()
    };
    let state = match container {
        Some(container) => match (&container.state, waiting) {
            (State::Running { started }, _) => ContainerState {
                running: Some(ContainerStateRunning {
                    started_at: Some(Time(seconds(*started))),
                }),
                ..ContainerState::default()
            },
            (State::Exited { .. }, Some((reason, message))) => wait(reason, message),
            (state, None) => terminated(&container.id, state).map(ended).unwrap_or_default(),
        },
        None => match waiting {
            Some((reason, message)) => wait(reason, message),
            None => wait(default_reason, ""),
        },
    };
    let runs = state.running.is_some();
    // The end before this one: of the attempt that was last told, or of this one while it waits to start again.
    let told = old.and_then(|old| old.state.as_ref()?.terminated.clone());
    let this = container.filter(|_| state.waiting.is_some());
    let last = match this.and_then(|container| terminated(&container.id, &container.state)) {
        Some(end) => Some(ended(end)),
        None => match (told, container) {
            (Some(end), Some(container)) if end.container_id.as_deref() != Some(&container.id) => {
                Some(ended(end))
            }
            _ => old.and_then(|old| old.last_state.clone()),
        },
    };
    let done = init && !is_sidecar(spec);
    let exited_well = state.terminated.as_ref().is_some_and(|end| end.exit_code == 0);
    let ready = if done {
        exited_well
    } else {
        runs && view.verdicts.get(&spec.name).is_none_or(|verdict| verdict.ready)
    };
    let known = || old.and_then(|old| old.container_id.clone());
    ContainerStatus {
        name: spec.name.clone(),
        image: spec.image.clone().unwrap_or_default(),
        image_id: String::new(),
        container_id: container.map(|container| container.id.clone()).or_else(known),
        ready,
        started: Some(view.has_started(&spec.name)),
        restart_count: container
            .and_then(|container| i32::try_from(container.attempt).ok())
            .or_else(|| old.map(|old| old.restart_count))
            .unwrap_or_default(),
        state: Some(state),
        last_state: last,
        ..ContainerStatus::default()
    }
}

/// Type, whether it holds, and why not.
type Wanted<'a> = (&'a str, bool, Option<(&'a str, String)>);

struct Conditions<'a> {
    /// As they were worked out last.
    old: &'a [PodCondition],
    told: &'a [PodCondition],
    now: Timestamp,
}

impl Conditions<'_> {
    /// Ours as wanted, others' as the API has them.
    fn with(self, wanted: &[Wanted<'_>]) -> Vec<PodCondition> {
        let mut conditions: Vec<PodCondition> = wanted
            .iter()
            .map(|(kind, holds, why)| {
                let status = if *holds { "True" } else { "False" };
                let before = self.old.iter().find(|condition| condition.type_ == *kind);
                let since = before
                    .filter(|condition| condition.status == status)
                    .and_then(|condition| condition.last_transition_time.clone());
                PodCondition {
                    type_: (*kind).to_owned(),
                    status: status.to_owned(),
                    last_transition_time: since.or(Some(Time(seconds(self.now)))),
                    reason: why.as_ref().map(|(reason, _)| (*reason).to_owned()),
                    message: why
                        .as_ref()
                        .map(|(_, message)| message.clone())
                        .filter(|message| !message.is_empty()),
                    ..PodCondition::default()
                }
            })
            .collect();
        let others = self.told.iter();
        let others = others.filter(|told| !wanted.iter().any(|(kind, ..)| *kind == told.type_));
        conditions.extend(others.cloned());
        conditions
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn pod(policy: &str) -> Pod {
        serde_json::from_value(json!({
            "metadata": {"name": "p"},
            "spec": {"restartPolicy": policy, "containers": [{"name": "a", "image": "x"}, {"name": "b", "image": "y"}],
                "initContainers": [{"name": "i"}]},
        }))
        .unwrap()
    }

    fn time(second: i64) -> Timestamp {
        Timestamp::from_second(second).unwrap()
    }

    fn running(name: &str, attempt: u32) -> Container {
        Container {
            id: format!("process://{name}-{attempt}"),
            name: name.into(),
            attempt,
            image: String::new(),
            state: State::Running { started: time(5) },
        }
    }

    fn exited(name: &str, code: i32) -> Container {
        Container {
            state: State::Exited {
                started: time(5),
                finished: time(9),
                code,
                reason: if code == 0 { "Completed" } else { "Error" }.into(),
                message: String::new(),
            },
            ..running(name, 0)
        }
    }

    fn view(containers: &[Container]) -> View {
        View {
            pod_ips: Some(vec!["10.0.0.2".parse().unwrap()]),
            host_ips: vec!["192.0.2.1".parse().unwrap()],
            containers: containers.to_vec(),
            ..View::default()
        }
    }

    fn condition<'a>(status: &'a PodStatus, kind: &str) -> &'a str {
        let list = status.conditions.as_ref().unwrap();
        &list
            .iter()
            .find(|condition| condition.type_ == kind)
            .unwrap()
            .status
    }

    #[test]
    fn phases() {
        let init = exited("i", 0);
        for (policy, containers, expected) in [
            ("Always", vec![], "Pending"),
            ("Always", vec![running("i", 0)], "Pending"),
            ("Never", vec![exited("i", 1)], "Failed"),
            ("Always", vec![exited("i", 1)], "Pending"),
            ("Always", vec![init.clone(), running("a", 0)], "Running"),
            ("Always", vec![init.clone(), exited("a", 0)], "Pending"),
            (
                "Always",
                vec![init.clone(), exited("a", 0), exited("b", 0)],
                "Running",
            ),
            (
                "OnFailure",
                vec![init.clone(), exited("a", 0), exited("b", 0)],
                "Succeeded",
            ),
            (
                "OnFailure",
                vec![init.clone(), exited("a", 0), exited("b", 1)],
                "Running",
            ),
            (
                "Never",
                vec![init.clone(), exited("a", 0), exited("b", 1)],
                "Failed",
            ),
            (
                "Never",
                vec![init.clone(), exited("a", 0), exited("b", 0)],
                "Succeeded",
            ),
        ] {
            assert_eq!(
                phase(&pod(policy), &view(&containers)),
                expected,
                "{policy} {containers:?}"
            );
        }
        let mut ending = view(&[init, exited("a", 0), exited("b", 143)]);
        ending.ending = true;
        assert_eq!(phase(&pod("Always"), &ending), "Failed");
    }

    #[test]
    fn a_pod_is_ready_when_all_containers_are() {
        let pod = pod("Always");
        let containers = [exited("i", 0), running("a", 0), running("b", 0)];
        let first = status(&pod, &PodStatus::default(), &view(&containers), time(10));
        assert_eq!(condition(&first, "Ready"), "True");
        assert_eq!(first.pod_ip.as_deref(), Some("10.0.0.2"));
        assert!(first.init_container_statuses.as_ref().unwrap()[0].ready);
        let mut unready = view(&containers);
        let verdict = Verdict {
            started: false,
            ready: false,
            failed: None,
        };
        unready.verdicts.insert("b".into(), verdict);
        let second = status(&pod, &first, &unready, time(20));
        assert_eq!(condition(&second, "Ready"), "False");
        let conditions = second.conditions.as_ref().unwrap();
        let since = |kind: &str| {
            let found = conditions
                .iter()
                .find(|condition| condition.type_ == kind)
                .unwrap();
            found.last_transition_time.as_ref().unwrap().0
        };
        assert_eq!((since("Ready"), since("Initialized")), (time(20), time(10)));
        assert_eq!(second.start_time, first.start_time);
        let started = |status: &PodStatus| of(status, "b").unwrap().started;
        assert_eq!((started(&first), started(&second)), (Some(true), Some(false)));
        // a condition that somebody else must set
        let mut gated = pod;
        let gate = json!([{"conditionType": "example.org/in-service"}]);
        gated.spec.as_mut().unwrap().readiness_gates = serde_json::from_value(gate).unwrap();
        let third = status(&gated, &first, &view(&containers), time(30));
        assert_eq!(condition(&third, "Ready"), "False");
        assert_eq!(condition(&third, "ContainersReady"), "True");
        let others = json!({"conditions": [{"type": "example.org/in-service", "status": "True"}]});
        gated.status = serde_json::from_value(others).unwrap();
        let fourth = status(&gated, &third, &view(&containers), time(40));
        assert_eq!(condition(&fourth, "Ready"), "True");
    }

    #[test]
    fn the_end_before_is_told_while_the_next_attempt_waits_and_runs() {
        let pod = pod("Always");
        let init = exited("i", 0);
        let ended = [init.clone(), exited("a", 3), running("b", 0)];
        let first = status(&pod, &PodStatus::default(), &view(&ended), time(10));
        let state = |status: &PodStatus| status.container_statuses.as_ref().unwrap()[0].clone();
        assert_eq!(state(&first).state.unwrap().terminated.unwrap().exit_code, 3);
        let mut waits = view(&ended);
        waits
            .waiting
            .insert("a".into(), ("CrashLoopBackOff".into(), "back-off".into()));
        let second = status(&pod, &first, &waits, time(11));
        assert_eq!(
            state(&second).state.unwrap().waiting.unwrap().reason.as_deref(),
            Some("CrashLoopBackOff")
        );
        assert_eq!(
            state(&second).last_state.unwrap().terminated.unwrap().exit_code,
            3
        );
        let third = status(
            &pod,
            &second,
            &view(&[init, running("a", 1), running("b", 0)]),
            time(20),
        );
        assert_eq!(state(&third).restart_count, 1);
        assert!(state(&third).state.unwrap().running.is_some());
        assert_eq!(state(&third).last_state.unwrap().terminated.unwrap().exit_code, 3);
    }
}
