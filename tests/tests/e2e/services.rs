//! Services as wholes: side by side, deleted and made again, for others to serve, without endpoints, in new ranges of
//! addresses; and kube-proxy's ways of asking how it is.

use std::net::SocketAddr;
use std::process::Command;

use beeline_tests::client::{Mode, Question};
use beeline_tests::objects::{service, slice_of};
use beeline_tests::{Load, agent, http, process, wait_for};
use serde_json::{Value, json};

use crate::pair::{
    BOTH, NODE_PORT, Pair, REFUSED, SILENT, UNREACHABLE, V4, V6, ask, assert_fails, assert_replies, slices,
    wait_fails, wait_replies,
};
use crate::scene::PROPAGATION;

fn at(ip: &str, port: u16) -> SocketAddr {
    SocketAddr::new(ip.parse().unwrap(), port)
}

fn ports() -> Value {
    json!([{"name": "web", "protocol": "TCP", "port": 8080}])
}

/// A ClusterIP Service with these of the pods.
fn cluster(pair: &Pair, name: &str, ips: &[&str], pods: &[usize]) -> Vec<Value> {
    let pods: Vec<_> = pods.iter().map(|i| &pair.servers[*i]).collect();
    let mut objects = vec![service(name, ips)];
    objects.extend(slices(name, "a", &ports(), &pods));
    objects
}

/// Asks from pods and hosts of both nodes.
#[track_caller]
fn inside(pair: &Pair, target: SocketAddr, wanted: &[&str]) {
    for (who, place) in pair.everywhere().into_iter().filter(|(who, _)| *who != "outside") {
        let what = format!("{who} to {target}");
        if wanted.is_empty() {
            assert_fails(
                &what,
                &ask(place, target, crate::pair::impatient(Mode::Http), 1),
                &UNREACHABLE,
            );
        } else {
            assert_replies(&what, &ask(place, target, Mode::Http, 48), wanted);
        }
    }
}

#[test]
fn services_go_up_and_down_without_a_trace_on_others() {
    let pair = Pair::new();
    let ips = [
        ["10.96.0.31", "fd00:10:96::31"],
        ["10.96.0.32", "fd00:10:96::32"],
        ["10.96.0.33", "fd00:10:96::33"],
    ];
    let names = ["up-1", "up-2", "up-3"];
    // the first two have the same pods
    let pods: [&[usize]; 3] = [&[0, 1], &[0, 1], &[1]];
    let answers: [&[&str]; 3] = [&BOTH, &BOTH, &BOTH[1..]];
    let check = |up: [bool; 3]| {
        for i in 0..3 {
            for ip in ips[i] {
                inside(&pair, at(ip, 80), if up[i] { answers[i] } else { &[] });
            }
        }
    };
    let up = |i: usize| pair.put_objects(names[i], &cluster(&pair, names[i], &ips[i], pods[i]));
    up(0);
    up(1);
    check([true, true, false]);
    pair.remove(names[0]);
    check([false, true, false]);
    up(2);
    check([false, true, true]);
    // made again, by the same name and addresses
    up(0);
    check([true, true, true]);
}

#[test]
fn a_service_follows_its_pods_from_none_to_two_and_back() {
    let pair = Pair::new();
    let both: &[&str] = &BOTH;
    for (ready, wanted) in [
        ([false, false], &both[..0]),
        ([true, false], &both[..1]),
        ([true, true], both),
        ([false, true], &both[1..]),
        ([false, false], &both[..0]),
    ] {
        pair.put(json!({}), &ready);
        for ip in [V4, V6] {
            if wanted.is_empty() {
                for client in &pair.clients {
                    wait_fails(client.place(), at(ip, 80), Mode::Http, &REFUSED);
                }
            } else {
                inside(&pair, at(ip, 80), wanted);
            }
        }
    }
}

#[test]
fn services_for_another_proxy_are_left_to_it() {
    let pair = Pair::new();
    let label = |value: Value| {
        let labels = json!({"service.kubernetes.io/service-proxy-name": value});
        pair.put(json!({"metadata": {"labels": labels}}), &[true, true]);
    };
    for _ in 0..2 {
        label("another".into());
        inside(&pair, at(V4, 80), &[]);
        inside(&pair, at(V6, 80), &[]);
        wait_fails(
            pair.outside.place(),
            pair.node_ports(0, NODE_PORT)[0],
            Mode::Http,
            &REFUSED,
        );
        label(Value::Null);
        inside(&pair, at(V4, 80), &BOTH);
        inside(&pair, at(V6, 80), &BOTH);
    }
}

#[test]
fn slices_for_headless_services_are_not_used() {
    let pair = Pair::new();
    let labels = json!({"service.kubernetes.io/headless": ""});
    let mut objects = cluster(&pair, "web", &[V4, V6], &[0, 1]);
    pair.put_objects("web", &objects);
    inside(&pair, at(V4, 80), &BOTH);
    for slice in &mut objects[1..] {
        crate::pair::merge(slice, json!({"metadata": {"labels": labels}}));
    }
    pair.put_objects("web", &objects);
    for ip in [V4, V6] {
        for client in &pair.clients {
            wait_fails(client.place(), at(ip, 80), Mode::Http, &REFUSED);
        }
    }
}

#[test]
fn addresses_of_new_ranges_are_served_and_free_ones_are_silent() {
    let pair = Pair::new();
    let range = |name: &str, cidrs: [&str; 2]| {
        json!({"apiVersion": "networking.k8s.io/v1", "kind": "ServiceCIDR", "metadata": {"name": name},
            "spec": {"cidrs": cidrs}})
    };
    let free = ["203.0.113.99", "2001:db8:cb00::99"];
    // until the range is known, packets for its addresses go where the routes say: nowhere, and somebody says so
    for ip in free {
        let report = ask(pair.clients[0].place(), at(ip, 80), Mode::Http, 1);
        assert_fails(ip, &report, &UNREACHABLE[1..]);
    }
    pair.put_objects(
        "ranges",
        &[
            range("kubernetes", ["10.96.0.0/16", "fd00:10:96::/112"]),
            range("more", ["203.0.113.0/24", "2001:db8:cb00::/64"]),
        ],
    );
    let ips = ["203.0.113.7", "2001:db8:cb00::7"];
    let mut objects = cluster(&pair, "new", &ips, &[0, 1]);
    crate::pair::merge(&mut objects[0], json!({"spec": {"type": "NodePort"}}));
    objects[0]["spec"]["ports"][0]["nodePort"] = 30_777.into();
    pair.put_objects("new", &objects);
    for ip in ips {
        inside(&pair, at(ip, 80), &BOTH);
    }
    for target in pair.node_ports(1, 30_777) {
        assert_replies(
            "its node port",
            &ask(pair.outside.place(), target, Mode::Http, 48),
            &BOTH,
        );
    }
    for ip in free {
        wait_fails(pair.clients[0].place(), at(ip, 80), Mode::Http, &SILENT);
    }
}

#[test]
fn a_rolling_update_fails_no_connection() {
    let mut pair = Pair::new();
    let balancer = at("203.0.113.10", 80);
    pair.cluster.route_to(balancer.ip(), &pair.nodes[0]).unwrap();
    let ingress = json!({"loadBalancer": {"ingress": [{"ip": balancer.ip(), "ipMode": "VIP"}]}});
    for policy in ["Cluster", "Local"] {
        let patch =
            json!({"spec": {"type": "LoadBalancer", "externalTrafficPolicy": policy}, "status": ingress});
        pair.put(patch.clone(), &[true, true]);
        let mut loads = Vec::new();
        let mut start = |place, target| {
            let load = Load::start(place, target, Mode::Http, 200, 4).unwrap();
            loads.push((target, load));
        };
        start(pair.clients[1].place(), at(V4, 80));
        start(pair.nodes[1].host(), at(V6, 80));
        // Under policy Local an outside client is for the balancer to move elsewhere in time.
        if policy == "Cluster" {
            start(pair.outside.place(), balancer);
            start(pair.outside.place(), pair.node_ports(0, NODE_PORT)[1]);
        }
        let ready = json!({"ready": true, "serving": true, "terminating": false});
        let terminating = json!({"ready": false, "serving": true, "terminating": true});
        for round in 0..6 {
            let (going, staying) = (round % 2, 1 - round % 2);
            pair.put_with(
                patch.clone(),
                &[(going, terminating.clone()), (staying, ready.clone())],
            );
            // the server ends when it has served what it has
            pair.servers[going].stop_echo().unwrap();
            pair.put_with(patch.clone(), &[(staying, ready.clone())]);
            pair.servers[going]
                .start_echo(beeline_tests::cluster::ECHO_PORT)
                .unwrap();
            pair.put(patch.clone(), &[true, true]);
        }
        for (target, load) in loads {
            let report = load.stop().unwrap();
            assert_eq!(report.failed, 0, "{policy} {target}: {report:?}");
            assert!(
                report.ok > 100 && report.replies.len() == 2,
                "{policy} {target}: {report:?}"
            );
        }
    }
}

#[test]
fn what_somebody_deletes_from_the_kernel_comes_back() {
    let pair = Pair::with(json!({}), |options| options.flag("--audit-period", 1));
    let client = pair.clients[0].place();
    inside(&pair, at(V4, 80), &BOTH);
    let [map] = ["FRONTENDS"].map(|name| {
        let dirs = std::fs::read_dir(pair.nodes[0].bpffs()).unwrap();
        let dir = dirs.map(|dir| dir.unwrap().path()).next().unwrap();
        dir.join("maps").join(name)
    });
    let bpftool = |args: &[&str]| {
        let mut command = Command::new("bpftool");
        command
            .args(["-j", "map", args[0], "pinned"])
            .arg(&map)
            .args(&args[1..]);
        process::output(command).unwrap()
    };
    let entries: Value = serde_json::from_str(&bpftool(&["dump"])).unwrap();
    let entries = entries.as_array().unwrap();
    assert!(entries.len() > 4, "{entries:?}");
    for entry in entries {
        let mut args = vec!["delete", "key"];
        args.extend(
            entry["key"]
                .as_array()
                .unwrap()
                .iter()
                .map(|byte| byte.as_str().unwrap()),
        );
        bpftool(&args);
    }
    for ip in [V4, V6] {
        wait_replies(client, at(ip, 80), Mode::Http, &BOTH);
    }
    for target in pair.node_ports(0, NODE_PORT) {
        wait_replies(pair.outside.place(), target, Mode::Http, &BOTH);
    }
}

#[test]
fn the_urls_of_kube_proxy_answer() {
    let pair = Pair::new();
    for node in &pair.nodes {
        let (status, body) = http::get(node.host().netns(), agent::HEALTH, "/healthz").unwrap();
        let health: Value = serde_json::from_str(&body).unwrap();
        assert_eq!((status, &health["healthy"]), (200, &json!(true)), "{body}");
        assert!(
            health["lastUpdated"].is_string() && health["nodeEligible"] == true,
            "{body}"
        );
        let (status, mode) = http::get(node.host().netns(), agent::METRICS, "/proxyMode").unwrap();
        assert_eq!((status, mode.as_str()), (200, "ebpf"));
    }
}

/// A Service of type `LoadBalancer` whose nodes are asked whether they have endpoints.
fn checked(policy: &str) -> Value {
    let mut patch = json!({"spec": {"type": "LoadBalancer", "externalTrafficPolicy": policy}});
    if policy == "Local" {
        patch["spec"]["healthCheckNodePort"] = HEALTH_PORT.into();
    }
    patch
}

const HEALTH_PORT: u16 = 30_999;

/// What a load balancer learns of each node, `None` if nobody answers.
#[track_caller]
fn wait_health(pair: &Pair, wanted: [Option<u16>; 2]) {
    for (node, wanted) in wanted.into_iter().enumerate() {
        for target in pair.node_ports(node, HEALTH_PORT) {
            wait_for(&format!("{target} to say {wanted:?}"), PROPAGATION, || {
                let found = http::get(pair.outside.place().netns(), target, "/healthz");
                Ok((found.ok().map(|(status, _)| status) == wanted).then_some(()))
            })
            .unwrap();
        }
    }
}

#[test]
fn the_health_check_says_no_while_terminating_endpoints_still_serve() {
    let pair = Pair::new();
    pair.put(checked("Local"), &[true, false]);
    wait_health(&pair, [Some(200), Some(503)]);
    let terminating = json!({"ready": false, "serving": true, "terminating": true});
    pair.put_with(checked("Local"), &[(0, terminating)]);
    wait_health(&pair, [Some(503), Some(503)]);
    for target in pair.node_ports(0, NODE_PORT) {
        let report = ask(pair.outside.place(), target, Mode::Http, 16);
        assert_replies("who knows no better", &report, &BOTH[..1]);
    }
}

#[test]
fn health_check_and_node_port_follow_the_external_policy() {
    let pair = Pair::new();
    let outside = pair.outside.place();
    for _ in 0..2 {
        pair.put(checked("Local"), &[true, false]);
        wait_health(&pair, [Some(200), Some(503)]);
        for (family, target) in pair.node_ports(0, NODE_PORT).into_iter().enumerate() {
            assert_replies("its node", &ask(outside, target, Mode::Http, 8), &BOTH[..1]);
            wait_fails(
                outside,
                pair.node_ports(1, NODE_PORT)[family],
                Mode::Http,
                &SILENT,
            );
        }
        pair.put(checked("Cluster"), &[true, false]);
        wait_health(&pair, [None, None]);
        for node in [0, 1] {
            for target in pair.node_ports(node, NODE_PORT) {
                assert_replies("any node", &ask(outside, target, Mode::Http, 8), &BOTH[..1]);
            }
        }
    }
    // the endpoint moves
    pair.put(checked("Local"), &[false, true]);
    wait_health(&pair, [Some(503), Some(200)]);
    // endpoints on both
    pair.put(checked("Local"), &[true, true]);
    wait_health(&pair, [Some(200), Some(200)]);
}

#[test]
fn connections_live_on_in_a_table_that_is_too_small_for_them() {
    let pair = Pair::with(json!({}), |options| options.flag("--max-conntrack", 1024));
    let mut loads = Vec::new();
    for target in pair.node_ports(0, NODE_PORT) {
        let question = Question {
            timeout_ms: 10_000,
            ..Mode::Hold.into()
        };
        loads.push(Load::start(pair.outside.place(), target, question, 600, 300).unwrap());
    }
    wait_for("flows to be forgotten", PROPAGATION * 2, || {
        let status = agent::beeline_json(&pair.nodes[0], &["status"])?;
        Ok(status["counters"]["flow_recovered"].as_u64().filter(|n| *n > 200))
    })
    .unwrap();
    for load in loads {
        let report = load.stop().unwrap();
        assert_eq!(report.failed, 0, "{report:?}");
        assert_eq!(report.replies.len(), 2, "{report:?}");
    }
}

#[test]
fn sloppy_addresses_mean_what_they_meant_to_kube_proxy() {
    let pair = Pair::new();
    // leading zeros are decimal, as in every release of Kubernetes that let them in
    let pod = pair.servers[0]
        .v4()
        .octets()
        .map(|byte| format!("{byte:03}"))
        .join(".");
    let slice = slice_of("web", "v4", "IPv4", &[beeline_tests::objects::endpoint(&pod)]);
    let mut object = Pair::service(json!({"spec": {"externalIPs": ["203.000.113.001"]}}));
    object["spec"]["clusterIP"] = "010.096.0.020".into();
    object["spec"]["clusterIPs"] = json!(["010.096.0.020"]);
    pair.put_objects("web", &[object, slice]);
    inside(&pair, at(V4, 80), &BOTH[..1]);
    inside(&pair, at("203.0.113.1", 80), &BOTH[..1]);
}
