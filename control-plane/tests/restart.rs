//! A restart: the same identity, the same objects, the same allocations.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test stops where it fails"
)]

mod common;

use std::os::unix::fs::PermissionsExt as _;

use beeline_control_plane::config::Config;
use beeline_control_plane::run::ControlPlane;
use common::{Server, call, start_in};
use serde_json::{Value, json};

fn service(name: &str, cluster_ip: Option<&str>) -> Value {
    let mut spec = json!({"ports": [{"port": 80}], "selector": {"app": "x"}});
    if let Some(cluster_ip) = cluster_ip {
        spec["clusterIP"] = cluster_ip.into();
    }
    json!({"apiVersion": "v1", "kind": "Service", "metadata": {"name": name}, "spec": spec})
}

#[tokio::test]
async fn everything_is_as_before_after_a_restart() {
    const SERVICES: &str = "/api/v1/namespaces/default/services";
    let server = Server::start().await;
    let client = server.client().await;
    let (code, created) = call(&client, "POST", SERVICES, &service("a", None)).await;
    assert_eq!(code, 201, "{created}");
    let (_, kubernetes) = call(&client, "GET", &format!("{SERVICES}/kubernetes"), &Value::Null).await;
    assert_eq!(kubernetes["spec"]["clusterIP"], "10.96.0.1");
    let before = std::fs::read_to_string(server.plane.kubeconfig()).unwrap();
    let mode = std::fs::metadata(server.plane.kubeconfig())
        .unwrap()
        .permissions()
        .mode();
    assert_eq!(mode & 0o777, 0o600);
    let port = server.port();
    let dir = server.stop().await;

    let plane = start_in(dir.path(), port).await;
    let server = Server { plane, dir };
    assert_eq!(
        std::fs::read_to_string(server.plane.kubeconfig()).unwrap(),
        before
    );
    // The client from before trusts and is trusted.
    let (code, found) = call(&client, "GET", &format!("{SERVICES}/a"), &Value::Null).await;
    assert_eq!((code, &found), (200, &created));
    let (_, same) = call(&client, "GET", &format!("{SERVICES}/kubernetes"), &Value::Null).await;
    assert_eq!(same, kubernetes, "nothing changed, so nothing was written");
    let taken = created["spec"]["clusterIP"].as_str();
    let (code, refused) = call(&client, "POST", SERVICES, &service("b", taken)).await;
    assert_eq!(code, 422, "{refused}");
    let (code, gone) = call(&client, "DELETE", &format!("{SERVICES}/a"), &Value::Null).await;
    assert_eq!(code, 200, "{gone}");
    let (code, created) = call(&client, "POST", SERVICES, &service("b", taken)).await;
    assert_eq!(code, 201, "{created}");
    server.stop().await;
}

#[tokio::test]
async fn a_busy_address_and_a_busy_directory_are_named() {
    let server = Server::start().await;
    let other = tempfile::tempdir().unwrap();
    let mut config = Config::new(other.path());
    config.bind.set_port(server.port());
    let error = format!("{:#}", ControlPlane::start(config).await.unwrap_err());
    assert!(error.contains(&format!("127.0.0.1:{}", server.port())), "{error}");

    let mut config = Config::new(server.dir.path().join("data"));
    config.bind.set_port(0);
    let error = format!("{:#}", ControlPlane::start(config).await.unwrap_err());
    assert!(
        error.contains("store.redb") && error.contains("another process"),
        "{error}"
    );
    server.stop().await;
}

#[tokio::test]
async fn the_service_of_the_api_follows_its_address() {
    let dir = tempfile::tempdir().unwrap();
    let mut slices = Vec::new();
    for advertise in [
        vec!["192.0.2.1".to_owned()],
        vec!["192.0.2.2".to_owned(), "127.0.0.1".to_owned()],
        Vec::new(),
    ] {
        let mut config = Config::new(dir.path());
        config.bind.set_port(0);
        config.advertise = advertise;
        let plane = ControlPlane::start(config).await.unwrap();
        let kubeconfig = std::fs::read_to_string(plane.kubeconfig()).unwrap();
        let port = plane.url().rsplit(':').next().unwrap().to_owned();
        // The advertised address is not on this machine: reach the server by its own.
        let host = plane
            .url()
            .trim_start_matches("https://")
            .split(':')
            .next()
            .unwrap()
            .to_owned();
        let local = kubeconfig.replace(&format!("https://{host}:"), "https://127.0.0.1:");
        let client = common::client(kube::config::Kubeconfig::from_yaml(&local).unwrap()).await;
        let path = "/apis/discovery.k8s.io/v1/namespaces/default/endpointslices/kubernetes";
        let (code, slice) = call(&client, "GET", path, &Value::Null).await;
        let (_, service) = call(
            &client,
            "GET",
            "/api/v1/namespaces/default/services/kubernetes",
            &Value::Null,
        )
        .await;
        assert_eq!(service["spec"]["ports"][0]["targetPort"].to_string(), port);
        if code == 200 {
            assert_eq!(slice["ports"][0]["port"].to_string(), port);
        }
        slices.push((code, slice["endpoints"][0]["addresses"][0].clone()));
        plane.stop().await;
    }
    assert_eq!(
        slices,
        [
            (200, json!("192.0.2.1")),
            (200, json!("192.0.2.2")),
            (404, Value::Null)
        ]
    );
}
