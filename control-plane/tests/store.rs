//! Both stores: comparing writes, history and watches, as their users see them. And the embedded one: durability and bounds.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test stops where it fails"
)]

#[path = "common/etcd.rs"]
mod etcd;

use std::collections::{BTreeMap, HashMap};
use std::io::{BufRead as _, BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use beeline_control_plane::store::{
    Event, Expect, Options, Range, RedbStore, Store, StoreError, Watch, Write,
};
use bytes::Bytes;
use etcd::Etcd;
use rstest::rstest;

const CRASH_FILE: &str = "BEELINE_TEST_CRASH_FILE";
const PREFIX: &str = "/registry/core/services/";

fn open(path: &Path) -> RedbStore {
    RedbStore::open(path, Options::default()).unwrap()
}

/// Where the objects of a test are kept.
enum Place {
    Redb(tempfile::TempDir),
    Etcd(Etcd),
}

impl Place {
    fn new(kind: &str) -> Self {
        match kind {
            "redb" => Self::Redb(tempfile::tempdir().unwrap()),
            _ => Self::Etcd(Etcd::start()),
        }
    }

    async fn open(&self) -> Arc<dyn Store> {
        match self {
            Self::Redb(dir) => Arc::new(open(&dir.path().join("store"))),
            Self::Etcd(etcd) => Arc::new(etcd.connect().await),
        }
    }
}

async fn store(kind: &str) -> (Place, Arc<dyn Store>) {
    let place = Place::new(kind);
    let store = place.open().await;
    (place, store)
}

async fn newest(store: &dyn Store) -> u64 {
    store.get("").await.unwrap().1
}

fn put(key: &str, expect: Expect, value: &str) -> Write {
    Write {
        key: key.into(),
        expect,
        value: Some(Bytes::copy_from_slice(value.as_bytes())),
        guards: Vec::new(),
        also: Vec::new(),
    }
}

/// Writes whatever the key is now.
async fn set(store: &dyn Store, key: &str, value: Option<&str>) -> u64 {
    let (found, _) = store.get(key).await.unwrap();
    let expect = found.map_or(Expect::Absent, |found| Expect::Revision(found.revision));
    let mut write = put(key, expect, value.unwrap_or_default());
    if value.is_none() {
        write.value = None;
    }
    store.write(write).await.unwrap()
}

async fn all(store: &dyn Store, revision: Option<u64>, limit: usize) -> BTreeMap<String, (u64, Bytes)> {
    let mut range = Range {
        prefix: PREFIX.into(),
        after: None,
        limit,
        revision,
    };
    let mut found = BTreeMap::new();
    loop {
        let page = store.list(range.clone()).await.unwrap();
        assert!(limit == 0 || page.items.len() <= limit);
        range.after = page.items.last().map(|item| item.key.clone());
        range.revision = Some(page.revision);
        for item in page.items {
            assert!(
                found.insert(item.key, (item.revision, item.value)).is_none(),
                "a key came twice"
            );
        }
        if page.remaining == 0 {
            return found;
        }
    }
}

async fn next(watch: &mut Box<dyn Watch>) -> Result<Arc<Event>, StoreError> {
    tokio::time::timeout(Duration::from_secs(20), watch.next())
        .await
        .expect("no event")
}

#[rstest]
#[tokio::test]
async fn writes_compare_before_they_change_anything(#[values("redb", "etcd")] kind: &str) {
    let (_place, store) = store(kind).await;
    let key = &format!("{PREFIX}a");
    let first = store.write(put(key, Expect::Absent, "1")).await.unwrap();
    let error = store.write(put(key, Expect::Absent, "2")).await.unwrap_err();
    assert!(
        matches!(error, StoreError::Conflict { current: Some(current), .. } if current.revision == first)
    );
    let error = store
        .write(put(key, Expect::Revision(first + 1), "2"))
        .await
        .unwrap_err();
    assert!(matches!(error, StoreError::Conflict { .. }));
    let mut guarded = put(key, Expect::Revision(first), "2");
    guarded.guards = vec![("/registry/core/namespaces/x".into(), Expect::Revision(1))];
    assert!(matches!(
        store.write(guarded.clone()).await.unwrap_err(),
        StoreError::Guard { .. }
    ));
    let (found, revision) = store.get(key).await.unwrap();
    assert_eq!((found.unwrap().value, revision), (Bytes::from("1"), first));
    let guard = store
        .write(put("/registry/core/namespaces/x", Expect::Absent, "ns"))
        .await
        .unwrap();
    guarded.guards[0].1 = Expect::Revision(guard);
    assert_eq!(store.write(guarded).await.unwrap(), guard + 1);
}

#[rstest]
#[tokio::test]
async fn what_is_written_together_is_written_or_not_as_a_whole(#[values("redb", "etcd")] kind: &str) {
    let (_place, store) = store(kind).await;
    let (key, claim) = (format!("{PREFIX}a"), "/registry/claims/services/a");
    let mut write = put(&key, Expect::Absent, "1");
    write.guards = vec![(claim.into(), Expect::Absent)];
    write.also = vec![
        (claim.into(), Some("mine".into())),
        ("/registry/claims/services/none".into(), None),
    ];
    let start = newest(&*store).await;
    let revision = store.write(write.clone()).await.unwrap();
    assert_eq!(newest(&*store).await, revision);
    assert_eq!(store.get(claim).await.unwrap().0.unwrap().value, "mine");
    assert_eq!(store.get(&key).await.unwrap().0.unwrap().revision, revision);
    // The claim is taken: nothing of another write is done.
    write.key = format!("{PREFIX}b");
    let error = store.write(write.clone()).await.unwrap_err();
    assert!(
        matches!(&error, StoreError::Guard { key } if key == claim),
        "{error}"
    );
    assert_eq!(newest(&*store).await, revision);
    // It goes with its owner.
    let mut delete = put(&key, Expect::Revision(revision), "");
    (delete.value, delete.also) = (None, vec![(claim.into(), None)]);
    store.write(delete).await.unwrap();
    assert_eq!(store.get(claim).await.unwrap().0, None);
    store.write(write).await.unwrap();
    let mut watch = store.watch("/registry/claims/services/", start).await.unwrap();
    for wanted in [true, false, true] {
        assert_eq!(next(&mut watch).await.unwrap().value.is_some(), wanted);
    }
}

#[tokio::test]
async fn a_second_process_is_told_that_the_store_is_in_use() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("store");
    let _store = open(&path);
    let error = RedbStore::open(&path, Options::default()).unwrap_err();
    assert!(matches!(error, StoreError::Locked { .. }), "{error}");
    assert!(error.to_string().contains(path.to_str().unwrap()));
}

#[rstest]
#[tokio::test]
async fn lists_show_any_revision_that_is_not_compacted(#[values("redb", "etcd")] kind: &str) {
    let (_place, store) = store(kind).await;
    let mut history = Vec::new();
    let mut state: BTreeMap<String, (u64, Bytes)> = BTreeMap::new();
    for step in 0..200_u32 {
        // A deterministic mix of creations, changes and deletions, some of another resource.
        let key = format!("{PREFIX}{}", step * 7 % 23);
        if step % 11 == 0 {
            set(&*store, "/registry/core/pods/p", Some(&step.to_string())).await;
        }
        if step % 5 == 4 && state.contains_key(&key) {
            set(&*store, &key, None).await;
            state.remove(&key);
        } else {
            let value = step.to_string();
            let revision = set(&*store, &key, Some(&value)).await;
            state.insert(key, (revision, value.into()));
        }
        let (_, revision) = store.get("").await.unwrap();
        history.push((revision, state.clone()));
    }
    for (revision, state) in &history {
        for limit in [0, 1, 4] {
            assert_eq!(
                &all(&*store, Some(*revision), limit).await,
                state,
                "revision {revision}, limit {limit}"
            );
        }
    }
    let (newest, _) = history.last().unwrap();
    let future = Range {
        revision: Some(newest + 1),
        prefix: PREFIX.into(),
        ..Range::default()
    };
    let error = store.list(future).await.unwrap_err();
    assert!(
        matches!(error, StoreError::Future { current, .. } if current == *newest),
        "{error}"
    );
    let (middle, state) = &history[100];
    store.compact(*middle).await.unwrap();
    assert_eq!(&all(&*store, Some(*middle), 3).await, state);
    let gone = Range {
        revision: Some(middle - 1),
        prefix: PREFIX.into(),
        ..Range::default()
    };
    let error = store.list(gone).await.unwrap_err();
    assert!(
        matches!(error, StoreError::Compacted { compacted, .. } if compacted == *middle),
        "{error}"
    );
}

#[rstest]
#[tokio::test]
async fn watches_begin_anywhere_in_the_history_but_not_before_it(#[values("redb", "etcd")] kind: &str) {
    let (place, store) = store(kind).await;
    for step in 0..10 {
        set(&*store, &format!("{PREFIX}{step}"), Some("x")).await;
    }
    let (_, newest) = store.get("").await.unwrap();
    let mut watch = store.watch(PREFIX, newest - 3).await.unwrap();
    for revision in newest - 2..=newest {
        assert_eq!(next(&mut watch).await.unwrap().revision, revision);
    }
    assert_eq!(watch.progress(), Some(newest));
    store.compact(newest - 2).await.unwrap();
    assert!(store.watch(PREFIX, newest - 2).await.is_ok());
    let error = store.watch(PREFIX, newest - 3).await.err().unwrap();
    assert!(matches!(error, StoreError::Compacted { .. }), "{error}");
    let error = store.watch(PREFIX, newest + 1).await.err().unwrap();
    assert!(matches!(error, StoreError::Future { .. }), "{error}");
    drop(watch);
    drop(store);
    // After a restart the history comes from where it is kept.
    let store = place.open().await;
    let mut watch = store.watch(PREFIX, newest - 2).await.unwrap();
    assert_eq!(next(&mut watch).await.unwrap().revision, newest - 1);
    assert_eq!(next(&mut watch).await.unwrap().revision, newest);
    let error = store.watch(PREFIX, newest - 3).await.err().unwrap();
    assert!(matches!(error, StoreError::Compacted { .. }), "{error}");
}

#[rstest]
#[tokio::test]
async fn an_event_carries_both_states(#[values("redb", "etcd")] kind: &str) {
    let (_place, store) = store(kind).await;
    let key = &format!("{PREFIX}a");
    let mut watch = store.watch(PREFIX, 1).await.unwrap();
    let created = set(&*store, key, Some("1")).await;
    set(&*store, "/registry/core/pods/p", Some("other")).await;
    let changed = set(&*store, key, Some("2")).await;
    let deleted = set(&*store, key, None).await;
    let mut seen = Vec::new();
    for _ in 0..3 {
        let event = next(&mut watch).await.unwrap();
        seen.push((event.revision, event.value.clone(), event.previous.clone()));
    }
    let (one, two) = (Bytes::from("1"), Bytes::from("2"));
    let expected = vec![
        (created, Some(one.clone()), None),
        (changed, Some(two.clone()), Some((created, one))),
        (deleted, None, Some((changed, two))),
    ];
    assert_eq!(seen, expected);
}

/// Watchers that start at any time see every change after their start once and in order.
#[rstest]
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn watches_miss_nothing_while_others_write(#[values("redb", "etcd")] kind: &str) {
    const WRITERS: u64 = 4;
    const EACH: u64 = 400;
    let (_place, store) = store(kind).await;
    let start = newest(&*store).await;
    let mut tasks = Vec::new();
    for writer in 0..WRITERS {
        let store = Arc::clone(&store);
        tasks.push(tokio::spawn(async move {
            let mut written = Vec::new();
            for step in 0..EACH {
                let other = step % 3 == 0;
                let prefix = if other { "/registry/core/pods/" } else { PREFIX };
                let revision = set(&*store, &format!("{prefix}{writer}-{}", step % 5), Some("x")).await;
                if !other {
                    written.push(revision);
                }
            }
            written
        }));
    }
    let mut watchers = Vec::new();
    for round in 0..20_u64 {
        store.reached(round * WRITERS * EACH / 25 + 1).await.unwrap();
        let (_, from) = store.get("").await.unwrap();
        // Some start in the past, so that they have to catch up.
        let from = from.saturating_sub(round % 3 * 150).max(1);
        let mut watch = store.watch(PREFIX, from).await.unwrap();
        let store = Arc::clone(&store);
        watchers.push(tokio::spawn(async move {
            let end = start + WRITERS * EACH;
            store.reached(from + 1).await.unwrap();
            let mut seen = Vec::new();
            loop {
                if watch.progress().is_some_and(|progress| progress >= end) {
                    return (from, seen);
                }
                match tokio::time::timeout(Duration::from_millis(200), watch.next()).await {
                    Ok(event) => seen.push(event.unwrap().revision),
                    // Only other resources have changed meanwhile.
                    Err(_) => continue,
                }
            }
        }));
    }
    let mut written = Vec::new();
    for task in tasks {
        written.extend(task.await.unwrap());
    }
    written.sort_unstable();
    for watcher in watchers {
        let (from, seen) = watcher.await.unwrap();
        let expected: Vec<u64> = written
            .iter()
            .copied()
            .filter(|revision| *revision > from)
            .collect();
        assert_eq!(seen, expected, "from {from}");
    }
}

#[rstest]
#[tokio::test]
async fn a_slow_watcher_neither_blocks_nor_loses_until_compaction_overtakes_it(
    #[values("redb", "etcd")] kind: &str,
) {
    let (_place, store) = store(kind).await;
    let start = newest(&*store).await;
    let mut slow = store.watch(PREFIX, start).await.unwrap();
    let mut too_slow = store.watch(PREFIX, start).await.unwrap();
    // More than any buffer between the writer and a watcher holds.
    let value = "x".repeat(4096);
    for step in 0..700 {
        set(&*store, &format!("{PREFIX}{}", step % 3), Some(&value)).await;
    }
    let (_, newest) = store.get("").await.unwrap();
    for revision in start + 1..=newest {
        assert_eq!(next(&mut slow).await.unwrap().revision, revision);
    }
    store.compact(newest).await.unwrap();
    let error = next(&mut too_slow).await.unwrap_err();
    assert!(matches!(error, StoreError::Compacted { .. }), "{error}");
}

/// A watcher of quiet objects is not thrown out because other objects change a lot.
#[rstest]
#[tokio::test]
async fn compaction_does_not_overtake_a_watcher_that_has_nothing_to_see(
    #[values("redb", "etcd")] kind: &str,
) {
    let (_place, store) = store(kind).await;
    let mut quiet = store.watch(PREFIX, newest(&*store).await).await.unwrap();
    for step in 0..600 {
        set(&*store, "/registry/core/pods/p", Some(&step.to_string())).await;
    }
    let (_, newest) = store.get("").await.unwrap();
    store.compact(newest).await.unwrap();
    let revision = set(&*store, &format!("{PREFIX}a"), Some("x")).await;
    assert_eq!(next(&mut quiet).await.unwrap().revision, revision);
}

#[tokio::test]
async fn the_log_is_bounded() {
    let dir = tempfile::tempdir().unwrap();
    let options = Options {
        max_log: 100,
        ..Options::default()
    };
    let store = RedbStore::open(&dir.path().join("store"), options).unwrap();
    for step in 0..250 {
        set(&store, &format!("{PREFIX}{}", step % 3), Some("x")).await;
    }
    let (_, newest) = store.get("").await.unwrap();
    assert!(store.watch(PREFIX, newest - 70).await.is_ok());
    let error = store.watch(PREFIX, newest - 101).await.err().unwrap();
    assert!(matches!(error, StoreError::Compacted { .. }), "{error}");
}

/// Not a test of its own: what [`acknowledged_writes_survive_kill_9`] kills. Prints each write once it is acknowledged.
#[test]
fn crash_child() {
    let Some(path) = std::env::var_os(CRASH_FILE) else {
        return;
    };
    let store = Arc::new(open(&PathBuf::from(path)));
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .unwrap();
    runtime.block_on(async {
        let mut tasks = Vec::new();
        for writer in 0..8 {
            let store = Arc::clone(&store);
            tasks.push(tokio::spawn(async move {
                for step in 0_u64.. {
                    let key = format!("{PREFIX}{writer}-{}", step % 50);
                    let value = (step % 7 != 6).then(|| format!("{writer}/{step}"));
                    if value.is_none() && store.get(&key).await.unwrap().0.is_none() {
                        continue;
                    }
                    let revision = set(&*store, &key, value.as_deref()).await;
                    let line = format!("ack {key} {revision} {}\n", value.as_deref().unwrap_or("-"));
                    std::io::stdout().write_all(line.as_bytes()).unwrap();
                }
            }));
        }
        for task in tasks {
            task.await.unwrap();
        }
    });
}

#[test]
fn acknowledged_writes_survive_kill_9() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("store");
    let mut acknowledged: HashMap<String, (u64, String)> = HashMap::new();
    let mut newest = 0;
    for round in 1..=6 {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "crash_child", "--nocapture", "--test-threads=1"])
            .env(CRASH_FILE, &path)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut count = 0;
        let mut before = newest;
        // Every line that got out before the kill counts, also those that are read after it.
        for line in BufReader::new(child.stdout.take().unwrap()).lines() {
            let line = line.unwrap();
            let words: Vec<&str> = line.split_whitespace().collect();
            let [.., "ack", key, revision, value] = words[..] else {
                continue;
            };
            let revision: u64 = revision.parse().unwrap();
            before = before.max(revision);
            assert!(
                revision > newest,
                "revision {revision} after {newest}: revisions went back"
            );
            let entry = acknowledged.entry(key.to_owned()).or_default();
            if revision > entry.0 {
                *entry = (revision, value.to_owned());
            }
            count += 1;
            if count == round * 97 {
                child.kill().unwrap();
            }
        }
        child.wait().unwrap();
        assert!(
            count >= round * 97,
            "the child ended by itself after {count} writes"
        );
        let store = open(&path);
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .unwrap();
        runtime.block_on(async {
            let state = all(&store, None, 0).await;
            let (_, current) = store.get("").await.unwrap();
            assert!(
                current >= before,
                "the store is at {current}, {before} was acknowledged"
            );
            for (key, (revision, value)) in &acknowledged {
                match state.get(key) {
                    // A later write that was durable but not acknowledged any more.
                    Some((at, _)) if at > revision => {}
                    Some((at, found)) => assert_eq!((at, &found[..]), (revision, value.as_bytes()), "{key}"),
                    None if value == "-" => {}
                    // As above, a deletion: at most one such write per writer.
                    None => assert!(
                        value_is_before_deletion(value),
                        "{key} = {value} at {revision} is lost"
                    ),
                }
            }
            newest = current;
            for (key, (revision, value)) in state {
                acknowledged.insert(key, (revision, String::from_utf8(value.to_vec()).unwrap()));
            }
            let keys: Vec<String> = acknowledged.keys().cloned().collect();
            for key in keys {
                if store.get(&key).await.unwrap().0.is_none() {
                    acknowledged.insert(key, (current, "-".into()));
                }
            }
        });
    }
}

/// Whether the writer's next write of this key, 50 steps later, would be a deletion.
fn value_is_before_deletion(value: &str) -> bool {
    let step: u64 = value.split('/').nth(1).unwrap().parse().unwrap();
    (step + 50) % 7 == 6
}

/// Whoever watches misses nothing when etcd goes away and comes back, and hears when it was away for too long.
#[tokio::test(flavor = "multi_thread")]
async fn watches_go_on_when_etcd_comes_back() {
    let mut etcd = Etcd::start();
    let store = etcd.connect().await;
    let start = newest(&store).await;
    let mut watch = store.watch(PREFIX, start).await.unwrap();
    let first = set(&store, &format!("{PREFIX}a"), Some("1")).await;
    assert_eq!(next(&mut watch).await.unwrap().revision, first);
    etcd.restart();
    // Another one writes as soon as etcd is back, before the watch is.
    let other = etcd.connect().await;
    let second = set(&other, &format!("{PREFIX}b"), Some("2")).await;
    let event = next(&mut watch).await.unwrap();
    assert_eq!((event.revision, event.previous.clone()), (second, None));
    assert_eq!(newest(&store).await, second);
}

/// A file system of a few megabytes; unmounted on drop.
struct SmallDisk(tempfile::TempDir);

impl SmallDisk {
    fn new(options: &str) -> Self {
        let dir = tempfile::Builder::new()
            .prefix(&format!("bl{}", std::process::id()))
            .tempdir()
            .unwrap();
        let disk = Self(dir);
        let mounted = Command::new("mount")
            .args(["-t", "tmpfs", "-o", options, "beeline-test"])
            .arg(disk.0.path())
            .status()
            .unwrap();
        assert!(mounted.success(), "mounting needs root");
        disk
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        drop(Command::new("umount").arg("-l").arg(self.0.path()).status());
    }
}

/// A full disk is an error for whoever writes, not the end of the store: what was acknowledged is there and readable, and
/// writing goes on when there is room again.
#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_is_an_error_and_nothing_more() {
    let disk = SmallDisk::new("size=6m");
    let path = disk.0.path().join("store");
    let filler = disk.0.path().join("filler");
    let store = open(&path);
    let watching = newest(&store).await;
    let mut watch = store.watch(PREFIX, watching).await.unwrap();
    let mut acknowledged: BTreeMap<String, u64> = BTreeMap::new();
    let value = "x".repeat(20_000);
    std::fs::write(&filler, vec![0; 1 << 20]).unwrap();
    let error = loop {
        let key = format!("{PREFIX}{}", acknowledged.len());
        match store.write(put(&key, Expect::Absent, &value)).await {
            Ok(revision) => drop(acknowledged.insert(key, revision)),
            Err(error) => break error,
        }
        assert!(acknowledged.len() < 1000, "the disk does not fill up");
    };
    assert!(matches!(error, StoreError::Backend { .. }), "{error}");
    // Room again, as when an administrator cleans up.
    std::fs::remove_file(&filler).unwrap();
    let back = async {
        loop {
            if let Ok((Some(_), _)) = store.get(&format!("{PREFIX}0")).await {
                let after = put("/registry/core/pods/after", Expect::Absent, "1");
                if let Ok(revision) = store.write(after).await {
                    return revision;
                }
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    let after = tokio::time::timeout(Duration::from_secs(20), back).await.unwrap();
    assert!(acknowledged.values().all(|revision| *revision < after));
    let check = async |store: &dyn Store| {
        let found = all(store, None, 0).await;
        for (key, revision) in &acknowledged {
            assert_eq!(found.get(key).map(|found| found.0), Some(*revision), "{key}");
        }
        found.len()
    };
    // What failed may be there, but then whoever watches has seen it.
    let there = check(&store).await;
    for _ in 0..there {
        next(&mut watch).await.unwrap();
    }
    drop(watch);
    drop(store);
    assert_eq!(check(&open(&path)).await, there);
}
