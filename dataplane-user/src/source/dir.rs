//! Objects from a directory of YAML and JSON files, for nodes without an API.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use dataplane_model::{Event, Problem};
use futures::StreamExt;
use inotify::{EventMask, Inotify, WatchMask};
use k8s_openapi::api::core::v1::{Node, Service};
use k8s_openapi::api::discovery::v1::EndpointSlice;
use k8s_openapi::api::networking::v1::ServiceCIDR;
use serde_json::Value;

use super::{Kind, Sender, Update};

/// How long the directory has to be quiet before it is read: an editor or a copy makes several changes.
const QUIET: Duration = Duration::from_millis(50);

/// How long it is waited for at the most.
const LONGEST: Duration = Duration::from_secs(1);

/// Kind, namespace, name.
type Key = (String, String, String);

/// The objects of one file.
///
/// As JSON text: parsed, an object takes ten times the memory.
type Objects = BTreeMap<Key, Box<str>>;

/// Reads the directory now and whenever something in it changes, until the receiver is gone.
///
/// # Errors
///
/// If the directory cannot be watched or listed.
pub async fn run(dir: PathBuf, sender: Sender) -> io::Result<()> {
    let inotify = Inotify::init()?;
    // A file counts when it has been written; a link when it has been made.
    let mask = WatchMask::CLOSE_WRITE
        | WatchMask::CREATE
        | WatchMask::DELETE
        | WatchMask::MOVED_FROM
        | WatchMask::MOVED_TO
        | WatchMask::DELETE_SELF;
    inotify.watches().add(&dir, mask)?;
    let mut changes = inotify.into_event_stream([0; 4096])?;
    let mut known: BTreeMap<PathBuf, Objects> = BTreeMap::new();
    // `None`: every file
    let mut changed: Option<BTreeSet<OsString>> = None;
    loop {
        let problems = scan(&dir, &mut known, changed.as_ref())?;
        for update in updates(&known, problems) {
            if sender.send(update).await.is_err() {
                return Ok(());
            }
        }
        let mut names = BTreeSet::new();
        let mut all = false;
        let mut note = |event: inotify::Event<OsString>| {
            let Some(name) = event.name else {
                // an overflow of the queue, or the end of the directory
                all = true;
                return;
            };
            let path = dir.join(&name);
            let link = fs::symlink_metadata(&path).is_ok_and(|meta| meta.is_symlink() || meta.nlink() > 1);
            if event.mask.contains(EventMask::CREATE) && !link {
                return;
            }
            // The files of a volume of Kubernetes are links through one that is replaced as a whole.
            all |= link && !is_objects(&path);
            names.insert(name);
        };
        tokio::select! {
            change = changes.next() => match change {
                Some(change) => note(change?),
                None => return Ok(()),
            },
            () = sender.closed() => return Ok(()),
        }
        let end = tokio::time::Instant::now() + LONGEST;
        while tokio::time::Instant::now() < end
            && let Ok(Some(change)) = tokio::time::timeout(QUIET, changes.next()).await
        {
            note(change?);
        }
        changed = (!all).then_some(names);
    }
}

/// Reads every file. A document that cannot be read is a problem; what its file held before and no longer names is kept,
/// so that a slip of the pen takes nothing away.
///
/// With `only`, just the files of these names are read again: one that is being written beside them is left alone.
fn scan(
    dir: &Path,
    known: &mut BTreeMap<PathBuf, Objects>,
    only: Option<&BTreeSet<OsString>>,
) -> io::Result<Vec<Problem>> {
    let mut problems = Vec::new();
    let paths: BTreeSet<PathBuf> = match only {
        Some(names) => names.iter().map(|name| dir.join(name)).collect(),
        None => {
            let listed = fs::read_dir(dir)?
                .map(|entry| Ok(entry?.path()))
                .collect::<io::Result<BTreeSet<_>>>()?;
            listed.into_iter().chain(known.keys().cloned()).collect()
        }
    };
    for path in paths {
        if !is_objects(&path) {
            continue;
        }
        let bytes = match fs::read(&path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                known.remove(&path);
                continue;
            }
            Err(error) => {
                problems.push(problem(&path, format!("cannot be read: {error}")));
                continue;
            }
        };
        let (mut objects, found, broken) = parse(&path, &String::from_utf8_lossy(&bytes));
        if broken {
            for (key, value) in known.remove(&path).into_iter().flatten() {
                objects.entry(key).or_insert(value);
            }
        }
        problems.extend(found);
        known.insert(path, objects);
    }
    Ok(problems)
}

/// True if the file's name says that it holds objects.
fn is_objects(path: &Path) -> bool {
    let extension = path.extension().and_then(|e| e.to_str());
    matches!(extension, Some("yaml" | "yml" | "json"))
}

fn problem(path: &Path, message: String) -> Problem {
    Problem {
        object: format!("file {}", path.display()),
        message,
    }
}

/// Splits a file into documents and these into objects; a List gives its items. Also says if something could not be read
/// that may have been an object.
fn parse(path: &Path, text: &str) -> (Objects, Vec<Problem>, bool) {
    let mut objects = Objects::new();
    let mut broken = false;
    let mut problems = Vec::new();
    for (number, document) in documents(text).into_iter().enumerate() {
        let number = number + 1;
        let value: Value = match serde_saphyr::from_str(&document) {
            Ok(value) => value,
            Err(error) => {
                let line = error.to_string().lines().next().unwrap_or_default().to_owned();
                problems.push(problem(path, format!("document {number}: {line}")));
                broken = true;
                continue;
            }
        };
        let items = match value {
            Value::Null => continue,
            Value::Object(mut map) if map.get("kind").is_some_and(|kind| kind == "List") => {
                match map.remove("items") {
                    Some(Value::Array(items)) => items,
                    _ => Vec::new(),
                }
            }
            value => vec![value],
        };
        for item in items {
            let field = |pointer| {
                item.pointer(pointer)
                    .and_then(Value::as_str)
                    .unwrap_or_default()
                    .to_owned()
            };
            let kind = field("/kind");
            let namespace = match field("/metadata/namespace") {
                // as kubectl does with the default context
                empty if empty.is_empty() => "default".into(),
                namespace => namespace,
            };
            let key = (kind, namespace, field("/metadata/name"));
            if key.2.is_empty() {
                problems.push(problem(
                    path,
                    format!("document {number}: {:?} without metadata.name", key.0),
                ));
                broken = true;
                continue;
            }
            match objects.entry(key) {
                Entry::Vacant(entry) => {
                    entry.insert(item.to_string().into());
                }
                Entry::Occupied(entry) => {
                    let (kind, namespace, name) = entry.key();
                    problems.push(problem(
                        path,
                        format!("document {number}: {kind} {namespace}/{name} again; the first is used"),
                    ));
                }
            }
        }
    }
    (objects, problems, broken)
}

/// The documents of a YAML stream. Split by hand, so that a bad one does not take the others with it.
fn documents(text: &str) -> Vec<String> {
    let mut out = vec![String::new()];
    for line in text.lines() {
        if line == "---" || line.starts_with("--- ") {
            out.push(line.strip_prefix("---").unwrap_or_default().trim().to_owned());
        } else if let Some(last) = out.last_mut() {
            last.push_str(line);
        }
        if let Some(last) = out.last_mut() {
            last.push('\n');
        }
    }
    out.retain(|document| {
        !document
            .lines()
            .all(|line| line.trim().is_empty() || line.trim().starts_with('#'))
    });
    out
}

/// Complete lists of everything known. Of an object in two files the one of the first file is used.
fn updates(files: &BTreeMap<PathBuf, Objects>, mut problems: Vec<Problem>) -> Vec<Update> {
    let mut owner: BTreeMap<&Key, &Path> = BTreeMap::new();
    let (mut services, mut slices, mut nodes, mut ranges) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for (path, objects) in files {
        for (key, value) in objects {
            if let Some(first) = owner.get(key) {
                let (kind, namespace, name) = key;
                let message = format!(
                    "is in {} and in {}; the first is used",
                    first.display(),
                    path.display()
                );
                problems.push(Problem {
                    object: format!("{kind} {namespace}/{name}"),
                    message,
                });
                continue;
            }
            owner.insert(key, path);
            let read = match key.0.as_str() {
                "Service" => object(key, value).map(|o: Service| services.push(o)),
                "EndpointSlice" => object(key, value).map(|o: EndpointSlice| slices.push(o)),
                "Node" => object(key, value).map(|o: Node| nodes.push(o)),
                "ServiceCIDR" => object(key, value).map(|o: ServiceCIDR| ranges.push(o)),
                other => Err(Problem {
                    object: format!("{other} {}/{}", key.1, key.2),
                    message: format!(
                        "in {}: Beeline uses Service, EndpointSlice, Node and ServiceCIDR only",
                        path.display()
                    ),
                }),
            };
            problems.extend(read.err());
        }
    }
    let mut out: Vec<Update> = problems.into_iter().map(Update::Problem).collect();
    out.push(Update::Event(Event::NodesReplaced(nodes)));
    out.push(Update::Event(Event::ServiceCidrsReplaced(ranges)));
    out.push(Update::Event(Event::ServicesReplaced(services)));
    out.push(Update::Event(Event::SlicesReplaced(slices)));
    out.extend([Kind::Node, Kind::ServiceCidr, Kind::Service, Kind::EndpointSlice].map(Update::Listed));
    out
}

fn object<K>(key: &Key, text: &str) -> Result<K, Problem>
where
    K: serde::de::DeserializeOwned
        + k8s_openapi::Metadata<Ty = k8s_openapi::apimachinery::pkg::apis::meta::v1::ObjectMeta>,
{
    let (kind, namespace, name) = key;
    let mut object: K = serde_json::from_str(text).map_err(|error| Problem {
        object: format!("{kind} {namespace}/{name}"),
        message: format!("cannot be read: {error}"),
    })?;
    object.metadata_mut().namespace = Some(namespace.clone());
    Ok(object)
}

#[cfg(test)]
mod tests {
    use tokio::sync::mpsc;

    use super::*;

    const SERVICE: &str = "apiVersion: v1\nkind: Service\nmetadata: {name: a}\nspec: {clusterIP: 10.0.0.1, ports: [{port: 80}]}\n";

    #[test]
    fn a_bad_document_is_named_and_the_others_are_used() {
        let text = format!(
            "# nothing here\n---\n{SERVICE}---\nkind: [\n---\nkind: Node\nmetadata: {{}}\n--- \n{{\"kind\": \"List\", \"items\": [{{\"kind\": \"Node\", \"metadata\": {{\"name\": \"n\"}}}}]}}\n"
        );
        let (objects, problems, broken) = parse(Path::new("x.yaml"), &text);
        let names: Vec<&str> = objects.keys().map(|key| key.2.as_str()).collect();
        assert_eq!(names, ["n", "a"]);
        assert!(broken);
        assert_eq!(problems.len(), 2, "{problems:?}");
        assert!(problems[0].message.starts_with("document 2: "), "{problems:?}");
        assert_eq!(problems[1].message, "document 3: \"Node\" without metadata.name");
    }

    #[tokio::test]
    async fn changes_are_seen_and_a_slip_takes_nothing_away() {
        let dir = tempfile::tempdir().unwrap();
        let (sender, mut receiver) = mpsc::channel(64);
        let task = tokio::spawn(run(dir.path().to_owned(), sender));
        /// Names of the next list of Services, and the problems before it.
        async fn next(receiver: &mut mpsc::Receiver<Update>) -> (Vec<String>, Vec<String>) {
            let (mut names, mut problems) = (Vec::new(), Vec::new());
            loop {
                match receiver.recv().await.unwrap() {
                    Update::Event(Event::ServicesReplaced(list)) => {
                        names = list.into_iter().filter_map(|s| s.metadata.name).collect();
                    }
                    Update::Problem(problem) => problems.push(problem.to_string()),
                    Update::Listed(Kind::EndpointSlice) => return (names, problems),
                    _ => {}
                }
            }
        }
        assert_eq!(next(&mut receiver).await, (vec![], vec![]));
        let file = dir.path().join("a.yaml");
        fs::write(&file, SERVICE).unwrap();
        assert_eq!(next(&mut receiver).await.0, ["a"]);
        // an atomic replacement, as editors and configuration management do it
        fs::write(dir.path().join(".new"), SERVICE.replace("name: a", "name: b")).unwrap();
        fs::rename(dir.path().join(".new"), &file).unwrap();
        while next(&mut receiver).await.0 != ["b"] {}
        fs::write(&file, "kind: [\n").unwrap();
        let (names, problems) = next(&mut receiver).await;
        assert_eq!(names, ["b"]);
        assert!(
            problems.len() == 1 && problems[0].contains("a.yaml"),
            "{problems:?}"
        );
        // the same object twice
        fs::write(
            dir.path().join("z.json"),
            r#"{"kind":"Service","metadata":{"name":"b"},"spec":{"ports":[{"port":"x"}]}}"#,
        )
        .unwrap();
        let (names, problems) = next(&mut receiver).await;
        assert_eq!(names, ["b"]);
        assert!(
            problems
                .iter()
                .any(|p| p.contains("a.yaml") && p.contains("z.json")),
            "{problems:?}"
        );
        // alone, it is found to be wrong and named
        fs::remove_file(&file).unwrap();
        let (names, problems) = next(&mut receiver).await;
        assert_eq!(names, [""; 0]);
        assert!(
            problems[0].starts_with("Service default/b: cannot be read"),
            "{problems:?}"
        );
        drop(receiver);
        task.await.unwrap().unwrap();
    }

    #[test]
    fn the_same_object_twice_in_a_file_is_named() {
        let (objects, problems, broken) = parse(Path::new("x.yaml"), &format!("{SERVICE}---\n{SERVICE}"));
        assert_eq!(objects.len(), 1);
        assert!(!broken, "nothing is lost");
        assert_eq!(
            problems[0].to_string(),
            problem(
                Path::new("x.yaml"),
                "document 2: Service default/a again; the first is used".into()
            )
            .to_string()
        );
    }

    /// As kubelet does it: `a.yaml -> ..data/a.yaml`, `..data -> ..1`, and `..data` is replaced by a rename.
    #[tokio::test]
    async fn a_volume_of_a_config_map_is_followed() {
        async fn until(receiver: &mut mpsc::Receiver<Update>, wanted: &[&str]) {
            let wait = async {
                loop {
                    let update = receiver.recv().await.unwrap();
                    if let Update::Event(Event::ServicesReplaced(list)) = update {
                        let names: Vec<_> = list.into_iter().filter_map(|s| s.metadata.name).collect();
                        if names == wanted {
                            return;
                        }
                    }
                }
            };
            tokio::time::timeout(Duration::from_secs(10), wait).await.unwrap();
        }
        use std::os::unix::fs::symlink;
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        for (version, name) in [("..1", "a"), ("..2", "b")] {
            fs::create_dir(at(version)).unwrap();
            let text = SERVICE.replace("name: a", &format!("name: {name}"));
            fs::write(at(version).join("a.yaml"), text).unwrap();
        }
        symlink("..1", at("..data")).unwrap();
        let (sender, mut receiver) = mpsc::channel(64);
        let task = tokio::spawn(run(dir.path().to_owned(), sender));
        until(&mut receiver, &[]).await;
        symlink("..data/a.yaml", at("a.yaml")).unwrap();
        until(&mut receiver, &["a"]).await;
        symlink("..2", at("..data_tmp")).unwrap();
        fs::rename(at("..data_tmp"), at("..data")).unwrap();
        until(&mut receiver, &["b"]).await;
        drop(receiver);
        task.await.unwrap().unwrap();
    }
}
