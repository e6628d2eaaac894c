//! The plugin with an agent that answers what the test says.

use std::cell::RefCell;
use std::collections::HashMap;

use proptest::prelude::*;

use super::*;
use crate::protocol::{Added, PortMapping};

/// Answers with what it was given, and keeps what it was asked.
struct Fake {
    answer: Option<Response>,
    asked: RefCell<Vec<Request>>,
}

impl Fake {
    fn new(answer: Response) -> Self {
        Self {
            answer: Some(answer),
            asked: RefCell::default(),
        }
    }
    fn dead() -> Self {
        Self {
            answer: None,
            asked: RefCell::default(),
        }
    }
}

impl Agent for Fake {
    fn ask(&self, socket: &Path, request: &Request, _: Option<&File>) -> Result<Response, ClientError> {
        self.asked.borrow_mut().push(request.clone());
        self.answer.clone().ok_or_else(|| ClientError::Absent {
            socket: socket.display().to_string(),
            source: std::io::ErrorKind::NotFound.into(),
        })
    }
}

fn environment(command: &str) -> HashMap<String, String> {
    [
        ("CNI_COMMAND", command),
        ("CNI_CONTAINERID", "c1"),
        // any namespace file will do, but not our own network namespace
        ("CNI_NETNS", "/proc/self/ns/uts"),
        ("CNI_IFNAME", "eth0"),
        ("CNI_PATH", "/opt/cni/bin"),
        (
            "CNI_ARGS",
            "IgnoreUnknown=1;K8S_POD_NAMESPACE=ns;K8S_POD_NAME=web;K8S_POD_UID=u",
        ),
    ]
    .map(|(key, value)| (key.to_owned(), value.to_owned()))
    .into()
}

fn run_with(env: &HashMap<String, String>, input: &str, agent: &Fake) -> (Value, Outcome) {
    let outcome = run(&|name| env.get(name).cloned(), input.as_bytes(), agent);
    let value = if outcome.stdout.is_empty() {
        Value::Null
    } else {
        serde_json::from_str(&outcome.stdout).unwrap()
    };
    (value, outcome)
}

fn code_of(env: &HashMap<String, String>, input: &str) -> u64 {
    let (value, outcome) = run_with(env, input, &Fake::new(Response::Done));
    assert!(outcome.failed, "{value}");
    assert!(
        value["cniVersion"].is_string() && value["msg"].is_string(),
        "{value}"
    );
    value["code"].as_u64().unwrap()
}

#[test]
fn add_passes_on_what_the_runtime_says() {
    let added = Added {
        host: Some(("bee0".into(), "0a:00:00:00:00:01".parse().unwrap())),
        mac: Some("0a:00:00:00:00:02".parse().unwrap()),
        mtu: 1500,
        ips: vec![("10.244.1.2".parse().unwrap(), "169.254.1.1".parse().unwrap())],
    };
    let agent = Fake::new(Response::Added(added));
    let input = r#"{"cniVersion": "1.0.0", "name": "cbr0", "type": "beeline-cni", "mtu": 0, "runtimeConfig": {
        "portMappings": [{"hostPort": 8080, "containerPort": 80, "protocol": "TCP", "hostIP": ""},
                         {"hostPort": 0, "containerPort": 81, "protocol": "udp"}],
        "bandwidth": {"ingressRate": 1000, "ingressBurst": 2000},
        "mac": "0A:00:00:00:00:02", "ips": ["10.244.1.2/24"], "dns": {"servers": ["10.96.0.10"]}}}"#;
    let (value, outcome) = run_with(&environment("ADD"), input, &agent);
    assert!(!outcome.failed, "{value}");
    assert_eq!(value["ips"][0]["address"], "10.244.1.2/32");
    assert_eq!(value["interfaces"][1]["sandbox"], "/proc/self/ns/uts");
    assert_eq!(value["dns"]["nameservers"][0], "10.96.0.10");
    let asked = agent.asked.borrow();
    let [Request::Add(add)] = &asked[..] else {
        panic!("{asked:?}")
    };
    assert_eq!(add.key.to_string(), "eth0 of container c1 in network cbr0");
    assert_eq!(add.pod.as_ref().unwrap().name, "web");
    assert_eq!(add.mtu, None);
    assert_eq!(add.mac.unwrap().to_string(), "0a:00:00:00:00:02");
    assert_eq!(add.ips, ["10.244.1.2".parse::<std::net::IpAddr>().unwrap()]);
    let tcp = PortMapping {
        host_port: 8080,
        container_port: 80,
        protocol: "tcp".into(),
        host_ip: None,
    };
    assert_eq!(add.port_mappings, [tcp]);
    assert_eq!(add.bandwidth.as_ref().unwrap().ingress_rate, 1000);
    assert_eq!(add.chained, None);
}

#[test]
fn behind_another_plugin_its_result_is_passed_on() {
    let agent = Fake::new(Response::Added(Added::default()));
    let previous = r#"{"cniVersion": "0.3.1", "interfaces": [{"name": "veth1"}, {"name": "eth0", "sandbox": "/x"}],
        "ips": [{"version": "4", "address": "10.1.0.5/24", "interface": 1}], "extra": {"kept": true}}"#;
    let input = format!(r#"{{"cniVersion": "0.3.1", "name": "n", "prevResult": {previous}}}"#);
    let (value, outcome) = run_with(&environment("ADD"), &input, &agent);
    assert!(!outcome.failed, "{value}");
    assert_eq!(value, serde_json::from_str::<Value>(previous).unwrap());
    let asked = agent.asked.borrow();
    let [Request::Add(add)] = &asked[..] else {
        panic!("{asked:?}")
    };
    assert_eq!(
        add.chained.as_ref().unwrap().ips,
        ["10.1.0.5".parse::<std::net::IpAddr>().unwrap()]
    );
}

#[test]
fn without_an_agent_add_can_be_tried_again_and_status_says_so() {
    let config = r#"{"cniVersion": "1.1.0", "name": "n"}"#;
    for (command, expected) in [("ADD", 11), ("STATUS", 50)] {
        let (value, outcome) = run_with(&environment(command), config, &Fake::dead());
        assert!(outcome.failed);
        assert_eq!(value["code"], expected, "{command}: {value}");
    }
}

#[test]
fn without_an_agent_del_succeeds_and_is_left_for_it() {
    let dir = tempfile::tempdir().unwrap();
    let state = dir.path().display();
    let config = format!(r#"{{"cniVersion": "0.3.1", "name": "n", "stateDir": "{state}"}}"#);
    let mut env = environment("DEL");
    env.remove("CNI_NETNS");
    for _ in 0..2 {
        let (value, outcome) = run_with(&env, &config, &Fake::dead());
        assert!(!outcome.failed, "{value}");
        assert!(outcome.note.unwrap().contains("left for the agent"));
    }
    let names: Vec<_> = fs::read_dir(dir.path().join(RELEASES))
        .unwrap()
        .map(|entry| entry.unwrap().file_name())
        .collect();
    assert_eq!(names, ["n@c1@eth0"]);
    let text = fs::read(dir.path().join(RELEASES).join("n@c1@eth0")).unwrap();
    let del: Del = serde_json::from_slice(&text).unwrap();
    assert_eq!(del.key.container_id, "c1");

    // a directory that cannot be written to changes nothing for the runtime
    let config = r#"{"cniVersion": "0.3.1", "name": "n", "stateDir": "/proc/none"}"#;
    let (_, outcome) = run_with(&env, config, &Fake::dead());
    assert!(!outcome.failed);
    assert!(outcome.note.unwrap().contains("cannot be left"));
}

#[test]
fn errors_have_the_codes_of_the_specification() {
    let good = r#"{"cniVersion": "1.0.0", "name": "n"}"#;
    let without = |command: &str, name: &str| {
        let mut env = environment(command);
        env.remove(name);
        env
    };
    let with = |command: &str, name: &str, value: &str| {
        let mut env = environment(command);
        env.insert(name.into(), value.into());
        env
    };
    assert_eq!(code_of(&without("ADD", "CNI_NETNS"), good), 4);
    assert_eq!(code_of(&without("DEL", "CNI_IFNAME"), good), 4);
    assert_eq!(code_of(&with("ADD", "CNI_CONTAINERID", "../x"), good), 4);
    assert_eq!(code_of(&with("ADD", "CNI_IFNAME", "a/b"), good), 4);
    assert_eq!(code_of(&with("ADD", "CNI_IFNAME", "sixteen-letters-"), good), 4);
    assert_eq!(code_of(&with("ADD", "CNI_ARGS", "novalue"), good), 4);
    assert_eq!(code_of(&with("ADD", "CNI_NETNS", "/nonexistent"), good), 4);
    assert_eq!(code_of(&with("ADD", "CNI_NETNS", "/etc/passwd"), good), 4);
    assert_eq!(code_of(&with("ADD", "CNI_NETNS", "/proc/self/ns/net"), good), 8);
    assert_eq!(code_of(&environment("REMOVE"), good), 4);
    assert_eq!(code_of(&environment("ADD"), "{"), 6);
    assert_eq!(code_of(&environment("ADD"), r#"{"name": ["n"]}"#), 6);
    assert_eq!(
        code_of(&environment("ADD"), r#"{"cniVersion": "9.0.0", "name": "n"}"#),
        1
    );
    assert_eq!(code_of(&environment("ADD"), r#"{"cniVersion": "1.0.0"}"#), 7);
    assert_eq!(
        code_of(
            &environment("ADD"),
            r#"{"cniVersion": "1.0.0", "name": "n", "mtu": 67}"#
        ),
        7
    );
    let ports =
        r#"{"cniVersion": "1.0.0", "name": "n", "runtimeConfig": {"portMappings": [{"hostPort": 70000}]}}"#;
    assert_eq!(code_of(&environment("ADD"), ports), 7);
    assert_eq!(
        code_of(
            &environment("CHECK"),
            r#"{"cniVersion": "0.3.1", "name": "n", "prevResult": {}}"#
        ),
        1
    );
    assert_eq!(code_of(&environment("CHECK"), good), 7);
    assert_eq!(code_of(&environment("GC"), good), 1);
    assert_eq!(
        code_of(&environment("GC"), r#"{"cniVersion": "1.1.0", "name": "n"}"#),
        7
    );
    assert_eq!(code_of(&environment("STATUS"), good), 1);
}

#[test]
fn version_needs_no_more_than_itself() {
    for (input, expected) in [
        ("", "0.1.0"),
        (r#"{"cniVersion": "0.4.0"}"#, "0.4.0"),
        (r#"{"cniVersion": "7"}"#, "1.1.0"),
    ] {
        let env = HashMap::from([("CNI_COMMAND".to_owned(), "VERSION".to_owned())]);
        let (value, outcome) = run_with(&env, input, &Fake::dead());
        assert!(!outcome.failed, "{value}");
        assert_eq!(value["cniVersion"], expected);
        assert_eq!(value["supportedVersions"].as_array().unwrap().len(), 7);
    }
}

#[test]
fn gc_names_what_lives() {
    let agent = Fake::new(Response::Done);
    let input = r#"{"cniVersion": "1.1.0", "name": "n",
        "cni.dev/valid-attachments": [{"containerID": "a", "ifname": "eth0"}]}"#;
    let (value, outcome) = run_with(&environment("GC"), input, &agent);
    assert!(!outcome.failed, "{value}");
    assert_eq!(outcome.stdout, "");
    let asked = agent.asked.borrow();
    assert_eq!(
        asked[0],
        Request::Gc(Gc {
            network: "n".into(),
            valid: vec![("a".into(), "eth0".into())]
        })
    );
}

fn hostile() -> impl Strategy<Value = String> {
    let text = prop_oneof![
        Just("\"\"".to_owned()),
        Just("null".to_owned()),
        Just("-1".to_owned()),
        Just("1e99".to_owned()),
        Just("[]".to_owned()),
        Just("{}".to_owned()),
        Just("[[[[{}]]]]".to_owned()),
        Just("\"10.0.0.1/33\"".to_owned()),
        Just("[{\"hostPort\": -5, \"containerPort\": 1e3}]".to_owned()),
        Just("[{\"address\": \"x\"}]".to_owned()),
        "[a-z\"{}:,\\[\\]]{0,12}",
    ];
    let key = prop_oneof![
        Just("cniVersion"),
        Just("name"),
        Just("mtu"),
        Just("dns"),
        Just("args"),
        Just("runtimeConfig"),
        Just("prevResult"),
        Just("ips"),
        Just("socket"),
        Just("cni.dev/valid-attachments"),
    ];
    prop::collection::vec((key, text), 0..6).prop_map(|pairs| {
        let fields: Vec<String> = pairs
            .iter()
            .map(|(key, value)| format!("\"{key}\": {value}"))
            .collect();
        format!(
            "{{\"cniVersion\": \"1.1.0\", \"name\": \"n\", {}}}",
            fields.join(", ")
        )
        .replace(", }", "}")
    })
}

proptest! {
    #[test]
    fn hostile_input_gets_an_answer(
        input in prop_oneof![hostile().prop_map(String::into_bytes), prop::collection::vec(any::<u8>(), 0..200)],
        command in prop_oneof![Just("ADD"), Just("DEL"), Just("CHECK"), Just("GC"), Just("STATUS"), Just("VERSION"), Just("é")],
        args in "[A-Z=;é]{0,10}",
    ) {
        let mut env = environment(command);
        env.insert("CNI_ARGS".into(), args);
        let outcome = run(&|name| env.get(name).cloned(), &input, &Fake::new(Response::Done));
        if outcome.failed {
            let value: Value = serde_json::from_str(&outcome.stdout).unwrap();
            prop_assert!(value["code"].as_u64().is_some_and(|code| code > 0));
        }
    }
}
