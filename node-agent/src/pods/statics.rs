//! Pods that files of the node ask for. The API shows a mirror of each, which nobody has to create for them to run.

use std::collections::BTreeMap;
use std::fs;
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::path::{Path, PathBuf};

use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Pod, Toleration};
use kube::api::{DeleteParams, PostParams, Preconditions};
use kube::{Api, ResourceExt as _};
use tracing::{info, warn};

use super::Context;

const SOURCE: &str = "kubernetes.io/config.source";
const HASH: &str = "kubernetes.io/config.hash";
const SEEN: &str = "kubernetes.io/config.seen";
/// What tells a mirror: the uid of the pod that it shows.
pub(super) const MIRROR: &str = "kubernetes.io/config.mirror";

/// Whether a pod of the API only shows one that a file asks for.
pub(super) fn is_mirror(pod: &Pod) -> bool {
    pod.annotations().contains_key(MIRROR)
}

/// Whether a file asks for the pod.
pub(super) fn is_static(pod: &Pod) -> bool {
    pod.annotations()
        .get(SOURCE)
        .is_some_and(|source| source == "file")
}

/// The pods of a directory, by the file and its content.
#[derive(Default)]
pub(super) struct Files {
    dir: Option<PathBuf>,
    node: String,
    /// By uid. A file that cannot be understood has an entry, too, so that it is told of once.
    known: BTreeMap<String, Option<Pod>>,
}

/// What has changed.
#[derive(Default)]
pub(super) struct Changes {
    pub(super) new: Vec<Pod>,
    /// Uids.
    pub(super) gone: Vec<String>,
}

impl Files {
    pub(super) fn new(dir: Option<&Path>, node: &str) -> Self {
        Self {
            dir: dir.map(Path::to_owned),
            node: node.to_owned(),
            known: BTreeMap::new(),
        }
    }

    /// Looks at the directory again. One that cannot be read changes nothing: its pods go on.
    pub(super) fn look(&mut self) -> Changes {
        let mut changes = Changes::default();
        let Some(dir) = &self.dir else { return changes };
        let entries = match fs::read_dir(dir) {
            Ok(entries) => entries,
            Err(error) => {
                if error.kind() != std::io::ErrorKind::NotFound {
                    warn!(dir = %dir.display(), %error, "static pods");
                }
                return changes;
            }
        };
        let mut found = BTreeMap::new();
        for entry in entries.flatten() {
            let path = entry.path();
            // Editors' files, and those that are being written.
            if entry.file_name().to_string_lossy().starts_with('.') || !path.is_file() {
                continue;
            }
            let Ok(text) = fs::read(&path) else { continue };
            let uid = uid(&path, &text);
            let pod = match self.known.remove(&uid) {
                Some(known) => known,
                None => match parse(&text, &self.node, &uid) {
                    Ok(pod) => {
                        info!(path = %path.display(), pod = pod.name_any(), "static pod");
                        changes.new.push(pod.clone());
                        Some(pod)
                    }
                    Err(why) => {
                        warn!(path = %path.display(), why, "this is no pod");
                        None
                    }
                },
            };
            found.insert(uid, pod);
        }
        let gone = std::mem::replace(&mut self.known, found).into_iter();
        changes.gone = gone.filter_map(|(uid, pod)| pod.map(|_| uid)).collect();
        changes
    }
}

/// What tells a file with its content from others. After an update of this program it may be another: then the pod starts again.
fn uid(path: &Path, text: &[u8]) -> String {
    let half = |salt: u8| {
        let mut hasher = DefaultHasher::new();
        (salt, path, text).hash(&mut hasher);
        hasher.finish()
    };
    format!("{:016x}{:016x}", half(0), half(1))
}

/// A pod as kubelet completes it (`pkg/kubelet/config` `applyDefaults`).
fn parse(text: &[u8], node: &str, uid: &str) -> Result<Pod, String> {
    let text = std::str::from_utf8(text).map_err(|error| error.to_string())?;
    let mut pod: Pod = serde_saphyr::from_str(text).map_err(|error| error.to_string())?;
    let name = pod.metadata.name.clone().filter(|name| !name.is_empty());
    let name = name.ok_or("it has no name")?;
    let meta = &mut pod.metadata;
    meta.name = Some(format!("{name}-{}", node.to_ascii_lowercase()));
    meta.namespace.get_or_insert_with(|| "default".to_owned());
    meta.uid = Some(uid.to_owned());
    let annotations = meta.annotations.get_or_insert_default();
    annotations.insert(SOURCE.to_owned(), "file".to_owned());
    annotations.insert(HASH.to_owned(), uid.to_owned());
    annotations.insert(SEEN.to_owned(), Timestamp::now().to_string());
    let spec = pod.spec.as_mut().ok_or("it has no spec")?;
    if spec.containers.is_empty() {
        return Err("it has no containers".to_owned());
    }
    spec.node_name = Some(node.to_owned());
    spec.enable_service_links = Some(false);
    // It stays whatever taint the node gets.
    let everything = Toleration {
        effect: Some("NoExecute".to_owned()),
        operator: Some("Exists".to_owned()),
        ..Toleration::default()
    };
    spec.tolerations.get_or_insert_default().push(everything);
    Ok(pod)
}

/// Makes the API show the pod; whether it did not yet. What else has its name there, such as the mirror of an older file, is deleted.
pub(super) async fn show(context: &Context, pod: &Pod) -> Result<bool, kube::Error> {
    let namespace = pod.namespace().unwrap_or_default();
    let api: Api<Pod> = Api::namespaced(context.client.clone(), &namespace);
    let hash = pod.annotations().get(HASH);
    let there = api.get_opt(&pod.name_any()).await?;
    if let Some(there) = there {
        let ours = there.annotations().get(MIRROR) == hash && there.metadata.deletion_timestamp.is_none();
        if ours {
            return Ok(false);
        }
        hide(context, &there).await?;
    }
    let mut mirror = pod.clone();
    mirror.metadata.uid = None;
    mirror.status = None;
    if let (Some(hash), Some(annotations)) = (hash, &mut mirror.metadata.annotations) {
        annotations.insert(MIRROR.to_owned(), hash.clone());
    }
    api.create(&PostParams::default(), &mirror).await?;
    Ok(true)
}

/// Ends the mirror.
pub(super) async fn hide(context: &Context, mirror: &Pod) -> Result<(), kube::Error> {
    let namespace = mirror.namespace().unwrap_or_default();
    let api: Api<Pod> = Api::namespaced(context.client.clone(), &namespace);
    let now = DeleteParams::default()
        .grace_period(0)
        .preconditions(Preconditions {
            uid: mirror.uid().filter(|_| is_mirror(mirror)),
            resource_version: None,
        });
    match api.delete(&mirror.name_any(), &now).await {
        Err(kube::Error::Api(status)) if matches!(status.code, 404 | 409) => Ok(()),
        other => other.map(drop),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const POD: &str = "metadata: {name: web}\nspec: {containers: [{name: c, image: x}]}\n";

    #[test]
    fn a_file_is_a_pod_and_another_text_another_one() {
        let dir = tempfile::tempdir().unwrap();
        let mut files = Files::new(Some(dir.path()), "Node-1");
        assert!(files.look().new.is_empty());
        let path = dir.path().join("web.yaml");
        fs::write(&path, POD).unwrap();
        fs::write(dir.path().join("bad.yaml"), "spec: 1").unwrap();
        fs::write(dir.path().join(".web.yaml.swp"), POD).unwrap();
        let first = files.look().new.remove(0);
        assert_eq!(
            (first.name_any().as_str(), first.namespace().as_deref()),
            ("web-node-1", Some("default"))
        );
        assert!(is_static(&first) && !is_mirror(&first));
        let again = files.look();
        assert!(again.new.is_empty() && again.gone.is_empty());
        fs::write(&path, POD.replace("image: x", "image: y")).unwrap();
        let changed = files.look();
        assert_eq!((changed.new.len(), changed.gone), (1, vec![first.uid().unwrap()]));
        fs::remove_file(&path).unwrap();
        assert_eq!(files.look().gone, [changed.new[0].uid().unwrap()]);
    }

    #[test]
    fn what_is_no_pod_says_why() {
        for (text, why) in [
            ("x: [", ""),
            ("metadata: {name: x}", "no spec"),
            ("spec: {containers: []}", "no name"),
        ] {
            let error = parse(text.as_bytes(), "n", "u").unwrap_err();
            assert!(error.contains(why), "{text}: {error}");
        }
    }
}
