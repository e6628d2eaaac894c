//! Real listeners on loopback addresses.

use std::net::{Ipv4Addr, Ipv6Addr};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;

use super::*;

const PATIENCE: Duration = Duration::from_secs(20);
const V4: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);
const V6: IpAddr = IpAddr::V6(Ipv6Addr::LOCALHOST);

struct Fixture {
    checks: watch::Sender<Vec<HealthCheckNodePort>>,
    addresses: watch::Sender<BTreeSet<IpAddr>>,
    healthy: Arc<AtomicBool>,
    failures: Arc<Mutex<Vec<String>>>,
    task: JoinHandle<()>,
}

impl Fixture {
    fn new(addresses: &[IpAddr]) -> Self {
        let checks = watch::Sender::default();
        let addresses = watch::Sender::new(addresses.iter().copied().collect());
        let healthy = Arc::new(AtomicBool::new(true));
        let failures = Arc::<Mutex<Vec<String>>>::default();
        let (asked, told) = (Arc::clone(&healthy), Arc::clone(&failures));
        let task = tokio::spawn(serve(
            checks.subscribe(),
            addresses.subscribe(),
            Arc::new(move || asked.load(Ordering::Relaxed)),
            Box::new(move |namespace, name, why| {
                told.lock().unwrap().push(format!("{namespace}/{name}: {why}"));
            }),
        ));
        Self {
            checks,
            addresses,
            healthy,
            failures,
            task,
        }
    }
}

fn check(name: &str, port: u16, v4: Option<u32>, v6: Option<u32>) -> HealthCheckNodePort {
    HealthCheckNodePort {
        namespace: "shop".into(),
        name: name.into(),
        port,
        local_endpoints_v4: v4,
        local_endpoints_v6: v6,
    }
}

/// A port that is free on both loopback addresses. Who asks may lose it to someone else, but hardly ever does.
async fn free_port() -> u16 {
    loop {
        let v4 = TcpListener::bind((V4, 0)).await.unwrap();
        let port = v4.local_addr().unwrap().port();
        if TcpListener::bind((V6, port)).await.is_ok() {
            return port;
        }
    }
}

/// Waits until the port is listened on, or is not.
async fn connect(addr: (IpAddr, u16), wanted: bool) -> Option<TcpStream> {
    let until = async {
        loop {
            match (TcpStream::connect(addr).await, wanted) {
                (Ok(stream), true) => return Some(stream),
                (Err(_), false) => return None,
                _ => tokio::task::yield_now().await,
            }
        }
    };
    tokio::time::timeout(PATIENCE, until).await.unwrap()
}

/// Status line, headers in lower case, body.
async fn ask(addr: (IpAddr, u16), request: &str) -> (String, Vec<String>, String) {
    let mut stream = connect(addr, true).await.unwrap();
    let request = format!("{request} HTTP/1.1\r\nHost: n\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).await.unwrap();
    let (head, body) = text.split_once("\r\n\r\n").unwrap();
    let mut lines = head.lines();
    let status = lines.next().unwrap().to_owned();
    (status, lines.map(str::to_lowercase).collect(), body.to_owned())
}

/// Waits until the status is as expected.
async fn status(addr: (IpAddr, u16), expected: &str) {
    let until = async {
        while !ask(addr, "GET /").await.0.contains(expected) {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(PATIENCE, until).await.unwrap();
}

#[tokio::test]
async fn every_request_is_answered_as_kube_proxy_does() {
    let fixture = Fixture::new(&[V4, V6]);
    let port = free_port().await;
    fixture
        .checks
        .send_replace(vec![check("we\"b", port, Some(2), Some(0))]);
    for request in ["GET /", "POST /healthz", "DELETE /any/path?x"] {
        let (status, headers, body) = ask((V4, port), request).await;
        assert_eq!(status, "HTTP/1.1 200 OK", "{request}");
        for header in [
            "content-type: application/json",
            "x-content-type-options: nosniff",
            "x-load-balancing-endpoint-weight: 2",
        ] {
            assert!(
                headers.iter().any(|h| h == header),
                "{header} is not in {headers:?}"
            );
        }
        assert_eq!(
            body,
            "{\n\t\"service\": {\n\t\t\"namespace\": \"shop\",\n\t\t\"name\": \"we\\\"b\"\n\t},\n\t\"localEndpoints\": 2,\n\t\"serviceProxyHealthy\": true\n}"
        );
    }
    // each family for itself
    let (status_line, headers, body) = ask((V6, port), "GET /").await;
    assert_eq!(status_line, "HTTP/1.1 503 Service Unavailable");
    assert!(headers.iter().any(|h| h == "x-load-balancing-endpoint-weight: 0"));
    assert!(body.contains("\"localEndpoints\": 0"), "{body}");
    // a node that cannot program its kernel gets no traffic, whatever it has
    fixture.healthy.store(false, Ordering::Relaxed);
    let (status_line, _, body) = ask((V4, port), "GET /").await;
    assert_eq!(status_line, "HTTP/1.1 503 Service Unavailable");
    assert!(
        body.contains("\"localEndpoints\": 2") && body.ends_with("\"serviceProxyHealthy\": false\n}"),
        "{body}"
    );
}

#[tokio::test]
async fn ports_open_change_and_close_live_with_their_connections() {
    let fixture = Fixture::new(&[V4, V6]);
    let (first, second) = (free_port().await, free_port().await);
    fixture
        .checks
        .send_replace(vec![check("web", first, Some(0), None)]);
    status((V4, first), "503").await;
    connect((V6, first), false).await;
    fixture
        .checks
        .send_replace(vec![check("web", first, Some(1), None)]);
    status((V4, first), "200").await;
    // one that stays open ends with its port
    let mut held = connect((V4, first), true).await.unwrap();
    fixture
        .checks
        .send_replace(vec![check("web", second, Some(1), Some(1))]);
    status((V6, second), "200").await;
    connect((V4, first), false).await;
    let ended = tokio::time::timeout(PATIENCE, held.read(&mut [0; 1]))
        .await
        .unwrap();
    assert!(matches!(ended, Ok(0) | Err(_)), "{ended:?}");
    // a port that goes from one Service to another
    fixture
        .checks
        .send_replace(vec![check("other", second, Some(0), None)]);
    status((V4, second), "503").await;
    // addresses that go
    fixture.addresses.send_replace(BTreeSet::new());
    connect((V4, second), false).await;
    assert_eq!(*fixture.failures.lock().unwrap(), [""; 0]);
    drop(fixture.checks);
    tokio::time::timeout(PATIENCE, fixture.task)
        .await
        .unwrap()
        .unwrap();
}

#[tokio::test]
async fn a_port_in_use_is_said_once_and_taken_when_it_is_free() {
    let taken = TcpListener::bind((V4, 0)).await.unwrap();
    let port = taken.local_addr().unwrap().port();
    let fixture = Fixture::new(&[V4]);
    let fine = free_port().await;
    fixture.checks.send_replace(vec![
        check("taken", port, Some(1), None),
        check("web", fine, Some(1), None),
    ]);
    status((V4, fine), "200").await;
    // tried again and again meanwhile
    tokio::time::sleep(RETRY * 5).await;
    {
        let failures = fixture.failures.lock().unwrap();
        let [failure] = &failures[..] else {
            panic!("{failures:?}")
        };
        assert!(
            failure.starts_with(&format!("shop/taken: health check node port 127.0.0.1:{port}: ")),
            "{failure}"
        );
    }
    drop(taken);
    status((V4, port), "200").await;
    assert_eq!(fixture.failures.lock().unwrap().len(), 1);
}
