//! Decisions, without an API: a model of one that carries them out shows that they come to rest, and where.

use std::collections::BTreeMap;

use rstest::rstest;

use super::*;

fn of<T: k8s_openapi::serde::de::DeserializeOwned>(value: Value) -> T {
    serde_json::from_value(value).unwrap()
}

/// Holds what the plans made; pods become ready when the test says so.
struct Model {
    deployment: Deployment,
    sets: BTreeMap<String, ReplicaSet>,
    pods: BTreeMap<String, Pod>,
    number: usize,
    /// The fewest available and the most pods at any time since the last [`Model::rest`].
    bounds: (i32, i32),
}

impl Model {
    fn new(spec: &Value) -> Self {
        let mut full = json!({
            "replicas": 10, "selector": {"matchLabels": {"app": "a"}},
            "template": {"metadata": {"labels": {"app": "a"}}, "spec": {"containers": [{"name": "c", "image": "1"}]}},
            "strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": "25%", "maxUnavailable": "25%"}},
        });
        json_patch::merge(&mut full, spec);
        Self {
            deployment: of(
                json!({"metadata": {"name": "d", "namespace": "x", "uid": "d", "generation": 1}, "spec": full}),
            ),
            sets: BTreeMap::new(),
            pods: BTreeMap::new(),
            number: 0,
            bounds: (i32::MAX, 0),
        }
    }

    fn change(&mut self, spec: &Value) {
        let mut value = serde_json::to_value(&self.deployment).unwrap();
        json_patch::merge(&mut value["spec"], spec);
        value["metadata"]["generation"] = (value["metadata"]["generation"].as_i64().unwrap() + 1).into();
        self.deployment = of(value);
    }

    fn carry_out(&mut self, actions: Vec<Action>) {
        for action in actions {
            self.number += 1;
            match action {
                Action::CreatePod { mut pod, .. } => {
                    let name = format!("p{:05}", self.number);
                    pod.metadata.name = Some(name.clone());
                    pod.metadata.uid = Some(name.clone());
                    self.pods.insert(name, *pod);
                }
                Action::DeletePod { pod, .. } => {
                    self.pods.remove(&pod.name_any());
                }
                Action::CreateSet { mut set, .. } => {
                    let name = set.name_any();
                    set.metadata.uid = Some(name.clone());
                    set.metadata.generation = Some(1);
                    assert!(self.sets.insert(name, *set).is_none());
                }
                Action::PatchSet { set, patch, .. } => {
                    let mut value = serde_json::to_value(&self.sets[&set.name_any()]).unwrap();
                    json_patch::merge(&mut value, &patch);
                    self.sets.insert(set.name_any(), of(value));
                }
                Action::DeleteSet(set) => {
                    self.sets.remove(&set.name_any());
                }
                Action::PatchDeployment { patch, .. } => {
                    let mut value = serde_json::to_value(&self.deployment).unwrap();
                    json_patch::merge(&mut value, &patch);
                    self.deployment = of(value);
                }
                Action::Status { of: subject, status } if subject.kind == "Deployment" => {
                    let mut value = serde_json::to_value(&self.deployment).unwrap();
                    json_patch::merge(&mut value["status"], &status);
                    self.deployment = of(value);
                }
                Action::Status { of: subject, status } => {
                    let mut value = serde_json::to_value(&self.sets[&subject.name]).unwrap();
                    json_patch::merge(&mut value["status"], &status);
                    self.sets.insert(subject.name, of(value));
                }
                other => panic!("{other:?}"),
            }
            let available = self
                .pods
                .values()
                .filter(|pod| pods::ready_since(pod).is_some())
                .count();
            let active = self.pods.len();
            self.bounds.0 = self.bounds.0.min(i32::try_from(available).unwrap());
            self.bounds.1 = self.bounds.1.max(i32::try_from(active).unwrap());
        }
    }

    /// One round of every controller; false when nobody had anything to do.
    fn step(&mut self) -> bool {
        let now = Timestamp::UNIX_EPOCH;
        let sets: Vec<Arc<ReplicaSet>> = self.sets.values().cloned().map(Arc::new).collect();
        let pods: Vec<Arc<Pod>> = self.pods.values().cloned().map(Arc::new).collect();
        let mut plans = vec![deployment::plan(&self.deployment, sets.iter(), pods.iter(), now)];
        for set in &sets {
            plans.push(Set::of_replica_set(set).unwrap().plan(pods.iter(), now));
        }
        let mut busy = false;
        for plan in plans {
            busy |= !plan.actions.is_empty();
            self.carry_out(plan.actions);
        }
        busy
    }

    /// Makes the oldest pod ready that is not and whose image is good.
    fn one_gets_ready(&mut self) -> bool {
        let waiting = self.pods.values_mut().find(|pod| {
            pods::ready_since(pod).is_none()
                && pod.spec.as_ref().unwrap().containers[0].image.as_deref() != Some("bad")
        });
        let Some(pod) = waiting else { return false };
        pod.status = Some(of(json!({
            "phase": "Running",
            "conditions": [{"type": "Ready", "status": "True", "lastTransitionTime": "1970-01-01T00:00:00Z"}],
        })));
        true
    }

    /// Until nothing changes any more.
    fn rest(&mut self) -> (i32, i32) {
        self.bounds = (i32::MAX, 0);
        for _ in 0..10_000 {
            if !self.step() && !self.one_gets_ready() {
                return self.bounds;
            }
        }
        panic!("does not come to rest");
    }

    fn images(&self) -> BTreeMap<String, usize> {
        let mut images = BTreeMap::new();
        for pod in self.pods.values() {
            let image = pod.spec.as_ref().unwrap().containers[0].image.clone().unwrap();
            *images.entry(image).or_default() += 1;
        }
        images
    }

    fn condition(&self, kind: &str) -> (String, String) {
        let conditions = self
            .deployment
            .status
            .as_ref()
            .unwrap()
            .conditions
            .as_ref()
            .unwrap();
        let condition = conditions
            .iter()
            .find(|condition| condition.type_ == kind)
            .unwrap();
        (condition.status.clone(), condition.reason.clone().unwrap())
    }
}

fn image(name: &str) -> Value {
    json!({"template": {"spec": {"containers": [{"name": "c", "image": name}]}}})
}

fn images(pairs: &[(&str, usize)]) -> BTreeMap<String, usize> {
    pairs
        .iter()
        .map(|(name, count)| ((*name).to_owned(), *count))
        .collect()
}

#[rstest]
#[case(10, json!("25%"), json!("25%"), 8, 13)]
#[case(10, json!(0), json!(1), 9, 10)]
#[case(10, json!(1), json!(0), 10, 11)]
#[case(10, json!("100%"), json!("0%"), 10, 20)]
#[case(10, json!(0), json!("100%"), 0, 10)]
#[case(1, json!("25%"), json!("25%"), 1, 2)]
#[case(3, json!(0), json!(0), 2, 3)]
fn a_rollout_stays_within_its_bounds(
    #[case] replicas: i32,
    #[case] surge: Value,
    #[case] missing: Value,
    #[case] least: i32,
    #[case] most: i32,
) {
    let mut model = Model::new(&json!({
        "replicas": replicas,
        "strategy": {"rollingUpdate": {"maxSurge": surge, "maxUnavailable": missing}},
    }));
    model.rest();
    let size = usize::try_from(replicas).unwrap();
    assert_eq!(model.images(), images(&[("1", size)]));
    assert_eq!(model.condition("Progressing").1, "NewReplicaSetAvailable");
    model.change(&image("2"));
    let (fewest, largest) = model.rest();
    assert_eq!(model.images(), images(&[("2", size)]));
    assert!(fewest >= least && largest <= most, "{fewest} to {largest}");
    assert_eq!(
        model.condition("Available"),
        ("True".into(), "MinimumReplicasAvailable".into())
    );
}

#[test]
fn a_bad_image_stops_at_the_bounds_and_a_way_back_is_open() {
    let mut model = Model::new(&json!({}));
    model.rest();
    model.change(&image("bad"));
    let (fewest, largest) = model.rest();
    assert_eq!((fewest, largest), (8, 13));
    assert_eq!(model.images(), images(&[("1", 8), ("bad", 5)]));
    model.change(&image("1"));
    let (fewest, _) = model.rest();
    assert!(fewest >= 8, "{fewest}");
    assert_eq!(model.images(), images(&[("1", 10)]));
    assert_eq!(model.sets.len(), 2);
    let annotations = model.deployment.metadata.annotations.as_ref().unwrap();
    assert_eq!(annotations["deployment.kubernetes.io/revision"], "3");
}

#[test]
fn scaling_in_the_middle_of_a_rollout_keeps_the_proportions() {
    let mut model = Model::new(&json!({}));
    model.rest();
    model.change(&image("bad"));
    model.rest();
    model.change(&json!({"replicas": 20}));
    model.rest();
    let now = model.images();
    assert_eq!(now.values().sum::<usize>(), 25, "{now:?}");
    assert!(now["1"] >= 15, "{now:?}");
    model.change(&json!({"replicas": 0}));
    model.rest();
    assert!(model.pods.is_empty());
}

#[test]
fn old_sets_are_kept_up_to_the_limit() {
    let mut model = Model::new(&json!({"replicas": 2, "revisionHistoryLimit": 2}));
    for n in 1..8 {
        model.change(&image(&n.to_string()));
        model.rest();
    }
    assert_eq!(model.sets.len(), 3);
    assert_eq!(model.images(), images(&[("7", 2)]));
}

#[test]
fn a_paused_deployment_is_scaled_but_not_rolled_out() {
    let mut model = Model::new(&json!({"replicas": 2}));
    model.rest();
    model.change(&json!({"paused": true}));
    model.change(&image("2"));
    model.change(&json!({"replicas": 5}));
    model.rest();
    assert_eq!(model.images(), images(&[("1", 5)]));
    assert_eq!(
        model.condition("Progressing"),
        ("Unknown".into(), "DeploymentPaused".into())
    );
    model.change(&json!({"paused": false}));
    model.rest();
    assert_eq!(model.images(), images(&[("2", 5)]));
}

#[test]
fn worthless_pods_go_first() {
    let pod = |name: &str, node: &str, phase: &str, ready: bool| -> Arc<Pod> {
        let conditions = if ready {
            json!([{"type": "Ready", "status": "True"}])
        } else {
            json!([])
        };
        Arc::new(of(json!({
            "metadata": {"name": name}, "spec": {"nodeName": node, "containers": []},
            "status": {"phase": phase, "conditions": conditions},
        })))
    };
    let mut list = [
        pod("serves", "n", "Running", true),
        pod("starts", "n", "Running", false),
        pod("waits", "n", "Pending", false),
        pod("nowhere", "", "Pending", false),
    ];
    pods::by_worth(&mut list);
    let names: Vec<String> = list.iter().map(|pod| pod.name_any()).collect();
    assert_eq!(names, ["nowhere", "waits", "starts", "serves"]);
}

#[test]
fn selectors_select() {
    let labels: BTreeMap<String, String> = [("a".to_owned(), "1".to_owned())].into();
    let fits = |selector: Value| pods::selects(&of(selector), Some(&labels));
    let term = |operator: &str, values: Value| {
        fits(json!({"matchExpressions": [{"key": "a", "operator": operator, "values": values}]}))
    };
    assert!(fits(json!({"matchLabels": {"a": "1"}})));
    assert!(!fits(json!({"matchLabels": {"a": "2"}})));
    assert!(!fits(json!({})));
    assert!(term("In", json!(["1", "2"])) && !term("NotIn", json!(["1"])));
    assert!(term("Exists", Value::Null) && !term("DoesNotExist", Value::Null));
    assert!(!term("Weird", Value::Null));
}
