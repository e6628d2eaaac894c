//! The client library of the agent against this server: paged and streaming lists, bookmarks, lost history, restarts.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test stops where it fails"
)]

mod common;

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use common::{Server, call, start_in};
use futures::StreamExt as _;
use futures::stream::BoxStream;
use k8s_openapi::api::core::v1::{ConfigMap, Service};
use kube::api::{Api, ListParams, PostParams};
use kube::runtime::watcher::{self, Event, ListSemantic, watcher};
use serde_json::{Value, json};

const SERVICES: &str = "/api/v1/namespaces/default/services";

fn service(name: &str) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Service", "metadata": {"name": name},
        "spec": {"ports": [{"port": 80}], "selector": {"app": "x"}},
    })
}

async fn create(client: &kube::Client, name: &str) {
    let (code, body) = call(client, "POST", SERVICES, &service(name)).await;
    assert_eq!(code, 201, "{body}");
}

/// What a user of the watcher believes to exist.
struct Mirror {
    events: BoxStream<'static, watcher::Result<Event<Service>>>,
    objects: BTreeMap<String, String>,
    lists: usize,
    errors: Vec<String>,
}

impl Mirror {
    fn new(client: &kube::Client, config: watcher::Config) -> Self {
        let events = watcher(Api::<Service>::default_namespaced(client.clone()), config).boxed();
        Self {
            events,
            objects: BTreeMap::new(),
            lists: 0,
            errors: Vec::new(),
        }
    }

    async fn until(&mut self, done: impl Fn(&Self) -> bool) {
        let mut initial = BTreeMap::new();
        let entry = |service: Service| {
            (
                service.metadata.name.unwrap(),
                service.metadata.resource_version.unwrap(),
            )
        };
        while !done(self) {
            let next = tokio::time::timeout(Duration::from_secs(30), self.events.next());
            match next.await.expect("nothing more comes").unwrap() {
                Ok(Event::Init) => initial.clear(),
                Ok(Event::InitApply(service)) => initial.extend([entry(service)]),
                Ok(Event::InitDone) => {
                    self.objects = std::mem::take(&mut initial);
                    self.lists += 1;
                }
                Ok(Event::Apply(service)) => self.objects.extend([entry(service)]),
                Ok(Event::Delete(service)) => drop(self.objects.remove(&entry(service).0)),
                Err(error) => self.errors.push(error.to_string()),
            }
        }
    }

    fn has(&self, name: &str) -> bool {
        self.objects.contains_key(name)
    }
}

async fn follows(config: watcher::Config) {
    let server = Server::start().await;
    let client = server.client().await;
    for n in 0..7 {
        create(&client, &format!("s{n}")).await;
    }
    let mut mirror = Mirror::new(&client, config);
    mirror.until(|mirror| mirror.lists == 1).await;
    assert_eq!(mirror.objects.len(), 8, "{:?}", mirror.objects);
    create(&client, "late").await;
    call(&client, "DELETE", &format!("{SERVICES}/s0"), &Value::Null).await;
    mirror
        .until(|mirror| mirror.has("late") && !mirror.has("s0"))
        .await;

    // History goes away while the watch is open: nothing happens to the watch.
    server.plane.forget_history().await.unwrap();
    create(&client, "after-compaction").await;
    mirror.until(|mirror| mirror.has("after-compaction")).await;
    assert_eq!((mirror.lists, &mirror.errors), (1, &Vec::new()));

    // The server goes away, and comes back without the history that the watcher needs.
    let port = server.port();
    let dir = server.stop().await;
    let plane = start_in(dir.path(), port).await;
    let server = Server { plane, dir };
    create(&client, "unseen").await;
    call(&client, "DELETE", &format!("{SERVICES}/s1"), &Value::Null).await;
    server.plane.forget_history().await.unwrap();
    mirror
        .until(|mirror| mirror.has("unseen") && !mirror.has("s1"))
        .await;
    create(&client, "last").await;
    mirror.until(|mirror| mirror.has("last")).await;
    let expected: BTreeSet<&str> = [
        "s2",
        "s3",
        "s4",
        "s5",
        "s6",
        "late",
        "after-compaction",
        "unseen",
        "last",
        "kubernetes",
    ]
    .into();
    assert_eq!(
        mirror.objects.keys().map(String::as_str).collect::<BTreeSet<_>>(),
        expected
    );
    server.stop().await;
}

#[tokio::test]
async fn watcher_with_paged_lists() {
    follows(watcher::Config {
        page_size: Some(3),
        ..watcher::Config::default()
    })
    .await;
}

#[tokio::test]
async fn watcher_with_streaming_lists() {
    let config = watcher::Config::default().streaming_lists();
    follows(config).await;
}

#[tokio::test]
async fn watcher_that_takes_any_revision() {
    let config = watcher::Config {
        list_semantic: ListSemantic::Any,
        ..watcher::Config::default()
    };
    follows(config).await;
}

#[tokio::test]
async fn a_watch_from_before_the_history_is_expired() {
    let server = Server::start().await;
    let client = server.client().await;
    create(&client, "a").await;
    server.plane.forget_history().await.unwrap();
    let api = Api::<Service>::default_namespaced(client);
    let mut events = api
        .watch(&kube::api::WatchParams::default(), "2")
        .await
        .unwrap()
        .boxed();
    let first = events.next().await.unwrap().unwrap();
    let kube::api::WatchEvent::Error(status) = first else {
        panic!("{first:?}")
    };
    assert_eq!((status.code, &status.reason[..]), (410, "Expired"));
    assert!(events.next().await.is_none());
    server.stop().await;
}

/// A page is consistent with the first one even if objects come and go in between.
#[tokio::test]
async fn pages_are_of_one_moment() {
    let server = Server::start().await;
    let client = server.client().await;
    for n in 0..5 {
        create(&client, &format!("s{n}")).await;
    }
    let api = Api::<Service>::default_namespaced(client.clone());
    let first = api.list(&ListParams::default().limit(2)).await.unwrap();
    assert_eq!(first.metadata.remaining_item_count, Some(4));
    let token = first.metadata.continue_.unwrap();
    call(&client, "DELETE", &format!("{SERVICES}/s4"), &Value::Null).await;
    create(&client, "s9").await;
    let rest = api
        .list(&ListParams::default().continue_token(&token))
        .await
        .unwrap();
    let names: Vec<String> = rest
        .items
        .into_iter()
        .map(|item| item.metadata.name.unwrap())
        .collect();
    assert_eq!(names, ["s1", "s2", "s3", "s4"]);
    assert_eq!(rest.metadata.resource_version, first.metadata.resource_version);
    // With a selector the limit counts what matches.
    let page = api
        .list(&ListParams::default().limit(1).fields("metadata.name!=kubernetes"))
        .await
        .unwrap();
    assert_eq!(page.items[0].metadata.name.as_deref(), Some("s0"));
    assert!(page.metadata.continue_.is_some());
    server.plane.forget_history().await.unwrap();
    create(&client, "s10").await;
    server.plane.forget_history().await.unwrap();
    let error = api
        .list(&ListParams::default().continue_token(&token))
        .await
        .unwrap_err();
    assert!(
        matches!(&error, kube::Error::Api(status) if status.code == 410),
        "{error}"
    );
    server.stop().await;
}

/// Concurrent creations never share an address, and a failed one keeps none.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn allocations_are_unique_and_given_back() {
    let server = Server::start().await;
    let client = server.client().await;
    let mut tasks = Vec::new();
    for n in 0..60 {
        let client = client.clone();
        tasks.push(tokio::spawn(async move {
            let mut service = service(&format!("n{}", n % 40));
            service["spec"]["type"] = "NodePort".into();
            call(&client, "POST", SERVICES, &service).await
        }));
    }
    let (mut addresses, mut ports, mut created) = (BTreeSet::new(), BTreeSet::new(), 0);
    for task in tasks {
        let (code, body) = task.await.unwrap();
        assert!(code == 201 || code == 409, "{body}");
        if code == 201 {
            created += 1;
            assert!(addresses.insert(body["spec"]["clusterIP"].to_string()), "{body}");
            assert!(
                ports.insert(body["spec"]["ports"][0]["nodePort"].to_string()),
                "{body}"
            );
        }
    }
    assert_eq!(created, 40);
    let (code, _) = call(&client, "DELETE", SERVICES, &Value::Null).await;
    assert_eq!(code, 200);
    for (n, port) in ports.iter().enumerate() {
        let mut service = service(&format!("again{n}"));
        service["spec"]["type"] = "NodePort".into();
        service["spec"]["ports"][0]["nodePort"] = port.parse::<u16>().unwrap().into();
        let (code, body) = call(&client, "POST", SERVICES, &service).await;
        assert_eq!(code, 201, "{body}");
    }
    server.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn ten_thousand_services_are_listed_in_pages() {
    let server = Server::start().await;
    let client = server.client().await;
    let mut tasks = futures::stream::iter((0..10_000).map(|n| {
        let client = client.clone();
        async move { create(&client, &format!("s{n}")).await }
    }))
    .buffer_unordered(128);
    while tasks.next().await.is_some() {}
    let mut mirror = Mirror::new(
        &client,
        watcher::Config {
            page_size: Some(500),
            ..watcher::Config::default()
        },
    );
    mirror.until(|mirror| mirror.lists == 1).await;
    assert_eq!(mirror.objects.len(), 10_001);
    server.stop().await;
}

#[tokio::test]
async fn generated_names_and_conflicts() {
    let server = Server::start().await;
    let client = server.client().await;
    let api = Api::<ConfigMap>::default_namespaced(client.clone());
    let mut map = ConfigMap::default();
    map.metadata.generate_name = Some("m-".into());
    let (one, two) = (
        api.create(&PostParams::default(), &map).await.unwrap(),
        api.create(&PostParams::default(), &map).await.unwrap(),
    );
    let (first, second) = (one.metadata.name.clone().unwrap(), two.metadata.name.unwrap());
    assert!(
        first.starts_with("m-") && first.len() == 7 && first != second,
        "{first} {second}"
    );

    let mut new = one.clone();
    new.data = Some([("a".to_owned(), "b".to_owned())].into());
    let changed = api.replace(&first, &PostParams::default(), &new).await.unwrap();
    let error = api
        .replace(&first, &PostParams::default(), &new)
        .await
        .unwrap_err();
    assert!(
        matches!(&error, kube::Error::Api(status) if status.code == 409),
        "{error}"
    );
    // Writing what is there already changes nothing.
    let same = api
        .replace(&first, &PostParams::default(), &changed)
        .await
        .unwrap();
    assert_eq!(same.metadata.resource_version, changed.metadata.resource_version);
    let dry = PostParams {
        dry_run: true,
        ..PostParams::default()
    };
    let mut other = changed.clone();
    other.data = None;
    api.replace(&first, &dry, &other).await.unwrap();
    assert_eq!(api.get(&first).await.unwrap().data, changed.data);
    server.stop().await;
}
