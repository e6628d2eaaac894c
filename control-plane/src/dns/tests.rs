use std::net::{IpAddr, Ipv4Addr};

use hickory_proto::op::{Edns, Message, MessageType, OpCode, Query, ResponseCode};
use hickory_proto::rr::{Name, RecordType};
use k8s_openapi::serde::de::DeserializeOwned;
use kube::runtime::watcher::Event;
use proptest::prelude::*;
use serde_json::{Value, json};

use super::zone::{Answer, Change, Zone};
use super::{Dns, Settings};

const CLIENT: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 244, 1, 5));

fn event<K: DeserializeOwned>(object: Value) -> Event<K> {
    Event::Apply(serde_json::from_value(object).unwrap())
}

fn service(name: &str, spec: &Value) -> Change {
    Change::Service(event(
        json!({"metadata": {"name": name, "namespace": "shop"}, "spec": spec}),
    ))
}

fn slice(name: &str, service: &str, endpoints: &Value, ports: &Value) -> Change {
    let labels = json!({"kubernetes.io/service-name": service});
    Change::Slice(event(json!({
        "metadata": {"name": name, "namespace": "shop", "labels": labels},
        "addressType": "IPv4", "endpoints": endpoints, "ports": ports,
    })))
}

/// A zone in which everything has been listed.
fn zone() -> Zone {
    let domain = Name::from_ascii("cluster.local").unwrap();
    let mut zone = Zone::new(&domain, vec!["10.96.0.10".parse().unwrap()]);
    for change in [
        Change::Service(Event::InitDone),
        Change::Slice(Event::InitDone),
        Change::Namespace(Event::InitDone),
        Change::Node(Event::InitDone),
        Change::Namespace(event(json!({"metadata": {"name": "shop"}}))),
        Change::Node(event(json!({
            "metadata": {"name": "n1"},
            "status": {"addresses": [{"type": "InternalIP", "address": "192.0.2.7"}]},
        }))),
        service(
            "web",
            &json!({"clusterIP": "10.96.0.20", "clusterIPs": ["10.96.0.20", "fd00::20"], "ports": [
                {"name": "http", "port": 80}, {"name": "dns", "port": 53, "protocol": "UDP"}]}),
        ),
        service(
            "db",
            &json!({"clusterIP": "None", "clusterIPs": ["None"], "ports": [{"name": "sql", "port": 5432}]}),
        ),
        slice(
            "db-1",
            "db",
            &json!([
                {"addresses": ["10.244.1.1"], "hostname": "db-0"},
                {"addresses": ["10.244.1.2"], "conditions": {"ready": true}},
                {"addresses": ["10.244.1.3"], "hostname": "db-2", "conditions": {"ready": false}},
            ]),
            &json!([{"name": "sql", "port": 15432}]),
        ),
        slice(
            "db-2",
            "db",
            &json!([{"addresses": ["fd00::1:1"], "hostname": "db-0"}]),
            &json!([{"name": "sql", "port": 15432}]),
        ),
        service("empty", &json!({"clusterIP": "None"})),
        service(
            "docs",
            &json!({"type": "ExternalName", "externalName": "www.example.org"}),
        ),
        service(
            "alias",
            &json!({"type": "ExternalName", "externalName": "web.shop.svc.cluster.local"}),
        ),
        service(
            "circle",
            &json!({"type": "ExternalName", "externalName": "circle.shop.svc.cluster.local"}),
        ),
    ] {
        zone.observe(change);
    }
    zone
}

fn dns() -> Dns {
    let settings = Settings {
        domain: "cluster.local".to_owned(),
        addresses: Vec::new(),
        clients: vec!["10.244.0.0/16".parse().unwrap()],
        // Nobody is there.
        upstream: vec!["127.0.0.1:1".parse().unwrap()],
    };
    let mut dns = Dns::new(settings, "192.0.2.1".parse().unwrap()).unwrap();
    dns.zone = zone().into();
    dns
}

fn name(text: &str) -> Name {
    Name::from_ascii(text).unwrap()
}

/// The records of a name as text, in order; an error code instead of none.
async fn ask(dns: &Dns, of: &str, kind: RecordType) -> Vec<String> {
    let mut query = Message::query();
    query.add_query(Query::query(name(of), kind));
    let answer = send(dns, &query, CLIENT).await;
    assert_eq!(answer.queries, query.queries);
    let mut found: Vec<String> = answer
        .answers
        .iter()
        .map(|record| record.data.to_string())
        .collect();
    found.sort();
    if found.is_empty() {
        let authority = answer
            .authorities
            .iter()
            .filter(|r| r.record_type() == RecordType::SOA);
        found.push(format!(
            "{:?} {}",
            answer.metadata.response_code,
            authority.count()
        ));
    }
    found
}

async fn send(dns: &Dns, query: &Message, client: IpAddr) -> Message {
    let bytes = dns.answer(&query.to_vec().unwrap(), client, false).await.unwrap();
    Message::from_vec(&bytes).unwrap()
}

#[tokio::test]
async fn names_of_services_and_what_is_behind_them() {
    let dns = dns();
    let nothing = ["NXDomain 1"];
    let no_data = ["NoError 1"];
    for (of, kind, wanted) in [
        ("web.shop.svc.cluster.local.", RecordType::A, &["10.96.0.20"][..]),
        ("WEB.Shop.svc.cluster.LOCAL.", RecordType::A, &["10.96.0.20"]),
        ("web.shop.svc.cluster.local.", RecordType::AAAA, &["fd00::20"]),
        ("web.shop.svc.cluster.local.", RecordType::MX, &no_data),
        (
            "_http._tcp.web.shop.svc.cluster.local.",
            RecordType::SRV,
            &["0 100 80 web.shop.svc.cluster.local."],
        ),
        (
            "_dns._udp.web.shop.svc.cluster.local.",
            RecordType::SRV,
            &["0 100 53 web.shop.svc.cluster.local."],
        ),
        ("_dns._tcp.web.shop.svc.cluster.local.", RecordType::SRV, &nothing),
        ("_tcp.web.shop.svc.cluster.local.", RecordType::SRV, &no_data),
        ("_sctp.web.shop.svc.cluster.local.", RecordType::SRV, &nothing),
        ("db-0.web.shop.svc.cluster.local.", RecordType::A, &nothing),
        ("other.shop.svc.cluster.local.", RecordType::A, &nothing),
        ("shop.svc.cluster.local.", RecordType::A, &no_data),
        ("none.svc.cluster.local.", RecordType::A, &nothing),
        ("svc.cluster.local.", RecordType::A, &no_data),
        ("cluster.local.", RecordType::A, &no_data),
        ("cluster.local.", RecordType::NS, &["ns.dns.cluster.local."]),
        ("ns.dns.cluster.local.", RecordType::A, &["10.96.0.10"]),
        ("dns-version.cluster.local.", RecordType::TXT, &["1.1.0"]),
        // headless
        (
            "db.shop.svc.cluster.local.",
            RecordType::A,
            &["10.244.1.1", "10.244.1.2"],
        ),
        ("db.shop.svc.cluster.local.", RecordType::AAAA, &["fd00::1:1"]),
        ("db-0.db.shop.svc.cluster.local.", RecordType::A, &["10.244.1.1"]),
        (
            "db-0.db.shop.svc.cluster.local.",
            RecordType::AAAA,
            &["fd00::1:1"],
        ),
        (
            "10-244-1-2.db.shop.svc.cluster.local.",
            RecordType::A,
            &["10.244.1.2"],
        ),
        ("db-2.db.shop.svc.cluster.local.", RecordType::A, &nothing),
        (
            "_sql._tcp.db.shop.svc.cluster.local.",
            RecordType::SRV,
            &[
                "0 50 15432 10-244-1-2.db.shop.svc.cluster.local.",
                "0 50 15432 db-0.db.shop.svc.cluster.local.",
            ],
        ),
        ("empty.shop.svc.cluster.local.", RecordType::A, &no_data),
        // pods
        (
            "10-244-1-9.shop.pod.cluster.local.",
            RecordType::A,
            &["10.244.1.9"],
        ),
        (
            "fd00--1-9.shop.pod.cluster.local.",
            RecordType::AAAA,
            &["fd00::1:9"],
        ),
        ("10-244-1.shop.pod.cluster.local.", RecordType::A, &nothing),
        ("10-244-1-9.none.pod.cluster.local.", RecordType::A, &nothing),
        // a name with the search path behind it
        ("www.example.org.shop.svc.cluster.local.", RecordType::A, &nothing),
        ("www.example.org.cluster.local.", RecordType::A, &nothing),
        // backwards
        (
            "20.0.96.10.in-addr.arpa.",
            RecordType::PTR,
            &["web.shop.svc.cluster.local."],
        ),
        (
            "1.1.244.10.in-addr.arpa.",
            RecordType::PTR,
            &["db-0.db.shop.svc.cluster.local."],
        ),
        (
            "0.2.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.0.d.f.ip6.arpa.",
            RecordType::PTR,
            &["web.shop.svc.cluster.local."],
        ),
        // another name
        (
            "alias.shop.svc.cluster.local.",
            RecordType::A,
            &["10.96.0.20", "web.shop.svc.cluster.local."],
        ),
        (
            "docs.shop.svc.cluster.local.",
            RecordType::CNAME,
            &["www.example.org."],
        ),
    ] {
        assert_eq!(ask(&dns, of, kind).await, wanted, "{of} {kind}");
    }
    // Nobody answers for the rest, and a circle has no end.
    for of in ["www.example.org.", "9.1.244.10.in-addr.arpa."] {
        assert_eq!(ask(&dns, of, RecordType::A).await, ["ServFail 0"], "{of}");
    }
    let mut query = Message::query();
    query.add_query(Query::query(
        name("circle.shop.svc.cluster.local."),
        RecordType::A,
    ));
    assert_eq!(
        send(&dns, &query, CLIENT).await.metadata.response_code,
        ResponseCode::ServFail
    );
}

#[tokio::test]
async fn changes_are_answered_at_once() {
    let dns = dns();
    let change = |change: Change| dns.zone.write().unwrap().observe(change);
    let name = "web.shop.svc.cluster.local.";
    change(service("web", &json!({"clusterIP": "10.96.0.21"})));
    assert_eq!(ask(&dns, name, RecordType::A).await, ["10.96.0.21"]);
    assert_eq!(
        ask(&dns, "20.0.96.10.in-addr.arpa.", RecordType::PTR).await,
        ["ServFail 0"],
        "the old address has no name any more"
    );
    let one = json!([{"addresses": ["10.244.1.2"]}]);
    change(slice("db-1", "db", &one, &json!([])));
    assert_eq!(
        ask(&dns, "db.shop.svc.cluster.local.", RecordType::A).await,
        ["10.244.1.2"]
    );
    let gone = json!({"metadata": {"name": "web", "namespace": "shop"}, "spec": {"clusterIP": "10.96.0.21"}});
    change(Change::Service(Event::Delete(
        serde_json::from_value(gone).unwrap(),
    )));
    assert_eq!(ask(&dns, name, RecordType::A).await, ["NXDomain 1"]);
}

#[tokio::test]
async fn before_everything_is_listed_nothing_is_denied() {
    let dns = dns();
    *dns.zone.write().unwrap() = Zone::new(&name("cluster.local."), Vec::new());
    let found = ask(&dns, "web.shop.svc.cluster.local.", RecordType::A).await;
    assert_eq!(found, ["ServFail 0"]);
    assert!(matches!(
        dns.zone(|zone| zone.lookup(&name("web.shop.svc.cluster.local."))),
        Answer::NotYet
    ));
}

#[tokio::test]
async fn who_does_not_belong_here_and_what_is_no_question() {
    let dns = dns();
    let mut query = Message::query();
    query.add_query(Query::query(name("web.shop.svc.cluster.local."), RecordType::A));
    let code = async |query: &Message, client: &str| {
        send(&dns, query, client.parse().unwrap())
            .await
            .metadata
            .response_code
    };
    for client in [
        "10.244.3.4",
        "::ffff:10.244.3.4",
        "127.0.0.1",
        "192.0.2.7",
        "192.0.2.1",
    ] {
        assert_eq!(code(&query, client).await, ResponseCode::NoError, "{client}");
    }
    for client in ["192.0.2.8", "8.8.8.8", "2001:db8::1"] {
        assert_eq!(code(&query, client).await, ResponseCode::Refused, "{client}");
    }
    let mut two = query.clone();
    two.add_query(query.queries[0].clone());
    assert_eq!(code(&two, "127.0.0.1").await, ResponseCode::FormErr);
    let mut update = query.clone();
    update.metadata.op_code = OpCode::Update;
    assert_eq!(code(&update, "127.0.0.1").await, ResponseCode::NotImp);
    let mut zone = Message::query();
    zone.add_query(Query::query(name("cluster.local."), RecordType::AXFR));
    assert_eq!(code(&zone, "127.0.0.1").await, ResponseCode::Refused);
    let mut newer = query.clone();
    let mut edns = Edns::new();
    edns.set_version(1);
    newer.set_edns(edns);
    // 16 has two names.
    assert_eq!(u16::from(code(&newer, "127.0.0.1").await), 16);
    // An answer is not answered.
    query.metadata.message_type = MessageType::Response;
    let bytes = query.to_vec().unwrap();
    assert_eq!(dns.answer(&bytes, CLIENT, false).await, None);
}

#[tokio::test]
async fn what_does_not_fit_into_a_datagram_is_cut_and_marked() {
    let dns = dns();
    let endpoints: Vec<Value> = (0..200)
        .map(|i| json!({"addresses": [format!("10.244.7.{i}")]}))
        .collect();
    dns.zone
        .write()
        .unwrap()
        .observe(slice("db-1", "db", &endpoints.into(), &json!([])));
    let mut query = Message::query();
    query.add_query(Query::query(name("db.shop.svc.cluster.local."), RecordType::A));
    let sizes = async |query: &Message, tcp| {
        let bytes = dns.answer(&query.to_vec().unwrap(), CLIENT, tcp).await.unwrap();
        let answer = Message::from_vec(&bytes).unwrap();
        (bytes.len(), answer.answers.len(), answer.metadata.truncation)
    };
    let (bytes, answers, cut) = sizes(&query, false).await;
    assert!(
        (480..=512).contains(&bytes) && answers > 20 && cut,
        "{bytes} {answers} {cut}"
    );
    let mut edns = Edns::new();
    edns.set_max_payload(4096);
    query.set_edns(edns);
    let (bytes, answers, cut) = sizes(&query, false).await;
    assert!(
        (1200..=1232).contains(&bytes) && answers > 50 && cut,
        "{bytes} {answers} {cut}"
    );
    let (_, answers, cut) = sizes(&query, true).await;
    assert_eq!((answers, cut), (200, false));
}

proptest! {
    #[test]
    fn no_bytes_bring_it_down(mut bytes in prop::collection::vec(any::<u8>(), 0..80), header in any::<bool>()) {
        if header && bytes.len() >= 12 {
            // One question, so that its name is read.
            bytes[2..12].copy_from_slice(&[1, 0, 0, 1, 0, 0, 0, 0, 0, 0]);
        }
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let answer = runtime.block_on(dns().answer(&bytes, CLIENT, true));
        if let Some(answer) = answer {
            prop_assert_eq!(&answer[..2], &bytes[..2]);
        }
    }
}
