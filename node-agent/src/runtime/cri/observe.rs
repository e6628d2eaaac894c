//! What a container runtime says that it runs.

use std::collections::HashMap;
use std::net::IpAddr;

use jiff::Timestamp;
use tonic::Status;

use super::super::{Container, PodRef, Sandbox, State};
use super::api::{self, Client};
use super::config::{POD_NAME, POD_NAMESPACE, POD_UID};

/// A sandbox of a pod.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) id: String,
    attempt: u32,
    ready: bool,
    ips: Vec<IpAddr>,
}

/// A pod of this node.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Known {
    pub(super) pod: PodRef,
    /// The newest first.
    pub(super) sandboxes: Vec<Place>,
    /// With the runtime's ids and states; the newest first.
    containers: Vec<(String, i32, Container)>,
}

impl Known {
    /// The last sandbox, if it can be used.
    pub(super) fn newest(&self) -> Option<&Place> {
        self.sandboxes.first().filter(|sandbox| sandbox.ready)
    }

    pub(super) fn sandbox(&self) -> Option<Sandbox> {
        self.newest().map(|sandbox| Sandbox {
            ips: sandbox.ips.clone(),
        })
    }

    pub(super) fn next_attempt(&self) -> u32 {
        self.sandboxes
            .first()
            .map_or(0, |sandbox| sandbox.attempt.saturating_add(1))
    }

    /// The last attempt of each container.
    pub(super) fn containers(&self) -> Vec<Container> {
        let mut found: Vec<Container> = Vec::new();
        for (.., container) in &self.containers {
            if !found.iter().any(|newer| newer.name == container.name) {
                found.push(container.clone());
            }
        }
        found
    }

    /// The last attempt of a container, with the runtime's id.
    pub(super) fn container(&self, name: &str) -> Option<(&String, &Container)> {
        let mut containers = self.containers.iter();
        let (id, _, container) = containers.find(|(.., container)| container.name == name)?;
        Some((id, container))
    }

    /// The runtime's ids of all attempts of a container.
    pub(super) fn ids(&self, name: &str) -> Vec<String> {
        let of = self
            .containers
            .iter()
            .filter(|(.., container)| container.name == name);
        of.map(|(id, ..)| id.clone()).collect()
    }
}

fn owner(labels: &HashMap<String, String>) -> Option<PodRef> {
    let get = |label: &str| labels.get(label).cloned();
    Some(PodRef {
        namespace: get(POD_NAMESPACE)?,
        name: get(POD_NAME)?,
        uid: get(POD_UID)?,
    })
}

/// All pods; `runtime`: what begins the ids of containers. What has not changed since `before` is not asked for again.
pub(super) async fn pods(
    client: &Client,
    runtime: &str,
    before: &HashMap<String, Known>,
) -> Result<HashMap<String, Known>, Status> {
    let sandboxes: api::Sandboxes = client.runtime("ListPodSandbox", api::Empty {}).await?;
    let containers: api::Containers = client.runtime("ListContainers", api::Empty {}).await?;
    let mut pods: HashMap<String, Known> = HashMap::new();
    for sandbox in sandboxes.items {
        let Some(pod) = owner(&sandbox.labels) else {
            continue;
        };
        let old = before
            .get(&pod.uid)
            .and_then(|known| known.sandboxes.iter().find(|old| old.id == sandbox.id));
        let ready = sandbox.state == api::READY;
        let ips = match old {
            Some(old) if !old.ips.is_empty() || !ready => old.ips.clone(),
            _ => addresses(client, &sandbox.id).await?,
        };
        let known = pods.entry(pod.uid.clone()).or_insert_with(|| Known {
            pod,
            ..Known::default()
        });
        known.sandboxes.push(Place {
            attempt: sandbox.metadata.map_or(0, |metadata| metadata.attempt),
            id: sandbox.id,
            ready,
            ips,
        });
    }
    for listed in containers.items {
        let Some(pod) = owner(&listed.labels) else {
            continue;
        };
        // One that has only been made has not been started by a program that has been killed meanwhile: it is made again.
        if listed.state == api::CREATED {
            continue;
        }
        let Some(known) = pods.get_mut(&pod.uid) else {
            continue;
        };
        let old = before
            .get(&pod.uid)
            .into_iter()
            .flat_map(|known| &known.containers);
        let old = old
            .into_iter()
            .find(|(id, state, _)| *id == listed.id && *state == listed.state);
        let container = match old {
            Some((.., container)) => container.clone(),
            None => status(client, runtime, &listed).await?,
        };
        known.containers.push((listed.id, listed.state, container));
    }
    for known in pods.values_mut() {
        known
            .sandboxes
            .sort_by_key(|sandbox| std::cmp::Reverse(sandbox.attempt));
        known
            .containers
            .sort_by_key(|(.., container)| std::cmp::Reverse(container.attempt));
    }
    Ok(pods)
}

async fn addresses(client: &Client, id: &str) -> Result<Vec<IpAddr>, Status> {
    let answer: api::SandboxStatusResponse = client
        .runtime("PodSandboxStatus", api::Named { id: id.to_owned() })
        .await?;
    let network = answer
        .status
        .and_then(|status| status.network)
        .unwrap_or_default();
    let more = network.more.iter().map(|more| more.ip.as_str());
    let all = [network.ip.as_str()].into_iter().chain(more);
    Ok(all.filter_map(|ip| ip.parse().ok()).collect())
}

async fn status(client: &Client, prefix: &str, listed: &api::Container) -> Result<Container, Status> {
    let answer: api::ContainerStatusResponse = client
        .runtime(
            "ContainerStatus",
            api::Named {
                id: listed.id.clone(),
            },
        )
        .await?;
    Ok(container(prefix, listed, &answer.status.unwrap_or_default()))
}

fn container(prefix: &str, listed: &api::Container, status: &api::ContainerStatus) -> Container {
    let time = |nanoseconds: i64| Timestamp::from_nanosecond(nanoseconds.into()).unwrap_or_default();
    let started = time(status.started_at);
    let metadata = listed.metadata.clone().unwrap_or_default();
    let state = if status.state == api::RUNNING {
        State::Running { started }
    } else {
        State::Exited {
            started,
            finished: time(status.finished_at),
            code: status.exit_code,
            reason: match (status.reason.as_str(), status.exit_code) {
                ("", 0) => "Completed".to_owned(),
                ("", _) => "Error".to_owned(),
                (reason, _) => reason.to_owned(),
            },
            message: status.message.clone(),
        }
    };
    Container {
        id: format!("{prefix}://{}", listed.id),
        name: metadata.name,
        attempt: metadata.attempt,
        image: status.image.clone().unwrap_or_default().image,
        state,
    }
}

/// Whether pods can be attached; the text says why not.
pub(super) async fn network(client: &Client) -> Result<Result<(), String>, Status> {
    let answer: api::StatusResponse = client.runtime("Status", api::Empty {}).await?;
    let conditions = answer.status.unwrap_or_default().conditions;
    let bad = conditions.into_iter().find(|condition| !condition.status);
    Ok(bad.map_or(Ok(()), |bad| {
        Err(format!("{} is false: {}", bad.kind, bad.message))
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn listed(id: &str, name: &str, attempt: u32) -> api::Container {
        api::Container {
            id: id.into(),
            metadata: Some(api::ContainerMetadata {
                name: name.into(),
                attempt,
            }),
            ..api::Container::default()
        }
    }

    #[test]
    fn the_last_attempt_of_a_container_is_what_counts() {
        let running = api::ContainerStatus {
            state: api::RUNNING,
            started_at: 5_000_000_000,
            ..api::ContainerStatus::default()
        };
        let ended = api::ContainerStatus {
            state: 2,
            exit_code: 137,
            reason: "OOMKilled".into(),
            ..running.clone()
        };
        let make = |id: &str, attempt: u32, status: &api::ContainerStatus| {
            let container = container("containerd", &listed(id, "c", attempt), status);
            (id.to_owned(), status.state, container)
        };
        let known = Known {
            containers: vec![make("2", 1, &running), make("1", 0, &ended)],
            ..Known::default()
        };
        let containers = known.containers();
        assert_eq!(
            (containers.len(), containers[0].id.as_str()),
            (1, "containerd://2")
        );
        assert!(matches!(containers[0].state, State::Running { started } if started.as_second() == 5));
        assert_eq!(known.ids("c"), ["2", "1"]);
        assert!(
            matches!(&known.containers[1].2.state, State::Exited { code: 137, reason, .. } if reason == "OOMKilled")
        );
        assert_eq!(known.container("d"), None);
    }

    #[test]
    fn a_pod_is_known_by_its_labels() {
        let labels = [(POD_NAME, "p"), (POD_NAMESPACE, "d"), (POD_UID, "u")];
        let labels: HashMap<String, String> = labels
            .into_iter()
            .map(|(label, value)| (label.to_owned(), value.to_owned()))
            .collect();
        assert_eq!(owner(&labels).unwrap().uid, "u");
        assert_eq!(owner(&HashMap::new()), None);
    }
}
