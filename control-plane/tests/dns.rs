//! The cluster's DNS as `dig` sees it, next to a running API.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test stops where it fails"
)]

mod common;

use std::net::SocketAddr;
use std::time::Duration;

use common::{Server, call};
use hickory_proto::op::{Message, ResponseCode};
use hickory_proto::rr::rdata::A;
use hickory_proto::rr::{RData, Record};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, UdpSocket};

/// A server of the world: it knows all names of `example.org`, says that long answers are to be asked for over TCP, and
/// answers nothing about `silent.example.org`.
async fn world() -> SocketAddr {
    fn answer(query: &[u8], tcp: bool) -> Option<Vec<u8>> {
        let mut message = Message::from_vec(query).unwrap().into_response();
        message.edns = None;
        let name = message.queries[0].name().clone();
        let text = name.to_ascii();
        if text.starts_with("silent") {
            return None;
        }
        if !text.ends_with("example.org.") {
            message.metadata.response_code = ResponseCode::NXDomain;
        } else if text.starts_with("long") && !tcp {
            message.metadata.truncation = true;
        } else {
            let data = RData::A(A([203, 0, 113, if tcp { 2 } else { 1 }].into()));
            message.add_answer(Record::from_rdata(name, 60, data));
        }
        message.to_vec().ok()
    }
    let tcp = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = tcp.local_addr().unwrap();
    let udp = UdpSocket::bind(address).await.unwrap();
    tokio::spawn(async move {
        let mut buffer = [0; 4096];
        while let Ok((length, client)) = udp.recv_from(&mut buffer).await {
            if let Some(answer) = answer(&buffer[..length], false) {
                udp.send_to(&answer, client).await.unwrap();
            }
        }
    });
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = tcp.accept().await {
            let length = stream.read_u16().await.unwrap();
            let mut query = vec![0; length.into()];
            stream.read_exact(&mut query).await.unwrap();
            let answer = answer(&query, true).unwrap();
            stream.write_u16(answer.len().try_into().unwrap()).await.unwrap();
            stream.write_all(&answer).await.unwrap();
        }
    });
    address
}

/// A control plane with DNS at a port that was free a moment ago.
async fn start() -> (Server, u16) {
    let world = world().await;
    for _ in 0..20 {
        let port = UdpSocket::bind("127.0.0.1:0")
            .await
            .unwrap()
            .local_addr()
            .unwrap()
            .port();
        // Free for datagrams does not mean free for connections.
        if TcpListener::bind(("127.0.0.1", port)).await.is_ok() {
            let server = Server::start_with(|config| {
                config.no_scheduler = true;
                config.dns_bind = Some(SocketAddr::from(([127, 0, 0, 1], port)));
                config.dns_upstream = vec![world];
            })
            .await;
            return (server, port);
        }
    }
    panic!("no port is free")
}

/// What dig prints.
async fn dig(port: u16, arguments: &str) -> String {
    let mut command = tokio::process::Command::new("dig");
    command
        .args(["-p", &port.to_string(), "@127.0.0.1", "+time=5", "+tries=1"])
        .args(arguments.split_whitespace())
        .kill_on_drop(true);
    let output = tokio::time::timeout(Duration::from_secs(30), command.output())
        .await
        .unwrap()
        .expect("dig is not installed: cargo xtask setup");
    String::from_utf8(output.stdout).unwrap()
}

/// Asks until the lines are as wanted, in any order.
async fn until(port: u16, arguments: &str, wanted: &[&str]) {
    let mut last = Vec::new();
    let asking = async {
        loop {
            let text = dig(port, &format!("+short {arguments}")).await;
            last = text.lines().map(str::to_owned).collect();
            last.sort();
            if last == wanted {
                return;
            }
        }
    };
    let asked = tokio::time::timeout(Duration::from_secs(20), asking).await;
    assert!(asked.is_ok(), "{arguments}: {last:?}");
}

async fn create(client: &kube::Client, path: &str, object: &Value) -> Value {
    let (code, answer) = call(client, "POST", path, object).await;
    assert_eq!(code, 201, "{answer}");
    answer
}

const SERVICES: &str = "/api/v1/namespaces/default/services";

#[tokio::test(flavor = "multi_thread")]
async fn dig_finds_what_is_in_the_api_and_what_is_in_the_world() {
    let (server, port) = start().await;
    let client = server.client().await;

    // where pods find it
    let dns = "/api/v1/namespaces/kube-system/services/kube-dns";
    let (_, service) = call(&client, "GET", dns, &Value::Null).await;
    assert_eq!(service["spec"]["clusterIP"], "10.96.0.10");
    let target = &service["spec"]["ports"][0]["targetPort"];
    assert_eq!(target.as_u64(), Some(port.into()), "{service}");

    until(port, "kubernetes.default.svc.cluster.local", &["10.96.0.1"]).await;
    let spec = json!({"clusterIP": "10.96.9.9", "selector": {"app": "web"}, "ports": [{"name": "http", "port": 80}]});
    create(
        &client,
        SERVICES,
        &json!({"metadata": {"name": "web"}, "spec": spec}),
    )
    .await;
    until(port, "web.default.svc.cluster.local", &["10.96.9.9"]).await;
    until(port, "-x 10.96.9.9", &["web.default.svc.cluster.local."]).await;
    until(
        port,
        "_http._tcp.web.default.svc.cluster.local SRV",
        &["0 100 80 web.default.svc.cluster.local."],
    )
    .await;
    let (code, _) = call(&client, "DELETE", &format!("{SERVICES}/web"), &Value::Null).await;
    assert_eq!(code, 200);
    until(port, "web.default.svc.cluster.local", &[]).await;
    let text = dig(port, "web.default.svc.cluster.local").await;
    assert!(
        text.contains("status: NXDOMAIN") && text.contains("SOA"),
        "{text}"
    );

    // a pod with a name of its own behind a headless Service: the controllers make its slice
    let spec =
        json!({"clusterIP": "None", "selector": {"app": "db"}, "ports": [{"name": "sql", "port": 5432}]});
    create(
        &client,
        SERVICES,
        &json!({"metadata": {"name": "db"}, "spec": spec}),
    )
    .await;
    let pods = "/api/v1/namespaces/default/pods";
    for (name, hostname) in [("db-a", "first"), ("db-b", "")] {
        let mut spec = json!({"containers": [{"name": "c", "image": "i"}]});
        if !hostname.is_empty() {
            spec["hostname"] = hostname.into();
            spec["subdomain"] = "db".into();
        }
        let meta = json!({"name": name, "labels": {"app": "db"}});
        create(&client, pods, &json!({"metadata": meta, "spec": spec})).await;
        let ip = if hostname.is_empty() {
            "10.244.0.6"
        } else {
            "10.244.0.5"
        };
        let condition = json!([{"type": "Ready", "status": "True"}]);
        let status = json!({"status": {"phase": "Running", "podIP": ip, "podIPs": [{"ip": ip}], "conditions": condition}});
        let path = format!("{pods}/{name}/status");
        let request = http::Request::patch(path).header("content-type", "application/merge-patch+json");
        let request = request.body(serde_json::to_vec(&status).unwrap()).unwrap();
        assert_eq!(common::send(&client, request).await.status(), 200);
    }
    until(
        port,
        "db.default.svc.cluster.local",
        &["10.244.0.5", "10.244.0.6"],
    )
    .await;
    until(port, "first.db.default.svc.cluster.local", &["10.244.0.5"]).await;
    until(
        port,
        "-x 10.244.0.6",
        &["10-244-0-6.db.default.svc.cluster.local."],
    )
    .await;
    until(
        port,
        "+tcp _sql._tcp.db.default.svc.cluster.local SRV",
        &[
            "0 50 5432 10-244-0-6.db.default.svc.cluster.local.",
            "0 50 5432 first.db.default.svc.cluster.local.",
        ],
    )
    .await;

    // the world, by its own name and by one of ours
    until(port, "www.example.org", &["203.0.113.1"]).await;
    until(port, "+tcp www.example.org", &["203.0.113.2"]).await;
    // dig asks again over TCP when the answer was cut, and so do we.
    until(port, "long.example.org", &["203.0.113.2"]).await;
    for (name, target, address) in [("docs", "www", "203.0.113.1"), ("far", "long", "203.0.113.2")] {
        let spec = json!({"type": "ExternalName", "externalName": format!("{target}.example.org")});
        create(
            &client,
            SERVICES,
            &json!({"metadata": {"name": name}, "spec": spec}),
        )
        .await;
        let alias = format!("{target}.example.org.");
        until(
            port,
            &format!("{name}.default.svc.cluster.local"),
            &[address, &alias],
        )
        .await;
    }
    let text = dig(port, "nobody.example.com").await;
    assert!(text.contains("status: NXDOMAIN"), "{text}");
    let text = dig(port, "silent.example.org").await;
    assert!(text.contains("status: SERVFAIL"), "{text}");

    // more than a datagram holds
    let endpoints: Vec<Value> = (1..=200)
        .map(|i| json!({"addresses": [format!("10.244.9.{i}")]}))
        .collect();
    let labels = json!({"kubernetes.io/service-name": "many"});
    create(
        &client,
        "/apis/discovery.k8s.io/v1/namespaces/default/endpointslices",
        &json!({
            "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
            "metadata": {"name": "many-1", "labels": labels}, "endpoints": endpoints, "ports": [],
        }),
    )
    .await;
    create(
        &client,
        SERVICES,
        &json!({"metadata": {"name": "many"}, "spec": {"clusterIP": "None"}}),
    )
    .await;
    let name = "many.default.svc.cluster.local";
    let mut all: Vec<String> = (1..=200).map(|i| format!("10.244.9.{i}")).collect();
    all.sort();
    let all: Vec<&str> = all.iter().map(String::as_str).collect();
    until(port, name, &all).await;
    let cut = dig(port, &format!("+ignore +noedns {name}")).await;
    assert!(cut.contains(" tc ") && cut.contains("SERVER: 127.0.0.1"), "{cut}");
    server.stop().await;
}
