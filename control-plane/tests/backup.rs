//! Saving what a control plane keeps while it is written to, and going on with it elsewhere.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a test stops where it fails")]

mod common;

use std::fs;
use std::path::Path;

use beeline_control_plane::backup;
use common::{Server, call, start_in};
use serde_json::{Value, json};

const MAPS: &str = "/api/v1/namespaces/default/configmaps";

async fn create(client: &kube::Client, name: &str) {
    let map = json!({"metadata": {"name": name}, "data": {"text": "ä\n\"x\" ".repeat(100)}});
    assert_eq!(call(client, "POST", MAPS, &map).await.0, 201);
}

async fn maps(client: &kube::Client) -> (Vec<Value>, String) {
    let (code, list) = call(client, "GET", MAPS, &Value::Null).await;
    assert_eq!(code, 200);
    let revision = list["metadata"]["resourceVersion"].as_str().unwrap().to_owned();
    let mut items = list["items"].as_array().unwrap().clone();
    // A controller's, whenever it comes to it.
    items.retain(|item| item["metadata"]["name"] != "kube-root-ca.crt");
    (items, revision)
}

fn names(items: &[Value]) -> Vec<&str> {
    items
        .iter()
        .map(|item| item["metadata"]["name"].as_str().unwrap())
        .collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_saved_under_load_goes_on_elsewhere() {
    let server = Server::start().await;
    let client = server.client().await;
    for i in 0..50 {
        create(&client, &format!("before-{i:02}")).await;
    }
    let writing = tokio::spawn({
        let client = client.clone();
        async move {
            for i in 0..400 {
                create(&client, &format!("during-{i:03}")).await;
            }
        }
    });
    let file = server.dir.path().join("backup");
    // Not before the writer is at it.
    while names(&maps(&client).await.0).len() < 60 {}
    let count = backup::save(server.plane.kubeconfig(), &file).await.unwrap();
    assert!(count > 60, "{count}");
    writing.await.unwrap();
    let (all, revision) = maps(&client).await;
    backup::save(server.plane.kubeconfig(), &file).await.unwrap_err();

    let elsewhere = tempfile::tempdir().unwrap();
    let data = elsewhere.path().join("data");
    assert_eq!(backup::restore(&file, &data).unwrap(), count);
    let again = format!("{:#}", backup::restore(&file, &data).unwrap_err());
    assert!(again.contains("is there already"), "{again}");
    let old = server.stop().await;
    copy(&old.path().join("data/pki"), &data.join("pki"));
    let plane = start_in(elsewhere.path(), 0).await;
    let client = common::client(kube::config::Kubeconfig::read_from(plane.kubeconfig()).unwrap()).await;
    let (restored, _) = maps(&client).await;
    let (had, have) = (names(&all), names(&restored));
    // What was written one after the other is there up to one moment.
    assert_eq!(had[..have.len()], have[..]);
    assert!(have.len() >= 60, "{}", have.len());
    assert_eq!(all[..have.len()], restored[..], "as it was, versions included");
    // Nobody takes the new history for the one that was lost.
    let watch = format!("{MAPS}?watch=1&timeoutSeconds=1&resourceVersion={revision}");
    let (_, answer) = call(&client, "GET", &watch, &Value::Null).await;
    assert!(answer.to_string().contains("410"), "{answer}");
    create(&client, "after").await;
    plane.stop().await;
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for file in fs::read_dir(from).unwrap() {
        let file = file.unwrap();
        fs::copy(file.path(), to.join(file.file_name())).unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_no_whole_backup_makes_no_store() {
    let server = Server::start().await;
    let file = server.dir.path().join("backup");
    backup::save(server.plane.kubeconfig(), &file).await.unwrap();
    let text = fs::read_to_string(&file).unwrap();
    let lines: Vec<&str> = text.lines().collect();
    let elsewhere = tempfile::tempdir().unwrap();
    let data = elsewhere.path().join("data");
    for (bad, says) in [
        (String::new(), "is no backup"),
        ("hello".to_owned(), "is no backup"),
        (text.replacen(":1,", ":7,", 1), "format 7"),
        (lines[..lines.len() - 1].join("\n"), "not complete"),
        (
            text.replacen(lines[1], "", 1).replacen("\n\n", "\n", 1),
            "keys are there",
        ),
        (text.replacen("\"key\"", "\"kei\"", 1), "line 2"),
        (text[..text.len() / 2].to_owned(), "backup"),
    ] {
        fs::write(&file, &bad).unwrap();
        let error = format!("{:#}", backup::restore(&file, &data).unwrap_err());
        assert!(error.contains(says), "{says}: {error}");
        let left: Vec<_> = fs::read_dir(&data).unwrap().collect();
        assert!(left.is_empty(), "{left:?}");
    }
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn only_administrators_have_it() {
    let server = Server::start().await;
    let mut config = server.config();
    config.auth_infos[0].auth_info = Some(kube::config::AuthInfo::default());
    let stranger = common::client(config).await;
    assert_eq!(call(&stranger, "GET", backup::PATH, &Value::Null).await.0, 403);
    let admin = server.client().await;
    assert_eq!(call(&admin, "POST", backup::PATH, &Value::Null).await.0, 405);
    server.stop().await;
}
